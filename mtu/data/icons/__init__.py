"""The icon data set: four image tasks with true targets, drawn with an icon font.

- `examples`: `IconDataset`, and the painting of its images.
- `task_dataset`: `IconTask`, the icons of one task as training data.
- `catalogue`: names, colours and captions, and their split into training, validation and test.
- `font`: the masks of all icons. The extra `train` installs the font.
"""

from mtu.data.icons.examples import IconDataset, IconExample
from mtu.data.icons.task_dataset import IconTask

__all__ = ["IconDataset", "IconExample", "IconTask"]
