"""The command `mtu`: arguments in, text out; the work is done elsewhere."""

import argparse
import json
import sys
from collections.abc import Sequence
from fractions import Fraction

from mtu import inspection

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        The exit code: 0, or 2 where the arguments are wrong.
    """
    parser = argparse.ArgumentParser(prog="mtu", description="One diffusion model, many tasks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inspect(commands)
    arguments = parser.parse_args(argv)
    try:
        print(arguments.run(arguments))
    except ValueError as error:
        print(f"mtu {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _add_inspect(commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="parameters and FLOPs of an upcycled model beside its original",
        description="Parameters, trained parameters, FFN blocks and FLOPs of an upcycled model beside its original. "
        "Only configurations are read, and nothing is computed but sizes.",
    )
    parser.set_defaults(run=_inspect)
    parser.add_argument(
        "model",
        nargs="?",
        default="sd15",
        help="sd15 (default), sdxl, or the folder of a UNet or a pipeline, stock or upcycled",
    )
    layout = parser.add_argument_group("expert layout, for a stock model")
    layout.add_argument("--num-experts", type=int, metavar="N", help="experts per FFN (default: 4, for SDXL 1)")
    layout.add_argument("--top-k", type=int, metavar="K", help="active experts per task (default: all)")
    layout.add_argument("--expert-ratio", type=_ratio, metavar="G", help="expert / FFN, as 0.25 or 1/4 (default: 1/N)")
    layout.add_argument("--norm", metavar="MODE", help="LayerNorms per task, or task_expert (default: task)")
    parser.add_argument("--size", type=int, default=512, help="edge of the picture in pixels (default: 512)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument("--sweep", action="store_true", help="list N x G under a budget, with the paper's recipe")
    sweep.add_argument(
        "--budget", metavar="P", help="parameters without routers: 860M, 1.2B, or 1.05x (times the original's)"
    )


def _inspect(arguments: argparse.Namespace) -> str:
    settings = {"num_experts": arguments.num_experts, "top_k": arguments.top_k, "expert_ratio": arguments.expert_ratio}
    common = {"norm": arguments.norm, "size": arguments.size}
    if not arguments.sweep:
        if arguments.budget is not None:
            raise ValueError("--budget goes with --sweep.")
        result = inspection.compare(arguments.model, **settings, **common)
        return json.dumps(result.to_dict(), indent=2) if arguments.json else inspection.format_comparison(result)
    given = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value is not None]
    if given:
        raise ValueError(f"--sweep tries all layouts: expected no {', '.join(given)}.")
    if arguments.budget is None:
        raise ValueError("--sweep needs a --budget of parameters, such as 860M, 1.2B or 1.05x.")
    result = inspection.sweep(arguments.model, arguments.budget, **common)
    return json.dumps(result.to_dict(), indent=2) if arguments.json else inspection.format_sweep(result)


def _ratio(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a number such as 0.25 or 1/4, but got {text!r}") from None
