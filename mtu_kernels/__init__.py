"""Fused kernels for feed-forward experts with per-sample routing: LayerNorm → grouped expert products → weighted sum.

The package works on tensors. Tasks, modules and diffusers belong to `mtu`, which it never imports.
"""

from mtu_kernels.arguments import ExpertWeights, NormAffine
from mtu_kernels.moe_ffn import available_backends, check_backend, moe_ffn, warmup
from mtu_kernels.routing import Routing, dense_weights, top_k_routing

__all__ = [
    "ExpertWeights",
    "NormAffine",
    "Routing",
    "available_backends",
    "check_backend",
    "dense_weights",
    "moe_ffn",
    "top_k_routing",
    "warmup",
]
