"""The hooks by which an attached memory follows the forwards of its model.

They sit on the model, its decoder and the first block (and on the MLPs for ``target="hidden"``), and keep one
``ForwardContext`` for the forward that runs: the documents of its tokens, X0, and the state it goes on from.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from inlay.fastweight.causal_lm import base_model, cache_among, forward_arguments
from inlay.fastweight.checkpointing import unwrap_checkpointing, wrap_checkpointing
from inlay.fastweight.chunks import longest_document
from inlay.fastweight.config import FastWeightConfig
from inlay.fastweight.context import ContextHolder, ForwardContext, documents_of, first_tensor, text_positions
from inlay.fastweight.errors import MemoryGoneError
from inlay.fastweight.families import Decoder, Site
from inlay.fastweight.layer import FastWeightProjection, capture_mlp_input
from inlay.fastweight.parallel import refuse_unnamed_documents
from inlay.fastweight.stepping import StepSource
from inlay.fastweight.streaming import MemoryState, StateError, ride, state_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ForwardHooks:
    """Registers the hooks and keeps the context. ``remove`` takes them off again.

    Attributes:
        session: The state that the forwards go on from in place of the cache's, while a session is open.
        step_source: Gives the fixed buffers that the forwards go on from while the model streams, if it can.
        parallel: The ranks that the tokens of the forwards are spread over, if they are.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        sites: Sequence[Site],
        layers: Mapping[int, FastWeightProjection],
        config: FastWeightConfig,
        holder: ContextHolder,
        *,
        on_backward: Callable[[], None],
    ) -> None:
        self.session: MemoryState | None = None
        self.step_source: StepSource | None = None
        self.parallel: ProcessGroup | None = None
        self._decoder = decoder
        self._sites = sites
        self._blocks = [decoder.blocks[0], *(site.block for site in sites)]
        self._layers = layers
        self._config = config
        self._holder = holder
        self._on_backward = on_backward
        self._parameters_of_forward = forward_arguments(decoder.module)
        self._warned: set[str] = set()
        self._long_enough = False  # some documents of this model's training
        self._handles: list[RemovableHandle] = []
        outer = {id(m): m for m in (model, base_model(model), decoder.model, decoder.module) if m is not None}
        self._arguments = [forward_arguments(module) for module in outer.values()]
        for depth, module in enumerate(outer.values()):
            enter, leave = functools.partial(self._enter, depth), functools.partial(self._leave, depth)
            self._handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, always_call=True),
            ]
        self._handles.append(decoder.blocks[0].register_forward_pre_hook(self._capture_x0, with_kwargs=True))
        if config.target == "hidden":
            for site in sites:
                hook = functools.partial(capture_mlp_input, layers[site.index])
                self._handles.append(site.mlp.register_forward_pre_hook(hook, with_kwargs=True))
        self._entrances = {name: getattr(decoder.model, name) for name in decoder.entrances}
        for name in self._entrances:
            decoder.model.__dict__[name] = functools.partial(self._enter_by, name)

    def configure(self, config: FastWeightConfig) -> None:
        """Follow another configuration from the next forward on."""
        self._config = config
        self._warned.clear()
        self._long_enough = False

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name, method in self._entrances.items():
            self._decoder.model.__dict__.pop(name, None)
            if getattr(self._decoder.model, name) != method:  # somebody else's, put there before
                self._decoder.model.__dict__[name] = method

    @torch.compiler.disable
    def _enter(
        self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the model or its decoder runs: open the context, take ``document_ids`` out of the arguments."""
        context = self._holder.current
        if context is not None and context.running and depth <= context.running[-1]:
            self._close()  # left behind by a forward that was interrupted (Ctrl-C)
            context = None
        if context is None:
            context = self._holder.current = ForwardContext()
        outermost = not context.running
        context.running.append(depth)
        kwargs = dict(kwargs)
        explicit = kwargs.pop("document_ids", None)
        if explicit is not None:
            context.explicit = explicit
        # Composite models make their masks before they call the decoder; the padding is in what they were given.
        mask = _mask_of_tokens(self._arguments[depth], args, kwargs)
        if _is_padding_mask(mask):
            context.attention_mask = mask
        elif outermost and mask is not None:
            context.opaque_mask = True
        if module is self._decoder.module:
            self._prepare(context, args, kwargs)
        return args, kwargs

    def _enter_by(self, name: str, *args: Any, document_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Run a method of the model that leads to the decoder past the model's forward, with documents if given."""
        if document_ids is None:
            return self._entrances[name](*args, **kwargs)
        model = self._decoder.model
        assert model is not None
        self._enter(0, model, (), {"document_ids": document_ids})
        try:
            return self._entrances[name](*args, **kwargs)
        finally:
            self._leave(0, model, (), None)

    @torch.compiler.disable
    def _leave(self, depth: int, module: nn.Module, args: Any, output: Any) -> None:
        """After it, or after an error in it."""
        context = self._holder.current
        if context is None:
            return
        context.running = [running for running in context.running if running < depth]
        if module is self._decoder.module:
            unwrap_checkpointing(context)
            if output is not None and context.tokens and not context.ran:
                self._warn_once(
                    "bypassed",
                    "no layer of the memory ran in this forward: the blocks work around the modules that hold it, as "
                    "some PEFT methods do, or were skipped. Detach the memory, or leave its down projections out of "
                    "what they change",
                )
            if output is not None and context.steps is not None:
                context.steps.advance(context.tokens)
            elif output is not None:
                values = tuple(output.values()) if isinstance(output, dict) else output
                values = values if isinstance(values, tuple) else (values,)
                self._watch_backward(values)
                self._keep_state(context, values)
        if not context.running:
            self._close()

    def _close(self) -> None:
        """Forget the context of the forward that is over."""
        if self._holder.current is not None:
            unwrap_checkpointing(self._holder.current)
        self._holder.current = None

    def _watch_backward(self, output: tuple[Any, ...]) -> None:
        first = first_tensor(output, {})
        if first is not None and first.requires_grad:
            first.register_hook(lambda gradient: self._on_backward())  # type: ignore[no-untyped-call]

    def _refuse_without_layers(self) -> None:
        for site in self._sites:
            if all(module is not self._layers[site.index] for module in site.block.modules()):
                raise MemoryGoneError(
                    f"the memory of block {site.index} is no longer in the model: something replaced the module that "
                    "held it, as moshi's replace_lora_with_linear does. Fuse adapters with inlay.moshi.lora.fuse_lora, "
                    "or take the memory out first with memory.detach()"
                )

    def _prepare(self, context: ForwardContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Work out the documents of this forward's tokens, and the state they go on from, from its arguments."""
        context.steps = None if self.step_source is None else self.step_source.current()
        enabled = any(layer.enabled for layer in self._layers.values())
        if enabled or self._decoder.checkpointing is not None:  # Kyutai's would forget the documents of attention
            wrap_checkpointing(self._holder, self._decoder, self._blocks, context)
        if not enabled:
            return
        self._refuse_without_layers()
        given = dict(zip(self._parameters_of_forward, args, strict=False)) | kwargs
        names = ("input_ids", "inputs_embeds", "hidden_states")
        tokens = next((given[name] for name in names if given.get(name) is not None), None)
        if not isinstance(tokens, Tensor):
            tokens = first_tensor(args, kwargs)
        if tokens is None:
            return  # the decoder itself will say that its input is missing
        batch, length = tokens.shape[:2]
        context.batch, context.tokens = batch, length
        if context.steps is not None:
            if batch != context.steps.batch_size:
                raise StateError(
                    f"the stream was begun for {context.steps.batch_size} rows, this call has {batch}: begin one with "
                    f"streaming({batch})"
                )
            return
        context.parallel = self.parallel
        context.state = self._find_state(given)
        if self.session is not None:
            self._refuse_reading_again(self.session, given)
        if context.parallel is not None and context.state is not None:
            raise StateError(
                "context parallelism reads whole sequences at once, without a state: pass use_cache=False, outside "
                "sessions"
            )
        begun = None if context.state is None else context.state.chunk_size
        if begun not in (None, self._config.chunk_size):
            raise StateError(
                f"what was read before is in chunks of {begun}, and the memory now runs with chunk_size="
                f"{self._config.chunk_size}. Go on with that one, or begin anew"
            )
        rows = None if context.state is None else context.state.rows
        if rows not in (None, batch):
            raise StateError(
                f"the session was made for {rows} rows, this call has {batch}: make it with "
                f"memory.session(batch_size={batch}), or repeat its rows with session.select"
            )
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if context.opaque_mask and context.explicit is None and text_positions(positions) is None:
            self._warn_once(
                "mask",
                "the attention mask is not [B, T], so the memory cannot tell padding from it and reads all tokens. If "
                "some are padding, pass document_ids with -1 there, or attach to the whole model and give it a mask "
                "[B, T]",
            )
        context.documents = documents_of(
            batch,
            length,
            explicit=context.explicit,
            attention_mask=mask if _is_padding_mask(mask) else context.attention_mask,
            position_ids=positions,
            carry=self._config.boundary == "carry",
            device=tokens.device,
            before=context.state.document if context.state is not None else self._begun(batch, tokens.device),
        )
        if context.parallel is not None:
            self._refuse_unnamed(context, tokens, positions)
        if context.state is not None:
            if context.state.layers:
                self._plan_state(context, context.state)
            context.state.interrupted = True
        training = self._decoder.module.training and torch.is_grad_enabled()
        alone = context.state is None and context.parallel is None
        if training and alone:
            self._warn_if_never_read(context, length)

    def _warn_if_never_read(self, context: ForwardContext, length: int) -> None:
        """Once. Documents are measured until one is long enough: the device has to be waited for."""
        if self._long_enough or "never read" in self._warned:
            return
        longest = length if context.documents is None else longest_document(context.documents)
        if longest > self._config.chunk_size:
            self._long_enough = context.documents is not None
            return
        what = "sequences of" if context.documents is None else "documents of at most"
        self._warn_once(
            "never read",
            f"training on {what} {longest} tokens with chunk_size={self._config.chunk_size}: what the memory writes is "
            "never read in them, so it gets no gradient. Use longer sequences or smaller chunks",
        )

    def _refuse_reading_again(self, session: MemoryState, given: Mapping[str, Any]) -> None:
        """A session reads each token once; ``generate`` without a KV cache gives all of them again and again."""
        ids = given.get("input_ids")
        if cache_among(given) is not None or not isinstance(ids, Tensor):
            return
        read, session.last_ids = session.last_ids, None
        if read is not None and ids.shape[1] == read.shape[1] + 1 > 2 and torch.equal(ids[:, :-1], read):
            raise StateError(
                "this call begins with all tokens of the last one, as generate does without a KV cache: the session "
                "has read them already. Generate with use_cache=True, or give the new tokens alone"
            )
        session.last_ids = ids

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(text, stacklevel=3)

    def _refuse_unnamed(self, context: ForwardContext, tokens: Tensor, positions: Any) -> None:
        """On all ranks, whatever each was given: whoever asks the others alone waits for ever."""
        named = context.explicit is not None or self._config.boundary == "carry"
        held = None if named else text_positions(positions)
        shape = tokens.shape[:2]
        none = torch.full(shape, -1, dtype=torch.long, device=tokens.device)
        documents = torch.zeros_like(none) if context.documents is None else context.documents
        told = (none, none) if held is None else (held.to(tokens.device).expand(shape), documents)
        refuse_unnamed_documents(*told, context.parallel)

    def _begun(self, batch: int, device: torch.device) -> Tensor | None:
        """The document that each row may go on with where the tokens before are on another rank; None on one alone."""
        return None if self.parallel is None else torch.zeros(batch, dtype=torch.long, device=device)

    def _find_state(self, given: Mapping[str, Any]) -> MemoryState | None:
        """The state of this forward: the open session's, the cache's, a new one where a cache begins, or none.

        Raises:
            StateError: The cache has been filled without this memory.
        """
        cache = cache_among(given)
        if self.session is not None:
            if self.session.interrupted and self.session.layers:
                raise StateError(
                    "the last forward of this session ended in an error and may have left its state half-written; "
                    "begin anew with session.reset(), or go on from a saved one with memory.load_session"
                )
            if cache is not None:
                ride(cache, self.session)
            return self.session
        if cache is None:
            begins = given.get("use_cache")
            if begins is None:
                begins = getattr(getattr(self._decoder.module, "config", None), "use_cache", False)
            return MemoryState() if begins and not self._decoder.module.training else None
        length = int(cache.get_seq_length())
        state = state_of(cache)
        if state is not None and state.interrupted and state.layers:
            raise StateError(
                "the last forward with this cache ended in an error and may have left the memory half-written; begin "
                "anew, or go on from a copy of the cache (copy.deepcopy)"
            )
        if state is None and length == 0:
            state = MemoryState()
            ride(cache, state)
        if state is None or state.length != length:
            raise StateError(
                f"the KV cache holds {length} tokens but the memory has read {state.length if state else 0}: it "
                "was filled before attach, within memory.disabled(), in training mode, or with a prefix that is no "
                "text (prefix tuning). Read the context again with the memory on"
            )
        return state

    def _plan_state(self, context: ForwardContext, state: MemoryState) -> None:
        size = self._config.chunk_size
        context.commits = size in state.phases
        phases = [phase % size for phase in state.phases]
        context.appends = (
            context.documents is None and not torch.is_grad_enabled() and max(phases) + context.tokens <= size
        )

    def _keep_state(self, context: ForwardContext, output: tuple[Any, ...]) -> None:
        """After a forward: note where the state stands, and let a new one ride in the cache that came out."""
        state = context.state
        if state is None or not state.layers:
            return
        size = self._config.chunk_size
        if context.appends:
            counts = [[context.tokens, int(phase == size)] for phase in state.phases]
            phases = [phase % size + context.tokens for phase in state.phases]
            state.advance(context.tokens, phases, torch.tensor(counts))
        else:
            layout = context.used_layout
            assert layout is not None
            counts = [[*both] for both in zip(layout.read, layout.written, strict=True)]
            state.advance(context.tokens, [*layout.phases], torch.tensor(counts))
        cache = next((value for value in output if isinstance(value, Cache)), None)
        if cache is not None and state_of(cache) is not state:
            ride(cache, state)

    @torch.compiler.disable
    def _capture_x0(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = self._holder.current
        if context is not None and context.x0 is None:
            context.x0 = first_tensor(args, kwargs)


def _mask_of_tokens(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The attention mask of the decoder's tokens among a forward's arguments; an encoder has one of its own."""
    name = "decoder_attention_mask" if "decoder_attention_mask" in names else "attention_mask"
    if name in kwargs:
        return kwargs[name]
    return args[names.index(name)] if name in names[: len(args)] else None


def _is_padding_mask(mask: object) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2
