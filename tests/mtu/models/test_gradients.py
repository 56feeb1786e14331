"""Training: what gets gradients, what moves, and that nothing leaks between tasks."""

import pytest
import torch

from ..outputs import TOLERANCE
from ..tiny import SDXL, inputs, stock_unet, upcycled_unet

NAMES = ("remove", "text-to-image", "remove", "super-resolution", "text-to-image")  # no "edit"
SETTINGS = [
    pytest.param({}, id="dense"),
    pytest.param({"norm": "task_expert"}, id="expert_norms"),
    pytest.param({"num_experts": 2, "expert_ratio": 1.0}, id="whole_experts"),
    pytest.param({"config": SDXL}, id="sdxl"),
]


def loss_of(unet, names=NAMES, **changes):
    prediction = unet(**{**inputs(unet), **changes}, task_ids=unet.task_ids(names)).sample
    return prediction.square().mean()


def gradients(unet, names=NAMES):
    unet.zero_grad()
    loss_of(unet, names).backward()
    return {name: parameter.grad.clone() for name, parameter in unet.named_trainable_parameters()}


def is_trainable(name):
    return ".ff." in name or ".norm3." in name or name.startswith(("conv_in.", "task_embedding."))


@pytest.mark.parametrize("settings", SETTINGS)
def test_exactly_the_trainable_parameters_require_and_get_gradients(settings):
    unet = upcycled_unet(**settings).train()
    expected = {name for name, _ in unet.named_parameters() if is_trainable(name)}
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == expected
    assert {name for name, _ in unet.named_trainable_parameters()} == expected
    assert [id(p) for p in unet.trainable_parameters()] == [id(p) for _, p in unet.named_trainable_parameters()]
    loss_of(unet, [spec.name for spec in unet.tasks] + ["edit"]).backward()
    for name, parameter in unet.named_parameters():
        if name in expected:
            assert parameter.grad is not None, name
            # With one expert the softmax is 1, so that nothing can reach the router.
            routes = ".router." in name or name == "task_embedding.weight"
            assert (parameter.grad.abs().max() > 0) == (not routes or unet.config.num_experts > 1), name
        else:
            assert parameter.grad is None, name


def test_freezing_again_restores_the_split():
    unet = upcycled_unet()
    unet.requires_grad_(True)
    unet.freeze_stock_parameters_()
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == {
        name for name, _ in unet.named_parameters() if is_trainable(name)
    }


@pytest.mark.parametrize("settings", SETTINGS)
def test_frozen_weights_never_move_and_trained_ones_do(settings):
    unet = upcycled_unet(**settings).train()
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    optimizer = torch.optim.AdamW(unet.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(unet).backward()
        optimizer.step()
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, before[name]) != is_trainable(name), name


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_task_that_is_absent_gets_exactly_no_gradient(settings):
    unet = upcycled_unet(**settings).train()
    grads = gradients(unet)
    absent = unet.task_index("edit")
    present = [unet.task_index(name) for name in set(NAMES)]
    packed = {name: g for name, g in grads.items() if ".ff." not in name}
    assert len(packed) >= 3 + 2 * len(unet.routed_feed_forwards())
    for name, grad in packed.items():
        assert (grad[absent] == 0).all(), name
        if name != "task_embedding.weight" or unet.config.num_experts > 1:
            assert all(grad[task].abs().max() > 0 for task in present), name


def test_the_gradients_of_a_mixed_batch_are_those_of_its_samples_added_up():
    unet = upcycled_unet(top_k=2, norm="task_expert").train()
    mixed = gradients(unet)
    added = {name: torch.zeros_like(grad) for name, grad in mixed.items()}
    given = inputs(unet)
    for i, name in enumerate(NAMES):
        unet.zero_grad()
        alone = {k: v[i : i + 1] for k, v in given.items()}
        (unet(**alone, task_ids=unet.task_ids(name)).sample.square().mean() / len(NAMES)).backward()
        for name, parameter in unet.named_trainable_parameters():
            added[name] += parameter.grad
    for name, grad in mixed.items():
        # Twice the depth of the forward pass, hence twice its tolerance.
        assert (added[name] - grad).abs().max() <= 2 * TOLERANCE * max(1e-2, grad.abs().max()), name


@pytest.mark.parametrize("settings", [{}, {"top_k": 2, "norm": "task_expert"}], ids=["dense", "top2"])
def test_gradient_checkpointing_gives_the_same_gradients_in_a_mixed_batch(settings):
    unet = upcycled_unet(**settings).train()
    plain = gradients(unet)
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    for name, grad in gradients(unet).items():
        assert torch.equal(grad, plain[name]), name  # the same operations in the same order


def test_inactive_experts_get_exactly_no_gradient():
    unet = upcycled_unet(top_k=1).train()
    grads = gradients(unet, ["edit"] * 5)
    task = unet.task_index("edit")
    for (name, layer), weights in zip(
        [(n, m) for n, m in unet.named_modules() if n.endswith(".ff")], unet.router_weights(), strict=True
    ):
        hidden = layer.net[2].in_features
        columns = grads[f"{name}.net.2.weight"].view(-1, 4, hidden // 4)
        value_rows = grads[f"{name}.net.0.proj.weight"].view(2, 4, hidden // 4, -1)
        for expert in range(4):
            idle = weights[task, expert] == 0
            assert (columns[:, expert] == 0).all() == idle
            assert (value_rows[:, expert] == 0).all() == idle


def test_routers_learn_from_the_preserving_start():
    """At zero logits the hidden layer gets no gradient at first; after one step it does."""
    unet = upcycled_unet(randomised=False).train()
    optimizer = torch.optim.SGD(unet.trainable_parameters(), lr=0.1)
    for step in range(2):
        grads = gradients(unet)
        for name, grad in grads.items():
            if ".router.linear_2." in name or (".router.linear_1." in name and step == 1):
                assert grad.abs().max() > 0, name
        optimizer.step()
    assert grads["task_embedding.weight"].abs().max() > 0


def test_gradients_reach_the_sample():
    unet = upcycled_unet()
    given = inputs(unet)
    sample = given["sample"].requires_grad_()
    unet(**given, task_ids=unet.task_ids(NAMES)).sample.sum().backward()
    assert (sample.grad[1, 4:] == 0).all()
    assert (sample.grad[0].abs().amax((1, 2)) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_autocast_trains(settings):
    unet = upcycled_unet(**settings).train()
    exact = gradients(unet)
    unet.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(unet)
    loss.backward()
    for name, parameter in unet.named_trainable_parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()
        # bfloat16 keeps 8 bits: gradients through 40 layers must still point the same way.
        if exact[name].norm() > 1e-4:
            cosine = torch.cosine_similarity(parameter.grad.flatten(), exact[name].flatten(), dim=0)
            assert cosine > 0.9, name


def test_a_bfloat16_model_trains():
    unet = upcycled_unet().to(torch.bfloat16).train()
    loss_of(unet).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == p.dtype for p in unet.trainable_parameters())


def test_the_stock_unet_is_upcycled_with_its_gradients_off():
    stock = stock_unet()
    stock.requires_grad_(True)
    unet = upcycled_unet(randomised=False)
    assert all(p.requires_grad for p in stock.parameters())
    assert not unet.conv_out.weight.requires_grad
