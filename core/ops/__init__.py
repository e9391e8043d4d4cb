"""The op set: one file per family, each with plain functions and their contracts.

Owns the registry. What always holds: an op's name is unique; the registry is read off the folder, so a new family is a
new file with a `CONTRACTS` tuple and nothing else.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from slotwise.core.contract import OpContract
from slotwise.core.errors import ContractError, GraphError, nearest


@functools.cache
def contracts() -> Mapping[str, OpContract]:
    """Every op contract by name, in the order of files and of each file's `CONTRACTS`."""
    found: dict[str, OpContract] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for contract in getattr(module, "CONTRACTS", ()):
            if contract.name in found:
                raise ContractError(f"op {contract.name!r} is declared twice; give each op its own name")
            found[contract.name] = contract
    return found


def contract_of(name: str) -> OpContract:
    """The contract of op `name`; raises GraphError when there is no such op."""
    known = contracts()
    if name not in known:
        raise GraphError(f"op {name!r} is not known{nearest(name, known)}; the ops are {', '.join(known)}")
    return known[name]
