"""What the frozen models get and give: as in diffusers' training scripts, to the last bit."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from mtu.data.task_dataset import ExampleImages
from mtu.tasks import EDIT, SUPER_RESOLUTION, TEXT_TO_IMAGE
from mtu.training.multitask.encoding import PipelineEncoder, image_key, preprocess, target_latents, text_key

from .tiny_pipelines import sd_pipeline, xl_pipeline


def noise_image(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def script_pixels(image: PIL.Image.Image, size: int, resample: PIL.Image.Resampling) -> torch.Tensor:
    """torchvision's Resize(size), CenterCrop(size), ToTensor, Normalize([0.5], [0.5]), written out."""
    width, height = image.size
    short, long = sorted((width, height))
    new_long = int(size * long / short)
    new_width, new_height = (size, new_long) if width <= height else (new_long, size)
    image = image.resize((new_width, new_height), resample)
    top, left = round((new_height - size) / 2.0), round((new_width - size) / 2.0)
    image = image.crop((left, top, left + size, top + size))
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5) / 0.5


@pytest.mark.parametrize(("width", "height"), [(19, 16), (40, 31), (31, 40), (333, 20), (9, 10)])
def test_images_are_resized_and_cropped_as_in_the_scripts(width: int, height: int) -> None:
    images = ExampleImages(noise_image(width, height), noise_image(width, height, 1))
    for spec, resample in (
        (EDIT, PIL.Image.Resampling.LANCZOS),
        (SUPER_RESOLUTION, PIL.Image.Resampling.BICUBIC),
    ):
        pixels = preprocess(images, spec, 16, 16, flip=False, description="")
        assert torch.equal(pixels.target, script_pixels(images.target, 16, PIL.Image.Resampling.LANCZOS))
        assert torch.equal(pixels.condition, script_pixels(images.condition, 16, resample))
        flipped = preprocess(images, spec, 16, 16, flip=True, description="")
        assert torch.equal(flipped.target, pixels.target.flip(-1))
        assert torch.equal(flipped.condition, pixels.condition.flip(-1))
    # y1 and x1 of train_text_to_image_sdxl.
    scale = 16 / min(width, height)
    top, left = (max(0, round((int(edge * scale) - 16) / 2.0)) for edge in (height, width))
    assert pixels.sizes.tolist() == [height, width, top, left]


def test_a_small_condition_image_is_cropped_like_its_target() -> None:
    """A picture of half the size, odd edges rounded down, shows the same cut-out."""
    target = noise_image(9, 5).resize((91, 51), PIL.Image.Resampling.BICUBIC)
    small = target.resize((45, 25), PIL.Image.Resampling.BICUBIC)
    pixels = preprocess(ExampleImages(target, small), SUPER_RESOLUTION, 32, 32, flip=False, description="")
    assert pixels.condition.shape == pixels.target.shape == (3, 32, 32)
    # Blurred by two resizings; a crop that is a pixel off differs by 0.06.
    assert (pixels.condition - pixels.target).abs().mean() < 0.03


def test_a_resolution_need_not_be_square() -> None:
    pixels = preprocess(ExampleImages(noise_image(40, 40), None), TEXT_TO_IMAGE, 16, 24, flip=False, description="")
    assert pixels.target.shape == (3, 16, 24)
    assert pixels.sizes.tolist() == [40, 40, 4, 0]
    pixels = preprocess(ExampleImages(noise_image(80, 20), None), TEXT_TO_IMAGE, 16, 24, flip=False, description="")
    assert pixels.sizes.tolist() == [20, 80, 0, 20]


def test_tensors_are_images_too() -> None:
    image = noise_image(16, 16)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    from_tensor = preprocess(ExampleImages(tensor, None), TEXT_TO_IMAGE, 16, 16, flip=False, description="")
    from_image = preprocess(ExampleImages(image, None), TEXT_TO_IMAGE, 16, 16, flip=False, description="")
    assert torch.equal(from_tensor.target, from_image.target)


def test_images_that_do_not_fit() -> None:
    image = noise_image(16, 16)
    for spec, images, message in (
        (EDIT, ExampleImages(image, None), r"^Task 'edit' takes a condition image, but row 3 has none\.$"),
        (
            TEXT_TO_IMAGE,
            ExampleImages(image, image),
            r"^Task 'text-to-image' takes no condition image, but row 3 has one\.$",
        ),
        (
            EDIT,
            ExampleImages(image, noise_image(16, 12)),
            r"must have the shape of its target, but in row 3 they have 16×12 and 16×16 pixels\.$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            preprocess(images, spec, 16, 16, flip=False, description="row 3")


def test_latents_are_those_of_the_vae() -> None:
    pipe = sd_pipeline()
    images = ExampleImages(noise_image(16, 16), noise_image(16, 16, 1))
    pixels = preprocess(images, EDIT, 16, 16, flip=False, description="")
    encoded = PipelineEncoder(pipe).encode_images(pixels, "")
    with torch.no_grad():
        target = pipe.vae.encode(pixels.target[None]).latent_dist
        condition = pipe.vae.encode(pixels.condition[None]).latent_dist.mode()
    assert torch.equal(encoded["condition"], condition[0])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    moments = encoded["target"][None]
    assert torch.equal(target_latents(moments, noise), target.sample(torch.Generator().manual_seed(3)))
    assert torch.equal(target_latents(moments, None), target.mode())
    assert not torch.equal(target_latents(moments, noise), target.mode())
    assert isinstance(target, DiagonalGaussianDistribution)


def test_embeddings_are_those_of_the_text_encoders() -> None:
    pipe = sd_pipeline()
    prompts = ["a red bell", "", "make it blue"]
    tokens = pipe.tokenizer(
        prompts, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = pipe.text_encoder(tokens)[0]
    encoded = PipelineEncoder(pipe).encode_prompts(prompts)
    for one, other in zip(encoded, expected, strict=True):
        torch.testing.assert_close(one["prompt_embeds"], other)  # encoded one by one, so up to rounding


def test_embeddings_of_sdxl_are_those_of_both_text_encoders() -> None:
    pipe = xl_pipeline()
    tokens = pipe.tokenizer(
        ["a red bell", ""], padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    encoded = PipelineEncoder(pipe).encode_prompts(["a red bell", ""])
    for i, one in enumerate(encoded):
        torch.testing.assert_close(one["prompt_embeds"], embeds[i])
        torch.testing.assert_close(one["pooled_prompt_embeds"], outputs[1].text_embeds[i])


def test_keys_depend_on_all_that_determines_the_entry() -> None:
    pipe = sd_pipeline()
    encoder = PipelineEncoder(pipe)
    digests = {encoder.vae_digest, encoder.text_digest}
    with torch.no_grad():
        pipe.vae.quant_conv.bias[0] += 1
        next(pipe.text_encoder.parameters())[0] += 1
    digests |= {PipelineEncoder(pipe).vae_digest, PipelineEncoder(pipe).text_digest}
    pipe.vae.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    digests |= {PipelineEncoder(pipe).vae_digest, PipelineEncoder(pipe).text_digest}
    pipe.tokenizer.model_max_length = 8
    digests |= {PipelineEncoder(pipe).text_digest}
    assert len(digests) == 7

    keys = {
        image_key("v", "i", EDIT, 16, 16, False),
        image_key("w", "i", EDIT, 16, 16, False),
        image_key("v", "j", EDIT, 16, 16, False),
        image_key("v", "i", SUPER_RESOLUTION, 16, 16, False),
        image_key("v", "i", TEXT_TO_IMAGE, 16, 16, False),
        image_key("v", "i", EDIT, 24, 16, False),
        image_key("v", "i", EDIT, 16, 24, False),
        image_key("v", "i", EDIT, 16, 16, True),
        text_key("t", "a"),
        text_key("u", "a"),
        text_key("t", "b"),
    }
    assert len(keys) == 11
    assert PipelineEncoder(sd_pipeline()).vae_digest == encoder.vae_digest


def test_an_embedding_does_not_depend_on_the_other_prompts(monkeypatch) -> None:
    """A batch of another size may round differently, so on a CPU each prompt is encoded by itself."""
    pipe, sizes = sd_pipeline(), []
    real = pipe.text_encoder.forward
    monkeypatch.setattr(
        pipe.text_encoder, "forward", lambda ids, **kwargs: sizes.append(len(ids)) or real(ids, **kwargs)
    )
    PipelineEncoder(pipe).encode_prompts(["a red bell", "", "make it blue"])
    assert sizes == [1, 1, 1]
