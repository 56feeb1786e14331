"""Kernels compiled for GPUs that are not here. Each test runs in a process of its own: here kernels are interpreted."""

import ast
import csv
import os
import subprocess
import sys

import pytest

from benchmarks.harness.provenance import ROOT
from benchmarks.kernels import compiled_kernels
from benchmarks.kernels.ahead_of_time import ARCHITECTURES
from benchmarks.kernels.kernel_calls import BITS
from benchmarks.kernels.sass import count_instructions, count_tensor_core, count_waits, find_main_loop, parse_listing
from mtu_kernels.triton.launch import is_interpreted
from mtu_kernels.triton.tiles import PAIR_PRODUCTS, TileConfig


def python(*arguments, **environment):
    """What a fresh interpreter prints, and how it ends."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shipped_tiles_compile_without_spills_within_the_chip_and_with_loads_that_run_ahead(arch, tmp_path):
    output = tmp_path / "kernels.csv"
    result = python("-m", "benchmarks.kernels.compiled_kernels", "--check", "--arch", arch, "--output", output)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert result.stdout.endswith(f"kernels compiled for {arch}: 0 violations.\n")
    with output.open(newline="") as file:
        kernels = list(csv.DictReader(file))
    compiled = {(name, kernel["dtype"]) for kernel in kernels for name in kernel["table_rows"].split("; ")}
    rows = [row for row in compiled_kernels.table_rows_of_arch(arch) if isinstance(row.tile, TileConfig)]
    dtypes = {16: ("bf16", "fp16"), 32: ("fp32",)}
    assert {
        (compiled_kernels.format_table_key(row), dtype) for row in rows for dtype in dtypes[row.key.bits]
    } <= compiled
    names = {kernel["kernel"] for kernel in kernels}
    assert {"layer_norm_kernel", "layer_norm_backward_kernel", "geglu_kernel", "geglu_backward_kernel"} <= names
    assert BITS.keys() >= {kernel["dtype"] for kernel in kernels}


CHECKER = """
from benchmarks.kernels.compiled_kernels import compile_all, describe_faults, describe_uncovered_rows
from benchmarks.kernels.compiled_kernels import table_rows_of_arch
from benchmarks.kernels.kernel_calls import record_launches_of_rows
from benchmarks.kernels.kernel_model import GPUS
from benchmarks.kernels.prediction import cells_of_product, compile_products, first_products_of_dense_calls
from mtu_kernels.triton.tiles import TableRow, TileConfig, TileKey

def show(arch, product, *tile):
    rows = (TableRow(TileKey(product, arch, 16, True), TileConfig(*tile), ""),)
    print(*tile, *describe_faults(next(compile_all(arch, record_launches_of_rows(rows)))), sep=" | ")

show("sm_80", "expert_in", 128, 128, 32, 4, 3)
show("sm_80", "expert_in", 128, 128, 64, 8, 5)
show("sm_86", "expert_sum", 128, 64, 64, 4, 1)
show("sm_90", "expert_sum", 128, 64, 64, 4, 3, True)
result = next(compile_all("sm_90", record_launches_of_rows(table_rows_of_arch("sm_90")[:1])))
code = result.compiled.machine_code
waits = tuple(i for i in code.main_loop if i.name.startswith("WARPGROUP.DEPBAR"))
serialised = code._replace(main_loop=(*code.main_loop, *waits))
faulty = result._replace(compiled=result.compiled._replace(machine_code=serialised))
print(len(waits), *describe_faults(result), *describe_faults(faulty))
for rates in GPUS.values():
    found = compile_products(rates, ((640, 1024),))
    for kernel in found:
        print(cells_of_product(kernel, rates) | {"product": kernel.launch.product_name})
    firsts = first_products_of_dense_calls(found)
    print(*((str(tokens), first.num_programs, first.starts_early) for tokens, first in firsts.items()))
row = TableRow(TileKey("expert_in", "sm_80", 16, True), TileConfig(64, 64, 64, 4, 3), "")
print(*describe_uncovered_rows("sm_80", [], (row,)))
"""


@pytest.mark.slow
def test_the_check_rejects_spills_and_what_does_not_fit_and_loads_and_products_that_wait():
    result = python("-c", CHECKER)
    assert result.returncode == 0, result.stderr
    spills, too_large, waits, right, serialised, *predicted, describe_uncovered_rows = result.stdout.splitlines()
    assert spills.startswith("128 | 128 | 32 | 4 | 3 | registers must not spill, got ")
    assert too_large.endswith("shared memory must be at most 166912 bytes, got 196608")
    assert "the main loop must load by LDGSTS alone, got 0 of it and " in waits
    assert right == "128 | 64 | 64 | 4 | 3 | True"
    assert serialised == "1 the main loop must wait once for its products, got 2 WARPGROUP.DEPBAR, which serialise them"
    # Dense: the first product alone is the package's. The second one is the library's.
    firsts = [ast.literal_eval(line) for line in predicted if line.startswith("(")]
    assert firsts == [("640x1024 B=2", 640, True), ("640x1024 B=2", 640, False)]
    cells = [ast.literal_eval(line) for line in predicted if line.startswith("{")]
    assert [(row["gpu"][:4], row["call"].split()[2]) for row in cells] == [
        (gpu, routing) for gpu in ("H100", "A100") for routing in ("dense", "top-2", "top-2")
    ]
    for row in cells:
        # Operands pass through registers on an A100, whose multiprocessors then move more than they load.
        assert (float(row["shared_cycles"]) > 0) == (row["gpu"][:4] == "A100")
        assert 0 < float(row["issue_cycles"]) < float(row["tensor_cycles"])
        assert int(row["programs_per_sm"]) >= 2
        rows, columns = map(int, row["tile"].split("x")[:2])
        columns *= 2 if row["product"] in PAIR_PRODUCTS else 1
        assert float(row["l2_bytes_per_flop"]) == pytest.approx((rows + columns) / (rows * columns), rel=1e-3)
    assert describe_uncovered_rows.count("no kernel of 64x64x64 warps=4 stages=3 was compiled in") == 2


JUST_IN_TIME = """
import os

import triton
from benchmarks.kernels.ahead_of_time import compile_launch, gpu_target
from benchmarks.kernels.kernel_calls import FFNCall, record_launches, top_2_shape

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return gpu_target("sm_90")

triton.runtime.driver.set_active(Driver())
cache = os.environ["TRITON_CACHE_DIR"]
for named in list(record_launches(FFNCall(top_2_shape(640, 1024)), "sm_90"))[:3]:
    launch = named.launch
    compile_launch(launch, "sm_90", listed=False)
    before = set(os.listdir(cache))
    launch.kernel.warmup(*launch.arguments, **launch.constant_arguments, **launch.compiler_options, grid=(1,))
    print(launch.kernel.__name__, len(before), len(set(os.listdir(cache)) - before))
"""


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_a_call_would_compile(tmp_path):
    # A call finds all that it needs in the cache: the same types, divisors and options.
    result = python("-c", JUST_IN_TIME, TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    kernels = [line.split() for line in result.stdout.splitlines()]
    assert [name for name, _, _ in kernels] == [
        "layer_norm_kernel",
        "expert_in_descriptor_kernel",
        "expert_sum_descriptor_kernel",
    ]
    assert all(int(before) > 0 and new == "0" for _, before, new in kernels)


AHEAD = """
from benchmarks.kernels.products import ProductShape
from benchmarks.kernels.tile_measure import ProductTask, compile_ahead
from mtu_kernels.triton.tiles import LIBRARY, TileConfig

if __name__ == "__main__":
    task = ProductTask("expert_sum", ProductShape(320, 256, 2, 8, 2, 320), "bf16")
    tiles = LIBRARY, TileConfig(128, 128, 64, 8, 9)
    for (_, tile), reason in compile_ahead({task: tiles}, "sm_90").items():
        print(tiles.index(tile), reason)
"""


@pytest.mark.slow
def test_the_tuner_finds_out_what_does_not_fit_before_it_measures(tmp_path):
    script = tmp_path / "ahead.py"
    script.write_text(AHEAD)
    result = python(script, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    # Nine stages of 32 KB, and the static part.
    assert result.stdout == f"1 it needs {(9 * 32 + 1) * 1024} bytes of shared memory\n"


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   STG.E.128 [R2.64], R4 ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/              @!P0 BRA `(.L_x_1) ;
"""

SERIALISED = """
.L_x_0:
        /*0000*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   WARPGROUP.ARRIVE ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   EXIT ;
"""


def test_waits_for_tensor_cores_are_counted_within_the_loop():
    loop = find_main_loop(parse_listing(SERIALISED))
    assert (count_tensor_core(loop), count_waits(loop)) == (2, 2)
    assert count_waits(find_main_loop(parse_listing(LISTING))) == 0


def test_the_main_loop_is_the_shortest_around_the_product():
    instructions = parse_listing(LISTING)
    assert len(instructions) == 9
    loop = find_main_loop(instructions)
    assert [instruction.address for instruction in loop] == [0x30, 0x40, 0x50]
    assert count_tensor_core(loop) == 2
    assert count_instructions(instructions, "LDGSTS", "STG") == 2
    by_address = LISTING.replace("`(.L_x_0)", "0x30").replace("`(.L_x_1)", "0x10").replace("`(.L_x_2)", "0x60")
    assert parse_listing(by_address) == instructions


CANDIDATES = ["expert_sum", "--arch", "sm_80", "--top-k", "--shapes", "1280x1024"]


@pytest.mark.slow
def test_candidates_are_listed_with_what_is_wrong_with_them_and_the_fastest_first():
    tiles = ["128x128x128x8x4", "64x64x64x4x3", "128x64x64x4x3x4"]
    result = python("-m", "benchmarks.kernels.compiled_candidates", *CANDIDATES, "--tiles", *tiles)
    assert result.returncode == 0, result.stderr
    head, _, *lines = result.stdout.splitlines()
    assert head.endswith("µs predicted for one A100 SXM 80GB, not measured")
    names = ["128x64x64 warps=4 stages=3 group_m=4", "64x64x64 warps=4 stages=3 group_m=8"]
    assert [line[:38].rstrip() for line in lines[:2]] == names
    # Registers, shared memory, programs, instructions of the loop, its waits, and of what follows; and the time.
    numbers = [[float(number) for number in line[38:].split()] for line in lines[:2]]
    assert all(len(row) == 7 and row[4] == 0 for row in numbers)
    assert numbers[0][6] < numbers[1][6]
    assert lines[2].startswith("128x128x128 warps=8 stages=4")
    assert lines[2].endswith("shared memory must be at most 166912 bytes, got 196608")


@pytest.mark.skipif(not is_interpreted(), reason="kernels are not interpreted here")
def test_interpreted_kernels_are_refused(capsys):
    with pytest.raises(SystemExit):
        compiled_kernels.main([])
    assert "TRITON_INTERPRET must be unset" in capsys.readouterr().err


EARLY = """
from benchmarks.kernels.ahead_of_time import compile_launch
from benchmarks.kernels.kernel_calls import FFNCall, dense_shape, record_launches
from benchmarks.kernels.products import draw_operands
from benchmarks.kernels.sass import count_waits
from mtu_kernels.triton.kernels.expert_in import FirstProductOutputs, launch_expert_in
from mtu_kernels.triton.tiles import TileConfig

operands = draw_operands(dense_shape(640, 1024), "bf16", "meta")
for tile in (
    TileConfig(128, 64, 64, 4, 3),
    TileConfig(128, 64, 64, 4, 3, descriptors=True),
    TileConfig(256, 96, 64, 8, 3, descriptors=True),
    TileConfig(128, 64, 64, 4, 5, descriptors=True, persistent=True),
):
    outputs = FirstProductOutputs(operands.h, None)
    launch = launch_expert_in(operands.x_hat, operands.experts, operands.routing, outputs, tile, "ieee", overlap=True)
    code = compile_launch(launch, "sm_90").machine_code
    names = [i.name_without_modifiers for i in code.instructions]
    first_load = min(names.index(name) for name in ("LDGSTS", "UTMALDG") if name in names)
    early = names.index("ACQBULK") < first_load
    print(launch.kernel.__name__, code.stack_bytes, count_waits(code.main_loop), early)
for arch in "sm_80", "sm_90":
    recorded = record_launches(FFNCall(dense_shape(640, 1024)), arch)
    print(*(named.launch.may_overlap_previous for named in recorded if "inference" in named.name))
"""


@pytest.mark.slow
def test_a_product_that_starts_early_waits_before_it_loads():
    """For the launch before it, which writes what it loads."""
    result = python("-c", EARLY)
    assert result.returncode == 0, result.stderr
    kernels = "expert_in_kernel", "expert_in_descriptor_kernel", "expert_in_wide_descriptor_kernel"
    # No register spills, and the main loop waits once for the products that are under way.
    *compiled, before, after = result.stdout.splitlines()
    assert compiled == [f"{name} 0 1 True" for name in (*kernels, "expert_in_persistent_kernel")]
    # Of LayerNorm and the first product, the second starts early, where there is such a launch.
    assert (before, after) == ("False False", "False True")
