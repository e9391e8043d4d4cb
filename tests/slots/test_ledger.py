"""Every slot is accounted for, whatever sequences do.

The state machine opens, reserves, commits, publishes, shares and closes at random, beside a model that keeps plain
lists of tokens, and compares every mark, page and equation after every step.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slotwise.core.errors import LedgerError, OutOfPages
from slotwise.slots.ledger import Ledger, RoleLedger
from slotwise.slots.pages import NOBODY, SCRATCH_PAGE

LANES, CAPACITY = 4, 20


def _lanes(*lanes: int) -> Any:
    return np.array(lanes, np.int64)


def _state(ledger: RoleLedger) -> dict[str, Any]:
    """Everything the ledger and its pool hold."""
    flat = {**vars(ledger), **{f"pool.{name}": value for name, value in vars(ledger.pool).items()}}
    del flat["pool"]
    return {name: copy.deepcopy(value) for name, value in flat.items()}


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return all(
        np.array_equal(value, after[name]) if isinstance(value, np.ndarray) else value == after[name]
        for name, value in before.items()
    )


class LedgerMachine(RuleBasedStateMachine):
    """`tokens[lane]` are the committed tokens of an open lane, `reserved[lane]` where its reservation ends."""

    @initialize(page_size=st.sampled_from((1, 3, 16)), pages=st.integers(2, 24))
    def start(self, page_size: int, pages: int) -> None:
        self.ledger = RoleLedger("target", lanes=LANES, capacity=CAPACITY, page_size=page_size, pages=pages)
        self.size = page_size
        self.tokens: dict[int, list[int]] = {}
        self.reserved: dict[int, int] = {}
        self.contents: dict[int, int] = {}  # slot -> the token written there last
        self.flow = [0, 0, 0]
        self.step = 0

    def _written(self, lane: int, begin: int, end: int) -> list[int]:
        return [int(slot) for slot in self.ledger.slots(lane, begin, end)]

    @precondition(lambda self: len(self.tokens) < LANES)
    @rule(prompt=st.lists(st.integers(0, 1), max_size=CAPACITY), limit=st.integers(0, CAPACITY))
    def open(self, prompt: list[int], limit: int) -> None:
        lane = next(lane for lane in range(LANES) if lane not in self.tokens)
        pages = self.ledger.pool.find_prefix(prompt, limit)
        self.ledger.open(lane, pages)
        shared = len(pages) * self.size
        held = [self.contents[slot] for slot in self._written(lane, 0, shared)]
        assert held == prompt[:shared], "the prefix that was found does not hold the tokens asked for"
        self.tokens[lane], self.reserved[lane] = prompt[:shared], shared

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        lanes = sorted(data.draw(st.sets(st.sampled_from(sorted(self.tokens)), min_size=1)))
        ends = [data.draw(st.integers(self.reserved[lane], CAPACITY)) for lane in lanes]
        missing = sum(
            -(-end // self.size) - -(-self.reserved[lane] // self.size) for lane, end in zip(lanes, ends, strict=True)
        )
        before = _state(self.ledger)
        short = self.ledger.pages_short(_lanes(*lanes), _lanes(*ends))
        assert int(short.sum()) == missing
        if missing > self.ledger.pool.available:
            with pytest.raises(OutOfPages, match="pages are needed for lanes"):
                self.ledger.reserve(_lanes(*lanes), _lanes(*ends))
            assert _same(before, _state(self.ledger))
            return
        held = {int(page) for lane in self.tokens for page in self._pages(lane)}
        self.ledger.reserve(_lanes(*lanes), _lanes(*ends))
        for lane, end in zip(lanes, ends, strict=True):
            self.flow[0] += end - self.reserved[lane]
            self.reserved[lane] = end
        taken = {int(page) for lane in self.tokens for page in self._pages(lane)} - held
        assert len(taken) == missing, "a page that somebody holds was given out"

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        lanes = sorted(data.draw(st.sets(st.sampled_from(sorted(self.tokens)), min_size=1)))
        ends = []
        for lane in lanes:
            begin, end = len(self.tokens[lane]), self.reserved[lane]
            new = data.draw(st.lists(st.integers(0, 1), min_size=end - begin, max_size=end - begin))
            for slot, token in zip(self._written(lane, begin, end), new, strict=True):
                self.contents[slot] = token
            keep = data.draw(st.integers(begin, end))
            ends.append(keep)
            self.tokens[lane] += new[: keep - begin]
            self.flow[1] += keep - begin
            self.flow[2] += end - keep
            self.reserved[lane] = keep
        self.ledger.commit(_lanes(*lanes), _lanes(*ends))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        lane = data.draw(st.sampled_from(sorted(self.tokens)))
        upto = data.draw(st.integers(0, CAPACITY))
        self.ledger.publish(lane, self.tokens[lane], upto)
        full = min(upto, len(self.tokens[lane])) // self.size
        # Fewer may be found: where another lane's page stood for the same tokens, and has been evicted since.
        assert len(self.ledger.pool.find_prefix(self.tokens[lane], full)) <= full

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        lane = data.draw(st.sampled_from(sorted(self.tokens)))
        self.flow[2] += self.reserved[lane] - len(self.tokens[lane])
        del self.tokens[lane], self.reserved[lane]
        self.ledger.close(lane)

    def _pages(self, lane: int) -> list[int]:
        return [int(page) for page in self.ledger.page_table[lane, : self.ledger.page_count[lane]]]

    @invariant()
    def balances(self) -> None:
        self.step += 1
        count, flow = self.ledger.pool.count(), self.ledger.flow
        assert count.free + count.held + count.cached == count.total == self.ledger.pool.total
        assert [flow.reserved, flow.committed, flow.released] == self.flow
        if all(self.reserved[lane] == len(tokens) for lane, tokens in self.tokens.items()):
            assert self.ledger.check(self.step) == count

    @invariant()
    def marks_and_tables_are_the_models(self) -> None:
        for lane in range(LANES):
            assert bool(self.ledger.is_open[lane]) == (lane in self.tokens)
            assert self.ledger.committed[lane] == len(self.tokens.get(lane, ()))
            assert self.ledger.reserved[lane] == self.reserved.get(lane, 0)
            assert self.ledger.page_count[lane] == -(-self.reserved.get(lane, 0) // self.size)
            table = self.ledger.page_table[lane]
            assert SCRATCH_PAGE not in table[: self.ledger.page_count[lane]]
            assert (table[self.ledger.page_count[lane] :] == SCRATCH_PAGE).all()

    @invariant()
    def what_is_written_next_is_the_lanes_alone(self) -> None:
        pool, holders = self.ledger.pool, {}
        for lane in self.tokens:
            for ordinal, page in enumerate(self._pages(lane)):
                holders.setdefault(page, []).append(lane)
                if ordinal * self.size >= len(self.tokens[lane]) - len(self.tokens[lane]) % self.size:
                    assert pool.owner[page] == lane
                if pool.owner[page] != NOBODY:
                    assert (pool.owner[page], pool.ordinal[page]) == (lane, ordinal)
        for page in range(1, pool.total + 1):
            assert pool.references[page] == len(holders.get(page, ()))
            if len(holders.get(page, ())) != 1:
                assert pool.owner[page] == NOBODY, "a page of several lanes, or of none, can be written"

    @invariant()
    def committed_tokens_are_where_the_table_says(self) -> None:
        for lane, tokens in self.tokens.items():
            assert [self.contents[slot] for slot in self._written(lane, 0, len(tokens))] == tokens


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def _open(capacity: int = 10, pages: int = 4, page_size: int = 3) -> RoleLedger:
    ledger = RoleLedger("target", lanes=2, capacity=capacity, page_size=page_size, pages=pages)
    ledger.open(0)
    ledger.reserve(_lanes(0), _lanes(5))
    ledger.commit(_lanes(0), _lanes(4))
    ledger.reserve(_lanes(0), _lanes(6))
    return ledger


REFUSED = {
    "opened twice": (lambda ledger: ledger.open(0), LedgerError, "lane 0 is opened twice"),
    "prefix beyond capacity": (lambda ledger: ledger.open(1, [1] * 4), LedgerError, "a prefix of 4 pages"),
    "unpublished prefix": (lambda ledger: ledger.open(1, [1]), LedgerError, "page 1 cannot be shared"),
    "commit beyond what is reserved": (
        lambda ledger: ledger.commit(_lanes(0), _lanes(7)), LedgerError, r"cannot commit up to \[7\].*reserved \[6\]"
    ),
    "commit below what is committed": (
        lambda ledger: ledger.commit(_lanes(0), _lanes(3)), LedgerError, r"commit up to \[3\].*committed are \[4\]"
    ),
    "reserve beyond capacity": (
        lambda ledger: ledger.reserve(_lanes(0), _lanes(11)), LedgerError, "the capacity is 10"
    ),
    "reserve backwards": (lambda ledger: ledger.reserve(_lanes(0), _lanes(5)), LedgerError, r"their marks are \[6\]"),
    "reserve for a closed lane": (
        lambda ledger: ledger.reserve(_lanes(0, 1), _lanes(6, 1)), LedgerError, r"open are \[True, False\]"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case: str) -> None:
    action, error, text = REFUSED[case]
    ledger = _open()
    before = _state(ledger)
    with pytest.raises(error, match=text):
        action(ledger)
    assert _same(before, _state(ledger))


def test_pages_run_out_for_all_lanes_of_a_call_or_for_none() -> None:
    ledger = _open(pages=3)
    ledger.open(1)
    before = _state(ledger)
    with pytest.raises(OutOfPages, match=r"target: 2 pages are needed for lanes \[1\], 1 of 3 are free or cached"):
        ledger.reserve(_lanes(0, 1), _lanes(6, 4))
    assert _same(before, _state(ledger))


def test_a_pool_that_fails_half_way_leaves_no_page_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = RoleLedger("target", lanes=2, capacity=10, page_size=3, pages=8)
    ledger.open(0)
    ledger.open(1)
    take = ledger.pool.take

    def fail_late(lane: int, ordinal: int) -> int:
        if (lane, ordinal) == (1, 1):
            raise OutOfPages("planted")
        return take(lane, ordinal)

    monkeypatch.setattr(ledger.pool, "take", fail_late)
    with pytest.raises(OutOfPages, match="planted"):
        ledger.reserve(_lanes(0, 1), _lanes(10, 6))
    assert ledger.check(1).free == 8
    assert not ledger.page_count.any()
    assert not ledger.page_table.any()
    assert not ledger.reserved.any()


def test_closing_releases_the_reservation_and_closing_again_does_nothing() -> None:
    ledger = _open()
    ledger.close(0)
    ledger.close(0)
    assert (ledger.flow.reserved, ledger.flow.committed, ledger.flow.released) == (7, 4, 3)
    assert ledger.check(1).free == 4


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda ledger: ledger.pool._free.pop(), r"step 9: free \+ held \+ cached != total for role target"),
        (lambda ledger: setattr(ledger.flow, "released", 7), r"step 9: reserved != committed \+ released"),
    ],
)
def test_an_equation_that_fails_names_the_step_and_prints_the_ledger(break_it: Any, text: str) -> None:
    ledger = _open()
    ledger.commit(_lanes(0), _lanes(6))
    both = Ledger([RoleLedger("draft", lanes=1, capacity=1, page_size=1, pages=1), ledger])
    both.check(8)
    break_it(ledger)
    with pytest.raises(LedgerError, match=text) as caught:
        both.check(9)
    assert "lane 0: committed 6 reserved 6 pages [1, 2]" in str(caught.value)


def test_a_reservation_not_yet_resolved_does_not_balance() -> None:
    with pytest.raises(LedgerError, match="reserved 7, committed 4, released 1"):
        _open().check(3)


def test_roles_are_closed_together() -> None:
    ledger = Ledger([_open(), RoleLedger("draft", lanes=2, capacity=4, page_size=1, pages=4)])
    ledger["draft"].open(0)
    ledger.close(0)
    assert not ledger["target"].is_open.any()
    assert not ledger["draft"].is_open.any()
    assert "draft" in ledger
    assert "verifier" not in ledger
