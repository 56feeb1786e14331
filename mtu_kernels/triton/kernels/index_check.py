"""The check of expert indices on the device: one kernel tests that they are in range and distinct."""

# Triton declares that a sum may be a tuple, and that a comparison is a bool, but both are tensors here.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtu_kernels.triton.launch import Launch, LaunchDevice, next_power_of_2


@triton.jit
def index_check_kernel(indices_ptr, valid_ptr, B, K, E, SLOTS: tl.constexpr, SAMPLES: tl.constexpr):
    """Sets valid to 1 if each row has K different numbers in [0, E), else to 0. It runs as one program."""
    slot_S = tl.arange(0, SLOTS)
    wrong = 0
    for first in range(0, B, SAMPLES):
        sample_B = first + tl.arange(0, SAMPLES)
        mask_BS = (sample_B < B)[:, None] & (slot_S < K)[None, :]
        index_BS = tl.load(indices_ptr + sample_B[:, None] * K + slot_S[None, :], mask=mask_BS, other=0)
        outside_BS = mask_BS & ((index_BS < 0) | (index_BS >= E))
        wrong += tl.sum(outside_BS.to(tl.int32))
        same_BSS = index_BS[:, :, None] == index_BS[:, None, :]
        pair_BSS = mask_BS[:, :, None] & mask_BS[:, None, :] & (slot_S[:, None] < slot_S[None, :])[None, :, :]
        wrong += tl.sum((same_BSS & pair_BSS).to(tl.int32))
    tl.store(valid_ptr, (wrong == 0).to(tl.int8))


def launch_index_check(indices: Tensor, valid: Tensor, num_experts: int) -> Launch:
    """indices (B, K) contiguous → valid (1,) int8."""
    B, K = indices.shape
    slots = next_power_of_2(K)
    # About 1024 pairs are compared at a time.
    constants = {"SLOTS": slots, "SAMPLES": max(1, min(64, 1024 // slots**2))}
    return Launch(index_check_kernel, 1, (indices, valid, B, K, num_experts), constants, 4, 1)


def indices_valid_flag(indices: Tensor, num_experts: int, machine: LaunchDevice) -> Tensor:
    """Whether indices (B, K) are valid, as a flag (1,) bool on their device."""
    valid = torch.empty(1, dtype=torch.int8, device=indices.device)
    machine.run_launch(launch_index_check(indices.contiguous(), valid, num_experts))
    return valid.view(torch.bool)
