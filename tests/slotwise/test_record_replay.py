"""What recordings promise: a run can be had again, its first difference is named, damage and strangers are refused."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from slotwise import LLM, Sampling
from slotwise.core.backend import load_backend
from slotwise.core.errors import LedgerError, OptionError, OutputError, RecordingError
from slotwise.engine.request import Request
from slotwise.inspect.near_tie import scores_at
from slotwise.inspect.replay import first_difference, load_recorded, replay, replay_on
from slotwise.recording.file import Recording, read_recording, sampling_from_json, write_line

from .commands import Run
from .planted import last_row_off, registered, spoiled

SMALL = {"capacity": 64, "max_sequences": 2, "decode_rows": 8, "prefill_chunk": 16, "speculate": 3, "page_size": 4}
SAMPLED = Sampling(max_new_tokens=14, temperature=0.8, seed=3, repetition_penalty=1.1)
PROMPTS = ["Once upon a time", "The cat", "Once upon a time there was a dog"]


@pytest.fixture(scope="module")
def load(stories: Path, stories_draft: Path) -> Callable[[], LLM]:
    """Loads the bundled pair anew, on the reference."""
    return lambda: LLM(stories, draft=stories_draft, backend="reference", threads=1, progress=False, **SMALL)


@pytest.fixture(scope="module")
def recorded(load: Callable[[], LLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three requests on two lanes, sampled, with logits."""
    path = tmp_path_factory.mktemp("recordings") / "run.jsonl"
    llm = load()
    with llm.record(path, tensors=True):
        llm.generate(PROMPTS, [SAMPLED, replace(SAMPLED, temperature=0), replace(SAMPLED, seed=9)])
    return path


@pytest.fixture(scope="module")
def recording(recorded: Path) -> Recording:
    """That recording, read."""
    return read_recording(recorded)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _rewrite(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(write_line({k: v for k, v in e.items() if k != "crc"}) for e in entries))


def test_a_recording_holds_every_step_with_its_binding_tokens_and_ledger(recording: Recording) -> None:
    assert not recording.is_cut
    assert recording.is_whole
    assert [e["request"] for e in recording.events if "request" in e] == [0, 1, 2]
    assert [step["step"] for step in recording.steps] == list(range(1, len(recording.steps) + 1))
    assert all(len(tokens) == 14 for tokens in recording.tokens().values())
    decodes = [step["decode"] for step in recording.steps if step["decode"]]
    assert {frozenset(d["spans"]) for d in decodes} >= {frozenset({"target", "draft"})}
    for decode in decodes:
        assert [len(drafts) for drafts in decode["drafts"]] == decode["k"]
    for step in recording.steps:
        for sums in step["ledger"].values():
            assert sums["free"] + sums["held"] + sums["cached"] == sums["total"]
            assert sums["reserved"] == sums["committed"] + sums["released"]


def test_page_tables_can_be_built_from_the_changes(recording: Recording) -> None:
    tables: dict[int, list[int]] = {}
    for step in recording.steps:
        for part in ("bound", "after"):
            for lane, start, pages in step.get(part, {}).get("target", {}).get("tables", []):
                tables[lane] = tables.get(lane, [])[:start] + pages
        held = [page for table in tables.values() for page in table]
        assert len(set(held)) == step["ledger"]["target"]["held"]
        assert 0 not in held
    assert not any(tables.values())


def test_the_logits_kept_are_those_that_tokens_were_drawn_from(
    recorded: Path, recording: Recording, load: Callable[[], LLM]
) -> None:
    tensors = load_file(f"{recorded}.safetensors")
    greedy = recording.tokens()[1]
    assert recording.requests[1]["sampling"]["temperature"] == 0
    plain = load()
    path = recorded.parent / "greedy.jsonl"
    with plain.record(path, tensors=True):
        out = plain.generate(PROMPTS[1], Sampling(max_new_tokens=4))
    kept = load_file(f"{path}.safetensors")
    firsts = [kept[name] for name in sorted(kept, key=lambda n: int(n[4:].partition(".")[0]))]
    assert int(firsts[0][-1].argmax()) == out.token_ids[0]
    assert len(tensors) >= len(recording.steps) - 1
    assert all(value.shape[1] == 2048 and value.isfinite().all() for value in tensors.values())
    assert greedy


def test_recording_changes_nothing(recording: Recording, load: Callable[[], LLM]) -> None:
    outs = load().generate(PROMPTS, [SAMPLED, replace(SAMPLED, temperature=0), replace(SAMPLED, seed=9)])
    assert [list(out.token_ids) for out in outs] == list(recording.tokens().values())


def test_a_replay_is_the_same_run_step_by_step(recorded: Path, recording: Recording) -> None:
    found = replay(recorded)
    assert found.is_same, str(found)
    assert found.steps == len(recording.steps)
    assert str(found).startswith(f"the same: {found.steps} steps and 42 tokens of 3 requests")


def test_a_recording_cut_short_replays_up_to_where_it_ends(recorded: Path, tmp_path: Path) -> None:
    text = recorded.read_text()
    cut = tmp_path / "cut.jsonl"
    head = text.index("\n") + 1  # the plan, which is most of a short recording
    cut.write_text(text[: head + int((len(text) - head) * 0.7)])
    short = read_recording(cut)
    assert short.is_cut
    found = replay(cut)
    assert found.is_same, str(found)
    assert found.steps == len(short.steps) < len(read_recording(recorded).steps)
    assert "cut short after step" in str(found)


def test_the_first_difference_of_a_step_is_named(recorded: Path, tmp_path: Path) -> None:
    entries = _lines(recorded)
    step = next(e for e in entries if e.get("step") == 5)
    step["decode"]["k"][0] += 1
    changed = tmp_path / "changed.jsonl"
    _rewrite(changed, entries)
    found = replay(changed)
    assert not found.is_same
    was = step["decode"]["k"][0]
    assert found.difference == f"step 5, decode, k[0]: recorded {was}, replayed {was - 1}"


def test_cancelled_requests_are_cancelled_again(load: Callable[[], LLM], tmp_path: Path) -> None:
    llm, path = load(), tmp_path / "cancel.jsonl"
    with llm.record(path):
        stream = llm.stream(PROMPTS[0], SAMPLED)
        next(stream)
        stream.close()
        llm.generate(PROMPTS[1], SAMPLED)
    assert [e["cancel"] for e in read_recording(path).events if "cancel" in e] == [0]
    found = replay(path)
    assert found.is_same, str(found)


def test_another_backend_with_the_same_arithmetic_gives_the_same_tokens(recorded: Path) -> None:
    twin = replace(load_backend("reference"), name="twin")
    with registered(twin):
        found = replay(recorded, backend="twin")
    assert found.is_same
    assert not found.same_plan
    assert "42 tokens of 3 requests" in str(found)


def test_a_run_without_drafts_replays_on_another_backend(stories: Path, tmp_path: Path) -> None:
    llm = LLM(stories, backend="reference", threads=1, progress=False, **{**SMALL, "speculate": 0})
    path = tmp_path / "run.jsonl"
    with llm.record(path):
        llm.generate(PROMPTS[0], SAMPLED)
    with registered(replace(load_backend("reference"), name="twin")):
        assert replay(path, backend="twin").is_same


def test_tokens_that_part_on_another_backend_are_named_with_the_gap(recorded: Path) -> None:
    with registered(spoiled("noisy", "logits", lambda _, outputs: outputs[0][:, 7].add_(50.0))):
        found = replay(recorded, backend="noisy")
    assert not found.is_same
    first = found.partings[0]
    assert (first.index, first.other) == (0, 7)
    assert not first.is_near_tie
    assert first.gap is not None
    assert first.gap > 10
    assert "no near-tie" in str(found)


def test_a_near_tie_is_called_one(load: Callable[[], LLM], tmp_path: Path) -> None:
    llm, path = load(), tmp_path / "greedy.jsonl"
    with llm.record(path):
        out = llm.generate(PROMPTS[0], Sampling(max_new_tokens=1))
    logits = llm.logits(llm.tokenizer.encode(PROMPTS[0]))[-1]
    best, second = logits.topk(2).indices.tolist()
    assert out.token_ids == (best,)

    def spoil(_: object, outputs: tuple[torch.Tensor, ...]) -> None:
        outputs[0][:, second] = outputs[0][:, best] * (1 + 1e-6)

    with registered(spoiled("tied", "logits", spoil)):
        found = replay(path, backend="tied")
    assert found.partings[0].other == second
    assert found.partings[0].is_near_tie
    assert "a near-tie" in str(found)


def test_damage_is_found_and_the_line_is_named(recorded: Path, tmp_path: Path) -> None:
    lines = recorded.read_text().splitlines(keepends=True)
    for number, word in ((1, "line 1: damaged"), (3, "line 3: damaged or edited")):
        broken = list(lines)
        middle = len(broken[number - 1]) // 2
        text = broken[number - 1]
        broken[number - 1] = text[:middle] + ("1" if text[middle] != "1" else "2") + text[middle + 1 :]
        path = tmp_path / "broken.jsonl"
        path.write_text("".join(broken))
        with pytest.raises(RecordingError, match=word):
            read_recording(path)


def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, stories: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(RecordingError, match="cannot be read"):
        read_recording(path)
    path.write_text("")
    with pytest.raises(RecordingError, match="is empty"):
        read_recording(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordingError, match="cannot be read"):
        read_recording(path)
    for text in ('{"a": 1}\n', write_line({"a": 1}), "[" * 5000 + "\n"):
        path.write_text(text)
        with pytest.raises(RecordingError, match="is no recording"):
            read_recording(path)
    with pytest.raises(RecordingError, match="is no recording"):
        read_recording(stories / "config.json")


def test_a_recording_of_another_version_is_refused(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    for schema, words in ((99, "update Slotwise"), (0, "record the run again")):
        entries = _lines(recorded)
        entries[0]["slotwise_recording"] = schema
        _rewrite(path, entries)
        with pytest.raises(RecordingError, match=f"schema {schema} .*{words}"):
            read_recording(path)
    entries = _lines(recorded)
    entries[0]["plan"]["slotwise_plan"] = 77
    _rewrite(path, entries)
    with pytest.raises(RecordingError, match="the plan has schema 77"):
        read_recording(path)
    entries = _lines(recorded)
    entries[0]["plan"]["options"]["capacity"] = 1
    _rewrite(path, entries)
    with pytest.raises(RecordingError, match="does not match its digest"):
        read_recording(path)
    entries = _lines(recorded)
    entries[2] = {"surprise": 1}
    _rewrite(path, entries)
    with pytest.raises(RecordingError, match="line 3: expected one of request"):
        read_recording(path)


def test_a_recording_of_another_checkpoint_is_refused(
    recorded: Path, recording: Recording, stories_draft: Path
) -> None:
    for options in ({}, {"backend": "reference"}):
        with pytest.raises(RecordingError, match="another checkpoint"):
            load_recorded(recording, model=stories_draft, **options)
    with pytest.raises(RecordingError, match="cannot be run on"):
        load_recorded(recording, model=recorded.parent)


def test_a_replay_needs_a_fresh_engine(recording: Recording, load: Callable[[], LLM]) -> None:
    llm = load()
    llm.generate("The", Sampling(max_new_tokens=1))
    with pytest.raises(RecordingError, match="has not run yet"):
        replay_on(llm.engine, recording)


def test_a_recording_does_not_begin_in_the_middle(load: Callable[[], LLM], tmp_path: Path) -> None:
    llm = load()
    stream = llm.stream(PROMPTS[0], SAMPLED)
    with pytest.raises(OptionError, match="while nothing runs"), llm.record(tmp_path / "x.jsonl"):
        pass
    stream.close()
    with pytest.raises(OutputError, match="cannot be written"), llm.record(tmp_path / "no" / "x.jsonl"):
        pass


def test_a_disk_that_fails_ends_the_recording_and_not_the_requests(load: Callable[[], LLM], tmp_path: Path) -> None:
    llm = load()
    outs = []
    broken = mock.patch("slotwise.recording.recorder.write_line", side_effect=OSError("no space"))
    with pytest.raises(OutputError, match=r"is incomplete: .*no space"), llm.record(tmp_path / "x.jsonl"), broken:
        outs.append(llm.generate(PROMPTS[0], SAMPLED))
    assert len(outs[0].token_ids) == 14
    assert len(llm.engine.observers) == 1  # the crash recorder's


def _crash(llm: LLM, at: int) -> Any:
    """Make the ledger's check fail in step `at`."""
    check = llm.engine.ledger.check

    def failing(step: int) -> None:
        check(step)
        if step == at:
            raise LedgerError(f"step {step}: planted")

    return mock.patch.object(llm.engine.ledger, "check", side_effect=failing)


def test_a_crash_writes_a_recording_by_itself_and_says_where(
    load: Callable[[], LLM], recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    llm = load()
    with _crash(llm, 4), pytest.raises(LedgerError, match="slotwise replay") as crash:
        llm.generate(PROMPTS, [SAMPLED, replace(SAMPLED, temperature=0), replace(SAMPLED, seed=9)])
    (path,) = tmp_path.glob("slotwise-crash-*.jsonl")
    assert str(path) in str(crash.value)
    found = read_recording(path)
    assert found.crash is not None
    assert (found.crash["crash"], found.crash["error"]) == (4, "LedgerError")
    assert "failing" in found.crash["where"]
    assert "target: pages of 4" in found.crash["ledger"]
    for number, tokens in found.tokens().items():
        assert tokens == recording.tokens()[number][: len(tokens)]
    again = replay(path)
    assert again.partings == ()
    assert "the recorded run crashed in step 4: LedgerError" in str(again)
    assert "ran past that without an error" in str(again)
    assert not again.is_same


def test_a_crash_within_a_recording_ends_it_with_the_crash(load: Callable[[], LLM], tmp_path: Path) -> None:
    llm, path = load(), tmp_path / "run.jsonl"
    with pytest.raises(LedgerError), _crash(llm, 3), llm.record(path):
        llm.generate(PROMPTS[0], SAMPLED)
    found = read_recording(path)
    assert found.crash is not None
    assert found.crash["under_way"]["step"] == 3
    assert [step["step"] for step in found.steps] == [1, 2]
    assert replay(path).steps == 2


def test_a_difference_is_told_in_words() -> None:
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}, "x") is None
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "x") == "x, a[1], b: recorded 2, replayed 3"
    assert first_difference([1], [1, 2], "x") == "x: 1 entries recorded, 2 replayed"
    assert first_difference({"a": 1}, {}, "x") == "x: a was recorded, not replayed"


def test_every_line_ends_with_its_checksum(recorded: Path) -> None:
    for line in recorded.read_text().splitlines():
        body, _, checksum = line.rpartition(',"crc":')
        assert zlib.crc32((body + "}").encode()) == int(checksum.rstrip("}"))


def test_the_commands_record_and_replay(run: Run, stories: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    options = ("--capacity", 48, "--max-sequences", 1, "--threads", 1, "--max-new-tokens", 6, "--draft", "ngram")
    done = run("generate", stories, "--prompt", "Once", "--record", path, "--backend", "reference", *options)
    assert (done.code, f"recorded in {path}" in done.err) == (0, True)
    again = run("replay", path)
    assert (again.code, again.err) == (0, "")
    assert again.out.startswith("the same: ")
    wrong = run("replay", path, "--backend", "nosuch")
    assert (wrong.code, "backend 'nosuch' is not known" in wrong.err) == (1, True)
    with registered(spoiled("off", "logits", last_row_off(-2.0))):
        parted = run("replay", path, "--backend", "off")
    assert (parted.code, "tokens part at new token 0" in parted.out) == (1, True)
    assert "--record" in run("generate", stories, "--prompt", "x", "--tensors").err


def test_the_score_of_a_token_that_was_drawn_is_the_greatest(recording: Recording, load: Callable[[], LLM]) -> None:
    """Penalties, temperature and noise included: what a parting is judged by is what was compared to draw."""
    llm = load()
    for number, line in recording.requests.items():
        request = Request(tuple(line["prompt_ids"]), sampling_from_json(line["sampling"]))
        tokens = recording.tokens()[number]
        for at in (1, 5, 13):
            scores = scores_at(llm.engine, request, line["sampling"]["seed"], tokens[:at])
            assert int(scores.argmax()) == tokens[at]
