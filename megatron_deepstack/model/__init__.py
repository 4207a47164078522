"""ViT, projector, stacking, injection and language model, built on Megatron-Core's layers."""
