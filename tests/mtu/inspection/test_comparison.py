"""`mtu inspect`: the paper's figures, folders, errors, and the sweep against models that are really built."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mtu
from mtu.cli import main
from mtu.inspection import Comparison, compare, format_comparison, sweep

from ..tiny import SD, SDXL, inputs, stock_unet, upcycled_unet


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def published(request) -> Comparison:
    return compare(request.param)


def table(text: str) -> dict[str, list[str]]:
    """The cells of each printed line after its label, numbers joined with their units."""
    found = {}
    for line in text.splitlines():
        label, *cells = re.split(r"\s{2,}", line.strip())
        if cells:
            found.setdefault(label, cells)
    return found


def counted_flops(unet: torch.nn.Module, given: dict) -> int:
    # The CPU's fused attention has no FLOP formula in PyTorch; the plain one is two batched products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(**given)
    return counter.get_total_flops()


def save_pipeline_folder(folder: Path, unet) -> Path:
    """What of a pipeline `inspect` looks at, with a VAE of factor 2."""
    unet.save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    vae.save_config(folder / "vae")
    return folder


# ---------------------------------------------------------------------------------------------- the paper's figures


def test_paper_figures_are_printed(published):
    # DESIGN §9; of the trained ones it gives 158 M and 1.5 B. Columns: original, upcycled, ratio, dropped, ratio.
    expected = {
        "sd15": {
            "parameters": ["859.5 M", "869.2 M", "1.011", "859.7 M", "1.000"],
            "trained parameters": ["-", "158.5 M", "-", "149.0 M", "-"],
            "FFN blocks": ["16", "16", "1.000", "16", "1.000"],
            "FLOPs, text-to-image, 4 channels": ["0.677 T", "0.677 T", "1.000", "0.677 T", "1.000"],
            "with attention products": ["0.803 T", "0.803 T", "1.000", "0.803 T", "1.000"],
            "FLOPs, widest task, 8 channels": ["0.677 T", "0.677 T", "1.000", "0.677 T", "1.000"],
        },
        "sdxl": {
            "parameters": ["2.567 B", "2.862 B", "1.115", "2.568 B", "1.000"],
            "trained parameters": ["-", "1.524 B", "-", "1.230 B", "-"],
            "FFN blocks": ["70", "70", "1.000", "70", "1.000"],
            "FLOPs, text-to-image, 4 channels": ["1.534 T", "1.534 T", "1.000", "1.534 T", "1.000"],
            "with attention products": ["1.589 T", "1.589 T", "1.000", "1.589 T", "1.000"],
            "FLOPs, widest task, 8 channels": ["1.534 T", "1.534 T", "1.000", "1.534 T", "1.000"],
        },
    }[published.name]
    printed = table(format_comparison(published))
    assert {label: printed[label] for label in expected} == expected


def test_without_routers_parameters_are_within_a_thousandth(published):
    rows = {row.key: row for row in published.rows}
    assert 1 < rows["parameters"].ratio_routers_dropped < 1.001


def test_routers_are_counted_apart_and_once_per_call(published):
    # Per layer and task, a W×W and a W×N product, a multiply-add being two.
    rows, config = {row.key: row for row in published.rows}, published.config
    per_task = 2 * config.router_width * (config.router_width + config.num_experts)
    expected = len(published.tasks) * rows["ffn_blocks"].upcycled * per_task
    assert rows["flops_routers_per_call"].upcycled == expected
    assert rows["flops_routers_per_call"].routers_dropped == 0


def test_text_names_the_convention_and_the_tasks(published):
    text = format_comparison(published)
    assert "A multiply-add counts as two." in text
    assert "512 x 512 (latents 64 x 64), batch 1, 77 text tokens" in text
    assert "text-to-image, edit, super-resolution, remove" in text


# ---------------------------------------------------------------------------- counts against a model that is really run


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (SD, {"num_experts": 4}),
        (SD, {"num_experts": 4, "norm": "task_expert"}),
        (SDXL, {"num_experts": 4, "top_k": 2}),
        (SDXL, {"num_experts": 2, "top_k": 1, "expert_ratio": 1.0, "norm": "task_expert"}),
    ],
    ids=["dense", "task_expert", "top_k", "top_k_task_expert"],
)
def test_counts_are_those_of_the_model_itself(config, layout):
    stock, upcycled = stock_unet(config), upcycled_unet(config, **layout)
    given = inputs(stock, batch=1, channels=4)
    given["sample"] = torch.zeros(1, 4, 8, 8)
    given["encoder_hidden_states"] = torch.zeros(1, 77, 16)
    wide = {**given, "sample": torch.zeros(1, 8, 8, 8)}

    rows = {row.key: row for row in compare(stock, **layout, size=64).rows}
    assert rows["parameters"].original == sum(p.numel() for p in stock.parameters())
    assert rows["parameters"].upcycled == sum(p.numel() for p in upcycled.parameters())
    assert rows["trained_parameters"].upcycled == sum(p.numel() for p in upcycled.parameters() if p.requires_grad)
    assert rows["ffn_blocks"].upcycled == len(upcycled.routed_layers())
    assert rows["flops_with_attention"].original == counted_flops(stock, given)
    upcycled.drop_routers_()
    # The tables that are left are constants.
    left = [p for name, p in upcycled.named_parameters() if ".ff.router." not in name]
    assert rows["parameters"].routers_dropped == sum(p.numel() for p in left)
    assert rows["flops_with_attention"].upcycled == counted_flops(upcycled, given)
    assert rows["flops_widest_task_with_attention"].upcycled == counted_flops(upcycled, wide)


def test_attention_products_are_what_their_formula_says():
    # Per attention, with S queries and S' keys of width D: Q Kᵀ and its product with V, 2·2·S·S'·D.
    unet = stock_unet(SD)
    rows = {row.key: row for row in compare(unet, size=64).rows}
    tokens = {32: 8 * 8, 64: 4 * 4}  # by width: the 8×8 latents, and the middle block's 4×4
    widths = [module.to_q.in_features for name, module in unet.named_modules() if name.endswith("attn1")]
    assert rows["ffn_blocks"].original == len(widths)
    # Self-attention has S' = S, cross-attention the 77 tokens of the text.
    expected = sum(4 * tokens[width] * (tokens[width] + 77) * width for width in widths)
    assert rows["flops_with_attention"].original - rows["flops"].original == expected


def test_top_k_costs_the_active_experts_only():
    unet = stock_unet(SD)
    flops = [
        {row.key: row for row in compare(unet, 4, top_k=top_k, size=64).rows}["flops"].upcycled for top_k in (1, 2, 4)
    ]
    assert flops[0] < flops[1] < flops[2]
    # Each expert costs the same.
    assert flops[2] - flops[1] == 2 * (flops[1] - flops[0])


def test_inspecting_a_unet_leaves_it_alone():
    unet = upcycled_unet(SD)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    compare(unet, size=64)
    after = unet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert unet.task_embedding is not None


# ---------------------------------------------------------------------------------------------------------- folders


def test_folder_of_a_unet_and_of_a_pipeline(tmp_path):
    unet = stock_unet(SD)
    unet.save_pretrained(tmp_path / "alone")
    save_pipeline_folder(tmp_path / "pipeline", unet)
    own = compare(unet, size=64).rows
    assert compare(tmp_path / "alone", size=64).rows == own
    # The pipeline's VAE halves the picture once: 16 pixels are the 8×8 latents that 64 are at the usual factor.
    piped = compare(str(tmp_path / "pipeline"), size=16)
    assert piped.latent_size == 8
    assert piped.rows == own


@pytest.mark.parametrize("drop_routers", [False, True], ids=["routers", "dropped"])
def test_folder_of_an_upcycled_unet_is_compared_with_its_stock_configuration(tmp_path, drop_routers):
    layout = {"num_experts": 2, "expert_ratio": 1.0, "norm": "task_expert"}
    tasks = ["text-to-image", mtu.TaskSpec("inpaint", condition_channels=5)]
    upcycled = upcycled_unet(SD, tasks=tasks, **layout)
    with_routers = sum(p.numel() for p in upcycled.parameters())
    if drop_routers:
        upcycled.drop_routers_()
    upcycled.save_pretrained(tmp_path / "unet")
    result = compare(tmp_path, size=64)
    rows = {row.key: row for row in result.rows}
    assert [task.name for task in result.tasks] == ["text-to-image", "inpaint"]
    assert rows["parameters"].original == sum(p.numel() for p in stock_unet(SD).parameters())
    assert rows["parameters"].upcycled == with_routers
    assert "widest task, 9 channels" in format_comparison(result)
    swept = {(row.num_experts, row.expert_ratio, row.top_k): row for row in sweep(tmp_path, "9x", size=64).layouts}
    assert swept[2, 1, None].parameters_with_routers == with_routers


def test_weights_are_not_needed(tmp_path):
    stock_unet(SD).save_config(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert main(["inspect", str(tmp_path), "--size", "64"]) == 0


# ------------------------------------------------------------------------------------------------------ command line


def test_json_holds_the_rows(capsys, tmp_path):
    stock_unet(SD).save_config(tmp_path)
    assert (
        main(["inspect", str(tmp_path), "--size", "64", "--num-experts", "2", "--expert-ratio", "1/4", "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert (result["num_experts"], result["expert_ratio"], result["preserved"]) == (2, 0.25, False)
    assert "drops hidden units" in result["why_not_preserved"]
    rows = {row["key"]: row for row in result["rows"]}
    assert rows["parameters"]["ratio"] == rows["parameters"]["upcycled"] / rows["parameters"]["original"]
    assert rows["flops"]["ratio"] < 1


def test_text_says_why_the_output_is_not_preserved(capsys, tmp_path):
    stock_unet(SD).save_config(tmp_path)
    assert main(["inspect", str(tmp_path), "--size", "64", "--top-k", "2"]) == 0
    captured = capsys.readouterr()
    assert "preserved at initialisation: no, top_k = 2 of 4 experts" in captured.out
    assert captured.err == ""


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
def test_folders_that_are_no_unets(capsys, tmp_path, kind, message):
    broken_folder(tmp_path, kind)
    assert_refused(capsys, [str(tmp_path)], message)


def assert_refused(capsys, arguments: list[str], message: str) -> None:
    """Raise unless `mtu inspect` with these arguments exits with 2 and one sentence on stderr that has `message`."""
    assert main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("mtu inspect: error: ")
    assert captured.err.endswith(".\n")
    assert captured.err.count("\n") == 1


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
        (["--sweep"], "--sweep needs a --budget"),
        (["--budget", "860M"], "--budget goes with --sweep."),
        (["--sweep", "--budget", "1B", "--top-k", "2"], "--sweep tries all layouts: expected no --top-k."),
        (["--sweep", "--budget", "many"], "such as 860M, 1.2B or 1.05x, but got 'many'."),
        (["--sweep", "--budget", "0M"], "such as 860M, 1.2B or 1.05x, but got '0M'."),
        (["--sweep", "--budget", "-1x"], "such as 860M, 1.2B or 1.05x, but got '-1x'."),
        (
            ["--sweep", "--budget", "500M"],
            "No layout fits into 500.0 M parameters: the smallest is N = 1 G = 1/4 (748.1 M)",
        ),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    # `--budget -1x` would be read as an option.
    assert_refused(capsys, " ".join(arguments).replace("--budget ", "--budget=").split(), message)


def test_layout_of_an_upcycled_model_cannot_be_changed(capsys, tmp_path):
    upcycled_unet(SD).save_config(tmp_path)
    assert_refused(capsys, [str(tmp_path), "--top-k", "1"], "its layout is fixed: expected no top_k.")


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["inspect", "--top-k", "two"], ["inspect", "--expert-ratio", "1/0"]]
)
def test_command_lines_that_do_not_parse_exit_with_2(arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2


# ------------------------------------------------------------------------------------------------------------- sweep


@pytest.mark.parametrize("norm", ["task", "task_expert"])
def test_swept_numbers_are_those_of_comparisons(norm):
    stock = stock_unet(SD)
    result = sweep(stock, "9x", norm=norm, size=64)
    assert len(result.layouts) == 26
    picked = result.layouts[5::6]
    assert any(layout.top_k for layout in picked)
    assert any(layout.top_k is None for layout in picked)
    for layout in picked:
        one = compare(
            stock,
            layout.num_experts,
            top_k=layout.top_k,
            expert_ratio=float(layout.expert_ratio),
            norm=norm,
            size=64,
        )
        rows = {row.key: row for row in one.rows}
        assert layout.parameters == rows["parameters"].routers_dropped, layout
        assert layout.parameters_with_routers == rows["parameters"].upcycled, layout
        assert layout.trained_parameters == rows["trained_parameters"].upcycled, layout
        assert layout.flops == rows["flops"].upcycled, layout
        assert layout.flops_with_attention == rows["flops_with_attention"].upcycled, layout
        assert layout.preserved == (one.config.why_not_preserved() is None), layout


def test_sweep_lists_every_layout_once_with_its_step():
    layouts = sweep(stock_unet(SD), "1.05x", size=64).layouts
    dense = {layout.num_experts: [] for layout in layouts}
    for layout in layouts:
        if layout.top_k is None:
            dense[layout.num_experts].append((str(layout.expert_ratio), layout.step))
        else:
            assert layout.top_k * layout.expert_ratio == 1
            assert layout.idle_experts == max(0, layout.num_experts - 4 * layout.top_k)  # of four tasks
    assert all(layout.idle_experts == 0 for layout in layouts if layout.top_k is None)
    top_1 = {layout.num_experts: layout.step for layout in layouts if layout.top_k == 1}
    assert top_1 == {2: 3, 4: 3, 8: None, 16: None}  # what four tasks cannot use is not recommended
    assert dense == {
        1: [("1/4", None), ("1/2", None), ("1", 1)],
        2: [("1/4", None), ("1/2", 2), ("1", 3)],
        4: [("1/4", 2), ("1/2", 2), ("1", 3)],
        8: [("1/8", 2), ("1/4", 2), ("1/2", 2), ("1", 3)],
        16: [("1/16", 2), ("1/4", 2), ("1/2", 2), ("1", 3)],
    }
    assert len({layout[:3] for layout in layouts}) == len(layouts)


def test_numbers_of_experts_that_do_not_divide_the_ffn_are_left_out():
    # Widths 6 and 12, hence 24 and 48 hidden units: 16 does not divide 24.
    stock = stock_unet(SD, block_out_channels=(6, 12), norm_num_groups=2, attention_head_dim=2)
    assert {layout.num_experts for layout in sweep(stock, "9x", size=64).layouts} == {1, 2, 4, 8}


def test_sweep_filters_by_budget(capsys):
    assert main(["inspect", "--sweep", "--budget", "1.01B"]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if re.match(r"\s*\d+\s+1", line)]
    # 859.7 M for E·G = 1; one full-size expert more is 148.6 M more.
    assert {row[3] for row in rows} == {"748.1", "785.3", "859.7", "1.008"}
    assert "12 more layouts go beyond the budget, from N = 4 G = 1" in text
    assert "N = 2 G = 1 (1.008 B)" in text.splitlines()[-1]


def test_sweep_prints_json(capsys, tmp_path):
    stock_unet(SD).save_config(tmp_path)
    assert main(["inspect", str(tmp_path), "--size", "64", "--sweep", "--budget", "1.05x", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["budget"] == int(1.05 * result["original_parameters"])
    assert "one expert: N = 1 G = 1 (" in result["recipe"][0]
    assert "smaller experts: N = 2 G = 1/2 (" in result["recipe"][1]
    assert "nothing fits; the smallest is N = 2 G = 1 (" in result["recipe"][2]
    for layout in result["layouts"]:
        assert layout["within_budget"] == (layout["parameters"] <= result["budget"])
        assert layout["ratio"] == layout["parameters"] / result["original_parameters"]
