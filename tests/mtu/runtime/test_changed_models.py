"""What becomes of compiled code and graphs when the model changes: new values, other parts, hooks, copies."""

import copy

import accelerate
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig

import mtu
from mtu.runtime.compiling import CompiledUNetCalls

from ..outputs import assert_close, assert_differ, predict
from ..states import SMALL
from ..tiny import inputs, upcycled_unet
from .compiled_models import GRAPHS, NAMES, compiled, plain, replace_data, update_routers

pytestmark = pytest.mark.usefixtures("dynamo")


def load_in_place(unet):
    unet.load_state_dict(upcycled_unet(SMALL, randomised=False).state_dict())


def write_through_data(unet):
    unet.task_embedding.weight.data.mul_(-2)
    unet.clear_routing_cache()


@pytest.mark.parametrize("change", [update_routers, load_in_place, write_through_data])
def test_a_graph_sees_new_values_in_old_places(change):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    before = predict(unet, given, *NAMES)
    change(unet)
    after = predict(unet, given, *NAMES)
    assert_differ(after, before)
    assert_close(after, plain(unet, given, *NAMES))
    assert captures.count == 1


def add_a_task(unet):
    unet.add_task(mtu.TaskSpec("colorize"))
    with torch.no_grad():
        unet.conv_in.weight[2] += 1


def assign_weights(unet):
    unet.load_state_dict(upcycled_unet(SMALL, randomised=False).state_dict(), assign=True)


def drop_the_routers(unet):
    unet.drop_routers_()
    for layer in unet.routed_feed_forwards():
        layer.router.weights.mul_(2)


def choose_processors(unet):
    unet.set_attn_processor(AttnProcessor())


def choose_a_backend(unet):
    unet.set_backend("reference")


@pytest.mark.parametrize(
    "change", [add_a_task, assign_weights, drop_the_routers, replace_data, choose_processors, choose_a_backend]
)
def test_a_model_of_other_parts_is_prepared_anew(change):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    predict(unet, given, *NAMES)
    change(unet)
    assert_close(predict(unet, given, *NAMES), plain(unet, given, *NAMES))
    assert captures.count == 2


def test_an_adapter_runs_uncompiled(caplog):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    before = predict(unet, given, *NAMES)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    for scale in (1.0, 0.3):
        unet.set_adapters("default", scale)
        adapted = predict(unet, given, *NAMES)
        assert_close(adapted, plain(unet, given, *NAMES))
        assert_differ(adapted, before)
    assert captures.count == 1
    assert [record.getMessage() for record in caplog.records if "adapter" in record.getMessage()] == [
        "Calls run uncompiled, as an adapter's strength is no tensor: fuse the adapter, then unload it."
    ]
    unet.fuse_lora()
    unet.unload_lora()
    assert_close(predict(unet, given, *NAMES), adapted)
    assert captures.count == 2


def test_autocast_runs_without_a_graph():
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predict(unet, given, *NAMES), plain(unet, given, *NAMES))
    predict(unet, given, *NAMES)
    assert captures.count == 1


def test_gradients_and_training_run_uncompiled(caplog):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    for _ in range(2):
        unet(**given, task_ids=unet.task_ids(NAMES)).sample.sum().backward()
    assert [record.getMessage() for record in caplog.records] == [
        "Calls run uncompiled, as they may record gradients: call the UNet under torch.no_grad()."
    ]
    caplog.clear()
    unet.train()(**given, task_ids=unet.task_ids(NAMES)).sample.sum().backward()
    assert all(parameter.grad is not None for parameter in unet.trainable_parameters())
    assert captures.count == 0
    assert not caplog.records


def enable_freeu(unet):
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def change_freeu(unet):
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=3.0)


def hook_a_block(unet):
    unet.conv_out.register_forward_hook(lambda module, inputs, output: output + 1)


def replace_a_forward(unet):
    forward = unet.conv_out.forward
    unet.conv_out.forward = lambda sample: forward(sample) + 1


def scale_a_processor(unet):
    processor = AttnProcessor()
    processor.scale = [1.0]
    unet.set_attn_processor(processor)


@pytest.mark.parametrize(
    "change", [enable_freeu, change_freeu, hook_a_block, replace_a_forward, scale_a_processor], ids=lambda f: f.__name__
)
def test_switches_are_heeded(change):
    unet = upcycled_unet()
    if change is change_freeu:
        enable_freeu(unet)
    unet, captures = compiled(unet, GRAPHS)
    given = inputs(unet)
    before = predict(unet, given, *NAMES)
    change(unet)
    after = predict(unet, given, *NAMES)
    assert_close(after, plain(unet, given, *NAMES))
    if change is not scale_a_processor:
        assert_differ(after, before)
    assert captures.count == (2 if "freeu" in change.__name__ else 1)


def test_what_takes_a_hook_off_leaves_the_models_own_forward():
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    unet.conv_out.forward = unet.conv_out.forward
    given = inputs(unet)
    assert_close(predict(unet, given, *NAMES), plain(unet, given, *NAMES))
    assert captures.count == 1


def test_a_model_that_left_the_gpu_runs_without_graphs(caplog):
    unet = upcycled_unet(SMALL)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet._compiled_call_impl = CompiledUNetCalls(unet, GRAPHS, 2)
    for _ in range(2):
        assert_close(predict(unet, given, *NAMES), expected)
    assert "Calls run without a CUDA graph, as the UNet is on cpu now." in caplog.text


def test_offloading_runs_uncompiled(caplog):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    caplog.clear()
    accelerate.cpu_offload(unet, execution_device="cpu")
    assert_close(predict(unet, given, *NAMES), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "Calls run uncompiled, as the forward of a MTUUNet2DConditionModel was replaced, as offloading and caching do."
    ]
    assert captures.count == 1


def test_copies_and_saved_models_are_plain(tmp_path):
    unet, _ = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet.save_pretrained(tmp_path)
    for other in (copy.deepcopy(unet), mtu.MTUUNet2DConditionModel.from_pretrained(tmp_path)):
        assert other._compiled_call_impl is None
        assert_close(predict(other, given, *NAMES), expected)
