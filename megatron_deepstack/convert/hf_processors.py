"""The files of transformers' processors for its own whole models, such as Qwen3-VL: how pixels are made, as values.

The image processors of transformers that use Pillow give the pixels exactly (`backend="pil"`, and always where
torchvision is missing); those that use torchvision round differently, as `data.resize=torch` does.
"""

from __future__ import annotations

from typing import Any, Final

from megatron_deepstack.config.schema import DataConfig, ModelConfig, VisionConfig
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.convert.hf_facts import PREPROCESSOR, PROCESSOR
from megatron_deepstack.convert.hf_written import select_strategy
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN
from megatron_deepstack.planning.views import read_tile_grids

VIDEO_PREPROCESSOR: Final = "video_preprocessor_config.json"
_BICUBIC: Final = 3
_FEWEST_FRAMES: Final = 4

Values = dict[str, dict[str, Any]]
"""Content of JSON files by name."""


def qwen3_vl_processor(model: ModelConfig, data: DataConfig) -> Values:
    """Return the processor's files of Qwen3-VL.

    Args:
        model: The recipe's model.
        data: How images were prepared.
    """
    vision = model.vision
    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size,
    }
    named = {"processor_class": "Qwen3VLProcessor", **_colours(vision), **sizes}
    return {
        PREPROCESSOR: {
            "image_processor_type": "Qwen2VLImageProcessor",
            **named,
            "size": {"shortest_edge": data.min_pixels, "longest_edge": data.max_pixels},
        },
        VIDEO_PREPROCESSOR: {
            "video_processor_type": "Qwen3VLVideoProcessor",
            **named,
            "size": {"shortest_edge": data.video_min_pixels, "longest_edge": data.video_max_pixels},
            "do_sample_frames": True,
            "fps": data.video_fps,
            "min_frames": _FEWEST_FRAMES,
            "max_frames": data.video_max_frames,
            "cap_pixels_per_frame": False,
        },
    }


def granite_processor(model: ModelConfig, data: DataConfig) -> Values:
    """Return the processor's files of Granite 4 Vision.

    Args:
        model: The recipe's model.
        data: How images were prepared.
    """
    vision, qformer = model.vision, model.qformer
    side = {"height": vision.image_size, "width": vision.image_size}
    grids = read_tile_grids(vision.tile_grids)
    return {
        PREPROCESSOR: {
            "image_processor_type": "LlavaNextImageProcessor",
            "processor_class": "Granite4VisionProcessor",
            **_colours(vision),
            "size": side,
            "do_center_crop": True,
            "crop_size": side,
            "do_pad": True,
            "image_grid_pinpoints": [
                [rows * vision.image_size, columns * vision.image_size] for columns, rows in grids
            ],
        },
        PROCESSOR: {
            "processor_class": "Granite4VisionProcessor",
            "patch_size": vision.patch_size,
            "downsample_rate": f"{qformer.query_side}/{qformer.window_side}",
            "vision_feature_select_strategy": select_strategy(vision),
            "num_additional_image_tokens": tower_of(vision).num_leading_tokens,
            "image_token": IMAGE_TOKEN,
        },
    }


def _colours(vision: VisionConfig) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
    }
