"""Each parameter of transformers' `apply_chat_template` acts here or is refused by name, and the docs say which."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from slotwise.core.errors import OptionError, RequestError
from slotwise.llm import LLM
from slotwise.models.chat_parameters import KEYWORDS, PARAMETERS
from slotwise.models.chat_template import ChatTemplate

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "hi"}]
TURNS = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def test_every_parameter_of_the_installed_transformers_has_its_line() -> None:
    base = pytest.importorskip("transformers.tokenization_utils_base").PreTrainedTokenizerBase
    theirs = inspect.signature(base.apply_chat_template).parameters
    named = {name for name, each in theirs.items() if each.kind is not each.VAR_KEYWORD} - {"self"}
    assert named <= {each.name for each in PARAMETERS}
    assert len({each.name for each in PARAMETERS}) == len(PARAMETERS)


def test_the_docs_have_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (.+) \|$", (ROOT / "docs" / "chat.md").read_text("utf-8"), re.M)
    assert rows == [(each.name, each.fate, each.says) for each in PARAMETERS]


@pytest.mark.parametrize("method", [LLM.chat, LLM.stream_chat, LLM.chat_prompt, ChatTemplate.render])
def test_what_acts_is_a_keyword_of_every_way_to_chat(method: Any) -> None:
    parameters = inspect.signature(method).parameters.values()
    assert [each.name for each in parameters if each.kind is each.KEYWORD_ONLY] == list(KEYWORDS)


@pytest.mark.parametrize("parameter", [each for each in PARAMETERS if each.fate != "acts"], ids=lambda each: each.name)
def test_what_does_not_act_is_refused_by_name_with_what_to_do(parameter: Any) -> None:
    with pytest.raises(OptionError, match=f"'{parameter.name}' (has no meaning|is not offered).*{parameter.says[:9]}"):
        ChatTemplate(TURNS, "mine").render(HELLO, **{parameter.name: True})


def test_an_unknown_keyword_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(OptionError, match=r"no keyword 'add_generation_promt' \(did you mean 'add_generation_prompt'"):
        ChatTemplate(TURNS, "mine").render(HELLO, add_generation_promt=False)
    with pytest.raises(OptionError, match=r"template_variables=\{'enable_thinking': \.\.\.\}"):
        ChatTemplate(TURNS, "mine").render(HELLO, enable_thinking=False)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "continue_final_message", "documents"])
def test_a_parameter_is_no_template_variable(name: str) -> None:
    with pytest.raises(OptionError, match=f"'{name}' is no variable; give '{name}' by itself"):
        ChatTemplate(TURNS, "mine").render(HELLO, template_variables={name: True})


@pytest.mark.parametrize("parameter", [each for each in PARAMETERS if each.name not in KEYWORDS], ids=lambda e: e.name)
@pytest.mark.parametrize("method", [LLM.chat, LLM.stream_chat, LLM.chat_prompt])
def test_advice_on_a_parameter_is_that_of_its_line_and_leads_in_no_circle(method: Any, parameter: Any) -> None:
    llm = object.__new__(LLM)
    llm._template = ChatTemplate(TURNS, "mine")
    for keywords in ({parameter.name: True}, {"template_variables": {parameter.name: True}}):
        with pytest.raises(OptionError, match=re.escape(parameter.says)) as refused:
            method(llm, HELLO, **keywords)
        assert "sampling=" not in str(refused.value)
        assert "by itself" not in str(refused.value)


def test_the_first_argument_is_named_where_it_is_given_by_its_name_in_transformers() -> None:
    with pytest.raises(OptionError, match="'conversation' is `messages`, the first argument"):
        ChatTemplate(TURNS, "mine").render(HELLO, conversation=HELLO)


@pytest.mark.parametrize(
    ("keyword", "values"),
    [("add_generation_prompt", ["no", 0, 1, []]), ("continue_final_message", [5, "", 0, None, ["content"]])],
)
def test_a_switch_takes_what_it_can_mean_alone(keyword: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(OptionError, match=f"{keyword} must be true, false or"):
            ChatTemplate(TURNS, "mine").render(HELLO, **{keyword: value})


def test_template_variables_reach_the_template_and_come_before_special_tokens() -> None:
    template = ChatTemplate("{{ bos_token }}{{ mood }}", "mine", {"bos_token": "<s>"})
    assert template.render(HELLO, template_variables={"mood": "glad"}) == "<s>glad"
    assert template.render(HELLO, template_variables={"bos_token": "<b>"}) == "<b>"
    with pytest.raises(RequestError, match="template_variables must be a mapping"):
        template.render(HELLO, template_variables=["mood"])  # type: ignore[arg-type]


def test_a_generation_prompt_is_opened_unless_a_message_is_gone_on_with() -> None:
    template = ChatTemplate(TURNS, "mine")
    assert template.render(HELLO) == "user:hi;>"
    assert template.render(HELLO, add_generation_prompt=False) == "user:hi;"
    assert template.render(HELLO, continue_final_message=True) == "user:hi"
    with pytest.raises(RequestError, match="give one of them"):
        template.render(HELLO, add_generation_prompt=True, continue_final_message=True)


def test_documents_reach_the_template() -> None:
    template = ChatTemplate("{% for d in documents %}{{ d.title }}={{ d.text }}{% endfor %}", "mine")
    assert template.render(HELLO, documents=[{"title": "a", "text": "b"}]) == "a=b"
    for wrong in ("text", ["text"], {"title": "a"}):
        with pytest.raises(RequestError, match="documents"):
            template.render(HELLO, documents=wrong)  # type: ignore[arg-type]


def test_a_keyword_of_sampling_is_sent_there() -> None:
    llm = object.__new__(LLM)
    with pytest.raises(OptionError, match=r"sampling=slotwise\.Sampling\(max_new_tokens=\.\.\.\)"):
        llm.chat(HELLO, max_new_tokens=3)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="'padding' has no meaning when generating"):
        llm.stream_chat(HELLO, padding=True)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match=r"template_variables=\{'enable_thinking': \.\.\.\}"):
        llm.chat_prompt(HELLO, enable_thinking=False)  # type: ignore[call-arg]
