"""One way to Moshi's weights, of a hub repository or a folder: the language model, Mimi and the text tokenizer.

`moshi.models.loaders` reads a repository's config.json and builds the three parts from it. It looks for the files on
the hub alone; here a folder that holds the same files is as good. Each part is built when first asked for: encoding
audio needs no 15 GB language model, and training on codes needs no Mimi.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from moshi.models import loaders
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from sentencepiece import SentencePieceProcessor

from inlay.fastweight.errors import InlayError
from inlay.files import sha256
from inlay.moshi.lora import fuse_lora

CONFIG_NAME = "config.json"
_WITHOUT_CONFIG = {
    "moshi_name": loaders.MOSHI_NAME,
    "mimi_name": loaders.MIMI_NAME,
    "tokenizer_name": loaders.TEXT_TOKENIZER_NAME,
}


class MoshiWeightsError(InlayError, ValueError):
    """These files are not a Moshi checkpoint, or are not all there."""


@dataclass(frozen=True)
class MoshiCheckpoint:
    """The parts of one checkpoint, each built at its first use and kept.

    `lm_config` holds the arguments of `LMModel` and what its loader takes besides (`lora`, `lora_rank`, …).
    """

    source: str
    info: loaders.CheckpointInfo
    lm_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def lm(self) -> LMModel:
        """The language model in eval mode, its weights in `dtype`; see :meth:`load_lm` for another of the same."""
        return self.load_lm()

    def load_lm(self, **overrides: Any) -> LMModel:
        """A new language model with the checkpoint's weights; LoRA that the checkpoint brings is fused into them.

        Args:
            overrides: Arguments of `LMModel` in place of config.json's, such as `gradient_checkpointing=True` or
                `context=6000`.
        """
        model: LMModel = self.info.get_moshi(device=self.device, dtype=self.dtype, lm_kwargs_overrides=overrides)
        fuse_lora(model)
        return model

    @cached_property
    def mimi(self) -> MimiModel:
        """Mimi in float32 and eval mode, with as many codebooks as one speaker has in the language model (8)."""
        mimi = self.info.get_mimi(device=self.device)
        mimi.requires_grad_(False)
        return mimi

    @cached_property
    def text_tokenizer(self) -> SentencePieceProcessor:
        """The tokenizer of the text stream."""
        return self.info.get_text_tokenizer()

    @cached_property
    def mimi_hash(self) -> str:
        """SHA-256 of Mimi's weights and sizes: codes of two Mimis with one hash can be mixed."""
        digest = hashlib.sha256(json.dumps(self.info.mimi_config, sort_keys=True).encode())
        digest.update(bytes.fromhex(sha256(self.info.mimi_weights)))
        return digest.hexdigest()

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the text tokenizer's file."""
        return sha256(self.info.tokenizer)

    @property
    def codebooks(self) -> int:
        """Mimi codebooks of one speaker: 8 in Moshi."""
        return int(max(self.lm_config["dep_q"], self.lm_config["n_q"] - self.lm_config["dep_q"]))

    @property
    def text_padding_id(self) -> int:
        """The text token of a frame in which no word piece is due: 3."""
        return int(self.lm_config.get("existing_text_padding_id", 3))

    @property
    def end_of_text_padding_id(self) -> int:
        """The text token of the last such frame before a word: 0."""
        return int(self.lm_config.get("existing_text_end_padding_id", 0))


def load_checkpoint(
    source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> MoshiCheckpoint:
    """Find a Moshi checkpoint's files. Nothing is built yet.

    Args:
        source: A folder with the files of `kyutai/moshiko-pytorch-bf16`, or a repository of the hub.
        device: Where the parts are put.
        dtype: Of the language model's weights; Mimi is float32 always.

    Raises:
        MoshiWeightsError: No such folder or repository, or a file is missing in it.
    """
    folder = Path(source).expanduser()
    looks_like_path = isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") != 1
    if folder.is_dir():
        info = _info_of_folder(folder)
    elif looks_like_path:
        raise MoshiWeightsError(f"{source}: no such folder; give a folder with {CONFIG_NAME}, or owner/name on the hub")
    else:
        info = _info_of_repository(str(source))
    lm_config = copy.deepcopy(info.lm_config if info.lm_config is not None else loaders._lm_kwargs)
    where = torch.device(device)
    if where.type == "cpu":  # several processes number theirs (cpu:0), which safetensors does not know
        where = torch.device("cpu")
    return MoshiCheckpoint(str(source), info, lm_config, where, dtype)


def is_conditioned(lm: LMModel) -> bool:
    """Whether a model wants conditions beside its streams; an empty ``conditioners`` in its config asks for none."""
    provider = lm.condition_provider
    return lm.fuser is not None or (provider is not None and len(provider.conditioners) > 0)


def _info_of_folder(folder: Path) -> loaders.CheckpointInfo:
    config_path = folder / CONFIG_NAME
    if not config_path.is_file():
        # A repository without one is the Moshi 7B of the first release, in files of fixed names.
        files = {key: _existing(folder, name, "and there is no config.json") for key, name in _WITHOUT_CONFIG.items()}
        return loaders.CheckpointInfo(files["moshi_name"], files["mimi_name"], files["tokenizer_name"])
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MoshiWeightsError(f"{config_path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise MoshiWeightsError(f"{config_path}: holds {type(config).__name__}, not an object")
    optional = {key: config[key] for key in ("mimi_config_name", "lora_name") if config.get(key)}
    files = {
        key: _existing(folder, name, f"{key} in {config_path}")
        for key, name in (_WITHOUT_CONFIG | {k: config[k] for k in _WITHOUT_CONFIG if k in config} | optional).items()
    }
    return loaders.CheckpointInfo.from_hf_repo(
        str(folder),
        moshi_weights=files["moshi_name"],
        mimi_weights=files["mimi_name"],
        tokenizer=files["tokenizer_name"],
        config_path=config_path,
        mimi_config_path=files.get("mimi_config_name"),
        lora_weights=files.get("lora_name"),
    )


def _existing(folder: Path, name: str, told_by: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise MoshiWeightsError(f"{path} is missing ({told_by})")
    return path


def _info_of_repository(repository: str) -> loaders.CheckpointInfo:
    try:
        return loaders.CheckpointInfo.from_hf_repo(repository)
    except (OSError, ValueError) as error:  # what the hub's client raises derives from these
        raise MoshiWeightsError(
            f"{repository}: no such folder here, and the hub did not give it ({type(error).__name__}: {error})"
        ) from error
