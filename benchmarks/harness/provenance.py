"""Where a figure comes from: the columns that every CSV row carries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["RESULTS", "command_line", "provenance"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# What keeps libraries from instructions that the machine has.
_LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
# What a benchmark writes must not make the tree of the next one look changed.
_WRITTEN = (":!benchmarks/results", ":!docs/images")


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command that a benchmark was started by, with the limits set in the environment."""
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]
    return shlex.join([*limits, "python", "-m", module, *arguments])


def provenance(command: str, device: torch.device | None = None, commit: str | None = None) -> dict[str, str]:
    """Command, commit, library versions and machine, for the last columns of a row.

    Args:
        command: how to make the row again.
        device: what was measured on; the CPU by default.
        commit: for a copy of the tree that came without its git directory; asked of git by default.
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
    # Asked of the metadata: importing a package to read its version would make it a requirement.
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
