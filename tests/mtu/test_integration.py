"""What users of diffusers do with a UNet: adapters, hooks, offloading, casting, attention processors."""

import accelerate
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

import mtu

from .outputs import TOLERANCE, assert_close, assert_differ, predict, rows
from .tiny import SD, SDXL, inputs, randomise_, stock_unet, upcycled_unet

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")
LORA = LoraConfig(r=4, lora_alpha=4, target_modules=["ff.net.2", "ff.net.0.proj", "to_q"], init_lora_weights=False)
SETTINGS = [
    pytest.param({}, id="dense"),
    pytest.param({"norm": "task_expert"}, id="expert_norms"),
    pytest.param({"num_experts": 4, "top_k": 2}, id="top2"),
]


def with_adapter(unet, like=None):
    unet.add_adapter(LORA)
    if like is not None:
        outcome = set_peft_model_state_dict(unet, get_peft_model_state_dict(like))
        assert not outcome.unexpected_keys
    return unet


# --------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("settings", [{}, {"norm": "task_expert"}, {"num_experts": 1}], ids=str)
@pytest.mark.parametrize("config", [SD, SDXL], ids=["sd", "sdxl"])
def test_a_stock_lora_acts_at_stock_strength(config, settings):
    stock = with_adapter(stock_unet(config))
    given = inputs(stock)
    latents = rows(given, slice(None), 4)
    expected = predict(stock, latents)
    assert_differ(predict(stock_unet(config), latents), expected)
    unet = with_adapter(mtu.upcycle(stock_unet(config), **settings), like=stock)
    names = [unet.tasks[i % 4].name for i in range(5)]
    assert_close(predict(unet, given, *names), expected)
    assert_close(predict(unet, latents), expected)
    unet.disable_adapters()
    stock.disable_adapters()
    assert_close(predict(unet, given, *names), predict(stock, latents))


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_an_adapted_mixed_batch_gives_each_sample_what_it_gets_alone(settings):
    unet = with_adapter(upcycled_unet(**settings))
    given = inputs(unet)
    mixed = predict(unet, given, *NAMES)
    for i, name in enumerate(NAMES):
        assert_close(predict(unet, rows(given, slice(i, i + 1)), name)[0], mixed[i])


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_adapter_that_does_nothing_changes_nothing(settings):
    """PEFT wraps the Linears, so this compares the module path with the fused one, on a whole UNet."""
    unet = upcycled_unet(**settings)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet.add_adapter(LoraConfig(target_modules=["ff.net.2", "ff.net.0.proj"], init_lora_weights=True))
    assert_close(predict(unet, given, *NAMES), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_fused_adapter_equals_the_adapter_and_can_be_exported(settings):
    unet = with_adapter(upcycled_unet(**settings))
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet.fuse_lora()
    unet.unload_lora()
    assert_close(predict(unet, given, *NAMES), expected)
    assert_close(predict(unet.export_task("edit"), rows(given, slice(2, 3)))[0], expected[2])


def test_the_strength_of_an_adapter_reaches_it():
    unet = with_adapter(upcycled_unet())
    given = inputs(unet)
    off = predict(unet, given, *NAMES, cross_attention_kwargs={"scale": 0.0})
    assert_close(off, predict(upcycled_unet(), given, *NAMES))
    assert_differ(predict(unet, given, *NAMES), off)


# ------------------------------------------------------------------------------------------- hooks, memory, casting


BLOCK_SCALES = {
    "docs": {"down": 0.9, "mid": 0.5, "up": {"block_1": [0.4, 0.8]}},
    "one_block": {"up": {"block_1": 0.6}},
    "number": 0.3,
    "none": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("scales", BLOCK_SCALES.values(), ids=BLOCK_SCALES)
def test_scales_by_block_are_those_of_the_stock_unet(scales):
    def scaled(unet):
        unet.set_adapters("default", scales)
        return {n: dict(m.scaling) for n, m in unet.named_modules() if hasattr(m, "scaling")}

    stock = with_adapter(stock_unet(SD))
    unet = with_adapter(mtu.upcycle(stock_unet(SD)), like=stock)
    assert scaled(unet) == scaled(stock)
    given = rows(inputs(stock), slice(None), 4)
    assert_close(predict(unet, given), predict(stock, given))


def test_scales_of_a_block_that_is_not_there_raise():
    unet = with_adapter(mtu.upcycle(stock_unet(SD)))
    with pytest.raises(ValueError, match="Expected 2 scales for up"):
        unet.set_adapters("default", {"up": {"block_1": [0.1, 0.2, 0.3]}})


@pytest.mark.parametrize("settings", SETTINGS)
def test_hooks_on_the_linears_run_and_count(settings):
    unet = upcycled_unet(**settings)
    given = inputs(unet)
    expected, called = predict(unet, given, *NAMES), []
    for layer in unet.routed_feed_forwards():
        layer.net[2].register_forward_hook(lambda *_: called.append(1))
    assert_close(predict(unet, given, *NAMES), expected)
    assert len(called) == len(unet.routed_feed_forwards())
    unet.routed_feed_forwards()[0].net[0].proj.register_forward_hook(lambda module, _, output: output + 1)
    assert_differ(predict(unet, given, *NAMES), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dropped", [False, True], ids=["routers", "dropped"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_sequential_offloading(settings, dropped):
    unet = upcycled_unet(**settings)
    if dropped:
        unet.drop_routers_()
    given = inputs(unet)
    expected, weights = predict(unet, given, *NAMES), unet.router_weights()
    accelerate.cpu_offload(unet, execution_device="cpu")
    assert unet.conv_out.weight.is_meta
    assert_close(predict(unet, given, *NAMES), expected)
    assert torch.equal(unet.router_weights(), weights)
    assert_close(predict(unet.export_task("edit"), rows(given, slice(2, 3)))[0], expected[2])
    if not dropped:
        unet.drop_routers_()
        assert torch.equal(unet.router_weights(), weights)
        assert_close(predict(unet, given, *NAMES), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_layerwise_casting_is_as_exact_as_its_storage(settings):
    unet, rounded = upcycled_unet(**settings), upcycled_unet(**settings)
    given = inputs(unet)
    exact = predict(unet, given, *NAMES)
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert unet.routed_feed_forwards()[0].net[2].weight.dtype == torch.bfloat16
    # The same values, rounded beforehand and computed with as usual.
    rounded.load_state_dict({name: tensor.float() for name, tensor in unet.state_dict().items()})
    assert_close(predict(unet, given, *NAMES), predict(rounded, given, *NAMES))
    assert (predict(unet, given, *NAMES) - exact).abs().max() > 100 * TOLERANCE * exact.abs().max()


def test_layerwise_casting_to_float8_runs():
    unet = upcycled_unet()
    exact = predict(unet, inputs(unet), *NAMES)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    error = (predict(unet, {**inputs(upcycled_unet())}, *NAMES) - exact).abs().max()
    # float8_e4m3 keeps 4 bits: 1/16 a weight, of either sign, which averages down over a layer and up over 40.
    assert 0 < error < exact.abs().max()


@pytest.mark.parametrize("config", [SD, SDXL], ids=["sd", "sdxl"])
def test_attention_processors_slices_and_fused_projections(config):
    unet = upcycled_unet(config)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet.set_attn_processor(AttnProcessor())
    assert_close(predict(unet, given, *NAMES), expected)
    unet.set_default_attn_processor()
    unet.set_attention_slice("max")
    assert_close(predict(unet, given, *NAMES), expected)
    unet.set_default_attn_processor()
    unet.fuse_qkv_projections()
    assert_close(predict(unet, given, *NAMES), expected)
    unet.unfuse_qkv_projections()
    assert_close(predict(unet, given, *NAMES), expected)


def test_chunks_of_tokens_and_freeu():
    unet = upcycled_unet()
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    blocks = [module for module in unet.modules() if hasattr(module, "set_chunk_feed_forward")]
    assert len(blocks) == len(unet.routed_feed_forwards())
    for block in blocks:
        block.set_chunk_feed_forward(7, dim=1)
    assert_close(predict(unet, given, *NAMES), expected)
    for block in blocks:
        block.set_chunk_feed_forward(None)
    assert torch.equal(predict(unet, given, *NAMES), expected)
    exported = unet.export_task("edit")
    for model in (unet, exported):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert_close(predict(unet, given, "edit"), predict(exported, given))


def test_channels_last():
    unet = upcycled_unet()
    given = inputs(unet)
    seen = []
    unet.down_blocks[0].resnets[0].norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    expected = predict(unet, given, *NAMES)
    assert seen[-1].is_contiguous()
    unet.to(memory_format=torch.channels_last)
    assert unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert unet.conv_in.weight.is_contiguous()
    given["sample"] = given["sample"].to(memory_format=torch.channels_last)
    assert_close(predict(unet, given, *NAMES), expected)
    # The input convolution hands on what the next one reads.
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)


def test_inference_mode_and_training_afterwards():
    unet = upcycled_unet()
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    with torch.inference_mode():
        assert torch.equal(unet(**given, task_ids=unet.task_ids(NAMES)).sample, expected)
    unet.train()(**given, task_ids=unet.task_ids(NAMES)).sample.sum().backward()
    assert all(parameter.grad is not None for parameter in unet.trainable_parameters())


# --------------------------------------------------------------------------------------------------------- compiling


COMPILED = ({}, {"num_experts": 4, "top_k": 2, "norm": "task_expert"})
MIXES = (NAMES, ("edit",) * 5, ("text-to-image", "remove", "remove", "edit", "super-resolution"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", COMPILED, ids=["dense", "top2"])
def test_one_compilation_serves_all_task_mixes_and_follows_updates(dynamo, settings):
    unet = upcycled_unet(**settings)
    given = inputs(unet)
    unet.clear_routing_cache()
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(unet, backend=keep, fullgraph=True)
    with torch.no_grad():
        outputs = [compiled(**given, task_ids=unet.task_ids(names)).sample for names in MIXES]
        assert all(layer.router._cache is None for layer in unet.routed_feed_forwards())
        for names, actual in zip(MIXES, outputs, strict=True):
            assert_close(actual, predict(unet, given, *names))
        randomise_([layer.router.linear_2.weight for layer in unet.routed_feed_forwards()], seed=9)
        updated = compiled(**given, task_ids=unet.task_ids(NAMES)).sample
    assert_differ(updated, outputs[0])
    assert_close(updated, predict(unet, given, *NAMES))
    # The routing weights of all layers are one gather, of tables (layers, T, …), and so are the indices of top-k.
    (graph,) = graphs
    gathers = [node.args for node in graph.graph.nodes if node.target == "index_select"]
    assert sum(dim == 1 for _, dim, _ in gathers) == (2 if "top_k" in settings else 1)


@pytest.mark.slow
def test_one_compilation_serves_training(dynamo):
    unet = upcycled_unet().train()
    given = inputs(unet)
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    for names in MIXES:
        grads = []
        for model in (unet, compiled):
            unet.zero_grad()
            model(**given, task_ids=unet.task_ids(names)).sample.square().mean().backward()
            grads.append([parameter.grad.clone() for parameter in unet.trainable_parameters()])
        for expected, actual in zip(*grads, strict=True):
            # Forward and backward: twice the depth of a prediction.
            assert (actual - expected).abs().max() <= 2 * TOLERANCE * max(1e-2, expected.abs().max())


@pytest.mark.slow
def test_repeated_blocks_are_compiled_and_one_compilation_serves_tasks(dynamo):
    unet = upcycled_unet()
    given = inputs(unet)
    expected = [predict(unet, given, *names) for names in MIXES]
    blocks = [module for module in unet.modules() if type(module).__name__ in unet._repeated_blocks]
    assert len(blocks) == len(unet.routed_feed_forwards())
    with torch._dynamo.config.patch(error_on_recompile=False):  # blocks of two widths share their code
        unet.compile_repeated_blocks(backend="eager", fullgraph=True)
        predict(unet, given, *NAMES)
    for names, output in zip(MIXES, expected, strict=True):
        assert_close(predict(unet, given, *names), output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "dropped"), [(COMPILED[0], False), (COMPILED[1], True)], ids=["dense", "dropped_top2"]
)
def test_an_exported_graph_takes_task_ids_at_run_time(settings, dropped):
    unet = upcycled_unet(**settings)
    if dropped:
        unet.drop_routers_()
    unet.requires_grad_(False)
    given = inputs(unet)
    with torch.no_grad():
        program = torch.export.export(unet, (), {**given, "task_ids": unet.task_ids(NAMES)}, strict=False)
        for names in MIXES:
            outputs = program.module()(**given, task_ids=unet.task_ids(names))
            assert_close(outputs.sample, predict(unet, given, *names))
    # aten alone, and memory by values: any runtime's
    assert not any(name in str(node.target) for node in program.graph.nodes for name in ("mtu_kernels", "as_strided"))
