"""The multi-task objective: the loss of a step, how it splits into parts, and what a training moves."""

import errno
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers import DDPMScheduler
from torch.nn import functional as F

import mtu
from mtu import storage
from mtu.training import BatchPart
from mtu.training.multitask import MultiTaskObjective

from ...pipelines.conftest import stock_pipeline
from .tiny_pipelines import TASKS, loss_of, make_objective, noise_data, sd_pipeline, xl_pipeline

# Losses of some ten elements in float32, summed in another order.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def pipe() -> mtu.MTUPipeline:
    return sd_pipeline()


def gradients(objective: MultiTaskObjective, parts: int = 1) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    for index in range(parts):
        loss_of(objective, 0, index, parts).loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@torch.no_grad()
@pytest.mark.parametrize("make_pipe", [sd_pipeline, xl_pipeline])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_sum_of_the_tasks_means(make_pipe, prediction_type: str) -> None:
    """Equation 2 of the paper, written out example by example with what diffusers' scripts call."""
    pipe = make_pipe()
    weights = {"edit": 3.0, "remove": 0.5}
    shares = {"text-to-image": 2, "edit": 1, "super-resolution": 1, "remove": 1}
    settings = {"batch_size": 7, "conditioning_dropout_prob": 0.25, "prediction_type": prediction_type}
    objective = make_objective(pipe, loss_weights=weights, shares=shares, **settings)
    # A step in which something is dropped in each way.
    for step in range(100):
        examples, draws = objective.load_batch.draw_examples(BatchPart(step, 0, 1))
        if len({(draw.drops_prompt, draw.drops_image) for draw in draws}) == 4:
            break
    batch = objective.load_batch(BatchPart(step, 0, 1))
    assert len({(draw.drops_prompt, draw.drops_image) for draw in draws}) == 4
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    is_xl = not isinstance(pipe, mtu.MTUPipeline)
    errors: dict[str, list[torch.Tensor]] = {}
    for i, (example, draw) in enumerate(zip(examples, draws, strict=True)):
        name = TASKS[example.task]
        spec, dataset = pipe.unet.tasks[example.task], noise_data(pipe)[name]
        images = dataset.load_images(example.row, draw.variant)
        t = batch.timesteps[i : i + 1]

        def latents(image, resample):
            image = image.resize((16, 16), resample)
            pixels = pipe.image_processor.preprocess(image)
            return pipe.vae.encode(pixels).latent_dist

        posterior = latents(images.target, 1)  # 1 is Lanczos
        clean = (posterior.mean + posterior.std * batch.latent_noise[i : i + 1]) * pipe.vae.config.scaling_factor
        noise = batch.noise[i : i + 1]
        sample = scheduler.add_noise(clean, noise, t)
        if spec.takes_image:
            condition = latents(images.condition, 3 if spec.resample == "bicubic" else 1).mode()
            sample = torch.cat([sample, condition * (not draw.drops_image)], dim=1)
        prompt = "" if draw.drops_prompt else dataset.prompts(example.row)[draw.variant][0]
        added = None
        if is_xl:
            given, negative, pooled, negative_pooled = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1)
            if draw.drops_prompt:
                given, pooled = negative, negative_pooled
                assert not given.any()
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
        else:
            given = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
        ids = pipe.unet.task_ids(name)
        predicted = pipe.unet(sample, t, given, added_cond_kwargs=added, task_ids=ids).sample
        target = noise if prediction_type == "epsilon" else scheduler.get_velocity(clean, noise, t)
        errors.setdefault(name, []).append(F.mse_loss(predicted, target))
    means = {name: torch.cat([error.view(1) for error in own]).mean() for name, own in errors.items()}
    partial = objective(batch)
    torch.testing.assert_close(partial.loss, sum(weights.get(name, 1) * mean for name, mean in means.items()))
    assert dict(partial.terms).keys() == means.keys()
    for name, mean in means.items():
        torch.testing.assert_close(partial.terms[name], mean)
    assert len(partial.example_losses) == 7


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_the_losses_of_parts_sum_to_that_of_the_batch(pipe, parts: int) -> None:
    objective = make_objective(pipe, shares={"edit": 3}, loss_weights={"edit": 2.0})
    whole = loss_of(objective)
    pieces = [loss_of(objective, 0, index, parts) for index in range(parts)]
    torch.testing.assert_close(sum(piece.loss for piece in pieces), whole.loss, **ROUNDING)
    for name, term in whole.terms.items():
        torch.testing.assert_close(sum(piece.terms[name] for piece in pieces), term, **ROUNDING)
    torch.testing.assert_close(torch.cat([piece.example_losses for piece in pieces]), whole.example_losses, **ROUNDING)
    expected, summed = gradients(objective), gradients(objective, parts)
    for name, gradient in expected.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_compute_the_same_loss(pipe, threads: int) -> None:
    plain = make_objective(pipe)
    expected, own = loss_of(plain), gradients(plain)
    threaded = make_objective(pipe, loss_threads=threads)
    partial = loss_of(threaded)
    torch.testing.assert_close(partial.loss, expected.loss, **ROUNDING)
    torch.testing.assert_close(partial.example_losses, expected.example_losses, **ROUNDING)
    for name, term in expected.terms.items():
        torch.testing.assert_close(partial.terms[name], term, **ROUNDING)
    for name, gradient in gradients(threaded).items():
        torch.testing.assert_close(gradient, own[name], rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        assert not loss_of(threaded).loss.requires_grad
    threaded.check_part_count(8 // threads)
    with pytest.raises(ValueError, match=rf"^batch_size = 8 must be a multiple of 16, .* for {threads} loss threads"):
        threaded.check_part_count(16 // threads)


@torch.no_grad()
@pytest.mark.parametrize("make_pipe", [sd_pipeline, xl_pipeline])
def test_a_cache_changes_no_bit(make_pipe, tmp_path) -> None:
    pipe = make_pipe()
    data = noise_data(pipe, rows=2, variants=2)
    expected = [
        loss_of(make_objective(pipe, data, latent_cache="none", text_cache="none", random_flip=True), step)
        for step in range(2)
    ]
    for kind in ("memory", "disk"):
        objective = make_objective(
            pipe, data, latent_cache=kind, text_cache=kind, cache_directory=tmp_path, random_flip=True
        )
        for step in range(2):
            batch = objective.load_batch(BatchPart(step, 0, 1))
            assert batch.missing_images is None
            assert not batch.missing_prompts
            partial = objective(send_to_device(batch, "cpu"))
            assert torch.equal(partial.loss, expected[step].loss)
            assert torch.equal(partial.example_losses, expected[step].example_losses)


@torch.no_grad()
def test_damaged_entries_are_encoded_and_written_again(pipe, tmp_path) -> None:
    settings = {"latent_cache": "disk", "text_cache": "disk", "cache_directory": tmp_path}
    expected = loss_of(make_objective(pipe, **settings)).loss
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 20 + 16  # images, and prompts with the empty one
    for number, file in enumerate(files):
        if number % 2:
            file.write_bytes(file.read_bytes()[:-1])
        else:
            file.unlink()
    objective = make_objective(pipe, prepare=False, **settings)
    for attempt in range(2):
        batch = objective.load_batch(BatchPart(0, 0, 1))
        assert (batch.missing_images is None) == bool(attempt)
        assert bool(batch.missing_prompts) != bool(attempt)
        with nullcontext() if attempt else pytest.warns(UserWarning, match=f"^The caches in {tmp_path} have damaged "):
            assert torch.equal(objective(batch).loss, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["latent_cache", "text_cache"])
def test_a_disk_that_fills_within_a_step_does_not_end_the_training(pipe, tmp_path, monkeypatch, kind: str) -> None:
    settings = {kind: "disk", "cache_directory": tmp_path}
    expected = [loss_of(make_objective(pipe, **settings), step).loss for step in range(2)]
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    objective = make_objective(pipe, prepare=False, **{"latent_cache": "none", "text_cache": "none", **settings})

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write_tensors", fail)
    with pytest.warns(UserWarning, match=r"^The cache does not keep .*No space left on device\.$") as caught:
        assert [loss_of(objective, step).loss for step in range(2)] == expected
    assert len(caught) == 1
    with pytest.raises(OSError, match="No space left on device"):
        objective.prepare(Accelerator(cpu=True))


@torch.no_grad()
def test_half_a_cache_does_as_well(pipe, tmp_path) -> None:
    settings = {"latent_cache": "disk", "text_cache": "disk", "cache_directory": tmp_path}
    objective = make_objective(pipe, **settings)
    expected = loss_of(objective).loss
    batch = objective.load_batch(BatchPart(0, 0, 1))
    item = objective.load_batch.image_key(next(iter(objective.load_batch.image_items())))
    paths = [path for path in tmp_path.rglob("*.safetensors") if path.stem != item]
    for path in paths[::2]:
        path.unlink()
    partly = objective.load_batch(BatchPart(0, 0, 1))
    assert 0 < len(partly.missing_images.positions) < 8
    assert partly.latents.positions
    assert torch.equal(objective(partly).loss, expected)
    assert torch.equal(objective(batch).loss, expected)


@torch.no_grad()
def test_the_empty_prompt_is_read_once(pipe, tmp_path, monkeypatch) -> None:
    objective = make_objective(
        pipe, noise_data(pipe, ["super-resolution"]), text_cache="disk", cache_directory=tmp_path
    )
    reads = []
    real = storage.read_tensors
    monkeypatch.setattr(storage, "read_tensors", lambda path: reads.append(path) or real(path))
    losses = [loss_of(objective, step).loss for step in range(2)]
    assert len(reads) == 1
    assert losses == [
        loss_of(make_objective(pipe, noise_data(pipe, ["super-resolution"])), step).loss for step in (0, 1)
    ]


def test_preparing_encodes_only_what_is_missing(pipe, tmp_path, monkeypatch) -> None:
    settings = {"latent_cache": "disk", "text_cache": "disk", "cache_directory": tmp_path}
    make_objective(pipe, noise_data(pipe, ["edit"]), **settings)
    encoded = []
    real = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: encoded.append(len(x)) or real(x))
    make_objective(pipe, noise_data(pipe, ["edit"]), **settings)
    assert encoded == []
    make_objective(pipe, noise_data(pipe, ["edit"], rows=6), **settings)
    assert encoded == [1, 1]  # target and condition of the new row
    make_objective(pipe, noise_data(pipe, ["edit"]), random_flip=True, **settings)
    assert encoded == [1] * 12


@pytest.mark.parametrize(
    ("names", "tasks"),
    [
        (["text-to-image"], ["text-to-image"]),
        (["text-to-image"], ["text-to-image", "edit"]),
        (["super-resolution"], ["super-resolution"]),
        (["text-to-image", "super-resolution"], ["super-resolution", "edit", "text-to-image"]),
    ],
)
def test_tasks_without_images_and_in_other_orders(names: list[str], tasks: list[str]) -> None:
    pipe = mtu.upcycle(stock_pipeline(), tasks)
    # More of each task than there are rows.
    objective = make_objective(pipe, noise_data(pipe, names, rows=2), batch_size=7)
    partial = loss_of(objective)
    partial.loss.backward()
    assert partial.loss.isfinite()
    assert set(partial.terms) == set(names)
    used = [pipe.unet.task_index(name) for name in names]
    assert [bool(row.any()) for row in pipe.unet.conv_in.bias.grad] == [i in used for i in range(len(tasks))]
    assert objective.trained_rows(0) == sorted(used)


def test_a_small_batch_has_a_part_of_the_tasks(pipe) -> None:
    objective = make_objective(pipe, batch_size=2)
    terms = [loss_of(objective, step).terms for step in range(2)]
    assert [list(one) for one in terms] == [["text-to-image", "edit"], ["super-resolution", "remove"]]
    assert [objective.trained_rows(step) for step in range(2)] == [[0, 1], [2, 3]]
    # A part without examples of a task has the term, too: so all parts of a step have the same terms.
    parts = [loss_of(objective, 0, index, 2).terms for index in range(2)]
    assert [list(one) for one in parts] == [["text-to-image", "edit"]] * 2
    assert parts[0]["edit"] == parts[1]["text-to-image"] == 0


@torch.no_grad()
def test_a_loss_that_is_not_finite_names_example_and_task(pipe) -> None:
    objective = make_objective(pipe, loss_threads=2)
    batch = objective.load_batch(BatchPart(0, 0, 1))
    broken = batch.noise.clone()
    broken[2] = float("nan")
    partial = objective(batch._replace(noise=broken))
    assert partial.example_losses.isfinite().tolist() == [position != 2 for position in range(8)]
    faulty = TASKS[batch.task_ids[2]]
    assert {name: bool(term.isfinite()) for name, term in partial.terms.items()} == {
        name: name != faulty for name in TASKS
    }
    assert not partial.loss.isfinite()
