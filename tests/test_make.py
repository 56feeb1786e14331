"""Continuous integration and the hooks of pre-commit run targets of the Makefile, and nothing of their own."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TARGETS = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


def test_workflows_call_make():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert len(commands) == len(jobs)
    assert_targets(commands)


def test_hooks_call_make():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert_targets([hook["entry"] for hook in repository["hooks"]])


def test_the_script_of_continuous_integration_calls_make():
    assert_targets([(ROOT / ".ci/run").read_text().splitlines()[-1].removeprefix("exec ")])


def assert_targets(commands: list[str]) -> None:
    """Raise unless each command is `make` with a target that the Makefile has."""
    for command in commands:
        program, target, *_ = command.split()
        assert program == "make"
        assert target in TARGETS
