"""Rows of whole models and of machines that nobody measured, for the page and the pictures."""

import csv

from benchmarks.ffn import machine, rows
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import DENSE, Setting, Workload
from benchmarks.models import unet_targets
from benchmarks.models.unet_catalogue import CONTENDERS
from benchmarks.pipelines import pipeline_contenders

from .rows_cases import SOURCE, make_row

MIXED = Setting(4, DENSE, 4)
STEPS = {"stock": 1000.0, "stock+graphs": 600.0, "mtu-triton": 900.0, "mtu-triton+graphs": 550.0, "four-unets": 1500.0}


def make_step(contender, median, B=4, model="sd15", setting=MIXED, group=None, **columns):
    """A row of a made-up GPU: a denoising step, its median in µs."""
    mixed = CONTENDERS[contender].relevant_setting(setting._replace(tasks=min(setting.tasks, B)))
    size = 1024 if model == "sdxl" else 512
    times = {"median_us": median, "p20_us": median * 0.9, "p80_us": median * 1.2, "rounds": 20}
    counts = {"peak_bytes": 2 * 10**9, "weight_bytes": 17 * 10**8, "images_per_s": 4.25, "source": SOURCE}
    known = CONTENDERS[contender]
    waits = {"warmup_s": 31.5 if known.is_compiled else None, "graph": known.uses_cuda_graphs}
    waits |= {"switch_us": 30.0 if "tasks" in known.depends_on else None}
    return Row(
        group=f"{model}-{B}" if group is None else group,
        contender=contender,
        device="cuda",
        workload=Workload(model=model, size=size, B=B),
        setting=mixed,
        **(times | counts | waits | columns),
    )


def make_images(contender, median):
    """A row of a made-up GPU: four images, their time in µs."""
    return Row(
        group="g",
        contender=contender,
        device="cuda",
        workload=Workload(model="icons", size=64, B=4, steps=20),
        setting=Setting(4, DENSE, 4),
        graph=False,
        median_us=median,
        p20_us=median,
        p80_us=median,
        rounds=20,
        peak_bytes=10**8,
        weight_bytes=5 * 10**8,
        warmup_s=None,
        images_per_s=4e6 / median,
        source=SOURCE,
    )


def make_roofs(device="cuda", dtype="bf16", flops_per_s=8e14, bytes_per_s=4e12):
    """The roofs of a made-up machine; by default they meet at 200 FLOP a byte."""
    rates = {"matrix": 8192, "flops_per_s": flops_per_s, "array_bytes": 2**30, "bytes_per_s": bytes_per_s}
    return Row(device=device, workload=Workload(dtype=dtype), part="triad", rounds=20, source=SOURCE, **rates)


def grown():
    """Rows of one feed-forward in which all four quantities grow, a group for each workload."""
    made = []
    for L in (256, 512, 1024):
        place = {"shape": (640, L), "B": 1, "group": f"tokens-{L}"}
        made += [make_row(name, L * 0.1 + own, **place) for name, own in (("products", 9), ("mtu-triton", 10))]
    for B in (1, 2, 4):
        place = {"shape": (1280, 64), "B": B, "group": f"batch-{B}"}
        made += [make_row(name, 50 + B, **place) for name in ("eager", "mtu-triton")]
    place = {"shape": (640, 256), "B": 8, "group": "tasks"}
    made += [make_row("eager", 500, **place), make_row("products", 300, setting=Setting(8, 2), **place)]
    made += [make_row("mtu-triton", 200, setting=Setting(8, K, T), **place) for K in (DENSE, 2) for T in (1, 2, 4)]
    place = {"shape": (640, 1024), "B": 1, "group": "experts"}
    for E in (2, 4, 8):
        made += [make_row("mtu-triton", 400 / E, setting=Setting(E, 2), **place)]
        made += [make_row("products", 300 / E, setting=Setting(E, 2), **place)]
        made += [make_row("mtu-triton", 100, setting=Setting(E), **place)]
    return made


# By the name of a file without its device.
_TABLES = {
    "machine": machine.TABLE,
    "moe_ffn": rows.TABLE,
    "scaling": rows.TABLE,
    "unet": unet_targets.TABLE,
    "pipeline": pipeline_contenders.TABLE,
}


def write_rows(path, made):
    name, _, device = path.stem.rpartition("_")
    for row in made:
        _TABLES[name or device].append_row(path, row)


def write_cells(path, columns, lines):
    """A CSV file of the columns and those of provenance."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[*columns, *SOURCE], *([*line, *SOURCE.values()] for line in lines)])
