"""What is written down is what was measured."""

import io
import json

import pytest
from rich.console import Console
from sidebyside import guard, report
from sidebyside.comparison import (
    ARITHMETIC,
    ARITHMETIC_SHARE,
    LIMIT_SHARE,
    MEMORY,
    MULTIPLY_ADDS,
    READ,
    Comparison,
    step_bytes,
)
from sidebyside.engine import About
from sidebyside.shapes import SHAPES
from sidebyside.work import DECODE, DECODE_BATCH
from tables import cpu_tables


@pytest.fixture
def found():
    found = Comparison(SHAPES["135M"], threads=2)
    found.about = {"slotwise bf16": About(270_000_000, 2, "as it is"), "llama.cpp bf16": About(269_000_000, 2, "so")}
    for turn, (mine, theirs) in enumerate([(90.0, 60.0), (80.0, 50.0), (100.0, 80.0)]):
        found.samples.add("slotwise bf16", DECODE, turn, mine)
        found.samples.add("llama.cpp bf16", DECODE, turn, theirs)
        found.samples.add("slotwise bf16", LIMIT_SHARE[DECODE], turn, 0.8)
        found.samples.add(MEMORY, READ, turn, 30e9)
        found.samples.add("slotwise bf16", ARITHMETIC_SHARE[DECODE_BATCH], turn, 0.7)
        found.samples.add(ARITHMETIC, MULTIPLY_ADDS, turn, 90e9)
    found.missing["slotwise int8"] = "[not] there"
    found.findings = {"slotwise bf16": guard.Finding(error=2.0, limit=1.0, agree=3, rows=24)}
    found.disturbance = {"host": 0.0, "others": 0.25}
    return found


def test_the_json_has_medians_ratios_of_rounds_reasons_and_faults(found):
    written = json.loads(json.dumps(report.as_json(found)))
    assert written["medians"]["slotwise bf16"][DECODE]["median"] == 90.0
    ratio = written["ratios"]["slotwise bf16"]["llama.cpp bf16"][DECODE]
    assert (ratio["least"], ratio["median"], ratio["most"]) == (1.25, 1.5, 1.6)
    assert written["missing"] == {"slotwise int8": "[not] there"}
    assert written["logits"]["slotwise bf16"]["wrong"] is True
    assert list(found.wrong) == ["slotwise bf16"]


def test_the_terminal_shows_what_is_missing_wrong_and_disturbed(found):
    console = Console(file=io.StringIO(), width=200)
    report.show(found, console)
    shown = console.file.getvalue()
    for text in (
        "slotwise int8: missing. [not] there",
        "WRONG RESULTS",
        "1.50 (1.25 to 1.60)",
        "25% of the cores' time",
    ):
        assert text in shown


def test_the_tables_for_the_docs_are_made_of_the_json(found):
    machine = {"processor": "P", "instructions": ["avx2"], "date": "today", "python": "3", "versions": {"torch": "2"}}
    shape = {"machine": machine, "options": {"threads": 2}, **json.loads(json.dumps(report.as_json(found)))}
    text = cpu_tables({"shapes": {"135M": shape}})
    assert "| slotwise bf16 | 90 | - | - | - | 80% | - | 70% | - | - |" in text
    assert "90 thousand million float32 multiply-adds a second" in text
    assert "| slotwise bf16 / llama.cpp bf16 | 1.5 (1.25 to 1.6) | - | - | - |" in text
    assert "slotwise int8: missing. [not] there" in text


def test_a_step_reads_the_weights_once_and_all_of_the_cache():
    shape, about = SHAPES["135M"], About(1000, 2, "")
    assert step_bytes(shape, about, 0) == 1000
    assert step_bytes(shape, about, 10) == 1000 + 10 * 30 * 2 * 3 * 64 * 2


def test_a_token_of_a_prompt_costs_no_product_with_the_head():
    shape = SHAPES["135M"]
    with_logits, without = (shape.multiply_adds(logits=logits) for logits in (True, False))
    assert with_logits - without == shape.vocab * shape.hidden
    assert with_logits + len(shape.norms) * shape.hidden == shape.parameters
