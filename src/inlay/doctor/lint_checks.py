"""The checks of a text recipe's lint: those of any memory, and of its data, optimizer and evaluation.

What one would look for in other code and this library rules out: the sum of a memory is float32 whatever the model's
dtype (`fastweight.scan`), and every mode of a recipe saves what it trains. What remains of half precision is checked:
base weights trained in it, and a memory clipped below the resolution of its layer's output.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import torch

from inlay.data import DataError, PackedStream, TextConfig
from inlay.data.config import Packing
from inlay.data.packing import NAMES_COLUMN
from inlay.data.sources import find_files
from inlay.doctor.findings import Finding, Severity
from inlay.doctor.lint_case import NotChecked, TextCase
from inlay.doctor.lint_memory import MEMORY_CHECKS
from inlay.doctor.reach_plan import percent

_COMPARED_TOKENS = 1 << 24
"""Training tokens, at most, in which the evaluation documents are looked for."""
_COMPARED_LENGTH = 16
"""Documents of fewer tokens can be alike by chance."""


def _short_documents(case: TextCase) -> Iterator[Finding]:
    size = case.memory.chunk_size
    if case.memory.boundary == "carry":
        return  # a row is one document
    if case.data is None:
        raise NotChecked("not checked: the data are not loaded")
    split = case.data.statistics.train or case.data.statistics.eval
    alone, pieces = split.memory(size).single_chunk_pieces, len(split.piece_tokens)
    if 3 * alone <= pieces or case.recipe.data.sequence_length <= size:
        return
    kind = "training" if split is case.data.statistics.train else "evaluation"
    says = (
        f"{percent(alone / pieces)} of the {pieces:,} {kind} documents have one chunk ({size} tokens or fewer, median "
        f"{int(np.median(split.piece_tokens))}): with boundary: reset nothing is ever read in them"
    )
    fix = f"memory.chunk_size: {max(1, (int(np.median(split.piece_tokens)) - 1) // 7)}"
    if case.text.packing == "concatenate":
        fix += ", or memory.boundary: carry if the documents in a sequence belong together"
    elif size < case.text.sequence_length:
        fix += f", or data.min_tokens: {size + 1} to leave them out"
    yield Finding("lint.short_documents", Severity.FATAL if alone == pieces else Severity.WARNING, says, fix)


def _half_weights(case: TextCase) -> Iterator[Finding]:
    """AdamW in place on weights of 16 bits: a step is about the learning rate, whatever the gradient."""
    if case.recipe.mode not in ("all", "memory+layers") or not case.adam:
        return
    dtype, rate = case.weight_dtype, case.number("learning_rate")
    fix = "model.dtype: float32 (with trainer.bf16: true the products stay fast)"
    if dtype == torch.float16:
        says = (
            f"mode: {case.recipe.mode} trains base weights kept in float16, where AdamW's running mean of squared "
            "gradients cannot hold less than 6e-08: steps come out many times too long, or infinite"
        )
        yield Finding("lint.half_weights", Severity.FATAL, says, fix)
    if dtype == torch.bfloat16:
        spacing = torch.finfo(dtype).eps * 2 ** math.floor(math.log2(case.weight_std))
        if rate < spacing:
            says = (
                f"mode: {case.recipe.mode} trains base weights kept in bfloat16, which around {case.weight_std:g} are "
                f"{spacing:.1e} apart, with AdamW steps of about {rate:.1e}: most of them round to nothing"
            )
            yield Finding("lint.half_weights", Severity.WARNING, says, fix)


def _steps(case: TextCase) -> Iterator[Finding]:
    steps, epochs = case.number("max_steps"), case.number("num_train_epochs")
    if steps > 0:
        return
    fix = "trainer.max_steps: 1000"
    if isinstance(case.recipe.data, TextConfig) and case.recipe.data.streaming:
        says = "data.streaming has no length, so the Trainer has to be told its steps"
        yield Finding("lint.steps", Severity.FATAL, says, fix)
    elif epochs <= 0:
        yield Finding("lint.steps", Severity.FATAL, f"trainer.num_train_epochs is {epochs:g}: nothing is trained", fix)


def _overlapping_sources(case: TextCase) -> Iterator[Finding]:
    text = case.text
    if not text.has_eval_data:
        return  # held out by the hash of a document's name: none is in both
    assert text.path is not None
    fix = "take eval_path and eval_split out, and a share of the documents (data.eval_fraction) is held out"
    if text.source == "dataset":
        both = set(text.split.split("+")) & set((text.eval_split or text.split).split("+"))
        if (text.eval_path or text.path) == text.path and both:
            says = f"training and evaluation both read the split {', '.join(sorted(both))} of {text.path}"
            yield Finding("lint.overlap", Severity.WARNING, says, f"data.eval_split: another split; or {fix}")
        return
    suffixes = (".jsonl", ".jsonl.gz") if text.source == "jsonl" else ("",)
    try:
        train, held = (
            {path.resolve() for path, _ in find_files(paths, suffixes)} for paths in (text.path, text.eval_path or ())
        )
    except DataError as error:
        raise NotChecked(f"not checked: {error}") from error
    if both_files := train & held:
        says = (
            f"{len(both_files)} of the {len(held)} evaluation files are training files too, {sorted(both_files)[0]} "
            "for one"
        )
        yield Finding(
            "lint.overlap", Severity.WARNING, says, f"data.eval_path: files that path does not hold; or {fix}"
        )


def _overlapping_documents(case: TextCase) -> Iterator[Finding]:
    """Sequences (``cut``) or documents (``concatenate``) of equal tokens in training and evaluation data.

    Looked for in the first ``_COMPARED_TOKENS`` tokens of the training data. Of concatenated documents that
    ``max_eval_sequences`` or the end of that stretch has cut short, no twin is found.
    """
    text = case.text
    if case.data is None:
        raise NotChecked("not checked: the data are not loaded")
    if isinstance(case.data.train, PackedStream):
        raise NotChecked("not checked: the training data are a stream")
    compared = min(len(case.data.train), _COMPARED_TOKENS // text.sequence_length)
    seen = set(_fingerprints(case.data.train, compared, text.packing))
    held = list(_fingerprints(case.data.eval, len(case.data.eval), text.packing))
    again = sum(fingerprint in seen for fingerprint in held)
    if again:
        kind = "sequences" if text.packing == "cut" else "documents"
        says = f"{again:,} of {len(held):,} evaluation {kind} are among the training {kind}, token for token"
        fix = "take the duplicates out of the data, or give other documents with data.eval_path"
        yield Finding("lint.overlap", Severity.WARNING, says, fix)


def _contexts(case: TextCase) -> Iterator[Finding]:
    section, length = case.recipe.evaluate, case.text.sequence_length
    longest = length if case.data is None else int(case.data.statistics.eval.piece_tokens.max())
    block = section.block or max(1, length // 8)
    needed = block + max(section.contexts or [1])
    if needed > longest and (section.block or section.contexts):
        says = (
            f"evaluate asks for {needed} tokens (a block of {block} and the longest context before it), but the "
            f"longest evaluation document has {longest}: the perplexity by context is left out"
        )
        fix = f"evaluate.block and the longest of evaluate.contexts: {longest} together, at most"
        yield Finding("lint.contexts", Severity.WARNING, says, fix)


def _fingerprints(dataset: Any, rows: int, packing: Packing) -> Iterator[bytes]:
    """A hash of the tokens of each piece of the first ``rows`` rows, or of each document put together again."""
    pieces = _pieces(dataset, rows)
    wholes: Iterable[np.ndarray] = (tokens for _, tokens in pieces)
    if packing == "concatenate":  # where a row's end cuts a document depends on its neighbours
        groups = groupby(pieces, key=lambda piece: piece[0])
        wholes = (np.concatenate([tokens for _, tokens in group]) for _, group in groups)
    for tokens in wholes:
        if len(tokens) >= _COMPARED_LENGTH:
            yield hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _pieces(dataset: Any, rows: int) -> Iterator[tuple[str, np.ndarray]]:
    """Name of the document and tokens of each piece, row by row."""
    for start in range(0, rows, 256):
        block = dataset[start : min(rows, start + 256)]
        for tokens, ids, names in zip(block["input_ids"], block["document_ids"], block[NAMES_COLUMN], strict=True):
            real = ids >= 0
            yield from zip(names, np.split(tokens[real], np.flatnonzero(np.diff(ids[real])) + 1), strict=True)


CHECKS: dict[str, Callable[[TextCase], Iterable[Finding]]] = {
    **MEMORY_CHECKS,
    "Short documents": _short_documents,
    "Half-precision weights": _half_weights,
    "Training steps": _steps,
    "Evaluation sources": _overlapping_sources,
    "Evaluation documents": _overlapping_documents,
    "Evaluation contexts": _contexts,
}
"""The checks by their titles, in the order in which they are told."""
