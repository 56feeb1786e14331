"""The tuner without a GPU: its tasks, its choice of tiles by their times, and the file that it writes."""

import math
import time

import pytest
import torch

from benchmarks.kernels import tile_rows, tune
from benchmarks.kernels.ahead_of_time import CompiledLaunch
from benchmarks.kernels.kernel_calls import SD_SHAPES
from benchmarks.kernels.products import ProductShape, draw_operands, prepare_product
from benchmarks.kernels.sass import Instruction, MachineCode
from benchmarks.kernels.tile_candidates import candidate_tiles
from benchmarks.kernels.tile_measure import (
    ProductTask,
    TileTimer,
    assert_matches_reference,
    reference_outputs,
    why_refused,
)
from mtu_kernels.triton.launch import arch_of, execute_launch, is_interpreted
from mtu_kernels.triton.tile_choice import default_tile, find_tile, triton_version_string
from mtu_kernels.triton.tile_table import ROWS
from mtu_kernels.triton.tiles import LIBRARY, PRODUCTS, TableRow, TileConfig, TileKey

SMALL, LARGE, WIDE = TileConfig(64, 64, 32, 4, 3), TileConfig(128, 64, 64, 4, 3), TileConfig(128, 128, 64, 8, 3, True)
KEY = TileKey("expert_in", "sm_90", 16, True, 640, 2048)


def test_the_shipped_table_is_what_the_tuner_writes():
    assert tile_rows.render_rows(ROWS) == tune.SHIPPED.read_text()
    assert tile_rows.merge_rows(ROWS, ()) == ROWS


@pytest.mark.parametrize(
    "rows",
    [
        (),
        (TableRow(KEY, LIBRARY, 'a "quoted" source \\'),),
        (*ROWS, TableRow(KEY, WIDE, "µs")),
        (TableRow(KEY._replace(triton="3.10"), WIDE, ""), TableRow(KEY._replace(triton="3.6"), SMALL, "")),
    ],
)
def test_a_table_is_read_as_it_was_written(rows, tmp_path):
    path = tmp_path / "table.py"
    tile_rows.write_rows(path, rows)
    assert tile_rows.read_rows(path) == tile_rows.merge_rows(rows, ())
    assert list(tmp_path.iterdir()) == [path]


def test_merging_drops_what_was_measured_again_and_keeps_the_rest():
    other = KEY._replace(arch="sm_80")
    old = [
        TableRow(other, SMALL, "other GPU"),
        TableRow(KEY, SMALL, "old"),
        TableRow(KEY._replace(tokens=0), SMALL, "old"),
    ]
    new = [TableRow(KEY._replace(tokens=0), LARGE, "new")]
    merged = tile_rows.merge_rows(old, new, measured=(KEY, KEY._replace(tokens=0)))
    assert [(row.key, row.source) for row in merged] == [(other, "other GPU"), (KEY._replace(tokens=0), "new")]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_75", "gfx942"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("grouped", [False, True])
def test_candidates_hold_the_table_and_the_default_and_fit_the_registers(arch, product, grouped):
    key = TileKey(product, arch, 16, grouped, 640, 2048)
    found = candidate_tiles(key)
    assert len(set(found)) == len(found)
    assert {find_tile(key), default_tile(key)} <= set(found)
    assert (LIBRARY in found) == (not grouped)
    # Two accumulators of all registers that a product can have: one, and half as many columns again.
    wide = [tile for tile in found if isinstance(tile, TileConfig) and tile.block_n % 3 == 0]
    assert bool(wide) == (arch == "sm_90" and product == "expert_in" and not grouped)
    assert all(tile.block_m * tile.block_n * 2 == 192 * 32 * tile.num_warps for tile in wide)
    grid = [tile for tile in found if isinstance(tile, TileConfig) and tile not in (*wide, find_tile(key))]
    assert len(grid) > 10
    has_descriptors = arch in ("sm_90", "sm_100") and product not in ("expert_out_backward", "expert_weights")
    assert any(tile.descriptors for tile in grid) == has_descriptors
    pairs = 2 if product in ("expert_in", "expert_in_train") else 1
    assert all(tile.block_m * tile.block_n * pairs <= 128 * 32 * tile.num_warps for tile in grid)


def test_shapes_of_one_key_are_measured_once():
    tasks = tune.tasks_by_key(PRODUCTS, SD_SHAPES, "sm_90")
    # 320 with 8192 and 32768 tokens; 640 with 2048, 8192 and 32768; 1280 with 128, 512, 2048 and 8192.
    assert len(tasks) == len(PRODUCTS) * 2 * 9
    keys = {
        task.shape.tile_key(task.product, "sm_90", 16)._replace(triton=triton_version_string())
        for task in tasks.values()
    }
    assert tasks.keys() == keys


def test_the_products_of_inference_are_measured_first():
    tasks = list(tune.tasks_by_key(PRODUCTS, ((640, 1024),), "sm_90", batches=(2,)).values())
    dense = [task.product for task in tasks if task.shape.K is None]
    assert [task.shape.K for task in tasks] == [None] * len(PRODUCTS) + [2] * len(PRODUCTS)
    assert dense[:2] == ["expert_in", "expert_sum"]
    assert sorted(dense) == sorted(PRODUCTS)
    only = tune.tasks_by_key(PRODUCTS, ((640, 1024),), "sm_90", (2, 8), ("top-2",))
    assert {(task.shape.E, task.shape.K) for task in only.values()} == {(8, 2)}


def measured(tokens, **times):
    tiles = {"small": SMALL, "large": LARGE, "wide": WIDE, "library": LIBRARY}
    return tune.TileTimes(KEY._replace(tokens=tokens), {tiles[name]: time for name, time in times.items()}, SMALL)


def test_a_width_gets_the_tile_that_is_best_on_the_whole_and_exceptions_where_they_pay():
    few, some, many = (
        measured(128, small=10, large=20),
        measured(2048, small=41, large=40),
        measured(8192, small=200, large=100),
    )
    rows = tune.choose_rows([few, some, many], "here")
    assert [(row.key.tokens, row.tile) for row in rows] == [(0, LARGE), (128, SMALL)]
    assert rows[1].source == "here: 10.0 µs at 128 tokens, before 10.0"
    assert rows[0].source.startswith(
        "here: 20.0 µs at 128 tokens, before 10.0; 40.0 µs at 2048 tokens, before 41.0; 100.0"
    )


def test_a_tile_that_fails_somewhere_is_not_chosen_for_a_width():
    rows = tune.choose_rows([measured(128, small=10, wide=1), measured(2048, small=40, library=39.9)], "here")
    assert [(row.key.tokens, row.tile) for row in rows] == [(0, SMALL), (128, WIDE)]
    assert tune.choose_rows([measured(128, wide=1)], "here")[0].source == "here: 1.0 µs at 128 tokens, before none"
    rows = tune.choose_rows([measured(128, wide=1), measured(2048, small=1)], "here")
    assert [(row.key.tokens, row.tile) for row in rows] == [(128, WIDE), (2048, SMALL)]


def test_tuning_writes_the_table_after_each_shape_and_stops_in_time(tmp_path, capsys):
    path = tmp_path / "table.py"
    tasks = tune.tasks_by_key(("expert_in",), ((640, 1024),), "sm_90")
    refused = [(task, WIDE) for task in tasks.values()]
    written = []

    def measure(task, tiles, keep):
        written.append(path.exists())
        assert WIDE not in tiles
        assert keep == (find_tile(task.shape.tile_key("expert_in", "sm_90", 16)),)
        if task.shape.B == 8 and task.shape.K is None:
            return {}
        return {tile: 100.0 - place for place, tile in enumerate(tiles)}

    later = time.monotonic() + 1000
    done = tune.measure_and_write_table(tasks, measure, path, "measured here", refused=refused, until=later)
    # (640, 1024) with 2 and 8 samples, dense and top-2; one of them comes out with nothing.
    assert written == [False, True, True, True]
    assert [(one.key.grouped, one.key.tokens) for one in done] == [(False, 2048), (True, 2048), (True, 8192)]
    assert "no candidate computed it rightly" in capsys.readouterr().err
    table = {row.key: row for row in tile_rows.read_rows(path)}
    assert table[KEY._replace(tokens=0, triton=triton_version_string())].source.startswith("measured here: ")
    # Rows for other versions of Triton stay, and so do those of other GPUs.
    assert {row.key: row for row in ROWS}.items() <= table.items()
    before = path.read_text()
    assert tune.measure_and_write_table(tasks, measure, path, "measured later", until=-math.inf) == []
    assert "out of time: 4 of 4 shapes" in capsys.readouterr().err
    assert path.read_text() == before


def test_a_width_that_is_cut_off_keeps_its_shipped_row_for_what_was_not_measured(tmp_path, monkeypatch):
    path = tmp_path / "table.py"
    tasks = tune.tasks_by_key(("expert_in",), ((1280, 64), (1280, 1024)), "sm_90", (2,), ("dense",))
    few, many = tasks
    width = few._replace(tokens=0)
    shipped = TableRow(width, WIDE, "shipped")
    monkeypatch.setattr(tune.tile_table, "ROWS", (shipped,))
    clock = iter((0, 2))
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    tune.measure_and_write_table(tasks, lambda task, tiles, keep: {SMALL: 1.0}, path, "here", until=1)
    assert {row.key: row.tile for row in tile_rows.read_rows(path)} == {width: WIDE, few: SMALL}
    monkeypatch.setattr(tune.time, "monotonic", lambda: 0)
    tune.measure_and_write_table(tasks, lambda task, tiles, keep: {SMALL: 1.0}, path, "here", until=1)
    assert {row.key: row.tile for row in tile_rows.read_rows(path)} == {width: SMALL}
    assert many.tokens == 2048


@pytest.mark.parametrize(("times", "code"), [({SMALL: 1.0}, 0), ({}, 1)])
def test_a_shape_that_nothing_computes_rightly_is_a_failure(times, code, tmp_path, monkeypatch):
    class FakeTimer(TileTimer):
        def __init__(self, device):
            super().__init__(torch.device("cpu"))

        def time_tiles(self, task, tiles, keep=()):
            return times

    facts = dict.fromkeys(("processor", "torch", "triton", "commit"), "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stand_ins = {"is_interpreted": lambda: False, "arch_of": lambda device: "sm_90", "TileTimer": FakeTimer}
    stand_ins |= {"collect_provenance": lambda *args: facts, "compile_ahead": lambda tiles, arch: {}}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(tune, name, stand_in)
    arguments = ["--products", "expert_in", "--shapes", "640x1024", "--table", str(tmp_path / "table.py")]
    assert tune.main(arguments) == code


WAIT = Instruction(0x10, "WARPGROUP.DEPBAR.LE", None)


@pytest.mark.parametrize(
    ("stack", "shared", "loop", "reason"),
    [
        (0, 100 * 1024, (WAIT, Instruction(0x20, "WARPGROUP.ARRIVE", None)), None),
        (8, 100 * 1024, (WAIT,), "it spills 8 bytes"),
        (0, 228 * 1024, (WAIT,), "it needs 233472 bytes of shared memory"),
        (0, 100 * 1024, (WAIT,) * 4, "it waits 4 times for its products in a step of its main loop"),
    ],
)
def test_tiles_that_spill_or_do_not_fit_or_are_serialised_are_not_measured(stack, shared, loop, reason):
    compiled = CompiledLaunch(None, shared, 0, MachineCode(90, stack, loop, loop, ()))
    assert why_refused(compiled, "sm_90") == reason
    assert why_refused(compiled._replace(shared_bytes=0, machine_code=None), "gfx942") is None


@pytest.mark.slow
@pytest.mark.parametrize("K", [None, 2])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_checked_against_their_reference(product, K):
    device = "cpu" if is_interpreted() else "cuda"
    operands = draw_operands(ProductShape(32, 20, 2, 4, K, 16), "fp16", device)
    exact = reference_outputs(product, operands)
    for tile in (TileConfig(16, 16, 16, 1, 2), *((LIBRARY,) if K is None else ())):
        work = prepare_product(product, operands, tile)
        work.run(execute_launch)
        assert_matches_reference(work.outputs, exact, torch.float16)
        next(iter(work.outputs.values()))[0, 0] += 1
        with pytest.raises(AssertionError, match="must be within"):
            assert_matches_reference(work.outputs, exact, torch.float16)


def test_the_library_has_no_product_by_expert():
    operands = draw_operands(ProductShape(32, 20, 2, 4, 2, 16), "fp16", "meta")
    with pytest.raises(ValueError, match="expert_sum must have a tile where routing is top-k"):
        prepare_product("expert_sum", operands, LIBRARY)


REFUSED = {
    ("--products", "norm"): "unknown product 'norm': expected some of expert_in, ",
    ("--routing", "sparse"): "unknown routing 'sparse': expected some of dense, top-2.",
    ("--batches", "0"): "expected positive whole numbers such as 1,8, got '0'.",
    ("--shapes", "320"): "unknown shape '320': expected DxL as in 320x4096",
    ("--table", "table.csv"): "--table must be a Python file, got table.csv.",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_arguments_are_refused_in_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert REFUSED[arguments] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "Tiles are measured on a CUDA device, and torch finds none." in capsys.readouterr().err


def assert_timed(product, shape, fits, too_large, device):
    task = ProductTask(product, shape, "bf16" if device.type == "cuda" else "fp16")
    with TileTimer(device) as timer:
        times = timer.time_tiles(task, (too_large, fits), (fits,))
    assert times.keys() == {fits}
    assert 0 < times[fits] < math.inf
    assert timer.refused.keys() == {(task, too_large)}


@pytest.mark.gpu
@pytest.mark.parametrize("product", PRODUCTS)
def test_tiles_are_timed_on_a_gpu_unless_they_do_not_fit(product):
    device = torch.device("cuda", torch.cuda.current_device())
    shape = ProductShape(320, 256, 2, 8, 2, 160)
    fits = default_tile(shape.tile_key(product, arch_of(device), 16))
    assert_timed(product, shape, fits, TileConfig(128, 128, 128, 8, 8), device)


@pytest.mark.slow
@pytest.mark.skipif(not is_interpreted(), reason="kernels are not interpreted here")
def test_tiles_are_timed_unless_they_do_not_run():
    # Blocks are powers of two.
    fits, refused = TileConfig(32, 16, 16, 1, 1), TileConfig(32, 24, 16, 1, 1)
    assert_timed("expert_sum", ProductShape(32, 20, 2, 4, 2, 16), fits, refused, torch.device("cpu"))
