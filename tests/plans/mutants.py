"""Plans with one thing changed, for the tests of the static verifier: what a mutant is, and what must become of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from slotwise.core.errors import VerificationError
from slotwise.plans.plan import Plan

Mutation = Callable[[Plan], Plan]
Mutants = Mapping[str, tuple[str, Mutation]]
"""What is changed -> the rule that it breaks, and the change."""


def rules_of(mutants: Mutants) -> list[str]:
    """Every rule that a mutant breaks, once."""
    return sorted({rule for rule, _ in mutants.values()})


def assert_caught(plan: Plan, rule: str, mutate: Mutation) -> None:
    """The changed plan is refused, under the name of the rule."""
    mutant = mutate(plan)
    assert mutant != plan
    with pytest.raises(VerificationError) as caught:
        mutant.verify()
    assert caught.value.rule == rule, str(caught.value)
    assert str(caught.value).startswith(f"{rule}: ")


def assert_listed(rule: str, doc: str | None) -> None:
    """A test module's docstring names the rule behind `The rules: `."""
    listed = (doc or "").partition("The rules: ")[2].replace("\n", " ")
    assert rule in [name.strip(" .") for name in listed.split(",")]
