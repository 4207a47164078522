"""Reading and writing YAML so that no value silently becomes another value.

PyYAML reads YAML 1.1, where `1:30` is 90 (base 60), `010` is 8 (base 8), and `no` is false everywhere. Here a plain
value is a number only where its spelling leaves no doubt. Every doubtful value stays a text: fields of text accept it,
and all other fields refuse it with a hint what to write. This module is also the only place that writes YAML. It quotes
texts so that readers of YAML 1.1 and this one read the same value.
"""

from __future__ import annotations

import re
from typing import Any, Final

import yaml

try:
    from yaml import CSafeDumper as _SafeDumper
    from yaml import CSafeLoader as _SafeLoader
except ImportError:  # PyYAML built without libyaml
    from yaml import SafeDumper as _SafeDumper  # type: ignore[assignment]
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

_MAX_VALUES: Final = 10_000
"""Largest number of values in a document, with aliases followed; a recipe has about 130 fields."""
_DIGITS: Final = r"[0-9]+(?:_[0-9]+)*"
_NULL: Final = re.compile(r"(?:null|Null|NULL)?")
_BOOL: Final = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+)")
_FLOAT: Final = re.compile(
    rf"[-+]?(?:(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?|{_DIGITS}[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)"
)
_TAG: Final = "tag:yaml.org,2002:"
_SCALARS: Final = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}


def parse_scalar(text: str) -> bool | int | float | str | None:
    """Read a plain YAML value: null, true or false, a number, or else the text itself.

    Numbers are in base 10, where `_` may separate digits (`1_000`), or have a prefix for their base (`0x1f`, `0o17`,
    `0b11`). `010`, `1:30`, `yes`, `2024-01-01` and `~` are texts.
    """
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def number_hint(text: str) -> str:
    """Return `; write ...` for a text that looks like a number but is none, and otherwise an empty text."""
    if re.fullmatch(r"[-+]?0[0-9_]+", text):
        plain = str(int(text)) if "__" not in text and text[-1] != "_" else "it"
        return f"; write {plain} without a leading zero, which some readers take for base 8"
    if re.fullmatch(r"[-+]?[0-9_]+(:[0-9]+)+(\.[0-9_]*)?", text):
        return "; write one number in base 10, as numbers with colons are base 60 to some readers"
    if re.fullmatch(r"[-+]?[0-9]{1,3}([,' ][0-9]{3})+(\.[0-9]+)?", text):
        return f"; write {re.sub(r'''[,' ]''', '_', text)}"
    return ""


class NotYaml(ValueError):
    """A text cannot be read as YAML; the message says where and why."""


def read_yaml(text: str) -> Any:
    """Return the value that a YAML document holds, as plain dicts, lists and scalars; None for an empty document.

    Raises:
        NotYaml: The text is not YAML, names a key twice, or holds many more values than a recipe has.
    """
    return _read(text)[0]


def read_value(text: str) -> Any:
    """Read the value of an override as `read_yaml` does, but refuse comments, which would silently shorten the value.

    A value that begins with `#`, such as a colour, is a text. A later `#` is refused if it would start a comment.

    Raises:
        NotYaml: As for `read_yaml`, and for a value with a comment.
    """
    if text.startswith("#"):
        return text
    value, end = _read(text)
    rest = text[end:].strip()
    if rest.startswith("#"):
        raise NotYaml(f"{rest!r} would be a comment; put the whole value in quotes")
    return value


def write_yaml(value: Any) -> str:
    """Write plain dicts, lists and scalars as a YAML document in block style, in the order given."""
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def _read(text: str) -> tuple[Any, int]:
    """Return the value, and the position in `text` where it ends."""
    try:
        loader = _Loader(str(text))
        node = loader.get_single_node()
        if node is None:
            return None, 0
        _require_sound(node)
        return loader.construct_document(node), node.end_mark.index
    except Exception as error:  # PyYAML lets IndexError and RecursionError through for odd tags and nesting
        raise NotYaml(str(error)) from error


def _require_sound(root: yaml.Node) -> None:
    """Raise if a mapping names a key twice, or if aliases make a small document large or endless."""
    waiting, count = [root], 0
    while waiting:
        node = waiting.pop()
        count += 1
        if count > _MAX_VALUES:
            raise yaml.YAMLError(f"holds more than {_MAX_VALUES} values, or an alias inside of what it stands for")
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                    if key.value in keys:
                        raise yaml.MarkedYAMLError(
                            problem=f"found duplicate key {key.value}", problem_mark=key.start_mark
                        )
                    keys.add(key.value)
                waiting += (key, value)


class _Loader(_SafeLoader):
    """PyYAML's safe loader that reads plain values with `parse_scalar`, also those with a written tag (`!!int`)."""

    def construct_plain(self, node: yaml.ScalarNode) -> Any:
        """Return the value of a scalar that has one of the tags in `_SCALARS`."""
        value, kind = parse_scalar(node.value), node.tag.removeprefix(_TAG)
        if kind == "float" and type(value) is int:
            return float(value)
        wanted = {"null": type(None), "bool": bool, "int": int, "float": float}[kind]
        if type(value) is not wanted:
            raise yaml.MarkedYAMLError(problem=f"{node.value!r} is no !!{kind}", problem_mark=node.start_mark)
        return value


_Loader.yaml_implicit_resolvers = {
    None: [
        *((f"{_TAG}{kind}", re.compile(f"(?:{pattern.pattern})$")) for kind, pattern in _SCALARS.items()),
        (f"{_TAG}merge", re.compile("<<$")),
    ]
}
for _kind in _SCALARS:
    _Loader.add_constructor(f"{_TAG}{_kind}", _Loader.construct_plain)


class _Dumper(_SafeDumper):
    """PyYAML's safe dumper, which quotes texts that YAML 1.1 or `parse_scalar` would read as other values."""

    def represent_text(self, text: str) -> yaml.Node:
        """Write a text, in quotes if `parse_scalar` would read another value."""
        return self.represent_scalar(f"{_TAG}str", text, style=None if parse_scalar(text) == text else "'")


_Dumper.add_representer(str, _Dumper.represent_text)
