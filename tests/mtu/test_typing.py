"""Type checkers know the result of `mtu.upcycle` and `mtu.load_trained`, and refuse misspelt arguments.

Pyright checks this file: each comment that expects an error is an error itself where there is none.
"""

# pyright: reportCallIssue=true, reportArgumentType=true, reportUnnecessaryTypeIgnoreComment=true

import inspect
from pathlib import Path
from typing import assert_type, get_overloads

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

import mtu
from mtu import MTUPipeline, MTUUNet2DConditionModel


@pytest.mark.parametrize("function", [mtu.upcycle, mtu.load_trained], ids=lambda function: function.__name__)
def test_overloads_have_the_parameters_of_the_function(function):
    def parameters(overload):
        return [(p.name, p.kind, p.default) for p in inspect.signature(overload).parameters.values()]

    overloads = get_overloads(function)
    assert len(overloads) == 2
    assert all(parameters(overload) == parameters(function) for overload in overloads)


def results(unet: UNet2DConditionModel, pipe: StableDiffusionPipeline, folder: Path) -> None:
    assert_type(mtu.upcycle(unet, num_experts=2), MTUUNet2DConditionModel)
    assert_type(mtu.upcycle(unet, ["edit", mtu.tasks.REMOVE], 4, top_k=2, init="paper"), MTUUNet2DConditionModel)
    assert_type(mtu.upcycle(pipe, backend="triton"), MTUPipeline)
    assert_type(mtu.load_trained(unet, folder), MTUUNet2DConditionModel)
    assert_type(mtu.load_trained(pipe, str(folder), backend="cpp"), MTUPipeline)


def mistakes(unet: UNet2DConditionModel, folder: Path) -> None:
    mtu.upcycle(unet, num_expert=2)  # pyright: ignore[reportCallIssue]
    mtu.upcycle(unet, init="preserved")  # pyright: ignore[reportCallIssue, reportArgumentType]
    mtu.upcycle(unet, backend="cuda")  # pyright: ignore[reportCallIssue, reportArgumentType]
    mtu.upcycle(unet, top_k="2")  # pyright: ignore[reportCallIssue, reportArgumentType]
    mtu.load_trained(unet, folder, backends="cpp")  # pyright: ignore[reportCallIssue]
