"""What the Python API promises: one model, asked in every way it can be asked."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import slotwise
from slotwise import LLM, Completion, Sampling
from slotwise.core.errors import CheckpointError, OptionError, PlanError, RequestError

STORY = "Once upon a time"
SHORT = Sampling(max_new_tokens=12)


# Generating


def test_one_prompt_gives_one_completion(llm: LLM) -> None:
    out = llm.generate(STORY, SHORT)
    assert isinstance(out, Completion)
    assert len(out.token_ids) == 12
    assert out.text == llm.tokenizer.decode(out.token_ids)
    assert (out.finish_reason, out.logprobs, out.error) == ("length", None, None)
    assert out.stats.prompt_tokens == len(llm.tokenizer.encode(STORY))
    assert (out.stats.new_tokens, out.stats.requested, out.stats.granted) == (12, 12, 12)
    assert not out.stats.clamped
    assert 0 < out.stats.seconds_to_first_token <= out.stats.seconds
    assert out.stats.slots["target"] >= out.stats.prompt_tokens


def test_token_ids_of_any_integral_kind_are_the_prompt_that_they_spell(llm: LLM) -> None:
    ids = llm.tokenizer.encode(STORY)
    expected = llm.generate(STORY, SHORT).token_ids
    kinds = (ids, tuple(ids), np.array(ids), torch.tensor(ids), [np.int32(i) for i in ids], list(torch.tensor(ids)))
    for prompt in kinds:
        assert llm.generate(prompt, SHORT).token_ids == expected


def test_several_prompts_come_back_in_order_and_as_if_alone(llm: LLM) -> None:
    prompts = ["The dog", llm.tokenizer.encode(STORY), "A big red ball"]
    together = llm.generate(prompts, SHORT)
    assert [out.token_ids for out in together] == [llm.generate(prompt, SHORT).token_ids for prompt in prompts]


def test_rows_of_an_array_are_several_prompts(llm: LLM) -> None:
    rows = np.array([[5, 6, 7], [8, 9, 10]])
    expected = [llm.generate(row.tolist(), SHORT).token_ids for row in rows]
    assert [out.token_ids for out in llm.generate(rows, SHORT)] == expected
    assert [out.token_ids for out in llm.generate(list(torch.tensor(rows)), SHORT)] == expected


def test_no_prompts_give_no_completions(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert llm.generate([], []) == []


def test_each_prompt_may_have_its_own_sampling(llm: LLM) -> None:
    outs = llm.generate([STORY, STORY], [Sampling(max_new_tokens=2), Sampling(max_new_tokens=7)])
    assert [len(out.token_ids) for out in outs] == [2, 7]


def test_a_prompt_that_cannot_be_served_leaves_the_others_alone(llm: LLM) -> None:
    good, long, wrong, half = llm.generate([STORY, [7] * 500, [3.5, 1], "\ud800"], SHORT)
    assert good.token_ids == llm.generate(STORY, SHORT).token_ids
    for out, words in ((long, "500 tokens, the capacity is 192"), (wrong, "found 3.5 at place 0"), (half, "surrogate")):
        assert (out.finish_reason, out.text, out.token_ids) == ("error", "", ())
        assert words in str(out.error)


def test_a_single_prompt_that_cannot_be_served_raises(llm: LLM) -> None:
    with pytest.raises(RequestError, match="500 tokens"):
        llm.generate([7] * 500)
    with pytest.raises(RequestError, match="500 tokens"):
        llm.stream([7] * 500)


def test_a_budget_beyond_the_capacity_is_clamped_and_reported(llm: LLM) -> None:
    out = llm.generate([7] * 180, Sampling(max_new_tokens=100, ignore_eos=True))
    assert (out.finish_reason, len(out.token_ids)) == ("length", 12)
    assert (out.stats.requested, out.stats.granted, out.stats.clamped) == (100, 12, True)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_no_drafter_changes_what_is_generated(llm: LLM, drafting: LLM, counting: LLM, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=temperature, seed=5, logprobs=2)
    plain, drafted = llm.generate(STORY, sampling), drafting.generate(STORY, sampling)
    counted = counting.generate(STORY, sampling)
    assert plain.token_ids == drafted.token_ids == counted.token_ids
    assert plain.logprobs == drafted.logprobs == counted.logprobs
    assert plain.stats.drafted == 0
    assert 0 < drafted.stats.accepted <= drafted.stats.drafted
    assert drafted.stats.verifications < plain.stats.verifications


def test_steps_started_ahead_change_no_token_and_no_end(stories: Path, llm: LLM) -> None:
    ahead = LLM(stories, capacity=128, threads=1, overlap=True)
    prompts = [STORY, "The dog", STORY + ", there was"]
    samplings = [Sampling(max_new_tokens=20 + n, temperature=0.5 * n, seed=n, stop=["."]) for n in range(3)]
    found = ahead.generate(prompts, samplings)
    expected = [llm.generate(prompt, each) for prompt, each in zip(prompts, samplings, strict=True)]
    assert [(c.text, c.token_ids, c.finish_reason) for c in found] == [
        (c.text, c.token_ids, c.finish_reason) for c in expected
    ]
    pieces = [chunk.text for chunk in ahead.stream(STORY, samplings[0])]
    assert "".join(pieces) == expected[0].text
    assert ahead.engine.is_idle


def test_overlap_is_yes_no_or_left_open(stories: Path) -> None:
    with pytest.raises(OptionError, match="overlap must be true, false or None, is 'always'"):
        LLM(stories, overlap="always")  # type: ignore[arg-type]


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    out = llm.generate(STORY, Sampling(max_new_tokens=5, logprobs=3))
    ids = [*llm.tokenizer.encode(STORY), *out.token_ids]
    expected = llm.logits(ids).log_softmax(-1)
    assert out.logprobs is not None
    assert len(out.logprobs) == 5
    for place, found in enumerate(out.logprobs, len(ids) - 5):
        assert found.token_id == ids[place]
        assert found.logprob == pytest.approx(expected[place - 1, ids[place]].item(), abs=1e-5)
        assert list(found.top) == expected[place - 1].topk(3).indices.tolist()


# Chatting


def test_a_chat_completes_what_the_template_makes_of_the_messages(talkative: Path) -> None:
    llm = LLM(talkative, capacity=128, threads=1)
    messages = [{"role": "user", "content": "Hello"}]
    ids = llm.chat_prompt(messages)
    assert llm.tokenizer.decode(ids) == "user: Hello\nOnce upon a time"
    out = llm.chat(messages, SHORT)
    assert out.token_ids == llm.generate(ids, SHORT).token_ids
    assert "".join(chunk.text for chunk in llm.stream_chat(messages, SHORT)) == out.text
    assert llm.tokenizer.decode(llm.chat_prompt(messages, add_generation_prompt=False)) == "user: Hello\n"


def test_a_chat_without_a_template_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"no chat template.*chat_template\.jinja"):
        llm.chat([{"role": "user", "content": "Hello"}])


# Logits and dtypes


def test_logits_are_those_of_transformers(random_checkpoint: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(random_checkpoint, dtype=torch.float32).eval()
    llm = LLM(random_checkpoint, threads=1)
    ids = [3, 1, 4, 1, 5, 92, 6, 53]
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0]
    found = llm.logits(ids)
    assert (found.dtype, found.shape) == (torch.float32, (8, 101))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert torch.equal(llm.logits(torch.tensor(ids)), found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_computing_dtype_is_the_users_choice(random_checkpoint: Path, dtype: str) -> None:
    llm = LLM(random_checkpoint, dtype=dtype, threads=1)
    assert llm.plan().target.dtype.torch == getattr(torch, dtype)
    exact = LLM(random_checkpoint, threads=1).logits([1, 2, 3])
    found = llm.logits([1, 2, 3])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0.05)
    assert torch.equal(found, exact) == (dtype == "float32")


# Defaults of the checkpoint


def test_the_checkpoint_says_how_to_sample(random_checkpoint: Path, llm: LLM) -> None:
    own = LLM(random_checkpoint, threads=1)
    assert own.default_sampling == Sampling(temperature=0.7, top_k=9, top_p=0.9, repetition_penalty=1.1)
    assert llm.default_sampling == Sampling()
    out = own.generate("w1 w2")
    assert own.generate("w1 w2", Sampling(**{**vars(own.default_sampling), "seed": out.stats.seed})).text == out.text


def test_sampling_that_the_checkpoint_suggests_in_vain_is_named(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(random_checkpoint, folder)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": -5000}')
    llm = LLM(folder, threads=1)
    with pytest.raises(CheckpointError, match=r"generation_config.json: temperature.*-5000.*give a Sampling"):
        llm.generate("w1")
    assert len(llm.generate("w1", Sampling(max_new_tokens=3)).token_ids) == 3


# Plans


def test_a_plan_tells_what_runs_and_what_would(drafting: LLM) -> None:
    plan = drafting.plan()
    assert (plan.draft, plan.options.speculate, plan.options.capacity) == ("model", 5, 192)
    plain = drafting.plan(speculate=0)
    assert (plain.draft, plain.options.capacity) == ("none", 192)
    assert "drafter: model -> none" in plan.diff(plain)
    assert plan.diff(drafting.plan(speculate=5)) == ""
    assert drafting.plan() is plan


def test_every_constructor_option_of_a_plan_can_be_changed(drafting: LLM) -> None:
    assert drafting.plan(draft="ngram").draft == "ngram"
    assert drafting.plan(draft=None).draft == "none"
    assert drafting.plan(dtype="float32").target.dtype.torch == torch.float32
    assert drafting.plan(preset="exact").options.page_size == 4
    with pytest.raises(OptionError, match=r"'speculat'.*did you mean 'speculate'"):
        drafting.plan(speculat=3)


def test_a_plan_can_be_watched_as_it_is_made(llm: LLM) -> None:
    seen: list[str] = []
    assert llm.plan(observe=lambda name, where, graph: seen.append(name)) == llm.plan()
    assert "fuse_add_norm" in seen


def test_a_draft_is_not_run_where_nothing_is_speculated(stories: Path, stories_draft: Path) -> None:
    llm = LLM(stories, draft=stories_draft, speculate=0, capacity=64, threads=1)
    assert llm.plan().draft == "none"
    assert llm.generate(STORY, SHORT).stats.drafted == 0


def test_a_preset_gives_what_is_left_out(stories: Path, tmp_path: Path) -> None:
    by_name = LLM(stories, preset="latency", speculate=3, capacity=64, draft="ngram", threads=1).plan().options
    assert (by_name.max_sequences, by_name.speculate, by_name.prefill_chunk) == (1, 3, 512)
    mine = tmp_path / "mine.toml"
    mine.write_text("capacity = 48\npage_size = 4\n")
    options = LLM(stories, preset=mine, threads=1).plan().options
    assert (options.capacity, options.page_size) == (48, 4)


def test_a_saved_plan_is_what_runs(stories: Path, stories_draft: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    first = LLM(stories, draft=stories_draft, capacity=32, max_sequences=1, prefill_chunk=16, threads=1)
    first.plan().save(path)
    assert slotwise.Plan.load(path) == first.plan()
    again = LLM(stories, draft=stories_draft, plan=path, threads=1)
    assert again.plan() == first.plan()
    assert again.plan(speculate=0) == first.plan(speculate=0)
    assert again.generate(STORY, SHORT).token_ids == first.generate(STORY, SHORT).token_ids
    with pytest.raises(PlanError, match=r"another checkpoint.*stories-draft"):
        LLM(stories_draft, draft=stories, plan=path)
    with pytest.raises(PlanError, match="no draft model is given; add draft=FOLDER"):
        LLM(stories, plan=path)
    with pytest.raises(OptionError, match="leave out capacity, preset, or leave out plan"):
        LLM(stories, draft=stories_draft, plan=path, capacity=64, preset="exact")
    with pytest.raises(PlanError, match="drafter: model -> ngram"):
        LLM(stories, draft="ngram", plan=replace(first.plan(draft="ngram"), draft="model"))


# Looking


def test_the_ledger_shows_the_last_steps_and_balances(drafting: LLM) -> None:
    drafting.generate(STORY, SHORT)
    text = drafting.ledger(2)
    assert text.count("%0 = reserve") == 2
    assert re.search(r"target: .*free \d+ \+ held 0 \+ cached \d+", text)
    assert re.search(r"draft: .*reserved \d+, committed \d+, released \d+", text)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_are_pytorchs(random_checkpoint: Path) -> None:
    LLM(random_checkpoint, threads=2)
    assert torch.get_num_threads() == 2


def test_a_saved_ngram_plan_needs_no_drafter_named(stories: Path, tmp_path: Path) -> None:
    path = tmp_path / "ngram.json"
    LLM(stories, draft="ngram", capacity=32, max_sequences=1, prefill_chunk=16, threads=1).plan().save(path)
    assert LLM(stories, plan=path, threads=1).plan().draft == "ngram"


@pytest.mark.parametrize("steps", [-1, 1.5, True, "x"])
def test_a_number_of_steps_that_makes_no_sense_is_refused(llm: LLM, steps: object) -> None:
    with pytest.raises(OptionError, match="steps must be an integer of 0 or more"):
        llm.ledger(steps)  # type: ignore[arg-type]
    assert "step " not in llm.ledger(0)


def test_n_completions_are_those_of_their_seeds(llm: LLM) -> None:
    sampling = Sampling(max_new_tokens=6, temperature=1.0, seed=2**64 - 1, n=3)
    found = llm.generate(STORY, sampling)
    alone = [llm.generate(STORY, replace(sampling, n=1, seed=seed)) for seed in (2**64 - 1, 0, 1)]
    completions = [found, *found.alternatives]
    assert [each.token_ids for each in completions] == [each.token_ids for each in alone]
    assert [each.stats.seed for each in completions] == [2**64 - 1, 0, 1]
    several = llm.generate([STORY, STORY], [sampling, replace(sampling, n=1)])
    assert [len(each.alternatives) for each in several] == [2, 0]
    with pytest.raises(OptionError, match="n: a stream has one completion"):
        llm.stream(STORY, sampling)


def test_n_completions_fill_their_prompt_once(llm: LLM) -> None:
    prompt = llm.tokenizer.encode(STORY * 12)
    found = llm.generate(prompt, Sampling(max_new_tokens=3, temperature=1.0, n=3))
    assert found.stats.shared_tokens < len(prompt)
    assert all(each.stats.shared_tokens > 0 for each in found.alternatives)


def test_seeds_that_are_drawn_are_whole_numbers_in_json(llm: LLM) -> None:
    seeds = [llm.generate(STORY, Sampling(max_new_tokens=1)).stats.seed for _ in range(4)]
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert len(set(seeds)) > 1


def test_bad_words_never_come_with_or_without_a_space(llm: LLM) -> None:
    plain = llm.generate(STORY, Sampling(max_new_tokens=40))
    word = max(plain.text.split(), key=len)
    bare = llm.generate(STORY, Sampling(max_new_tokens=40, bad_words=[word])).text
    assert f" {word}" in plain.text
    assert f" {word}" not in bare


def test_log_probabilities_of_the_prompt_are_those_of_its_logits(llm: LLM) -> None:
    ids = llm.tokenizer.encode(STORY)
    found = llm.generate(STORY, Sampling(max_new_tokens=2, prompt_logprobs=2, logprobs=2))
    expected = llm.logits(ids).double().log_softmax(-1)
    assert found.prompt_logprobs is not None
    assert found.prompt_logprobs[0] is None
    entries = [each for each in found.prompt_logprobs[1:] if each is not None]
    assert [each.token_id for each in entries] == ids[1:]
    for row, each in zip(expected, entries, strict=False):
        assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-9)
        assert each.rank == 1 + int((row > row[each.token_id]).sum())
        assert list(each.top) == row.topk(2).indices.tolist()
    assert b"".join(each.bytes or b"" for each in entries).decode().strip() in STORY
    assert found.token_ids == llm.generate(STORY, Sampling(max_new_tokens=2)).token_ids


def test_the_text_may_end_after_what_stopped_it(llm: LLM) -> None:
    plain = llm.generate(STORY, Sampling(max_new_tokens=20)).text
    stop = plain[5:9]
    cut = plain.index(stop)
    assert llm.generate(STORY, Sampling(max_new_tokens=20, stop=stop)).text == plain[:cut]
    assert llm.generate(STORY, Sampling(max_new_tokens=20, stop=stop, include_stop=True)).text == plain[: cut + 4]


@pytest.mark.parametrize("include_stop", [True, False])
def test_special_tokens_are_shown_where_they_are_asked_for(llm: LLM, include_stop: bool) -> None:
    (end,) = llm.eos_ids
    begin = llm.tokenizer.encode(STORY)[0]
    sampling = Sampling(max_new_tokens=8, temperature=1.5, seed=3, ignore_eos=True, logit_bias={begin: 16.0, end: 16.0})
    hidden = llm.generate(STORY, sampling)
    shown = replace(sampling, skip_special_tokens=False)
    chunks = list(llm.stream(STORY, shown))
    completion = chunks[-1].completion
    assert completion is not None
    assert completion.token_ids == hidden.token_ids
    assert {begin, end} < set(hidden.token_ids)
    assert completion.text.replace("<|begin|>", "").replace("<|end|>", "") == hidden.text
    assert completion.text.count("<|end|>") == hidden.token_ids.count(end)
    assert "".join(chunk.text for chunk in chunks) == completion.text
    # A stop that is a special token, by its id and by its name.
    before, _, _ = completion.text.partition("<|end|>")
    for stop in ({"stop_token_ids": [end]}, {"stop": "<|end|>"}, {"ignore_eos": False}):
        cut = llm.generate(STORY, replace(shown, include_stop=include_stop, **stop))
        assert cut.text == before + "<|end|>" * include_stop
        assert cut.token_ids == hidden.token_ids[: hidden.token_ids.index(end) + 1]
        assert "<|" not in llm.generate(STORY, replace(sampling, include_stop=include_stop, **stop)).text


def test_nothing_ends_a_text_before_its_least_length(llm: LLM) -> None:
    plain = llm.generate(STORY, Sampling(max_new_tokens=20))
    early = plain.token_ids[2]
    assert llm.generate(STORY, Sampling(max_new_tokens=20, stop_token_ids=[early])).stats.new_tokens <= 3
    later = llm.generate(STORY, Sampling(max_new_tokens=20, stop_token_ids=[early], min_new_tokens=9))
    assert early not in later.token_ids[:9]
    assert later.stats.new_tokens > 9
