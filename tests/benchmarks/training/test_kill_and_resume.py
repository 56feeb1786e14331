"""The command that ends trainings early: its rows and its exit code. The trainings are in tests/mtu/training."""

import csv

import pytest

from benchmarks.training import kill_and_resume
from benchmarks.training.kill_and_resume import COLUMNS, ENDINGS, Outcome
from benchmarks.training.kill_cases import Digests

WHOLE = Digests("a" * 12, "b" * 12, "c" * 12, "d" * 12)


@pytest.mark.parametrize(("left", "unequal"), [(WHOLE, 0), (WHOLE._replace(optimizer="e" * 12, log="f" * 12), 2)])
def test_rows_tell_how_many_digests_differ(tmp_path, monkeypatch, capsys, left, unequal):
    monkeypatch.setattr(kill_and_resume, "run_unbroken", lambda *arguments: WHOLE)
    monkeypatch.setattr(kill_and_resume, "run_interrupted", lambda *arguments: Outcome((3, 7), (2, 6), left))
    output = tmp_path / "kill.csv"
    assert kill_and_resume.main(["--cases", "cached,two processes", "--output", str(output)]) == bool(unequal)
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["ending"]) for row in rows] == [
        (case, ending) for case in ("cached", "two processes") for ending in ENDINGS
    ]
    assert tuple(rows[0])[: len(COLUMNS)] == COLUMNS
    assert {row["unequal"] for row in rows} == {str(unequal)}
    assert (rows[0]["ended_at"], rows[0]["resumed_from"], rows[0]["cache"]) == ("3 7", "2 6", "disk")
    assert f"{len(rows) if unequal else 0} resumed trainings differ" in capsys.readouterr().out
