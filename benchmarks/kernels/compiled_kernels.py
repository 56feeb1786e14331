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

from benchmarks.harness.commands import make_parser, parse, usage_errors
from benchmarks.harness.provenance import RESULTS, command_line, provenance
from benchmarks.harness.rows import read_cells, write_cells
from benchmarks.kernels.ahead_of_time import (
    ARCHITECTURES,
    CHIPS,
    Compiled,
    check_not_interpreted,
    compile_launch,
    programs_per_processor,
    specialize,
)
from benchmarks.kernels.kernel_calls import (
    ODD,
    NamedLaunch,
    all_calls,
    block_of,
    by_descriptor,
    few_calls,
    record,
    record_others,
    record_rows,
)
from benchmarks.kernels.sass import count, count_tensor_core, count_waits
from mtu_kernels.triton.launch import Launch
from mtu_kernels.triton.tile_choice import keys_from_exact_to_general, triton_major_minor
from mtu_kernels.triton.tile_table import ROWS
from mtu_kernels.triton.tiles import TableRow, TileConfig

MODULE = "benchmarks.kernels.compiled_kernels"
TENSOR_CORE = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}


class Result(NamedTuple):
    """A kernel of one architecture, with all rows of the table that it is the code of.

    Attributes:
        named: the first launch that needs it.
        rows: of the table.
        compiled: None where the compiler refuses, with its `error`.
    """

    arch: str
    named: NamedLaunch
    rows: tuple[TableRow, ...]
    compiled: Compiled | None
    error: str = ""


def is_product(launch: Launch) -> bool:
    return launch.product_name is not None


def tile_of(launch: Launch) -> str:
    """Block sizes, warps and stages of a launch, as text."""
    names = ("BLOCK_M", "BLOCK_N", "ROWS", "BLOCK_D")
    numbers = block_of(launch) if is_product(launch) else [launch.constant_arguments.get(name) for name in names]
    sizes = "x".join(str(number) for number in numbers if number is not None)
    return f"{sizes} warps={launch.num_warps} stages={launch.num_stages}".strip()


def table_tile(tile: TileConfig) -> str:
    """A tile of the table in the form of `tile_of`."""
    sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return f"{sizes} warps={tile.num_warps} stages={tile.num_stages}"


def row_name(row: TableRow) -> str:
    """A row of the table in a cell of the CSV file: product, kind of routing, width and tokens (0: any), Triton."""
    version = f" triton {row.key.triton}" if row.key.triton else ""
    return f"{row.key.product} {'grouped' if row.key.grouped else 'dense'} {row.key.width}x{row.key.tokens}{version}"


def rows_of(arch: str, rows: Iterable[TableRow] = ROWS) -> list[TableRow]:
    """Rows of an architecture that the installed Triton gets: those of its version, and those for any version else."""
    ours = [row for row in rows if row.key.arch == arch and row.key.triton in ("", triton_major_minor())]
    named = {row.key._replace(triton="") for row in ours if row.key.triton}
    return [row for row in ours if row.key.triton or named.isdisjoint(keys_from_exact_to_general(row.key))]


def violations(result: Result) -> Iterator[str]:
    """The faults of a kernel, a sentence each."""
    if result.compiled is None:
        yield f"it must compile, got {result.error}"
        return
    code, launch = result.compiled.code, result.compiled.launch
    if code is None:
        return
    chip = CHIPS[result.arch]
    spills = count(code.instructions, "STL", "LDL")
    if (code.stack or spills) and not _is_odd(result):
        uses = f" and {spills} loads and stores of it" if code.instructions else ""
        yield f"registers must not spill, got {code.stack} bytes of stack{uses}"
    if result.compiled.shared > chip.shared_per_program:
        yield f"shared memory must be at most {chip.shared_per_program} bytes, got {result.compiled.shared}"
    elif programs_per_processor(result.compiled, chip) == 0:
        yield f"a program must fit on a multiprocessor, got {code.registers} registers in {launch.num_warps} warps"
    if is_product(launch) and code.instructions and result.named.dtype != "fp32":
        yield from _product_violations(result, launch, code.main_loop)


def _product_violations(result: Result, launch: Launch, loop: Sequence) -> Iterator[str]:
    bases = {instruction.base for instruction in loop}
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
    loads = "UTMALDG" if by_descriptor(launch) else "LDGSTS"
    slow = count(loop, "LDG")
    if loads not in bases or slow:
        yield f"the main loop must load by {loads} alone, got {count(loop, loads)} of it and {slow} LDG"


def _is_odd(result: Result) -> bool:
    """Whether rows of a shape are no multiples of 16 bytes: elements are then loaded one by one, and may spill."""
    return result.named.shape == ODD


def launches_of(arch: str, *, quick: bool, rows: Sequence[TableRow] = ROWS) -> list[NamedLaunch]:
    """The launches that are compiled for an architecture; a few for AMD, whose code nothing here reads."""
    found = list(record_rows(rows_of(arch, rows)))
    calls = few_calls() if quick else all_calls()
    if arch not in CHIPS:
        quick, calls = True, few_calls()[-1:]
    for call in calls:
        found += record(call, arch, recompute=not quick)
    for dtype in ("bf16",) if quick else ("bf16", "fp16", "fp32"):
        found += record_others(dtype)
    return [named for named in found if named.launch.num_programs]


def compile_all(arch: str, launches: Iterable[NamedLaunch], *, quick: bool = False) -> Iterator[Result]:
    """Compiles each kernel once, however many launches need it.

    With `quick` only the code of products in bfloat16 is disassembled; that in float16 differs by the type.
    """
    kernels: dict[tuple[str, ...], list[NamedLaunch]] = {}
    for named in launches:
        kernels.setdefault(specialize(named.launch, arch).key, []).append(named)
    for alike in tqdm(kernels.values(), desc=arch, unit="kernel", file=sys.stderr):
        rows = tuple(dict.fromkeys(named.row for named in alike if named.row is not None))
        first = alike[0]
        listed = not quick or (is_product(first.launch) and first.dtype == "bf16")
        try:
            yield Result(arch, first, rows, compile_launch(first.launch, arch, listed=listed))
        except Exception as error:  # Compilers fail in many ways, and each failure is a finding.
            reason = " ".join(str(error).split())[-200:]
            yield Result(arch, first, rows, None, f"{type(error).__name__}: {reason}")


def uncovered(arch: str, results: Iterable[Result], rows: Sequence[TableRow] = ROWS) -> Iterator[str]:
    """Rows of the table that no kernel shows exactly as they are."""
    shown = {(row.key, result.named.dtype) for result in results for row in result.rows if _shows(result, row)}
    for row in rows_of(arch, rows):
        if not isinstance(row.tile, TileConfig):
            continue
        for dtype in ("bf16", "fp16") if row.key.bits == 16 else ("fp32",):
            if (row.key, dtype) not in shown:
                yield f"tile_table.py, {row.key}: no kernel of {table_tile(row.tile)} was compiled in {dtype}"


def _shows(result: Result, row: TableRow) -> bool:
    launch, tile = result.named.launch, row.tile
    if not isinstance(tile, TileConfig):
        return False
    return tile_of(launch) == table_tile(tile) and by_descriptor(launch) == tile.descriptors


def cells(result: Result) -> dict[str, str]:
    """A row of the CSV file."""
    named, launch, compiled = result.named, result.named.launch, result.compiled
    row = {
        "arch": result.arch,
        "kernel": launch.kernel.__name__,
        "call": named.name,
        "dtype": named.dtype,
        "tile": tile_of(launch),
        "table_rows": "; ".join(map(row_name, result.rows)),
    }
    columns = dict.fromkeys(("registers", "stack_bytes", "shared_bytes", "programs_per_sm", "occupancy"), "")
    columns |= dict.fromkeys(("loop_instructions", "loop_tensor_core", "tensor_core_share", "loop_loads"), "")
    columns |= dict.fromkeys(("loop_waits", "epilogue_instructions", "instructions"), "")
    if compiled is not None:
        columns["shared_bytes"] = str(compiled.shared)
    if compiled is not None and compiled.code is not None:
        code, chip = compiled.code, CHIPS[result.arch]
        programs = programs_per_processor(compiled, chip)
        columns |= {"registers": code.registers, "stack_bytes": code.stack, "programs_per_sm": programs}
        columns["occupancy"] = f"{programs * launch.num_warps * 32 / chip.threads:.3f}"
        columns["instructions"] = len(code.instructions) or ""
        if is_product(launch) and code.instructions:
            busy = count_tensor_core(code.main_loop)
            columns |= {"loop_instructions": len(code.main_loop), "loop_tensor_core": busy}
            columns["tensor_core_share"] = f"{busy / max(len(code.main_loop), 1):.3f}"
            columns["loop_loads"] = count(code.main_loop, "LDGSTS", "UTMALDG", "LDG")
            columns["loop_waits"] = count_waits(code.main_loop)
            columns["epilogue_instructions"] = len(code.epilogue)
    return row | {name: str(value) for name, value in columns.items()}


def rows_of_others(path: Path, source: dict[str, str]) -> list[dict[str, str]]:
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
    argv, options = parse(parser, argv)
    with usage_errors(parser):
        check_not_interpreted()
    results: list[Result] = []
    wrong: list[str] = []
    for arch in options.arch:
        found = list(compile_all(arch, launches_of(arch, quick=options.check), quick=options.check))
        for result in found:
            where = f"{arch} {result.named.launch.kernel.__name__} {tile_of(result.named.launch)} {result.named.dtype}"
            wrong += [f"{where} ({result.named.name}): {violation}." for violation in violations(result)]
        wrong += [f"{sentence}." for sentence in uncovered(arch, found)]
        results += found
    source = provenance(command_line(MODULE, argv))
    if options.output is not None or not options.check:
        path = options.output or RESULTS / "compiled_kernels.csv"
        write_cells(path, [cells(result) for result in results], source, kept=rows_of_others(path, source))
    for sentence in wrong:
        print(sentence)
    print(f"{len(results)} kernels compiled for {', '.join(options.arch)}: {len(wrong)} violations.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
