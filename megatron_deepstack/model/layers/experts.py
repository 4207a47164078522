"""Experts in place of the MLP: Megatron-Core's MoE layer with the router and the balancing loss of published models.

The router works in float32: softmax over all experts, the largest few, and their weights made to sum to 1, which is the
same as a softmax over the largest logits alone. Tokens go to the ranks of their experts and back by Megatron's
all-to-all. An expert is never split over tensor parallelism; ranks of tensor parallelism send their own parts of the
sequence, as data-parallel ranks send theirs.

The balancing loss (Fedus et al., arXiv 2101.03961, equations 4 to 6, with several experts for a token) is

    loss = mean over the layers with experts of  E * sum over experts e of  f_e * P_e

of one sample: f_e is the mean over its tokens of whether e was chosen, P_e the mean probability of e. Each sample
counts by its targets, as it does in the loss of the text, so neither packing nor layout changes the sum. (transformers
means f_e and P_e over all layers before it multiplies, which a pipeline cannot compute; with one layer both are equal.)

Legend: K samples of a micro-batch, T tokens of this rank, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import cache
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_deepstack.config.choices import RecomputeModule
from megatron_deepstack.config.schema import LanguageConfig, ParallelConfig
from megatron_deepstack.config.sizes import expert_layers
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.parallel.reduce import sum_over_group


class ExpertProducts(StrEnum):
    """How the matrix products of the experts of a rank are computed."""

    GROUPED = "grouped"
    """All experts in one product of groups, by Transformer Engine."""
    SEQUENTIAL = "sequential"
    """One expert after another."""


def expert_products(*, engine: bool) -> ExpertProducts:
    """Decide how experts are computed.

    Args:
        engine: Whether the decoder's layers are Transformer Engine's, which need a GPU.

    Returns:
        Grouped products where Transformer Engine can run them, otherwise one expert after another.
    """
    return ExpertProducts.GROUPED if engine else ExpertProducts.SEQUENTIAL


def expert_settings(language: LanguageConfig, parallel: ParallelConfig, *, engine: bool) -> dict[str, Any]:
    """Return the fields of Megatron's config that concern experts.

    Args:
        language: The decoder.
        parallel: The layout.
        engine: Whether the layers are Transformer Engine's.

    Returns:
        Values by the names of `TransformerConfig`; none for a decoder without experts.
    """
    layers = expert_layers(language)
    if not layers:
        return {}
    return {
        "num_moe_experts": language.num_experts,
        "moe_ffn_hidden_size": language.expert_ffn_hidden_size,
        "moe_router_topk": language.num_active_experts,
        "moe_router_pre_softmax": language.num_active_experts == 1,  # Megatron's condition; the router sets it right
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": expert_products(engine=engine) is ExpertProducts.GROUPED,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
        "moe_layer_freq": 1
        if len(layers) == language.num_layers
        else [int(layer in layers) for layer in range(language.num_layers)],
    }


def require_expert_activation(again: Collection[RecomputeModule], *, engine: bool) -> None:
    """Make sure that what experts compute between their linears can be computed again, where that is wanted.

    Args:
        again: The parts of layers that are computed again.
        engine: Whether the layers are Transformer Engine's.

    Raises:
        ConfigError: Experts are computed one after another here.
    """
    part = RecomputeModule.EXPERT_ACTIVATION
    if part in again and expert_products(engine=engine) is not ExpertProducts.GROUPED:
        raise ConfigError(
            [
                f"parallel.recompute_modules: {part} needs experts in grouped products, by Transformer Engine, which "
                f"does not run here; use {RecomputeModule.MLP}, which computes all of a layer's experts again"
            ]
        )


def balance_factor(language: LanguageConfig) -> float:
    """Return what one layer's sum of f_e * P_e is multiplied by in the loss, see the module's docstring."""
    layers = expert_layers(language)
    return language.balance_loss * language.num_experts / len(layers) if layers else 0.0


def membership_on_device(owners_T: torch.Tensor, sizes_K2: torch.Tensor) -> torch.Tensor:
    """Put together what the balancing loss needs to know of the samples of a micro-batch.

    Args:
        owners_T: int64, the number of the sample that each token belongs to, -1 for padding.
        sizes_K2: int64, targets and tokens of each sample.

    Returns:
        float32 (K, T + 1): 1 where a token belongs to a sample; and in the last column the sample's targets over its
        tokens squared, since two means over its tokens are multiplied.
    """
    belongs_KT = torch.arange(len(sizes_K2), device=owners_T.device)[:, None] == owners_T
    targets_K, tokens_K = sizes_K2.float().unbind(dim=1)
    return torch.cat([belongs_KT.float(), (targets_K / tokens_K.clamp(min=1) ** 2)[:, None]], dim=1)


class BalancedRouter(TopKRouter):
    """Megatron's router, with the balancing loss of the published models."""

    balance_factor: float = 0.0
    membership_KT: torch.Tensor | None = None
    """Whose the tokens are, (K, T + 1) as `membership_on_device` gives it; None where no gradient is wanted.
    The layer sets it for the length of one forward."""
    tally_E1: torch.Tensor | None = None
    """float32 (E + 1,): gets how many tokens chose each expert, and last the sum of f_e * P_e; see `expert_load`."""

    def routing(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As TopKRouter's. The gradient of the balancing loss enters with that of the weights.

        Collective over tp and cp where it does.

        Args:
            logits: (S, B, E), float32.
            *args: What Megatron's router takes.
            **kwargs: The same.

        Returns:
            Weights of the experts, (T, E), and whether each was chosen, boolean (T, E).
        """
        weights_TE, chosen_TE = super().routing(logits, *args, **kwargs)
        if self.topk == 1:
            weights_TE = weights_TE / weights_TE.sum(dim=-1, keepdim=True)
        # Recomputed layers run forward for a gradient once as well: in their first pass gradients are off.
        if self.membership_KT is None or not torch.is_grad_enabled():
            return weights_TE, chosen_TE
        balance = self._balance(logits.reshape(-1, logits.shape[-1]), chosen_TE, self.membership_KT)
        if not self.balance_factor:
            return weights_TE, chosen_TE
        return MoEAuxLossAutoScaler.apply(weights_TE, self.balance_factor * balance), chosen_TE

    def _balance(self, logits_TE: torch.Tensor, chosen_TE: torch.Tensor, membership_KT: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum of f_e * P_e of a micro-batch, each sample times its targets; and the tally."""
        belongs_KT, scale_K = membership_KT[:, :-1], membership_KT[:, -1]
        own_KE = belongs_KT @ chosen_TE.to(belongs_KT.dtype)
        own_E = own_KE.sum(dim=0)
        counts_KE = sum_over_group(own_KE, self.tp_cp_group)
        probabilities_KE = belongs_KT @ torch.softmax(logits_TE.float(), dim=-1)
        balance = (scale_K[:, None] * counts_KE * probabilities_KE).sum()
        if self.tally_E1 is not None:
            self.tally_E1 += torch.cat([own_E, balance.detach()[None]])
        return balance


class ExpertLayer(MoELayer):
    """Megatron's MoE layer, which gets the samples of its tokens in place of a mask of padding.

    Megatron's block hands `padding_mask` unchanged through recomputation, and to layers in general; nothing of it is a
    mask here: see `BalancedRouter.membership_KT`, and `membership_at_hand`.
    """

    parts: MoESubmodules
    factor: float
    moe_layer_recompute: bool
    membership_KT: torch.Tensor | None = None
    """What `membership_at_hand` says."""

    def __init__(self, config: Any, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(config, submodules=self.parts, pg_collection=pg_collection, **kwargs)
        assert isinstance(self.router, BalancedRouter)
        self.router.balance_factor = self.factor
        self.recomputed, self.moe_layer_recompute = self.moe_layer_recompute, False

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: Any = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """As MoELayer's: (S, B, H) to (S, B, H) and no bias. Collective over ep, and over tp and cp with a membership.

        Args:
            hidden_states: (S, B, H).
            intermediate_tensors: Of Megatron's captured graphs; there are none here.
            padding_mask: The membership of the tokens, (K, T + 1); None takes the one at hand, if there is one.
            **kwargs: What later versions add.
        """
        assert intermediate_tensors is None, "experts are not captured in CUDA graphs here"
        if padding_mask is None:
            padding_mask = self.membership_KT
        # Megatron refuses to train where tensor-parallel ranks hold the same tokens, as they do for answers.
        self.training = torch.is_grad_enabled()

        def whole(hidden_states: torch.Tensor, membership_KT: torch.Tensor | None) -> torch.Tensor:
            self.router.membership_KT = membership_KT
            try:
                output, _ = super(ExpertLayer, self).forward(hidden_states, **kwargs)
            finally:
                self.router.membership_KT = None
                self._forget_graph()
            return output

        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(whole, False, hidden_states, padding_mask), None
        return whole(hidden_states, padding_mask), None

    def _forget_graph(self) -> None:
        """Let go of what Megatron's dispatcher keeps of a forward pass that is over.

        It is a part of the graph, whose leaves' hooks lead back to this layer: a cycle through C++ which Python's
        collector does not see, so that a model, its process groups and their threads would outlive the run.
        """
        for name, value in vars(self.token_dispatcher).items():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(self.token_dispatcher, name, None)


@contextmanager
def membership_at_hand(layers: Sequence[ExpertLayer], membership_KT: torch.Tensor | None) -> Iterator[None]:
    """Let layers know whose tokens they get in a forward pass, also where Megatron's block does not hand it on.

    In megatron-core 0.16 the layers that `recompute_method: block` does not recompute get no `padding_mask`. Those it
    recomputes do: they run again when forward passes of other micro-batches have come between.

    Args:
        layers: A chunk's layers with experts.
        membership_KT: As `membership_on_device` gives it, or None.
    """
    for layer in layers:
        layer.membership_KT = membership_KT
    try:
        yield
    finally:
        for layer in layers:
            layer.membership_KT = None


@cache
def expert_mlp(factor: float, *, engine: bool) -> type:
    """Return the MLP's place in the spec of a layer with experts.

    Args:
        factor: See `balance_factor`.
        engine: Whether the layers are Transformer Engine's.

    Returns:
        A class that is built as both supported versions of Megatron build an MLP.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # megatron-core 0.16 asks whether it is None, also where it was not imported
    grouped = expert_products(engine=engine) is ExpertProducts.GROUPED
    found = get_moe_module_spec_for_backend(_backend(engine), num_experts=1, moe_grouped_gemm=grouped)
    parts = found.submodules if isinstance(found, ModuleSpec) else found.keywords["submodules"]
    parts.router, parts.shared_experts = BalancedRouter, None
    return type("ExpertLayer", (ExpertLayer,), {"parts": parts, "factor": factor})


def _backend(engine: bool) -> Any:
    if not engine:
        return LocalSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
