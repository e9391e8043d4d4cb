"""Layouts: where elements stand, by hand and for any matrix, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core import layouts
from slotwise.core.errors import GraphError
from slotwise.core.layouts import CODES_WORD, GROUP_WORD, OCTET, OCTETS, ROWS, WEIGHT_WORD, in_rows, laid_out, to_octets
from slotwise.core.ops import contract_of
from slotwise.core.specs import DType, TensorSpec

WORDS = (GROUP_WORD, WEIGHT_WORD, CODES_WORD)


def test_by_hand_a_word_of_each_of_eight_rows_follows_the_other() -> None:
    rows = torch.arange(16 * 4).view(16, 4)  # row r holds 4 r .. 4 r + 3
    flat = to_octets(rows, 2).flatten().tolist()
    assert flat[:4] == [0, 1, 4, 5]
    assert flat[14:18] == [28, 29, 2, 3]
    assert flat[32:34] == [32, 33]


@given(octets=st.integers(1, 5), words=st.integers(1, 9), word=st.sampled_from(WORDS))
def test_every_element_stands_where_the_layout_says(octets: int, words: int, word: int) -> None:
    rows = torch.arange(octets * OCTET * words * word).view(octets * OCTET, words * word)
    stood = to_octets(rows, word)
    assert stood.shape == rows.shape
    places = stood.view(octets, words, OCTET, word)
    for row in range(len(rows)):
        assert places[row // OCTET, :, row % OCTET].flatten().tolist() == rows[row].tolist()
    assert in_rows(stood, word, OCTETS).equal(rows)
    assert laid_out(rows, word, ROWS) is rows


@pytest.mark.parametrize(
    ("dtype", "word"),
    [
        (torch.bfloat16, WEIGHT_WORD),
        (torch.float32, WEIGHT_WORD),
        (torch.int8, CODES_WORD),
        (torch.float16, GROUP_WORD),
    ],
)
def test_the_compiled_loop_for_large_weights_does_the_same(
    dtype: torch.dtype, word: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randint(-100, 100, (48, 300)).to(dtype)
    expected = to_octets(weight, word)
    monkeypatch.setattr(layouts, "_LARGE", 0)
    assert to_octets(weight, word).equal(expected)
    assert to_octets(weight.t().contiguous().t(), word).equal(expected), "whatever its strides"


def test_a_weight_that_does_not_divide_into_octets_is_refused_by_the_op() -> None:
    x, bias = TensorSpec(DType.BF16, ("T", 6)), None
    linear = contract_of("linear")
    linear.infer((x, TensorSpec(DType.BF16, (16, 6)), bias), {"layout": OCTETS})
    with pytest.raises(GraphError, match="rows in a multiple of 8 and columns in a multiple of 2"):
        linear.infer((x, TensorSpec(DType.BF16, (12, 6)), bias), {"layout": OCTETS})
    gated = contract_of("linear_gated")
    with pytest.raises(GraphError, match="rows in a multiple of 16"):
        gated.infer((x, TensorSpec(DType.BF16, (24, 6))), {"layout": OCTETS, "activation": "silu"})
    with pytest.raises(GraphError, match="attribute layout must be rows or octets, is 'columns'"):
        linear.complete_attrs({"layout": "columns"})
