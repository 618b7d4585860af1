"""Generated facts can be answered from their context alone, from one place in it, and by no memory of the names."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from inlay.data import DataError
from inlay.data.facts import FactsDataset, facts_context, facts_tokenizer
from inlay.data.facts_language import LANGUAGES, Language
from inlay.data.facts_words import TRADES, YEARS
from inlay.data.qa import QAExample
from inlay.data.qa_config import FactsConfig
from inlay.data.sources import Split


def config(**fields: Any) -> FactsConfig:
    return FactsConfig.model_validate({"source": "facts", **fields})


ENGLISH = config(
    vocabulary="english",
    facts=16,
    facts_per_entity=3,
    phrasings=2,
    distractors=12,
    answer_lengths={1: 1, 2: 1, 3: 2, 7: 1, 40: 1},
    questions=16,
)
SMALL = config(distractors=6, questions=8, shared_names=True)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.)\s", text)


def times_stated(answer: str, context: str) -> int:
    looked_for, text = words(answer), words(context)
    return sum(text[place : place + len(looked_for)] == looked_for for place in range(len(text)))


def names_in(text: str, language: Language) -> set[str]:
    """Every pair of a head and a tail that stand side by side, in the order of their kind."""
    tails, found = {tail.lower() for tail in language.tails}, set()
    heads = {head.lower(): kind for kind in language.kinds for head in kind.heads}
    for first, second in pairwise(words(text)):
        head, tail = (first, second) if second in tails else (second, first)
        # A head after a tail is a name only where the kind says so: "ashford port" is two names that meet.
        if tail in tails and head in heads and (heads[head].name.index("{head}") == 0) == (head == first):
            found.add(f"{head} {tail}")
    return found


@st.composite
def configs(draw: st.DrawFn) -> FactsConfig:
    facts = draw(st.integers(1, 20))
    return config(
        vocabulary=draw(st.sampled_from(["small", "english", "pairs"])),
        facts=facts,
        facts_per_entity=draw(st.integers(1, 8)),
        shared_names=draw(st.booleans()),
        phrasings=draw(st.sampled_from([1, 2])),
        distractors=draw(st.integers(0, 15)),
        answer_lengths=draw(st.dictionaries(st.integers(1, 40), st.floats(0.1, 1), min_size=1, max_size=4)),
        questions=draw(st.integers(1, facts)),
        seed=draw(st.integers(0, 1000)),
    )


@given(config=configs(), number=st.integers(0, 10**6), split=st.sampled_from(["train", "eval"]))
def test_every_answer_is_stated_exactly_once(config: FactsConfig, number: int, split: Any) -> None:
    examples = facts_context(config, split, number)
    assert len(examples) == len({example.question for example in examples}) == config.questions
    for example in examples:
        assert example.context == examples[0].context
        (answer,) = example.answers
        assert len(answer.split()) in config.answer_lengths
        assert times_stated(answer, example.context) == 1
        assert times_stated(answer, example.question) == 0


@pytest.mark.parametrize("config", [SMALL, ENGLISH], ids=["small", "english"])
def test_a_question_names_one_entity_whose_sentence_holds_the_answer(config: FactsConfig) -> None:
    for number in range(50):
        for example in facts_context(config, "eval", number):
            (name,) = names_in(example.question, config.language)
            (sentence,) = [
                one for one in re.split(r"(?<=\.)\s", example.context) if times_stated(example.answers[0], one)
            ]
            assert names_in(sentence, config.language) == {name}


@pytest.mark.parametrize("config", [SMALL, ENGLISH], ids=["small", "english"])
def test_distractors_are_as_many_as_asked_for_and_hold_no_answer(config: FactsConfig) -> None:
    forms = [re.sub(r"\\\{\w+\\\}", ".+", re.escape(text)) for text in config.language.distractors]
    distractor = re.compile("|".join(forms))
    mentioned = 0
    for number in range(50):
        examples = facts_context(config, "train", number)
        told = sentences(examples[0].context)
        distractors = [sentence for sentence in told if distractor.fullmatch(sentence)]
        assert len(distractors) == config.distractors
        assert len(told) == config.facts + config.distractors
        for example in examples:
            assert not any(times_stated(example.answers[0], sentence) for sentence in distractors)
            name = names_in(example.question, config.language)
            mentioned += any(name <= names_in(sentence, config.language) for sentence in distractors)
    assert mentioned > 100  # some talk about the very entity that is asked about


@pytest.mark.parametrize("config", [SMALL, ENGLISH], ids=["small", "english"])
def test_train_and_test_are_told_of_other_entities_made_of_the_same_words(config: FactsConfig) -> None:
    told: dict[str, set[str]] = {}
    for split in ("train", "eval"):
        contexts = [facts_context(config, split, number)[0].context for number in range(600)]
        told[split] = set().union(*(names_in(context, config.language) for context in contexts))
    assert len(told["eval"]) > 100
    assert not told["train"] & told["eval"]
    parts = {part for name in told["train"] for part in name.split()}
    assert parts >= {part for name in told["eval"] for part in name.split()}


def test_the_names_kept_for_evaluation_do_not_depend_on_the_seed() -> None:
    first, second = (
        set().union(*(names_in(facts_context(one, split, n)[0].context, one.language) for n in range(500)))
        for one, split in ((config(seed=1), "train"), (config(seed=2), "eval"))
    )
    assert not first & second


def test_names_differ_in_both_parts_unless_they_are_to_share_one() -> None:
    shared = 0
    for sharing in (False, True):
        data = config(facts=6, facts_per_entity=1, shared_names=sharing, questions=1)
        for number in range(100):
            names = names_in(facts_context(data, "train", number)[0].context, data.language)
            assert len(names) == 6
            parts = Counter(part for name in names for part in name.split())
            if sharing:
                shared += parts.most_common(1)[0][1] > 1
            else:
                assert parts.most_common(1)[0][1] == 1
    assert shared > 80


def test_answers_have_the_lengths_asked_for() -> None:
    weights = {1: 1.0, 2: 2.0, 9: 1.0, 40: 1.0}
    for vocabulary in ("small", "english"):
        data = config(vocabulary=vocabulary, answer_lengths=weights, facts=10, questions=10)
        lengths = Counter(
            len(example.answers[0].split()) for n in range(200) for example in facts_context(data, "train", n)
        )
        for length, weight in weights.items():
            assert lengths[length] / 2000 == pytest.approx(weight / 5, abs=0.04)


def test_a_curriculum_step_changes_the_number_of_facts_and_nothing_else() -> None:
    data = config(facts=8, questions=4)
    steps = [data.with_facts(facts) for facts in (2, 3, 8)]
    assert [(step.facts, step.questions) for step in steps] == [(2, 2), (3, 3), (8, 4)]
    assert steps[-1] == data
    assert len({facts_tokenizer(step).backend_tokenizer.to_str() for step in steps}) == 1
    for step in steps:
        assert facts_context(step, "train", 0)[0].context.count(".") == step.facts


@pytest.mark.parametrize("config", [SMALL, ENGLISH], ids=["small", "english"])
def test_the_tokenizer_knows_every_word_and_gives_answers_back(config: FactsConfig) -> None:
    tokenizer = facts_tokenizer(config)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<bos>", "<eos>", "<unk>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token_id not in tokenizer("Context: Question: Answer: ")["input_ids"]
    for example in (one for n in range(40) for one in facts_context(config, ("train", "eval")[n % 2], n)[:4]):
        for text in (example.context, example.question):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids).split() == re.findall(r"\w+|[.,?]", text)
        (answer,) = example.answers
        ids = tokenizer(answer)["input_ids"]
        assert len(ids) == len(answer.split())
        assert tokenizer.decode(ids) == answer


def test_the_small_vocabulary_is_small_and_shrinks_with_its_knobs() -> None:
    assert 300 <= len(facts_tokenizer(config())) <= 600
    less = config(tails=20, nouns=40, adjectives=10)
    assert len(facts_tokenizer(config())) - len(facts_tokenizer(less)) == 28 + 80 + 30
    assert len(facts_tokenizer(config(vocabulary="english"))) > 1000


@pytest.mark.parametrize(
    ("config", "digest"), [(SMALL, "ebaeb382b5525b8e"), (ENGLISH, "37c34f4e54245c8d")], ids=["small", "english"]
)
def test_examples_are_the_same_in_every_process_and_on_every_machine(config: FactsConfig, digest: str) -> None:
    """These digests are of another process; one changes only where the data set itself is changed."""
    places = [divmod(index, config.questions) for index in (0, 17, 5000)]
    splits: tuple[Split, ...] = ("train", "eval")
    examples = [facts_context(config, split, context)[question] for split in splits for context, question in places]
    assert hashlib.sha256(repr(examples).encode()).hexdigest()[:16] == digest


def test_examples_differ_by_seed_split_and_number() -> None:
    contexts = {
        facts_context(config(seed=seed), split, number)[0].context
        for seed in (0, 1)
        for split in ("train", "eval")
        for number in range(50)
    }
    assert len(contexts) == 200


def test_a_data_set_gives_examples_by_index_with_ids_of_their_own() -> None:
    data = FactsDataset(config(eval_examples=10, questions=4), "eval")
    examples = list(data)
    assert len(examples) == len(data) == 10
    assert len({example.id for example in examples}) == 10
    assert len({example.context for example in examples}) == 3
    assert examples[5] == facts_context(data.config, "eval", 1)[1] == data[-5]
    assert data[2:4] == examples[2:4]
    assert isinstance(data[0], QAExample)
    with pytest.raises(IndexError, match="example 10 of 10"):
        data[10]


@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)
def test_words_that_make_an_answer_unique_are_nowhere_else_in_the_language(language: Language) -> None:
    own = {*language.nouns, *YEARS, *TRADES}
    assert len(own) == len(language.nouns) + len(YEARS) + len(TRADES)
    attributes = [attribute for kind in language.kinds for attribute in kind.attributes]
    texts = [text for attribute in attributes for text in (*attribute.statements, attribute.question)]
    elsewhere = {*language.adjectives, *language.joints, *language.tails}
    elsewhere.update(word for text in (*texts, *language.distractors) for word in re.findall(r"\w+", text))
    elsewhere.update(head for kind in language.kinds for head in kind.heads)
    assert not own & {word.lower() for word in elsewhere}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"questions": 9}, "9 questions need as many facts; facts is 8"),
        ({"nouns": 20}, "8 facts need 28 nouns, so that no answer is stated twice; there are 20"),
        ({"nouns": 500}, "nouns is 500; vocabulary: small has 120"),
        ({"tails": 4}, "a context has 4 entities; names differ in both their parts for at most 2"),
        ({"answer_lengths": {41: 1}}, "answer_lengths has 41: 1.0; lengths are 1 to 40 words, weights above 0"),
        ({"answer_lengths": {2: 0}}, "answer_lengths has 2: 0.0"),
        ({"fact": 3}, "Extra inputs are not permitted"),
    ],
)
def test_a_config_that_cannot_be_told_is_refused_with_the_fix(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        config(**fields)


def test_too_few_names_of_a_split_are_an_error_and_no_endless_search() -> None:
    with pytest.raises(DataError, match="the eval split has names of"):
        facts_context(config(tails=8, eval_fraction=0.001), "eval", 0)
