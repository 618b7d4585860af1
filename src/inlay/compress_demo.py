"""The demonstration of soft tokens: a small model is taught to answer from text, frozen, and given a compressor.

Three steps, each of them the main job: the decoder of the recipe learns to answer questions about generated facts from
the full text (once; it is kept in the cache); a compressor learns to write the text in a quarter and an eighth of the
tokens; both are asked about people, places and things that neither has met, beside every cheap way to spend as many
tokens. Nothing is compared before full text itself answers: a decoder that does not read cannot judge a compressor.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from inlay.demo import DemoError, cores_here, recipe_path, remove_runs
from inlay.evaluate.compress_methods import FULL_TEXT, SOFT_TOKENS
from inlay.evaluate.compress_results import CompressEvaluation
from inlay.evaluate.compress_suite import CompressSuite
from inlay.report import Headline
from inlay.report.console import print_section, progress_bar
from inlay.report.document import Verdict
from inlay.train.allocator import keep_freed_memory
from inlay.train.base_lm import BaseOutcome, base_outcome, build_base_lm
from inlay.train.compress import train_compressor
from inlay.train.compress_recipe import load_compress_recipe
from inlay.train.compress_report import measure_compress_run, write_compress_report

TASK = "terse"
FULL_TEXT_ANSWERS = 0.95
"""Exact match of full text below which nothing is compared."""


def run_compress_demo(directory: Path, console: Console) -> Path:
    """Train decoder and compressor, evaluate and report; an earlier demo in ``directory`` is replaced.

    Returns:
        The path of ``report.html``.

    Raises:
        DemoError: The decoder does not answer from full text, so that there is nothing to compare with.
    """
    began = time.monotonic()
    keep_freed_memory()
    torch.set_num_threads(cores_here())
    recipe = load_compress_recipe(recipe_path(TASK))
    build_base_lm(recipe, console)
    outcome = base_outcome(recipe)
    assert outcome is not None
    if outcome.exact_match < FULL_TEXT_ANSWERS:
        raise DemoError(
            f"the decoder answers {_percent(outcome.exact_match)} of held-out questions from full text and the demo "
            f"compares from {_percent(FULL_TEXT_ANSWERS)} on; give the last of base.stages in {recipe_path(TASK)} more "
            "max_steps"
        )
    console.print(
        f"the decoder answers {_percent(outcome.exact_match)} from full text, learnt in {outcome.steps:,} steps and "
        f"{outcome.seconds / 60:.1f} min"
    )
    run = directory / TASK
    remove_runs([run])
    train_compressor(recipe, run, console=console)
    suite = measure_compress_run(run, shown=partial(progress_bar, console), device="cpu")
    suite.write(run / "evaluation.json")
    for section in suite.sections():
        print_section(console, section)
    path = write_compress_report(
        run, suite.sections(), headlines(suite, outcome, time.monotonic() - began), directory / "report.html"
    )
    console.print(f"report: {path}", soft_wrap=True)
    return path


def headlines(suite: CompressSuite, outcome: BaseOutcome, seconds: float) -> list[Headline]:
    """What the demo comes to: full text, soft tokens at each budget, the best cut, and the alarm."""
    evaluation = suite.evaluation
    full = evaluation.find(FULL_TEXT)
    cards = [] if full is None else [Headline("full text", _percent(full.scores.exact_match), "exact match")]
    cards += [card for budget in evaluation.budgets if (card := _budget_card(evaluation, budget)) is not None]
    alarms = [collapse.budget for collapse in suite.alarms]
    said = f"raised at {' and '.join(alarms)}" if alarms else "silent"
    learnt = f"with {outcome.seconds / 60:.1f} min for the decoder when it is not in the cache"
    return [
        *cards,
        Headline("alarm for collapse", said, "do slots say anything?", "bad" if alarms else "good"),
        Headline("measured in", f"{seconds / 60:.1f} min", learnt),
    ]


def _budget_card(evaluation: CompressEvaluation, budget: str) -> Headline | None:
    soft, cut = evaluation.find(SOFT_TOKENS, budget), evaluation.best_cut(budget)
    if soft is None or cut is None:
        return None
    gain = evaluation.gain(budget)
    verdict: Verdict = "neutral"
    if gain is not None and (gain.f1.low > 0 or gain.f1.high < 0):
        verdict = "good" if gain.f1.mean > 0 else "bad"
    note = f"{_percent(cut.scores.exact_match)} for the text cut to as many ({cut.name})"
    return Headline(f"soft tokens at {budget}", _percent(soft.scores.exact_match), note, verdict)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
