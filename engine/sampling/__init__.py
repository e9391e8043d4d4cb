"""Sampling: what a request may ask for, what that does to its logits, and what feeds the sampler's programs.

Owns the `Sampling` record (`request.py`), the edits of logits (`adjust.py`), log-probabilities (`logprobs.py`) and the
`Sampler` (`sampler.py`). What always holds: a row's edits are a function of its sequence's tokens up to that row, so
a drafted row is edited as if its drafts had been committed. Importing this package alone loads the record alone.
"""

from slotwise.engine.sampling.request import Sampling as Sampling
