"""The first step of a run on a GPU: its messages about unfit machines and wrong results."""

import pytest
import torch

from benchmarks.gpu import smoke
from benchmarks.kernels import product_profile
from mtu_kernels import moe_ffn
from mtu_kernels.triton.launch import is_interpreted

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="kernels are not interpreted here")


@pytest.mark.slow
def test_facts_and_two_passes_that_are_right(capsys):
    assert smoke.main(["--quick", "--commit", "abc1234"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "commit: abc1234" in lines
    assert f"torch: {torch.__version__}" in lines
    assert lines[-2:] == ["32x16 B=2 fp16 forward: right", "32x16 B=2 fp16 forward+backward: right"]


def test_wrong_results_are_said_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(smoke, "moe_ffn", lambda *args, backend, **options: moe_ffn(*args, **options) * 1.1)
    assert smoke.main(["--quick"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("y must be torch.float16 within ")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_gradients_that_are_wrong_are_said_and_do_not_decide(monkeypatch, capsys):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, d_y):
            return 1.1 * d_y

    monkeypatch.setattr(smoke, "moe_ffn", lambda *args, **options: Scaled.apply(moe_ffn(*args, **options)))
    assert smoke.main(["--quick"]) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == "32x16 B=2 fp16 forward: right"
    assert last[1].startswith("FAILED, gradients at 32x16: the gradient of x must be ")


def test_a_machine_without_a_gpu_or_a_compiler_is_unfit(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert smoke.main([]) == 1
    assert capsys.readouterr().err == "A CUDA device is needed, and torch finds none.\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(smoke, "machine_facts", lambda commit: ["commit: abc1234"])
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert smoke.main([]) == 1
    expected = "Triton needs a C compiler for the launchers of its kernels, and finds neither gcc nor clang.\n"
    assert capsys.readouterr().err == expected


def test_a_product_that_is_wrong_is_not_profiled(capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.kernels.tile_measure.assert_matches_reference", _refuse)
    assert product_profile.main(["--quick"]) == 1
    assert "must run with its tile TileConfig(" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        product_profile.main([])
    assert "Products are profiled on a CUDA device, and torch finds none." in capsys.readouterr().err


def _refuse(*arguments):
    raise AssertionError("h must be within 1 of the reference, got 2 off")
