"""Callbacks by which transformers' ``Trainer`` looks after a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from inlay.fastweight import CheckpointError, Memory
from inlay.train.weights import MEMORY


class FiniteMemory(TrainerCallback):
    """Stops the run when the memory holds or gives NaN, naming layer and step."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each optimizer step."""
        self.memory.raise_if_not_finite(state.global_step)


class MemoryCallback(FiniteMemory):
    """Keeps a memory with the checkpoints of a plain ``Trainer``, which saves of a PEFT model the adapters alone.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[inlay.MemoryCallback(memory)])
        trainer.train(resume_from_checkpoint=True)

    Each checkpoint gets a folder ``memory``, as :meth:`Memory.save_pretrained` writes it. A run that is resumed goes on
    with the memory of its checkpoint, ``load_best_model_at_end`` loads the best one's, and a memory that is not finite
    stops the run. :class:`inlay.train.trainer.InlayTrainer` does all this by itself.

    Args:
        memory: The memory of the model that is trained.
        resume_from: The checkpoint that the run goes on from, if it is not of ``args.output_dir``.
    """

    def __init__(self, memory: Memory, resume_from: str | Path | None = None) -> None:
        super().__init__(memory)
        self.resume_from = None if resume_from is None else Path(resume_from)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the memory of the checkpoint that the run goes on from, if it does.

        Raises:
            CheckpointError: The checkpoint has none, or one of another model.
        """
        if state.global_step:
            self._load(self.resume_from or Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the memory beside what the Trainer saved."""
        if args.should_save:
            self.memory.save_pretrained(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", MEMORY))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the memory of the best checkpoint, if the Trainer loads that."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint))

    def _load(self, checkpoint: Path) -> None:
        folder = checkpoint / MEMORY
        if not folder.is_dir():
            raise CheckpointError(
                f"the Trainer goes on from a checkpoint, and {folder} is not there. If the checkpoint lies elsewhere, "
                "say MemoryCallback(memory, resume_from=...); one that was saved without this callback has no memory"
            )
        self.memory.load(folder)
