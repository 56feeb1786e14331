"""Tables of one feed-forward: beside its peers, under the roofs of the machine, and with more and more input."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.ffn.roofline import RooflinePoint, read_roofline_points
from benchmarks.ffn.rows import TABLE
from benchmarks.ffn.scaling_lines import Line, make_panels, routing_name, us_per_token
from benchmarks.ffn.targets import TESTED, make_ratios_function
from benchmarks.harness.report import Ratios
from benchmarks.harness.rows import Row, read_cells
from benchmarks.harness.workloads import DENSE, Setting
from benchmarks.pages.markdown import (
    MISSING,
    format_digits,
    format_duration,
    format_ratio,
    provenance_line,
    table_lines,
)

_USUAL_BATCH = 8
_FLOOR = "products"


_FOUR, _TOP_2, _FOUR_TASKS = Setting(4), Setting(8, 2), Setting(4, DENSE, 4)


def _over(to: str | None, setting: Setting = _FOUR, direction: str = "forward", **changed: int | None) -> Ratios:
    """Times in a setting over those of another contender, or of the same one with a changed setting."""
    wanted = (setting, direction)
    return make_ratios_function(to, lambda row: (row.setting, row.workload.direction) == wanted, **changed)


# Lines of the table: ratios of the contender under test.
_RATIOS = {
    "four experts / stock feed-forward of diffusers, eager": _over("eager"),
    "… / `torch.compile` of the stock feed-forward": _over("compile-folded"),
    "… / the same, max-autotune": _over("compile-folded-max"),
    "… / the two matrix products alone": _over("products"),
    "top-2 of 8 / all 8": _over(None, _TOP_2, K=DENSE),
    "four mixed tasks / one task": _over(None, _FOUR_TASKS, tasks=1),
    "forward + backward, four experts / stock, eager": _over("eager", direction="forward+backward"),
}


def feed_forward_table(results: Path, device: str) -> list[str]:
    """Time of the contender under test, and its ratios to others, by shape."""
    rows = TABLE.read_rows(results / f"moe_ffn_{device}.csv")
    lines, used = [], []
    batch = _batch(rows, TESTED[device])
    rows = [row for row in rows if batch == row.workload.B]
    shapes = sorted({row.workload[:2] for row in rows if row.contender == TESTED[device]}, key=lambda s: (s[0], -s[1]))
    for dtype in sorted({row.workload.dtype for row in rows}):
        chosen = [row for row in rows if row.workload.dtype == dtype]
        found = {row.workload: row for row in chosen if (row.contender, row.setting) == (TESTED[device], _FOUR)}
        forward = {workload[:2]: row for workload, row in found.items() if workload.direction == "forward"}
        cells = {shape: format_duration(row.median_us) for shape, row in forward.items()}
        lines.append([dtype, "four experts: time", *(cells.get(shape, MISSING) for shape in shapes)])
        used += found.values()
        for name, ratios in _RATIOS.items():
            measured = ratios(chosen, TESTED[device])
            if measured:
                used += [row for row, _ in measured]
                cells = {row.workload[:2]: format_ratio(value) for row, value in measured}
                lines.append([dtype, name, *(cells.get(shape, MISSING) for shape in shapes)])
    if not used:
        raise ValueError(f"There are no rows of {TESTED[device]} in {results / f'moe_ffn_{device}.csv'}.")
    header = ["", f"`{TESTED[device]}`, B = {batch}, width × tokens", *("{}×{}".format(*shape) for shape in shapes)]
    return [*table_lines(header, lines, 2), "", provenance_line((row.source for row in used), f"moe_ffn_{device}.csv")]


def _batch(rows: Sequence[Row], tested: str) -> int:
    batches = [row.workload.B for row in rows if row.contender == tested]
    return max(set(batches), key=lambda B: (B == _USUAL_BATCH, batches.count(B)), default=1)


def roofline_table(results: Path, device: str) -> list[str]:
    """The work and the traffic of each shape, the roof that binds it, and the share of that roof that is reached.

    Shapes are those of the dtype that most rows have; the picture shows all.
    """
    drawn = read_roofline_points(results, device)
    batch = drawn[0].measured.workload.B
    lines, dtypes = [], [point.roofs.workload.dtype for point in drawn]
    dtype = max(sorted(set(dtypes)), key=dtypes.count)
    for place in dict.fromkeys(point.measured.workload for point in drawn if point.roofs.workload.dtype == dtype):
        here = {point.measured.contender: point for point in drawn if point.measured.workload == place}
        must, roofs = next((point.cost, point.roofs) for point in here.values())
        work = [f"{must.flops / 1e9:.1f}", f"{must.bytes / 1e6:.1f}", f"{must.intensity:.0f}"]
        share = [_share(here.get(name)) for name in (TESTED[device], "eager")]
        lines.append([f"{place.dtype} {place.D}×{place.L}", must.name_of_lower_roof(roofs), *work, *share])
    names = (f"moe_ffn_{device}.csv", f"scaling_{device}.csv")
    header = [f"B = {batch}", "bound by", "GFLOP", "MB", "FLOP/byte", f"`{TESTED[device]}`", "stock, eager"]
    roofs = {point.roofs.workload.dtype: point.roofs for point in drawn}.values()
    sources = [row.source for row in (*roofs, *(point.measured for point in drawn))]
    files = ["machine.csv", *(name for name in names if (results / name).exists())]
    return [_roofs(drawn), "", *table_lines(header, lines, 2), "", provenance_line(sources, *files)]


def _roofs(drawn: Sequence[RooflinePoint]) -> str:
    texts = []
    for dtype, roofs in {point.roofs.workload.dtype: point.roofs for point in drawn}.items():
        product = f"{format_digits(roofs.flops_per_s / 1e12)} TFLOP/s (matrices of edge {roofs.matrix})"
        meet = f"they meet at {roofs.flops_per_s / roofs.bytes_per_s:.0f} FLOP/byte"
        texts.append(f"{dtype} {product} and {format_digits(roofs.bytes_per_s / 1e9)} GB/s ({roofs.part}); {meet}")
    return f"Roofs: {'. '.join(texts)}."


def _share(point: RooflinePoint | None) -> str:
    return (
        MISSING if point is None else f"{format_digits(point.flops_per_s / 1e12)} TFLOP/s ({point.share_of_roof:.2f})"
    )


def scaling_table(results: Path, device: str) -> list[str]:
    """µs a token by the varied quantity; the picture alone shows the bare products, and lines that do not vary."""
    rows = TABLE.read_rows(results / f"scaling_{device}.csv")
    lines, used = [], []
    for panel in make_panels(rows):
        for line in panel.lines:
            same = len({id(row) for row in line.row_by_value.values()}) == 1 < len(line.row_by_value)
            if line.contender != _FLOOR and not same:
                lines.append([f"{panel.name} ({panel.fixed_text})", _line_name(line)])
                lines[-1] += [f"{x}: **{format_digits(us_per_token(row))}**" for x, row in line.row_by_value.items()]
                used += line.row_by_value.values()
    if not lines:
        raise ValueError(f"Nothing is varied in {results / f'scaling_{device}.csv'}.")
    columns = max(map(len, lines))
    body = [cells + [""] * (columns - len(cells)) for cells in lines]
    header = ["µs a token by", "", *[""] * (columns - 2)]
    return [*table_lines(header, body, 2), "", provenance_line((row.source for row in used), f"scaling_{device}.csv")]


def _line_name(line: Line) -> str:
    return f"`{line.contender}`" + ("" if line.K is DENSE else f", {routing_name(line.K)}")


_SIZES = {"parameters": "parameters", "flops": "FLOPs of a UNet call, convolutions and linears"}


def sizes_table(results: Path) -> list[str]:
    """Parameters and FLOPs, before and after upcycling."""
    columns = ("model", "num_experts", "size", "quantity", "original", "upcycled", "ratio", "ratio_routers_dropped")
    rows = read_cells(results / "model_sizes.csv", columns, "benchmarks.models.model_sizes")
    lines = []
    for cells in rows:
        if cells["quantity"] in _SIZES:
            place = f"{cells['model']} {cells['size']}², N = {cells['num_experts']}"
            counts = [_count(cells[name]) for name in ("original", "upcycled")]
            ratios = [format_ratio_cell(cells[name]) for name in ("ratio", "ratio_routers_dropped")]
            lines.append([place, _SIZES[cells["quantity"]], *counts, *ratios])
    header = ["model", "quantity", "original", "upcycled", "ratio", "… routers dropped"]
    return [*table_lines(header, lines, 2), "", provenance_line(rows, "model_sizes.csv")]


def _count(text: str) -> str:
    if not text:
        return MISSING
    value = int(text)
    return f"{value / 1e12:.3f} T" if value >= 1e11 else f"{value / 1e6:,.1f} M"


def format_ratio_cell(text: str) -> str:
    """A ratio of a CSV cell to three places; a dash where there is none."""
    return f"{float(text):.3f}" if text else MISSING
