"""What routers start from: experts that start alike part, and every router learns."""

import pytest
import torch

import mtu
from mtu.experts import ExpertConfig
from mtu.inspection import sweep_layouts
from mtu.models.router import TaskContext

from ..outputs import assert_close, predict, rows
from ..tiny import SD, inputs, randomise_, stock_unet

# One feed-forward network in all.
ONE_BLOCK = {
    **SD,
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}
LAYOUTS = [
    pytest.param(layout.num_experts, layout.top_k, float(layout.expert_ratio), id=str(layout).partition(" (")[0])
    for layout in sweep_layouts(stock_unet(ONE_BLOCK), "99x", size=64).layouts
    if layout.num_experts > 1
] + [
    pytest.param(4, None, 1.5, id="N = 4 G = 3/2"),
    pytest.param(4, None, 0.75, id="N = 4 G = 3/4"),
    pytest.param(4, 2, 1.0, id="N = 4 G = 1 top-2"),
]
UNPRESERVED = "ignore:The output of the original cannot be preserved"
IDLE = "ignore:In 1 of 1 layers some expert is used by no task"


def logits_of(unet):
    """Initial logits by layer, (layers, T, E)."""
    hidden = [torch.relu(router.linear_1(unet.task_embedding.weight)) for router in unet.routers()]
    return torch.stack([router.linear_2(h) for router, h in zip(unet.routers(), hidden, strict=True)]).detach()


def train_the_ffn(unet, steps):
    """Train the feed-forward network of a one-block UNet by itself, a sample of each task in a batch.

    Returns its output weights by expert before and after, (E, D, F), which experts got gradients, and the largest
    gradient of the router.
    """
    block, generator = next(iter(unet.routed_blocks_by_name().values())), torch.Generator().manual_seed(5)
    x, target = torch.randn(2, 4, 6, 32, generator=generator)
    context = TaskContext(torch.arange(4) % len(unet.tasks), unet.task_embedding.weight)
    trained = [*block.ff.parameters(), *block.norm3.parameters(), unet.task_embedding.weight]
    optimizer, weight = torch.optim.AdamW(trained, lr=1e-4), block.ff.net[2].weight
    by_expert = lambda tensor: torch.stack(tensor.detach().clone().chunk(unet.config.num_experts, dim=1))  # noqa: E731
    before, used, largest = by_expert(weight), torch.zeros(unet.config.num_experts, dtype=torch.bool), 0.0
    for _ in range(steps):
        (block.ff(x, context.affine_per_sample(block.norm3), context) - target).square().mean().backward()
        used |= by_expert(weight.grad).flatten(1).any(dim=1)
        largest = max([largest, *(float(p.grad.abs().max()) for p in block.ff.router.parameters())])
        optimizer.step()
        optimizer.zero_grad()
    return before, by_expert(weight), used, largest


@pytest.mark.parametrize(("num_experts", "top_k", "ratio"), LAYOUTS)
@pytest.mark.parametrize("init", ["preserve", "paper"])
@pytest.mark.filterwarnings(UNPRESERVED, IDLE)
def test_experts_part_and_routers_learn(num_experts, top_k, ratio, init):
    unet = mtu.upcycle(stock_unet(ONE_BLOCK), num_experts=num_experts, top_k=top_k, expert_ratio=ratio, init=init)
    before, after, used, router_gradient = train_the_ffn(unet.train(), steps=60 if ratio >= 1 else 3)
    # Rounding alone gives gradients of some 1e-9.
    assert router_gradient > 1e-5
    assert used.sum() >= min(num_experts, top_k or num_experts, 4)
    moved = (after - before).flatten(1).norm(dim=1)
    alike = [
        (i, j)
        for i in range(num_experts)
        for j in range(i)
        if torch.equal(before[i], before[j]) and (used[i] or used[j])
    ]
    assert bool(alike) == (ratio >= 1)
    for i, j in alike:
        assert (after[i] - after[j]).norm() >= 0.2 * max(moved[i], moved[j]), (i, j)


@pytest.mark.parametrize(("num_experts", "top_k", "ratio"), LAYOUTS)
@pytest.mark.filterwarnings(IDLE)
def test_layouts_keep_the_output_where_they_say_so(num_experts, top_k, ratio):
    config = ExpertConfig(num_experts, top_k, ratio, "task", 1 / ratio, 16)
    stock = stock_unet(ONE_BLOCK)
    given = inputs(stock, batch=4)
    expected = predict(stock, rows(given, slice(None), 4))
    settings = {"num_experts": num_experts, "top_k": top_k, "expert_ratio": ratio}
    if config.why_output_not_preserved() is not None:
        with pytest.warns(UserWarning, match="cannot be preserved"):
            mtu.upcycle(stock, **settings)
        return
    unet = mtu.upcycle(stock, **settings)
    names = [task.name for task in unet.tasks]
    assert_close(predict(unet, given, *names), expected)
    if ratio >= 1:
        for router in unet.routers():
            randomise_(list(router.parameters()), seed=7)
        assert_close(predict(unet, given, *names), expected)


@pytest.mark.parametrize("width", [16, 768, 2048])
@pytest.mark.parametrize("num_experts", [2, 4, 8, 16])
def test_logits_of_whole_experts_start_spread_at_any_width(width, num_experts):
    unet = mtu.upcycle(stock_unet(ONE_BLOCK, cross_attention_dim=width), num_experts=num_experts, expert_ratio=1.0)
    assert 0.9 < logits_of(unet).std() < 1.1
    weights = unet.router_weights()
    assert weights.min() > 0.01
    assert weights.max() < 0.9


def test_more_tasks_than_hidden_units_and_low_precision_start_spread():
    tasks = [mtu.TaskSpec(f"task-{i}", 0) for i in range(40)]
    unet = mtu.upcycle(stock_unet(), tasks, num_experts=4, expert_ratio=1.0)
    assert 0.9 < logits_of(unet).std() < 1.1
    unet = mtu.upcycle(stock_unet().bfloat16(), num_experts=4, expert_ratio=1.0)
    assert 0.9 < logits_of(unet).float().std() < 1.1


def test_top_1_of_as_many_whole_experts_as_tasks_uses_all():
    unet = mtu.upcycle(stock_unet(), num_experts=4, expert_ratio=1.0, top_k=1)  # else it would warn
    weights = unet.router_weights()
    assert (weights.sum(dim=1) == 1).all()
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("settings", [{}, {"num_experts": 4, "expert_ratio": 0.5}], ids=["default", "half"])
def test_dense_routers_below_whole_experts_start_uniform(settings):
    unet = mtu.upcycle(stock_unet(), **settings)
    assert (logits_of(unet) == 0).all()


@pytest.mark.parametrize(("tasks", "num_experts"), [(["edit"], 2), (["edit", "remove"], 8)])
def test_it_warns_where_too_few_tasks_part_experts(tasks, num_experts):
    with pytest.warns(UserWarning, match="In . of 4 layers some experts start alike .*move them alike") as caught:
        mtu.upcycle(stock_unet(), tasks, num_experts=num_experts, expert_ratio=1.0)
    assert caught[0].filename == __file__
    mtu.upcycle(stock_unet(), ["edit"])  # experts of their own units
