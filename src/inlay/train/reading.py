"""A decoder with a fast-weight memory that reads a context, forgets it, and answers from what the memory holds.

    read    [context] [end, until its last chunk is full]    keys and values are dropped afterwards
    answer  [question?] [anchor] [answer] [EOS]              the layout, without slots; attention sees nothing else

What goes from the first row to the second is the session's state and nothing more, as soft tokens are all that goes
from a compressor to its decoder. A chunk becomes readable when it is full, so what is left of the last one is filled
with end tokens. Gradients run through the state: the memory learns to write what will be asked for.

Trained are the memory's own parameters and, where the recipe has it, a LoRA adapter that is on while it reads and while
it answers. A run's directory holds what is trained:

runs/…/
  recipe.yaml, metrics.jsonl, tensorboard/, checkpoint-N/, finished    as every run
  memory/, adapter/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from pydantic import Field, field_validator
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from inlay.data import QAConfig, load_qa
from inlay.data.tokenizer import load_pretrained_tokenizer
from inlay.devices import chosen_device
from inlay.fastweight import FastWeightConfig, Memory, Session, attach, attach_pretrained
from inlay.softtoken.layout import PromptLayout
from inlay.softtoken.objectives import read
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import SoftTokens
from inlay.train.callback import FiniteMemory
from inlay.train.compress_data import ByContext, ContextCollator
from inlay.train.compress_recipe import check_compress_trainer
from inlay.train.directory import (
    DONE,
    RECIPE,
    RunError,
    begin_run,
    finish_run,
    prepare_run,
    run_trainer,
)
from inlay.train.loss_parts import LossTrainer
from inlay.train.pretrained import load_causal_lm, with_lora
from inlay.train.recipe import LoraSection, ModelSection
from inlay.train.weights import ADAPTER, MEMORY, load_weights, save_weights
from inlay.train.yaml_recipe import RunRecipe, read_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ReadingRecipe(RunRecipe):
    """One training of a decoder to answer from its fast weights."""

    trainer_check = check_compress_trainer

    decoder: ModelSection
    """The decoder, with its tokenizer beside it (``name_or_path``). Its own weights are frozen."""

    memory: FastWeightConfig
    lora: LoraSection | None = None
    """The adapter that is trained along; None trains the memory's own parameters alone."""

    layout: PromptLayout = PromptLayout()
    data: QAConfig
    context_tokens: int | None = Field(default=None, ge=2)
    """Contexts are cut behind so many tokens; None reads them whole."""

    questions_per_context: int = Field(default=1, ge=1)
    """Most questions about a context in one batch, where it is read once for all of them."""

    @field_validator("decoder", mode="before")
    @classmethod
    def _a_place_alone_is_a_decoder(cls, value: Any) -> Any:
        return {"name_or_path": value} if isinstance(value, str) else value  # as runs of before have it

    @field_validator("decoder")
    @classmethod
    def _decoder_can_answer(cls, value: ModelSection) -> ModelSection:
        if value.name_or_path is None:
            raise ValueError("config gives random weights, and a frozen decoder has to answer; take name_or_path")
        return value


class ReadingTask(nn.Module):
    """Decoder and memory as one module, whose forward is the loss of answers.

    Attributes:
        decoder: In PEFT's wrapper where it has LoRA.
        memory: Its memory.
        layout: What stands around the answers.
    """

    def __init__(self, decoder: PreTrainedModel | PeftModel, memory: Memory, layout: BoundLayout) -> None:
        super().__init__()
        self.decoder = decoder
        self.memory = memory
        self.layout = layout

    @property
    def lm(self) -> Any:
        """The decoder out of PEFT's wrapper; its adapters stay on."""
        return self.decoder.get_base_model() if isinstance(self.decoder, PeftModel) else self.decoder

    def read(self, ids: Tensor, mask: Tensor) -> Session:
        """A session that has read contexts.

        Args:
            ids: `[C, S]` token ids, padding on the right.
            mask: `[C, S]` bool, True at tokens.
        """
        ids, mask = filled(ids, mask, self.memory.config.chunk_size, self.layout.stop_ids[0])
        session = self.memory.session(batch_size=len(ids))
        with session:
            self.memory.decoder.module(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        return session

    def forward(
        self,
        contexts: Tensor,
        mask: Tensor,
        index: Tensor,
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
    ) -> Tensor:
        """Cross-entropy of the answers and their ends.

        Args:
            contexts: `[C, S]` token ids, padding on the right.
            mask: `[C, S]` bool.
            index: `[B]` int64, the context of each question.
            questions: B questions.
            answers: B answers, each with its references.
        """
        session = self.read(contexts, mask)
        session.select(index)
        batch = self.layout.training(self.lm, no_slots(self.lm, len(index)), questions, answers)
        with session:
            return read(self.lm, batch, "the prompt").cross_entropy

    def answer(self, session: Session, questions: Sequence[str]) -> list[str]:
        """Greedy answers from what the rows of ``session`` have read; the session goes on from there."""
        with session:
            return self.layout.answer(self.lm, no_slots(self.lm, session.batch_size), questions)


def filled(ids: Tensor, mask: Tensor, chunk_size: int, end: int) -> tuple[Tensor, Tensor]:
    """Rows that end where a chunk ends.

    Args:
        ids: `[C, S]`, padding on the right.
        mask: `[C, S]` bool.
        chunk_size: Tokens per chunk.
        end: What stands behind a row's own tokens.
    """
    lengths = mask.sum(1, keepdim=True)
    wanted = -(-lengths // chunk_size) * chunk_size
    places = torch.arange(int(wanted.max()), device=ids.device)
    wide = nn.functional.pad(ids, (0, max(0, len(places) - ids.shape[1])))[:, : len(places)]
    return wide.masked_fill(places >= lengths, end), places < wanted


def no_slots(model: Any, rows: int) -> SoftTokens:
    """A memory of no slots for each row: the layout's prompt alone."""
    weight = model.get_input_embeddings().weight
    return SoftTokens(
        weight.new_zeros(rows, 0, weight.shape[1]), torch.zeros(rows, 0, dtype=torch.bool, device=weight.device)
    )


class ReadingTrainer(LossTrainer):
    """A ``Trainer`` of a :class:`ReadingTask`, whose checkpoints hold what is trained."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's loss of one batch."""
        loss = model(**inputs)
        return (loss, {}) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            save_weights(self.model.decoder, self.model.memory, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model.decoder, self.model.memory, Path(resume_from_checkpoint))


@dataclass(frozen=True)
class ReadingRun:
    """A finished run, loaded.

    Attributes:
        directory: Where it lies.
        recipe: What it ran.
        task: Decoder, memory and layout, in eval mode.
        trained: How many parameters were trained.
    """

    directory: Path
    recipe: ReadingRecipe
    task: ReadingTask
    trained: int


def train_reading(
    recipe: ReadingRecipe, directory: Path, *, resume: bool = False, console: Console | None = None
) -> dict[str, float]:
    """Train what ``recipe`` says and leave what is trained in ``directory``.

    Args:
        recipe: A checked recipe.
        directory: The run's own directory.
        resume: Go on from the last checkpoint in ``directory``; from the start if there is none.
        console: Where decoder and memory are summed up; None for nowhere.

    Returns:
        The closing metrics of the Trainer.

    Raises:
        RunError: ``directory`` holds a run already (without ``resume``), or another one (with it).
        AttachError: The memory does not fit the decoder.
        NonFiniteMemoryError: The memory holds or gives NaN.
    """
    arguments, console = prepare_run(directory, recipe, recipe.trainer, resume=resume, console=console)
    task = _build(recipe)
    data = load_qa(recipe.data)
    console.print(f"{task.memory}; {count_trained(task):,} parameters trained")
    begin_run(directory, recipe)
    trainer = ReadingTrainer(
        model=task,
        args=arguments,
        train_dataset=ByContext(data.train, recipe.questions_per_context),
        eval_dataset=ByContext(data.eval, recipe.questions_per_context),
        data_collator=ContextCollator(task.layout, recipe.context_tokens),
        callbacks=[FiniteMemory(task.memory)],
    )
    metrics = run_trainer(trainer, directory, resume=resume, console=console)
    finish_run(directory, lambda: save_weights(task.decoder, task.memory, directory))
    return metrics


def load_reading_run(directory: Path, *, device: str | torch.device | None = None) -> ReadingRun:
    """Load a finished run.

    Raises:
        RunError: ``directory`` is no such run, or one that has not finished.
    """
    if not (directory / DONE).is_file():
        raise RunError(f"{directory} holds no finished run; train it to the end first")
    recipe = read_recipe(ReadingRecipe, directory / RECIPE)
    base, tokenizer = _load_decoder(recipe)
    decoder: PreTrainedModel | PeftModel = base
    if (directory / ADAPTER).is_dir():
        decoder = PeftModel.from_pretrained(base, str(directory / ADAPTER), is_trainable=True)
    memory = attach_pretrained(decoder, directory / MEMORY)
    memory.train_only("memory+lora" if recipe.lora is not None else "memory")
    decoder.to(chosen_device(device)).eval()
    task = ReadingTask(decoder, memory, recipe.layout.bind(tokenizer))
    return ReadingRun(directory, recipe, task.eval(), count_trained(task))


def count_trained(task: nn.Module) -> int:
    """Parameters that require a gradient."""
    return sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)


def _build(recipe: ReadingRecipe) -> ReadingTask:
    base, tokenizer = _load_decoder(recipe)
    decoder = with_lora(base, recipe.lora)
    memory = attach(decoder, recipe.memory).train_only("memory" if recipe.lora is None else "memory+lora")
    return ReadingTask(decoder, memory, recipe.layout.bind(tokenizer))


def _load_decoder(recipe: ReadingRecipe) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    place = str(recipe.decoder.name_or_path)
    return load_causal_lm(place, recipe.decoder, "decoder"), load_pretrained_tokenizer(place)
