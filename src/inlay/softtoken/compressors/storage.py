"""A compressor on disk, without the decoder it is for.

DIR/
  compressor.json          configuration, which model it is for, checksums of the other files
  compressor.safetensors   the compressor's own parameters (projector, memory tokens, queries, gain)
  adapter/                 the LoRA adapter as PEFT saves it, for kinds that have one

The files are put into place together, the header last (:mod:`inlay.files`): what does not belong to one save is noticed
by its checksum. A compressor writes for one decoder's weights; another model is refused, of the same shape too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from inlay import __version__
from inlay.files import replacing_together, sha256
from inlay.softtoken.compressors.adapter import adapter_parameters
from inlay.softtoken.compressors.config import CONFIG, BaseCompressorConfig
from inlay.softtoken.compressors.errors import CompressorError
from inlay.softtoken.compressors.language_model import LanguageModel

if TYPE_CHECKING:
    from inlay.softtoken.compressors.base import Compressor

HEADER = "compressor.json"
TENSORS = "compressor.safetensors"
ADAPTER = "adapter"
ADAPTER_TENSORS = f"{ADAPTER}/adapter_model.safetensors"
FORMAT = 1
_SAMPLE = 64


def save(compressor: Compressor[Any], directory: Path) -> None:
    """Write ``compressor`` to ``directory``, which is made if it is not there.

    Raises:
        CompressorError: It holds NaN or infinity. Nothing is written.
    """
    own = compressor.state_dict()
    adapter = {} if compressor.adapter is None else dict(compressor.adapter.tensors())
    broken = [name for name, tensor in (own | adapter).items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CompressorError(f"the compressor is not saved: {broken[0]!r} holds NaN or infinity")
    with replacing_together(directory / HEADER) as new:
        save_file(_plain(own), new / TENSORS, metadata={"format": "pt"})
        if compressor.adapter is not None:
            (new / ADAPTER).mkdir()
            compressor.adapter.config.save_pretrained(str(new / ADAPTER))
            save_file(_plain(adapter), new / ADAPTER_TENSORS, metadata={"format": "pt"})
        files = sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file())
        header = {
            "format": FORMAT,
            "inlay": __version__,
            "config": compressor.config.model_dump(mode="json"),
            "model": describe_model(compressor.lm.model),
            "sha256": {file: sha256(new / file) for file in files},
        }
        (new / HEADER).write_text(json.dumps(header, indent=2) + "\n")


def read(directory: Path) -> tuple[BaseCompressorConfig, dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """What :func:`save` wrote: configuration, the model it is for, own tensors, the adapter's tensors.

    Raises:
        CompressorError: A file is missing or damaged, of a newer format, or the files are not of one save.
    """
    path = directory / HEADER
    if not path.is_file():
        raise CompressorError(f"{directory} holds no compressor: {HEADER} is missing. Save one with save_pretrained")
    try:
        header = json.loads(path.read_text())
        if header["format"] != FORMAT:
            raise CompressorError(
                f"{path} is of format {header['format']}, this version of inlay ({__version__}) reads {FORMAT}; it was "
                f"written by inlay {header.get('inlay')}"
            )
        config = CONFIG.validate_python(header["config"])
        model, digests = dict(header["model"]), dict(header["sha256"])
    except CompressorError:
        raise
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise CompressorError(f"{path} is not a compressor's header: {error}") from error
    for file, digest in digests.items():
        if not (directory / file).is_file() or sha256(directory / file) != digest:
            raise CompressorError(
                f"{directory / file} is missing, damaged or not of the same save as {HEADER}: its checksum differs. "
                "Copy the directory again, or take an earlier save"
            )
    try:
        own = load_file(directory / TENSORS)
        adapter = load_file(directory / ADAPTER_TENSORS) if ADAPTER_TENSORS in digests else {}
    except (SafetensorError, OSError) as error:
        raise CompressorError(f"the tensors in {directory} are damaged: {error}") from error
    return config, model, own, adapter


def check_model(directory: Path, saved: dict[str, Any], model: Any) -> None:
    """Refuse a compressor that was trained for another model.

    Raises:
        CompressorError: Names what differs.
    """
    here = describe_model(model)
    different = {key: (saved.get(key), here[key]) for key in here if saved.get(key) != here[key]}
    if set(different) == {"weights"}:
        raise CompressorError(
            f"the compressor in {directory} was trained for a model of this shape with other weights; load that one "
            "(its slots mean nothing to another)"
        )
    if different:
        raise CompressorError(
            f"the compressor in {directory} is for another model: "
            + ", ".join(f"{key} is {theirs!r} there and {ours!r} here" for key, (theirs, ours) in different.items())
        )


def load_tensors(
    directory: Path, compressor: Compressor[Any], own: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    """Copy saved tensors into ``compressor``. Checks all of them before it copies any.

    Raises:
        CompressorError: A tensor is missing, has no place, or is of another shape.
    """
    targets: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        (compressor.state_dict(), own),
        ({} if compressor.adapter is None else dict(compressor.adapter.tensors()), adapter),
    ]
    for target, saved in targets:
        odd = sorted(
            name
            for name in target.keys() | saved.keys()
            if name not in target or name not in saved or target[name].shape != saved[name].shape
        )
        if odd:
            raise CompressorError(f"the compressor in {directory} does not fit its own configuration: see {odd[:5]}")
    with torch.no_grad():
        for target, saved in targets:
            for name, tensor in saved.items():
                target[name].copy_(tensor)


def describe_model(model: Any) -> dict[str, Any]:
    """What tells one decoder from another: its shape, and a hash of a sample of its base weights.

    The sample is taken in bfloat16, so that a model is the same in float32 and bfloat16. Adapters and a fast-weight
    memory are no part of it.
    """
    lm = LanguageModel(model)
    text = lm.model.config.get_text_config()
    left_out = adapter_parameters(lm.model)
    digest = hashlib.sha256()
    for name, parameter in sorted(lm.model.named_parameters(), key=lambda item: _plain_name(item[0])):
        if id(parameter) in left_out or not parameter.is_floating_point() or ".target." in name:
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE].to("cpu", torch.bfloat16).contiguous()
        digest.update(_plain_name(name).encode() + sample.view(torch.uint8).numpy().tobytes())
    return {
        "type": text.model_type,
        "width": lm.width,
        "blocks": len(lm.blocks),
        "vocabulary": lm.embedding.num_embeddings,
        "weights": digest.hexdigest(),
    }


def _plain_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _plain(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
