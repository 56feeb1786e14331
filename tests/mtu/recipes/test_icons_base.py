"""The base recipe: its parts, one miniature run from end to end, and the model that ships."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from mtu.data.icons.catalogue import (
    BACKGROUND_COLOURS,
    ICON_COLOURS,
    OUTLINE_SUFFIX,
    icon_caption,
    split_of_combination,
    split_of_name,
    text_to_image_icon_names,
    vocabulary,
)
from mtu.recipes.icons import vae as vae_module
from mtu.recipes.icons.__main__ import main, make_base_model
from mtu.recipes.icons.base_model import (
    BaseModelConfig,
    build_untrained_pipeline,
    convert_to_float16_and_save,
    train_base_model,
)
from mtu.recipes.icons.denoiser import DenoiserConfig
from mtu.recipes.icons.prompts import (
    IconPicture,
    PromptConfig,
    draw_instruction_prompt,
    draw_prompt,
    draw_scene_pictures,
    icon_pictures,
)
from mtu.recipes.icons.score import ScoreConfig, classify_colours, retrieval_hits, sample_icon_pictures
from mtu.recipes.icons.text_encoder import TextEncoderConfig, build_tokenizer
from mtu.recipes.icons.vae import VAEConfig, draw_training_pictures
from mtu.training import TrainerConfig
from mtu.training.checkpoints import Checkpoint, delete_checkpoints, read_newest_checkpoint, write_checkpoint

ASSET = Path(__file__).parents[3] / "mtu" / "assets" / "icons-base"

MINIATURE = BaseModelConfig(
    vae=VAEConfig(block_out_channels=(8, 8, 16), norm_num_groups=4, batch_size=2),
    text_encoder=TextEncoderConfig(width=16, num_layers=1, num_heads=2),
    denoiser=DenoiserConfig(
        block_out_channels=(8, 8, 16), heads=2, norm_num_groups=4, batch_size=4, prompts=PromptConfig(scenes=20)
    ),
    vae_training=TrainerConfig(steps=3, log_every=1, checkpoint_every=2),
    denoiser_training=TrainerConfig(steps=4, log_every=1, checkpoint_every=2, ema_decay=0.5),
)
SCORE = ScoreConfig(
    num_samples=8,
    validation_samples_per_guidance_scale=2,
    candidate_guidance_scales=(1.0, 3.0),
    inference_steps=2,
    num_retrieval_candidates=5,
    reconstructions_per_kind=2,
)


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a hundredth of the pictures, so that encoding them all takes no time."""
    monkeypatch.setattr("mtu.recipes.icons.denoiser.icon_pictures", lambda split: icon_pictures(split)[::100])


@pytest.mark.slow
def test_every_word_is_one_token_and_any_text_can_be_encoded() -> None:
    tokenizer = build_tokenizer(24)
    for word in vocabulary():
        assert len(tokenizer(word).input_ids) == 3, word
    text = "a red bell, Zürich Ω 日本 x9 🙂"
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.lower().replace(" ", "")
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]
    assert len(tokenizer("").input_ids) == 2
    # Written down: in every process the same words must get the same numbers, or resuming would scramble them.
    assert len(tokenizer) == 2935
    assert tokenizer("red").input_ids == [2933, 2575, 2934]


def test_training_combinations_are_all_there_and_none_is_held_out() -> None:
    pictures = icon_pictures("train")
    assert {p.name.removesuffix(OUTLINE_SUFFIX).removesuffix("-off") for p in pictures} == set(
        text_to_image_icon_names()
    )
    assert all(split_of_combination(*p) == "train" and split_of_name(p.name) == "train" for p in pictures)
    assert {p.colour for p in pictures} == set(ICON_COLOURS)
    assert {p.background for p in pictures} == set(BACKGROUND_COLOURS)
    held_out = set(icon_pictures("test")) | set(icon_pictures("validation"))
    assert held_out
    assert not held_out & set(pictures)
    asked = sample_icon_pictures("test", 300, 0)
    assert len(set(asked)) == 300
    assert set(asked) <= held_out


@pytest.mark.slow
def test_the_autoencoder_never_sees_held_out_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, shown = vae_module._drawable()
    painted = Counter()
    full = vae_module.paint_mask

    def spy(mask: np.ndarray, colour: np.ndarray, background: np.ndarray) -> np.ndarray:
        if mask.shape == (64, 64):
            painted[(mask.tobytes(), tuple(colour), tuple(background))] += 1
        return full(mask, colour, background)

    monkeypatch.setattr(vae_module, "paint_mask", spy)
    draw_training_pictures(np.random.default_rng(0), VAEConfig(batch_size=300))
    drawn = vae_module.icon_masks(64)[rows]
    allowed = set()
    for index, mask in enumerate(drawn):
        for c, colour in enumerate(ICON_COLOURS.values()):
            for b, background in enumerate(BACKGROUND_COLOURS.values()):
                if shown[index, c, b]:
                    allowed |= {(mask.tobytes(), colour, background)}
        if index == 400:
            break
    known = {mask.tobytes() for mask in drawn[:401]}
    checked = [key for key in painted if key[0] in known]
    assert len(painted) > 150
    assert checked
    assert set(checked) <= allowed


def test_instructions_say_what_the_picture_shows() -> None:
    rng = np.random.default_rng(0)
    words = Counter()
    for _ in range(500):
        picture = IconPicture("bell-outline", "red", "black")
        text = draw_instruction_prompt(picture, rng)
        base, *instructions = text.split(", ")
        words.update(text.replace(",", "").split())
        assert "?" not in text
        assert "  " not in text
        assert " bell" in base
        assert ("outline it" in instructions) != ("outlined" in base)
        if "make it red" not in instructions:
            assert base.startswith("a red ")
        if "put it on black" not in instructions:
            assert base.endswith(" on black")
        assert set(instructions) <= {"make it red", "put it on black", "outline it"}
    assert min(words[word] for word in ("make", "put", "outline", "it")) > 100
    assert set(words) <= set(vocabulary())


@pytest.mark.slow
def test_scenes_show_both_icons_or_the_one_that_is_left() -> None:
    rng, config = np.random.default_rng(0), PromptConfig(scenes=200, prompt_dropout_prob=0.0)
    scenes = draw_scene_pictures(rng, config)
    for scene in scenes:
        picture = scene.paint()
        colours = {tuple(int(c) for c in pixel) for pixel in picture.reshape(-1, 3)}
        assert ICON_COLOURS[scene.colours[0]] in colours
        assert (ICON_COLOURS[scene.colours[1]] in colours) == (not scene.second_icon_removed)
        prompt = draw_prompt(scene, rng, config)
        assert prompt.endswith(f", remove the {scene.colours[1]} {scene.names[1]}") == scene.second_icon_removed
    assert 40 < sum(scene.second_icon_removed for scene in scenes) < 100
    prompts = [draw_prompt(scenes[0], rng, PromptConfig(prompt_dropout_prob=0.5)) for _ in range(200)]
    assert 60 < prompts.count("") < 140


@pytest.mark.slow
def test_scores_are_perfect_for_true_pictures_and_not_for_others() -> None:
    pictures = sample_icon_pictures("test", 60, 0)
    true = np.stack([picture.paint() for picture in pictures]).astype(np.float32)
    noisy = np.clip(true + np.random.default_rng(0).normal(0, 20, true.shape), 0, 255)
    for images in (true, noisy):
        colours, backgrounds = classify_colours(images)
        assert colours == [p.colour for p in pictures]
        assert backgrounds == [p.background for p in pictures]
        # A few icons are drawn alike under two names.
        assert retrieval_hits(images, pictures, 100, 0).mean() > 0.95
    assert retrieval_hits(np.roll(true, 1, axis=0), pictures, 100, 0).mean() < 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("few_pictures")
def test_miniature_run_from_end_to_end_resumes_and_describes_itself(tmp_path: Path) -> None:
    make_base_model(tmp_path, MINIATURE, SCORE, command="the command")
    model = tmp_path / "model"
    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["samples"] == 8
    assert 0 <= metrics["text_to_image"]["retrieval_top1"] <= 1
    assert metrics["training"]["denoiser_steps"] == 4
    card = (model / "README.md").read_text()
    assert "the command" in card
    assert "{" not in card.replace("{}", "")
    assert (model / "samples.png").is_file()
    first = {path.name: path.read_bytes() for path in model.rglob("*.safetensors")}
    # Resuming a finished run trains nothing, and comes to the same weights; also under another name of the device.
    make_base_model(tmp_path, MINIATURE, SCORE, command="the command", resume=True, device="cpu:0")
    assert {path.name: path.read_bytes() for path in model.rglob("*.safetensors")} == first
    # Without --resume the checkpoints are not destroyed, also where only the second stage has one.
    delete_checkpoints(tmp_path / "vae")
    denoiser = read_newest_checkpoint(tmp_path / "denoiser").state
    with pytest.raises(FileExistsError, match="denoiser holds the checkpoint of a training: continue it with resume"):
        make_base_model(tmp_path, MINIATURE, SCORE, command="the command")
    assert read_newest_checkpoint(tmp_path / "denoiser").state == denoiser
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    assert {m.dtype for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.unet.config.cross_attention_dim == 16
    assert pipeline.vae.config.scaling_factor != 1.0


def test_resuming_from_an_empty_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["base", "--output", str(tmp_path), "--resume", "--minutes", "0.01"])
    assert f"There is no checkpoint in {tmp_path / 'vae'} to resume from." in capsys.readouterr().err


@pytest.mark.usefixtures("few_pictures")
def test_overwriting_leaves_no_stage_of_the_older_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a resume would put the older denoiser over the newer autoencoder."""
    for stage in ("vae", "denoiser"):
        write_checkpoint(tmp_path / stage, Checkpoint(1, {"a": torch.ones(1)}, {}))

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mtu.recipes.icons.base_model.Trainer", stop)
    with pytest.raises(KeyboardInterrupt):
        train_base_model(tmp_path, MINIATURE, overwrite=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_command_does_not_destroy_a_training_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "vae", Checkpoint(1, {"a": torch.ones(1)}, {}))
    with pytest.raises(SystemExit, match="2"):
        main(["base", "--output", str(tmp_path), "--minutes", "0.01"])
    assert "holds the checkpoint of a training" in capsys.readouterr().err


@pytest.mark.slow
def test_an_autoencoder_of_no_use_stops_the_training() -> None:
    vae = vae_module.build_vae(MINIATURE.vae)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
    with pytest.raises(FloatingPointError, match=r"its latents have the standard deviation 0\.0\.$"):
        vae_module.measure_and_set_scaling_factor(vae, 0, pictures=2)


@pytest.mark.slow
def test_untrained_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first, again = build_untrained_pipeline(MINIATURE), build_untrained_pipeline(MINIATURE)
    convert_to_float16_and_save(first, tmp_path)
    for name in ("unet", "vae", "text_encoder"):
        loaded = getattr(StableDiffusionPipeline.from_pretrained(tmp_path), name).state_dict()
        for key, tensor in getattr(again, name).state_dict().items():
            assert torch.equal(loaded[key], tensor.half().float() if tensor.is_floating_point() else tensor), key


@pytest.mark.slow
def test_shipped_model_is_small_and_draws_what_the_caption_says() -> None:
    files = [path for path in ASSET.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    pipeline = StableDiffusionPipeline.from_pretrained(ASSET)
    pipeline.set_progress_bar_config(disable=True)
    metrics = json.loads((ASSET / "metrics.json").read_text())
    pictures = sample_icon_pictures("test", 6, 1)
    output = pipeline(
        [icon_caption(*picture) for picture in pictures],
        num_inference_steps=10,
        guidance_scale=metrics["guidance_scale"],
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    images = output.images * 255
    colours, backgrounds = classify_colours(images)
    assert sum(c == p.colour for c, p in zip(colours, pictures, strict=True)) >= 5
    assert sum(b == p.background for b, p in zip(backgrounds, pictures, strict=True)) >= 5
    assert retrieval_hits(images, pictures, 100, 0).sum() >= 4
    # An empty prompt and unknown words must run too.
    assert pipeline(["", "a Zürich of 7"], num_inference_steps=1, output_type="np").images.shape == (2, 64, 64, 3)
