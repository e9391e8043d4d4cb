"""The edits of one sequence's logits, row by row.

Owns `LogitAdjuster`. What always holds: the edits of a row are a function of the tokens before it (prompt, committed
output, then drafts), so those of a drafted row are those of the sequence in which its drafts had been committed; asking
for them changes nothing, so there is nothing to roll back. What counts tokens is kept from row to row, what looks at
their order is asked anew for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from slotwise.engine.sampling.contexts import Context, ForcedTokens, context_steps, together
from slotwise.engine.sampling.edits import Edit, Edits, Ints, merged
from slotwise.engine.sampling.penalties import Ban, token_steps
from slotwise.engine.sampling.request import Sampling


def adjuster_for(
    sampling: Sampling, prompt_ids: Sequence[int], eos_ids: Iterable[int] = (), budget: int | None = None
) -> LogitAdjuster | None:
    """What edits the logits of a sequence; None where nothing that `sampling` asks for does."""
    return LogitAdjuster(sampling, prompt_ids, eos_ids, budget) if sampling.adjusts_logits else None


class LogitAdjuster:
    """The history of one sequence, as the steps see it; committed tokens are all that it keeps.

    `eos_ids` are the model's ends, `budget` how many tokens may be generated. `commit` costs time in the number of
    distinct tokens it is given plus a copy of the edits; so does `edits`, and a pass over the history where a step
    looks at the order of tokens.
    """

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], eos_ids: Iterable[int] = (), budget: int | None = None
    ) -> None:
        single = frozenset(ids[0] for ids in sampling.bad_word_ids if len(ids) == 1)
        self._token_steps = (*token_steps(sampling), *([Ban(single)] if single else []))
        self._context_steps = context_steps(sampling, sampling.ends(eos_ids))
        self._forced = ForcedTokens(sampling.forced_bos_token_id, tuple(sampling.forced_eos_token_ids), budget)
        allowed = sampling.allowed_token_ids
        self._only: Ints | None = None if allowed is None else np.array(allowed, np.int64)
        self._in_prompt = frozenset(prompt_ids)
        self._prompt_length = len(prompt_ids)
        self._known: Ints = np.array(prompt_ids, np.int64)
        self._output_counts: Counter[int] = Counter()
        fixed = {token for step in self._token_steps for token in step.fixed_tokens()}
        self._committed = self._counted(fixed | self._in_prompt, self._output_counts)

    def commit(self, token_ids: Sequence[int]) -> None:
        """Add generated tokens to the history, in any number."""
        self._committed = self._after(token_ids)
        self._output_counts.update(token_ids)
        self._known = self._followed_by(token_ids)

    def edits(self, draft_prefix: Sequence[int] = ()) -> Edits:
        """Return the edits of the row whose history is the committed tokens and then `draft_prefix`."""
        found, context = self._after(draft_prefix), Context(self._followed_by(draft_prefix), self._prompt_length)
        seen = together(edit for step in self._context_steps for edit in step.edits(context))
        found = found.joined(Edits.of({token: merged(edits) for token, edits in seen.items()}))
        forced = self._forced.of(context)
        return replace(found, only=self._only, forced=forced) if forced or self._only is not None else found

    def _followed_by(self, token_ids: Sequence[int]) -> Ints:
        return np.concatenate([self._known, np.array(token_ids, np.int64)]) if token_ids else self._known

    def _after(self, token_ids: Sequence[int]) -> Edits:
        """The edits that count tokens, once `token_ids` have come."""
        if not token_ids or not self._token_steps:
            return self._committed
        fresh = Counter(token_ids)
        counts = {token: self._output_counts[token] + count for token, count in fresh.items()}
        return self._committed.overlaid(self._counted(counts, counts))

    def _counted(self, tokens: Iterable[int], output_counts: Mapping[int, int]) -> Edits:
        edits: dict[int, Edit] = {}
        for token in tokens:
            in_prompt, count = token in self._in_prompt, output_counts.get(token, 0)
            found = [edit for step in self._token_steps if (edit := step.edit(token, in_prompt, count)) is not None]
            # A token that some step touches stays listed even where its edits cancel: the list then only grows.
            if found:
                edits[token] = merged(found)
        return Edits.of(edits)
