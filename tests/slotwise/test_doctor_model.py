"""What `slotwise doctor MODEL` promises: every special token and end with the file that named it, and what will act."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slotwise.inspect import checkpoint
from slotwise.inspect.checkpoint import describe

from .commands import Run


@pytest.fixture
def told(stories: Path, tmp_path: Path, run: Run) -> Any:
    """The words of `doctor` on a copy of the bundled model with entries of its JSON files changed."""

    def tell(code: int = 0, **files: dict[str, Any]) -> list[str]:
        shutil.copytree(stories, tmp_path / "m")
        for name, change in files.items():
            file = tmp_path / "m" / f"{name}.json"
            file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **change}))
        done = run("doctor", tmp_path / "m")
        assert (done.code, done.err) == (code, "")
        return [" ".join(line.split()) for line in done.out.splitlines()]

    return tell


def test_a_checkpoint_is_told_in_sections(told: Any) -> None:
    lines = told()
    for line in (
        "architecture llama",
        "vocabulary 2048 ids",
        "around a prompt '<|begin|>' 1",
        "bos_token '<|begin|>' 1 (tokenizer_config.json)",
        "2 '<|end|>', named by generation_config.json, config.json, tokenizer_config.json",
        "templates none",
        "greedy generation_config.json changes nothing",
    ):
        assert line in lines


def test_every_token_and_end_comes_with_its_file(told: Any) -> None:
    entry = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    lines = told(
        tokenizer_config={
            "extra_special_tokens": {"tool_token": "<tool>"},
            "additional_special_tokens": ["<|begin|>", "<list>"],
            "added_tokens_decoder": {
                "2": {"content": "<here>", "special": True, **entry},
                "2049": {"content": "<shown>", "special": False, **entry},
            },
            "chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}],
        },
        special_tokens_map={"mask_token": "<mask>"},
        config={"eos_token_id": [5, 9000]},
        generation_config={"do_sample": True, "temperature": 0.5, "top_k": 7},
    )
    beyond = "; beyond the model's 2048 ids, so it never draws it"
    for line in (
        f"tool_token '<tool>' 2050 (tokenizer_config.json){beyond}",
        f"mask_token '<mask>' 2052 (special_tokens_map.json){beyond}",
        f"without a name '<list>' 2051 (tokenizer_config.json){beyond}",
        f"without a name '<here>' 2048 (tokenizer_config.json){beyond}",
        f"without a name '<shown>' 2049 (tokenizer_config.json), shown as text{beyond}",
        "note tokenizer_config.json gives '<here>' the id 2, it has 2048",
        f"9000 no token, named by config.json{beyond}",
        "templates default, tool_use (tokenizer_config.json)",
        "temperature 0.5",
        "top_k 7",
    ):
        assert line in lines, "\n".join(lines)


def test_what_is_refused_leaves_the_rest_told(told: Any) -> None:
    lines = told(1, generation_config={"do_sample": "yes"}, config={"model_type": "lama"})
    refused = [line for line in lines if line.startswith("refused: ")]
    assert len(refused) == 2
    assert 'model_type "lama" is not supported' in refused[0]
    assert "'do_sample' must be true or false" in refused[1]
    assert "eos_token '<|end|>' 2 (tokenizer_config.json)" in lines


def test_a_folder_that_is_none_is_one_sentence(run: Run, tmp_path: Path) -> None:
    done = run("doctor", tmp_path / "none")
    assert (done.code, done.out) == (1, "")
    assert "expected a checkpoint folder" in done.err


def test_a_part_tells_what_it_knows_by_one_more_section(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ages(found: checkpoint.Checkpoint) -> checkpoint.Lines:
        yield "name", found.model.spec.name

    monkeypatch.setattr(checkpoint, "SECTIONS", (("mine", ages),))
    assert str(describe(stories)[0]) == "mine\n  name               stories"
