"""The pipelines whose images are measured, stock and upcycled, copies of them, and the samples that they make."""

import argparse
import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from torch import Tensor, nn

import mtu
from benchmarks.harness.arguments import parse_count
from benchmarks.harness.correctness import WrongResult
from benchmarks.harness.memory import storage_bytes
from benchmarks.harness.workloads import Workload
from benchmarks.models.unet_models import copy_unet_sharing_weights
from mtu.data.icons import examples as icons
from mtu.data.icons.examples import IconDataset
from mtu.pipelines.inputs import prepare_condition_image
from mtu.recipes.icons.demo import ICON_TASKS, SHIPPED_BASE_MODEL
from mtu.tasks import TaskSpec

# How far tasks are moved apart: enough that one task's weights give other images than another's, little enough that
# images stay images.
_NORM_STD = 0.02
_ROUTER_STD = 0.02
_CONDITION_STD = 0.1

# The pipelines that `export_task` makes.
StockPipeline = StableDiffusionPipeline | StableDiffusionInstructPix2PixPipeline


class Sample(NamedTuple):
    """The arguments of one image.

    Attributes:
        spec: of its task.
        prompt: "" for tasks that take none.
        image: (3, size, size) float32 in [0, 1], of the output's size, which stock pipelines ask for; None for tasks
            that take none.
        latents: (c, h, w) float32, the noise that it starts from.
    """

    spec: TaskSpec
    prompt: str
    image: Tensor | None
    latents: Tensor


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds --folder and --steps."""
    parser.add_argument("--folder", type=Path, help="a pipeline's folder, stock or upcycled (default: shipped icons)")
    parser.add_argument("--steps", type=parse_count, help="denoising steps (default: the tasks' own)")


def workload_from_options(pipe: mtu.MTUPipeline, options: argparse.Namespace, quick_steps: int) -> Workload:
    """Model, size and steps of the images that the options ask for.

    Raises:
        ValueError: the pictures are no squares, or tasks have different numbers of steps and none is given.
    """
    steps = denoising_steps(pipe.unet.tasks, options.steps or (quick_steps if options.quick else None))
    model = "icons" if options.folder is None else options.folder.resolve().name
    return Workload(model=model, size=picture_edge(pipe), steps=steps)


def load_pipeline(folder: Path | None) -> mtu.MTUPipeline:
    """A pipeline of several tasks in float32 from a folder in diffusers' layout, by default the shipped icons model.

    A stock one is upcycled. Where all tasks are the same, they get small seeded differences.

    Raises:
        ValueError: there is no such folder, or it holds another kind of pipeline.
    """
    index = (SHIPPED_BASE_MODEL if folder is None else folder) / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{index.parent} must be a pipeline's folder in diffusers' layout, got no {index.name} there.")
    kinds = {cls.__name__: cls for cls in (StableDiffusionPipeline, mtu.MTUPipeline)}
    kind = json.loads(index.read_text()).get("_class_name")
    if kind not in kinds:
        raise ValueError(f"{index.parent} must hold one of {', '.join(kinds)}, got {kind}.")
    unsafe = {"safety_checker": None, "requires_safety_checker": False}
    pipe = kinds[kind].from_pretrained(index.parent, dtype=torch.float32, use_safetensors=True, **unsafe)
    if not isinstance(pipe, mtu.MTUPipeline):
        pipe = mtu.upcycle(pipe, ICON_TASKS if folder is None else None)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.requires_grad_(False).eval()
    if _tasks_are_equal(pipe.unet):
        separate_tasks_(pipe.unet)
    return pipe


def separate_tasks_(unet: mtu.MTUUNet2DConditionModel) -> None:
    """Move the tasks' own parameters apart by small seeded random numbers, as training would do it."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor, std: float) -> Tensor:
        return std * torch.randn(tensor.shape, generator=generator).to(tensor)

    with torch.no_grad():
        for block in unet.routed_blocks_by_name().values():
            for parameter in block.norm3.parameters():
                parameter.add_(noise(parameter, _NORM_STD))
            last = getattr(block.ff.router, "linear_2", None)
            if last is not None:
                last.weight.add_(noise(last.weight, _ROUTER_STD))
        conv, latent = unet.conv_in, unet.conv_in.latent_channels
        scale = _CONDITION_STD * float(conv.weight[:, :, :latent].std())
        for row, channels in zip(conv.weight, conv.channels_per_task, strict=True):
            row[:, latent:channels].add_(noise(row[:, latent:channels], scale))
    unet.clear_routing_cache()


def draw_samples(pipe: mtu.MTUPipeline, per_task: int) -> list[Sample]:
    """Samples of all tasks, in turn: captions, instructions and pictures of icons, and latents by seed."""
    size, factor = picture_edge(pipe), pipe.vae_scale_factor
    shape = (pipe.unet.config.in_channels, size // factor, size // factor)
    data, samples = IconDataset("test"), []
    for number in range(per_task):
        for position, spec in enumerate(pipe.unet.tasks):
            example = data.get_example(_icon_task(spec), number)
            generator = torch.Generator().manual_seed(len(pipe.unet.tasks) * number + position)
            image = example.condition_image if spec.takes_image else None
            if image is not None:
                image = prepare_condition_image(image / 2 + 0.5, spec, size, size) / 2 + 0.5
            prompt = example.prompt if spec.uses_prompt else ""
            samples.append(Sample(spec, prompt, image, torch.randn(shape, generator=generator)))
    return samples


def picture_edge(pipe: DiffusionPipeline) -> int:
    """Edge of the pictures that the model was made for, in pixels. Raises ValueError if they are no squares."""
    size = pipe.unet.config.sample_size
    edges = {size} if isinstance(size, int) else set(size)
    if len(edges) != 1:
        raise ValueError(f"The model must make square pictures, got a sample_size of {size}.")
    return edges.pop() * pipe.vae_scale_factor


def denoising_steps(specs: Sequence[TaskSpec], given: int | None) -> int:
    """Denoising steps of a call: those given, or the tasks' own. Raises ValueError where these differ."""
    own = {spec.num_inference_steps for spec in specs}
    if given is None and len(own) > 1:
        raise ValueError(f"--steps must be given for tasks of different numbers of steps, got {sorted(own)}.")
    return own.pop() if given is None else given


def stock_rows_per_sample(spec: TaskSpec) -> int:
    """Rows of the UNet's batch for one sample in a stock pipeline."""
    guided = spec.guidance != "none" and spec.guidance_scale > 1
    return (3 if spec.takes_image else 2) if guided else 1


def cast_copy(pipe: mtu.MTUPipeline, dtype: torch.dtype, device: torch.device, backend: str) -> mtu.MTUPipeline:
    """A copy in another dtype, on another device and backend. Raises RuntimeError for a backend that is missing."""
    copied = copy.deepcopy(pipe)
    for part in _modules(copied):
        # diffusers' own `.to` warns of modules to keep in float32 even where there are none.
        nn.Module.to(part, device, dtype)
    copied.unet.set_backend(backend)
    # A copy of a pipeline has a progress bar again.
    copied.set_progress_bar_config(disable=True)
    return copied


def export_stock_pipeline(pipe: mtu.MTUPipeline, name: str, parts: mtu.MTUPipeline) -> StockPipeline:
    """The stock pipeline of one task: folded in the precision of `pipe`, with the dtype and the device of `parts`.

    `parts` is a pipeline of the same model, which shares all its modules but the UNet.
    """
    stock = pipe.export_task(name)
    unet = nn.Module.to(stock.unet, parts.unet.device, parts.unet.dtype)
    stock.register_modules(unet=unet, vae=parts.vae, text_encoder=parts.text_encoder)
    stock.set_progress_bar_config(disable=True)
    return stock


def copy_sharing_weights(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline with a UNet of its own on the same weights, so that one may be compiled and the other not."""
    copied = copy.copy(pipe)
    copied.unet = copy_unet_sharing_weights(pipe.unet)
    return copied


def count_weight_bytes(pipes: Iterable[DiffusionPipeline]) -> int:
    """Bytes of all parameters and buffers that pipelines keep, shared ones counted once."""
    modules = [module for pipe in pipes for module in _modules(pipe)]
    return storage_bytes(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))


def make_upcycled_images(pipe: mtu.MTUPipeline, samples: Sequence[Sample], steps: int) -> Tensor:
    """Images of any mix of tasks from one call: (n, 3, H, W) in [0, 1], in the pipeline's dtype."""
    prompts, images = [sample.prompt for sample in samples], [sample.image for sample in samples]
    tasks, size = [sample.spec.name for sample in samples], picture_edge(pipe)
    output: Any = pipe(prompts, images, tasks, **_common(pipe, samples, steps), height=size, width=size)
    return output.images


def make_stock_images(pipe: StockPipeline, samples: Sequence[Sample], steps: int) -> Tensor:
    """Images of one task from one call of its exported pipeline: (n, 3, H, W) in [0, 1], in the pipeline's dtype."""
    spec = samples[0].spec
    given: dict[str, Any] = {"guidance_scale": spec.guidance_scale}
    if spec.takes_image:
        # Without dual guidance, i − u drops out of the stock formula at the scale 1.
        given["image_guidance_scale"] = 1.0 if spec.image_guidance_scale is None else spec.image_guidance_scale
        given["image"] = torch.stack([sample.image for sample in samples])
    output: Any = pipe([sample.prompt for sample in samples], **_common(pipe, samples, steps), **given)
    return output.images


def positions_by_task(samples: Sequence[Sample]) -> Mapping[str, list[int]]:
    """Positions of the samples of each task, by its name."""
    positions: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        positions.setdefault(sample.spec.name, []).append(i)
    return positions


def check_images(images: Tensor, user: Tensor, exact: Tensor) -> None:
    """Asserts ``rms(images − exact) <= 2 · rms(user − exact) + ulp``, and the dtype.

    The largest difference, as for one call of a kernel, would not do: the steps of a sampler pass single pixels' errors
    on. `user` are the images of the code whose error sets the tolerance, `exact` those of a wider dtype.

    Raises:
        WrongResult: one sentence with the error and the tolerance.
    """
    error, usual = (float((t.double() - exact.double()).square().mean().sqrt()) for t in (images, user))
    allowed = 2 * usual + torch.finfo(user.dtype).eps
    # Not "error > allowed", which NaN would pass.
    if images.dtype != user.dtype or not error <= allowed:
        raise WrongResult(
            f"the images must be {user.dtype} within {allowed:.3g} (root mean square) of the exact ones, got "
            f"{images.dtype} off by {error:.3g}."
        )


def _common(pipe: DiffusionPipeline, samples: Sequence[Sample], steps: int) -> dict[str, Any]:
    latents = torch.stack([sample.latents for sample in samples]).to(pipe.unet.device, pipe.unet.dtype)
    return {"latents": latents, "num_inference_steps": steps, "output_type": "pt"}


def _modules(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def _tasks_are_equal(unet: mtu.MTUUNet2DConditionModel) -> bool:
    rows = [parameter for block in unet.routed_blocks_by_name().values() for parameter in block.norm3.parameters()]
    return len(unet.tasks) > 1 and all(torch.equal(row, row[:1].expand_as(row)) for row in rows)


def _icon_task(spec: TaskSpec) -> str:
    """The task of the icons' data whose prompts and pictures serve a task."""
    if spec.name in icons.TASK_NAMES:
        return spec.name
    return "edit" if spec.takes_image else "text-to-image"
