"""Kernels of compiled blocks and UNets, counted without a GPU: an upcycled block launches no more than a stock one."""

import csv

import pytest
import torch

from benchmarks.harness.fake_gpu import WORKS, GeneratedCode, RecordedOperator
from benchmarks.models import launch_count
from benchmarks.models.launch_count import CompiledPart, compile_and_list_kernels, kernels_in_code, kernels_of_operator

# Kernels are interpreted where there is no GPU, and bfloat16 is not served there. Inductor fuses both alike.
DTYPE = "fp16"

counted = pytest.mark.skipif(not WORKS, reason="Compilers before torch 2.11 do not take fake tensors.")


def counts(part):
    return [
        compile_and_list_kernels(CompiledPart(part, contender, DTYPE, 640, 1024)) for contender in ("stock", "triton")
    ]


@pytest.mark.slow
@counted
def test_the_feed_forward():
    stock, upcycled = counts("feed-forward")
    # LayerNorm, product, GEGLU, product, residual.
    assert [len(kernels) for kernels in stock] == [3, 2, 0]
    # The gather of the routing weights, LayerNorm with those of γ and β, residual; the second product; all of GEGLU.
    assert [len(kernels) for kernels in upcycled] == [3, 1, 1]
    assert upcycled.ours[0].startswith("expert_in")
    assert len([name for name in upcycled.generated if "native_layer_norm" in name and "_per_" in name]) == 1


@counted
@pytest.mark.slow
def test_the_block():
    stock, upcycled = counts("block")
    # Six products and one attention in each attention layer, two products in the feed-forward.
    assert len(stock.library) == 2 * 6 - 2 + 2 == len(upcycled.library) + 1
    assert stock.num_kernels == 17 >= upcycled.num_kernels
    # The residual of attention is part of the LayerNorm behind it, in both.
    for launches in (stock, upcycled):
        norms = [name for name in launches.generated if "native_layer_norm" in name and "_per_" in name]
        assert len(norms) == 3
        assert [("add" in name) for name in norms] == [False, True, True]


@counted
@pytest.mark.slow
def test_a_whole_unet():
    upcycled = compile_and_list_kernels(CompiledPart("unet", "triton", DTYPE, model="tiny"))
    # One kernel of this project in each of the four feed-forwards.
    assert [name.startswith("expert_in") for name in upcycled.ours] == [True] * 4


def test_an_operator_counts_as_what_it_launches():
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x_hat, w_in, b_in, weights = empty(2, 64, 320), empty(2560, 320), empty(2560), empty(2, 4, dtype=torch.float32)
    assert len(kernels_of_operator(RecordedOperator("expert_hidden_triton", (x_hat, w_in, b_in, weights, 4)))) == 1
    # A copy that an operator would make counts, too.
    strided = empty(2, 320, 64).mT
    assert "aten.clone.default" in kernels_of_operator(
        RecordedOperator("expert_hidden_triton", (strided, w_in, b_in, weights, 4))
    )
    affine = [empty(2, 320, dtype=torch.float32) for _ in range(2)]
    fused = (x_hat, *affine, w_in, b_in, empty(320, 1280), empty(320), weights, None, 4, 1e-5)
    norm, first, second = kernels_of_operator(RecordedOperator("moe_ffn_triton", fused))
    assert (norm, second) == ("layer_norm_kernel", "aten.addmm.out")
    assert first.startswith("expert_in")


def test_unknown_calls_are_errors():
    code = "def call(args):\n    args.clear()\n    {}\n"
    launches = kernels_in_code(GeneratedCode(code.format("triton_poi_0.run(x); extern_kernels.mm(x)"), ()))
    assert launches == (("triton_poi_0",), ("mm",), ())
    with pytest.raises(ValueError, match=r"^Generated code calls 'buf0\.copy_', which is neither a launch nor"):
        kernels_in_code(GeneratedCode(code.format("buf0.copy_(x)"), ()))
    with pytest.raises(ValueError, match=r"^Generated code lacks calls of \['expert_hidden_triton'\]\.$"):
        kernels_in_code(GeneratedCode(code.format("pass"), (RecordedOperator("expert_hidden_triton", ()),)))


@counted
def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        launch_count, "compile_and_list_kernels", lambda compiled: launch_count.KernelNames(("a",) * 3, ("b",), ())
    )
    output = tmp_path / "rows.csv"
    assert launch_count.main(["--shapes", "320x4096", "--unets", "tiny", "--output", str(output)]) == 0
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows[::3]] == ["feed-forward", "block", "unet tiny"]
    assert [row["contender"] for row in rows[:3]] == ["stock", "triton", "eager"]
    assert {(row["generated"], row["library"], row["ours"], row["launches"]) for row in rows} == {("3", "1", "0", "4")}
    assert rows[0]["command"].startswith("python -m benchmarks.models.launch_count")
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
