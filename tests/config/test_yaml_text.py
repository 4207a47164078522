"""Plain YAML values: a number is what it looks like; what leaves doubt is a text, which fields of numbers refuse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_deepstack.config.check import value_at
from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.yaml_text import NotYaml, parse_scalar, read_value, read_yaml, write_yaml
from megatron_deepstack.errors import ConfigError

MEANT = {
    "0": 0,
    "-0": 0,
    "10": 10,
    "+5": 5,
    "-5": -5,
    "1_000": 1000,
    "178_956_970": 178_956_970,
    "0x1f": 31,
    "0o17": 15,
    "0b101": 5,
    "1e3": 1000.0,
    "1E+3": 1000.0,
    "1.e3": 1000.0,
    ".5": 0.5,
    ".5e3": 500.0,
    "1.": 1.0,
    "-1_000.5": -1000.5,
    "007.5": 7.5,
    ".inf": math.inf,
    "-.Inf": -math.inf,
    "true": True,
    "FALSE": False,
    "null": None,
    "NULL": None,
    "": None,
}
"""Plain values, and what they are."""

TEXTS = ["010", "-010", "00", "08", "1:30", "1:30.5", "12:30:45", "1__0", "1_", "_1", "1,000", "1e", "0x", "0o8", "0b2"]
TEXTS += ["yes", "No", "on", "OFF", "y", "N", "tRUE", "2024-01-01", "2001-12-14t21:59:43.10-05:00", "~", "inf", "nan"]
TEXTS += ["=", "none", "None", "nil", "0.1.2", "1 000", "1'000", "½", "一"]


@pytest.mark.parametrize(("text", "value"), MEANT.items(), ids=map(repr, MEANT))
def test_values_that_leave_no_doubt(text: str, value: object) -> None:
    for read in (read_yaml, read_value, parse_scalar):
        assert read(text) == value
        assert type(read(text)) is type(value)


def test_not_a_number() -> None:
    assert math.isnan(read_yaml(".nan"))


@pytest.mark.parametrize("text", TEXTS)
def test_doubtful_values_are_texts(text: str) -> None:
    assert read_yaml(text) == read_value(text) == text
    assert read_yaml(f"a: {text}\nb: [{text.replace(',', ';')}]") == {"a": text, "b": [text.replace(",", ";")]}


@pytest.mark.parametrize(("text", "tag"), [("010", "int"), ("1:30", "int"), ("1:30", "float"), ("yes", "bool")])
def test_a_written_tag_brings_no_surprise_either(text: str, tag: str) -> None:
    with pytest.raises(NotYaml, match=f"'{text}' is no !!{tag}"):
        read_yaml(f"!!{tag} {text}")
    assert (read_yaml("!!float 5"), read_yaml("!!str 5")) == (5.0, "5")


def test_keys_are_read_alike() -> None:
    assert read_yaml("{on: 1, 010: 2, 1:30: 3}") == {"on": 1, "010": 2, "1:30": 3}


def test_merged_mappings_and_aliases() -> None:
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 2},
    }


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 1}]" for n in range(8))]
)
def test_endless_documents(text: str) -> None:
    with pytest.raises(NotYaml, match="holds more than 10000 values, or an alias inside of what it stands for"):
        read_yaml(text)


@pytest.mark.parametrize("text", ["run #3", "[1, 2] # two", "é #1", " # x"])
def test_a_comment_cuts_nothing_off_an_override(text: str) -> None:
    with pytest.raises(NotYaml, match="would be a comment; put the whole value in quotes"):
        read_value(text)
    assert read_value(f'"{text}"') == text


def test_an_override_that_begins_with_a_hash_is_a_text() -> None:
    assert read_value("#ffffff") == "#ffffff"


@given(st.text() | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False) | st.sampled_from(TEXTS))
def test_what_is_written_is_read_back_here_and_by_yaml_1_1(value: object) -> None:
    written = write_yaml({"key": value})
    assert read_yaml(written) == {"key": value}
    assert type(read_yaml(written)["key"]) is type(value)
    assert yaml.safe_load(written) == {"key": value}


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty.yaml").touch()
    return tmp_path / "empty.yaml"


NUMBERS = {
    "base 60": ("train.steps", "1:30", "found '1:30', expected a whole number; write one number in base 10"),
    "base 60 as a float": ("optimizer.lr", "1:30.5", "found '1:30.5', expected a number; write one number in base 10"),
    "base 8": ("train.steps", "010", "found '010', expected a whole number; write 10 without a leading zero"),
    "base 8 in a list": ("model.stacks.slots", "[01, 2, 3, 4]", "expected a whole number; write 1 without a leading"),
    "commas": ("train.steps", "1,000", "found '1,000', expected a whole number; write 1_000"),
    "fraction": ("train.steps", "1.5e0", "found 1.5, expected a whole number"),
    "infinite": ("optimizer.lr", ".inf", "found inf, expected a finite number"),
    "inf": ("optimizer.lr", "inf", "found 'inf', expected a number"),
    "date": ("train.steps", "2024-01-01", "found '2024-01-01', expected a whole number"),
    "yes for a number": ("train.steps", "yes", "found 'yes', expected a whole number"),
    "y for a truth": ("train.truncate", "y", "found 'y', expected true or false"),
    "1 for a truth": ("train.truncate", "1", "found 1, expected true or false"),
    "~ for a number": ("train.steps", "~", "found '~', expected a whole number"),
    "~ for a text": ("logging.wandb_project", "~", "found '~', expected text; `~` alone is null to YAML: write null"),
    "~ for a path": (
        "data.store",
        "~",
        "expected a path; `~` alone is null to YAML: write null for none, or ~/ for the",
    ),
    "~ for paths": (
        "data.stores",
        "~",
        "expected a path; `~` alone is null to YAML: write null for none, or ~/ for the",
    ),
}


@pytest.mark.parametrize(("path", "value", "message"), NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("where", ["file", "override"])
def test_what_cannot_be_meant_is_refused(empty: Path, path: str, value: str, message: str, where: str) -> None:
    if where == "file":
        *sections, name = path.split(".")
        plain = value if "," not in value or value[0] == "[" else f"'{value}'"
        lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(sections)]
        empty.write_text("\n".join([*lines, f"{'  ' * len(sections)}{name}: {plain}"]))
    with pytest.raises(ConfigError) as caught:
        load_recipe(empty, [f"{path}={value}"] if where == "override" else [])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: found ")
    assert message in problem


ACCEPTED = {
    "exponent for a whole number": ("train.steps", "1e3", 1000),
    "underscores": ("data.max_image_pixels", "1_000_000", 1_000_000),
    "no digit before the point": ("optimizer.warmup_fraction", ".5", 0.5),
    "none behind it": ("optimizer.lr", "1.", 1.0),
    "sign": ("train.steps", "+5", 5),
    "yes": ("train.truncate", "yes", True),
    "Off": ("train.truncate", "Off", False),
    "no as a name": ("name", "no", "no"),
    "time as a name": ("name", "1:30", "1:30"),
    "zeros as a name": ("name", "007", "007"),
    "date as a folder": ("run_dir", "2024-01-01", "2024-01-01"),
    "~ for a number that may be absent": ("launch.ranks", "~", None),
    "nothing": ("data.store", "", None),
}


@pytest.mark.parametrize(("path", "value", "meant"), ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_meant(empty: Path, path: str, value: str, meant: object) -> None:
    found = value_at(load_recipe(empty, [f"{path}={value}"]), path)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize("value", ["*.json", "@x", "`x`", "!x", "%x", "run #3"])
def test_overrides_with_signs_of_yaml_say_that_quotes_help(empty: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"put the (whole )?value in quotes"):
        load_recipe(empty, [f"data.records={value}"])
    assert load_recipe(empty, [f'data.records="{value}"']).data.records == (value,)
