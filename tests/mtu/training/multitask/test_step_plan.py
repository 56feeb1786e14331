"""`StepPlan`: whose turn it is, which row it visits, and that nothing depends on what came before."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtu.training.multitask.step_plan import StepPlan

SHARES = st.one_of(st.integers(1, 5), st.sampled_from([0.1, 0.25, 0.3, 1.5]))
PLANS = st.lists(st.tuples(st.integers(1, 7), SHARES), min_size=1, max_size=4)


def make_plan(tasks, batch_size: int, seed: int = 0) -> StepPlan:
    rows = {f"task {i}": rows for i, (rows, _) in enumerate(tasks)}
    return StepPlan(rows, {f"task {i}": share for i, (_, share) in enumerate(tasks)}, batch_size, seed)


def turns_in_order(tasks, count: int) -> list[int]:
    """The tasks of the first turns, by sorting the times of all of them."""
    times = [
        ((Fraction(2 * turn + 1, 2) / Fraction(str(share))), task)
        for task, (_, share) in enumerate(tasks)
        for turn in range(count)
    ]
    return [task for _, task in sorted(times)[:count]]


@settings(max_examples=50, deadline=None)
@given(PLANS, st.integers(1, 9), st.integers(0, 2**40))
def test_tasks_take_turns_by_their_shares(tasks, batch_size: int, seed: int) -> None:
    plan = make_plan(tasks, batch_size, seed)
    expected = turns_in_order(tasks, 8 * batch_size)
    assert [example.task for step in range(8) for example in plan.examples(step)] == expected
    # A plan that starts later agrees.
    assert make_plan(tasks, batch_size, seed).examples(5) == plan.examples(5)
    for step in range(8):
        examples = plan.examples(step)
        for task in {example.task for example in examples}:
            own = [example for example in examples if example.task == task]
            assert [example.rank for example in own] == list(range(len(own)))
            assert {example.count for example in own} == {len(own)}


@settings(max_examples=50, deadline=None)
@given(PLANS, st.integers(1, 9), st.integers(0, 2**40))
def test_each_epoch_visits_every_row_once(tasks, batch_size: int, seed: int) -> None:
    plan = make_plan(tasks, batch_size, seed)
    visits: dict[int, list[tuple[int, int]]] = {task: [] for task in range(len(tasks))}
    for step in range(60):
        for example in plan.examples(step):
            visits[example.task].append((example.epoch, example.row))
    for task, (rows, _) in enumerate(tasks):
        for epoch in range(len(visits[task]) // rows):
            own = visits[task][epoch * rows : (epoch + 1) * rows]
            assert {number for number, _ in own} == {epoch}
            assert sorted(row for _, row in own) == list(range(rows))


def test_a_step_is_planned_once(monkeypatch) -> None:
    plan, planned = make_plan([(7, 1), (5, 2)], 4), []
    real = plan._plan
    monkeypatch.setattr(plan, "_plan", lambda step: planned.append(step) or real(step))
    first, *_ = (plan.examples(step) for step in (0, 0, 1, 0, 1))
    assert planned == [0, 1]
    for step in range(20):
        plan.examples(step)
    assert plan.examples(0) == first
    assert len(plan._recent) < 10


def test_the_order_differs_by_epoch_task_and_seed() -> None:
    def order(task: int, epoch: int, seed: int) -> list[int]:
        plan = make_plan([(50, 1), (50, 1)], 100, seed)
        return [example.row for example in plan.examples(epoch) if example.task == task]

    orders = [order(task, epoch, seed) for task in (0, 1) for epoch in (0, 1) for seed in (0, 1)]
    assert len({tuple(rows) for rows in orders}) == len(orders)
    assert order(1, 1, 1) == order(1, 1, 1)


@pytest.mark.parametrize("step", [10, 10**6, 10**12])
def test_a_late_step_has_the_shares_of_an_early_one(step: int) -> None:
    plan = make_plan([(7, 3), (5, 1), (2, 0.5)], 9)
    counts = [sum(example.task == task for example in plan.examples(step)) for task in range(3)]
    assert counts == [6, 2, 1]  # 4.5 turns to a unit of time: the turns of one step repeat in each


def test_a_small_batch_rotates_through_the_tasks() -> None:
    plan = make_plan([(3, 1)] * 4, 1)
    assert [plan.examples(step)[0].task for step in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
