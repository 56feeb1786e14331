"""The tokenizer and text encoder of the icon models."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mtu.data.catalogue import vocabulary

WORD_END = "</w>"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class TextConfig:
    """The text encoder's size.

    Attributes:
        width: of the embeddings and of what the UNet attends to.
        layers: transformer layers.
        heads: attention heads.
        max_length: tokens per prompt, begin and end included.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    max_length: int = 24


def build_tokenizer(max_length: int) -> CLIPTokenizer:
    """Train a byte-pair tokenizer for which each word of the data set is one token.

    Every byte is a token, alone and at a word's end, so that any text can be encoded without an unknown token.

    Args:
        max_length: tokens per prompt, begin and end included.
    """
    stock = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    trained.normalizer, trained.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The size is out of reach: training goes on until every word has been merged into one token.
    trainer = trainers.BpeTrainer(
        vocab_size=1_000_000,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    trained.train_from_iterator(vocabulary(), trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet), *(left + right for left, right in merges)]
    # Two pairs can merge to the same token; it keeps its first place.
    ordered = dict.fromkeys([*tokens, BEGIN, END])
    identifiers = {token: number for number, token in enumerate(ordered)}
    return CLIPTokenizer(vocab=identifiers, merges=merges, model_max_length=max_length)


def build_text_encoder(config: TextConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build an untrained CLIP text encoder for a tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            projection_dim=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Return the (n, max_length) int64 token numbers of prompts, padded as StableDiffusionPipeline pads them."""
    length = tokenizer.model_max_length
    return tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
