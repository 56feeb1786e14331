"""The tables that `mtu train --dry-run` prints."""

from mtu.inspection.reports import Report, format_count
from mtu.training.runs.dry_run import RunEstimate, examples_per_pass

__all__ = ["run_estimate_reports"]


def run_estimate_reports(run: RunEstimate) -> list[Report]:
    """Tables of examples, memory and disk, with what is known about the time."""
    return [_example_report(run), _memory_report(run), _disk_report(run)]


def _example_report(run: RunEstimate) -> Report:
    trained = f"{format_count(run.trained_parameters)} of {format_count(run.parameters)} parameters are trained"
    lines = [["task", "rows", "examples a step", "epochs"]]
    for task in run.tasks:
        rows = "not given" if task.rows is None else str(task.rows)
        epochs = "-" if task.epochs is None else f"{task.epochs:.4g}"
        lines.append([task.name, rows, f"{task.examples_per_step:.4g}", epochs])
    notes = "\n".join([_length(run), *_time(run)])
    return Report(f"{run.model.name}: {trained}.", lines, notes, num_left_aligned_columns=1)


def _length(run: RunEstimate) -> str:
    examples = f"{run.config.objective.batch_size} examples"
    if run.steps is None:
        return f"Length: {run.config.epochs:g} epochs in steps of {examples}; how many steps depends on the data."
    limit = run.config.trainer.max_minutes
    return f"Length: {run.steps} steps of {examples}" + ("." if limit is None else f", or {limit:g} minutes.")


def _time(run: RunEstimate) -> list[str]:
    duration, limit = run.duration, run.config.trainer.max_minutes
    in_all = ""
    if run.steps is not None:
        seconds = run.steps * duration.seconds_per_step
        in_all = f", {_format_seconds(seconds if limit is None else min(seconds, 60 * limit))} in all"
    kind = "" if duration.is_measured else " (an estimate, without loading, encoding and pictures)"
    return [f"Time: {_format_seconds(duration.seconds_per_step)} a step{in_all}{kind}.", duration.basis]


def _memory_report(run: RunEstimate) -> Report:
    parts = run.memory._asdict() | {"in all": run.memory.total}
    lines = [["memory", "bytes"], *([name, _format_bytes(size)] for name, size in parts.items())]
    examples = examples_per_pass(run.config, run.processes)
    where = "" if run.processes == 1 else f" in each of {run.processes} processes"
    return Report(
        f"Memory of a step on a GPU{where}, with {examples} example{'s' if examples > 1 else ''} at a time:",
        lines,
        "This is the peak of what the allocator hands out. The context of the device comes on top.\n" + _encoders(run),
        num_left_aligned_columns=1,
    )


def _encoders(run: RunEstimate) -> str:
    """A sentence on the memory of the models that encode. What no cache keeps is encoded in each step."""
    objective = run.config.objective
    sizes = "3.3 GB in SDXL" if run.model.is_xl else "0.5 GB in SD 1.5"
    # Parameters in float32: 84 million of the VAE, 123 million of CLIP L and 695 million of CLIP bigG.
    models = {"the VAE (0.3 GB)": objective.latent_cache, f"the text encoders ({sizes})": objective.text_cache}
    staying = [name for name, cache in models.items() if cache == "none"]
    if not staying:
        return "So do the VAE and the text encoders, before the first step alone."
    verb = "stay" if len(staying) > 1 or objective.text_cache == "none" else "stays"
    return f"So do the models that encode; without a cache, {' and '.join(staying)} {verb} there."


def _disk_report(run: RunEstimate) -> Report:
    disk = run.disk
    shown = {
        "one checkpoint": disk.checkpoint,
        "checkpoints in all": disk.checkpoints,
        "cached latents": disk.latent_cache,
        "cached texts": disk.text_cache,
        "UNet of the finished pipeline": disk.model,
        "free": disk.free,
    }
    lines = [["disk", "bytes"]]
    lines += [[name, "unknown" if size is None else _format_bytes(size)] for name, size in shown.items()]
    needed = sum(size or 0 for size in (disk.checkpoints, disk.latent_cache, disk.text_cache, disk.model))
    verdict = "That fits." if needed < disk.free else f"That does not fit: {_format_bytes(needed)} are needed."
    return Report(f"Disk at {run.config.output}:", lines, verdict, num_left_aligned_columns=1)


def _format_bytes(size: int) -> str:
    for unit, symbol in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {symbol}"
    return f"{size} B"


def _format_seconds(seconds: float) -> str:
    for unit, symbol in ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {symbol}"
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
