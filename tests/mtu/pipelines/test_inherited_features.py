"""What the multi-task pipeline inherits from diffusers: LoRAs, precisions, slicing, other VAEs, the safety checker."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig

from .mixed_batches import STEPS, assert_same, images, noise, run_stock


def test_lora(pipe, mixed):
    """On the feed-forward networks, which then run through the wrapped modules, and the attentions."""
    reference = mixed()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["net.2", "to_q"], init_lora_weights=False)
    torch.manual_seed(0)
    pipe.unet.add_adapter(config)
    full = mixed()
    assert (full - reference).abs().max() > 0.01
    assert_same(mixed(cross_attention_kwargs={"scale": 1.0}), full)
    assert_same(mixed(cross_attention_kwargs={"scale": 0.0}), reference)
    half = mixed(cross_attention_kwargs={"scale": 0.5})
    assert (half - full).abs().max() > 0.01
    assert (half - reference).abs().max() > 0.01
    pipe.unet.disable_adapters()
    assert_same(mixed(), reference)


def test_a_pipeline_with_adapters_is_not_saved_in_part(pipe, tmp_path):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"Unload adapters, .* before save_pretrained: .*to_q is a Linear of peft\.$"):
        pipe.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_bfloat16(pipe, mixed):
    reference = mixed(output_type="latent")
    pipe.to(torch.bfloat16)
    result = mixed(output_type="latent")
    assert result.dtype == torch.bfloat16
    assert torch.isfinite(result).all()
    # bfloat16 has 8 bits; guidance amplifies its rounding. Another task's weights differ by more than 1.
    scale = reference.abs().max()
    assert (result.float() - reference).abs().mean() <= 0.05 * scale
    assert mixed(output_type="np").dtype == np.float32


def test_slicing(pipe, mixed):
    reference = mixed()
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    assert_same(mixed(), reference)
    pipe.disable_attention_slicing()
    for block in pipe.unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.set_chunk_feed_forward(3, dim=1)
    assert_same(mixed(), reference)


def test_channels_last(pipe, mixed):
    reference = mixed()
    pipe.unet.to(memory_format=torch.channels_last)
    assert_same(mixed(), reference)


@pytest.mark.slow
def test_compiled_unet(pipe, mixed):
    reference = mixed()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert_same(mixed(), reference)


def test_tiny_vae(pipe, picture):
    """Its encoder has no distribution to take the mode of."""
    torch.manual_seed(0)
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    image = images(picture)[1]
    result = pipe("blue", image, "edit", latents=noise(1), num_inference_steps=STEPS, output_type="pt").images
    assert_same(result, run_stock(pipe, "edit", "blue", image, noise(1)))


def test_a_vae_of_another_precision(pipe, mixed):
    reference = mixed()
    pipe.vae.to(torch.float64)
    result = mixed()
    assert_same(result.float(), reference)


def test_safety_checker(pipe, mixed):
    """A flagged image is left as the checker returns it."""

    class Checker(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, images, clip_input):
            images = images.clone()
            images[1] = 0.25
            return images, [False, True, False, False]

    class Extractor:
        def __call__(self, pictures, return_tensors):
            assert len(pictures) == 4
            return type("Batch", (dict,), {"to": lambda self, device: self, "pixel_values": torch.zeros(4, 3, 2, 2)})()

    reference = mixed()
    pipe.safety_checker, pipe.feature_extractor = Checker(), Extractor()
    result = mixed()
    assert_same(result[[0, 2, 3]], reference[[0, 2, 3]])
    assert (result[1] == 0.25).all()


def test_training_mode_changes_nothing_here(pipe, mixed):
    """The tiny model has no dropout; the routing table is computed anew at each call."""
    reference = mixed()
    pipe.unet.train()
    assert_same(mixed(), reference)
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
