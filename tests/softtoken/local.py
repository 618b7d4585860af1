"""Three kinds of tokenizer built on the spot, and the tiny decoders that read them."""

from __future__ import annotations

from functools import cache
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import nn

TEXTS = [
    "Question: Who lives in Paris?\nAnswer: Ada Lovelace lives in Paris.",
    "Question: What is the capital of Austria?\nAnswer: Vienna is the capital.",
    "Ada Lovelace, the mother of Bob, was born in 1815. unanswerable user assistant",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _wrapped(tokenizer: tokenizers.Tokenizer, **changes: Any) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "additional_special_tokens": SPECIAL[3:],
            "chat_template": CHATML,
        }
        | changes,
    )


@cache
def byte_level() -> transformers.PreTrainedTokenizerFast:
    """BPE over bytes, of the GPT and Llama 3 kind: a space begins the word behind it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return _wrapped(tokenizer)


@cache
def metaspace() -> transformers.PreTrainedTokenizerFast:
    """BPE over ``▁``, of the SentencePiece kind, which puts a space before any text and a BOS before that."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return _wrapped(tokenizer)


@cache
def words() -> transformers.PreTrainedTokenizerFast:
    """One id a word, spaces thrown away; the numbers 3 to 40 are words of their own id."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {str(number): number for number in range(3, 41)}
    names = ["Question", "Answer", "Who", "lives", "in", "Paris", "Ada", "Bob", "unanswerable", "user", "assistant"]
    for word in [*names, ":", "?", "<|im_start|>", "<|im_end|>"]:
        vocabulary[word] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrapped(tokenizer)


def llama(vocabulary: int, seed: int = 0, spread: float = 0.3) -> nn.Module:
    """A Llama of 2 layers of width 32. Its logits differ as a trained model's do; to train, spread=0.02 is better."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=spread,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2(vocabulary: int, seed: int = 0) -> nn.Module:
    """A GPT-2, whose positions are learnt one by one: a shift of all by one shows."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def mistral(vocabulary: int, seed: int = 0) -> nn.Module:
    """A decoder whose attention sees 6 positions back."""
    torch.manual_seed(seed)
    config = transformers.MistralConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=6, initializer_range=0.3,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config).eval()
