"""The words and sentences that generated facts are told in: three vocabularies, one grammar.

`SMALL` is closed and lower case, a few hundred words, so that a model of 200k parameters learns to read it in minutes.
`ENGLISH` has several thousand words, two ways to state each of its facts, years, dates and trades.
`PAIRS` is key-value recall with the words of `SMALL`: a name, an attribute and its value, and the first two are asked.

A name is a head and a tail ("clara ashford"). A value is a phrase of any length: plural nouns, each under up to two
adjectives, tied by joints ("old lanterns beside narrow copper doors"); in `ENGLISH` also a year, a date or a trade.

Nouns, years and trades occur in values and nowhere else: not in templates, names or among the adjectives. Whoever uses
one of them once in a context has stated the value that holds it once. `tests/data/test_facts.py` holds the lists to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from inlay.data.facts_words import ADJECTIVES, NOUNS, PEOPLE, PLACES, TAILS, THINGS, split_words

ValueKind = Literal["phrase", "year", "date", "trade"]


@dataclass(frozen=True)
class Attribute:
    """Something that can be said of an entity, and asked."""

    statements: tuple[str, str]
    """Two ways to state it, with `{name}` and `{value}`."""

    question: str
    """With `{name}`."""

    values: ValueKind = "phrase"
    """What its values are: a phrase has any length, a year or trade 1 word, a date 3."""


@dataclass(frozen=True)
class Kind:
    """A kind of entity."""

    heads: tuple[str, ...]
    """First parts of names."""

    name: str
    """A name's template, with `{head}` and `{tail}`."""

    attributes: tuple[Attribute, ...]
    """What can be said of it."""


@dataclass(frozen=True)
class Language:
    """Everything a context is made of."""

    kinds: tuple[Kind, ...]
    """People, places, things."""

    tails: tuple[str, ...]
    """Last parts of names, of all kinds."""

    nouns: tuple[str, ...]
    """Of phrases; in plural, so that they need no article."""

    adjectives: tuple[str, ...]
    """Of phrases."""

    joints: tuple[str, ...]
    """Stand between a phrase's parts."""

    distractors: tuple[str, ...]
    """Sentences that answer nothing; with `{name}` of an entity, `{phrase}`, or neither."""

    capitals: bool
    """Whether a sentence begins with a capital letter."""

    def cut(self, tails: int | None, nouns: int | None, adjectives: int | None) -> Language:
        """With the first so many of these words; None keeps all."""
        return replace(
            self, tails=self.tails[:tails], nouns=self.nouns[:nouns], adjectives=self.adjectives[:adjectives]
        )

    def sentence(self, text: str) -> str:
        """`text` as a sentence begins."""
        return text[:1].upper() + text[1:] if self.capitals else text


def _small_attribute(word: str) -> Attribute:
    return Attribute(
        (f"the {word} of {{name}} is {{value}}.", f"for {{name}} the {word} is {{value}}."),
        f"what is the {word} of {{name}}?",
    )


def _pair(word: str) -> Attribute:
    return Attribute((f"{{name}} {word} {{value}}.",) * 2, f"{{name}} {word}?")


def _small_kinds(attribute: Callable[[str], Attribute]) -> tuple[Kind, ...]:
    said = (
        (PEOPLE, "gift tool dream cargo prize burden secret craft"),
        (PLACES, "emblem harvest export relic legend tribute pride supply"),
        (THINGS, "content price cover ornament lining mark purpose origin"),
    )
    return tuple(
        Kind(tuple(head.lower() for head in heads[:16]), "{head} {tail}", tuple(map(attribute, split_words(words))))
        for heads, words in said
    )


SMALL = Language(
    kinds=_small_kinds(_small_attribute),
    tails=tuple(tail.lower() for tail in TAILS[:48]),
    nouns=NOUNS[:120],
    adjectives=ADJECTIVES[:40],
    joints=("and", "with", "near", "under"),
    distractors=(
        "the road was long and the night was cold.",
        "nobody knew why the rain had stopped.",
        "a voice was heard in the street.",
        "someone had seen {phrase} by the road.",
        "there were {phrase} in the street.",
        "nobody spoke of {name} that night.",
        "the rain had come to {name} before.",
        "a song about {name} was long.",
    ),
    capitals=False,
)

ENGLISH = Language(
    kinds=(
        Kind(
            PEOPLE,
            "{head} {tail}",
            (
                Attribute(
                    (
                        "{name} spent many years collecting {value}.",
                        "Collecting {value} kept {name} busy for many years.",
                    ),
                    "What did {name} spend many years collecting?",
                ),
                Attribute(
                    ("{name} painted {value} on the walls of the hall.", "The hall shows {value} painted by {name}."),
                    "What did {name} paint on the walls of the hall?",
                ),
                Attribute(
                    ("{name} was afraid of {value} since childhood.", "Since childhood, {value} frightened {name}."),
                    "What was {name} afraid of since childhood?",
                ),
                Attribute(
                    ("{name} became rich by selling {value}.", "Selling {value} had made {name} rich."),
                    "What did {name} sell to become rich?",
                ),
                Attribute(
                    ("{name} wrote a long letter about {value}.", "A long letter about {value} was sent by {name}."),
                    "What did {name} write a long letter about?",
                ),
                Attribute(
                    ("{name} inherited {value} from an aunt.", "An aunt left {value} to {name}."),
                    "What did {name} inherit from an aunt?",
                ),
                Attribute(
                    ("{name} often dreamt of {value}.", "In many a dream, {value} came back to {name}."),
                    "What did {name} often dream of?",
                ),
                Attribute(
                    ("{name} lost {value} on a journey.", "On a journey, {value} were lost by {name}."),
                    "What did {name} lose on a journey?",
                ),
                Attribute(
                    ("{name} was born in {value}.", "It was in {value} that {name} was born."),
                    "In which year was {name} born?",
                    "year",
                ),
                Attribute(
                    ("{name} was married on {value}.", "On {value}, guests came to the wedding of {name}."),
                    "On which date was {name} married?",
                    "date",
                ),
                Attribute(
                    ("{name} grew up among {value}.", "It was {value} who raised {name}."),
                    "Among whom did {name} grow up?",
                    "trade",
                ),
            ),
        ),
        Kind(
            PLACES,
            "{head} {tail}",
            (
                Attribute(
                    ("{name} is famous for its {value}.", "Travellers praise the {value} of {name}."),
                    "What is {name} famous for?",
                ),
                Attribute(
                    ("The stalls of {name} sell {value}.", "Those who need {value} go to the stalls of {name}."),
                    "What do the stalls of {name} sell?",
                ),
                Attribute(
                    ("The flag of {name} shows {value}.", "One can see {value} on the flag of {name}."),
                    "What does the flag of {name} show?",
                ),
                Attribute(
                    ("The museum of {name} keeps {value}.", "Behind glass, {value} are kept in the museum of {name}."),
                    "What does the museum of {name} keep?",
                ),
                Attribute(
                    ("A flood once carried {value} into {name}.", "With a flood, {value} were washed into {name}."),
                    "What did a flood once carry into {name}?",
                ),
                Attribute(
                    ("Below {name}, workmen dug up {value}.", "Workmen dug up {value} below {name}."),
                    "What did workmen dig up below {name}?",
                ),
                Attribute(
                    ("The children of {name} sing about {value}.", "A song about {value} is sung in {name}."),
                    "What do the children of {name} sing about?",
                ),
                Attribute(
                    ("In winter {name} exports {value}.", "Ships bring {value} from {name} in winter."),
                    "What does {name} export in winter?",
                ),
                Attribute(
                    ("{name} was founded in {value}.", "It was in {value} that settlers founded {name}."),
                    "In which year was {name} founded?",
                    "year",
                ),
                Attribute(
                    ("{name} burnt down on {value}.", "On {value}, a fire destroyed {name}."),
                    "On which date did {name} burn down?",
                    "date",
                ),
                Attribute(
                    ("Most families in {name} were {value}.", "For work, {value} moved to {name}."),
                    "What work did most families in {name} do?",
                    "trade",
                ),
            ),
        ),
        Kind(
            THINGS,
            "the {tail} {head}",
            (
                Attribute(
                    ("{name} is decorated with {value}.", "One finds {value} all over {name}."),
                    "What is {name} decorated with?",
                ),
                Attribute(
                    ("{name} was exchanged for {value}.", "Somebody gave {value} to get {name}."),
                    "What was {name} exchanged for?",
                ),
                Attribute(
                    ("{name} was hidden behind {value}.", "Stacked up, {value} concealed {name}."),
                    "What was {name} hidden behind?",
                ),
                Attribute(
                    ("{name} was found among {value}.", "A heap of {value} was where a boy found {name}."),
                    "Among what was {name} found?",
                ),
                Attribute(
                    ("{name} reminds its owner of {value}.", "Thinking of {value}, its owner looks at {name}."),
                    "What does {name} remind its owner of?",
                ),
                Attribute(
                    ("{name} is said to attract {value}.", "People say that {value} are drawn to {name}."),
                    "What is {name} said to attract?",
                ),
                Attribute(
                    ("{name} was shipped together with {value}.", "One crate held {value} besides {name}."),
                    "What was {name} shipped together with?",
                ),
                Attribute(
                    ("{name} bears a picture of {value}.", "A picture of {value} is engraved on {name}."),
                    "Of what does {name} bear a picture?",
                ),
                Attribute(
                    ("{name} was made in {value}.", "It was in {value} that someone made {name}."),
                    "In which year was {name} made?",
                    "year",
                ),
                Attribute(
                    ("{name} was stolen on {value}.", "On {value}, thieves took {name}."),
                    "On which date was {name} stolen?",
                    "date",
                ),
                Attribute(
                    ("{name} was repaired by {value}.", "It took {value} to repair {name}."),
                    "Who repaired {name}?",
                    "trade",
                ),
            ),
        ),
    ),
    tails=TAILS,
    nouns=NOUNS,
    adjectives=ADJECTIVES,
    joints=split_words("and with near under beside behind above between without among"),
    distractors=(
        "The weather stayed mild until the end of the week.",
        "A dog barked somewhere and was answered by another.",
        "Nobody could remember who had left the gate open.",
        "The evening train was late again.",
        "In the inn they talked about taxes and the price of bread.",
        "It would have been easy to miss the turn of the road.",
        "The archive was closed for three days.",
        "Smoke rose from a chimney and drifted across the yard.",
        "Somebody had left {phrase} by the side of the road.",
        "The cellar was said to be full of {phrase}.",
        "A stranger asked everyone about {phrase}.",
        "That year {phrase} were cheaper than ever.",
        "A newspaper printed a short note about {name}.",
        "Few records mention {name} before that time.",
        "Opinions about {name} have always been divided.",
        "A scholar from the capital came to learn more about {name}.",
    ),
    capitals=True,
)

PAIRS = replace(SMALL, kinds=_small_kinds(_pair))

LANGUAGES: dict[str, Language] = {"small": SMALL, "english": ENGLISH, "pairs": PAIRS}
"""By the name that `FactsConfig.vocabulary` gives them."""
