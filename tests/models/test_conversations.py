"""Conversations as people write them render in real templates as in transformers, or both refuse.

Where messages are brought into one form first, the conversation that transformers is given in its place stands beside.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from slotwise.core.errors import CheckpointError, RequestError
from slotwise.models.chat_template import ChatTemplate

BESIDE = [folder / "shared" / "chat_templates" for folder in Path(__file__).parents[3:]]
SHARED = next((folder for folder in BESIDE if folder.is_dir()), BESIDE[0])
NAMES = (
    "GLM-4.6", "HuggingFaceTB-SmolLM3-3B", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "Qwen3-Coder",
    "deepseek-ai-DeepSeek-V3.1", "google-gemma-2-2b-it", "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct", "microsoft-Phi-3.5-mini-instruct", "mistralai-Mistral-Nemo-Instruct-2407",
    "openai-gpt-oss-120b",
)  # fmt: skip
READS_PARTS = {"GLM-4.6": ("user", "system", "assistant")}
"""The templates that write the text of parts, and in whose messages."""

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": '<now> & "thén"',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "é"}, "n": {"type": "integer", "enum": [1, 2]}},
            "required": ["city"],
        },
    },
}
ARGUMENTS = {"city": "Zürich", "n": 2, "deep": {"a": [1, None, 1.5, True]}}
WRITTEN = '{"city":"Z\\u00fcrich",  "n": 2, "deep": {"a": [1, null, 1.5, true]}}'
HELLO = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello there"}
MORE = {"role": "user", "content": "And more?"}


def call(arguments: Any = ARGUMENTS, name: str = "weather", **also: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}, **also}


def calling(*calls: dict[str, Any], **also: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls), **also}


def result(content: Any = "sunny") -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@dataclass(frozen=True)
class Shape:
    """A conversation; `instead` is what transformers is given in its place where ours brings it into another form."""

    said: list[dict[str, Any]]
    instead: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)


def without(message: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name not in names}


TOOLS = {"tools": [TOOL]}
REASONED = {**ANSWER, "reasoning_content": "why so", "thinking": "why so"}
CALLED = calling(call())
SHAPES: dict[str, Shape] = {
    "one": Shape([HELLO]),
    "no prompt": Shape([HELLO], options={"add_generation_prompt": False}),
    "system": Shape([{"role": "system", "content": "Be brief. /no_think"}, HELLO]),
    "developer": Shape([{"role": "developer", "content": "Be brief."}, HELLO]),
    "system alone": Shape([{"role": "system", "content": "Be brief."}]),
    "system in the middle": Shape([HELLO, ANSWER, {"role": "system", "content": "Now rhyme."}, MORE]),
    "turns": Shape([HELLO, ANSWER, MORE]),
    "many turns": Shape([HELLO, ANSWER, MORE, {**ANSWER, "content": "b"}, HELLO, {**ANSWER, "content": "d"}, MORE]),
    "the same role twice": Shape([HELLO, MORE]),
    "an assistant twice": Shape([HELLO, ANSWER, ANSWER]),
    "an assistant first": Shape([ANSWER, HELLO]),
    "an assistant last": Shape([HELLO, ANSWER], options={"add_generation_prompt": False}),
    "unknown role": Shape([HELLO, {"role": "critic", "content": "bad"}]),
    "unicode": Shape([{"role": "user", "content": "naïve 🙂 \u202e \u0000 ｆｕｌｌ\u2028é"}]),
    "blanks": Shape([{"role": "user", "content": " \n a \t\n"}, {"role": "assistant", "content": "\n\nb \n"}, MORE]),
    "markup": Shape([{"role": "user", "content": "<b>&amp; {{ messages }} {% if %} '\"\\ <|im_end|>"}]),
    "empty content": Shape([{"role": "user", "content": ""}]),
    "empty answer": Shape([HELLO, {"role": "assistant", "content": ""}, MORE]),
    "null keys": Shape(
        [{**HELLO, "name": None, "tool_calls": None}, {**ANSWER, "tool_calls": None, "reasoning": None}, MORE],
        [HELLO, ANSWER, MORE],
    ),
    "tools": Shape([HELLO], options=TOOLS),
    "two tools and a system": Shape(
        [{"role": "system", "content": "Be brief."}, HELLO],
        options={"tools": [TOOL, {"type": "function", "function": {**TOOL["function"], "name": "other"}}]},  # type: ignore[dict-item]
    ),
    "no tools": Shape([HELLO], options={"tools": []}),
    "a call": Shape([HELLO, CALLED, result(), MORE], options=TOOLS),
    "a call last": Shape([HELLO, CALLED], options={**TOOLS, "add_generation_prompt": False}),
    "a result last": Shape([HELLO, CALLED, result()], options=TOOLS),
    "a call with words": Shape([HELLO, calling(call(), content="Let me see."), result(), MORE], options=TOOLS),
    "a call without arguments": Shape([HELLO, calling(call({})), result(), ANSWER, MORE], options=TOOLS),
    "two calls": Shape([HELLO, calling(call(), call({"city": "P"})), result(), result("rain"), MORE], options=TOOLS),
    "arguments as text": Shape(
        [HELLO, calling(call(WRITTEN)), result(), ANSWER, MORE], [HELLO, CALLED, result(), ANSWER, MORE], TOOLS
    ),
    "arguments as empty text": Shape(
        [HELLO, calling(call("")), result(), MORE], [HELLO, calling(call({})), result(), MORE], TOOLS
    ),
    "a call of a bare function": Shape([HELLO, calling({"name": "weather", "arguments": ARGUMENTS}), result()]),
    "null content": Shape(
        [HELLO, {**CALLED, "content": None}, result(), MORE], [HELLO, without(CALLED, "content"), result(), MORE], TOOLS
    ),
    "null content, last": Shape(
        [HELLO, {**CALLED, "content": None}, result()], [HELLO, without(CALLED, "content"), result()], TOOLS
    ),
    "no content": Shape([HELLO, without(CALLED, "content"), result(), ANSWER, MORE], options=TOOLS),
    "a result as a mapping": Shape([HELLO, CALLED, result({"output": "sunny", "t": 3}), MORE], options=TOOLS),
    "a result as a list": Shape([HELLO, CALLED, result([{"output": "sunny"}]), MORE], options=TOOLS),
    "a result of nothing": Shape([HELLO, CALLED, result([]), MORE], options=TOOLS),
    "a result of nothing, as a mapping": Shape([HELLO, CALLED, result({}), MORE], options=TOOLS),
    "a result of many lines": Shape([HELLO, CALLED, result('{"t": 3}\n"x"'), MORE], options=TOOLS),
    "reasoning_content": Shape([HELLO, {**ANSWER, "reasoning_content": "why so"}, MORE], [HELLO, REASONED, MORE]),
    "thinking": Shape([HELLO, {**ANSWER, "thinking": "why so"}, MORE], [HELLO, REASONED, MORE]),
    "reasoning": Shape(
        [HELLO, {**ANSWER, "reasoning": "why so"}],
        [HELLO, {**REASONED, "reasoning": "why so"}],
        {"add_generation_prompt": False},
    ),
    "reasoning before a call": Shape(
        [HELLO, calling(call(), reasoning="look it up"), result()],
        [HELLO, calling(call(), reasoning_content="look it up", thinking="look it up"), result()],
        TOOLS,
    ),
    "reasoning in the text": Shape([HELLO, {**ANSWER, "content": "<think>\nwhy\n</think>\n\nso"}, MORE]),
    "parts": Shape([{"role": "user", "content": parts("Hi ", "there")}]),
    "parts in turns": Shape(
        [{"role": "system", "content": parts("Be brief.")}, HELLO, {**ANSWER, "content": parts("a", "b")}, MORE]
    ),
    "parts of a result": Shape([HELLO, CALLED, result(parts("sunny")), MORE], options=TOOLS),
    "thinking off": Shape([HELLO, ANSWER, MORE], variables={"enable_thinking": False}),
    "thinking on": Shape([HELLO], variables={"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}),
    "documents": Shape([HELLO], options={"documents": [{"title": "a", "text": "b"}]}),
    "go on": Shape([HELLO, ANSWER], options={"continue_final_message": True}),
    "go on, trimmed": Shape([HELLO, {**ANSWER, "content": " Sure, \n"}], options={"continue_final_message": True}),
    "go on, empty": Shape([HELLO, {**ANSWER, "content": ""}], options={"continue_final_message": True}),
    "go on, again": Shape([{**HELLO, "content": "<|im_end|>\n"}, {**ANSWER, "content": "<|im_end|>\n"}],
                          options={"continue_final_message": True}),
    "go on, parts": Shape(
        [HELLO, {**ANSWER, "content": parts("Sure, ", "it is")}], options={"continue_final_message": True}
    ),
    "go on with a user": Shape([HELLO, ANSWER, MORE], options={"continue_final_message": True}),
    "go on with reasoning": Shape(
        [HELLO, {**ANSWER, "content": "", "reasoning": "why"}],
        [HELLO, {**ANSWER, "content": "", "reasoning_content": "why", "thinking": "why"}],
        {"continue_final_message": "reasoning_content"},
    ),
    "go on after a call": Shape([HELLO, CALLED, result(), ANSWER], options={**TOOLS, "continue_final_message": True}),
    "go on with a call": Shape(
        [HELLO, {**CALLED, "content": None}], [HELLO, without(CALLED, "content")], {"continue_final_message": True}
    ),
}  # fmt: skip


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """A tokenizer of transformers, for its way with messages: it is asked for text."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **TOKENS)


def theirs(source: str, shape: Shape, said: list[dict[str, Any]]) -> str | None:
    """What transformers makes of it, None where it raises."""
    options = {"add_generation_prompt": "continue_final_message" not in shape.options, **shape.options}
    try:
        text = tokenizer().apply_chat_template(
            copy.deepcopy(said), chat_template=source, tokenize=False, **options, **shape.variables
        )
    except Exception:  # whatever the oracle raises
        return None
    assert isinstance(text, str)
    return text


def given(name: str, shape: Shape) -> list[dict[str, Any]]:
    """What transformers is given: parts as they are where the template reads them, else their texts."""
    found = []
    for message in shape.said if shape.instead is None else shape.instead:
        content = message.get("content")
        if isinstance(content, list) and content and all("text" in part for part in content):
            if message["role"] not in READS_PARTS.get(name, ()):
                content = "".join(part["text"] for part in content)
            message = {**message, "content": content}
        found.append(message)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_renders_as_in_transformers(name: str, shape: str) -> None:
    file = SHARED / f"{name}.jinja"
    if not file.exists():
        pytest.skip("the chat templates of real models are not beside this checkout")
    if shape == "go on with reasoning" and Version(version("transformers")) < Version("5.23"):
        pytest.skip("the installed transformers goes on with no field but content")
    source, wanted = file.read_text("utf-8"), SHAPES[shape]
    expected = theirs(source, wanted, given(name, wanted))
    if expected is None and shape.startswith(("null content", "no content")):
        # Where a template cannot do without a content, it is given empty text.
        expected = theirs(source, wanted, [{"content": "", **one} for one in given(name, wanted)])
        assert expected is not None or name.startswith(("google", "microsoft", "mistral"))
    said = copy.deepcopy(wanted.said)
    try:
        ours = ChatTemplate(source, "template", TOKENS).render(
            said, template_variables=wanted.variables, **wanted.options
        )
    except RequestError:
        ours = None
    assert ours == expected
    assert said == wanted.said


@pytest.mark.parametrize("name", NAMES)
def test_most_conversations_do_render(name: str) -> None:
    file = SHARED / f"{name}.jinja"
    if not file.exists():
        pytest.skip("the chat templates of real models are not beside this checkout")
    rendered = 0
    for shape in SHAPES.values():
        try:
            ChatTemplate(file.read_text("utf-8"), "template", TOKENS).render(
                shape.said, template_variables=shape.variables, **shape.options
            )
            rendered += 1
        except (CheckpointError, RequestError):
            pass
    assert rendered > len(SHAPES) // 3
