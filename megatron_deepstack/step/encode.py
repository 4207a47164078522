"""Encoding a rank's views before the schedule, and the encoder's backward after it.

The whole pipeline runs between the two, so the encoder's graph is cut at its output rows: `EncoderPass` keeps what its
backward needs. Three cases: nothing to train (no graph), a frozen ViT under a trained projector (features kept, the
projector's graph only), and a trained ViT, whose graph is kept, or dropped and rebuilt chunk by chunk where its
activations would not fit (`parallel.encoder_chunk_views`, `parallel.encoder_memory_gib`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from megatron_deepstack.model.vision.encoder import VisualEncoder
from megatron_deepstack.model.vision.views import Views
from megatron_deepstack.planning.budget.encoder_views import AtOnce


class EncoderPass:
    """One forward and, if anything is trained, one backward of the encoder over this rank's views."""

    def __init__(self, encoder: VisualEncoder, views: Views, at_once: AtOnce | None = None) -> None:
        """Encode `views`, of which there may be none. Not collective.

        Args:
            encoder: The encoder.
            views: The views of this rank's units, in order.
            at_once: Bounds the views whose ViT activations are alive at once; None sets no bound.
        """
        self.encoder, self.views = encoder, views
        self.trains_vit = any(p.requires_grad for p in encoder.vit.parameters())
        self.trains = any(p.requires_grad for p in encoder.parameters())
        self.cuts = self._whole_images(at_once or AtOnce()).cuts(views.num_patches)
        self.rerun = self.trains_vit and len(self.cuts) > 2
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and self.trains_vit and not self.rerun):
            features = [encoder.vit.features(chunk) for chunk in self._chunks()] or [encoder.vit.no_features()]
        self.num_outputs = [len(chunk) for chunk in features]
        self.features = torch.cat(features)
        if self.rerun:
            self.features.requires_grad_()
        with torch.set_grad_enabled(grad and self.trains):
            self.live_rows = encoder(self.features)

    @property
    def rows(self) -> torch.Tensor:
        """(rows of all views + 1, H): rows of all views in order, then the newline; detached."""
        return self.live_rows.detach()

    def release_rows(self) -> None:
        """Free the memory of `rows` once they are sent: the backward needs their shape only, not their values."""
        self.live_rows.untyped_storage().resize_(0)

    def backward(self, grad_rows: torch.Tensor) -> None:
        """Accumulate the parameters' gradients from those of `rows`. It does nothing if nothing is trained."""
        if not self.live_rows.requires_grad:
            return
        torch.autograd.backward(self.live_rows, grad_rows)
        if self.rerun and self.features.grad is not None:
            grads = self.features.grad.split(self.num_outputs)
            for chunk, grad in zip(self._chunks(), grads, strict=True):
                torch.autograd.backward(self.encoder.vit.features(chunk), grad)

    def _whole_images(self, at_once: AtOnce) -> AtOnce:
        """The bound, rounded down to whole images if the ViT itself combines the views of an image."""
        if self.encoder.vit.stacks is None or not at_once.views:
            return at_once
        per_image = self.encoder.vit.stacks.views_per_image
        return replace(at_once, views=max(at_once.views // per_image, 1) * per_image)

    def _chunks(self) -> list[Views]:
        vision = self.encoder.vit.vision
        return [self.views.part(first, stop, vision) for first, stop in pairwise(self.cuts)]
