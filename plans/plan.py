"""The plan: what users hold, with all that can be done with it.

Owns `Plan`. What always holds: a plan adds nothing to its record (`record.py`), so its text and JSON are functions of
its content alone, and equal plans print equally on every run.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from slotwise.core.errors import OptionError, OutputError, PlanError
from slotwise.plans.checks.plan import verify_plan
from slotwise.plans.diff import diff_plans
from slotwise.plans.record import PlanRecord
from slotwise.plans.serialise import plan_from_json, plan_to_json
from slotwise.plans.show import show_plan


@dataclass(frozen=True)
class Plan(PlanRecord):
    """A compiled plan: print it, save it, compare it, verify it."""

    def verify(self) -> None:
        """Raise VerificationError naming the rule when the plan cannot be trusted; see `plans/checks/`."""
        verify_plan(self)

    def diff(self, other: PlanRecord) -> str:
        """The differences to `other`, side by side; empty when there are none."""
        return diff_plans(self, other)

    def to_json(self) -> str:
        """The plan as JSON text, the same on every run."""
        return plan_to_json(self)

    def save(self, path: str | Path) -> None:
        """Write `to_json()` to `path`; raises OutputError where that cannot be."""
        if not isinstance(path, str | Path):
            raise OptionError(f"a plan is saved to a path, found {path!r}")
        try:
            Path(path).write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"plan file {path} cannot be written: {error.strerror or error}; give the path of a file in a folder "
                "that exists"
            ) from error

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan; raises PlanError for another schema or damaged text."""
        record = plan_from_json(text)
        return Plan(**{field.name: getattr(record, field.name) for field in fields(record)})

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read and verify a plan file; raises PlanError when it is missing, damaged or of another schema."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise PlanError(
                f"plan file {path} cannot be read: {error.strerror or error}; `slotwise plan show MODEL --save FILE` "
                "makes one"
            ) from error
        except UnicodeDecodeError as error:
            raise PlanError(f"plan file {path} cannot be read: it is not UTF-8 text, so no plan") from error
        try:
            plan = Plan.from_json(text)
        except PlanError as error:
            raise PlanError(f"plan file {path}: {error}") from error
        try:
            plan.verify()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise PlanError(
                f"plan file {path} is damaged: {type(error).__name__}: {error}; compile it again"
            ) from error
        return plan

    def __str__(self) -> str:
        return show_plan(self)
