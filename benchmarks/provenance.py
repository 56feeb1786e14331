"""Where a figure comes from: the columns that every CSV row carries."""

import platform
import subprocess
from pathlib import Path

import diffusers
import torch

__all__ = ["RESULTS", "provenance"]

RESULTS = Path(__file__).parent / "results"


def provenance(command: str) -> dict[str, str]:
    """Command, commit, library versions and machine, for the last columns of a row."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "command": command,
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": platform.machine(),
    }
