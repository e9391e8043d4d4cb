"""What the viewer's page promises once its scripts have run; in a browser, where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slotwise.inspect.view import view_page
from slotwise.recording.file import Recording


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


def test_ten_thousand_steps_take_few_nodes_and_fifty_snapshots(dump: Any, recording: Recording, tmp_path: Path) -> None:
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
