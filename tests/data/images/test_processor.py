"""A run is refused a store that was made for something else, with every difference named."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_deepstack.config.choices import GridRule, Variant
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, VisionConfig
from megatron_deepstack.data.images.processor import Processor, check_store
from megatron_deepstack.data.images.source import QuarantineError
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.errors import StoreError
from megatron_deepstack.testing.tiny_data import jpeg_bytes, tiny_recipe

MODEL = tiny_recipe().model


def made_for(variant: Variant, tokenizer: Tokenizer) -> Any:
    processor = Processor.of(tiny_recipe(variant=variant))
    attributes = SimpleNamespace(processor=processor.describe(), tokenizer=tokenizer.describe())
    return SimpleNamespace(name="store", attributes=attributes)


@pytest.mark.parametrize("variant", [Variant.DEEPSTACK_L, Variant.LLAVA, Variant.IN_SEQUENCE])
def test_a_store_serves_every_model_that_looks_at_its_views(variant: Variant, tokenizer: Tokenizer) -> None:
    check_store(made_for(Variant.DEEPSTACK_L, tokenizer), replace(MODEL, variant=variant), tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": VisionConfig(image_size=56)}, "model.vision.image_size is 56, it was made with 28"),
        (
            {"variant": Variant.DEEPSTACK_HD},
            "model.variant 'deepstack_hd' needs the views 'high_res', it holds 'crops'",
        ),
        ({"stacks": replace(MODEL.stacks, grid=GridRule.FIXED_2X2)}, "grid is fixed_2x2, it was made with best_fit"),
        ({"stacks": replace(MODEL.stacks, num_crops=9)}, "num_crops is 9, it was made with 4"),
        ({"language": LanguageConfig(vocab_size=100)}, "vocab_size is 100, its tokenizer has 400 ids"),
    ],
)
def test_differences_are_named(change: dict[str, Any], message: str, tokenizer: Tokenizer) -> None:
    model: ModelConfig = replace(MODEL, **change)
    with pytest.raises(StoreError, match=rf"store was made for something else:(.|\n)*{message}"):
        check_store(made_for(Variant.DEEPSTACK_L, tokenizer), model)


def test_another_tokenizer_is_named(tokenizer: Tokenizer) -> None:
    other = SimpleNamespace(source="other.model", fingerprint="f" * 64)
    with pytest.raises(StoreError, match=r"other.model has sha256 ffffffffffff..., its tokenizer had"):
        check_store(made_for(Variant.DEEPSTACK_L, tokenizer), MODEL, other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variant", "grid", "views"),
    [
        (Variant.DEEPSTACK_L, (3, 1), 4),
        (Variant.DEEPSTACK_HD, (3, 1), 20),
        (Variant.LLAVA, (1, 1), 1),
    ],
)
def test_processing(variant: Variant, grid: tuple[int, int], views: int) -> None:
    processor = Processor.of(tiny_recipe(variant=variant))
    image = processor.process(jpeg_bytes(90, 30, seed=1))
    assert (image.grid, image.size, image.damage) == (grid, (90, 30), None)
    assert image.slots.shape == (views, 28, 28, 3)
    assert views <= processor.most_slots
    with pytest.raises(QuarantineError, match="not an image"):
        processor.process(b"text")
