"""The GPU kernels, each by itself: compiled ahead of time, predicted, tuned."""
