"""Recipes from YAML files and `section.field=value` overrides, and back to YAML.

OmegaConf resolves `${...}`; `yaml_text` reads the YAML, and `build` converts it strictly. The order of precedence is,
lowest first: the schema's defaults, a section's `architecture`, the file named by `base:`, the file itself, the
overrides. One file describes one run. The resolved recipe that a run writes reads back as exactly the same Recipe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_deepstack.config import architectures
from megatron_deepstack.config.build import Interpolated, build_recipe, defaults, plain
from megatron_deepstack.config.check import find_problems
from megatron_deepstack.config.constraints import PathError, expand_home
from megatron_deepstack.config.problems import Problem, did_you_mean, raise_problems, without_echoes
from megatron_deepstack.config.renamed import with_present_names
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.yaml_text import read_value, read_yaml, write_yaml
from megatron_deepstack.errors import ConfigError

RECIPES = Path(__file__).parent.parent / "recipes"
"""Folder of the recipes that come with the package."""
_ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "vision": architectures.VISION,
    "language": architectures.LANGUAGE,
}
_MAX_RECIPE_BYTES = 1 << 20
_ECHO = re.compile(r"(object_type|full_key)\b")
"""Lines that OmegaConf adds to its messages."""
_IN_WORDS: Mapping[str, str] = {
    r".*Environment variable '(\w+)' not found.*": (
        r"the environment variable \1 is not set; set it, or write ${oc.env:\1,VALUE} with a value to take then"
    ),
    r"Interpolation key '([^']*)' not found": r"${\1} names no field that is set",
    r"Recursive interpolation detected": "it leads back to itself",
    r'in "<(?:unicode|byte) string>", line': "at line",
}
"""Messages of OmegaConf and PyYAML, and what they mean."""
_INDICATORS = ("*", "&", "!", "%", "@", "`", "|", ">")
"""Characters with a special meaning at the start of a YAML value, where people write them in patterns and names."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and check it with `config.check`.

    Args:
        path: A YAML file, or the bare name of a recipe of the package, such as `demo`.
        overrides: Each `section.field=value`, applied in order.

    Returns:
        The checked recipe.

    Raises:
        ConfigError: The file, an override or a value is wrong. The error holds all problems.
    """
    recipe, problems = read_recipe(path, overrides)
    raise_problems(problems)
    return recipe


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[Problem]]:
    """Load a recipe as `load_recipe` does, but return the problems, so that a caller can add others to them.

    Args:
        path: A YAML file, or the bare name of a recipe of the package.
        overrides: Each `section.field=value`, applied in order.

    Returns:
        The recipe, whose fields hold their default where they have a problem, and the problems.

    Raises:
        ConfigError: The file cannot be read at all.
    """
    problems: list[Problem] = []
    file, written = find_recipe(path), dict[str, Path]()
    given = _read(file, (), written)
    for override in overrides:
        given = _apply(given, override, problems)
        key = override.partition("=")[0]
        written = {path: where for path, where in written.items() if not f"{path}.".startswith(f"{key}.")}
    recipe = build_recipe(_resolved(with_present_names(given, problems), problems), problems)
    problems += without_echoes(find_problems(recipe), problems)
    return recipe, [_placed(problem, written, file) for problem in problems]


def _placed(problem: Problem, written: Mapping[str, Path], file: Path) -> Problem:
    """The problem with the name of the base that its field is written in, if it is in none of the package's."""
    where = written.get(problem.paths[0], file) if problem.paths else file
    if where == file or where.parent == RECIPES:
        return problem
    return replace(problem, text=f"{problem.text} (written in {where})")


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> tuple[Recipe, list[Problem]]:
    """Apply overrides to a recipe that is already loaded.

    Args:
        recipe: The recipe. It is not changed.
        overrides: Each `section.field=value`, applied in order.

    Returns:
        The changed recipe and all its problems, as `read_recipe` returns them.
    """
    problems: list[Problem] = []
    given = _escaped(plain(recipe))
    for override in overrides:
        given = _apply(given, override, problems)
    changed = build_recipe(_resolved(given, problems), problems)
    problems += without_echoes(find_problems(changed), problems)
    return changed, problems


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write the whole recipe as YAML, with every field; `load_recipe` reads back an equal recipe."""
    return write_yaml(_escaped(plain(recipe)))


def find_recipe(path: str | Path) -> Path:
    """Find the file of a recipe.

    Args:
        path: A YAML file, or the bare name of a recipe of the package.

    Returns:
        The file. A file in the current folder takes precedence over a recipe of the package with that name.

    Raises:
        ConfigError: There is no such file and no such recipe.
    """
    try:
        file = Path(expand_home(str(path)))
    except PathError as error:
        raise ConfigError([f"recipe '{path}': expected {error}"]) from error
    with suppress(OSError):  # a name that is too long for the file system is not a file either
        if file.is_file():
            return file
    names = sorted(known.stem for known in RECIPES.glob("*.yaml"))
    if str(path) in names:
        return RECIPES / f"{path}.yaml"
    found = "is a folder" if os.path.isdir(path) else "no such file"
    raise ConfigError(
        [f"recipe '{path}': {found}; give a YAML file or one of {', '.join(names)}{did_you_mean(str(path), names)}"]
    )


def _read(file: Path, seen: tuple[Path, ...], written: dict[str, Path]) -> dict[Any, Any]:
    """Read one file and merge it over its `base`, which is a path relative to the file or the name of a recipe.

    The file that each field's value is written in is added to `written`, by the field's path.
    """
    if file.resolve() in seen:
        chain = " -> ".join(str(step) for step in (*seen, file.resolve()))
        raise ConfigError([f"{file}: `base` leads back to the same file: {chain}"])
    given, below = _parse(file), dict[Any, Any]()
    if "base" in given:
        base = given.pop("base")
        if not isinstance(base, str):
            raise ConfigError([f"{file}: base: found {base!r}, expected the path of another recipe"])
        beside = file.parent / base
        below = _read(beside if beside.is_file() else _find_base(file, base), (*seen, file.resolve()), written)
    written.update(dict.fromkeys(_paths(given), file))
    return _over(below, given)


def _paths(given: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """The paths of all fields of a mapping."""
    for key, value in given.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _find_base(file: Path, base: str) -> Path:
    """The recipe that `file` names as its base and that does not lie beside it. Raises ConfigError if there is none."""
    if "${" in base:
        raise ConfigError([f"{file}: base: found {base!r}, expected a path or a name without `${{...}}`"])
    try:
        return find_recipe(base)
    except ConfigError as error:
        here = f" beside {file.absolute().parent}" if not Path(base).is_absolute() else ""
        raise ConfigError([f"{file}: base (looked{here} first): {problem}" for problem in error.problems]) from error


def _parse(file: Path) -> dict[Any, Any]:
    """Read the YAML of one file, without resolving interpolations."""
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_RECIPE_BYTES + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: cannot be read: {_one_line(error)}"]) from error
    if len(content) > _MAX_RECIPE_BYTES:
        raise ConfigError([f"{file}: more than 1 MiB is no recipe; expected a page of YAML"])
    try:
        given = read_yaml(text)
        OmegaConf.create(given)  # raises for interpolations that it cannot parse, and for keys that are not words
    except Exception as error:  # PyYAML lets IndexError and others through for odd tags
        raise ConfigError([f"{file}: is not valid YAML: {_one_line(error)}"]) from error
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ConfigError([f"{file}: found a list or a bare value, expected sections such as `model:` and `train:`"])
    return given


def _apply(given: dict[Any, Any], override: str, problems: list[Problem]) -> dict[Any, Any]:
    """Return `given` with one `section.field=value` applied."""
    key, equals, text = override.partition("=")
    if not equals or any(not part or part != part.strip() for part in key.split(".")):
        problems.append(Problem(paths=("",), text=f"override '{override}': expected section.field=value"))
        return given
    try:
        change = read_value(text)
        for part in reversed(key.split(".")):
            change = {part: change}
        OmegaConf.create(change)
        return _over(given, change)
    except Exception as error:  # for the reason given in _parse
        quotes = "; put the value in quotes" if text[:1] in _INDICATORS else ""
        problems.append(Problem(paths=(key,), text=f"override '{override}' cannot be read: {_one_line(error)}{quotes}"))
        return given


def _over(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """Merge `above` over `below`: sections are merged key by key, everything else (lists too) is replaced."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _resolved(given: dict[Any, Any], problems: list[Problem]) -> dict[Any, Any]:
    """Merge what was given over the defaults and the named architectures, and resolve every interpolation."""
    base = defaults(Recipe)
    for section, known in _ARCHITECTURES.items():
        shape = _architecture(given, section, known, problems)
        if shape is not None:
            base["model"][section] = plain(shape)
    values = _resolve(OmegaConf.create(_over(base, given)), "", problems)
    assert isinstance(values, dict)
    return values


def _architecture(given: dict[Any, Any], section: str, known: Mapping[str, Any], problems: list[Problem]) -> Any:
    """Return the sizes that `model.SECTION.architecture` names, None without that key; the key is removed."""
    model = given.get("model")
    keys = model.get(section) if isinstance(model, dict) else None
    if not isinstance(keys, dict) or "architecture" not in keys:
        return None
    name = keys.pop("architecture")
    if isinstance(name, str) and name in known:
        return known[name]
    near = did_you_mean(str(name), list(known))
    path = f"model.{section}.architecture"
    problems.append(Problem(paths=(path,), text=f"found {name!r}, expected one of {', '.join(known)}{near}"))
    return None


def _resolve(node: DictConfig | ListConfig, path: str, problems: list[Problem]) -> dict[Any, Any] | list[Any]:
    """Return plain dicts and lists. A value whose interpolation fails becomes a problem and is left out."""
    if isinstance(node, ListConfig):
        pairs = [(str(index), item) for index, item in _items(node, range(len(node)), path, problems)]
        return [_resolve(item, f"{path}.{key}", problems) if _nested(item) else item for key, item in pairs]
    return {
        key: _resolve(item, f"{path}.{key}".lstrip("."), problems) if _nested(item) else item
        for key, item in _items(node, list(node.keys()), path, problems)
    }


def _nested(item: object) -> bool:
    return isinstance(item, (DictConfig, ListConfig))


def _items(node: DictConfig | ListConfig, keys: Sequence[Any], path: str, problems: list[Problem]) -> list[Any]:
    pairs = []
    written: Any = OmegaConf.to_container(node)
    for key in keys:
        try:
            item = node[key]
            is_text = isinstance(item, str) and OmegaConf.is_interpolation(node, key)
            pairs.append((key, Interpolated(item, written[key]) if is_text else item))
        except (OmegaConfBaseException, ValueError) as error:
            place = f"{path}.{key}".lstrip(".")
            problems.append(Problem(paths=(place,), text=f"cannot be resolved: {_one_line(error)}"))
    return pairs


def _one_line(error: Exception) -> str:
    """What OmegaConf or PyYAML say, without their own words for what the message names anyway."""
    told = " ".join(line.strip() for line in str(error).splitlines() if not _ECHO.match(line.strip()))
    for pattern, words in _IN_WORDS.items():
        told = re.sub(pattern, words, told)
    return told


def _escaped(value: Any) -> Any:
    """Protect each `${` in strings, so that it is not taken for an interpolation when it is read back."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
