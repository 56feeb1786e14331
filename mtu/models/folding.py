"""Folding one task of an upcycled UNet into a plain diffusers UNet.

This is arithmetic on tensors alone; `MTUUNet2DConditionModel.export_task` also carries settings over.
"""

from typing import cast

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from mtu.experts import stock_config
from mtu.models.conv_in import TaskConvIn
from mtu.models.ffn import RoutedTransformerBlock, projections
from mtu.models.settings import unfused_state_dict
from mtu_kernels import Routing, dense_weights

__all__ = ["stock_unet_and_folded_tensors"]


@torch.no_grad()
def stock_unet_and_folded_tensors(
    unet: UNet2DConditionModel, task_id: int, embedding: Tensor | None, *, prune: bool = False
) -> tuple[UNet2DConditionModel, dict[str, Tensor]]:
    """Fold task `task_id` of an upcycled UNet into a stock UNet with the same output.

        W_out ← W_out · w_t (columns of each expert);   norm3 ← γ_t, β_t
        per-expert norms instead: b_in ← b_in + W_in,e β_te, W_in,e ← W_in,e ∘ γ_te, norm3 ← 1, 0

    Folding is exact in real arithmetic. It is computed in float32 and then cast. With top-k, the columns of inactive
    experts are zero.

    Args:
        unet: an upcycled UNet whose tensors are in memory, in the dtype that the layers compute in.
        task_id: the task.
        embedding: (T, W) the task embedding; None once the routers are dropped.
        prune: whether to drop the hidden units of inactive experts. A stock configuration cannot describe the
            narrower FFNs.

    Returns:
        The UNet on the meta device, and the tensors to load into it, which may share memory with those of `unet`.

    Raises:
        ValueError: the hidden width is not that of a stock FFN and `prune` is false, or the UNet has adapters.
    """
    blocks = {name: block for name, block in unet.named_modules() if isinstance(block, RoutedTransformerBlock)}
    for name, block in blocks.items():
        hidden, stock = projections(block.ff)[1].in_features, 4 * block.dim
        if hidden != stock and not prune:
            raise ValueError(
                f"{name} has {hidden} hidden units, but a stock configuration holds {stock}: pass prune=True for a "
                "model in memory."
            )
    state = unfused_state_dict(unet)
    for name in [key for key in state if ".ff.router." in key or key.startswith("task_embedding.")]:
        del state[name]
    channels = cast(TaskConvIn, unet.conv_in).channels_per_task[task_id]
    state["conv_in.weight"] = state["conv_in.weight"][task_id, :, :channels]
    state["conv_in.bias"] = state["conv_in.bias"][task_id]
    for name, block in blocks.items():
        for key, tensor in _folded_block(block, task_id, embedding, prune).items():
            state[f"{name}.{key}"] = tensor

    with init_empty_weights():
        folded = UNet2DConditionModel(**{**stock_config(unet), "in_channels": channels})
        for name in blocks:
            feed_forward = cast(BasicTransformerBlock, folded.get_submodule(name)).ff
            width, (project_in, project_out) = state[f"{name}.ff.net.2.weight"].shape[1], projections(feed_forward)
            if width != project_out.in_features:
                feed_forward.net[0].proj = nn.Linear(project_in.in_features, 2 * width)
                feed_forward.net[2] = nn.Linear(width, project_out.out_features)
    different = folded.state_dict().keys() ^ state.keys()
    if different:
        raise ValueError(
            f"Unload adapters before exporting: {len(different)} parameters are not those of a "
            f"stock UNet, for example {min(different)!r}."
        )
    return folded, state


def _folded_block(
    block: RoutedTransformerBlock, task_id: int, embedding: Tensor | None, prune: bool
) -> dict[str, Tensor]:
    table = block.ff.router(embedding)
    routing = Routing(
        table.weights[task_id : task_id + 1], None if table.indices is None else table.indices[task_id : task_id + 1]
    )
    project_in, project_out = projections(block.ff)
    w_in, b_in, w_out = project_in.weight, project_in.bias, project_out.weight
    experts, dtype = block.ff.num_experts, w_out.dtype
    hidden = w_out.shape[1]
    columns = dense_weights(routing, experts)[0].repeat_interleave(hidden // experts)
    folded = {}
    gamma, beta = block.norm3.weight[task_id], block.norm3.bias[task_id]
    if gamma.dim() == 2:
        # The rows of W_in are the values of all experts, followed by the gates of all experts.
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
