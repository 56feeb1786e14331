"""The multi-task Stable Diffusion pipeline."""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

from mtu.compat import parameter_access
from mtu.compat.private_interfaces import MTUPipelineDownloader, retrieve_timesteps
from mtu.example_inputs import default_latent_size
from mtu.models import pretrained
from mtu.pipelines.callbacks import StepEndCallback, collapse_guidance_scales
from mtu.pipelines.conversion import check_not_offloaded, convert_pipeline
from mtu.pipelines.denoising import (
    SampleConditioning,
    build_branch_inputs,
    denoise,
    encode_condition_images,
    select_prompt_embeds,
)
from mtu.pipelines.guidance import GuidancePlan, plan_guidance
from mtu.pipelines.inputs import PipelineInputs, output_size, parse_pipeline_inputs
from mtu.pipelines.model_card import write_model_card

__all__ = ["MTUPipeline"]


class MTUPipeline(StableDiffusionPipeline):
    """Text-to-image, editing, super-resolution and removal (and tasks of your own) from one Stable Diffusion model.

    Loading, saving, offloading, LoRA and the rest are inherited from `StableDiffusionPipeline`; made by `mtu.upcycle`
    from a stock pipeline, or by `MTUPipeline.from_pretrained`.
    """

    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds"]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str | None] | None = None,
        image: Any = None,
        task: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float | None] | None = None,
        image_guidance_scale: float | Sequence[float | None] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> StableDiffusionPipelineOutput | tuple:
        """Generate images, each under its own task.

        Args:
            prompt: one text per sample; None or "" for tasks that take no prompt.
            image: condition image of each sample (PIL, array (H, W, 3), tensor (3, H, W) with values in [0, 1], or
                uint8); None for tasks that take none. A single image serves all samples.
            task: task name, or one per sample; None: the model's first task.
            height, width: of the outputs, in pixels; None: from the images, else the model's own.
            num_inference_steps: None: the tasks' own.
            guidance_scale: of the text, one number or one per sample; None: the task's own. No effect on tasks
                without guidance.
            image_guidance_scale: of the image, for tasks with dual guidance; likewise.
            negative_prompt: one text, or one per sample.
            num_images_per_prompt: outputs per sample.
            eta: η of DDIM.
            generator: one for all, or a list with one per output, for a seed per image.
            latents: (outputs, 4, h, w) initial noise; None: drawn from `generator`.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: return `StableDiffusionPipelineOutput` rather than a tuple.
            cross_attention_kwargs: for attention processors; `scale` is the LoRA scale.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after each step; returns the
                tensors to go on with, of the same shapes. The next steps follow what it sets `pipeline._guidance_scale`
                and `_image_guidance_scale` to: a number, which holds for all samples, or one per sample. They are
                numbers where the guided samples' scales agree, else tensors (outputs,).
            callback_on_step_end_tensor_inputs: of "latents" and "prompt_embeds" (one row per guidance branch, in the
                order of the stock pipelines where all samples have equally many). A callback that turns text guidance
                off (a scale ≤ 1) may return the rows of the prompts alone; one that turns it on returns all rows.

        Returns:
            Images in the order of the samples, and whether the safety checker (if any) flagged them.

        Raises:
            ValueError: what was given does not fit the tasks; before anything is computed.
        """
        self._check_upcycled()
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        inputs = parse_pipeline_inputs(
            self.unet.tasks,
            prompt=prompt,
            image=image,
            task=self.unet.tasks[0].name if task is None else task,
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
        )
        own = default_latent_size(self.unet)
        own = None if own is None else (own[0] * self.vae_scale_factor, own[1] * self.vae_scale_factor)
        size = output_size(inputs, height, width, own, self.vae_scale_factor)
        self._check_call(inputs, size, generator, latents, eta, output_type, callback_on_step_end_tensor_inputs)
        self._show_settings(inputs, cross_attention_kwargs)

        device, embeds_scale = self._execution_device, self.unet.config.time_cond_proj_dim is not None
        scales = inputs.guidance_scales, inputs.image_guidance_scales
        plan = plan_guidance(inputs.tasks, *scales, device, embeds_scale=embeds_scale)
        prompt_embeds = self._branch_prompts(inputs, plan, cross_attention_kwargs)
        samples = SampleConditioning(
            inputs.tasks,
            self.unet.task_ids([spec.name for spec in inputs.tasks], device),
            encode_condition_images(self.vae, inputs, size, device, self.unet.dtype),
            self._timestep_cond(inputs).to(device, prompt_embeds.dtype) if embeds_scale else None,
        )
        self._num_timesteps = len(retrieve_timesteps(self.scheduler, inputs.num_inference_steps, device)[0])
        sample: Tensor = self.prepare_latents(
            len(inputs.tasks),
            self.unet.config.in_channels,
            *size,
            prompt_embeds.dtype,
            device,
            generator,
            None if latents is None else latents.to(prompt_embeds.dtype),
        )
        scheduler_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        on_step_end = None
        if callback_on_step_end is not None:
            on_step_end = StepEndCallback(
                callback_on_step_end, callback_on_step_end_tensor_inputs, self, samples, embeds_scale
            )
        branches = build_branch_inputs(samples, plan, prompt_embeds)
        sample = denoise(self, sample, branches, inputs.num_inference_steps, scheduler_kwargs, on_step_end)
        return self._finish(sample, generator, output_type, return_dict)

    def export_task(self, name: str) -> StableDiffusionPipeline | StableDiffusionInstructPix2PixPipeline:
        """The stock diffusers pipeline of one task, on a plain UNet with the same output; all else is shared.

        It resizes and guides as stock pipelines do: give it images of the output size, and the task's scales.

        Raises:
            ValueError: unknown task, experts that no stock configuration can hold, an offloaded pipeline, or a stock
                UNet.
        """
        self._check_upcycled()
        spec = self.unet.tasks[self.unet.task_index(name)]
        check_not_offloaded(self)
        stock = StableDiffusionInstructPix2PixPipeline if spec.takes_image else StableDiffusionPipeline
        return convert_pipeline(self, stock, self.unet.export_task(name))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """Load what `save_pretrained` wrote, from a folder or a repository of the Hub; arguments as in diffusers.

        Only safetensors files are read.

        Raises:
            ValueError: `use_safetensors=False`, or a UNet of another architecture, truncated or altered.
            OSError: a repository that cannot be reached, or lacks files.
        """
        return super().from_pretrained(pretrained_model_name_or_path, **_safetensors_only(kwargs))

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike:
        """Download a repository of the Hub into the cache, and return its folder; arguments as in diffusers.

        Only safetensors files are fetched.

        Raises:
            ValueError: `use_safetensors=False`.
            OSError: a repository that cannot be reached, or lacks files.
        """
        # diffusers itself downloads components of the libraries that it knows, and refuses others.
        return MTUPipelineDownloader.download(pretrained_model_name, **_safetensors_only(kwargs))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any):
        """A multi-task pipeline of what another pipeline has, its upcycled UNet too; arguments as in diffusers.

        As there, all of it is cast to `torch_dtype`, float32 by default.
        """
        # diffusers takes over models of exactly the class that its stock pipeline names.
        own = {name: part for name, part in pipeline.components.items() if name == "unet"}
        return super().from_pipe(pipeline, **{**own, **kwargs})

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, with a README.md that says how to load the folder; one of another hand is kept.

        Raises:
            ValueError: another format than safetensors, a stock UNet, or one that cannot be saved; before any part is
                written.
        """
        self._check_upcycled()
        parameter_access.check_saveable(self.unet, "save_pretrained")
        pretrained.check_safetensors_only(
            inspect.signature(super().save_pretrained).bind(save_directory, *args, **kwargs).arguments
        )
        super().save_pretrained(save_directory, *args, **kwargs)
        write_model_card(save_directory, self.unet)

    @property
    def image_guidance_scale(self) -> float | Tensor:
        """s_image of the call, as `guidance_scale` is s_text."""
        return self._image_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether some sample's prompt is guided by a scale > 1."""
        is_guided = bool((torch.as_tensor(self._guidance_scale) > 1).any())
        return is_guided and self.unet.config.time_cond_proj_dim is None

    def _upload_folder(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any):
        # diffusers has put its own card there just before, where the repository had none.
        write_model_card(working_dir, self.unet)
        return super()._upload_folder(working_dir, *args, **kwargs)

    # ------------------------------------------------------------------------------------------------------- parts

    def _check_upcycled(self) -> None:
        if not hasattr(self.unet, "task_ids"):
            raise ValueError(
                f"This pipeline holds a {type(self.unet).__name__}, but an upcycled UNet is needed: mtu.upcycle(pipe)."
            )

    def _show_settings(self, inputs: PipelineInputs, cross_attention_kwargs: dict[str, Any] | None) -> None:
        """Set what callbacks may ask for, and change: as the stock pipelines have it."""
        self._interrupt = False
        self._cross_attention_kwargs = cross_attention_kwargs
        self._clip_skip, self._guidance_rescale = None, 0.0
        guidance = [spec.guidance for spec in inputs.tasks]
        self._guidance_scale = collapse_guidance_scales(inputs.guidance_scales, [kind != "none" for kind in guidance])
        self._image_guidance_scale = collapse_guidance_scales(
            inputs.image_guidance_scales, [kind == "dual" for kind in guidance]
        )

    def _check_call(
        self,
        inputs: PipelineInputs,
        size: tuple[int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        eta: float,
        output_type: str,
        callback_inputs: Sequence[str],
    ) -> None:
        count = len(inputs.tasks)
        for spec in inputs.tasks:
            if spec.condition_channels not in (0, self.vae.config.latent_channels):
                raise ValueError(
                    f"Task {spec.name!r} reads {spec.condition_channels} condition channels, but this pipeline gives "
                    f"the {self.vae.config.latent_channels} latent channels of an image."
                )
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator must have one entry for each of {count} outputs, but got {len(generator)}.")
        for one in generator if isinstance(generator, list) else [generator]:
            if not isinstance(one, torch.Generator) and (one is not None or isinstance(generator, list)):
                raise ValueError(f"generator must be a torch.Generator or a list of them, but got a {type(one)}.")
        expected = (count, self.unet.config.in_channels, *(edge // self.vae_scale_factor for edge in size))
        if latents is not None and not (isinstance(latents, Tensor) and latents.is_floating_point()):
            given = latents.dtype if isinstance(latents, Tensor) else type(latents)
            raise ValueError(f"latents must be a floating-point tensor of shape {expected}, but got {given}.")
        if latents is not None and tuple(latents.shape) != expected:
            raise ValueError(f"latents must have the shape {expected}, but got {tuple(latents.shape)}.")
        if not isinstance(eta, int | float) or not 0 <= eta <= 1:
            raise ValueError(f"eta must be a number in [0, 1], but got {eta!r}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', but got {output_type!r}.")
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs can be {self._callback_tensor_inputs}, but got {unknown}."
            )

    def _branch_prompts(
        self, inputs: PipelineInputs, plan: GuidancePlan, cross_attention_kwargs: dict[str, Any] | None
    ) -> Tensor:
        """(N, L, D): the text embedding of each branch."""
        needs_negative = not bool(plan.use_prompt.all())
        positive, negative = self.encode_prompt(
            inputs.prompts,
            self._execution_device,
            1,
            needs_negative,
            inputs.negative_prompts if needs_negative else None,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
        )
        return select_prompt_embeds(plan, positive, negative).to(self.unet.dtype)

    def _timestep_cond(self, inputs: PipelineInputs) -> Tensor:
        """(B, W): each sample's guidance scale embedded, as the stock pipelines do for text-to-image.

        With a condition image they embed none, which zeros amount to: their projection has no bias.
        """
        scales = torch.tensor([scale - 1 for scale in inputs.guidance_scales])
        embedding = self.get_guidance_scale_embedding(scales, self.unet.config.time_cond_proj_dim)
        return embedding * torch.tensor([not spec.takes_image for spec in inputs.tasks])[:, None]

    def _finish(
        self,
        latents: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        return_dict: bool,
    ) -> StableDiffusionPipelineOutput | tuple:
        if output_type == "latent":
            images, flagged = latents, None
        else:
            scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            decoded = self.vae.decode(scaled, return_dict=False, generator=generator)[0]
            decoded, flagged = self.run_safety_checker(decoded, self._execution_device, decoded.dtype)
            visible = [True] * len(decoded) if flagged is None else [not flag for flag in flagged]
            images = self.image_processor.postprocess(decoded, output_type=output_type, do_denormalize=visible)
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images, flagged) if return_dict else (images, flagged)


def _safetensors_only(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("use_safetensors") is False:
        raise ValueError("Only safetensors files are loaded, but got use_safetensors=False.")
    return {**kwargs, "use_safetensors": True}


# `model_index.json` names the module a class is imported from: the package, not this file.
MTUPipeline.__module__ = "mtu"
