"""Steps that stand in for those of a run on a GPU, and the folders of one."""

import json
import time
import zipfile

from benchmarks.gpu.output import FACTS, RESULTS, PackedOutput
from benchmarks.gpu.stages import RESERVE_SECONDS, GPURun
from benchmarks.gpu.state import State
from benchmarks.gpu.steps import Step

COMMIT = "abc1234"


def shell(name, script, seconds=30.0, least_seconds=0.0, **options):
    """A step that runs a script in its folder."""

    def command(place):
        return ["/bin/sh", "-c", f"cd {place.folder}; {script}"]

    return Step(name, "nothing", command, seconds, least_seconds, **options)


class Folders:
    """The folders of a run, and calls of it."""

    def __init__(self, path):
        self.state, self.output = path / "state", path / "output"

    def call(self, *steps, seconds=30.0):
        """Runs steps, and returns how each of them ended, by name."""
        state = State(self.state, COMMIT)
        state.kill_leftovers()
        state.tree.mkdir(exist_ok=True)
        names = [step.name for step in steps]
        try:
            output = PackedOutput(self.output, state, names, COMMIT)
            GPURun(state, output, time.monotonic() + seconds + RESERVE_SECONDS, COMMIT, quick=False).run_steps(steps)
            return {name: outcome.status for name, outcome in state.read_outcomes(names).items()}
        finally:
            state.release()

    def sentence(self, name):
        return json.loads((self.output / FACTS).read_text())["steps"][name]["sentence"]

    def packed(self):
        with zipfile.ZipFile(self.output / RESULTS) as archive:
            return {name: archive.read(name).decode() for name in archive.namelist()}
