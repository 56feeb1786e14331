"""Encoding before the first step, by several processes and threads."""

import contextlib
import threading
import time
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator

from mtu.training import BatchPart
from mtu.training.multitask import precomputing
from mtu.training.multitask.encoding import PipelineEncoder
from mtu.training.multitask.precomputing import _in_threads, encode_missing_items

from .tiny_pipelines import loss_of, make_objective, noise_data, sd_pipeline


class OneOfTwo:
    """What the preparation asks of an accelerator, as one of two processes."""

    num_processes = 2

    def __init__(self, index: int) -> None:
        self.process_index, self.is_main_process = index, index == 0


@pytest.fixture
def _alone(monkeypatch) -> None:
    """The processes of these tests do not run at the same time, so they do not wait for each other."""
    monkeypatch.setattr(precomputing, "common_errors_context", lambda accelerator: contextlib.nullcontext())


def prepare(objective, accelerator: OneOfTwo) -> None:
    encoder = PipelineEncoder(objective.pipeline)
    encode_missing_items(encoder, objective.load_batch, cast(Accelerator, accelerator), torch.device("cpu"), 1)


@pytest.mark.usefixtures("_alone")
def test_processes_share_the_work(tmp_path, monkeypatch) -> None:
    pipe = sd_pipeline()
    encoded: list[Any] = []
    real = PipelineEncoder.encode_images
    monkeypatch.setattr(
        PipelineEncoder, "encode_images", lambda self, pixels, text: encoded.append(text) or real(self, pixels, text)
    )
    settings = {"latent_cache": "disk", "text_cache": "disk", "cache_directory": tmp_path}
    objective = make_objective(pipe, prepare=False, **settings)
    prepare(objective, OneOfTwo(0))
    assert len(encoded) == 10
    prepare(objective, OneOfTwo(1))
    assert len(set(encoded)) == len(encoded) == 20
    batch = objective.load_batch(BatchPart(0, 0, 1))
    assert batch.missing_images is None
    assert not batch.missing_prompts


@pytest.mark.usefixtures("_alone")
def test_each_process_fills_a_cache_in_memory_of_its_own() -> None:
    pipe = sd_pipeline()
    losses = []
    for index in range(2):
        objective = make_objective(pipe, prepare=False)
        prepare(objective, OneOfTwo(index))
        assert objective.load_batch(BatchPart(0, 0, 1)).missing_images is None
        losses.append(loss_of(objective).loss)
    assert torch.equal(*losses)


def test_threads_encode_the_same() -> None:
    pipe = sd_pipeline()
    one, other = (make_objective(pipe, loss_threads=threads).load_batch(BatchPart(0, 0, 1)) for threads in (1, 4))
    for name, tensor in one.latents.tensors.items():
        assert torch.equal(other.latents.tensors[name], tensor)


def test_models_go_to_the_device_of_training_only_to_encode(monkeypatch) -> None:
    """Where everything is cached, the memory of the accelerator is left to the UNet."""
    pipe = sd_pipeline()
    moves: dict[str, list[str]] = {"vae": [], "text_encoder": []}
    for name, places in moves.items():
        monkeypatch.setattr(getattr(pipe, name), "to", lambda device, places=places: places.append(str(device)))
    data = noise_data(pipe, ["edit"])
    make_objective(pipe, data)
    assert all(places[-1] == "cpu" for places in moves.values())
    objective = make_objective(pipe, data, prepare=False, latent_cache="none")
    pipe.unet.to("meta")
    objective.prepare(Accelerator(cpu=True))  # the text encoder, which does not really move, encodes on the CPU
    assert moves["vae"][-1] == "meta"
    assert moves["text_encoder"][-1] == "cpu"


@pytest.mark.parametrize("own", [False, True])
def test_the_pipeline_can_sample_after_a_training(monkeypatch, own: bool) -> None:
    """Models are on one device then, and checkpointing is as it was."""
    pipe = sd_pipeline()
    if own:
        pipe.unet.enable_gradient_checkpointing()
    objective = make_objective(pipe, noise_data(pipe, ["edit"]), prepare=False, gradient_checkpointing=True)
    objective.finish()  # after an error before the preparation
    assert pipe.unet.is_gradient_checkpointing == own
    objective.prepare(Accelerator(cpu=True))
    assert pipe.unet.is_gradient_checkpointing
    places: list[str] = []
    for name in ("vae", "text_encoder"):
        monkeypatch.setattr(getattr(pipe, name), "to", lambda device: places.append(str(device)))
    pipe.unet.to("meta")
    for _ in range(2):
        objective.finish()
        assert pipe.unet.is_gradient_checkpointing == own
        assert places == ["meta", "meta"]


def test_results_come_in_order_and_only_a_few_wait() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        time.sleep(0.001 * (item % 3))
        return item

    results = _in_threads(work, range(30), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert max(started) <= 8
    assert list(results) == list(range(3, 30))
    assert threading.active_count() < 10


def test_an_abandoned_iteration_stops_its_threads() -> None:
    started: list[int] = []
    results = _in_threads(lambda item: started.append(item), range(1000), 2)
    next(results)
    results.close()
    assert len(started) < 20
