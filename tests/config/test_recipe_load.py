"""Recipes from YAML and overrides: what is read, what is refused, and with which words."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deepstack.config.architectures import LANGUAGE, VISION
from megatron_deepstack.config.build import field_paths
from megatron_deepstack.config.check import find_problems
from megatron_deepstack.config.choices import Part, Recompute, Variant
from megatron_deepstack.config.load import RECIPES, load_recipe, read_recipe, recipe_to_yaml
from megatron_deepstack.config.schema import (
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    StackConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_deepstack.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path):
    def write_recipe(text: str, name: str = "recipe.yaml") -> Path:
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        return file

    return write_recipe


def problems_of(file: Path | str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, overrides)
    return caught.value.problems


def test_an_empty_file_is_the_defaults(write):
    assert load_recipe(write("")) == Recipe()
    assert load_recipe(write("model:\ntrain:\n")) == Recipe()


def test_values_of_every_kind(write):
    recipe = load_recipe(
        write(
            "name: kinds\n"
            "model: {stacks: {slots: [0, 2, 4, 6]}, vision: {mean: [0, 0.5, 1]}}\n"
            "parallel: {recompute: full, sequence_parallel: true, tensor: 2}\n"
            "optimizer: {lr: 1e-3, weight_decay: 1}\n"
            "train: {trainable: [vision, language]}\n"
        )
    )
    assert recipe.model.stacks.slots == (0, 2, 4, 6)
    assert recipe.model.vision.mean == (0.0, 0.5, 1.0)
    assert recipe.parallel == ParallelConfig(tensor=2, sequence_parallel=True, recompute=Recompute.FULL)
    assert recipe.optimizer.lr == 1e-3
    assert isinstance(recipe.optimizer.weight_decay, float)
    assert recipe.train.trainable == (Part.VISION, Part.LANGUAGE)


def test_overrides_come_last_and_in_order(write):
    file = write("train: {steps: 5, seed: 1}\n")
    recipe = load_recipe(file, ["train.steps=6", "train.steps=7", "model.language.num_kv_heads=null"])
    assert (recipe.train.steps, recipe.train.seed, recipe.model.language.num_kv_heads) == (7, 1, None)


def test_a_list_is_replaced_not_merged(write):
    recipe = load_recipe(write("model: {stacks: {slots: [0, 1, 2, 3]}}\n"), ["model.stacks.slots=[4,5,6,7]"])
    assert recipe.model.stacks.slots == (4, 5, 6, 7)


def test_base_is_relative_to_its_file(tmp_path, write):
    (tmp_path / "inner").mkdir()
    write("train: {steps: 5, seed: 3}\nname: low\n", "base.yaml")
    write("base: ../base.yaml\nname: middle\n", "inner/middle.yaml")
    recipe = load_recipe(write("base: inner/middle.yaml\ntrain: {steps: 9}\n"))
    assert (recipe.name, recipe.train.steps, recipe.train.seed) == ("middle", 9, 3)


def test_interpolation_reaches_defaults_and_architectures(write):
    file = write(
        "model: {language: {architecture: vicuna_13b}}\n"
        "train: {steps: '${model.language.num_layers}', global_batch_size: '${train.micro_batch_size}'}\n"
    )
    recipe = load_recipe(file)
    assert (recipe.train.steps, recipe.train.global_batch_size) == (40, 1)


def test_a_problem_of_a_base_names_its_file(write):
    base = write("train: {stepz: 5, seed: x}\nname: low\n", "base.yaml")
    top = write("base: base.yaml\ntrain: {seed: y}\noptimizer: {lr: fast}\n")
    _, problems = read_recipe(top)
    texts = {problem.paths[0]: str(problem) for problem in problems}
    assert texts["train.stepz"].endswith(f"(written in {base})")
    assert "written in" not in texts["train.seed"] + texts["optimizer.lr"]
    _, problems = read_recipe(top, ["train.stepz=6"])
    assert not any("written in" in str(problem) for problem in problems)


def test_an_architecture_is_a_base_for_the_other_keys(write):
    file = write("model: {language: {architecture: vicuna_13b, num_layers: 4}, vision: {num_layers: 5}}\n")
    assert load_recipe(file).model.language == replace(LANGUAGE["vicuna_13b"], num_layers=4)
    changed = load_recipe(file, ["model.language.architecture=qwen3_8b"])
    assert changed.model.language == replace(LANGUAGE["qwen3_8b"], num_layers=4)


WHOLE = sorted(set(VISION) & set(LANGUAGE))
"""Sizes of models whose tower and decoder belong together."""
SHAPES = {name: shape for table in (VISION, LANGUAGE) for name, shape in table.items() if name not in WHOLE}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_named_shapes_pass_the_checks(shape):
    model = ModelConfig(vision=shape) if isinstance(shape, VisionConfig) else ModelConfig(language=shape)
    assert not find_problems(Recipe(model=model))


@pytest.mark.parametrize("name", WHOLE)
def test_named_whole_models_fit_together(name):
    of_qwen = Variant.QWEN3_VL_MOE if LANGUAGE[name].num_experts else Variant.QWEN3_VL
    tiled = bool(VISION[name].tile_grids)
    model = ModelConfig(
        variant=Variant.GRANITE4_VISION if tiled else of_qwen,
        vision=VISION[name],
        language=LANGUAGE[name],
        stacks=StackConfig(slots=(9, 6, 3, 0, 12, 15, 18, 21) if tiled else None),
    )
    assert not find_problems(Recipe(model=model))


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_of_the_package_load_by_name(file):
    assert load_recipe(file.stem) == load_recipe(file)


REFUSED = {
    "typo in a key": ("train: {stepz: 3}", "train.stepz: unknown key (value 3); did you mean 'train.steps'?"),
    "typo in a section": ("trian: {steps: 3}", "trian: unknown key; did you mean 'train'?"),
    "key of another section": ("train: {lr: 3}", "train.lr: unknown key (value 3); did you mean 'optimizer.lr'?"),
    "nothing near": ("7: 8", "7: unknown key (value 8); known here: name, run_dir, model"),
    "bad enum": ("parallel: {recompute: ful}", "found 'ful', expected one of none, selective, full; did you mean"),
    "enum that YAML 1.1 reads as false": ("parallel: {recompute: off}", "recompute: found 'off', expected one of none"),
    "text for a number": ("train: {steps: many}", "train.steps: found 'many', expected a whole number"),
    "fraction for a whole number": ("train: {steps: 1.5}", "train.steps: found 1.5, expected a whole number"),
    "true for a number": ("train: {steps: true}", "train.steps: found true, expected a whole number"),
    "number for a truth": ("train: {truncate: 1}", "train.truncate: found 1, expected true or false"),
    "number for a text": ("name: 2024", "name: found 2024, expected text; put it in quotes"),
    "null for a number": ("train: {steps: null}", "train.steps: found null, expected a whole number"),
    "not finite": ("optimizer: {lr: .nan}", "optimizer.lr: found nan, expected a finite number"),
    "too large": ("train: {steps: 99999999999999999999}", "expected a whole number of at most 63 bits"),
    "value for a section": ("model: 4", "model: found 4, expected a section with keys variant, vision"),
    "section for a value": ("train: {steps: {a: 1}}", "train.steps: found a section, expected a whole number"),
    "value for a list": ("model: {stacks: {slots: 3}}", "model.stacks.slots: found 3, expected a list of numbers"),
    "wrong item": ("model: {stacks: {slots: [1, x]}}", "model.stacks.slots: found [1, 'x'], expected a whole number"),
    "wrong length": ("model: {vision: {std: [1]}}", "model.vision.std: found [1], expected a list of 3 values"),
    "unknown architecture": ("model: {language: {architecture: vicuna_8b}}", "did you mean 'vicuna_7b'?"),
    "missing interpolation": ("train: {steps: '${x.y}'}", "train.steps: cannot be resolved: ${x.y} names no field"),
    "variable that is not set": (
        "name: '${oc.env:NOT_SET_X}'",
        "the environment variable NOT_SET_X is not set;",
    ),
    "circular interpolation": ("name: ${name}", "name: cannot be resolved: it leads back to itself"),
    "mandatory marker": ("name: ???", "name: cannot be resolved: Missing mandatory value"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(write, text, message):
    (problem,) = problems_of(write(text))
    assert message in problem


UNREADABLE = {
    "not YAML": ("a: [", "is not valid YAML"),
    "key twice": ("name: a\nname: b\n", "found duplicate key name"),
    "list": ("- 1", "found a list or a bare value"),
    "bare value": ("42", "is not valid YAML"),
    "empty number": ("train: {steps: !!int }", "is not valid YAML"),
    "nested without end": ("[" * 5000, "is not valid YAML"),
    "control character": ("\0", "is not valid YAML"),
    "object": ("a: !!python/object:os.system {}", "is not valid YAML"),
    "itself as its base": ("base: recipe.yaml", "`base` leads back to the same file"),
    "number as its base": ("base: 3", "base: found 3, expected the path of another recipe"),
    "base that is not there": ("base: nowhere", "recipe.yaml: base (looked beside "),
    "base with a variable": ("base: ${oc.env:HOME}/a.yaml", "expected a path or a name without `${...}`"),
    "tab": ("train:\n\tsteps: 3", "cannot start any token at line 2, column 1"),
    "broken interpolation": ("name: ${", "is not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable(write, text, message):
    (problem,) = problems_of(write(text))
    assert message in problem


def test_files_that_are_no_recipes(tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    assert "cannot be read" in problems_of(binary)[0]
    assert "is a folder" in problems_of(tmp_path)[0]
    assert "no such file" in problems_of("x" * 5000)[0]
    assert "no such file; give a YAML file or one of" in problems_of(tmp_path / "none.yaml")[0]
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (1 << 20) + b"\n")
    assert "more than 1 MiB is no recipe" in problems_of(large)[0]


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", " train.steps=3", "train.steps =3", ""])
def test_override_without_a_proper_key(write, override):
    assert problems_of(write(""), override) == (f"override '{override}': expected section.field=value",)


@pytest.mark.parametrize("override", ["train.trainable=[vision", "train.steps=!!int ", "name=${", "a." * 3000 + "b=1"])
def test_override_with_a_broken_value(write, override):
    assert "cannot be read" in problems_of(write(""), override)[0]


def test_all_problems_at_once_in_file_and_overrides(write):
    found = problems_of(
        write("train: {stepz: 3, global_batch_size: x}\nmodle: {}\nparallel: {tensor: 3}\n"),
        "optimizer.lr=-1",
        "data.template=v2",
        "broken",
    )
    starts = ["override 'broken'", "train.stepz", "modle", "train.global_batch_size", "optimizer.lr: found -1.0"]
    starts += ["parallel.tensor: 3 tensor-parallel ranks", "data.template: found 'v2'"]
    for start in starts:
        assert any(problem.startswith(start) for problem in found), (start, found)


def test_a_field_that_could_not_be_read_is_reported_once(write):
    (problem,) = problems_of(write("model: {vision: {image_size: big, patch_size: 13}}"))
    assert problem.startswith("model.vision.image_size: found 'big'")


def test_problems_can_be_had_without_raising(write):
    recipe, problems = read_recipe(write("train: {stepz: 3, seed: 5}"))
    assert recipe.train.seed == 5
    assert [problem.paths for problem in problems] == [("train.stepz",)]


AWKWARD = ["1e5", "yes", "null", "${x}", r"\${x}", r"a\\${b", "2024-01-01", " padded ", "#", "a: b", "é\u2028", "0x1f"]


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_names_survive_the_round_trip(write, name):
    recipe = Recipe(name=name)
    assert load_recipe(write(recipe_to_yaml(recipe))) == recipe


@settings(max_examples=40)
@given(
    name=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip),
    lr=st.floats(1e-12, 10, allow_nan=False),
    slots=st.lists(st.integers(0, 31), min_size=4, max_size=4),
    trainable=st.sets(st.sampled_from(Part), min_size=1),
    kv_heads=st.sampled_from([None, 1, 2, 32]),
)
def test_round_trip_is_exact(tmp_path_factory, name, lr, slots, trainable, kv_heads):
    recipe = Recipe(
        name=name,
        optimizer=OptimizerConfig(lr=lr),
        model=ModelConfig(language=LanguageConfig(num_kv_heads=kv_heads), stacks=StackConfig(slots=tuple(slots))),
        train=TrainConfig(trainable=tuple(trainable)),
    )
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["model", "vision", "train", "steps", "slots", "x"]), inner, max_size=4)
        ),
    )
)
def test_any_mapping_is_a_recipe_or_a_config_error(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "any_mapping.yaml"
    file.write_text(json.dumps(value if isinstance(value, dict) else {"model": value}), encoding="utf-8")
    with suppress(ConfigError):
        assert isinstance(load_recipe(file), Recipe)


def test_every_field_can_be_set_by_its_path(write):
    assert "model.stacks.slots" in field_paths()
    assert len(set(field_paths())) == len(field_paths()) > 60
