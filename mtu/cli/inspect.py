"""The command `mtu inspect`, which prints parameters and FLOPs of an upcycled model beside those of its original."""

import json
from fractions import Fraction
from typing import Annotated, Any

import typer

from mtu.cli.output import print_report

__all__ = ["EXAMPLES", "run_inspect_command"]

EXAMPLES = """
[bold]Examples[/bold]

  mtu inspect sd15
  mtu inspect sdxl --num-experts 4 --expert-ratio 1/4
  mtu inspect path/to/a/pipeline --size 768
  mtu inspect sd15 --sweep --budget 1.05x
  mtu inspect sd15 --json > sizes.json
"""
_LAYOUT = "Expert layout, for a stock model"
_SWEEP = "Sweep"


def _parse_ratio(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise typer.BadParameter(f"expected a number such as 0.25 or 1/4, but got {text!r}.") from None


Model = Annotated[str, typer.Argument(help="sd15, sdxl, or the folder of a UNet or a pipeline, stock or upcycled.")]
NumExperts = Annotated[
    int | None, typer.Option(metavar="N", help="Experts per FFN (default: 4, for SDXL 1).", rich_help_panel=_LAYOUT)
]
TopK = Annotated[
    int | None, typer.Option(metavar="K", help="Active experts per task (default: all).", rich_help_panel=_LAYOUT)
]
_RATIO_HELP = "Width of an expert / that of the FFN, such as 0.25 or 1/4 (default: 1/N)."
ExpertRatio = Annotated[
    float | None, typer.Option(metavar="G", parser=_parse_ratio, help=_RATIO_HELP, rich_help_panel=_LAYOUT)
]
_NORM_HELP = "One LayerNorm per task, or task_expert: one per task and expert (default: task)."
Norm = Annotated[str | None, typer.Option(metavar="MODE", help=_NORM_HELP, rich_help_panel=_LAYOUT)]
Size = Annotated[int, typer.Option(metavar="PIXELS", help="Edge of the picture.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_SWEEP_HELP = "List all layouts within a budget, with the paper's recipe."
Sweep = Annotated[bool, typer.Option("--sweep", help=_SWEEP_HELP, rich_help_panel=_SWEEP)]
_BUDGET_HELP = "Parameters without routers: 860M, 1.2B, or 1.05x for a multiple of the original's."
Budget = Annotated[str | None, typer.Option(metavar="P", help=_BUDGET_HELP, rich_help_panel=_SWEEP)]


def run_inspect_command(
    model: Model = "sd15",
    num_experts: NumExperts = None,
    top_k: TopK = None,
    expert_ratio: ExpertRatio = None,
    norm: Norm = None,
    size: Size = 512,
    as_json: AsJson = False,
    sweep: Sweep = False,
    budget: Budget = None,
) -> None:
    """Print parameters and FLOPs of an upcycled model beside its original.

    The command reads configurations only: it needs no weights, and computes nothing but sizes.
    """
    layout: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k, "expert_ratio": expert_ratio}
    given = [f"--{name.replace('_', '-')}" for name, value in layout.items() if value is not None]
    if sweep and given:
        raise typer.BadParameter(f"--sweep tries all layouts: expected no {', '.join(given)}.")
    if sweep and budget is None:
        raise typer.BadParameter("--sweep needs a --budget of parameters, such as 860M, 1.2B or 1.05x.")
    if budget is not None and not sweep:
        raise typer.BadParameter("--budget goes with --sweep.")
    # PyTorch and diffusers take seconds to import, and neither `--help` nor the checks above need them.
    from mtu import inspection

    common: dict[str, Any] = {"norm": norm, "size": size}
    if budget is None:
        result = inspection.compare_with_original(model, **layout, **common)
    else:
        result = inspection.sweep_layouts(model, budget, **common)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print_report(result.report())
