"""Pipelines: prompts and images in, images out, one call for any mix of tasks."""

from mtu.pipelines.stable_diffusion import MTUPipeline

__all__ = ["MTUPipeline"]
