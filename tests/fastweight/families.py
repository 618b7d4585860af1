"""Tiny random models of every family that a memory is tested on, and what they have to be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from inlay import FastWeightConfig

VOCAB = 64
WIDTH = 16
BLOCKS = 3
MEMORY_BLOCKS = [0, 2]

_SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large enough that logits differ between tokens, as a trained model's do.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIMI = {
    "model_type": "mimi",
    "hidden_size": 16,
    "num_filters": 4,
    "codebook_size": 16,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "num_quantizers": 2,
    "upsample_groups": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def _causal_lm(config: type, **changes: Any) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(config(**_SIZE | changes))


def _gemma3_multimodal() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config=_SIZE | {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=61,
        eoi_token_index=62,
        image_token_index=63,
        initializer_range=0.2,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=BLOCKS,
        n_head=2,
        n_positions=256,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def qwen3_moe(mlp_only_layers: list[int]) -> nn.Module:
    """A mixture of experts whose blocks ``mlp_only_layers`` are dense."""
    return _causal_lm(
        transformers.Qwen3MoeConfig,
        head_dim=8,
        mlp_only_layers=mlp_only_layers,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )


def moshi_config() -> transformers.MoshiConfig:
    """A Moshi with a tiny audio encoder and depth decoder; they have blocks of their own."""
    size = {k: v for k, v in _SIZE.items() if k != "intermediate_size"}
    depth = size | {"ffn_dim": 16, "input_size": WIDTH, "num_codebooks": 2, "num_hidden_layers": 5}
    return transformers.MoshiConfig(
        **size,
        ffn_dim=64,
        sliding_window=32,
        num_codebooks=2,
        audio_encoder_config=dict(_MIMI),
        depth_decoder_config=depth,
    )


def _kyutai() -> nn.Module:
    size = {k: v for k, v in _SIZE.items() if k != "intermediate_size"}
    config = transformers.KyutaiSpeechToTextConfig(
        **size,
        ffn_dim=64,
        sliding_window=32,
        num_codebooks=2,
        codebook_vocab_size=16,
        audio_bos_token_id=15,
        audio_pad_token_id=96,
        codec_config=dict(_MIMI),
    )
    return transformers.KyutaiSpeechToTextForConditionalGeneration(config)


class HomeMadeMLP(nn.Module):
    """A plain MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 32)
        self.out = nn.Linear(32, WIDTH)

    def forward(self, *, stream: Tensor) -> Tensor:
        return self.out(self.up(stream).relu())


class HomeMadeBlock(nn.Module):
    """Mixes with the tokens before it, then the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.ffn = HomeMadeMLP()

    def forward(self, *, stream: Tensor, weights: Tensor) -> Tensor:
        stream = stream + self.mix(weights @ stream).tanh()
        return stream + self.ffn(stream=stream)


class HomeMade(nn.Module):
    """A model of nobody's: no config, containers that have no forward, its own names for every argument."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "words": nn.Embedding(VOCAB, WIDTH),
                "stack": nn.ModuleList([HomeMadeBlock() for _ in range(BLOCKS)]),
                "head": nn.Linear(WIDTH, VOCAB),
            }
        )

    def forward(self, words: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Any:
        tokens = words.shape[1]
        allowed = torch.ones(words.shape[0], tokens, tokens, dtype=torch.bool, device=words.device).tril()
        if attention_mask is not None:
            allowed = allowed & attention_mask.bool().unsqueeze(1)
        if position_ids is not None and attention_mask is None:
            document = (position_ids == 0).cumsum(1)
            allowed = allowed & (document.unsqueeze(2) == document.unsqueeze(1))
        weights = allowed / allowed.sum(-1, keepdim=True).clamp(min=1)
        stream = self.parts["words"](words)
        for block in self.parts["stack"]:
            stream = block(stream=stream, weights=weights.to(stream.dtype))
        return transformers.modeling_outputs.CausalLMOutput(logits=self.parts["head"](stream))


@dataclass(frozen=True)
class Model:
    """A family under test."""

    name: str
    build: Callable[[], nn.Module]
    blocks: str
    """Path of the list of blocks, written down here independently of the library."""
    projection: str
    """Path from a block to its down projection."""
    embedding: str
    """Name of the token embedding's parameter."""
    pattern: str | None = None
    codebooks: int = 0
    """Audio tokens that come with every text token."""
    token_types: bool = False
    """Whether the model wants ``token_type_ids`` to train."""
    memory_blocks: tuple[int, ...] = (0, 2)
    checkpointing: bool = True

    def make(self, seed: int = 0) -> nn.Module:
        """The model, in eval mode; the same seed gives the same weights."""
        torch.manual_seed(seed)
        model = self.build().eval()
        for parameter in model.parameters():  # biases and norms start as constants that hide mistakes
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    def config(self, **changes: Any) -> FastWeightConfig:
        """A memory that matters to this model."""
        base: dict[str, Any] = {
            "layers": list(self.memory_blocks),
            "chunk_size": 4,
            "eta": 0.05,
            "init": {"normal": 0.5},
            "projection": self.pattern,
        }
        return FastWeightConfig(**base | changes)

    def projections(self, model: nn.Module) -> list[nn.Module]:
        """The down projection of every memory block, as it is now."""
        return [model.get_submodule(f"{self.blocks}.{i}.{self.projection}") for i in self.memory_blocks]

    def tokens(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """Random input ids ``[B, T]``, or ``[B, T, 1 + codebooks]``; special tokens left out."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 60, (batch, length), generator=generator)
        if not self.codebooks:
            return ids
        audio = torch.randint(0, 14, (batch, length, self.codebooks), generator=generator)
        return torch.cat([ids.unsqueeze(-1), audio], dim=-1)

    def logits(self, model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
        """``[B, T, V]`` of a whole forward without a cache."""
        if isinstance(model, HomeMade):
            return model(words=ids, **kwargs).logits
        if self.token_types:
            kwargs["token_type_ids"] = torch.zeros_like(ids)
        return model(input_ids=ids, use_cache=False, **kwargs).logits

    def loss(self, model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
        """Mean next-token loss."""
        logits = self.logits(model, ids, **kwargs)
        text = ids[..., 0] if self.codebooks else ids
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())


_LLAMA = {"blocks": "model.layers", "projection": "mlp.down_proj", "embedding": "model.embed_tokens.weight"}
_MOSHI = {"blocks": "model.layers", "projection": "mlp.fc2"}

MODELS = [
    Model("llama", lambda: _causal_lm(transformers.LlamaConfig), **_LLAMA),
    Model("mistral", lambda: _causal_lm(transformers.MistralConfig, sliding_window=8, head_dim=8), **_LLAMA),
    Model("qwen2", lambda: _causal_lm(transformers.Qwen2Config), **_LLAMA),
    Model("qwen3", lambda: _causal_lm(transformers.Qwen3Config, head_dim=8), **_LLAMA),
    Model(
        "gemma3",
        lambda: _causal_lm(transformers.Gemma3TextConfig, head_dim=8, sliding_window=8, sliding_window_pattern=2),
        **_LLAMA,
    ),
    Model(
        "gemma3-multimodal",
        _gemma3_multimodal,
        "model.language_model.layers",
        "mlp.down_proj",
        "model.language_model.embed_tokens.weight",
        token_types=True,
    ),
    Model("phi3", lambda: _causal_lm(transformers.Phi3Config), **_LLAMA),
    Model("olmo2", lambda: _causal_lm(transformers.Olmo2Config), **_LLAMA),
    Model("gpt2", _gpt2, "transformer.h", "mlp.c_proj", "transformer.wte.weight"),
    Model(
        "gpt-neox",
        lambda: _causal_lm(transformers.GPTNeoXConfig, hidden_dropout=0.0, attention_dropout=0.0),
        "gpt_neox.layers",
        "mlp.dense_4h_to_h",
        "gpt_neox.embed_in.weight",
    ),
    Model("qwen3-moe", lambda: qwen3_moe([0, 2]), **_LLAMA),
    Model("moshi", lambda: transformers.MoshiForCausalLM(moshi_config()), **_MOSHI, embedding=_LLAMA["embedding"]),
    Model("kyutai-stt", _kyutai, **_MOSHI, embedding="model.embed_tokens.embed_tokens.weight", codebooks=2),
    Model(
        "home-made",
        HomeMade,
        "parts.stack",
        "ffn.out",
        "parts.words.weight",
        pattern="parts.stack.{layer}.ffn.out",
        checkpointing=False,
    ),
]
BY_NAME = {model.name: model for model in MODELS}


def enable_checkpointing(model: nn.Module, *, reentrant: bool = False) -> None:
    """Gradient checkpointing by whichever name this transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def hook_counts(model: nn.Module) -> dict[str, int]:
    """How many forward hooks every module has."""
    return {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}


def modules_of(model: nn.Module) -> dict[str, int]:
    """The identity of every module by name."""
    return {name: id(module) for name, module in model.named_modules()}


def trainable(model: nn.Module) -> Iterator[str]:
    """Names of the parameters that require a gradient."""
    return (name for name, parameter in model.named_parameters() if parameter.requires_grad)
