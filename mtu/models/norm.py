"""The task norm: the per-task affines of the normalisation before a feed-forward network.

The normalisation itself is part of the fused feed-forward network (`mtu_kernels`).
"""

import torch
from torch import Tensor, nn

from mtu.models.router import select_rows
from mtu.models.task_rows import PerTaskModule
from mtu_kernels import NormAffine

__all__ = ["TaskAffineTable"]


class TaskAffineTable(PerTaskModule):
    """γ and β of every task: a call selects those of each sample, and the feed-forward network normalises.

    Args:
        num_tasks: T.
        dim: D.
        num_experts: E for one affine per task and expert; None for one per task.
        eps: ε of the normalisation.

    Parameters: weight and bias, (T, D) or (T, E, D).
    """

    def __init__(self, num_tasks: int, dim: int, num_experts: int | None, eps: float) -> None:
        super().__init__()
        shape = (num_tasks, dim) if num_experts is None else (num_tasks, num_experts, dim)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, task_ids: Tensor) -> NormAffine:
        """The affine of each sample.

        Args:
            task_ids: (B,) int64.

        Returns:
            γ and β, (B, D) or (B, E, D) float32.
        """
        return NormAffine(select_rows(self.weight, task_ids).float(), select_rows(self.bias, task_ids).float())
