"""The decoder as a compressor uses it: what it embeds, reads, and leaves in its cache.

The only place that knows how a Hugging Face decoder is laid out and driven, and it knows little: a list of blocks, in
each an attention module with a projection for its queries, and a forward that takes ``inputs_embeds`` and
``position_ids``. Whatever is hooked or switched for a pass is undone when it ends, in an error too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.fastweight.causal_lm import base_model, cache_argument, forward_arguments
from inlay.softtoken.compressors.adapter import Adapter, adapters, recomputed_within, tuner_layers
from inlay.softtoken.compressors.errors import CompressorError

KeyValues = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of each layer, `[B, H_kv, M, d_head]`."""

QUERY_PROJECTIONS = ("q_proj", "c_attn", "qkv_proj", "query_key_value", "Wqkv", "q_b_proj")
"""What families call the linear layer that the queries come from, alone or together with keys and values."""


class LanguageModel:
    """A causal LM that a compressor reads with and writes for. No module: its weights are not the compressor's.

    Attributes:
        model: The transformers model, taken out of PEFT's wrapper.
        decoder: Its part that runs the blocks.
        blocks: The blocks, in order.
        embedding: Its input embedding.
        width: D.
        heads: Attention heads.
        max_positions: Longest input; None where the model does not say.
    """

    def __init__(self, model: Any) -> None:
        self.model = model = base_model(model)
        self.decoder = model.get_decoder()
        text = model.config.get_text_config()
        self.embedding = model.get_input_embeddings()
        self.width: int = text.hidden_size
        self.heads: int = text.num_attention_heads
        self.max_positions: int | None = getattr(text, "max_position_embeddings", None)
        self.blocks = self._find_blocks(text.num_hidden_layers)
        parameters = forward_arguments(self.decoder)
        missing = [name for name in ("inputs_embeds", "attention_mask", "position_ids") if name not in parameters]
        if missing:
            raise CompressorError(
                f"{type(self.decoder).__name__} cannot be read with by a compressor: its forward does not take "
                f"{', '.join(missing)}"
            )

    def _find_blocks(self, count: int) -> nn.ModuleList:
        lists = {name: m for name, m in self.decoder.named_children() if isinstance(m, nn.ModuleList)}
        for blocks in lists.values():
            if len(blocks) == count:
                return blocks
        raise CompressorError(
            f"{type(self.decoder).__name__} has no list of its {count} blocks; its lists of modules are {sorted(lists)}"
        )

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.embedding.weight.device

    @property
    def attention(self) -> str:
        """Its attention implementation, ``sdpa``, ``eager``, …"""
        return str(self.decoder.config._attn_implementation)

    def embed(self, ids: Tensor) -> Tensor:
        """`[B, S]` ids to `[B, S, D]`."""
        return self.embedding(ids)

    @property
    def shifts_positions(self) -> bool:
        """Whether only the distance of positions matters, so that counting may begin anywhere (rotary embeddings).

        Raises:
            CompressorError: Neither that nor a table of positions is found.
        """
        if any("rotary" in type(module).__name__.lower() for module in self.decoder.modules()):
            return True
        tables = [m for m in self.decoder.modules() if isinstance(m, nn.Embedding) and m is not self.embedding]
        if any(table.num_embeddings >= (self.max_positions or 1) for table in tables):
            return False
        raise CompressorError(
            f"form kv needs to know how {type(self.decoder).__name__} marks positions, and neither a rotary module nor "
            "a table of positions was found in it; use form embeddings"
        )

    def read(
        self,
        embeds: Tensor,
        mask: Tensor,
        *,
        first_position: Tensor | int = 0,
        adapter: Adapter | None,
        bidirectional: bool = False,
        within: Callable[[], AbstractContextManager[None]] | None = None,
        around: Sequence[AbstractContextManager[Any]] = (),
    ) -> Tensor:
        """One pass of the decoder over `embeds`.

        Args:
            embeds: `[B, T, D]`, padding behind what counts.
            mask: `[B, T]` bool, False at padding.
            first_position: Position of each row's first vector, `[B]` or one for all.
            adapter: The one adapter that is on; None for the base model.
            bidirectional: Let every token read all of its row.
            within: More that holds during the pass and when checkpointing runs a block of it again.
            around: More that holds during the pass alone.

        Returns:
            The last hidden state, `[B, T, D]`.
        """
        layers, names = tuner_layers(self.model), [] if adapter is None else [adapter.name]
        holds = _Once(lambda: _configured(layers, names, within))
        places = torch.arange(embeds.shape[1], device=embeds.device)
        first = torch.as_tensor(first_position, device=embeds.device).view(-1, 1)
        trained = torch.is_grad_enabled() and (adapter is not None or embeds.requires_grad)
        if trained and not embeds.requires_grad and self._checkpoints:
            embeds = embeds.detach().requires_grad_()  # reentrant checkpointing gives no gradient otherwise
        with torch.set_grad_enabled(trained), ExitStack() as stack:
            stack.enter_context(recomputed_within(self.decoder, holds))
            stack.enter_context(holds())
            for context in around:
                stack.enter_context(context)
            return self.decoder(
                inputs_embeds=embeds,
                attention_mask=self._both_ways(mask, embeds.dtype) if bidirectional else mask.long(),
                position_ids=(first + places).expand(len(embeds), -1),
                use_cache=False,
            ).last_hidden_state

    @property
    def _checkpoints(self) -> bool:
        return any(getattr(block, "gradient_checkpointing", False) for block in self.blocks)

    def _both_ways(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        allowed = mask[:, None, None, :].expand(-1, -1, mask.shape[1], -1)
        if self.attention == "sdpa":
            return allowed
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def query_projections(self, block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """Attention modules of ``block``, each with the projection that its queries come from."""
        return [
            (block.get_submodule(path.rpartition(".")[0]), module)
            for path, module in block.named_modules()
            if path.rpartition(".")[2] in QUERY_PROJECTIONS
        ]

    def read_keys_values(
        self,
        embeds: Tensor,
        mask: Tensor,
        places: Tensor,
        *,
        first_position: Tensor | int = 0,
        adapter: Adapter | None,
    ) -> tuple[Tensor, KeyValues]:
        """As :meth:`read`, and what the pass leaves in each layer's cache at `places` `[B, M]`, keys rotated.

        Raises:
            CompressorError: A block keeps no keys and values that are known, or gradient checkpointing cuts them off.
        """
        recorder = Recorder([self._cache_argument(index, block) for index, block in enumerate(self.blocks)])
        hidden = self.read(embeds, mask, first_position=first_position, adapter=adapter, around=[recorder])
        kv = recorder.at(places)
        refuse_cut_off(hidden, kv[-1][0], "form kv")
        return hidden, kv

    def _cache_argument(self, index: int, block: nn.Module) -> tuple[nn.Module, str]:
        for attention, _ in self.query_projections(block):
            name = cache_argument(attention)
            if name is not None:
                return attention, name
        raise CompressorError(
            f"form kv: block {index} of {type(self.decoder).__name__} has no attention module known to keep keys and "
            "values; use form embeddings"
        )


class Recorder:
    """Stands in for the cache of a pass and notes each layer's keys (rotated) and values, `[B, H_kv, T, d_head]`.

    Not a ``Cache``: gradient checkpointing takes that away, and attention would make room in it. This one hands back
    what it was given.
    """

    def __init__(self, modules: Sequence[tuple[nn.Module, str]]) -> None:
        self._modules = modules
        self._noted: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What attention calls with its keys and values."""
        self._noted.setdefault(layer, (keys, values))
        return keys, values

    def __enter__(self) -> Recorder:
        self._handles = [
            module.register_forward_pre_hook(self._stand_in(name), with_kwargs=True) for module, name in self._modules
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _stand_in(self, name: str) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        return lambda _, args, kwargs: (args, kwargs | {name: self})

    def at(self, places: Tensor) -> KeyValues:
        """Keys and values at `places` `[B, M]`."""
        pairs = [self._noted[layer] for layer in range(len(self._modules))]
        return tuple((_at(keys, places), _at(values, places)) for keys, values in pairs)


def _at(tensor: Tensor, places: Tensor) -> Tensor:
    index = places[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)


def refuse_cut_off(hidden: Tensor, taken: Tensor, what: str) -> None:
    """Refuse a tensor ``taken`` out of a pass that gradient checkpointing has cut off from what it was made of.

    Raises:
        CompressorError: The pass has a graph and ``taken`` has none.
    """
    if hidden.requires_grad and not taken.requires_grad:
        raise CompressorError(
            f"{what} gets no gradient under reentrant gradient checkpointing; use "
            "model.gradient_checkpointing_enable({'use_reentrant': False})"
        )


@contextmanager
def _configured(
    layers: Sequence[Any], names: Sequence[str], within: Callable[[], AbstractContextManager[None]] | None
) -> Iterator[None]:
    with adapters(layers, names), nullcontext() if within is None else within():
        yield


@dataclass
class _Once:
    """A context that is entered once, however often it is asked for while it holds."""

    make: Callable[[], AbstractContextManager[None]]
    holds: bool = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.holds:
            yield
            return
        with self.make():
            self.holds = True
            try:
                yield
            finally:
                self.holds = False
