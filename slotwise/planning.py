"""From what a user names to a plan: folders, options and presets in, a compiled plan out.

What always holds: a plan is made from configs and headers alone, no weight is read; and a saved plan is accepted for
checkpoints only when it is the very plan that this version makes of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slotwise.core.backend import default_backend, load_backend
from slotwise.core.errors import CheckpointError, OptionError, PlanError
from slotwise.core.specs import DType
from slotwise.models.load import LoadedModel, load_model
from slotwise.models.tokenizer import Tokenizer, vocabulary_mismatch
from slotwise.plans.compile import AfterPass, Identity, compile_plan
from slotwise.plans.fit import Subject, fit
from slotwise.plans.memory import Budget
from slotwise.plans.options import PlanOptions, parse_preference
from slotwise.plans.plan import Plan
from slotwise.plans.presets import apply_preset, read_preset
from slotwise.slots.step import DRAFT, TARGET

NGRAM = "ngram"

Drafter = LoadedModel | str | None
"""A draft model, `"ngram"`, or nothing."""


DRAFTING = ("speculate", "acceptance", "adaptive")
"""Options that say how drafts are made and judged."""


def settle_options(preset: str | Path | None, given: Mapping[str, Any], draft: object) -> PlanOptions:
    """The preset's options, or the defaults, with those that were given (not None) in place.

    Where neither names a backend, it is the machine's default. Without a drafter an option of `DRAFTING` that was given
    is an OptionError, but for `speculate` 0, which says so; in a preset it waits for a drafter.
    """
    if preset is not None:
        check_path("preset", preset, "a name or the path of a TOML file")
    named = given.get("backend") is not None or (preset is not None and "backend" in read_preset(preset))
    start = PlanOptions() if named else PlanOptions(backend=parse_preference(default_backend()))
    options = start if preset is None else apply_preset(start, preset)
    settled = options.with_changes(**{name: value for name, value in given.items() if value is not None})
    idle = [name for name in DRAFTING if given.get(name) is not None and (name, given[name]) != ("speculate", 0)]
    if draft is None and idle:
        raise OptionError(
            f"{idle[0]} {given[idle[0]]} says how drafts are made or judged, and nothing drafts: give draft, a draft "
            f"model's folder or '{NGRAM}', or leave {' and '.join(idle)} out"
        )
    return settled


@dataclass(frozen=True)
class Choice:
    """What a model is to be planned by: `options`, the drafter, the plan that was saved if there is one.

    `named` is what was given by name, for plans that differ in some of it.
    """

    options: PlanOptions
    draft: str | Path | None
    saved: Plan | None
    named: Mapping[str, Any]


def choose(
    given: Mapping[str, Any],
    *,
    draft: str | Path | None,
    preset: str | Path | None,
    plan: Plan | str | Path | None,
) -> Choice:
    """Settle between options (`given`, those that are not None) and a saved plan, which excludes them."""
    if plan is None:
        options = settle_options(preset, given, draft)
        return Choice(options, draft, None, {"draft": draft, "preset": preset, **given})
    if not isinstance(plan, Plan):
        check_path("plan", plan, "a Plan or the path of a plan file")
        plan = Plan.load(plan)
    if given or preset is not None:
        names = ", ".join([*given, *(["preset"] if preset is not None else [])])
        raise OptionError(f"a saved plan has its options in it; leave out {names}, or leave out plan")
    # The n-gram drafter has no folder to name: the plan alone says that it is wanted.
    draft = NGRAM if draft is None and plan.draft == NGRAM else draft
    return Choice(plan.options, draft, plan, {"draft": draft, **vars(plan.options)})


def load_draft(draft: str | Path | None, target: LoadedModel, tokenizer: Tokenizer, dtype: DType | None) -> Drafter:
    """The drafter that `draft` names, for a `target` with this tokenizer.

    Raises CheckpointError when an id that both models have is another token in the draft model. The vocabularies may be
    padded differently: ids beyond the target's are left out, and ids beyond the draft model's are never drafted.
    """
    if draft is None or draft == NGRAM:
        return None if draft is None else NGRAM
    check_path("draft", draft, f"a checkpoint folder or '{NGRAM}'")
    try:
        loaded = load_model(draft, dtype, target.spec.vocab_size)
        its_tokenizer = Tokenizer.load(draft)
    except CheckpointError as error:
        raise CheckpointError(f"draft model: {error}; draft takes a checkpoint folder or '{NGRAM}'") from error
    mismatch = vocabulary_mismatch(tokenizer, its_tokenizer, below=loaded.spec.vocab_size)
    if mismatch is not None:
        raise CheckpointError(
            f"the draft model {draft} does not have the target's vocabulary: {mismatch}; use a draft that was made for "
            f"this model, or draft='{NGRAM}'"
        )
    return loaded


def compile_for(model: LoadedModel, draft: Drafter, options: PlanOptions, observe: AfterPass | None = None) -> Plan:
    """The plan of loaded models, with their names and fingerprints in it."""
    subject = subject_of(model, draft)
    return compile_plan(
        subject.target, draft=subject.draft, options=options, identities=subject.identities, observe=observe
    )


def subject_of(model: LoadedModel, draft: Drafter, *, overlap: bool = False) -> Subject:
    """Loaded models as searches for what fits take them."""
    identities = {TARGET: Identity(model.spec.name, model.checkpoint.fingerprint())}
    if isinstance(draft, LoadedModel):
        identities[DRAFT] = Identity(draft.spec.name, draft.checkpoint.fingerprint())
    drafter = draft.spec if isinstance(draft, LoadedModel) else draft
    return Subject(model.spec, drafter, identities, overlap)


def open_models(
    model: str | Path, draft: str | Path | None, preset: str | Path | None, given: Mapping[str, Any]
) -> tuple[LoadedModel, Drafter, PlanOptions]:
    """What a user names, opened and settled: headers are read, no weight is."""
    check_path("model", model, "a checkpoint folder")
    settled = settle_options(preset, given, draft)
    loaded = load_model(model, settled.dtype)
    drafter = None if draft is None else load_draft(draft, loaded, Tokenizer.load(model), settled.dtype)
    return loaded, drafter, settled


def plan_model(
    model: str | Path,
    *,
    draft: str | Path | None = None,
    preset: str | Path | None = None,
    memory: int | str | None = None,
    observe: AfterPass | None = None,
    **options: Any,
) -> Plan:
    """The plan of a checkpoint folder, from its config and headers alone: no weight is read.

    With `memory`, the plan of what `options` leave open that fits there; PlanError, with what would fit, where none is.
    """
    loaded, drafter, settled = open_models(model, draft, preset, options)
    budget = None if memory is None else Budget.given(memory)
    return plan_within(loaded, drafter, settled, budget, observe)


def plan_within(
    model: LoadedModel,
    draft: Drafter,
    options: PlanOptions,
    budget: Budget | None,
    observe: AfterPass | None = None,
    *,
    overlap: bool = False,
) -> Plan:
    """The plan of loaded models within `budget`; None leaves the choice to the options alone."""
    if budget is None:
        return compile_for(model, draft, options, observe)
    found = fit(subject_of(model, draft, overlap=overlap), options, budget)
    return found if observe is None else compile_for(model, draft, found.options, observe)


def memory_here(options: PlanOptions) -> Budget | None:
    """What there is where the first backend of `options` keeps its tensors."""
    return Budget.here(load_backend(options.backend_names[0]).device)


def check_saved(saved: Plan, model: LoadedModel, draft: Drafter) -> None:
    """Raise PlanError unless `saved` is what this version makes of these checkpoints."""
    given = {TARGET: model} | ({DRAFT: draft} if isinstance(draft, LoadedModel) else {})
    for role in saved.roles:
        if role.role not in given:
            raise PlanError(f"the plan drafts with {role.model}, no draft model is given; add draft=FOLDER")
        found = given[role.role]
        if role.fingerprint != found.checkpoint.fingerprint():
            raise PlanError(
                f"the plan was made for another checkpoint: its {role.role} is {role.model} with fingerprint "
                f"{role.fingerprint[:12]}, {found.checkpoint.folder} has {found.checkpoint.fingerprint()[:12]}; "
                "load that checkpoint, or compile a plan for this one"
            )
    differences = saved.diff(compile_for(model, draft, saved.options))
    if differences:
        raise PlanError(
            "the plan is not the one that this version makes of these checkpoints; compile it again. The differences, "
            f"saved -> now:\n{differences}"
        )


def check_path(name: str, value: object, expected: str) -> None:
    """Raise OptionError unless `value` is text or a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise OptionError(f"{name} must be {expected}, found {value!r:.80} (a {type(value).__name__})")
