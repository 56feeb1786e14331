"""`MTUPipeline`, the multi-task pipeline of Stable Diffusion 1 and 2: encoding, checks, decoding, loading, saving."""

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
from mtu.example_inputs import default_latent_height_and_width
from mtu.models import pretrained
from mtu.pipelines.callbacks import StepEndCallback, collapse_guidance_scales
from mtu.pipelines.conversion import check_pipeline_not_offloaded, pipeline_with_class_and_unet
from mtu.pipelines.denoising import (
    BranchInputs,
    SampleConditioning,
    build_branch_inputs,
    denoise,
    encode_condition_images,
    select_prompt_embeds,
)
from mtu.pipelines.guidance import GuidancePlan, plan_guidance
from mtu.pipelines.inputs import PipelineInputs, output_height_and_width, parse_pipeline_inputs
from mtu.pipelines.model_card import write_model_card

__all__ = ["MTUPipeline"]


class MTUPipeline(StableDiffusionPipeline):
    """Stable Diffusion for several tasks: text-to-image, editing, super-resolution, removal, and tasks of your own.

    `mtu.upcycle` makes this pipeline from a stock one, and `MTUPipeline.from_pretrained` loads a saved one. Loading,
    saving, offloading, LoRA and all else come from `StableDiffusionPipeline`.
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
        """Generate images; each sample of the batch has its own task.

        Args:
            prompt: one text per sample; None or "" for tasks that take no prompt.
            image: condition image of each sample; None for tasks that take none. An image is a PIL image, an array
                (H, W, 3) or a tensor (3, H, W), uint8 or float in [0, 1]. A single image serves all samples.
            task: one task name, or one per sample; None: the model's first task.
            height, width: size of the outputs in pixels; None: the size that the images imply, else the model's own.
            num_inference_steps: denoising steps; None: the tasks' own number.
            guidance_scale: scale of text guidance, one number or one per sample; None: the task's own. It has no
                effect on tasks without guidance.
            image_guidance_scale: scale of image guidance, one number or one per sample; None: the task's own. It has
                an effect on tasks with dual guidance only.
            negative_prompt: one text, or one per sample.
            num_images_per_prompt: outputs per sample.
            eta: η of DDIM, in [0, 1].
            generator: one generator for all outputs, or a list with one per output.
            latents: (outputs, 4, h, w) initial noise; None: the noise is drawn from `generator`.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return `StableDiffusionPipelineOutput` instead of a tuple.
            cross_attention_kwargs: arguments of the attention processors; `scale` is the LoRA scale.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after each step. It returns
                a dictionary of tensors, of the same shapes, for the next steps. It may also set
                `pipeline._guidance_scale` and `pipeline._image_guidance_scale` to a number, which holds for all
                samples, or to one number per sample. They are numbers where the scales of all guided samples agree,
                else tensors (outputs,).
            callback_on_step_end_tensor_inputs: which of "latents" and "prompt_embeds" the callback gets. The prompt
                embeddings have one row per guidance branch, in the order of the stock pipelines where all samples
                have equally many. A callback that turns text guidance off (a scale ≤ 1) may return the rows of the
                prompts alone; a callback that turns it on returns all rows.

        Returns:
            The images in the order of the samples, and whether the safety checker (if any) flagged them.

        Raises:
            ValueError: the arguments do not fit the tasks. Nothing has been computed then.

        Example:
            One call mixes a task without an image with tasks that edit and enlarge one::

                output = pipe(
                    prompt=["a red bell on white", "make it blue", ""],
                    image=[None, photo, small_photo],
                    task=["text-to-image", "edit", "super-resolution"],
                    guidance_scale=[5.0, None, None],  # None: the task's own scale
                    height=512,
                    width=512,
                )
                picture, edited, enlarged = output.images
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
        size = output_height_and_width(inputs, height, width, self._default_size(), self.vae_scale_factor)
        self._check_task_channels(inputs)
        self._check_noise(inputs, size, generator, latents, eta)
        self._check_output_options(output_type, callback_on_step_end_tensor_inputs)
        self._publish_call_settings(inputs, cross_attention_kwargs)

        samples, branches = self._encode_inputs(inputs, size, cross_attention_kwargs)
        device, dtype = self._execution_device, branches.prompt_embeds.dtype
        self._num_timesteps = len(retrieve_timesteps(self.scheduler, inputs.num_inference_steps, device)[0])
        sample: Tensor = self.prepare_latents(
            len(inputs.tasks),
            self.unet.config.in_channels,
            *size,
            dtype,
            device,
            generator,
            None if latents is None else latents.to(dtype),
        )
        scheduler_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        on_step_end = None
        if callback_on_step_end is not None:
            on_step_end = StepEndCallback(
                callback_on_step_end, callback_on_step_end_tensor_inputs, self, samples, self._embeds_guidance_scale()
            )
        sample = denoise(self, sample, branches, inputs.num_inference_steps, scheduler_kwargs, on_step_end)
        return self._decode_latents(sample, generator, output_type, return_dict)

    def export_task(self, name: str) -> StableDiffusionPipeline | StableDiffusionInstructPix2PixPipeline:
        """Make the stock diffusers pipeline of one task, whose plain UNet has the same output.

        The new pipeline shares all other components. It resizes and guides as stock pipelines do, so its caller resizes
        images to the output size and passes the task's guidance scales.

        Args:
            name: the task.

        Returns:
            A `StableDiffusionInstructPix2PixPipeline` for a task with an image, else a `StableDiffusionPipeline`.

        Raises:
            ValueError: the task is unknown, no stock configuration can hold the experts, the pipeline is offloaded, or
                its UNet is not upcycled.
        """
        self._check_upcycled()
        spec = self.unet.tasks[self.unet.task_index(name)]
        check_pipeline_not_offloaded(self)
        stock = StableDiffusionInstructPix2PixPipeline if spec.takes_image else StableDiffusionPipeline
        return pipeline_with_class_and_unet(self, stock, self.unet.export_task(name))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """Load a pipeline that `save_pretrained` saved, from safetensors files alone.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the Hub.
            kwargs: as in diffusers.

        Raises:
            ValueError: `use_safetensors` is False, or the UNet is of another architecture, truncated or altered.
            OSError: the repository cannot be reached, or lacks files.
        """
        return super().from_pretrained(pretrained_model_name_or_path, **_safetensors_only(kwargs))

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike:
        """Download the safetensors files of a repository of the Hub into the cache.

        Args:
            pretrained_model_name: the repository.
            kwargs: as in diffusers.

        Returns:
            The folder of the downloaded files.

        Raises:
            ValueError: `use_safetensors` is False.
            OSError: the repository cannot be reached, or lacks files.
        """
        # diffusers refuses to download components of libraries that it does not know, such as the upcycled UNet.
        return MTUPipelineDownloader.download(pretrained_model_name, **_safetensors_only(kwargs))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any):
        """Make a multi-task pipeline from the components of another pipeline, which include an upcycled UNet.

        As in diffusers, all components are cast to `torch_dtype`, which is float32 by default.

        Args:
            pipeline: the other pipeline.
            kwargs: as in diffusers.
        """
        # diffusers alone would drop the upcycled UNet, because its class is not exactly that of the stock pipeline.
        own = {name: part for name, part in pipeline.components.items() if name == "unet"}
        return super().from_pipe(pipeline, **{**own, **kwargs})

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline as diffusers does, with a model card (README.md) that says how to load it.

        A card that somebody else wrote or edited stays.

        Args:
            save_directory: the folder.
            args, kwargs: as in diffusers.

        Raises:
            ValueError: the arguments ask for another format than safetensors, the UNet is not upcycled, or it cannot be
                saved. Nothing has been written then.
        """
        self._check_upcycled()
        parameter_access.check_saveable(self.unet, "save_pretrained")
        pretrained.check_saves_safetensors(
            inspect.signature(super().save_pretrained).bind(save_directory, *args, **kwargs).arguments
        )
        super().save_pretrained(save_directory, *args, **kwargs)
        write_model_card(save_directory, self.unet)

    @property
    def image_guidance_scale(self) -> float | Tensor:
        """s_image of the running call: a number, or (outputs,) float64 where samples differ."""
        return self._image_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call guides the prompt of some sample with a scale > 1."""
        is_guided = bool((torch.as_tensor(self._guidance_scale) > 1).any())
        return is_guided and self.unet.config.time_cond_proj_dim is None

    def _upload_folder(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any):
        # Where the repository had no card, diffusers has just put its own there, and this replaces it.
        write_model_card(working_dir, self.unet)
        return super()._upload_folder(working_dir, *args, **kwargs)

    # ---------------------------------------------------------------------------------------------- steps of a call

    def _check_upcycled(self) -> None:
        if not hasattr(self.unet, "task_ids"):
            raise ValueError(
                f"This pipeline holds a {type(self.unet).__name__}, but an upcycled UNet is needed: mtu.upcycle(pipe)."
            )

    def _check_task_channels(self, inputs: PipelineInputs) -> None:
        channels = self.vae.config.latent_channels
        for spec in inputs.tasks:
            if spec.condition_channels not in (0, channels):
                raise ValueError(
                    f"Task {spec.name!r} reads {spec.condition_channels} condition channels, but this pipeline gives "
                    f"the {channels} latent channels of an image."
                )

    def _check_noise(
        self,
        inputs: PipelineInputs,
        size: tuple[int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        eta: float,
    ) -> None:
        count = len(inputs.tasks)
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

    def _check_output_options(self, output_type: str, callback_tensor_names: Sequence[str]) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', but got {output_type!r}.")
        unknown = [name for name in callback_tensor_names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs can be {self._callback_tensor_inputs}, but got {unknown}."
            )

    def _publish_call_settings(self, inputs: PipelineInputs, cross_attention_kwargs: dict[str, Any] | None) -> None:
        """Set the attributes that callbacks read and change, as the stock pipelines do."""
        self._interrupt = False
        self._cross_attention_kwargs = cross_attention_kwargs
        self._clip_skip, self._guidance_rescale = None, 0.0
        kinds = [spec.guidance for spec in inputs.tasks]
        self._guidance_scale = collapse_guidance_scales(inputs.guidance_scales, [kind != "none" for kind in kinds])
        self._image_guidance_scale = collapse_guidance_scales(
            inputs.image_guidance_scales, [kind == "dual" for kind in kinds]
        )

    def _default_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the model's own outputs; None if its configuration names no size."""
        latent_size = default_latent_height_and_width(self.unet)
        if latent_size is None:
            return None
        return latent_size[0] * self.vae_scale_factor, latent_size[1] * self.vae_scale_factor

    def _embeds_guidance_scale(self) -> bool:
        return self.unet.config.time_cond_proj_dim is not None

    def _encode_inputs(
        self, inputs: PipelineInputs, size: tuple[int, int], cross_attention_kwargs: dict[str, Any] | None
    ) -> tuple[SampleConditioning, BranchInputs]:
        """Encode prompts, images and guidance scales, and spread them over the guidance branches."""
        device, embeds_guidance_scale = self._execution_device, self._embeds_guidance_scale()
        scales = inputs.guidance_scales, inputs.image_guidance_scales
        plan = plan_guidance(inputs.tasks, *scales, device, embeds_guidance_scale=embeds_guidance_scale)
        prompt_embeds = self._branch_prompts(inputs, plan, cross_attention_kwargs)
        samples = SampleConditioning(
            inputs.tasks,
            self.unet.task_ids([spec.name for spec in inputs.tasks], device),
            encode_condition_images(self.vae, inputs, size, device, self.unet.dtype),
            self._timestep_cond(inputs).to(device, prompt_embeds.dtype) if embeds_guidance_scale else None,
        )
        return samples, build_branch_inputs(samples, plan, prompt_embeds)

    def _branch_prompts(
        self, inputs: PipelineInputs, plan: GuidancePlan, cross_attention_kwargs: dict[str, Any] | None
    ) -> Tensor:
        """The text embedding of each branch, (N, L, D)."""
        needs_negative = not bool(plan.use_prompt_per_branch.all())
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
        """The embedded guidance scale of each sample, (B, W), as the stock pipelines compute it for text-to-image.

        Samples with a condition image get zeros. The stock pipelines embed no scale for them, which has the same
        effect, because the projection of the embedding has no bias.
        """
        scales = torch.tensor([scale - 1 for scale in inputs.guidance_scales])
        embedding = self.get_guidance_scale_embedding(scales, self.unet.config.time_cond_proj_dim)
        return embedding * torch.tensor([not spec.takes_image for spec in inputs.tasks])[:, None]

    def _decode_latents(
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


# `model_index.json` names the module that a class is imported from, which shall be the package and not this file.
MTUPipeline.__module__ = "mtu"
