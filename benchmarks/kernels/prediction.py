"""`python -m benchmarks.kernels.prediction`: predicts times on an H100 and an A100 from compiled kernels.

Writes `results/predicted_kernels.csv`, the package's products of a forward pass one by one, and
`results/predicted_forward.csv`: forward passes beside the two plain products alone and beside the stock feed-forward,
compiled, then whole UNets beside stock ones. Launches are those of the package, compiled here by Triton;
`benchmarks.kernels.kernel_model` predicts their times, and `benchmarks.kernels.forward_model` combines them. Nothing is
measured.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.harness.commands import exit_on_usage_errors, make_parser, parse_arguments
from benchmarks.harness.provenance import RESULTS, collect_provenance, command_line
from benchmarks.harness.report import geometric_mean
from benchmarks.harness.rows import write_cells
from benchmarks.kernels.ahead_of_time import CompiledLaunch, check_not_interpreted, compile_once
from benchmarks.kernels.compiled_kernels import format_tile_of_launch, is_product
from benchmarks.kernels.forward_model import (
    UNETS,
    DenseFFNSizes,
    FirstProductGrid,
    ForwardTimes,
    first_product_before_tuning,
    ping_pong_first_product,
    predict_compiled_moe_ffn,
    predict_compiled_stock_ffn,
    predict_moe_ffn,
    predict_plain_products,
    predict_step_ratio,
)
from benchmarks.kernels.kernel_calls import SD_SHAPES, FFNCall, dense_shape, record_launches, top_2_shape
from benchmarks.kernels.kernel_model import GPUS, GPURates, ProgramCost, predict_grid_us, read_tile
from mtu_kernels.triton.launch import Launch
from mtu_kernels.triton.tiles import PAIR_PRODUCTS

MODULE = "benchmarks.kernels.prediction"
STATUS = "predicted, not measured"
BATCH = 2
MEAN = "geometric mean"
COLUMNS = (
    "gpu", "subject", "what", "variant", "status", "norm_us", "first_us", "second_us", "others_us", "total_us",
    "reference_us", "ratio", "first_tflops", "first_l2_bytes_per_flop", "first_l2_bytes_over_before",
)  # fmt: skip


class CompiledProduct(NamedTuple):
    """A product of a forward pass, compiled."""

    call: FFNCall
    launch: Launch
    program: ProgramCost


Firsts = dict[DenseFFNSizes, FirstProductGrid]


class Variant(NamedTuple):
    """Forward passes with some of the leads built in, by shape.

    Attributes:
        description: "op", over the two plain products alone; or "compiled", over the stock feed-forward, compiled.
        name: of the leads.
        first_products: the first products.
        forward_times: the passes.
        reference_times: the times in µs that they are divided by.
    """

    description: str
    name: str
    first_products: Firsts
    forward_times: dict[DenseFFNSizes, ForwardTimes]
    reference_times: dict[DenseFFNSizes, float]


def compile_products(rates: GPURates, shapes: Sequence[tuple[int, int]] = SD_SHAPES) -> list[CompiledProduct]:
    """The package's products in forward passes, dense and top-2 of 8 experts, compiled for a GPU."""
    done: dict[tuple[str, ...], CompiledLaunch] = {}
    found = []
    for D, L in shapes:
        for shape in (dense_shape(D, L), top_2_shape(D, L)):
            call = FFNCall(shape)
            for named in record_launches(call, rates.arch, recompute=False):
                launch = named.launch
                if named.phase != "inference" or not is_product(launch):
                    continue
                depth = D if launch.product_name in PAIR_PRODUCTS else shape.active_hidden
                tile = read_tile(compile_once(launch, rates.arch, done), rates.arch)
                found.append(CompiledProduct(call, launch, tile.make_program(depth)))
    return found


def first_products_of_dense_calls(found: Iterable[CompiledProduct]) -> Firsts:
    """The first products of dense calls, by shape."""
    return {
        DenseFFNSizes(shape.D, shape.L, shape.B): FirstProductGrid(
            program, launch.num_programs, launch.may_overlap_previous
        )
        for (shape, *_), launch, program in found
        if shape.K is None and launch.product_name in PAIR_PRODUCTS
    }


def cells_of_product(kernel: CompiledProduct, rates: GPURates) -> dict[str, str]:
    """A row of `predicted_kernels.csv`: the bounds of a product, and its time without memory and launch."""
    call, launch, program = kernel
    parts = program.loop_cycles(launch.num_programs, rates)
    busiest = math.ceil(launch.num_programs / rates.num_processors)
    return {
        "gpu": rates.name,
        "call": str(call),
        "kernel": launch.kernel.__name__,
        "tile": format_tile_of_launch(launch),
        "status": STATUS,
        "programs": str(launch.num_programs),
        "programs_per_sm": str(program.resident_programs),
        "waves": f"{launch.num_programs / rates.num_processors / program.resident_programs:.4g}",
        "quantisation": f"{launch.num_programs / rates.num_processors / busiest:.4g}",
        **{f"{name}_cycles": f"{cycles:.4g}" for name, cycles in parts.items()},
        "epilogue_cycles": f"{program.epilogue_cycles:.4g}",
        "l2_bytes_per_flop": f"{program.l2_bytes_per_flop:.4g}",
        "us": f"{predict_grid_us(program, launch.num_programs, rates):.4g}",
    }


def predict_variants(rates: GPURates, shipped: Firsts) -> Iterator[Variant]:
    """Forward passes at all shapes, for each set of leads; `shipped` are the first products as the package has them."""
    late = {tokens: first._replace(starts_early=False) for tokens, first in shipped.items()}
    old = {tokens: first_product_before_tuning(tokens, rates) for tokens in shipped}
    yield _ops("before", old, rates)
    yield _ops("lead 2: first product rewritten", late, rates)
    if rates.arch == "sm_90":
        early = {tokens: first._replace(starts_early=True) for tokens, first in late.items()}
        yield _ops("leads 2 and 4: and launched early", early, rates)
        turns = {tokens: ping_pong_first_product(tokens)._replace(starts_early=True) for tokens in shipped}
        yield _ops("leads 3 and 4: ping-pong in Gluon; launched early", turns, rates)
    yield _ops("shipped defaults", shipped, rates)
    yield _compiled("before", old, rates, opaque=True)
    yield _compiled("lead 2: first product rewritten", late, rates, opaque=True)
    yield _compiled("leads 1 and 2: and LayerNorm is the compiler's", late, rates, opaque=False)


def _ops(name: str, firsts: Firsts, rates: GPURates) -> Variant:
    forwards = {tokens: predict_moe_ffn(tokens, first, rates) for tokens, first in firsts.items()}
    floors = {tokens: predict_plain_products(tokens, rates).total_us for tokens in firsts}
    return Variant("op", name, firsts, forwards, floors)


def _compiled(name: str, firsts: Firsts, rates: GPURates, *, opaque: bool) -> Variant:
    forwards = {
        tokens: predict_compiled_moe_ffn(tokens, first, rates, opaque=opaque) for tokens, first in firsts.items()
    }
    others = {tokens: predict_compiled_stock_ffn(tokens, rates).total_us for tokens in firsts}
    return Variant("compiled", name, firsts, forwards, others)


def cells_of_variant(variant: Variant, rates: GPURates) -> Iterator[dict[str, str]]:
    """Rows of `predicted_forward.csv`: a variant at each shape, on the mean, and, where it is compiled, in UNets."""
    head = {"gpu": rates.name, "subject": "", "what": variant.description, "variant": variant.name, "status": STATUS}
    ratios = []
    for tokens, forward in variant.forward_times.items():
        program, programs, _ = variant.first_products[tokens]
        flops = 4 * tokens.num_rows * tokens.hidden_size * tokens.D
        loaded = program.bytes * programs
        old = first_product_before_tuning(tokens, rates)
        ratios.append(forward.total_us / variant.reference_times[tokens])
        row = head | {"subject": str(tokens)}
        row |= {name: f"{time:.1f}" for name, time in forward._asdict().items()}
        row |= {"total_us": f"{forward.total_us:.1f}", "reference_us": f"{variant.reference_times[tokens]:.1f}"}
        row |= {"ratio": f"{ratios[-1]:.3f}", "first_tflops": f"{flops / forward.first_us / 1e6:.0f}"}
        row |= {"first_l2_bytes_per_flop": f"{loaded / flops:.5f}"}
        yield row | {"first_l2_bytes_over_before": f"{loaded / (old.program.bytes * old.num_programs):.3f}"}
    mean = geometric_mean(ratios)
    yield dict.fromkeys(COLUMNS, "") | head | {"subject": MEAN, "ratio": f"{mean:.3f}"}
    for unet in UNETS if variant.description == "compiled" else ():
        number = {DenseFFNSizes(D, L, BATCH): count for (D, L), count in unet.ffn_counts.items()}
        ours = math.fsum(count * variant.forward_times[tokens].total_us for tokens, count in number.items())
        theirs = math.fsum(count * variant.reference_times[tokens] for tokens, count in number.items())
        ratio = predict_step_ratio(unet, ours, theirs, rates)
        yield dict.fromkeys(COLUMNS, "") | head | {"subject": f"UNet of {unet.name}", "ratio": f"{ratio:.3f}"}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(MODULE, "Predicts times on an H100 and an A100 from compiled kernels; nothing is measured.")
    argv, _ = parse_arguments(parser, argv)
    with exit_on_usage_errors(parser):
        check_not_interpreted()
    source = collect_provenance(command_line(MODULE, argv))
    each, whole = [], []
    for rates in GPUS.values():
        found = compile_products(rates)
        each += [cells_of_product(kernel, rates) for kernel in found]
        for variant in predict_variants(rates, first_products_of_dense_calls(found)):
            whole += list(cells_of_variant(variant, rates))
    write_cells(RESULTS / "predicted_kernels.csv", each, source)
    write_cells(RESULTS / "predicted_forward.csv", whole, source)
    print("Predicted: op / two products, compiled / compiled stock")
    for row in whole:
        if not row["total_us"]:
            print(f"{row['ratio']:>6}  {row['gpu']:13}  {row['subject']:20}  {row['what']}, {row['variant']}")


if __name__ == "__main__":
    main()
