"""A tiny multi-task pipeline, offline and seeded, with randomised trained weights."""

import copy
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import mtu

from .mixed_batches import PROMPTS, STEPS, TASKS, images, noise

MAX_LENGTH = 16


def stock_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=16,
    ).eval()


def stock_pipeline() -> StableDiffusionPipeline:
    """Stable Diffusion with a VAE of factor 2; 16×16 pixels."""
    unet = stock_unet()
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    tokenizer = byte_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        # Embeddings start at a scale of 0.02, with which every prompt would mean nearly the same.
        for name, parameter in text_encoder.named_parameters():
            if "embedding" in name:
                parameter.mul_(50)
        # As the latents of every picture would be nearly zero.
        vae.quant_conv.weight.mul_(8)
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def byte_tokenizer() -> CLIPTokenizer:
    """Every byte is a token, alone and at the end of a word; no merges, no files."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=MAX_LENGTH)


def randomise_(unet: mtu.MTUUNet2DConditionModel) -> None:
    """Move every trained parameter away from its start, where a mixed-up task would not be seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


@pytest.fixture(scope="session")
def shared_pipe() -> mtu.MTUPipeline:
    """For tests that leave it as it was."""
    pipe = mtu.upcycle(stock_pipeline())
    randomise_(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shared_pipe: mtu.MTUPipeline) -> mtu.MTUPipeline:
    """A pipeline of its own for each test, which may change its modules, its scheduler and its settings."""
    fresh = copy.deepcopy(shared_pipe)
    fresh.set_progress_bar_config(disable=True)
    return fresh


@pytest.fixture
def stock() -> StableDiffusionPipeline:
    return stock_pipeline()


@pytest.fixture
def picture() -> Callable[..., PIL.Image.Image]:
    """`picture(width, height, seed)`: an RGB image of noise."""

    def draw(width: int = 16, height: int = 16, seed: int = 0) -> PIL.Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return PIL.Image.fromarray(pixels)

    return draw


@pytest.fixture
def mixed(pipe, picture):
    """Run one batch of all four tasks; arguments may be overridden."""

    def run(**given):
        arguments = {"prompt": list(PROMPTS), "image": images(picture), "task": list(TASKS), "latents": noise()}
        arguments |= {"num_inference_steps": STEPS, "output_type": "pt", **given}
        return pipe(**arguments).images

    return run
