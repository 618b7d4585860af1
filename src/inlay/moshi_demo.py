"""The demonstration on speech: conversations are made, encoded, learnt with a memory and without, and one is streamed.

Every step is the command of the same name on files of the real formats; only the sizes are a toy's. In the
conversations the user says a catchword and Moshi answers what belongs to it; the next time it is longer ago than
attention reaches. What was said then can only come from the memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from inlay.data.audio_check import check_audio
from inlay.data.speech import SpeechConfig, synthesise
from inlay.demo import (
    WITH,
    Arm,
    DemoError,
    arms_progress,
    cores_here,
    recipe_path,
    remove_runs,
    train_arms,
)
from inlay.evaluate import NO_MEMORY
from inlay.evaluate.moshi import MoshiEvaluation, evaluate_moshi
from inlay.evaluate.position import NO_STEP
from inlay.moshi.duplex import Voice
from inlay.moshi.encode import encode_data
from inlay.moshi.model import MoshiForTraining
from inlay.moshi.run import Run, run_file
from inlay.moshi.run_report import run_cards, run_sections, write_run
from inlay.moshi.toy import ToySizes, write_toy_checkpoint
from inlay.moshi.weights import CONFIG_NAME, load_checkpoint
from inlay.report import Code, Headline, Report, Section, training_curves, write_report
from inlay.report.console import print_section, progress_bar
from inlay.report.provenance import provenance
from inlay.train.moshi import load_moshi_run
from inlay.train.moshi_recipe import load_moshi_recipe
from inlay.train.report import training_curve

TASK = "moshi_demo"
SIZES = ToySizes(num_layers=2, num_heads=2, depformer_dim=16, depformer_layers=1, mimi_filters=2)
REACH = SIZES.num_layers * SIZES.context
"""Frames that attention reaches back, through all layers."""

TRAIN = SpeechConfig(conversations=160, duration=60.0, return_after=8.0, style="quiz")
HELD_OUT = replace(TRAIN, conversations=12, seed=1)


@dataclass(frozen=True)
class DemoPaths:
    """Where a demo keeps its files."""

    root: Path

    @property
    def toy(self) -> Path:
        """The checkpoint that both arms start from."""
        return self.root / "toy"

    def speech(self, part: str) -> Path:
        """Conversations of a part of the data, ``train`` or ``held-out``."""
        return self.root / f"speech-{part}"

    def codes(self, part: str) -> Path:
        """Their codes."""
        return self.root / f"codes-{part}"

    def run(self, variant: str) -> Path:
        """A training."""
        return self.root / variant.replace(" ", "-")


def run_moshi_demo(directory: Path, console: Console) -> Path:
    """Make data, train, evaluate, stream and report. Conversations and codes that are there already are used.

    Returns:
        The path of ``report.html``.

    Raises:
        DataError: espeak-ng is not installed; the message says how to install it.
        DemoError: A step failed.
    """
    began = time.monotonic()
    paths = DemoPaths(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for part, config in (("train", TRAIN), ("held-out", HELD_OUT)):
        _make_conversations(config, paths.speech(part), console)
    if not (paths.toy / CONFIG_NAME).is_file():
        with console.status("writing a toy Moshi with random weights"):
            write_toy_checkpoint(paths.toy, sizes=SIZES)
    for part in ("train", "held-out"):
        _encode(paths.speech(part), paths.codes(part), paths.toy, console)
    arms = _arms(paths)
    remove_runs([arm.directory for arm in arms])
    with arms_progress(console) as progress:
        train_arms(arms, progress, cores_here())
    torch.set_num_threads(cores_here())
    evaluation = measure(paths, console)
    evaluation.write(directory / "evaluation.json")
    for section in evaluation.sections():
        print_section(console, section)
    torch.set_num_threads(1)  # of so small a model a frame is quickest on one core
    streamed = _stream(paths, console)
    path = _report(paths, evaluation, streamed, time.monotonic() - began)
    console.print(f"streamed: {directory / 'answer.wav'}", soft_wrap=True)
    console.print(f"report: {path}", soft_wrap=True)
    return path


def _make_conversations(config: SpeechConfig, folder: Path, console: Console) -> None:
    with progress_bar(console, f"conversations: {folder.name}") as shown:
        manifest = synthesise(config, folder, progress=shown)
    with progress_bar(console, f"checking: {folder.name}") as shown:
        report = check_audio(str(manifest), progress=shown)
    if report.exit_code:
        for table in report.tables():
            console.print(table)
        raise DemoError(f"{folder} holds unsound conversations; delete it")
    console.print(
        f"{folder.name}: {len(report.conversations)} conversations, {report.seconds / 60:.1f} min, "
        f"{report.returns:,} phrases return",
        highlight=False,
    )


def _encode(speech: Path, codes: Path, toy: Path, console: Console) -> None:
    with progress_bar(console, f"encoding: {codes.name}") as shown:

        def told(done: float, total: float) -> None:
            shown(round(done), round(total))

        encode_data(str(speech), codes, load_checkpoint(toy), workers=cores_here(), progress=told)


def _arms(paths: DemoPaths) -> list[Arm]:
    recipe = recipe_path(TASK)
    data = (
        f"moshi_paths.hf_repo_id={paths.toy}",
        f"data.train_data={paths.codes('train')}",
        f"data.eval_data={paths.codes('held-out')}",
    )
    steps = load_moshi_recipe(recipe).max_steps
    return [
        Arm("moshi", variant, recipe, (*data, *more), paths.run(variant), steps)
        for variant, more in ((WITH, ()), (NO_MEMORY, ("memory=null",)))
    ]


def measure(paths: DemoPaths, console: Console) -> MoshiEvaluation:
    """Both arms on the conversations held out, the one with a memory also with η = 0."""
    evaluation: MoshiEvaluation | None = None
    for variant in (WITH, NO_MEMORY):
        run = load_moshi_run(paths.run(variant), device="cpu")
        data = run.recipe.load_data()
        task = MoshiForTraining(run.lm, run.recipe.loss)
        with progress_bar(console, f"evaluating: {variant}") as shown:
            settings = run.recipe.evaluate.model_dump() | {"returned_after": REACH}
            found = evaluate_moshi(task, data.eval, **settings, progress=shown)
        evaluation = found if evaluation is None else evaluation.add(found.variants)
    assert evaluation is not None
    evaluation.baseline = NO_MEMORY
    return evaluation


def less(evaluation: MoshiEvaluation, stream: str, baseline: str) -> tuple[float, float]:
    """By which share the loss on returned phrases is lower with the memory than in ``baseline``, and ± half the 95 %
    interval."""
    gain = replace(evaluation, baseline=baseline).gain(WITH, stream)
    base = evaluation.variants[baseline][stream].returned.bits
    return gain.mean / base, gain.half / base


def _stream(paths: DemoPaths, console: Console) -> Run:
    moshi = load_moshi_run(paths.run(WITH), device="cpu").moshi
    source = min((paths.speech("held-out") / "audio").glob("*.wav"))
    with progress_bar(console, f"streaming: {source.name}") as shown:
        done = run_file(
            moshi,
            source,
            paths.root / "answer.wav",
            voice=Voice(seed=0),
            stereo=True,
            on_frame=lambda run, total, _: shown(run.frames, total),
        )
    write_run(done, paths.root / "stream")
    return done


def _report(paths: DemoPaths, evaluation: MoshiEvaluation, streamed: Run, seconds: float) -> Path:
    cards = []
    for stream in ("text", "audio"):
        share, half = less(evaluation, stream, NO_MEMORY)
        off, _ = less(evaluation, stream, NO_STEP)
        cards.append(
            Headline(
                f"returned phrases, {stream}",
                f"{-100 * share:+.0f} % loss".replace("-", "\u2212"),
                f"with a memory against without, ± {100 * half:.0f}; {-100 * off:+.0f} % against η = 0".replace(
                    "-", "\u2212"
                ),
                "good" if share - half > 0 else "bad" if share + half < 0 else "neutral",
            )
        )
    curves = {variant: training_curve(paths.run(variant)) for variant in (WITH, NO_MEMORY)}
    heard = run_cards(streamed)
    report = Report(
        title="What a memory buys Moshi",
        subtitle=f"A toy Moshi on made conversations: attention reaches {REACH} frames back, phrases return later",
        summary=[*cards, heard[1], Headline("measured in", f"{seconds / 60:.1f} min", "in this run")],
        sections=[
            *evaluation.sections(),
            Section("Training", items=[training_curves(curves, baseline=NO_MEMORY).figure()]),
            *[
                replace(one, title=f"Streaming: {one.title[0].lower()}{one.title[1:]}")
                for one in run_sections(streamed)
            ],
            Section("Recipe", items=[Code(recipe_path(TASK).read_text(), f"{TASK}.yaml")]),
        ],
        provenance=provenance(),
    )
    return write_report(report, paths.root / "report.html")
