"""Plans that fit: the largest capacity, pool or number of sequences within a budget, from headers alone.

Owns `Subject`, `fit`, `refuse`, `alternatives` and `survey`. What always holds: what is found fits, and one more of it
does not; every number comes from a compiled plan, none from a formula beside it. Memory grows nearly evenly with what
is sought, so a search asks outlines of plans where the number should lie, and only then whole plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from slotwise.core.errors import PlanError
from slotwise.core.model import ModelSpec
from slotwise.core.sizes import size
from slotwise.plans.compile import Identity, compile_plan, unverified_plan
from slotwise.plans.memory import Budget, need_of, refuse_beyond
from slotwise.plans.options import WEIGHTS, PlanOptions
from slotwise.plans.plan import Plan

With = Callable[[int], PlanOptions]
"""The options for so many of what is sought."""


@dataclass(frozen=True)
class Subject:
    """What is to be planned: models, with their identities by role, and whether steps are to be started ahead."""

    target: ModelSpec
    draft: ModelSpec | str | None = None
    identities: Mapping[str, Identity] = field(default_factory=dict)
    overlap: bool = False
    _peaks: dict[tuple[PlanOptions, bool], int] = field(default_factory=dict, repr=False, compare=False)

    def plan(self, options: PlanOptions) -> Plan:
        """The plan with these options."""
        return compile_plan(self.target, draft=self.draft, options=options, identities=self.identities)

    def peak(self, options: PlanOptions, *, outline: bool = False) -> int:
        """Bytes that the plan with these options takes; by its outline, at least: soon found, and close."""
        key = options, outline
        if key not in self._peaks:
            record = unverified_plan(self.target, draft=self.draft, options=options, outline=outline)
            self._peaks[key] = need_of(record, overlap=self.overlap).peak
        return self._peaks[key]

    def reach(self, options: PlanOptions) -> int:
        """Pages of the longest sequence that the model serves."""
        return -(-self.target.max_positions // options.page_size)

    def capacity(self, options: PlanOptions, pages: int) -> int:
        """Tokens of a sequence of so many pages, at most what the model serves."""
        return min(pages * options.page_size, self.target.max_positions)


@dataclass(frozen=True, slots=True)
class Row:
    """One form of weights in a survey.

    `plan` is the one of the capacity asked for, else the largest that fits, else the smallest that there is; `capacity`
    the largest that fits, `pages` the largest pool that does at the plan's capacity, 0 where none does. `refused` says
    why there is no plan at all.
    """

    weights: str
    plan: Plan | None
    fits: bool = False
    capacity: int = 0
    pages: int = 0
    refused: str = ""


def fit(subject: Subject, options: PlanOptions, budget: Budget) -> Plan:
    """The plan with `options`, what they leave open chosen so that it stays within `budget`.

    Without a capacity it is the largest at which `max_sequences` full sequences fit (with `pages`: at which that pool
    fits), at most what the model serves. With a capacity and no pages, the pool holds as many pages as fit, from one
    full sequence up to all of them. Raises PlanError, with what would fit, where nothing that was asked for does.
    """
    found = _fit(subject, options, budget)
    if found is not None:
        return found
    each = -(-options.capacity // options.page_size)
    pages, capacity = options.pages or each, options.capacity or subject.capacity(options, 1)
    plan = subject.plan(replace(options, capacity=capacity, pages=pages))
    refuse(subject, plan, budget)
    raise PlanError(f"no plan was found within {budget}, and yet this one fits: {plan}")


def refuse(subject: Subject, plan: Plan, budget: Budget | None) -> None:
    """Raise PlanError, with what would fit, when `plan` takes more than `budget`."""
    if budget is not None:
        refuse_beyond(
            plan, budget, overlap=subject.overlap, alternatives=lambda: tuple(alternatives(subject, plan, budget))
        )


def alternatives(subject: Subject, plan: Plan, budget: Budget) -> Iterator[str]:
    """What fits near a plan that does not: each changes one thing of its options, as sentences name it."""
    options = plan.options
    each = -(-options.capacity // options.page_size)
    # A pool of whole sequences grows and shrinks with their number; any other is somebody's wish.
    whole = options.pages % each == 0
    full = options.pages // each

    def say(what: str, found: Plan | None) -> Iterator[str]:
        if found is not None:
            yield f"{what} ({size(need_of(found, overlap=subject.overlap).peak)})"

    smaller = _largest(
        subject, lambda n: replace(options, capacity=n * options.page_size, pages=n * full), 1, each - 1, budget
    )
    yield from say(f"capacity={smaller.options.capacity}" if smaller else "", smaller)
    pool = _largest(subject, lambda n: replace(options, pages=n), each, options.pages - 1, budget)
    yield from say(f"pages={pool.options.pages}" if pool else "", pool)
    if whole and full == options.max_sequences:
        fewer = _largest(
            subject, lambda n: replace(options, max_sequences=n, pages=n * each), 1, options.max_sequences - 1, budget
        )
        yield from say(f"max_sequences={fewer.options.max_sequences}" if fewer else "", fewer)
    for weights in WEIGHTS:
        if weights == options.weights:
            continue
        try:
            held = subject.plan(replace(options, weights=weights))
        except PlanError:
            continue  # Not every model's weights have every form.
        if need_of(held, overlap=subject.overlap).peak <= budget.nbytes:
            yield from say(f"weights={weights!r}", held)
            return


def survey(subject: Subject, options: PlanOptions, budget: Budget, weights: tuple[str, ...] = WEIGHTS) -> list[Row]:
    """A row for each form of `weights`: the plan that was asked for, or the largest that fits."""
    rows = []
    for name in weights:
        asked = replace(options, weights=name)
        try:
            largest = _largest_capacity(subject, replace(asked, capacity=0), budget)
            plan = largest
            if options.capacity or plan is None:
                plan = subject.plan(asked if options.capacity else replace(asked, capacity=subject.capacity(asked, 1)))
        except PlanError as error:
            rows.append(Row(name, None, refused=str(error)))
            continue
        fits = need_of(plan, overlap=subject.overlap).peak <= budget.nbytes
        pool = plan if fits else _fit(subject, replace(asked, capacity=plan.options.capacity), budget)
        rows.append(
            Row(
                name,
                plan,
                fits,
                0 if largest is None else largest.options.capacity,
                0 if pool is None else pool.options.pages,
            )
        )
    return rows


def _fit(subject: Subject, options: PlanOptions, budget: Budget) -> Plan | None:
    if not options.capacity:
        return _largest_capacity(subject, options, budget)
    if options.pages:
        plan = subject.plan(options)
        return plan if need_of(plan, overlap=subject.overlap).peak <= budget.nbytes else None
    each = -(-options.capacity // options.page_size)
    return _largest(subject, lambda n: replace(options, pages=n), each, each * options.max_sequences, budget)


def _largest_capacity(subject: Subject, options: PlanOptions, budget: Budget) -> Plan | None:
    """The plan of the greatest capacity, a whole number of pages or all that the model serves."""
    most = min(subject.reach(options), options.pages or subject.reach(options))
    return _largest(subject, lambda n: replace(options, capacity=subject.capacity(options, n)), 1, most, budget)


def _largest(subject: Subject, options_with: With, low: int, high: int, budget: Budget) -> Plan | None:
    """The plan of the largest count from `low` to `high` that fits; None where not even `low` does."""

    def peak(count: int) -> int:
        return subject.peak(options_with(count))

    def outline(count: int) -> int:
        return subject.peak(options_with(count), outline=True)

    count = _last_within(outline, low, high, budget.nbytes)
    if count is not None and peak(count) > budget.nbytes:
        # A smaller program takes more than the largest of its kind: about as much more at every count.
        more = peak(count) - outline(count)
        guess = _last_within(outline, low, count - 1, budget.nbytes - more)
        count = _last_within(peak, low, count - 1, budget.nbytes, guess)
    return None if count is None else subject.plan(options_with(count))


def _last_within(
    amount: Callable[[int], int], low: int, high: int, budget: int, guess: int | None = None
) -> int | None:
    """The n from `low` to `high` with amount(n) <= budget < amount(n + 1), or `high` where that is within it.

    None where not even amount(low) is. `guess` is where to look first.
    """
    if guess is not None and low <= guess < high and amount(guess) <= budget < amount(guess + 1):
        return guess
    if low > high or amount(low) > budget:
        return None
    if amount(high) <= budget:
        return high
    halve = False
    while high - low > 1:
        # Where a straight line meets the budget; every other time the middle, should the line be bent.
        line = low + (budget - amount(low)) * (high - low) // (amount(high) - amount(low))
        middle = min(max((low + high) // 2 if halve else line, low + 1), high - 1)
        halve = not halve
        if amount(middle) <= budget:
            low = middle
        else:
            high = middle
    return low
