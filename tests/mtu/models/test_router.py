"""Routers: the formula, the table's cache, and what is left when routers are dropped."""

import copy

import pytest
import torch
from torch import nn

from mtu.experts import ExpertConfig
from mtu.models.initial_routing import initial_router_state_dict
from mtu.models.router import Router, RoutingTable, precomputed_tables_context, select_rows
from mtu_kernels import dense_weights

from ..tiny import randomise_, upcycled_unet

TASKS, WIDTH, EXPERTS = 3, 16, 4


def layout(top_k=None, routing_scale=4.0):
    return ExpertConfig(EXPERTS, top_k, 0.25, "task", routing_scale, WIDTH)


def new_router(top_k=None, routing_scale=4.0):
    config, router = layout(top_k, routing_scale), Router(layout(top_k, routing_scale))
    embedding = torch.zeros(TASKS, WIDTH)  # what these layouts start from does not depend on it
    router.load_state_dict(initial_router_state_dict(config, embedding, torch.Generator().manual_seed(0)))
    return router.eval()


@pytest.fixture
def embedding():
    return nn.Parameter(torch.randn(TASKS, WIDTH, generator=torch.Generator().manual_seed(3)))


@pytest.fixture
def trained():
    router = new_router()
    nn.init.normal_(router.linear_2.weight, generator=torch.Generator().manual_seed(4))
    return router


def logits_of(router, embedding):
    first, second = router.linear_1, router.linear_2
    hidden = (embedding.double() @ first.weight.double().T + first.bias.double()).clamp(min=0)
    return hidden @ second.weight.double().T + second.bias.double()


def test_dense_weights_are_the_scaled_softmax(trained, embedding):
    routing = trained(embedding)
    expected = 4.0 * logits_of(trained, embedding).softmax(-1)
    # A product over 16 and a softmax: some 20 roundings of values of about 4.
    torch.testing.assert_close(routing.weights.double(), expected, rtol=0, atol=20 * 4 * 2**-23)
    assert routing.indices is None
    assert routing.weights.dtype == torch.float32


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_renormalises_over_the_kept_experts(trained, embedding, top_k):
    trained.top_k = top_k
    logits = logits_of(trained, embedding)
    kept = logits.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    masked = torch.full_like(logits, -torch.inf).scatter(1, kept, logits.gather(1, kept))
    table = trained(embedding)
    assert table.indices.dtype == torch.int32
    assert table.indices.tolist() == kept.tolist()
    weights = dense_weights(table, EXPERTS)
    torch.testing.assert_close(weights.double(), 4.0 * masked.softmax(-1), rtol=0, atol=20 * 4 * 2**-23)
    assert (weights == 0).sum() == TASKS * (EXPERTS - top_k)


def test_ties_go_to_the_lower_expert(embedding):
    router = new_router(top_k=2)
    nn.init.zeros_(router.linear_2.weight)
    assert router(embedding).indices.tolist() == [[0, 1]] * TASKS


def test_dense_routers_start_uniform_and_top_k_routers_near_it(embedding):
    assert torch.equal(new_router(None, 3.0)(embedding).weights, torch.full((TASKS, EXPERTS), 0.75))
    routing = new_router(top_k=2)(embedding)
    assert 0 < (routing.weights - 2.0).abs().max() < 0.5
    assert torch.equal(new_router(2).linear_2.weight, new_router(2).linear_2.weight)


def test_top_k_of_all_experts_is_dense():
    assert new_router(top_k=EXPERTS).top_k is None


def test_the_table_is_float32_under_autocast_and_in_bfloat16(trained, embedding):
    expected = trained(embedding).weights
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(trained(embedding).weights, expected)
    assert trained.bfloat16()(embedding).weights.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ cache


@pytest.fixture
def computed(trained, monkeypatch):
    """How often the table was computed."""
    calls, route = [], trained._route
    monkeypatch.setattr(trained, "_route", lambda embedding: calls.append(1) or route(embedding))
    return calls


@torch.no_grad()
def test_the_cache_serves_repeated_calls(trained, embedding, computed):
    first = trained(embedding)
    assert trained(embedding) is first
    assert len(computed) == 1


def add_in_place(router, embedding):
    router.linear_2.weight.add_(0.5 * torch.randn_like(router.linear_2.weight))


def write_through_data(router, embedding):
    router.linear_1.weight.data.copy_(torch.randn_like(router.linear_1.weight))


def write_embedding_through_data(router, embedding):
    embedding.data.mul_(0.5)


def load(router, embedding):
    router.load_state_dict({k: torch.randn_like(v) for k, v in router.state_dict().items()})


def load_by_assignment(router, embedding):
    router.load_state_dict({k: torch.randn_like(v) for k, v in router.state_dict().items()}, assign=True)


def step_an_optimizer(router, embedding):
    for parameter in router.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(router.linear_2.parameters(), lr=0.5, momentum=0.9).step()
    torch.optim.Adam(router.linear_1.parameters(), lr=0.5, foreach=True).step()


def step_a_fused_optimizer(router, embedding):
    router.linear_1.weight.grad = torch.randn_like(router.linear_1.weight)
    torch.optim.AdamW([router.linear_1.weight], lr=0.5, fused=True).step()


def change_dtype(router, embedding):
    router.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        add_in_place,
        write_through_data,
        write_embedding_through_data,
        load,
        load_by_assignment,
        step_an_optimizer,
        step_a_fused_optimizer,
        change_dtype,
    ],
)
def test_the_cache_sees_every_kind_of_update(trained, embedding, change):
    with torch.no_grad():
        before = trained(embedding).weights.clone()
        change(trained, embedding)
        cached, fresh = trained(embedding).weights, trained._route(embedding).weights
    assert torch.equal(cached, fresh)
    assert not torch.equal(cached, before)


def test_another_embedding_is_another_table(trained, embedding):
    with torch.no_grad():
        first, other = trained(embedding).weights, trained(-embedding).weights
        assert not torch.equal(first, other)
        assert torch.equal(trained(embedding[:2]).weights, first[:2])


def test_an_explicit_invalidation_empties_the_cache(trained, embedding, computed):
    with torch.no_grad():
        trained(embedding)
        trained.clear_cache()
        trained(embedding)
    assert len(computed) == 2


def test_nothing_is_cached_with_gradients_in_training_or_for_fake_tensors(trained, embedding):
    trained(embedding)
    with torch.no_grad():
        trained.train()(embedding)
        trained.eval()
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            trained(mode.from_tensor(embedding))
        trained.to("meta")(embedding.to("meta"))
    assert trained._cache is None


def test_nothing_is_cached_while_compiling(trained, embedding):
    compiled = torch.compile(trained, backend="eager", fullgraph=True)
    with torch.no_grad():
        weights = compiled(embedding).weights
        assert trained._cache is None
        torch.testing.assert_close(weights, trained(embedding).weights)
    torch.compiler.reset()


def test_a_cached_table_does_not_block_training(trained, embedding):
    with torch.inference_mode():
        trained(embedding)
    with torch.no_grad():
        trained(embedding)
    trained(embedding).weights[:, 0].sum().backward()
    assert embedding.grad.abs().sum() > 0
    assert trained.linear_1.weight.grad.abs().sum() > 0


def test_a_copy_has_a_cache_of_its_own(trained, embedding):
    with torch.no_grad():
        before = trained(embedding).weights
        twin = copy.deepcopy(trained)
        twin.linear_2.weight.neg_()
        assert torch.equal(trained(embedding).weights, before)
        assert torch.equal(twin(embedding).weights, twin._route(embedding).weights)


# ------------------------------------------------------------------------------------------- tables, selecting rows


@pytest.mark.parametrize(
    "convert", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.double], ids=["bfloat16", "half", "double"]
)
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_table_stays_float32(convert, top_k):
    table = RoutingTable(layout(top_k), TASKS)
    table.weights.uniform_()
    before = table.weights.clone()
    convert(nn.Sequential(table))
    assert table.weights.dtype == torch.float32
    assert torch.equal(table.weights, before)
    assert table.indices is None if top_k is None else table.indices.dtype == torch.int32
    assert table.to("meta").weights.is_meta


def test_tables_of_dropped_routers_are_not_trained():
    unet = upcycled_unet(top_k=2)
    unet.drop_routers_()
    unet.freeze_stock_parameters_()
    tables = {name for name, _ in unet.named_parameters() if ".ff.router." in name}
    assert {name.rpartition(".")[2] for name in tables} == {"weights", "indices"}
    assert not tables & {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert not tables & {name for name, _ in unet.named_trainable_parameters()}
    unet.requires_grad_(True)
    assert {name for name, parameter in unet.named_parameters() if not parameter.requires_grad} == tables


def test_a_table_is_its_state_dict():
    table, other = RoutingTable(layout(2), TASKS), RoutingTable(layout(2), TASKS)
    table.weights.uniform_()
    table.indices.copy_(torch.tensor([[3, 1], [0, 2], [2, 3]]))
    assert set(table.state_dict()) == {"weights", "indices"}
    other.load_state_dict(table.state_dict())
    assert torch.equal(other().weights, table.weights)
    assert torch.equal(other().indices, table.indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(TASKS, 5), (TASKS, 4, 5), (TASKS, 2, 3, 3, 3)], ids=str)
def test_selected_rows_are_the_same_bits_with_and_without_gradients(shape, dtype):
    table = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    ids = torch.tensor([2, 0, 2, 2])
    selected = select_rows(table, ids)
    with torch.no_grad():
        assert torch.equal(select_rows(table, ids), selected)
    assert torch.equal(selected, table[ids])
    selected.backward(torch.ones_like(selected))
    counts = torch.tensor([1.0, 0.0, 3.0]).to(dtype).view(-1, *(1,) * (len(shape) - 1))
    assert torch.equal(table.grad, counts.expand(shape))


def test_selected_rows_of_integers_have_no_gradients():
    table = torch.tensor([[0, 3], [2, 1]], dtype=torch.int32)
    selected = select_rows(table, torch.tensor([1, 0, 1]))
    assert selected.dtype == torch.int32
    assert selected.tolist() == [[2, 1], [0, 3], [2, 1]]
    assert not selected.requires_grad


def test_a_router_with_an_adapter_is_not_cached(embedding):
    """An adapter's switches are Python state, which no look at tensors can see."""

    class Adapted(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight, self.bias, self.linear = linear.weight, linear.bias, linear
            self.strength = 1.0

        def forward(self, x):
            return self.linear(x) + self.strength * x.flip(-1)

    router = new_router()
    router.linear_1 = Adapted(router.linear_1)
    randomise_([router.linear_2.weight], seed=5)
    with torch.no_grad():
        with_adapter = router(embedding).weights
        router.linear_1.strength = 0.0
        assert not torch.equal(router(embedding).weights, with_adapter)


def test_a_storage_dtype_is_not_that_of_the_embedding(embedding):
    """Quantized layers store integers; what they compute in is their own affair."""

    class Quantized(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
            self.linear = linear

        def forward(self, x):
            return self.linear(x)

    router = new_router()
    randomise_([router.linear_2.weight], seed=5)
    with torch.no_grad():
        expected = router(embedding).weights
        router.linear_1 = Quantized(router.linear_1)
        assert torch.equal(router(embedding).weights, expected)


# -------------------------------------------------------------------------------------------------- holding a table


@torch.no_grad()
def test_a_held_table_is_computed_once_and_let_go(trained, embedding, computed):
    before = trained(embedding).weights.clone()
    with precomputed_tables_context([trained], embedding):
        kept = trained(embedding)
        trained.linear_2.bias.add_(torch.arange(4.0))
        with precomputed_tables_context([trained], embedding):  # as a compiled UNet within a pipeline
            pass
        assert trained(embedding) is kept
        assert torch.equal(kept.weights, before)
    assert len(computed) == 1
    assert not torch.equal(trained(embedding).weights, before)


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_held_table_stays_where_it_is(embedding, top_k):
    router = new_router(top_k)
    places = []
    for context in (torch.no_grad(), torch.inference_mode(), torch.no_grad()):
        randomise_([router.linear_2.weight], seed=len(places))
        with context:
            fresh = router._route(embedding)
            router(embedding)  # fills the cache with tensors of its own
            with precomputed_tables_context([router], embedding):
                table = router(embedding)
                assert torch.equal(table.weights, fresh.weights)
                assert top_k is None or torch.equal(table.indices, fresh.indices)
                assert not table.weights.is_inference()
                assert not table.weights.requires_grad
                places.append([None if t is None else t.data_ptr() for t in table])
    assert places[0] == places[1] == places[2]


def test_a_router_that_fails_lets_the_others_go(embedding):
    first, second = new_router(), new_router()
    second._route = None
    with torch.no_grad(), pytest.raises(TypeError), precomputed_tables_context([first, second], embedding):
        pass
    assert not first.is_precomputed


@torch.no_grad()
def test_a_copy_of_a_held_router_is_free(trained, embedding):
    with precomputed_tables_context([trained], embedding):
        twin = copy.deepcopy(trained)
    before = twin(embedding).weights.clone()
    twin.linear_2.bias.add_(torch.arange(4.0))
    assert not torch.equal(twin(embedding).weights, before)


def test_training_and_gradients_do_not_read_a_held_table(trained, embedding, computed):
    with torch.no_grad(), precomputed_tables_context([trained], embedding), torch.enable_grad():
        trained(embedding).weights[:, 0].sum().backward()
    assert embedding.grad.abs().sum() > 0
    with torch.no_grad(), precomputed_tables_context([trained], embedding):
        trained.train()(embedding)
    assert len(computed) == 3


@torch.no_grad()
def test_a_model_that_was_moved_meanwhile_routes_itself(trained, embedding):
    with precomputed_tables_context([trained], embedding):
        assert trained.to("meta")(embedding.to("meta")).weights.is_meta
