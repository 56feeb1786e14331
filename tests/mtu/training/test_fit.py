"""`fit`: resuming is exact, checkpoints survive interruptions, and errors say what is wrong."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mtu.experts import ExpertConfig
from mtu.models.router import Router
from mtu.training import FitConfig, fit
from mtu.training.checkpoint import read_checkpoint, write_checkpoint
from mtu.training.fit_config import learning_rate_at
from mtu.training.fit_log import LogEntry
from mtu.training.fit_state import TrainingState, parameter_groups

from ..file_operations import CUTS, count_operations, run_cut_off

CONFIG = FitConfig(steps=10, learning_rate=1e-2, warmup_steps=2, ema_decay=0.9, checkpoint_every=5, log_every=1)


class Model(nn.Module):
    """A convolution, an embedding and a linear map: every kind of parameter the loop tells apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.embedding = nn.Embedding(5, 4)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 2)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        features = self.conv(torch.randn(6, 3, 8, 8, generator=generator)).mean((2, 3))
        rows = torch.randint(5, (6,), generator=generator)
        return (self.linear(self.dropout(features + self.embedding(rows))) - 1).square().mean()


def tensors_of(directory: Path) -> Path:
    """The file of tensors of a checkpoint."""
    return directory / json.loads((directory / "checkpoint.json").read_text())["file"]


def train(
    config: FitConfig = CONFIG,
    directory: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_at: int | None = None,
) -> tuple[Model, list[LogEntry]]:
    """Train a fresh model; `stop_at` interrupts before that step, as a user would."""
    model = Model()

    def loss_fn(step: int) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        return model.loss(step)

    return model, fit(
        loss_fn, {"model": model}, model.parameters(), config, directory=directory, resume=resume, overwrite=overwrite
    )


def test_resumed_training_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    straight, history = train(directory=tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        # Two steps beyond the checkpoint, so that their log lines must be dropped again.
        train(directory=tmp_path / "broken", stop_at=7)
    resumed, resumed_history = train(directory=tmp_path / "broken", resume=True)
    for (name, expected), (_, found) in zip(straight.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(expected, found), name
    assert [(e.step, e.loss, e.learning_rate) for e in history] == [
        (e.step, e.loss, e.learning_rate) for e in resumed_history
    ]
    tensors = [read_checkpoint(tmp_path / name)[0] for name in ("straight", "broken")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    lines = (tmp_path / "broken" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter in the checkpoint to a meta parameter")
def test_a_checkpoint_goes_on_where_the_modules_are(tmp_path: Path) -> None:
    """On the meta device, whose tensors do not mix with the CPU's."""
    train(directory=tmp_path)
    model = Model().to("meta")
    training = TrainingState({"model": model}, model.parameters(), CONFIG)
    training.load(tmp_path)
    where = {name: tensor.device.type for name, tensor in training.checkpoint_tensors().items()}
    # AdamW counts its steps on the host, where the generator of the batches is, too.
    on_host = {name for name in where if name == "random" or name.startswith("optimizer.step.")}
    assert where == {name: "cpu" if name in on_host else "meta" for name in where}
    loss = model.linear(torch.ones(3, 4, device="meta")).square().mean() + model.embedding.weight.mean()
    training.optimizer_step(training.backward(loss))
    assert training.step == 11


def test_entries_of_a_resumed_training_average_the_steps_before_it_too(tmp_path: Path) -> None:
    config = replace(CONFIG, log_every=4)
    straight = train(config)[1]
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, stop_at=7)
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "lo\n' + log.read_text())  # as a full disk leaves it
    resumed = train(config, tmp_path, resume=True)[1]
    assert [(e.step, e.loss) for e in resumed] == [(e.step, e.loss) for e in straight]


def test_resuming_a_finished_training_changes_nothing(tmp_path: Path) -> None:
    model, history = train(directory=tmp_path)
    again, repeated = train(directory=tmp_path, resume=True)
    assert repeated == history
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_directory_holds_one_checkpoint_and_no_pickle(tmp_path: Path) -> None:
    train(directory=tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [tensors_of(tmp_path).name, "checkpoint.json", "log.jsonl"]


@pytest.mark.slow
def test_the_loss_falls_and_averaged_weights_are_left_in_the_modules(tmp_path: Path) -> None:
    model, history = train(replace(CONFIG, steps=200, learning_rate=3e-2), tmp_path)
    assert history[-1].loss < 0.5 * history[0].loss
    tensors, _ = read_checkpoint(tmp_path)
    assert torch.equal(model.linear.weight, tensors["average.model.linear.weight"])
    assert not torch.equal(model.linear.weight, tensors["module.model.linear.weight"])


def test_the_average_is_what_its_definition_says() -> None:
    model, weights = Model(), []

    def loss_fn(step: int) -> Tensor:
        weights.append(model.linear.weight.detach().clone())
        return model.loss(step)

    fit(loss_fn, {"model": model}, model.parameters(), replace(CONFIG, steps=4, ema_decay=0.2))
    other, _ = train(replace(CONFIG, steps=4, ema_decay=None))
    average = weights[0]
    for step, weight in enumerate([*weights[1:], other.linear.weight], start=1):
        decay = min(0.2, step / (step + 10))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model.linear.weight, average)


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = FitConfig(steps=100, learning_rate=1.0, warmup_steps=9)
    assert learning_rate_at(0, 0, config) == pytest.approx(0.1)
    assert learning_rate_at(50, 0, config) == pytest.approx(0.5)
    assert learning_rate_at(100, 0, config) == pytest.approx(0.0)
    assert learning_rate_at(99, 0, replace(config, schedule="constant")) == 1.0
    limited = replace(config, minutes=2.0)
    assert learning_rate_at(10, 60, limited) == pytest.approx(0.5)
    assert learning_rate_at(10, 120, limited) == pytest.approx(0.0)
    assert learning_rate_at(75, 60, limited) == learning_rate_at(75, 0, config)


def test_a_time_limit_ends_the_training_with_a_checkpoint(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=10**6, minutes=0.2 / 60, checkpoint_every=10**6)
    _, history = train(config, tmp_path)
    assert 0 < history[-1].step < 10**6
    assert history[-1].seconds >= 0.2
    assert read_checkpoint(tmp_path)[1]["step"] == history[-1].step
    # Already over: resuming makes no step, unless more time is given.
    assert train(config, tmp_path, resume=True)[1] == history
    longer = train(replace(config, minutes=0.4 / 60), tmp_path, resume=True)[1]
    assert longer[-1].step > history[-1].step


def test_vectors_and_embeddings_do_not_decay() -> None:
    model = Model()
    decayed, kept = parameter_groups({"model": model}, model.parameters(), 0.1)
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {id(model.conv.weight), id(model.linear.weight)}
    assert len(kept["params"]) == 3


def test_the_matrices_of_a_router_decay() -> None:
    router = Router(ExpertConfig(2, None, 0.5, "task", 2.0, 4))
    decayed, kept = parameter_groups({"router": router}, router.parameters(), 0.1)
    assert {id(p) for p in decayed["params"]} == {id(router.linear_1.weight), id(router.linear_2.weight)}
    assert {id(p) for p in kept["params"]} == {id(router.linear_1.bias), id(router.linear_2.bias)}


def test_only_the_given_parameters_move() -> None:
    model, fresh = Model(), Model()
    fit(model.loss, {"model": model}, [model.linear.weight], CONFIG)
    before = dict(fresh.named_parameters())
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"linear.weight"}


class Root(nn.Module):
    """Two weights whose gradient at zero is infinite from one step on, under a finite loss."""

    def __init__(self) -> None:
        super().__init__()
        self.steady, self.bad = (nn.Parameter(torch.ones(2)) for _ in range(2))

    def loss(self, step: int, bad_step: int | None) -> Tensor:
        if step != bad_step:
            return self.steady.square().sum() + self.bad.square().sum()
        return self.steady.square().sum() + (self.bad - self.bad.detach()).sum().clamp_min(0).sqrt()


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_gradient_that_is_not_finite_spares_weights_and_checkpoint(
    tmp_path: Path, max_grad_norm: float | None
) -> None:
    config = replace(CONFIG, steps=6, checkpoint_every=1, max_grad_norm=max_grad_norm)
    model, straight = Root(), Root()

    def run(model: Root, directory: Path, bad_step: int | None, resume: bool = False) -> None:
        fit(lambda step: model.loss(step, bad_step), {"model": model}, model.parameters(), config,
            directory=directory, resume=resume)  # fmt: skip

    message = (
        r"^The gradient of step 3 is not finite in model.bad, so the step was not made; try a lower learning rate\.$"
    )
    with pytest.raises(FloatingPointError, match=message):
        run(model, tmp_path / "stopped", 3)
    assert model.bad.grad is None
    tensors, state = read_checkpoint(tmp_path / "stopped")
    assert state["step"] == 3
    assert torch.equal(tensors["module.model.bad"], model.bad)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    # With the fault out of the data, the training goes on as if there had been none.
    resumed = Root()
    run(resumed, tmp_path / "stopped", None, resume=True)
    run(straight, tmp_path / "straight", None)
    assert torch.equal(resumed.steady, straight.steady)
    assert torch.equal(resumed.bad, straight.bad)


def test_a_loss_that_is_not_finite_stops_before_the_weights_move() -> None:
    model, weights = Model(), []

    def loss_fn(step: int) -> Tensor:
        weights.append(model.linear.weight.detach().clone())
        return model.loss(step) * (float("nan") if step == 3 else 1.0)

    with pytest.raises(FloatingPointError, match="The loss of step 3 is nan"):
        fit(loss_fn, {"model": model}, model.parameters(), CONFIG)
    assert torch.equal(model.linear.weight, weights[-1])


@pytest.mark.parametrize(
    ("rate", "scale", "what"), [(3e37, 1.0, "m.weight"), (1e-3, 1e25, "exp_avg_sq of m.weight")], ids=["rate", "moment"]
)
def test_what_a_step_spoilt_is_not_saved(tmp_path: Path, rate: float, scale: float, what: str) -> None:
    """Loss and gradients are finite; the sum of the steps or the square of a gradient is not."""
    model = nn.Linear(1, 1, bias=False)
    config = FitConfig(20, rate, schedule="constant", weight_decay=0.0, max_grad_norm=None, checkpoint_every=1)

    def loss_fn(step: int) -> Tensor:
        return model.weight.sum() * (scale if step > 2 else 1.0)

    with pytest.raises(
        FloatingPointError, match=rf"^Step \d+ left numbers that are not finite in {what}, so no"
    ) as caught:
        fit(loss_fn, {"m": model}, model.parameters(), config, directory=tmp_path)
    tensors, state = read_checkpoint(tmp_path)
    assert f"Step {state['step']} " in str(caught.value)
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_gradients_whose_norm_overflows_are_taken_as_they_are_unless_it_scales_them() -> None:
    for limit in (None, 1.0):
        model = nn.Linear(2, 1)
        run = lambda model=model, limit=limit: fit(  # noqa: E731
            lambda step: model.weight.sum() * 1e30, {"model": model}, [model.weight],
            replace(CONFIG, steps=1, max_grad_norm=limit),
        )  # fmt: skip
        if limit is None:
            assert run()
        else:
            with pytest.raises(FloatingPointError, match="The norm of the gradient of step 0 is inf"):
                run()


def test_the_average_of_bfloat16_weights_moves_by_less_than_they_can(tmp_path: Path) -> None:
    model = nn.Linear(8, 8, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    config = FitConfig(steps=9, ema_decay=0.999, schedule="constant")
    with pytest.warns(
        UserWarning, match=r"1 of 1 parameters to train are torch\.bfloat16, for example m\.weight, which"
    ):
        training = TrainingState({"m": model}, model.parameters(), config)
    nn.init.constant_(model.weight, 1.5)
    for _ in range(5000):
        training.move_average_towards_weights(0.001)
    # Rounded 5,000 times to float32, by at most half of 2⁻²³ each.
    assert float(training.averaged_weights["m.weight"][0, 0]) == pytest.approx(
        1.5 - 0.5 * 0.999**5000, abs=5000 * 2**-24
    )
    training.save(tmp_path)
    tensors, _ = read_checkpoint(tmp_path)
    assert tensors["average.m.weight"].dtype == torch.float32
    # Earlier versions kept it in the parameters' dtype.
    with pytest.warns(UserWarning, match="bfloat16"):
        again = TrainingState({"m": model}, model.parameters(), config)
    state = {"step": 0, "seconds": 0.0, "config": asdict(config)}
    write_checkpoint(tmp_path, {**tensors, "average.m.weight": tensors["average.m.weight"].bfloat16()}, state)
    again.load(tmp_path)
    assert again.averaged_weights["m.weight"].dtype == torch.float32
    again.copy_average_to_modules()
    assert torch.equal(model.weight, training.averaged_weights["m.weight"].bfloat16())


def test_float16_weights_are_refused() -> None:
    model = nn.Linear(2, 1).half()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"2 of 2 parameters to train are torch\.float16, .* by which AdamW divides"):
        fit(lambda step: model.weight.sum(), {"model": model}, model.parameters(), CONFIG)
    assert torch.equal(model.weight, before)


def test_a_checkpoint_is_not_destroyed_unasked(tmp_path: Path) -> None:
    model, _ = train(directory=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    torch.manual_seed(99)
    state = torch.get_rng_state()
    with pytest.raises(
        FileExistsError, match=r"holds the checkpoint of a training: continue it with resume, delete it"
    ):
        fit(lambda step: pytest.fail("trained"), {"model": model}, model.parameters(), CONFIG, directory=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="expected one of them, got both"):
        train(directory=tmp_path, resume=True, overwrite=True)
    # Interrupted before its first checkpoint, the new training leaves nothing of the old one to resume.
    with pytest.raises(KeyboardInterrupt):
        train(directory=tmp_path, overwrite=True, stop_at=3)
    with pytest.raises(FileNotFoundError):
        train(directory=tmp_path, resume=True)
    assert [entry.step for entry in train(directory=tmp_path, overwrite=True)[1]] == list(range(1, 11))


def test_resuming_from_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint in .* to resume from\.$"):
        train(directory=tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume needs the directory"):
        train(resume=True)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_resuming_from_a_truncated_checkpoint_says_so(tmp_path: Path, keep: int) -> None:
    train(directory=tmp_path)
    path = tensors_of(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"^The checkpoint is damaged: .* is truncated or was altered"):
        train(directory=tmp_path, resume=True)


def test_resuming_from_a_missing_or_broken_part_says_so(tmp_path: Path) -> None:
    train(directory=tmp_path)
    state = (tmp_path / "checkpoint.json").read_text()
    (tmp_path / "checkpoint.json").write_text(state[: len(state) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        train(directory=tmp_path, resume=True)
    (tmp_path / "checkpoint.json").write_text(state)
    tensors_of(tmp_path).unlink()
    with pytest.raises(ValueError, match="is damaged"):
        train(directory=tmp_path, resume=True)


@pytest.mark.slow
def test_a_checkpoint_may_be_cut_off_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_on(directory: Path) -> None:
        train(replace(CONFIG, checkpoint_every=5), directory, resume=True)

    def started(directory: Path) -> Path:
        with pytest.raises(KeyboardInterrupt):
            train(directory=directory, stop_at=7)
        return directory

    straight, _ = train()
    count = started(tmp_path / "count")
    for operation in range(0, count_operations(monkeypatch, lambda: train_on(count)), 3):
        directory = started(tmp_path / str(operation))
        run_cut_off(monkeypatch, lambda directory=directory: train_on(directory), operation, CUTS[1])
        resumed, history = train(directory=directory, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
        assert [entry.step for entry in history] == list(range(1, 11))


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its file of tensors was named by the step, and had no digest."""
    straight, _ = train()
    with pytest.raises(KeyboardInterrupt):
        train(directory=tmp_path, stop_at=7)
    state = json.loads((tmp_path / "checkpoint.json").read_text())
    old = tmp_path / "checkpoint-0000005.safetensors"
    tensors_of(tmp_path).rename(old)
    kept = {key: state[key] for key in ("step", "seconds", "config")}
    (tmp_path / "checkpoint.json").write_text(json.dumps({**kept, "file": old.name}))
    resumed, _ = train(directory=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert not old.exists()


def test_resuming_another_training_says_what_differs(tmp_path: Path) -> None:
    train(directory=tmp_path)
    with pytest.raises(ValueError, match=r"was made with another learning_rate, steps\.$"):
        train(replace(CONFIG, steps=11, learning_rate=1.0, log_every=2), tmp_path, resume=True)
    for model in (nn.Linear(2, 2), Model().double()):
        with pytest.raises(ValueError, match="does not fit the module 'model'"):
            fit(lambda step: pytest.fail("trained"), {"model": model}, model.parameters(), CONFIG,
                directory=tmp_path, resume=True)  # fmt: skip
    model = Model()
    with pytest.raises(ValueError, match="was made by training other parameters of the modules"):
        fit(model.loss, {"model": model}, [model.linear.weight], CONFIG, directory=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Model().parameters(), strict=True))


def test_wrong_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FitConfig(steps=0)
    with pytest.raises(ValueError, match="unknown schedule 'linear'"):
        FitConfig(steps=1, schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ema_decay"):
        FitConfig(steps=1, ema_decay=1.0)
    with pytest.raises(ValueError, match="warmup_steps must be at least 0, got -1"):
        FitConfig(steps=1, warmup_steps=-1)
    with pytest.raises(ValueError, match="max_grad_norm must be a positive number or None, got 0"):
        FitConfig(steps=1, max_grad_norm=0.0)
    stray = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="belongs to none of the modules"):
        fit(lambda step: stray.sum(), {"model": Model()}, [stray], CONFIG)
