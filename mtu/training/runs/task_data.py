"""The data of a training: the data set of each task, made and checked before a model is loaded."""

from collections.abc import Mapping, Sequence

from mtu.data.checking import check_image_folder
from mtu.data.icons.task_dataset import IconTask
from mtu.data.image_digests import ImageDigests
from mtu.data.image_folder import ImageFolder
from mtu.data.task_dataset import TaskDataset
from mtu.tasks import TaskSpec
from mtu.training.runs.run_config import DataSource

__all__ = ["check_data", "open_task_datasets"]

_MOST_PROBLEMS_SHOWN = 10


def open_task_datasets(
    sources: Mapping[str, DataSource], tasks: Sequence[TaskSpec], digests: ImageDigests | None = None
) -> dict[str, TaskDataset]:
    """Open the data sets of a training, in the order of the tasks.

    Args:
        sources: where the examples of each task come from.
        tasks: the tasks of the model.
        digests: remembers the digests of images for later trainings; None: nothing does.

    Raises:
        ValueError: a folder does not exist, or its `metadata.jsonl` cannot be read.
    """
    opened: dict[str, TaskDataset] = {}
    for task in tasks:
        source = sources.get(task.name)
        if source is None:
            continue
        if source.folder is not None:
            opened[task.name] = ImageFolder(source.folder, task, digests)
        elif source.icons is not None:
            opened[task.name] = IconTask(task.name, source.icons, source.split, source.seed)
    return opened


def check_data(sources: Mapping[str, DataSource], tasks: Sequence[TaskSpec]) -> None:
    """Check all rows of the folders of a training.

    Raises:
        ValueError: some rows are bad; the message lists the first ones.
    """
    problems = []
    for task in tasks:
        source = sources.get(task.name)
        if source is not None and source.folder is not None:
            found = check_image_folder(source.folder, task, decode=False)
            problems += [problem for problem in found if problem.severity == "error"]
    if problems:
        shown = [str(problem).rstrip(".") for problem in problems[:_MOST_PROBLEMS_SHOWN]]
        more = len(problems) - len(shown)
        rest = f"; and {more} more, which mtu data check lists" if more else ""
        raise ValueError(f"The data cannot be trained on: {'; '.join(shown)}{rest}.")
