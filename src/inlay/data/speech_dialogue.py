"""What the two speakers of a made conversation say: small talk, and facts that are told early and asked for later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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

    def __init__(self, generator: np.random.Generator, *, return_after: float) -> None:
        self.generator = generator
        self.return_after = return_after
        self.said: dict[Fact, float] = {}
        self._facts = self._all_facts()

    def exchange(self, now: float) -> Iterator[Turn]:
        """The turns of the next exchange. `now`: seconds since the conversation's start."""
        due = [fact for fact, last in self.said.items() if now - last >= self.return_after]
        ask, tell = self.generator.random(2)
        if due and ask < 0.7:
            yield from self._ask(due[self.generator.integers(len(due))])
        elif tell < 0.6 and (fact := next(self._facts, None)) is not None:
            yield from self._tell(fact)
        else:
            question, answer = _SMALL_TALK[self.generator.integers(len(_SMALL_TALK))]
            yield Turn(False, tuple(question.split()))
            yield Turn(True, tuple(answer.split()))

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

    def _all_facts(self) -> Iterator[Fact]:
        subjects = [
            *(f"the number of the {place}" for place in _PLACES),
            *(f"the name of my {person}" for person in _PEOPLE),
            *(f"the password of the {thing}" for thing in _THINGS),
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


def _statement(opening: tuple[str, ...], fact: Fact) -> Turn:
    lead = (*opening, *fact.subject.split(), "is")
    return Turn(True, (*lead, *fact.phrase), slice(len(lead), len(lead) + len(fact.phrase)), fact)
