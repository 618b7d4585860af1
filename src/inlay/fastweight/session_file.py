"""A session on disk: one safetensors file that holds what a conversation has read, and says whose it is.

Its metadata name the format, the version of inlay, the model, the memory's configuration and a hash of the memory's own
weights, since a sum that other weights wrote means nothing to these. A checksum goes over the tensors *and* those
metadata, so no flipped bit anywhere in the file is taken for a state.

Writing is atomic (:mod:`inlay.files`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inlay import __version__
from inlay.fastweight.deferred import Products
from inlay.fastweight.errors import CheckpointError
from inlay.fastweight.scan import accumulator_dtype
from inlay.fastweight.state import FastWeightState
from inlay.fastweight.streaming import MemoryState
from inlay.files import replacing

KIND = "inlay-session"
FORMAT = 1


def write_session(path: Path, state: MemoryState, identity: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path`` so that a kill at any moment leaves the old file or the new one.

    Args:
        path: Its folder is made if it is not there.
        state: Of a session; any device.
        identity: What the session belongs to, checked by :func:`read_session`: JSON values by name.
    """
    tensors = {
        f"{index}.{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for index, layer in state.layers.items()
        for name, tensor in _fields(layer).items()
    }
    counts = torch.zeros(state.rows or 0, 2, dtype=torch.long) if state.counts is None else state.counts
    content = {
        "format": FORMAT,
        "inlay": __version__,
        **identity,
        "batch_size": state.rows,
        "length": state.length,
        "tokens_read": counts[:, 0].tolist(),
        "chunks_committed": counts[:, 1].tolist(),
    }
    write_tensors(path, KIND, content, tensors)


def write_tensors(path: Path, kind: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a session of some kind so that a kill at any moment leaves the old file or the new one.

    Args:
        path: Its folder is made if it is not there.
        kind: Noted in the file, asked for by :func:`read_tensors`.
        content: JSON values by name, kept as metadata; ``format`` is one of them.
        tensors: On the CPU, contiguous.
    """
    metadata = {"kind": kind} | {name: json.dumps(value) for name, value in content.items()}
    metadata["sha256"] = _digest(metadata, tensors)
    with replacing(path) as new:
        save_file(dict(tensors), new, metadata=metadata)


def read_session(path: Path, identity: Mapping[str, Any], sizes: Mapping[int, tuple[int, int, int]]) -> MemoryState:
    """Read and check what :func:`write_session` wrote.

    Args:
        path: The file.
        identity: What it has to belong to.
        sizes: Width D, inner width F and chunk size C of every layer, by block.

    Returns:
        The state, on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, of a newer format, or belongs to something else; it says which.
    """
    content, tensors = read_tensors(path, KIND, FORMAT, identity)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = _expected_shapes(content["batch_size"], sizes, found) if tensors else {}
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))[0]
        raise CheckpointError(
            f"the session in {path} is of another model: {odd!r} is {found.get(odd)} there and {expected.get(odd)} here"
        )
    return _state(content, tensors)


def read_tensors(
    path: Path, kind: str, version: int, identity: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check what :func:`write_tensors` wrote.

    Args:
        path: The file.
        kind: What it has to be.
        version: The format that is read.
        identity: Values of its content that it has to have: what it belongs to.

    Returns:
        The content and the tensors, on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, of another format, or belongs to something else; it says which.
    """
    metadata, tensors = _read(path)
    content = _parse(path, metadata, kind, version)
    if _digest({k: v for k, v in metadata.items() if k != "sha256"}, tensors) != metadata.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its checksum differs. Take an earlier copy, or begin a new session")
    for name, ours in identity.items():
        if content.get(name) != ours:
            raise CheckpointError(f"the session in {path} is of another {_difference(name, content.get(name), ours)}")
    return content, tensors


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and every bit of the tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fields(layer: FastWeightState) -> dict[str, Tensor]:
    """Each tensor of a layer's state by its name: the sum, or the products that stand for it, as far as used."""
    named = {"phase": layer.phase, "document": layer.document, "z": layer.z, "x": layer.x}
    if layer.products is None:
        return named | {"sum": layer.sum}
    used = layer.products.used
    return named | {"products.z": layer.products.z[:, :used], "products.v": layer.products.v[:, :used]}


def _layer(fields: dict[str, Tensor]) -> FastWeightState:
    """The other way round."""
    z, v = fields.get("products.z"), fields.get("products.v")
    products = None if z is None or v is None else Products(z, v, z.shape[1])
    total = fields.get("sum")
    if total is None:
        total = torch.zeros(len(fields["z"]), 0, 0, dtype=accumulator_dtype(fields["z"].dtype))
    return FastWeightState(total, fields["phase"], fields["document"], fields["z"], fields["x"], products)


def _expected_shapes(
    rows: int, sizes: Mapping[int, tuple[int, int, int]], found: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}
    for index, (width, inner, chunk) in sizes.items():
        own: dict[str, tuple[int, ...]] = {
            "phase": (rows,),
            "document": (rows,),
            "z": (rows, chunk, inner),
            "x": (rows, chunk, width),
        }
        history = found.get(f"{index}.products.z")
        if history is None:
            own["sum"] = (rows, width, inner)
        else:
            own |= {"products.z": (rows, history[1], inner), "products.v": (rows, history[1], width)}
        expected |= {f"{index}.{name}": shape for name, shape in own.items()}
    return expected


def _state(content: dict[str, Any], tensors: dict[str, Tensor]) -> MemoryState:
    state = MemoryState(content["batch_size"])
    state.length = content["length"]
    if tensors:
        state.counts = torch.tensor([content["tokens_read"], content["chunks_committed"]]).T.contiguous()
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, field = name.partition(".")
        layers.setdefault(int(index), {})[field] = tensor
    state.layers = {index: _layer(layers[index]) for index in sorted(layers)}
    return state


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is no file: there is no session to load. Save one with session.save")
    try:
        with safe_open(path, framework="pt") as file:
            # Copied: what is read is a view of the file, and the state is written in place.
            return dict(file.metadata() or {}), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a session: it is no safetensors file, or one that is damaged or cut off ({error})"
        ) from error


def _parse(path: Path, metadata: dict[str, str], kind: str, version: int) -> dict[str, Any]:
    found = metadata.get("kind", "")
    if found != kind:
        what = (
            f"of another kind ({found}, not {kind})"
            if found.startswith(KIND)
            else "a safetensors file of something else"
        )
        raise CheckpointError(f"{path} is not a session: it is {what}, or damaged")
    try:
        content = {name: json.loads(text) for name, text in metadata.items() if name not in ("kind", "sha256")}
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error} in its header") from error
    if content.get("format") != version:
        raise CheckpointError(
            f"the session in {path} is of format {content.get('format')} (or damaged), this version of inlay "
            f"({__version__}) reads {version}; it was written by inlay {content.get('inlay')}"
        )
    return content


def _difference(name: str, theirs: Any, ours: Any) -> str:
    """What differs, in words: of two dictionaries only the keys that do."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [key for key in ours | theirs if theirs.get(key) != ours.get(key)]
        parts = [f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here" for key in keys]
        return f"{name}: " + ", ".join(parts)
    if name == "weights":
        return "training: other weights of the memory wrote it. Load it with the run or checkpoint it was saved with"
    return f"{name}: {theirs!r} there and {ours!r} here"


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    digest.update(hash_tensors(tensors).encode())
    return digest.hexdigest()
