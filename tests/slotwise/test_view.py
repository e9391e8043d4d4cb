"""What the viewer and the traces promise: one file that needs nothing, and the truth about every slot of every step."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from slotwise import LLM, Plan
from slotwise.inspect.page import build_page
from slotwise.inspect.view import view_page
from slotwise.models.tokenizer import Tokenizer
from slotwise.planning import plan_model
from slotwise.recording.file import Recording, read_recording, write_line

from .commands import Run
from .conftest import SAMPLINGS


class _References(HTMLParser):
    """Collects everything in a page that a browser would fetch, and checks that elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "input", "link", "br", "img", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _data(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    return found


def test_a_page_is_one_file_that_fetches_nothing(page: str) -> None:
    reader = _References()
    reader.feed(page)
    assert reader.fetched == []
    assert reader.open == []
    for word in ("@import", "url(", "fetch(", "XMLHttpRequest", "import(", "https://"):
        assert word not in page
    assert page.count("<html") == page.count("</html>") == 1


def test_text_in_the_data_cannot_leave_it() -> None:
    evil = "</script><script>alert(1)</script>\u2028<!--"
    made = build_page("<b>t</b>", "report.html", {"text": evil}, scripts=())
    assert _data(made) == {"text": evil}
    assert "alert(1)</script>" not in made
    assert "<title>&lt;b&gt;t&lt;/b&gt;</title>" in made


def test_a_page_has_every_call_with_its_cost_and_its_place(recording: Recording, page: str) -> None:
    plan = _data(page)["plan"]
    assert [p["name"] for p in plan["programs"]] == [p.name for p in recording.plan.programs]
    for shown, program in zip(plan["programs"], recording.plan.programs, strict=True):
        assert [call["op"] for call in shown["calls"]] == [node.op for node in program.graph.nodes]
        assert len(shown["placements"]) == len(program.placements)
        assert sum(c["flops"] for c in shown["calls"] if c["op"] != "attention") == program.flops()
        assert sum(c["bytes"] for c in shown["calls"] if c["op"] != "attention") == program.bytes_moved()
    assert plan["text"] == str(recording.plan)


def test_a_page_names_the_programs_of_every_round_of_every_draft_loop(recording: Recording, page: str) -> None:
    plan = recording.plan
    assert len(plan.loops) == len(_data(page)["plan"]["loops"]) > 1
    known = {program.name for program in plan.programs}
    for shown, loop in zip(_data(page)["plan"]["loops"], plan.loops, strict=True):
        runs = {n: r["programs"] for r in shown["rounds"] for n in range(r["first"], r["last"] + 1)}
        draws = f"sampler.{loop.sampler}.{loop.sequences}"
        assert runs == {
            number: [f"draft.decode.{loop.first if number == 1 else loop.sequences}", draws]
            for number in range(1, loop.rounds + 1)
        }
        assert known.issuperset(name for names in runs.values() for name in names)
        assert (shown["sequences"], shown["sampler"]) == (loop.sequences, loop.sampler)
        assert len(shown["rounds"]) == (1 if loop.first == loop.sequences else 2)


def test_a_plan_without_a_draft_model_has_no_draft_loops_to_show(recording: Recording) -> None:
    assert _data(view_page(replace(recording.plan, loops=())))["plan"]["loops"] == []


def test_a_page_has_every_step_and_no_more_than_it_needs(recording: Recording, page: str) -> None:
    shown = _data(page)["recording"]
    assert [step["step"] for step in shown["steps"]] == [step["step"] for step in recording.steps]
    assert all("known" not in (step["decode"] or {}) for step in shown["steps"])
    assert any(step["decode"] and any(step["decode"]["k"]) for step in shown["steps"])


def test_a_crashed_run_says_so(recorded: Path, tmp_path: Path) -> None:
    crashed = tmp_path / "crash.jsonl"
    lines = recorded.read_text().splitlines(keepends=True)
    crash = {
        "crash": 9,
        "error": "KeyError",
        "message": "x\ny",
        "where": "a.py:1 in f",
        "traceback": "",
        "ledger": "l",
        "tokens": {},
    }
    crashed.write_text("".join(lines[:6]) + write_line(crash))
    found = read_recording(crashed)
    assert _data(view_page(found.plan, found))["recording"]["crash"]["where"] == "a.py:1 in f"


def test_the_command_writes_pages_and_traces(
    run: Run, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("plan", "view", recorded)
    assert (done.code, done.err) == (0, "saved to run.html\n")
    assert "Slots over time" in Path("run.html").read_text()
    assert run("plan", "view", recorded, "--format", "perfetto", "-o", "t.json").code == 0
    assert run("plan", "view", recorded, "--bandwidth", 0).code == 2
    assert "cannot be written" in run("plan", "view", recorded, "-o", tmp_path / "no" / "x.html").err
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text(recorded.read_text().replace('"step":2', '"step":3', 1))
    assert "damaged or edited" in run("plan", "view", damaged).err


def test_a_trace_of_a_recording_has_its_steps_sequences_and_counters(
    run: Run, recorded: Path, recording: Recording, tmp_path: Path
) -> None:
    out = tmp_path / "trace.json"
    assert run("plan", "view", recorded, "--format", "perfetto", "-o", out).code == 0
    events = json.loads(out.read_text())["traceEvents"]
    steps = [e for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert [e["name"] for e in steps] == [f"step {step['step']}" for step in recording.steps]
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for a, b in itertools.pairwise(steps))
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {"engine", "steps", "sequence 0", "sequence 1", "sequence 2"}
    assert sum(e["args"]["tokens"] for e in events if e["name"] == "tokens kept") == 33
    pages = [e["args"] for e in events if e["name"] == "target pages"]
    assert {sum(each.values()) for each in pages} == {recording.plan.target.pages}


def test_a_trace_of_a_plan_lays_its_calls_end_to_end(run: Run, recording: Recording, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "trace.json"
    recording.plan.save(plan)
    assert run("plan", "view", plan, "--format", "perfetto", "--bandwidth", 10, "--gflops", 1, "-o", out).code == 0
    events = [e for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "X" and e["tid"] == 1]
    program = recording.plan.programs[0]
    assert [e["name"] for e in events] == [node.op for node in program.graph.nodes]
    for event, after in itertools.pairwise(events):
        assert event["dur"] == pytest.approx(max(event["args"]["bytes"] / 10e3, event["args"]["flops"] / 1e3), abs=2e-3)
        assert after["ts"] == pytest.approx(event["ts"] + event["dur"], abs=2e-3)


def test_recordings_are_compared(run: Run, recorded: Path, stories: Path, stories_draft: Path, tmp_path: Path) -> None:
    assert run("plan", "diff", recorded, recorded).code == 0
    other = tmp_path / "other.jsonl"
    llm = LLM(
        stories,
        draft=stories_draft,
        backend="reference",
        threads=1,
        progress=False,
        capacity=64,
        max_sequences=2,
        decode_rows=8,
        prefill_chunk=8,
        page_size=4,
        speculate=0,
    )
    text = "Once upon a time there was a little girl"
    with llm.record(other):
        llm.generate([text, "The dog", text + " named"], SAMPLINGS)
    done = run("plan", "diff", recorded, other)
    assert done.code == 1
    assert "speculate: 3 -> 0" in done.out
    drafted = re.search(r"drafted: (\d+) -> 0", done.out)
    assert drafted is not None
    assert int(drafted[1]) > 0
    assert "sequence 0, new token" not in done.out  # coupled: the tokens are the same
    assert "first difference: step" in done.out


def test_plans_differ_in_bytes_and_flops(recording: Recording, stories: Path) -> None:
    options = {"capacity": 64, "max_sequences": 2, "decode_rows": 8, "prefill_chunk": 8, "page_size": 4, "speculate": 3}
    one, other = (
        plan_model(stories, draft="ngram", dtype=dtype, backend="reference", **options)
        for dtype in ("bfloat16", "float32")
    )
    program = next(p for p in one.programs if p.name == "target.decode.1")
    assert f"target.decode.1: bytes moved: {program.bytes_moved():,} -> " in one.diff(other)
    assert isinstance(recording.plan, Plan)


def test_a_recording_has_the_text_of_every_token_that_it_speaks_of(recording: Recording, stories: Path) -> None:
    ids = {token for request in recording.requests.values() for token in request["prompt_ids"]}
    for step in recording.steps:
        ids |= {token for _, fresh in step["tokens"] for token in fresh}
        ids |= {token for drafts in (step["decode"] or {}).get("drafts", []) for token in drafts}
    assert recording.texts.keys() == ids
    tokenizer = Tokenizer.load(stories)
    plain = [token for token in ids if token not in tokenizer.eos_ids and token > 10]
    assert plain
    assert all(recording.texts[token].strip() == tokenizer.decode([token]).strip() for token in plain)


def test_a_token_that_would_end_the_script_is_text_on_the_page(recording: Recording) -> None:
    first = next(index for index, event in enumerate(recording.events) if "texts" in event)
    hostile = "</script><img src=x onerror=alert(1)><!--"
    changed = {**recording.events[first], "texts": [[token, hostile] for token, _ in recording.events[first]["texts"]]}
    events = (*recording.events[:first], changed, *recording.events[first + 1 :])
    page = view_page(recording.plan, replace(recording, events=events))
    assert hostile in _data(page)["recording"]["texts"].values()
    assert hostile not in page
    reader = _References()
    reader.feed(page)
    assert reader.fetched == []
