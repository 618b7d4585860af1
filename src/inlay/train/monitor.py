"""What the memory does while it trains, measured on the steps that are logged and on no others.

A memory that does not learn is easily overlooked: the loss falls all the same, because the base learns. So each log of
the Trainer also holds, under ``memory/``,

    grad_convolution, grad_projection, grad_base_down_projection, grad_rest   gradient norms before clipping
    sum_norm, output_share, dead_chunks                                       see :mod:`inlay.doctor.vitals`
    clip_rate                                                                 updates clipped since the last log
    warning                                                                   once, if the memory gets no gradient

and, where several blocks have a memory, the same by block (``memory/sum_norm/block_6``); ``sum_norm`` and
``output_share`` of the whole are then means over the blocks.

The Trainer clips before any callback sees a gradient, and a forward can be observed only while it runs. So
:class:`~inlay.train.trainer.InlayTrainer` runs its forwards within :meth:`MemoryMonitor.observing` and calls
:meth:`MemoryMonitor.note_gradients` after a step's last backward.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, has_length

from inlay.doctor.gradient_verdict import WEAK
from inlay.doctor.gradients import BASE, CONVOLUTION, PROJECTION, REST, GroupNorm, Groups, group_norms, parameter_groups
from inlay.doctor.vitals import LayerVitals, fetch, layer_vitals
from inlay.fastweight import FastWeightProjection, Memory
from inlay.fastweight.layer import Observation

PREFIX = "memory/"
WARNING = PREFIX + "warning"
LOGS_IN_A_ROW = 3
"""So many logs have to say so before the warning."""

logger = logging.getLogger(__name__)


class MemoryMonitor(TrainerCallback):
    """Measures a memory on the steps that are logged, and warns once when it gets no gradient.

    Args:
        memory: The memory that is trained.
        diagnose: Gives one sentence that says why the memory gets no gradient. Called once, between two steps.
        alarm: Is told the warning; by default it goes to this module's logger.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        diagnose: Callable[[], str] | None = None,
        alarm: Callable[[str], None] = logger.warning,
    ) -> None:
        self.memory = memory
        self.diagnose = diagnose
        self.alarm = alarm
        self._groups: Groups = {}
        self._watched_step: int | None = None
        self._vitals: dict[int, LayerVitals] = {}
        self._norms: dict[str, float] = {}
        self._logs = 0
        self._starved_logs = 0
        self._warned = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Sort the parameters into groups, and forget what was measured before."""
        assert model is not None
        groups = parameter_groups(model, self.memory)
        self._groups = groups | self._by_block(groups)
        self._watched_step = None
        self._logs = self._starved_logs = 0
        self.memory.clear_statistics()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Before the first forward of a step: will it be logged?"""
        step = state.global_step + 1
        self._watched_step = step if is_logged(step, args, state, train_dataloader) else None
        self._vitals, self._norms = {}, {}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the evaluation's updates out of the clip rate."""
        self.memory.clear_statistics()

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Within the block, the first forward of a step that will be logged is measured."""
        if self._watched_step is None:
            yield
            return
        layers = self.memory.layers.values()
        before = [layer.observer for layer in layers]
        try:
            for layer in layers:
                layer.observer = self._observer(layer)
            yield
        finally:
            for layer, observer in zip(layers, before, strict=True):
                layer.observer = observer

    def note_gradients(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """After a step's last backward, before clipping: keep the norms of its gradients if it will be logged.

        Args:
            scaler: What the loss was scaled with (fp16).
        """
        if self._watched_step is None:
            return
        scale = 1.0 if scaler is None else scaler.get_scale()
        self._norms = {name: norm / scale for name, norm in group_norms(self._groups).items()}

    def collect(self, args: TrainingArguments, state: TrainerState) -> dict[str, float | str]:
        """What was measured of the step that is being logged; nothing the second time, or if it was not watched."""
        if self._watched_step != state.global_step:
            return {}
        self._watched_step = None
        values = {f"grad_{name.replace(' ', '_')}": norm for name, norm in self._norms.items()}
        values |= self._fetch_vitals()
        logs: dict[str, float | str] = {PREFIX + name: value for name, value in values.items() if math.isfinite(value)}
        warning = self._judge(args, state)
        return logs if warning is None else {**logs, WARNING: warning}

    def _by_block(self, groups: Groups) -> Groups:
        """The groups that belong to a layer, layer by layer; none where there is one layer."""
        layers = self.memory.layers
        if len(layers) == 1:
            return {}
        return {
            f"{name}/block_{index}": [parameter]
            for name, parameters in groups.items()
            if name != REST
            for index, layer in layers.items()
            for parameter in parameters
            if any(parameter is own for own in layer.parameters())
        }

    def _observer(self, layer: FastWeightProjection) -> Callable[[Observation], None]:
        def observe(seen: Observation) -> None:
            if layer.index not in self._vitals:  # the step may have more microbatches
                self._vitals[layer.index] = layer_vitals(layer, seen)

        return observe

    def _fetch_vitals(self) -> dict[str, float]:
        """Everything that the layers hold, in one transfer to the host."""
        measured: dict[tuple[str, int], Tensor] = {}
        for index, vitals in self._vitals.items():
            measured["sum_norm", index] = vitals.sum_norm
            measured["output_share", index] = vitals.output_share
            measured["dead_chunks", index] = vitals.dead_chunks
        if self.memory.config.clips:
            for index, layer in self.memory.layers.items():
                measured["clipped", index] = layer.statistics.clipped
                measured["updates", index] = layer.statistics.updates
        values: dict[str, dict[int, float]] = {}
        for (name, index), value in fetch(measured).items():
            values.setdefault(name, {})[index] = value

        result: dict[str, float] = {}
        for name in ("sum_norm", "output_share"):
            if name in values:
                by_block = values[name]
                result |= _with_blocks(name, sum(by_block.values()) / len(by_block), by_block)
        if "dead_chunks" in values:  # of the chunk grid that all layers share
            result["dead_chunks"] = next(iter(values["dead_chunks"].values()))
        if self.memory.config.clips:
            self.memory.clear_statistics()
            clipped, updates = values["clipped"], values["updates"]
            rates = {index: clipped[index] / max(1.0, updates[index]) for index in clipped}
            result |= _with_blocks("clip_rate", sum(clipped.values()) / max(1.0, sum(updates.values())), rates)
        return result

    def _judge(self, args: TrainingArguments, state: TrainerState) -> str | None:
        """The warning, the one time it is due."""
        self._logs += 1
        if self._warned or self._logs == 1 or state.global_step <= args.get_warmup_steps(state.max_steps):
            return None
        starved = starvation(self._norms, self._groups, args.adam_epsilon)
        self._starved_logs = 0 if starved is None else self._starved_logs + 1
        if self._starved_logs < LOGS_IN_A_ROW or not state.is_world_process_zero:
            return None
        self._warned = True
        text = f"Step {state.global_step}: {starved}, {LOGS_IN_A_ROW} logs in a row. {self._diagnosis()}"
        self.alarm(text)
        return text

    def _diagnosis(self) -> str:
        if self.diagnose is None:
            return "`inlay doctor RECIPE.yaml` says why."
        try:
            says = self.diagnose()
            return f"{says[:1].upper()}{says[1:].removesuffix('.')}."
        except Exception as error:  # a run of days must not end because its diagnosis did
            return f"Why could not be found out ({type(error).__name__}: {error}); try `inlay doctor RECIPE.yaml`."


def is_logged(step: int, args: TrainingArguments, state: TrainerState, dataloader: Any = None) -> bool:
    """Whether the Trainer will log after optimizer step ``step``.

    Args:
        step: Counted from 1 over the whole run.
        args: Its logging strategy.
        state: Its ``logging_steps`` are whole steps, also where ``args`` gives a share of the run.
        dataloader: Of the training data; an epoch's end is known by its length.
    """
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    if args.logging_strategy == IntervalStrategy.EPOCH:
        if step == state.max_steps:
            return True
        return has_length(dataloader) and step % math.ceil(len(dataloader) / args.gradient_accumulation_steps) == 0
    return False


def starvation(norms: Mapping[str, float], groups: Groups, epsilon: float) -> str | None:
    """A clause that says how little gradient the memory gets, if it is too little to learn from.

    Convolution and projection are judged together, by the one that has more per element: at ``init: zero`` the
    projection has none and the memory learns all the same. Where the base down projections are trained their gradient
    is the measure, else AdamW's ε, below which a gradient no longer moves its parameter.

    Args:
        norms: Gradient norms by group.
        groups: The parameters of each group.
        epsilon: AdamW's ε.
    """
    rms = {
        name: GroupNorm(norms[name], sum(parameter.numel() for parameter in groups[name])).rms
        for name in (CONVOLUTION, PROJECTION, BASE)
        if name in norms
    }
    if CONVOLUTION not in rms and PROJECTION not in rms:
        return None
    own = max(rms.get(CONVOLUTION, 0.0), rms.get(PROJECTION, 0.0))
    says = f"the memory's convolution and projection get a gradient of {own:.1e} per element (RMS)"
    if rms.get(BASE):
        ratio = own / rms[BASE]
        return f"{says}, {ratio:.1e} of what their base down projection gets" if ratio < WEAK else None
    return f"{says}, below AdamW's epsilon ({epsilon:g})" if own < epsilon else None


def monitor_on(console: Console, memory: Memory, diagnose: Callable[[], str]) -> MemoryMonitor:
    """A monitor that warns on ``console``, or in the log where that is quiet."""
    if console.quiet:
        return MemoryMonitor(memory, diagnose=diagnose)

    def alarm(text: str) -> None:
        title = "[bold]The memory does not learn[/]"
        console.print(Panel(escape(text), title=title, title_align="left", border_style="red"))

    return MemoryMonitor(memory, diagnose=diagnose, alarm=alarm)


def _with_blocks(name: str, whole: float, by_block: Mapping[int, float]) -> dict[str, float]:
    """A value of the whole memory and, if there are several blocks, that of each."""
    if len(by_block) == 1:
        return {name: whole}
    return {name: whole} | {f"{name}/block_{index}": value for index, value in by_block.items()}
