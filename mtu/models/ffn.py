"""The routed feed-forward network and the transformer block around it.

The fused computation lives in `mtu_kernels`, routers in `mtu.models.router`.
"""

import functools
from typing import Any, Literal, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import Tensor, nn
from torch.nn import functional as F

from mtu.compat.plain_linear import is_plain_linear
from mtu.experts import ExpertConfig
from mtu.models.norm import TaskAffineTable
from mtu.models.router import Router, RoutingTable, TaskContext
from mtu_kernels import ExpertWeights, NormAffine, Routing, dense_weights, moe_ffn
from mtu_kernels.tracing import static_size

__all__ = [
    "TASK_CONTEXT_KEY",
    "Backend",
    "RoutedFeedForward",
    "RoutedTransformerBlock",
    "check_unet_upcyclable",
    "projections",
    "why_not_upcyclable",
]

# The backends of `mtu_kernels.moe_ffn`; "auto" takes the fastest one for each call.
Backend = Literal["auto", "cpp", "eager", "reference", "triton"]

# The task context travels under this key in `cross_attention_kwargs`. That is the one argument which diffusers passes
# from the UNet to every transformer block, also through gradient checkpointing; GLIGEN uses it in the same way.
TASK_CONTEXT_KEY = "mtu"


def why_not_upcyclable(block: BasicTransformerBlock) -> str | None:
    """The reason why this block cannot be upcycled, as a clause; None if it can be."""
    if block.norm_type != "layer_norm" or not isinstance(block.norm3, nn.LayerNorm):
        return f"its norm_type is {block.norm_type!r}, not 'layer_norm'"
    if not block.norm3.elementwise_affine:
        return "its norm3 has no affine to start the task norms from"
    if type(block.ff.net[0]) is not GEGLU:
        return f"its activation is {type(block.ff.net[0]).__name__}, not GEGLU"
    if block.pos_embed is not None or hasattr(block, "fuser"):
        return "it has positional embeddings or a GLIGEN fuser"
    for name, linear in (("ff.net.0.proj", block.ff.net[0].proj), ("ff.net.2", block.ff.net[2])):
        if not is_plain_linear(linear):
            kind = f"{type(linear).__module__.partition('.')[0]} {type(linear).__name__}"
            return f"{name} is a {kind}, not a plain nn.Linear (unload or fuse adapters; offload, quantize afterwards)"
    return None


def projections(feed_forward: FeedForward) -> tuple[nn.Linear, nn.Linear]:
    """The projections `net.0.proj` and `net.2` of a GEGLU feed-forward network without adapters."""
    return cast(GEGLU, feed_forward.net[0]).proj, cast(nn.Linear, feed_forward.net[2])


def check_unet_upcyclable(unet: UNet2DConditionModel) -> None:
    """Raise a ValueError unless the UNet has transformer blocks and each of them can be upcycled."""
    blocks = [(name, m) for name, m in unet.named_modules() if isinstance(m, BasicTransformerBlock)]
    if not blocks:
        raise ValueError(
            "This UNet has no feed-forward networks to upcycle: expected transformer blocks (BasicTransformerBlock), "
            f"but got the blocks {[*unet.config.down_block_types, unet.config.mid_block_type]}."
        )
    for name, block in blocks:
        reason = why_not_upcyclable(block)
        if reason is not None:
            raise ValueError(f"{name} cannot be upcycled: {reason}.")
    if unet.config.center_input_sample or unet.config.attention_type != "default":
        raise ValueError(
            "Only UNets with center_input_sample=False and attention_type='default' can be upcycled, but got "
            f"{unet.config.center_input_sample} and {unet.config.attention_type!r}."
        )


class RoutedFeedForward(FeedForward):
    """A GEGLU feed-forward network whose hidden units are grouped into experts, with its router.

        x̂ = LayerNorm(x) γ_t + β_t;   u, g = x̂ W_inᵀ + b_in;   y = Σ_e w_te · W_out,e (u_e · gelu(g_e)) + b_out

    `net.0.proj` (2H, D) and `net.2` (D, H) keep their diffusers names, types and, where H = 4D, values; expert e owns
    the hidden units `[eF, (e+1)F)`.

    Args:
        stock: the block's feed-forward network, whose modules become those of the new one.
        router: the Router or RoutingTable of this layer.
        config: the expert layout.
        eps: ε of the normalisation.
    """

    def __init__(self, stock: FeedForward, router: Router | RoutingTable, config: ExpertConfig, eps: float) -> None:
        # The constructor of FeedForward would build new layers, but this network takes over the stock ones.
        nn.Module.__init__(self)
        self.net = stock.net
        self.router = router
        self.num_experts = config.num_experts
        self.eps = eps
        self.backend: Backend = "auto"

    def forward(
        self, hidden_states: Tensor, affine: NormAffine, context: TaskContext, residual: bool = False
    ) -> Tensor:
        """Normalise and transform the tokens of each sample with the experts of its task.

        Args:
            hidden_states: (B, L, D), before the normalisation.
            affine: γ and β of each sample, (B, D) or (B, E, D) float32.
            context: the tasks of the samples.
            residual: whether to add `hidden_states` to the result; fused kernels add them before rounding.

        Returns:
            (B, L, D).
        """
        routing = context.routing_per_sample(self.router)
        if self._is_plain(hidden_states):
            return self._fused(hidden_states, affine, routing, residual)
        output = self._by_modules(hidden_states, affine, routing)
        return hidden_states + output if residual else output

    def _is_plain(self, hidden_states: Tensor) -> bool:
        if self.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.net):
            return False
        for linear in (self.net[0].proj, self.net[2]):
            if not is_plain_linear(linear):
                return False
            if hidden_states.dtype not in (linear.weight.dtype, torch.float32) and not torch.is_autocast_enabled(
                hidden_states.device.type
            ):
                return False
        return True

    def _fused(self, hidden_states: Tensor, affine: NormAffine, routing: Routing, residual: bool) -> Tensor:
        w_in, w_out = self.net[0].proj, self.net[2]
        experts = ExpertWeights(w_in.weight, w_in.bias, w_out.weight, w_out.bias, self.num_experts)
        return moe_ffn(hidden_states, affine, experts, routing, eps=self.eps, backend=self.backend, residual=residual)

    def _by_modules(self, hidden_states: Tensor, affine: NormAffine, routing: Routing) -> Tensor:
        activation, dropout, project_out = self.net[0], self.net[1], self.net[2]
        dtype = hidden_states.dtype
        unit = F.layer_norm(hidden_states.float(), (static_size(hidden_states.shape[-1]),), eps=self.eps)
        if affine.weight.dim() == 2:
            normed = unit * affine.weight[:, None] + affine.bias[:, None]
            hidden = activation(normed.to(dtype))
        else:
            # The wrapped Linear runs once for each expert's input, and only that expert's units are kept. This takes
            # E times the work of the fused path, but it is right for adapters of any kind.
            parts = []
            for expert in range(self.num_experts):
                normed = unit * affine.weight[:, expert, None] + affine.bias[:, expert, None]
                parts.append(activation(normed.to(dtype)).chunk(self.num_experts, dim=-1)[expert])
            hidden = torch.cat(parts, dim=-1)
        weights = dense_weights(routing, self.num_experts)
        # The weights are float32, so that the product is rounded once, as in the fused path.
        weighted = hidden.unflatten(-1, (self.num_experts, -1)) * weights[:, None, :, None]
        hidden = project_out(dropout(weighted.to(hidden.dtype).flatten(2)))
        for module in self.net[3:]:
            hidden = module(hidden)
        return hidden


class RoutedTransformerBlock(BasicTransformerBlock):
    """A diffusers transformer block whose feed-forward network is routed by task.

    Args:
        stock: the block; its modules are taken over.
        config: expert layout.
        num_tasks: T.
        routers_dropped: build routing tables in the place of routers.

    Raises:
        TypeError: the block's `norm3` is no LayerNorm, see `why_not_upcyclable`.
    """

    ff: RoutedFeedForward
    norm3: TaskAffineTable

    def __init__(
        self, stock: BasicTransformerBlock, config: ExpertConfig, num_tasks: int, routers_dropped: bool
    ) -> None:
        stock_norm = stock.norm3
        if not isinstance(stock_norm, nn.LayerNorm):
            raise TypeError(
                f"A routed transformer block needs a LayerNorm as norm3, but got {type(stock_norm).__name__}."
            )
        # The constructor of BasicTransformerBlock would build new layers, but this block takes over the stock ones.
        nn.Module.__init__(self)
        # It also takes over the plain attributes (sizes, flags), and registers the modules in their stock order.
        plain = {name: value for name, value in vars(stock).items() if not name.startswith("_") and name != "training"}
        for name, value in plain.items():
            setattr(self, name, value)
        for name, module in stock.named_children():
            self.add_module(name, module)
        self._chunk_size, self._chunk_dim = None, 1
        stock_hidden_width = stock.ff.net[2].in_features
        width = config.hidden_units_per_expert(stock_hidden_width)
        if width * config.num_experts != stock_hidden_width:
            stock.ff.net[0].proj = nn.Linear(self.dim, 2 * width * config.num_experts)
            stock.ff.net[2] = nn.Linear(width * config.num_experts, self.dim)
        router = RoutingTable(config, num_tasks) if routers_dropped else Router(config)
        num_norms = config.num_experts if config.norm == "task_expert" else None
        eps = stock_norm.eps
        self.norm3 = TaskAffineTable(num_tasks, self.dim, num_norms, eps)
        self.ff = RoutedFeedForward(stock.ff, router, config, eps)

    def set_chunk_feed_forward(self, chunk_size: int | None, dim: int = 0) -> None:
        """Run the feed-forward network over slices of `chunk_size` tokens.

        Raises:
            ValueError: `dim` is not 1. Slices of the batch (0) would separate samples from their routing.
        """
        if chunk_size is not None and dim != 1:
            raise ValueError(f"A routed feed-forward network can be chunked over tokens (dim=1) only, but got {dim}.")
        super().set_chunk_feed_forward(chunk_size, dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Run self-attention, cross-attention and the feed-forward network, each with its residual, as diffusers does.

        Args:
            hidden_states: (B, L, D).
            cross_attention_kwargs: the TaskContext under `TASK_CONTEXT_KEY`, and arguments of attention processors.

        Returns:
            (B, L, D).

        Raises:
            ValueError: there is no task context, as the block was not called by an upcycled UNet.
        """
        attention_kwargs = dict(cross_attention_kwargs or {})
        context = attention_kwargs.pop(TASK_CONTEXT_KEY, None)
        if context is None:
            raise ValueError(
                "A routed transformer block needs a task context in "
                f"cross_attention_kwargs[{TASK_CONTEXT_KEY!r}], but got "
                f"{sorted(attention_kwargs)}; call it through MTUUNet2DConditionModel."
            )
        hidden_states = hidden_states + self.attn1(
            self.norm1(hidden_states),
            encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
            attention_mask=attention_mask,
            **attention_kwargs,
        )
        if self.attn2 is not None and self.norm2 is not None:
            hidden_states = hidden_states + self.attn2(
                self.norm2(hidden_states),
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **attention_kwargs,
            )
        feed_forward = functools.partial(self.ff, affine=context.affine_per_sample(self.norm3), context=context)
        if self._chunk_size is not None:
            chunks = [feed_forward(part) for part in hidden_states.split(self._chunk_size, dim=1)]
            return hidden_states + torch.cat(chunks, dim=1)
        if self.ff._forward_hooks or self.ff._backward_hooks:
            # Forward hooks expect the FFN output without the residual, as in a stock block.
            return hidden_states + feed_forward(hidden_states)
        return feed_forward(hidden_states, residual=True)
