"""The command `mtu train`: from a YAML file and flags to a finished pipeline.

Each flag is made of a setting of `mtu.training.runs.run_config`, whose modules import no PyTorch.
"""

import inspect
import itertools
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
_OFF = "no_"  # before the key of a switch: the parameter that turns it off
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
        settings = read_run_config(config, _given_settings(flags))
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


def _given_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The settings that flags give, by key."""
    known, given = settings_by_key(), {}
    for name, value in flags.items():
        if value is None or value == []:
            continue
        key = name.removeprefix(_OFF)
        if key in given:
            raise ValueError(
                f"{known[key].flag} and {_off_flag(known[key])} contradict each other: expected one of them."
            )
        given[key] = _flag_value(known[key], value if key == name else False)
    return given


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


def _off_flag(setting: Setting) -> str:
    """The flag that switches a setting off."""
    return f"--no-{setting.flag.removeprefix('--')}"


def _options(setting: Setting) -> list[inspect.Parameter]:
    """The parameters of the command for a setting: its flag, and for a switch another one that turns it off."""
    if setting.annotation is bool:
        # Help that shows both names of a switch has no room for the longest ones.
        panel = "Switches (with --no- before its name, each is turned off)"
        on = typer.Option(setting.flag, help=_help(setting), show_default=False, rich_help_panel=panel)
        off = typer.Option(_off_flag(setting), hidden=True)
        return [_parameter(setting.key, bool | None, on), _parameter(f"{_OFF}{setting.key}", bool | None, off)]
    option = typer.Option(
        setting.flag,
        metavar=_metavar(setting),
        help=_help(setting),
        show_default=False,
        rich_help_panel=setting.section,
    )
    kind = list[str] | None if is_mapping_type(setting.annotation) else str | None
    return [_parameter(setting.key, kind, option)]


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _metavar(setting: Setting) -> str:
    """A short word for the values of a setting: a wide column of them would cut off the names of flags."""
    if is_mapping_type(setting.annotation):
        return _mapping_words(setting)
    shown = {"an integer": "INTEGER", "a number": "NUMBER", "a path": "PATH", "a text": "TEXT"}
    special = {"tasks": "TASK,…", "cache_directory": "PATH", "resolution": "PIXELS", "betas": "NUMBERS"}
    words = describe_type(setting.annotation).removesuffix(" or null")
    return special.get(setting.key, shown.get(words, "NAME"))


def _help(setting: Setting) -> str:
    """The sentence of a setting, with its choices and its default."""
    default = setting.default
    if setting.key == "cache_directory":
        return f"{setting.help} (default: cache in the output folder)"
    notes = []
    if setting.annotation is not bool and _metavar(setting) == "NAME":
        notes.append(describe_type(setting.annotation))
    if default is not MISSING and default is not None and not is_mapping_type(setting.annotation):
        words = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        notes.append(f"default: {words.lower() if isinstance(default, bool) else words}")
    return f"{setting.help} ({'; '.join(notes)})" if notes else setting.help


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
    return inspect.Signature([*own, *itertools.chain(*map(_options, settings_by_key().values()))])


# typer makes the options of a command out of the signature of its function.
run_train_command.__signature__ = _make_signature()  # pyright: ignore[reportFunctionMemberAccess]
