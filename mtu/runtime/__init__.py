"""Running a model: compiled code and CUDA graphs, which are prepared once for each size of a batch.

The kernels themselves live in `mtu_kernels`.
"""
