"""The columns that every CSV row carries to say where its figures come from."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Variables that keep libraries from instructions that the machine has.
_LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
# Files that a benchmark writes must not make the tree of the next one look changed.
_WRITTEN = (":!benchmarks/results", ":!docs/images")


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command that a benchmark was started by, with the limits set in the environment."""
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]
    return shlex.join([*limits, "python", "-m", module, *arguments])


def collect_provenance(command: str, device: torch.device | None = None, commit: str | None = None) -> dict[str, str]:
    """Command, commit, library versions and machine, for the last columns of a row.

    `device` is the one that was measured on, by default the CPU. `commit` is for a copy of the tree without its git
    directory; by default git is asked.
    """
    return {
        "command": command,
        "commit": commit or _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "machine": platform.machine(),
        "processor": _processor(device or torch.device("cpu")),
        "threads": str(torch.get_num_threads()),
    }


def _version(package: str) -> str:
    # The metadata has it without an import, which would make the package a requirement.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _commit() -> str:
    head = _git("rev-parse", "--short", "HEAD")
    if not head:
        return "unknown"
    return head + ("-dirty" if _git("status", "--porcelain", "--", ".", *_WRITTEN) else "")


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
