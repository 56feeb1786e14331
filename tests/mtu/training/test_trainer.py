"""`Trainer`: what it trains, how it splits batches, and what it logs."""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mtu.experts import ExpertConfig
from mtu.models.router import Router
from mtu.training import BatchPart, PartialLoss, TrainerConfig
from mtu.training.batch_loader import PartSequence, iterate_over_batches, part_seed
from mtu.training.optimizer import learning_rate_at, parameter_groups
from mtu.training.trainer import Trainer
from mtu.training.training_state import TrainingState

from .small_objectives import NUM_ROWS, Batch, FunctionObjective, LoadBatch, SmallObjective

CONFIG = TrainerConfig(steps=4, learning_rate=1e-2, log_every=1)


def trained_values(objective: SmallObjective) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in objective.state_dict().items()}


def test_the_loss_falls_and_averaged_weights_are_left_in_the_modules() -> None:
    objective = SmallObjective(dropout=0.0)
    trainer = Trainer(objective, replace(CONFIG, steps=150, learning_rate=3e-2, ema_decay=0.9))
    history = trainer.train()
    assert history[-1].loss < 0.5 * history[0].loss
    left = trained_values(objective)
    with trainer.averaged_weights_context():
        assert all(torch.equal(tensor, left[name]) for name, tensor in objective.state_dict().items())
    plain = SmallObjective(dropout=0.0)
    Trainer(plain, replace(CONFIG, steps=150, learning_rate=3e-2)).train()
    assert not torch.equal(plain.model.linear.weight, objective.model.linear.weight)


def test_only_parameters_that_require_gradients_move() -> None:
    objective, fresh = SmallObjective(), SmallObjective()
    objective.model.conv.requires_grad_(False)
    objective.eval()
    Trainer(objective, CONFIG).train()
    before = dict(fresh.named_parameters())
    moved = {name for name, parameter in objective.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"model.embedding.weight", "model.linear.weight", "model.linear.bias"}
    assert not objective.training
    with pytest.raises(ValueError, match="There is nothing to train"):
        Trainer(objective.requires_grad_(False), CONFIG).train()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_rows_without_examples_keep_value_moments_and_number_of_steps(optimizer: str) -> None:
    """Nothing of an embedding's row may move while its task is absent, but dense training moves it by its momentum."""

    table = nn.Embedding(2, 6)

    class Rows(FunctionObjective):
        def row_parameters(self) -> Sequence[Parameter]:
            return list(table.parameters())

        def trained_rows(self, step: int) -> Sequence[int]:
            return [step % 2]

    rows = Rows(lambda step: (table.weight[step % 2] * torch.arange(1.0, 7)).sum(), table=table)
    config = replace(CONFIG, steps=5, weight_decay=0.1, max_grad_norm=None, optimizer=optimizer)
    alone = [table.weight[i].detach().clone() for i in range(2)]
    trainer = Trainer(rows, config)
    trainer.train()
    for index, steps in enumerate((3, 2)):
        single = nn.Embedding(1, 6)
        single.weight.data.copy_(alone[index])
        loss = lambda step, single=single: (single.weight[0] * torch.arange(1.0, 7)).sum()  # noqa: E731
        Trainer(FunctionObjective(loss, table=single), replace(config, steps=steps)).train()
        assert torch.equal(table.weight[index], single.weight[0])
    assert trainer._state is not None
    states = trainer._state.optimizer.state
    assert [int(states[row]["step"]) for row in trainer._state.rows["table.weight"]] == [3, 2]


@pytest.mark.parametrize("passes", [2, 3])
def test_accumulation_changes_only_the_rounding(passes: int) -> None:
    whole, split = SmallObjective(dropout=0.0), SmallObjective(dropout=0.0)
    history = Trainer(whole, CONFIG).train()
    split_history = Trainer(split, replace(CONFIG, gradient_accumulation_steps=passes)).train()
    torch.testing.assert_close(dict(split.named_parameters()), dict(whole.named_parameters()))
    for entry, other in zip(history, split_history, strict=True):
        assert other.loss == pytest.approx(entry.loss)
        assert other.terms == pytest.approx(entry.terms)
    with pytest.raises(ValueError, match="A batch of 6 cannot be split into 4 equal parts"):
        Trainer(whole, replace(CONFIG, gradient_accumulation_steps=4)).train()


def test_the_log_shows_means_since_the_last_entry_and_terms_only_where_there_were_any(tmp_path: Path) -> None:
    singles = Trainer(SmallObjective(), CONFIG).train()
    pairs = Trainer(SmallObjective(), replace(CONFIG, log_every=2, tensorboard=True), tmp_path).train()
    for entry, (first, second) in zip(pairs, (singles[:2], singles[2:]), strict=True):
        assert entry.step == second.step
        assert entry.loss == pytest.approx((first.loss + second.loss) / 2)
        assert entry.terms.keys() == first.terms.keys() | second.terms.keys()
        for name, value in entry.terms.items():
            found = [single.terms[name] for single in (first, second) if name in single.terms]
            assert value == pytest.approx(sum(found) / len(found))
        assert first.loss == pytest.approx(sum(first.terms.values()))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [entry._asdict() for entry in pairs]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    with pytest.raises(ValueError, match="The log for TensorBoard needs a directory"):
        Trainer(SmallObjective(), replace(CONFIG, tensorboard=True)).train()


def test_gradients_from_before_a_training_do_not_enter_it(tmp_path: Path) -> None:
    """Neither those of the user, nor those of a step that an error ended between its passes."""
    config = replace(CONFIG, gradient_accumulation_steps=2, checkpoint_every=1)
    objective, straight = SmallObjective(), SmallObjective()
    for parameter in objective.parameters():
        parameter.grad = torch.full_like(parameter, 7.0) if parameter.requires_grad else None
    trainer, passes, forward = Trainer(objective, config, tmp_path), [], objective.forward

    def fail_once(batch: Batch) -> PartialLoss:
        passes.append(batch)
        return forward(batch) if len(passes) != 6 else pytest.fail("cut off")

    objective.forward = fail_once
    with pytest.raises(pytest.fail.Exception):
        trainer.train()
    assert all(parameter.grad is None for parameter in objective.parameters())
    trainer.train(resume=True)
    Trainer(straight, config).train()
    assert all(map(torch.equal, objective.state_dict().values(), straight.state_dict().values()))


def test_the_global_random_state_is_left_as_it_was() -> None:
    state = torch.get_rng_state()
    Trainer(SmallObjective(), CONFIG).train()
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_load_from_the_first_step_that_is_left_on() -> None:
    load = LoadBatch(6)
    parts = PartSequence(start=10_000, stop=10_003, passes=2, process=1, processes=3)
    assert [part.index for part in parts.of_step(10_000)] == [1, 4]
    found = list(iterate_over_batches(load, parts, 2, pin_memory=False))
    expected = [load(part) for step in range(10_000, 10_003) for part in parts.of_step(step)]
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_that_cannot_be_loaded_ends_the_training_in_one_sentence(num_workers: int) -> None:
    objective = SmallObjective(LoadBatch(6, unreadable_step=2))
    with pytest.raises(ValueError, match=r"^pictures/metadata.jsonl, line 2: the image cannot be read\.$"):
        Trainer(objective, replace(CONFIG, num_workers=num_workers)).train()


@pytest.mark.parametrize("fails", [False, True])
def test_the_objective_learns_that_the_training_has_ended(fails: bool) -> None:
    calls: list[str] = []
    objective = SmallObjective(LoadBatch(6, {(1, i): float("nan") for i in range(6)} if fails else {}))
    objective.prepare = lambda accelerator: calls.append("prepare")
    objective.finish = lambda: calls.append("finish")
    with pytest.raises(FloatingPointError) if fails else nullcontext():
        Trainer(objective, TrainerConfig(steps=2)).train()
    assert calls == ["prepare", "finish"]


def test_validation_sees_the_averaged_weights_and_leaves_the_trained_ones() -> None:
    objective, seen = SmallObjective(), []

    def validate(step: int) -> None:
        objective.eval()
        seen.append((step, trained_values(objective)))

    config = replace(CONFIG, steps=5, validate_every=2, ema_decay=0.5)
    Trainer(objective, config, validate=validate).train()
    other = SmallObjective()
    Trainer(other, replace(config, validate_every=None)).train()
    assert [step for step, _ in seen] == [2, 4, 5]
    assert all(torch.equal(tensor, seen[-1][1][name]) for name, tensor in trained_values(objective).items())
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in trained_values(objective).items())
    assert not torch.equal(seen[0][1]["model.linear.weight"], seen[1][1]["model.linear.weight"])


def test_the_average_is_what_its_definition_says() -> None:
    model, weights = nn.Linear(3, 2), []

    def loss_fn(step: int) -> Tensor:
        weights.append(model.weight.detach().clone())
        return (model.weight - step).square().sum() + model.bias.sum()

    Trainer(FunctionObjective(loss_fn, model=model), replace(CONFIG, ema_decay=0.2)).train()
    last = nn.Linear(3, 2)
    last.weight.data.copy_(weights[0])
    Trainer(
        FunctionObjective(lambda step: (last.weight - step).square().sum() + last.bias.sum(), m=last), CONFIG
    ).train()
    average = weights[0]
    for step, weight in enumerate([*weights[1:], last.weight.detach()], start=1):
        decay = min(0.2, step / (step + 10))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model.weight.detach(), average)


def test_the_average_of_bfloat16_weights_moves_by_less_than_they_can() -> None:
    model = nn.Linear(8, 8, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    objective = FunctionObjective(lambda step: model.weight.sum(), m=model)
    with pytest.warns(UserWarning, match=r"1 of 1 parameters to train are torch\.bfloat16, for example m\.weight"):
        state = TrainingState(objective, replace(CONFIG, ema_decay=0.999))
    nn.init.constant_(model.weight, 1.5)
    for _ in range(5000):
        state.move_average_towards_weights(0.001)
    # Rounded 5,000 times to float32, by at most half of 2⁻²³ each.
    assert float(state.averaged_weights["m.weight"][0, 0]) == pytest.approx(1.5 - 0.5 * 0.999**5000, abs=5000 * 2**-24)
    state.copy_average_to_modules()
    assert torch.equal(model.weight, state.averaged_weights["m.weight"].bfloat16())


def test_float16_weights_are_refused() -> None:
    model = nn.Linear(2, 1).half()
    with pytest.raises(ValueError, match=r"2 of 2 parameters to train are torch\.float16, .* by which AdamW divides"):
        Trainer(FunctionObjective(lambda step: model.weight.sum(), model=model), CONFIG).train()


def test_each_part_of_a_step_draws_other_numbers() -> None:
    model, drawn = nn.Linear(1, 1), []

    def loss(step: int) -> Tensor:
        drawn.append(float(torch.rand(())))
        return model.weight.sum() + model.bias.sum()

    config = replace(CONFIG, gradient_accumulation_steps=2)
    Trainer(FunctionObjective(loss, model=model), config).train()
    assert len(set(drawn)) == 8
    torch.manual_seed(part_seed(config.seed, BatchPart(3, 1, 2)))
    assert float(torch.rand(())) == drawn[-1]


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = TrainerConfig(steps=100, learning_rate=1.0, warmup_steps=9, schedule="cosine")
    assert learning_rate_at(0, 0, config) == pytest.approx(0.1)
    assert learning_rate_at(50, 0, config) == pytest.approx(0.5)
    assert learning_rate_at(100, 0, config) == pytest.approx(0.0)
    assert learning_rate_at(99, 0, replace(config, schedule="constant")) == 1.0
    limited = replace(config, max_minutes=2.0)
    assert learning_rate_at(10, 60, limited) == pytest.approx(0.5)
    assert learning_rate_at(10, 120, limited) == pytest.approx(0.0)
    assert learning_rate_at(75, 60, limited) == learning_rate_at(75, 0, config)


def test_vectors_and_embeddings_do_not_decay_but_the_matrices_of_routers_do() -> None:
    model = SmallObjective().model
    decayed, kept = parameter_groups(model, dict(model.named_parameters()), 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(m.weight) for m in (model.conv, model.linear, model.frozen)}
    assert len(kept["params"]) == 4
    router = Router(ExpertConfig(2, None, 0.5, "task", 2.0, 4))
    decayed, kept = parameter_groups(router, dict(router.named_parameters()), 0.1)
    assert {id(p) for p in decayed["params"]} == {id(router.linear_1.weight), id(router.linear_2.weight)}
    assert {id(p) for p in kept["params"]} == {id(router.linear_1.bias), id(router.linear_2.bias)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be an integer ≥ 1, but got 0"),
        ({"steps": 1.5}, "steps must be an integer ≥ 1, but got 1.5"),
        ({"steps": True}, "steps must be an integer ≥ 1, but got True"),
        ({"steps": "10"}, "steps must be an integer ≥ 1, but got '10'"),
        ({"learning_rate": math.inf}, "learning_rate must be a positive number, but got inf"),
        ({"weight_decay": math.inf}, "weight_decay must be a number ≥ 0, but got inf"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), but got 0.9"),
        ({"tensorboard": 1}, "tensorboard must be True or False, but got 1"),
        ({"schedule": "linear"}, "schedule must be constant or cosine, but got 'linear'"),
        ({"optimizer": "sgd"}, "optimizer must be adamw or adamw8bit, but got 'sgd'"),
        ({"ema_decay": 1.0}, r"ema_decay must be None, or a number in \[0, 1\), but got 1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer ≥ 0, but got -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a positive number or None, but got 0"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit must be an integer ≥ 1, or None, but got 0"),
    ],
)
def test_wrong_configurations_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**{"steps": 1, **wrong})


def test_rows_share_their_memory_and_its_counter_of_changes_with_the_parameter() -> None:
    """Caches of routing tables look at that counter."""
    state = TrainingState(SmallObjective(), CONFIG)
    rows, table = state.rows["model.embedding.weight"], state.parameters["model.embedding.weight"]
    assert len(rows) == NUM_ROWS
    version = table._version
    with torch.no_grad():
        rows[1].fill_(5.0)
    assert table[1, 0].item() == 5.0
    assert table._version > version


def test_rows_of_a_parameter_that_was_moved_are_not_trained_in_vain(tmp_path: Path) -> None:
    objective = SmallObjective()
    config = replace(CONFIG, validate_every=2)

    def validate(step: int) -> None:
        objective.double().float()

    with pytest.raises(RuntimeError, match=r"^model\.embedding\.weight was moved to other memory during the training"):
        Trainer(objective, config, tmp_path, validate=validate).train()
    assert Trainer(objective, config, tmp_path).train(resume=True)
