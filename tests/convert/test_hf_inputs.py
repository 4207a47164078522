"""What the processor of an exported folder makes of questions and pictures is what the training made of them."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_folders import LANGUAGE, MODEL, MODELS, PHOTOS, Folder, drawn_weights
from PIL import Image
from transformers import AutoProcessor

from megatron_deepstack.config.choices import DeepGrey, ImageResize, Orientation, Template
from megatron_deepstack.config.schema import DataConfig
from megatron_deepstack.convert.export import write_model
from megatron_deepstack.convert.export_files import About
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.tensor_files import LazyTensor
from megatron_deepstack.data.text.conversation import encode_prompt
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.testing.tiny_data import draw_photo, write_tokenizer

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.mark.parametrize("template", Template)
def test_prompts_have_the_tokens_of_the_training(tmp_path: Path, template: Template) -> None:
    from megatron_deepstack.testing.tiny_chat import GRANITE_4_TOKENS, write_chat_tokenizer

    if template not in (Template.V1, Template.PLAIN):
        control = {
            Template.LLAMA_3: ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            Template.QWEN: ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
            Template.QWEN3_VL: ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"),
            Template.GRANITE_4: GRANITE_4_TOKENS,
        }[template]
        tokenizer = load_tokenizer(write_chat_tokenizer(tmp_path / "chat", control, None))
    else:
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer.model"))
    language = replace(LANGUAGE, vocab_size=tokenizer.vocab_size)
    model = replace(MODEL, language=language)
    lazy = {key: LazyTensor.of(value) for key, value in drawn_weights(model).items()}
    about = About(data=DataConfig(template=template))
    write_model(lazy, model, tmp_path / "out", Naming.HUGGING_FACE, tokenizer, about)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for number in (0, 1, 2):
        if template is Template.PLAIN and number == 0:
            continue
        content = [{"type": "image", "image": photo} for photo in PHOTOS[:number]]
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]}]
        made = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        found = made["input_ids"][0]
        image = found == processor.image_token_id
        assert int(image.sum()) == 16 * number
        prompt = encode_prompt("What is this?", template, tokenizer, num_images=number)
        expected = torch.from_numpy(np.repeat(prompt, np.where(prompt == IMAGE_TOKEN_ID, 16, 1)))
        assert torch.equal(found.masked_fill(image, IMAGE_TOKEN_ID).to(torch.int32), expected.to(torch.int32))


def image_cases() -> dict[str, Image.Image]:
    """Pictures of all kinds that a store reads, and sizes around the rules of grids."""
    rng = np.random.default_rng(0)
    photo = draw_photo(64, 48, 7)
    transparent = photo.convert("RGBA")
    transparent.putalpha(Image.fromarray(rng.integers(0, 256, (48, 64), dtype=np.uint8)))
    turned = draw_photo(60, 30, 8)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    return {
        "photo": photo,
        "wide": draw_photo(100, 17, 4),
        "tall": draw_photo(9, 80, 5),
        "one pixel": draw_photo(1, 1, 6),
        "grey": photo.convert("L"),
        "palette": photo.convert("P"),
        "cmyk": photo.convert("CMYK"),
        "transparent": transparent,
        "deep grey": Image.fromarray(rng.integers(0, 65536, (30, 40), dtype=np.uint16)),
        "turned": turned,
    }


CHANGES = {
    "as published": {},
    "corrected": {"orientation": Orientation.EXIF, "deep_grey": DeepGrey.SCALE, "transparency": "#ffffff"},
    "by torch": {"resize": ImageResize.TORCH},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["l", "v", "hd"])
def test_pixels_are_those_of_a_store(tmp_path: Path, folder: Folder, name: str, change: str) -> None:
    from megatron_deepstack.data.images.processor import Processor
    from megatron_deepstack.testing.tiny_data import tiny_recipe

    data = replace(DataConfig(), **CHANGES[change])
    recipe = replace(tiny_recipe(), model=MODELS[name])
    recipe = replace(recipe, data=replace(recipe.data, **{key: getattr(data, key) for key in CHANGES[change]}))
    ours = Processor.of(recipe)
    theirs = AutoProcessor.from_pretrained(folder(name), trust_remote_code=True).image_processor
    for key, value in CHANGES[change].items():
        setattr(theirs, key, str(value))
    for case, image in image_cases().items():
        kind = "TIFF" if case in ("cmyk", "deep grey") else "JPEG" if case in ("photo", "turned") else "PNG"
        file = tmp_path / f"{case}.{kind.lower()}"
        image.save(file, kind, **({"exif": image.info["exif"]} if "exif" in image.info else {}))
        wanted = ours.process(file.read_bytes())
        views, grid = theirs.make_views(theirs.fetch_images(str(file)))
        assert grid == wanted.grid, case
        assert np.array_equal(views, wanted.slots), case


def test_a_picture_in_a_url_is_read(folder: Folder, tmp_path: Path) -> None:
    """As servers are given pictures; turned by EXIF only if the run's store did so, like files."""
    processor = AutoProcessor.from_pretrained(folder("l"), trust_remote_code=True)
    turned = draw_photo(60, 30, 8)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "photo.jpg", exif=exif)
    url = "data:image/jpeg;base64," + base64.b64encode((tmp_path / "photo.jpg").read_bytes()).decode()
    by_file, by_url = (
        processor.image_processor(one, return_tensors="pt") for one in (str(tmp_path / "photo.jpg"), url)
    )
    assert torch.equal(by_url["pixel_values"], by_file["pixel_values"])
    with pytest.raises(ValueError, match=r"a data: URL cannot be read .*expected data:image/...;base64"):
        processor.image_processor("data:image/png,abc", return_tensors="pt")
    with pytest.raises(ValueError, match=r"a data: URL cannot be read"):
        processor.image_processor("data:image/png;base64,%%%", return_tensors="pt")
