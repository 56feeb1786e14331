"""The Triton kernels, one step of the computation a file: each defines kernels and the functions that launch them.

Importing one of them imports Triton.
"""
