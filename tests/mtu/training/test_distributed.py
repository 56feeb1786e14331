"""Training in several processes: the same steps as in one, exact resuming, sharding, and ends that all agree on."""

import pytest
import torch

from mtu.training import distributed
from tests.mtu.training import distributed_cases as cases
from tests.mtu.training.processes import run_in_processes

SHARDED = {"fully_shard": True}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The folder of a training in one process."""
    directory = tmp_path_factory.mktemp("one")
    run_in_processes(1, cases.train, directory, {})
    return directory


def assert_close(directory, other):
    tensors, others = cases.tensors_of_checkpoint(directory), cases.tensors_of_checkpoint(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("changes", [{}, SHARDED], ids=["whole", "sharded"])
def test_two_processes_make_the_steps_of_one(one_process, tmp_path, changes):
    losses, others = run_in_processes(2, cases.train, tmp_path, {**changes, "gradient_accumulation_steps": 2})
    assert losses == others
    assert_close(tmp_path, one_process)


@pytest.mark.parametrize(
    ("changes", "frozen_dtype"), [({}, torch.float32), (SHARDED, torch.bfloat16)], ids=["whole", "sharded"]
)
def test_three_processes_resume_exactly(tmp_path, changes, frozen_dtype):
    # Three processes add in an order that matters, and their parts of a tensor are not equally large.
    train = cases.train_with_and_without_interruption
    (losses, others), *further = run_in_processes(3, train, tmp_path, changes, frozen_dtype)
    assert losses == others
    for unbroken, resumed in further:
        assert unbroken == losses
        assert resumed == losses[-1:]
        # Only the main process reads and writes files.
    assert not list(tmp_path.glob("machine-*/*/*"))
    assert cases.digests_of_checkpoint(tmp_path / "unbroken") == cases.digests_of_checkpoint(tmp_path / "resumed")


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_sharded_training_goes_on_unsharded_and_the_reverse(one_process, tmp_path, first, second):
    run_in_processes(first, cases.train, tmp_path, SHARDED, stop_at=2)
    run_in_processes(second, cases.train, tmp_path, SHARDED, resume=True)
    assert_close(tmp_path, one_process)


def test_a_sharded_model_is_read_as_a_whole():
    results = run_in_processes(2, cases.read_sharded_model)
    assert results == [True, True]


def test_sigterm_to_one_process_ends_all_after_the_same_step(tmp_path):
    ends = run_in_processes(2, cases.end_of_training, tmp_path, {1: {1: "terminate"}})
    assert ends == [("SystemExit", "143")] * 2
    assert cases.digests_of_checkpoint(tmp_path, step=2)


def test_a_loss_that_is_not_finite_in_one_process_ends_all(tmp_path):
    ends = run_in_processes(2, cases.end_of_training, tmp_path, {1: {1: "spoil"}})
    assert {kind for kind, _ in ends} == {"FloatingPointError"}
    assert ends[0] == ends[1]
    assert "step 1" in ends[0][1]
    assert "example 6" in ends[0][1]
    assert "example 5" not in ends[0][1]
    assert cases.digests_of_checkpoint(tmp_path, step=1)


def test_a_full_disk_of_the_main_process_ends_all(tmp_path):
    ends = run_in_processes(2, cases.end_of_training, tmp_path, {0: {2: "fill disk"}})
    assert {kind for kind, _ in ends} == {"OSError"}
    assert ends[0] == ends[1]
    assert "step 3 cannot be written" in ends[0][1]
    assert cases.digests_of_checkpoint(tmp_path, step=2)


@pytest.mark.parametrize("has_directory", [True, False])
def test_processes_with_different_settings_are_refused(tmp_path, has_directory):
    errors = run_in_processes(2, cases.error_of_different_seeds, tmp_path if has_directory else None)
    assert errors[0] == errors[1]
    assert errors[0].startswith("Process 1 has another config than the main process")


def test_processes_launched_with_fsdp_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fully_shard: true"):
        distributed.make_accelerator()


def test_mixed_precision_of_the_launch_is_said_to_have_no_effect(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.warns(UserWarning, match="bf16"):
        distributed.make_accelerator()
