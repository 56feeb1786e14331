"""The command `mtu train`: from a YAML file and flags to a finished pipeline.

Each flag is made of a setting of `mtu.training.runs.run_config`, whose modules import no PyTorch.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING
from typing import Annotated, Any

import typer

from mtu.cli.output import print_error, print_report
from mtu.training.runs.run_config import RunConfig, Setting, settings_by_key
from mtu.training.runs.settings_file import read_run_config
from mtu.training.runs.typed_values import describe_type, is_mapping_type

__all__ = ["EXAMPLES", "run_train_command"]

EXAMPLES = """
[bold]Examples[/bold]

  mtu train icons --output runs/icons
  mtu train sd15 --model path/to/sd15 --data edit=edits --output runs/edit
  mtu train my.yaml --learning-rate 5e-5 --upcycle num_experts=2
  mtu train my.yaml --dry-run
  mtu train my.yaml --resume

Several GPUs: accelerate launch -m mtu train my.yaml. In YAML, each key is a flag's name with underscores.
"""

_RUN = "Run"
Config = Annotated[
    str | None,
    typer.Argument(
        help="A YAML file; the output folder of a training, whose config.yaml is read; or sd15, sdxl or icons, the "
        "settings that mtu ships. Flags replace its settings."
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on from the newest checkpoint in the output folder, if there is one.", rich_help_panel=_RUN
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Delete the checkpoints in the output folder, and start; pictures stay.",
        rich_help_panel=_RUN,
    ),
]
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="With --resume: go on although data or settings, such as the learning rate, have changed.",
        rich_help_panel=_RUN,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print memory, time, examples and disk space, and load nothing.", rich_help_panel=_RUN
    ),
]


def run_train_command(
    context: typer.Context,
    config: str | None,
    resume: bool,
    overwrite: bool,
    accept_changes: bool,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Train a multi-task model: from a base model and folders of images to a finished pipeline."""
    with _errors_context(context, are_of_all_processes=True):
        if resume and overwrite:
            raise ValueError("--resume continues the checkpoint that --overwrite deletes: expected one of them.")
        if accept_changes and not resume:
            raise ValueError("--accept-changes accepts changes since a checkpoint: expected --resume with it.")
        given = {key: value for key, value in flags.items() if value is not None and value != []}
        settings = read_run_config(config, {key: _flag_value(settings_by_key()[key], given[key]) for key in given})
        if not dry_run:
            _connect_processes()
    with _errors_context(context):
        if dry_run:
            _print_estimate(settings)
        else:
            _run(settings, resume, overwrite, accept_changes)


@contextmanager
def _errors_context(context: typer.Context, are_of_all_processes: bool = False) -> Iterator[None]:
    """Let an error become a line on stderr and an exit code.

    Args:
        context: tells whether the user asked for the traceback.
        are_of_all_processes: whether all processes of a machine meet an error together, so that the first one tells it.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe has seen enough
        raise
    except (ValueError, OSError, FloatingPointError) as error:
        if context.parent is not None and context.parent.params["debug"]:
            raise
        if not are_of_all_processes or os.environ.get("LOCAL_RANK", "0") == "0":
            print_error(f"mtu train: error: {error}")
        # Whatever ends a training before its end by fault of a setting, a file or the disk is 2.
        raise typer.Exit(1 if isinstance(error, FloatingPointError) else 2) from None


def _connect_processes() -> None:
    """Connect the processes that a launcher started. Each refuses a launcher that is not supported."""
    # PyTorch and diffusers take seconds to import, and neither help nor the reading of settings needs them.
    from mtu.training.distributed import make_accelerator

    make_accelerator()


def _print_estimate(settings: RunConfig) -> None:
    """Print what a training will take."""
    from mtu.training.runs.dry_run import estimate_run
    from mtu.training.runs.dry_run_report import run_estimate_reports

    reports = run_estimate_reports(estimate_run(settings))
    for number, report in enumerate(reports if _is_main_process() else ()):
        if number:
            print()
        print_report(report)


def _run(settings: RunConfig, resume: bool, overwrite: bool, accept_changes: bool) -> None:
    """Train, and say where the result is."""
    import diffusers
    import transformers

    from mtu.training.checkpoints import checkpoint_steps
    from mtu.training.runs.run import process_group_context, run_training

    if not _is_main_process():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    try:
        with process_group_context():
            run_training(settings, resume=resume, overwrite=overwrite, accept_changes=accept_changes)
    except (KeyboardInterrupt, SystemExit):
        steps = checkpoint_steps(settings.output)
        if steps and _is_main_process():
            print_error(f"The training ended after step {steps[-1]}, which is saved; --resume continues it.")
        raise
    if _is_main_process():
        print(f"The trained pipeline is in {settings.output / 'model'}.")


def _is_main_process() -> bool:
    """Whether this is the first or the only process, as `torchrun` and `accelerate launch` tell it."""
    return os.environ.get("RANK", "0") == "0"


def _flag_value(setting: Setting, value: Any) -> Any:
    """The value of a flag: a text, a truth value, or the KEY=VALUE pairs of a mapping as a dictionary."""
    if not isinstance(value, list):
        return value
    pairs = [item.partition("=") for item in value]
    for item, (key, sign, _) in zip(value, pairs, strict=True):
        if not sign or not key:
            raise ValueError(f"{setting.flag} must be {_mapping_words(setting)}, but got {item!r}.")
    keys = [key for key, _, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"{setting.flag} gives {twice!r} twice: expected each key once.")
    return {key: text for key, _, text in pairs}


def _mapping_words(setting: Setting) -> str:
    if setting.key == "data":
        return "TASK=FOLDER"
    return "TASK=NUMBER" if setting.key in ("shares", "loss_weights") else "KEY=VALUE"


def _option(setting: Setting) -> inspect.Parameter:
    """The parameter of the command that stands for a setting."""
    names, kind = [setting.flag], str | None
    if setting.annotation is bool:
        names, kind = [f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"], bool | None
    elif is_mapping_type(setting.annotation):
        kind = list[str] | None
    option = typer.Option(
        *names,
        metavar=None if setting.annotation is bool else _metavar(setting),
        help=_help(setting),
        show_default=False,
        # Two names a flag take a column of their own, which would narrow the text of all others.
        rich_help_panel="Switches" if setting.annotation is bool else setting.section,
    )
    return inspect.Parameter(
        setting.key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _metavar(setting: Setting) -> str:
    if is_mapping_type(setting.annotation):
        return _mapping_words(setting)
    words = describe_type(setting.annotation).removesuffix(" or null")
    shown = {"an integer": "INTEGER", "a number": "NUMBER", "a path": "PATH", "a text": "TEXT"}
    if words in shown:
        return shown[words]
    if setting.key == "tasks":
        return "TASK,…"
    if setting.key == "cache_directory":
        return "PATH"
    if setting.key == "resolution":
        return "PIXELS"
    if "list" in words:
        return "NUMBER,NUMBER"
    return words.replace(", ", "|").replace(" or ", "|")


def _help(setting: Setting) -> str:
    """The sentence of a setting, with its default."""
    default = setting.default
    if setting.key == "cache_directory":
        return f"{setting.help} (default: cache in the output folder)"
    if default is MISSING or default is None or is_mapping_type(setting.annotation):
        return setting.help
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    words = str(default).lower() if isinstance(default, bool) else default
    return f"{setting.help} (default: {words})"


def _make_signature() -> inspect.Signature:
    """The parameters of the command: its own, and a flag for each setting."""
    own = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        inspect.Parameter("config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Config),
    ]
    for name, annotation in (
        ("resume", Resume),
        ("overwrite", Overwrite),
        ("accept_changes", AcceptChanges),
        ("dry_run", DryRun),
    ):
        own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation))
    return inspect.Signature([*own, *map(_option, settings_by_key().values())])


# typer makes the options of a command out of the signature of its function.
run_train_command.__signature__ = _make_signature()  # pyright: ignore[reportFunctionMemberAccess]
