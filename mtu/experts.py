"""The split of feed-forward networks into experts: its settings, and the arithmetic of hidden units.

An upcycled model keeps these settings in its configuration beside the stock ones, which `stock_config` returns. The
initial weights of routers live in `mtu.models.initial_routing`.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

__all__ = ["ExpertConfig", "NormMode", "stock_config"]

NormMode = Literal["task", "task_expert"]


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """The expert layout of every feed-forward network (FFN) of an upcycled model.

    A stock FFN has 4D hidden units. The upcycled FFN has E·F slots for them, where F = G · 4D, and expert e owns the
    slots `[eF, (e+1)F)`. The units are split (E·G = 1), truncated or tiled; see `stock_unit_indices`.

    Args:
        num_experts: E.
        top_k: K, the number of active experts per task; None: all of them (dense routing).
        expert_ratio: G = F / 4D; 1/E keeps the parameter count.
        norm: "task" (one LayerNorm per task) or "task_expert" (one per task and expert).
        routing_scale: routing weights are `routing_scale · softmax(…)`; 1/G preserves the function.
        router_width: the width of task embeddings and routers.

    Raises:
        ValueError: a value is out of its range.

    Source: MTU (arXiv 2503.11905) §3, except for `routing_scale`, by which this library preserves the function.
    """

    num_experts: int
    top_k: int | None
    expert_ratio: float
    norm: NormMode
    routing_scale: float
    router_width: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ExpertConfig":
        """Read the layout from the configuration of an upcycled model."""
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})

    def __post_init__(self) -> None:
        _check_positive_int("num_experts", self.num_experts)
        _check_positive_int("router_width", self.router_width)
        if self.top_k is not None:
            _check_positive_int("top_k", self.top_k)
            if self.top_k > self.num_experts:
                raise ValueError(f"top_k must be at most num_experts = {self.num_experts}, but got {self.top_k}.")
        if self.norm not in ("task", "task_expert"):
            raise ValueError(f"norm must be 'task' or 'task_expert', but got {self.norm!r}.")
        for name in ("expert_ratio", "routing_scale"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be a positive number, but got {value!r}.")

    @property
    def has_dense_routing(self) -> bool:
        """Whether every expert is active for every task."""
        return self.top_k is None or self.top_k == self.num_experts

    @property
    def num_active_experts(self) -> int:
        """K, the number of experts that run for a task."""
        return self.num_experts if self.top_k is None else self.top_k

    @property
    def experts_hold_whole_ffn(self) -> bool:
        """Whether G ≥ 1: each expert holds all hidden units, and all experts start as the same function."""
        return self._ratio >= 1

    def hidden_units_per_expert(self, stock_hidden_width: int) -> int:
        """F, the number of hidden units of one expert.

        Args:
            stock_hidden_width: 4D, the hidden units of the stock FFN.

        Raises:
            ValueError: E does not divide the units, or G times the units is not a whole number.
        """
        if stock_hidden_width % self.num_experts:
            raise ValueError(
                f"num_experts must divide the hidden width of every FFN, but {self.num_experts} does not divide "
                f"{stock_hidden_width}."
            )
        width = self._ratio * stock_hidden_width
        if width.denominator != 1 or width < 1:
            raise ValueError(
                f"expert_ratio times the hidden width must be a whole number ≥ 1, but {self.expert_ratio} · "
                f"{stock_hidden_width} = {float(width):g}."
            )
        return int(width)

    def stock_unit_indices(self, stock_hidden_width: int) -> Tensor | None:
        """The index of the stock unit that each slot of the upcycled FFN starts from.

        Slot s starts from unit `s mod 4D`. With G < 1, two experts could get the same units in this way, as with E = 4
        and G = 1/2, and training could never make them different. In that case slot i of expert e starts from unit
        `(e · 4D/E + i) mod 4D`.

        Args:
            stock_hidden_width: 4D.

        Returns:
            (E·F,) int64; None if the slots are the stock units in order.
        """
        width = self.hidden_units_per_expert(stock_hidden_width)
        if width * self.num_experts == stock_hidden_width:
            return None
        starts = width * torch.arange(self.num_experts) % stock_hidden_width
        if not self.experts_hold_whole_ffn and len(starts.unique()) < self.num_experts:
            starts = stock_hidden_width // self.num_experts * torch.arange(self.num_experts)
        return ((starts[:, None] + torch.arange(width)) % stock_hidden_width).flatten()

    def output_column_scales(self, stock_hidden_width: int) -> Tensor | None:
        """The factor of each slot's output column that preserves the function of the stock FFN.

        With G ≥ 1, every expert holds the whole FFN. If expert e has n_ej copies of unit j, the factor `1 / (n_ej ·
        routing_scale)` preserves the function for any initial routing weights. With G < 1, dense routing starts at
        w = routing_scale / E, so unit j with n_j copies in all gets the factor `E / (n_j · routing_scale)`.

        Args:
            stock_hidden_width: 4D.

        Returns:
            (E·F,) float64; None if all factors are 1.
        """
        units = self.stock_unit_indices(stock_hidden_width)
        if units is None:
            units = torch.arange(stock_hidden_width)
        if self.experts_hold_whole_ffn:
            per_expert = units.view(self.num_experts, -1)
            counts = [torch.bincount(row, minlength=stock_hidden_width)[row] for row in per_expert]
            copies = torch.cat(counts)
            scale = 1.0 / (copies.double() * self.routing_scale)
        else:
            copies = torch.bincount(units, minlength=stock_hidden_width)[units]
            scale = self.num_experts / (copies.double() * self.routing_scale)
        return None if torch.allclose(scale, torch.ones_like(scale), rtol=1e-12, atol=0) else scale

    def why_output_not_preserved(self) -> str | None:
        """The reason why no initialisation can preserve the original's output, as a clause; None if one can."""
        if not self.has_dense_routing and not self.experts_hold_whole_ffn:
            return f"top_k = {self.top_k} of {self.num_experts} experts with expert_ratio = {self.expert_ratio:g} < 1"
        if self.expert_ratio * self.num_experts < 1 - 1e-9:
            return f"expert_ratio = {self.expert_ratio:g} < 1/num_experts drops hidden units"
        return None

    @property
    def _ratio(self) -> Fraction:
        # A float cannot be exactly 1/3, so this takes the nearest fraction with a small denominator.
        return Fraction(self.expert_ratio).limit_denominator(4096)


def stock_config(unet: UNet2DConditionModel) -> dict[str, Any]:
    """The entries of a UNet's configuration that are arguments of `UNet2DConditionModel`."""
    known = inspect.signature(UNet2DConditionModel.__init__).parameters
    return {name: value for name, value in unet.config.items() if name in known}


def _check_positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer ≥ 1, but got {value!r}.")
