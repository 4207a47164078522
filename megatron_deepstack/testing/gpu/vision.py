"""The vision tower and the projector alone: views a second, frozen and learning, and how far from the ceiling."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from megatron_deepstack.config.choices import Layers, Precision, Switch
from megatron_deepstack.config.schema import LoraConfig, ModelConfig, ParallelConfig, SpeedConfig
from megatron_deepstack.config.sizes import tokens_per_view
from megatron_deepstack.model.layers.speed import decide_speed
from megatron_deepstack.model.rules import fill
from megatron_deepstack.model.vision.encoder import VisualEncoder
from megatron_deepstack.model.vision.views import Views
from megatron_deepstack.model.weights import encoder_rules
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.planning.budget.cost import projector_flops, view_flops
from megatron_deepstack.planning.budget.encoder_views import AtOnce
from megatron_deepstack.platform.compute.capabilities import capabilities
from megatron_deepstack.platform.compute.device import has_gpu, local_device, max_memory_bytes
from megatron_deepstack.platform.compute.measure import release_memory
from megatron_deepstack.step.encode import EncoderPass
from megatron_deepstack.testing.gpu.report import Report, Settings
from megatron_deepstack.testing.gpu.stage import draw_on_device, stage_size
from megatron_deepstack.testing.gpu.timing import mean_seconds, only_rank, read_ceiling


def run(settings: Settings, report: Report) -> None:
    """Measure CLIP ViT-L/336 with a projector to width 4096: as a run would build it here, and then without fusions.

    Args:
        settings: Size and folders of the trial.
        report: Gets a row for each measurement.
    """
    groups, size = only_rank(settings), stage_size(tiny=settings.tiny)
    model = ModelConfig(vision=size.vision, language=replace(size.language, num_layers=1))
    measure = Measure(report, _encoder(model, groups, SpeedConfig()), model, read_ceiling(settings))
    frozen, learning, repeats = (3, 2, 1) if settings.tiny else (50, 25, 5)
    measure.encoder.requires_grad_(False)
    measure.forward("tower and projector, frozen", _pixels(model, frozen), repeats)
    if has_gpu():
        measure.forward("the same, pixels in page-locked memory", _pixels(model, frozen).pin_memory(), repeats)
    measure.projector(frozen, repeats)
    _let_learn(measure.encoder)
    measure.learning(_pixels(model, learning), repeats)
    plain = SpeedConfig(fusions=Switch.NEVER, vision_layers=Layers.LOCAL)
    measure.encoder = _encoder(model, groups, plain)
    measure.encoder.requires_grad_(False)
    measure.forward("tower and projector, frozen, local layers unfused", _pixels(model, frozen), repeats)


def _encoder(model: ModelConfig, groups: Groups, speed: SpeedConfig) -> VisualEncoder:
    """An encoder with weights drawn on the device."""
    decided = decide_speed(
        speed,
        capabilities(),
        language=model.language,
        parallel=ParallelConfig(),
        precision=Precision.BF16,
        layers=model.layers,
        lora=LoraConfig(),
    )
    encoder = VisualEncoder(model, Precision.BF16, groups.encoder, decided).to(local_device())
    fill(encoder, encoder_rules(encoder, model), draw_on_device, 0, 1)
    return encoder


def _let_learn(encoder: VisualEncoder) -> None:
    encoder.vit.requires_grad_(True)
    for layer in encoder.vit.unused_layers():
        layer.requires_grad_(False)
    encoder.projector.requires_grad_(True)


def _pixels(model: ModelConfig, views: int) -> torch.Tensor:
    side = model.vision.image_size
    return torch.randint(0, 256, (views, side, side, 3), dtype=torch.uint8)


class Measure:
    """Measures an encoder and reports rows."""

    def __init__(self, report: Report, encoder: VisualEncoder, model: ModelConfig, ceiling: float | None) -> None:
        """Prepare to measure.

        Args:
            report: Gets the rows.
            encoder: The encoder, which may be replaced between measurements.
            model: Its model.
            ceiling: TFLOP/s that matrix products reach; None if that was not measured.
        """
        self.report, self.encoder, self.model, self.ceiling = report, encoder, model, ceiling

    def forward(self, what: str, pixels: torch.Tensor, repeats: int) -> None:
        """Measure from pixels on the host to rows.

        Args:
            what: What the row is called.
            pixels: uint8 (N, side, side, 3) on the host.
            repeats: Passes under the clock.
        """
        with self.report.case(what):
            seconds = mean_seconds(partial(EncoderPass, self.encoder, Views(pixels)), repeats, warm_up=2)
            self._row(what, len(pixels), seconds, view_flops(self.model.vision) + projector_flops(self.model))

    def projector(self, views: int, repeats: int) -> None:
        """Measure from features on the device to rows.

        Args:
            views: Number of views.
            repeats: Passes under the clock.
        """
        what = "projector alone, frozen"
        with self.report.case(what):
            features = torch.randn(
                views,
                tokens_per_view(self.model.vision),
                self.model.vision.hidden_size,
                device=local_device(),
                dtype=torch.bfloat16,
            )
            seconds = mean_seconds(partial(self.encoder.forward, features), repeats, warm_up=2)
            self._row(what, views, seconds, projector_flops(self.model))

    def learning(self, pixels: torch.Tensor, repeats: int) -> None:
        """Measure forward and backward of all, and again with activations kept for a fifth of the views at a time.

        Args:
            pixels: uint8 (N, side, side, 3) on the host.
            repeats: Passes under the clock.
        """
        flops = 3 * (view_flops(self.model.vision) + projector_flops(self.model))
        for what, chunk in (("both learning", 0), ("both learning, in chunks", max(len(pixels) // 5, 1))):
            with self.report.case(what):
                release_memory()
                seconds = mean_seconds(partial(self._train, pixels, chunk), repeats, warm_up=1)
                self._row(what, len(pixels), seconds, flops, peak_GB=max_memory_bytes() / 1e9)

    def _train(self, pixels: torch.Tensor, views_at_once: int) -> None:
        encoded = EncoderPass(self.encoder, Views(pixels), AtOnce(views=views_at_once))
        encoded.backward(torch.ones_like(encoded.rows))

    def _row(self, what: str, views: int, seconds: float, flops: float, **more: float) -> None:
        """`flops` are one view's."""
        tflops = views * flops / seconds / 1e12
        share = {} if self.ceiling is None else {"share_of_ceiling": tflops / self.ceiling}
        self.report.measured(
            what, views=views, ms=1000 * seconds, views_per_s=views / seconds, TFLOPs=tflops, **share, **more
        )
