"""The UNets, contenders and peers of the benchmark: right ones pass the check, and wrong ones fail it."""

import functools

import pytest
import torch

from benchmarks.harness.correctness import WrongResult
from benchmarks.harness.workloads import Setting, Workload
from benchmarks.models.unet_catalogue import CONTENDERS
from benchmarks.models.unet_contenders import build_deployment
from benchmarks.models.unet_models import (
    TASKS,
    UNetFamily,
    build_original,
    check_setting,
    compute_reference_outputs,
    copy_unet_sharing_weights,
    default_num_experts,
    draw_batch,
    picture_edge,
    select_rows,
    task_specs_of,
)

CPU = torch.device("cpu")
DENSE, TOP_2 = Setting(4, None, 4), Setting(4, 2, 4)
WORKLOAD = Workload(model="tiny", size=64, B=4)
draw = functools.partial(draw_batch, device=CPU)
# Triton runs on GPUs, or takes its time.
HERE = [
    name
    for name, contender in CONTENDERS.items()
    if not contender.is_compiled and contender.implementation.backend != "triton"
]
PEERS = ["four-unets", "swapped-unets", "lora-hotswap", "lora-per-sample"]


@functools.cache
def family():
    return UNetFamily("tiny", "bf16", CPU)


@functools.cache
def reference(setting):
    return compute_reference_outputs(family(), WORKLOAD, setting)


# ------------------------------------------------------------------------------------------------- models and inputs


def test_the_original_is_the_same_at_every_call():
    first, second = (build_original("tiny", "bf16", CPU) for _ in range(2))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.isfinite().all(), name
        assert a.std() > 0, name
    assert first.mid_block.resnets[0].norm1.weight.float().mean() == pytest.approx(1, abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size", "experts", "steps"), [("sd15", 512, 4, 20), ("sdxl", 1024, 1, 50)])
def test_models_are_measured_as_the_paper_has_them(model, size, experts, steps):
    assert (picture_edge(model), default_num_experts(model)) == (size, experts)
    assert {task.num_inference_steps for task in task_specs_of(model)} == {steps}
    check_setting(model, Setting(experts))


def test_a_picture_has_the_same_numbers_in_every_batch():
    small, large = draw(WORKLOAD._replace(B=1), tasks=1), draw(WORKLOAD._replace(branches=3), tasks=4)
    assert large.task_of_row == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    assert large.inputs["sample"].shape == (12, 8, 8, 8)
    for name in ("sample", "encoder_hidden_states"):
        assert torch.equal(small.inputs[name][0], large.inputs[name][0])
        assert not torch.equal(large.inputs[name][0], large.inputs[name][1])
    assert select_rows(large, [3, 5], 4)["sample"].shape == (2, 4, 8, 8)


def test_all_tasks_have_their_turn():
    mixes = [draw(WORKLOAD._replace(B=2), tasks=2, first=first).task_of_row for first in range(3)]
    assert mixes == [(0, 1), (1, 2), (2, 3)]


def test_copies_share_memory_but_not_what_is_done_to_them():
    unet = build_original("tiny", "bf16", CPU)
    copied = copy_unet_sharing_weights(unet)
    for a, b in zip(unet.parameters(), copied.parameters(), strict=True):
        assert a is not b
        assert a.data_ptr() == b.data_ptr()
    copied.to(torch.float32)
    copied.conv_out = None
    assert unet.conv_out.weight.dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------------- contenders


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_contenders_compute_what_the_original_does(name):
    setting = CONTENDERS[name].relevant_setting(DENSE)
    deployment = build_deployment(CONTENDERS[name], family(), setting)
    workload = WORKLOAD._replace(branches=2)
    batch = draw(workload, tasks=setting.tasks)
    output = deployment.predict(batch)
    reference(Setting()).check_output(output, branches=2)
    rows = sorted(row for part in deployment.unet_calls_of(batch) for row in part.rows)
    assert rows == [*range(8)]
    if deployment.after_check is not None:
        deployment.after_check()
        assert not torch.equal(deployment.predict(batch), output)
    if deployment.switch_tasks is not None:
        deployment.switch_tasks()


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_peers_give_each_sample_its_task(name):
    peer = build_deployment(CONTENDERS[name], fine_tuned := UNetFamily("tiny", "fp32", CPU), Setting(tasks=4))
    for task in range(TASKS):
        fine_tuned.fine_tuned_unet(task).conv_out.bias.data += task
    if peer.after_check is not None:
        peer.after_check()
    workload = WORKLOAD._replace(dtype="fp32")
    mixes = [peer.predict(draw(workload, tasks=4, first=first)) for first in range(4)]
    # Picture 0 has task 0 at first, then others.
    alone = peer.predict(draw(workload, tasks=1))
    torch.testing.assert_close(mixes[0][0], alone[0], rtol=1e-4, atol=1e-5)
    for mixed in mixes[1:]:
        assert (mixed[0] - alone[0]).abs().max() > 1e-3
    again = peer.predict(draw(workload, tasks=4, first=3))
    torch.testing.assert_close(again, mixes[3])


@pytest.mark.slow
def test_weights_are_counted_once_for_each_storage():
    names = ("stock", "mtu-eager", "mtu-eager@routers", "four-unets", "swapped-unets", "lora-per-sample")
    deployments = {
        name: build_deployment(CONTENDERS[name], family(), CONTENDERS[name].relevant_setting(DENSE)) for name in names
    }
    held = {name: deployment.count_weight_bytes(CPU) for name, deployment in deployments.items()}
    stock = held["stock"]
    assert stock == sum(p.numel() * 2 for p in family().new_original().parameters())
    assert stock < held["mtu-eager"] <= 1.02 * stock
    assert held["mtu-eager"] < held["mtu-eager@routers"]
    assert held["four-unets"] == 4 * stock
    # On a CPU the sources of the swap are where the UNet is.
    assert held["swapped-unets"] == 5 * stock
    assert stock < held["lora-per-sample"] < 2 * stock


# --------------------------------------------------------------------------------------------------------------- check


def _no_bias(upcycled):
    bias = upcycled.routed_feed_forwards()[0].net[2].bias
    bias.data = torch.zeros_like(bias)


def _no_affine_of_one_task(upcycled):
    for block in upcycled.routed_blocks_by_name().values():
        block.norm3.weight.data = block.norm3.weight.clone()
        block.norm3.bias.data = block.norm3.bias.clone()
        block.norm3.weight[3], block.norm3.bias[3] = 1, 0


def _heavy_routing(upcycled):
    for layer in upcycled.routed_feed_forwards():
        layer.router.weights.data.mul_(1.2)


def _nan_in_one_row(upcycled):
    def spoil(module, inputs, output):
        return output.index_fill(0, torch.tensor([len(output) - 1]), torch.nan)

    upcycled.conv_out.register_forward_hook(spoil)


def _other_dtype(upcycled):
    upcycled.conv_out.register_forward_hook(lambda module, inputs, output: output.float())


@pytest.mark.slow
@pytest.mark.parametrize("setting", [DENSE, TOP_2], ids=["dense", "top2"])
@pytest.mark.parametrize("spoil", [_no_bias, _no_affine_of_one_task, _heavy_routing, _nan_in_one_row, _other_dtype])
def test_wrong_results_are_not_timed(setting, spoil):
    # The last row is not among those that are compared.
    batch = draw(WORKLOAD._replace(B=5), tasks=4)
    expected = reference(setting if setting.K else Setting())
    deployment = build_deployment(CONTENDERS["mtu-eager"], family(), setting)
    expected.check_output(deployment.predict(batch), branches=1)
    spoil(deployment.unets[0])
    with pytest.raises(WrongResult, match=r"the UNet's output must be torch.bfloat16 within .* of float32, got"):
        expected.check_output(deployment.predict(batch), branches=1)
