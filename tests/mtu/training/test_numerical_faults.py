"""A step whose loss or gradients are not finite changes no weight, names its examples, and loses no work."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mtu.training import TrainerConfig
from mtu.training.checkpoints import checkpoint_steps, read_newest_checkpoint
from mtu.training.trainer import Trainer

from .small_objectives import FunctionObjective, LoadBatch, SmallObjective

CONFIG = TrainerConfig(steps=6, learning_rate=1e-2, ema_decay=0.9, log_every=1)


def spoilt(**factors: float) -> SmallObjective:
    """An objective whose loss of some examples of step 3 is multiplied."""
    return SmallObjective(LoadBatch(6, {(3, int(name[1:])): factor for name, factor in factors.items()}))


@pytest.mark.parametrize("passes", [1, 2])
def test_a_loss_that_is_not_finite_names_its_examples_and_saves_the_state_before_it(
    tmp_path: Path, passes: int
) -> None:
    config = replace(CONFIG, gradient_accumulation_steps=passes)
    objective = spoilt(e1=float("nan"), e4=float("inf"))
    message = (
        r"^The loss of step 3 is nan, because the loss of example 1; example 4 is not finite, so the step was not "
        r"made, and the state before it is saved; correct the examples or lower the learning rate, and resume with "
        r"accept_changes \(--accept-changes\)\.$"
    )
    with pytest.raises(FloatingPointError, match=message):
        Trainer(objective, config, tmp_path).train()
    checkpoint = read_newest_checkpoint(tmp_path)
    assert checkpoint.step == 3
    assert torch.equal(checkpoint.tensors["trained.model.linear.weight"], objective.model.linear.weight)
    assert all(parameter.grad is None for parameter in objective.parameters())
    # With the fault out of the data, the training goes on as if there had been none.
    resumed, straight = SmallObjective(), SmallObjective()
    history = Trainer(resumed, config, tmp_path).train(resume=True)
    assert [entry.step for entry in history] == [1, 2, 3, 4, 5, 6]
    Trainer(straight, config).train()
    assert all(map(torch.equal, resumed.state_dict().values(), straight.state_dict().values()))


def test_a_state_that_is_saved_is_not_saved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr("mtu.training.trainer.write_checkpoint", lambda _, checkpoint, *__: steps.append(checkpoint[0]))
    with pytest.raises(FloatingPointError):
        Trainer(spoilt(e1=float("nan")), replace(CONFIG, checkpoint_every=1), tmp_path).train()
    assert steps == [1, 2, 3]


def test_without_a_directory_nothing_is_said_of_a_saved_state() -> None:
    objective = spoilt(e0=float("nan"))
    objective.load = replace(objective.load, size=12)
    with pytest.raises(FloatingPointError, match="is not finite, so the step was not made; try a lower"):
        Trainer(objective, CONFIG).train()
    # Who is at fault is unknown where only the sum is infinite.
    overflow = SmallObjective(LoadBatch(12, {(3, i): 3e37 for i in range(12)}))
    with pytest.raises(FloatingPointError, match=r"example 7; and 4 more, so the step"):
        Trainer(overflow, CONFIG).train()


class Root(nn.Module):
    """Two weights whose gradient at zero is infinite from one step on, under a finite loss."""

    def __init__(self) -> None:
        super().__init__()
        self.steady, self.bad = (nn.Parameter(torch.ones(2)) for _ in range(2))

    def loss(self, step: int) -> Tensor:
        if step != 3:
            return self.steady.square().sum() + self.bad.square().sum()
        return self.steady.square().sum() + (self.bad - self.bad.detach()).sum().clamp_min(0).sqrt()


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_gradient_that_is_not_finite_spares_weights_and_checkpoint(
    tmp_path: Path, max_grad_norm: float | None
) -> None:
    root = Root()
    message = r"^The gradient of step 3 is not finite in model\.bad, so the step was not made, and the state before"
    with pytest.raises(FloatingPointError, match=message):
        Trainer(
            FunctionObjective(root.loss, model=root), replace(CONFIG, max_grad_norm=max_grad_norm), tmp_path
        ).train()
    checkpoint = read_newest_checkpoint(tmp_path)
    assert checkpoint.step == 3
    assert torch.equal(checkpoint.tensors["trained.model.bad"], root.bad)
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors.values())


def test_gradients_whose_norm_overflows_are_taken_as_they_are_unless_it_scales_them() -> None:
    model = nn.Linear(2, 1)
    objective = FunctionObjective(lambda step: model.weight.sum() * 1e30 + model.bias.sum(), model=model)
    assert Trainer(objective, replace(CONFIG, steps=1, max_grad_norm=None)).train()
    with pytest.raises(FloatingPointError, match="The norm of the gradient of step 0 is inf"):
        Trainer(objective, replace(CONFIG, steps=1)).train()


@pytest.mark.parametrize("checkpoint_every", [1, 100])
@pytest.mark.parametrize(
    ("rate", "scale", "what"), [(3e37, 1.0, "m.weight"), (1e-3, 1e25, "exp_avg_sq of m.weight")], ids=["rate", "moment"]
)
def test_what_a_step_spoilt_is_not_saved(
    tmp_path: Path, rate: float, scale: float, what: str, checkpoint_every: int
) -> None:
    """Loss and gradients are finite; the sum of the steps or the square of a gradient is not."""
    model = nn.Linear(1, 1, bias=False)
    objective = FunctionObjective(lambda step: model.weight.sum() * (scale if step > 2 else 1.0), m=model)
    config = TrainerConfig(20, rate, weight_decay=0.0, max_grad_norm=None, checkpoint_every=checkpoint_every)
    with pytest.raises(FloatingPointError, match=rf"Step \d+ left numbers that are not finite in {what}, so no"):
        Trainer(objective, config, tmp_path).train()
    if checkpoint_every == 1:
        tensors = read_newest_checkpoint(tmp_path).tensors
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    else:
        assert checkpoint_steps(tmp_path) == []
