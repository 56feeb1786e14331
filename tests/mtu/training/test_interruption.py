"""Signals: the training finishes its step and saves, a second signal ends it at once, and workers live on."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtu.training import TrainerConfig
from mtu.training.checkpoints import checkpoint_steps
from mtu.training.interruption import Interruption
from mtu.training.trainer import Trainer

from .small_objectives import Batch, SmallObjective

CONFIG = TrainerConfig(steps=8, learning_rate=1e-2, log_every=1)


class Signalled(SmallObjective):
    """Gets signals while it computes the loss of a step, as from a user or a cluster."""

    def __init__(self, step: int, *signals: int) -> None:
        super().__init__()
        self.passes, self.signals = step, signals

    def forward(self, batch: Batch):
        if self.passes == 0:
            for number in self.signals:
                signal.raise_signal(number)
        self.passes -= 1
        return super().forward(batch)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("number", "ending"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["term", "int"]
)
def test_a_signal_ends_the_training_after_its_step_with_a_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int, ending: type[BaseException], num_workers: int
) -> None:
    config = replace(CONFIG, num_workers=num_workers)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ending) as caught:
        Trainer(Signalled(3, number), config, tmp_path).train()
    if ending is SystemExit:
        assert caught.value.code == 143
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "The training ends after this step and saves; a second signal ends it at once." in capfd.readouterr().err
    assert checkpoint_steps(tmp_path) == [4]
    resumed, straight = SmallObjective(), SmallObjective()
    Trainer(resumed, config, tmp_path).train(resume=True)
    Trainer(straight, config).train()
    assert all(map(torch.equal, resumed.state_dict().values(), straight.state_dict().values()))


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(tmp_path: Path, second: int) -> None:
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        Trainer(Signalled(3, signal.SIGINT, second), CONFIG, tmp_path).train()
    assert checkpoint_steps(tmp_path) == []


def test_a_signal_after_the_last_step_ends_the_process_too(tmp_path: Path) -> None:
    def validate(step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"):
        Trainer(SmallObjective(), replace(CONFIG, validate_every=8), tmp_path, validate=validate).train()
    assert checkpoint_steps(tmp_path) == [8]


def test_another_thread_trains_without_handlers() -> None:
    handlers, seen = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], []

    def train() -> None:
        with Interruption():
            seen.append([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)])
        seen.append(Trainer(SmallObjective(), CONFIG).train())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen[0] == handlers
    assert len(seen[1]) == 8
