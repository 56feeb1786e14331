"""Whole images: the commands on a small model, contenders and their check, and PSNR beside that of stock pipelines."""

import csv
import json
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline

import mtu
from benchmarks.harness.correctness import WrongResult
from benchmarks.harness.provenance import collect_provenance
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import Workload
from benchmarks.pipelines import image_psnr, pipeline, pipeline_models, psnr_rows
from benchmarks.pipelines.image_psnr import ExecutionPath
from benchmarks.pipelines.pipeline_contenders import TABLE, comparison_lines
from benchmarks.pipelines.pipeline_models import check_images, copy_sharing_weights, draw_samples, stock_rows_per_sample
from benchmarks.pipelines.psnr_rows import STOCK, make_psnr_rows, psnr, squared_errors, standard_error, verdict
from mtu.recipes.icons.base_model import BaseModelConfig, build_untrained_pipeline, convert_to_float16_and_save
from mtu.recipes.icons.denoiser import DenoiserConfig
from mtu.recipes.icons.text_encoder import TextEncoderConfig
from mtu.recipes.icons.vae import VAEConfig
from mtu.tasks import EDIT, SD_TASKS, SUPER_RESOLUTION, TaskSpec

MINIATURE = BaseModelConfig(
    vae=VAEConfig(block_out_channels=(8, 8, 16), norm_num_groups=4),
    text_encoder=TextEncoderConfig(width=16, num_layers=1, num_heads=2),
    denoiser=DenoiserConfig(block_out_channels=(8, 16), heads=2, norm_num_groups=4),
)
NAMES = [spec.name for spec in SD_TASKS]
SOURCE = {"commit": "abc1234"}
WORKLOAD = Workload(model="m", size=64, B=4, steps=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stock pipeline, untrained."""
    path = tmp_path_factory.mktemp("pipelines") / "miniature"
    torch.manual_seed(0)
    convert_to_float16_and_save(build_untrained_pipeline(MINIATURE), path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    """The same upcycled, for tests that leave it as it is."""
    return pipeline_models.load_pipeline(folder)


@pytest.fixture(autouse=True)
def _one_checked_step(monkeypatch):
    monkeypatch.setattr(pipeline, "_CHECKED_STEPS", 1)


@pytest.fixture
def loaded(pipe, monkeypatch):
    """The commands get the pipeline that was loaded before: loading and upcycling take as long as the rest."""
    for module in (pipeline, image_psnr):
        monkeypatch.setattr(module, "load_pipeline", lambda folder: pipe)


@pytest.fixture
def no_compiler(monkeypatch):
    """Compiling takes seconds; the code around it is the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_quickly(module, folder, output, *arguments):
    arguments = ["--quick", "--device", "cpu", "--folder", str(folder), "--output", str(output), *arguments]
    return module.main(arguments), arguments


# ------------------------------------------------------------------------------------------------------ the command


@pytest.mark.slow
def test_a_run_from_start_to_report(folder, tmp_path, capsys):
    output = tmp_path / "pipeline_cpu.csv"
    status, arguments = run_quickly(pipeline, folder, output, "--steps", "1", "--contenders", "stock-each,mtu")
    assert status == 0
    out = capsys.readouterr().out
    assert f"2 rows added to {output}" in out
    assert "miniature 64x64 images=4 steps=1 bf16 " in out
    rows, source = read(output), collect_provenance(f"python -m benchmarks.pipelines.pipeline {' '.join(arguments)}")
    assert tuple(rows[0]) == (*TABLE.columns, *source)
    assert [(row["contender"], row["E"], row["tasks"]) for row in rows] == [
        ("stock-each", "1", "1"),
        ("mtu", "4", "4"),
    ]
    assert len({row["group"] for row in rows}) == 1
    for row in rows:
        assert 0 < int(row["p20_us"]) <= int(row["median_us"]) <= int(row["p80_us"])
        assert float(row["images_per_s"]) == pytest.approx(4e6 / int(row["median_us"]), rel=1e-3)
        assert (row["rounds"], row["warmup_s"], row["graph"]) == ("2", "", "0")
        assert int(row["peak_bytes"]) > 0
        assert {name: row[name] for name in source} == source
    stock, upcycled = (int(row["weight_bytes"]) for row in rows)
    assert stock > upcycled
    assert f"mtu: {int(rows[1]['median_us']) / int(rows[0]['median_us']):.3f} of stock-each" in out


@pytest.mark.slow
@pytest.mark.usefixtures("loaded", "no_compiler")
def test_compiled_contenders_are_warmed_up_and_graphs_refused_off_gpus(folder, tmp_path, capsys, caplog):
    output = tmp_path / "rows.csv"
    names = "stock-each+compile,mtu+compile,mtu-each+compile,mtu+graphs"
    assert run_quickly(pipeline, folder, output, "--contenders", names, "--steps", "1")[0] == 0
    rows = read(output)
    assert [row["contender"] for row in rows] == names.split(",")[:3]
    assert all(float(row["warmup_s"]) >= 0 and row["steps"] == "1" for row in rows)
    assert [(row["E"], row["tasks"]) for row in rows] == [("1", "1"), ("4", "4"), ("4", "1")]
    stock, upcycled, each = (int(row["weight_bytes"]) for row in rows)
    assert stock > upcycled == each
    printed = capsys.readouterr()
    assert "skipped mtu+graphs at miniature 64x64 images=4 steps=1 bf16: mode='reduce-overhead' needs" in printed.err
    assert "mtu+compile: " in printed.out
    assert " of stock-each+compile" in printed.out
    new_sizes = [record for record in caplog.records if record.name == "mtu"]
    assert not new_sizes, "the warm-up must know them all"


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_wrong_images_end_in_an_error(folder, tmp_path, capsys, monkeypatch):
    right = pipeline.make_stock_images
    monkeypatch.setattr(pipeline, "make_stock_images", lambda *given: 1 - right(*given))
    output = tmp_path / "rows.csv"
    assert run_quickly(pipeline, folder, output, "--contenders", "stock-each,mtu", "--steps", "1")[0] == 1
    failed = "FAILED, not timed: stock-each at miniature 64x64 images=4 steps=1 bf16 E=1 dense tasks=1: WrongResult: "
    assert failed in capsys.readouterr().err
    assert [row["contender"] for row in read(output)] == ["mtu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contenders", "mtu-cpp"], "unknown contender 'mtu-cpp': expected some of stock-each, mtu, mtu-each, "),
        (["--runs", "1"], "expected a whole number from 2 on, got '1'."),
        (["--steps", "0"], "expected a whole number from 1 on, got '0'."),
        (["--folder", "nowhere"], "nowhere must be a pipeline's folder in diffusers' layout, got no model_index.json"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_wrong_arguments(arguments, words, folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_quickly(pipeline, folder, tmp_path / "rows.csv", *arguments)
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("module", [pipeline, image_psnr], ids=["pipeline", "image_psnr"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_gpu_that_is_not_there(module, folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_quickly(module, folder, tmp_path / "rows.csv", "--device", "cuda")
    assert "--device cuda needs a CUDA device, and torch finds none." in capsys.readouterr().err


@pytest.mark.parametrize("module", [pipeline, image_psnr], ids=["pipeline", "image_psnr"])
def test_a_file_of_other_columns_is_refused_before_anything_is_loaded(module, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "load_pipeline", None)
    output = tmp_path / "rows.csv"
    output.write_text("model\n")
    with pytest.raises(SystemExit, match="2"):
        run_quickly(module, tmp_path, output)
    assert "must have the columns" in capsys.readouterr().err
    assert output.read_text() == "model\n"


# ------------------------------------------------------------------------------------------------- models and samples


def test_a_pipeline_of_another_kind(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"must hold one of StableDiffusionPipeline, MTUPipeline, got FluxPipeline\."):
        pipeline_models.load_pipeline(tmp_path)


@pytest.mark.slow
def test_tasks_that_are_equal_are_moved_apart_and_others_are_left_as_they_are(folder, pipe, tmp_path):
    again = pipeline_models.load_pipeline(folder)
    state = pipe.unet.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.unet.state_dict().items())
    stock = mtu.upcycle(StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32))
    changed = {name for name, tensor in stock.unet.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == {
        name
        for name in state
        if ".norm3." in name or name.endswith("router.linear_2.weight") or name == "conv_in.weight"
    }
    conv = state["conv_in.weight"]
    assert torch.equal(conv[:, :, :4], conv[:1, :, :4].expand(4, -1, -1, -1, -1))
    assert not conv[0, :, 4:].any()
    assert all(conv[task, :, 4:].any() for task in (1, 2, 3))

    with torch.no_grad():
        again.unet.conv_out.bias.add_(1)
    again.save_pretrained(tmp_path / "model")
    loaded = pipeline_models.load_pipeline(tmp_path / "model").unet.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in again.unet.state_dict().items())


@pytest.mark.slow
def test_each_task_makes_images_of_its_own(pipe):
    """With the weights of another task the same request gives another image."""
    samples = draw_samples(pipe, 1)
    edit = samples[1]
    for other in (SUPER_RESOLUTION.name, "remove"):
        index = pipe.unet.task_index(other)
        own = pipeline_models.make_upcycled_images(pipe, [edit], 2)
        pipe.unet.task_ids = lambda names, device=None, index=index: torch.full((len(names),), index)
        swapped = pipeline_models.make_upcycled_images(pipe, [edit], 2)
        del pipe.unet.task_ids
        assert (own - swapped).abs().max() > 1e-3
    turned = edit._replace(image=edit.image.flip(-1))
    assert (own - pipeline_models.make_upcycled_images(pipe, [turned], 2)).abs().max() > 1e-3


def test_samples_are_the_same_at_every_call_and_all_different(pipe):
    samples, again = draw_samples(pipe, 2), draw_samples(pipe, 2)
    assert [sample.spec.name for sample in samples] == NAMES * 2
    assert all(torch.equal(a.latents, b.latents) and a.prompt == b.prompt for a, b in zip(samples, again, strict=True))
    assert len({float(sample.latents.sum()) for sample in samples}) == 8
    assert [sample.image is None for sample in samples[:4]] == [True, False, False, False]
    assert [sample.prompt == "" for sample in samples[:4]] == [False, False, True, False]
    assert all(sample.image.shape == (3, 64, 64) for sample in samples if sample.image is not None)


def test_a_task_of_ones_own_is_asked_for_too(folder):
    stock = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    own = mtu.upcycle(stock, [TaskSpec("sketch", condition_channels=0), TaskSpec("colourise", guidance="text")])
    sketch, colourise = draw_samples(own, 1)
    assert sketch.image is None
    assert sketch.prompt
    assert colourise.image.shape == (3, 64, 64)


def test_steps_are_those_of_the_tasks_or_those_given():
    longer = TaskSpec("longer", num_inference_steps=50)
    assert pipeline_models.denoising_steps(SD_TASKS, None) == 20
    assert pipeline_models.denoising_steps((EDIT, longer), 7) == 7
    with pytest.raises(ValueError, match=r"--steps must be given for tasks of different .* steps, got \[20, 50\]"):
        pipeline_models.denoising_steps((EDIT, longer), None)


def test_rows_of_the_unets_batches():
    assert [stock_rows_per_sample(spec) for spec in SD_TASKS] == [2, 3, 1, 3]


def test_copies_share_weights_but_not_their_layout(pipe):
    copied = copy_sharing_weights(pipe)
    pairs = list(zip(pipe.unet.parameters(), copied.unet.parameters(), strict=True))
    assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert copied.vae is pipe.vae
    before = pipe.unet.conv_out.weight.stride()
    copied.unet.to(memory_format=torch.channels_last)
    assert pipe.unet.conv_out.weight.stride() == before


def test_wrong_results_are_not_timed():
    exact = torch.linspace(0, 1, 48).view(1, 3, 4, 4)
    user = (exact + 0.01).bfloat16()
    check_images((exact - 0.015).bfloat16(), user, exact)
    for images in ((exact + 0.04).bfloat16(), exact + 0.01, (exact * torch.nan).bfloat16()):
        with pytest.raises(WrongResult, match=r"the images must be torch.bfloat16 within .* of the exact ones, got"):
            check_images(images, user, exact)


def test_contenders_are_compared_with_the_stock_pipelines_run_in_the_same_way():
    times = {"stock-each": 8.0, "mtu": 6.0, "stock-each+compile": 4.0, "mtu+compile": 3.0}
    rows = [Row(contender=name, workload=WORKLOAD, median_us=time, source=SOURCE) for name, time in times.items()]
    assert comparison_lines(rows) == [
        "mtu: 0.750 of stock-each",
        "stock-each+compile: 0.500 of stock-each",
        "mtu+compile: 0.750 of stock-each+compile, 0.375 of stock-each",
    ]


# ---------------------------------------------------------------------------------------------------------- PSNR


@pytest.mark.slow
@pytest.mark.usefixtures("loaded", "no_compiler")
def test_a_run_of_all_paths_from_start_to_table(folder, tmp_path, capsys):
    output = tmp_path / "image_psnr_cpu.csv"
    arguments = ["--paths", "mtu-eager,mixed,compiled", "--samples", "1", "--steps", "1"]
    _, arguments = run_quickly(image_psnr, folder, output, *arguments)
    out = capsys.readouterr().out
    rows, source = read(output), collect_provenance(f"python -m benchmarks.pipelines.image_psnr {' '.join(arguments)}")
    assert tuple(rows[0]) == (*psnr_rows.TABLE.columns, *source)
    paths = [STOCK, "mtu-eager", "mixed", "compiled"]
    expected = [(path, task, "bf16") for path in paths for task in (*NAMES, "all")]
    expected += [(path, task, "fp32") for path in paths if path != "mtu-eager" for task in (*NAMES, "all")]
    assert [(row["path"], row["task"], row["dtype"]) for row in rows] == expected
    assert f"{len(expected)} rows added to {output}" in out
    for row in rows:
        assert row["images"] == ("4" if row["task"] == "all" else "1")
        assert (row["model"], row["size"], row["steps"], row["device"]) == ("miniature", "64", "1", "cpu")
        if row["dtype"] == "fp32":
            assert float(row["psnr_db"]) > float(row["allowed_db"]) == 60
        else:
            assert 20 < float(row["psnr_db"]) < 80


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_paths_that_cannot_run_are_skipped_and_wrong_ones_end_in_an_error(folder, tmp_path, capsys, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("Nothing of the kind runs here.")

    right = image_psnr.PATHS["mtu-eager"]
    paths = {"mtu-cpp": refuse, "mixed": lambda *given: 1 - right.implementation.make_images(*given)}
    for name, images in paths.items():
        monkeypatch.setitem(image_psnr.PATHS, name, right._replace(implementation=ExecutionPath(images)))
    output = tmp_path / "rows.csv"
    given = ["--samples", "1", "--steps", "1", "--dtypes", "fp32"]
    assert run_quickly(image_psnr, folder, output, *given, "--paths", "mtu-cpp")[0] == 0
    skipped = "skipped mtu-cpp at miniature 64x64 images=4 steps=1 fp32: Nothing of the kind runs here."
    assert skipped in capsys.readouterr().err
    assert run_quickly(image_psnr, folder, output, *given, "--paths", "mixed")[0] == 1
    assert capsys.readouterr().out.count("missed") == 5
    with pytest.raises(SystemExit, match="2"):
        run_quickly(image_psnr, folder, output, "--paths", "graphs")
    assert "on this device, got graphs." in capsys.readouterr().err


def test_psnr_of_squared_errors():
    assert psnr(torch.tensor([1e-4, 1e-3])).tolist() == pytest.approx([40, 30])
    assert psnr(torch.zeros(1)).tolist() == pytest.approx([200]), "equal images"
    images, exact = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    images[1] = 0.5
    assert squared_errors(images, exact).tolist() == [0, 0.25]


def test_the_standard_error_of_a_mean():
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)
    assert standard_error(torch.zeros(5)) == 0
    assert standard_error(torch.ones(1)) == math.inf, "one sample says nothing of chance"


def test_rows_are_compared_with_the_stock_pipelines_task_by_task():
    stock = torch.tensor([1e-4, 1e-3] * 8, dtype=torch.float64)
    # As far as a factor of two, but for the first sample of each task: it makes most of the pooled error.
    worse = 2 * stock
    worse[:2] *= 100
    workload = WORKLOAD._replace(B=16)
    errors = {STOCK: stock, "worse": worse, "better": stock / 2, "even": stock * torch.tensor([2, 2, 0.49, 0.49] * 4)}
    rows = {(row.contender, row.part): row for row in make_psnr_rows(errors, ["a", "b"], workload, "cpu", SOURCE)}
    assert [rows[STOCK, task].allowed_db for task in "ab"] == pytest.approx([40, 30])
    assert [rows["better", task].psnr_db for task in "ab"] == pytest.approx([43.01, 33.01], abs=0.01)
    assert rows["worse", "a"].psnr_db == pytest.approx(40 - 3.01 - 20 / 8, abs=0.01)
    assert rows["worse", "a"].pooled_db == pytest.approx(psnr(torch.tensor([2e-4 * 107 / 8])).item(), abs=0.01)
    assert rows["worse", "a"].error_db == pytest.approx(20 / 8, abs=0.01)
    verdicts = {path: verdict(rows[path, "a"]) for path in errors}
    assert verdicts == {STOCK: "met", "worse": "even", "better": "met", "even": "met"}
    assert verdict(rows["worse", "all"]) == "missed", "twice as many samples show it"
    assert rows["worse", "all"].workload.B == 16
    assert rows["worse", "a"].workload.B == 8
    single = make_psnr_rows(errors, ["a", "b"], workload._replace(dtype="fp32"), "cpu", SOURCE)
    assert {verdict(row) for row in single} == {"missed"}, "30 and 40 dB are no rounding of float32"


@pytest.mark.parametrize(
    ("psnr_db", "error_db", "expected"),
    [(40.0, 0.0, "met"), (39.2, 0.3, "even"), (39.0, 0.3, "missed"), (math.nan, 0.3, "missed")],
)
def test_verdicts(psnr_db, error_db, expected):
    figures = {"psnr_db": psnr_db, "allowed_db": 40.0, "error_db": error_db, "pooled_db": 39.0}
    row = Row(contender="mixed", part="edit", workload=WORKLOAD, source=SOURCE, **figures)
    assert verdict(row) == expected
    assert tuple(psnr_rows.TABLE.cells_of_row(row)) == (*psnr_rows.TABLE.columns, *SOURCE)
