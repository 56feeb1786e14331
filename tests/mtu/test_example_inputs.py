import pytest
import torch

import mtu
from mtu.example_inputs import make_example_inputs

from .tiny import FAMILIES, SD, stock_unet, upcycled_unet


@pytest.mark.parametrize("changes", [{}, {"time_cond_proj_dim": 6}, {"cross_attention_dim": (16, 16)}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_unet_takes_its_example_inputs(family, changes):
    unet = stock_unet(FAMILIES[family], **changes)
    inputs = make_example_inputs(unet, 2, height=8, width=4, text_tokens=3)
    assert unet(**inputs).sample.shape == (2, 4, 8, 4)
    assert ("timestep_cond" in inputs) == bool(changes.get("time_cond_proj_dim"))


def test_an_upcycled_unet_takes_them_in_its_dtype_and_with_condition_channels():
    unet = upcycled_unet(SD).to(torch.bfloat16)
    inputs = make_example_inputs(unet, channels=8)
    assert inputs["sample"].dtype == torch.bfloat16
    assert unet(**inputs).sample.shape == (1, 4, SD["sample_size"], SD["sample_size"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_embed_type": "identity"}, "class_embed_type='identity'"),
        ({"sample_size": None}, r"sample_size is None\): pass height and width"),
        ({"cross_attention_dim": (16, 8)}, r"cross_attention_dim is \(16, 8\)"),
    ],
)
def test_what_cannot_be_told_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_example_inputs(stock_unet(SD, **changes))


def test_models_without_a_size_of_their_own_are_warmed_up_where_one_is_given():
    unet = stock_unet(SD, sample_size=None)
    with pytest.raises(ValueError, match="no default size \\(sample_size is None\\): pass height and width"):
        mtu.warmup(unet, [1])
    assert mtu.warmup(unet, [1], height=4, width=4)[1] > 0
