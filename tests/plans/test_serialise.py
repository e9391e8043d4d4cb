"""A plan survives its JSON, and nothing else is taken for one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.core.errors import PlanError
from slotwise.plans.plan import Plan
from slotwise.plans.record import SCHEMA


@pytest.fixture(scope="module")
def text(tiny_plan: Plan) -> str:
    return tiny_plan.to_json()


@pytest.mark.parametrize("which", ["tiny_plan", "pair_plan"])
def test_reading_gives_the_plan_that_was_written(which: str, request: pytest.FixtureRequest) -> None:
    plan: Plan = request.getfixturevalue(which)
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert hash(read) == hash(plan)
    assert str(read) == str(plan)
    assert read.to_json() == plan.to_json()
    read.verify()


def test_a_plan_is_saved_and_loaded(tiny_plan: Plan, tmp_path: Path) -> None:
    tiny_plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == tiny_plan


def test_a_plain_diff_of_two_files_reads_well(text: str) -> None:
    assert max(map(len, text.splitlines())) < 2000
    assert len(text.splitlines()) > 100


def _with(text: str, **changes: object) -> str:
    return json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "it is not JSON"),
        (lambda text: "[" * 100000, "it is not JSON"),
        (lambda text: "[]", "the key 'slotwise_plan' is missing"),
        (lambda text: "{}", "the key 'slotwise_plan' is missing"),
        (lambda text: _with(text, slotwise_plan=SCHEMA + 1), f"has schema {SCHEMA + 1}.*update Slotwise to read it"),
        (lambda text: _with(text, slotwise_plan=SCHEMA - 1), f"has schema {SCHEMA - 1}.*compile it again"),
        (lambda text: _with(text, slotwise_plan="one"), "has schema 'one'.*compile it again"),
        (lambda text: _with(text, digest=None), "damaged or was edited"),
        (lambda text: _with(text, draft="none"), "damaged or was edited"),
        (lambda text: f'{{"slotwise_plan": {SCHEMA}}}', "damaged or was edited"),
    ],
    ids=["empty", "deep", "list", "object", "newer", "older", "odd schema", "no digest", "edited", "no content"],
)
def test_what_is_no_plan_of_this_schema_is_refused(text: str, change: object, message: str) -> None:
    assert callable(change)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(change(text))


@settings(max_examples=50)
@given(data=st.data())
def test_a_truncated_file_is_refused(text: str, data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(text.rstrip()) - 1))
    with pytest.raises(PlanError, match="it is not JSON"):
        Plan.from_json(text[:end])


@settings(max_examples=25)
@given(data=st.data())
def test_one_edited_number_is_refused(text: str, data: st.DataObject) -> None:
    body = text.index('"options"')
    number = data.draw(st.sampled_from([m for m in re.finditer(r"\d+", text) if m.start() > body]))
    value = data.draw(st.integers(1, 9999).filter(lambda n: n != int(number.group())))
    with pytest.raises(PlanError):
        Plan.from_json(f"{text[: number.start()]}{value}{text[number.end() :]}")


def _signed(body: dict[str, object]) -> str:
    """`body` with a digest that fits: what somebody who means harm would write."""
    from slotwise.plans.serialise import _digest

    body = {key: value for key, value in body.items() if key not in ("slotwise_plan", "digest")}
    return json.dumps({"slotwise_plan": SCHEMA, "digest": _digest(body), **body})


def test_the_signing_used_here_is_the_real_one(text: str, tiny_plan: Plan) -> None:
    assert Plan.from_json(_signed(json.loads(text))) == tiny_plan


@pytest.mark.parametrize("key", ["options", "draft", "roles", "steps", "buffers", "programs"])
@pytest.mark.parametrize("value", [None, 3, [3], {"a": 3}, "missing"], ids=repr)
def test_signed_nonsense_is_a_plan_error_too(text: str, key: str, value: object) -> None:
    body = json.loads(text)
    body[key] = value
    if value == "missing":
        del body[key]
    with pytest.raises(PlanError):
        Plan.from_json(_signed(body)).verify()


def test_a_file_that_is_not_there_and_one_that_is_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan file .*none\.json cannot be read"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"plan file .*bytes\.json cannot be read"):
        Plan.load(tmp_path / "bytes.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(PlanError, match=r"plan file .*other\.json: this is no plan"):
        Plan.load(tmp_path / "other.json")
