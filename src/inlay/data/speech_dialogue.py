"""What the two speakers of a made conversation say: small talk, and facts that are told early and asked for later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

_PLACES = ("hotel", "doctor", "garage", "bank", "office", "school", "library", "station", "bakery", "museum")
_PEOPLE = ("brother", "sister", "teacher", "neighbour", "doctor", "dentist", "uncle", "cousin")
_THINGS = ("garden", "cellar", "safe", "boat", "computer", "kitchen", "attic", "locker")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NAMES = ("anna", "bruno", "clara", "david", "emma", "felix", "greta", "henry", "ida", "jonas", "karin", "louis")
_SURNAMES = ("miller", "fisher", "baker", "carter", "hunter", "mason", "porter", "turner", "weaver", "cooper")
_COLOURS = ("red", "green", "blue", "yellow", "white", "black", "silver", "golden", "orange", "purple")
_ANIMALS = ("tiger", "rabbit", "donkey", "eagle", "monkey", "turtle", "lion", "pigeon", "camel", "spider")
_OBJECTS = ("window", "basket", "ladder", "candle", "hammer", "mirror", "bottle", "pillow", "button", "carpet")

_CATCHWORDS = {"the number": _PLACES, "the name": _PEOPLE, "the password": _THINGS}
"""What each kind of fact is about."""

_ACKNOWLEDGEMENTS = ("yes", "okay", "right", "sure")

_SMALL_TALK = (
    ("how was the weather today", "it rained all morning but now the sun is out"),
    ("what did you have for lunch", "i had some bread and cheese and a cup of tea"),
    ("did you sleep well last night", "yes thank you i slept very well"),
    ("where shall we go at the weekend", "we could walk along the river and take the boat"),
    ("is the train late again", "it should be here in a few minutes"),
    ("do you like this music", "i like it very much it reminds me of summer"),
    ("what are you reading at the moment", "a long story about a village in the mountains"),
    ("have you seen my keys", "i think they are on the table next to the window"),
    ("can you cook dinner tonight", "of course i will make rice with lemon and pepper"),
    ("who called this morning", "somebody from the shop they will call again tomorrow"),
    ("when does the meeting start", "it starts at half past three in the small room"),
    ("are you tired", "a little but i can go on for a while"),
)


@dataclass(frozen=True)
class Fact:
    """Something that is told once and asked for later, in the same words each time."""

    subject: str
    """As in "the number of the hotel"."""

    phrase: tuple[str, ...]
    """What is told of it: the words that return."""


@dataclass(frozen=True)
class Turn:
    """What one speaker says without a break."""

    main: bool
    """Whether it is the main speaker: Moshi."""

    words: tuple[str, ...]
    """What is said."""

    phrase: slice | None = None
    """Which of the words are a fact's phrase, said by the main speaker."""

    fact: Fact | None = None
    """The fact, where there is such a phrase."""


class Dialogue:
    """Writes one conversation, exchange by exchange, as time goes on.

    Args:
        generator: Draws everything.
        return_after: Seconds that lie between a phrase and its return at least.
    """

    asks, tells = 0.7, 0.6
    """How often a fact that is due is asked for, and how often, when none is, a new one is told."""

    def __init__(self, generator: np.random.Generator, *, return_after: float) -> None:
        self.generator = generator
        self.return_after = return_after
        self.said: dict[Fact, float] = {}
        self._facts = self._all_facts()

    def exchange(self, now: float) -> Iterator[Turn]:
        """The turns of the next exchange. `now`: seconds since the conversation's start."""
        due = [fact for fact, last in self.said.items() if now - last >= self.return_after]
        ask, tell = self.generator.random(2)
        if due and ask < self.asks:
            yield from self._ask(due[self.generator.integers(len(due))])
        elif tell < self.tells and (fact := next(self._facts, None)) is not None:
            yield from self._tell(fact)
        else:
            yield from self._chat()

    def acknowledgement(self) -> str:
        """A word to say while the other one speaks."""
        return _ACKNOWLEDGEMENTS[self.generator.integers(len(_ACKNOWLEDGEMENTS))]

    def note_said(self, fact: Fact, at: float) -> None:
        """Be told that the main speaker's saying of a fact ended at `at` seconds."""
        self.said[fact] = at

    def _tell(self, fact: Fact) -> Iterator[Turn]:
        yield Turn(False, ("please", "remember", *fact.subject.split(), "is", *fact.phrase))
        yield _statement(("i", "see"), fact)

    def _ask(self, fact: Fact) -> Iterator[Turn]:
        yield Turn(False, ("tell", "me", *fact.subject.split()))
        yield _statement(("of", "course"), fact)
        yield Turn(False, ("thank", "you"))

    def _chat(self) -> Iterator[Turn]:
        question, answer = _SMALL_TALK[self.generator.integers(len(_SMALL_TALK))]
        yield Turn(False, tuple(question.split()))
        yield Turn(True, tuple(answer.split()))

    def _all_facts(self) -> Iterator[Fact]:
        subjects = [
            f"{kind} of {'my' if kind == 'the name' else 'the'} {word}"
            for kind, words in _CATCHWORDS.items()
            for word in words
        ]
        for index in self.generator.permutation(len(subjects)):
            yield Fact(subjects[index], self._phrase(subjects[index]))

    def _phrase(self, subject: str) -> tuple[str, ...]:
        if subject.startswith("the number"):
            return tuple(self._draw(_DIGITS) for _ in range(4))
        if subject.startswith("the name"):
            return self._draw(_NAMES), self._draw(_SURNAMES)
        return self._draw(_COLOURS), self._draw(_ANIMALS), self._draw(_OBJECTS)

    def _draw(self, words: tuple[str, ...]) -> str:
        return words[self.generator.integers(len(words))]


class Quiz(Dialogue):
    """A conversation of catchwords: "hotel?" "hotel four seven two nine". It holds many more returns a minute, from
    which a model of a few layers learns within minutes what a phrase's return is."""

    asks, tells = 0.8, 1.0

    def _tell(self, fact: Fact) -> Iterator[Turn]:
        return self._ask(fact)

    def _ask(self, fact: Fact) -> Iterator[Turn]:
        yield Turn(False, (fact.subject,))
        yield Turn(True, (fact.subject, *fact.phrase), slice(1, 1 + len(fact.phrase)), fact)

    def _chat(self) -> Iterator[Turn]:
        yield Turn(False, (self.acknowledgement(),))

    def _all_facts(self) -> Iterator[Fact]:
        kinds = {word: kind for kind, words in _CATCHWORDS.items() for word in words}
        for word in self.generator.permutation(sorted(kinds)):
            yield Fact(str(word), self._phrase(kinds[word]))


Style = Literal["talk", "quiz"]
STYLES: dict[Style, type[Dialogue]] = {"talk": Dialogue, "quiz": Quiz}
"""Kinds of conversations."""


def _statement(opening: tuple[str, ...], fact: Fact) -> Turn:
    lead = (*opening, *fact.subject.split(), "is")
    return Turn(True, (*lead, *fact.phrase), slice(len(lead), len(lead) + len(fact.phrase)), fact)
