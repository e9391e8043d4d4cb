"""A plan's draft loops, bound: all rounds as one launch.

Owns `Loops`. What always holds: round r runs the very programs that one round alone runs, on arrays of its own; a loop
of fewer rounds is the beginning of a longer one, so a round is bound once for each number of sequences, at load.
Launches are made one when they are first needed: a plan has many loops, of which a run meets few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slotwise.core.backend import Launch
from slotwise.engine.arrays import Arrays
from slotwise.engine.calls import BoundCall
from slotwise.plans.arrays import input_array, output_arrays
from slotwise.plans.loop import FED, FEEDS, GIVEN, DraftLoop, round_buffer
from slotwise.plans.plan import Plan
from slotwise.plans.program import Program
from slotwise.slots.rounds import RoundInputs

BoundProgram = tuple[Program, tuple[BoundCall, ...]]
TensorOf = Callable[[str], torch.Tensor]
"""An array of the plan, by name."""


@dataclass(frozen=True, slots=True)
class BoundLoop:
    """So many rounds of a loop: its programs in order, the launches that run them, the arrays that it reads and writes.

    What a program reads that one before it wrote is not among `reads`.
    """

    programs: tuple[BoundProgram, ...]
    launches: tuple[Launch, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


class Loops:
    """The loops of `plan`, over its arrays in `buffers` (on the kernels' side) and `arrays` (on the host's).

    `bind` gives a program's calls their tensors, `chained` makes the launches of programs one.
    """

    def __init__(
        self,
        plan: Plan,
        buffers: Mapping[str, torch.Tensor],
        arrays: Arrays,
        bind: Callable[[Program, TensorOf, TensorOf], tuple[BoundCall, ...]],
        chained: Callable[[Iterable[BoundProgram]], tuple[Launch, ...]],
    ) -> None:
        self._buffers = buffers
        self._arrays = arrays
        self._bind = bind
        self._chained = chained
        self._acceptance = plan.options.acceptance
        self._vocab_size = plan.target.vocab_size
        self._programs = {(program.role, program.kind, program.rows): program for program in plan.programs}
        self._loops = plan.loops
        self._slices = max((loop.rounds for loop in plan.loops), default=1) - 1
        self._rounds: dict[tuple[tuple[str, str, int], int], BoundProgram] = {}
        for loop in plan.loops:
            for number, key in loop.programs(loop.rounds):
                if (key, number) not in self._rounds:
                    self._rounds[key, number] = self._round(self._programs[key], number)
        self._bound: dict[tuple[DraftLoop, int], BoundLoop] = {}
        self._found: dict[tuple[str, int, int], DraftLoop | None] = {}
        self.inputs = RoundInputs(**{name: self.later(name) for name in GIVEN})
        """What the rounds after the first are given."""

    def find(self, sampler: str, sequences: int, rows: int) -> DraftLoop | None:
        """The smallest loop for so many sequences and rows of the first round; None when there is none."""
        key = sampler, sequences, rows
        if key not in self._found:
            fitting = [x for x in self._loops if x.sampler == sampler and x.sequences >= sequences and x.first >= rows]
            self._found[key] = min(fitting, key=lambda x: (x.sequences, x.first), default=None)
        return self._found[key]

    def later(self, name: str) -> Any:
        """The host's array of `name` of the later rounds, [rounds, rows, ...]; empty where there is none."""
        if not self._slices:
            return np.zeros((0, 0), np.int32)
        flat = self._arrays[round_buffer(name)]
        return flat.reshape(self._slices, -1, *flat.shape[1:])

    def bound(self, loop: DraftLoop, rounds: int) -> BoundLoop:
        """The first `rounds` rounds of `loop`."""
        key = loop, rounds
        if key not in self._bound:
            self._bound[key] = self._make(loop, rounds)
        return self._bound[key]

    def _make(self, loop: DraftLoop, rounds: int) -> BoundLoop:
        programs: list[BoundProgram] = []
        reads: dict[str, None] = {}
        writes: dict[str, None] = {}
        for number, key in loop.programs(rounds):
            programs.append(self._rounds[key, number])
            program, _ = programs[-1]
            inputs = [input_array(program, value, self._vocab_size) for value in program.graph.inputs]
            names = [self._source(name, number)[0] for name in inputs]
            reads |= {name: None for name in names if name not in writes}
            outputs = output_arrays(program, self._acceptance, self._vocab_size)
            writes |= {self._target(name, number)[0]: None for name in outputs}
        return BoundLoop(tuple(programs), self._chained(programs), tuple(reads), tuple(writes))

    def _round(self, program: Program, number: int) -> BoundProgram:
        """The program with its calls on the arrays of round `number`."""
        return program, self._bind(
            program,
            lambda name: self._slice(*self._source(name, number)),
            lambda name: self._slice(*self._target(name, number)),
        )

    def _source(self, name: str, number: int) -> tuple[str, int]:
        """Where round `number` finds its input `name`: (array, which round's part of it; 0 for all of it)."""
        return self._target(FEEDS, number - 1) if number and name == FED else self._target(name, number)

    def _target(self, name: str, number: int) -> tuple[str, int]:
        own = round_buffer(name)
        return (own, number) if number and own in self._buffers else (name, 0)

    def _slice(self, name: str, number: int) -> torch.Tensor:
        buffer = self._buffers[name]
        return buffer if not number else buffer.view(self._slices, -1, *buffer.shape[1:])[number - 1]
