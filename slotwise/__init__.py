"""Slotwise: a compiler for language-model decoding in which every KV-cache slot is accounted for.

>>> import slotwise
>>> llm = slotwise.LLM("examples/models/stories", draft="examples/models/stories-draft")
>>> out = llm.generate("Once upon a time", slotwise.Sampling(max_new_tokens=200, temperature=0.8, seed=7))

What always holds: `import slotwise` loads none of its parts; each name is fetched when it is first asked for, so that
what needs no model (`slotwise --help`) does not wait for PyTorch. The names below are the whole API.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slotwise.async_llm import AsyncLLM as AsyncLLM
    from slotwise.async_llm import AsyncStream as AsyncStream
    from slotwise.core.errors import BackendError as BackendError
    from slotwise.core.errors import CheckpointError as CheckpointError
    from slotwise.core.errors import HubError as HubError
    from slotwise.core.errors import KernelSelectionError as KernelSelectionError
    from slotwise.core.errors import LedgerError as LedgerError
    from slotwise.core.errors import OptionError as OptionError
    from slotwise.core.errors import OutputError as OutputError
    from slotwise.core.errors import PlanError as PlanError
    from slotwise.core.errors import RecordingError as RecordingError
    from slotwise.core.errors import RequestError as RequestError
    from slotwise.core.errors import SequenceFault as SequenceFault
    from slotwise.core.errors import SlotwiseError as SlotwiseError
    from slotwise.core.errors import VerificationError as VerificationError
    from slotwise.engine.request import Chunk as Chunk
    from slotwise.engine.request import Completion as Completion
    from slotwise.engine.request import Stats as Stats
    from slotwise.engine.sampling import Sampling as Sampling
    from slotwise.engine.sampling.logprobs import TokenLogprobs as TokenLogprobs
    from slotwise.inspect.crossvalidate import crossvalidate as crossvalidate
    from slotwise.inspect.crossvalidate_report import CrossValidation as CrossValidation
    from slotwise.llm import LLM as LLM
    from slotwise.plans.plan import Plan as Plan
    from slotwise.stream import Stream as Stream
else:  # a type checker would take every name for one that is there

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            from slotwise.core.errors import nearest

            raise AttributeError(f"module 'slotwise' has no attribute {name!r}{nearest(name, _HOMES)}")
        found: object = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = found
        return found


__version__ = "0.1.0"

_PLACES = {
    "slotwise.async_llm": ("AsyncLLM", "AsyncStream"),
    "slotwise.core.errors": (
        "BackendError",
        "CheckpointError",
        "HubError",
        "KernelSelectionError",
        "LedgerError",
        "OptionError",
        "OutputError",
        "PlanError",
        "RecordingError",
        "RequestError",
        "SequenceFault",
        "SlotwiseError",
        "VerificationError",
    ),
    "slotwise.engine.request": ("Chunk", "Completion", "Stats"),
    "slotwise.engine.sampling": ("Sampling",),
    "slotwise.engine.sampling.logprobs": ("TokenLogprobs",),
    "slotwise.inspect.crossvalidate": ("crossvalidate",),
    "slotwise.inspect.crossvalidate_report": ("CrossValidation",),
    "slotwise.llm": ("LLM",),
    "slotwise.plans.plan": ("Plan",),
    "slotwise.stream": ("Stream",),
}
"""Where each public name is made."""

_HOMES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted([*_HOMES, "__version__"])


def __dir__() -> list[str]:
    return list(__all__)
