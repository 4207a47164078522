"""Asking a folder of weights: the pixels and answers of the run that it was exported from, and of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import NEW_TOKENS, answer_here, make_run, train_two_steps
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.choices import GridRule, ImageResize, Variant
from megatron_deepstack.config.schema import ParallelConfig, Recipe, StackConfig, VisionConfig
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.errors import CheckpointError, ConfigError, DataError, StoreError
from megatron_deepstack.inference.answerer import FolderAnswerer, RunAnswerer, answerer_at
from megatron_deepstack.inference.ask.preparation import Asked
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny_chat import QWEN_CONFIG, QWEN_TOKENS, write_chat_tokenizer
from megatron_deepstack.testing.tiny_data import draw_photo
from orchestration.preprocess.driver.run import preprocess

pytestmark = pytest.mark.usefixtures("quiet_transformers")

Pools = Callable[[int], RankPool]
VIT = VisionConfig(image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=5, num_heads=2)
MODELS: dict[str, dict[str, Any]] = {
    "l": {},
    "hd": {"variant": Variant.DEEPSTACK_HD},
    "v": {"variant": Variant.DEEPSTACK_V, "vision": VIT, "stacks": StackConfig(grid=GridRule.FIXED_2X2, start=1)},
    "llava": {"variant": Variant.LLAVA, "stacks": StackConfig()},
}


def export_here(rank: int, recipe: Recipe, output: str, naming: Naming) -> None:
    from megatron_deepstack.inference.export import export_on_rank

    export_on_rank(recipe, output, naming, groups_for(ParallelConfig()))


@dataclass(frozen=True)
class Made:
    """A run and its exports."""

    recipe: Recipe
    folder: Path

    def export(self, naming: Naming) -> Path:
        """The folder of that naming."""
        return self.folder / f"as_{naming}"

    @property
    def photos(self) -> list[str]:
        """Its pictures."""
        return [str(path) for path in sorted(Path(str(self.recipe.data.images)).iterdir())]

    @property
    def asked(self) -> list[Asked]:
        """Questions with one picture, two, and none."""
        first, second, third, _ = self.photos
        return [Asked("What is it?", (first,)), Asked("Which are they?", (second, third)), Asked("Hello?")]


Runs = Callable[[str], Made]


@pytest.fixture(scope="module")
def runs(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A function that gives the run of a model of `MODELS` with both exports, made when it is first asked for."""
    made: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            recipe = make_run(folder, ParallelConfig(), **MODELS[name])
            ranks(1).run(train_two_steps, recipe)
            for naming in Naming:
                ranks(1).run(export_here, recipe, str(folder / f"as_{naming}"), naming)
            made[name] = Made(recipe, folder)
        return made[name]

    return make


@pytest.mark.parametrize(
    ("name", "naming"),
    [
        pytest.param(name, naming, id=f"{name}-{naming}", marks=[pytest.mark.slow] * (row % 2 == column))
        for row, name in enumerate(MODELS)
        for column, naming in enumerate(Naming)
    ],
)
def test_a_folder_answers_as_the_run_it_was_exported_from(ranks: Pools, runs: Runs, name: str, naming: Naming) -> None:
    """The same pixels, the same prompts, and 64 tokens; the model is that of the recipe."""
    made = runs(name)
    run, folder = answerer_at(Path(made.recipe.run_dir)), answerer_at(made.export(naming))
    assert (type(run), type(folder)) == (RunAnswerer, FolderAnswerer)
    language = replace(run.recipe.model.language, head_dim=8)  # a config says what a recipe derives
    assert folder.recipe.model == replace(run.recipe.model, language=language)
    ours, theirs = run.preparation("ask", pytest.fail), folder.preparation("ask", pytest.fail)
    assert (theirs.context, theirs.template, theirs.processor) == (ours.context, ours.template, ours.processor)
    before, after = ([one.prepare(asked) for asked in made.asked] for one in (ours, theirs))
    for expected, found in zip(before, after, strict=True):
        np.testing.assert_array_equal(found.prompt, expected.prompt)
        for picture, other in zip(found.pictures, expected.pictures, strict=True):
            assert picture.grid == other.grid
            np.testing.assert_array_equal(picture.slots, other.slots)
    (expected_ids,) = ranks(1).run(answer_here, run, ours, before)
    assert ranks(1).run(answer_here, folder, theirs, after) == [expected_ids]
    assert [len(ids) for ids in expected_ids] == [min(NEW_TOKENS, one.room) for one in before]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_generates_the_same_tokens(ranks: Pools, runs: Runs, name: str) -> None:
    """64 of them, greedy, from each question alone: what its own processor, cache and `generate` give."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    made = runs(name)
    path = made.export(Naming.HUGGING_FACE)
    answerer = answerer_at(path, ["train.seq_length=512"])
    preparation = answerer.preparation("ask", pytest.fail)
    prepared = [preparation.prepare(asked) for asked in made.asked]
    (ours,) = ranks(1).run(answer_here, answerer, preparation, prepared)
    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    model.generation_config.eos_token_id = None
    for asked, one, expected in zip(made.asked, prepared, ours, strict=True):
        content: list[dict[str, str]] = [{"type": "image", "path": str(picture)} for picture in asked.pictures]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": asked.text}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = inputs["input_ids"][0]
        image = ids == processor.image_token_id
        begins = torch.cat([~image[:0], ~image]) | torch.cat([image.new_ones(1), ~image[:-1]])
        words = ids.masked_fill(image, IMAGE_TOKEN_ID)
        assert [n for n in words.tolist() if n >= 0] == [n for n in one.prompt.tolist() if n >= 0]
        assert begins.any()
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :]
        assert tokens.tolist() == expected


def test_a_folder_says_how_the_store_was_made(ranks: Pools, runs: Runs, tmp_path: Path) -> None:
    """Also where the run's recipe says otherwise."""
    recipe = runs("l").recipe
    data = replace(recipe.data, store=str(tmp_path / "store.zarr"), resize=ImageResize.TORCH, transparency="#FFFFFF")
    preprocess(replace(recipe, data=data), str(data.store), workers=0)
    asked = replace(recipe, data=replace(recipe.data, store=data.store))
    ranks(1).run(export_here, asked, str(tmp_path / "out"), Naming.HUGGING_FACE)
    found = answerer_at(tmp_path / "out").recipe.data
    assert (found.resize, found.transparency) == (ImageResize.TORCH, "#ffffff")


def copy_of(made: Made, tmp_path: Path, naming: Naming = Naming.HUGGING_FACE) -> Path:
    """A copy of an export, to be damaged."""
    return Path(shutil.copytree(made.export(naming), tmp_path / "copy"))


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_what_a_folder_does_not_say_is_told(runs: Runs, tmp_path: Path) -> None:
    """The template is known by its text; without it the defaults of a recipe are taken, and said."""
    folder = copy_of(runs("l"), tmp_path)
    change_config(folder, lambda config: config.pop("data"))
    said: list[str] = []
    answerer_at(folder).preparation("ask", said.append)
    assert len(said) == 1
    assert "taken is data.resize=pillow, data.orientation=" in said[0]
    assert "template" not in said[0]
    (folder / "chat_template.jinja").unlink()
    answerer_at(folder).preparation("ask", said.append)
    assert "taken is data.template=v1, data.resize=pillow" in said[1]


def test_a_tokenizer_of_another_kind_is_the_same_after_export(ranks: Pools, runs: Runs, tmp_path: Path) -> None:
    """transformers' tokenizer.json is written anew, with `<image>`; prompts and stores are still those of the run."""
    recipe = runs("l").recipe
    words = write_chat_tokenizer(tmp_path / "words", QWEN_TOKENS, QWEN_CONFIG)
    data = replace(recipe.data, tokenizer=str(words), template="qwen", store=str(tmp_path / "store.zarr"))
    chatty = replace(recipe, data=data, run_dir=str(tmp_path / "run"))
    preprocess(chatty, str(data.store), workers=0)
    ranks(1).run(train_two_steps, chatty)
    ranks(1).run(export_here, chatty, str(tmp_path / "out"), Naming.HUGGING_FACE)
    run, folder = answerer_at(tmp_path / "run"), answerer_at(tmp_path / "out")
    ours, theirs = run.preparation("ask", pytest.fail), folder.preparation("ask", pytest.fail)
    assert theirs.tokenizer.fingerprint != ours.tokenizer.fingerprint
    for asked in runs("l").asked:
        np.testing.assert_array_equal(theirs.prepare(asked).prompt, ours.prepare(asked).prompt)
    assert len(folder.open_store(str(data.store))) == 5
    with pytest.raises(StoreError, match=r"was made with a tokenizer of sha256 .*has learned with one of"):
        folder.open_store(str(recipe.data.store))


def test_wrong_tokenizers_are_refused(runs: Runs, tmp_path: Path) -> None:
    words = write_chat_tokenizer(tmp_path / "words", QWEN_TOKENS, QWEN_CONFIG)
    named = [f"data.tokenizer={words}"]
    for naming in Naming:
        with pytest.raises(DataError, match=r"words.*: gives other ids than the tokenizer with which the model in"):
            answerer_at(runs("l").export(naming), named).preparation("ask", pytest.fail)
    with pytest.raises(DataError, match=r"words.*: has sha256 .*name that one with data\.tokenizer=PATH"):
        answerer_at(Path(runs("l").recipe.run_dir), named).preparation("ask", pytest.fail)
    folder = copy_of(runs("l"), tmp_path)
    change_config(folder, lambda config: config.pop("data"))
    small = replace(answerer_at(folder, named).recipe.model.language, vocab_size=300)
    answerer = answerer_at(folder, named)
    fewer = replace(answerer, recipe=replace(answerer.recipe, model=replace(answerer.recipe.model, language=small)))
    with pytest.raises(DataError, match=r"its ids go up to \d+, and the model in .* has 300 words"):
        fewer.preparation("ask", pytest.fail)
    for file in ("tokenizer.model", "tokenizer.json"):
        (folder / file).unlink()
    with pytest.raises(ConfigError, match=r"holds no tokenizer; name the model's with data\.tokenizer=PATH"):
        answerer_at(folder).preparation("ask", pytest.fail)


def _nothing(folder: Path) -> Path:
    return folder.with_name("nothing")


def _file(folder: Path) -> Path:
    return folder / "config.json"


def _truncated(folder: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def _incomplete(folder: Path) -> Path:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _without_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder


def _without_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def _another_architecture(folder: Path) -> Path:
    change_config(folder, lambda config: config.update(model_type="whisper"))
    return folder


def _unfinished(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder.rename(folder.with_name("out.partial"))


def _changed(**changes: Any) -> Callable[[Path], Path]:
    """Other values in its config.json, below `text_config` if there is a double underscore."""

    def damage(folder: Path) -> Path:
        def change(config: dict[str, Any]) -> None:
            for key, value in changes.items():
                section, _, name = key.rpartition("__")
                (config[section] if section else config)[name] = value

        change_config(folder, change)
        return folder

    return damage


def _adapters(folder: Path) -> Path:
    (folder / "config.json").rename(folder / "adapter_config.json")
    return folder


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (_nothing, ConfigError, r"nothing: no such folder; expected the run_dir of a `train` or `launch`"),
        (_file, ConfigError, r"config\.json: is a file; expected the run_dir"),
        (_empty, ConfigError, r"copy: holds neither; expected the run_dir"),
        (_truncated, CheckpointError, r"model\.safetensors: cannot be read as safetensors: .*it is cut off, or still"),
        (_changed(text_config=[1]), CheckpointError, r"config\.json: text_config: found \[1\], expected an object"),
        (
            _changed(text_config__num_hidden_layers=-1),
            CheckpointError,
            r"config\.json: .*model\.language\.num_layers: found -1, expected a number above 0",
        ),
        (
            _changed(text_config__num_hidden_layers=10**9),
            CheckpointError,
            r"config\.json describes 10000000\d\d layers, and the files hold \d+ tensors",
        ),
        (
            _changed(text_config__max_position_embeddings="many"),
            CheckpointError,
            r"config\.json: max_position_embeddings: found 'many', expected a number of tokens",
        ),
        (
            _changed(text_config__rope_parameters=None, text_config__rope_scaling={"rope_type": "linear"}),
            CheckpointError,
            r"config\.json: .*rope_scaling\.factor.*: not set, and linear needs it",
        ),
        (_incomplete, CheckpointError, r"names model-00002-of-00002\.safetensors, not there; finish the download"),
        (_without_config, ConfigError, r"copy: holds weights, and no config\.json that says what they compute"),
        (_without_weights, CheckpointError, r"copy: holds none of model\.safetensors"),
        (_another_architecture, CheckpointError, r"config\.json: model_type 'whisper' is no whole model of ours"),
        (_unfinished, ConfigError, r"out\.partial: an export that is being written, or whose writing was cut off"),
        (_adapters, ConfigError, r"copy: holds adapters alone; name the run that they are of"),
    ],
)
def test_what_cannot_be_asked_is_named(
    runs: Runs, tmp_path: Path, damage: Callable[[Path], Path], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        answerer_at(damage(copy_of(runs("l"), tmp_path)))


def test_what_lies_in_a_run_or_above_runs_is_named(runs: Runs, tmp_path: Path) -> None:
    run = Path(runs("l").recipe.run_dir)
    (step,) = (run / "checkpoints").iterdir()
    for path in (step.parent, run / "tensorboard"):
        with pytest.raises(ConfigError, match=f"lies in the run {run}; name that run"):
            answerer_at(path)
    shutil.copytree(run, tmp_path / "one")
    with pytest.raises(ConfigError, match="the runs one lie in it; name one of them"):
        answerer_at(tmp_path)


def test_a_checkpoint_that_is_being_written_is_named(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs("l").recipe.run_dir, tmp_path / "run")
    (step,) = (tmp_path / "run" / "checkpoints").iterdir()
    step.rename(step.with_name(f"{step.name}.partial"))
    with pytest.raises(CheckpointError, match=rf"holds no finished checkpoint: {step.name}\.partial is being written"):
        answerer_at(tmp_path / "run").require_weights()


def test_questions_that_a_folder_cannot_take(runs: Runs, tmp_path: Path) -> None:
    """Its own limits are named: pixels of a picture, and positions of the context."""
    made = runs("l")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    draw_photo(3000, 3000, 1).save(tmp_path / "large.png")
    preparation = answerer_at(made.export(Naming.HUGGING_FACE), ["data.max_image_pixels=1000000"]).preparation(
        "ask", pytest.fail
    )
    for name, message in (("broken.png", "give another picture"), ("large.png", r"data\.max_image_pixels")):
        with pytest.raises(DataError, match=message):
            preparation.prepare(Asked("What is it?", (str(tmp_path / name),)))
    with pytest.raises(DataError, match=r"context has 256 \(max_position_embeddings in .*config\.json, or train\.seq"):
        preparation.prepare(Asked("word " * 3000))


@pytest.mark.slow
def test_the_verbs_take_a_folder(runs: Runs, tmp_path: Path) -> None:
    """`ask` in two stages, and `evaluate` by two replicas, of a store and of a file."""
    made = runs("l")
    folder, photo = copy_of(made, tmp_path), made.photos[0]
    asked = ["ask", str(folder), photo, "What is it?", "--json", "--max-new-tokens", "8"]
    answers = []
    for layout in ([], ["parallel.pipeline=2"]):
        result = CliRunner().invoke(app, [*asked, *layout])
        assert result.exit_code == 0, result.output
        answers.append(json.loads(result.stdout)["answers"][0]["answer"])
    assert answers[0] == answers[1]
    arguments = ["evaluate", str(folder), "--store", str(made.recipe.data.store), "--ranks", "2", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "4"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["questions"], document["step"]) == (5, None)
    assert Path(document["folder"]) == folder / "evaluations" / "store"
    result = CliRunner().invoke(app, ["evaluate", str(folder)])
    assert (result.exit_code, "name questions with --store or --file" in result.stderr) == (2, True), result.output
