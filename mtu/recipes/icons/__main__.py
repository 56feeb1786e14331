"""`python -m mtu.recipes.icons`: the command line that trains the base model and runs the demo."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from mtu.data.icons.catalogue import OUTLINE_SUFFIX, text_to_image_icon_names
from mtu.recipes.icons.base_model import BaseModelConfig, convert_to_float16_and_save, train_base_model
from mtu.recipes.icons.base_model_card import write_base_model_card_and_provenance
from mtu.recipes.icons.demo import SHIPPED_BASE_MODEL, DemoConfig, run_demo
from mtu.recipes.icons.device import describe_device
from mtu.recipes.icons.score import ScoreConfig, score_base_pipeline_in_folder


def add_base_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `base` command."""
    parser = commands.add_parser("base", help="train the base text-to-image model from nothing")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, logs and the model")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from the checkpoints in the output folder")
    existing.add_argument("--overwrite", action="store_true", help="delete the checkpoints in the output folder")
    parser.add_argument("--minutes", type=float, help="limit of both trainings together, in minutes")
    parser.add_argument("--steps", type=int, help="limit of each training, in optimizer steps")
    parser.add_argument("--device", default="cpu", help="where to train; may change at --resume (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data and noise")
    parser.set_defaults(run=run_base_command)


def run_base_command(arguments: argparse.Namespace) -> None:
    """Run the `base` command with parsed arguments."""
    command = f"python -m mtu.recipes.icons base --output DIR --seed {arguments.seed}"
    config = BaseModelConfig(seed=arguments.seed).with_training_limits(arguments.minutes, arguments.steps)
    if arguments.minutes is not None:
        command += f" --minutes {arguments.minutes:g}"
    if arguments.steps is not None:
        command += f" --steps {arguments.steps}"
    if arguments.device != "cpu":
        command += f" --device {arguments.device}"
    make_base_model(
        arguments.output,
        config,
        ScoreConfig(),
        command=command,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        device=arguments.device,
    )


def make_base_model(
    output: Path,
    config: BaseModelConfig,
    score: ScoreConfig,
    *,
    command: str,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
) -> None:
    """Train, save and score the base model, and write its model card.

    Args:
        output: folder for checkpoints and logs. The model is saved in `model` below it.
        config: the settings of model and training.
        score: the settings of the scores.
        command: the command line, for the model card.
        resume: whether to continue from the checkpoints in the output folder, which may come from another device.
        overwrite: whether to delete the checkpoints in the output folder and start anew.
        device: the device of training and scoring.

    Raises:
        FileExistsError: the folder holds checkpoints, and neither `resume` nor `overwrite` is true.
        FileNotFoundError: `resume` is true, but there is no checkpoint.
        ValueError: the device cannot be used.
    """
    pipeline, history = train_base_model(output, config, resume=resume, overwrite=overwrite, device=device)
    folder = output / "model"
    convert_to_float16_and_save(pipeline, folder)
    metrics = score_base_pipeline_in_folder(folder, score, device)
    prompts = config.denoiser.prompts
    provenance = {
        "command": command,
        "seed": config.seed,
        "machine": describe_device(pipeline.device),
        "names": len(text_to_image_icon_names()),
        "all_icons": sum(len((name, name + OUTLINE_SUFFIX)) for name in text_to_image_icon_names()),
        "vae_minutes": history["vae"][-1].seconds / 60,
        "vae_steps": history["vae"][-1].step,
        "vae_batch": config.vae.batch_size,
        "denoiser_minutes": history["denoiser"][-1].seconds / 60,
        "denoiser_steps": history["denoiser"][-1].step,
        "denoiser_batch": config.denoiser.batch_size,
        "scenes": prompts.scene_fraction,
        "instructions": prompts.instruction_fraction,
        "removed": prompts.removal_fraction,
        "remark": "",
    }
    write_base_model_card_and_provenance(folder, metrics, provenance)
    print(f"The model is in {folder}; its scores are in {folder / 'README.md'}.")


def add_demo_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `demo` command."""
    defaults = DemoConfig()
    parser = commands.add_parser("demo", help="upcycle a base model, train it on four tasks, show and measure them")
    parser.add_argument(
        "--base", type=Path, default=SHIPPED_BASE_MODEL, help="folder of the base model (default: the shipped)"
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for pictures, tables, model")
    parser.add_argument("--minutes", type=float, default=defaults.max_training_minutes, help="of training")
    parser.add_argument(
        "--steps",
        type=int,
        default=defaults.max_training_steps,
        help="of the optimizer, at most (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="where to train and generate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of data, initialisation and noise")
    parser.set_defaults(run=run_demo_command)


def run_demo_command(arguments: argparse.Namespace) -> None:
    """Run the `demo` command with parsed arguments."""
    config = DemoConfig(max_training_minutes=arguments.minutes, max_training_steps=arguments.steps, seed=arguments.seed)
    run_demo(arguments.base, arguments.output, config, arguments.device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m mtu.recipes.icons", description="The icon models of mtu.")
    commands = parser.add_subparsers(required=True, metavar="command")
    add_base_command(commands)
    add_demo_command(commands)
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except (ValueError, OSError, FloatingPointError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
