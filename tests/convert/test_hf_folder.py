"""Exports under Hugging Face's names, as transformers loads and runs them, against the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_folders import LANGUAGE, MODEL, MODELS, PHOTOS, Folder, drawn_weights, load
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.testing.oracle import OracleSample, oracle_forward

pytestmark = pytest.mark.usefixtures("quiet_transformers")

# Measured: logits up to 2.9e-6 apart, the largest 6.3; both in float32.
TOLERANCE = 2e-5

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


def test_transformers_serve_finds_the_class(folder: Folder) -> None:
    """What its server asks before it loads: whether the kind of model is known, and then the class by `auto_map`."""
    modeling_auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    if not hasattr(transformers, "AutoModelForMultimodalLM"):
        pytest.skip("this transformers has no such class")
    config = transformers.AutoConfig.from_pretrained(folder("l"), trust_remote_code=True)
    assert config.model_type in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    model = transformers.AutoModelForMultimodalLM.from_pretrained(folder("l"), trust_remote_code=True)
    assert type(model).__name__ == "DeepStackForConditionalGeneration"
