"""Samples computed by transformers in float32, from a folder of its layout and with that folder's own processor.

A DeepStack folder brings code. It is run only if it is the code that this package writes, byte for byte; otherwise the
classes of this package stand in for it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.convert.export_files import CODE
from megatron_deepstack.convert.hf_config import read_config
from megatron_deepstack.testing.parity.by_transformers import model_inputs
from megatron_deepstack.testing.parity.drawn import DrawnSample

Views = tuple[np.ndarray, tuple[int, int]]
"""Normalised views of a picture (views, 3, S, S), and its grid."""
Answer = tuple[torch.Tensor, tuple[int, ...], tuple[np.ndarray, ...]]


def by_own_code(
    folder: Path, model: ModelConfig, questions: Sequence[tuple[DrawnSample, tuple[bytes, ...]]], num_new: int
) -> list[Answer]:
    """Compute samples, and continue each greedily, without a cache.

    Args:
        folder: A folder that transformers loads.
        model: Its model.
        questions: Samples, and the files of their pictures; without files the sample's own views are taken.
        num_new: Tokens that follow each sample.

    Returns:
        Per question its logits (T, vocabulary of text), the tokens that follow, and the normalised pixels of its
        pictures.
    """
    theirs = TransformersFolder(folder, model)
    found = []
    for sample, pictures in questions:
        pixels = theirs.prepared(pictures)
        logits = theirs.logits(sample, pixels)
        new: list[int] = []
        last = logits
        for _ in range(num_new):
            new.append(int(last[-1].argmax()))
            tokens = np.concatenate([sample.tokens, np.array(new, np.int64)])
            last = theirs.logits(replace(sample, tokens=tokens, loss_mask=np.ones_like(tokens)), pixels)
        found.append((logits, tuple(new), tuple(views for views, _ in pixels)))
    return found


class TransformersFolder:
    """A folder as transformers loads it."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Load it in float32. `model` is what its config.json describes."""
        from transformers import AutoImageProcessor, AutoModelForImageTextToText

        self.model, self.config, traits = model, read_config(folder), model.variant.traits
        self.has_code = not traits.is_llava and traits.whole_model is None
        options: dict[str, Any] = {"trust_remote_code": True} if self.has_code else {}
        loader: Any = AutoModelForImageTextToText
        processor: Any = AutoImageProcessor
        if self.has_code and not _is_our_code(folder):
            from megatron_deepstack.convert.hf_folder.modeling_deepstack import DeepStackForConditionalGeneration
            from megatron_deepstack.convert.hf_folder.processing_deepstack import DeepStackImageProcessor

            loader, processor, options = DeepStackForConditionalGeneration, DeepStackImageProcessor, {}
        self.module = loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", **options).eval()
        self.processor = None if traits.whole_model else processor.from_pretrained(folder, **options)

    def prepared(self, pictures: Sequence[bytes]) -> list[Views]:
        """What the folder's processor makes of files of pictures."""
        found = []
        with tempfile.TemporaryDirectory(prefix="convert-check-") as scratch:
            for number, content in enumerate(pictures):
                file = Path(scratch) / f"picture-{number}"
                file.write_bytes(content)
                found.append(self._one(file))
        return found

    def _one(self, file: Path) -> Views:
        assert self.processor is not None
        if not self.has_code:
            with Image.open(file) as image:
                made = self.processor(image.convert("RGB"), return_tensors="np")
            return np.asarray(made["pixel_values"]), (1, 1)
        made = self.processor(images=[self.processor.fetch_images(str(file))], return_tensors="np")
        columns, rows = np.asarray(made["image_grids"])[0].tolist()
        return np.asarray(made["pixel_values"]), (columns, rows)

    @torch.no_grad()
    def logits(self, sample: DrawnSample, pixels: Sequence[Views]) -> torch.Tensor:
        """Compute a sample.

        Args:
            sample: Its tokens; and its views, for a model whose folder has no processor of ours.
            pixels: Views of its pictures.

        Returns:
            Logits (T, vocabulary of text), float32.
        """
        if self.processor is None:
            inputs = model_inputs(sample, self.model, self.config, self.module.dtype)
        else:
            inputs = self._inputs(sample, pixels)
        found = self.module(**inputs, use_cache=False).logits[0, :, : self.model.language.vocab_size]
        return found.float()

    def _inputs(self, sample: DrawnSample, pixels: Sequence[Views]) -> dict[str, Any]:
        own = replace(sample, shapes=tuple(grid for _, grid in pixels))
        expanded = own.expanded(self.model)
        ids = torch.from_numpy(expanded.tokens.copy()).long()[None]
        number = int(self.config.get("image_token_index", self.config.get("image_token_id", 0)))
        for span in expanded.spans:
            ids[0, span.start : span.start + span.length] = number
        if not pixels:
            return {"input_ids": ids}
        inputs = {"input_ids": ids, "pixel_values": torch.from_numpy(np.concatenate([views for views, _ in pixels]))}
        if self.has_code:
            inputs["image_grids"] = torch.tensor([list(grid) for _, grid in pixels])
        return inputs


def _is_our_code(folder: Path) -> bool:
    """Whether a folder's code is what this package writes."""
    ours = package_files("megatron_deepstack.convert.hf_folder")
    scripts = {file.name for file in folder.glob("*.py")}
    return scripts == set(CODE) and all((folder / name).read_bytes() == (ours / name).read_bytes() for name in CODE)
