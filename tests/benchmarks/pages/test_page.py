"""The page: its cells, its notes on missing rows, and that it agrees with the files."""

import re

import pytest

from benchmarks.harness.workloads import DENSE, Setting
from benchmarks.models import import_time
from benchmarks.models.unet_targets import TARGETS
from benchmarks.pages import markdown, page, tables_ffn, tables_models
from benchmarks.pipelines import psnr_rows

from ..page_cases import MIXED, STEPS, make_images, make_roofs, make_step, write_cells, write_rows
from ..rows_cases import SOURCE, make_row

FRAME = "# Title\n\nbefore\n\n<!-- table: {} -->\nold\n<!-- end -->\n\nafter\n"


def cells(lines):
    """The body of the Markdown tables among the lines, by first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows if not set("".join(row)) <= set("-:")}


@pytest.fixture
def paths(tmp_path):
    """Where results, the page and its pictures are."""
    results = tmp_path / "results"
    results.mkdir()
    return results, tmp_path / "performance.md", tmp_path / "images"


def test_the_committed_page_is_what_the_committed_files_say(capsys):
    assert page.main(["--check"]) == 0, capsys.readouterr().err


def test_the_committed_page_has_each_table_once_and_no_figure_in_its_prose():
    text = page.PAGE.read_text(encoding="utf-8")
    assert sorted(match[2] for match in page._MARKED.finditer(text)) == sorted(page.BLOCKS)
    prose = re.sub(r"```.*?```|`[^`]*`", "", page._MARKED.sub("", text), flags=re.DOTALL)
    # Ratios, times and bytes have a point or a unit.
    assert re.findall(r"\d+\.\d+(?! ×)|\d+ ?(?:%|ms|µs|s\b|GB|MB|×)", prose.replace("SD 1.5", "")) == []


def test_tables_are_written_between_their_markers_alone(paths, capsys):
    results, path, images = paths
    write_rows(results / "unet_cuda.csv", [make_step(name, time) for name, time in STEPS.items()])
    path.write_text(FRAME.format("unet"), encoding="utf-8")
    arguments = ["--page", str(path), "--results", str(results)]
    assert page.main([*arguments, "--check"]) == 1
    assert "would change the table 'unet'." in capsys.readouterr().err
    assert "old" in path.read_text(encoding="utf-8")
    assert page.main(arguments) == 0
    text = path.read_text(encoding="utf-8")
    assert text.startswith(
        "# Title\n\nbefore\n\n<!-- table: unet -->\n| SD 1.5, 512 × 512, bf16: time / `stock` | B = 4 | B = 4: images/s"
    )
    assert text.endswith(
        "*Not measured yet: `python -m benchmarks.models.unet --device cpu`.*\n<!-- end -->\n\nafter\n"
    )
    assert "old" not in text
    assert "![" not in text
    assert page.main([*arguments, "--check"]) == 0

    path.write_text(text.replace("0.90", "0.89"), encoding="utf-8")
    assert page.main([*arguments, "--check"]) == 1

    images.mkdir()
    (images / "unet_cuda.png").write_bytes(b"")
    assert page.main(arguments) == 0
    assert "<!-- table: unet -->\n![unet_cuda](images/unet_cuda.png)\n\n|" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (FRAME.format("magic"), "must name one of the tables targets, imports, .*, got 'magic'"),
        ("<!-- table: unet -->\n", "some stand alone"),
        ("<!-- end -->\n", "some stand alone"),
        ("<!-- table: unet -->\n<!-- table: ffn -->\n<!-- end -->\n", "some stand alone"),
    ],
    ids=["unknown", "no_end", "no_start", "nested"],
)
def test_wrong_markers(text, words, paths, capsys):
    results, path, _ = paths
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        page.main(["--page", str(path), "--results", str(results)])
    assert re.search(words, capsys.readouterr().err)
    assert path.read_text(encoding="utf-8") == text


def test_a_page_must_be_there(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        page.main(["--page", str(tmp_path / "none.md")])
    assert "There is no" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in page.BLOCKS if name != "targets"])
def test_files_that_are_missing_or_of_other_columns_are_not_measured(name, paths):
    results, _, images = paths
    empty = page.render_page(FRAME.format(name), results, images)
    assert empty.count("*Not measured yet: `python -m benchmarks.") == 1
    assert "|" not in empty
    for stem in ("unet", "pipeline", "image_psnr", "moe_ffn", "scaling"):
        (results / f"{stem}_cpu.csv").write_text("group,contender\na,b\n")
    for stem in ("machine", "import_time", "model_sizes"):
        (results / f"{stem}.csv").write_text("a\n1\n")
    assert page.render_page(FRAME.format(name), results, images) == empty


def test_targets_are_met_missed_or_not_measured(paths):
    results, _, _ = paths
    rows = [make_step(name, time) for name, time in STEPS.items()]
    rows += [make_step("mtu-triton+graphs@each", 600), make_step("stock+graphs", 100, group="other")]
    write_rows(results / "unet_cuda.csv", rows)
    lines = [line.split(" | ") for line in tables_models.targets_table(results) if line.startswith("| GPU")]
    found = {line[1]: line[2:] for line in lines}
    whats = [target.description for target in TARGETS["cuda"]]
    assert list(found) == whats
    assert found["SD 1.5 at 512x512, four mixed tasks, graphs / the original, graphs"] == ["1.00", "0.917", "met |"]
    assert found["switching tasks / a step"] == ["0.01", "0.055", "**missed** |"]
    assert found["four tasks at once / one after another"] == ["0.85", "0.917", "**missed** |"]
    assert found["SDXL at 1024x1024, four mixed tasks, graphs / the original, graphs"][1] == "not measured yet"
    assert len([line for line in tables_models.targets_table(results) if line.startswith("| CPU")]) == len(
        TARGETS["cpu"]
    )


def test_steps_by_batch(paths):
    results, _, _ = paths
    rows = [make_step(name, time * B, B=B) for B in (1, 4) for name, time in STEPS.items()]
    rows += [make_step("mtu-cpp", 2000, B=4, group="alone"), make_step("mtu-triton", 870, setting=Setting(4))]
    write_rows(results / "unet_cuda.csv", rows)
    table = cells(tables_models.unet_tables(results, "cuda"))
    assert table["`stock`"][:2] == ["1.00 (1.00 ms)", "1.00 (4.00 ms)"]
    assert table["`mtu-triton+graphs`"][:2] == ["0.55", "0.55"]
    assert table["`mtu-cpp`"][:2] == ["–", "2.00 ms"]
    assert "`mtu-triton, one task`" not in table
    assert tables_models.unet_tables(results, "cuda")[-1] == (
        "<sub>Some GPU, 1 threads, commit abc1234, torch 2.0: `none` → "
        "[unet_cuda.csv](../benchmarks/results/unet_cuda.csv)</sub>"
    )


def test_settings_over_the_usual(paths):
    results, _, _ = paths
    rows = [make_step("mtu-triton", 100), make_step("mtu-triton@each", 130), make_step("four-unets", 100)]
    rows += [make_step("four-unets", 90, setting=Setting(4)), make_step("mtu-triton", 80, setting=Setting(4, 2, 4))]
    write_rows(results / "unet_cuda.csv", rows)
    table = cells(tables_models.settings_table(results, "cuda"))
    assert table["`mtu-triton@each`"] == ["samples one after another / at once", "1.30"]
    assert table["`mtu-triton, top-2 of 4`"] == ["top-k / dense", "0.80"]
    assert len(table) == 3
    write_rows(results / "unet_cpu.csv", rows[:1])
    with pytest.raises(ValueError, match="no settings to compare"):
        tables_models.settings_table(results, "cpu")


def test_the_costs_of_serving_are_those_of_four_tasks(paths):
    results, _, _ = paths
    rows = [make_step(name, time * B, B=B, images_per_s=4.25 * B) for B in (4, 8) for name, time in STEPS.items()]
    rows += [make_step("mtu-cpp", 900, B=8), make_step("mtu-eager", 100, switch_us=0.004)]
    write_rows(results / "unet_cuda.csv", rows)
    table = cells(tables_models.unet_tables(results, "cuda"))
    (header,) = (name for name in table if name.startswith("SD 1.5"))
    assert table[header][2:] == ["B = 4: images/s", "weights", "peak beside them", "a switch / a step", "warm-up"]
    assert table["`stock`"][2:] == ["17.0", "1.70 GB", "2.00 GB", "–", "–"]
    assert table["`mtu-triton+graphs`"][2:] == ["17.0", "1.70 GB", "2.00 GB", "0.014", "31.5 s"]
    assert table["`mtu-eager`"][2:] == ["4.25", "1.70 GB", "2.00 GB", "< 0.0001", "–"]
    assert table["`mtu-cpp`"][2:] == ["–"] * 5


def test_whole_images(paths):
    results, _, _ = paths
    write_rows(results / "pipeline_cuda.csv", [make_images("stock-each", 4e6), make_images("mtu", 3e6)])
    table = cells(tables_models.pipeline_tables(results, "cuda"))
    assert table["`mtu`"] == ["3.00 s", "0.75", "1.33", "0.500 GB", "–"]
    assert "icons, 4 images of 64², 20 steps, bf16" in table


def test_psnr_says_what_was_missed(paths):
    results, _, _ = paths
    lines = [("stock-eager", "edit", "bf16", 30, 30, 0), ("mtu-cpp", "edit", "bf16", 29.5, 30, 0.3)]
    lines += [("graphs", "edit", "bf16", 29.0, 30, 0.3), ("mixed", "edit", "bf16", "nan", 30, 0.3)]
    lines += [("stock-eager", task, "fp32", psnr, 60, 0) for task, psnr in (("edit", "inf"), ("remove", 110))]
    place = {"images": 16, "pooled_db": 30, "model": "icons", "device": "cuda", "size": 64, "steps": 20}
    names = ("path", "task", "dtype", "psnr_db", "allowed_db", "error_db")
    rows = [dict(zip(names, line, strict=True)) | place for line in lines]
    columns = psnr_rows.TABLE.columns
    write_cells(results / "image_psnr_cuda.csv", columns, [[row[name] for name in columns] for row in rows])
    table = cells(tables_models.image_psnr_table(results, "cuda"))
    assert table["icons, 16 images of 20 steps: PSNR in dB (allowed)"] == ["bf16, edit", "fp32, worst task"]
    assert table["`stock-eager`"] == ["30.0 (30.0)", "110.0 (60.0)"]
    assert table["`mtu-cpp`"] == ["29.5 (30.0) even", "–"]
    assert table["`graphs`"] == ["29.0 (30.0) **missed**", "–"]
    assert table["`mixed`"] == ["nan (30.0) **missed**", "–"]


def test_imports(paths):
    results, _, _ = paths
    part, ours, theirs, at_most = import_time.PAIRS[0]
    lines = [("g", part, statement, us, us, us, 20) for statement, us in ((ours, 2.2e6), (theirs, 2e6))]
    write_cells(results / "import_time.csv", import_time.TABLE.columns, lines)
    assert cells(tables_models.imports_table(results))[f"`{ours}`"] == [
        f"`{theirs}`",
        "2.20 s",
        "2.00 s",
        "1.100",
        f"{at_most:.2f}",
    ]


def test_one_feed_forward(paths):
    results, _, _ = paths
    rows = [make_row(name, us) for name, us in (("products", 90), ("eager", 200), ("mtu-triton", 100))]
    rows += [make_row("mtu-triton", us, setting=Setting(8, K)) for K, us in ((DENSE, 100), (2, 30))]
    rows += [make_row("mtu-triton", 104, setting=MIXED), make_row("eager", 1, B=1), make_row("mtu-triton", 9, B=1)]
    rows += [make_row(name, us, direction="forward+backward") for name, us in (("eager", 500), ("mtu-triton", 400))]
    write_rows(results / "moe_ffn_cuda.csv", rows)
    lines = tables_ffn.feed_forward_table(results, "cuda")
    assert lines[0] == "|  | `mtu-triton`, B = 8, width × tokens | 320×4096 |"
    found = dict(line.strip("|").split(" | ")[1:] for line in lines if line.startswith("| bf16"))
    assert {what: value.strip() for what, value in found.items()} == {
        "four experts: time": "100 µs",
        "four experts / stock feed-forward of diffusers, eager": "0.50",
        "… / the two matrix products alone": "1.11",
        "top-2 of 8 / all 8": "0.30",
        "four mixed tasks / one task": "1.04",
        "forward + backward, four experts / stock, eager": "0.80",
    }


def test_the_roofline(paths):
    results, _, _ = paths
    write_rows(results / "machine.csv", [make_roofs()])
    write_rows(results / "moe_ffn_cuda.csv", [make_row("mtu-triton", 200), make_row("mtu-triton", 30, (1280, 64))])
    lines = tables_ffn.roofline_table(results, "cuda")
    assert (
        lines[0]
        == "Roofs: bf16 800 TFLOP/s (matrices of edge 8192) and 4,000 GB/s (triad); they meet at 200 FLOP/byte."
    )
    # 24·B·L·D² FLOPs in 200 µs.
    assert cells(lines)["bf16 320×4096"] == ["products", "80.5", "44.4", "1813", "403 TFLOP/s (0.50)", "–"]
    assert cells(lines)["bf16 1280×64"][0] == "products"


def test_scaling_has_a_line_for_each_contender_and_routing(paths):
    results, _, _ = paths
    for L in (256, 512):
        names = (("products", 1), ("eager", L), ("mtu-triton", L / 2))
        write_rows(
            results / "scaling_cuda.csv", [make_row(name, us, (640, L), B=1, group=str(L)) for name, us in names]
        )
    lines = [line for line in tables_ffn.scaling_table(results, "cuda") if line.startswith("| tokens")]
    assert lines == [
        "| tokens (width 640, B = 1, 4 experts, bf16) | `mtu-triton` | 256: **0.500** | 512: **0.500** |",
        "| tokens (width 640, B = 1, 4 experts, bf16) | `eager` | 256: **1.00** | 512: **1.00** |",
    ]


def test_numbers_and_where_they_come_from():
    texts = [markdown.format_digits(value) for value in (1234.5, 99.96, 12.34, 9.996, 1.234, 0.5)]
    assert texts == ["1,234", "100", "12.3", "10.0", "1.23", "0.500"]
    texts = [markdown.format_duration(us) for us in (12.34, 999.6, 5e4, 31.5e6)]
    assert texts == ["12.3 µs", "1.00 ms", "50.0 ms", "31.5 s"]
    sources = [SOURCE | {"command": f"A=1 python -m benchmarks.ffn.moe_ffn --seconds {s}"} for s in (1, 2, 2, 3)]
    assert markdown.provenance_line(sources[:3], "a.csv", "b.csv") == (
        "<sub>Some GPU, 1 threads, commit abc1234, torch 2.0: `A=1 python -m benchmarks.ffn.moe_ffn --seconds 1`, "
        "`A=1 python -m benchmarks.ffn.moe_ffn --seconds 2` → [a.csv](../benchmarks/results/a.csv), "
        "[b.csv](../benchmarks/results/b.csv)</sub>"
    )
    assert ": `python -m benchmarks.ffn.moe_ffn` → " in markdown.provenance_line(sources, "a.csv")
