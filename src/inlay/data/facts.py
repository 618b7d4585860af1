"""Generated facts: questions about people, places and things that no model can know by heart.

    the gift of clara ashford is old lanterns. the emblem of port wexton is bells. ...
    what is the emblem of port wexton?   bells

Names are pairs of words, and some of the pairs are kept for evaluation: every word is met in training, but an
evaluation entity never. Each value holds a noun, year or trade that occurs nowhere else in its context, so every answer
is stated exactly once, and no distractor can hold it.

Examples are made when asked for, from (seed, split, number) alone: the same on every machine and in every process.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, NamedTuple, overload

import tokenizers

from inlay.data.facts_language import LANGUAGES, Attribute, Kind, Language
from inlay.data.facts_words import DAYS, MONTHS, TRADES, YEARS
from inlay.data.problems import DataError
from inlay.data.qa_config import SPARE_NOUNS, FactsConfig
from inlay.data.qa_sources import QAExample
from inlay.data.sources import Split, is_held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PADDING, BEGIN, END, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
_PROMPT_WORDS = ("Context", "Question", "Answer", ":")
_WORD = re.compile(r"\w+|[^\w\s]")


class FactsDataset(Sequence[QAExample]):
    """Facts by index, made when asked for; the questions about one context are neighbours.

    Args:
        config: difficulty, sizes and seed.
        split: "train" or "eval": other contexts, about other entities.
    """

    def __init__(self, config: FactsConfig, split: Split) -> None:
        self.config = config
        self.split = split
        self._made: tuple[int, tuple[QAExample, ...]] | None = None

    def __len__(self) -> int:
        return self.config.train_examples if self.split == "train" else self.config.eval_examples

    @overload
    def __getitem__(self, index: int) -> QAExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[QAExample]: ...
    def __getitem__(self, index: int | slice) -> QAExample | list[QAExample]:
        """Example `index`, or a list. Raises `IndexError` outside 0..len-1 (negative ones count from the end)."""
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        context, question = divmod(index % len(self), self.config.questions)
        if self._made is None or self._made[0] != context:  # neighbours share their context: make it once for all
            self._made = context, facts_context(self.config, self.split, context)
        return self._made[1][question]


def facts_context(config: FactsConfig, split: Split, number: int) -> tuple[QAExample, ...]:
    """The examples of context `number`, one per question.

    Raises:
        DataError: the split has too few names: `eval_fraction` is too near to 0 or 1.
    """
    # Seeded by text, which is hashed alike in every process, whatever PYTHONHASHSEED says.
    rng = random.Random(f"{config.seed} {split} {number}")
    language = config.language
    values = _Values(language, rng, config.facts)
    lengths = rng.choices([*config.answer_lengths], [*config.answer_lengths.values()], k=config.facts)

    entities = _draw_entities(config, split, rng)
    paragraphs: list[list[str]] = []
    told: list[tuple[str, str]] = []
    for first, entity in zip(range(0, config.facts, config.facts_per_entity), entities, strict=True):
        paragraphs.append([])
        for attribute, value in _draw_facts(entity.kind, lengths[first : first + config.facts_per_entity], values, rng):
            statement = rng.choice(attribute.statements[: config.phrasings])
            paragraphs[-1].append(statement.format(name=entity.name, value=value))
            told.append((attribute.question.format(name=entity.name), value))
    sentences = rng.sample(language.distractors, len(language.distractors))
    for index in range(config.distractors):
        place = rng.randrange(len(entities))
        sentence = sentences[index % len(sentences)].format(name=entities[place].name, phrase=values.filler())
        paragraphs[place].insert(rng.randint(0, len(paragraphs[place])), sentence)

    context = "\n".join(" ".join(map(language.sentence, paragraph)) for paragraph in paragraphs)
    return tuple(
        QAExample(f"facts-{split}-{number}-{index}", context, language.sentence(question), (answer,))
        for index, (question, answer) in enumerate(rng.sample(told, config.questions))
    )


def facts_tokenizer(config: FactsConfig) -> PreTrainedTokenizerFast:
    """One token per word of everything that `config` can say, of both splits; only the vocabulary's sizes matter.

    Answers come back from their tokens unchanged. The special tokens are ``<pad>``, ``<bos>``, ``<eos>`` and ``<unk>``,
    none of which is put around a text; ``Context``, ``Question``, ``Answer`` and the colon are there for prompts.
    """
    from transformers import PreTrainedTokenizerFast

    special = (PADDING, BEGIN, END, UNKNOWN)
    ids = {word: index for index, word in enumerate((*special, *sorted(_vocabulary(config.language))))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


class _Entity(NamedTuple):
    kind: Kind
    head: str
    tail: str
    name: str


class _Values:
    """Draws the values of one context, of which no two share the word that makes them unique."""

    def __init__(self, language: Language, rng: random.Random, facts: int) -> None:
        self._language = language
        self._rng = rng
        nouns = rng.sample(language.nouns, facts + SPARE_NOUNS)
        self._own, self._shared = nouns[:facts], nouns[facts:]
        self._used: dict[tuple[str, ...], set[str]] = {YEARS: set(), TRADES: set()}

    def fits(self, attribute: Attribute, length: int) -> bool:
        """Whether `attribute` can have a value of `length` words that is not used up."""
        if attribute.values == "phrase":
            return True
        pool = TRADES if attribute.values == "trade" else YEARS
        return length == (3 if attribute.values == "date" else 1) and len(self._used[pool]) < len(pool)

    def draw(self, attribute: Attribute, length: int) -> str:
        """A value of `length` words."""
        match attribute.values:
            case "phrase":
                return self._phrase(length, self._own.pop())
            case "year":
                return self._unused(YEARS)
            case "trade":
                return self._unused(TRADES)
            case "date":
                return f"{self._rng.choice(DAYS)} {self._rng.choice(MONTHS)} {self._unused(YEARS)}"

    def filler(self) -> str:
        """A phrase of two words, for distractors, which is no answer nor part of one."""
        return self._phrase(2, self._rng.choice(self._shared))

    def _unused(self, pool: tuple[str, ...]) -> str:
        used = self._used[pool]
        while (word := self._rng.choice(pool)) in used:
            pass
        used.add(word)
        return word

    def _phrase(self, length: int, noun: str) -> str:
        """Parts of one to three words, a noun under its adjectives, tied by joints; `noun` is one of the nouns."""
        sizes = [*_part_sizes(length, self._rng)]
        nouns = self._rng.sample(self._shared, len(sizes))
        nouns[self._rng.randrange(len(sizes))] = noun
        words: list[str] = []
        for size, last in zip(sizes, nouns, strict=True):
            if words:
                words.append(self._rng.choice(self._language.joints))
            words += [*self._rng.sample(self._language.adjectives, size - 1), last]
        return " ".join(words)


def _part_sizes(length: int, rng: random.Random) -> Iterator[int]:
    """Sizes (1 to 3) of parts that fill `length` words with a joint between each two."""
    while length > 0:
        # What a part leaves is nothing, or a joint and at least one word.
        size = rng.choice([size for size in (1, 2, 3) if length == size or length >= size + 2])
        yield size
        length -= size + 1


def _draw_entities(config: FactsConfig, split: Split, rng: random.Random) -> list[_Entity]:
    known, by_tail = _split_entities(config.vocabulary, config.tails, config.eval_fraction, split)
    if len(by_tail) < 2 * config.entities:
        raise DataError(
            f"the {split} split has names of {len(by_tail)} tails; {config.entities} entities in a context need "
            f"{2 * config.entities}: bring eval_fraction ({config.eval_fraction}) nearer 0.5, or raise tails"
        )
    drawn: list[_Entity] = []
    parts: set[str] = set()
    while len(drawn) < config.entities:
        share = config.shared_names and drawn and rng.random() < 0.5
        entity = rng.choice(by_tail[rng.choice(drawn).tail] if share else known)
        if entity in drawn or not (config.shared_names or parts.isdisjoint((entity.head, entity.tail))):
            continue
        parts.update((entity.head, entity.tail))
        drawn.append(entity)
    return drawn


@cache
def _split_entities(
    vocabulary: str, tails: int | None, eval_fraction: float, split: Split
) -> tuple[list[_Entity], dict[str, list[_Entity]]]:
    """All entities of a split, and the same by the tail of their names."""
    language = LANGUAGES[vocabulary]
    known, by_tail = [], defaultdict(list)
    for kind, tail in product(language.kinds, language.tails[:tails]):
        for head in kind.heads:
            name = kind.name.format(head=head, tail=tail)
            if is_held_out(name, eval_fraction) == (split == "eval"):
                entity = _Entity(kind, head, tail, name)
                known.append(entity)
                by_tail[tail].append(entity)
    return known, dict(by_tail)


def _draw_facts(
    kind: Kind, lengths: Sequence[int], values: _Values, rng: random.Random
) -> Iterator[tuple[Attribute, str]]:
    left = [*kind.attributes]
    for length in lengths:
        attribute = rng.choice([one for one in left if values.fits(one, length)])
        left.remove(attribute)
        yield attribute, values.draw(attribute, length)


def _vocabulary(language: Language) -> set[str]:
    """Every word and punctuation mark that `language` has."""
    attributes = [attribute for kind in language.kinds for attribute in kind.attributes]
    questions = [text for attribute in attributes for text in (*attribute.statements, attribute.question)]
    templates = [*questions, *language.distractors, *(kind.name for kind in language.kinds)]
    plain = [re.sub(r"\{\w+\}", " ", template).strip() for template in templates]
    words = {word for text in plain for word in _WORD.findall(f"{text} {language.sentence(text)}")}
    for group in (language.nouns, language.adjectives, language.joints, language.tails, _PROMPT_WORDS):
        words.update(group)
    words.update(head for kind in language.kinds for head in kind.heads)
    for values, pools in (("year", (YEARS,)), ("trade", (TRADES,)), ("date", (YEARS, DAYS, MONTHS))):
        if any(attribute.values == values for attribute in attributes):
            words.update(*pools)
    return words
