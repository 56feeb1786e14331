"""Tables of whole models: denoising steps and their memory, whole images and their PSNR, imports, targets."""

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.report import Ratio, Target
from benchmarks.harness.rows import CsvTable, Row
from benchmarks.models import import_time, unet_targets
from benchmarks.models.steps import (
    MeasuredStep,
    compare_with_usual,
    deployed_batch_and_steps,
    steps_by_setup,
    usual_cases,
)
from benchmarks.models.unet_catalogue import ORIGINAL, find_contender
from benchmarks.pages.markdown import (
    MISSING,
    format_digits,
    format_duration,
    format_gigabytes,
    format_ratio,
    format_small_ratio,
    provenance_line,
    table_lines,
)
from benchmarks.pipelines import pipeline_contenders, psnr_rows
from benchmarks.pipelines.pipeline_contenders import STOCK

_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def unet_tables(results: Path, device: str) -> list[str]:
    """A denoising step of each contender relative to the original's, by batch, in a table for each model.

    Memory, switching and warm-up are those of the batch of four tasks.
    """
    rows = _rows(unet_targets.TABLE, results / f"unet_{device}.csv")
    lines = []
    for setup, cases in steps_by_setup(rows).items():
        chosen = usual_cases(cases)
        if not chosen:
            continue
        served, steps = deployed_batch_and_steps(chosen)
        batches = sorted({B for found in chosen.values() for B in found})
        header = [f"{setup}: time / `{ORIGINAL}`", *(f"B = {B}" for B in batches)]
        header += [f"B = {served}: images/s", "weights", "peak beside them", "a switch / a step", "warm-up"]
        cells = []
        for case, found in chosen.items():
            cells.append([f"`{case}`", *(_step(found.get(B)) for B in batches), *_served(steps.get(case))])
        lines += [*table_lines(header, cells), ""]
    return [*lines, provenance_line((row.source for row in rows), f"unet_{device}.csv")]


def _served(step: MeasuredStep | None) -> list[str]:
    if step is None:
        return [MISSING] * 5
    row = step.measured
    switch = MISSING if row.switch_us is None else format_small_ratio(row.switch_us / row.median_us)
    memory = [format_gigabytes(row.weight_bytes), format_gigabytes(row.peak_bytes)]
    return [format_digits(row.images_per_s), *memory, switch, _warm_up(row.warmup_s)]


def _warm_up(seconds: float | None) -> str:
    return MISSING if seconds is None else format_duration(seconds * 1e6)


def _rows(table: CsvTable, path: Path) -> list[Row]:
    rows = table.read_rows(path)
    if not rows:
        raise ValueError(f"There are no rows in {path}.")
    return rows


def _step(step: MeasuredStep | None) -> str:
    if step is None:
        return MISSING
    own = format_duration(step.measured.median_us)
    if step.original_row is None:
        return own
    return format_ratio(step.relative_to_original(step.measured.median_us)) + (
        f" ({own})" if step.measured is step.original_row else ""
    )


def settings_table(results: Path, device: str) -> list[str]:
    """Ratios of a contender's steps by batch: one task to mixed tasks, top-k to dense routing, and the like."""
    rows = _rows(unet_targets.TABLE, results / f"unet_{device}.csv")
    lines, used = [], []
    for setup, cases in steps_by_setup(rows).items():
        # Of upcycled UNets: the settings of their experts.
        found = {
            case: of
            for case, of in compare_with_usual(cases).items()
            if "E" in find_contender(case.contender).depends_on
        }
        batches = sorted({B for comparison in found.values() for B in comparison.pairs_by_batch})
        cells = []
        for case, (what, pairs) in found.items():
            ratios = {
                B: format_ratio(own.measured.median_us / plain.measured.median_us) for B, (own, plain) in pairs.items()
            }
            cells.append([f"`{case}`", what, *(ratios.get(B, MISSING) for B in batches)])
            used += [step.measured for pair in pairs.values() for step in pair]
        if cells:
            header = [str(setup), "ratio", *(f"B = {B}" for B in batches)]
            lines += [*table_lines(header, cells, 2), ""]
    if not lines:
        raise ValueError(f"There are no settings to compare in {results / f'unet_{device}.csv'}.")
    return [*lines, provenance_line((row.source for row in used), f"unet_{device}.csv")]


def pipeline_tables(results: Path, device: str) -> list[str]:
    """Whole images, a table for each model; ratios are to the stock pipelines of the same group."""
    path = results / f"pipeline_{device}.csv"
    rows = _rows(pipeline_contenders.TABLE, path)
    last = {(row.workload, row.contender): row for row in rows}
    stock = {row.group: row for row in rows if row.contender == STOCK}
    lines = []
    for place in dict.fromkeys(workload for workload, _ in last):
        title = f"{place.model}, {place.B} images of {place.size}², {place.steps} steps, {place.dtype}"
        header = [title, "time", f"/ `{STOCK}`", "images/s", "weights", "warm-up"]
        cells = []
        for row in (row for (workload, _), row in last.items() if workload == place):
            relative = format_ratio(row.median_us / stock[row.group].median_us) if row.group in stock else MISSING
            held = [format_digits(row.images_per_s), format_gigabytes(row.weight_bytes), _warm_up(row.warmup_s)]
            cells.append([f"`{row.contender}`", format_duration(row.median_us), relative, *held])
        lines += [*table_lines(header, cells), ""]
    return [*lines, provenance_line((row.source for row in last.values()), path.name)]


def image_psnr_table(results: Path, device: str) -> list[str]:
    """PSNR of each path's images, the least allowed one, and the verdict: by task, in float32 the worst task alone."""
    path = results / f"image_psnr_{device}.csv"
    rows = _rows(psnr_rows.TABLE, path)
    lines = []
    for model, steps in dict.fromkeys((row.workload.model, row.workload.steps) for row in rows):
        here = [row for row in rows if (row.workload.model, row.workload.steps) == (model, steps)]
        last = {(row.contender, row.workload.dtype, row.part): row for row in here}
        columns = dict.fromkeys((dtype, task) for _, dtype, task in last if dtype != "fp32")
        in_fp32 = [row for (_, dtype, _), row in last.items() if dtype == "fp32"]
        body = []
        for path_name in dict.fromkeys(name for name, _, _ in last):
            own = (row for row in in_fp32 if row.contender == path_name)
            worst = min(own, key=lambda row: row.psnr_db - row.allowed_db, default=None)
            body.append([f"`{path_name}`", *(_decibels(last.get((path_name, *column))) for column in columns)])
            body[-1] += [_decibels(worst)] * bool(in_fp32)
        images = max(row.workload.B for row in last.values())
        fewer = min((row.workload.B for row in in_fp32), default=images)
        header = [f"{model}, {images} images of {steps} steps: PSNR in dB (allowed)"]
        header += [f"{dtype}, {task}" for dtype, task in columns]
        header += ["fp32, worst task" + f" ({fewer} images)" * (fewer != images)] * bool(in_fp32)
        lines += [*table_lines(header, body), ""]
    return [*lines, provenance_line((row.source for row in rows), path.name)]


def _decibels(row: Row | None) -> str:
    if row is None:
        return MISSING
    text = "∞" if math.isinf(row.psnr_db) else f"{row.psnr_db:.1f}"
    verdict = {"met": "", "even": " even", "missed": " **missed**"}[psnr_rows.verdict(row)]
    return f"{text} ({row.allowed_db:.1f}){verdict}"


def imports_table(results: Path) -> list[str]:
    """Times of imports in fresh interpreters, ours over theirs."""
    rows = import_time.TABLE.read_rows(results / "import_time.csv")
    medians = {(row.part, row.contender): row.median_us for row in rows}
    lines = []
    for part, ours, theirs, at_most in import_time.PAIRS:
        if (part, ours) in medians and (part, theirs) in medians:
            mine, other = medians[part, ours], medians[part, theirs]
            target = MISSING if at_most is None else format_ratio(at_most)
            lines.append(
                [
                    f"`{ours}`",
                    f"`{theirs}`",
                    format_duration(mine),
                    format_duration(other),
                    f"{mine / other:.3f}",
                    target,
                ]
            )
    if not lines:
        raise ValueError(f"There are no pairs to compare in {results / 'import_time.csv'}.")
    header = ["statement", "divided by", "time", "of the other", "ratio", "at most"]
    return [*table_lines(header, lines, 2), "", provenance_line((row.source for row in rows), "import_time.csv")]


def targets_table(results: Path) -> list[str]:
    """Whether whole models meet their targets. The table is always there, and says which ones were not measured."""
    lines, sources, files = [], [], []
    for device, chosen in unet_targets.TARGETS.items():
        try:
            rows = unet_targets.TABLE.read_rows(results / f"unet_{device}.csv")
        except ValueError:
            rows = []
        for target in chosen:
            found = target.ratios_of_rows(rows, unet_targets.TESTED[device])
            sources += [of.measured.source for of in found]
            files += [f"unet_{device}.csv"] * bool(found)
            at_most = MISSING if target.at_most is None else format_ratio(target.at_most)
            lines.append([_DEVICES[device], target.description, at_most, *_verdict(target, found)])
    header = ["", "what", "at most", "measured", ""]
    return [*table_lines(header, lines, 2), *(["", provenance_line(sources, *dict.fromkeys(files))] if sources else [])]


def _verdict(target: Target, found: Sequence[Ratio]) -> list[str]:
    if not found:
        return ["not measured yet", MISSING]
    value = target.mean_or_largest(found)
    verdict = MISSING if target.at_most is None else "met" if value <= target.at_most else "**missed**"
    return [format_small_ratio(value), verdict]
