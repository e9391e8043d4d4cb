"""Shuffles, votes and warp barriers.

Owns what `cuda.shfl_sync` and kin do. What always holds: every lane that a mask names and that has not returned takes
part in the same call with the same mask, and a lane's value is only read from one that takes part; else it is a fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import DivergentWarp, site_text
from .threads import WARP, Threads

_LANES = np.arange(WARP)
_WEIGHTS = (1 << np.arange(WARP)).astype(np.int64)
FULL = 0xFFFFFFFF


def by_warp(threads: Threads, value: Any) -> Any:
    """One value a lane, shape (warps, 32); lanes that do not exist get 0."""
    if threads.block_size % WARP == 0:
        return value.reshape(-1, WARP)
    warps = -(-threads.block_size // WARP)
    wide = np.zeros((threads.blocks, warps * WARP), value.dtype)
    wide[:, : threads.block_size] = value.reshape(threads.blocks, threads.block_size)
    return wide.reshape(-1, WARP)


def by_thread(threads: Threads, value: Any) -> Any:
    """The way back from `by_warp`."""
    if threads.block_size % WARP == 0:
        return value.reshape(-1)
    return value.reshape(threads.blocks, -1)[:, : threads.block_size].reshape(-1)


def _words(bits: Any) -> Any:
    """Lanes as the bits of one number a warp."""
    return bits @ _WEIGHTS


def members(threads: Threads, mask: Any, site: int) -> Any:
    """Who takes part with each lane: one mask a lane, shape (warps, 32); None where all lanes of whole warps do.

    Raises DivergentWarp where a lane that runs is not in its own mask, or one that a mask names is not here.
    """
    everyone = mask.ndim == 0 and int(mask) & FULL == FULL
    if everyone and threads.mask.full and threads.block_size % WARP == 0:
        return None
    here = by_warp(threads, threads.mask.bits)
    exists = by_warp(threads, np.ones(threads.lanes, np.bool_))
    if threads.left_at is not None:
        exists = exists & ~by_warp(threads, threads.left_at != 0)
    named = by_warp(threads, np.broadcast_to(mask, threads.lanes).astype(np.int64)) & FULL
    there = _words(exists)[:, None]
    outside = here & ((named >> _LANES) & 1 == 0)
    if outside.any():
        warp, lane = np.argwhere(outside)[0]
        raise _fault(
            threads, warp, lane, site, f"lane {lane} takes part in a warp operation and is not in its mask "
            f"{int(named[warp, lane]):#010x}",
        )  # fmt: skip
    # Of each lane's mask, the lanes that run with the same mask:
    alike = (named[:, :, None] == named[:, None, :]) & here[:, None, :]
    missing = here & ((_words(alike) & named) != (named & there))
    if missing.any():
        warp, lane = np.argwhere(missing)[0]
        absent = int(named[warp, lane] & there[warp, 0] & ~_words(alike)[warp, lane])
        lanes = [number for number in range(WARP) if absent >> number & 1]
        other = [number for number in lanes if here[warp, number]]
        words = (
            f"lanes {other} give other masks ({int(named[warp, other[0]]):#010x})"
            if other
            else f"lanes {lanes} are not here"
        )
        raise _fault(
            threads, warp, lane, site, f"a warp operation with the mask {int(named[warp, lane]):#010x}, and {words}"
        )
    return np.where(here, named & there, 0)


def _fault(threads: Threads, warp: int, lane: int, site: int, words: str) -> DivergentWarp:
    warps = -(-threads.block_size // WARP)
    number = warp // warps * threads.block_size + warp % warps * WARP + lane
    return DivergentWarp(f"{words}\n  {threads.name_of_lane(int(number))} at {site_text(site)}")


def _shuffle(source: Callable[[Any], Any]) -> Callable[..., Any]:
    """A shuffle; `source(x)` is the lane that each lane reads, its own where there is none."""

    def shuffle(threads: Threads, site: int, mask: Any, value: Any, x: Any) -> Any:
        taking_part = members(threads, mask, site)
        lanes = source(x.astype(np.int64)) if x.ndim == 0 else source(by_warp(threads, x.astype(np.int64)))
        if taking_part is not None:
            wide = np.broadcast_to(lanes, taking_part.shape)
            lost = (taking_part != 0) & ((taking_part >> wide) & 1 == 0)
            if lost.any():
                warp, lane = np.argwhere(lost)[0]
                raise _fault(
                    threads, warp, lane, site,
                    f"lane {lane} reads the value of lane {wide[warp, lane]}, which takes no part",
                )  # fmt: skip
        if value.ndim == 0:
            return value
        values = by_warp(threads, value)
        moved = values[:, lanes] if lanes.ndim == 1 else np.take_along_axis(values, lanes, 1)
        return by_thread(threads, moved)

    return shuffle


def _inside(lanes: Any) -> Any:
    return np.where((lanes < 0) | (lanes >= WARP), _LANES, lanes)


def _all_lanes(x: Any) -> Any:
    return np.broadcast_to(x & (WARP - 1), (WARP,)) if x.ndim == 0 else x & (WARP - 1)


shfl = _shuffle(_all_lanes)
shfl_up = _shuffle(lambda x: _inside(_LANES - x))
shfl_down = _shuffle(lambda x: _inside(_LANES + x))
shfl_xor = _shuffle(lambda x: _inside(_LANES ^ x))


def _vote(decide: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A vote; `decide(yes, present)` of lanes' bits, one number a lane, gives each lane's answer."""

    def vote(threads: Threads, site: int, mask: Any, predicate: Any) -> Any:
        taking_part = members(threads, mask, site)
        if taking_part is None:
            taking_part = np.full((threads.lanes // WARP, WARP), FULL, np.int64)
        yes = by_warp(threads, np.broadcast_to(predicate != 0, threads.lanes))
        return by_thread(threads, decide(_words(yes)[:, None] & taking_part, taking_part))

    return vote


all_sync = _vote(lambda yes, present: yes == present)
any_sync = _vote(lambda yes, present: yes != 0)
eq_sync = _vote(lambda yes, present: (yes == present) | (yes == 0))
ballot_sync = _vote(lambda yes, present: yes.astype(np.uint32).view(np.int32))


def syncwarp(threads: Threads, site: int, mask: Any = np.int64(FULL)) -> None:  # noqa: B008 (a number)
    """`cuda.syncwarp`: orders memory accesses of the lanes that the mask names."""
    taking_part = members(threads, mask, site)
    if taking_part is None:
        threads.sync_warps(np.ones((threads.lanes // WARP, WARP), np.bool_))
        return
    for word in np.unique(taking_part[taking_part != 0]):
        threads.sync_warps((taking_part == word) & ((word >> _LANES) & 1 == 1))


def active_mask(threads: Threads, site: int) -> Any:
    """`cuda.activemask`: the lanes that run here."""
    here = by_warp(threads, threads.mask.bits)
    return by_thread(threads, np.repeat(_words(here)[:, None], WARP, 1)).astype(np.uint32).view(np.int32)


def match_any(threads: Threads, site: int, mask: Any, value: Any) -> Any:
    """`cuda.match_any_sync`: the lanes with the same value."""
    taking_part = members(threads, mask, site)
    values = by_warp(threads, np.broadcast_to(value, threads.lanes))
    same = _words(values[:, :, None] == values[:, None, :])
    found = same if taking_part is None else same & taking_part
    return by_thread(threads, found).astype(np.uint32).view(np.int32)
