"""What inspection counts: the paper's figures, folders, and the sweep against models that are really built."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mtu
from mtu.inspection import Comparison, compare_with_original, sweep_layouts

from ..tiny import SD, SDXL, inputs, stock_unet, upcycled_unet


@pytest.fixture(scope="module", params=["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def published(request) -> Comparison:
    return compare_with_original(request.param)


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


@pytest.mark.slow
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
    }[published.model_name]
    printed = table(str(published.report()))
    assert {label: printed[label] for label in expected} == expected


def test_without_routers_parameters_are_within_a_thousandth(published):
    rows = {row.key: row for row in published.quantities}
    assert 1 < rows["parameters"].ratio_without_routers < 1.001


def test_routers_are_counted_apart_and_once_per_call(published):
    # Per layer and task, a W×W and a W×N product, a multiply-add being two.
    rows, config = {row.key: row for row in published.quantities}, published.expert_config
    per_task = 2 * config.router_width * (config.router_width + config.num_experts)
    expected = len(published.tasks) * rows["ffn_blocks"].upcycled * per_task
    assert rows["flops_routers_per_call"].upcycled == expected
    assert rows["flops_routers_per_call"].upcycled_without_routers == 0


def test_text_names_the_convention_and_the_tasks(published):
    text = str(published.report())
    assert "A multiply-add counts as two." in text
    assert "512 x 512 (latents 64 x 64), batch 1, 77 text tokens" in text
    assert "text-to-image, edit, super-resolution, remove" in text


# ---------------------------------------------------------------------------- counts against a model that is really run


@pytest.mark.slow
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

    rows = {row.key: row for row in compare_with_original(stock, **layout, size=64).quantities}
    assert rows["parameters"].original == sum(p.numel() for p in stock.parameters())
    assert rows["parameters"].upcycled == sum(p.numel() for p in upcycled.parameters())
    assert rows["trained_parameters"].upcycled == sum(p.numel() for p in upcycled.parameters() if p.requires_grad)
    assert rows["ffn_blocks"].upcycled == len(upcycled.routed_feed_forwards())
    assert rows["flops_with_attention"].original == counted_flops(stock, given)
    upcycled.drop_routers_()
    # The tables that are left are constants.
    left = [p for name, p in upcycled.named_parameters() if ".ff.router." not in name]
    assert rows["parameters"].upcycled_without_routers == sum(p.numel() for p in left)
    assert rows["flops_with_attention"].upcycled == counted_flops(upcycled, given)
    assert rows["flops_widest_task_with_attention"].upcycled == counted_flops(upcycled, wide)


@pytest.mark.slow
def test_attention_products_are_what_their_formula_says():
    # Per attention, with S queries and S' keys of width D: Q Kᵀ and its product with V, 2·2·S·S'·D.
    unet = stock_unet(SD)
    rows = {row.key: row for row in compare_with_original(unet, size=64).quantities}
    tokens = {32: 8 * 8, 64: 4 * 4}  # by width: the 8×8 latents, and the middle block's 4×4
    widths = [module.to_q.in_features for name, module in unet.named_modules() if name.endswith("attn1")]
    assert rows["ffn_blocks"].original == len(widths)
    # Self-attention has S' = S, cross-attention the 77 tokens of the text.
    expected = sum(4 * tokens[width] * (tokens[width] + 77) * width for width in widths)
    assert rows["flops_with_attention"].original - rows["flops"].original == expected


@pytest.mark.slow
def test_top_k_costs_the_active_experts_only():
    unet = stock_unet(SD)
    flops = [
        {row.key: row for row in compare_with_original(unet, 4, top_k=top_k, size=64).quantities}["flops"].upcycled
        for top_k in (1, 2, 4)
    ]
    assert flops[0] < flops[1] < flops[2]
    # Each expert costs the same.
    assert flops[2] - flops[1] == 2 * (flops[1] - flops[0])


def test_inspecting_a_unet_leaves_it_alone():
    unet = upcycled_unet(SD)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    compare_with_original(unet, size=64)
    after = unet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert unet.task_embedding is not None


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.mark.slow
def test_folder_of_a_unet_and_of_a_pipeline(tmp_path):
    unet = stock_unet(SD)
    unet.save_pretrained(tmp_path / "alone")
    save_pipeline_folder(tmp_path / "pipeline", unet)
    own = compare_with_original(unet, size=64).quantities
    assert compare_with_original(tmp_path / "alone", size=64).quantities == own
    # The pipeline's VAE halves the picture once: 16 pixels are the 8×8 latents that 64 are at the usual factor.
    piped = compare_with_original(str(tmp_path / "pipeline"), size=16)
    assert piped.latent_size == 8
    assert piped.quantities == own


@pytest.mark.slow
@pytest.mark.parametrize("drop_routers", [False, True], ids=["routers", "dropped"])
def test_folder_of_an_upcycled_unet_is_compared_with_its_stock_configuration(tmp_path, drop_routers):
    layout = {"num_experts": 2, "expert_ratio": 1.0, "norm": "task_expert"}
    tasks = ["text-to-image", mtu.TaskSpec("inpaint", condition_channels=5)]
    upcycled = upcycled_unet(SD, tasks=tasks, **layout)
    with_routers = sum(p.numel() for p in upcycled.parameters())
    if drop_routers:
        upcycled.drop_routers_()
    upcycled.save_pretrained(tmp_path / "unet")
    result = compare_with_original(tmp_path, size=64)
    rows = {row.key: row for row in result.quantities}
    assert [task.name for task in result.tasks] == ["text-to-image", "inpaint"]
    assert rows["parameters"].original == sum(p.numel() for p in stock_unet(SD).parameters())
    assert rows["parameters"].upcycled == with_routers
    assert "widest task, 9 channels" in str(result.report())
    swept = {
        (row.num_experts, row.expert_ratio, row.top_k): row for row in sweep_layouts(tmp_path, "9x", size=64).layouts
    }
    assert swept[2, 1, None].parameters_with_routers == with_routers


# ------------------------------------------------------------------------------------------------------------- sweep


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["task", "task_expert"])
def test_swept_numbers_are_those_of_comparisons(norm):
    stock = stock_unet(SD)
    result = sweep_layouts(stock, "9x", norm=norm, size=64)
    assert len(result.layouts) == 26
    picked = result.layouts[5::6]
    assert any(layout.top_k for layout in picked)
    assert any(layout.top_k is None for layout in picked)
    for layout in picked:
        one = compare_with_original(
            stock,
            layout.num_experts,
            top_k=layout.top_k,
            expert_ratio=float(layout.expert_ratio),
            norm=norm,
            size=64,
        )
        rows = {row.key: row for row in one.quantities}
        assert layout.parameters == rows["parameters"].upcycled_without_routers, layout
        assert layout.parameters_with_routers == rows["parameters"].upcycled, layout
        assert layout.trained_parameters == rows["trained_parameters"].upcycled, layout
        assert layout.flops == rows["flops"].upcycled, layout
        assert layout.flops_with_attention == rows["flops_with_attention"].upcycled, layout
        assert layout.preserves_output == (one.expert_config.why_output_not_preserved() is None), layout


def test_sweep_lists_every_layout_once_with_its_step():
    layouts = sweep_layouts(stock_unet(SD), "1.05x", size=64).layouts
    dense = {layout.num_experts: [] for layout in layouts}
    for layout in layouts:
        if layout.top_k is None:
            dense[layout.num_experts].append((str(layout.expert_ratio), layout.recipe_step))
        else:
            assert layout.top_k * layout.expert_ratio == 1
            assert layout.num_idle_experts == max(0, layout.num_experts - 4 * layout.top_k)  # of four tasks
    assert all(layout.num_idle_experts == 0 for layout in layouts if layout.top_k is None)
    top_1 = {layout.num_experts: layout.recipe_step for layout in layouts if layout.top_k == 1}
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
    assert {layout.num_experts for layout in sweep_layouts(stock, "9x", size=64).layouts} == {1, 2, 4, 8}
