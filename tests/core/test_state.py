"""What a state's declaration promises: sizes by its parts, and groups of states that live and die together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.specs import DType
from slotwise.core.state import StatePart, StateSpec, grouped, kv_state

WINDOWED = kv_state(1, 2, 24, DType.BF16, window=512)


def test_a_state_takes_what_its_parts_take() -> None:
    coded = StateSpec("kv", 3, (StatePart("codes", (2, 24), DType.I8), StatePart("scales", (2,), DType.F32)))
    assert coded.nbytes == 2 * 24 + 2 * 4
    assert kv_state(0, 2, 24, DType.BF16).nbytes == 2 * (2 * 24 * 2)


def test_a_state_is_named_by_its_kind_and_layer_and_prints_what_it_declares() -> None:
    assert WINDOWED.name == "kv1"
    assert WINDOWED.value_name("v") == "kv1.v"
    assert str(WINDOWED) == "kv1: k bf16[2, 24], v bf16[2, 24], a slot a token, the last 512 tokens, truncate"


def test_a_group_prints_how_much_of_what_it_holds() -> None:
    (group,) = grouped([WINDOWED, kv_state(2, 2, 24, DType.BF16, window=512)])
    assert str(group) == ("2 layers of k bf16[2, 24], v bf16[2, 24], the last 512 tokens read, truncate on rejection")
    assert group.nbytes == 2 * WINDOWED.nbytes


states = st.builds(
    StateSpec,
    kind=st.sampled_from(["kv", "latent"]),
    layer=st.integers(0, 9),
    parts=st.just(WINDOWED.parts),
    unit=st.sampled_from(["token", "sequence"]),
    on_rejection=st.sampled_from(["truncate", "replay"]),
    window=st.sampled_from([0, 4, 512]),
)


@given(st.lists(states, max_size=12))
def test_groups_part_the_states_by_unit_rejection_and_window_alone(given_states: list[StateSpec]) -> None:
    groups = grouped(given_states)
    together = [state for group in groups for state in group.states]
    assert sorted(map(str, together)) == sorted(map(str, given_states))
    assert len({(group.unit, group.on_rejection, group.window) for group in groups}) == len(groups)
    for group in groups:
        for state in group.states:
            assert (state.unit, state.on_rejection, state.window) == (group.unit, group.on_rejection, group.window)
