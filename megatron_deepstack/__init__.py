"""Distributed, pipeline-parallel training of DeepStack multimodal language models."""

__version__ = "0.1.0"
