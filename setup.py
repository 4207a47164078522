"""Installation: the packages, what they need, and the command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path("megatron_deepstack/__init__.py").read_text()).group(1)

setup(
    name="megatron-deepstack",
    version=VERSION,
    description="Distributed, pipeline-parallel training of DeepStack multimodal language models",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_deepstack*", "orchestration*"]),
    package_data={
        "megatron_deepstack": ["recipes/*.yaml", "report/*.css", "report/*.js"],
        "orchestration": ["manifests/*.yaml", "manifests/*.sh", "manifests/*.sbatch"],
    },
    entry_points={
        "console_scripts": ["megatron-deepstack = megatron_deepstack.cli:main"],
        "lmms_eval.models": ["megatron_deepstack = megatron_deepstack.inference.lmms.manifest:manifest"],
    },
    install_requires=[
        "Pillow>=11",
        "PyYAML>=6",
        "bokeh>=3.6,<4",
        "fsspec>=2025.3",
        "google-crc32c>=1.5",
        "megatron-core>=0.16.1,<0.20",
        "numcodecs>=0.15",
        "numpy>=2",
        "omegaconf>=2.4",
        "psutil>=5.9",
        "ray[default,train]>=2.60,<3",
        "rich>=13",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "simplejpeg>=1.8",
        "tensorboard>=2.18",
        "tokenizers>=0.22",
        "torch>=2.6",
        "typer>=0.20",
        "zarr>=3.1",
    ],
    extras_require={
        "test": [
            "av>=14",
            "flask>=3",
            "flask-cors>=5",
            "hypothesis>=6",
            "moto[s3]>=5.1",
            "mypy>=1.15",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "s3fs>=2025.3",
            "scikit-image>=0.25",
            "transformers>=5",
            "types-PyYAML",
            "wandb>=0.20",
        ],
        "gpu": ["transformer-engine[pytorch]"],
        "wandb": ["wandb"],
        "s3": ["s3fs>=2025.3"],
        # PyAV and not torchcodec: its wheels bring FFmpeg, and one build serves every release of torch
        "video": ["av>=14"],
    },
)
