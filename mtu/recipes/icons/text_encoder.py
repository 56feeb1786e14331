"""The tokenizer and text encoder of the icon models."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mtu.data.icons.catalogue import vocabulary

WORD_END = "</w>"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class TextEncoderConfig:
    """Size of the text encoder.

    Attributes:
        width: width of the embeddings, which the UNet attends to.
        num_layers: number of transformer layers.
        num_heads: number of attention heads.
        max_length: tokens per prompt, including begin and end.
    """

    width: int = 128
    num_layers: int = 3
    num_heads: int = 4
    max_length: int = 24


@cache
def learn_bpe_merges(words: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Learn byte-pair merges until every word is one token.

    The most frequent pair is merged first, and of equally frequent pairs the alphabetically first. The trainer of the
    `tokenizers` library breaks ties by a randomly seeded hash table, so that another process would get other token
    numbers. A resumed training needs the same ones.

    Args:
        words: lower-case ASCII words, each counted once.
    """
    pieces = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges = []
    while unfinished := [word for word in pieces if len(word) > 1]:
        counts = Counter(pair for word in unfinished for pair in pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word in unfinished:
            for i in reversed(range(len(word) - 1)):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]
    return tuple(merges)


def build_tokenizer(max_length: int) -> CLIPTokenizer:
    """Build a byte-pair tokenizer for which each word of the data set is one token.

    Every byte is a token, alone and at a word's end, so that any text can be encoded without an unknown token.

    Args:
        max_length: tokens per prompt, including begin and end.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_bpe_merges(vocabulary())
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet), *(left + right for left, right in merges)]
    # Two pairs may merge to the same token, which keeps its first place.
    ordered = dict.fromkeys([*tokens, BEGIN, END])
    identifiers = {token: number for number, token in enumerate(ordered)}
    return CLIPTokenizer(vocab=identifiers, merges=list(merges), model_max_length=max_length)


def build_text_encoder(config: TextEncoderConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build an untrained CLIP text encoder for a tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            projection_dim=config.width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Turn prompts into token numbers, (n, max_length) int64, padded as `StableDiffusionPipeline` pads them."""
    length = tokenizer.model_max_length
    return tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
