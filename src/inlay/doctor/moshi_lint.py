"""Lint of a Moshi recipe: what is asked of any memory, and what can be wrong with encoded conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median_low

import numpy as np
import torch

from inlay.data.problems import DataError
from inlay.doctor.findings import Finding, Severity
from inlay.doctor.lint import Lint, run_checks
from inlay.doctor.lint_case import TYPICAL_STD, Case, NotChecked
from inlay.doctor.lint_memory import MEMORY_CHECKS
from inlay.doctor.reach_plan import percent
from inlay.evaluate.scoring import choose
from inlay.fastweight import FastWeightConfig
from inlay.moshi.codes_store import CodesStore
from inlay.moshi.interleave import FRAME_RATE
from inlay.moshi.sequences import MoshiData, MoshiSequences, mark_returns
from inlay.moshi.weights import MoshiCheckpoint
from inlay.train.moshi import refuse_other_codes
from inlay.train.moshi_recipe import MoshiRecipe

_READ_FILES = 256
"""Conversations, at most, whose text is read."""
_SILENT = 0.05
"""Share of conversations without a word from which they are told of."""


@dataclass(frozen=True)
class MoshiCase(Case):
    """A Moshi recipe under examination.

    Attributes:
        recipe: The recipe.
        checkpoint: The files of its model, of which nothing is built.
        data: Its sequences.
    """

    recipe: MoshiRecipe
    checkpoint: MoshiCheckpoint
    data: MoshiData

    @property
    def configured(self) -> FastWeightConfig | None:
        """See :class:`Case`."""
        return self.recipe.memory

    @property
    def tokens(self) -> int:
        """See :class:`Case`."""
        return self.recipe.frames

    def length(self, tokens: int) -> str:
        """See :class:`Case`."""
        return f"duration_sec: {tokens / FRAME_RATE:g}"

    @property
    def blocks(self) -> int:
        """See :class:`Case`."""
        return int(self.checkpoint.lm_config["num_layers"])

    @property
    def width(self) -> int:
        """See :class:`Case`."""
        return int(self.checkpoint.lm_config["dim"])

    @property
    def inner(self) -> int:
        """See :class:`Case`; as Kyutai's ``ActivationGating`` computes it."""
        feedforward = int(self.checkpoint.lm_config.get("hidden_scale", 4) * self.width)
        return 21 * self.width // 8 if feedforward == 4 * self.width else 2 * feedforward // 3

    @property
    def weight_std(self) -> float:
        """See :class:`Case`."""
        return TYPICAL_STD

    @property
    def output_dtype(self) -> torch.dtype:
        """See :class:`Case`."""
        return torch.bfloat16 if self.recipe.param_dtype == "bfloat16" else torch.float32

    @property
    def adam(self) -> bool:
        """See :class:`Case`."""
        return str(self.recipe.trainer.get("optim", "adamw")).startswith("adam")

    @property
    def rates(self) -> dict[str, float]:
        """See :class:`Case`."""
        lr, memory_lr = self.recipe.optim.lr, self.recipe.optim.memory_lr
        if memory_lr is None:
            return {"optim.lr": lr}
        own = {"optim.memory_lr": memory_lr}
        return own if self.recipe.mode == "memory" else {"optim.lr": lr} | own  # in that mode lr drives nothing

    @cached_property
    def window(self) -> int:
        """Frames that attention sees. Raises :class:`NotChecked` for a model that sees all."""
        yarn, context = self.recipe.yarn, self.checkpoint.lm_config.get("context")
        if yarn is not None:
            context = yarn.original_context or context
        if context is None:
            raise NotChecked("not checked: the model's attention has no window")
        return round(context * (1.0 if yarn is None else yarn.factor))


def lint_moshi(case: MoshiCase, *, source: Path | None = None) -> Lint:
    """Look for faults in a Moshi recipe without building its model.

    Args:
        case: The recipe, the files of its model, and its data.
        source: File that the recipe was read from, for the heading.
    """
    return Lint(str(source or case.recipe.name), run_checks(MOSHI_CHECKS, case))


def _codes(case: MoshiCase) -> Iterator[Finding]:
    try:
        refuse_other_codes(case.data, case.checkpoint)
    except DataError as error:
        yield Finding("lint.other_codes", Severity.FATAL, *_told(str(error)))


def _window(case: MoshiCase) -> Iterator[Finding]:
    """A memory trained where attention sees everything may learn what attention does better."""
    if case.recipe.memory is not None and case.tokens <= case.window:
        says = (
            f"sequences of {case.tokens:,} frames lie within the {case.window:,} that attention sees: nothing is in "
            "the memory that attention could not read"
        )
        fix = f"{case.length(min(32_000, 4 * case.window))}, or longer"
        yield Finding("lint.within_window", Severity.WARNING, says, fix)


def _short(case: MoshiCase) -> Iterator[Finding]:
    size = case.memory.chunk_size
    if case.memory.boundary == "carry":
        return  # a row is one document
    frames = [piece for row in case.data.train_statistics.rows for piece in row]
    alone = sum(piece <= size for piece in frames)
    if 3 * alone <= len(frames) or case.tokens <= size:
        return
    says = (
        f"{percent(alone / len(frames))} of the {len(frames):,} training documents have one chunk ({size} frames or "
        f"fewer, median {median_low(frames):,}): with boundary: reset nothing is ever read in them"
    )
    fix = f"memory.chunk_size: {max(1, (median_low(frames) - 1) // 7)}"
    if case.recipe.data.packing == "concatenate":
        fix += ", or memory.boundary: carry if the files in a sequence belong together"
    else:
        fix += f", or data.min_sec: {(size + 1) / FRAME_RATE:g} to leave them out"
    yield Finding("lint.short_documents", Severity.FATAL if alone == len(frames) else Severity.WARNING, says, fix)


def _words(case: MoshiCase) -> Iterator[Finding]:
    """A main speaker without words, as when another name stands in the alignments or the channels are swapped."""
    for name, split in (("training", case.data.train), ("evaluation", case.data.eval)):
        files = sorted({(piece.store, piece.entry) for row in split.rows for piece in row})
        if not files:
            continue
        read = [files[index] for index in choose(len(files), _READ_FILES)]
        silent = [file for file in read if not _has_words(split.stores[file[0]], file[1])]
        if len(silent) <= _SILENT * len(read):
            continue
        store, entry = silent[0]
        first = split.stores[store]
        says = (
            f"{percent(len(silent) / len(read))} of the {name} conversations have no word of "
            f"{first.identity.main_speaker} in their text ({first.entries[entry].path} is the first): their text loss "
            "is padding"
        )
        fix = "check the speaker's name in the alignments with inlay moshi check, then encode again"
        severity = Severity.FATAL if len(silent) == len(read) and name == "training" else Severity.WARNING
        yield Finding("lint.no_words", severity, says, fix)


def _returns(case: MoshiCase) -> Iterator[Finding]:
    split = case.data.train
    if not any(entry.stored.returns for store in split.stores for entry in store.entries):
        raise NotChecked("not checked: the data do not tell which phrases return (those of inlay moshi synthesise do)")
    farthest = max(_farthest_returns(split))
    if farthest <= case.window:
        says = (
            "no phrase of the training sequences returns after more than the attention's window of "
            f"{case.window:,} frames (the farthest after {farthest:,}): a memory has nothing to say that attention "
            "does not see"
        )
        fix = f"{case.length(4 * case.window)}, or make conversations with a longer --return-after"
        yield Finding("lint.nothing_returns", Severity.WARNING, says, fix)


def _farthest_returns(split: MoshiSequences) -> Iterator[int]:
    """Of each piece, how many frames lie between a phrase and its return, at most; 0 without one."""
    for piece in {piece for row in split.rows for piece in row}:
        distances = np.zeros(piece.frames, np.int64)
        mark_returns(split.stores[piece.store], piece, distances)
        yield int(distances.max())


def _overlap(case: MoshiCase) -> Iterator[Finding]:
    """By content, wherever the files lie."""
    train, held = (
        {split.stores[piece.store].entries[piece.entry].stored.audio.sha256 for row in split.rows for piece in row}
        for split in (case.data.train, case.data.eval)
    )
    if both := train & held:
        says = f"{len(both):,} of the {len(held):,} evaluation conversations are among the training conversations"
        fix = "give other codes with data.eval_data, or take it out, and data.eval_fraction of the files is held out"
        yield Finding("lint.overlap", Severity.WARNING, says, fix)


def _has_words(store: CodesStore, entry: int) -> bool:
    identity = store.identity
    silence = [identity.text_padding_id, identity.end_of_text_padding_id, -1]
    return bool((~np.isin(store.text(entry), silence)).any())


def _told(error: str) -> tuple[str, str]:
    """What is wrong, and what to do, of a message that says both."""
    says, _, fix = error.partition("; ")
    return says, fix


MOSHI_CHECKS: dict[str, Callable[[MoshiCase], Iterable[Finding]]] = {
    **MEMORY_CHECKS,
    "Attention's window": _window,
    "Short documents": _short,
    "Codes": _codes,
    "Words of the main speaker": _words,
    "Returned phrases": _returns,
    "Evaluation conversations": _overlap,
}
"""The checks by their titles, in the order in which they are told."""
