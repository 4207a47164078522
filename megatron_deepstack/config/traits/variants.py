"""The members of the DeepStack family, and what each of them is (arXiv 2406.04334, section 3).

A variant answers three questions: which views of an image are looked at, what takes the image's place in the sequence
(its *context*), and what is stacked where. The rows of `VARIANTS` are the only place that knows the answers. A new
variant is a member of `Variant` with a row; if it asks for a context or a source of stacks that no row has, also a
function in `planning.exchange.rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class ViewLayout(StrEnum):
    """Views stored of an image, in order; each layout is a prefix of the next."""

    GLOBAL = "global"
    CROPS = "crops"
    HIGH_RES = "high_res"


class Context(StrEnum):
    """What takes the image's place in the sequence."""

    GLOBAL = "global"
    """The tokens of the global view."""
    MOSAIC = "mosaic"
    """The global tokens, then the mosaic of the crops, each of its rows closed by the learned newline."""
    SEQUENCE = "sequence"
    """The global tokens, then the tokens of all crops, stack after stack."""


class StackSource(StrEnum):
    """What stacks are sampled from."""

    NOTHING = "nothing"
    """There are no stacks."""
    CROPS = "crops"
    """The mosaic of the image's crops: as many stacks as crops."""
    HIGH_RES = "high_res"
    """The high-res crops that each view of the context has for itself: as many stacks as a view has of them."""


class StackedPart(StrEnum):
    """The transformer whose layers stacks are added to."""

    DECODER = "decoder"
    VIT = "vit"
    """An image's views are then encoded together, and every image must have the same grid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantTraits:
    """What a variant is."""

    views: ViewLayout
    """Views that are looked at, and therefore stored."""
    context: Context
    stack_source: StackSource = StackSource.NOTHING
    stacked_part: StackedPart = StackedPart.DECODER
    """Without meaning where there are no stacks."""
    is_llava: bool = False
    """transformers' LlavaForConditionalGeneration computes the same, so that an export can take its names."""

    @property
    def has_crops(self) -> bool:
        """Images are cut into a grid of crops."""
        return self.views is not ViewLayout.GLOBAL

    @property
    def has_newline(self) -> bool:
        """The encoder has the learned row that closes each row of a mosaic."""
        return self.context is Context.MOSAIC

    @property
    def stacks_in_decoder(self) -> bool:
        """Stacks are added before decoder layers."""
        return self.stack_source is not StackSource.NOTHING and self.stacked_part is StackedPart.DECODER

    @property
    def stacks_in_vit(self) -> bool:
        """Stacks are added before ViT layers, so that an image's views are encoded together."""
        return self.stack_source is not StackSource.NOTHING and self.stacked_part is StackedPart.VIT


class Variant(StrEnum):
    """Which member of the DeepStack family is trained; what each is stands in `VARIANTS`."""

    DEEPSTACK_L = "deepstack_l"
    DEEPSTACK_V = "deepstack_v"
    DEEPSTACK_HD = "deepstack_hd"
    LLAVA = "llava"
    LLAVA_ANYRES = "llava_anyres"
    IN_SEQUENCE = "in_sequence"

    @property
    def traits(self) -> VariantTraits:
        """What the variant is."""
        return VARIANTS[self]

    @property
    def stacks_in_vit(self) -> bool:
        """Short for `traits.stacks_in_vit`."""
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
}
"""One row for each variant. Where several look at the same views, a store of these views is shown as the first's."""


def variant_without_crops() -> Variant:
    """The variant to name to somebody whose settings leave no crops."""
    return next(variant for variant, traits in VARIANTS.items() if not traits.has_crops)


def variant_of_views(views: ViewLayout) -> Variant:
    """The first variant that looks at exactly these views."""
    return next(variant for variant, traits in VARIANTS.items() if traits.views is views)
