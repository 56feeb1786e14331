"""Folding one task back into a plain diffusers UNet."""

from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from mtu.compat import in_memory
from mtu.experts import stock_config
from mtu.models.settings import carry_settings_, unfused_state
from mtu_kernels import Routing, dense_weights

if TYPE_CHECKING:
    from mtu.models.ffn import RoutedTransformerBlock
    from mtu.models.unet import MTUUNet2DConditionModel

__all__ = ["export_task"]


@torch.no_grad()
def export_task(unet: "MTUUNet2DConditionModel", index: int, *, prune: bool = False) -> UNet2DConditionModel:
    """The stock UNet that computes what `unet` computes for task id `index`, on tensors of its own.

        W_out ← W_out · w_t (columns of each expert);   norm3 ← γ_t, β_t
        per-expert norms instead: b_in ← b_in + W_in,e β_te, W_in,e ← W_in,e ∘ γ_te, norm3 ← 1, 0

    Exact in real arithmetic; folded in float32, then cast. With top-k, the columns of inactive experts are zero.
    Settings (attention processors, FreeU, gradient checkpointing, …) are carried over; all parameters take gradients.

    Args:
        prune: drop the hidden units of inactive experts; the result is for in-memory use and graph export, as a
            stock configuration cannot describe its narrower FFNs.

    Returns:
        A `UNet2DConditionModel` with in_channels = 4 + the task's condition channels.

    Raises:
        ValueError: the hidden width is not that of a stock FFN, and `prune` is false; or the model holds adapters,
            quantized or sharded tensors, or settings that cannot be carried over, as hooks.
    """
    in_memory.check_plain(unet, "export_task")
    source = in_memory.in_memory(unet, computed=True)
    blocks = source.routed_blocks()
    for name, block in blocks.items():
        hidden, stock = block.ff.net[2].in_features, 4 * block.dim
        if hidden != stock and not prune:
            raise ValueError(
                f"{name} has {hidden} hidden units, but a stock configuration holds {stock}: pass prune=True for a "
                "model in memory."
            )
    channels = source.conv_in.latent_channels + unet.tasks[index].condition_channels
    state = unfused_state(source)
    for name in [key for key in state if ".ff.router." in key or key.startswith("task_embedding.")]:
        del state[name]
    state["conv_in.weight"] = state["conv_in.weight"][index, :, :channels]
    state["conv_in.bias"] = state["conv_in.bias"][index]
    embedding = None if source.task_embedding is None else source.task_embedding.weight
    widths = {}
    for name, block in blocks.items():
        for key, tensor in _folded_block(block, index, embedding, prune).items():
            state[f"{name}.{key}"] = tensor
        widths[name] = state[f"{name}.ff.net.2.weight"].shape[1]

    with init_empty_weights():
        exported = UNet2DConditionModel(**{**stock_config(unet), "in_channels": channels})
        for name, width in widths.items():
            feed_forward = exported.get_submodule(name).ff
            if width != feed_forward.net[2].in_features:
                feed_forward.net[0].proj = nn.Linear(feed_forward.net[0].proj.in_features, 2 * width)
                feed_forward.net[2] = nn.Linear(width, feed_forward.net[2].out_features)
    different = exported.state_dict().keys() ^ state.keys()
    if different:
        raise ValueError(
            f"Unload adapters before exporting: {len(different)} parameters are not those of a "
            f"stock UNet, for example {min(different)!r}."
        )
    carry_settings_(unet, exported)
    exported.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, assign=True)
    return exported.to(memory_format=torch.channels_last) if unet.is_channels_last else exported


def _folded_block(
    block: "RoutedTransformerBlock", index: int, embedding: Tensor | None, prune: bool
) -> dict[str, Tensor]:
    table = block.ff.router(embedding)
    routing = Routing(
        table.weights[index : index + 1], None if table.indices is None else table.indices[index : index + 1]
    )
    w_in, b_in, w_out = block.ff.net[0].proj.weight, block.ff.net[0].proj.bias, block.ff.net[2].weight
    experts, dtype = block.ff.num_experts, w_out.dtype
    hidden = w_out.shape[1]
    columns = dense_weights(routing, experts)[0].repeat_interleave(hidden // experts)
    folded = {}
    gamma, beta = block.norm3.weight[index], block.norm3.bias[index]
    if gamma.dim() == 2:
        # Rows of W_in: the values of all experts, then the gates of all experts.
        rows = torch.arange(experts, device=w_in.device).repeat_interleave(hidden // experts).repeat(2)
        shift = (w_in.float() * beta.float()[rows]).sum(-1)
        b_in = (b_in.float() + shift).to(dtype)
        w_in = (w_in.float() * gamma.float()[rows]).to(dtype)
        gamma, beta = torch.ones_like(gamma[0]), torch.zeros_like(beta[0])
    w_out = (w_out.float() * columns).to(dtype)
    if prune and routing.indices is not None:
        width = hidden // experts
        kept = torch.cat([torch.arange(e * width, (e + 1) * width) for e in sorted(routing.indices[0].tolist())])
        kept = kept.to(w_in.device)
        w_in, b_in = w_in[torch.cat([kept, kept + hidden])], b_in[torch.cat([kept, kept + hidden])]
        w_out = w_out[:, kept]
    folded["norm3.weight"], folded["norm3.bias"] = gamma, beta
    folded["ff.net.0.proj.weight"], folded["ff.net.0.proj.bias"] = w_in, b_in
    folded["ff.net.2.weight"] = w_out
    return folded
