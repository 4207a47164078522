"""Window Q-Formers, the projectors of Granite 4 Vision: one for each stack, from one state of the tower to its rows.

A view is divided into windows. In each window a few queries, which begin with learned vectors plus a downsampled
version of the patches, attend to each other and to the window's patches. A linear layer brings them to the decoder's
width. Dropout, which the published model has while it is trained, is left out.

Legend: N views, P patches on one side of a view, W windows of all views, Q queries and M patches of a window, C width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_deepstack.config.schema import ModelConfig, QFormerConfig
from megatron_deepstack.config.sizes import tokens_per_side
from megatron_deepstack.model.layers.megatron_config import ACTIVATIONS

_NORM_EPSILON = 1e-6
"""Epsilon of the norm before the windows, which no config names."""


class QFormers(torch.nn.Module):
    """A Q-Former for each stack."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        taps, sampled = model.vision.taps, model.qformer.num_sampled
        states = sorted(set(taps))
        self.state_of_stack = tuple(states.index(layer) for layer in taps)
        offsets = [None] * (len(taps) - sampled) + list(range(sampled))
        self.stacks = torch.nn.ModuleList(WindowQFormer(model, offset, dtype) for offset in offsets)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P * P, states, C) to rows (N, tokens, stacks, hidden), each token's rows of all stacks together."""
        rows = [part(features[:, :, state]) for part, state in zip(self.stacks, self.state_of_stack, strict=True)]
        return torch.stack(rows, dim=2)


class WindowQFormer(torch.nn.Module):
    """From one state of the tower to the rows of one stack."""

    def __init__(self, model: ModelConfig, offset: int | None, dtype: torch.dtype) -> None:
        """`offset` is the patch of each 2x2 with which queries begin, line by line; None for averages."""
        super().__init__()
        config, width = model.qformer, model.vision.hidden_size
        self.side, self.offset = tokens_per_side(model.vision), offset
        self.query_side, self.window_side = config.query_side, config.window_side
        self.norm = torch.nn.LayerNorm(width, eps=_NORM_EPSILON, dtype=dtype)
        self.query = torch.nn.Parameter(torch.empty(1, config.query_side**2, width, dtype=dtype))
        self.positions = torch.nn.Parameter(torch.empty(1, config.window_side**2, width, dtype=dtype))
        self.query_norm = torch.nn.LayerNorm(width, eps=config.layernorm_epsilon, dtype=dtype)
        self.layers = torch.nn.ModuleList(
            QFormerLayer(config, width, dtype, crosses=number % config.cross_attention_interval == 0)
            for number in range(config.num_layers)
        )
        self.out = torch.nn.Linear(width, model.language.hidden_size, dtype=dtype)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P * P, C) to (N, tokens, hidden), both line by line."""
        x_NPPC = self.norm(features).unflatten(1, (self.side, self.side))
        patches_WMC = _windows(x_NPPC, self.window_side) + self.positions
        x_WQC = self.query_norm(self.query + _windows(self._downsampled(x_NPPC), self.query_side))
        for layer in self.layers:
            x_WQC = layer(x_WQC, patches_WMC)
        return self.out(_together(x_WQC, self.side // self.window_side, self.query_side))

    def _downsampled(self, x_NPPC: torch.Tensor) -> torch.Tensor:
        if self.offset is not None:
            line, column = divmod(self.offset, 2)
            return x_NPPC[:, line::2, column::2]
        side = self.side // self.window_side * self.query_side
        return F.adaptive_avg_pool2d(x_NPPC.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)


def _windows(x_NSSC: torch.Tensor, side: int) -> torch.Tensor:
    """(N, S, S, C) to (windows, side * side, C): view by view, window by window, each line by line."""
    number = x_NSSC.shape[1] // side
    cut = x_NSSC.unflatten(2, (number, side)).unflatten(1, (number, side))
    return cut.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def _together(x_WQC: torch.Tensor, number: int, side: int) -> torch.Tensor:
    """(windows, side * side, C) to (N, tokens, C), line by line; `number` is the windows on one side of a view."""
    cut = x_WQC.unflatten(0, (-1, number, number)).unflatten(3, (side, side))
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2).flatten(1, 2)


class QFormerLayer(torch.nn.Module):
    """Attention among queries, attention to patches in some layers, and an MLP; a LayerNorm follows each."""

    def __init__(self, config: QFormerConfig, width: int, dtype: torch.dtype, *, crosses: bool) -> None:
        super().__init__()
        self.among = QFormerAttention(config, width, dtype)
        self.across = QFormerAttention(config, width, dtype) if crosses else None
        self.fc1 = torch.nn.Linear(width, config.ffn_hidden_size, dtype=dtype)
        self.fc2 = torch.nn.Linear(config.ffn_hidden_size, width, dtype=dtype)
        self.norm = torch.nn.LayerNorm(width, eps=config.layernorm_epsilon, dtype=dtype)
        self.activation: Callable[[torch.Tensor], torch.Tensor] = ACTIVATIONS[config.activation]  # type: ignore[assignment]

    def forward(self, x_WQC: torch.Tensor, patches_WMC: torch.Tensor) -> torch.Tensor:
        """Run the layer on the queries of all windows; gradients flow to both arguments.

        Args:
            x_WQC: The queries.
            patches_WMC: The patches of their windows; not used in a layer that does not look at them.

        Returns:
            (W, Q, C).
        """
        x_WQC = self.among(x_WQC, x_WQC)
        if self.across is not None:
            x_WQC = self.across(x_WQC, patches_WMC)
        return self.norm(x_WQC + self.fc2(self.activation(self.fc1(x_WQC))))


class QFormerAttention(torch.nn.Module):
    """Attention of queries to other vectors, added to the queries and normalised."""

    def __init__(self, config: QFormerConfig, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.out = (torch.nn.Linear(width, width, dtype=dtype) for _ in range(4))
        self.norm = torch.nn.LayerNorm(width, eps=config.layernorm_epsilon, dtype=dtype)

    def forward(self, x_WQC: torch.Tensor, others_WMC: torch.Tensor) -> torch.Tensor:
        """Attend, add and normalise; gradients flow to both arguments.

        Args:
            x_WQC: The queries.
            others_WMC: What they attend to, which may be the queries themselves.

        Returns:
            (W, Q, C).
        """
        q, k, v = (
            linear(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for linear, x in ((self.query, x_WQC), (self.key, others_WMC), (self.value, others_WMC))
        )
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(x_WQC + self.out(found))
