"""Scores are the official scripts', digit for digit, and the interval holds the true mean.

`squad_cases.json` holds our own strings with the scores that evaluate-v1.1.py and the v2.0 rules of transformers 4.57
(`data/metrics/squad_metrics.py`) gave them; 20,000 such strings agreed when the file was made.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from inlay.evaluate import EvaluationError
from inlay.evaluate.squad import Version, exact_match, f1, normalize_answer, squad_scores

TRUTH = json.loads((Path(__file__).parent / "squad_cases.json").read_text())
CASES = TRUTH["cases"]


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Quick,  brown\tFox.", "quick brown fox"),
        ("e.g., a U.S. port", "eg us port"),  # punctuation goes first: "U.S." is one word, and "a" an article
        ("a-the", "athe"),  # for the same reason this is no article
        ("An apple a day", "apple day"),
        ("theory of another", "theory of another"),
        ("1,024 (about)", "1024 about"),
        ("“quoted” — ÉTÉ", "“quoted” — été"),  # only ASCII punctuation is deleted
        ("\u00a0the\n", ""),
        ("", ""),
    ],
)
def test_normalisation_worked_by_hand(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "expected"),
    [
        ("the Denver port", ["Denver Port"], True, 1.0),
        ("port", ["old port"], False, 2 / 3),  # precision 1, recall 1/2
        ("old old port", ["old port"], False, 4 / 5),  # 2 of 3 words, 2 of 2: a set would say 1
        ("port port port", ["port"], False, 1 / 2),
        ("port old", ["old port"], False, 1.0),  # F1 does not know word order
        ("new port", ["old harbour", "a port", "new"], False, 2 / 3),  # the best reference counts
        ("harbour", ["old port"], False, 0.0),
        ("", ["old port"], False, 0.0),
    ],
)
@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_scores_worked_by_hand(
    version: Version, prediction: str, references: list[str], exact: bool, expected: float
) -> None:
    assert exact_match(prediction, references, version) is exact
    assert f1(prediction, references, version) == pytest.approx(expected, abs=1e-12)


def test_silence_is_right_for_an_unanswerable_question_and_nothing_else_is() -> None:
    assert exact_match("", []) is True
    assert f1(" the. ", []) == 1.0
    assert exact_match("harbour", []) is False
    assert f1("harbour", []) == 0.0


def test_where_nothing_is_left_the_versions_differ_as_published() -> None:
    assert exact_match("the", ["a"], "1.1") is True
    assert f1("the", ["a"], "1.1") == 0.0
    assert f1("the", ["a"], "2.0") == 1.0
    assert exact_match("", ["the", "port"], "1.1") is True
    assert exact_match("", ["the", "port"], "2.0") is False  # v2 drops "the", and "port" is left


@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_the_official_scores_of_awkward_strings(version: Version) -> None:
    scored = [case for case in CASES if case[version] is not None]
    assert len(scored) >= 60
    for case in scored:
        ours = [exact_match(case["prediction"], case["references"], version)]
        ours.append(f1(case["prediction"], case["references"], version))
        assert ours == [case[version][0], pytest.approx(case[version][1], abs=1e-6)], case


def test_the_official_means_over_all_answerable_and_unanswerable_questions() -> None:
    scores = squad_scores([case["prediction"] for case in CASES], [case["references"] for case in CASES])
    truth = TRUTH["aggregate 2.0"]
    for part, prefix in ((scores.overall, ""), (scores.answerable, "HasAns_"), (scores.unanswerable, "NoAns_")):
        assert part is not None
        assert part.questions == truth[f"{prefix}total"]
        assert part.exact_match.mean == pytest.approx(truth[f"{prefix}exact"], abs=1e-6)
        assert part.f1.mean == pytest.approx(truth[f"{prefix}f1"], abs=1e-6)


def test_json_holds_the_means_and_no_single_questions() -> None:
    content = squad_scores(["old port", "port"], [["old port"], ["old port"]]).to_json()
    assert json.loads(json.dumps(content)) == content
    assert content.keys() == {"version", "questions", "exact_match", "f1", "answerable", "unanswerable"}
    assert content["exact_match"]["mean"] == 0.5
    assert content["f1"]["mean"] == pytest.approx(5 / 6)
    assert content["unanswerable"] is None


@pytest.mark.parametrize(("contexts", "asked", "mean"), [(60, 1, 0.03), (30, 1, 0.5), (8, 5, 0.5), (30, 3, 0.3)])
def test_the_interval_holds_the_true_mean_in_95_of_100_experiments(contexts: int, asked: int, mean: float) -> None:
    rng = np.random.default_rng(0)
    about = np.repeat(np.arange(contexts), asked).tolist()
    held, experiments = 0, 200
    for _ in range(experiments):
        # Questions of one context share its difficulty, so together they tell less than as many of their own.
        difficulty = rng.beta(2 * mean, 2 * (1 - mean), contexts) if asked > 1 else np.full(contexts, mean)
        right = rng.random(len(about)) < np.repeat(difficulty, asked)
        answers = ["port" if one else "harbour" for one in right]
        interval = squad_scores(answers, [["port"]] * len(about), contexts=about).overall.exact_match
        assert 0 <= interval.low <= interval.mean <= interval.high <= 1
        held += interval.low <= mean <= interval.high
    assert held / experiments == pytest.approx(0.95, abs=0.04)


def test_perfect_answers_to_few_questions_leave_room_for_doubt() -> None:
    interval = squad_scores(["port"] * 20, [["port"]] * 20).overall.exact_match
    assert interval.high == 1
    assert interval.low == pytest.approx(0.839, abs=1e-3)  # Wilson, 20 of 20: n / (n + z²)
    one_context = squad_scores(["port"] * 20, [["port"]] * 20, contexts=["same"] * 20).overall.exact_match
    assert np.isnan(one_context.low)


def test_a_gain_is_paired_question_by_question() -> None:
    references = [["old port"]] * 6
    better = squad_scores(["old port", "port", "old port", "port", "old port", "port"], references)
    worse = squad_scores(["old port", "port", "old port", "port", "port", "harbour"], references)
    gain = better.gain(worse)
    assert gain.exact_match.mean == pytest.approx(1 / 6)
    assert gain.f1.mean == pytest.approx((1 / 3 + 2 / 3) / 6)
    # By hand: differences 0 0 0 0 0 1, standard deviation 0.4082, t(5) = 2.5706.
    assert gain.exact_match.high - gain.exact_match.mean == pytest.approx(2.5706 * 0.408248 / np.sqrt(6), abs=1e-4)
    assert better.gain(better).f1.high == 0


def test_scores_of_other_questions_are_not_compared() -> None:
    ours = squad_scores(["port"], [["port"]])
    with pytest.raises(EvaluationError, match="same questions"):
        ours.gain(squad_scores(["port"], [["harbour"]]))
    with pytest.raises(EvaluationError, match="same questions"):
        ours.gain(squad_scores(["port"], [["port"]], version="2.0"))


def test_what_cannot_be_scored_is_refused_with_the_fix() -> None:
    with pytest.raises(EvaluationError, match="put it in a list"):
        exact_match("port", "port")
    with pytest.raises(EvaluationError, match=r"use version 2\.0"):
        f1("", [], "1.1")
    with pytest.raises(EvaluationError, match="1 predictions for 2 questions"):
        squad_scores(["port"], [["port"], ["port"]])
    with pytest.raises(EvaluationError, match="at least one question"):
        squad_scores([], [])


def test_the_data_say_which_rules_they_are_scored_by() -> None:
    answered = squad_scores(["the", "port"], [["a"], ["port"]])
    assert (answered.version, answered.exact_match, answered.f1) == ("1.1", 1.0, 0.5)
    with_an_unanswerable = squad_scores(["the", "port", ""], [["a"], ["port"], []])
    assert (with_an_unanswerable.version, with_an_unanswerable.f1) == ("2.0", 1.0)
