"""`mtu.warmup` prepares sizes before they are needed."""

import logging

import pytest

import mtu

from ..outputs import predict, rows
from ..states import SMALL
from ..tiny import FAMILIES, inputs, stock_unet, upcycled_unet
from .compiled_models import GRAPHS, compiled

pytestmark = pytest.mark.usefixtures("dynamo")


def test_warm_up_prepares_sizes_quietly(caplog, capsys):
    caplog.set_level(logging.WARNING)
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    # Two branches of text guidance, three of dual guidance, one without guidance.
    batches = [2, ["text-to-image", "edit", "super-resolution"], ("super-resolution",)]
    seconds = mtu.warmup(unet, batches, height=8, width=12, text_tokens=5)
    assert list(seconds) == [2, ("text-to-image", "edit", "super-resolution"), ("super-resolution",)]
    assert all(value > 0 for value in seconds.values())
    assert "warm-up: 100%" in capsys.readouterr().err
    assert captures.count == 3
    given = inputs(unet, batch=6)
    for count in (1, 2, 6):
        predict(unet, rows(given, slice(0, count)), *["edit"] * count)
    assert captures.count == 3
    assert not caplog.records
    predict(unet, rows(given, slice(0, 3)), *["edit"] * 3)
    assert captures.count == 4
    assert len(caplog.records) == 1


def test_warm_up_of_models_that_are_not_compiled_runs_them():
    assert mtu.warmup(upcycled_unet(FAMILIES["sdxl"]), [1], text_tokens=3)[1] > 0
    assert mtu.warmup(stock_unet(), [1])[1] > 0


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([0], {}, r"A batch has at least one row, but got 0\."),
        ([[]], {}, r"A batch has at least one row, but got \(\)\."),
        ([["paint"]], {}, r"Unknown task 'paint'"),
        (["paint"], {}, r"Unknown task 'paint'"),
        ([1], {"height": 0}, r"height and width must be positive multiples of 1, but got 0 and 8\."),
        (range(2, 10), {}, r"At most max_cached_sizes = 8 sizes are kept, but got 9 to warm up\."),
    ],
    ids=["no rows", "no tasks", "unknown tasks", "unknown task", "no height", "too many"],
)
def test_warm_up_refuses(batches, options, message):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    with pytest.raises(ValueError, match=message):
        mtu.warmup(unet, [1, *batches], **options)
    assert captures.count == 0


def test_models_in_training_are_not_warmed_up():
    with pytest.raises(ValueError, match=r"mtu\.warmup expects a UNet in eval mode"):
        mtu.warmup(upcycled_unet(SMALL).train(), [1])


def test_stock_unets_have_no_tasks_to_warm_up():
    with pytest.raises(ValueError, match="Only upcycled UNets have tasks"):
        mtu.warmup(stock_unet(), [["edit"]])
