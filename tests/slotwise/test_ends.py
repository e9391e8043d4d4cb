"""A text ends where any of a checkpoint's files says, or a stop string; what was drawn can be decoded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slotwise import LLM, Sampling
from slotwise.core.errors import OptionError

from .test_padded_pair import padded

SETTINGS: dict[str, Any] = {"capacity": 64, "threads": 1, "progress": False}
END, OTHER = 2, 1
SILENT = {"eos_token": None}


def copied(stories: Path, folder: Path, **files: dict[str, Any]) -> Path:
    """A copy of the bundled model with entries of its JSON files changed; None removes one."""
    shutil.copytree(stories, folder)
    for name, change in files.items():
        file = folder / f"{name}.json"
        entries = {**(json.loads(file.read_text()) if file.exists() else {}), **change}
        file.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))
    return folder


def forced(token: int, **options: Any) -> Sampling:
    """Draws `token` at each place."""
    return Sampling(max_new_tokens=4, logit_bias={token: 1e4}, **options)


@pytest.mark.parametrize(
    "files",
    [
        {"generation_config": {"eos_token_id": OTHER}, "config": {"eos_token_id": OTHER}},
        {"generation_config": {"eos_token_id": END}, "config": {"eos_token_id": OTHER}, "tokenizer_config": SILENT},
        {"generation_config": {"eos_token_id": [OTHER]}, "config": {"eos_token_id": [END]}, "tokenizer_config": SILENT},
    ],
    ids=["the tokenizer's", "generation_config's", "config's"],
)  # fmt: skip
def test_every_file_names_ends(stories: Path, tmp_path: Path, files: dict[str, dict[str, Any]]) -> None:
    model = LLM(copied(stories, tmp_path / "m", **files), **SETTINGS)
    assert set(model.eos_ids) == {END, OTHER}
    for end in (END, OTHER):
        out = model.generate("Once", forced(end))
        assert (out.token_ids, out.text, out.finish_reason) == ((end,), "", "stop")


def test_an_end_that_the_model_cannot_give_is_no_end(stories: Path, tmp_path: Path) -> None:
    model = LLM(copied(stories, tmp_path / "m", config={"eos_token_id": [END, 5000]}), **SETTINGS)
    assert model.eos_ids == (END,)


def test_a_stop_string_may_name_a_special_token(llm: LLM) -> None:
    name = llm.tokenizer.token(END)
    out = llm.generate("Once", forced(END, ignore_eos=True, stop=name))
    assert (out.token_ids, out.text, out.finish_reason) == ((END,), "", "stop")
    out = llm.generate("Once", forced(END, ignore_eos=True, stop=f"{name}{name}"))
    assert (out.token_ids, out.finish_reason) == ((END, END), "stop")
    assert llm.generate("Once", forced(END, ignore_eos=True, stop=f"a{name}")).finish_reason == "length"
    with pytest.raises(OptionError, match="can never match"):
        llm.generate("Once", Sampling(stop="\ud800"))


def test_what_a_padded_model_draws_can_be_decoded(stories: Path, tmp_path: Path) -> None:
    model = LLM(padded(stories, tmp_path / "m", 2112), **SETTINGS)
    out = model.generate("Once", forced(2100))
    assert model.tokenizer.decode(out.token_ids) == out.text == model.tokenizer.token(2100) == ""
    assert model.tokenizer.decode([*out.token_ids, *model.tokenizer.encode("a", add_special_tokens=False)]) == "a"
    for beyond in (2112, -1):
        with pytest.raises(OptionError, match=r"token id .* must lie in \[0, 2112\)"):
            model.tokenizer.decode([beyond])
        with pytest.raises(OptionError, match="token id"):
            model.tokenizer.token(beyond)
