"""Pipelines with a compiled UNet: the images of the plain one, no size that warm-up did not name, routers run once."""

import numpy as np
import pytest
import torch

import mtu
from mtu.runtime.compiling import CompiledUNetCalls, ExecutionPlan

TASKS = ("text-to-image", "edit", "super-resolution", "remove")


def generate(pipe, picture, tasks=TASKS, **options):
    return pipe(
        ["a bell" if task != "super-resolution" else None for task in tasks],
        image=[None if task == "text-to-image" else picture(seed=i) for i, task in enumerate(tasks)],
        task=list(tasks),
        height=16,
        width=16,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(i) for i in range(len(tasks))],
        output_type="np",
        **options,
    ).images


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "mtu"]


@pytest.fixture
def compiled(pipe):
    """The pipeline through `CompiledUNetCalls`, without generating code."""
    torch.compiler.reset()
    pipe.unet._compiled_call_impl = CompiledUNetCalls(pipe.unet, ExecutionPlan({"backend": "eager"}, False), 4)
    yield pipe
    torch.compiler.reset()


@pytest.mark.slow
def test_warm_up_names_the_sizes_of_calls_and_images_stay_the_same(compiled, shared_pipe, picture, caplog):
    mtu.warmup(compiled, [TASKS, ("edit", "remove", "text-to-image", "super-resolution")], height=16, width=16)
    (size,) = compiled.unet._compiled_call_impl._sizes
    for tasks in (TASKS, TASKS[::-1]):
        expected, actual = generate(shared_pipe, picture, tasks), generate(compiled, picture, tasks)
        # float32 over two steps and the VAE; images are in [0, 1].
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    assert list(compiled.unet._compiled_call_impl._sizes) == [size]
    assert not messages(caplog)
    generate(compiled, picture, ("text-to-image",))
    (message,) = messages(caplog)
    assert message.startswith("New size, 2 rows of 8×8 latents with 16 text tokens")


@pytest.mark.slow
def test_a_pipeline_of_a_task_that_was_exported(shared_pipe, picture, caplog):
    stock = shared_pipe.export_task("text-to-image")
    stock.set_progress_bar_config(disable=True)

    def run():
        generator = torch.Generator().manual_seed(0)
        return stock("a bell", num_inference_steps=2, generator=generator, output_type="np").images

    expected = run()
    torch.compiler.reset()
    stock.unet._compiled_call_impl = CompiledUNetCalls(stock.unet, ExecutionPlan({"backend": "eager"}, False), 4)
    mtu.warmup(stock, [2])
    np.testing.assert_allclose(run(), expected, rtol=0, atol=1e-4)
    assert not messages(caplog)
    torch.compiler.reset()


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "compiled"])
def test_routers_run_at_most_once_in_a_call(pipe, picture, monkeypatch, is_compiled, request):
    if is_compiled:
        pipe = request.getfixturevalue("compiled")
    router, count = pipe.unet.routers()[0], []
    route = router._route
    monkeypatch.setattr(router, "_route", lambda embedding: count.append(1) or route(embedding))
    generate(pipe, picture)
    assert len(count) == 1
    # Every call looks for changes.
    router.linear_2.bias.data.add_(torch.arange(4.0))
    generate(pipe, picture)
    assert len(count) == 2
    assert not router.is_precomputed


def test_a_callback_that_fails_lets_the_routers_go(pipe, picture):
    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, picture, callback_on_step_end=fail)
    assert not any(router.is_precomputed for router in pipe.unet.routers())


def test_warm_up_takes_pixels_and_refuses_others(compiled):
    with pytest.raises(ValueError, match=r"height and width must be positive multiples of 2, but got 15 and 16\."):
        mtu.warmup(compiled, [1], height=15)
    assert not compiled.unet._compiled_call_impl._sizes


@pytest.mark.gpu
def test_cuda_graphs_give_the_images_of_the_plain_pipeline(pipe, picture):
    pipe.to("cuda")
    expected = generate(pipe, picture)
    mtu.compile(pipe, "cudagraphs")
    mtu.warmup(pipe, [TASKS], height=16, width=16)
    assert len(pipe.unet._compiled_call_impl._sizes) == 1
    for tasks in (TASKS, TASKS[::-1]):
        actual = generate(pipe, picture, tasks)
        if tasks == TASKS:
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    assert len(pipe.unet._compiled_call_impl._sizes) == 1
