"""Running a model: compiled code and CUDA graphs, prepared once for each size of a batch."""
