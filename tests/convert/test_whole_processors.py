"""Exported folders of whole models: transformers' own processors load them, and give the ids and pixels of training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_deepstack.config.choices import Template
from megatron_deepstack.config.schema import DataConfig, ModelConfig, Recipe
from megatron_deepstack.convert.export import write_model
from megatron_deepstack.convert.export_files import About
from megatron_deepstack.convert.hf_folder_model import model_of_folder
from megatron_deepstack.convert.hf_names import Naming, by_published_name
from megatron_deepstack.convert.hf_whole import used_tensors
from megatron_deepstack.convert.tensor_files import files_by_name, lazy_tensor
from megatron_deepstack.data.images.processors import processor_of
from megatron_deepstack.data.images.sized_processor import SizedProcessor
from megatron_deepstack.data.records.dialects import read_conversation
from megatron_deepstack.data.text.conversation import encode_conversation, encode_prompt, writes_tools
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.model.published_shapes import published_shapes
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.planning.views import stored_shape
from megatron_deepstack.testing.tiny_chat import (
    GRANITE_4_CONFIG,
    GRANITE_4_TOKENS,
    QWEN3_VL_TOKENS,
    QWEN3_VL_WORDS,
    QWEN_CONFIG,
    QWEN_TOKENS,
    write_chat_tokenizer,
)
from megatron_deepstack.testing.tiny_data import jpeg_bytes

sys.path.append(str(Path(__file__).parents[1] / "parity"))

pytestmark = pytest.mark.usefixtures("quiet_transformers")

SIZES = ((90, 60), (33, 70), (64, 64))
TOKENS: Mapping[str, tuple[tuple[str, ...], dict[str, Any], tuple[str, ...]]] = {
    "qwen3_vl": (QWEN3_VL_TOKENS, QWEN_CONFIG, QWEN3_VL_WORDS),
    "qwen3_vl-bare": ((*QWEN_TOKENS, "<|vision_start|>", "<|vision_end|>"), QWEN_CONFIG, ()),
    "granite4_vision": (GRANITE_4_TOKENS, GRANITE_4_CONFIG, ()),
    "granite4_vision-bare": (GRANITE_4_TOKENS[:3], GRANITE_4_CONFIG, ()),
}
"""Tokenizers: with the tokens that stand for images, and without them."""


@dataclass(frozen=True)
class Exported:
    """A folder that was read and written again, with the recipe that it was written for."""

    source: Path
    folder: Path
    recipe: Recipe

    @property
    def model(self) -> ModelConfig:
        return self.recipe.model


@pytest.fixture(scope="module")
def exported_as(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}

    def of(name: str) -> Exported:
        if name not in made:
            made[name] = _export(name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


def _export(name: str, root: Path) -> Exported:
    import whole_folders

    family = name.partition("-")[0]
    words = write_chat_tokenizer(root / "words", *TOKENS[name])
    rows = load_tokenizer(words).vocab_size
    source = getattr(whole_folders, family)(root / "source", text={"vocab_size": rows})
    model = model_of_folder(source)
    data = DataConfig(
        template=Template.QWEN3_VL if family == "qwen3_vl" else Template.GRANITE_4,
        tokenizer=str(words),
        min_pixels=40 * 40,
        max_pixels=80 * 60,
    )
    files = files_by_name(source)
    names = by_published_name(used_tensors(files, model), str(source), model)
    tensors = {one: lazy_tensor(files[names[one]], names[one]) for one in names}
    about = About(data=data, seq_length=2048, card=("Drawn.",))
    write_model(tensors, model, root / "out", Naming.HUGGING_FACE, load_tokenizer(words), about)
    return Exported(source, root / "out", Recipe(model=model, data=data))


def _pictures() -> list[bytes]:
    return [jpeg_bytes(*size, seed=number) for number, size in enumerate(SIZES)]


def _opened(data: bytes) -> Image.Image:
    import io

    return Image.open(io.BytesIO(data)).convert("RGB")


def _expanded(tokens: np.ndarray, rows: list[int], pad: int) -> list[int]:
    left = iter(rows)
    return [t for token in tokens.tolist() for t in ([pad] * next(left) if token == IMAGE_TOKEN_ID else [token])]


def _rows(exported: Exported) -> list[int]:
    """Positions of each picture in the sequence."""
    processor = processor_of(exported.recipe)
    found = [processor.process(data) for data in _pictures()]
    shapes = [stored_shape(processor.layout, one.grid, one.size) for one in found]
    return [context_length(exported.model, shape) for shape in shapes]


def _messages(number: int) -> list[dict[str, Any]]:
    images = [{"type": "image"}] * number
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A photo."},
        {"role": "user", "content": [{"type": "text", "text": "Of a number?"}]},
    ]


@pytest.mark.parametrize("name", TOKENS)
def test_prompts_have_the_ids_of_the_training(exported_as: Callable[[str], Exported], name: str) -> None:
    from transformers import AutoTokenizer

    exported = exported_as(name)
    theirs, tokenizer = AutoTokenizer.from_pretrained(exported.folder), load_tokenizer(exported.recipe.data.tokenizer)
    template = exported.recipe.data.template
    gap = "" if template is Template.QWEN3_VL else "\n"
    turns = read_conversation({"messages": [
        {"role": "user", "content": f"<image>{gap}" * 2 + "What is it?"}, {"role": "assistant", "content": "A photo."},
    ]}, writes_tools=writes_tools(template)).turns  # fmt: skip
    prompt = encode_prompt("Of a number?", template, tokenizer, history=turns)
    text = theirs.apply_chat_template(_messages(2), tokenize=False, add_generation_prompt=True)
    config = json.loads((exported.folder / "config.json").read_text())
    pad = config.get("image_token_id", config.get("image_token_index"))
    assert theirs(text, add_special_tokens=False).input_ids == _expanded(prompt, [1, 1], pad)
    assert theirs.convert_tokens_to_ids(theirs.image_token) == pad < config["text_config"]["vocab_size"]


def test_tools_are_written_as_in_training(exported_as: Callable[[str], Exported]) -> None:
    from transformers import AutoTokenizer

    exported = exported_as("qwen3_vl")
    tools = [{"type": "function", "function": {"name": "zoom", "parameters": {"é": [1, None]}}}, {"name": "count"}]
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"box": [1, 2]}}}
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which number?"},
        {"role": "assistant", "content": "", "tool_calls": [call, {"function": {"name": "count", "arguments": "{}"}}]},
        {"role": "tool", "content": "closer"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "Once more.", "tool_calls": [call]},
        {"role": "tool", "content": "43"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\n43"},
    ]
    theirs = AutoTokenizer.from_pretrained(exported.folder)
    for first in (0, 1):
        messages = talk[first:]
        turns = read_conversation({"messages": messages, "tools": tools}, writes_tools=True).turns
        tokens, _ = encode_conversation(turns, Template.QWEN3_VL, load_tokenizer(exported.recipe.data.tokenizer))
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        assert theirs(text, add_special_tokens=False).input_ids == tokens.tolist()


@pytest.mark.parametrize("name", ["qwen3_vl", "granite4_vision"])
def test_pixels_are_those_of_the_training(exported_as: Callable[[str], Exported], name: str) -> None:
    """Bit for bit before they are normalised, with the processor that uses Pillow."""
    from transformers import AutoImageProcessor

    exported = exported_as(name)
    theirs, ours = AutoImageProcessor.from_pretrained(exported.folder, backend="pil"), processor_of(exported.recipe)
    vision = exported.model.vision
    mean, std = np.array(vision.mean), np.array(vision.std)
    for data in _pictures():
        found, made = theirs([_opened(data)], return_tensors="np"), ours.process(data)
        if isinstance(ours, SizedProcessor):
            from megatron_deepstack.testing.parity.by_transformers import patches_by_definition

            shape = stored_shape(ours.layout, made.grid, made.size)
            view, grid = ours.view_of(np.asarray(_opened(data)))
            assert shape == grid
            assert tuple(found["image_grid_thw"][0]) == made.grid
            expected = patches_by_definition(view[None], grid, exported.model)
            np.testing.assert_allclose(found["pixel_values"], expected, atol=1e-6)
        else:
            expected = ((made.slots / 255.0 - mean) / std).transpose(0, 3, 1, 2)
            np.testing.assert_allclose(found["pixel_values"][0], expected, atol=1e-6)


def test_granite_answers_through_its_processor(exported_as: Callable[[str], Exported]) -> None:
    """AutoProcessor and AutoModel from the folder alone; the logits are those of the folder that it was read from."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    exported = exported_as("granite4_vision")
    processor = AutoProcessor.from_pretrained(exported.folder, backend="pil")
    images = [_opened(data) for data in _pictures()]
    text = processor.apply_chat_template(_messages(3), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=images, return_tensors="pt")
    tokenizer = load_tokenizer(exported.recipe.data.tokenizer)
    turns = read_conversation({"messages": [
        {"role": "user", "content": "<image>\n" * 3 + "What is it?"}, {"role": "assistant", "content": "A photo."},
    ]}).turns  # fmt: skip
    prompt = encode_prompt("Of a number?", Template.GRANITE_4, tokenizer, history=turns)
    pad = tokenizer.control_id("<image>")
    assert inputs["input_ids"][0].tolist() == _expanded(prompt, _rows(exported), pad)
    before, after = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (exported.source, exported.folder)
    )
    before.config.image_token_index = pad
    with torch.no_grad():
        assert torch.equal(before(**inputs).logits, after(**inputs).logits)
    answer = after.generate(**inputs, max_new_tokens=3)
    assert answer.shape[1] <= inputs["input_ids"].shape[1] + 3


def test_qwen_answers_through_its_processor(exported_as: Callable[[str], Exported]) -> None:
    """The same; transformers has a processor of videos only where torchvision is."""
    pytest.importorskip("torchvision")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    exported = exported_as("qwen3_vl")
    processor = AutoProcessor.from_pretrained(exported.folder)
    images = [_opened(data) for data in _pictures()]
    text = processor.apply_chat_template(_messages(3), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=images, return_tensors="pt")
    tokenizer = load_tokenizer(exported.recipe.data.tokenizer)
    turns = read_conversation({"messages": [
        {"role": "user", "content": "<image>" * 3 + "What is it?"}, {"role": "assistant", "content": "A photo."},
    ]}, writes_tools=True).turns  # fmt: skip
    prompt = encode_prompt("Of a number?", Template.QWEN3_VL, tokenizer, history=turns)
    pad = tokenizer.control_id("<|image_pad|>")
    assert inputs["input_ids"][0].tolist() == _expanded(prompt, _rows(exported), pad)
    assert processor.video_processor.fps == exported.recipe.data.video_fps
    model = AutoModelForImageTextToText.from_pretrained(exported.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("name", ["qwen3_vl-bare", "granite4_vision-bare"])
def test_tokens_that_a_tokenizer_lacks_get_rows(exported_as: Callable[[str], Exported], name: str) -> None:
    """Rows of words stay as they are; new ones are their mean, which is never the likeliest token."""
    exported = exported_as(name)
    config = json.loads((exported.folder / "config.json").read_text())
    words = exported.model.language.vocab_size
    assert config["text_config"]["vocab_size"] % 64 == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (exported.source, exported.folder))
    for tensor in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[tensor][:words], before[tensor])
        assert torch.allclose(after[tensor][words:], before[tensor].mean(0), atol=1e-6)
    again = model_of_folder(exported.folder)
    assert again == replace(
        exported.model, language=replace(exported.model.language, vocab_size=config["text_config"]["vocab_size"])
    )
    assert set(published_shapes(exported.model)) == set(published_shapes(again))


@pytest.mark.parametrize("name", ["qwen3_vl", "granite4_vision"])
def test_how_answers_end_and_what_the_card_says(exported_as: Callable[[str], Exported], name: str) -> None:
    exported = exported_as(name)
    generation = json.loads((exported.folder / "generation_config.json").read_text())
    tokenizer = load_tokenizer(exported.recipe.data.tokenizer)
    assert tokenizer.eos_id in generation["eos_token_id"]
    assert "trust_remote_code" not in (exported.folder / "README.md").read_text()
    assert json.loads((exported.folder / "config.json").read_text())["text_config"]["max_position_embeddings"] == 2048
