"""Where questions and answers come from: the four kinds of `QAConfig`, told apart by `source`.

Whatever the source, no context is in both the training and the evaluation set: held-out data is chosen by title or
context, never by question, and where both sets are given their overlap is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inlay.data.config import OnError, Paths
from inlay.data.facts_language import LANGUAGES, Language

LONGEST_ANSWER = 40
SPARE_NOUNS = 20


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _ReadConfig(_Config):
    eval_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the titles (of the contexts, where there are no titles) held out by their hash, when no evaluation
    data is given."""

    max_examples: int | None = Field(None, ge=1)
    """Read at most so many questions of the training data, and as many of evaluation data that is given."""

    max_eval_examples: int | None = Field(None, ge=1)
    """Evaluate on at most so many questions, spread evenly over the evaluation data."""

    on_error: OnError = "raise"
    """What a record that cannot be used does. `raise`: up to 20 of them are listed in one `DataError`.
    `skip`: each is logged as a warning and counted."""

    @property
    def has_eval_data(self) -> bool:
        """Whether evaluation data is given, so that none is held out of the training data."""
        return getattr(self, "eval_path", None) is not None or getattr(self, "eval_split", None) is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.has_eval_data and self.eval_fraction != _ReadConfig.model_fields["eval_fraction"].default:
            raise ValueError("eval_fraction has no effect beside evaluation data that is given; remove one of them")
        return self


class SquadConfig(_ReadConfig):
    """Files in the nested JSON of SQuAD v1.1 and v2.0."""

    source: Literal["squad"]
    """Names this variant."""

    path: Paths
    """A `.json` or `.json.gz` file, a folder, a glob, or a list of them."""

    eval_path: Paths | None = None
    """Evaluation data, likewise. Without it, articles are held out by the hash of their title."""


class FlatConfig(_ReadConfig):
    """Records of one question each, and how their keys or columns are called."""

    context_field: str = Field("context", min_length=1)
    """Key or column of the text that is asked about."""

    title_field: str | None = None
    """Key or column of a title: contexts of one title are held out together."""

    question_field: str = Field("question", min_length=1)
    """Key or column of the question."""

    answers_field: str = Field("answers", min_length=1)
    """Key or column of the answers: a string, a list of strings, or SQuAD's `{"text": [...]}`. An empty list is
    unanswerable."""

    id_field: str | None = None
    """Key or column of an id that is unique in its set; file and line, or split and row, when not given."""


class JsonlConfig(FlatConfig):
    """Files with one JSON object per line and question."""

    source: Literal["jsonl"]
    """Names this variant."""

    path: Paths
    """A `.jsonl` or `.jsonl.gz` file, a folder, a glob, or a list of them."""

    eval_path: Paths | None = None
    """Evaluation data, likewise. Without it, contexts are held out by their hash."""


class DatasetQAConfig(FlatConfig):
    """Whatever `datasets.load_dataset` opens, one question per row. Columns as in the `squad` and `squad_v2` sets."""

    source: Literal["dataset"]
    """Names this variant."""

    path: str = Field(min_length=1)
    """Hub id or local folder."""

    dataset_config: str | None = None
    """Configuration name of the hub data set."""

    split: str = "train"
    """Split to train on."""

    eval_split: str | None = None
    """Split to evaluate on. Without it, contexts are held out by their hash."""


class FactsConfig(_Config):
    """Generated contexts about people, places and things, with questions; no download.

    What makes it harder: more `facts`, several `facts_per_entity` (the name alone no longer finds the answer),
    `shared_names` (half of the name neither), longer answers, `distractors`, a second phrasing, more words.
    """

    source: Literal["facts"]
    """Names this variant."""

    vocabulary: Literal["small", "english", "pairs"] = "small"
    """`small`: a few hundred lower-case words, for a model trained from scratch in minutes. `english`: richer
    sentences, for pretrained models. `pairs`: key-value recall, a name, an attribute and its value without a sentence
    around them."""

    facts: int = Field(8, ge=1, le=256)
    """Facts in a context. A model that learns from scratch wants few first (see `with_facts`)."""

    facts_per_entity: int = Field(2, ge=1, le=8)
    """Facts told of one entity."""

    shared_names: bool = False
    """Let entities of one context share the last part of their names."""

    phrasings: Literal[1, 2] = 1
    """Ways to state a fact. The first always puts the name before the value, the second of `english` often after."""

    distractors: int = Field(0, ge=0, le=1000)
    """Sentences between the facts that answer nothing, though they may mention an entity of the context."""

    answer_lengths: dict[int, float] = Field(default={1: 0.25, 2: 0.5, 3: 0.25}, min_length=1)
    """How often an answer has how many words (1 to 40), as weights: `{2: 3, 8: 1}` makes a quarter 8 words long."""

    questions: int = Field(4, ge=1)
    """Questions about one context, each about another of its facts. Neighbouring examples share their context."""

    tails: int | None = Field(None, ge=4)
    """Last parts of names; all of the vocabulary's when not given (as for `nouns` and `adjectives`)."""

    nouns: int | None = Field(None, ge=1)
    """Nouns in answers."""

    adjectives: int | None = Field(None, ge=2)
    """Adjectives in answers."""

    eval_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of all names kept for evaluation. Every part of a name is met in training, these pairs of parts never."""

    train_examples: int = Field(100_000, ge=1)
    """Length of the training set. Examples are made when asked for, so a large number costs nothing."""

    eval_examples: int = Field(512, ge=1)
    """Length of the evaluation set."""

    seed: int = Field(0, ge=0)
    """Fixes every example of both sets."""

    @property
    def entities(self) -> int:
        """Entities in a context; the last may have fewer facts than `facts_per_entity`."""
        return -(-self.facts // self.facts_per_entity)

    @property
    def language(self) -> Language:
        """The words and sentences, cut to the sizes asked for."""
        return LANGUAGES[self.vocabulary].cut(self.tails, self.nouns, self.adjectives)

    def with_facts(self, facts: int) -> FactsConfig:
        """The same data with so many facts in a context, and no more questions than facts: a step of a curriculum."""
        changes: dict[str, Any] = {"facts": facts, "questions": min(self.questions, facts)}
        return FactsConfig.model_validate(self.model_dump() | changes)

    @model_validator(mode="after")
    def _check(self) -> Self:
        language = LANGUAGES[self.vocabulary]
        for name in ("tails", "nouns", "adjectives"):
            asked, most = getattr(self, name), len(getattr(language, name))
            if asked is not None and asked > most:
                raise ValueError(f"{name} is {asked}; vocabulary: {self.vocabulary} has {most}")
        for length, weight in self.answer_lengths.items():
            if not 1 <= length <= LONGEST_ANSWER or not 0 < weight < float("inf"):
                raise ValueError(
                    f"answer_lengths has {length}: {weight}; lengths are 1 to {LONGEST_ANSWER} words, weights above 0"
                )
        if self.questions > self.facts:
            raise ValueError(f"{self.questions} questions need as many facts; facts is {self.facts}")
        if (nouns := len(self.language.nouns)) < self.facts + SPARE_NOUNS:
            raise ValueError(
                f"{self.facts} facts need {self.facts + SPARE_NOUNS} nouns, so that no answer is stated twice; "
                f"there are {nouns}: lower facts, or raise nouns"
            )
        heads = sum(len(kind.heads) for kind in language.kinds)
        if self.entities > (most := min(heads, len(self.language.tails)) // 2):
            raise ValueError(
                f"a context has {self.entities} entities; names differ in both their parts for at most {most}: "
                "lower facts, or raise tails or facts_per_entity"
            )
        return self


ReadQAConfig = SquadConfig | JsonlConfig | DatasetQAConfig

QAConfig = Annotated[SquadConfig | JsonlConfig | DatasetQAConfig | FactsConfig, Field(discriminator="source")]
"""The QA data of a recipe. A field type; outside a model validate with `pydantic.TypeAdapter(QAConfig)`."""
