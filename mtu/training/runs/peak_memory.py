"""The memory that a training step takes at its peak, computed before any weight is loaded.

The step runs once on fake tensors, which have shapes but no values, and every storage is counted from its creation to
its release. That takes seconds. The result is what torch asks its allocator for: the context of CUDA, the workspaces of
cuDNN and cuBLAS, and gaps between the allocator's blocks come on top. So do a VAE and text encoders on the same device.
"""

import copy
import functools
import weakref
from typing import Any, Literal, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

# The documentation of torch imports the class from this module.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtu.example_inputs import fill_in_height_and_width, make_example_inputs
from mtu.models.unet import MTUUNet2DConditionModel

__all__ = ["StepSettings", "TrainingMemory", "peak_training_memory"]

# Optimizers with 8-bit states keep them in blocks with a float32 scale each, and small tensors in float32.
_SCALED_BLOCK = 256
_LEAST_8BIT_ELEMENTS = 4096

# Backends whose operators save their pre-activations, and whose backward pass needs memory inside the operator.
_FUSED_OPERATORS = "mtu_kernels.moe_ffn_"


class StepSettings(NamedTuple):
    """The settings of a training step that its memory depends on, for one process.

    Args:
        batch_size: the examples of one forward pass: those of a step, divided by the processes and by the steps of
            gradient accumulation.
        height, width: the size of the images in pixels; None: the UNet's own.
        pixels_per_latent: the factor of the VAE.
        autocast_dtype: the compute dtype; None: that of the parameters.
        frozen_dtype: the dtype of the parameters that are not trained; None: as they are.
        gradient_checkpointing: whether blocks are computed again in the backward pass.
        accumulates_gradients: whether a step has several backward passes, so that gradients are held all the time.
        keeps_average: whether a float32 average of the trained parameters is kept.
        optimizer: "adamw", or "adamw8bit" with moments of 8 bits.
        num_processes: the number of processes.
        fully_shard: whether the processes share the tensors out by `torch.distributed.fsdp.fully_shard`, in units of
            one transformer block. Otherwise each process holds all of them, and the gradients all the time, because
            they lie in the buffers of the exchange.
        device_type: "cuda" or "cpu"; autocast rounds other operators on each.
    """

    batch_size: int = 1
    height: int | None = None
    width: int | None = None
    pixels_per_latent: int = 8
    autocast_dtype: torch.dtype | None = None
    frozen_dtype: torch.dtype | None = None
    gradient_checkpointing: bool = False
    accumulates_gradients: bool = False
    keeps_average: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    num_processes: int = 1
    fully_shard: bool = False
    device_type: Literal["cuda", "cpu"] = "cuda"


class TrainingMemory(NamedTuple):
    """The bytes that a process holds at the peak of a training step, by their use.

    Attributes:
        weights: all parameters and buffers.
        gradients: the gradients of the trained parameters.
        optimizer: the moments.
        average: the average of the trained parameters.
        activations: what the peak holds beyond these: activations, copies of weights in the compute dtype, and the
            buffers of the exchange between processes.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all parts: the peak."""
        return sum(self)

    @property
    def training_state(self) -> int:
        """Gradients, optimizer and average: what training holds beyond the model."""
        return self.gradients + self.optimizer + self.average


def peak_training_memory(unet: UNet2DConditionModel, settings: StepSettings) -> TrainingMemory:
    """Compute the memory of one training step of a UNet: forward and backward pass, and the optimizer's step.

    Args:
        unet: a UNet on any device, such as the meta device; it stays as it is, and its values are not read. Parameters
            that require gradients are trained.
        settings: the settings of the step.

    Returns:
        The bytes at the peak, by their use.

    Raises:
        ValueError: the UNet trains no parameter, takes other inputs than text and the sizes of SDXL, or has no size.

    Example:
        >>> with torch.device("meta"):
        ...     unet = mtu.upcycle(UNet2DConditionModel.from_config(config), init="paper")
        >>> settings = StepSettings(autocast_dtype=torch.bfloat16, gradient_checkpointing=True)
        >>> peak_training_memory(unet, settings).total
    """
    trained = [p for p in unet.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("This UNet trains no parameter: expected some that require gradients.")
    weights = [(t, _stored_dtype(t, settings)) for t in (*unet.parameters(), *unet.buffers())]
    weight_bytes = sum(t.numel() * dtype.itemsize for t, dtype in weights)
    gradient_bytes = sum(p.numel() * p.dtype.itemsize for p in trained)
    averaged = sum(p.numel() * max(4, p.dtype.itemsize) for p in trained) if settings.keeps_average else 0
    state = TrainingMemory(weight_bytes, gradient_bytes, _optimizer_bytes(trained, settings), averaged, 0)

    held_throughout = settings.accumulates_gradients or settings.num_processes > 1
    # What the forward and the backward pass hold beyond the weights, and beyond gradients that are there throughout.
    passes = _peak_of_passes(unet, settings, held_throughout) - (0 if held_throughout else gradient_bytes)
    if settings.num_processes > 1 and settings.fully_shard:
        n = settings.num_processes
        state = TrainingMemory(*(-(-part // n) for part in state))
        passes += _unsharded_bytes(unet, settings)
    # The fused kernels of the optimizer's step need no memory of their own.
    return state._replace(activations=max(0, passes))


def _stored_dtype(tensor: Tensor, settings: StepSettings) -> torch.dtype:
    frozen = settings.frozen_dtype is not None and tensor.is_floating_point() and not tensor.requires_grad
    return settings.frozen_dtype if frozen and settings.frozen_dtype is not None else tensor.dtype


def _optimizer_bytes(trained: list[nn.Parameter], settings: StepSettings) -> int:
    if settings.optimizer == "adamw":
        return sum(2 * p.numel() * p.dtype.itemsize for p in trained)
    sizes = [p.numel() for p in trained]
    return sum(2 * (n + 4 * -(-n // _SCALED_BLOCK)) if n >= _LEAST_8BIT_ELEMENTS else 8 * n for n in sizes)


def _unsharded_bytes(unet: UNet2DConditionModel, settings: StepSettings) -> int:
    """The bytes that `fully_shard` gathers: all outside of the units, and two units, of which one is fetched ahead.

    Their gradients are held whole until they are reduced, once more in the buffer of that exchange.
    """
    units = unet.routed_blocks_by_name().values() if isinstance(unet, MTUUNet2DConditionModel) else ()
    inside = {id(p) for unit in units for p in unit.parameters()}

    def gathered(parameters: Any) -> int:
        sizes = [(p.numel() * _stored_dtype(p, settings).itemsize, p.requires_grad) for p in parameters]
        return sum(size * (3 if trained else 1) for size, trained in sizes)

    root = gathered(p for p in unet.parameters() if id(p) not in inside)
    return root + 2 * max((gathered(unit.parameters()) for unit in units), default=0)


def _peak_of_passes(unet: UNet2DConditionModel, settings: StepSettings, held_throughout: bool) -> int:
    """The most bytes that forward and backward pass hold beyond those that were held before."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _copy_without_values(unet, settings, mode)
    with mode:
        height, width = fill_in_height_and_width(model, settings.height, settings.width, settings.pixels_per_latent)
        size = {"height": height // settings.pixels_per_latent, "width": width // settings.pixels_per_latent}
        inputs = make_example_inputs(model, settings.batch_size, channels=model.conv_in.in_channels, **size)
        if isinstance(model, MTUUNet2DConditionModel):
            inputs["task_ids"] = torch.zeros(settings.batch_size, dtype=torch.int64)
        if held_throughout:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with StorageCounter() as counter:
            for tensor in tree_leaves([list(model.parameters()), [p.grad for p in model.parameters()], inputs]):
                counter.ignore(tensor)
            with torch.autocast("cpu", settings.autocast_dtype, enabled=settings.autocast_dtype is not None):
                predicted = model(**inputs).sample.float()
                loss = F.mse_loss(predicted, torch.zeros_like(predicted))
            del predicted
            loss.backward()
    return counter.peak


def _copy_without_values(
    unet: UNet2DConditionModel, settings: StepSettings, mode: FakeTensorMode
) -> UNet2DConditionModel:
    """A copy of a UNet in training mode with fake parameters."""
    tensors: dict[int, Any] = {}
    with mode:
        for tensor in (*unet.parameters(), *unet.buffers()):
            fake = torch.empty(tensor.shape, dtype=_stored_dtype(tensor, settings), device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    # Other tensors are small and keep their values; the mode could not copy them.
    model = copy.deepcopy(unet, tensors).train()
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    else:
        model.disable_gradient_checkpointing()
    if settings.device_type == "cuda" and settings.autocast_dtype is not None:
        for module in model.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.forward = functools.partial(_forward_in_float32, module)
    if settings.device_type == "cuda" and isinstance(model, MTUUNet2DConditionModel):
        for layer in model.routed_feed_forwards():
            # The operators of this backend are those of a GPU in shape, and every installation has them.
            layer.backend = "eager" if layer.backend == "eager" else "reference"
    return model


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of the storages that operators make within this context, for as long as they are alive.

    Attributes:
        held: bytes at the moment.
        peak: the most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._bytes_by_id: dict[int, int] = {}

    def ignore(self, tensor: Tensor | None) -> None:
        """Leave a tensor out, because it was there before."""
        if tensor is not None:
            self._remember(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._bytes_by_id:
                    self._remember(storage, storage.nbytes())
        if str(func).startswith(_FUSED_OPERATORS):
            self.peak = max(self.peak, self.held + _workspace_bytes(str(func), args))
        return results

    def _remember(self, storage: torch.UntypedStorage, size: int) -> None:
        # torch returns the same object for a storage as long as the storage is alive, so the object ends with it.
        self._bytes_by_id[id(storage)] = size
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, id(storage)).atexit = False

    def _forget(self, key: int) -> None:
        self.held -= self._bytes_by_id.pop(key)


def _workspace_bytes(operator: str, args: tuple) -> int:
    """What a fused feed-forward operator holds inside, beyond its arguments and results."""
    tensors = [argument for argument in args if isinstance(argument, Tensor)]
    if "_backward" in operator:
        x, w_out = tensors[1], tensors[6]
        rows, hidden = x.shape[0] * x.shape[1], w_out.shape[1]
        # The weighted activations, the gradient of the pre-activations, x̂ and its gradient.
        return rows * (3 * hidden + 2 * x.shape[2]) * w_out.dtype.itemsize
    x, w_out = tensors[0], tensors[5]
    rows, hidden = x.shape[0] * x.shape[1], w_out.shape[1]
    # The weighted activations and x̂.
    return rows * (hidden + x.shape[2]) * w_out.dtype.itemsize


def _forward_in_float32(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    """The forward of a norm as autocast runs it on GPUs; on CPUs it keeps the dtype of its input."""
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(hidden_states.float(), norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(hidden_states.float(), norm.normalized_shape, weight, bias, norm.eps)
