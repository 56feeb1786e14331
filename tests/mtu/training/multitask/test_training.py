"""Trainings of tiny models: what moves, what does not, and in which precision."""

from dataclasses import replace

import pytest
import torch

from mtu.training import BatchPart, Trainer, TrainerConfig, precision
from mtu.training.multitask import MultiTaskObjective

from ..processes import run_in_processes
from .tiny_pipelines import (
    TASKS,
    loss_of,
    make_objective,
    noise_data,
    sd_pipeline,
    train_with_a_cache_on_disk,
    xl_pipeline,
)

STEPS = TrainerConfig(steps=3, learning_rate=1e-3, log_every=1)


def train(objective: MultiTaskObjective, config: TrainerConfig = STEPS, **kwargs):
    return Trainer(objective, config, **kwargs).train()


@pytest.mark.parametrize("make_pipe", [sd_pipeline, xl_pipeline])
def test_training_moves_the_upcycled_parts_alone(make_pipe) -> None:
    pipe = make_pipe()
    unet = pipe.unet
    old = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    frozen = [pipe.vae, pipe.text_encoder, *([pipe.text_encoder_2] if make_pipe is xl_pipeline else [])]
    before = [value.clone() for module in frozen for value in module.state_dict().values()]
    objective = make_objective(pipe, batch_size=4)
    assert {name for name, _ in objective.named_parameters()} == {f"unet.{name}" for name in old}
    entries = train(objective)
    assert len(entries) == 3
    assert set(entries[0].terms) == set(TASKS)
    moved = {name for name, parameter in unet.named_parameters() if not torch.equal(parameter, old[name])}
    assert moved == {name for name, _ in unet.named_trainable_parameters()}
    after = [value for module in frozen for value in module.state_dict().values()]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rows_of_absent_tasks_never_move(weight_decay: float) -> None:
    pipe = sd_pipeline()
    objective = make_objective(pipe, noise_data(pipe, ["text-to-image", "edit"]), batch_size=1)
    rows = objective.row_parameters()
    packed = {p for module in pipe.unet.per_task_modules_by_name().values() for p in module.parameters()}
    assert set(rows) == packed
    config = replace(STEPS, steps=1, weight_decay=weight_decay)
    before = [row.detach().clone() for row in rows]
    assert objective.trained_rows(0) == [0]  # the second task comes in the second step
    train(objective, config)
    for old, new in zip(before, rows, strict=True):
        assert torch.equal(new[1:], old[1:])
    assert any(not torch.equal(new[0], old[0]) for old, new in zip(before, rows, strict=True))
    objective = make_objective(pipe, noise_data(pipe, ["text-to-image", "edit"]), batch_size=3)
    assert objective.trained_rows(0) == [0, 1]
    train(objective, replace(config, steps=2))
    for old, new in zip(before, rows, strict=True):
        assert torch.equal(new[2:], old[2:])


def test_an_update_is_that_of_the_loss() -> None:
    """One step of plain AdamW from the gradients of the loss, in one part and in four."""
    for parts in (1, 4):
        pipe = sd_pipeline()
        objective = make_objective(pipe, batch_size=4)
        partial = loss_of(objective)
        partial.loss.backward()
        expected = {}
        for name, p in objective.named_parameters():
            if p.grad is not None:
                # The first step of AdamW goes by the learning rate against the sign of the gradient.
                expected[name] = p.detach() - 1e-3 * p.grad / (p.grad.abs() + 1e-8)
        config = replace(STEPS, steps=1, weight_decay=0.0, max_grad_norm=None, gradient_accumulation_steps=parts)
        train(objective, config)
        for name, p in objective.named_parameters():
            if name in expected:
                # Where a gradient is zero up to rounding, its sign is arbitrary.
                close = (p - expected[name]).abs() < 1e-5
                assert close.float().mean() > 0.98, name


@pytest.mark.parametrize("make_pipe", [sd_pipeline, xl_pipeline])
def test_gradient_checkpointing_changes_nothing(make_pipe) -> None:
    gradients = []
    for checkpointing in (False, True):
        objective = make_objective(make_pipe(), gradient_checkpointing=checkpointing, batch_size=4).train()
        assert objective.unet.is_gradient_checkpointing == checkpointing
        loss_of(objective).loss.backward()
        gradients.append([p.grad for p in objective.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("make_pipe", [sd_pipeline, xl_pipeline])
def test_frozen_weights_may_be_in_bfloat16(make_pipe) -> None:
    """With autocast, frozen weights in bfloat16 give what frozen weights in float32 do: both round them."""
    losses, updates = [], []
    for frozen_dtype in (torch.float32, torch.bfloat16):
        pipe = make_pipe()
        for parameter in pipe.unet.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(frozen_dtype)
        objective = make_objective(pipe, precision="bf16", batch_size=4)
        partial = loss_of(objective)
        partial.loss.backward()
        losses.append(partial)
        updates.append({p.grad.dtype for p in objective.parameters() if p.grad is not None})
    exact = loss_of(make_objective(make_pipe(), batch_size=4))
    # Norms in bfloat16 round their weights by 2⁻⁹, each of some ten.
    torch.testing.assert_close(losses[1].loss, losses[0].loss, rtol=0.02, atol=0)
    torch.testing.assert_close(losses[0].loss, exact.loss, rtol=0.02, atol=0)
    assert updates == [{torch.float32}] * 2
    assert losses[0].loss.dtype == losses[0].example_losses.dtype == torch.float32
    with pytest.raises(ValueError, match=r"^Parameters of several dtypes \(torch.bfloat16, torch.float32\) compute"):
        make_objective(pipe)


@pytest.mark.parametrize(("threads", "shares_weights"), [(1, True), (2, False)])
def test_threads_do_not_share_the_weights_that_autocast_converts(threads, shares_weights, monkeypatch) -> None:
    """The cache of autocast belongs to all threads of a process, and one would free what another one uses."""
    seen = []
    real = precision.autocast_to

    def spy(device_type: str, dtype: torch.dtype | None, *, cache_weights: bool = True):
        seen.append((dtype, cache_weights))
        return real(device_type, dtype, cache_weights=cache_weights)

    objective = make_objective(sd_pipeline(), precision="bf16", batch_size=2, loss_threads=threads)
    monkeypatch.setattr(precision, "autocast_to", spy)
    loss_of(objective)
    assert seen == [(torch.bfloat16, shares_weights)] * threads


@torch.no_grad()
def test_a_model_in_bfloat16_has_a_loss() -> None:
    pipe = sd_pipeline()
    expected = loss_of(make_objective(pipe, batch_size=4)).loss
    pipe.unet.to(torch.bfloat16)
    # Some 40 layers, each of which may round by 2⁻⁸.
    assert float(loss_of(make_objective(pipe, batch_size=4)).loss) == pytest.approx(float(expected), rel=0.1)


def test_another_objective_does_not_continue_a_checkpoint(tmp_path) -> None:
    pipe = sd_pipeline()
    data = noise_data(pipe, ["text-to-image", "edit"])

    def run(data=data, steps=1, resume=True, **changes) -> None:
        objective = make_objective(pipe, data, **{"batch_size": 2, **changes})
        Trainer(objective, replace(STEPS, steps=steps), tmp_path).train(resume=resume)

    run(resume=False)
    # How the loss is computed may change, and so may the order in which the tasks are given.
    run(dict(reversed(data.items())), loss_threads=2, latent_cache="none", text_cache="none")
    for changes in (
        {"precision": "bf16"},
        {"batch_size": 4},
        {"conditioning_dropout_prob": 0.1},
        {"seed": 3},
        {"snr_gamma": 5.0},
        {"prediction_type": "v_prediction"},
        {"shares": {"edit": 2}},
        {"data": {"edit": data["edit"]}},
        {"data": {**data, "edit": noise_data(pipe, ["edit"], rows=6)["edit"]}},
    ):
        with pytest.raises(ValueError, match="another"):
            run(**changes)
    pipe.vae.register_to_config(scaling_factor=0.7)
    with pytest.raises(ValueError, match="another"):
        run()


def test_what_stands_for_a_dropped_prompt_is_a_setting() -> None:
    with_zeros, without = (make_objective(xl_pipeline(zeros), prepare=False).settings for zeros in (True, False))
    assert {key for key, value in with_zeros.items() if without[key] != value} == {"zeros_for_dropped_prompt"}


def test_blocks_with_experts_are_sharding_units() -> None:
    pipe = xl_pipeline()
    units = make_objective(pipe, prepare=False).sharding_units()
    assert units == list(pipe.unet.routed_blocks_by_name().values())
    assert len(units) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_load_the_same_batches(workers: int) -> None:
    pipe = sd_pipeline()
    objective = make_objective(pipe, latent_cache="none", text_cache="none", batch_size=4)
    train(objective, replace(STEPS, steps=2, num_workers=workers))
    reference = sd_pipeline()
    train(make_objective(reference, batch_size=4), replace(STEPS, steps=2))
    for one, other in zip(pipe.unet.parameters(), reference.unet.parameters(), strict=True):
        assert torch.equal(one, other)
    assert objective.describe_examples(BatchPart(0, 0, 4))


@pytest.mark.slow
@pytest.mark.parametrize("fully_shard", [False, True])
def test_two_processes_encode_half_each_and_train_as_one(fully_shard: bool, tmp_path) -> None:
    expected, _ = train_with_a_cache_on_disk(str(tmp_path / "one"))
    both = run_in_processes(2, train_with_a_cache_on_disk, str(tmp_path / "two"), fully_shard=fully_shard)
    for losses, encoded in both:
        assert losses == pytest.approx(expected, rel=1e-5)
        assert encoded in (4, 6)  # images of two and three of the five rows
    assert sum(encoded for _, encoded in both) == 10
