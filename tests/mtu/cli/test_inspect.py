"""`mtu inspect`: what it prints, and the sentence for each thing that it refuses."""

import json
import re
from pathlib import Path

import pytest

from mtu.inspection import sweep_layouts
from tests.mtu.tiny import SD, stock_unet, upcycled_unet

ANSI = "\x1b["


@pytest.mark.slow
def test_weights_are_not_needed(run_mtu, tmp_path):
    stock_unet(SD).save_config(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert run_mtu("inspect", str(tmp_path), "--size", "64").code == 0


@pytest.mark.slow
def test_json_holds_the_rows(run_mtu, tmp_path):
    stock_unet(SD).save_config(tmp_path)
    layout = ["--num-experts", "2", "--expert-ratio", "1/4"]
    ended = run_mtu("inspect", str(tmp_path), "--size", "64", *layout, "--json")
    assert ended.code == 0
    result = json.loads(ended.out)
    assert (result["num_experts"], result["expert_ratio"], result["preserved"]) == (2, 0.25, False)
    assert "drops hidden units" in result["why_not_preserved"]
    rows = {row["key"]: row for row in result["rows"]}
    assert rows["parameters"]["ratio"] == rows["parameters"]["upcycled"] / rows["parameters"]["original"]
    assert rows["flops"]["ratio"] < 1


@pytest.mark.slow
def test_text_says_why_the_output_is_not_preserved(run_mtu, tmp_path):
    stock_unet(SD).save_config(tmp_path)
    ended = run_mtu("inspect", str(tmp_path), "--size", "64", "--top-k", "2")
    assert ended.code == 0
    assert "preserved at initialisation: no, top_k = 2 of 4 experts" in ended.out
    assert ended.err == ""


def write_config(folder: Path, text: str, where: str = "config.json") -> None:
    path = folder / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def broken_folder(folder: Path, kind: str) -> None:
    if kind == "empty":
        return
    if kind == "corrupt":
        write_config(folder, '{"_class_name": "UNet2D', "unet/config.json")
    elif kind == "not utf-8":
        (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    elif kind == "list":
        write_config(folder, "[1, 2]")
    elif kind == "vae":
        write_config(folder, '{"_class_name": "AutoencoderKL"}')
    elif kind == "no class":
        write_config(folder, "{}")
    elif kind == "nonsense":
        write_config(folder, '{"_class_name": "UNet2DConditionModel", "block_out_channels": "wide"}')
    elif kind == "half upcycled":
        write_config(folder, '{"_class_name": "MTUUNet2DConditionModel", "tasks": ["edit"]}')
    elif kind == "no blocks":
        stock_unet(SD).save_config(folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        write_config(folder, json.dumps({**config, "mid_block_type": None}))
    elif kind == "class labels":
        stock_unet(SD, num_class_embeds=10).save_config(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "holds neither config.json nor unet/config.json"),
        ("corrupt", "config.json is not a JSON file: "),
        ("not utf-8", "config.json is not a JSON file: "),
        ("list", "must hold a JSON object, but holds a list"),
        ("vae", "describes a AutoencoderKL, but a UNet2DConditionModel or MTUUNet2DConditionModel is expected"),
        ("no class", "describes a None, but a UNet2DConditionModel or MTUUNet2DConditionModel is expected"),
        ("nonsense", "describes no UNet2DConditionModel: "),
        ("half upcycled", "describes no MTUUNet2DConditionModel: "),
        ("no blocks", "has no feed-forward networks to upcycle"),
        ("class labels", "but got num_class_embeds=10"),
    ],
)
def test_folders_that_are_no_unets(run_mtu, tmp_path, kind, message):
    broken_folder(tmp_path, kind)
    assert_refused(run_mtu, [str(tmp_path)], message)


def assert_refused(run_mtu, arguments: list[str], message: str) -> None:
    """Raise unless `mtu inspect` exits with 1 and writes one sentence on stderr that has `message`."""
    ended = run_mtu("inspect", *arguments)
    assert ended.code == 1
    assert ended.out == ""
    assert message in ended.err
    assert ended.err.startswith("mtu inspect: error: ")
    assert ended.err.endswith(".\n")
    assert ended.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such"], "There is no folder 'no/such': expected sd15, sdxl or the folder of a model."),
        (["--size", "0"], "size must be a positive multiple of 8, the pixels per latent, but got 0."),
        (["--size", "-8"], "size must be a positive multiple of 8"),
        (["--size", "100"], "size must be a positive multiple of 8"),
        (["--num-experts", "0"], "num_experts must be an integer ≥ 1, but got 0."),
        (["--num-experts", "3"], "num_experts must divide the hidden width of every FFN, but 3 does not divide"),
        (["--top-k", "5"], "top_k must be at most num_experts = 4, but got 5."),
        (["--top-k", "0"], "top_k must be an integer ≥ 1, but got 0."),
        (["--expert-ratio", "-1"], "expert_ratio must be a positive number, but got -1"),
        (["--expert-ratio", "0"], "expert_ratio must be a positive number, but got 0"),
        (["--expert-ratio", "1/7"], "expert_ratio times the hidden width must be a whole number ≥ 1"),
        (["--norm", "batch"], "norm must be 'task' or 'task_expert', but got 'batch'."),
        (["--sweep", "--budget", "many"], "such as 860M, 1.2B or 1.05x, but got 'many'."),
        (["--sweep", "--budget", "0M"], "such as 860M, 1.2B or 1.05x, but got '0M'."),
        (["--sweep", "--budget", "-1x"], "such as 860M, 1.2B or 1.05x, but got '-1x'."),
        (
            ["--sweep", "--budget", "500M"],
            "No layout fits into 500.0 M parameters: the smallest is N = 1 G = 1/4 (748.1 M)",
        ),
    ],
)
def test_bad_arguments(run_mtu, arguments, message):
    # `--budget -1x` would be read as an option.
    assert_refused(run_mtu, " ".join(arguments).replace("--budget ", "--budget=").split(), message)


def test_layout_of_an_upcycled_model_cannot_be_changed(run_mtu, tmp_path):
    upcycled_unet(SD).save_config(tmp_path)
    assert_refused(run_mtu, [str(tmp_path), "--top-k", "1"], "its layout is fixed: expected no top_k.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep"], "--sweep needs a --budget"),
        (["--budget", "860M"], "--budget goes with --sweep."),
        (["--sweep", "--budget", "1B", "--top-k", "2"], "--sweep tries all layouts: expected no --top-k."),
        (["--top-k", "two"], "Invalid value for '--top-k'"),
        (["--expert-ratio", "1/0"], "'--expert-ratio': expected a number such as 0.25 or 1/4, but got '1/0'."),
    ],
)
def test_command_lines_that_make_no_sense_exit_with_2(run_mtu, arguments, message):
    ended = run_mtu("inspect", *arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert message in " ".join(ended.err.replace("│", " ").split())


# ------------------------------------------------------------------------------------------------- pipe and terminal


@pytest.mark.slow
def test_a_pipe_gets_the_plain_report_whatever_the_width(run_mtu, monkeypatch, tmp_path):
    stock_unet(SD).save_config(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    ended = run_mtu("inspect", str(tmp_path), "--size", "64", "--sweep", "--budget", "2x")
    assert ended.out == f"{sweep_layouts(tmp_path, '2x', size=64).report()}\n"


@pytest.mark.slow
@pytest.mark.parametrize("swept", [False, True], ids=["comparison", "sweep"])
@pytest.mark.parametrize("columns", [200, 60])
def test_a_terminal_gets_the_same_cells_and_sentences(run_mtu, monkeypatch, tmp_path, swept, columns):
    stock_unet(SD).save_config(tmp_path)
    arguments = ["inspect", str(tmp_path), "--size", "64", *(["--sweep", "--budget", "2x"] if swept else [])]
    plain = run_mtu(*arguments).out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = run_mtu(*arguments).out
    assert ANSI in shown
    assert ANSI not in plain
    words = re.sub(r"\x1b\[[0-9;]*m|─", "", shown).split()
    assert words == plain.split()
    # Nothing wraps inside the cells of a table that fits, and a table that does not fit keeps its lines.
    table = plain.split("\n\n")[1].splitlines()
    if columns == 200:
        assert all(any(row.split() == line.split() for line in shown.splitlines()) for row in table[1:])
    else:
        assert all(row in shown for row in table)


# ------------------------------------------------------------------------------------------------------------- sweep


@pytest.mark.slow
def test_sweep_filters_by_budget(run_mtu):
    ended = run_mtu("inspect", "--sweep", "--budget", "1.01B")
    assert ended.code == 0
    text = ended.out
    rows = [line.split() for line in text.splitlines() if re.match(r"\s*\d+\s+1", line)]
    # 859.7 M for E·G = 1; one full-size expert more is 148.6 M more.
    assert {row[3] for row in rows} == {"748.1", "785.3", "859.7", "1.008"}
    assert "12 more layouts go beyond the budget, from N = 4 G = 1" in text
    assert "N = 2 G = 1 (1.008 B)" in text.splitlines()[-1]


@pytest.mark.slow
def test_sweep_prints_json(run_mtu, tmp_path):
    stock_unet(SD).save_config(tmp_path)
    ended = run_mtu("inspect", str(tmp_path), "--size", "64", "--sweep", "--budget", "1.05x", "--json")
    assert ended.code == 0
    result = json.loads(ended.out)
    assert result["budget"] == int(1.05 * result["original_parameters"])
    assert "one expert: N = 1 G = 1 (" in result["recipe"][0]
    assert "smaller experts: N = 2 G = 1/2 (" in result["recipe"][1]
    assert "nothing fits; the smallest is N = 2 G = 1 (" in result["recipe"][2]
    for layout in result["layouts"]:
        assert layout["within_budget"] == (layout["parameters"] <= result["budget"])
        assert layout["ratio"] == layout["parameters"] / result["original_parameters"]
