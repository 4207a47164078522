"""The files of an export beside its weights, and what the weights need so that transformers can have them.

Under published names these are config.json, how a global view is made, and the tokenizer's files. Under Hugging Face's
names they are all that transformers needs to answer questions about images: the processor's files, a tokenizer that
knows `<image>`, the chat template, which tokens end an answer, a model card; and code, unless the variant is one of
transformers' own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from typing import Any, Final

from megatron_deepstack.config.schema import DataConfig, ModelConfig, VisionConfig
from megatron_deepstack.config.sizes import tokens_per_view
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.convert.chat_template import chat_template
from megatron_deepstack.convert.hf_facts import CONFIG, PREPROCESSOR, PROCESSOR
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.hf_written import (
    deepstack_config,
    hf_tower,
    llava_config,
    published_config,
    select_strategy,
)
from megatron_deepstack.convert.tokenizer_json import transformers_files
from megatron_deepstack.convert.vocabulary import padded_vocabulary
from megatron_deepstack.data.text.conversation import stop_ids
from megatron_deepstack.data.text.probe import probe
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN
from megatron_deepstack.planning.views import layout_of

GENERATION: Final = "generation_config.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"
CARD: Final = "README.md"
PROBE: Final = "tokenizer_probe"
"""Key beside the facts about the data in config.json: see `data.text.probe`."""
FINGERPRINT: Final = "tokenizer_sha256"
"""Another one: fingerprint of the tokenizer of the training, as stores record it."""
CODE: Final = (
    "configuration_deepstack.py",
    "modeling_deepstack.py",
    "processing_deepstack.py",
    "vision_deepstack.py",
)
"""Files of `convert.hf_folder` that an export carries."""
_MOST_NEW_TOKENS: Final = 512
_BICUBIC: Final = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What an export says beside the model itself."""

    data: DataConfig = field(default_factory=DataConfig)
    """How images and conversations were prepared."""
    seq_length: int | None = None
    """Longest sequence of the training."""
    card: Sequence[str] = ()
    """Paragraphs of the model card."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportPlan:
    """All of an export but its weights."""

    files: Mapping[str, bytes]
    """Content by name."""
    vocab_size: int
    """Rows that embedding and output layer must have."""
    has_final_norm: bool
    """Whether the tower needs a norm at its end that ours lacks, because no feature passes it."""


def plan_export(
    model: ModelConfig, naming: Naming, tokenizer: Tokenizer | None, dtype: str, about: About
) -> ExportPlan:
    """Everything that is written beside the weights.

    Args:
        model: The recipe's model.
        naming: Whose names the export has.
        tokenizer: The run's tokenizer, if there is one.
        dtype: Of the weights, by torch's name.
        about: What else is said.

    Returns:
        The plan.

    Raises:
        ConfigError: transformers has no such decoder or tower.
        DataError: transformers cannot have the tokenizer.
    """
    if naming is Naming.PUBLISHED:
        length = {} if about.seq_length is None else {"max_position_embeddings": about.seq_length}
        config = {**published_config(model), **length, "data": prepared_facts(about.data, tokenizer), "dtype": dtype}
        files = {
            CONFIG: _json(config),
            PREPROCESSOR: _json(preprocessor_config(model.vision)),
            **({} if tokenizer is None else tokenizer.files),
        }
        return ExportPlan(files=files, vocab_size=model.language.vocab_size, has_final_norm=False)
    known, numbers = ({}, {}) if tokenizer is None else transformers_files(tokenizer)
    image_token = numbers.get(IMAGE_TOKEN, model.language.vocab_size)
    vocab_size = padded_vocabulary(model.language.vocab_size, image_token)
    config = transformers_config(model, vocab_size, image_token)
    if about.seq_length is not None:
        config["text_config"]["max_position_embeddings"] = about.seq_length
    config["data"] = prepared_facts(about.data, tokenizer)
    files = {CONFIG: _json({**config, "dtype": dtype}), **known, **_processor_files(model, about.data)}
    files[CARD] = model_card(model, about, remote_code=not model.variant.traits.is_llava).encode()
    if tokenizer is not None:
        files[GENERATION] = _json(generation_config(tokenizer, about.data))
        files[CHAT_TEMPLATE] = chat_template(about.data.template).encode()
    is_llava = model.variant.traits.is_llava
    return ExportPlan(
        files=files,
        vocab_size=vocab_size,
        has_final_norm=is_llava and hf_tower(model.vision).final_norm and not tower_of(model.vision).has_post_norm,
    )


def transformers_config(model: ModelConfig, vocab_size: int, image_token: int) -> dict[str, Any]:
    """The config.json of an export under Hugging Face's names.

    Args:
        model: The recipe's model.
        vocab_size: Rows of the embedding that is written.
        image_token: Id of the image's placeholder.

    Raises:
        ConfigError: transformers has no such decoder, or no such tower for variant llava.
    """
    if model.variant.traits.is_llava:
        return llava_config(model, vocab_size, image_token, tokens_per_view(model.vision))
    return deepstack_config(model, vocab_size, image_token)


def preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    """How a global view is made, for transformers: a plain bicubic resize, without padding or cropping."""
    size = {"height": vision.image_size, "width": vision.image_size}
    known = tower_of(vision).hugging_face
    return {
        "image_processor_type": "CLIPImageProcessor" if known is None else known.image_processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": _BICUBIC,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
    }


def prepared_facts(data: DataConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """How images and conversations were prepared, for `convert` and for answers from an exported folder.

    Args:
        data: The run's section.
        tokenizer: The run's tokenizer, if there is one.

    Returns:
        Plain JSON values, which stand under `data` in config.json.
    """
    images = {name: str(getattr(data, name)) for name in ("resize", "orientation", "deep_grey")}
    return {
        "template": str(data.template),
        **images,
        "transparency": data.transparency.lower(),
        "max_image_pixels": data.max_image_pixels,
        **({} if tokenizer is None else {PROBE: probe(tokenizer), FINGERPRINT: tokenizer.fingerprint}),
    }


def _processor_files(model: ModelConfig, data: DataConfig) -> dict[str, bytes]:
    if model.variant.traits.is_llava:
        processor = {
            "processor_class": "LlavaProcessor",
            "patch_size": model.vision.patch_size,
            "vision_feature_select_strategy": select_strategy(model.vision),
            "num_additional_image_tokens": tower_of(model.vision).num_leading_tokens,
            "image_token": IMAGE_TOKEN,
        }
        image = preprocessor_config(model.vision)
        return {PREPROCESSOR: _json({**image, "processor_class": "LlavaProcessor"}), PROCESSOR: _json(processor)}
    code = {name: (package_files("megatron_deepstack.convert.hf_folder") / name).read_bytes() for name in CODE}
    auto = {
        "AutoProcessor": "processing_deepstack.DeepStackProcessor",
        "AutoImageProcessor": "processing_deepstack.DeepStackImageProcessor",
    }
    image = {
        "image_processor_type": "DeepStackImageProcessor",
        "processor_class": "DeepStackProcessor",
        "auto_map": auto,
        "view_size": model.vision.image_size,
        "views": str(layout_of(model.variant)),
        "grid": str(model.stacks.grid),
        "num_crops": model.stacks.num_crops,
        "image_mean": list(model.vision.mean),
        "image_std": list(model.vision.std),
        "resize": str(data.resize),
        "orientation": str(data.orientation),
        "deep_grey": str(data.deep_grey),
        "transparency": data.transparency.lower(),
        "max_image_pixels": data.max_image_pixels,
    }
    processor = {
        "processor_class": "DeepStackProcessor",
        "auto_map": auto,
        "patch_size": model.vision.patch_size,
        "context": str(model.variant.traits.context),
        "image_token": IMAGE_TOKEN,
    }
    return {**code, PREPROCESSOR: _json(image), PROCESSOR: _json(processor)}


def generation_config(tokenizer: Tokenizer, data: DataConfig) -> dict[str, Any]:
    """Which tokens end an answer; greedy, as `generate` is.

    Args:
        tokenizer: The run's tokenizer.
        data: Names the template.
    """
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(stop_ids(data.template, tokenizer)),
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
        "max_new_tokens": _MOST_NEW_TOKENS,
    }


def model_card(model: ModelConfig, about: About, *, remote_code: bool) -> str:
    """The text of README.md.

    Args:
        model: The recipe's model.
        about: Paragraphs to add.
        remote_code: Whether the folder brings code of its own.
    """
    remote = ", trust_remote_code=True" if remote_code else ""
    example = f"""```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER{remote})
processor = AutoProcessor.from_pretrained(FOLDER{remote})
content = [{{"type": "image", "path": "picture.jpg"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```"""
    tags = "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---"
    title = f"# A model of variant {model.variant}"
    made = "Trained with megatron-deepstack; FOLDER is this folder. Written for transformers 5."
    return "\n\n".join([tags, title, made, example, *about.card]) + "\n"


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
