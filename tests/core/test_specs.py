"""Dtypes and specs: names become sizes only when bound, and text reads back as what was printed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.errors import GraphError, OptionError
from slotwise.core.specs import DType, TensorSpec, dim_size, parse_spec

_DIMS = st.one_of(
    st.integers(0, 10**6), st.sampled_from(["T", "B", "Hkv", "N2"]), st.builds("B+{}".format, st.integers(1, 9))
)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", DType.BF16),
        ("BFloat16", DType.BF16),
        ("float32", DType.F32),
        ("int64", DType.I64),
        ("bool", DType.BOOL),
    ],
)
def test_a_dtype_has_its_short_and_its_torch_name(name: str, dtype: DType) -> None:
    assert DType.parse(name) is dtype
    assert DType.parse(dtype) is dtype


def test_an_unknown_dtype_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"'float31' is not known.*did you mean 'float32'"):
        DType.parse("float31")


@pytest.mark.parametrize("dtype", list(DType))
def test_a_dtype_knows_its_torch_type_and_size(dtype: DType) -> None:
    tensor = torch.zeros(3, dtype=dtype.torch)
    assert DType.of(tensor) is dtype
    assert dtype.itemsize == tensor.element_size()
    assert dtype.is_float == tensor.is_floating_point()


def test_a_tensor_of_another_type_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"torch\.complex64 are not supported.*f32"):
        DType.of(torch.zeros(1, dtype=torch.complex64))


def test_a_dimension_is_a_size_a_name_or_a_name_plus_a_constant() -> None:
    assert [dim_size(dim, {"B": 4}) for dim in (7, "B", "B+1")] == [7, 4, 5]
    with pytest.raises(GraphError, match=r"'T\+1' has no size.*'B': 4"):
        dim_size("T+1", {"B": 4})


def test_binding_gives_sizes_and_bytes() -> None:
    spec = TensorSpec(DType.BF16, ("T", 3, "B+1"))
    bound = spec.sized({"T": 2, "B": 4})
    assert bound.shape == (2, 3, 5)
    assert bound.nbytes() == spec.nbytes({"T": 2, "B": 4}) == 60
    assert TensorSpec(DType.F32, ()).nbytes() == 4


@given(st.sampled_from(DType), st.lists(_DIMS, max_size=4))
def test_text_reads_back_as_the_spec_it_was_printed_from(dtype: DType, shape: list[int | str]) -> None:
    spec = TensorSpec(dtype, tuple(shape))
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize("text", ["", "f32", "f32[", "f33[T]", "f32[-1]", "f32[T,]", "f32[T B]", "f32[1+T]", "[T]"])
def test_text_that_is_no_spec_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(GraphError, match="is no tensor spec") as caught:
        parse_spec(text)
    assert repr(text) in str(caught.value)


@given(st.text(max_size=12))
def test_any_other_text_is_a_spec_or_a_graph_error(text: str) -> None:
    try:
        spec = parse_spec(text)
    except GraphError:
        return
    assert parse_spec(str(spec)) == spec
