"""The computed memory of a training step against what the allocator is asked for, and its parts."""

import math

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness.memory import measure_peak_bytes
from mtu.example_inputs import make_example_inputs
from mtu.inspection.inspected_model import load_inspected_model
from mtu.training.runs.peak_memory import StepSettings, peak_training_memory
from tests.mtu.tiny import SD, SDXL, stock_unet, upcycled_unet

SIZE = {"batch_size": 4, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def sd15():
    return load_inspected_model("sd15").build_upcycled()


def measured_step(unet, settings):
    """The most bytes that forward and backward pass hold beyond the weights, by torch's own record on a CPU."""
    unet.train()
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    inputs = make_example_inputs(unet, settings.batch_size, height=8, width=8, channels=unet.conv_in.in_channels)
    if hasattr(unet, "tasks"):
        inputs["task_ids"] = torch.zeros(settings.batch_size, dtype=torch.int64)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast_dtype is not None):
            predicted = unet(**inputs).sample.float()
            loss = F.mse_loss(predicted, torch.zeros_like(predicted))
        del predicted
        loss.backward()

    return measure_peak_bytes(step, torch.device("cpu"))


@pytest.mark.parametrize("config", [SD, SDXL], ids=["sd", "sdxl"])
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_what_the_allocator_is_asked_for(config, autocast_dtype, checkpointing):
    unet = upcycled_unet(config, backend="eager")
    settings = StepSettings(
        **SIZE, device_type="cpu", autocast_dtype=autocast_dtype, gradient_checkpointing=checkpointing
    )
    computed = peak_training_memory(unet, settings)
    measured = measured_step(unet, settings)
    held = computed.gradients + computed.activations
    # Operators allocate some tensors inside, of up to a few rows of tokens: 3.5 % of this tiny step at the most.
    assert measured * 0.96 <= held <= measured * 1.001


def test_the_memory_inside_of_fused_operators_counts():
    unet = upcycled_unet(SD, backend="reference")
    settings = StepSettings(**SIZE, device_type="cpu")
    eager = peak_training_memory(upcycled_unet(SD, backend="eager"), settings)
    fused = peak_training_memory(unet, settings)
    # Fused operators save less. That of the backward pass needs its share in any case.
    assert eager.activations / 2 < fused.activations < eager.activations


def test_a_stock_unet_can_be_computed_too():
    unet = stock_unet(SD)
    settings = StepSettings(**SIZE, device_type="cpu")
    computed = peak_training_memory(unet, settings)
    assert computed.gradients == computed.weights == sum(p.nbytes for p in unet.parameters())
    measured = measured_step(unet, settings)
    assert measured * 0.96 <= computed.gradients + computed.activations <= measured * 1.001


def test_the_state_of_sd15_is_what_the_paper_trains(sd15):
    settings = StepSettings(autocast_dtype=torch.bfloat16, gradient_checkpointing=True, keeps_average=True)
    memory = peak_training_memory(sd15, settings)
    trained = sum(p.numel() for p in sd15.trainable_parameters())
    assert memory.training_state == 4 * 4 * trained <= 2.6e9
    assert memory.weights == 4 * sum(p.numel() for p in sd15.parameters())
    assert memory.total == sum(memory)
    small = peak_training_memory(sd15, settings._replace(optimizer="adamw8bit", frozen_dtype=torch.bfloat16))
    assert small.weights == 2 * sum(p.numel() for p in sd15.parameters()) + 2 * trained
    # Two moments of a byte each, with a scale of four bytes for 256 of them.
    assert small.optimizer == pytest.approx(2 * trained * (1 + 4 / 256), rel=0.01)


def test_the_unet_stays_as_it_is():
    unet = upcycled_unet(SD)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    peak_training_memory(unet, StepSettings(**SIZE, gradient_checkpointing=True, autocast_dtype=torch.bfloat16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert not unet.training
    assert not unet.is_gradient_checkpointing
    assert all(p.grad is None for p in unet.parameters())
    assert not any("forward" in vars(module) for module in unet.modules())


def test_processes_share_the_state_only_when_it_is_sharded():
    unet = upcycled_unet(SDXL)
    alone, copies, shards = (
        peak_training_memory(unet, StepSettings(**SIZE, keeps_average=True, num_processes=n, fully_shard=sharded))
        for n, sharded in ((1, False), (4, False), (4, True))
    )
    assert copies[:4] == alone[:4]
    assert copies.activations >= alone.activations
    assert shards[:4] == tuple(math.ceil(part / 4) for part in alone[:4])
    # Gathering needs at least what lies outside of the units.
    assert shards.activations > 0


def test_gradients_of_several_passes_are_there_throughout():
    unet = upcycled_unet(SD)
    settings = StepSettings(**SIZE)
    once, several = (
        peak_training_memory(unet, settings._replace(accumulates_gradients=several)) for several in (False, True)
    )
    assert once.total < several.total <= once.total + once.gradients


def test_a_unet_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="trains no parameter"):
        peak_training_memory(upcycled_unet(SD).requires_grad_(False), StepSettings(**SIZE))
