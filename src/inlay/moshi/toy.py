"""A Moshi small enough for tests and the demo: random weights in the files of `kyutai/moshiko-pytorch-bf16`.

Everything but the sizes is Moshi's: 17 streams with its delays, gated MLPs, float32 RMS norms, RoPE, a depformer with
weights per step, Mimi at 24 kHz and 12.5 frames/s, and a SentencePiece tokenizer with Moshi's special ids. So the same
loading code reads it, and what works on it works on the 7B.

A random encoder in front of empty codebooks would answer every sound with one code. So Mimi's encoder gets convolutions
that keep their input's variance and have no bias, beside which a sound would hardly show; and its codebooks are drawn
from its own latents of noise and of tones, level by level from what the levels before left over. That makes codes that
depend on the sound, as a trained Mimi's do, though not codes that sound well.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import sentencepiece
import torch
from moshi.models import loaders
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.quantization.core_vq import EuclideanCodebook
from moshi.quantization.vq import ResidualVectorQuantizer, SplitResidualVectorQuantizer
from safetensors.torch import save_file
from torch import nn

from inlay.files import replacing_together
from inlay.moshi.toy_text import toy_text
from inlay.moshi.weights import CONFIG_NAME

MIMI_CONFIG_NAME = "mimi_config.json"
TOKENIZER_NAME = "tokenizer_spm_toy.model"
MIMI_WEIGHTS_NAME = "tokenizer-toy.safetensors"


@dataclass(frozen=True)
class ToySizes:
    """Sizes of a toy checkpoint; what is not named here follows from these or is Moshi's own."""

    dim: int = 64
    """D, the main transformer's width; a multiple of `num_heads`, and the heads' width even (RoPE)."""

    num_layers: int = 4
    """Layers of the main transformer."""

    num_heads: int = 4
    """Heads of the main transformer and of the depformer."""

    context: int = 32
    """Frames that attention sees: Moshi's 3,000."""

    card: int = 64
    """Codes in a Mimi codebook: Moshi's 2,048."""

    text_pieces: int = 640
    """Pieces of the text tokenizer at most; 260 of them are bytes and the special ones."""

    depformer_dim: int = 32
    """Width of the depformer."""

    depformer_layers: int = 2
    """Layers of the depformer."""

    mimi_dim: int = 16
    """Width of Mimi's latents: 512 in the real one."""

    mimi_filters: int = 4
    """Filters of Mimi's first convolution: 64 in the real one."""


def write_toy_checkpoint(
    directory: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, sizes: ToySizes | None = None
) -> Path:
    """Write a small random Moshi as a folder that :func:`inlay.moshi.weights.load_checkpoint` reads.

    Args:
        directory: The folder; made if needed, its files of the same names replaced.
        seed: Of all weights. The global generator is left as it was.
        dtype: Of the language model's weights on disk; loading converts them.
        sizes: `ToySizes()` when not given.

    Returns:
        The folder: `config.json`, `model.safetensors`, Mimi's weights and sizes, the text tokenizer.
    """
    sizes = sizes or ToySizes()
    folder = Path(directory)
    tokenizer = _train_tokenizer(sizes.text_pieces)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).get_piece_size()
    lm_config, mimi_config = _lm_config(sizes, text_card=pieces), _mimi_config(sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = LMModel(**lm_config, device="cpu", dtype=torch.float32)
        torch.manual_seed(seed + 1)
        mimi = loaders.get_mimi(None, mimi_config, num_codebooks=lm.dep_q)
        _draw_encoder(mimi)
        _draw_codebooks(mimi)
    names = {
        "mimi_name": MIMI_WEIGHTS_NAME,
        "mimi_config_name": MIMI_CONFIG_NAME,
        "tokenizer_name": TOKENIZER_NAME,
        "moshi_name": loaders.MOSHI_NAME,
        "model_type": "moshi",
    }
    with replacing_together(folder / CONFIG_NAME) as new:
        _save(lm.to(dtype).state_dict(), new / loaders.MOSHI_NAME)
        _save(mimi.state_dict(), new / MIMI_WEIGHTS_NAME)
        (new / TOKENIZER_NAME).write_bytes(tokenizer)
        (new / MIMI_CONFIG_NAME).write_text(json.dumps(mimi_config, indent=2))
        (new / CONFIG_NAME).write_text(json.dumps(lm_config | names, indent=2))
    return folder


def _lm_config(sizes: ToySizes, text_card: int) -> dict[str, Any]:
    return loaders._lm_kwargs | {
        "dim": sizes.dim,
        "text_card": text_card,
        "card": sizes.card,
        "num_heads": sizes.num_heads,
        "num_layers": sizes.num_layers,
        "context": sizes.context,
        "depformer_dim": sizes.depformer_dim,
        "depformer_dim_feedforward": int(4.125 * sizes.depformer_dim),
        "depformer_num_heads": sizes.num_heads,
        "depformer_num_layers": sizes.depformer_layers,
    }


def _mimi_config(sizes: ToySizes) -> dict[str, Any]:
    dim = sizes.mimi_dim
    real: dict[str, Any] = loaders._mimi_config
    return real | {
        "seanet": real["seanet"] | {"dimension": dim, "n_filters": sizes.mimi_filters},
        "quantizer": real["quantizer"]
        | {"dimension": dim, "n_q": 8, "bins": sizes.card, "input_dimension": dim, "output_dimension": dim},
        "transformer": real["transformer"]
        | {
            "d_model": dim,
            "num_heads": 2,
            "num_layers": 2,
            "dim_feedforward": 4 * dim,
            "input_dimension": dim,
            "output_dimensions": [dim],
        },
    }


@torch.no_grad()
def _draw_encoder(mimi: MimiModel) -> None:
    for module in mimi.encoder.modules():
        if isinstance(module, nn.Conv1d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                module.bias.zero_()


@torch.no_grad()
def _draw_codebooks(mimi: MimiModel) -> None:
    seconds = max(40, mimi.cardinality // 4)  # at least three latents for each code
    sound = _sounds(seconds)
    latents = torch.cat(
        [mimi._encode_to_unquantized_latent(part) for part in torch.split(sound, mimi.sample_rate * 8, dim=-1)], 2
    )
    quantizer = cast(SplitResidualVectorQuantizer, mimi.quantizer)
    for part in (quantizer.rvq_first, quantizer.rvq_rest):
        _draw_levels(part, latents)


def _draw_levels(quantizer: ResidualVectorQuantizer, latents: torch.Tensor) -> None:
    residual = quantizer.input_proj(latents)[0].T  # [frames, dimension]
    for layer in quantizer.vq.layers:
        codebook = cast(EuclideanCodebook, layer._codebook)
        codebook.embedding_sum.copy_(residual[torch.randperm(len(residual))[: codebook.codebook_size]])
        codebook._initialized.fill_(1)
        residual = residual - codebook.decode(codebook.encode(residual))


def _sounds(seconds: int) -> torch.Tensor:
    """Tones with overtones and noise of changing pitch and loudness, five changes a second: `[1, 1, samples]`."""
    rate, step = loaders.SAMPLE_RATE, loaders.SAMPLE_RATE // 5
    steps = seconds * 5
    pitch = 80 * 4 ** torch.rand(steps)
    loudness = torch.rand(steps) ** 2 * 0.5
    noisiness = torch.rand(steps) ** 2
    phase = torch.cumsum(pitch.repeat_interleave(step) / rate, 0).double() * 2 * torch.pi
    overtones = torch.rand(8, steps)
    tone = sum(overtones[k].repeat_interleave(step) * torch.sin((k + 1) * phase).float() / 4 for k in range(8))
    noise = torch.randn(seconds * rate) * noisiness.repeat_interleave(step)
    return ((tone + noise) * loudness.repeat_interleave(step)).view(1, 1, -1)


def _train_tokenizer(pieces: int) -> bytes:
    model = io.BytesIO()
    # Id 0 ends padding in Moshi's text stream: with bytes for unknown letters no word ever yields it.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=toy_text(),
        model_writer=model,
        vocab_size=pieces,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _save(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
