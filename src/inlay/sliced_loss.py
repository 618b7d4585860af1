"""The training loss of a causal LM without the logits of a whole sequence.

Of a training step of Qwen3-0.6B on 8,192 tokens, 15 GB of 17 are logits and what their loss keeps: 151,936 float32
numbers a token, several times. Here the model runs up to its last hidden states. Logits are made of a slice of tokens
at a time, keep the cross-entropy of its labels, and are made again in the backward.

A slice's logits come out of the model's own forward, run around hidden states that are there already; so whatever a
model does to its logits behind the head (Gemma's soft cap, Granite's scale) is done to them.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from inlay.data.packing import NO_LABEL
from inlay.fastweight.causal_lm import CACHE_ARGUMENTS

LOGITS_AT_ONCE = 2**25
"""Logits of a slice, B · tokens · vocabulary: 134 MB in float32."""

StandIn: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_MADE = 2  # slices of a run without numbers: the gradient of a trained head is summed over them
_MARK = "_sliced_loss"

logger = logging.getLogger(__name__)


@dataclass
class SlicedOutput(ModelOutput):
    """What a causal LM gives whose loss was made in slices.

    Attributes:
        loss: Mean cross-entropy in nats, as the model's own.
        logits: None.
        label_nats: ``[B, T − 1]`` float32, the cross-entropy of ``labels[:, 1:]``; 0 where nothing is predicted. None
            unless :func:`label_nats` asks.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    label_nats: Tensor | None = None


def slice_loss(model: nn.Module, *, stand_in: StandIn | None = None) -> bool:
    """Let a causal LM of transformers make its loss in slices, whenever it is called with ``labels`` and the logits of
    the whole batch would be more than :data:`LOGITS_AT_ONCE`.

    Such a call gives a :class:`SlicedOutput`, with ``loss`` as before and no ``logits``. All other calls are as they
    were: without labels, or that ask for hidden states, attentions, a KV cache or tuples, or have a loss of their own.
    Whatever wraps the model (PEFT, DDP, accelerate) may wrap it before or after. An evaluation that looks at logits
    (``compute_metrics`` of transformers' Trainer) goes into :func:`whole_logits`.

    Args:
        model: The model, or what wraps it.
        stand_in: For a run on tensors without numbers: makes ``[B, S]`` of a slice's hidden states and labels. Two
            slices are made as they are, and nothing is compared with the model's own logits at the first call.

    Returns:
        Whether the model can: one whose forward takes ``logits_to_keep``, with a head of its own and transformers'
        loss for causal LMs. Any other is left as it is.
    """
    lm = _causal_lm(model)
    if lm is None:
        return False
    if _MARK not in lm.__dict__:
        lm.__dict__[_MARK] = lm.__dict__["forward"] = _SlicedForward(lm, stand_in)
    return True


def label_nats(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """The cross-entropy of each label given what stands before it, in nats.

    Args:
        model: A causal LM; in slices if it was told to (:func:`slice_loss`).
        inputs: What it is called with, without labels.
        labels: ``[B, T]`` in transformers' convention: not shifted, −100 where nothing is predicted.

    Returns:
        ``[B, T − 1]`` float32 of ``labels[:, 1:]``; 0 where nothing is predicted.
    """
    forward = _installed(model)
    if forward is not None and forward.slices(labels):
        forward.asked = True
        try:
            output = model(**inputs, labels=labels)
        finally:
            forward.asked = False
        if "label_nats" in output:
            nats: Tensor = output["label_nats"]
            return nats
    output = model(**inputs)
    return nats_of(output if isinstance(output, Tensor) else output.logits, labels)


def nats_of(logits: Tensor, labels: Tensor) -> Tensor:
    """:func:`label_nats` of logits ``[B, T, vocabulary]`` that are there, in float32 a slice at a time."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    size = _slice_size(logits.shape[0], logits.shape[-1])
    parts = zip(torch.split(logits, size, 1), torch.split(labels, size, 1), strict=True)
    return torch.cat([_cross_entropy(*part) for part in parts], 1)


@contextmanager
def whole_logits(model: nn.Module) -> Iterator[None]:
    """Within the block the model gives its logits with its loss, however many they are."""
    forward = _installed(model)
    before = forward is not None and forward.usable
    try:
        if forward is not None:
            forward.usable = False
        yield
    finally:
        if forward is not None:
            forward.usable = before


def _installed(model: nn.Module) -> _SlicedForward | None:
    return next((module.__dict__[_MARK] for module in model.modules() if _MARK in module.__dict__), None)


class _SlicedForward:
    """What stands in for a causal LM's ``forward``."""

    def __init__(self, lm: PreTrainedModel, stand_in: StandIn | None) -> None:
        self.lm = lm
        self.original = lm.forward
        self.stand_in = stand_in
        self.trusted = stand_in is not None
        self.usable = True
        self.asked = False
        self.__signature__ = inspect.signature(lm.forward)

    def slices(self, labels: Tensor) -> bool:
        """Whether the loss of these labels is made in slices."""
        if not self.usable or torch.compiler.is_compiling():
            return False
        head = getattr(self.lm.get_output_embeddings(), "weight", None)
        # A head that is spread over processes (FSDP, DeepSpeed, DTensor) is whole within the model's own forward alone.
        if head is None or head.dim() != 2 or hasattr(head, "placements"):
            return False
        return labels.numel() * int(head.shape[0]) > LOGITS_AT_ONCE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        labels = kwargs.get("labels")
        if labels is None or self._asks_for_more(kwargs) or not self.slices(labels):
            return self.original(**kwargs)
        given = dict(kwargs)
        items = given.pop("num_items_in_batch", None)
        with _watched(self.lm) as seen:
            output = self.original(**given | {"labels": None, "logits_to_keep": 1})
        if not seen or not self._agrees(seen[0], output.logits):
            self.usable = False
            name = type(self.lm).__name__
            logger.warning("%s makes its logits in a way of its own: its loss needs those of whole sequences", name)
            return self.original(**kwargs)
        nats = self._nats(seen[0], labels)
        labelled = (labels[:, 1:] != NO_LABEL).sum() if items is None else items
        loss = nats.sum() / (labelled.to(nats.device) if isinstance(labelled, Tensor) else labelled)
        return SlicedOutput(loss=loss, label_nats=nats if self.asked else None)

    def _asks_for_more(self, given: Mapping[str, Any]) -> bool:
        """Whether a call wants more than a loss, or another loss than transformers' own."""
        config = self.lm.config
        wanted = ("output_hidden_states", "output_attentions", "use_cache")
        return (
            bool({"logits_to_keep", "shift_labels", "ignore_index"} & given.keys())
            or any(given.get(name) for name in (*wanted, *CACHE_ARGUMENTS))
            or any(getattr(config, name, False) and given.get(name) is None for name in wanted[:2])
            or (config.return_dict if given.get("return_dict") is None else given["return_dict"]) is False
            or self.lm.loss_function is not ForCausalLMLoss
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _SlicedForward:
        """For the model's copy."""
        lm = copy.deepcopy(self.lm, memo)  # under way already
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.lm, twin.original = lm, getattr(self.original, "__func__", self.original).__get__(lm)
        return twin

    def _agrees(self, outputs: Any, logits: Tensor) -> bool:
        """Whether the last token's logits are the model's own, to the bit; asked once."""
        if not self.trusted:
            with torch.no_grad():
                ours = self._logits(outputs, outputs.last_hidden_state[:, -1:])
            self.trusted = torch.equal(ours, logits)
        return self.trusted

    def _nats(self, outputs: Any, labels: Tensor) -> Tensor:
        hidden, labels = outputs.last_hidden_state[:, :-1], labels[:, 1:]
        size = _slice_size(hidden.shape[0], self.lm.get_output_embeddings().weight.shape[0])

        def of_slice(part: Tensor, wanted: Tensor) -> Tensor:
            return _cross_entropy(self._logits(outputs, part), wanted)

        nats: list[Tensor] = []
        for part, wanted in zip(torch.split(hidden, size, 1), torch.split(labels, size, 1), strict=True):
            if self.stand_in is not None and len(nats) >= _MADE:
                nats.append(self.stand_in(part, wanted))
            elif torch.is_grad_enabled():
                again = checkpoint(
                    of_slice, part, wanted, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
                )
                nats.append(again)
            else:
                nats.append(of_slice(part, wanted))
        return torch.cat(nats, 1)

    def _logits(self, outputs: Any, hidden: Tensor) -> Tensor:
        """``[B, S, vocabulary]`` by the model's own forward, to whose decoder ``hidden`` ``[B, S, D]`` has come."""
        name, modules = self.lm.base_model_prefix, self.lm._modules
        decoder = modules[name]
        assert decoder is not None
        modules[name] = _Given(decoder, type(outputs)(**{**outputs, "last_hidden_state": hidden}))
        try:
            logits: Tensor = type(self.lm).forward(self.lm).logits
        finally:
            modules[name] = decoder
        return logits


class _Given(nn.Module):
    """In a decoder's place: gives what it is said to give, and is asked for all else as the decoder would be."""

    def __init__(self, decoder: nn.Module, outputs: Any) -> None:
        super().__init__()
        self.__dict__.update(decoder=decoder, outputs=outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["decoder"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["outputs"]


@contextmanager
def _watched(lm: PreTrainedModel) -> Iterator[list[Any]]:
    """Within the block the outputs of the decoder of ``lm`` come to the list."""
    seen: list[Any] = []

    def note(module: nn.Module, args: Any, outputs: Any) -> None:
        if getattr(outputs, "last_hidden_state", None) is not None:
            seen.append(outputs)

    handle = lm.get_submodule(lm.base_model_prefix).register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _causal_lm(model: nn.Module) -> PreTrainedModel | None:
    """The causal LM in ``model`` whose loss can be made in slices; None if it cannot."""
    lm = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if lm is None or "logits_to_keep" not in inspect.signature(lm.forward).parameters:
        return None
    if lm.get_output_embeddings() is None or lm._modules.get(lm.base_model_prefix) is None:
        return None
    names = inspect.unwrap(type(lm).forward).__code__.co_names
    if "loss_function" not in names or lm.loss_function is not ForCausalLMLoss:
        return None  # a loss of its own
    return None if getattr(lm.config, "output_router_logits", False) else lm  # which adds the balance of experts


def _slice_size(rows: int, vocabulary: int) -> int:
    return max(1, LOGITS_AT_ONCE // (rows * vocabulary))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B, S]`` in nats, of logits ``[B, S, vocabulary]`` in float32 or finer and ``labels`` ``[B, S]``."""
    single = logits if logits.dtype == torch.float64 else logits.float()
    nats = F.cross_entropy(
        single.flatten(0, 1), labels.to(logits.device).flatten(), ignore_index=NO_LABEL, reduction="none"
    )
    return nats.view(labels.shape)
