"""`BatchLoader` makes the part of a step's batch that a process computes at a time, with all that is random in it.

It runs in worker processes, which have no models. Images and prompts that are not in a cache therefore travel to the
objective, which encodes them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtu.data.task_dataset import TaskDataset
from mtu.tasks import TaskSpec
from mtu.training.multitask.encoded_cache import EncodedCache
from mtu.training.multitask.encoding import ExamplePixels, image_key, preprocess, text_key
from mtu.training.multitask.multitask_config import MultiTaskConfig
from mtu.training.multitask.step_plan import PlannedExample, StepPlan
from mtu.training.multitask.timesteps import timesteps_at_fractions
from mtu.training.objective import BatchPart

__all__ = [
    "Batch",
    "BatchLoader",
    "FoundEncodings",
    "ImageItem",
    "MissingImages",
    "MissingPrompt",
    "ModelCache",
    "TrainedTask",
]


class FoundEncodings(NamedTuple):
    """What a cache had of the images or prompts of a part.

    Args:
        positions: the positions in the part of the m examples that it had.
        tensors: their tensors by name, (m, …) each. Few large tensors take fewer file descriptors on their way from a
            worker process than many small ones.
    """

    positions: list[int]
    tensors: dict[str, Tensor]


class MissingImages(NamedTuple):
    """The preprocessed images of k examples that have to be encoded.

    Args:
        positions: their positions in the part.
        keys: their keys in the cache; empty strings: there is no cache.
        descriptions: where a user finds them.
        have_condition: whether they have a condition image.
        targets, conditions: (k, 3, H, W) float32 in [−1, 1]; zero without a condition image.
        sizes: (k, 4) int64, as in `ExamplePixels`.
    """

    positions: list[int]
    keys: list[str]
    descriptions: list[str]
    have_condition: list[bool]
    targets: Tensor
    conditions: Tensor
    sizes: Tensor


class MissingPrompt(NamedTuple):
    """A prompt that has to be encoded.

    Args:
        position: its position in the part.
        key: its key in the cache; empty: there is no cache.
        prompt: the prompt.
    """

    position: int
    key: str
    prompt: str


class Batch(NamedTuple):
    """A part of a step's batch, with n examples.

    Args:
        task_ids: (n,) int64.
        timesteps: (n,) int64.
        noise: (n, c, h, w) float32.
        latent_noise: (n, c, h, w) float32, by which target latents are drawn; None: they are the mode.
        keeps_image: (n,) bool, False where dropout takes the condition image.
        has_zero_text: (n,) bool, True where zeros stand for the dropped prompt. Elsewhere, the empty prompt does.
        counts: (n,) int64, how many examples of the same task the step has.
        tasks: the tasks of the step, also those that this part has no example of.
        latents: the encoded images that were in the cache (see `PipelineEncoder.encode_images`). Without a condition
            image, the condition is zero.
        texts: the encoded prompts that were in the cache (see `PipelineEncoder.encode_prompts`).
        missing_images: the other images; None: there are none.
        missing_prompts: the other prompts.
        num_damaged_entries: how many damaged entries of the caches the process that loaded this part has met.
    """

    task_ids: Tensor
    timesteps: Tensor
    noise: Tensor
    latent_noise: Tensor | None
    keeps_image: Tensor
    has_zero_text: Tensor
    counts: Tensor
    tasks: list[str]
    latents: FoundEncodings
    texts: FoundEncodings
    missing_images: MissingImages | None
    missing_prompts: list[MissingPrompt]
    num_damaged_entries: int


class DrawnExample(NamedTuple):
    """The random choices of one example.

    Args:
        variant: number of the variant.
        prompt: the prompt; empty where it is dropped.
        drops_prompt, drops_image: what dropout takes.
        flip: whether the images are mirrored.
        fraction: a number in [0, 1), where in its stretch of the schedule the timestep lies.
        noise_seed: seed of the noise.
    """

    variant: int
    prompt: str
    drops_prompt: bool
    drops_image: bool
    flip: bool
    fraction: float
    noise_seed: int


class ImageItem(NamedTuple):
    """The images of one variant, perhaps mirrored, which are encoded together."""

    task: int
    row: int
    variant: int
    flip: bool


class ModelCache(NamedTuple):
    """A cache of what a model encoded.

    Args:
        entries: the cache.
        model_digest: a digest of the model, which the keys depend on.
    """

    entries: EncodedCache
    model_digest: str


class TrainedTask(NamedTuple):
    """A task with its examples.

    Args:
        spec: the task.
        task_id: its id in the model.
        dataset: its examples.
    """

    spec: TaskSpec
    task_id: int
    dataset: TaskDataset


class BatchLoader:
    """Loads the parts of batches; each is a function of (seed, step, positions) alone.

    Args:
        tasks: the tasks, in the order of the plan.
        plan: says which example each position of a step holds.
        config: the settings of the objective.
        num_timesteps: timesteps of the noise schedule.
        latent_shape: (c, h, w) of the latents.
        zeros_for_dropped_prompt: whether zeros stand for a dropped prompt, and not the embedding of the empty prompt.
        latent_cache, text_cache: the caches of encoded images and prompts; None: there is none.
    """

    def __init__(
        self,
        tasks: Sequence[TrainedTask],
        plan: StepPlan,
        config: MultiTaskConfig,
        *,
        num_timesteps: int,
        latent_shape: tuple[int, int, int],
        zeros_for_dropped_prompt: bool,
        latent_cache: ModelCache | None,
        text_cache: ModelCache | None,
    ) -> None:
        self.tasks, self.plan, self.config = tasks, plan, config
        self.latent_cache, self.text_cache = latent_cache, text_cache
        self._timestep_count, self._latent_shape = num_timesteps, latent_shape
        self._zeros_for_dropped_prompt = zeros_for_dropped_prompt
        # Dropout and tasks without prompts need it in each step.
        self._empty_prompt: dict[str, Tensor] | None = None

    def __call__(self, part: BatchPart) -> Batch:
        """Load a part of a batch."""
        examples, draws = self.draw_examples(part)
        generators = [torch.Generator().manual_seed(draw.noise_seed) for draw in draws]
        noise = torch.stack([torch.randn(self._latent_shape, generator=generator) for generator in generators])
        latent_noise = None
        if self.config.latent_sampling == "sample":
            latent_noise = torch.stack([torch.randn(self._latent_shape, generator=one) for one in generators])
        # Within each task, each of equal stretches of the schedule gives one timestep: the loss then varies less from
        # step to step than with the independent timesteps of diffusers' scripts.
        pairs = list(zip(examples, draws, strict=True))
        fractions = torch.tensor([(example.rank + draw.fraction) / example.count for example, draw in pairs])
        present = {example.task for example in self.plan.examples(part.step)}
        latents, missing_images = self._latents(
            [ImageItem(example.task, example.row, draw.variant, draw.flip) for example, draw in pairs]
        )
        texts, missing_prompts = self._texts([draw.prompt for draw in draws])
        return Batch(
            torch.tensor([self.tasks[example.task].task_id for example in examples]),
            timesteps_at_fractions(fractions, self._timestep_count),
            noise,
            latent_noise,
            torch.tensor([not draw.drops_image for draw in draws]),
            torch.tensor([draw.drops_prompt and self._zeros_for_dropped_prompt for draw in draws]),
            torch.tensor([example.count for example in examples]),
            [self.tasks[index].spec.name for index in sorted(present)],
            latents,
            texts,
            missing_images,
            missing_prompts,
            sum(cache.entries.damaged for cache in (self.latent_cache, self.text_cache) if cache is not None),
        )

    def draw_examples(self, part: BatchPart) -> tuple[Sequence[PlannedExample], list[DrawnExample]]:
        """The examples of a part, and the random choices of each."""
        size = self.config.batch_size // part.count
        first = part.index * size
        examples = self.plan.examples(part.step)[first : first + size]
        return examples, [self._draw(part.step, first + i, example) for i, example in enumerate(examples)]

    def describe(self, part: BatchPart) -> list[str]:
        """Tell a user which examples a part consists of."""
        return [self._describe(example, draw) for example, draw in zip(*self.draw_examples(part), strict=True)]

    def image_items(self) -> Iterator[ImageItem]:
        """All images that a training may visit."""
        for index, task in enumerate(self.tasks):
            for row in range(len(task.dataset)):
                for variant in range(len(task.dataset.prompts(row))):
                    for flip in (False, True) if self.config.random_flip else (False,):
                        yield ImageItem(index, row, variant, flip)

    def prompts(self) -> list[str]:
        """All prompts that a training may visit, each once. The empty prompt is the first."""
        found = {"": None}
        for task in self.tasks:
            if task.spec.uses_prompt:
                for row in range(len(task.dataset)):
                    for prompts in task.dataset.prompts(row):
                        found.update(dict.fromkeys(prompts))
        return list(found)

    def image_key(self, item: ImageItem) -> str:
        """The key of images in the cache; empty: there is no cache."""
        if self.latent_cache is None:
            return ""
        spec, _, dataset = self.tasks[item.task]
        digest = dataset.image_digest(item.row, item.variant)
        return image_key(self.latent_cache.model_digest, digest, spec, *self.config.height_and_width, item.flip)

    def load_pixels(self, item: ImageItem) -> ExamplePixels:
        """Load and preprocess the images of an item.

        Raises:
            ValueError: an image cannot be read, or does not fit the task.
        """
        spec, _, dataset = self.tasks[item.task]
        images = dataset.load_images(item.row, item.variant)
        height, width = self.config.height_and_width
        return preprocess(images, spec, height, width, flip=item.flip, description=self.describe_item(item))

    def describe_item(self, item: ImageItem) -> str:
        """Tell a user which images an item consists of."""
        spec, _, dataset = self.tasks[item.task]
        variants = len(dataset.prompts(item.row))
        which = f" (variant {item.variant + 1})" if variants > 1 else ""
        return f"{spec.name}: {dataset.describe_row(item.row)}{which}"

    def _draw(self, step: int, position: int, example: PlannedExample) -> DrawnExample:
        """Make the random choices of an example.

        Dual guidance learns its three branches as in diffusers' train_instruct_pix2pix: of the probability p each, the
        prompt is dropped, both are, and the image is. Text guidance drops the prompt alone.
        """
        rng = np.random.default_rng([self.config.seed, 2, step, position])
        uniform, fraction, flip, variant, prompt = rng.random(5)
        noise_seed = int(rng.integers(2**63))
        spec, _, dataset = self.tasks[example.task]
        variants = dataset.prompts(example.row)
        variant = int(variant * len(variants))
        prompts = variants[variant] if spec.uses_prompt else [""]
        p = self.config.conditioning_dropout_prob
        drops_prompt = uniform < {"none": 0, "text": p, "dual": 2 * p}[spec.guidance]
        drops_image = spec.guidance == "dual" and p <= uniform < 3 * p
        return DrawnExample(
            variant,
            "" if drops_prompt else prompts[int(prompt * len(prompts))],
            bool(drops_prompt),
            bool(drops_image),
            bool(self.config.random_flip and flip < 0.5),
            float(fraction),
            noise_seed,
        )

    def _describe(self, example: PlannedExample, draw: DrawnExample) -> str:
        return self.describe_item(ImageItem(example.task, example.row, draw.variant, draw.flip))

    def _latents(self, items: Sequence[ImageItem]) -> tuple[FoundEncodings, MissingImages | None]:
        """What the cache has of some images, and the others."""
        found: dict[int, dict[str, Tensor]] = {}
        missing = []
        for position, item in enumerate(items):
            key = self.image_key(item)
            entry = None if self.latent_cache is None else self.latent_cache.entries.get(key)
            if entry is None:
                missing.append((position, key, self.describe_item(item), self.load_pixels(item)))
            else:
                found[position] = {"condition": torch.zeros(self._latent_shape), **entry}
        return _stacked(found), _stacked_images(missing) if missing else None

    def _texts(self, prompts: Sequence[str]) -> tuple[FoundEncodings, list[MissingPrompt]]:
        """What the cache has of some prompts, and the others."""
        found, missing = {}, []
        for position, prompt in enumerate(prompts):
            key = "" if self.text_cache is None else text_key(self.text_cache.model_digest, prompt)
            entry = self._read_text(key, prompt)
            if entry is None:
                missing.append(MissingPrompt(position, key, prompt))
            else:
                found[position] = entry
        return _stacked(found), missing

    def _read_text(self, key: str, prompt: str) -> dict[str, Tensor] | None:
        """The embeddings of a prompt from the cache. Those of the empty prompt are read once."""
        if self.text_cache is None:
            return None
        if prompt:
            return self.text_cache.entries.get(key)
        if self._empty_prompt is None:
            self._empty_prompt = self.text_cache.entries.get(key)
        return self._empty_prompt


def _stacked(found: Mapping[int, Mapping[str, Tensor]]) -> FoundEncodings:
    if not found:
        return FoundEncodings([], {})
    names = next(iter(found.values()))
    tensors = {name: torch.stack([entry[name] for entry in found.values()]) for name in names}
    return FoundEncodings(list(found), tensors)


def _stacked_images(missing: Sequence[tuple[int, str, str, ExamplePixels]]) -> MissingImages:
    positions, keys, descriptions, pixels = (list(column) for column in zip(*missing, strict=True))
    conditions = [torch.zeros_like(one.target) if one.condition is None else one.condition for one in pixels]
    return MissingImages(
        positions,
        keys,
        descriptions,
        [one.condition is not None for one in pixels],
        torch.stack([one.target for one in pixels]),
        torch.stack(conditions),
        torch.stack([one.sizes for one in pixels]),
    )
