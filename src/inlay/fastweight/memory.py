"""``attach``: put a memory into a model that is already there, and take it out again.

Everything is checked first and changed second. Attached, the model is still the user's own: its class, its
``state_dict`` keys, ``Trainer``, PEFT and ``generate`` work as before. Nothing outside the model is patched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inlay.fastweight import checkpoint
from inlay.fastweight.config import FastWeightConfig
from inlay.fastweight.context import ContextHolder
from inlay.fastweight.errors import AttachError, CheckpointError, MemoryNeverReadError, NonFiniteMemoryError
from inlay.fastweight.families import Decoder, Site, find_decoder, is_called, projection_shape
from inlay.fastweight.hooks import ForwardHooks
from inlay.fastweight.layer import FastWeightProjection, Representation
from inlay.fastweight.session import Session, load_session
from inlay.fastweight.stepping import StepSource
from inlay.fastweight.streaming import MemoryState, StateError

TrainMode = Literal["memory", "memory+layers", "memory+lora", "all"]
_RUNNING = ("eta", "chunk_size", "boundary", "exposure", "max_update_norm", "max_update_ratio", "normalize_target")


def attach(model: nn.Module, config: FastWeightConfig) -> Memory:
    """Give ``model`` a fast-weight memory.

    The down projection of each configured block is replaced by one whose weight grows with what it reads. With
    ``init="zero"`` the model's outputs do not change until the memory is trained.

    While attached, the model's forward also takes ``document_ids`` ``[B, T]`` (integers, −1 for padding): the memory of
    a row starts empty at each new id. Without them, padding is read off ``attention_mask`` and packed documents off
    ``position_ids``.

    Args:
        model: A Hugging Face causal LM, its decoder, a PEFT model around one, Kyutai's ``LMModel`` (its main
            transformer gets the memory, the depformer never does), or any module of which ``config.projection`` says
            where the down projections are.
        config: See :class:`FastWeightConfig`.

    Returns:
        The handle of the memory: switch it off, train, save or detach it.

    Raises:
        AttachError: The configuration does not fit the model, or it has a memory already. The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach takes a model that is loaded (from_pretrained); got {type(model).__name__}")
    if not isinstance(config, FastWeightConfig):
        raise AttachError(f"attach takes a FastWeightConfig; got {type(config).__name__}: inlay.FastWeightConfig(**…)")
    if find_memory(model) is not None:
        raise AttachError(
            f"{type(model).__name__} has a memory already. Take it out with memory.detach() before attaching another; "
            "inlay.find_memory(model) gives you its handle"
        )
    decoder = find_decoder(model, config.projection)
    if getattr(decoder.module, "is_streaming", False):
        raise AttachError(
            "the model is streaming, and what it has read so far could not be in the memory. Leave the 'with "
            "lm_gen.streaming(...)' block, attach, and begin the stream anew"
        )
    sites = [decoder.site(index) for index in config.layer_indices(len(decoder.blocks))]
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    for site in sites:
        features = projection_shape(site.projection)[0]
        if isinstance(width, int) and features != width:
            raise AttachError(
                f"{site.name!r} of block {site.index} gives {features} features and the model is {width} wide: it is "
                "no down projection; name that one with FastWeightConfig(projection=…)"
            )
        if hasattr(site.projection, "_hf_hook") and next(site.projection.parameters()).is_meta:
            raise AttachError(
                f"the weights of block {site.index} are offloaded (device_map), so the memory would be built on no "
                "device. Load the model onto one device, attach, and dispatch it then (accelerate.dispatch_model)"
            )
        if config.target == "hidden" and (site.mlp is site.block or not is_called(site.mlp)):
            raise AttachError(
                f"target='hidden' takes the input of the module that calls the projection, but block {site.index} has "
                f"no MLP module with a forward around {site.name!r}; use target='embeddings'"
            )
        if config.max_update_ratio is not None:
            weight: Any = site.projection.weight
            if not weight.is_floating_point():
                raise AttachError(
                    f"max_update_ratio needs the norm of W0, but block {site.index} holds it quantized "
                    f"({weight.dtype}); use max_update_norm"
                )
    return Memory(model, config, decoder, sites)


def attach_pretrained(model: nn.Module, directory: str | Path) -> Memory:
    """Give ``model`` the memory saved in ``directory`` by :meth:`Memory.save_pretrained`.

    Strict in both directions: every tensor of the file must have its place in the model and the other way round. If
    base weights were trained along with the memory, they are loaded too.

    Raises:
        CheckpointError: The files are missing, damaged or of another model. The model is unchanged.
        AttachError: As :func:`attach`.
    """
    saved = checkpoint.read(Path(directory))
    decoder = find_decoder(model, saved.config.projection)
    checkpoint.check_model(saved, checkpoint.describe_model(model, decoder))
    memory = attach(model, saved.config)
    try:
        memory.load(directory)
    except BaseException:
        memory.detach()
        raise
    return memory


def find_memory(model: nn.Module) -> Memory | None:
    """The memory attached to ``model`` or to a module within it; None if there is none."""
    for module in model.modules():
        memory = module.__dict__.get("inlay_memory")
        if memory is not None:
            return memory
    return None


class Memory:
    """The handle of an attached memory. Made by :func:`attach`.

    Attributes:
        model: The model it is attached to.
        config: Its configuration.
        layers: The memory layers by block index.
        trained_base: Names of base parameters that a backward has been through, which are saved with the memory.
    """

    def __init__(self, model: nn.Module, config: FastWeightConfig, decoder: Decoder, sites: Sequence[Site]) -> None:
        self.model = model
        self.config = config
        self.decoder = decoder
        self.layers: dict[int, FastWeightProjection] = {}
        self.trained_base: set[str] = set()
        self._sites = list(sites)
        holder = ContextHolder()
        for site in sites:
            site.install()
            layer = FastWeightProjection.around(site.projection, site.index, config, holder)
            setattr(site.parent, site.name, layer)
            self.layers[site.index] = layer
        self._hooks = ForwardHooks(model, decoder, sites, self.layers, config, holder, on_backward=self._note_trained)
        decoder.module.__dict__["inlay_memory"] = self
        if hasattr(decoder.module, "is_streaming"):  # Kyutai's: the memory becomes part of its streaming state
            from inlay.moshi.streaming import MemoryStream

            self.step_source = MemoryStream.install(self)

    @contextmanager
    def using(self, **changes: Any) -> Iterator[FastWeightConfig]:
        """Run with other settings for a while, on the same parameters; states of before must not go on within it.

        Args:
            changes: Fields of :class:`FastWeightConfig` that say how the memory runs: ``eta``, ``chunk_size``,
                ``boundary``, ``exposure``, ``max_update_norm``, ``max_update_ratio``, ``normalize_target``.

        Raises:
            ValueError: Another field (how the memory is built), or a value that it cannot have.
            StateError: A stream of Kyutai's is open.
        """
        self._refuse_in_stream("using")
        unknown = sorted(changes.keys() - set(_RUNNING))
        if unknown:
            fields = ", ".join(_RUNNING)
            raise ValueError(f"{', '.join(unknown)}: fixed when a memory is built; only {fields} can change")
        before = self.config
        after = FastWeightConfig.model_validate(before.model_dump() | changes)
        try:
            self._configure(after)
            yield after
        finally:
            self._configure(before)

    def _configure(self, config: FastWeightConfig) -> None:
        self.config = config
        self._hooks.configure(config)
        for layer in self.layers.values():
            layer.configure(config)

    @contextmanager
    def context_parallel(self, group: dist.ProcessGroup | None = None) -> Iterator[None]:
        """Read sequences whose tokens are spread over ranks, each of which has a part of every row, in order.

        Within the block every rank calls the model on its part, forward and backward, and the memory goes on from rank
        to rank (:mod:`inlay.fastweight.parallel`). Attention is the model's own affair: it has to see the other ranks'
        tokens by itself (ring attention) and be told where its own stand (``position_ids``). Packed documents need
        ``document_ids`` that are the same on all ranks. Each rank's gradients are those of its tokens: add them up.

        Args:
            group: Of processes; None for all.

        Raises:
            RuntimeError: There is no process group.
            StateError: A stream of Kyutai's is open.
        """
        self._refuse_in_stream("context_parallel")
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("context_parallel needs processes: start them with torchrun, and init_process_group")
        before = self._hooks.parallel
        try:
            self._hooks.parallel = dist.group.WORLD if group is None else group
            yield
        finally:
            self._hooks.parallel = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base model: within the block every memory layer is the original projection, bit for bit.

        Raises:
            StateError: A stream of Kyutai's is open.
        """
        self._refuse_in_stream("disabled")
        before = {index: layer.enabled for index, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.enabled = False
            yield
        finally:
            for index, enabled in before.items():
                self.layers[index].enabled = enabled

    def detach(self) -> nn.Module:
        """Take the memory out and give the very modules back that were there before. Returns the model.

        Raises:
            StateError: A stream of Kyutai's is open.
        """
        self._refuse_in_stream("detach")
        if self.step_source is not None:
            self.step_source.uninstall()
        self._hooks.remove()
        for site in self._sites:
            layer = self.layers[site.index]
            for module in self.model.modules():
                for name, child in list(module._modules.items()):
                    if child is layer:  # under another wrapper by now, if PEFT came after attach
                        module._modules[name] = site.projection
            site.restore()
        self.decoder.module.__dict__.pop("inlay_memory", None)
        return self.model

    def save_pretrained(self, directory: str | Path, *, base: bool = True) -> None:
        """Write ``memory.safetensors`` and ``memory.json``: the memory's tensors and whatever of the base was trained.

        PEFT adapters are saved by PEFT (``model.save_pretrained``). Old files stay until the new ones are whole. What
        was trained are the tensors that a backward of this process has been through, and those that :meth:`load` gave.

        Args:
            directory: Made if it is not there.
            base: False leaves the base model's tensors out, for when the whole model is saved elsewhere.

        Raises:
            NonFiniteMemoryError: The memory holds NaN or infinity.
        """
        self.raise_if_not_finite()
        trained = {name: p for name, p in self.base_parameters().items() if base and name in self.trained_base}
        checkpoint.write(
            Path(directory), self.config, checkpoint.describe_model(self.model, self.decoder), self.layers, trained
        )

    def load(self, directory: str | Path) -> None:
        """Load the tensors saved in ``directory`` into this memory and its model, strictly like ``attach_pretrained``.

        Raises:
            CheckpointError: The files are missing, damaged, of another model or of a memory built differently. Nothing
                is changed.
        """
        saved = checkpoint.read(Path(directory))
        if saved.config != self.config:
            raise CheckpointError(
                f"the memory in {directory} was built with {saved.config!r}, this one with {self.config!r}; use "
                "inlay.attach_pretrained, which attaches it as it was saved"
            )
        checkpoint.check_model(saved, checkpoint.describe_model(self.model, self.decoder))
        checkpoint.load_tensors(saved, self.layers, self.base_parameters())
        self.trained_base.update(saved.base_names)

    def session(self, batch_size: int = 1) -> Session:
        """A new session: streaming without a KV cache, and conversations that outlive a process.

        Args:
            batch_size: Rows B of every call within it.
        """
        if batch_size < 1:
            raise ValueError(f"a session has at least one row; got batch_size={batch_size}")
        return Session(self, MemoryState(batch_size))

    def load_session(self, path: str | Path) -> Session:
        """The session that :meth:`Session.save` wrote to ``path``; it goes on bit for bit.

        Raises:
            CheckpointError: The file is missing, damaged or of a newer format, or another model, configuration or
                training of the memory wrote it; the message says which. Nothing is half-loaded.
        """
        return load_session(self, Path(path))

    @property
    def open_session(self) -> MemoryState | None:
        """The state of the session that is open, which every forward goes on from; None if none is."""
        return self._hooks.session

    @open_session.setter
    def open_session(self, state: MemoryState | None) -> None:
        self._hooks.session = state

    @property
    def step_source(self) -> StepSource | None:
        """Where the forwards find the state of the stream that their model has open; None if it cannot stream."""
        return self._hooks.step_source

    @step_source.setter
    def step_source(self, source: StepSource | None) -> None:
        self._hooks.step_source = source

    def _refuse_in_stream(self, name: str) -> None:
        if self.step_source is not None and self.step_source.active:
            raise StateError(
                f"memory.{name}() within an open stream: it would miss frames, and a captured CUDA graph would not "
                "notice at all. Leave the 'with lm_gen.streaming(...)' block first"
            )

    @property
    def representation(self) -> Representation:
        """How states hold what is committed: the ``dense`` sum, ``deferred`` products (Z, V), or by default (``auto``)
        products up to D·F / (D + F) committed tokens, where the sum becomes cheaper. Set it before a state begins.
        Logits are the same to rounding."""
        return next(iter(self.layers.values())).representation

    @representation.setter
    def representation(self, value: Representation) -> None:
        if value not in get_args(Representation):
            raise ValueError(f"representation takes one of {get_args(Representation)}; got {value!r}")
        for layer in self.layers.values():
            layer.representation = value

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The memory's own parameters, named ``"{block}.conv"`` and ``"{block}.projection"``."""
        for index, layer in self.layers.items():
            for name, parameter in layer.memory_parameters():
                yield f"{index}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The memory's own parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The base model's parameters by the names it has without wrappers; no memory, no PEFT adapter."""
        own = {id(parameter) for parameter in self.parameters()} | {id(p) for p in _adapter_parameters(self.model)}
        return {
            checkpoint.plain_name(name): parameter
            for name, parameter in self.model.named_parameters()
            if id(parameter) not in own
        }

    def train_only(self, mode: TrainMode = "memory") -> Memory:
        """Choose what requires a gradient.

        Args:
            mode: ``memory``: convolution and projection alone. ``memory+layers``: and the whole blocks that hold a
                memory. ``memory+lora``: and the LoRA adapters of the model (PEFT's active ones with their
                ``modules_to_save``, or Kyutai's). ``all``: everything.

        Raises:
            ValueError: An unknown mode, or ``memory+lora`` without adapters.
        """
        if mode not in get_args(TrainMode):
            raise ValueError(f"train_only takes one of {get_args(TrainMode)}; got {mode!r}")
        adapters = list(_adapter_parameters(self.model, active=True))
        if mode == "memory+lora" and not adapters:
            raise ValueError(
                "memory+lora: the model has no LoRA adapters. Put them in first: peft.get_peft_model(model, "
                "LoraConfig(…)), or for Kyutai's Moshi moshi.modules.lora.replace_all_linear_with_lora"
            )
        for parameter in self.model.parameters():
            parameter.requires_grad_(mode == "all" and parameter.is_floating_point())
        chosen: list[nn.Parameter] = list(self.parameters())
        if mode == "memory+layers":
            chosen += [p for site in self._sites for p in site.block.parameters() if p.is_floating_point()]
        if mode == "memory+lora":
            chosen += adapters
        for parameter in chosen:
            parameter.requires_grad_(True)
        return self

    def check_lengths(self, document_tokens: Sequence[int]) -> None:
        """Refuse data whose every document is too short for the memory ever to be read.

        Args:
            document_tokens: Tokens of each document (of each sequence, with ``boundary="carry"``).

        Raises:
            MemoryNeverReadError: None is longer than a chunk.
        """
        longest = max(document_tokens, default=0)
        if longest <= self.config.chunk_size:
            raise MemoryNeverReadError(
                f"no document is longer than a chunk: the longest has {longest} tokens and chunk_size is "
                f"{self.config.chunk_size}, so what the memory writes is never read and nothing can be learnt. Use "
                f"longer sequences, or a chunk_size of {max(1, longest // 4)} or less"
                + (
                    ", or boundary='carry' where a row holds several documents"
                    if self.config.boundary == "reset"
                    else ""
                )
            )

    def raise_if_not_finite(self, step: int | None = None) -> None:
        """Check parameters and what training forwards gave since the last call of :meth:`clear_statistics`.

        Raises:
            NonFiniteMemoryError: Names the first layer, and ``step`` if given.
        """
        if self._is_finite():
            return
        when = "" if step is None else f" at step {step}"
        for index, layer in self.layers.items():
            for name, parameter in layer.memory_parameters():
                if not torch.isfinite(parameter).all():
                    raise NonFiniteMemoryError(
                        f"the memory of block {index} holds NaN or infinity in {name!r}{when}. Lower the learning rate "
                        f"or eta (now {self.config.eta}), or clip updates with max_update_ratio"
                    )
            if bool(layer.statistics.nonfinite):
                raise NonFiniteMemoryError(
                    f"the memory of block {index} gave NaN or infinity{when}. Lower eta (now {self.config.eta}) or set "
                    "max_update_ratio; if the base model alone does so too (memory.disabled()), the fault is there"
                )

    def _is_finite(self) -> bool:
        """Asked of each device once: waiting for it after every step costs more than looking."""
        flags: dict[torch.device, list[Tensor]] = defaultdict(list)
        for layer in self.layers.values():
            for flag in (*(torch.isfinite(p).all() for p in layer.target.parameters()), ~layer.statistics.nonfinite):
                flags[flag.device].append(flag.view(()))
        return all(bool(torch.stack(held).all()) for held in flags.values())

    def clip_rate(self) -> dict[int, float]:
        """Share of complete chunks whose update was clipped, by block, since :meth:`clear_statistics`."""
        return {
            index: int(layer.statistics.clipped) / max(1, int(layer.statistics.updates))
            for index, layer in self.layers.items()
        }

    def clear_statistics(self) -> None:
        """Start counting anew."""
        for layer in self.layers.values():
            layer.statistics.clear()

    def _note_trained(self) -> None:
        """A backward goes through the model: what of the base requires a gradient counts as trained."""
        self.trained_base.update(name for name, p in self.base_parameters().items() if p.requires_grad)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        size = f"{count:,} parameters, eta={self.config.eta}, C={self.config.chunk_size}"
        return f"Memory(blocks {list(self.layers)}, {size})"


def _adapter_parameters(model: nn.Module, *, active: bool = False) -> Iterator[nn.Parameter]:
    """Parameters of the adapters in the model: PEFT's, its trained copies of whole modules (``modules_to_save``) among
    them, and those of Kyutai's LoRALinear. With ``active``, of the adapters that PEFT runs alone.
    """
    for module in model.modules():
        wraps = hasattr(module, "base_layer") or hasattr(module, "original_module")
        names = getattr(module, "adapter_layer_names", ()) if wraps else ()
        for name in ("lora_A", "lora_B") if hasattr(module, "frozen_W") else names:
            adapter = getattr(module, name, None)
            if not isinstance(adapter, nn.Module):
                continue
            running = getattr(module, "active_adapters", None) if active else None
            for path, parameter in adapter.named_parameters():
                if running is None or path.partition(".")[0] in running:
                    yield parameter
