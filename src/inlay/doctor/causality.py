"""Does the model read ahead? One token is replaced, and nothing before it may change.

For random t, token t + 1 becomes another one; the logits up to t must be the very same numbers, since the shapes are
the same and so is the order of every sum. That is asked of the model as it runs in evaluation (exposure 0), and of the
recipe's exposure, which acts in training only: with α > 0 a chunk reads its own Δ_i, whose targets are made from the
embeddings of the tokens that are to be predicted. What the training loss falls by then is labels read, not learning.

Besides random places, those where a fault would sit are tried: a chunk's last token, its first, and the second, which
the target's convolution would reach from the chunk before if it were not cut at the border.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inlay.doctor.findings import Finding, Severity
from inlay.doctor.measuring import next_token_target, on_device_of, undisturbed
from inlay.evaluate.scoring import logits_of, token_bits
from inlay.fastweight import Memory, find_memory
from inlay.report import Section, Table, Text
from inlay.report.document import Verdict
from inlay.report.numbers import Cell


@dataclass(frozen=True)
class Leak:
    """What replacing token t + 1 did to the logits up to t, in one setting.

    Attributes:
        setting: What ran: ``memory off``, ``exposure 0``, …
        change: Largest |Δlogit|; 0 for an honest model.
        relative: The same over the RMS of the logits.
        changed: Probes in which any logit changed.
        reach: Most tokens between the replaced one and a logit that changed; 0 if none did.
        bits: Loss of the batch in bits per token; None if it has no labels.
    """

    setting: str
    change: float
    relative: float
    changed: int
    reach: int
    bits: float | None


@dataclass(frozen=True)
class Causality:
    """The result of :func:`probe_causality`.

    Attributes:
        probes: Tokens replaced, one at a time, in each setting.
        exposure: α that training runs with.
        rounding: Change that counts as rounding: that of the base model where it is of the dtype's own size, as in a
            mixture of experts, whose shapes follow the tokens. 0 for others.
        base: The model with its memory off.
        honest: With its memory at exposure 0, as in evaluation; None without a memory.
        exposed: At the recipe's exposure; None where that is 0.
        trained: At the recipe's exposure, with the next token's embedding for a target in place of a fresh memory's
            zero; None where the recipe's own target shows the leak.
        culprits: Blocks whose memory alone reads ahead at exposure 0.
    """

    probes: int
    exposure: float
    rounding: float
    base: Leak
    honest: Leak | None
    exposed: Leak | None
    trained: Leak | None
    culprits: tuple[int, ...]

    @property
    def leaked_bits(self) -> float | None:
        """What exposure takes off the loss of the batch, in bits per token; None without exposure or labels."""
        if self.exposed is None or self.honest is None or self.exposed.bits is None or self.honest.bits is None:
            return None
        return self.honest.bits - self.exposed.bits

    def findings(self) -> list[Finding]:
        """``causality.leak`` (the model reads ahead) and ``causality.exposure`` (training does)."""
        found = []
        if self.base.change > self.rounding:
            found.append(
                Finding(
                    "causality.leak",
                    Severity.FATAL,
                    f"the base model itself, with the memory off, reads ahead: replacing a token changes logits up to "
                    f"{self.base.reach} tokens before it by up to {self.base.change:.3g} ({self.base.relative:.2g} of "
                    "their RMS)",
                    "use a causal model: check its attention mask, and whether it was built as an encoder",
                )
            )
        if self.culprits and self.honest is not None:
            blocks = ", ".join(map(str, self.culprits))
            found.append(
                Finding(
                    "causality.leak",
                    Severity.FATAL,
                    f"the memory of block {blocks} reads ahead at exposure 0: replacing a token changes logits up to "
                    f"{self.honest.reach} tokens before it by up to {self.honest.change:.3g} "
                    f"({self.honest.relative:.2g} of their RMS)",
                    "look for what replaced or patched the target generator or the memory layer of that block",
                )
            )
        leaking = self.trained or self.exposed
        if leaking is not None and leaking.change > self.rounding:
            found.append(Finding("causality.exposure", Severity.WARNING, self._exposure(leaking), "memory.exposure: 0"))
        return found

    def _exposure(self, leaking: Leak) -> str:
        if self.trained is not None:
            return (
                f"exposure {self.exposure:g} will leak labels: the fresh memory's target is still zero, but once it "
                f"carries the next token, replacing that token changes logits before it by up to {leaking.change:.3g} "
                f"({leaking.relative:.2g} of their RMS)"
            )
        says = (
            f"exposure {self.exposure:g} leaks labels: replacing a token changes logits before it by up to "
            f"{leaking.change:.3g} ({leaking.relative:.2g} of their RMS)"
        )
        if self.leaked_bits is None:
            return says
        if self.leaked_bits < 0.01:
            return f"{says}; the loss hardly falls by it yet ({self.leaked_bits:.2g} bits per token), but will"
        return f"{says}, and the training loss is {self.leaked_bits:.3g} bits per token lower for it"

    def section(self) -> Section:
        """One table: a row for each setting."""
        rows: list[list[Cell]] = []
        verdicts: list[Verdict] = []
        for leak in (self.base, self.honest, self.exposed, self.trained):
            if leak is None:
                continue
            rows.append([leak.setting, _exact(leak.change), _exact(leak.relative), leak.changed, leak.reach, leak.bits])
            verdicts.append("good" if leak.change <= self.rounding else "bad")
        table = Table(
            ["setting", "largest |Δlogit|", "over RMS of logits", "probes changed", "tokens ahead", "loss, bits/token"],
            rows,
            verdicts=verdicts,
            align=["left", "right", "right", "right", "right", "right"],
        )
        items: list[Table | Text] = [table]
        if self.leaked_bits is not None:
            items.append(Text(f"Exposure takes {self.leaked_bits:+.3g} bits per token off the loss of this batch."))
        if self.rounding > 0:
            items.append(Text(f"Changes up to {self.rounding:.2g} are rounding: the base model alone shows them."))
        return Section(
            "Causality",
            f"{self.probes} times one token was replaced. Logits before it may not change at all.",
            items,
        )


def probe_causality(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    exposure: float | None = None,
    positions: int = 8,
    seed: int = 0,
) -> Causality:
    """Replace tokens of ``batch`` and read the logits before them.

    Costs ceil(positions / B) + 1 forwards for each of up to four settings.

    Args:
        model: Any causal LM, with or without a memory.
        batch: ``input_ids`` ``[B, T]`` (or ``[B, T, codebooks]``) and what else :func:`inlay.data.collate` gives;
            ``labels`` for the loss.
        exposure: α to try besides 0; the memory's own when not given.
        positions: Tokens to replace.
        seed: Chooses them and what they become.

    Raises:
        ValueError: No row has two tokens, or ``positions`` is below 1.
    """
    memory = find_memory(model)
    alpha = 0.0 if memory is None else memory.config.exposure if exposure is None else exposure
    probe = _Probe(model, memory, on_device_of(model, batch), positions, seed)
    with nullcontext() if memory is None else memory.disabled():
        base = probe.measure("base model" if memory is None else "memory off")
    # A real leak is far above the dtype's resolution; routing that follows the tokens gives changes of its size.
    rounding = base.change if base.relative <= 16 * probe.resolution else 0.0
    if memory is None:
        return Causality(probe.count, 0.0, rounding, base, None, None, None, ())

    exposed = trained = None
    with memory.using(exposure=0.0):
        honest = probe.measure("exposure 0")
        culprits = tuple(_culprits(memory, probe, base, rounding)) if honest.change > max(rounding, base.change) else ()
    if alpha > 0:
        with memory.using(exposure=alpha):
            exposed = probe.measure(f"exposure {alpha:g} in training", exposed=True)
            if exposed.change <= rounding:
                with next_token_target(memory):
                    trained = probe.measure(f"exposure {alpha:g}, once the target has grown", exposed=True)
    return Causality(probe.count, alpha, rounding, base, honest, exposed, trained, culprits)


class _Probe:
    """The same replaced tokens, measured in one setting after the other."""

    def __init__(
        self, model: nn.Module, memory: Memory | None, batch: dict[str, Tensor], positions: int, seed: int
    ) -> None:
        if positions < 1:
            raise ValueError(f"positions must be at least 1; got {positions}")
        self.model = model
        self.memory = memory
        self.batch = batch
        self.resolution = 0.0
        self._within = _place_in_document(batch, carry=memory is not None and memory.config.boundary == "carry")
        choose = random.Random(seed)
        ids = batch["input_ids"]
        rows = [row for row in range(ids.shape[0]) if int((self._within[row] >= 0).sum()) > 1]
        if not rows:
            raise ValueError("causality needs a row of at least two tokens")
        self._rounds: list[list[tuple[int, int]]] = []  # per forward, (row, replaced place): one of each row
        places = {row: self._places(row, positions, choose) for row in rows}
        for n in range(positions):
            if n % len(rows) == 0:
                self._rounds.append([])
            row = rows[n % len(rows)]
            if n // len(rows) < len(places[row]):
                self._rounds[-1].append((row, places[row][n // len(rows)]))
        self._rounds = [chosen for chosen in self._rounds if chosen]
        self.count = sum(map(len, self._rounds))
        self._replaced = [self._replace(chosen, choose) for chosen in self._rounds]

    def _places(self, row: int, most: int, choose: random.Random) -> list[int]:
        """Places of a row whose token is replaced, by turns a chunk's border and anywhere; never the first token."""
        within = self._within[row].tolist()
        anywhere = [t for t, place in enumerate(within) if place >= 0][1:]
        choose.shuffle(anywhere)
        size = 0 if self.memory is None else self.memory.config.chunk_size
        borders = [t for t in anywhere if size and within[t] >= size and within[t] % size in (0, 1)]
        borders += [t for t in anywhere if size and within[t] % size == size - 1]
        choose.shuffle(borders)
        mixed = [t for pair in zip(borders, anywhere, strict=False) for t in pair] + anywhere
        return list(dict.fromkeys(mixed))[:most]

    def _replace(self, chosen: list[tuple[int, int]], choose: random.Random) -> Tensor:
        """The input ids with another token of the batch at each chosen place."""
        ids = self.batch["input_ids"].clone()
        streams = ids.unsqueeze(-1) if ids.dim() == 2 else ids
        known = [set(tokens.tolist()) for tokens in streams[self._within >= 0].T]
        for row, place in chosen:
            for stream in range(streams.shape[-1]):
                old = int(streams[row, place, stream])
                others = sorted(known[stream] - {old}) or [old - 1 if old else old + 1]
                streams[row, place, stream] = choose.choice(others)
        return ids

    def measure(self, setting: str, *, exposed: bool = False) -> Leak:
        """Run the batch as it is and with the tokens replaced; with the exposure of training if ``exposed``."""
        change, changed, reach = 0.0, 0, 0
        with undisturbed(self.model, self.memory, exposed=exposed):
            before = logits_of(self.model, self.batch)
            for chosen, ids in zip(self._rounds, self._replaced, strict=True):
                logits = logits_of(self.model, {**self.batch, "input_ids": ids})
                for row, place in chosen:
                    real = self._within[row, :place] >= 0
                    moved = (logits[row, :place] - before[row, :place]).float().abs().amax(-1) * real
                    if bool(moved.any()):
                        changed += 1
                        change = max(change, float(moved.max()))
                        reach = max(reach, place - int(moved.nonzero()[0]))
        self.resolution = torch.finfo(before.dtype).eps
        real = self._within >= 0
        rms = float(before[real].float().pow(2).mean().sqrt())
        return Leak(setting, change, change / rms if rms else 0.0, changed, reach, self._bits(before))

    def _bits(self, logits: Tensor) -> float | None:
        labels = self.batch.get("labels")
        if labels is None:
            return None
        bits, labelled = token_bits(logits, labels)
        return float(bits[labelled].mean()) if labelled.any() else None


def _culprits(memory: Memory, probe: _Probe, base: Leak, rounding: float) -> Iterator[int]:
    """Blocks whose memory reads ahead with the others switched off."""
    for index in memory.layers:
        with _alone(memory, index):
            if probe.measure(f"block {index} alone").change > max(rounding, base.change):
                yield index


@contextmanager
def _alone(memory: Memory, index: int) -> Iterator[None]:
    with memory.disabled():
        memory.layers[index].enabled = True
        yield


def _place_in_document(batch: Mapping[str, Tensor], *, carry: bool) -> Tensor:
    """``[B, T]`` tokens of the same document before each one (of the same row with ``carry``); −1 for padding."""
    ids = batch["input_ids"]
    documents = torch.zeros(ids.shape[:2], dtype=torch.long, device=ids.device)
    if "document_ids" in batch:
        documents = batch["document_ids"].long()
    elif "attention_mask" in batch:
        documents = batch["attention_mask"].long() - 1
    real = documents >= 0
    rank = real.cumsum(1) - 1
    starts = torch.ones_like(real)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    if carry:
        starts = real & (rank == 0)
    first = torch.where(starts & real, rank, 0).cummax(1).values
    return torch.where(real, rank - first, -1)


def _exact(value: float) -> str:
    return "exactly 0" if value == 0 else f"{value:.3g}" if math.isfinite(value) else "not finite"
