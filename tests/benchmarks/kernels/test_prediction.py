"""The model of kernels' times: its laws, and its results for earlier versions of the feed-forward."""

import csv

import pytest

from benchmarks.harness.rows import write_cells
from benchmarks.kernels import forward_model
from benchmarks.kernels.compiled_kernels import cells_of_other_tritons
from benchmarks.kernels.forward_model import UNETS, DenseFFNSizes, FirstProductGrid
from benchmarks.kernels.kernel_model import (
    A100,
    H100,
    CompiledTile,
    overlapped_time,
    predict_grid_us,
    predict_library_us,
    predict_product_us,
)
from benchmarks.kernels.prediction import COLUMNS, MEAN, STATUS, cells_of_variant, predict_variants

GPUS = pytest.mark.parametrize("rates", [H100, A100], ids=lambda rates: rates.arch)
TILE = CompiledTile(128, 128, 64, 4, 3, loop=96, epilogue=1340, resident_programs=2)
SHAPES = tuple(DenseFFNSizes(D, L, 2) for unet in UNETS for D, L in unet.ffn_counts)


# By arithmetic on the kernels as they were, to 15 %: two products, first product, second product, LayerNorm, in µs.
@pytest.mark.parametrize(
    ("D", "L", "two", "first", "second", "norm"),
    [
        (320, 4096, 34, 24, 10, 5.5),
        (640, 1024, 33, 24, 13, 3.5),
        (1280, 256, 33, 29, 13.5, 2.5),
        (1280, 64, 17, 15, 6.6, 1.8),
        (640, 4096, 111, 92, 37, 10),
        (1280, 1024, 109, 92, 36, 5.5),
    ],
)
def test_the_model_agrees_with_arithmetic_on_what_there_was(D, L, two, first, second, norm):
    tokens = DenseFFNSizes(D, L, 2)
    now = forward_model.predict_moe_ffn(tokens, forward_model.first_product_before_tuning(tokens, H100), H100)
    floor = forward_model.predict_plain_products(tokens, H100).total_us
    assert floor == pytest.approx(two, rel=0.15)
    assert now.total_us == pytest.approx(first + second + norm, rel=0.15)
    assert now.total_us / floor == pytest.approx((first + second + norm) / two, rel=0.15)


@GPUS
@pytest.mark.parametrize("tokens", SHAPES, ids=str)
def test_nothing_is_faster_than_the_chip(rates, tokens):
    flops = 2 * tokens.num_rows * tokens.hidden_size * tokens.D
    weights_us = tokens.w_out_bytes / rates.memory_tbs / 1e6
    firsts = [
        forward_model.first_product_before_tuning(tokens, rates)._replace(starts_early=True),
        forward_model.ping_pong_first_product(tokens),
    ]
    for forward in (
        *(forward_model.predict_moe_ffn(tokens, first, rates) for first in firsts),
        forward_model.predict_plain_products(tokens, rates),
        forward_model.predict_compiled_stock_ffn(tokens, rates),
    ):
        assert forward.first_us > max(2 * flops / rates.tflops / 1e6, 2 * weights_us) - rates.edge_us
        assert forward.second_us > max(flops / rates.tflops / 1e6, weights_us) + rates.edge_us


@GPUS
def test_a_grid_waits_for_its_slowest_part(rates):
    programs = 4 * rates.num_processors
    base = TILE.make_program(1280)
    time = predict_grid_us(base, programs, rates)
    assert time > rates.microseconds(4 * max(base.loop_cycles(programs, rates).values()))
    # One more program than all multiprocessors have: one of them takes a fifth.
    assert predict_grid_us(base, programs + 1, rates) > 1.2 * time
    # Alone on its multiprocessor, a program hides its epilogue behind nothing.
    alone = predict_grid_us(base._replace(resident_programs=1), programs, rates)
    assert alone - time == pytest.approx(rates.microseconds(3 * (base.epilogue_cycles + 800)), rel=1e-9)
    # Smaller tiles load more for each FLOP.
    small = TILE._replace(rows=64).make_program(1280)
    assert small.l2_bytes_per_flop == pytest.approx(1.5 * base.l2_bytes_per_flop)
    assert predict_grid_us(small, 2 * programs, rates) > time
    # Two stages have one tile on its way: too few for one program alone, if it is small.
    lonely = TILE._replace(step=32, num_stages=2, resident_programs=1).make_program(1280)
    assert predict_grid_us(lonely, rates.num_processors, rates) > predict_grid_us(base, rates.num_processors, rates)


def test_operands_that_pass_through_registers_take_shared_memory_s_time():
    through = TILE._replace(shared_bytes=10**6).make_program(1280)
    assert predict_grid_us(through, 132, H100) > H100.microseconds(20 * 10**6 / 128)


def test_two_bounds_hinder_each_other_where_they_are_equal():
    assert overlapped_time(1.0, 1.0) == pytest.approx(2**0.25)
    assert overlapped_time(1.0, 0.1) == pytest.approx(1.0, rel=1e-4)
    assert predict_product_us(TILE.make_program(64), 1, 3e9, H100) == pytest.approx(1000 + H100.edge_us, rel=1e-3)


@GPUS
def test_a_library_splits_the_depth_where_there_are_few_tiles(rates):
    flops_us = 2 * 128 * 1280 * 5120 / rates.tflops / 1e6
    # Whole products of 64×64 tiles would keep 40 multiprocessors busy.
    whole = flops_us * rates.num_processors / 40
    assert flops_us < predict_library_us(128, 1280, 5120, 0, rates) < whole


@GPUS
@pytest.mark.parametrize("unet", UNETS, ids=lambda unet: unet.name)
def test_a_unet_changes_by_the_share_of_its_feed_forwards(rates, unet):
    share = forward_model.feed_forward_time_share(unet, rates)
    assert (
        share == pytest.approx(unet.ffn_time_share)
        if rates is H100
        else unet.ffn_time_share < share < unet.ffn_flop_share
    )
    assert forward_model.predict_step_ratio(unet, 3.0, 3.0, rates) == 1
    assert forward_model.predict_step_ratio(unet, 0.0, 3.0, rates) == pytest.approx(1 - share)


@GPUS
def test_leads_pay_and_every_row_says_that_it_is_predicted(rates):
    # The rewritten product, here: larger tiles, and a shorter epilogue.
    tile = CompiledTile(256, 128, 64, 8, 3, loop=99, epilogue=1055, resident_programs=1)
    shipped = {
        tokens: FirstProductGrid(tile.make_program(tokens.D), -(-tokens.num_rows // 256) * (tokens.hidden_size // 64))
        for tokens in SHAPES
    }
    found = {variant[:2]: list(cells_of_variant(variant, rates)) for variant in predict_variants(rates, shipped)}
    rows = [row for rows in found.values() for row in rows]
    assert all(tuple(row) == COLUMNS and row["status"] == STATUS and row["gpu"] == rates.name for row in rows)
    means = {variant: float(row["ratio"]) for variant, each in found.items() for row in each if row["subject"] == MEAN}
    assert (
        means["compiled", "leads 1 and 2: and LayerNorm is the compiler's"]
        < means["compiled", "lead 2: first product rewritten"]
    )
    assert means["op", "shipped defaults"] == means["op", "lead 2: first product rewritten"]
    # An A100 has no dependent launches.
    early = means.get(("op", "leads 2 and 4: and launched early"), 0.0)
    assert (early > 0) == (rates is H100)
    assert early < means["op", "shipped defaults"]
    (large,) = (row for row in found["op", "shipped defaults"] if row["subject"] == "1280x1024 B=2")
    assert float(large["first_l2_bytes_over_before"]) == 0.75
    assert float(large["first_l2_bytes_per_flop"]) == pytest.approx(2 * (256 + 128) / (2 * 256 * 128), rel=1e-3)
    unets = [row for row in rows if row["subject"].startswith("UNet")]
    assert len(unets) == 3 * len(UNETS)
    assert all(0.7 < float(row["ratio"]) < 1.1 for row in unets)


def test_a_compiler_s_norm_starts_nothing_early_and_saves_kernels():
    tokens = DenseFFNSizes(1280, 1024, 2)
    first = forward_model.first_product_before_tuning(tokens, H100)
    apart, whole = (
        forward_model.predict_compiled_moe_ffn(tokens, first._replace(starts_early=True), H100, opaque=opaque)
        for opaque in (False, True)
    )
    assert apart == forward_model.predict_compiled_moe_ffn(tokens, first, H100, opaque=False)
    assert whole.first_us < apart.first_us
    assert whole.others_us > 4 * H100.edge_us
    assert apart.others_us == 0


def test_rows_of_other_versions_of_triton_stay(tmp_path):
    path = tmp_path / "kernels.csv"
    rows = [{"kernel": "a", "registers": "1"}, {"kernel": "b", "registers": "2"}]
    assert cells_of_other_tritons(path, {"triton": "3.6.0"}) == []
    write_cells(path, rows, {"triton": "3.6.0"})
    for _ in range(2):
        new = {"triton": "3.8.0"}
        write_cells(path, [row | {"waits": "1"} for row in rows[:1]], new, kept=cells_of_other_tritons(path, new))
    with path.open(newline="") as file:
        found = [tuple(row.values()) for row in csv.DictReader(file)]
    assert found == [("a", "1", "1", "3.8.0"), ("a", "1", "", "3.6.0"), ("b", "2", "", "3.6.0")]
