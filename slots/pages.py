"""Pages of one role's cache: who holds them, which are cached for reuse, which are free.

Owns `PagePool`. What always holds: page 0 is scratch, belongs to nobody and is never given out; every other page is
exactly one of free, held (by one sequence, or shared by several) or cached (published, held by none, evictable); only
full pages of committed tokens are published. Prefixes are keyed by their tokens, not by a hash, so two prefixes never
collide.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slotwise.core.errors import LedgerError, OutOfPages

SCRATCH_PAGE = 0
NOBODY = -1
"""Owner of a page that is not exclusively one lane's; an owner, not a slot: it never reaches a kernel."""

ROOT = 0
"""The prefix of no tokens, parent of every first page."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PageCount:
    """How many pages are in each state; `total` leaves out the scratch page."""

    total: int
    free: int
    held: int
    cached: int


class PagePool:
    """`pages` usable pages and the scratch page, for up to `lanes` sequences.

    `owner[page]` is the lane that alone may write the page, `ordinal[page]` its place in that lane's sequence,
    `references[page]` how many lanes hold it. Every method either does all it says or raises and changes nothing.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.total = pages
        self.page_size = page_size
        self.references = np.zeros(pages + 1, np.int64)
        self.owner = np.full(pages + 1, NOBODY, np.int64)
        self.ordinal = np.zeros(pages + 1, np.int64)
        self._free = list(range(pages, 0, -1))
        # A published page is known by its prefix node: (parent node, its tokens) -> node.
        self._node_of_page: dict[int, int] = {}
        self._page_of_node: dict[int, int] = {}
        self._nodes: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key_of_node: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._next_node = ROOT + 1
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._withdrawn: set[int] = set()

    @staticmethod
    def table_bytes(pages: int) -> int:
        """Bytes of a pool's arrays and of its list of free pages, an object of 32 bytes for each."""
        return 3 * 8 * (pages + 1) + (8 + 32) * pages

    @property
    def available(self) -> int:
        """Pages that can be given out now: free ones, and cached ones that can be evicted."""
        return len(self._free) + len(self._cached)

    def take(self, lane: int, ordinal: int) -> int:
        """Give a page to `lane` as its page number `ordinal`; raises OutOfPages when there is none."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self._unpublish(page)
        else:
            raise OutOfPages(f"all {self.total} pages are held; none is free or cached")
        self._withdrawn.discard(page)
        self.references[page] = 1
        self.owner[page] = lane
        self.ordinal[page] = ordinal
        return page

    def give_back(self, page: int, lane: int) -> None:
        """`lane` lets go of `page`; a published page stays cached, any other becomes free."""
        if page == SCRATCH_PAGE or self.references[page] < 1:
            raise LedgerError(f"page {page} was given back by lane {lane}, but nobody holds it")
        self.references[page] -= 1
        if self.references[page]:
            return
        self.owner[page] = NOBODY
        if page in self._node_of_page:
            self._cached[page] = None
        else:
            self._free.append(page)

    def find_prefix(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Pages that hold the longest published prefix of `tokens`, at most `limit` pages; nothing is changed."""
        node, found, size = ROOT, [], self.page_size
        for start in range(0, min(len(tokens) // size, limit) * size, size):
            child = self._nodes.get((node, tuple(tokens[start : start + size])))
            if child is None or child not in self._page_of_node:
                break
            node = child
            found.append(self._page_of_node[child])
        return found

    def share(self, pages: Sequence[int]) -> None:
        """One more holder for each of `pages` (found by `find_prefix`); raises LedgerError for one not published."""
        for page in pages:
            if page not in self._node_of_page:
                raise LedgerError(f"page {page} cannot be shared: only published pages are")
        for page in pages:
            self._cached.pop(page, None)
            self.references[page] += 1

    def publish(self, page: int, parent: int, tokens: tuple[int, ...]) -> int:
        """Let others find `page`, which holds the committed `tokens` after the prefix node `parent`; returns its node.

        When another page already stands for the same prefix, that one stays and `page` remains private. The page can no
        longer be written by anyone.
        """
        if len(tokens) != self.page_size:
            raise LedgerError(f"page {page} holds {len(tokens)} of {self.page_size} tokens; only full pages are shared")
        key = (parent, tokens)
        node = self._nodes.get(key)
        if node is None:
            node = self._next_node
            self._next_node += 1
            self._nodes[key], self._key_of_node[node] = node, key
        if node not in self._page_of_node and page not in self._node_of_page and page not in self._withdrawn:
            self._page_of_node[node], self._node_of_page[page] = page, node
            self.owner[page] = NOBODY
        return node

    def withdraw(self, page: int) -> None:
        """Let nobody find the held `page` any more, until it is given out anew; its holders keep it."""
        self._withdrawn.add(page)
        if page in self._node_of_page:
            self._unpublish(page)

    def count(self) -> PageCount:
        """Pages in each state, counted anew from the pages themselves."""
        held = int(np.count_nonzero(self.references[1:]))
        return PageCount(self.total, len(self._free), held, len(self._cached))

    @property
    def cached(self) -> tuple[int, ...]:
        """Pages that are published and held by nobody, the one to be evicted first in front."""
        return tuple(self._cached)

    def _unpublish(self, page: int) -> None:
        node = self._node_of_page.pop(page)
        del self._page_of_node[node]
        # The node's name goes too: its children are unreachable from then on and age out of the cache by themselves.
        del self._nodes[self._key_of_node.pop(node)]
