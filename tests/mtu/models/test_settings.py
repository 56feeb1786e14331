"""What is set on a UNet besides its weights is carried over by `upcycle` and `export_task`, or refused."""

import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils.checkpoint import checkpoint

import mtu
from tests.mtu.outputs import assert_close, assert_differ, assert_unchanged, predict, rows, snapshot
from tests.mtu.tiny import SD, inputs, stock_unet, upcycled_unet


class Louder(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 1.5


def checkpoint_function(*args):
    return checkpoint(*args, use_reentrant=False)


def train_in_part(unet):
    unet.up_blocks.train()
    unet.up_blocks[1].attentions[0].transformer_blocks[0].ff.eval()


def chunk_tokens(unet):
    for module in unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(8, dim=1)


def hook_and_unhook(unet):
    add_hook_to_module(unet.conv_out, ModelHook())
    remove_hook_from_module(unet.conv_out)


def widen_epsilon(unet):
    for module in unet.modules():
        if hasattr(module, "eps"):
            module.eps = 0.01


# A setting, and what it is read from.
SETTINGS = {
    "freeu": (lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6), lambda unet: unet.up_blocks[0].b1),
    "disabled_freeu": (
        lambda unet: (unet.enable_freeu(0.9, 0.2, 1.5, 1.6), unet.disable_freeu()),
        lambda unet: unet.up_blocks[0].b1,
    ),
    "processor": (
        lambda unet: unet.set_attn_processor(Louder()),
        lambda unet: {type(processor) for processor in unet.attn_processors.values()},
    ),
    "default_processor": (
        lambda unet: unet.set_default_attn_processor(),
        lambda unet: {type(processor) for processor in unet.attn_processors.values()},
    ),
    "attention_slice": (
        lambda unet: unet.set_attention_slice(1),
        lambda unet: {(type(p).__name__, p.slice_size) for p in unet.attn_processors.values()},
    ),
    "unfused": (
        lambda unet: (unet.fuse_qkv_projections(), unet.unfuse_qkv_projections()),
        lambda unet: {type(processor) for processor in unet.attn_processors.values()},
    ),
    "gradient_checkpointing": (
        lambda unet: unet.enable_gradient_checkpointing(checkpoint_function),
        lambda unet: (unet.is_gradient_checkpointing, unet.mid_block._gradient_checkpointing_func),
    ),
    "chunks": (chunk_tokens, lambda unet: unet.mid_block.attentions[0].transformer_blocks[0]._chunk_size),
    "training": (lambda unet: unet.train(), lambda unet: {module.training for module in unet.modules()}),
    "training_in_part": (
        train_in_part,
        lambda unet: (
            unet.training,
            unet.up_blocks[1].attentions[0].training,
            {module.training for module in unet.up_blocks[1].attentions[0].transformer_blocks[0].ff.modules()},
        ),
    ),
    "channels_last": (
        lambda unet: unet.to(memory_format=torch.channels_last),
        lambda unet: (
            {unet.conv_in.weight[..., :4, :, :].is_contiguous(memory_format=torch.channels_last)}
            if unet.conv_in.weight.dim() == 4
            else {unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)}
        ),
    ),
    "epsilon": (
        widen_epsilon,
        lambda unet: {
            getattr(unet.mid_block.attentions[0].transformer_blocks[0], name).eps
            for name in ("norm1", "norm2", "norm3")
        },
    ),
    "configuration": (
        lambda unet: unet.register_to_config(_name_or_path="user/base", note="mine"),
        lambda unet: (unet.config._name_or_path, unet.config.note),
    ),
    "attribute": (lambda unet: setattr(unet.mid_block, "mine", [1]), lambda unet: unet.mid_block.mine),
    "hook_taken_off": (hook_and_unhook, lambda unet: hasattr(unet.conv_out, "_hf_hook")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_carried_over(name):
    set_, read = SETTINGS[name]
    stock, reference = stock_unet(SD), stock_unet(SD)
    for unet in (stock, reference):
        set_(unet)
    expected = read(stock)
    upcycled = mtu.upcycle(stock)
    assert read(upcycled) == expected
    given = rows(inputs(reference), slice(None), 4)
    assert_close(predict(upcycled, given), predict(reference, given))
    exported = upcycled.export_task("text-to-image")
    assert read(exported) == expected
    assert_close(predict(exported, given), predict(upcycled, given))
    assert type(exported) is UNet2DConditionModel


@pytest.mark.parametrize("name", ["freeu", "processor"])
def test_settings_that_change_the_output_are_seen(name):
    unet = upcycled_unet(SD)
    given = rows(inputs(unet), slice(None), 4)
    plain = predict(unet, given)
    SETTINGS[name][0](unet)
    assert_differ(predict(unet, given), plain)
    assert_close(predict(unet.export_task("text-to-image"), given), predict(unet, given))


def test_settings_of_an_export_are_its_own():
    unet = upcycled_unet(SD)
    exported = unet.export_task("edit")
    exported.enable_freeu(0.9, 0.2, 1.5, 1.6)
    for processor in exported.attn_processors.values():
        processor._attention_backend = "native"
    assert not hasattr(unet.up_blocks[0], "b1")
    assert not any(hasattr(processor, "_attention_backend") for processor in unet.attn_processors.values())


def replaced(unet):
    unet.conv_act = torch.nn.ReLU()


def bound(unet):
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.head_to_batch_dim = types.MethodType(lambda self, tensor: tensor, attention)


def replaced_function(unet):
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.head_to_batch_dim = lambda tensor: tensor


def subclassed(unet):
    """As token merging does it."""
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.__class__ = type("Merging", (type(block),), {})


def chunk_batch(unet):
    for module in unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(1, dim=0)


REFUSED = {
    "hook": (lambda unet: unet.mid_block.register_forward_hook(lambda *args: None), "remove those of mid_block first"),
    "hook_of_the_model": (
        lambda unet: unet.register_forward_pre_hook(lambda *args: None),
        r"remove those of (MTU)?UNet2DConditionModel first",
    ),
    "backward_hook": (
        lambda unet: unet.conv_out.register_full_backward_hook(lambda *args: None),
        "remove those of conv_out first",
    ),
    "hook_of_a_parameter": (
        lambda unet: unet.requires_grad_(True).conv_out.weight.register_hook(lambda grad: grad),
        "remove those of the parameter conv_out.weight first",
    ),
    "replaced_module": (replaced, "conv_act is a ReLU, but the UNet's configuration says SiLU"),
    "replaced_method": (bound, "attn1.head_to_batch_dim was replaced"),
    "replaced_function": (replaced_function, "attn1.head_to_batch_dim was replaced"),
    "subclass": (subclassed, "transformer_blocks.0 is a Merging, but .* says BasicTransformerBlock"),
    "fused_projections": (lambda unet: unet.fuse_qkv_projections(), "call unfuse_qkv_projections first"),
}
REFUSED_STOCK = {
    "tiling": (
        lambda unet: setattr(unet.conv_in, "padding_mode", "circular"),
        "conv_in cannot .* expected padding_mode = 'zeros', but got 'circular'",
    ),
    "compiled": (lambda unet: unet.mid_block.compile(), "not compiled"),
    "compiled_by_mtu": (lambda unet: mtu.compile(unet, "default"), "not compiled"),
    "chunks_of_the_batch": (chunk_batch, r"over tokens \(dim=1\) only, but .* has 0"),
    "layerwise_casting": (
        lambda unet: unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        r"unload or fuse adapters; offload, quantize afterwards",
    ),
}


CASES = [("upcycle", name) for name in [*REFUSED, *REFUSED_STOCK]] + [("export", name) for name in REFUSED]


@pytest.mark.parametrize(("how", "name"), CASES)
def test_settings_that_cannot_be_carried_over_raise_and_change_nothing(how, name):
    set_, message = {**REFUSED, **REFUSED_STOCK}[name]
    unet = stock_unet(SD) if how == "upcycle" else upcycled_unet(SD)
    set_(unet)
    before = snapshot(unet)
    with pytest.raises(ValueError, match=message) as raised:
        mtu.upcycle(unet) if how == "upcycle" else unet.export_task("edit")
    assert str(raised.value).count(". ") == 0
    assert_unchanged(unet, before)
