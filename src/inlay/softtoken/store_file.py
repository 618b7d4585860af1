"""One file of soft tokens: the slots of many documents, and a header that says whose they are and what they stand for.

    embeddings      [N, D]              form ``embeddings``: the slots of all documents, one behind the other
    {layer}.keys    [N, H_kv, d_head]   form ``kv``, and {layer}.values likewise

A slot is the first dimension, so a document is one run of bytes in each tensor, and reading it touches nothing else.
The header lies in the file's safetensors metadata. Two kinds of checksum guard the file: one goes over the header and
the table of tensors, and is compared when the file is opened; one goes over each document's slots, and is compared
when they are read. A flipped bit anywhere is then noticed before a slot is handed out, and no call reads the whole file
to find out about one document.

Under its own name a file is whole (:mod:`inlay.files`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inlay import __version__
from inlay.fastweight.session_file import hash_tensors
from inlay.files import replacing
from inlay.softtoken.compressors import Compressor, describe_model
from inlay.softtoken.errors import SoftTokenError
from inlay.softtoken.layout import PromptLayout
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import SoftTokens

KIND = "inlay-soft-tokens"
FORMAT = 1

Slots = dict[str, Tensor]
"""One document's slots by the name of the file's tensor, each `[m, …]`."""


class StoreError(SoftTokenError):
    """These soft tokens cannot be read, or not used here; the message names the file, the document and the fix."""


@dataclass(frozen=True)
class StoredDocument:
    """What a store notes of one document.

    Attributes:
        id: Its name in the store.
        source: SHA-256 of its text, from :func:`hash_text`.
        tokens: Its length.
        slots: Slots m that stand for it.
        ratio: Tokens per slot that were asked for; None where the number of slots was.
    """

    id: str
    source: str
    tokens: int
    slots: int
    ratio: int | None = None


@dataclass(frozen=True)
class StoreHeader:
    """What soft tokens belong to. To another decoder, compressor or layout they mean nothing.

    Attributes:
        model: The decoder as :func:`~inlay.softtoken.compressors.describe_model` tells it from others.
        compressor: Its ``fingerprint`` (a hash of all it learned) and its ``config``.
        layout: The prompt layout.
        run: The folder of the run that wrote them, where one did. It may move: no difference to anything.
    """

    model: dict[str, Any]
    compressor: dict[str, Any]
    layout: dict[str, Any]
    run: str | None = None

    @staticmethod
    def of(
        model: Any, compressor: Compressor[Any], layout: PromptLayout | BoundLayout, run: Path | None = None
    ) -> StoreHeader:
        """The header of what ``compressor`` writes for ``model`` to read in ``layout``."""
        layout = layout.layout if isinstance(layout, BoundLayout) else layout
        return StoreHeader(
            describe_model(model),
            {"fingerprint": compressor.fingerprint(), "config": compressor.config.model_dump(mode="json")},
            layout.model_dump(mode="json"),
            None if run is None else str(run.resolve()),
        )

    def difference(self, here: StoreHeader) -> str | None:
        """How the header ``here`` differs from this one of a file, in words; None if it does not."""
        named = [
            ("model", self.model, here.model),
            ("compressor", self.compressor["config"], here.compressor["config"]),
            ("layout", self.layout, here.layout),
        ]
        parts = [f"another {name}: {', '.join(odd)}" for name, *pair in named if (odd := _differing(*pair))]
        if not parts and self.compressor["fingerprint"] != here.compressor["fingerprint"]:
            parts = ["another training of the compressor: its weights differ"]
        return " and of ".join(parts) or None


@dataclass(frozen=True)
class StoreFile:
    """A file whose header was read and checked.

    Attributes:
        path: Where it lies.
        header: What its slots belong to.
        documents: What is in it, in the order of the slots.
        tensors: Dtype and shape of one slot, by the tensor's name.
        digests: The checksum of each document's slots.
    """

    path: Path
    header: StoreHeader
    documents: tuple[StoredDocument, ...]
    tensors: dict[str, tuple[str, list[int]]]
    digests: tuple[str, ...] = field(repr=False)

    def read(self, indices: Sequence[int]) -> list[Slots]:
        """The slots of the documents at these ``indices``, on the CPU. Nothing else is read.

        Raises:
            StoreError: The file is damaged there, or is no longer the one that was opened.
        """
        starts = [0, *accumulate(document.slots for document in self.documents)]
        try:
            with safe_open(self.path, framework="pt") as file:
                whole = {name: file.get_slice(name) for name in self.tensors}
                read = [{name: whole[name][starts[i] : starts[i + 1]] for name in whole} for i in indices]
        except (SafetensorError, OSError, IndexError) as error:
            raise StoreError(f"{self.path} cannot be read: {error}") from error
        for index, slots in zip(indices, read, strict=True):
            if hash_tensors(slots) != self.digests[index]:
                raise StoreError(
                    f"{self.path} is damaged, or was written anew since it was opened: the slots of "
                    f"{self.documents[index].id!r} do not have their checksum. Take another copy, or remove the file "
                    "and encode its documents again"
                )
        return read


def write_file(path: Path, header: StoreHeader, documents: Sequence[StoredDocument], slots: Sequence[Slots]) -> None:
    """Write ``documents`` and the ``slots`` of each to ``path``: a kill at any moment leaves it as it was, or whole.

    Raises:
        StoreError: A document comes twice, or slots are not of one form, dtype and width.
    """
    tensors = _concatenated(documents, slots)
    content = {
        "format": FORMAT,
        "inlay": __version__,
        "header": asdict(header),
        "tensors": {name: [str(t.dtype), [*t.shape[1:]]] for name, t in tensors.items()},
        "documents": [asdict(document) for document in documents],
        "digests": [hash_tensors(one) for one in slots],
    }
    metadata = {"kind": KIND} | {name: json.dumps(value) for name, value in content.items()}
    metadata["sha256"] = _metadata_digest(metadata)
    with replacing(path) as new:
        save_file(tensors, new, metadata=metadata)
        read_file(new)  # safetensors writes headers that it does not read again: those beyond 100 MB


def read_file(path: Path) -> StoreFile:
    """Read and check the header of what :func:`write_file` wrote; the slots are left where they are.

    Raises:
        StoreError: The file is missing, damaged or cut off, of a newer format, or something else.
    """
    if not path.is_file():
        raise StoreError(f"{path} is no file: there are no soft tokens to load (inlay compress encode writes them)")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            shapes = {name: [*file.get_slice(name).get_shape()] for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise StoreError(
            f"{path} holds no soft tokens: it is no safetensors file, or one that is damaged or cut off ({error}). "
            "Take another copy, or remove the file and encode its documents again (inlay compress encode --resume)"
        ) from error
    content = _parse(path, metadata)
    try:
        documents = tuple(StoredDocument(**document) for document in content["documents"])
        tensors = {name: (str(dtype), list(shape)) for name, (dtype, shape) in content["tensors"].items()}
        found = StoreFile(path, StoreHeader(**content["header"]), documents, tensors, tuple(content["digests"]))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is no file of soft tokens as this version of inlay writes it: {error}") from error
    total = sum(document.slots for document in documents)
    if shapes != {name: [total, *shape] for name, (_, shape) in tensors.items()}:
        raise StoreError(f"{path} is damaged: its tensors are not those that its header lists")
    return found


def hash_text(text: str) -> str:
    """SHA-256 of a document's text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def split_rows(documents: Sequence[StoredDocument], memory: SoftTokens) -> list[Slots]:
    """The slots of each document, one row of ``memory`` each, on the CPU and as a file holds them.

    Raises:
        StoreError: Rows or slots are not as many as the documents say, or a slot holds NaN or infinity.
    """
    if len(documents) != memory.rows:
        raise StoreError(f"{len(documents)} documents for a memory of {memory.rows} rows")
    memory = memory.detach().to("cpu")
    rows = []
    for index, document in enumerate(documents):
        row = memory.row(index)
        if row.slots != document.slots:
            raise StoreError(f"{document.id!r} has {row.slots} slots and is said to have {document.slots}")
        slots = _named(row)
        if not all(torch.isfinite(tensor).all() for tensor in slots.values()):
            raise StoreError(f"the slots of {document.id!r} hold NaN or infinity; was the compressor trained well?")
        rows.append(slots)
    return rows


def join_rows(rows: Sequence[Slots]) -> SoftTokens:
    """The other way round: one memory of all ``rows``, zeros behind the shorter ones."""
    return SoftTokens.cat([_row(slots) for slots in rows])


def _named(row: SoftTokens) -> Slots:
    if row.embeddings is not None:
        return {"embeddings": row.embeddings[0]}
    pairs = {f"{layer}.keys": keys for layer, (keys, _) in enumerate(row.kv or ())}
    pairs |= {f"{layer}.values": values for layer, (_, values) in enumerate(row.kv or ())}
    return {name: tensor[0].transpose(0, 1) for name, tensor in pairs.items()}


def _row(slots: Slots) -> SoftTokens:
    mask = torch.ones(1, len(next(iter(slots.values()))), dtype=torch.bool)
    if "embeddings" in slots:
        return SoftTokens(slots["embeddings"].unsqueeze(0), mask)
    batched = {name: tensor.transpose(0, 1).unsqueeze(0) for name, tensor in slots.items()}
    layers = range(len(batched) // 2)
    return SoftTokens(None, mask, tuple((batched[f"{layer}.keys"], batched[f"{layer}.values"]) for layer in layers))


def _concatenated(documents: Sequence[StoredDocument], slots: Sequence[Slots]) -> dict[str, Tensor]:
    counts = Counter(document.id for document in documents)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise StoreError(f"the document {twice[0]!r} comes twice; ids are unique in a file")
    kinds = {tuple((name, t.dtype, t.shape[1:]) for name, t in sorted(one.items())) for one in slots}
    if len(kinds) != 1:
        raise StoreError(f"one file holds slots of one form, dtype and width; got {len(kinds)} kinds")
    return {name: torch.cat([one[name] for one in slots]).contiguous() for name in slots[0]}


def _parse(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if metadata.get("kind") != KIND:
        raise StoreError(f"{path} holds no soft tokens: it is a safetensors file of something else, or damaged")
    if metadata.get("format") != str(FORMAT):
        raise StoreError(
            f"{path} is of format {metadata.get('format')} (or damaged), this version of inlay ({__version__}) reads "
            f"{FORMAT}; it was written by inlay {metadata.get('inlay')}"
        )
    if _metadata_digest(metadata) != metadata.get("sha256"):
        raise StoreError(f"{path} is damaged: its header does not have its checksum. Take another copy")
    return {name: json.loads(text) for name, text in metadata.items() if name not in ("kind", "sha256")}


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    odd = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    odd.sort(key=lambda key: isinstance(here.get(key, there.get(key)), dict))  # what is said in a word comes first
    if odd == ["weights"]:
        return ["of the same shape, with other weights"]
    return [f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in odd if key != "weights"]


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    content = {name: text for name, text in metadata.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
