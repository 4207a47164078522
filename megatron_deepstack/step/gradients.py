"""Gradient buffers that are not cleared before a step: the first gradient of a parameter is copied, later ones added.

Megatron's buffers are filled with zeros in each step, and each gradient is added to them. That writes them once more
than necessary. Here a parameter's part is only marked as unwritten; whatever got no gradient in a step is cleared
before ranks add up their buffers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.cuda_graphs import is_graph_capturing

from megatron_deepstack.platform.compute.device import has_gpu


class GradientBuffers(DistributedDataParallel):
    """Megatron's wrapper of a module, whose buffers are overwritten by the first gradients of a step."""

    unwritten: set[torch.nn.Parameter]
    """Parameters without a gradient since the step began."""

    @property
    def _written_by_kernels(self) -> bool:
        """Whether the linears' kernels add gradients to the buffers themselves, which must then be zeros before."""
        return bool(self.config.gradient_accumulation_fusion) and has_gpu()

    def zero_grad_buffer(self) -> None:
        """Begin a step. Not collective."""
        if self._written_by_kernels:
            self.unwritten = set()
            super().zero_grad_buffer()
            return
        self.unwritten = set(self.params_with_grad)
        for parameter in self.params_with_grad:
            parameter.grad_added_to_main_grad = False
        for group in self.bucket_groups + self.expert_parallel_bucket_groups:
            group.reset()

    def finish_grad_sync(self, *args: object, **kwargs: object) -> None:
        """Add up the buffers of the ranks. Collective over the data-parallel ranks.

        Args:
            *args: What Megatron passes.
            **kwargs: The same.
        """
        for parameter in self.unwritten:
            parameter.main_grad.zero_()  # type: ignore[attr-defined]
        self.unwritten = set()
        super().finish_grad_sync(*args, **kwargs)

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        """Megatron's hook, which finds the first gradient of a step in the buffer already."""
        add = super()._make_backward_post_hook(param)

        def copy_or_add(*unused: object) -> None:
            if is_graph_capturing():
                return
            if param.grad is None or param not in self.unwritten:
                add()
                return
            self.unwritten.discard(param)
            if getattr(param, "zero_out_wgrad", False):  # an embedding that is the head too: Megatron adds in any case
                param.main_grad.zero_()  # type: ignore[attr-defined]
                add()
                return
            param.main_grad.copy_(param.grad)  # type: ignore[attr-defined]
            param.grad_added_to_main_grad = True  # type: ignore[attr-defined]
            add()
            param.grad_added_to_main_grad = False  # type: ignore[attr-defined]

        return copy_or_add
