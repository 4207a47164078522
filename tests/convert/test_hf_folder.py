"""Exports under Hugging Face's names, as transformers loads and runs them, against the oracle."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from megatron_deepstack.config.choices import (
    DeepGrey,
    GridRule,
    ImageResize,
    Orientation,
    Sampler,
    Template,
    Variant,
)
from megatron_deepstack.config.schema import DataConfig, LanguageConfig, ModelConfig, StackConfig, VisionConfig
from megatron_deepstack.convert.export import write_model
from megatron_deepstack.convert.export_files import About
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.tensor_files import LazyTensor
from megatron_deepstack.data.text.conversation import encode_prompt
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.model.published_shapes import published_shapes
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.testing.oracle import OracleSample, oracle_forward
from megatron_deepstack.testing.tiny_data import draw_photo, write_tokenizer

pytestmark = pytest.mark.usefixtures("quiet_transformers")

VISION = VisionConfig(image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=5, num_heads=2)
LANGUAGE = LanguageConfig(vocab_size=400, hidden_size=32, ffn_hidden_size=48, num_layers=6, num_heads=4, num_kv_heads=2)
MODEL = ModelConfig(vision=VISION, language=LANGUAGE)
SIGLIP = replace(VISION, kind="siglip", image_size=18)
VIT_STACKS = StackConfig(grid=GridRule.FIXED_2X2, start=1)
MODELS = {
    "l": MODEL,
    "l-1d-deep": replace(MODEL, stacks=StackConfig(sampler=Sampler.SEQUENTIAL_1D, num_stacks=3, slots=(5, 0, 5))),
    "l-siglip-qwen2": replace(MODEL, vision=SIGLIP, language=replace(LANGUAGE, qkv_bias=True, tied_embeddings=True)),
    "v": replace(MODEL, variant=Variant.DEEPSTACK_V, stacks=VIT_STACKS),
    "hd": replace(MODEL, variant=Variant.DEEPSTACK_HD),
    "hd-grid-qwen3": replace(
        MODEL,
        variant=Variant.DEEPSTACK_HD,
        language=replace(LANGUAGE, qk_norm=True),
        stacks=StackConfig(sampler=Sampler.GRID, interval=0),
    ),
    "anyres": replace(MODEL, variant=Variant.LLAVA_ANYRES),
    "llava": replace(MODEL, variant=Variant.LLAVA),
    "in-sequence": replace(MODEL, variant=Variant.IN_SEQUENCE),
}
PHOTOS = [draw_photo(50, 40, 1), draw_photo(70, 20, 2), draw_photo(16, 16, 3)]
# Measured: logits up to 2.9e-6 apart, the largest 6.3; both in float32.
TOLERANCE = 2e-5

Folder = Callable[[str], Path]


def drawn_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Weights of ordinary size, biases and norms too."""
    generator = torch.Generator().manual_seed(11)
    weights = {}
    for name, shape in published_shapes(model).items():
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        weights[name] = 1 + 0.1 * noise if is_norm else noise * (0.15 if len(shape) > 1 else 0.1)
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A function that gives the exported folder of a model of `MODELS`, made when it is first asked for."""
    place = tmp_path_factory.mktemp("folders")
    tokenizer = load_tokenizer(write_tokenizer(place / "tokenizer.model"))

    def make(name: str) -> Path:
        if not (place / name).exists():
            model = MODELS[name]
            lazy = {key: LazyTensor.of(value) for key, value in drawn_weights(model).items()}
            write_model(lazy, model, place / name, Naming.HUGGING_FACE, tokenizer, About(seq_length=512))
        return place / name

    return make


def load(path: Path, **options: Any) -> tuple[Any, Any]:
    model, report = AutoModelForImageTextToText.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval(), AutoProcessor.from_pretrained(path, trust_remote_code=True)


PROMPTS = ["<image> What is it?", "No picture here.", "One <image> and <image> another, which is longer?"]
IMAGES = [[PHOTOS[0]], [], [PHOTOS[1], PHOTOS[2]]]


def oracle_logits(name: str, processor: Any) -> list[Tensor]:
    """Of each prompt, by the oracle from the pixels that the processor makes."""
    model, samples = MODELS[name], []
    for prompt, images in zip(PROMPTS, IMAGES, strict=True):
        ids = processor.tokenizer(prompt)["input_ids"]
        tokens = torch.tensor([IMAGE_TOKEN_ID if i == processor.image_token_id else i for i in ids])
        made = processor.image_processor(images, return_tensors="pt") if images else None
        samples.append(
            OracleSample(
                tokens=tokens,
                labels=tokens,
                pixel_values=None if made is None else made["pixel_values"],
                grids=() if made is None else tuple(map(tuple, made["image_grids"].tolist())),
            )
        )
    return oracle_forward(model, drawn_weights(model), samples)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llava"])
def test_logits_are_the_oracles_in_a_batch_padded_on_either_side(folder: Folder, name: str) -> None:
    """Prompts with one image, with none, and with several between words, of different lengths."""
    model, processor = load(folder(name))
    expected = oracle_logits(name, processor)
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        inputs = processor(text=PROMPTS, images=IMAGES, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        for row, mask, wanted in zip(logits, inputs["attention_mask"].bool(), expected, strict=True):
            torch.testing.assert_close(row[mask][:, : LANGUAGE.vocab_size], wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["l", "v", "hd"])
def test_the_same_tokens_however_they_are_generated(folder: Folder, name: str) -> None:
    """Greedy: with and without cache, by a chunked prefill, in a batch and alone; and beams likewise."""
    model, processor = load(folder(name))
    batch = processor(text=PROMPTS, images=IMAGES, padding=True, return_tensors="pt")
    answer = partial(model.generate, max_new_tokens=8, min_new_tokens=8)
    length = batch["input_ids"].shape[1]
    tokens = answer(**batch)[:, length:]
    assert torch.equal(tokens, answer(**batch, use_cache=False)[:, length:])
    assert torch.equal(tokens, answer(**batch, prefill_chunk_size=7)[:, length:])
    beams = answer(**batch, num_beams=2, num_return_sequences=2)[::2, length:]
    for index, (prompt, images) in enumerate(zip(PROMPTS, IMAGES, strict=True)):
        one = processor(text=prompt, images=images or None, return_tensors="pt")
        start = one["input_ids"].shape[1]
        assert torch.equal(answer(**one)[0, start:], tokens[index])
        assert torch.equal(answer(**one, num_beams=2)[0, start:], beams[index])


def test_greedy_tokens_are_the_oracles(folder: Folder) -> None:
    """64 of them, each from the whole sequence again."""
    model, processor = load(folder("l"))
    one = processor(text=PROMPTS[2], images=IMAGES[2], return_tensors="pt")
    tokens = model.generate(**one, max_new_tokens=64, min_new_tokens=64)[0]
    ids = processor.tokenizer(PROMPTS[2])["input_ids"]
    ids = [IMAGE_TOKEN_ID if i == processor.image_token_id else i for i in ids] + tokens[-64:].tolist()
    sample = OracleSample(
        tokens=torch.tensor(ids),
        labels=torch.tensor(ids),
        pixel_values=one["pixel_values"],
        grids=tuple(map(tuple, one["image_grids"].tolist())),
    )
    (logits,) = oracle_forward(MODEL, drawn_weights(MODEL), [sample])
    stops = set(model.generation_config.eos_token_id)
    allowed = [i for i in range(LANGUAGE.vocab_size) if i not in stops]
    chosen = torch.tensor(allowed)[logits[-65:-1, allowed].argmax(-1)]
    assert torch.equal(chosen, tokens[-64:])


def test_the_baseline_is_transformers_own_and_can_be_prompted(folder: Folder) -> None:
    """LLaVA's classes, without code: logits from a prompt with a picture, and an answer that ends."""
    path = folder("llava")
    assert not list(path.glob("*.py"))
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~_umask()}
    model, processor = LlavaForConditionalGeneration.from_pretrained(path), AutoProcessor.from_pretrained(path)
    assert isinstance(processor, LlavaProcessor)
    content = [{"type": "image", "image": PHOTOS[0]}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = inputs["input_ids"][0]
    image = tokens == processor.image_token_id
    assert int(image.sum()) == 16
    keep = torch.cat([image[:1].new_ones(1), ~(image[1:] & image[:-1])])
    asked = tokens.masked_fill(image, IMAGE_TOKEN_ID)[keep]
    sample = OracleSample(tokens=asked, labels=asked, pixel_values=inputs["pixel_values"], grids=((1, 1),))
    (expected,) = oracle_forward(MODELS["llava"], drawn_weights(MODELS["llava"]), [sample])
    with torch.no_grad():
        logits = model(**inputs).logits[0, :, : LANGUAGE.vocab_size]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    ids = model.generate(**inputs, max_new_tokens=3)
    assert ids.max() < LANGUAGE.vocab_size or ids[0, -3:].max() < LANGUAGE.vocab_size
    assert model.generation_config.eos_token_id == [processor.tokenizer.eos_token_id]


def _umask() -> int:
    """Of this process; it can be read only by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


FRESH = """
import sys
sys.meta_path = [found for found in sys.meta_path if "editable" not in str(found).lower()]
sys.path = [place for place in sys.path if place != sys.argv[3]]
try:
    import megatron_deepstack
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("this package can be imported")
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "path": sys.argv[2]}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
print(model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :].tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l", "v", "hd"])
def test_it_answers_where_this_package_is_not(folder: Folder, tmp_path: Path, name: str) -> None:
    """A process that cannot import this package gives the tokens that this process gives."""
    PHOTOS[0].save(tmp_path / "photo.png")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, str(folder(name)), str(tmp_path / "photo.png"), root],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model, processor = load(folder(name))
    content = [{"type": "image", "image": PHOTOS[0]}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :].tolist()
    assert done.stdout.splitlines()[-1] == str(tokens)


def test_a_chunk_without_its_rows_is_refused(folder: Folder) -> None:
    model, processor = load(folder("l"))
    one = processor(text=PROMPTS[0], images=IMAGES[0], return_tensors="pt")
    with pytest.raises(ValueError, match=r"hold 7 image placeholders .* 16 rows; take both from one call"):
        model(**{**one, "input_ids": one["input_ids"][:, :8], "attention_mask": one["attention_mask"][:, :8]})
    with pytest.raises(ValueError, match="the images have 0 rows"):
        model(input_ids=one["input_ids"])


@pytest.mark.parametrize("name", ["l", "v", "hd"])
def test_it_trains(folder: Folder, name: str) -> None:
    """Gradients reach every part, also where layers are recomputed; the loss is the same."""
    model, processor = load(folder(name))
    inputs = processor(text=PROMPTS[2], images=IMAGES[2], return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    losses, grads = [], []
    for recomputed in (False, True):
        model.train()
        if recomputed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        grads.append({key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None})
    assert losses[0] == losses[1]
    assert grads[0].keys() == grads[1].keys()
    assert {"lm_head.weight", "model.vision_tower.encoder.layers.0.mlp.fc1.weight"} <= grads[0].keys()
    for key, value in grads[0].items():
        torch.testing.assert_close(grads[1][key], value, msg=key)


def test_half_precision_and_saving_again(folder: Folder, tmp_path: Path) -> None:
    """bfloat16 answers; what transformers saves loads again and computes the same."""
    model, processor = load(folder("hd"), dtype=torch.bfloat16)
    inputs = processor(text=PROMPTS[0], images=IMAGES[0], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.dtype is torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again, other = load(tmp_path / "again")
    same = other(text=PROMPTS[0], images=IMAGES[0], return_tensors="pt")
    assert torch.equal(same["pixel_values"], inputs["pixel_values"])
    with torch.no_grad():
        assert torch.equal(again(**same).logits, logits)


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


@pytest.mark.parametrize("name", ["l", "v", "hd"])
def test_a_device_map_changes_nothing(folder: Folder, tmp_path: Path, name: str) -> None:
    """Layers that lie on the disk until they are used: hooks that move them meet the hooks that add stacks."""
    pytest.importorskip("accelerate", reason="transformers needs accelerate for device_map")
    model, processor = load(folder(name))
    inputs = processor(text=PROMPTS, images=IMAGES, padding=True, return_tensors="pt")
    layers = LANGUAGE.num_layers
    places = {f"model.language_model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(layers)}
    rest = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    places |= dict.fromkeys([*rest, *(f"model.language_model.{key}" for key in ("embed_tokens", "norm"))], "cpu")
    places |= {"model.language_model.rotary_emb": "cpu", **({"model.image_newline": "cpu"} if name == "hd" else {})}
    spread, _ = load(folder(name), device_map=places, offload_folder=tmp_path)
    assert spread.hf_device_map == places
    with torch.no_grad():
        torch.testing.assert_close(spread(**inputs).logits, model(**inputs).logits, atol=TOLERANCE, rtol=0)
    whole, _ = load(folder(name), device_map="auto")
    answer = partial(torch.equal, model.generate(**inputs, max_new_tokens=4))
    assert answer(whole.generate(**inputs, max_new_tokens=4))


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


def test_transformers_serve_finds_the_class(folder: Folder) -> None:
    """What its server asks before it loads: whether the kind of model is known, and then the class by `auto_map`."""
    modeling_auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    if not hasattr(transformers, "AutoModelForMultimodalLM"):
        pytest.skip("this transformers has no such class")
    config = transformers.AutoConfig.from_pretrained(folder("l"), trust_remote_code=True)
    assert config.model_type in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    model = transformers.AutoModelForMultimodalLM.from_pretrained(folder("l"), trust_remote_code=True)
    assert type(model).__name__ == "DeepStackForConditionalGeneration"
