"""Two recordings side by side: their plans, and what the runs did differently.

Owns `diff_recordings`. What always holds: one line a difference, `name: left -> right`, as for plans; recordings of one
run differ in nothing but time, which is not compared.
"""

from __future__ import annotations

from slotwise.inspect.replay import IGNORED, first_difference, parts_at
from slotwise.recording.file import Recording


def diff_recordings(left: Recording, right: Recording) -> str:
    """The differences of two recordings; empty when there are none."""
    lines: list[str] = []
    plans = left.plan.diff(right.plan)
    if plans:
        lines += ["plans", *(f"  {line}" for line in plans.splitlines())]
    rows = [*_table(_facts(left), _facts(right)), *_requests(left, right), *_tokens(left, right)]
    if rows:
        lines += ["runs", *(f"  {row}" for row in rows)]
    first = _first_step(left, right)
    if first is not None:
        lines += ["steps", f"  first difference: {first}"]
    return "\n".join(lines)


def _table(left: dict[str, str], right: dict[str, str]) -> list[str]:
    names = [*left, *(name for name in right if name not in left)]
    pairs = [(name, left.get(name, "absent"), right.get(name, "absent")) for name in names]
    return [f"{name}: {one} -> {other}" for name, one, other in pairs if one != other]


def _facts(recording: Recording) -> dict[str, str]:
    """What a run comes to: steps, tokens, drafts, and the slots of each role."""
    steps, crash = recording.steps, recording.crash
    decodes = [step["decode"] for step in steps if step["decode"] is not None]
    drafted = sum(sum(decode["k"]) for decode in decodes)
    accepted = sum(min(k, a) for d in decodes for k, a in zip(d["k"], d.get("accepted", []), strict=False))
    found = {
        "version": recording.header["version"],
        "ends": "crash" if crash is not None else "cut short" if recording.is_cut else "whole",
        "steps": str(len(steps)),
        "requests": str(len(recording.requests)),
        "tokens": str(sum(map(len, recording.tokens().values()))),
        "prefill chunks": str(sum(len(step["prefill"]) for step in steps)),
        "drafted": str(drafted),
        "accepted": str(accepted),
    }
    roles = dict.fromkeys(role for step in steps for role in step["ledger"])
    for role in roles:
        sums = [step["ledger"][role] for step in steps if role in step["ledger"]]
        found[f"{role} pages held at most"] = str(max(each["held"] for each in sums))
        for word in ("reserved", "committed", "released"):
            found[f"{role} slots {word}"] = str(sums[-1][word])
    return found


def _requests(left: Recording, right: Recording) -> list[str]:
    rows = []
    for number in sorted(left.requests.keys() & right.requests.keys()):
        one, other = left.requests[number], right.requests[number]
        for name in ("prompt_ids", "sampling"):
            found = first_difference(one[name], other[name], f"request {number}, {name}")
            if found is not None:
                rows.append(found.replace("recorded", "left").replace("replayed", "right"))
    return rows


def _tokens(left: Recording, right: Recording) -> list[str]:
    rows, ours, theirs = [], left.tokens(), right.tokens()
    for number in sorted(ours.keys() & theirs.keys()):
        one, other = ours[number], theirs[number]
        at = parts_at(one, other, recorded_ended=not left.is_cut, ended=not right.is_cut)
        if at is not None:
            shown = [str(tokens[at]) if at < len(tokens) else "the end" for tokens in (one, other)]
            rows.append(f"sequence {number}, new token {at}: {shown[0]} -> {shown[1]}")
    return rows


def _first_step(left: Recording, right: Recording) -> str | None:
    """The first step that was bound, or came out, otherwise."""
    for one, other in zip(left.steps, right.steps, strict=False):
        mine, its = ({k: v for k, v in step.items() if k not in IGNORED} for step in (one, other))
        found = first_difference(mine, its, f"step {one['step']}")
        if found is not None:
            return found.replace("recorded", "left").replace("replayed", "right")
    return None
