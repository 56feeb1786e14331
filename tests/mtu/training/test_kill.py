"""Trainings that are killed and resumed: two cases of `python -m benchmarks.training.kill_and_resume`."""

import random

import pytest

from benchmarks.training.kill_and_resume import ENDINGS, run_interrupted, run_unbroken
from benchmarks.training.kill_cases import CASES

STEPS = 10


@pytest.mark.slow
@pytest.mark.parametrize(("case", "ending"), [("two workers", "3 SIGKILLs"), ("two processes", "torn checkpoint")])
def test_a_killed_training_ends_as_an_unbroken_one(tmp_path, case, ending):
    expected = run_unbroken(CASES[case], STEPS, tmp_path / "unbroken")
    outcome = run_interrupted(CASES[case], ENDINGS[ending], STEPS, tmp_path / "interrupted", random.Random())
    assert outcome.digests == expected, outcome
