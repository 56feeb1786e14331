"""The step of the upcycled UNet beside the stock one's: what each trains, what they start from, and the rows."""

import pytest
import torch

from benchmarks.harness.correctness import WrongResult
from benchmarks.harness.workloads import Workload
from benchmarks.models.unet_models import TASKS, UNetFamily, draw_batch
from benchmarks.training import step_ratio

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def objectives():
    family = UNetFamily("tiny", "fp32", CPU)
    batch = draw_batch(Workload(model="tiny", size=64, B=4, dtype="fp32"), CPU, TASKS)
    unets = {name: contender.implementation(family) for name, contender in step_ratio.CONTENDERS.items()}
    return {name: step_ratio.make_objective(unet, batch, "fp32") for name, unet in unets.items()}


def test_each_contender_trains_its_own_part(objectives):
    trained = {
        name: {key for key, p in objective.unet.named_parameters() if p.requires_grad}
        for name, objective in objectives.items()
    }
    assert all(".ff.net." in key for key in trained["stock"])
    assert trained["stock-norms"] - trained["stock"] == {
        key for key in trained["stock-norms"] if ".norm3." in key or key.startswith("conv_in.")
    }
    routing = {key for key in trained["mtu"] if ".ff.router." in key or key.startswith("task_embedding.")}
    assert trained["mtu"] == trained["stock-norms"] | routing
    assert len(trained["stock"]) == 4 * sum(".norm3.weight" in key for key in trained["mtu"])


def test_all_start_from_one_loss_and_other_ones_are_refused(objectives):
    with torch.no_grad():
        losses = {name: objective(None).loss.item() for name, objective in objectives.items()}
    step_ratio.check_losses(losses, "fp32")
    with pytest.raises(WrongResult, match="mtu must start from the loss of stock"):
        step_ratio.check_losses({**losses, "mtu": losses["mtu"] * 1.001}, "fp32")
    with pytest.raises(WrongResult, match="but got nan"):
        step_ratio.check_losses({**losses, "mtu": float("nan")}, "bf16")


def test_a_step_moves_what_is_trained_alone(objectives):
    objective = objectives["mtu"]
    before = {name: p.detach().clone() for name, p in objective.unet.named_parameters()}
    step_ratio.make_step(objective)()
    moved = {name for name, p in objective.unet.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name, p in objective.unet.named_parameters() if not p.requires_grad}
    assert moved
    assert not moved & frozen
    assert all(p.grad is None for p in objective.unet.parameters())


@pytest.mark.slow
def test_the_command_writes_rows_and_prints_ratios(tmp_path, capsys):
    path = tmp_path / "steps.csv"
    arguments = ["--quick", "--device", "cpu", "--dtypes", "bf16", "--gradient-checkpointing", "--output", str(path)]
    assert step_ratio.main(arguments) == 0
    rows = step_ratio.TABLE.read_rows(path)
    assert [row.contender for row in rows] == list(step_ratio.CONTENDERS)
    assert len({row.group for row in rows}) == 1
    printed = capsys.readouterr().out
    assert "step / of fine-tuning the same FFNs of the stock UNet: " in printed
    assert "(at most 1.05" in printed
