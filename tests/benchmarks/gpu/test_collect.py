"""The results of a run on a GPU are put into their places."""

import dataclasses
import json
import shutil
import time
import zipfile

import pytest

from benchmarks import gpu_run
from benchmarks.ffn.rows import TABLE as ROWS_TABLE
from benchmarks.gpu.collect import Destinations, place_results
from benchmarks.gpu.output import FACTS, RESULTS, PackedOutput
from benchmarks.gpu.stages import RESERVE_SECONDS, GPURun
from benchmarks.gpu.state import State
from benchmarks.gpu.steps import TABLE, TUNE, Step
from benchmarks.kernels import tile_rows, tune
from benchmarks.pages import plot
from mtu_kernels.triton.tile_table import ROWS
from mtu_kernels.triton.tiles import TableRow, TileConfig, TileKey

from ..rows_cases import make_row

KEY = TileKey("expert_in", "sm_90", 16, False, 640, 0)
TUNED = TableRow(KEY, TileConfig(128, 64, 64, 8, 3, True), "measured on a GPU: 24.0 µs at 2048 tokens, before 29.0")


@pytest.fixture
def places(tmp_path):
    table = tmp_path / "places" / TABLE
    table.parent.mkdir()
    shutil.copy(tune.SHIPPED, table)
    return Destinations(table, tmp_path / "places" / "results")


@pytest.fixture
def returned(tmp_path):
    """The output folder of a run that tuned a tile, and measured rows in two steps."""
    files = tmp_path / "measured"
    files.mkdir()
    tile_rows.write_rows(files / TABLE, tile_rows.merge_rows(ROWS, [TUNED]))
    for name, contenders in (("a", ("products", "eager")), ("b", ("mtu-triton",))):
        for place, contender in enumerate(contenders):
            ROWS_TABLE.append_row(files / f"{name}.csv", make_row(contender, 10.0 + place))

    def copy(name, source, target):
        return Step(name, "", lambda place: ["cp", str(files / source), str(place.folder / target)], 30, 0)

    steps = [copy(TUNE, TABLE, TABLE), copy("a", "a.csv", "moe_ffn_cuda.csv"), copy("b", "b.csv", "moe_ffn_cuda.csv")]
    state = State(tmp_path / "state", "abc1234")
    state.copy_source_tree()
    output = PackedOutput(tmp_path / "output", state, [step.name for step in steps], "abc1234")
    GPURun(state, output, time.monotonic() + 60 + RESERVE_SECONDS, "abc1234", quick=True).run_steps(steps)
    # The tree that runs has the tuned table, and its own keeps the shipped one.
    assert TUNED in tile_rows.read_rows(state.tree / "mtu_kernels" / "triton" / TABLE)
    assert TUNED not in tile_rows.read_rows(tune.SHIPPED)
    state.release()
    return tmp_path / "output"


def contents(places):
    files = (
        [places.table_file, *places.results_folder.glob("*")] if places.results_folder.exists() else [places.table_file]
    )
    return {file: file.read_text() for file in files}


def test_rows_and_tiles_come_to_their_places_once(returned, places):
    file = places.results_folder / "moe_ffn_cuda.csv"
    ROWS_TABLE.append_row(file, make_row("loop", 99.0))
    assert place_results(returned, places)[-1] == f"3 rows into {file}, 0 were there"
    assert [row.contender for row in ROWS_TABLE.read_rows(file)] == ["loop", "products", "eager", "mtu-triton"]
    table = tile_rows.read_rows(places.table_file)
    assert TUNED in table
    # Other widths, products and architectures stay; the earlier choice for this width is gone.
    same = {row for row in ROWS if row.key._replace(tokens=0) == KEY}
    assert set(table) == (set(ROWS) - same) | {TUNED}
    before = contents(places)
    assert place_results(returned, places)[-1] == f"0 rows into {file}, 3 were there"
    assert contents(places) == before


def test_tiles_of_a_width_that_was_cut_off_leave_its_other_rows(returned, places):
    only = TUNED._replace(key=KEY._replace(tokens=2048))
    with zipfile.ZipFile(returned / RESULTS, "w") as archive:
        archive.writestr(f"tune/{TABLE}", tile_rows.render_rows([only]))
    place_results(returned, places)
    assert set(tile_rows.read_rows(places.table_file)) == {row for row in ROWS if row.key != only.key} | {only}


def _without_facts(folder):
    (folder / FACTS).unlink()


def _of_something_else(folder):
    (folder / FACTS).write_text(json.dumps({"run": "other"}))


def _cut_off(folder):
    (folder / RESULTS).write_bytes((folder / RESULTS).read_bytes()[:-100])


def _of_a_smoke_test(folder):
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps(facts | {"quick": True}))


def _with_rows_of_a_smoke_test(folder):
    row = make_row("eager", 10.0)
    row = dataclasses.replace(
        row, source=row.source | {"command": "python -m benchmarks.ffn.moe_ffn --quick --seconds 0"}
    )
    ROWS_TABLE.append_row(folder / "quick.csv", row)
    with zipfile.ZipFile(folder / RESULTS, "a") as archive:
        archive.write(folder / "quick.csv", "c/moe_ffn_cuda.csv")


def _with_other_columns(folder):
    with zipfile.ZipFile(folder / RESULTS, "a") as archive:
        archive.writestr("c/moe_ffn_cuda.csv", "model,time\nx,1\n")


def _with_a_broken_table(folder):
    with zipfile.ZipFile(folder / RESULTS, "a") as archive:
        archive.writestr(f"again/{TABLE}", "ROWS = (")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without_facts, "No such file"),
        (_of_something_else, "summary.json is of 'other'"),
        (_of_a_smoke_test, "the run was a smoke test of tiny models"),
        (_with_rows_of_a_smoke_test, "rows of moe_ffn_cuda.csv in the step c are of a smoke test"),
        (_cut_off, "File is not a zip file"),
        (_with_other_columns, "the rows of moe_ffn_cuda.csv have other columns in the step c"),
        (_with_a_broken_table, "was never closed"),
    ],
)
def test_a_folder_that_is_no_result_is_refused_before_anything_changes(spoil, reason, returned, places):
    spoil(returned)
    before = contents(places)
    with pytest.raises(ValueError, match="--collect must be the output folder of a run, got ") as error:
        place_results(returned, places)
    assert reason in str(error.value)
    assert str(error.value).count("\n") == 0
    assert contents(places) == before


def test_a_file_of_older_columns_is_refused_before_anything_changes(returned, places):
    places.results_folder.mkdir()
    (places.results_folder / "moe_ffn_cuda.csv").write_text("model\n")
    before = contents(places)
    with pytest.raises(ValueError, match="must have the columns"):
        place_results(returned, places)
    assert contents(places) == before


def test_the_command_draws_and_writes_the_page_anew(returned, monkeypatch, capsys):
    called = []
    monkeypatch.setattr("benchmarks.gpu.collect.place_results", lambda folder: [f"rows of {folder}"])
    monkeypatch.setattr(plot, "main", lambda argv: called.append("plot"))
    monkeypatch.setattr("benchmarks.pages.page.main", lambda argv: called.append("page") or 0)
    assert gpu_run.main(["--collect", str(returned)]) == 0
    assert called == ["plot", "page"]
    assert capsys.readouterr().out == f"rows of {returned}\n"


def test_the_command_refuses_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_run.main(["--collect", str(tmp_path)])
    assert f"error: --collect must be the output folder of a run, got {tmp_path}: " in capsys.readouterr().err
