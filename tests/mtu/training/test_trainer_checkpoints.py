"""Checkpoints of the trainer: resuming is exact, no interruption loses them, and no other training takes them."""

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from mtu.training import LogEntry, TrainerConfig
from mtu.training.checkpoints import Checkpoint, checkpoint_steps, read_newest_checkpoint, write_checkpoint
from mtu.training.optimizer import learning_rate_at
from mtu.training.trainer import Trainer
from mtu.training.training_state import TrainingState

from ..file_operations import CUTS, count_operations, run_cut_off
from .small_objectives import Batch, FunctionObjective, LoadBatch, SmallObjective

CONFIG = TrainerConfig(
    steps=10, learning_rate=1e-2, warmup_steps=2, schedule="cosine", ema_decay=0.9, checkpoint_every=5, log_every=1
)


class Kill(BaseException):
    """Ends a training, which cannot save any more."""


class Interrupted(SmallObjective):
    """Stops before a step, as a kill would."""

    stop_at = -1

    def forward(self, batch: Batch):
        if self.stop_at == 0:
            raise Kill
        self.stop_at -= 1
        return super().forward(batch)


def train(
    directory: Path,
    config: TrainerConfig = CONFIG,
    *,
    passes_before_stop: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> tuple[SmallObjective, list[LogEntry]]:
    """Train a fresh objective."""
    objective = Interrupted()
    folder = str(directory)
    if passes_before_stop is not None:
        objective.stop_at = passes_before_stop
        with pytest.raises(Kill):
            Trainer(objective, config, folder).train(resume=resume, overwrite=overwrite)
        return objective, []
    return objective, Trainer(objective, config, folder).train(resume=resume, overwrite=overwrite)


def full_disk(*arguments: object) -> None:
    """Fails as writing to a full disk does."""
    raise OSError(28, "No space left on device")


def tensors_of(directory: Path, step: int) -> Path:
    """The file of tensors of a checkpoint."""
    folder = directory / "checkpoints"
    return folder / json.loads((folder / f"step-{step:08d}.json").read_text())["file"]


def assert_equal_weights(objective: SmallObjective, other: SmallObjective) -> None:
    for (name, expected), found in zip(objective.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw8bit"},
        {"gradient_accumulation_steps": 3},
        {"num_workers": 2},
        {"log_every": 4, "ema_decay": None, "checkpoint_every": 3},
    ],
    ids=str,
)
def test_a_training_resumed_twice_is_bitwise_the_uninterrupted_one(tmp_path: Path, settings: dict) -> None:
    config = replace(CONFIG, **settings)
    straight, history = train(tmp_path / "straight", config)
    passes = config.gradient_accumulation_steps
    # Two steps beyond the checkpoint, so that their log lines must be dropped again.
    train(tmp_path / "broken", config, passes_before_stop=7 * passes)
    train(tmp_path / "broken", config, passes_before_stop=1 * passes, resume=True)
    log = tmp_path / "broken" / "log.jsonl"
    damaged = '{"step": 1, "lo\n' + json.dumps(LogEntry("a", 0.0, 0.0, 0.0, 0.0, {})._asdict()) + "\n"  # type: ignore[arg-type]
    log.write_text(damaged + log.read_text())  # as a full disk leaves it
    resumed, resumed_history = train(tmp_path / "broken", config, resume=True)
    assert_equal_weights(straight, resumed)
    # The file of tensors has their digest in its name.
    assert tensors_of(tmp_path / "straight", 10).name == tensors_of(tmp_path / "broken", 10).name
    assert [(e.step, e.loss, e.learning_rate, e.terms) for e in history] == [
        (e.step, e.loss, e.learning_rate, e.terms) for e in resumed_history
    ]
    assert [json.loads(line) for line in log.read_text().splitlines()] == [e._asdict() for e in resumed_history]


def test_8_bit_states_are_restored_with_their_numbers_and_memory_format(tmp_path: Path) -> None:
    """Only tensors of 4,096 elements have states of 8 bits."""

    def objective() -> FunctionObjective:
        torch.manual_seed(0)
        conv = nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last)
        return FunctionObjective(lambda step: (conv.weight * (step + 1)).cos().square().mean(), conv=conv)

    config = replace(CONFIG, optimizer="adamw8bit", steps=6, checkpoint_every=3)
    straight, broken = Trainer(objective(), config), objective()
    straight.train()
    loss = broken.loss
    broken.loss = lambda step: loss(step) if step < 4 else pytest.fail("cut off")
    with pytest.raises(pytest.fail.Exception):
        Trainer(broken, config, tmp_path).train()
    resumed = Trainer(objective(), config, tmp_path)
    resumed.train(resume=True)
    states = [trainer._state.optimizer.state for trainer in (straight, resumed) if trainer._state is not None]
    for found, expected in zip(states[1].values(), states[0].values(), strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key
    assert {value["state1"].dtype for value in states[1].values()} == {torch.uint8}
    assert all(map(torch.equal, resumed.objective.state_dict().values(), straight.objective.state_dict().values()))


def test_resuming_a_finished_training_changes_nothing(tmp_path: Path) -> None:
    objective, history = train(tmp_path)
    again, repeated = train(tmp_path, resume=True)
    assert repeated == history
    assert_equal_weights(objective, again)


def test_the_directory_holds_the_last_checkpoints_and_no_pickle(tmp_path: Path) -> None:
    config = replace(CONFIG, checkpoint_every=2)
    train(tmp_path, config)
    names = [f"step-{step:08d}.json" for step in (8, 10)] + [tensors_of(tmp_path, step).name for step in (8, 10)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "log.jsonl"]
    train(tmp_path, replace(config, checkpoints_total_limit=None), overwrite=True)
    assert checkpoint_steps(tmp_path) == [2, 4, 6, 8, 10]


def test_buffers_are_saved_and_frozen_weights_are_not(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(2)
    objective = FunctionObjective(lambda step: norm(torch.arange(8.0).view(4, 2) + step).square().sum(), norm=norm)
    Trainer(objective, replace(CONFIG, steps=1), tmp_path).train()
    tensors = read_newest_checkpoint(tmp_path).tensors
    assert torch.equal(tensors["buffer.norm.running_mean"], norm.running_mean)
    train(tmp_path, overwrite=True)
    assert not any("frozen" in name for name in read_newest_checkpoint(tmp_path).tensors)


def test_a_checkpoint_goes_on_where_the_modules_are(tmp_path: Path) -> None:
    """On the meta device, whose tensors do not mix with the CPU's."""
    train(tmp_path)
    checkpoint = read_newest_checkpoint(tmp_path)
    objective = SmallObjective().to("meta")
    state = TrainingState(objective, CONFIG)
    state.load(checkpoint.tensors, checkpoint.state["optimizer_numbers"])
    values = [value for values in state.optimizer.state.values() for value in values.values()]
    assert {value.device.type for value in (*values, *state.averaged_weights.values())} == {"meta"}
    images, rows = torch.ones(6, 3, 8, 8, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta")
    objective.model(images, rows).square().mean().backward()
    state.take_gradients()
    state.optimizer_step(torch.ones((), device="meta"))
    assert state.step == 1
    assert all(p.grad is None for p in (*state.parameters.values(), *state.optimizer_parameters.values()))


@pytest.mark.parametrize("damage", ["truncated tensors", "no tensors", "half of the state", "empty state"])
def test_the_newest_whole_checkpoint_is_taken_and_others_are_named(tmp_path: Path, damage: str) -> None:
    straight, _ = train(tmp_path / "straight")
    train(tmp_path, passes_before_stop=7)
    train(tmp_path / "copy", resume=False)
    shutil.copytree(tmp_path / "copy" / "checkpoints", tmp_path / "checkpoints", dirs_exist_ok=True)
    tensors, state = tensors_of(tmp_path, 10), tmp_path / "checkpoints" / "step-00000010.json"
    if damage == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "no tensors":
        tensors.unlink()
    else:
        state.write_text(state.read_text()[: 0 if damage == "empty state" else 99])
    with pytest.warns(
        UserWarning, match=r"^Training goes on from step 5, because newer checkpoints are damaged: step-00000010 \("
    ):
        resumed, _ = train(tmp_path, replace(CONFIG, checkpoint_every=1, checkpoints_total_limit=1), resume=True)
    assert_equal_weights(straight, resumed)
    assert checkpoint_steps(tmp_path) == [10]
    assert read_newest_checkpoint(tmp_path).step == 10


def test_the_last_whole_checkpoint_survives_damaged_ones_of_later_steps(tmp_path: Path) -> None:
    train(tmp_path, passes_before_stop=7)
    for step in (8, 9):
        (tmp_path / "checkpoints" / f"step-{step:08d}.json").write_text("{")
    config = replace(CONFIG, checkpoint_every=7, checkpoints_total_limit=1)
    with pytest.warns(UserWarning, match="damaged"):
        train(tmp_path, config, passes_before_stop=3, resume=True)
    assert checkpoint_steps(tmp_path) == [7]
    train(tmp_path, config, resume=True)


def test_damaged_checkpoints_alone_are_an_error(tmp_path: Path) -> None:
    train(tmp_path)
    for step in (5, 10):
        tensors_of(tmp_path, step).write_bytes(b"")
    with pytest.raises(ValueError, match=r"^Every checkpoint in .* is damaged: step-00000010 \(.*, step-00000005 \("):
        train(tmp_path, resume=True)


def test_a_save_may_be_cut_off_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each operation on files, by a kill or a full disk: the older or the newer checkpoint loads, and goes on."""
    config = replace(CONFIG, steps=4, checkpoint_every=1)
    started = tmp_path / "started"
    train(started, config, passes_before_stop=3)
    assert checkpoint_steps(started) == [2, 3]
    straight, _ = train(tmp_path / "straight", config)

    def train_on(directory: Path) -> None:
        train(directory, config, resume=True)

    shutil.copytree(started, tmp_path / "count")
    count = count_operations(monkeypatch, lambda: train_on(tmp_path / "count"))
    assert count > 20
    newest = []
    for operation in range(count):
        directory = tmp_path / str(operation)
        shutil.copytree(started, directory)
        run_cut_off(monkeypatch, lambda directory=directory: train_on(directory), operation, CUTS[operation % 2])
        newest.append(read_newest_checkpoint(directory).step)
        resumed, history = train(directory, config, resume=True)
        assert_equal_weights(straight, resumed)
        assert [entry.step for entry in history] == [1, 2, 3, 4]
        if newest[-1] == 3:
            # The next save has deleted what the interrupted one left.
            assert len(list((directory / "checkpoints").iterdir())) == 4
    assert set(newest) == {3, 4}


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
    ids=["python", "safetensors"],
)
def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    train(tmp_path, passes_before_stop=7)

    def full_disk(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("mtu.storage.save_file", full_disk)
    message = r"^The checkpoint of step 10 cannot be written to .* \(No space left on device\); that of step 5 stays\.$"
    with pytest.raises(OSError, match=message):
        train(tmp_path, resume=True)
    monkeypatch.undo()
    train(tmp_path, resume=True)


def test_a_folder_that_cannot_be_written_to_is_one_sentence_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^The folder .*file/run cannot be written to \(Not a directory\)\.$"):
        train(tmp_path / "file" / "run")
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    with pytest.raises(OSError, match=r"^The folder .* cannot be written to \(Is a directory\)\.$"):
        train(tmp_path / "run")


def test_a_checkpoint_is_not_destroyed_unasked(tmp_path: Path) -> None:
    train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    objective = FunctionObjective(lambda step: pytest.fail("trained"), linear=nn.Linear(1, 1))
    state = torch.get_rng_state()
    with pytest.raises(FileExistsError, match=r"holds the checkpoint of a training: continue it with resume, delete"):
        Trainer(objective, CONFIG, tmp_path).train()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="expected one of them, got both"):
        train(tmp_path, resume=True, overwrite=True)
    # Interrupted before its first checkpoint, the new training leaves nothing of the old one to resume.
    train(tmp_path, overwrite=True, passes_before_stop=3)
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint in .* to resume from\.$"):
        train(tmp_path, resume=True)
    with pytest.raises(ValueError, match="directory that holds the checkpoint"):
        Trainer(SmallObjective(), CONFIG).train(resume=True)


def test_overwriting_deletes_nothing_unless_the_new_training_can_begin(tmp_path: Path) -> None:
    train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="float16"):
        Trainer(SmallObjective().half(), CONFIG, tmp_path).train(overwrite=True)
    objective, threads = SmallObjective(), threading.active_count()
    objective.prepare = lambda accelerator: pytest.fail("the cache is full")
    with pytest.raises(pytest.fail.Exception):
        Trainer(objective, replace(CONFIG, tensorboard=True), tmp_path).train(overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert threading.active_count() == threads


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_step_loses_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    config = replace(CONFIG, gradient_accumulation_steps=2, num_workers=num_workers)
    objective = SmallObjective(LoadBatch(6, unreadable_step=7))
    with pytest.raises(ValueError, match="line 7: the image cannot be read"):
        Trainer(objective, config, tmp_path).train()
    assert checkpoint_steps(tmp_path) == [5, 7]
    straight, _ = train(tmp_path / "straight", config)
    resumed, history = train(tmp_path, config, resume=True)
    assert_equal_weights(straight, resumed)
    assert [entry.step for entry in history] == list(range(1, 11))
    monkeypatch.setattr("mtu.storage.save_file", full_disk)
    with pytest.raises(
        ValueError, match=r"cannot be read\.\nThe state before this step was not saved: The checkpoint of"
    ):
        Trainer(SmallObjective(LoadBatch(6, unreadable_step=1)), config, tmp_path / "full").train()
    # Before the first step, there is nothing to lose.
    with pytest.raises(ValueError, match=r"cannot be read\.$"):
        Trainer(SmallObjective(LoadBatch(6, unreadable_step=0)), config, tmp_path / "full").train()


def test_an_error_of_a_validation_loses_no_work(tmp_path: Path) -> None:
    config = replace(CONFIG, validate_every=3)
    with pytest.raises(pytest.fail.Exception):
        Trainer(SmallObjective(), config, tmp_path, validate=lambda step: pytest.fail("no picture")).train()
    assert checkpoint_steps(tmp_path) == [3]
    straight, _ = train(tmp_path / "straight", config)
    assert_equal_weights(straight, train(tmp_path, config, resume=True)[0])


def test_two_trainings_do_not_run_in_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", f"{lock}; print(); input()", str(tmp_path / ".lock")]
    returned = []

    def run_another(step: int) -> None:
        returned.append(subprocess.run(command, input="\n", text=True, capture_output=True).stderr)

    Trainer(SmallObjective(), replace(CONFIG, validate_every=10), tmp_path, validate=run_another).train()
    assert "BlockingIOError" in returned[0]
    before = sorted(tmp_path.rglob("*"))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as another:
        assert another.stdout is not None
        another.stdout.readline()
        with pytest.raises(ValueError, match=r"^Another training is running in .*: wait for its end, or choose"):
            train(tmp_path, overwrite=True)
        assert sorted(tmp_path.rglob("*")) == before
        another.communicate(b"\n")


def test_a_time_limit_ends_the_training_with_a_checkpoint(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=10**6, max_minutes=0.2 / 60, checkpoint_every=10**6)
    _, history = train(tmp_path, config)
    assert 0 < history[-1].step < 10**6
    assert history[-1].seconds >= 0.2
    assert read_newest_checkpoint(tmp_path).step == history[-1].step
    # Already over: resuming makes no step, unless more time is given.
    assert train(tmp_path, config, resume=True)[1] == history
    longer = train(tmp_path, replace(config, max_minutes=0.4 / 60), resume=True)[1]
    assert longer[-1].step > history[-1].step


def test_resuming_another_training_says_what_differs(tmp_path: Path) -> None:
    train(tmp_path)
    message = (
        r"was made with another learning_rate \(0\.01 then, 1\.0 now\), steps \(10 then, 11 now\); accept_changes \(--a"
    )
    with pytest.raises(ValueError, match=message):
        train(tmp_path, replace(CONFIG, steps=11, learning_rate=1.0, log_every=2), resume=True)
    with pytest.raises(ValueError, match=r"was made with another size \(6 then, 9 now\); accept_changes"):
        Trainer(SmallObjective(LoadBatch(9)), CONFIG, tmp_path).train(resume=True)
    with pytest.raises(ValueError, match=r"does not fit this model: 5 trained parameters differ .* model\.conv\.bias"):
        Trainer(SmallObjective().double(), CONFIG, tmp_path).train(resume=True)
    objective = SmallObjective()
    objective.model.linear.requires_grad_(False)
    with pytest.raises(ValueError, match="2 trained parameters differ"):
        Trainer(objective, CONFIG, tmp_path).train(resume=True)
    objective = SmallObjective()
    with torch.no_grad():
        objective.model.frozen.bias[0] += 1e-7
    with pytest.raises(ValueError, match="the values of its frozen parameters differ"):
        Trainer(objective, CONFIG, tmp_path).train(resume=True)
    assert torch.equal(objective.model.linear.weight, SmallObjective().model.linear.weight)


def test_accepted_changes_hold_from_the_checkpoint_on_and_are_recorded(tmp_path: Path) -> None:
    train(tmp_path, passes_before_stop=6)
    changed = replace(CONFIG, learning_rate=1e-3, max_grad_norm=0.5, warmup_steps=0, seed=1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"was made with another betas .*, learning_rate .* now\)\.$"):
        Trainer(SmallObjective(), replace(changed, betas=(0.8, 0.9)), tmp_path).train(resume=True, accept_changes=True)
    with pytest.raises(ValueError, match="but resume is false"):
        Trainer(SmallObjective(), changed, tmp_path).train(accept_changes=True)
    history = Trainer(SmallObjective(LoadBatch(9)), changed, tmp_path).train(resume=True, accept_changes=True)
    rates = [learning_rate_at(step, 0, CONFIG if step < 5 else changed) for step in range(10)]
    assert [entry.learning_rate for entry in history] == rates
    # The changed settings are now those of the checkpoint.
    assert Trainer(SmallObjective(LoadBatch(9)), changed, tmp_path).train(resume=True) == history
    changes = {
        "step": 5,
        "accepted_changes": [
            "learning_rate (0.01 then, 0.001 now)",
            "max_grad_norm (1.0 then, 0.5 now)",
            "seed (0 then, 1 now)",
            "warmup_steps (2 then, 0 now)",
            "weight_decay (0.01 then, 0.1 now)",
            "size (6 then, 9 now)",
        ],
    }
    assert read_newest_checkpoint(tmp_path).state["accepted_changes"] == [changes]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[5] == changes
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]


def test_a_checkpoint_that_lacks_what_this_training_needs_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with_buffer = SmallObjective()
    with_buffer.model.register_buffer("scale", torch.ones(1))
    for objective, message in (
        (with_buffer, r"does not fit this model: 1 buffers differ in name, dtype or shape, .* model\.scale\.$"),
        (SmallObjective(has_rows=False), r"1 parameters with one row per task differ .* model\.embedding\.weight\.$"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(objective, CONFIG, tmp_path).train(resume=True)
    with pytest.raises(ValueError, match="is of step 10: expected steps to be at least as many, but got 7"):
        Trainer(SmallObjective(), replace(CONFIG, steps=7), tmp_path).train(resume=True, accept_changes=True)
    write_checkpoint(tmp_path, Checkpoint(11, {}, {"training": {}}))
    with pytest.raises(
        ValueError, match=r"The checkpoint in .* lacks 'seconds', .*, 'config', .*: expected one that a"
    ):
        train(tmp_path, resume=True)


def test_a_constant_rate_may_go_on_for_more_steps(tmp_path: Path) -> None:
    config = replace(CONFIG, schedule="constant")
    straight, _ = train(tmp_path / "straight", replace(config, steps=15))
    train(tmp_path, config)
    longer, _ = train(tmp_path, replace(config, steps=15, num_workers=1, gradient_accumulation_steps=1), resume=True)
    assert_equal_weights(straight, longer)


def test_checkpoints_may_have_more_than_eight_digits(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        write_checkpoint(tmp_path, Checkpoint(step, {"a": torch.ones(1)}, {}))
    assert read_newest_checkpoint(tmp_path).step == 100_000_000
