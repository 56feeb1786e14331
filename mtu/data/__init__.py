"""Data sets and image processing for training and tests.

- `icons`: a data set of icons with true targets for four tasks.
- `degradation`: the degradation that makes low-resolution images for super-resolution.
- `images`: conversion, resizing and comparison of images as tensors.
"""
