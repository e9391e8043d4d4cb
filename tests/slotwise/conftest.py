"""Checkpoints and models that the tests of the API and of the command line share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from slotwise import LLM, Sampling
from slotwise.cli import main
from slotwise.inspect.view import view_page
from slotwise.recording.file import Recording, read_recording

from .commands import Outcome, Run

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Once upon a time{% endif %}"
)


SAMPLINGS = [Sampling(max_new_tokens=count, temperature=0.8, seed=3) for count in (20, 3, 10)]
"""Those of the run in `recorded`."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("plan", "show", folder)` runs a command in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse, for --help and wrong use
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture(scope="session")
def llm(stories: Path) -> LLM:
    """The bundled target, without a drafter."""
    return LLM(stories, capacity=192, threads=1)


@pytest.fixture(scope="session")
def drafting(stories: Path, stories_draft: Path) -> LLM:
    """The bundled pair."""
    return LLM(stories, draft=stories_draft, capacity=192, threads=1)


@pytest.fixture(scope="session")
def counting(stories: Path) -> LLM:
    """The bundled target, drafting from what its text repeats."""
    return LLM(stories, draft="ngram", capacity=192, threads=1)


@pytest.fixture(scope="session")
def talkative(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled target with a chat template."""
    folder = tmp_path_factory.mktemp("checkpoints") / "talkative"
    shutil.copytree(stories, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """A tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama in float32, of 101 words, whose authors would sample."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoints") / "random"
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.1})
    )
    write_tokenizer(folder, [f"w{index}" for index in range(101)])
    return folder


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def recording(recorded: Path) -> Recording:
    """The run of `recorded`, read."""
    return read_recording(recorded)


@pytest.fixture(scope="session")
def page(recording: Recording) -> str:
    """Its page."""
    return view_page(recording.plan, recording)
