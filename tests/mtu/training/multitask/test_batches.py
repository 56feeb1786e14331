"""The batches of a step: what is random in them, and on what that depends."""

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from mtu.training.multitask import MultiTaskObjective
from mtu.training.multitask.batches import Batch
from mtu.training.multitask.timesteps import timesteps_at_fractions
from mtu.training.objective import BatchPart

from .tiny_pipelines import TASKS, make_objective, noise_data, sd_pipeline, xl_pipeline


@pytest.fixture(scope="module")
def pipe():
    return sd_pipeline()


def uncached(pipe, data=None, **settings) -> MultiTaskObjective:
    settings = {"latent_cache": "none", "text_cache": "none", **settings}
    return make_objective(pipe, noise_data(pipe) if data is None else data, prepare=False, **settings)


def load(objective: MultiTaskObjective, step: int = 0, index: int = 0, count: int = 1) -> Batch:
    return objective.load_batch(BatchPart(step, index, count))


def contents(batch: Batch) -> list[Tensor]:
    """The tensors that have a row per example, and the prompts as tensors of their bytes."""
    fields = [batch.task_ids, batch.timesteps, batch.noise, batch.keeps_image, batch.has_zero_text, batch.counts]
    assert batch.latent_noise is not None
    images = [batch.missing_images.targets, batch.missing_images.conditions, batch.missing_images.sizes]
    prompts = torch.stack([torch.tensor(list(item.prompt.encode().ljust(40))) for item in batch.missing_prompts])
    return [*fields, batch.latent_noise, *images, prompts]


def assert_same(batch: Batch, other: Batch) -> None:
    for one, two in zip(contents(batch), contents(other), strict=True):
        assert torch.equal(one, two)


def test_a_batch_depends_on_seed_and_step_alone(pipe) -> None:
    settings = {"random_flip": True, "conditioning_dropout_prob": 0.3}
    data = noise_data(pipe, variants=2, captions=2)
    objective = uncached(pipe, data, **settings)
    expected = load(objective, step=3)
    for step in (0, 7, 3):
        again = load(objective, step)
    assert_same(again, expected)
    assert_same(pickle.loads(pickle.dumps(objective.load_batch))(BatchPart(3, 0, 1)), expected)
    for other in (load(objective, step=4), load(uncached(pipe, data, seed=1, **settings), step=3)):
        differs = [not torch.equal(one, two) for one, two in zip(contents(other), contents(expected), strict=True)]
        assert all(differs[index] for index in (1, 2, 6, 7, 8, 10))  # timesteps, noise, images and prompts


@pytest.mark.parametrize("count", [2, 4, 8])
def test_parts_make_up_the_batch(pipe, count: int) -> None:
    objective = uncached(pipe, noise_data(pipe, variants=2))
    whole = load(objective, step=2)
    parts = [load(objective, 2, index, count) for index in range(count)]
    for one, pieces in zip(contents(whole), zip(*map(contents, parts), strict=True), strict=True):
        assert torch.equal(one, torch.cat(pieces))
    assert {tuple(part.tasks) for part in parts} == {tuple(whole.tasks)}
    described = [text for index in range(count) for text in objective.describe_examples(BatchPart(2, index, count))]
    assert described == objective.describe_examples(BatchPart(2, 0, 1)) == whole.missing_images.descriptions


def test_examples_are_described(pipe) -> None:
    objective = uncached(pipe, noise_data(pipe, ["edit"], rows=1, variants=3), batch_size=40)
    assert set(objective.describe_examples(BatchPart(0, 0, 1))) == {
        f"edit: noise, line 1 (variant {variant})" for variant in (1, 2, 3)
    }
    objective = uncached(pipe, noise_data(pipe, ["edit"], rows=1), batch_size=1)
    assert objective.describe_examples(BatchPart(0, 0, 1)) == ["edit: noise, line 1"]


@pytest.mark.parametrize("name", TASKS)
def test_dropout_follows_the_guidance(pipe, name: str) -> None:
    """As train_instruct_pix2pix does: of the probability p each, the prompt alone, both, and the image alone."""
    objective = uncached(pipe, noise_data(pipe, [name], rows=3), batch_size=600, conditioning_dropout_prob=0.25)
    loader, spec = objective.load_batch, pipe.unet.tasks[pipe.unet.task_index(name)]
    _, draws = loader.draw_examples(BatchPart(0, 0, 1))
    frequency = {
        lost: sum((draw.drops_prompt, draw.drops_image) == lost for draw in draws) / 600
        for lost in ((False, False), (True, False), (True, True), (False, True))
    }
    expected = {"none": (1, 0, 0, 0), "text": (0.75, 0.25, 0, 0), "dual": (0.25, 0.25, 0.25, 0.25)}[spec.guidance]
    assert list(frequency.values()) == [pytest.approx(p, abs=0.09 if 0 < p < 1 else 0) for p in expected]  # 5 σ
    assert all(draw.prompt == "" for draw in draws if draw.drops_prompt)
    assert all((draw.prompt != "") == spec.uses_prompt for draw in draws if not draw.drops_prompt)


def test_the_dropped_prompt_of_sdxl_is_zero_if_the_model_says_so(pipe) -> None:
    settings = {"batch_size": 60, "conditioning_dropout_prob": 0.3}
    for one, zeros in ((pipe, False), (xl_pipeline(True), True), (xl_pipeline(False), False)):
        objective = uncached(one, noise_data(one, ["edit", "super-resolution"]), **settings)
        batch = load(objective)
        dropped = [draw.drops_prompt for draw in objective.load_batch.draw_examples(BatchPart(0, 0, 1))[1]]
        # The empty prompt of super-resolution is a prompt.
        assert batch.has_zero_text.tolist() == [drop and zeros for drop in dropped]
        assert 10 < sum(dropped) < 30


def test_variants_prompts_and_flips_are_drawn_alike(pipe) -> None:
    data = noise_data(pipe, ["edit"], rows=1, variants=2, captions=2)
    objective = uncached(pipe, data, batch_size=400, random_flip=True, conditioning_dropout_prob=0.0)
    draws = objective.load_batch.draw_examples(BatchPart(0, 0, 1))[1]
    seen = [(draw.variant, draw.prompt, draw.flip) for draw in draws]
    expected = {
        (variant, f"edit 0.{variant}.{caption}", flip)
        for variant in (0, 1)
        for caption in (0, 1)
        for flip in (False, True)
    }
    assert set(seen) == expected
    assert all(seen.count(one) == pytest.approx(50, abs=33) for one in expected)  # 5 σ
    assert len({draw.noise_seed for draw in draws}) == 400
    assert not any(draw.flip for draw in uncached(pipe, data).load_batch.draw_examples(BatchPart(0, 0, 1))[1])


def test_timesteps_are_stratified_within_each_task(pipe) -> None:
    objective = uncached(pipe, batch_size=40)
    seen = []
    for step in range(5):
        batch = load(objective, step)
        for task in range(4):
            own = batch.timesteps[batch.task_ids == task]
            assert (own // 100).tolist() == list(range(10))  # one in each tenth of 1000 timesteps, wherever it is
            seen += (own % 100).tolist()
    assert len(set(seen)) > 70


def test_the_last_timestep_is_drawn_where_a_sum_rounds_up() -> None:
    """The largest float32 below 1, plus 15, is 16: every few hundred thousand draws."""
    fractions = torch.tensor([0.0, 1 / 16, (1 - 2**-24 + 15) / 16])
    assert timesteps_at_fractions(fractions, 1000).tolist() == [0, 62, 999]


def test_conditions_are_zero_where_a_task_has_none(pipe) -> None:
    objective = make_objective(pipe, noise_data(pipe, ["text-to-image", "edit"]))
    batch = load(objective)
    absent = batch.task_ids == pipe.unet.task_index("text-to-image")
    assert batch.missing_images is None
    assert batch.latents.positions == list(range(8))
    assert batch.latents.tensors["condition"][absent].eq(0).all()
    assert batch.latents.tensors["condition"][~absent].ne(0).any(dim=(1, 2, 3)).all()
    wanted = load(uncached(pipe, noise_data(pipe, ["text-to-image", "edit"]))).missing_images
    assert wanted.have_condition == (~absent).tolist()
    assert wanted.conditions[absent].eq(0).all()


def test_pixels_match_their_rows(pipe) -> None:
    data = noise_data(pipe, ["edit"])
    objective = uncached(pipe, data, batch_size=5)
    batch = load(objective)
    rows = [example.row for example in objective.plan.examples(0)]
    assert sorted(rows) == list(range(5))
    for position, row in enumerate(rows):
        images = data["edit"].load_images(row, 0)
        expected = torch.from_numpy(np.array(images.target)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(batch.missing_images.targets[position], expected)
        prompt = batch.missing_prompts[position].prompt
        assert prompt in ("", f"edit {row}.0.0")


def test_mirrored_examples_are_mirrored(pipe) -> None:
    data = noise_data(pipe, ["edit"])
    plain, mirrored = load(uncached(pipe, data)), load(uncached(pipe, data, random_flip=True))
    flips = [
        draw.flip for draw in uncached(pipe, data, random_flip=True).load_batch.draw_examples(BatchPart(0, 0, 1))[1]
    ]
    assert 0 < sum(flips) < 8
    for position, flip in enumerate(flips):
        for name in ("targets", "conditions"):
            image, other = (getattr(one.missing_images, name)[position] for one in (plain, mirrored))
            assert torch.equal(other, image.flip(-1) if flip else image)


def test_mode_needs_no_latent_noise(pipe) -> None:
    one, other = load(uncached(pipe)), load(uncached(pipe, latent_sampling="mode"))
    assert other.latent_noise is None
    assert torch.equal(one.noise, other.noise)
    assert not torch.equal(one.noise, one.latent_noise)


def test_a_task_without_prompts_ignores_those_of_its_data(pipe, monkeypatch) -> None:
    data = noise_data(pipe, ["super-resolution"])
    monkeypatch.setattr(data["super-resolution"], "prompts", lambda row: [["a caption"]])
    objective = uncached(pipe, data)
    assert objective.load_batch.prompts() == [""]
    assert {item.prompt for item in load(objective).missing_prompts} == {""}
