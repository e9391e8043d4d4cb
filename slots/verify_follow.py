"""The run-time verifier of steps started ahead: whose token each row is fed.

Owns `verify_follow`. What always holds: a row is fed what the step before sampled for the same lane, one position on,
and that lane's mark stands where the row before ended; all of it is read off the filled rows and the ledger.
"""

from __future__ import annotations

from slotwise.core.errors import VerificationError
from slotwise.slots.ledger import RoleLedger
from slotwise.slots.rows import FilledRows, Ints
from slotwise.slots.verify_binding import some

RULE = "overlap"


def verify_follow(before: FilledRows, after: FilledRows, follows: Ints, ledger: RoleLedger) -> None:
    """Check that each row of `after` is fed what row `follows[i]` of `before` sampled: its own sequence's next token.

    Raises VerificationError of the rule `overlap`.
    """
    if before.rows != before.lanes.size or after.rows != after.lanes.size:
        raise VerificationError(RULE, f"{ledger.role}: both calls must have a row a sequence, to follow each other")
    if some((follows < 0) | (follows >= before.rows)) or follows.size != after.rows:
        raise VerificationError(
            RULE, f"{ledger.role}: {after.rows} rows follow the rows {follows.tolist()} of a call of {before.rows}"
        )
    lanes, positions = before.row_lanes[follows], before.row_positions[follows]
    if some((lanes != after.row_lanes) | (positions + 1 != after.row_positions)):
        raise VerificationError(
            RULE,
            f"{ledger.role}: rows at {after.row_positions.tolist()} of lanes {after.row_lanes.tolist()} would be fed "
            f"what rows at {positions.tolist()} of lanes {lanes.tolist()} sampled",
        )
    if some(before.end[follows] != ledger.committed[lanes]):
        raise VerificationError(
            RULE,
            f"{ledger.role}: the rows before end at {before.end[follows].tolist()}, committed are "
            f"{ledger.committed[lanes].tolist()}",
        )
