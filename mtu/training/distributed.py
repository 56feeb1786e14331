"""Several processes in one training: gradients, sharded tensors, and what all processes must do or raise together.

Each process holds the whole model (DistributedDataParallel), or a shard of it (`fully_shard`). Sums over the processes
have an order that is fixed from the first step on, so a resumed training repeats them bit by bit. The trainer decides
which part of a batch a process computes. It calls these functions in one process, too.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from mtu.training.objective import Objective

__all__ = [
    "broadcast_tensors",
    "broadcast_text",
    "common_errors_context",
    "copy_whole_model",
    "delayed_reduction_context",
    "full_tensor",
    "gather_on_main_process",
    "gradient_norm",
    "is_sharded",
    "load_into",
    "local_tensor",
    "make_accelerator",
    "names_of_infinite_tensors",
    "sharded_like",
    "share_objective",
]

Model = TypeVar("Model", bound=ModelMixin)

# The other processes wait while the main process writes a checkpoint, so a slow disk must not look like a dead process.
_TIMEOUT = timedelta(hours=1)

# Errors that the other processes raise as the main process does, each after the classes that it includes.
_SHARED_ERRORS = (FileExistsError, FileNotFoundError, PermissionError, OSError, FloatingPointError, ValueError)


def make_accelerator(accelerator: Accelerator | None = None) -> Accelerator:
    """Make the Accelerator of a training, or check a given one.

    It tells the device and connects the processes. The training has settings of its own for precision, accumulation and
    sharding, so those of `accelerate launch` have no effect or are refused.

    Args:
        accelerator: an Accelerator to check; None: make one.

    Raises:
        ValueError: the processes were launched with FSDP, DeepSpeed or Megatron of accelerate.

    Warns:
        UserWarning: the processes were launched with mixed precision of accelerate, which has no effect.
    """
    # On CPUs, accelerate reads this variable and trains with DistributedDataParallel instead.
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "Processes launched with FSDP of accelerate (ACCELERATE_USE_FSDP) are not supported: launch them without "
            "it, and set `fully_shard: true` to shard the model."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if accelerator is None:
        # On a machine without a GPU, accelerate takes each process for the only one unless it is told to use CPUs.
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)],
        )
    else:
        precision = accelerator.mixed_precision
    if precision != "no":
        warnings.warn(
            f"The mixed precision {precision!r} of accelerate has no effect: set the training's precision instead.",
            stacklevel=2,
        )
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
    if accelerator.distributed_type not in supported:
        raise ValueError(
            f"accelerate's distributed type {accelerator.distributed_type.value} is not supported: expected one of "
            f"{', '.join(kind.value for kind in supported)}."
        )
    return accelerator


# ----------------------------------------------------------------------------------------------------------- gradients


def share_objective(accelerator: Accelerator, objective: Objective, fully_shard: bool) -> nn.Module:
    """Return a module whose backward pass averages the gradients over all processes.

    All processes begin with the weights of the main process. If these are sharded, the objective gets new parameters,
    so an optimizer must be built afterwards.

    Args:
        accelerator: tells the processes.
        objective: the objective, on the accelerator's device; if it is to be sharded, on any device.
        fully_shard: whether each process keeps a shard of the objective's models instead of the whole. Parameters with
            one row per task stay whole. A single process keeps the whole.

    Returns:
        The module to call in the place of the objective.

    Raises:
        ValueError: the objective has no sharding units.
    """
    if accelerator.num_processes > 1 and fully_shard:
        _shard_(objective, accelerator)
        return objective
    if accelerator.num_processes == 1:
        return objective
    # Unless it looks for unused parameters, DistributedDataParallel forms new buckets after the first step. A sum over
    # more than two processes depends on the buckets, and a resumed training would begin with the old ones.
    return DistributedDataParallel(
        objective,
        device_ids=None if accelerator.device.type == "cpu" else [accelerator.device],
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )


@contextlib.contextmanager
def delayed_reduction_context(accelerator: Accelerator, module: nn.Module, is_last_pass: bool) -> Iterator[None]:
    """Run the forward and the backward pass of a part of a batch within this context.

    Only the last pass of a step averages the gradients over the processes, those of the passes before included. Shards
    of gradients are averaged by each pass, because no process has room for all of them.

    Args:
        accelerator: tells the processes.
        module: the module that `share_objective` returned.
        is_last_pass: whether this is the last pass of the step.
    """
    if isinstance(module, DistributedDataParallel):
        with contextlib.nullcontext() if is_last_pass else module.no_sync():
            yield
        return
    yield
    if is_last_pass and accelerator.num_processes > 1:
        whole = [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        _average_gradients_(whole, accelerator.num_processes)


def _shard_(objective: Objective, accelerator: Accelerator) -> None:
    """Replace the parameters of the objective's models, except for those with a row per task, by their shards."""
    units = list(objective.sharding_units())
    if not units:
        raise ValueError(
            f"fully_shard needs an objective with sharding units, but {type(objective).__name__} has none."
        )
    rows = set(objective.row_parameters())
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for unit in units:
        _take_from_main_process_(unit.parameters(), accelerator)
        fully_shard(unit, mesh=mesh, ignored_params=rows)
    _take_from_main_process_(objective.parameters(), accelerator)
    for child in objective.children():
        if any(module is unit for module in child.modules() for unit in units):
            # Between two steps, the child has no backward pass after which its parameters would be freed.
            fully_shard(child, mesh=mesh, ignored_params=rows, reshard_after_forward=True)


def _take_from_main_process_(parameters: Iterable[Parameter], accelerator: Accelerator) -> None:
    """Move parameters to the device, and give them the values of the main process; sharded ones have them already."""
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            # Only contiguous parameters can be sharded, so those in the channels-last format leave it.
            parameter.data = broadcast_tensor(accelerator, parameter.data)


def _average_gradients_(parameters: Sequence[Parameter], num_processes: int) -> None:
    """Replace the gradients of parameters that each process holds as a whole by their mean, in a fixed order."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # Each process must send the same number of values.
        by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        parts = (flat / num_processes).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Compute the () L2 norm of all gradients together, sharded or not. All processes call it, and get the same."""
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    sharded = [local_tensor(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
    norm = nn.utils.get_total_norm(whole)
    if not sharded:
        return norm
    square = nn.utils.get_total_norm(sharded).square()
    torch.distributed.all_reduce(square)
    return (square + norm.square()).sqrt()


# ------------------------------------------------------------------------------------------------------------- tensors


def is_sharded(tensor: Tensor) -> bool:
    """Whether the processes share a tensor out."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, in the same memory; the tensor itself if it is whole."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(local: Tensor, parameter: Tensor) -> Tensor:
    """Return the parts that the processes hold of a tensor as one sharded tensor, if a parameter is sharded.

    Args:
        local: the part that this process holds; its shape is that of the parameter's part.
        parameter: the parameter.
    """
    if not isinstance(parameter, DTensor):
        return local
    place = {"device_mesh": parameter.device_mesh, "placements": parameter.placements}
    return DTensor.from_local(local, **place, run_check=False, shape=parameter.shape, stride=parameter.stride())


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor, or gather it if it is sharded; all processes call this together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def load_into(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor of the same shape, of which this process may hold only a part.

    Args:
        tensor: the tensor.
        values: the values of the whole tensor, the same in all processes.
    """
    if isinstance(tensor, DTensor):
        # Without a source, the processes exchange nothing.
        values = values.to(tensor.device)
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    local_tensor(tensor).copy_(values)


@torch.no_grad()
def gather_on_main_process(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather tensors on the CPU of the main process, one after the other; all processes call this together.

    Args:
        accelerator: tells the processes.
        tensors: the tensors by name, sharded or not.

    Returns:
        In the main process the whole tensors; in the others nothing. Tensors that are not sharded stay where they are.
    """
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = full_tensor(tensor)
        if accelerator.is_main_process:
            gathered[name] = whole.cpu() if isinstance(tensor, DTensor) else whole
    return gathered


def copy_whole_model(accelerator: Accelerator, model: Model) -> Model | None:
    """Return a whole copy of a model of diffusers that may be sharded, on the CPU; all processes call this together.

    Args:
        accelerator: tells the processes.
        model: the model.

    Returns:
        The copy in the main process, for example to save it; None in the others.
    """
    values = gather_on_main_process(accelerator, model.state_dict())
    values = {name: value.to("cpu", copy=True) for name, value in values.items()}
    if not accelerator.is_main_process:
        return None
    with init_empty_weights():
        # The class of a sharded model makes models of the original class.
        copy = type(model)(**{key: value for key, value in model.config.items() if not key.startswith("_")})
    copy.load_state_dict(values, assign=True)
    return copy.train(model.training)


# ----------------------------------------------------------------------------------------------------------- agreement


def broadcast_tensor(accelerator: Accelerator, tensor: Tensor, source: int = 0) -> Tensor:
    """Send a tensor of one process to all processes.

    Args:
        accelerator: tells the processes.
        tensor: the tensor; in the other processes, a tensor of the same shape and dtype, whose values do not matter.
        source: the process that sends it.

    Returns:
        The tensor, on the accelerator's device.
    """
    tensor = tensor.detach().to(accelerator.device).contiguous()
    if accelerator.num_processes > 1:
        torch.distributed.broadcast(tensor, src=source)
    return tensor


def broadcast_text(accelerator: Accelerator, text: str, source: int = 0) -> str:
    """Send a text of one process to all processes, and return it; those of the other processes do not matter."""
    if accelerator.num_processes == 1:
        return text
    values = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
    length = int(broadcast_tensor(accelerator, torch.tensor(len(values)), source))
    if accelerator.process_index != source:
        values = torch.empty(length, dtype=torch.uint8)
    return bytes(broadcast_tensor(accelerator, values, source).cpu().numpy()).decode().strip()


def broadcast_tensors(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Send named tensors of the main process to the CPUs of all processes; those of the others do not matter."""
    if accelerator.num_processes == 1:
        return dict(tensors)
    layout = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
    received = {}
    for name, (dtype, shape) in json.loads(broadcast_text(accelerator, json.dumps(layout))).items():
        if accelerator.is_main_process:
            broadcast_tensor(accelerator, tensors[name])
            received[name] = tensors[name]
        else:
            received[name] = broadcast_tensor(accelerator, torch.empty(shape, dtype=getattr(torch, dtype))).cpu()
    return received


@torch.no_grad()
def names_of_infinite_tensors(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold a value that is not finite, sharded ones in any process.

    All processes call this with the same names, and get the same.
    """
    if not tensors:
        return []
    # An optimizer counts its steps on the CPU, whatever the device of its other tensors.
    device = next((tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"), torch.device("cpu"))
    finite = torch.stack([local_tensor(tensor).isfinite().all().to(device) for tensor in tensors.values()]).int()
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return [name for name, is_finite in zip(tensors, finite.tolist(), strict=True) if not is_finite]


@contextlib.contextmanager
def common_errors_context(accelerator: Accelerator) -> Iterator[None]:
    """Raise an error that one process meets within this context in all processes, so that none waits for the others.

    All processes enter the context. What they do together within it must fail in all of them or in none.

    Args:
        accelerator: tells the processes.

    Raises:
        Exception: the error. Processes without one raise an error of the same class as that of the first process that
            has one, with the same message, or a RuntimeError.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if accelerator.num_processes > 1:
        first = torch.tensor(accelerator.num_processes if error is None else accelerator.process_index)
        first = first.to(accelerator.device)
        torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        source = int(first)
        if source == accelerator.num_processes:
            return
        kinds = {kind.__name__: kind for kind in _SHARED_ERRORS}
        name = next((name for name, kind in kinds.items() if isinstance(error, kind)), "RuntimeError")
        name, _, message = broadcast_text(accelerator, f"{name}: {error}", source).partition(": ")
        if error is None:
            error = kinds.get(name, RuntimeError)(message)
    if error is not None:
        raise error
