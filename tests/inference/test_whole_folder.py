"""Asking folders of whole models: those that transformers writes, and ours, answer as transformers' `generate` does."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import NEW_TOKENS, answer_here

from megatron_deepstack.config.choices import Template
from megatron_deepstack.convert.exported_folder import read_exported
from megatron_deepstack.convert.folders import convert_folder
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.data.text.conversation import stop_ids
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.inference.answerer import answerer_at
from megatron_deepstack.inference.ask.preparation import Asked
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny_chat import (
    GRANITE_4_CONFIG,
    GRANITE_4_TOKENS,
    QWEN3_VL_TOKENS,
    QWEN3_VL_WORDS,
    QWEN_CONFIG,
    write_chat_tokenizer,
)
from megatron_deepstack.testing.tiny_data import draw_photo

sys.path.append(str(Path(__file__).parents[1] / "parity"))

pytestmark = pytest.mark.usefixtures("quiet_transformers")

QWEN = (QWEN3_VL_TOKENS, QWEN_CONFIG, QWEN3_VL_WORDS)
TOKENS: Mapping[str, tuple[tuple[str, ...], dict[str, Any], tuple[str, ...]]] = {
    "qwen3_vl": QWEN,
    "qwen3_vl_moe": QWEN,
    "granite4_vision": (GRANITE_4_TOKENS, GRANITE_4_CONFIG, ()),
}
IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- for item in message.content -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if item.type == 'image' else item.text -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' -}}
"""


def image_processor(kind: str) -> Any:
    """transformers' processor with Pillow, for the tiny model of that kind."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if kind == "granite4_vision":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        side = {"height": 16, "width": 16}
        grids = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
        return LlavaNextImageProcessorPil(size=side, crop_size=side, image_grid_pinpoints=grids, do_pad=True, **half)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 48}
    return Qwen2VLImageProcessorPil(size=size, patch_size=4, temporal_patch_size=2, merge_size=2, **half)


@dataclass(frozen=True)
class Folder:
    """A folder as transformers writes it, and pictures."""

    kind: str
    path: Path
    photos: tuple[Path, ...]

    @property
    def asked(self) -> list[Asked]:
        """Questions with one picture, two, and none."""
        first, second, third = map(str, self.photos)
        return [Asked("What is it?", (first,)), Asked("Which are they?", (second, third)), Asked("Hello?")]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folder]:
    import whole_folders

    made: dict[str, Folder] = {}

    def make(kind: str) -> Folder:
        root = tmp_path_factory.mktemp(kind)
        words = write_chat_tokenizer(root / "words", *TOKENS[kind])
        tokenizer = load_tokenizer(words)
        rows = tokenizer.vocab_size + tokenizer.vocab_size % 2
        path = getattr(whole_folders, kind)(root / "folder", text={"vocab_size": rows})
        for file in Path(words).iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        config = json.loads((path / "config.json").read_text())
        names = {"image_token_index": "<image>"} if kind == "granite4_vision" else IDS
        config |= {key: tokenizer.control_id(name) for key, name in names.items()}
        (path / "config.json").write_text(json.dumps(config))
        image_processor(kind).save_pretrained(path)
        if kind != "granite4_vision":
            (path / "chat_template.jinja").write_text(QWEN_TEMPLATE)
        photos = [root / f"{number}.png" for number in range(3)]
        for number, (photo, size) in enumerate(zip(photos, ((75, 31), (40, 90), (33, 33)), strict=True)):
            draw_photo(*size, number).save(photo)
        return Folder(kind, path, tuple(photos))

    def of(kind: str) -> Folder:
        if kind not in made:
            made[kind] = make(kind)
        return made[kind]

    return of


def by_transformers(folder: Folder, prompts: list[np.ndarray]) -> list[list[int]]:
    """New tokens of `generate`, greedy, of each prompt alone; the pictures by transformers' processor."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder.path, dtype=torch.float32).eval()
    config = json.loads((folder.path / "config.json").read_text())
    image = config.get("image_token_id", config.get("image_token_index"))
    found = []
    for asked, prompt in zip(folder.asked, prompts, strict=True):
        pictures = [Image.open(path).convert("RGB") for path in asked.pictures]
        inputs: dict[str, Any] = dict(image_processor(folder.kind)(pictures, return_tensors="pt")) if pictures else {}
        rows = iter(_rows(model, inputs))
        ids = [token for n in prompt.tolist() for token in ([image] * next(rows) if n < 0 else [n])]
        tokens = torch.tensor([ids])
        if folder.kind != "granite4_vision" and pictures:
            inputs["mm_token_type_ids"] = (tokens == image).int()
        with torch.no_grad():
            out = model.generate(
                input_ids=tokens, **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
            )
        found.append(out[0, len(ids) :].tolist())
    return found


def _rows(model: Any, inputs: dict[str, Any]) -> list[int]:
    """Positions of each picture."""
    if not inputs:
        return []
    if "image_grid_thw" in inputs:
        return [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
    from transformers.models.granite4_vision.processing_granite4_vision import Granite4VisionProcessor

    counter = object.__new__(Granite4VisionProcessor)
    counter.image_processor, counter.patch_size = image_processor("granite4_vision"), 4
    counter.downsample_rate, counter.num_additional_image_tokens = "1/2", 0
    return [counter._get_number_of_features(*map(int, size), 16, 16) for size in inputs["image_sizes"]]


KINDS = [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "qwen3_vl_moe")) for kind in TOKENS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_answers_as_its_generate(
    ranks: Callable[[int], RankPool], folder_of: Callable[[str], Folder], tmp_path: Path, kind: str
) -> None:
    """64 tokens, also from what `convert` makes of it, and with experts split over two tensor-parallel ranks."""
    folder = folder_of(kind)
    said: list[str] = []
    answerer = answerer_at(folder.path, ["train.seq_length=512"])
    preparation = answerer.preparation("ask", said.append)
    assert len(said) == 1, said
    assert "does not say how its data was prepared; taken is data.template=" in said[0]
    prepared = [preparation.prepare(asked) for asked in folder.asked]
    (ours,) = ranks(1).run(answer_here, answerer, preparation, prepared)
    assert ours == by_transformers(folder, [one.prompt for one in prepared])
    convert_folder(folder.path, tmp_path / "out", Naming.HUGGING_FACE)
    split = ["parallel.tensor=2", "parallel.sequence_parallel=true", "train.seq_length=512"]
    split += ["parallel.expert=2"] if kind == "qwen3_vl_moe" else []
    written = answerer_at(tmp_path / "out", split).without_sequence_parallelism()
    again = written.preparation("ask", pytest.fail)
    assert again.processor == preparation.processor
    assert ranks(2).run(answer_here, written, again, [again.prepare(asked) for asked in folder.asked]) == [ours, ours]


class Harness:
    """Stands for the base class of lmms-eval's models."""

    def __init__(self) -> None:
        self.rank, self.task_dict = 0, dict[str, Any]()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_vl", "granite4_vision"])
def test_the_model_for_lmms_eval_gives_the_same_answers(
    ranks: Callable[[int], RankPool], folder_of: Callable[[str], Folder], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With ranks of its own, in batches, and for a task that gives its pictures in memory."""
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["lmms_eval.api.model"], "lmms", Harness, raising=False)
    monkeypatch.delitem(sys.modules, "megatron_deepstack.inference.lmms.model", raising=False)
    module = importlib.import_module("megatron_deepstack.inference.lmms.model")
    monkeypatch.delitem(sys.modules, "megatron_deepstack.inference.lmms.model")
    folder = folder_of(kind)
    model = module.MegatronDeepStack(str(folder.path), batch_size=2)
    model.task_dict = {"task": {"test": [asked.pictures for asked in folder.asked]}}
    options = {"max_new_tokens": NEW_TOKENS, "temperature": 0}
    found = model.generate_until(
        [
            SimpleNamespace(args=(asked.text, options, lambda paths: map(Image.open, paths), number, "task", "test"))
            for number, asked in enumerate(folder.asked)
        ]
    )
    model.clean()
    answerer = answerer_at(folder.path)
    preparation = answerer.preparation("ask", lambda line: None)
    prepared = [preparation.prepare(asked) for asked in folder.asked]
    (expected,) = ranks(1).run(answer_here, answerer, preparation, prepared)
    ends = stop_ids(preparation.template, preparation.tokenizer)
    kept = [ids[: next((place for place, one in enumerate(ids) if one in ends), len(ids))] for ids in expected]
    assert found == [preparation.tokenizer.decode(ids).strip() for ids in kept]


def changed(folder: Path, target: Path, name: str, **changes: Any) -> Path:
    """A folder with other values in one of its JSON files; None removes a key."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    values = {**json.loads((folder / name).read_text()), **changes}
    (target / name).unlink()
    (target / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return target


# id, kind, changes to the processor's file, what is said
REFUSED = [
    ("kind", "qwen3_vl", {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type: found 'CLIPImageP"),
    ("filter", "qwen3_vl", {"resample": 2}, "resample: found 2, computed is 3"),
    ("padding", "qwen3_vl", {"do_pad": True}, "do_pad: found True, computed is False"),
    ("patches", "qwen3_vl", {"patch_size": 16}, "patch_size: found 16, computed is 4"),
    ("unscaled", "qwen3_vl", {"do_rescale": False}, "do_rescale: found False, computed is True"),
    ("limits", "qwen3_vl", {"size": {"shortest_edge": "few"}}, "data.min_pixels: found 'few', expected a whole number"),
    ("grids", "granite4_vision", {"image_grid_pinpoints": [[16, 32]]}, r"image_grid_pinpoints: found \[\[16, 32\]\]"),
    ("tiles", "granite4_vision", {"size": {"height": 32, "width": 32}}, "size: found .*, computed is"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_pictures_that_are_prepared_otherwise_are_refused(
    folder_of: Callable[[str], Folder], tmp_path: Path, kind: str, changes: dict[str, Any], words: str
) -> None:
    name = "preprocessor_config.json"
    with pytest.raises(CheckpointError, match=f"{name}.*prepares .*otherwise|{name}: prepares") as caught:
        read_exported(changed(folder_of(kind).path, tmp_path / "changed", name, **changes))
    assert caught.match(words)


def test_what_a_processor_says_is_taken(folder_of: Callable[[str], Folder], tmp_path: Path) -> None:
    """Older keys, values in one file, colours, and a template that begins an answer itself."""
    folder = folder_of("qwen3_vl").path
    found = read_exported(changed(folder, tmp_path / "old", "preprocessor_config.json", min_pixels=2048))
    assert (found.data.min_pixels, found.data.max_pixels, found.data.template) == (2048, 64 * 48, Template.QWEN3_VL)
    nested = tmp_path / "nested"
    nested.mkdir()
    for file in folder.iterdir():
        if file.name != "preprocessor_config.json":
            (nested / file.name).symlink_to(file)
    values = {**json.loads((folder / "preprocessor_config.json").read_text()), "image_mean": [0.4, 0.5, 0.6]}
    (nested / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    found = read_exported(nested)
    assert found.model.vision.mean == (0.4, 0.5, 0.6)
    assert found.data.min_pixels == 32 * 32
    (nested / "chat_template.jinja").unlink()
    (nested / "chat_template.jinja").write_text(QWEN_TEMPLATE + "{{- '<think>' -}}")
    said: list[str] = []
    answerer_at(nested).preparation("ask", said.append)
    assert "its chat template writes a question as" in said[1]
    assert "name that one with data.template=NAME" in said[1]
