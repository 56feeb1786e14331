"""The commands `mtu data …`, which look at training data and change nothing."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtu.tasks import SD_TASKS, TaskSpec

if TYPE_CHECKING:
    # The library of images is imported with PyTorch, for which `mtu --help` does not wait.
    from mtu.data.checking import ImageFolderReport

__all__ = ["data_app"]

_TASKS = {task.name: task for task in SD_TASKS}
_METADATA = "metadata.jsonl"
_MOST_WARNINGS = 20

EXAMPLES = f"""
[bold]Examples[/bold]

  mtu data check data
  mtu data check data/edit
  mtu data check photos --task text-to-image --resolution 512
  mtu data check data --json > problems.json

[bold]Tasks[/bold]

  {", ".join(_TASKS)}

[bold]Exit codes[/bold]

  0    All rows can be trained on.
  1    There are bad rows.
  2    The command line is wrong.
"""

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", epilog=EXAMPLES, help="Check training data.")


def _parse_task(name: str) -> str:
    if name not in _TASKS:
        raise typer.BadParameter(f"expected one of {', '.join(_TASKS)}, but got {name!r}.")
    return name


_DIRECTORY_HELP = "A folder with a metadata.jsonl, or a folder of such folders with the names of their tasks."
Directory = Annotated[
    Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help=_DIRECTORY_HELP, show_default=False)
]
_TASK_HELP = "The task of DIR, by default the name of the folder. For a task of your own, name one with its inputs."
Task = Annotated[str | None, typer.Option(metavar="NAME", parser=_parse_task, help=_TASK_HELP)]
Resolution = Annotated[
    int | None, typer.Option(metavar="PIXELS", min=1, help="Warn of targets that are smaller than this.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@data_app.command("check", epilog=EXAMPLES)
def run_check_command(
    directory: Directory, task: Task = None, resolution: Resolution = None, as_json: AsJson = False
) -> None:
    """Report every row that cannot be trained on, with its line.

    The command decodes all images, and writes nothing.
    """
    tasks = {} if task is None else {directory: _TASKS[task]}
    tasks = tasks or _tasks_by_folder(directory)
    from mtu.data.checking import report_on_image_folder

    reports = {
        folder: report_on_image_folder(folder, spec, resolution=resolution, show_progress=True)
        for folder, spec in tasks.items()
    }
    if as_json:
        print(json.dumps([_as_json(folder, tasks[folder], report) for folder, report in reports.items()], indent=2))
    else:
        for folder, report in reports.items():
            _print_text(tasks[folder], report)
    if any(report.bad_rows for report in reports.values()):
        raise typer.Exit(1)


def _tasks_by_folder(directory: Path) -> dict[Path, TaskSpec]:
    """The folders of rows that a folder is or holds, with the tasks that they are named after."""
    if (directory / _METADATA).is_file():
        name = directory.resolve().name
        if name not in _TASKS:
            raise typer.BadParameter(
                f"{directory} is not named after a built-in task: give --task with one of {', '.join(_TASKS)}."
            )
        return {directory: _TASKS[name]}
    from mtu.data.image_folder import read_metadata
    from mtu.data.metadata_rows import infer_task

    tasks = {}
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        if folder.name in _TASKS:
            tasks[folder] = _TASKS[folder.name]
        elif (folder / _METADATA).is_file():
            try:
                tasks[folder] = infer_task(read_metadata(folder), folder.name)
            except ValueError as error:
                raise typer.BadParameter(f"The folder {folder} is not named after a task. {error}") from None
    if not tasks:
        raise typer.BadParameter(
            f"{directory} holds neither a {_METADATA} nor folders with one: expected {directory / 'edit' / _METADATA}, "
            "for example."
        )
    return tasks


def _as_json(folder: Path, task: TaskSpec, report: "ImageFolderReport") -> dict[str, Any]:
    return {"folder": str(folder), "task": task.name, "bad_rows": report.bad_rows, **asdict(report)}


def _print_text(task: TaskSpec, report: "ImageFolderReport") -> None:
    """Print all errors, the first warnings, and a summary."""
    warnings = 0
    for problem in report.problems:
        warnings += problem.severity == "warning"
        if problem.severity == "error" or warnings <= _MOST_WARNINGS:
            print(problem)
    if warnings > _MOST_WARNINGS:
        print(f"{warnings - _MOST_WARNINGS} more warnings, all of which --json lists.")
    counts = [_count(report.rows, "row"), _count(report.variants, "variant"), _count(report.prompts, "prompt")]
    if report.smallest and report.largest:
        counts.append("images from {}×{} to {}×{} pixels".format(*report.smallest, *report.largest))
    inferred = (
        "" if task.name in _TASKS else f" (a task with {'an' if task.takes_image else 'no'} image, like its first row)"
    )
    print(f"{task.name}{inferred}: {', '.join(counts)}; {_count(report.bad_rows, 'bad row')}.")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
