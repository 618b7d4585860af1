"""What was wrong with the experiment of seed 003, fault by fault, and what each objective adds to plain cross-entropy.

    python docs/studies/seed003.py --steps 300
    python docs/studies/seed003.py mine.yaml trainer.learning_rate=1e-3 --steps 1000 --only "seed 003" "+ Muon"
    python docs/studies/seed003.py --list

Every arm trains a compressor for the same number of steps, on the same data, before the same frozen decoder, and is
scored on the same held-out questions at one ratio. The first arms begin with the seed's setup and take one fault out
after the other, then put in what the recipe does beyond that; the last is the recipe itself. To that the objectives are
added one by one, and each of the seed's faults by itself. The faults that the library does not let one make live in
``seed003_faults.py``, nowhere else.

An arm is a run in ``--runs``, with its recipe, metrics and weights. What is finished is not done again, so a study that
was stopped goes on when the same command is given. Figures land in ``ablation.json`` beside the runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from seed003_faults import Faults
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import inlay
from inlay.compress_demo import FULL_TEXT_ANSWERS
from inlay.data import DataError, QAExample, load_qa
from inlay.evaluate.compress_methods import Budget, context_ids, cut_methods, text_methods
from inlay.evaluate.squad import SquadScores, squad_scores
from inlay.fastweight import InlayError
from inlay.memories import keep_decoder
from inlay.report import Table
from inlay.report.console import rich_table
from inlay.report.jsonfile import plain, write_json
from inlay.softtoken.prompting import in_eval_mode
from inlay.train.base_lm import full_text_exact_match
from inlay.train.compress import CompressRun, load_compress_run, train_compressor
from inlay.train.compress_recipe import CompressRecipe, load_compress_recipe
from inlay.train.directory import DONE, RECIPE
from inlay.train.yaml_recipe import check_recipe, dump_recipe

DEFAULT = Path(inlay.__file__).parent / "recipes" / "terse.yaml"
RESULT = "result.json"
SEED_TOKENS = 12
PRETRAINED = 1 / 3
"""Share of an arm's steps that its pretraining takes; the rest are for the answers."""


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        name: What it has that the arm before it (or, of an objective, the recipe) has not.
        layout: What differs from the recipe's layout.
        compressor: The whole section; None for the recipe's.
        one_ratio: Train the measured ratio alone from the first step on; else as the recipe draws its ratios.
        muon: Train with Muon where the recipe does; else with ``trainer.optim`` alone.
        objectives: Weights beside that of the answer.
        pretrained: Spend a part of the steps on reconstruction and continuation first.
        faults: What the library would not do.
        weights_of: The arm whose weights are scored, where nothing differs but the answering.
    """

    name: str
    layout: Mapping[str, Any] = field(default_factory=dict)
    compressor: Mapping[str, Any] | None = None
    one_ratio: bool = False
    muon: bool = True
    objectives: Mapping[str, float] = field(default_factory=dict)
    pretrained: bool = False
    faults: Faults = field(default_factory=Faults)
    weights_of: str | None = None


def cumulative(base: CompressRecipe) -> list[Arm]:
    """The seed's setup, and one fault less in each arm after it; the last is the recipe ``base``.

    What the recipe does not do (a start at mean-pooled embeddings, keys and values, several ratios, Muon) has no arm.
    """
    seed = Arm(
        "seed 003",
        layout={"bos": False, "bos_after": False, "question": None, "anchor": "", "eos": False}
        | {"answer_tokens": SEED_TOKENS},
        compressor={"kind": "crossattention", "positions": "raw", "calibrate": False},
        one_ratio=True,
        muon=False,
        faults=Faults(shifted_twice=True, answer_bos=True, question_compressed=True, padding_attended=True),
    )
    compressor = _sections(base)["compressor"]

    def without(*keys: str) -> dict[str, Any]:
        return {key: value for key, value in arms[-1].layout.items() if key not in keys}

    def fixed(name: str, **changes: Any) -> None:
        arms.append(replace(arms[-1], name=name, **{"weights_of": None} | changes))

    def fault(**changes: bool) -> Faults:
        return replace(arms[-1].faults, **changes)

    arms = [seed]
    fixed("+ labels shifted once", faults=fault(shifted_twice=False))
    fixed("+ end of answer supervised", layout=without("eos"))
    fixed("+ BOS when answering too", layout=without() | {"bos_after": True}, faults=fault(answer_bos=False))
    fixed("+ question behind the slots", layout=without("question"), faults=fault(question_compressed=False))
    fixed("+ anchor, the recipe's BOS", layout=without("anchor", "bos", "bos_after"))
    fixed("+ padding masked", faults=fault(padding_attended=False))
    fixed("+ positions at the embeddings' scale", compressor=dict(seed.compressor or {}) | {"positions": "calibrated"})
    fixed("+ slots at the embeddings' scale", compressor={"kind": "crossattention"})
    fixed("+ the recipe's answer budget", layout={}, weights_of=arms[-1].name)
    plain = {key: value for key, value in compressor.items() if key not in ("form", "residual")}
    fixed(f"+ {base.compressor.kind}", compressor=plain)
    if "residual" in compressor:
        fixed("+ start at mean-pooled embeddings", compressor=plain | {"residual": compressor["residual"]})
    if "form" in compressor:
        fixed("+ keys and values", compressor=compressor)
    if _several_ratios(base):
        fixed("+ several ratios, the low ones first", one_ratio=False)
    if base.muon is not None:
        fixed("+ Muon", muon=True)
    arms[-1] = Arm(arms[-1].name)
    return arms


def objectives(base: CompressRecipe) -> list[Arm]:
    """The recipe with one objective beside the answer's cross-entropy."""
    recipe = cumulative(base)[-1].name
    weights = {
        "first_token": {"first_token": 0.5},
        "first_k": {"first_k": 0.5},
        "distillation": {"distillation": 1.0},
        "reconstruction": {"reconstruction": 0.2},
        "scheduled_sampling": {"scheduled_sampling": 0.5},
        "diversity": {"diversity": 0.1},
    }
    return [
        Arm("answer alone", weights_of=recipe),
        *(Arm(name, objectives=weight) for name, weight in weights.items()),
        Arm("pretraining", pretrained=True),
    ]


def alone(base: CompressRecipe) -> list[Arm]:
    """The recipe with one of the seed's faults and nothing else wrong."""
    compressor = _sections(base)["compressor"]
    return [
        Arm("labels shifted twice", faults=Faults(shifted_twice=True)),
        Arm("end of answer not supervised", layout={"eos": False}),
        Arm("BOS in training alone", faults=Faults(answer_bos=True)),
        Arm("question compressed along", layout={"question": None}, faults=Faults(question_compressed=True)),
        Arm("no anchor", layout={"anchor": ""}),
        Arm("padding attended to", faults=Faults(padding_attended=True)),
        Arm("slots not calibrated", compressor=compressor | {"calibrate": False}),
    ]


def recipe_of(arm: Arm, base: CompressRecipe, decoder: str, steps: int, ratio: int) -> CompressRecipe:
    """The recipe of an arm.

    Args:
        arm: The arm.
        base: The study's recipe.
        decoder: Where its decoder lies.
        steps: Optimizer steps, those of a pretraining among them.
        ratio: The ratio that is measured, and the only one trained where the arm or the recipe says so.
    """
    raw = _sections(base)
    compressor = dict(arm.compressor or raw["compressor"]) | {"slots": None}
    if arm.one_ratio or not _several_ratios(base):
        compressor["ratios"] = [ratio]
        raw |= {"curriculum": (), "train_ratios": None}
    else:
        compressor["ratios"] = raw["compressor"]["ratios"]
    if not arm.muon:
        raw["muon"] = None
    before = max(1, round(PRETRAINED * steps)) if arm.pretrained else 0
    raw |= {
        "name": slug(arm.name),
        "decoder": {key: value for key, value in raw["decoder"].items() if key != "config"} | {"name_or_path": decoder},
        "base": None,
        "compressor": compressor,
        "layout": raw.get("layout", {}) | dict(arm.layout),
        "objectives": {"answer": 1.0, **arm.objectives},
        "pretraining": {"max_steps": before} if arm.pretrained else None,
        "trainer": raw.get("trainer", {}) | {"max_steps": max(1, steps - before)},
        "evaluate": raw.get("evaluate", {}) | {"ratios": [ratio]},
    }
    return check_recipe(CompressRecipe, raw, arm.name)


def _sections(recipe: CompressRecipe) -> dict[str, Any]:
    compressor = recipe.model_dump(mode="json", include={"compressor"})
    return recipe.model_dump(mode="json", exclude_defaults=True) | compressor


def _several_ratios(recipe: CompressRecipe) -> bool:
    return bool(recipe.curriculum or recipe.train_ratios)


def slug(name: str) -> str:
    """The name of an arm's directory."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_arm(
    arm: Arm,
    recipe: CompressRecipe,
    directory: Path,
    examples: Sequence[QAExample],
    console: Console,
    ratio: int,
    trained_in: Path | None = None,
) -> dict[str, Any]:
    """Train and score an arm, or read what was found before.

    Args:
        arm: The arm.
        recipe: Its recipe.
        directory: Its run.
        examples: Held-out questions.
        console: Shows the training.
        ratio: The ratio that is measured.
        trained_in: The run whose weights are scored; ``directory`` when not given.
    """
    settings = {"recipe": dump_recipe(recipe), "faults": asdict(arm.faults), "questions": len(examples)}
    kept = directory / RESULT
    if kept.is_file() and (found := json.loads(kept.read_text()))["settings"] == settings:
        return dict(found)
    if trained_in is None and not _finished(directory, recipe):
        train_compressor(recipe, directory, resume=True, console=console, trainer_class=arm.faults.trainer())
    run = load_compress_run(trained_in or directory)
    given, scores = score(run, recipe, arm.faults, examples, ratio)
    shown = [
        {"question": one.question, "answers": list(one.answers), "given": text}
        for one, text in list(zip(examples, given, strict=True))[:8]
    ]
    result = {"settings": settings, "arm": arm.name, **scores.to_json(), "examples": shown}
    write_json(result, kept)
    return dict(plain(result))


def score(
    run: CompressRun, recipe: CompressRecipe, faults: Faults, examples: Sequence[QAExample], ratio: int
) -> tuple[list[str], SquadScores]:
    """The answers that an arm gives, and their scores."""
    layout, size = recipe.layout.bind(run.tokenizer), recipe.evaluate.batch_size
    given: list[str] = []
    with in_eval_mode(run.model), in_eval_mode(run.compressor):
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            contexts = [layout.context_ids(one.context, recipe.context_tokens) for one in part]
            questions = [one.question for one in part]
            memory = faults.write(run.compressor, layout, contexts, questions, ratio, "left")
            given += layout.answer(run.model, memory, questions)
    return given, _scores(given, examples)


def bounds(run: CompressRun, examples: Sequence[QAExample], ratio: int) -> list[dict[str, Any]]:
    """Full text, no context, and the first tokens of the text at the same ratio, scored on the same questions."""
    contexts = context_ids(run.layout, examples, run.context_tokens)
    seed, size = run.recipe.seed, run.recipe.evaluate.batch_size
    methods = [*text_methods(run.model, contexts, seed)[:2]]
    methods.append(cut_methods(run.model, run.compressor, [Budget(ratio)], seed)[0])
    found = []
    for method in methods:
        given: list[str] = []
        for start in range(0, len(examples), size):
            part = slice(start, start + size)
            questions = [one.question for one in examples[part]]
            given += run.layout.answer(run.model, method.write(contexts[part]), questions)
        label = f"{method.name} {method.budget.label}" if method.budget else method.name
        found.append({"arm": label, **plain(_scores(given, examples).to_json())})
    return found


def require_full_text(base: CompressRecipe, decoder: str, examples: Sequence[QAExample]) -> None:
    """Make sure that a decoder which was trained for this answers from the full text: else no arm says anything.

    Raises:
        InlayError: It does not.
    """
    if base.base is None:
        return
    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=base.decoder.dtype).eval()
    layout = base.layout.bind(AutoTokenizer.from_pretrained(decoder))
    found = full_text_exact_match(model, layout, list(examples))
    if found < FULL_TEXT_ANSWERS:
        raise InlayError(
            f"the decoder in {decoder} answers {100 * found:.1f} % from full text, and arms are compared from "
            f"{100 * FULL_TEXT_ANSWERS:.0f} % on; give base.stages more max_steps and delete it"
        )


def table(results: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Exact match and F1 of each arm, with what it answers to the first question."""
    rows = []
    for one in results:
        example = next(iter(one.get("examples", [])), None)
        answer = "" if example is None else textwrap.shorten(example["given"], 40, placeholder=" …") or "(nothing)"
        rows.append([one["arm"], _share(one["exact_match"]), _share(one["f1"]), answer])
    wanted = next((one["examples"][0]["answers"] for one in results if one.get("examples")), [""])
    heading = f"for “{(wanted or ['(nothing)'])[0]}”"
    return Table(["", "exact match", "F1", heading], rows, title, ["left", "right", "right", "left"])


def _scores(given: Sequence[str], examples: Sequence[QAExample]) -> SquadScores:
    return squad_scores(given, [one.answers for one in examples], contexts=[one.context for one in examples])


def _finished(directory: Path, recipe: CompressRecipe) -> bool:
    return (directory / DONE).is_file() and load_compress_recipe(directory / RECIPE) == recipe


def _share(interval: Mapping[str, float | None]) -> str:
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    assert mean is not None
    return f"{100 * mean:.1f}" + (
        f" ({100 * low:.1f}–{100 * high:.1f})" if low is not None and high is not None else ""
    )


def study(
    base: CompressRecipe,
    directory: Path,
    console: Console,
    *,
    steps: int,
    ratio: int = 4,
    questions: int | None = None,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Run all arms, or those named in ``only`` (and what they take their weights from), and print their tables."""
    groups = {
        "Faults taken out one after the other": cumulative(base),
        "Objectives beside the answer's": objectives(base),
        "One fault alone": alone(base),
    }
    arms = [arm for group in groups.values() for arm in group]
    chosen = [arm for arm in arms if not only or arm.name in only]
    needed = {arm.weights_of for arm in chosen}
    todo = [arm for arm in arms if arm in chosen or arm.name in needed]
    directory.mkdir(parents=True, exist_ok=True)
    decoder = keep_decoder(base, directory / "decoder", console)
    examples = load_qa(base.data).eval[: questions or base.evaluate.examples]
    require_full_text(base, decoder, examples)
    results: dict[str, dict[str, Any]] = {}
    for number, arm in enumerate(todo, 1):
        console.print(f"[bold]{number} of {len(todo)}: {arm.name}[/]", highlight=False)
        place = directory / slug(arm.name)
        trained_in = None if arm.weights_of is None else directory / slug(arm.weights_of)
        recipe = recipe_of(arm, base, decoder, steps, ratio)
        results[arm.name] = run_arm(arm, recipe, place, examples, console, ratio, trained_in)
    any_run = load_compress_run(directory / slug(next(arm.weights_of or arm.name for arm in reversed(todo))))
    bound = bounds(replace(any_run, layout=base.layout.bind(any_run.tokenizer)), examples, ratio)
    about = f"{len(examples):,} questions, {steps:,} steps an arm, {ratio} tokens a slot, in per cent"
    content: dict[str, Any] = {"recipe": dump_recipe(base), "steps": steps, "ratio": ratio, "bounds": bound}
    for title, group in groups.items():
        found = [results[arm.name] for arm in group if arm.name in results]
        content[title] = found
        if found:
            console.print(rich_table(table([*bound, *found], f"{title}: {about}")))
    console.print(f"figures: {write_json(content, directory / 'ablation.json')}")
    return content


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipe", type=Path, nargs="?", default=DEFAULT, help="of a compression run; the terse facts' if not given"
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value, e.g. trainer.learning_rate=1e-3")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each arm")
    parser.add_argument("--ratio", type=int, default=4, help="tokens per slot")
    parser.add_argument("--questions", type=int, help="held-out questions; the recipe's evaluate.examples if not given")
    parser.add_argument("--runs", type=Path, default=Path("runs/seed003"), help="where the arms are kept")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms alone")
    parser.add_argument("--list", action="store_true", help="name the arms and stop")
    given = parser.parse_args(arguments)
    logging.disable_progress_bar()  # of loading and saving; the Trainer's stays
    try:
        base = load_compress_recipe(given.recipe, given.overrides)
        arms = [arm.name for arm in (*cumulative(base), *objectives(base), *alone(base))]
        if given.list:
            print("\n".join(arms))
            return
        if unknown := [name for name in given.only if name not in arms]:
            parser.error(f"no arm is called {unknown[0]!r}; there are: {', '.join(arms)}")
        study(
            base,
            given.runs,
            Console(),
            steps=given.steps,
            ratio=given.ratio,
            questions=given.questions,
            only=given.only,
        )
    except (InlayError, DataError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
