"""The members of the DeepStack family, and what each of them is (arXiv 2406.04334, section 3).

A variant answers three questions: which views of an image are used, what takes the image's place in the sequence (its
*context*), and which tokens are stacked before which layers. The answers are written only in `VARIANTS`. A new variant
needs a member of `Variant` and an entry of `VARIANTS`. If its context or its source of stacks is new as well, it also
needs a function in `planning.exchange.rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class ViewLayout(StrEnum):
    """Which views of an image are stored, in order. Each layout begins with all views of the previous one."""

    GLOBAL = "global"
    CROPS = "crops"
    HIGH_RES = "high_res"
    TILES = "tiles"
    """The whole image as one view, and tiles of a larger version that keeps the aspect ratio and is padded."""
    NATIVE = "native"
    """One view of the image at its own resolution; it has nothing in common with the other layouts."""


class Context(StrEnum):
    """What takes the image's place in the sequence."""

    GLOBAL = "global"
    """The tokens of the global view."""
    MOSAIC = "mosaic"
    """The global tokens, then the mosaic of the crops, with the learned newline at the end of each of its lines."""
    SEQUENCE = "sequence"
    """The global tokens, then the tokens of all crops, stack after stack."""
    UNPADDED = "unpadded"
    """The tokens of the whole image, then the mosaic of the tiles without its padding, with the learned newline at the
    end of each of its lines. Only stacks are added there: the embedding at these positions is 0."""
    MERGED = "merged"
    """The merged tokens of the one view."""


class StackSource(StrEnum):
    """The tokens from which stacks are sampled."""

    NOTHING = "nothing"
    """There are no stacks."""
    CROPS = "crops"
    """The mosaic of the image's crops. There are as many stacks as crops."""
    HIGH_RES = "high_res"
    """The high-res crops of each context view. There are as many stacks as one view has high-res crops."""
    TAPS = "taps"
    """Outputs of chosen layers of the tower, of the same view. There are as many stacks as the tower has taps."""


class StackedPart(StrEnum):
    """The transformer to whose layers the stacks are added."""

    DECODER = "decoder"
    VIT = "vit"
    """The views of an image are then encoded together, and every image must have the same grid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantTraits:
    """What a variant is."""

    views: ViewLayout
    """Views that the model uses, and that are therefore stored."""
    context: Context
    """What takes the image's place in the sequence."""
    stack_source: StackSource = StackSource.NOTHING
    """The tokens from which stacks are sampled."""
    stacked_part: StackedPart = StackedPart.DECODER
    """Where stacks are added. It has no meaning if there are no stacks."""
    is_llava: bool = False
    """True if transformers' own LlavaForConditionalGeneration computes the same. An export is then one; for other
    variants it brings its own code."""
    has_experts: bool = False
    """The layers of its decoder may have experts."""
    whole_model: str | None = None
    """`model_type` of the model of transformers whose mathematics this is as a whole, such as `qwen3_vl`; None for the
    variants of the paper."""

    @property
    def has_crops(self) -> bool:
        """Images are cut into a grid of crops."""
        return self.views in (ViewLayout.CROPS, ViewLayout.HIGH_RES)

    @property
    def is_native(self) -> bool:
        """Each image is one view at its own resolution."""
        return self.views is ViewLayout.NATIVE

    @property
    def has_newline(self) -> bool:
        """The encoder has the learned newline, which ends each line of a mosaic."""
        return self.context in (Context.MOSAIC, Context.UNPADDED)

    @property
    def has_base_rows(self) -> bool:
        """Visual rows take the place of the embedding at an image's positions; otherwise zeros do."""
        return self.context is not Context.UNPADDED

    @property
    def stacks_in_decoder(self) -> bool:
        """Stacks are added before decoder layers."""
        return self.stack_source is not StackSource.NOTHING and self.stacked_part is StackedPart.DECODER

    @property
    def stacks_in_vit(self) -> bool:
        """Stacks are added before ViT layers, so that an image's views are encoded together."""
        return self.stack_source is not StackSource.NOTHING and self.stacked_part is StackedPart.VIT


class Variant(StrEnum):
    """Which member of the DeepStack family is trained; `VARIANTS` describes each of them."""

    DEEPSTACK_L = "deepstack_l"
    DEEPSTACK_V = "deepstack_v"
    DEEPSTACK_HD = "deepstack_hd"
    LLAVA = "llava"
    LLAVA_ANYRES = "llava_anyres"
    IN_SEQUENCE = "in_sequence"
    QWEN3_VL = "qwen3_vl"
    QWEN3_VL_MOE = "qwen3_vl_moe"
    GRANITE4_VISION = "granite4_vision"

    @property
    def traits(self) -> VariantTraits:
        """What the variant is."""
        return VARIANTS[self]

    @property
    def stacks_in_vit(self) -> bool:
        """The same as `traits.stacks_in_vit`."""
        return self.traits.stacks_in_vit


VARIANTS: Final[Mapping[Variant, VariantTraits]] = {
    Variant.DEEPSTACK_L: VariantTraits(views=ViewLayout.CROPS, context=Context.GLOBAL, stack_source=StackSource.CROPS),
    Variant.DEEPSTACK_V: VariantTraits(
        views=ViewLayout.CROPS,
        context=Context.GLOBAL,
        stack_source=StackSource.CROPS,
        stacked_part=StackedPart.VIT,
    ),
    Variant.DEEPSTACK_HD: VariantTraits(
        views=ViewLayout.HIGH_RES, context=Context.MOSAIC, stack_source=StackSource.HIGH_RES
    ),
    Variant.LLAVA: VariantTraits(views=ViewLayout.GLOBAL, context=Context.GLOBAL, is_llava=True),
    Variant.LLAVA_ANYRES: VariantTraits(views=ViewLayout.CROPS, context=Context.MOSAIC),
    Variant.IN_SEQUENCE: VariantTraits(views=ViewLayout.CROPS, context=Context.SEQUENCE),
    Variant.QWEN3_VL: VariantTraits(
        views=ViewLayout.NATIVE,
        context=Context.MERGED,
        stack_source=StackSource.TAPS,
        whole_model="qwen3_vl",
    ),
    Variant.QWEN3_VL_MOE: VariantTraits(
        views=ViewLayout.NATIVE,
        context=Context.MERGED,
        stack_source=StackSource.TAPS,
        has_experts=True,
        whole_model="qwen3_vl_moe",
    ),
    Variant.GRANITE4_VISION: VariantTraits(
        views=ViewLayout.TILES,
        context=Context.UNPADDED,
        stack_source=StackSource.TAPS,
        whole_model="granite4_vision",
    ),
}
"""The traits of each variant. If several variants use the same views, a store of these views is shown as one of the
first of them."""


def variant_without_crops() -> Variant:
    """Return the variant that messages recommend to users whose settings leave no crops."""
    return next(variant for variant, traits in VARIANTS.items() if not traits.has_crops)


def published_variant(*, has_stacks: bool, is_any_resolution: bool) -> Variant:
    """Return the variant that the released code computes.

    Args:
        has_stacks: Its config asks for stacks in the decoder.
        is_any_resolution: The context is the whole mosaic, to which the stacks belong if there are any.
    """
    if is_any_resolution:
        return Variant.DEEPSTACK_HD if has_stacks else Variant.LLAVA_ANYRES
    return Variant.DEEPSTACK_L if has_stacks else Variant.LLAVA


def variant_of_views(views: ViewLayout) -> Variant:
    """Return the first variant that uses exactly these views."""
    return next(variant for variant, traits in VARIANTS.items() if traits.views is views)
