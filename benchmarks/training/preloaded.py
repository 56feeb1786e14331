"""What the server of forked processes computes and imports once, so that trainings on icons start sooner."""

import diffusers.guiders
import diffusers.pipelines.onnx_utils

import mtu.upcycling
from mtu.data.icons.examples import IMAGE_SIZE
from mtu.data.icons.font import icon_masks

__all__ = ["diffusers", "mtu"]

# Drawing all icons takes half a second for each size. The function keeps what it has drawn.
icon_masks(IMAGE_SIZE)
icon_masks(IMAGE_SIZE // 2)
