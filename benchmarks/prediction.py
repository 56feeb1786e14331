"""`python -m benchmarks.prediction`: what compiled kernels let one expect on an H100 and an A100, before measuring.

Writes `results/predicted_kernels.csv`, the package's products of a forward pass one by one, and
`results/predicted_forward.csv`: forward passes beside the two plain products alone and beside the stock feed-forward,
compiled, then whole UNets beside stock ones. Launches are those that the package makes, their code is what Triton
compiles here; `benchmarks.kernel_model` gives them times, and `benchmarks.forward_model` puts them together.
Nothing is measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.ahead_of_time import Compiled, compile_launch, specialize
from benchmarks.compiled_kernels import is_product, tile_of, write
from benchmarks.forward_model import (
    UNETS,
    FirstProduct,
    Forward,
    Tokens,
    before,
    compiled,
    op,
    ping_pong,
    products,
    stock,
    unet_ratio,
)
from benchmarks.kernel_calls import SD_SHAPES, Call, dense, record, top_2
from benchmarks.kernel_model import GPUS, Program, Rates, grid_us, read_tile
from benchmarks.provenance import RESULTS, command_line, provenance
from mtu_kernels.triton.launch import Launch, interpreted

STATUS = "predicted, not measured"
BATCH = 2
COLUMNS = (
    "gpu", "subject", "variant", "status", "norm_us", "first_us", "second_us", "others_us", "total_us",
    "over_two_products", "over_compiled_stock", "first_tflops", "l2_bytes_per_flop",
)  # fmt: skip


class Kernel(NamedTuple):
    """A product of a forward pass, compiled."""

    call: Call
    launch: Launch
    program: Program


class Prediction(NamedTuple):
    """A forward pass at a shape, and the grid of its first product."""

    tokens: Tokens
    forward: Forward
    first: FirstProduct


def kernels(rates: Rates) -> list[Kernel]:
    """The package's products in forward passes at the shapes of SD 1.5 and SDXL, dense and top-2 of 8 experts."""
    done: dict[tuple[str, ...], Compiled] = {}
    found = []
    for D, L in SD_SHAPES:
        for shape in (dense(D, L), top_2(D, L)):
            call = Call(shape)
            for name, _, _, launch in record(call, rates.arch, recompute=False):
                if not name.startswith("inference") or not is_product(launch):
                    continue
                key = specialize(launch, rates.arch).key
                if key not in done:
                    done[key] = compile_launch(launch, rates.arch)
                depth = D if launch.kernel.__name__.startswith("expert_in") else shape.active_hidden
                tile = read_tile(done[key]._replace(launch=launch), rates.arch)
                found.append(Kernel(call, launch, tile.program(depth)))
    return found


def kernel_cells(kernel: Kernel, rates: Rates) -> dict[str, str]:
    """A row of `predicted_kernels.csv`: what bounds a product, and its time without memory and launch."""
    call, launch, program = kernel
    parts = program.loop_cycles(launch.programs, rates)
    busiest = math.ceil(launch.programs / rates.processors)
    return {
        "gpu": rates.name,
        "call": str(call),
        "kernel": launch.kernel.__name__,
        "tile": tile_of(launch),
        "status": STATUS,
        "programs": str(launch.programs),
        "programs_per_sm": str(program.resident),
        "waves": f"{launch.programs / rates.processors / program.resident:.4g}",
        "quantisation": f"{launch.programs / rates.processors / busiest:.4g}",
        **{f"{name}_cycles": f"{cycles:.4g}" for name, cycles in parts.items()},
        "epilogue_cycles": f"{program.epilogue_cycles:.4g}",
        "l2_bytes_per_flop": f"{program.l2_bytes_per_flop:.4g}",
        "us": f"{grid_us(program, launch.programs, rates):.4g}",
    }


def variants(rates: Rates, shipped: dict[tuple[int, int], FirstProduct]) -> Iterator[tuple[str, list[Prediction]]]:
    """Forward passes at all shapes, by what is built into them.

    shipped: the first products of dense calls as the package launches them, by width and tokens.
    """
    shapes = [Tokens(D, L, BATCH) for D, L in shipped]
    now = [shipped[tokens.D, tokens.L] for tokens in shapes]
    old = [before(tokens, rates) for tokens in shapes]
    late = [first._replace(early=False) for first in now]
    choices = {"before": old, "lead 2: first product rewritten": late}
    if rates.arch == "sm_90":
        choices["leads 2, 4: and launched early"] = [first._replace(early=True) for first in now]
        choices["leads 3, 4: ping-pong in Gluon, launched early"] = [
            ping_pong(tokens)._replace(early=True) for tokens in shapes
        ]
    choices["shipped defaults"] = now
    for name, firsts in choices.items():
        yield name, [Prediction(t, op(t, first, rates), first) for t, first in zip(shapes, firsts, strict=True)]
    for name, firsts, opaque in (
        ("compiled, before", old, True),
        ("compiled, lead 2", late, True),
        ("compiled, leads 1, 2: LayerNorm is the compiler's", late, False),
    ):
        yield (
            name,
            [
                Prediction(t, compiled(t, first, rates, opaque=opaque), first)
                for t, first in zip(shapes, firsts, strict=True)
            ],
        )


def forward_cells(rates: Rates, variant: str, predictions: Sequence[Prediction]) -> Iterator[dict[str, str]]:
    """Rows of `predicted_forward.csv`: a variant at each shape, on the mean, and, where it is compiled, in UNets."""
    head = {"gpu": rates.name, "subject": "", "variant": variant, "status": STATUS}
    ratios = []
    for tokens, forward, (program, programs, _) in predictions:
        floor, other = products(tokens, rates).total, stock(tokens, rates).total
        ratios.append((forward.total / floor, forward.total / other))
        flops = 4 * tokens.rows * tokens.hidden * tokens.D
        row = head | {"subject": f"{tokens.D}x{tokens.L} B={tokens.B}"}
        row |= {f"{name}_us": f"{time:.1f}" for name, time in forward._asdict().items()}
        row |= {"total_us": f"{forward.total:.1f}"}
        row |= {"over_two_products": f"{ratios[-1][0]:.3f}", "over_compiled_stock": f"{ratios[-1][1]:.3f}"}
        row |= {"first_tflops": f"{flops / forward.first / 1e6:.0f}"}
        yield row | {"l2_bytes_per_flop": f"{program.bytes * programs / flops:.5f}"}
    means = [math.exp(math.fsum(map(math.log, column)) / len(ratios)) for column in zip(*ratios, strict=True)]
    row = dict.fromkeys(COLUMNS, "") | head | {"subject": "geometric mean"}
    yield row | {"over_two_products": f"{means[0]:.3f}", "over_compiled_stock": f"{means[1]:.3f}"}
    if not variant.startswith("compiled"):
        return
    by_shape = {(tokens.D, tokens.L): (forward.total, tokens) for tokens, forward, _ in predictions}
    for unet in UNETS:
        ours = math.fsum(number * by_shape[shape][0] for shape, number in unet.blocks.items())
        theirs = math.fsum(number * stock(by_shape[shape][1], rates).total for shape, number in unet.blocks.items())
        row = dict.fromkeys(COLUMNS, "") | head | {"subject": f"UNet of {unet.name}"}
        yield row | {"over_compiled_stock": f"{unet_ratio(unet, ours, theirs, rates):.3f}"}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    description = __doc__.split("\n\n")[1]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=description)
    parser.parse_args(argv)
    if interpreted():
        parser.error("TRITON_INTERPRET must be unset, since interpreted kernels cannot be compiled; it is set.")
    source = provenance(command_line("benchmarks.prediction", argv))
    each, whole = [], []
    for rates in GPUS.values():
        found = kernels(rates)
        each += [kernel_cells(kernel, rates) for kernel in found]
        first = {
            (kernel.call.shape.D, kernel.call.shape.L): FirstProduct(kernel.program, kernel.launch.programs)
            for kernel in found
            if kernel.call.shape.K is None and kernel.launch.kernel.__name__.startswith("expert_in")
        }
        for variant, predictions in variants(rates, first):
            whole += list(forward_cells(rates, variant, predictions))
    write(RESULTS / "predicted_kernels.csv", each, source)
    write(RESULTS / "predicted_forward.csv", whole, source)
    print("Predicted time / two products, / compiled stock:")
    for row in whole:
        if row["subject"][0] in "gU":
            ratios = f"{row['over_two_products'] or '-':>6} {row['over_compiled_stock']:>6}"
            print(f"{ratios}  {row['gpu']:13}  {row['subject']:20}  {row['variant']}")


if __name__ == "__main__":
    main()
