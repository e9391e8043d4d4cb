"""The DEBUG ladder: how much Slotwise says of itself on the error stream.

Owns `level` and `DebugObserver`; the one place where the environment variable DEBUG is read. What always holds: it
changes nothing of what is computed; each level shows all that the lower ones do:
  1  the plan, summarised
  2  time and bandwidth of every op, when the process ends
  3  which kernel was chosen for each op, and why the others were not
  4  the graph after every pass
  5  the slot ledger after every step
"""

from __future__ import annotations

import atexit
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from slotwise.core.graph import Graph
from slotwise.core.ops import contract_of
from slotwise.core.printer import format_graph
from slotwise.engine.engine import Engine
from slotwise.engine.observer import Observer
from slotwise.plans.compile import AfterPass
from slotwise.plans.passes.plan_buffers import call_spec
from slotwise.plans.plan import Plan
from slotwise.plans.show import show_plan
from slotwise.slots.binding import Binding

HIGHEST = 5


def level() -> int:
    """The level asked for: 0 where DEBUG is not set or is not a number from 0 to 5 (other tools use the name too)."""
    text = os.environ.get("DEBUG", "")
    return int(text) if text.isdecimal() and text.isascii() and int(text) <= HIGHEST else 0


def say(text: str) -> None:
    """Print to the error stream."""
    print(text, file=sys.stderr)


def pass_observer() -> AfterPass | None:
    """From level 4: prints the graph after every pass."""
    if level() < 4:
        return None

    def observe(name: str, where: str, graph: Graph) -> None:
        say(f"after {name}, {where}:\n{format_graph(graph)}\n")

    return observe


def show_choices(plan: Plan) -> str:
    """Every distinct choice of a kernel, with the reason and the kernels that were refused."""
    lines: dict[str, None] = {}
    for program in plan.programs:
        for node in program.graph.nodes:
            if node.selection is not None:
                refused = "".join(f"\n    not {r.kernel}: {r.reason}" for r in node.selection.rejected)
                kind = f"{program.role}.{program.kind}"
                lines[f"  {kind} {node.op}: {node.selection.kernel} ({node.selection.reason}){refused}"] = None
    return "\n".join(["kernels", *lines])


def attach(engine: Engine, write: Callable[[str], None] = say) -> None:
    """Show what the level asks for of a loaded plan, and watch its engine."""
    asked = level()
    if asked >= 1:
        write(show_plan(engine.plan))
    if asked >= 3:
        write(show_choices(engine.plan))
    if asked >= 5:
        engine.observers.append(LedgerPrinter(engine, write))
    if asked >= 2:
        clock = OpClock(engine.plan)
        engine.executor.probe = clock.add
        atexit.register(lambda: write(str(clock)) if clock.calls else None)


class LedgerPrinter(Observer):
    """Prints the ledger after every step."""

    def __init__(self, engine: Engine, write: Callable[[str], None]) -> None:
        self._engine, self._write = engine, write
        self._bound = 0

    def began(self, epoch: int) -> None:
        """See `Observer`."""
        self._bound = 0

    def bound(self, binding: Binding) -> None:
        """See `Observer`."""
        self._bound += len(binding.sequences)

    def ended(self, epoch: int) -> None:
        """See `Observer`."""
        self._write(f"step {epoch}, {self._bound} bound\n{self._engine.ledger}")


@dataclass(slots=True)
class _Spent:
    """What one op and kernel took altogether."""

    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0


class OpClock:
    """Adds up time and bytes by op and kernel; `add` is an executor's probe.

    Bytes are the contracts', for attention those of full page tables, so its bandwidth is left out. `begun` are the
    seconds until chains had begun, which are no kernel's.
    """

    def __init__(self, plan: Plan) -> None:
        self.calls: dict[tuple[str, str], _Spent] = {}
        self.begun = 0.0
        self._ways: Counter[bool] = Counter()
        self._order: dict[str, list[tuple[str, str, int]]] = {}
        self._next: dict[str, int] = {}
        for program in plan.programs:
            nodes = [node for node in program.graph.nodes if node.selection is not None]
            self._order[program.name] = [
                (
                    node.op,
                    node.selection.kernel if node.selection is not None else "",
                    contract_of(node.op).call_cost(call_spec(node).inputs, node.attr_dict).bytes,
                )
                for node in nodes
            ]

    def add(self, program: str, kernel: str, seconds: float, is_inside: bool) -> None:
        """One call; those of a program come in its order."""
        if not kernel:
            self.begun += seconds
            return
        self._ways[is_inside] += 1
        order, place = self._order[program], self._next.get(program, 0)
        if order[place][1] != kernel:  # the run before ended with an error
            place = 0
        self._next[program] = (place + 1) % len(order)
        op, _, moved = order[place]
        spent = self.calls.setdefault((op, kernel), _Spent())
        spent.calls += 1
        spent.seconds += seconds
        spent.bytes += moved

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for head in ("op", "kernel"):
            table.add_column(head)
        for head in ("calls", "time", "share", "each", "bandwidth"):
            table.add_column(head, justify="right")
        total = sum(spent.seconds for spent in self.calls.values()) or 1.0
        for (op, kernel), spent in sorted(self.calls.items(), key=lambda item: -item[1].seconds):
            rate = "-" if op == "attention" else f"{spent.bytes / max(spent.seconds, 1e-12) / 1e9:.1f} GB/s"
            each = f"{spent.seconds / spent.calls * 1e6:.1f} us"
            share = f"{spent.seconds / total:.0%}"
            table.add_row(op, kernel, str(spent.calls), f"{spent.seconds * 1e3:.1f} ms", share, each, rate)
        console = Console(width=120, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(table)
        return f"{captured.get().rstrip()}\n{self._how()}"

    def _how(self) -> str:
        """Which way calls were timed, and what is in no line of the table."""
        parts = []
        if self._ways[True]:
            parts.append(
                f"{self._ways[True]} calls were timed inside the chains that they run in, which took "
                f"{self.begun * 1e3:.1f} ms more to begin (waking threads)"
            )
        if self._ways[False]:
            parts.append(
                f"{self._ways[False]} calls were launched and timed one by one: each is charged what a launch by "
                "itself takes, and the whole is slower"
            )
        return "\n".join(parts)
