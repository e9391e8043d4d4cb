"""Engines in processes of their own: what fails there is a reason, not an end."""

import pytest
from sidebyside.bandwidth import PATTERNS, MemoryReader
from sidebyside.engine import EngineSpec
from sidebyside.workers import EngineFailed, Worker

ENGINE = """
import os

class Toy:
    def __init__(self, threads, size): self.size = size
    def about(self): return f"{os.environ['OMP_NUM_THREADS']} threads, size {self.size}"
    def double(self, x): return 2 * x
    def fail(self): raise ValueError("no such thing")
    def die(self): os._exit(3)

def load(threads, size):
    if size < 0:
        raise MemoryError("too small")
    return Toy(threads, size)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_engine.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    return EngineSpec("toy", "toy_engine", {"size": 5})


def test_a_worker_answers_survives_a_failing_call_and_says_how_it_died(toy):
    worker = Worker(toy, 3)
    assert worker.about == "3 threads, size 5"
    assert worker.ask("double", 21) == 42
    with pytest.raises(EngineFailed, match="ValueError: no such thing"):
        worker.ask("fail")
    assert worker.ask("double", 1) == 2
    with pytest.raises(EngineFailed, match="exit code 3"):
        worker.ask("die")
    with pytest.raises(EngineFailed, match=r"ended"):
        worker.ask("double", 1)
    worker.close()


def test_an_engine_that_does_not_load_says_why(toy):
    with pytest.raises(EngineFailed, match="MemoryError: too small"):
        Worker(EngineSpec("toy", "toy_engine", {"size": -1}), 1)
    with pytest.raises(EngineFailed, match="no_such_engine"):
        Worker(EngineSpec("missing", "no_such_engine"), 1)


def test_every_pattern_reads_every_byte():
    reader = MemoryReader(threads=2, size=1 << 22)
    assert sum(part.size for part in reader.parts) * 8 == 1 << 22
    for pattern in PATTERNS:
        before = pattern(reader.parts[1])
        for place in (0, reader.parts[1].size // 2, -1):
            reader.parts[1][place] ^= 1
            assert pattern(reader.parts[1]) != before
            reader.parts[1][place] ^= 1
    assert reader.read() > 0
    assert reader.copy() > 0
