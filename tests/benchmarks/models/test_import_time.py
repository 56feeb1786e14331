"""Import times: the command on statements that take no time, its rows, its report."""

import csv
import dataclasses

import pytest

from benchmarks.harness.provenance import collect_provenance
from benchmarks.harness.rows import Row
from benchmarks.models import import_time
from benchmarks.models.import_time import PAIRS, TABLE, StatementPair

SWIFT = (StatementPair("swift", "import math", "import json", 1.1), StatementPair("other", "pass", "import this", None))


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_from_start_to_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(import_time, "PAIRS", SWIFT)
    output = tmp_path / "rows" / "import_time.csv"
    arguments = ["--rounds", "2", "--output", str(output)]
    assert import_time.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"4 rows added to {output}" in out
    assert "swift: import math 0." in out
    assert "(at most 1.10" in out
    rows, source = read(output), collect_provenance(f"python -m benchmarks.models.import_time {' '.join(arguments)}")
    assert tuple(rows[0]) == (*TABLE.columns, *source)
    statements = ["import math", "import json", "pass", "import this"]
    assert [row["statement"] for row in rows] == statements
    for row in rows:
        assert 0 < int(row["p20_us"]) <= int(row["median_us"]) <= int(row["p80_us"])
        assert row["rounds"] == "2"
        assert {name: row[name] for name in source} == source

    assert import_time.main(arguments) == 0
    rows = read(output)
    assert [row["statement"] for row in rows] == statements * 2
    assert len({row["group"] for row in rows}) == 2


def test_the_report_divides_within_a_pair():
    times = {pair: (0.5e6 * (number + 1), 2e6) for number, pair in enumerate(PAIRS)}
    rows = [
        Row(part=pair.part, contender=statement, median_us=time, source={})
        for pair, both in times.items()
        for statement, time in zip((pair.ours, pair.theirs), both, strict=True)
    ]
    theirs = "import torch; import diffusers"
    assert import_time.report_lines(rows) == [
        f"import: import mtu 0.50 s / {theirs} 2.00 s = 0.250 (at most 1.10)",
        f"first use: from mtu import * 1.00 s / {theirs}; diffusers.StableDiffusionPipeline 2.00 s = 0.500 "
        "(at most 1.10)",
        "kernels: import mtu_kernels 1.50 s / import torch 2.00 s = 0.750",
    ]
    slow = [dataclasses.replace(row, median_us=2.3e6) if row.contender == "import mtu" else row for row in rows]
    assert import_time.report_lines(slow)[0].endswith("= 1.150 (at most 1.10, missed)")


def test_a_statement_that_fails_ends_the_run_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(import_time, "PAIRS", (StatementPair("broken", "import math", "import no_such_module", None),))
    output = tmp_path / "rows.csv"
    words = r"'import no_such_module' ended with 1: ModuleNotFoundError: No module named 'no_such_module'"
    with pytest.raises(RuntimeError, match=words):
        import_time.main(["--output", str(output)])
    assert not output.exists()


@pytest.mark.parametrize("rounds", ["1", "few"])
def test_wrong_arguments(rounds, capsys):
    with pytest.raises(SystemExit, match="2"):
        import_time.main(["--rounds", rounds])
    assert f"expected a whole number from 2 on, got {rounds!r}." in capsys.readouterr().err


def test_a_file_of_other_columns_is_refused_before_anything_is_measured(tmp_path, capsys):
    output = tmp_path / "rows.csv"
    output.write_text("model\n")
    with pytest.raises(SystemExit, match="2"):
        import_time.main(["--output", str(output)])
    assert "must have the columns" in capsys.readouterr().err
    assert output.read_text() == "model\n"
