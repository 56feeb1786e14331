"""Adding and removing tasks, and what becomes of routers without which no more can come: the per-task tensors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mtu.compat import in_memory
from mtu.models.conv_in import TaskConvIn
from mtu.models.norm import TaskLayerNorm
from mtu.models.router import RoutingTable, TaskEmbedding
from mtu.tasks import TaskSpec

if TYPE_CHECKING:
    from mtu.models.unet import MTUUNet2DConditionModel

__all__ = ["add_task", "check_surgery", "drop_routers_", "get_task_rows", "remove_task", "set_task_rows_"]


def add_task(unet: "MTUUNet2DConditionModel", spec: TaskSpec, source: int) -> int:
    """Append `spec`, starting from the rows of task id `source`; returns its id.

    Raises:
        ValueError: a task of that name exists, or the routers were dropped.
    """
    if not isinstance(spec, TaskSpec):
        raise TypeError(f"add_task takes a TaskSpec, but got {type(spec).__name__}.")
    if spec.name in [task.name for task in unet.tasks]:
        raise ValueError(f"A task named {spec.name!r} exists already; expected a new name.")
    if unet.task_embedding is None:
        raise ValueError("No task can be added once the routers are dropped: expected a model with routers.")
    check_surgery(unet, "add_task")
    specs = (*unet.tasks, spec)
    _select_rows_(unet, specs, [*range(len(unet.tasks)), source])
    return len(specs) - 1


def remove_task(unet: "MTUUNet2DConditionModel", index: int) -> None:
    """Remove the task with id `index`.

    Raises:
        ValueError: it is the last one.
    """
    specs = unet.tasks
    if len(specs) == 1:
        raise ValueError(f"{specs[0].name!r} is the only task of this model: a model needs at least one.")
    check_surgery(unet, "remove_task")
    kept = [i for i in range(len(specs)) if i != index]
    _select_rows_(unet, tuple(specs[i] for i in kept), kept)


@torch.no_grad()
def drop_routers_(unet: "MTUUNet2DConditionModel") -> None:
    """Replace the routers and the task embedding by their output.

    Raises:
        ValueError: they are dropped already, or under group offloading.
    """
    if unet.task_embedding is None:
        raise ValueError("The routers of this model were dropped already; expected a model with routers.")
    in_memory.check_no_group_hooks(unet, "drop_routers_")
    embedding = unet.embedding_table(unet.task_device)
    for layer in unet.routed_layers():
        routing = layer.router(embedding)
        table = RoutingTable(unet.expert_config, len(unet.tasks)).to(routing.weights.device)
        table.weights.copy_(routing.weights)
        if table.indices is not None:
            table.indices.copy_(routing.indices)
        layer.router = table.train(layer.training)
    unet.task_embedding = None
    unet.register_to_config(routers_dropped=True)


def check_surgery(unet: "MTUUNet2DConditionModel", action: str) -> None:
    """Raise a ValueError unless what is put in the place of per-task tensors reaches the calls of the model."""
    in_memory.check_no_hooks(unet, action)
    _check_rows(unet, action)


def get_task_rows(unet: "MTUUNet2DConditionModel", index: int) -> dict[str, Tensor]:
    """The tensors that task id `index` alone owns, under the names of the packed ones.

    Raises:
        ValueError: what holds them is wrapped, or they are sharded or without values.
    """
    _check_rows(unet, "reading a task's rows")
    in_memory.check_values(unet, "Reading a task's rows")
    tensors = in_memory.read_tensors(unet, _packed_tensors(unet))
    return {name: tensor[index] for name, tensor in tensors.items()}


@torch.no_grad()
def set_task_rows_(unet: "MTUUNet2DConditionModel", index: int, rows: dict[str, Tensor]) -> None:
    """Overwrite what task id `index` owns; a narrower input convolution is padded with zeros."""
    packed = _packed_tensors(unet)
    for name, row in rows.items():
        target = packed[name][index]
        target.zero_()
        target[tuple(slice(size) for size in row.shape)].copy_(row)
    _release_routing(unet)


def _check_rows(unet: "MTUUNet2DConditionModel", action: str) -> None:
    owners = [(f"{name}.norm3", block.norm3, TaskLayerNorm) for name, block in unet.routed_blocks().items()]
    owners.append(("conv_in", unet.conv_in, TaskConvIn))
    if unet.task_embedding is not None:
        owners.append(("task_embedding", unet.task_embedding, TaskEmbedding))
    for name, module, kind in owners:
        if type(module) is not kind:
            raise ValueError(
                f"Unload adapters before {action}: {name} is a {type(module).__name__} around what it was."
            )
        in_memory.check_plain(module, action)


def _release_routing(unet: "MTUUNet2DConditionModel") -> None:
    """Have routers run again also within `hold_routing`: what they held is of other tasks."""
    for router in unet.routers():
        router.release()
        router.invalidate()


def _packed_tensors(unet: "MTUUNet2DConditionModel") -> dict[str, Tensor]:
    owners = [(name, m) for name, m in unet.named_modules() if isinstance(m, TaskLayerNorm | TaskConvIn | RoutingTable)]
    if unet.task_embedding is not None:
        owners.append(("task_embedding", unet.task_embedding))
    return {f"{name}.{key}": tensor for name, module in owners for key, tensor in module.state_dict().items()}


@torch.no_grad()
def _select_rows_(unet: "MTUUNet2DConditionModel", specs: tuple[TaskSpec, ...], rows: Sequence[int]) -> None:
    """Make `specs` the tasks, the new task i starting from the old row `rows[i]`."""
    index = torch.tensor(rows, device=unet.task_device)
    for module in unet.modules():
        if isinstance(module, TaskLayerNorm):
            module.weight = nn.Parameter(module.weight[index], module.weight.requires_grad)
            module.bias = nn.Parameter(module.bias[index], module.bias.requires_grad)
        elif isinstance(module, RoutingTable):
            module.select_rows_(index)
    if unet.task_embedding is not None:
        weight = unet.task_embedding.weight
        unet.task_embedding.weight = nn.Parameter(weight[index], weight.requires_grad)
    conv = unet.conv_in
    counts = [spec.condition_channels for spec in specs]
    old_counts = [unet.tasks[row].condition_channels for row in rows]
    old = conv.weight[index]
    weight = old.new_zeros(*old.shape[:2], conv.latent_channels + max(counts), *old.shape[3:])
    for i, count in enumerate(counts):
        width = conv.latent_channels + min(count, old_counts[i])
        weight[i, :, :width] = old[i, :, :width]
    conv.set_rows_(weight, conv.bias[index], counts)
    unet.register_to_config(tasks=[spec.to_dict() for spec in specs])
    _release_routing(unet)
