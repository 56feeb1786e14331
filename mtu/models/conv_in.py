"""The task input convolution: one `conv_in` per task in one tensor, so that a batch may mix tasks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtu.models.router import select_rows
from mtu.models.task_rows import PerTaskModule

__all__ = ["TaskConvIn"]


class TaskConvIn(PerTaskModule):
    """Per-sample 2-D convolution `y[b] = weight[t_b] ∗ x[b] + bias[t_b]`, stride 1, same size.

    The kernels of all tasks are padded with zeros to the widest task. The layer computes one batched product over
    unfolded patches, whose cost does not depend on the number of tasks.

    Args:
        condition_channels: the condition channels of each task. Task t reads the channels
            `[0, latent_channels + condition_channels[t])`.
        latent_channels: the channels of the noisy latents.
        out_channels: C.
        kernel_size: odd edge length k.

    Parameters: weight (T, C, Cin, k, k) with Cin the widest task's channels, bias (T, C).
    """

    def __init__(
        self, condition_channels: Sequence[int], latent_channels: int, out_channels: int, kernel_size: int
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.kernel_size = kernel_size
        self.channels_per_task = tuple(latent_channels + count for count in condition_channels)
        tasks, widest = len(self.channels_per_task), max(self.channels_per_task)
        self.weight = nn.Parameter(torch.zeros(tasks, out_channels, widest, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(tasks, out_channels))
        # (T,) int64. It is no buffer, as offloading would leave a buffer on the meta device or move it by itself. The
        # counts follow from the configuration, so they are made wherever they are needed.
        self.channel_counts = self._counted("cpu")

    @property
    def in_channels(self) -> int:
        """Cin, the channels of the widest task."""
        return max(self.channels_per_task)

    def forward(self, sample: Tensor, task_ids: Tensor | None = None, *, channels_last: bool = False) -> Tensor:
        """Convolve each sample with the kernel of its task.

        Args:
            sample: (B, c, H, W) with latent_channels ≤ c ≤ Cin. Missing channels count as zero, and channels beyond
                a task's own are ignored.
            task_ids: (B,) int64. None returns `sample` unchanged: the upcycled UNet has called this layer with
                task_ids, and the stock forward then calls it again with the result alone.
            channels_last: whether the result is in the channels-last memory format.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: the sample has too few or too many channels.
        """
        if task_ids is None:
            return sample
        _, given, height, width = sample.shape
        self.check_channel_count(given)
        # A product with zero would keep infinite values of ignored channels as NaN, but `where` does not.
        channels = self._channels_on(sample.device)
        own = torch.arange(given, device=sample.device) < channels[task_ids][:, None]
        sample = torch.where(own[:, :, None, None], sample, 0.0)
        # Layerwise casting does not cast this layer, so its dtype may be wider than that of the sample.
        kernels = select_rows(self.weight[:, :, :given], task_ids).flatten(2).to(sample.dtype)
        patches = F.unfold(sample, self.kernel_size, padding=self.kernel_size // 2)
        bias = select_rows(self.bias, task_ids).to(sample.dtype)
        if channels_last:
            # The result of this product has its channels in the last dimension, which is the layout asked for.
            output = torch.baddbmm(bias[:, None], patches.transpose(1, 2), kernels.transpose(1, 2))
            return output.view(-1, height, width, bias.shape[1]).permute(0, 3, 1, 2)
        return torch.baddbmm(bias[:, :, None], kernels, patches).view(-1, bias.shape[1], height, width)

    def check_channel_count(self, num_channels: int) -> None:
        """Raise a ValueError unless a sample may have this many channels."""
        if not self.latent_channels <= num_channels <= self.in_channels:
            raise ValueError(
                f"sample must have {self.latent_channels} to {self.in_channels} channels (latents, then the condition "
                f"image), but got {num_channels}."
            )

    def _apply(self, fn, recurse: bool = True):
        # `.to(memory_format=torch.channels_last)` also converts tensors of five dimensions, which torch refuses. So
        # `fn` gets the kernels of all tasks as one tensor of four dimensions, and the product's own layout is kept.
        def by_kernel(tensor: Tensor) -> Tensor:
            if tensor.dim() != 5:
                return fn(tensor)
            return fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2]).contiguous()

        super()._apply(by_kernel, recurse)
        self.move_channel_counts_to_own_device_()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.move_channel_counts_to_own_device_()

    def move_channel_counts_to_own_device_(self) -> None:
        """Move the channel counts to the parameters' device; needed only after parameters were set one by one."""
        # Parameters on the meta device are offloaded or have no values yet, so the counts stay where they are.
        device = self.channel_counts.device if self.weight.is_meta else self.weight.device
        channels = self._counted(device)
        if (self.channel_counts.shape, self.channel_counts.device) == (channels.shape, channels.device):
            # CUDA graphs read them at this address.
            self.channel_counts.copy_(channels)
        else:
            self.channel_counts = channels

    def _channels_on(self, device: torch.device) -> Tensor:
        """The channel counts on the sample's device, where they then stay; offloading does not tell it beforehand."""
        if self.channel_counts.device == device:
            return self.channel_counts
        if torch.compiler.is_compiling():
            return self.channel_counts.to(device)
        # After a call on the meta device the old tensor has no values, so it is not copied.
        self.channel_counts = self._counted(device)
        return self.channel_counts

    def _counted(self, device: torch.device | str) -> Tensor:
        # A tensor that is made in inference mode cannot be written to outside it.
        with torch.inference_mode(False):
            return torch.tensor(self.channels_per_task, device=device)

    @torch.no_grad()
    def select_task_rows_(self, old_task_ids: Sequence[int], condition_channels: Sequence[int] | None = None) -> None:
        """Make the old row `old_task_ids[i]` the new row i, in new parameters.

        Args:
            old_task_ids: the old task id of each new one.
            condition_channels: the condition channels of each new task; None: those of the old rows. Channels that the
                old row did not have start at zero.
        """
        old_channels = [self.channels_per_task[row] for row in old_task_ids]
        channels = old_channels
        if condition_channels is not None:
            channels = [self.latent_channels + count for count in condition_channels]
        super().select_task_rows_(old_task_ids)
        old = self.weight
        weight = old.new_zeros(*old.shape[:2], max(channels), *old.shape[3:])
        for i, counts in enumerate(zip(channels, old_channels, strict=True)):
            weight[i, :, : min(counts)] = old[i, :, : min(counts)]
        self.weight = nn.Parameter(weight, old.requires_grad)
        self.channels_per_task = tuple(channels)
        self.move_channel_counts_to_own_device_()
