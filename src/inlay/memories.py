"""``inlay evaluate --memories``: both memories trained from one decoder at equal bytes, and asked the same questions.

runs/NAME/
  recipe.yaml
  TASK/decoder/        the decoder of a task, before either memory
  TASK/fast-weights/   a run of ``inlay.train.reading``
  TASK/soft-tokens/    a run of ``inlay compress train``
  memories.json, report.html

What is finished is not done again, so a comparison that was stopped goes on when it is asked for once more. The number
of soft tokens is settled when the fast weights are there: it is what a session's state takes in bytes, in slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress

from inlay.data import QAConfig, QAExample, load_qa
from inlay.evaluate.compress_measuring import cache_bytes_per_slot
from inlay.evaluate.compress_methods import Budget, Ids, compressing_writer, context_ids, padded_ids, text_writer
from inlay.evaluate.memories import (
    FAST_WEIGHTS,
    FULL_TEXT,
    NO_CONTEXT,
    SOFT_TOKENS,
    Way,
    from_session,
    from_slots,
    measure_ways,
)
from inlay.evaluate.memories_results import MemoriesEvaluation, TaskScores, ways_in_order
from inlay.evaluate.scoring import Progress as ShowProgress
from inlay.evaluate.scoring import choose, device_of
from inlay.fastweight import Session
from inlay.files import write_folder, write_whole
from inlay.report import Code, Report, training_curves, write_report
from inlay.report.console import print_section
from inlay.report.document import Section
from inlay.report.provenance import provenance
from inlay.train.compress import CompressRun, load_compress_run, train_compressor
from inlay.train.compress_recipe import CompressRecipe, load_compress_recipe
from inlay.train.directory import DONE, RECIPE, refuse_another_run, told_once
from inlay.train.memories_recipe import MemoriesRecipe
from inlay.train.pretrained import load_causal_lm
from inlay.train.reading import ReadingRecipe, ReadingRun, load_reading_run, no_slots, train_reading
from inlay.train.report import training_curve
from inlay.train.yaml_recipe import dump_recipe, read_recipe

DECODER = "decoder"
FIGURES = "memories.json"


def compare_memories(
    recipe: MemoriesRecipe,
    directory: Path,
    console: Console,
    *,
    progress: Callable[[str], ShowProgress | None] = lambda task: None,
) -> MemoriesEvaluation:
    """Train what is not there yet, ask, print, and write ``memories.json`` and ``report.html``.

    Args:
        recipe: A checked recipe.
        directory: Where the comparison is kept.
        console: Shows what is done, and the table.
        progress: Of a task's questions: called with answers given and answers in all.

    Raises:
        RunError: ``directory`` holds another comparison.
    """
    refuse_another_run(directory, recipe, resume=True)
    processes = PartialState()
    processes.wait_for_everyone()  # all have looked before one of them writes
    console = told_once(console)
    if processes.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / RECIPE, dump_recipe(recipe))
    # Of every task before anything is trained: data that cannot be had should not be found out after minutes.
    asked = {task: _asked(recipe, section.data) for task, section in recipe.tasks.items()}
    found = []
    for task, examples in asked.items():
        place = directory / task
        decoder = keep_decoder(recipe.task_recipe(task), place / DECODER, console)
        reading = _read(recipe.reading(task, decoder), place / FAST_WEIGHTS.replace(" ", "-"), task, console)
        compression = recipe.compression(task, decoder, _slots(recipe, reading, examples))
        soft = _compress(compression, place / SOFT_TOKENS.replace(" ", "-"), task, console)
        found.append(_measure(recipe, task, decoder, reading, soft, examples, progress(task)))
    evaluation = MemoriesEvaluation(tuple(found))
    if processes.is_main_process:
        print_section(console, evaluation.section())
        console.print(f"figures: {evaluation.write(directory / FIGURES)}", soft_wrap=True)
        console.print(f"report: {_report(recipe, directory, evaluation)}", soft_wrap=True)
    return evaluation


def _asked(recipe: MemoriesRecipe, data: QAConfig) -> list[QAExample]:
    """The questions of a task, from all of its evaluation data."""
    examples = load_qa(data).eval
    return [examples[index] for index in choose(len(examples), recipe.evaluate.examples)]


def evaluate_memories(
    path: Path | None, overrides: Sequence[str], runs: Path, console: Console, errors: Console
) -> MemoriesEvaluation:
    """What the command does.

    Args:
        path: A recipe, or the directory of a comparison; None for the recipe that comes along.
        overrides: ``section.key=value``.
        runs: Where comparisons are kept.
        console: For the table.
        errors: For the progress bar.
    """
    known = path is not None and path.is_dir()
    source = Path(str(files("inlay"))) / "recipes" / "memories.yaml" if path is None else path
    recipe = read_recipe(MemoriesRecipe, source / RECIPE if known else source, overrides)
    with Progress(console=errors, transient=True) as bar:

        def progress(task: str) -> ShowProgress:
            line = bar.add_task(f"asking: {task}", total=None)
            return lambda done, total: bar.update(line, completed=done, total=total)

        return compare_memories(recipe, source if known else runs / recipe.name, console, progress=progress)


def keep_decoder(recipe: CompressRecipe, place: Path, console: Console) -> str:
    """Where the decoder of a recipe lies: the hub or a folder that the recipe names, or ``place``, to which one that is
    trained from scratch is written."""
    if recipe.decoder.name_or_path is not None:
        return recipe.decoder.name_or_path
    if not place.is_dir():
        from inlay.train.base_lm import build_base_lm

        model, tokenizer = build_base_lm(recipe, console)

        def save(new: Path) -> None:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)

        processes = PartialState()
        if processes.is_main_process:
            write_folder(place, save)
        processes.wait_for_everyone()
    return str(place)


def _read(recipe: ReadingRecipe, place: Path, task: str, console: Console) -> ReadingRun:
    if not ((place / DONE).is_file() and read_recipe(ReadingRecipe, place / RECIPE) == recipe):
        console.print(f"[bold]{task}: {FAST_WEIGHTS}[/]", highlight=False)
        train_reading(recipe, place, resume=True, console=console)
    return load_reading_run(place)


def _compress(recipe: CompressRecipe, place: Path, task: str, console: Console) -> CompressRun:
    if not ((place / DONE).is_file() and load_compress_recipe(place / RECIPE) == recipe):
        console.print(f"[bold]{task}: {SOFT_TOKENS}[/]", highlight=False)
        train_compressor(recipe, place, resume=True, console=console)
    return load_compress_run(place)


def _slots(recipe: MemoriesRecipe, reading: ReadingRun, examples: Sequence[QAExample]) -> int:
    """How many soft tokens take the bytes of a session's state."""
    contexts = context_ids(reading.task.layout, examples[: recipe.evaluate.batch_size], recipe.context_tokens)
    with torch.no_grad():
        held = _session(reading, contexts).nbytes / len(contexts)
    model = reading.task.lm
    weight = model.get_input_embeddings().weight
    per_slot = weight.shape[1] * weight.element_size()
    if recipe.soft_tokens.compressor.form == "kv":
        with reading.task.memory.disabled():
            per_slot = cache_bytes_per_slot(model)
    return max(1, round(held / per_slot))


def _session(reading: ReadingRun, contexts: Sequence[Ids]) -> Session:
    return reading.task.read(*padded_ids(contexts, device_of(reading.task)))


def _measure(
    recipe: MemoriesRecipe,
    task: str,
    decoder: str,
    reading: ReadingRun,
    soft: CompressRun,
    examples: Sequence[QAExample],
    progress: ShowProgress | None,
) -> TaskScores:
    layout, device = reading.task.layout, device_of(reading.task)
    plain: Any = load_causal_lm(decoder, recipe.lm, "lm").to(device).eval()
    lm = reading.task.lm
    slots = soft.recipe.compressor.slots
    fast = from_session(lm, layout, lambda contexts: _session(reading, contexts), lambda rows: no_slots(lm, rows))
    written = from_slots(soft.model, layout, compressing_writer(soft.compressor, Budget(slots=slots)))
    trained = sum(parameter.numel() for parameter in soft.compressor.trainable_parameters())
    ways = [
        Way(FULL_TEXT, from_slots(plain, layout, text_writer(plain, lambda context: context), bytes_per_slot=4)),
        Way(NO_CONTEXT, from_slots(plain, layout, text_writer(plain, lambda _: ()))),
        *(Way(FAST_WEIGHTS, fast, reading.trained, control) for control in (False, True)),
        *(Way(SOFT_TOKENS, written, trained, control) for control in (False, True)),
    ]
    scores = measure_ways(
        ways,
        layout,
        examples,
        cache_bytes_per_slot=cache_bytes_per_slot(plain),
        context_tokens=recipe.context_tokens,
        batch_size=recipe.evaluate.batch_size,
        seed=recipe.seed,
        progress=progress,
    )
    contexts = context_ids(layout, examples, recipe.context_tokens)
    memory = reading.task.memory
    own = sum(parameter.numel() for parameter in memory.parameters())
    what = {
        FAST_WEIGHTS: f"{reading.trained:,} parameters in {_steps(reading.recipe.trainer)} steps: convolution and "
        f"projection of the target ({own:,}) in blocks {[*memory.layers]}, and LoRA on the decoder",
        SOFT_TOKENS: f"{trained:,} parameters in {_steps(soft.recipe.trainer)} steps: the compressor "
        f"{soft.compressor.config.kind}, LoRA with which it reads included; the decoder is frozen",
    }
    notes = []
    shortest = min(map(len, contexts))
    assert slots is not None
    if slots > shortest:
        notes.append(
            f"{task}: the fast weights' state is worth {slots} soft tokens and the shortest context has {shortest} "
            "tokens, which is all the slots it gets: soft tokens have fewer bytes. Take longer contexts, or a decoder "
            "whose MLP is narrower."
        )
    full = next(one for one in scores if one.name == FULL_TEXT)
    if recipe.tasks[task].base is not None and full.scores.exact_match < 0.9:
        notes.append(
            f"{task}: the decoder itself answers {100 * full.scores.exact_match:.1f} % from full text, too few to tell "
            "what a memory loses; give its base more steps."
        )
    return TaskScores(
        task=task,
        questions=len(examples),
        contexts=len(set(contexts)),
        context_tokens=sum(map(len, contexts)) / len(contexts),
        ways=ways_in_order(scores),
        what=what,
        notes=tuple(notes),
    )


def _steps(trainer: dict[str, Any]) -> str:
    return f"{trainer['max_steps']:,}" if "max_steps" in trainer else "all"


def _report(recipe: MemoriesRecipe, directory: Path, evaluation: MemoriesEvaluation) -> Path:
    figures = []
    for task in recipe.tasks:
        curves = {
            name: training_curve(directory / task / name.replace(" ", "-")) for name in (FAST_WEIGHTS, SOFT_TOKENS)
        }
        drawn = {name: curve for name, curve in curves.items() if curve[0]}
        if drawn:
            figures.append(training_curves(drawn, title=f"Training loss on {task}").figure("Nats per token."))
    report = Report(
        title=recipe.name,
        subtitle="one context in fast weights and in soft tokens",
        sections=[
            evaluation.section(),
            *([Section("Training", items=figures)] if figures else []),
            Section("Recipe", items=[Code(dump_recipe(recipe))]),
        ],
        provenance=provenance(),
    )
    return write_report(report, directory / "report.html")
