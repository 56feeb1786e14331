"""The command that computes the memory of training steps: its rows, and the cards that they name."""

import csv

from benchmarks.training import memory


def test_rows_say_settings_bytes_and_card(tmp_path, capsys):
    path = tmp_path / "memory.csv"
    assert memory.main(["--quick", "--output", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1
    for row in rows:
        parts = [int(row[f"{part}_bytes"]) for part in ("weights", "gradients", "optimizer", "average", "activations")]
        assert int(row["peak_bytes"]) == sum(parts)
        assert int(row["card_gib"]) == memory.least_card(sum(parts))
        assert row["commit"]
    assert "state of SD 1.5: 2.536 GB" in capsys.readouterr().out


def test_a_card_keeps_its_margin():
    assert memory.least_card(0) == 8
    # 8 GiB are 8.59e9 bytes: a twentieth of the peak and a gigabyte stay free.
    assert memory.least_card(int(7.2e9)) == 8
    assert memory.least_card(int(7.3e9)) == 12
    assert memory.least_card(10**12) is None
