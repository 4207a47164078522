"""The section `speed`: fusions and overlaps, which change how fast a step is and not what it computes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_deepstack.config.choices import GradientDtype, Layers, OptIn, Switch


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedConfig:
    """Fusions and overlaps. `auto` follows what NVIDIA's recipes for H100 do, where this machine and its packages can;
    docs/performance.md has a table of all with their sources."""

    fusions: Switch = Switch.AUTO
    """`never` switches off all fusions below that are `auto`, to look for a fault or to measure what they bring;
    `always` demands every one of them."""
    activation_fusion: Switch = Switch.AUTO
    """Compute the activation of an MLP together with its gate or bias in one kernel, in decoder and tower. It saves
    passes over memory and keeps less for the backward pass. It needs a compiler, and is `auto` only on GPUs."""
    rope_fusion: Switch = Switch.AUTO
    """Rotate queries and keys in one kernel of Transformer Engine. Without it, packed rows make the host wait for the
    GPU in each layer if the layers are Transformer Engine's."""
    gradient_accumulation_fusion: Switch = Switch.AUTO
    """Add the gradients of the decoder's matrices to their buffer in the matrix product itself. It needs Transformer
    Engine or Apex, and is not used with LoRA, whose matrices are frozen."""
    cross_entropy_fusion: Switch = Switch.AUTO
    """Compute the loss in fewer kernels and with one all-reduce less. Its gradients are bf16, so it is not used under
    `precision: fp32`."""
    optimizer_fusion: Switch = Switch.AUTO
    """Update each group of parameters in one kernel. Transformer Engine's or Apex's AdamW does so where installed;
    otherwise this is PyTorch's fused AdamW, on GPUs and on CPUs."""
    vision_layers: Layers = Layers.AUTO
    """Layers of the vision tower: Transformer Engine's or Megatron's local ones, both with fused attention. `auto` is
    what `model.layers` builds for the decoder."""
    overlap_p2p: Switch = Switch.AUTO
    """Send activations between stages while chunks compute. It needs `parallel.virtual_pipeline` above 1."""
    overlap_param_gather: Switch = Switch.AUTO
    """Gather updated parameters of the decoder bucket by bucket during the next forward pass. It needs
    `parallel.distributed_optimizer` and `parallel.overlap_grad_reduce`."""
    synchronize_p2p: bool = False
    """Let the host wait for the GPU after each exchange between stages, as Megatron-Core does by default for the sake
    of old versions of PyTorch."""
    gradient_dtype: GradientDtype = GradientDtype.FP32
    """Number format in which gradients are added up and reduced over ranks. bf16 halves their memory and traffic, and
    loses small terms of long sums."""
    cuda_graphs: OptIn = OptIn.NEVER
    """Launch each decoder layer as one CUDA graph, which spares the host the work of launching kernels. All
    micro-batches must have one shape: it needs `train.batching: padded` with `train.row_length: full`, Transformer
    Engine's layers, bf16 and one chunk per stage, and goes with neither recomputation nor `parallel.offload_layers`. It
    takes memory of its own. No GPU has run it yet."""
    tp_overlap: OptIn = OptIn.NEVER
    """Exchange activations between tensor-parallel ranks beside matrix products, in buffers of Transformer Engine
    (Megatron's `tp_comm_overlap`). It needs `parallel.tensor` above 1 with `parallel.sequence_parallel`, Transformer
    Engine's layers and `train.row_length: full`. No GPU has run it yet."""
