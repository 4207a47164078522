"""DeepStack models for transformers (arXiv 2406.04334): a vision tower, a projector, and a decoder that takes stacks.

An image becomes base rows, which take the place of its placeholders in the sequence, and stacks of as many rows. Stack
k is added to the hidden states at the same positions before decoder layer `slots[k]` (in DeepStack-V: before layer
`slots[k]` of the vision tower). Rows belong to placeholders in the order of both, so several images in a prompt,
prompts without images, padding on either side, beams and prompts that are read in chunks need nothing else. Stacks are
added while a prompt is read; tokens that are generated are text.

The decoder is transformers' own. Stacks reach its layers as a keyword argument, which a hook before each layer takes
out. This file needs torch and transformers only; it is copied beside the weights.

Legend: N views, T tokens of a view (P with the leading one left out), C width of the tower, R rows of an image, H width
of the decoder, B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from .configuration_deepstack import DeepStackConfig
from .vision_deepstack import DeepStackVisionTower, Grid, mosaic, sample_stacks

HIGH_RES_SIDE = 2
"""Number of high-res crops of a view in each direction."""


@dataclass
class DeepStackImageOutput(BaseModelOutputWithPooling):
    """Images in the decoder's width.

    `pooler_output` lists the base rows (R, H) of each image, and `deepstack_features` the same for each stack.
    """

    pooler_output: Any = None
    deepstack_features: list[list[Tensor]] | None = None


class DeepStackProjector(nn.Module):
    """From the tower's width to the decoder's."""

    def __init__(self, config: DeepStackConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """(..., H)."""
        return self.linear_2(self.act(self.linear_1(features)))


def lay_out_mosaic(views_NPH: Tensor, grid: Grid, newline_H: Tensor | None) -> Tensor:
    """The tokens of the global view, then the mosaic of the crops, each of its lines with the newline at its end.

    Args:
        views_NPH: The global view, then the crops in raster order.
        grid: Columns and rows of the crops.
        newline_H: The learned vector.

    Returns:
        (R, H).
    """
    assert newline_H is not None
    picture = mosaic(views_NPH[1:], grid)
    newlines = newline_H.to(picture).expand(len(picture), 1, -1)
    return torch.cat([views_NPH[0], torch.cat([picture, newlines], dim=1).flatten(0, 1)])


def add_stacks(layers_stacks: list[int], module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> Any:
    """Before a decoder layer: add the stacks whose slot it is to its input, at the positions of placeholders.

    Args:
        layers_stacks: Numbers of the layer's stacks.
        module: The layer.
        arguments: Its arguments; the first is the hidden states (B, S, H).
        keywords: Its keyword arguments, from which `deepstack` is taken out.

    Returns:
        The arguments and keyword arguments for the layer.
    """
    stacked = keywords.pop("deepstack", None)
    if stacked is None or not layers_stacks:
        return arguments, keywords
    (positions, stacks), hidden_BSH = stacked, arguments[0]
    where = tuple(index.to(hidden_BSH.device) for index in positions)
    for k in layers_stacks:
        hidden_BSH = hidden_BSH.index_put(where, hidden_BSH[where] + stacks[k].to(hidden_BSH))
    return (hidden_BSH, *arguments[1:]), keywords


class DeepStackPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of all DeepStack models."""

    config_class = DeepStackConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = [  # noqa: RUF012
        "DeepStackVisionEmbeddings",
        "DeepStackVisionLayer",
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
    ]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class DeepStackModel(DeepStackPreTrainedModel):
    """Tower, projector and decoder, without the output layer."""

    def __init__(self, config: DeepStackConfig) -> None:
        super().__init__(config)
        self.vision_tower = DeepStackVisionTower(config)
        self.multi_modal_projector = DeepStackProjector(config)
        self.image_newline = (
            nn.Parameter(torch.zeros(config.text_config.hidden_size)) if config.context == "mosaic" else None
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.slots = config.slots if config.stacked_part == "decoder" and config.stack_source != "nothing" else []
        self.num_stacks: int | None = config.stacks.get("num_stacks")
        layers = self.language_model.layers
        outside = [slot for slot in self.slots if not 0 <= slot < len(layers)]
        if outside:
            raise ValueError(f"slots (config.json): {outside} are outside the decoder's layers 0 to {len(layers) - 1}")
        for number, layer in enumerate(layers if self.slots else ()):
            own = [k for k, slot in enumerate(self.slots) if slot == number]
            layer.register_forward_pre_hook(partial(add_stacks, own), with_kwargs=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, image_grids: Tensor, **kwargs: Any) -> DeepStackImageOutput:
        """Encode images.

        Args:
            pixel_values: Normalised pixels (N, 3, side, side) of the views of all images, one image after another.
            image_grids: Columns and rows of the crops of each image (images, 2).
            **kwargs: Not used.

        Returns:
            The rows of each image.

        Raises:
            ValueError: There are more or fewer views than the grids say.
        """
        grids = [(int(columns), int(rows)) for columns, rows in image_grids.tolist()]
        counts = [self._num_views(grid) for grid in grids]
        if sum(counts) != len(pixel_values):
            raise ValueError(f"pixel_values: found {len(pixel_values)} views, expected {counts} by image_grids {grids}")
        rows_NPH = self.multi_modal_projector(self.vision_tower(pixel_values, grids))
        if self.vision_tower.slots:
            return DeepStackImageOutput(pooler_output=list(rows_NPH))
        images = [self._rows(views, grid) for views, grid in zip(rows_NPH.split(counts), grids, strict=True)]
        stacks = [[of_image[1 + k] for of_image in images] for k in range(len(self.slots))]
        return DeepStackImageOutput(
            pooler_output=[of_image[0] for of_image in images], deepstack_features=stacks or None
        )

    def _num_views(self, grid: Grid) -> int:
        source, context = self.config.stack_source, self.config.context
        if source == "nothing" and context == "global":
            return 1
        return (1 + grid[0] * grid[1]) * (1 + HIGH_RES_SIDE**2 if source == "high_res" else 1)

    def _rows(self, views_NPH: Tensor, grid: Grid) -> list[Tensor]:
        """Base rows of an image, then its stacks; stacks that its grid does not fill are zero."""
        context, source, sampler = self.config.context, self.config.stack_source, self.config.sampler
        num_context = 1 + grid[0] * grid[1]
        if context == "mosaic":
            base = lay_out_mosaic(views_NPH[:num_context], grid, self.image_newline)
        elif context == "sequence":
            base = torch.cat([views_NPH[0], *sample_stacks(views_NPH[1:num_context], grid, sampler)])
        else:
            base = views_NPH[0]
        stacks: list[Tensor] = []
        if source == "crops" and self.slots:
            stacks = sample_stacks(views_NPH[1:num_context], grid, sampler)
        elif source == "high_res":
            side = HIGH_RES_SIDE
            by_view = [
                sample_stacks(crops, (side, side), sampler)
                for crops in views_NPH[num_context:].unflatten(0, (-1, side * side))
            ]
            by_stack = [torch.stack(same) for same in zip(*by_view, strict=True)]
            stacks = [lay_out_mosaic(views, grid, self.image_newline) for views in by_stack]
        stacks = stacks[: self.num_stacks]
        if len(stacks) > len(self.slots):
            raise ValueError(f"image_grids: {grid} has {len(stacks)} stacks, config.json has {len(self.slots)} slots")
        missing = [torch.zeros_like(base)] * (len(self.slots) - len(stacks))
        return [base, *stacks, *missing]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, DeepStackImageOutput] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch.

        Args:
            input_ids: (B, S) with one placeholder for each row of an image.
            pixel_values: See `get_image_features`; images of all prompts in order.
            image_grids: See `get_image_features`.
            attention_mask: (B, S) ones, and zeros at padding.
            position_ids: (B, S) positions.
            past_key_values: The cache of what was read before.
            inputs_embeds: (B, S, H) instead of `input_ids`, for text alone.
            mm_encoder_outputs: `{"image": get_image_features(...)}` instead of pixels, with the rows of exactly the
                placeholders in `input_ids`.
            **kwargs: For the decoder.

        Returns:
            The decoder's output.

        Raises:
            ValueError: Placeholders and images do not fit.
        """
        images = (mm_encoder_outputs or {}).get("image")
        if images is None and pixel_values is not None:
            if image_grids is None:
                raise ValueError("image_grids: missing beside pixel_values; the processor makes both")
            images = self.get_image_features(pixel_values, image_grids)
        if (input_ids is None) == (inputs_embeds is None) or (input_ids is None and images is not None):
            raise ValueError("give input_ids, or inputs_embeds without images: placeholders say where images are")
        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            inputs_embeds, deepstack = self._place(input_ids, inputs_embeds, images)
            if deepstack is not None:
                kwargs["deepstack"] = deepstack
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _place(self, input_ids: Tensor, embeds_BSH: Tensor, images: DeepStackImageOutput | None) -> tuple[Tensor, Any]:
        """Base rows in the place of placeholders; and the stacks with their positions, if there are any."""
        if images is None and input_ids.shape[1] == 1:
            return embeds_BSH, None  # a generated token, which is text
        positions = (input_ids == self.config.image_token_index).nonzero(as_tuple=True)
        num_rows = 0 if images is None else sum(len(rows) for rows in images.pooler_output)
        if len(positions[0]) != num_rows:
            raise ValueError(
                f"input_ids hold {len(positions[0])} image placeholders (id {self.config.image_token_index}), the "
                f"images have {num_rows} rows; take both from one call of the processor. If you read a prompt in "
                "chunks, give each chunk the rows of its placeholders as mm_encoder_outputs, or let generate do so "
                "(prefill_chunk_size)"
            )
        if images is None or num_rows == 0:
            return embeds_BSH, None
        rows_RH = torch.cat([rows.to(embeds_BSH) for rows in images.pooler_output])
        embeds_BSH = embeds_BSH.index_put(positions, rows_RH)
        if images.deepstack_features is None:
            return embeds_BSH, None
        return embeds_BSH, (positions, [torch.cat(list(stack)) for stack in images.deepstack_features])


class DeepStackForConditionalGeneration(DeepStackPreTrainedModel, GenerationMixin):
    """The whole model, which answers questions about images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeepStackConfig) -> None:
        super().__init__(config)
        self.model = DeepStackModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def get_image_features(self, pixel_values: Tensor, image_grids: Tensor, **kwargs: Any) -> DeepStackImageOutput:
        """As `DeepStackModel.get_image_features`.

        Args:
            pixel_values: Normalised pixels (N, 3, side, side) of the views of all images, one image after another.
            image_grids: Columns and rows of the crops of each image (images, 2).
            **kwargs: Not used.

        Returns:
            The rows of each image.
        """
        return self.model.get_image_features(pixel_values, image_grids, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, DeepStackImageOutput] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of a batch, and the loss if there are labels.

        Args:
            input_ids: See `DeepStackModel.forward`, as for the arguments that are not described here.
            pixel_values: Pixels.
            image_grids: Grids.
            attention_mask: Mask.
            position_ids: Positions.
            past_key_values: Cache.
            inputs_embeds: Embedded tokens.
            labels: (B, S) the tokens to be learned, -100 elsewhere and at placeholders.
            logits_to_keep: Number of last positions that get logits, or their indices; 0 for all.
            mm_encoder_outputs: Encoded images.
            return_dict: False for a tuple.
            **kwargs: For the decoder.

        Returns:
            Loss, logits (B, S, vocabulary) and cache.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grids=image_grids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if return_dict is False else result
