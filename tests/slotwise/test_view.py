"""What the viewer and the traces promise: one file that needs nothing, and the truth about every slot of every step."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from slotwise import LLM, Plan, Sampling
from slotwise.inspect.page import build_page
from slotwise.inspect.view import view_page
from slotwise.models.tokenizer import Tokenizer
from slotwise.planning import plan_model
from slotwise.recording.file import Recording, read_recording, write_line

from .commands import Run

SAMPLINGS = [Sampling(max_new_tokens=count, temperature=0.8, seed=3) for count in (20, 3, 10)]


@pytest.fixture(scope="module")
def recorded(stories: Path, stories_draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three requests with drafts; the third begins when the second ends, and shares pages with the first."""
    llm = LLM(
        stories,
        draft=stories_draft,
        backend="reference",
        capacity=64,
        max_sequences=2,
        decode_rows=8,
        prefill_chunk=8,
        page_size=4,
        speculate=3,
        threads=1,
        progress=False,
    )
    path = tmp_path_factory.mktemp("view") / "run.jsonl"
    text = "Once upon a time there was a little girl"
    with llm.record(path):
        llm.generate([text, "The dog", text + " named"], SAMPLINGS)
    return path


@pytest.fixture(scope="module")
def recording(recorded: Path) -> Recording:
    """That run, read."""
    return read_recording(recorded)


@pytest.fixture(scope="module")
def page(recording: Recording) -> str:
    """Its page."""
    return view_page(recording.plan, recording)


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


# In a browser, where there is one


@pytest.fixture(scope="module")
def browser() -> str:
    """A Chromium's path."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("needs a browser: Debian's chromium, or google-chrome")


@pytest.fixture(scope="module")
def dump(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`dump(page file, hash)` is the document after its scripts ran."""
    profile = tmp_path_factory.mktemp("profile")

    def dumped(file: Path, fragment: str, *, script: str = "") -> str:
        if script:
            text = file.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
            file = file.with_name(f"driven-{file.name}")
            file.write_text(text, encoding="utf-8")
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --window-size=1400,1000 --virtual-time-budget=5000 --dump-dom"
        )
        words = [browser, *flags.split(), f"--user-data-dir={profile}", f"file://{file}#{fragment}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    return dumped


def test_the_slot_map_agrees_with_the_ledger_at_every_step(
    dump: Any, page: str, recording: Recording, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    script = """
      const all = steps.map((_, i) => [false, true].map((after) =>
        Object.fromEntries(DATA.plan.roles.map((role) => [role.role, history_.counts(i, after, role)]))));
      const out = document.createElement("pre");
      out.id = "all"; out.textContent = JSON.stringify(all); document.body.append(out);"""
    document = dump(file, "", script=script)
    assert 'data-ready="true"' in document
    found = json.loads(document.partition('<pre id="all">')[2].partition("</pre>")[0])
    for step, (before, after) in zip(recording.steps, found, strict=True):
        decode = step["decode"]
        for role in recording.plan.roles:
            ledger, counts = step["ledger"][role.role], after[role.role]
            assert sum(counts.values()) == role.slots
            assert counts["scratch"] == role.page_size
            assert counts["cached"] == ledger["cached"] * role.page_size
            assert counts["reserved"] == counts["speculative"] == counts["accepted"] == counts["rejected"] == 0
            held = ledger["held"] * role.page_size
            assert counts["committed"] + counts["shared"] <= held
            spans = [] if decode is None else decode["spans"].get(role.role, [])
            planned = sum(before[role.role][state] for state in ("reserved", "accepted", "rejected", "speculative"))
            assert planned == sum(end - begin for _, begin, end in spans)
        if decode is not None:
            kept = dict(step["tokens"])
            taken = sum(min(a, len(kept.get(s, []))) for a, s in zip(decode["accepted"], decode["seq"], strict=True))
            assert before["target"]["accepted"] == taken
            assert before["target"]["accepted"] + before["target"]["rejected"] == sum(decode["k"])
    assert any(after["target"]["shared"] for _, after in found)
    assert any(after["target"]["cached"] for _, after in found)


def test_tokens_are_shown_as_text_and_every_held_page_names_its_owner(
    dump: Any, page: str, recording: Recording, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    script = """
      const drawn = [], draw = CanvasRenderingContext2D.prototype.fillText;
      CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
        drawn.push(text);
        draw.call(this, text, ...rest);
      };
      after = true;
      const owned = steps.map((_, i) => {
        show(i);
        return DATA.plan.roles.map((role) => [...history_.owners(i, after, role)]);
      });
      const out = document.createElement("pre");
      out.id = "all"; out.textContent = JSON.stringify({ drawn, owned, text: history_.describe(1) });
      document.body.append(out);"""
    document = dump(file, "", script=script)
    found = json.loads(html.unescape(document.partition('<pre id="all">')[2].partition("</pre>")[0]))
    owners = {owner for step in found["owned"] for role in step for _, owner in role}
    assert {"scratch", "cached", "seq 0"} <= owners
    assert any("+" in owner for owner in owners)  # a page that two share
    assert owners <= set(found["drawn"])
    fresh = recording.steps[1]["tokens"][0][1]
    assert f"{fresh[0]} {json.dumps(recording.texts[fresh[0]])}" in found["text"]


def test_a_step_is_chosen_by_the_address_and_by_keys(
    dump: Any, page: str, recording: Recording, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    assert 'data-step="5"' in dump(file, "step=5")
    last = recording.steps[-1]["step"]
    press = "for (const key of [{}]) dispatchEvent(new KeyboardEvent('keydown', {{ key, bubbles: true }}));"
    for keys, step in (
        ("'End'", last),
        ("'End','Home'", 1),
        ("'ArrowRight','ArrowRight','ArrowLeft'", 2),
        ("'ArrowLeft'", 1),
        ("'End','ArrowRight'", last),
        ("'PageDown','PageDown','PageUp'", 1 + max(1, round(len(recording.steps) / 20))),
    ):
        assert f'data-step="{step}"' in dump(file, "", script=press.format(keys)), keys
    document = dump(file, "step=5", script=press.format("' '"))
    assert "after the outcome" in document


def test_hovering_names_owner_and_position(dump: Any, page: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    script = """
      show(steps.findIndex((s) => s.decode)); const map = maps[0], size = map.role.page_size;
      const [slot, found] = [...map.slots].find(([, f]) => f.position !== undefined);
      const page = Math.floor(slot / size), box = map.canvas.getBoundingClientRect();
      map.canvas.dispatchEvent(new MouseEvent("mousemove", { bubbles: true,
        clientX: box.left + (page % map.columns) * (size * map.cell + 6) + (slot % size) * map.cell + 2,
        clientY: box.top + Math.floor(page / map.columns) * (map.cell + 4) + 2 }));"""
    document = dump(file, "", script=script)
    hover = document.partition('id="hover"')[2].partition("</div>")[0]
    assert re.search(
        r"target slot \d+: page \d+, place \d+\n(committed|shared)\nsequence \d \(lane \d\), position \d+", hover
    )


def test_both_themes_and_every_tab_draw(dump: Any, page: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    for theme in ("light", "dark"):
        assert f'data-theme="{theme}"' in dump(file, f"theme={theme}")
    program = dump(file, "tab=program&program=target.decode.2")
    assert "rms_norm" in program.partition('id="calls"')[2]
    assert re.search(r"\d+ calls, .* at least", program)


def test_a_draft_loop_leads_to_the_programs_that_it_runs(
    dump: Any, page: str, recording: Recording, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    script = """
      const link = [...document.querySelectorAll("#loops a")].find((each) => each.textContent === "draft.decode.2");
      link.click();
      const out = document.createElement("pre");
      out.id = "chosen"; out.textContent = byId("program").value + " " + byId("total").textContent.split(",")[0];
      document.body.append(out);"""
    document = dump(file, "tab=program&program=target.decode.1", script=script)
    (program,) = (each for each in recording.plan.programs if each.name == "draft.decode.2")
    assert f'<pre id="chosen">draft.decode.2 {len(program.graph.nodes)} calls</pre>' in document
    listed, rounds = (
        document.partition('<details id="loops">')[2].partition("</details>")[0],
        recording.plan.loops[0].rounds,
    )
    assert f"<summary>Draft loops: {len(recording.plan.loops)}</summary>" in listed
    assert f"<td>1 to {rounds}</td>" in listed
    assert set(re.findall(r'aria-current="true">([^<]*)<', listed)) == {"draft.decode.2"}
    assert 'href="#tab=program&amp;program=draft.decode.2"' in listed


def test_ten_thousand_steps_are_stepped_through_quickly(dump: Any, recording: Recording, tmp_path: Path) -> None:
    """The run over and over, as one recording: a jump touches one snapshot and its changes; the page stays small."""
    body = recording.steps
    steps = [{**body[i % len(body)], "step": i + 1} for i in range(10_000)]
    requests = [event for event in recording.events if "request" in event]
    long = replace(recording, events=(*requests, *steps))
    file = tmp_path / "long.html"
    file.write_text(view_page(long.plan, long), encoding="utf-8")
    script = """
      const out = document.createElement("pre"); out.id = "nodes";
      for (const i of [0, 9999, 5000, 4999, 123]) show(i);
      out.textContent = document.getElementsByTagName("*").length + " " + history_.snapshots.length;
      document.body.append(out);"""
    document = dump(file, "step=9000", script=script)
    nodes, snapshots = map(int, document.partition('<pre id="nodes">')[2].partition("</pre>")[0].split())
    assert nodes < 1000
    assert snapshots == 50
    assert 'data-step="124"' in document
