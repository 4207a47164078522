"""CUDA graphs of decoder layers: each layer's passes are captured once and then launched as a whole.

A graph has fixed addresses, so whatever it reads and writes has one shape, and what it keeps between the passes belongs
to it alone. Each micro-batch of a step therefore has its own graphs where stages are pipelined; one is enough where
forward and backward passes alternate. All steps must have the same micro-batches: `train.batching: padded` and
`train.row_length: full` see to that. The rows that a layer adds differ in number, and are added outside of its graphs
(see `layers.decoder_layer` and `layers.injection`).

Transformer Engine captures (`make_graphed_callables`). Megatron's own helper for it asks for global state that is not
kept here; of Megatron the layers' side is used: they choose between capture, replay and a plain pass.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer import cuda_graphs

from megatron_deepstack.errors import ConfigError
from megatron_deepstack.model.language import LanguageChunk
from megatron_deepstack.planning.batch.step_plan import StepPlan
from megatron_deepstack.platform.compute.device import local_device

Capture = Callable[..., tuple[Callable[..., Any], ...]]
PLAIN_STEPS = 2
"""Steps before the capture: kernels are chosen and buffers made in them, and the optimizer makes its states."""
_WARM_PASSES = 3
"""Passes of each layer that Transformer Engine runs right before it captures them; its default."""


def one_forward_one_backward(stage: int, num_stages: int, num_micro_batches: int) -> list[int]:
    """Return the order of passes of a stage with one chunk, in Transformer Engine's form.

    Args:
        stage: Number of the stage.
        num_stages: Their number.
        num_micro_batches: Micro-batches of a step.

    Returns:
        1 for a forward pass and -1 for a backward pass.
    """
    warm = min(num_stages - 1 - stage, num_micro_batches)
    return [1] * warm + [1, -1] * (num_micro_batches - warm) + [-1] * warm


class LayerGraphs:
    """The graphs of a rank's only chunk."""

    def __init__(self, chunk: LanguageChunk, stage: int, num_stages: int, capture: Capture | None = None) -> None:
        """Make none yet.

        Args:
            chunk: The chunk.
            stage: Number of its stage.
            num_stages: Number of all stages.
            capture: As Transformer Engine's `make_graphed_callables`, which is taken if none is given.

        Raises:
            ConfigError: torch's memory may move in a way that NCCL's buffers in a graph do not survive.
        """
        settings = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
        movable = any("expandable_segments:True" in one for one in settings)
        if movable and os.environ.get("NCCL_GRAPH_REGISTER") != "0":
            raise ConfigError(
                [
                    "speed.cuda_graphs: expandable_segments is on in PYTORCH_ALLOC_CONF, and NCCL registers buffers of "
                    "graphs at fixed addresses; set the variable NCCL_GRAPH_REGISTER=0, or speed.cuda_graphs=never"
                ]
            )
        self._chunk, self._stage, self._num_stages, self._make = chunk, stage, num_stages, capture
        self._plain_steps = 0
        self._shape: tuple[int, int, tuple[int, ...]] | None = None

    def before_step(self, plan: StepPlan) -> None:
        """Capture, if it is time; call it before each training step. Collective over tp when it captures.

        Gradient buffers are not kept.

        Args:
            plan: The step.
        """
        shape = plan.num_micro_batches, plan.micro_batch_size, tuple(sorted(set(plan.seq_lengths)))
        if self._shape is not None:
            assert shape == self._shape, (
                f"speed.cuda_graphs: graphs were captured for (micro-batches, samples of each, lengths) {self._shape}, "
                f"and a step has {shape}"
            )
            return
        self._plain_steps += 1
        if self._plain_steps > PLAIN_STEPS:
            assert len(shape[2]) == 1, f"speed.cuda_graphs: rows of a step have different lengths: {shape[2]}"
            self._capture(plan)
            self._shape = shape

    def _capture(self, plan: StepPlan) -> None:
        layers = list(self._chunk.decoder.layers)
        if not layers:
            return
        number = plan.num_micro_batches if self._num_stages > 1 else 1
        order = one_forward_one_backward(self._stage, self._num_stages, number)
        in_flight = min(self._num_stages - self._stage, number)
        inputs = [[self._hidden(plan) for _ in layers] for _ in range(in_flight)]
        angles = self._chunk.angles_of_rows(plan.seq_lengths[0], plan.micro_batch_size)
        gc.collect()
        cuda_graphs._set_capture_start()
        try:
            graphs = (self._make or _engines_capture())(
                tuple(layers),
                tuple((inputs[batch % in_flight][index],) for batch in range(number) for index in range(len(layers))),
                sample_kwargs=tuple({"rotary_pos_emb": angles} for _ in range(number * len(layers))),
                num_warmup_iters=_WARM_PASSES,
                allow_unused_input=True,
                fp8_enabled=False,
                _order=order,
                _num_layers_per_chunk=[len(layers)],
                _reuse_graph_input_output_buffers=True,
            )
        finally:
            cuda_graphs._set_capture_end()
        for index, layer in enumerate(layers):
            layer.cuda_graphs = [graphs[batch * len(layers) + index] for batch in range(number)]

    def _hidden(self, plan: StepPlan) -> torch.Tensor:
        config = self._chunk.config
        split = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return torch.ones(
            plan.seq_lengths[0] // split,
            plan.micro_batch_size,
            config.hidden_size,
            dtype=config.params_dtype,
            device=local_device(),
            requires_grad=True,
        )


def _engines_capture() -> Capture:
    return importlib.import_module("transformer_engine.pytorch").make_graphed_callables  # type: ignore[no-any-return]
