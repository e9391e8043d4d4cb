"""Slotwise: a compiler for language-model decoding in which every KV-cache slot is accounted for.

>>> import slotwise
>>> llm = slotwise.LLM("examples/models/stories", draft="examples/models/stories-draft")
>>> out = llm.generate("Once upon a time", slotwise.Sampling(max_new_tokens=200, temperature=0.8, seed=7))
"""

from slotwise.core.errors import SlotwiseError
from slotwise.engine.request import Chunk, Completion, Stats, TokenLogprobs
from slotwise.engine.sampling import Sampling
from slotwise.inspect.crossvalidate import CrossValidation, crossvalidate
from slotwise.llm import LLM
from slotwise.plans.plan import Plan
from slotwise.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Chunk",
    "Completion",
    "CrossValidation",
    "Plan",
    "Sampling",
    "SlotwiseError",
    "Stats",
    "Stream",
    "TokenLogprobs",
    "__version__",
    "crossvalidate",
]
