"""A layout in the tokens of one tokenizer: batches for training and for generation, and answers.

Both batches come out of ``BoundLayout._sequences``, which sets each row's memory between the ids before and behind it
and moves the padding to one side. They differ in what stands behind the memory (the prompt, or the prompt and the
answer) and in the side.

In form ``kv`` the memory is not in the sequence: it is the cache that the sequence goes on from, at position m in a row
of m slots. Nothing can then stand before the memory, and something must stand behind it, for the answer's first token
is read off a position of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from inlay.softtoken.batches import NO_LABEL, GenerationBatch, TrainingBatch, padded
from inlay.softtoken.errors import LayoutError
from inlay.softtoken.tokens import SoftTokens, in_order, packing_order
from inlay.softtoken.wording import Prompt, Wording

# Greedy, whatever the model's generation_config holds (sampling, a repetition penalty).
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
}


class BoundLayout(Wording):
    """A :class:`PromptLayout` in the tokens of one tokenizer; made by :meth:`PromptLayout.bind`."""

    def training(
        self,
        model: Any,
        memory: SoftTokens,
        questions: Sequence[str] | None,
        answers: Sequence[str | Sequence[str]],
    ) -> TrainingBatch:
        """Prompts and answers for ``model(**batch.inputs())``, gradients reaching ``memory``.

        Args:
            model: A Hugging Face causal LM.
            memory: B rows.
            questions: B questions; None for a layout without.
            answers: B answers, each one text or its references.

        Raises:
            LayoutError: Rows disagree in number, a row has nothing before its answer or nothing to learn, or the
                memory does not go with the layout or the model.
        """
        prompts = self._prompts(memory, questions)
        if len(answers) != memory.rows:
            raise LayoutError(f"{len(answers)} answers for a memory of {memory.rows} rows")
        targets = [self.answer_ids(references) for references in answers]
        if [] in targets:
            raise LayoutError(
                f"row {targets.index([])}: the answer is empty and eos is false, so nothing is supervised"
            )
        if memory.form == "kv" and any(
            module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()
        ):
            raise LayoutError(
                "form kv is lost under gradient checkpointing, in which transformers' blocks drop their cache; train "
                "with gradient_checkpointing: false, or use form embeddings"
            )
        behind = [prompt.after + target for prompt, target in zip(prompts, targets, strict=True)]
        embeds, attention_mask, position_ids = self._sequences(model, memory, behind, "right")
        unsupervised = [
            (0 if memory.form == "kv" else len(prompt.before) + used) + len(prompt.after)
            for prompt, used in zip(prompts, memory.lengths.tolist(), strict=True)
        ]
        labels = [[NO_LABEL] * count + target for count, target in zip(unsupervised, targets, strict=True)]
        return TrainingBatch(
            embeds,
            attention_mask,
            position_ids,
            memory if memory.form == "kv" else None,
            model,
            padded(labels, NO_LABEL, embeds.device),
        )

    def generation(self, model: Any, memory: SoftTokens, questions: Sequence[str] | None) -> GenerationBatch:
        """Prompts for ``model.generate(**batch.inputs())``; arguments and errors as for :meth:`training`.

        Raises:
            LayoutError: Also where a sliding window would count the padding between a row's keys and its prompt, and
                where a row and the longest answer take more positions than the model has.
        """
        prompts = self._prompts(memory, questions)
        if len(self._alike(model, memory, prompts)) > 1:
            raise LayoutError(
                "form kv: this batch takes more places than the model's attention slides over, which would count the "
                "padding before shorter prompts; answer prompts of one length together (answer and generate do)"
            )
        embeds, attention_mask, position_ids = self._sequences(model, memory, [p.after for p in prompts], "left")
        self._check_positions(model, memory, prompts, position_ids)
        return GenerationBatch(
            embeds,
            attention_mask,
            position_ids,
            memory if memory.form == "kv" else None,
            model,
            self.stop_ids,
            self.max_new_tokens,
        )

    def answer(
        self, model: Any, memory: SoftTokens, questions: Sequence[str] | None, **generate_kwargs: Any
    ) -> list[str]:
        """The model's answers, one a row, in eval mode and by greedy decoding.

        Args:
            model: A Hugging Face causal LM.
            memory: B rows.
            questions: B questions of any lengths; None for a layout without.
            generate_kwargs: Passed on to transformers' ``generate``, over what the layout and greedy decoding say.
        """
        return [self.decode(ids) for ids in self.generate(model, memory, questions, **generate_kwargs)]

    @torch.no_grad()
    def generate(
        self, model: Any, memory: SoftTokens, questions: Sequence[str] | None, **generate_kwargs: Any
    ) -> list[list[int]]:
        """The ids of the answers, each up to its first stop id, that included; arguments as for :meth:`answer`."""
        said: dict[int, list[int]] = {}
        for rows in self.together(model, memory, questions):
            whole = len(rows) == memory.rows
            part = memory if whole else memory.select(rows)
            asked = questions if whole or questions is None else [questions[row] for row in rows]
            batch = self.generation(model, part, asked)
            with in_eval_mode(model):
                ids = model.generate(**batch.inputs() | _GREEDY | generate_kwargs)
            said |= zip(rows, map(self._ended, ids.tolist()), strict=True)
        return [said[row] for row in range(memory.rows)]

    def together(self, model: Any, memory: SoftTokens, questions: Sequence[str] | None) -> list[list[int]]:
        """The rows that :meth:`generation` takes in one batch: all of them, but where a sliding window would count the
        padding between a row's keys and its prompt, those whose prompts are equally long."""
        return self._alike(model, memory, self._prompts(memory, questions))

    def _alike(self, model: Any, memory: SoftTokens, prompts: Sequence[Prompt]) -> list[list[int]]:
        lengths = [len(prompt.after) for prompt in prompts]
        if memory.form == "kv" and len(set(lengths)) > 1:
            windows = [layer.sliding_window for layer in DynamicCache(config=model.config).layers if layer.is_sliding]
            if windows and min(windows) < memory.slots + max(lengths) + self.max_new_tokens:
                return [[row for row, one in enumerate(lengths) if one == length] for length in sorted(set(lengths))]
        return [[*range(len(lengths))]]

    def _check_positions(self, model: Any, memory: SoftTokens, prompts: Sequence[Prompt], position_ids: Tensor) -> None:
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        last, row = position_ids.max(dim=1).values.max(dim=0)
        needed = int(last) + 1 + self.max_new_tokens
        if limit is not None and needed > limit:
            slots, prompt = int(memory.lengths[row]), prompts[int(row)]
            raise LayoutError(
                f"row {int(row)}: {slots:,} slots, {len(prompt.before) + len(prompt.after):,} tokens of prompt and an "
                f"answer of {self.max_new_tokens} take {needed:,} positions and {type(model).__name__} has {limit:,}; "
                "use fewer slots (a larger ratio), a shorter question, or lower answer_tokens"
            )

    def _ended(self, ids: list[int]) -> list[int]:
        end = next((place for place, index in enumerate(ids) if index in self.stop_ids), len(ids))
        return ids[: end + 1]

    def _prompts(self, memory: SoftTokens, questions: Sequence[str] | None) -> list[Prompt]:
        """Each row's prompt, when the memory goes with them."""
        if isinstance(questions, str):
            raise LayoutError(f"questions are a list, one a row; got the text {questions!r}: give [{questions!r}]")
        if questions is None:
            questions = [""] * memory.rows
        if len(questions) != memory.rows:
            raise LayoutError(f"{len(questions)} questions for a memory of {memory.rows} rows")
        prompts = []
        for row, question in enumerate(questions):
            try:
                prompts.append(self.prompt(question))
            except LayoutError as error:
                raise LayoutError(f"row {row}: {error}") from error
        if memory.form == "kv" and self._pieces_before:
            raise LayoutError(
                f"form kv: the memory's keys stand at positions 0 to M−1, but {self._pieces_before[0].name} comes "
                "before it; set bos: false, bos_after: true and chat: false"
            )
        for row, (prompt, used) in enumerate(zip(prompts, memory.lengths.tolist(), strict=True)):
            if not prompt.after and (memory.form == "kv" or not (prompt.before or used)):
                raise LayoutError(
                    f"row {row}: nothing stands before the answer that could predict its first token; set an anchor, "
                    "or bos_after: true"
                )
        return prompts

    def _sequences(
        self, model: Any, memory: SoftTokens, behind: Sequence[Sequence[int]], padding: Literal["left", "right"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings `[B, T, D]`, attention mask and position ids of: before, memory, ``behind`` (ids of each row)."""
        table = model.get_input_embeddings()
        device = table.weight.device
        memory = memory.to(device)
        text = table(padded(behind, 0, device))
        embeds, mask = text, padded([[1] * len(row) for row in behind], 0, device).bool()
        if memory.kv is not None:
            layers = model.config.get_text_config(decoder=True).num_hidden_layers
            if len(memory.kv) != layers:
                raise LayoutError(
                    f"the memory has keys and values of {len(memory.kv)} layers, the model has {layers}; was it "
                    "written for another model?"
                )
        if memory.embeddings is not None:
            if memory.embeddings.shape[-1] != text.shape[-1]:
                raise LayoutError(
                    f"the memory's slots have width {memory.embeddings.shape[-1]}, the model's embeddings "
                    f"{text.shape[-1]}; was it written for another model?"
                )
            before = padded([[i for piece in self._pieces_before for i in piece.ids]] * memory.rows, 0, device)
            embeds = torch.cat([table(before), memory.embeddings.to(text.dtype), text], dim=1)
            mask = torch.cat([torch.ones_like(before, dtype=torch.bool), memory.mask, mask], dim=1)
        longest = int(mask.sum(dim=1).max())
        order = packing_order(mask, padding)
        order = order[:, :longest] if padding == "right" else order[:, mask.shape[1] - longest :]
        mask = mask.gather(1, order)
        embeds = in_order(embeds, order).masked_fill_(~mask.unsqueeze(-1), 0)
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        if memory.form == "kv":
            cached = memory.mask.gather(1, packing_order(memory.mask, "left"))
            return embeds, torch.cat([cached, mask], dim=1).long(), positions + memory.lengths.unsqueeze(1)
        return embeds, mask.long(), positions


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode within the block; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
