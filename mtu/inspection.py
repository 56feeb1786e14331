"""What an upcycled model costs beside its original: parameters and FLOPs, counted on the meta device.

FLOPs are those of one forward of the UNet at batch 1, a multiply-add counting as two: the paper's convention, found by
computing (0.677 T for SD 1.5 at 512², where the paper says 0.67). The two matrix products inside attention, which the
paper leaves out, are reported apart; so are the routers, which run once per call whatever the batch, or never once they
are dropped.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mtu.config import ExpertConfig, NormMode
from mtu.export import stock_config
from mtu.router import Router
from mtu.tasks import TaskSpec
from mtu.unet import MTUUNet2DConditionModel
from mtu.upcycle import upcycle

__all__ = ["BUILT_IN", "Comparison", "Layout", "Row", "Sweep", "compare", "format_comparison", "format_sweep", "sweep"]

TEXT_TOKENS = 77

# The UNets of the two published models, as arguments of UNet2DConditionModel.
BUILT_IN: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}

_SWEPT_EXPERTS = (1, 2, 4, 8, 16)
_SWEPT_RATIOS = (Fraction(1, 4), Fraction(1, 2), Fraction(1))

# What diffusers raises on a configuration that it cannot build.
_CONFIG_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)

_FLOP_NOTE = (
    "FLOPs: one UNet forward at {size} x {size} (latents {latent} x {latent}), batch 1, {tokens} text tokens, a multiply-add "
    "being two;\nconvolutions and linear layers, without and with the two products inside attention."
)


class Row(NamedTuple):
    """One quantity of the original and of the upcycled model; None where a model has no such thing.

    Attributes:
        key: name for machines; it starts with the unit's kind, "parameters", "ffn" or "flops".
        label: name for people.
        original, upcycled, routers_dropped: the stock model, the upcycled one, and that after `drop_routers_`.
    """

    key: str
    label: str
    original: int | None
    upcycled: int | None
    routers_dropped: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the ratios to the original."""
        ratios = {
            "ratio": _ratio(self.upcycled, self.original),
            "ratio_routers_dropped": _ratio(self.routers_dropped, self.original),
        }
        return {**self._asdict(), **ratios}


class Comparison(NamedTuple):
    """An upcycled model beside its original.

    Attributes:
        name: of the model.
        size, latent_size: edge of the picture and of the latents that FLOPs are counted for.
        tasks: of the upcycled model.
        config: its expert layout.
        rows: the quantities.
    """

    name: str
    size: int
    latent_size: int
    tasks: tuple[TaskSpec, ...]
    config: ExpertConfig
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        layout = {key: getattr(self.config, key) for key in ("num_experts", "top_k", "expert_ratio", "norm")}
        reason = self.config.why_not_preserved()
        return {
            "model": self.name,
            "size": self.size,
            "latent_size": self.latent_size,
            "tasks": [task.name for task in self.tasks],
            **layout,
            "preserved": reason is None,
            "why_not_preserved": reason,
            "rows": [row.to_dict() for row in self.rows],
        }


class Layout(NamedTuple):
    """One expert layout of a sweep.

    Attributes:
        num_experts, expert_ratio, top_k: N, G and K; top_k None is dense routing.
        parameters: after `drop_routers_`; this is what a budget bounds.
        parameters_with_routers: while training.
        trained_parameters: with routers.
        flops, flops_with_attention: of the text-to-image task, without routers.
        preserved: whether initialisation keeps the original's output.
        step: of the paper's recipe, 1 to 3; None: not part of it.
        within_budget: whether `parameters` fit.
    """

    num_experts: int
    expert_ratio: Fraction
    top_k: int | None
    parameters: int
    parameters_with_routers: int
    trained_parameters: int
    flops: int
    flops_with_attention: int
    preserved: bool
    step: int | None
    within_budget: bool

    def __str__(self) -> str:
        routing = "" if self.top_k is None else f" top-{self.top_k}"
        return f"N = {self.num_experts}, G = {self.expert_ratio}{routing}"


class Sweep(NamedTuple):
    """All layouts of one model, and the recipe for a budget.

    Attributes:
        name: of the model.
        size, latent_size: edge of the picture and of the latents that FLOPs are counted for.
        budget: parameters.
        original_parameters, original_flops: of the stock model.
        layouts: by N, then G; those beyond the budget too.
        recipe: its three steps, a line each.
    """

    name: str
    size: int
    latent_size: int
    budget: int
    original_parameters: int
    original_flops: int
    layouts: tuple[Layout, ...]
    recipe: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        layouts = [
            {
                **layout._asdict(),
                "expert_ratio": float(layout.expert_ratio),
                "ratio": layout.parameters / self.original_parameters,
                "flop_ratio": layout.flops / self.original_flops,
            }
            for layout in self.layouts
        ]
        fields = {**self._asdict(), "layouts": layouts, "recipe": list(self.recipe)}
        return {"model": fields.pop("name"), **fields}


def compare(
    model: str | os.PathLike | UNet2DConditionModel,
    num_experts: int | None = None,
    *,
    top_k: int | None = None,
    expert_ratio: float | None = None,
    norm: NormMode | None = None,
    size: int = 512,
    latent_factor: int | None = None,
) -> Comparison:
    """Count parameters and FLOPs of an upcycled model beside those of its original; no weights are read.

    Args:
        model: "sd15", "sdxl", a UNet (stock or upcycled), or the folder of a UNet or pipeline.
        num_experts, top_k, expert_ratio, norm: as in `upcycle`, for a stock model; an upcycled one has its own.
        size: edge of the picture in pixels.
        latent_factor: pixels per latent; None: that of the pipeline's VAE where there is one, else 8.

    Returns:
        The comparison, for `format_comparison`.

    Raises:
        ValueError: no such folder, not a UNet's, or arguments that `upcycle` refuses.
    """
    subject = _subject(model)
    latent_size = _latent_size(size, latent_factor or subject.latent_factor)
    given = {"num_experts": num_experts, "top_k": top_k, "expert_ratio": expert_ratio, "norm": norm}
    given = {key: value for key, value in given.items() if value is not None}
    if subject.upcycled is not None and given:
        raise ValueError(f"{subject.name} is upcycled already and has its own layout: expected no {', '.join(given)}.")
    upcycled = subject.upcycled or _upcycled(subject, **given)
    return Comparison(
        subject.name, size, latent_size, upcycled.tasks, upcycled.expert_config, _rows(subject, upcycled, latent_size)
    )


def sweep(
    model: str | os.PathLike | UNet2DConditionModel,
    budget: str | int,
    *,
    norm: NormMode | None = None,
    size: int = 512,
    latent_factor: int | None = None,
) -> Sweep:
    """Parameters and FLOPs of N ∈ {1, 2, 4, 8, 16} × G ∈ {1/N, 1/4, 1/2, 1}, and the paper's recipe for a budget.

    Every N·G·4D hidden units cost the same, so one model is counted and the others are derived from it. Routing is dense,
    and top-k besides where some K < N has K·G = 1: the active parameters and FLOPs of the original.

    Args:
        model: "sd15", "sdxl", a UNet, or the folder of a UNet or pipeline; of an upcycled one, its original.
        budget: parameters after `drop_routers_`: a number, "860M", "1.2B", or "1.05x", times the original's.
        norm: as in `upcycle`; None: that of an upcycled model, else "task".
        size, latent_factor: as in `compare`.

    Returns:
        The sweep, for `format_sweep`.

    Raises:
        ValueError: as `compare`, or a budget below the smallest layout.

    Source: MTU (arXiv 2503.11905) §8.
    """
    subject = _subject(model)
    latent_size = _latent_size(size, latent_factor or subject.latent_factor)
    stock = _stock(subject.config)
    original = _parameters(stock)
    flops = _count_flops(stock, stock.config.in_channels, latent_size)
    limit = _parse_budget(budget, original)
    norm = norm or (subject.upcycled.expert_config.norm if subject.upcycled is not None else "task")
    layouts = _layouts(_upcycled(subject, num_experts=1, norm=norm), limit, latent_size, flops.ffn)
    if not any(layout.within_budget for layout in layouts):
        least = min(layouts, key=lambda layout: layout.parameters)
        raise ValueError(
            f"No layout fits into {_count(limit)} parameters: the smallest, {least}, needs {_count(least.parameters)}."
        )
    recipe = tuple(_recipe_line(step, layouts) for step in (1, 2, 3))
    return Sweep(subject.name, size, latent_size, limit, original, flops.products, layouts, recipe)


def format_comparison(comparison: Comparison) -> str:
    """The comparison as an aligned table, with what it means."""
    config, tasks = comparison.config, ", ".join(task.name for task in comparison.tasks)
    experts = f"{config.num_experts} expert{'s' if config.num_experts > 1 else ''}"
    ratio = Fraction(config.expert_ratio).limit_denominator(4096)
    routing = "dense" if config.is_dense else f"top-{config.top_k}"
    lines = [["", "original", "upcycled", "ratio", "routers dropped", "ratio"]]
    for row in comparison.rows:
        show = _flops if row.key.startswith("flops") else _count
        original, upcycled, dropped = (None if v is None else show(v) for v in row[2:])
        ratios = (_ratio(value, row.original) for value in (row.upcycled, row.routers_dropped))
        first, second = (None if r is None else f"{r:.3f}" for r in ratios)
        lines.append([row.label, *(cell or "-" for cell in (original, upcycled, first, dropped, second))])
    reason = config.why_not_preserved()
    return "\n".join(
        [
            f"{comparison.name}: {experts} of {ratio} of the FFN, {routing} routing, norm {config.norm!r}; tasks: {tasks}",
            "",
            _table(lines, left=1),
            "",
            _FLOP_NOTE.format(size=comparison.size, latent=comparison.latent_size, tokens=TEXT_TOKENS),
            "Routers run once per call, whatever the batch; drop_routers_() leaves only their output.",
            f"Output of the original preserved at initialisation: {'yes' if reason is None else f'no, {reason}'}.",
        ]
    )


def format_sweep(result: Sweep) -> str:
    """The layouts within the budget as an aligned table, and the recipe."""
    fitting = [layout for layout in result.layouts if layout.within_budget]
    beyond = [layout for layout in result.layouts if not layout.within_budget]
    lines = [["N", "G", "top-k", "parameters", "ratio", "with routers", "trained", "FLOPs", "ratio"]]
    lines[0] += ["with attention", "preserved", "step"]
    for layout in fitting:
        cells = [str(layout.num_experts), str(layout.expert_ratio), str(layout.top_k or "dense")]
        cells += [_count(layout.parameters), f"{layout.parameters / result.original_parameters:.3f}"]
        cells += [_count(layout.parameters_with_routers), _count(layout.trained_parameters)]
        cells += [_flops(layout.flops), f"{layout.flops / result.original_flops:.3f}"]
        cells += [_flops(layout.flops_with_attention), "yes" if layout.preserved else "no", str(layout.step or "-")]
        lines.append(cells)
    title = f"{result.name}: N experts of G times the FFN within {_count(result.budget)} parameters, routers dropped"
    rest = "All layouts fit."
    if beyond:
        least = min(beyond, key=lambda layout: layout.parameters)
        rest = f"{len(beyond)} more do not fit; the smallest of them, {least}, needs {_count(least.parameters)}."
    note = _FLOP_NOTE.format(size=result.size, latent=result.latent_size, tokens=TEXT_TOKENS)
    original = f"(the original: {_count(result.original_parameters)})"
    recipe = ["The paper's recipe (section 8) for this budget:", *result.recipe]
    return "\n".join([f"{title} {original}", "", _table(lines, left=0), "", rest, note, "", *recipe])


# ---------------------------------------------------------------------------------------------------------- subject


class _Subject(NamedTuple):
    name: str
    config: dict[str, Any]  # of the stock UNet
    upcycled: MTUUNet2DConditionModel | None
    latent_factor: int


def _subject(model: str | os.PathLike | UNet2DConditionModel) -> _Subject:
    """What is to be inspected, on the meta device."""
    if isinstance(model, UNet2DConditionModel):
        is_upcycled = isinstance(model, MTUUNet2DConditionModel)
        name, config, factor = "an upcycled UNet" if is_upcycled else "a stock UNet", dict(model.config), 8
    elif isinstance(model, str) and model in BUILT_IN:
        return _Subject(model, BUILT_IN[model], None, 8)
    else:
        name, config, factor = _read_folder(Path(model))
        is_upcycled = config["_class_name"] == MTUUNet2DConditionModel.__name__
    cls = MTUUNet2DConditionModel if is_upcycled else UNet2DConditionModel
    try:
        with torch.device("meta"):
            unet = cls.from_config({**config, "routers_dropped": False} if is_upcycled else config)
    except _CONFIG_ERRORS as error:
        raise ValueError(f"{name} has a config.json that describes no {cls.__name__}: {_one_line(error)}") from error
    return _Subject(name, stock_config(unet), unet if isinstance(unet, MTUUNet2DConditionModel) else None, factor)


def _read_folder(folder: Path) -> tuple[str, dict[str, Any], int]:
    """Name, configuration and latent factor of the UNet in a folder of its own or of a pipeline."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}: expected {', '.join(BUILT_IN)} or the folder of a model.")
    path = next((p for p in (folder / "config.json", folder / "unet" / "config.json") if p.is_file()), None)
    if path is None:
        raise ValueError(f"{folder} holds neither config.json nor unet/config.json: expected a UNet or a pipeline.")
    config = _read_json(path)
    names = [UNet2DConditionModel.__name__, MTUUNet2DConditionModel.__name__]
    if config.get("_class_name") not in names:
        raise ValueError(f"{path} describes a {config.get('_class_name')}, but a {' or '.join(names)} is expected.")
    vae = path.parent.parent / "vae" / "config.json"
    channels = _read_json(vae).get("block_out_channels") if path.parent.name == "unet" and vae.is_file() else None
    return str(folder), config, 2 ** (len(channels) - 1) if isinstance(channels, list) and channels else 8


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {_one_line(error)}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(config).__name__}.")
    return config


def _latent_size(size: int, factor: int) -> int:
    if size < 1 or size % factor:
        raise ValueError(f"size must be a positive multiple of {factor}, the pixels per latent, but got {size}.")
    return size // factor


def _stock(config: Mapping[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config).eval()


def _upcycled(subject: _Subject, **settings: Any) -> MTUUNet2DConditionModel:
    tasks = None if subject.upcycled is None else subject.upcycled.tasks
    # Without values there is nothing to preserve, and init="paper" does not warn of it.
    return upcycle(_stock(subject.config), tasks, init="paper", backend="eager", **settings).to("meta")
