"""Encoding before the first step: all images and prompts of a training that are not in a cache yet."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from accelerate import Accelerator
from tqdm import tqdm

from mtu.training.distributed import common_errors_context
from mtu.training.multitask.batches import BatchLoader
from mtu.training.multitask.encoding import PipelineEncoder, on_device_context, text_key

__all__ = ["encode_missing_items"]

_LOADING_THREADS = 4
_PROMPTS_BETWEEN_UPDATES = 64

Item = TypeVar("Item")
Result = TypeVar("Result")


def encode_missing_items(
    encoder: PipelineEncoder, loader: BatchLoader, accelerator: Accelerator, device: torch.device, threads: int
) -> None:
    """Fill the caches of a training; the processes share the work, and all of them wait for the last.

    Caches in memory belong to their process, so each process fills its own. Models are on the device only as long as
    they have something to encode.

    Args:
        encoder: encodes by the models of the pipeline.
        loader: knows the items and the caches.
        accelerator: tells the processes.
        device: the device of encoding in this process.
        threads: CPU threads that encode images at the same time.

    Raises:
        ValueError: an image cannot be read, or does not fit its task.
        FloatingPointError: latents are not finite.
        OSError: a cache cannot be written, for example on a full disk.
    """
    # The processes wait for each other at the end of this context.
    with common_errors_context(accelerator):
        _encode_images(encoder, loader, accelerator, device, threads)
        _encode_prompts(encoder, loader, accelerator, device)


def _encode_images(
    encoder: PipelineEncoder, loader: BatchLoader, accelerator: Accelerator, device: torch.device, threads: int
) -> None:
    cache = loader.latent_cache
    if cache is None:
        return
    own = _own_share(loader.image_items(), cache.entries.directory is None, accelerator)
    missing = []
    for item in _with_progress(list(own), "looking for encoded images", accelerator):
        key = loader.image_key(item)
        if key not in cache.entries:
            missing.append((key, item))
    if not missing:
        return

    def encode(key_and_item) -> None:
        key, item = key_and_item
        # Threads have their own grad mode, which `encode_images` turns off.
        cache.entries.put(key, encoder.encode_images(loader.load_pixels(item), loader.describe_item(item)))

    with on_device_context([encoder.vae], device):
        # On a CPU, threads encode. Elsewhere, they load the next images while the accelerator encodes.
        if device.type == "cpu":
            results = _in_threads(encode, missing, threads)
        else:
            loaded = _in_threads(lambda pair: (*pair, loader.load_pixels(pair[1])), missing, _LOADING_THREADS)
            results = (
                cache.entries.put(key, encoder.encode_images(pixels, loader.describe_item(item)))
                for key, item, pixels in loaded
            )
        for _ in _with_progress(results, "encoding images", accelerator, len(missing)):
            pass


def _encode_prompts(
    encoder: PipelineEncoder, loader: BatchLoader, accelerator: Accelerator, device: torch.device
) -> None:
    cache = loader.text_cache
    if cache is None:
        return
    own = list(_own_share(loader.prompts(), cache.entries.directory is None, accelerator))
    keys = {text_key(cache.model_digest, prompt): prompt for prompt in own}
    missing = [(key, prompt) for key, prompt in keys.items() if key not in cache.entries]
    if not missing:
        return
    chunks = [missing[i : i + _PROMPTS_BETWEEN_UPDATES] for i in range(0, len(missing), _PROMPTS_BETWEEN_UPDATES)]
    with on_device_context(encoder.text_encoders, device):
        for chunk in _with_progress(chunks, f"encoding {len(missing)} prompts", accelerator):
            encoded = encoder.encode_prompts([prompt for _, prompt in chunk])
            for (key, _), tensors in zip(chunk, encoded, strict=True):
                cache.entries.put(key, tensors)


def _own_share(items: Iterable[Item], needs_all: bool, accelerator: Accelerator) -> Iterator[Item]:
    """The items that this process encodes."""
    for number, item in enumerate(items):
        if needs_all or number % accelerator.num_processes == accelerator.process_index:
            yield item


def _with_progress(
    items: Iterable[Item], description: str, accelerator: Accelerator, total: int | None = None
) -> Iterable[Item]:
    """Iterate with a progress bar on the main process, which goes away at the end."""
    return tqdm(items, description, total, leave=False, disable=not accelerator.is_main_process)


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> Iterator[Result]:
    """Call a function in threads and yield the results in order, with only a few of them waiting in memory."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
