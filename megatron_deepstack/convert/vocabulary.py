"""Vocabularies that are longer in a folder than in a recipe: placeholders of images, and padding behind them.

Models of transformers look up an image's placeholder like a word, so their embedding has rows for it, and often more
rows up to a round number. None of them stands for text, and no row of a recipe's model corresponds to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from megatron_deepstack.convert.tensor_files import LazyTensor
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.errors import CheckpointError

EMBEDDINGS: Final = ("model.embed_tokens.weight", "lm_head.weight")
"""Published names of the tensors that have a row for each token."""
VOCABULARY_MULTIPLE: Final = 64
"""Size that Hugging Face's LLaVA pads its vocabulary to, behind the image token."""


def padded_vocabulary(vocab_size: int, image_token: int) -> int:
    """Rows of a vocabulary with a place for the image token: as they are if it fits, else a multiple of 64.

    Args:
        vocab_size: Rows without it.
        image_token: Its id.
    """
    if image_token < vocab_size:
        return vocab_size
    return (image_token // VOCABULARY_MULTIPLE + 1) * VOCABULARY_MULTIPLE


def lengthened(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """An embedding or output layer with more rows.

    New rows are the mean of all: their logit is the mean logit, never the largest, so generation cannot choose them.

    Args:
        rows: (V, H).
        num_rows: Rows of the result, at least V.

    Returns:
        (num_rows, H), the same tensor if it has as many already.
    """
    if num_rows == len(rows):
        return rows
    mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(num_rows - len(rows), -1)])


def text_rows(config: Mapping[str, Any]) -> int | None:
    """How many rows of a folder's embedding stand for text; None if its config names no placeholder behind them.

    Args:
        config: Content of its config.json.
    """
    said = config.get("num_text_tokens")
    if isinstance(said, int):
        return said
    image = config.get("image_token_index", config.get("image_token_id"))
    rows = (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(image, int) or rows is None:
        return None
    return image if padded_vocabulary(image, image) == rows else None


def require_rows(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Refuse a tokenizer that gives ids without a row in the embedding: it belongs to another model.

    Args:
        tokenizer: The folder's tokenizer.
        vocab_size: Rows that stand for text.
        where: The folder, for the message.

    Raises:
        CheckpointError: It has more tokens than there are rows. Control tokens do not count: no text gives their ids.
    """
    if tokenizer.num_text_ids > vocab_size:
        raise CheckpointError(
            f"{tokenizer.source}: has {tokenizer.num_text_ids} tokens, {where} has {vocab_size} rows for text; none "
            f"for {tokenizer.names_from(vocab_size)}. It is the tokenizer of another model, or tokens were added to "
            "it: put the model's own one there"
        )


def without_placeholders(tensor: LazyTensor, num_rows: int, rows: int | None) -> LazyTensor:
    """A tensor of `EMBEDDINGS` cut to the rows of text, if these are as many as a model has.

    Args:
        tensor: The tensor.
        num_rows: Rows that the model has.
        rows: Rows that stand for text, see `text_rows`.
    """
    if rows != num_rows or tensor.shape[0] <= num_rows:
        return tensor
    return tensor.changed((num_rows, *tensor.shape[1:]), lambda read: read[:num_rows])
