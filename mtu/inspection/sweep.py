"""The expert layouts of a model under a parameter budget, and the paper's recipe for choosing one."""

import os
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from diffusers import UNet2DConditionModel

from mtu.experts import ExpertConfig, NormMode
from mtu.inspection.counting import Flops, count_flops, count_parameters
from mtu.inspection.inspected_model import load_inspected_model
from mtu.inspection.reports import Report, flop_counting_note, format_count, format_flops
from mtu.models.unet import MTUUNet2DConditionModel

__all__ = ["LayoutCost", "LayoutSweep", "sweep_layouts"]

_EXPERTS = (1, 2, 4, 8, 16)
_RATIOS = (Fraction(1, 4), Fraction(1, 2), Fraction(1))

_RECIPE = (
    "1. Start with input convolutions, task norms and one expert",
    "2. If that underperforms, raise N with smaller experts",
    "3. Or keep full-size experts and add more, as the budget allows",
)

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)([KMBx]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class LayoutCost(NamedTuple):
    """One expert layout of a sweep, with its parameters and FLOPs.

    Attributes:
        num_experts, expert_ratio: N and G.
        top_k: K; None for dense routing.
        parameters: parameters after `drop_routers_`, which a budget bounds.
        parameters_with_routers: parameters during training.
        trained_parameters: parameters that training changes.
        flops, flops_with_attention: FLOPs of a task without condition channels, without routers.
        preserves_output: whether initialisation can preserve the output of the original.
        num_idle_experts: number of experts that top-k routing must leave without a task, and so without a gradient.
        recipe_step: step of the paper's recipe, 1 to 3, that the layout belongs to; None if it belongs to none.
        within_budget: whether `parameters` fit the budget.
    """

    num_experts: int
    expert_ratio: Fraction
    top_k: int | None
    parameters: int
    parameters_with_routers: int
    trained_parameters: int
    flops: int
    flops_with_attention: int
    preserves_output: bool
    num_idle_experts: int
    recipe_step: int | None
    within_budget: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the layout and its cost as JSON values."""
        return {
            "num_experts": self.num_experts,
            "expert_ratio": float(self.expert_ratio),
            "top_k": self.top_k,
            "parameters": self.parameters,
            "parameters_with_routers": self.parameters_with_routers,
            "trained_parameters": self.trained_parameters,
            "flops": self.flops,
            "flops_with_attention": self.flops_with_attention,
            "preserved": self.preserves_output,
            "idle_experts": self.num_idle_experts,
            "step": self.recipe_step,
            "within_budget": self.within_budget,
        }

    def __str__(self) -> str:
        routing = "" if self.top_k is None else f" top-{self.top_k}"
        return f"N = {self.num_experts} G = {self.expert_ratio}{routing} ({format_count(self.parameters)})"


class LayoutSweep(NamedTuple):
    """All expert layouts of one model, and the paper's recipe for a budget.

    Attributes:
        model_name: name of the model.
        image_size, latent_size: edges of the image and of the latents for which FLOPs are counted.
        parameter_budget: highest number of parameters.
        original_parameters, original_flops: parameters and FLOPs of the stock model.
        layouts: the layouts by N, then G, including those beyond the budget.
        recipe_lines: the three steps of the recipe, a line each.
    """

    model_name: str
    image_size: int
    latent_size: int
    parameter_budget: int
    original_parameters: int
    original_flops: int
    layouts: tuple[LayoutCost, ...]
    recipe_lines: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the sweep as JSON values."""
        layouts = [
            {
                **layout.to_dict(),
                "ratio": layout.parameters / self.original_parameters,
                "flop_ratio": layout.flops / self.original_flops,
            }
            for layout in self.layouts
        ]
        return {
            "model": self.model_name,
            "size": self.image_size,
            "latent_size": self.latent_size,
            "budget": self.parameter_budget,
            "original_parameters": self.original_parameters,
            "original_flops": self.original_flops,
            "layouts": layouts,
            "recipe": list(self.recipe_lines),
        }

    def report(self) -> Report:
        """A table of the layouts within the budget, with notes on its numbers and the recipe."""
        fitting = [layout for layout in self.layouts if layout.within_budget]
        beyond = [layout for layout in self.layouts if not layout.within_budget]
        header = [
            "N",
            "G",
            "routing",
            "parameters",
            "ratio",
            "with routers",
            "trained",
            "FLOPs",
            "ratio",
            "+ attention",
        ]
        lines = [[*header, "preserved", "idle", "step"]]
        for layout in fitting:
            cells = [str(layout.num_experts), str(layout.expert_ratio)]
            cells += ["dense" if layout.top_k is None else f"top-{layout.top_k}"]
            cells += [format_count(layout.parameters), f"{layout.parameters / self.original_parameters:.3f}"]
            cells += [format_count(layout.parameters_with_routers), format_count(layout.trained_parameters)]
            cells += [format_flops(layout.flops), f"{layout.flops / self.original_flops:.3f}"]
            cells += [format_flops(layout.flops_with_attention), "yes" if layout.preserves_output else "no"]
            lines.append([*cells, str(layout.num_idle_experts or "-"), str(layout.recipe_step or "-")])
        rest = "No layout goes beyond the budget."
        if beyond:
            least = min(beyond, key=lambda layout: layout.parameters)
            rest = f"{len(beyond)} more layouts go beyond the budget, from {least} on."
        summary = (
            f"{self.model_name}: N experts of G times the FFN within {format_count(self.parameter_budget)} parameters "
            f"once routers are dropped (original: {format_count(self.original_parameters)})."
        )
        notes = [
            rest,
            "Preserved: training starts from the output of the original.",
            "Idle: experts that top-k routing leaves without a task, and so without a gradient.",
            flop_counting_note(self.image_size, self.latent_size),
            "Routers, which run once per call whatever the batch, are left out.",
            "",
            "The paper's recipe (section 8) for this budget:",
            *self.recipe_lines,
        ]
        return Report(summary, lines, "\n".join(notes))


def sweep_layouts(
    model: str | os.PathLike | UNet2DConditionModel,
    budget: str | int,
    *,
    norm: NormMode | None = None,
    size: int = 512,
    vae_scale_factor: int | None = None,
) -> LayoutSweep:
    """Count parameters and FLOPs of all expert layouts, and fit the paper's recipe to a budget.

        N ∈ {1, 2, 4, 8, 16},  G ∈ {1/N, 1/4, 1/2, 1},  dense routing, and top-k routing with K·G = 1 where K < N

    These top-k layouts have the active parameters and FLOPs of the original. Only the model of one full-size expert is
    counted. The others follow from it, because all hidden units cost the same.

    Args:
        model: "sd15", "sdxl", a UNet, or the folder of a UNet or a pipeline. The layouts of an upcycled model are those
            of its original.
        budget: highest number of parameters after `drop_routers_`: a number, "860M", "1.2B", or a multiple of the
            original's, "1.05x".
        norm: the norm mode, as in `upcycle`; None: the mode of an upcycled model, else "task".
        size, vae_scale_factor: as in `compare_with_original`.

    Returns:
        The sweep; `print(sweep.report())` shows it.

    Raises:
        ValueError: the folder does not exist or does not hold a UNet, the budget is no number, or no layout fits it.

    Source: MTU (arXiv 2503.11905) §8.
    """
    inspected = load_inspected_model(model)
    latent_size = inspected.compute_latent_size(size, vae_scale_factor)
    stock = inspected.build_stock()
    original = count_parameters(stock)
    limit = _parse_budget(budget, original)
    if norm is None:
        norm = "task" if inspected.upcycled_unet is None else inspected.upcycled_unet.expert_config.norm
    one_expert = inspected.build_upcycled(num_experts=1, norm=norm)
    layouts = _layouts(one_expert, limit, count_flops(one_expert, stock.config.in_channels, latent_size))
    if not any(layout.within_budget for layout in layouts):
        least = min(layouts, key=lambda layout: layout.parameters)
        raise ValueError(f"No layout fits into {format_count(limit)} parameters: the smallest is {least}.")
    flops = count_flops(stock, stock.config.in_channels, latent_size).layers
    recipe = tuple(_recipe_line(step, layouts) for step in (1, 2, 3))
    return LayoutSweep(inspected.name, size, latent_size, limit, original, flops, layouts, recipe)


def _parse_budget(budget: str | int, original: int) -> int:
    match = _BUDGET.fullmatch(str(budget).strip())
    if match is None or not Fraction(match[1]):
        raise ValueError(f"A budget is a number of parameters such as 860M, 1.2B or 1.05x, but got {str(budget)!r}.")
    unit = match[2].lower()
    return int(Fraction(match[1]) * (original if unit == "x" else _UNITS[unit]))


def _layouts(one_expert: MTUUNet2DConditionModel, budget: int, flops: Flops) -> tuple[LayoutCost, ...]:
    """The layouts whose experts divide the widths of the model, derived from the model with one full-size expert."""
    config, layouts = one_expert.expert_config, []
    for num_experts in _EXPERTS:
        for ratio in sorted({*_RATIOS, Fraction(1, num_experts)}):
            active = ratio.denominator  # K with K·G = 1
            for top_k in (None, active) if active < num_experts else (None,):
                layout = ExpertConfig(num_experts, top_k, float(ratio), config.norm, 1.0, config.router_width)
                try:
                    sizes = _sizes(one_expert, layout)
                except ValueError:
                    continue  # N does not divide some layer's hidden units
                layouts.append(_layout_cost(layout, ratio, sizes, flops, budget, len(one_expert.tasks)))
    return tuple(layouts)


def _layout_cost(
    layout: ExpertConfig, ratio: Fraction, sizes: tuple[int, int, int], flops: Flops, budget: int, num_tasks: int
) -> LayoutCost:
    parameters, routers, trained = sizes
    # FLOPs of FFNs are proportional to the active hidden units, which are K·G times the stock ones.
    layers = flops.layers + int(flops.ffn * (layout.num_active_experts * ratio - 1))
    preserved = layout.why_output_not_preserved() is None
    idle = max(0, layout.num_experts - layout.num_active_experts * num_tasks)
    return LayoutCost(
        num_experts=layout.num_experts,
        expert_ratio=ratio,
        top_k=layout.top_k,
        parameters=parameters,
        parameters_with_routers=parameters + routers,
        trained_parameters=trained,
        flops=layers,
        flops_with_attention=layers + flops.attention,
        preserves_output=preserved,
        num_idle_experts=idle,
        recipe_step=_step(layout.num_experts, ratio) if preserved and not idle else None,
        within_budget=parameters <= budget,
    )


def _sizes(one_expert: MTUUNet2DConditionModel, layout: ExpertConfig) -> tuple[int, int, int]:
    """Parameters without routers, parameters of the routers, and trained parameters of a layout.

    Raises:
        ValueError: the layout does not fit the hidden widths.
    """
    layers, extra = one_expert.routed_feed_forwards(), layout.num_experts - 1
    grown = 0
    for layer in layers:
        dim, stock_hidden = int(layer.net[2].out_features), int(layer.net[2].in_features)
        hidden = layout.num_experts * layout.hidden_units_per_expert(stock_hidden)
        grown += (3 * dim + 2) * (hidden - stock_hidden)  # two rows of w_in and b_in and a column of w_out per unit
        if layout.norm == "task_expert":
            grown += extra * 2 * dim * len(one_expert.tasks)
    routers = count_parameters(one_expert.task_embedding) + sum(count_parameters(layer.router) for layer in layers)
    routers_grown = extra * (layout.router_width + 1) * len(layers)
    trained = sum(parameter.numel() for parameter in one_expert.trainable_parameters())
    parameters = count_parameters(one_expert) - routers + grown
    return parameters, routers + routers_grown, trained + grown + routers_grown


def _step(num_experts: int, ratio: Fraction) -> int:
    """The step of the recipe to which a layout belongs. It must preserve the output, and train all its experts."""
    if num_experts == 1:
        return 1
    return 2 if ratio < 1 else 3


def _recipe_line(step: int, layouts: Sequence[LayoutCost]) -> str:
    own = [layout for layout in layouts if layout.recipe_step == step]
    fitting = [str(layout) for layout in own if layout.within_budget]
    if fitting:
        return f"{_RECIPE[step - 1]}: {', '.join(fitting)}."
    least = min(own, key=lambda layout: layout.parameters, default=None)
    return f"{_RECIPE[step - 1]}: nothing fits{'' if least is None else f'; the smallest is {least}'}."
