"""The comparison of one upcycled model with its original: parameters and FLOPs, as numbers and as a report."""

import os
from fractions import Fraction
from typing import Any, NamedTuple

from diffusers import UNet2DConditionModel

from mtu.experts import ExpertConfig, NormMode
from mtu.inspection.counting import count_flops, count_parameters
from mtu.inspection.inspected_model import InspectedModel, load_inspected_model
from mtu.inspection.reports import Report, flop_counting_note, format_count, format_flops
from mtu.models.unet import MTUUNet2DConditionModel
from mtu.tasks import TaskSpec

__all__ = ["Comparison", "Quantity", "compare_with_original"]


class Quantity(NamedTuple):
    """One quantity of the original and of the upcycled model.

    Attributes:
        key: name of the quantity in JSON; those of FLOPs start with "flops".
        label: name of the quantity in reports.
        original: value for the stock model; None if the quantity does not apply to it.
        upcycled: value for the upcycled model.
        upcycled_without_routers: value for the upcycled model after `drop_routers_`.
    """

    key: str
    label: str
    original: int | None
    upcycled: int
    upcycled_without_routers: int

    @property
    def ratio(self) -> float | None:
        """`upcycled / original`; None without an original."""
        return self.upcycled / self.original if self.original else None

    @property
    def ratio_without_routers(self) -> float | None:
        """`upcycled_without_routers / original`; None without an original."""
        return self.upcycled_without_routers / self.original if self.original else None

    def to_dict(self) -> dict[str, Any]:
        """Return the values and their ratios as JSON values."""
        return {
            "key": self.key,
            "label": self.label,
            "original": self.original,
            "upcycled": self.upcycled,
            "routers_dropped": self.upcycled_without_routers,
            "ratio": self.ratio,
            "ratio_routers_dropped": self.ratio_without_routers,
        }


class Comparison(NamedTuple):
    """An upcycled model beside its original.

    Attributes:
        model_name: name of the model.
        image_size, latent_size: edges of the image and of the latents for which FLOPs are counted.
        tasks: tasks of the upcycled model.
        expert_config: expert layout of the upcycled model.
        quantities: the compared quantities.
    """

    model_name: str
    image_size: int
    latent_size: int
    tasks: tuple[TaskSpec, ...]
    expert_config: ExpertConfig
    quantities: tuple[Quantity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        reason = self.expert_config.why_output_not_preserved()
        return {
            "model": self.model_name,
            "size": self.image_size,
            "latent_size": self.latent_size,
            "tasks": [task.name for task in self.tasks],
            **{key: getattr(self.expert_config, key) for key in ("num_experts", "top_k", "expert_ratio", "norm")},
            "preserved": reason is None,
            "why_not_preserved": reason,
            "rows": [row.to_dict() for row in self.quantities],
        }

    def report(self) -> Report:
        """A table of the quantities, with notes on its numbers."""
        config, tasks = self.expert_config, ", ".join(task.name for task in self.tasks)
        experts = f"{config.num_experts} expert{'s' if config.num_experts > 1 else ''}"
        ratio = Fraction(config.expert_ratio).limit_denominator(4096)
        routing = "dense" if config.has_dense_routing else f"top-{config.top_k}"
        lines = [["", "original", "upcycled", "ratio", "routers dropped", "ratio"]]
        for row in self.quantities:
            show = format_flops if row.key.startswith("flops") else format_count
            original = "-" if row.original is None else show(row.original)
            ratios = ["-" if r is None else f"{r:.3f}" for r in (row.ratio, row.ratio_without_routers)]
            lines.append(
                [row.label, original, show(row.upcycled), ratios[0], show(row.upcycled_without_routers), ratios[1]]
            )
        reason = config.why_output_not_preserved()
        summary = (
            f"{self.model_name}: {experts} of {ratio} of the FFN, {routing} routing, norm {config.norm!r}.\n"
            f"Tasks: {tasks}."
        )
        notes = [
            flop_counting_note(self.image_size, self.latent_size),
            "Routers run once per call, whatever the batch; drop_routers_() leaves only their output.",
            f"Output of the original preserved at initialisation: {'yes' if reason is None else f'no, {reason}'}.",
        ]
        return Report(summary, lines, "\n".join(notes), num_left_aligned_columns=1)


def compare_with_original(
    model: str | os.PathLike | UNet2DConditionModel,
    num_experts: int | None = None,
    *,
    top_k: int | None = None,
    expert_ratio: float | None = None,
    norm: NormMode | None = None,
    size: int = 512,
    vae_scale_factor: int | None = None,
) -> Comparison:
    """Count parameters and FLOPs of an upcycled model beside those of its original, without reading weights.

    Args:
        model: "sd15", "sdxl", a UNet (stock or upcycled, left as it is), or the folder of a UNet or a pipeline.
        num_experts, top_k, expert_ratio, norm: the layout of a stock model, as in `upcycle`. An upcycled model has its
            own layout.
        size: edge of the image in pixels.
        vae_scale_factor: pixels per latent; None: those of the pipeline's VAE if there is one, else 8.

    Returns:
        The comparison; `print(comparison.report())` shows it.

    Raises:
        ValueError: the folder does not exist or does not hold a UNet, or `upcycle` refuses the arguments.
    """
    inspected = load_inspected_model(model)
    latent_size = inspected.compute_latent_size(size, vae_scale_factor)
    settings = {"num_experts": num_experts, "top_k": top_k, "expert_ratio": expert_ratio, "norm": norm}
    settings = {key: value for key, value in settings.items() if value is not None}
    if inspected.upcycled_unet is None:
        upcycled = inspected.build_upcycled(**settings)
    elif settings:
        raise ValueError(
            f"{inspected.name} is upcycled already, its layout is fixed: expected no {', '.join(settings)}."
        )
    else:
        upcycled = inspected.upcycled_unet
    tasks, config = upcycled.tasks, upcycled.expert_config
    return Comparison(inspected.name, size, latent_size, tasks, config, _quantities(inspected, upcycled, latent_size))


def _quantities(inspected: InspectedModel, upcycled: MTUUNet2DConditionModel, latent_size: int) -> tuple[Quantity, ...]:
    """All quantities. This drops the routers of `upcycled`."""
    stock = inspected.build_stock()
    channels, widest = stock.config.in_channels, upcycled.conv_in.in_channels
    original = count_flops(stock, channels, latent_size)
    own, wide = (count_flops(upcycled, count, latent_size) for count in (channels, widest))
    parameters, trained = count_parameters(upcycled), sum(p.numel() for p in upcycled.trainable_parameters())
    blocks = len(upcycled.routed_feed_forwards())
    upcycled.drop_routers_()
    trained_dropped = sum(p.numel() for p in upcycled.trainable_parameters())
    rows = [
        Quantity("parameters", "parameters", count_parameters(stock), parameters, count_parameters(upcycled)),
        Quantity("trained_parameters", "trained parameters", None, trained, trained_dropped),
        Quantity("ffn_blocks", "FFN blocks", blocks, blocks, blocks),
    ]
    first, total = upcycled.tasks[0].name, original.layers + original.attention
    tasks = [("", f"{first}, {channels} channels", own), ("_widest_task", f"widest task, {widest} channels", wide)]
    for key, label, flops in tasks if widest > channels else tasks[:1]:
        layers, both = flops.layers, flops.layers + flops.attention
        rows.append(Quantity(f"flops{key}", f"FLOPs, {label}", original.layers, layers, layers))
        rows.append(Quantity(f"flops{key}_with_attention", "  with attention products", total, both, both))
    rows.append(Quantity("flops_routers_per_call", "FLOPs of the routers, per call", None, own.routers, 0))
    return tuple(rows)
