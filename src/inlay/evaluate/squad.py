"""Exact match and F1, as the official SQuAD scripts score them (evaluate-v1.1.py and evaluate-v2.0.py).

Both texts are normalised: lower case, ASCII punctuation deleted, the articles a, an and the replaced by a space, white
space squeezed; in this order, so "e.g., a U.S. port" becomes "eg us port". Exact match compares what is left; F1
compares its words as *multisets* (a word said twice counts twice):

    precision = common / words of the prediction        recall = common / words of the reference
    F1 = 2 · precision · recall / (precision + recall)

A question has the score of its best reference, F1 and exact match each by itself. The versions differ only where
nothing is left after normalising: v2 counts two such texts as equal (F1 1; v1.1 says 0, though it calls them an exact
match), and drops such references, so that a question without others is answered right by saying nothing.

The scripts print per cent; here every score is 0 to 1. Questions about one context are no independent measurements:
the 95 % intervals are from the spread between contexts.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from inlay.evaluate.intervals import Interval, mean_interval, numbered, paired_interval
from inlay.evaluate.scoring import EvaluationError

Version: TypeAlias = Literal["1.1", "2.0"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class ScoreIntervals:
    """Exact match and F1 of some questions, or how much better one set of answers is than another.

    Attributes:
        questions: How many.
        exact_match: Mean, 0 to 1 (a difference: -1 to 1), with its 95 % interval.
        f1: Likewise.
    """

    questions: int
    exact_match: Interval
    f1: Interval

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {"questions": self.questions, "exact_match": self.exact_match.to_json(), "f1": self.f1.to_json()}


@dataclass(frozen=True)
class SquadScores:
    """What :func:`squad_scores` measured.

    Attributes:
        version: Rules scored by.
        overall: Over all questions.
        answerable: Over the questions with a reference; None if there is none.
        unanswerable: Over the questions without; None if there is none.
        exact_matches: Exact match of every question, in the order given.
        f1s: F1 of every question.
        contexts: Number of the context of every question; equal numbers, one context.
        reference_hash: Of references and contexts: scores with the same one are of the same questions.
    """

    version: Version
    overall: ScoreIntervals
    answerable: ScoreIntervals | None
    unanswerable: ScoreIntervals | None
    exact_matches: tuple[bool, ...] = field(repr=False)
    f1s: tuple[float, ...] = field(repr=False)
    contexts: tuple[int, ...] = field(repr=False)
    reference_hash: str = field(repr=False)

    @property
    def exact_match(self) -> float:
        """Exact match over all questions, 0 to 1."""
        return self.overall.exact_match.mean

    @property
    def f1(self) -> float:
        """F1 over all questions, 0 to 1."""
        return self.overall.f1.mean

    def gain(self, baseline: SquadScores) -> ScoreIntervals:
        """This minus ``baseline`` on the same questions, with paired intervals.

        Raises:
            EvaluationError: They are scores of other questions, or by other rules.
        """
        if (self.reference_hash, self.version) != (baseline.reference_hash, baseline.version):
            raise EvaluationError(
                f"scores of {len(self.f1s)} questions by v{self.version} cannot be compared with those of "
                f"{len(baseline.f1s)} by v{baseline.version}: score both on the same questions in the same order"
            )
        contexts = np.array(self.contexts)
        counts = np.bincount(contexts)

        def paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
            difference = np.array(ours, dtype=np.float64) - np.array(theirs, dtype=np.float64)
            return paired_interval(np.bincount(contexts, difference).astype(np.float64), counts)

        return ScoreIntervals(
            len(contexts), paired(self.exact_matches, baseline.exact_matches), paired(self.f1s, baseline.f1s)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain types; without the single questions."""
        return {
            "version": self.version,
            **self.overall.to_json(),
            "answerable": self.answerable.to_json() if self.answerable else None,
            "unanswerable": self.unanswerable.to_json() if self.unanswerable else None,
        }


def normalize_answer(text: str) -> str:
    """``text`` as it is compared: lower case, without punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str], version: Version = "2.0") -> bool:
    """Whether ``prediction`` equals one of the ``references`` after normalisation.

    Args:
        prediction: The answer given; empty for "this has no answer".
        references: Right answers; none for an unanswerable question, which v1.1 does not know.
        version: Rules to score by.

    Raises:
        EvaluationError: ``references`` is a single string, or has no answer with v1.1.
    """
    given = normalize_answer(prediction)
    return any(given == wanted for wanted in _normalized(references, version))


def f1(prediction: str, references: Sequence[str], version: Version = "2.0") -> float:
    """F1 of the words of ``prediction`` against the best of the ``references``, 0 to 1.

    Arguments and errors as in :func:`exact_match`.
    """
    given = normalize_answer(prediction).split()
    return max(_word_f1(given, wanted.split(), version) for wanted in _normalized(references, version))


def squad_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    contexts: Sequence[Hashable] | None = None,
    version: Version | None = None,
) -> SquadScores:
    """Score one prediction per question.

    Args:
        predictions: ``[questions]`` answers given.
        references: ``[questions]`` right answers of each, as :func:`exact_match` takes them.
        contexts: ``[questions]`` what each is asked about: equal values (a text, an id), one context. Without, every
            question counts as an independent measurement.
        version: Rules to score by. When not given, those of the data: 2.0 if a question has no references, else 1.1.

    Raises:
        EvaluationError: The lengths differ, there is no question, or a question's references are no list of answers.
    """
    lengths = {len(predictions), len(references), len(predictions if contexts is None else contexts)}
    if len(lengths) > 1 or not predictions:
        about = "" if contexts is None else f" about {len(contexts)} contexts"
        raise EvaluationError(
            f"{len(predictions)} predictions for {len(references)} questions{about}: "
            "give one prediction, and one context, per question, and at least one question"
        )
    if version is None:
        version = "1.1" if all(references) else "2.0"
    exact = [exact_match(*pair, version) for pair in zip(predictions, references, strict=True)]
    f1s = [f1(*pair, version) for pair in zip(predictions, references, strict=True)]
    groups = numbered(range(len(predictions)) if contexts is None else contexts)
    answerable = np.array([len(answers) > 0 for answers in references])

    def mean(chosen: np.ndarray) -> ScoreIntervals | None:
        if not chosen.any():
            return None
        where = groups[chosen]
        return ScoreIntervals(
            int(chosen.sum()),
            mean_interval(np.array(exact, dtype=np.float64)[chosen], where),
            mean_interval(np.array(f1s)[chosen], where),
        )

    overall = mean(np.ones_like(answerable))
    assert overall is not None
    return SquadScores(
        version=version,
        overall=overall,
        answerable=mean(answerable),
        unanswerable=mean(~answerable),
        exact_matches=tuple(exact),
        f1s=tuple(f1s),
        contexts=tuple(groups.tolist()),
        reference_hash=hashlib.sha256(repr([list(map(tuple, references)), groups.tolist()]).encode()).hexdigest()[:16],
    )


def with_silence(predictions: Sequence[str], references: Sequence[Sequence[str]], unanswerable: str) -> list[str]:
    """The predictions as SQuAD counts them: where some questions have no answer, saying so is saying nothing.

    Args:
        predictions: ``[questions]`` answers given.
        references: ``[questions]`` right answers of each.
        unanswerable: How a decoder was taught to say that there is no answer.
    """
    if all(references):
        return list(predictions)
    nothing = normalize_answer(unanswerable)
    return ["" if normalize_answer(one) == nothing else one for one in predictions]


def _normalized(references: Sequence[str], version: Version) -> list[str]:
    if isinstance(references, str):
        raise EvaluationError(f"references are a list of answers; got the string {references!r}: put it in a list")
    if version == "1.1" and not references:
        raise EvaluationError("a question without references has no score by v1.1: use version 2.0")
    normalized = [normalize_answer(reference) for reference in references]
    if version == "2.0":
        return [reference for reference in normalized if reference] or [""]
    return normalized


def _word_f1(given: list[str], wanted: list[str], version: Version) -> float:
    if version == "2.0" and not (given and wanted):
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
