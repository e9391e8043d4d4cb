"""Engines in processes of their own, one asked at a time.

Owns `Worker`. What always holds: an engine's threads, caches and faults stay in its process; between turns it waits
for a message and runs nothing; a process that dies or fails in a turn loses that figure, and the comparison goes on.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from sidebyside.engine import EngineSpec

PATIENCE = 300.0
"""Seconds that one turn may take."""


class EngineFailed(Exception):
    """An engine could not be loaded, or failed in a turn; the text says how."""


class Worker:
    """An engine in a process of its own, made by `spec.load`; `threads` is what its libraries are told.

    Raises EngineFailed where the engine does not come up.
    """

    def __init__(self, spec: EngineSpec, threads: int, **arguments: Any) -> None:
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, spec, {**arguments, "threads": threads}), daemon=True
        )
        with _environment(threads):
            self._process.start()
        other.close()
        self.about = self._answer()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the engine there; raises EngineFailed."""
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise EngineFailed(f"its process has ended (exit code {self._process.exitcode})") from error
        return self._answer()

    def close(self) -> None:
        """End the process; its memory returns before this does."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> Any:
        try:
            if not self._connection.poll(PATIENCE):
                self._process.kill()
                raise EngineFailed(f"no answer in {PATIENCE:.0f} s")
            succeeded, value = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise EngineFailed(f"its process ended with exit code {self._process.exitcode}") from error
        if not succeeded:
            raise EngineFailed(value)
        return value


def _serve(connection: Connection, spec: EngineSpec, arguments: dict[str, Any]) -> None:
    """A worker's life: load, then answer until the other end closes."""
    try:
        engine = spec.load(**arguments)
        connection.send((True, engine.about()))
    except Exception as error:
        connection.send((False, _said(error)))
        return
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(engine, method)(*arguments))
        except Exception as error:
            answer = (False, _said(error))
        connection.send(answer)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """What a new process inherits: thread counts for every library, no network, no advice."""
    wanted: Mapping[str, str] = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
