"""A page is free, held or cached, never two of them; what cannot be done changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from slotwise.core.errors import LedgerError, OutOfPages
from slotwise.slots.pages import NOBODY, ROOT, SCRATCH_PAGE, PageCount, PagePool


def _state(pool: PagePool) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in vars(pool).items()}


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return all(
        bool((after[name] == value).all()) if hasattr(value, "all") else after[name] == value
        for name, value in before.items()
    )


def _published(pool: PagePool, *prefix: tuple[int, ...], lane: int = 0) -> list[int]:
    parent, pages = ROOT, []
    for ordinal, tokens in enumerate(prefix):
        page = pool.take(lane, ordinal)
        parent = pool.publish(page, parent, tokens)
        pages.append(page)
    return pages


def test_the_scratch_page_is_never_given_out() -> None:
    pool = PagePool(5, 4)
    assert sorted(pool.take(0, i) for i in range(5)) == [1, 2, 3, 4, 5]
    assert pool.owner[SCRATCH_PAGE] == NOBODY
    assert pool.count() == PageCount(5, 0, 5, 0)


def test_a_published_page_survives_its_holder_and_is_found_by_its_tokens() -> None:
    pool = PagePool(4, 2)
    pages = _published(pool, (1, 2), (3, 4))
    for page in reversed(pages):
        pool.give_back(page, 0)
    assert pool.count() == PageCount(4, 2, 0, 2)
    assert pool.find_prefix([1, 2, 3, 4, 5], 9) == pages
    assert pool.find_prefix([1, 2, 3, 4, 5], 1) == pages[:1]
    assert pool.find_prefix([1, 2, 3], 9) == pages[:1]
    assert pool.find_prefix([3, 4], 9) == []
    pool.share(pages)
    assert pool.count() == PageCount(4, 2, 2, 0)


def test_nobody_may_write_a_published_page() -> None:
    pool = PagePool(2, 2)
    (page,) = _published(pool, (1, 2))
    assert pool.owner[page] == NOBODY


def test_the_same_prefix_is_kept_once_and_its_continuation_is_found_behind_it() -> None:
    pool = PagePool(4, 1)
    first = _published(pool, (7,))
    second = _published(pool, (7,), (8,), lane=1)
    assert pool.owner[second[0]] == 1, "the second page for one prefix stays private"
    assert pool.find_prefix([7, 8], 9) == [first[0], second[1]]


def test_cached_pages_are_evicted_when_free_ones_are_gone_and_only_then() -> None:
    pool = PagePool(2, 1)
    (page,) = _published(pool, (7,))
    pool.give_back(page, 0)
    other = pool.take(1, 0)
    assert pool.find_prefix([7], 9) == [page]
    assert pool.take(1, 1) == page != other
    assert pool.find_prefix([7], 9) == []
    assert pool.count() == PageCount(2, 0, 2, 0)


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = PagePool(2, 1)
    pages = _published(pool, (7,), (8,))
    for page in reversed(pages):
        pool.give_back(page, 0)
    assert pool.take(1, 0) == pages[1]
    assert pool.find_prefix([7, 8], 9) == pages[:1]


@pytest.mark.parametrize(
    ("action", "error", "text"),
    [
        (lambda pool: pool.give_back(4, 0), LedgerError, "page 4 was given back by lane 0, but nobody holds it"),
        (lambda pool: pool.give_back(SCRATCH_PAGE, 0), LedgerError, "page 0 was given back"),
        (lambda pool: pool.publish(2, ROOT, (1,)), LedgerError, "holds 1 of 2 tokens; only full pages are shared"),
        (lambda pool: pool.share([1, 2]), LedgerError, "page 2 cannot be shared: only published pages are"),
        (lambda pool: pool.share([4]), LedgerError, "page 4 cannot be shared"),
    ],
    ids=["free", "scratch", "partial", "unpublished after a published one", "free shared"],
)
def test_what_is_refused_changes_nothing(
    action: Callable[[PagePool], object], error: type[Exception], text: str
) -> None:
    pool = PagePool(4, 2)
    _published(pool, (1, 2))
    pool.take(0, 1)
    before = _state(pool)
    with pytest.raises(error, match=text):
        action(pool)
    assert _same(before, _state(pool))


def test_an_exhausted_pool_says_so() -> None:
    pool = PagePool(1, 2)
    pool.take(0, 0)
    with pytest.raises(OutOfPages, match="all 1 pages are held"):
        pool.take(1, 0)
    assert pool.count() == PageCount(1, 0, 1, 0)


def test_a_withdrawn_page_is_not_found_again_until_it_is_given_out_anew() -> None:
    pool = PagePool(2, 1)
    (page,) = _published(pool, (7,))
    pool.share([page])
    pool.withdraw(page)
    assert pool.find_prefix([7], 9) == []
    pool.publish(page, ROOT, (7,))  # by the other holder, who knows nothing of it
    assert pool.find_prefix([7], 9) == []
    pool.give_back(page, 0)
    pool.give_back(page, 1)
    assert pool.take(0, 0) == page
    pool.publish(page, ROOT, (7,))
    assert pool.find_prefix([7], 9) == [page]
