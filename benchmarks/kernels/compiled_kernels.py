"""`python -m benchmarks.kernels.compiled_kernels`: compiles every kernel for every architecture, and reads the code.

No GPU is needed. Writes `results/compiled_kernels.csv`. Fails where registers spill, where a program does not fit the
chip, where a product lacks tensor cores or loads that run ahead of it, and where its main loop waits for Hopper's
tensor cores more than once, so that products are serialised. `--check` compiles less: the tiles that are shipped, each
in all of its dtypes, and one call of each kind; it writes a file only with `--output`. Tiles are those that the
installed Triton would get; rows that other versions have written stay in the file.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.harness.commands import exit_on_usage_errors, make_parser, parse_arguments
from benchmarks.harness.provenance import RESULTS, collect_provenance, command_line
from benchmarks.harness.rows import read_cells, write_cells
from benchmarks.kernels.ahead_of_time import (
    ARCHITECTURES,
    CHIPS,
    CompiledLaunch,
    check_not_interpreted,
    compile_launch,
    compiler_input_of,
    programs_per_processor,
)
from benchmarks.kernels.kernel_calls import (
    ODD,
    NamedLaunch,
    all_calls,
    few_calls,
    record_launches,
    record_launches_of_rows,
    record_other_launches,
    tile_block_of,
    uses_descriptors,
)
from benchmarks.kernels.sass import count_instructions, count_tensor_core, count_waits
from mtu_kernels.triton.launch import Launch
from mtu_kernels.triton.tile_choice import keys_from_exact_to_general, triton_version_string
from mtu_kernels.triton.tile_table import ROWS
from mtu_kernels.triton.tiles import TableRow, TileConfig

MODULE = "benchmarks.kernels.compiled_kernels"
TENSOR_CORE = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}


class CompiledKernel(NamedTuple):
    """A kernel of one architecture, with all rows of the table that it is the code of.

    Attributes:
        named_launch: the first launch that needs it.
        table_rows: of the table.
        compiled: None where the compiler refuses, with its `error`.
    """

    arch: str
    named_launch: NamedLaunch
    table_rows: tuple[TableRow, ...]
    compiled: CompiledLaunch | None
    error: str = ""


def is_product(launch: Launch) -> bool:
    return launch.product_name is not None


def format_tile_of_launch(launch: Launch) -> str:
    """Block sizes, warps and stages of a launch, as text."""
    names = ("BLOCK_M", "BLOCK_N", "ROWS", "BLOCK_D")
    numbers = tile_block_of(launch) if is_product(launch) else [launch.constant_arguments.get(name) for name in names]
    sizes = "x".join(str(number) for number in numbers if number is not None)
    return f"{sizes} warps={launch.num_warps} stages={launch.num_stages}".strip()


def format_table_tile(tile: TileConfig) -> str:
    """A tile of the table in the form of `format_tile_of_launch`."""
    sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return f"{sizes} warps={tile.num_warps} stages={tile.num_stages}"


def format_table_key(row: TableRow) -> str:
    """A row of the table in a cell of the CSV file: product, kind of routing, width and tokens (0: any), Triton."""
    version = f" triton {row.key.triton}" if row.key.triton else ""
    return f"{row.key.product} {'grouped' if row.key.grouped else 'dense'} {row.key.width}x{row.key.tokens}{version}"


def table_rows_of_arch(arch: str, rows: Iterable[TableRow] = ROWS) -> list[TableRow]:
    """Rows of an architecture that the installed Triton gets: those of its version, and those for any version else."""
    ours = [row for row in rows if row.key.arch == arch and row.key.triton in ("", triton_version_string())]
    named = {row.key._replace(triton="") for row in ours if row.key.triton}
    return [row for row in ours if row.key.triton or named.isdisjoint(keys_from_exact_to_general(row.key))]


def describe_faults(result: CompiledKernel) -> Iterator[str]:
    """The faults of a kernel, a sentence each."""
    if result.compiled is None:
        yield f"it must compile, got {result.error}"
        return
    code, launch = result.compiled.machine_code, result.compiled.launch
    if code is None:
        return
    chip = CHIPS[result.arch]
    spills = count_instructions(code.instructions, "STL", "LDL")
    if (code.stack_bytes or spills) and not _is_odd(result):
        uses = f" and {spills} loads and stores of it" if code.instructions else ""
        yield f"registers must not spill, got {code.stack_bytes} bytes of stack{uses}"
    if result.compiled.shared_bytes > chip.max_shared_bytes_per_program:
        most, got = chip.max_shared_bytes_per_program, result.compiled.shared_bytes
        yield f"shared memory must be at most {most} bytes, got {got}"
    elif programs_per_processor(result.compiled, chip) == 0:
        yield f"a program must fit on a multiprocessor, got {code.num_registers} registers in {launch.num_warps} warps"
    if is_product(launch) and code.instructions and result.named_launch.dtype != "fp32":
        yield from _product_violations(result, launch, code.main_loop)


def _product_violations(result: CompiledKernel, launch: Launch, loop: Sequence) -> Iterator[str]:
    bases = {instruction.name_without_modifiers for instruction in loop}
    wanted = "HMMA"
    if launch.constant_arguments["BLOCK_M"] >= 64 and launch.num_warps >= 4:
        wanted = TENSOR_CORE.get(result.arch, wanted)
    if wanted not in bases:
        yield f"the main loop must hold {wanted}, got {', '.join(sorted(bases)) or 'no loop'}"
    waits = count_waits(loop)
    if waits > 1:
        yield f"the main loop must wait once for its products, got {waits} WARPGROUP.DEPBAR, which serialise them"
    if _is_odd(result):
        return
    loads = "UTMALDG" if uses_descriptors(launch) else "LDGSTS"
    slow = count_instructions(loop, "LDG")
    if loads not in bases or slow:
        yield f"the main loop must load by {loads} alone, got {count_instructions(loop, loads)} of it and {slow} LDG"


def _is_odd(result: CompiledKernel) -> bool:
    """Whether rows of a shape are no multiples of 16 bytes: elements are then loaded one by one, and may spill."""
    return result.named_launch.shape == ODD


def launches_for_arch(arch: str, *, quick: bool, rows: Sequence[TableRow] = ROWS) -> list[NamedLaunch]:
    """The launches that are compiled for an architecture; a few for AMD, whose code nothing here reads."""
    found = list(record_launches_of_rows(table_rows_of_arch(arch, rows)))
    calls = few_calls() if quick else all_calls()
    if arch not in CHIPS:
        quick, calls = True, few_calls()[-1:]
    for call in calls:
        found += record_launches(call, arch, recompute=not quick)
    for dtype in ("bf16",) if quick else ("bf16", "fp16", "fp32"):
        found += record_other_launches(dtype)
    return [named for named in found if named.launch.num_programs]


def compile_all(arch: str, launches: Iterable[NamedLaunch], *, quick: bool = False) -> Iterator[CompiledKernel]:
    """Compiles each kernel once, however many launches need it.

    With `quick` only the code of products in bfloat16 is disassembled; that in float16 differs by the type.
    """
    kernels: dict[tuple[str, ...], list[NamedLaunch]] = {}
    for named in launches:
        kernels.setdefault(compiler_input_of(named.launch, arch).key, []).append(named)
    for alike in tqdm(kernels.values(), desc=arch, unit="kernel", file=sys.stderr):
        rows = tuple(dict.fromkeys(named.table_row for named in alike if named.table_row is not None))
        first = alike[0]
        listed = not quick or (is_product(first.launch) and first.dtype == "bf16")
        try:
            yield CompiledKernel(arch, first, rows, compile_launch(first.launch, arch, listed=listed))
        except Exception as error:  # Compilers fail in many ways, and each failure is a finding.
            reason = " ".join(str(error).split())[-200:]
            yield CompiledKernel(arch, first, rows, None, f"{type(error).__name__}: {reason}")


def describe_uncovered_rows(
    arch: str, results: Iterable[CompiledKernel], rows: Sequence[TableRow] = ROWS
) -> Iterator[str]:
    """Rows of the table that no kernel shows exactly as they are."""
    shown = {
        (row.key, result.named_launch.dtype) for result in results for row in result.table_rows if _shows(result, row)
    }
    for row in table_rows_of_arch(arch, rows):
        if not isinstance(row.tile, TileConfig):
            continue
        for dtype in ("bf16", "fp16") if row.key.bits == 16 else ("fp32",):
            if (row.key, dtype) not in shown:
                yield f"tile_table.py, {row.key}: no kernel of {format_table_tile(row.tile)} was compiled in {dtype}"


def _shows(result: CompiledKernel, row: TableRow) -> bool:
    launch, tile = result.named_launch.launch, row.tile
    if not isinstance(tile, TileConfig):
        return False
    return format_tile_of_launch(launch) == format_table_tile(tile) and uses_descriptors(launch) == tile.descriptors


def csv_cells(result: CompiledKernel) -> dict[str, str]:
    """A row of the CSV file."""
    named, launch, compiled = result.named_launch, result.named_launch.launch, result.compiled
    row = {
        "arch": result.arch,
        "kernel": launch.kernel.__name__,
        "call": named.name,
        "dtype": named.dtype,
        "tile": format_tile_of_launch(launch),
        "table_rows": "; ".join(map(format_table_key, result.table_rows)),
    }
    columns = dict.fromkeys(("registers", "stack_bytes", "shared_bytes", "programs_per_sm", "occupancy"), "")
    columns |= dict.fromkeys(("loop_instructions", "loop_tensor_core", "tensor_core_share", "loop_loads"), "")
    columns |= dict.fromkeys(("loop_waits", "epilogue_instructions", "instructions"), "")
    if compiled is not None:
        columns["shared_bytes"] = str(compiled.shared_bytes)
    if compiled is not None and compiled.machine_code is not None:
        code, chip = compiled.machine_code, CHIPS[result.arch]
        programs = programs_per_processor(compiled, chip)
        columns |= {"registers": code.num_registers, "stack_bytes": code.stack_bytes, "programs_per_sm": programs}
        columns["occupancy"] = f"{programs * launch.num_warps * 32 / chip.max_threads:.3f}"
        columns["instructions"] = len(code.instructions) or ""
        if is_product(launch) and code.instructions:
            busy = count_tensor_core(code.main_loop)
            columns |= {"loop_instructions": len(code.main_loop), "loop_tensor_core": busy}
            columns["tensor_core_share"] = f"{busy / max(len(code.main_loop), 1):.3f}"
            columns["loop_loads"] = count_instructions(code.main_loop, "LDGSTS", "UTMALDG", "LDG")
            columns["loop_waits"] = count_waits(code.main_loop)
            columns["epilogue_instructions"] = len(code.epilogue)
    return row | {name: str(value) for name, value in columns.items()}


def cells_of_other_tritons(path: Path, source: dict[str, str]) -> list[dict[str, str]]:
    """The rows of a file that other versions of Triton compiled."""
    known = read_cells(path, ("triton",), MODULE) if path.exists() else []
    return [row for row in known if row["triton"] != source["triton"]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if any kernel is not as it should be."""
    description = (
        "Compiles every kernel for every architecture, and fails where the code of one is not as it should be."
    )
    parser = make_parser(MODULE, description)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="(default: all)")
    parser.add_argument("--check", action="store_true", help="compile less, and write no file but that of --output")
    parser.add_argument("--output", type=Path, help="CSV file (default: results/compiled_kernels.csv)")
    argv, options = parse_arguments(parser, argv)
    with exit_on_usage_errors(parser):
        check_not_interpreted()
    results: list[CompiledKernel] = []
    wrong: list[str] = []
    for arch in options.arch:
        found = list(compile_all(arch, launches_for_arch(arch, quick=options.check), quick=options.check))
        for result in found:
            name, launch = result.named_launch.launch.kernel.__name__, result.named_launch.launch
            where = f"{arch} {name} {format_tile_of_launch(launch)} {result.named_launch.dtype}"
            wrong += [f"{where} ({result.named_launch.name}): {violation}." for violation in describe_faults(result)]
        wrong += [f"{sentence}." for sentence in describe_uncovered_rows(arch, found)]
        results += found
    source = collect_provenance(command_line(MODULE, argv))
    if options.output is not None or not options.check:
        path = options.output or RESULTS / "compiled_kernels.csv"
        write_cells(path, [csv_cells(result) for result in results], source, kept=cells_of_other_tritons(path, source))
    for sentence in wrong:
        print(sentence)
    print(f"{len(results)} kernels compiled for {', '.join(options.arch)}: {len(wrong)} violations.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
