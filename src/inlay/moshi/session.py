"""A conversation on disk: everything that Moshi's stream holds, so that another process goes on bit for bit.

That is what Kyutai's modules call their streaming state (the rings of keys and values of the language model and of
Mimi's two transformers, Mimi's convolutions, LMGen's delayed tokens), the memory, and the random numbers' generator. It
goes to one safetensors file of constant size, atomically, through :mod:`inlay.fastweight.session_file`.

Loading copies into the tensors of an open stream, in place: a graph that was captured on them stays valid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen
from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import RingKVCache
from torch import Tensor, nn

from inlay import __version__
from inlay.fastweight.errors import CheckpointError
from inlay.fastweight.memory import find_memory
from inlay.fastweight.session_file import read_tensors, write_tensors
from inlay.fastweight.stepping import StepState
from inlay.fastweight.streaming import StateError
from inlay.moshi.streaming import stream_of
from inlay.moshi.yarn import yarn_of

KIND = "inlay-session-moshi"
FORMAT = 1

# Of LMGen's state: what its arguments and the model decide rather than what has been heard.
_SETTINGS = {"initial", "condition_sum", "condition_cross", "cfg_is_masked_until"}
# And of every state, and of a ring of keys.
_SETTINGS |= {"batch_size", "capacity", "respect_exec_mask"}
# Made at the first step, not with the stream.
_LATER = {"k_cross", "v_cross"}
_CONDITIONS = ("condition_sum", "condition_cross")
_SAMPLE = 64
_RANDOM = "random"


def save_session(path: str | Path, lm_gen: LMGen, mimi: MimiModel | None = None) -> None:
    """Write what the open streams of ``lm_gen`` and ``mimi`` hold to one file.

    Args:
        path: Replaced atomically: a kill leaves the old file or the new one.
        lm_gen: Within ``lm_gen.streaming(batch_size)``.
        mimi: Within ``mimi.streaming(batch_size)``; None if the stream is fed with codes.

    Raises:
        StateError: A stream is not open.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, int] = {}
    for name, _, _, value in _held(lm_gen, mimi):
        if isinstance(value, Tensor):
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        elif value is not None:
            numbers[name] = value
    tensors[_RANDOM] = _random_state(lm_gen.lm_model.device)
    state = lm_gen._streaming_state
    assert state is not None
    conditions = {name: value for name in _CONDITIONS if (value := getattr(state, name)) is not None}
    tensors |= {name: value.detach().to("cpu", copy=True).contiguous() for name, value in conditions.items()}
    content = {
        "format": FORMAT,
        "inlay": __version__,
        "model": _describe(lm_gen, mimi),
        "sampled weights": _fingerprint(lm_gen.lm_model),
        "sampled weights of Mimi": None if mimi is None else _fingerprint(mimi),
        "batch_size": state.batch_size,
        "conditions": [*conditions],
        "frames": state.offsets.tolist(),
        "chunks_committed": _chunks(lm_gen),
        "numbers": numbers,
    }
    write_tensors(Path(path), KIND, content, tensors)


def load_session(path: str | Path, lm_gen: LMGen, mimi: MimiModel | None = None) -> None:
    """Let the open streams of ``lm_gen`` and ``mimi`` go on from what :func:`save_session` wrote.

    Raises:
        CheckpointError: The file is missing, damaged, of a newer format, or of another model, memory, training,
            condition or number of rows; the message says which. Nothing is changed.
        StateError: A stream is not open.
    """
    path = Path(path)
    held = list(_held(lm_gen, mimi))
    content, tensors = read_tensors(path, KIND, FORMAT, {"model": _describe(lm_gen, mimi)})
    state = lm_gen._streaming_state
    assert state is not None
    if content["batch_size"] != state.batch_size:
        raise CheckpointError(
            f"the session in {path} is of {content['batch_size']} rows, this stream of {state.batch_size}: enter "
            f"lm_gen.streaming({content['batch_size']})"
        )
    parts: dict[str, tuple[str, nn.Module | None]] = {
        "sampled weights": ("model or its memory", lm_gen.lm_model),
        "sampled weights of Mimi": ("Mimi", mimi),
    }
    for name, (what, module) in parts.items():
        if content[name] != (None if module is None else _fingerprint(module)):
            raise CheckpointError(
                f"the session in {path} is of other weights: the {what} has been trained since or is another one, and "
                "what one has read means nothing to the other. Load what it was saved with, or begin a new session"
            )
    for name in _CONDITIONS if "conditions" in content else ():
        if not _close(tensors.pop(name, None), getattr(state, name)):
            raise CheckpointError(
                f"the session in {path} was begun with another {name.replace('_', ' for ')}: give lm_gen the "
                "condition_tensors of then, or begin a new session"
            )
    numbers: dict[str, int] = content["numbers"]
    random = tensors.pop(_RANDOM)
    own = {name: (owner, field, value) for name, owner, field, value in held}
    here = {name: _size(value) for name, (_, field, value) in own.items() if isinstance(value, Tensor)}
    there = {name: _size(tensor) for name, tensor in tensors.items()}
    for name in sorted(here.keys() | there.keys()):
        later = name in own and own[name][1] in _LATER and (name not in here or name not in there)
        if here.get(name) != there.get(name) and not later:
            raise CheckpointError(
                f"the session in {path} does not fit this stream: {name} is {there.get(name)} there and "
                f"{here.get(name)} here"
            )
    with torch.no_grad():
        for name, (owner, field, value) in own.items():
            if name in numbers:
                setattr(owner, field, numbers[name])
            elif name not in tensors:
                if isinstance(value, Tensor):
                    setattr(owner, field, None)
            elif isinstance(value, Tensor):
                value.copy_(tensors[name])
            else:
                setattr(owner, field, tensors[name].to(lm_gen.lm_model.device))
    if random.shape == _random_state(lm_gen.lm_model.device).shape:  # a GPU's numbers do not go on on a CPU
        _set_random_state(lm_gen.lm_model.device, random)
    stream = stream_of(lm_gen.lm_model)
    if stream is not None and stream.steps is not None:
        stream.steps.version += 1
        stream.steps.commit()  # what an error in the last step may have kept it from


def _held(lm_gen: LMGen, mimi: MimiModel | None) -> Iterator[tuple[str, Any, str, Any]]:
    """Name, owner, field and value of whatever an open stream holds; None where there is nothing yet."""
    modules: dict[str, StreamingModule[Any] | None] = {"gen": lm_gen, "lm": lm_gen.lm_model, "mimi": mimi}
    for part, module in modules.items():
        if module is None:
            continue
        if not module.is_streaming:
            what = {"gen": "lm_gen", "lm": "lm_gen.lm_model", "mimi": "mimi"}[part]
            raise StateError(f"{what} has no stream open: enter 'with {what}.streaming(batch_size)' first")
        for name, state in module.get_streaming_state().items():
            yield from _fields(f"{part}.{name}", state)


def _close(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two conditions are the same but for rounding, on another device for one."""
    if one is None or other is None or one.shape != other.shape:
        return one is other
    one, other = one.float(), other.detach().cpu().float()
    return bool((one - other).norm() <= 0.01 * one.norm())


def _size(tensor: Tensor) -> tuple[list[int], str]:
    return [*tensor.shape], str(tensor.dtype)


def _fields(prefix: str, owner: Any) -> Iterator[tuple[str, Any, str, Any]]:
    for field, value in vars(owner).items():
        name = f"{prefix}.{field}"
        if isinstance(value, RingKVCache):
            yield from _fields(name, value)
        elif isinstance(value, StepState):
            for key, tensor in value.tensors().items():
                yield f"{name}.{key}", value, key, tensor
        elif field not in _SETTINGS and (value is None or isinstance(value, Tensor | int)):
            yield name, owner, field, value


def _describe(lm_gen: LMGen, mimi: MimiModel | None) -> dict[str, Any]:
    """What a session belongs to, in words that tell what differs."""
    lm = lm_gen.lm_model
    stream = stream_of(lm)
    memory = find_memory(lm) if stream is not None and stream.steps is not None else None
    return {
        "width": lm.dim,
        "blocks": len(lm.transformer.layers),
        "streams": [lm.n_q, lm.dep_q],
        "codes": [lm.card, lm.text_card],
        "window": lm.context,
        "YaRN": None if (yarn := yarn_of(lm)) is None else yarn.model_dump(mode="json"),
        "delays": list(lm.delays),
        "dtype": str(lm.dtype),
        "guidance": lm_gen.cfg_coef != 1.0,
        "Mimi's codebooks": None if mimi is None else mimi.num_codebooks,
        "memory": None if memory is None else memory.config.model_dump(mode="json"),
    }


def _fingerprint(module: nn.Module) -> str:
    """SHA-256 over every tensor's name, shape, dtype and 64 values spread over it: cheap for 7B, and no two trainings
    of one model share it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]} ".encode())
        if tensor.numel():
            flat = tensor.detach().reshape(-1)
            at = torch.linspace(0, flat.numel() - 1, min(_SAMPLE, flat.numel()), dtype=torch.float64).long()
            sample = flat[at.to(flat.device)].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _chunks(lm_gen: LMGen) -> list[int]:
    stream = stream_of(lm_gen.lm_model)
    return [] if stream is None or stream.steps is None else stream.steps.chunks.tolist()


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
