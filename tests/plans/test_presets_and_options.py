"""Options are checked when they are made; presets are options in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slotwise.core.errors import OptionError
from slotwise.core.specs import DType
from slotwise.plans.options import PlanOptions, option_names, parse_preference
from slotwise.plans.presets import apply_preset, preset_names, read_preset


def test_the_presets_are_those_in_the_folder() -> None:
    assert preset_names() == ("default", "exact", "latency", "throughput")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_makes_options(name: str) -> None:
    options = apply_preset(PlanOptions(), name)
    for key, value in read_preset(name).items():
        found = getattr(options, key)
        expected = {"dtype": DType.parse, "backend": parse_preference}.get(key, lambda same: same)(value)
        assert found == expected


def test_the_default_preset_is_the_default() -> None:
    assert apply_preset(PlanOptions(), "default") == PlanOptions()
    assert apply_preset(PlanOptions(), "exact").dtype is DType.F32


def test_a_preset_changes_what_it_names_and_nothing_else() -> None:
    options = apply_preset(PlanOptions(capacity=99), "latency")
    assert (options.capacity, options.speculate) == (99, 8)


def test_a_preset_can_be_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('description = "x"\nspeculate = 3\n[backend]\n"*" = "reference"\nattention = ["a", "reference"]\n')
    options = apply_preset(PlanOptions(), path)
    assert options.speculate == 3
    assert options.backends_for("attention") == ("a", "reference")
    assert options.backends_for("linear") == ("reference",)
    assert options.backend_names == ("reference", "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("speculat = 3", "option 'speculat' is not known.*did you mean 'speculate'"),
        ("speculate = -1", "speculate must be an integer from 0 to 63, is -1"),
        ("speculate = ", "cannot be read as TOML"),
        ("backend = 5", "backend must be a name"),
        ("[backend]\nattention = 5\n'*' = 'reference'", "op 'attention' must be one or more backend names, is 5"),
        ("[backend]\natention = 'a'\n'*' = 'reference'", "op 'atention': no such op.*did you mean 'attention'"),
    ],
)
def test_a_faulty_preset_is_named_with_its_fault(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "faulty.toml"
    path.write_text(content)
    with pytest.raises(OptionError, match=rf"(?s)faulty\.toml.*{message}"):
        apply_preset(PlanOptions(), path)


def test_a_preset_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match=r"bytes\.toml cannot be read as TOML"):
        read_preset(tmp_path / "bytes.toml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latensy", "preset 'latensy' is not known.*did you mean 'latency'.*there are default, exact"),
        ("none.toml", "preset file none.toml does not exist"),
        ("../default", "preset file ../default does not exist"),
    ],
)
def test_an_unknown_preset_is_named(name: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_preset(name)


BAD: dict[str, tuple[Any, ...]] = {
    "backend": (5, (), [], {}, {"attention": "a"}, [""], [3], (("a",),), (("*", ()),), {"*": {}}, None),
    "capacity": (-1, 2**30 + 1, 1.0, "8", True, None),
    "page_size": (0, -1, 2**16 + 1, 1.5),
    "pages": (-1, 2**31),
    "max_sequences": (0, 2**16 + 1),
    "speculate": (-1, 64, False),
    "acceptance": ("couple", "", None, 3),
    "adaptive": (1, "yes", None),
    "prefill_chunk": (0, 2**16 + 1),
    "decode_rows": (0, 2**12 + 1, 5),
    "share_prefixes": (0, "no"),
    "dtype": ("float33", "int32", "int8", "bool", 3),
    "weights": ("int5", "INT8", "", None, 8, ["int8"]),
}


def test_every_option_has_bad_values_here() -> None:
    assert tuple(BAD) == option_names()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=name.split("_")[0]):
        PlanOptions(**{name: value})  # type: ignore[arg-type]


def test_a_misspelt_option_and_rule_suggest_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"option 'page_sise' is not known.*did you mean 'page_size'"):
        PlanOptions().with_changes(page_sise=3)
    with pytest.raises(OptionError, match=r"is 'couple'.*did you mean 'coupled'"):
        PlanOptions(acceptance="couple")


@pytest.mark.parametrize(
    "choice",
    ["a", ["a"], {"*": "a"}, {"*": ["a"]}, (("*", ("a",)),)],
    ids=["name", "list", "table", "table of lists", "preference"],
)
def test_a_preference_can_be_written_in_several_ways(choice: Any) -> None:
    assert parse_preference(choice) == (("*", ("a",)),)
    assert parse_preference(parse_preference(choice)) == parse_preference(choice)
