"""A small language model that answers questions about generated facts, trained from scratch: the decoder of the demo.

A compressor can only be judged by a decoder that answers from the full text, and one that is trained in minutes has to
be taught economically. So a context is read once for all questions about it: its keys and values are a memory in form
``kv``, behind which :meth:`BoundLayout.training` sets each question and answer. To the model that is the same as full
text in front of every question. The loss is that of the answers and their ends; with ``text_weight`` that of the
context's tokens as well, which teaches what can follow what, and to repeat names.

Two things decide whether such a model finds the fact that is asked for at all, and neither is its size. It must meet
few facts first: among eight, the gradient says too little about which one was meant (``base.stages``). And its first
block should see a few tokens only (a sliding window): a name, an attribute and a value then meet in one place from the
first step on, rather than once attention has learned to look there. One in four steps goes back to an earlier stage, or
the model forgets how to read short contexts, and text cut short would look worse than it is.

What is trained is kept in the cache, under a hash of everything that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, set_seed
from transformers.utils import CONFIG_NAME

from inlay.data import FactsConfig, QAExample, facts_tokenizer
from inlay.data.facts import facts_context
from inlay.data.tokenizer import default_cache_dir, load_pretrained_tokenizer
from inlay.evaluate.squad import exact_match
from inlay.fastweight.causal_lm import with_cache
from inlay.files import write_folder
from inlay.softtoken.batches import NO_LABEL, padded
from inlay.softtoken.objectives import predictions
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import SoftTokens, embed_text
from inlay.train.compress_data import tokenise_contexts
from inlay.train.compress_recipe import BaseSection, CompressRecipe
from inlay.train.directory import training_device
from inlay.train.muon import MuonAdamW, split_matrices
from inlay.train.pretrained import load_causal_lm, untrained_causal_lm
from inlay.train.yaml_recipe import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OUTCOME = "base.json"
_FORMAT = 2  # of rows, schedule and optimizer: a change here makes another model of the same recipe
_WARMUP = 100
_LAST_RATE = 0.05
_REVIEWED = 0.25
_SHOWN_EVERY = 10
_LOOK_EVERY = 0.5


@dataclass(frozen=True)
class BaseOutcome:
    """How the training went.

    Attributes:
        exact_match: Of held-out full texts at the end, 0 to 1.
        wanted: What the recipe wanted it to be.
        steps: Optimizer steps, of all stages.
        seconds: Wall clock.
        looks: (steps so far, facts in a context, exact match), one for each look at held-out contexts.
    """

    exact_match: float
    wanted: float
    steps: int
    seconds: float
    looks: tuple[tuple[int, int, float], ...]

    @property
    def reached(self) -> bool:
        """Whether it answers as well as it should."""
        return self.exact_match >= self.wanted


def build_base_lm(
    recipe: CompressRecipe, console: Console, *, cache_dir: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The decoder that ``recipe.decoder.config`` describes, trained as ``recipe.base`` says, or taken from the cache.

    Of several processes (``torchrun``) the first trains it, and the others wait until it lies in the cache, which they
    share.

    Args:
        recipe: With ``decoder.config``, ``base`` and generated facts.
        console: Shows the progress, and warns of a model that answers less well than ``base.exact_match``.
        cache_dir: Where it is kept, under ``base-lms``; the library's cache directory when not given.

    Returns:
        The model on the CPU, in the recipe's dtype and in eval mode, and its tokenizer.

    Raises:
        RecipeError: The architecture is unknown, or too short for a row.
    """
    folder = _folder(recipe, cache_dir)
    processes = PartialState()
    if processes.is_main_process and not _is_whole(folder):
        model, tokenizer, outcome = train_base_lm(recipe, console)

        def save(place: Path) -> None:
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
            (place / OUTCOME).write_text(json.dumps(asdict(outcome), indent=2) + "\n")

        write_folder(folder, save, _is_whole)
    while not _is_whole(folder):  # rather than at a barrier, whose timeout is shorter than a training
        time.sleep(_LOOK_EVERY)
    processes.wait_for_everyone()
    outcome = read_outcome(folder)
    if not outcome.reached:
        console.print(
            f"[yellow]warning:[/] the decoder answers {100 * outcome.exact_match:.1f} % of held-out full texts exactly "
            f"and base.exact_match is {100 * outcome.wanted:.0f} %: what a compressor loses cannot be told from what "
            "the decoder cannot do. Give the last of base.stages more max_steps, or the data fewer facts"
        )
    return _load(recipe, folder)


def base_outcome(recipe: CompressRecipe, *, cache_dir: Path | None = None) -> BaseOutcome | None:
    """How the cached decoder of ``recipe`` was trained; None if there is none."""
    folder = _folder(recipe, cache_dir)
    return read_outcome(folder) if _is_whole(folder) else None


def read_outcome(folder: Path) -> BaseOutcome:
    """The outcome that was saved with a decoder."""
    fields = json.loads((folder / OUTCOME).read_text())
    return BaseOutcome(**fields | {"looks": tuple(map(tuple, fields["looks"]))})


def train_base_lm(
    recipe: CompressRecipe, console: Console
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, BaseOutcome]:
    """Train the decoder; arguments and errors as for :func:`build_base_lm`."""
    data, base = recipe.data, recipe.base
    assert isinstance(data, FactsConfig)
    assert base is not None
    set_seed(recipe.seed)
    tokenizer = facts_tokenizer(data)
    layout = recipe.layout.bind(tokenizer)
    model = untrained_lm(recipe, tokenizer)
    optimizer = _optimizer(base, model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    contexts = max(1, base.batch_size // data.questions)
    began, steps, found = time.monotonic(), 0, 0.0
    looks: list[tuple[int, int, float]] = []
    wanted = [base.exact_match if stage.exact_match is None else stage.exact_match for stage in base.stages]
    rng = random.Random(recipe.seed)
    with _progress(console) as progress:
        for number, stage in enumerate(base.stages):
            held_out = _held_out(stage.data(data), base.eval_examples)
            last = number + 1 == len(base.stages)
            bar = progress.add_task(f"decoder, {stage.data(data).facts} facts", total=stage.max_steps, note="")
            for step in range(stage.max_steps):
                rate = _rate(steps, step / stage.max_steps if last else 0.0)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * rate
                met = rng.randrange(number) if number and rng.random() < _REVIEWED else number
                facts = base.stages[met].data(data)
                examples = [facts_context(facts, "train", steps * contexts + place) for place in range(contexts)]
                loss = base_loss(model, layout, examples, base.text_weight)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                steps += 1
                if steps % _SHOWN_EVERY == 0:
                    note = f"loss {loss.item():.2f}, exact match {100 * found:.0f} %"
                    progress.update(bar, completed=step + 1, note=note)
                if (step + 1) % base.eval_steps == 0 or step + 1 == stage.max_steps:
                    found = full_text_exact_match(model, layout, held_out)
                    looks.append((steps, stage.data(data).facts, found))
                    if found >= wanted[number]:
                        break
            progress.update(bar, completed=step + 1, total=step + 1, note=f"exact match {100 * found:.1f} %")
    outcome = BaseOutcome(found, base.exact_match, steps, time.monotonic() - began, tuple(looks))
    return model.cpu().eval(), tokenizer, outcome


def full_text_exact_match(
    model: PreTrainedModel, layout: BoundLayout, examples: list[QAExample], batch_size: int = 64
) -> float:
    """Share of ``examples`` that the model answers exactly when it reads their whole contexts, 0 to 1."""
    right = 0
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        ids, mask = tokenise_contexts(layout, [example.context for example in part])
        with torch.no_grad():
            memory = embed_text(model, ids.to(model.device), mask.to(model.device))
        answers = layout.answer(model, memory, [example.question for example in part])
        right += sum(exact_match(given, example.answers) for given, example in zip(answers, part, strict=True))
    return right / len(examples)


def base_loss(
    model: PreTrainedModel, layout: BoundLayout, contexts: Sequence[Sequence[QAExample]], text_weight: float
) -> Tensor:
    """Mean cross-entropy of the answers and their ends, and ``text_weight`` times that of the contexts' own tokens.

    Args:
        model: The decoder.
        layout: As in answering.
        contexts: Questions, grouped by their contexts.
        text_weight: 0 leaves the contexts' tokens out.
    """
    texts = tokenise_contexts(layout, [examples[0].context for examples in contexts])
    ids, mask = (tensor.to(model.device) for tensor in texts)
    cache = DynamicCache()
    read = model(input_ids=ids, attention_mask=mask.long(), **with_cache(model, cache), use_cache=True)
    memory = SoftTokens(None, mask, tuple((layer.keys, layer.values) for layer in cache.layers))
    owner = [row for row, examples in enumerate(contexts) for _ in examples]
    asked = [example for examples in contexts for example in examples]
    batch = layout.training(
        model, memory.select(owner), [one.question for one in asked], [one.answers for one in asked]
    )
    said = model(**{name: value for name, value in batch.inputs().items() if name != "labels"})
    loss = predictions(said.logits, batch.labels).cross_entropy
    if text_weight:
        prompts = padded([layout.prompt(one.question).after for one in asked], NO_LABEL, model.device)
        for logits, labels in ((read.logits, ids.masked_fill(~mask, NO_LABEL)), (said.logits, prompts)):
            loss = loss + text_weight * predictions(logits[:, : labels.shape[1]], labels).cross_entropy
    return loss


def _optimizer(base: BaseSection, model: PreTrainedModel) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": base.learning_rate, "betas": (0.9, 0.98), "weight_decay": 0.0}
    if base.muon is None:
        return torch.optim.AdamW(model.parameters(), **settings)
    return MuonAdamW(*split_matrices([model]), matrix_lr=base.muon, **settings)


def _rate(steps: int, spent: float) -> float:
    """The share of the peak learning rate: a warm-up, then constant, and falling as the last stage is spent."""
    return min(1.0, (steps + 1) / _WARMUP, max(_LAST_RATE, 1 - spent))


def _held_out(facts: FactsConfig, count: int) -> list[QAExample]:
    """One question about each of ``count`` contexts, none of which is in the data's evaluation set."""
    first = facts.eval_examples // facts.questions + 1
    return [facts_context(facts, "eval", first + place)[place % facts.questions] for place in range(count)]


def untrained_lm(recipe: CompressRecipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The architecture of ``recipe.decoder.config`` with random weights, in float32, on the device it is trained on.

    Raises:
        RecipeError: The architecture is unknown, or its vocabulary too small for the tokenizer.
    """
    section = recipe.decoder
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = untrained_causal_lm(section, "decoder", dtype=torch.float32, vocab_size=len(tokenizer), **special)
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        raise RecipeError(f"decoder.config.vocab_size must be at least {len(tokenizer)}, the words of the facts")
    return model.to(training_device(recipe.trainer)).train()


def _folder(recipe: CompressRecipe, cache_dir: Path | None) -> Path:
    """Where the decoder of ``recipe`` is kept: a hash of everything that it depends on."""
    data, base = recipe.data, recipe.base
    assert isinstance(data, FactsConfig)
    assert base is not None
    digest = hashlib.sha256()
    said = (
        _FORMAT,
        recipe.seed,
        recipe.decoder.model_dump_json(exclude={"dtype"}),
        base.model_dump_json(),
        recipe.layout.model_dump_json(exclude={"answer_tokens"}),
        data.model_dump_json(exclude={"train_examples"}),
        torch.__version__,
        transformers.__version__,
        # What the data is made of is code: samples stand for it.
        *(facts_context(stage.data(data), "train", 0) for stage in base.stages),
        sorted(facts_tokenizer(data).get_vocab().items()),
    )
    for part in said:
        digest.update(f"{part!r}\n".encode())
    return (cache_dir or default_cache_dir()) / "base-lms" / digest.hexdigest()[:24]


def _is_whole(folder: Path) -> bool:
    """Whether a decoder lies there: what is left where only its tokenizer was saved is none."""
    return all((folder / name).is_file() for name in (OUTCOME, CONFIG_NAME))


def _load(recipe: CompressRecipe, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return load_causal_lm(folder, recipe.decoder, "decoder").eval(), load_pretrained_tokenizer(folder)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
