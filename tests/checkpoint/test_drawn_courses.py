"""Recipes drawn at random: saved under one layout, read and saved again under another, exported, and read back.

A fault shows itself by the number of its draw, which makes the same recipes again. To look further than the suite does:
DEEPSTACK_COURSES=1000:1400 python -m pytest -m slow tests/checkpoint/test_drawn_courses.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from drawn_recipes import Course, asked_draws, drawn_course
from safetensors.torch import load_file
from trained_rank import State, TrainedRank, differing, plain_tensors

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.convert.export import require_exportable
from megatron_deepstack.convert.exported_folder import read_exported
from megatron_deepstack.convert.folders import convert_folder
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.hf_whole import whole_model_of
from megatron_deepstack.convert.published import published_source
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.inference.export import Adapters, export_on_rank
from megatron_deepstack.inference.to_checkpoint import recipe_of_folder, write_on_rank
from megatron_deepstack.model.layers.lora import is_adapter
from megatron_deepstack.testing.compare import gather_published, worst
from megatron_deepstack.testing.parity.conversion import check_conversion
from megatron_deepstack.testing.ranks import RankPool, groups_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_transformers")]

Pools = Callable[[int], RankPool]
LOSS_TOLERANCE = {Precision.FP32: 3e-6, Precision.BF16: 5e-3}
PARAMETER_TOLERANCE = {Precision.FP32: 5e-4, Precision.BF16: 1e-1}


@dataclass(slots=True)
class Continued:
    """A checkpoint after two steps, and the third step of the ranks that wrote it."""

    path: Path
    weights: State
    """After two steps, by published names."""
    loss: float
    gradient_norm: float
    parameters: State
    """After the third step."""


def train_and_save(rank: int, recipe: Recipe, path: Path | None = None) -> Continued | None:
    """Train two steps, or take them from a checkpoint; save, and train the third."""
    trained = TrainedRank(recipe, initial_seed=99 if path is not None else None)
    if path is None:
        trained.step()
        trained.step()
    else:
        trained.load(path)
    weights, saved = trained.published(), trained.save()
    loss = trained.step()
    trained.saver.close()
    result = Continued(saved, weights, loss, trained.gradient_norm, trained.published())
    return result if rank == 0 else None


def start_from(rank: int, recipe: Recipe, source: Path) -> State | None:
    """The weights of a layout that starts from a folder of weights, or from a run folder with a checkpoint of these."""
    from megatron_deepstack.checkpoint.folder import newest_whole
    from megatron_deepstack.checkpoint.load import load
    from megatron_deepstack.model.build import build_model, fill_model
    from megatron_deepstack.model.init import random_source

    groups = groups_for(recipe.parallel)
    model = build_model(recipe.model, recipe.parallel, recipe.train.precision, groups)
    if (source / "config.json").exists():
        fill_model(model, published_source(source, model=recipe.model), groups.decoder.tp)
    else:
        fill_model(model, random_source(recipe.model, 99), groups.decoder.tp)
        checkpoint, _ = newest_whole(source)
        assert checkpoint is not None
        load(checkpoint, model, None)
    found = gather_published(model, groups, lambda parameter: parameter)
    return found if rank == 0 else None


def export(rank: int, recipe: Recipe, output: Path, naming: Naming, adapters: Adapters) -> None:
    alone = replace(recipe, parallel=ParallelConfig())
    export_on_rank(alone, str(output), naming, groups_for(alone.parallel), adapters)


def to_checkpoint(rank: int, folder: Path, target: Path) -> None:
    recipe = recipe_of_folder(folder, target)
    write_on_rank(recipe, str(folder), str(target), groups_for(ParallelConfig()))
    (target / "recipe.yaml").write_text(recipe_to_yaml(recipe), encoding="utf-8")


@pytest.mark.parametrize("number", asked_draws("DEEPSTACK_COURSES", 6))
def test_a_drawn_run_goes_on_and_is_exported(ranks: Pools, tmp_path: Path, number: int) -> None:
    """Tensors bit for bit through all of it; what is computed under another layout, or by another, within rounding."""
    course = drawn_course(number)
    print(course)  # which pytest shows with a failure
    read = _through_another_layout(ranks, tmp_path, course)
    first, other = _in_folders(course, tmp_path)
    run = Path(other.run_dir)
    (run / "recipe.yaml").write_text(recipe_to_yaml(other), encoding="utf-8")
    weights = {name: tensor for name, tensor in read.weights.items() if not is_adapter(name)}
    naming = _naming(other)
    if naming is None:
        return
    left_out = tmp_path / "left_out"
    ranks(1).run(export, other, left_out, naming, Adapters.LEFT_OUT if other.lora.rank else Adapters.MERGED)
    found = read_exported(left_out).tensors
    assert {str(tensor.dtype) for tensor in found.values()} == {DTYPES[other.train.precision]}
    assert differing({name: tensor.read().float() for name, tensor in found.items()}, weights) == []
    for source in (left_out, *_converted(ranks, left_out, naming, other)):
        for num_ranks, recipe in ((course.num_ranks, first), (course.other_num_ranks, other)):
            assert differing(ranks(num_ranks).run(start_from, recipe, source)[0], weights) == [], source
    _compute_alike(ranks, run, left_out, other, naming)


DTYPES = {Precision.FP32: "torch.float32", Precision.BF16: "torch.bfloat16"}


def _in_folders(course: Course, folder: Path) -> tuple[Recipe, Recipe]:
    return replace(course.recipe, run_dir=str(folder / "first")), replace(course.other, run_dir=str(folder / "other"))


def _through_another_layout(ranks: Pools, folder: Path, course: Course) -> Continued:
    """What the other layout read; back under the first one, the third step is bit for bit that of no stop."""
    first, other = _in_folders(course, folder)
    back = replace(first, run_dir=str(folder / "back"))
    written: Continued = ranks(course.num_ranks).run(train_and_save, first)[0]
    read: Continued = ranks(course.other_num_ranks).run(train_and_save, other, written.path)[0]
    again: Continued = ranks(course.num_ranks).run(train_and_save, back, read.path)[0]
    expected = ranks(1).run(plain_tensors, str(written.path))[0]
    for one in (read, again):
        assert differing(ranks(1).run(plain_tensors, str(one.path))[0], expected) == []
        assert differing(one.weights, written.weights) == []
    assert (again.loss, again.gradient_norm) == (written.loss, written.gradient_norm)
    assert differing(again.parameters, written.parameters) == []
    assert read.loss == pytest.approx(written.loss, rel=LOSS_TOLERANCE[first.train.precision])
    error, name = worst(read.parameters, written.parameters)
    assert error <= PARAMETER_TOLERANCE[first.train.precision], name
    return read


def _naming(recipe: Recipe) -> Naming | None:
    """That of transformers where it has such a model; None where a model that it alone can have is not written."""
    for naming in (Naming.HUGGING_FACE, Naming.PUBLISHED):
        with suppress(ConfigError):
            require_exportable(recipe.model, Path(recipe.run_dir) / "export", naming)
            return naming
    return None


def _converted(ranks: Pools, folder: Path, naming: Naming, recipe: Recipe) -> list[Path]:
    """The folder in other layouts: as a checkpoint, and under published names, from which the same folder is made."""
    checkpoint, paper, again = (folder.with_name(name) for name in ("checkpoint", "paper", "again"))
    ranks(1).run(to_checkpoint, folder, checkpoint)
    if naming is Naming.PUBLISHED or recipe.model.variant.traits.whole_model is not None:
        return [checkpoint]
    convert_folder(folder, paper, Naming.PUBLISHED)
    convert_folder(paper, again, naming)
    assert differing(load_file(again / "model.safetensors"), load_file(folder / "model.safetensors")) == []
    return [checkpoint, paper]


def _compute_alike(ranks: Pools, run: Path, left_out: Path, recipe: Recipe, naming: Naming) -> None:
    """The run's checkpoint by this system, and its export by transformers where that can."""
    folder = left_out
    if recipe.lora.rank:
        if recipe.train.precision is Precision.BF16:
            return  # merged weights are rounded, which tests/convert/test_adapters.py measures
        folder = left_out.with_name("merged")
        ranks(1).run(export, recipe, folder, naming, Adapters.MERGED)
    whole = whole_model_of(recipe.model.variant)
    if whole is not None:
        _number_special_tokens(folder / "config.json", list(whole[1].special_tokens))
    for line in check_conversion(folder, run, pool=ranks(1)):
        print(line)


def _number_special_tokens(file: Path, keys: list[str]) -> None:
    """Within the vocabulary; a folder without a tokenizer does not number them."""
    numbers = {key: 57 + place for place, key in enumerate(keys)}
    file.write_text(json.dumps({**json.loads(file.read_text()), **numbers}))
