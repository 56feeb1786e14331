"""`python -m benchmarks.training.memory`: the memory of a training step by settings, and the cards that it fits on.

No GPU is needed, and nothing is loaded: the sizes are computed by `mtu.training.runs.peak_memory`. They are those of
the UNet's training alone, with latents and text embeddings that were encoded before. For the context of CUDA, the
workspaces of its libraries and gaps between the allocator's blocks, a margin is added before a card is chosen.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.harness.commands import add_commit_option, make_parser, parse_arguments
from benchmarks.harness.provenance import RESULTS, collect_provenance, command_line
from benchmarks.harness.rows import write_cells
from mtu.inspection.inspected_model import load_inspected_model
from mtu.training.runs.peak_memory import StepSettings, TrainingMemory, peak_training_memory

MODULE = "benchmarks.training.memory"
FILE = "training_step_memory.csv"
# The memory of common cards in GiB.
CARDS = (8, 12, 24, 80)
# Kept free: for the context and workspaces, and a share of the peak for gaps between blocks.
MARGIN_BYTES = 1_000_000_000
MARGIN_SHARE = 0.05
# The state of training that SD 1.5 may have.
SD15_STATE_BYTES = 2_600_000_000

_BF16 = {"autocast_dtype": torch.bfloat16}
_CHECKPOINTED = {**_BF16, "gradient_checkpointing": True, "keeps_average": True}
_SMALL = {**_CHECKPOINTED, "frozen_dtype": torch.bfloat16}
_SMALLEST = {**_SMALL, "optimizer": "adamw8bit", "keeps_average": False}


class Case(NamedTuple):
    """A model, the edge of its images in pixels, and the settings of a step that differ from `StepSettings`."""

    model: str
    size: int
    settings: dict[str, Any]


CASES = (
    Case("sd15", 512, {"keeps_average": True}),
    Case("sd15", 512, {**_BF16, "keeps_average": True}),
    Case("sd15", 512, _CHECKPOINTED),
    Case("sd15", 512, {**_CHECKPOINTED, "batch_size": 16}),
    Case("sd15", 512, {**_CHECKPOINTED, "num_processes": 8, "batch_size": 16}),
    Case("sd15", 512, _SMALL),
    Case("sd15", 512, {**_SMALL, "batch_size": 16}),
    Case("sd15", 512, _SMALLEST),
    Case("sd15", 512, {**_SMALLEST, "batch_size": 4}),
    Case("sdxl", 512, _CHECKPOINTED),
    Case("sdxl", 512, _SMALL),
    Case("sdxl", 512, {**_SMALL, "batch_size": 16}),
    Case("sdxl", 512, _SMALLEST),
    Case("sdxl", 1024, _SMALL),
    Case("sdxl", 1024, _SMALLEST),
    Case("sdxl", 512, {**_CHECKPOINTED, "num_processes": 8, "fully_shard": True, "batch_size": 16}),
    Case("sdxl", 1024, {**_SMALL, "num_processes": 8, "fully_shard": True, "batch_size": 4}),
)


def least_card(total: int) -> int | None:
    """The memory in GiB of the smallest card that a peak fits on with its margin; None: it fits on none of `CARDS`."""
    needed = total * (1 + MARGIN_SHARE) + MARGIN_BYTES
    return next((card for card in CARDS if needed <= card * 2**30), None)


def compute_rows(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A row of each case: settings, bytes by use, and the card."""
    unets = {name: load_inspected_model(name).build_upcycled() for name in dict.fromkeys(case.model for case in cases)}
    for unet in unets.values():
        unet.set_backend("auto")
    rows = []
    for model, size, changes in tqdm(cases, unit="case", file=sys.stderr):
        settings = StepSettings(height=size, width=size, **changes)
        memory = peak_training_memory(unets[model], settings)
        rows.append({**_settings_cells(model, size, settings), **_memory_cells(memory)})
    return rows


def _settings_cells(model: str, size: int, settings: StepSettings) -> dict[str, Any]:
    return {
        "model": model,
        "size": size,
        "B": settings.batch_size,
        "autocast": _name(settings.autocast_dtype),
        "frozen": _name(settings.frozen_dtype),
        "checkpointing": int(settings.gradient_checkpointing),
        "optimizer": settings.optimizer,
        "processes": settings.num_processes,
        "sharded": int(settings.fully_shard),
    }


def _name(dtype: torch.dtype | None) -> str:
    return {None: "fp32", torch.bfloat16: "bf16"}[dtype]


def _memory_cells(memory: TrainingMemory) -> dict[str, Any]:
    sizes = {f"{name}_bytes": size for name, size in memory._asdict().items()}
    card = least_card(memory.total)
    return {**sizes, "peak_bytes": memory.total, "card_gib": "" if card is None else card}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if the state of SD 1.5 is larger than it may be."""
    parser = make_parser(MODULE, "The memory of a training step by settings, and the cards that it fits on.")
    parser.add_argument("--output", type=Path, default=RESULTS / FILE, help="CSV to write (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the first case alone")
    add_commit_option(parser)
    argv, options = parse_arguments(parser, argv)
    rows = compute_rows(CASES[:1] if options.quick else CASES)
    write_cells(options.output, rows, collect_provenance(command_line(MODULE, argv), commit=options.commit))
    for row in rows:
        settings = " ".join(str(value) for value in list(row.values())[:9])
        print(f"{settings}: {row['peak_bytes'] / 1e9:.2f} GB, card {row['card_gib'] or 'none'}")
    states = [sum(row[f"{part}_bytes"] for part in ("gradients", "optimizer", "average")) for row in rows]
    largest = max(state for row, state in zip(rows, states, strict=True) if row["model"] == "sd15")
    missed = largest > SD15_STATE_BYTES
    print(f"state of SD 1.5: {largest / 1e9:.3f} GB (at most {SD15_STATE_BYTES / 1e9}{', missed' if missed else ''})")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
