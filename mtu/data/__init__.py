"""Data sets and image processing for training and tests.

- `task_dataset`: the interface of training data.
- `image_folder`: `ImageFolder`, the training examples of one task in a folder.
- `metadata_rows`: the format of its `metadata.jsonl`.
- `checking`: finds every bad row of such a folder.
- `image_files`: reading image files, upright and in RGB.
- `image_digests`: digests of files, each of which is read once.
- `examples`: `ExampleList`, training examples in memory.
- `icons`: a data set of icons with true targets for four tasks.
- `degradation`: the degradation that makes low-resolution images for super-resolution.
- `images`: conversion, resizing and comparison of images as tensors.
"""

from mtu.data.checking import check_image_folder
from mtu.data.examples import Example, ExampleList
from mtu.data.image_folder import ImageFolder

__all__ = ["Example", "ExampleList", "ImageFolder", "check_image_folder"]
