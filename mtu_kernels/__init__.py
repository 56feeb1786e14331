"""Feed-forward experts with per-sample routing, fused: LayerNorm → grouped expert products → weighted sum.

Knows tensors only: no tasks, no modules, no diffusers.
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
