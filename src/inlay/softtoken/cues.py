"""Reading a context back from its slots: what a compressor is pretrained on.

    [BOS?] [soft tokens] [cue] [text]        the text is supervised

The text is the context itself (*reconstruction*) or what comes next (*continuation*). Which of the two is asked for,
the decoder is told by a cue: one learned embedding for each, at the scale of the token embeddings, where an answer has
a question and an anchor. No token of the vocabulary takes a new meaning.

Nothing ends these texts: they are as long as the context happens to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inlay.softtoken.batches import NO_LABEL, TrainingBatch
from inlay.softtoken.errors import SoftTokenError
from inlay.softtoken.tokens import SoftTokens, embed_text, packing_order

RECONSTRUCTION = "reconstruction"
CONTINUATION = "continuation"
CUED = (RECONSTRUCTION, CONTINUATION)
"""The objectives that have a cue."""

FILE = "cues.safetensors"


class Cues(nn.Module):
    """Learned embeddings, `[D]` float32, by the name of their objective.

    Args:
        names: The objectives.
        width: D.
        rms: What their elements are drawn at: the RMS of the decoder's embeddings.
    """

    def __init__(self, names: Iterable[str], width: int, rms: float) -> None:
        super().__init__()
        self.embeddings = nn.ParameterDict({name: rms * torch.randn(width) for name in names})

    def __getitem__(self, name: str) -> Tensor:
        return self.embeddings[name]

    def save(self, directory: Path) -> None:
        """Write ``cues.safetensors``, if there is a cue."""
        if self.embeddings:
            tensors = {name: cue.detach().cpu().clone() for name, cue in self.embeddings.items()}
            save_file(tensors, directory / FILE, metadata={"format": "pt"})

    def load(self, directory: Path) -> None:
        """Copy in the cues that ``directory`` has for these names.

        Raises:
            SoftTokenError: One of them is missing.
        """
        saved = load_file(directory / FILE) if (directory / FILE).is_file() else {}
        if missing := sorted(set(self.embeddings) - set(saved)):
            raise SoftTokenError(f"{directory / FILE} has no cue for {', '.join(missing)}")
        with torch.no_grad():
            for name, cue in self.embeddings.items():
                cue.copy_(saved[name])


def cued(
    model: Any, before: Sequence[int], memory: SoftTokens, cue: Tensor, ids: Tensor, mask: Tensor
) -> TrainingBatch:
    """Memory, cue and text as a batch that supervises the text.

    Args:
        model: A Hugging Face causal LM.
        before: Ids in front of the memory (a BOS, say).
        memory: B rows.
        cue: `[D]`.
        ids: `[B, S]`, the tokens that texts are taken from.
        mask: `[B, S]` bool, True at the tokens of a row's text; the others may stand anywhere. A row may have none.

    Raises:
        SoftTokenError: The memory is of form ``kv`` and something stands before it.
    """
    if memory.form == "kv" and len(before):
        raise SoftTokenError("form kv: nothing can stand before the memory; set bos: false in the layout")
    rows, device = len(ids), ids.device
    text = embed_text(model, ids, mask)
    assert text.embeddings is not None
    one = torch.ones(rows, 1, dtype=torch.bool, device=device)
    asked = SoftTokens(cue.to(text.embeddings.dtype).expand(rows, 1, -1), one)
    parts = [asked, text]
    if memory.embeddings is not None:
        front = torch.tensor(before, dtype=torch.long, device=device).expand(rows, -1)
        parts = [embed_text(model, front, torch.ones_like(front)), memory, *parts]
    sequence = SoftTokens.concatenate(parts)
    assert sequence.embeddings is not None

    places = torch.arange(sequence.slots, device=device)
    at = places - (sequence.lengths - text.lengths).unsqueeze(1)  # number of the token within its row's text
    tokens = ids.gather(1, packing_order(mask))
    labels = tokens.gather(1, at.clamp(0, ids.shape[1] - 1)).masked_fill((at < 0) | ~sequence.mask, NO_LABEL)
    positions = (sequence.mask.long().cumsum(dim=1) - 1).clamp(min=0)
    attended = sequence.mask
    if memory.form == "kv":
        cached = memory.mask.gather(1, packing_order(memory.mask, "left"))
        attended = torch.cat([cached, attended], dim=1)
        positions = positions + memory.lengths.unsqueeze(1)
    return TrainingBatch(
        sequence.embeddings.masked_fill(~sequence.mask.unsqueeze(-1), 0),
        attended.long(),
        positions,
        memory if memory.form == "kv" else None,
        model,
        labels,
    )
