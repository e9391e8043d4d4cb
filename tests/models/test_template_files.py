"""Of several chat templates the one is rendered that transformers would render."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slotwise.core.errors import CheckpointError, RequestError
from slotwise.llm import LLM
from slotwise.models.chat_template import ChatTemplate

STORIES = Path(__file__).parents[2] / "examples" / "models" / "stories"
HELLO = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
PLAIN, WITH_TOOLS, RAG = "plain {{ messages[0].content }}", "tools {{ tools|tojson }}", "rag {{ documents }}"
BOTH = {"default": PLAIN, "tool_use": WITH_TOOLS}


def as_list(templates: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "template": source} for name, source in templates.items()]


def write(folder: Path, configured: object, files: dict[str, str]) -> Path:
    """A checkpoint's tokenizer with these templates in its configuration and beside it."""
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(STORIES / name, folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|start|>", "eos_token": "<|end|>"}
    if configured is not None:
        config["chat_template"] = configured  # type: ignore[assignment]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, source in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source)
    return folder


PLACES: dict[str, tuple[object, dict[str, str]]] = {
    "text": (PLAIN, {}),
    "list": (as_list(BOTH), {}),
    "mapping": (BOTH, {}),
    "list without default": (as_list({"tool_use": WITH_TOOLS, "rag": RAG}), {}),
    "list of one": (as_list({"tool_use": WITH_TOOLS}), {}),
    "list of default": (as_list({"default": PLAIN}), {}),
    "files": (None, {"chat_template.jinja": PLAIN, "additional_chat_templates/tool_use.jinja": WITH_TOOLS}),
    "files without default": (None, {"additional_chat_templates/tool_use.jinja": WITH_TOOLS}),
    "files before list": (as_list(BOTH), {"additional_chat_templates/rag.jinja": RAG}),
    "file before list": (as_list(BOTH), {"chat_template.jinja": "file"}),
    "nothing": (None, {}),
}


@pytest.mark.parametrize("asked", [None, "default", "tool_use", "rag", "{{ bos_token }}mine"])
@pytest.mark.parametrize("tools", [None, [], TOOLS], ids=["without tools", "no tools", "tools"])
@pytest.mark.parametrize("place", PLACES)
def test_the_template_is_the_one_that_transformers_renders(tmp_path: Path, place: str, tools: Any, asked: Any) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path, *PLACES[place])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs: str | None
    ours: str | None
    try:
        theirs = tokenizer.apply_chat_template(
            HELLO, tools=tools, chat_template=asked, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # whatever the oracle raises
        theirs = None
    if theirs == asked and place != "nothing":
        # transformers takes the name of a template that there is not for a template's text; here it is refused, and
        # `default` names a lone template.
        theirs = {"text": PLAIN, "list of default": PLAIN, "file before list": "file"}.get(place)
        theirs = theirs.replace("{{ messages[0].content }}", "hi") if theirs and asked == "default" else None
    elif theirs == asked:
        theirs = None
    try:
        ours = ChatTemplate.load(folder).render(HELLO, tools=tools, chat_template=asked)
    except RequestError:
        ours = None
    assert ours == theirs


def test_a_list_without_default_says_so_when_a_chat_needs_one(tmp_path: Path) -> None:
    template = ChatTemplate.load(write(tmp_path, *PLACES["list without default"]))
    assert template.has_chat_template
    with pytest.raises(RequestError, match=r"none named 'default'; choose one by chat_template=, of rag, tool_use"):
        template.render(HELLO)
    with pytest.raises(RequestError, match="no template 'tool_user', only rag, tool_use"):
        template.render(HELLO, chat_template="tool_user")


def test_a_checkpoint_whose_templates_lack_a_default_generates(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(STORIES, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "chat_template": as_list({"rag": RAG, "tool_use": "{{ messages[0].content }}"})})
    )
    llm = LLM(folder, capacity=32, threads=1, progress=False)
    assert llm.generate([1, 2, 3]).token_ids
    assert llm.chat_prompt(HELLO, chat_template="tool_use") == llm.tokenizer.encode("hi", add_special_tokens=False)
    with pytest.raises(RequestError, match="reads no variable 'tools', so it would change nothing"):
        llm.chat_prompt(HELLO, tools=TOOLS)
    with pytest.raises(RequestError, match=r"reads no variable 'documnts' \(did you mean 'documents'\?\)"):
        llm.chat_prompt(HELLO, chat_template="rag", template_variables={"documnts": 1})


def test_a_template_of_the_callers_own_is_the_callers_fault() -> None:
    with pytest.raises(RequestError, match="chat_template: the chat template is broken at line 1"):
        ChatTemplate(PLAIN, "mine").render(HELLO, chat_template="{% if %}")
    with pytest.raises(RequestError, match="must be a template's text or its name, found a int"):
        ChatTemplate(PLAIN, "mine").render(HELLO, chat_template=3)  # type: ignore[arg-type]


def test_a_template_file_of_several_must_be_text(tmp_path: Path) -> None:
    folder = write(tmp_path, None, {"additional_chat_templates/a.jinja": ""})
    (folder / "additional_chat_templates" / "b.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"b\.jinja: expected UTF-8"):
        ChatTemplate.load(folder)
