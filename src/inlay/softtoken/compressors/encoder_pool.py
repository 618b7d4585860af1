"""``encoder-pool``: the LM itself, in whose last block the queries are mean-pooled over runs of neighbouring tokens.

ARC-Encoder (Pilchen, Grave, Pérez, 2025), the best of the published ablations. Blocks 1 to L−1 run as ever. The last
one gets, behind the S tokens, one row per run:

    residual   the mean of the run's hidden states
    query      the mean of the run's queries, before they are rotated
    position   that of the run's last token
    reads      what the run's last token reads; keys and values of all tokens stay whole, and nobody reads a pooled row

so that what comes out of it is a slot per run, which an MLP brings into the embedding space. Unlike memory tokens, a
slot has a place in the text, and any number of them comes without a table.

The published encoder reads in both directions (``attention: bidirectional``) and rotates pooled queries for positions 0
to M−1, against keys at 0 to S−1; here query and keys stay in the text's own coordinates. Where no query projection is
known by name, the query is that of the mean hidden state, normed by the block, which is what the released encoder does.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlay.softtoken.compressors.base import Compressor
from inlay.softtoken.compressors.calibration import Projector, normalised
from inlay.softtoken.compressors.config import EncoderPoolConfig
from inlay.softtoken.compressors.errors import CompressorError
from inlay.softtoken.compressors.language_model import refuse_cut_off
from inlay.softtoken.compressors.passages import Passage, Written
from inlay.softtoken.compressors.segments import Runs


class EncoderPoolCompressor(Compressor[EncoderPoolConfig]):
    """Pooled queries in the last block.

    Attributes:
        projector: From the last block's output to the embedding space.
    """

    def __init__(self, config: EncoderPoolConfig, model: Any) -> None:
        super().__init__(config, model)
        if self.lm.attention not in ("sdpa", "eager"):
            raise CompressorError(
                f"encoder-pool needs a mask of its own in the last block, which {self.lm.attention} does not take; "
                "load the model with attn_implementation='sdpa'"
            )
        taken = inspect.signature(self.lm.blocks[-1].forward).parameters
        if not {"hidden_states", "attention_mask"} <= taken.keys():
            raise CompressorError(
                f"encoder-pool adds rows to the last block, and {type(self.lm.blocks[-1]).__name__} does not take its "
                "hidden_states and attention_mask by these names; use encoder-tokens"
            )
        self.projector = Projector(self.lm.width, config.projector_width)
        if config.residual:
            nn.init.zeros_(self.projector.down.weight)
        self.use_adapter(config.lora)

    def write(self, passage: Passage) -> Written:
        """One pass over what came before and the segment."""
        text = passage.joined()
        block = self.lm.blocks[-1]
        pooled = PooledBlock(block, [projection for _, projection in self.lm.query_projections(block)], text.runs)
        hidden = self.lm.read(
            text.embeds,
            text.mask,
            adapter=self.adapter,
            bidirectional=self.config.attention == "bidirectional",
            within=pooled.hooked,
        )
        assert pooled.output is not None
        refuse_cut_off(hidden, pooled.output, "encoder-pool")
        slots = self.projector(pooled.output)
        if self.config.residual:
            slots = slots + normalised(text.runs.mean(text.embeds).to(slots.dtype))
        return Written(self.calibrated(slots))


class PooledBlock:
    """A block that, while hooked, also computes a row per run.

    Attributes:
        output: `[B, M, D]`, what the block made of the pooled rows.
    """

    def __init__(self, block: nn.Module, queries: Sequence[nn.Module], runs: Runs) -> None:
        self.output: Tensor | None = None
        self._block = block
        self._queries = queries
        self._runs = runs
        self._tokens = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within it the block gets a row per run behind the tokens, with the mean of the run's queries, and gives the
        tokens' rows alone."""
        handles = [
            self._block.register_forward_pre_hook(self._append, with_kwargs=True),
            self._block.register_forward_hook(self._take_off),
            *(projection.register_forward_hook(self._pool_queries) for projection in self._queries),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _pool_queries(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        # A fused projection's keys and values are pooled with it, but nobody reads those of a pooled row.
        tokens = output[:, : self._tokens]
        return torch.cat([tokens, self._runs.mean(tokens)], dim=1)

    def _append(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = inspect.signature(block.forward).bind(*args, **kwargs)
        hidden: Tensor = bound.arguments["hidden_states"]
        self._tokens = hidden.shape[1]
        more: dict[str, Any] = next(
            (bound.arguments.get(p.name, {}) for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD),
            {},
        )
        bound.arguments["hidden_states"] = torch.cat([hidden, self._runs.mean(hidden)], dim=1)
        bound.arguments["attention_mask"] = self._extended_mask(bound.arguments.get("attention_mask"), hidden)
        for arguments in (bound.arguments, more):
            if isinstance(arguments.get("position_ids"), Tensor):
                arguments["position_ids"] = self._with_last(arguments["position_ids"])
            if arguments.get("position_embeddings") is not None:
                arguments["position_embeddings"] = tuple(map(self._with_last, arguments["position_embeddings"]))
        return bound.args, bound.kwargs

    def _take_off(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        self.output = hidden[:, self._tokens :]
        rest = hidden[:, : self._tokens]
        return (rest, *output[1:]) if isinstance(output, tuple) else rest

    def _with_last(self, x: Tensor) -> Tensor:
        """`[B or 1, S, …]` and behind it, for each run, what its last token has."""
        last = self._runs.last
        x = x.expand(len(last), *x.shape[1:])
        index = last.view(*last.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return torch.cat([x, x.gather(1, index)], dim=1)

    def _extended_mask(self, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """`[B, 1, S, S]` as the block would get it to `[B, 1, S + M, S + M]`."""
        if mask is None:  # what attention takes for causal and without padding
            allowed = torch.ones(self._tokens, self._tokens, dtype=torch.bool, device=hidden.device).tril()
            mask = allowed[None, None]
        last = self._runs.last
        mask = mask.expand(len(last), -1, -1, -1)
        rows = mask.gather(2, last[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return nn.functional.pad(torch.cat([mask, rows], dim=2), (0, last.shape[1]), value=blocked)
