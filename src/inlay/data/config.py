"""What data a run trains and evaluates on: the `data:` part of a recipe.

`DataConfig` is one of two models, told apart by `task`: `TextConfig` (documents, tokenised and packed) or
`RecallConfig` (generated key-value recall). A field that the chosen source would not read is refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

OnError = Literal["raise", "skip"]
Packing = Literal["cut", "concatenate"]
Source = Literal["python-stdlib", "files", "jsonl", "dataset"]
Paths = str | tuple[str, ...]

_ONLY_FOR: dict[str, tuple[Source, ...]] = {
    "path": ("files", "jsonl", "dataset"),
    "eval_path": ("files", "jsonl", "dataset"),
    "text_field": ("jsonl", "dataset"),
    "dataset_config": ("dataset",),
    "split": ("dataset",),
    "eval_split": ("dataset",),
    "streaming": ("dataset",),
}


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class PretrainedTokenizer(_Config):
    """A tokenizer that exists already."""

    kind: Literal["pretrained"]
    """Names this variant."""

    name_or_path: str = Field(min_length=1)
    """Hub id, or a folder written by `save_pretrained`."""


class BpeTokenizer(_Config):
    """A byte-level BPE, learnt from the training documents and cached."""

    kind: Literal["bpe"]
    """Names this variant."""

    vocab_size: int = Field(2048, ge=258)
    """Symbols in all: 256 bytes, 2 special tokens, the rest learnt merges (fewer when the text holds fewer)."""

    max_documents: int | None = Field(None, ge=1)
    """Learn from the first so many training documents; all when not given. A stream needs it."""


class ByteTokenizer(_Config):
    """One token per UTF-8 byte, and 2 special tokens: nothing to learn."""

    kind: Literal["bytes"]
    """Names this variant."""


TokenizerConfig = Annotated[PretrainedTokenizer | BpeTokenizer | ByteTokenizer, Field(discriminator="kind")]


class TextConfig(_Config):
    """Documents from a source, tokenised and packed into sequences of equal length."""

    task: Literal["text"]
    """Names this variant."""

    source: Source
    """`python-stdlib`: the reader's own Python library, no download. `files`: one UTF-8 document per file.
    `jsonl`: one per line (`.gz` too). `dataset`: one per row of whatever `datasets.load_dataset` opens."""

    path: Paths | None = None
    """`files`, `jsonl`: a file, a folder, a glob, or a list of them. `dataset`: one hub id or local folder."""

    dataset_config: str | None = None
    """Configuration name of the hub data set."""

    split: str = "train"
    """Split of the data set to train on."""

    text_field: str = Field("text", min_length=1)
    """Key (`jsonl`) or column (`dataset`) that holds the document's text."""

    streaming: bool = False
    """Pack while training instead of holding the packed corpus in memory. Needs `max_eval_sequences`."""

    eval_path: Paths | None = None
    """Evaluation documents, of the same kind as `path`. Without it and `eval_split`, documents are held out."""

    eval_split: str | None = None
    """Split of the data set to evaluate on."""

    eval_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the documents held out, chosen by the hash of a document's name, when no evaluation data is given."""

    sequence_length: int = Field(ge=2)
    """Tokens in a sequence."""

    packing: Packing = "cut"
    """`cut`: a sequence holds (a part of) one document, padded at the document's tail. `concatenate`: neighbouring
    documents fill a sequence, each with its own document id; only the very last sequence is padded."""

    min_tokens: int | None = Field(None, ge=2)
    """`cut` drops what is left of a document below this many tokens; a quarter of `sequence_length` when not given."""

    max_documents: int | None = Field(None, ge=1)
    """Read at most so many documents of `path`, and as many of `eval_path` or `eval_split`."""

    max_eval_sequences: int | None = Field(None, ge=1)
    """Evaluate on at most so many sequences, spread evenly over the evaluation data (a stream: its first ones)."""

    on_error: OnError = "raise"
    """What a file or line that cannot be read does. `raise`: up to 20 of them are listed in one `DataError`.
    `skip`: each is logged as a warning and counted in the statistics."""

    add_eos: bool = True
    """Close every document with the tokenizer's end-of-sequence token."""

    tokenizer: TokenizerConfig
    """How text becomes tokens, told apart by `kind`: `pretrained`, `bpe` or `bytes`. A recipe with `model.name_or_path`
    takes that model's when none is given."""

    @property
    def min_piece_tokens(self) -> int:
        """`min_tokens` with its default worked out, in tokens (at least 2: one token has nothing to predict)."""
        return self.min_tokens if self.min_tokens is not None else max(2, self.sequence_length // 4)

    @property
    def has_eval_data(self) -> bool:
        """Whether evaluation documents are given, so that none are held out of the training documents."""
        return self.eval_path is not None or self.eval_split is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        for name in sorted(changed & _ONLY_FOR.keys()):
            if self.source not in _ONLY_FOR[name]:
                raise ValueError(f"{name} has no effect with source: {self.source}; remove it")
        if self.source != "python-stdlib" and not self.path:
            raise ValueError(f"source: {self.source} needs a path")
        for name in ("path", "eval_path"):
            if self.source == "dataset" and isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name}: source: dataset takes one name or folder, not a list")
        if self.min_piece_tokens > self.sequence_length:
            raise ValueError(f"min_tokens is {self.min_tokens}, above sequence_length ({self.sequence_length})")
        if self.has_eval_data and "eval_fraction" in changed:
            raise ValueError("eval_fraction has no effect beside eval_path or eval_split; remove one of them")
        if self.streaming and self.max_eval_sequences is None:
            raise ValueError("streaming needs max_eval_sequences: the evaluation data is held in memory")
        if self.streaming and isinstance(self.tokenizer, BpeTokenizer) and self.tokenizer.max_documents is None:
            raise ValueError("streaming needs tokenizer.max_documents: a BPE cannot be learnt from an endless stream")
        return self


class RecallConfig(_Config):
    """Generated key-value recall: pairs in the first half of a sequence, asked for in the second."""

    task: Literal["recall"]
    """Names this variant."""

    sequence_length: int = Field(256, ge=4)
    """Tokens in a sequence."""

    pairs: int = Field(16, ge=1)
    """Key-value pairs in a sequence; every one is asked for once."""

    keys: int = Field(64, ge=1)
    """Distinct key tokens; within a sequence no key comes twice."""

    values: int = Field(64, ge=2)
    """Distinct value tokens, drawn independently, so guessing scores 1 / values."""

    min_distance: int = Field(1, ge=1)
    """Fewest tokens from a pair's value to the key that asks for it. Set it to the attention window to put every
    pair out of the window's sight. Close to its limit it forces the questions into the order of the pairs."""

    alignment: Literal[1, 2] = 1
    """Pairs and questions start at multiples of this. 2 keeps each pair within one chunk of even size: a key at the end
    of a chunk cannot be written with its value, which the target's convolution does not see across the edge."""

    train_examples: int = Field(100_000, ge=1)
    """Length of the training set. Examples are made when asked for, so a large number costs nothing."""

    eval_examples: int = Field(512, ge=1)
    """Length of the evaluation set."""

    seed: int = Field(0, ge=0)
    """Fixes every example of both sets."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        half = self.sequence_length // 2
        if 2 * self.pairs > half:
            raise ValueError(
                f"{self.pairs} pairs need {2 * self.pairs} tokens in each half of a sequence; "
                f"sequence_length {self.sequence_length} leaves {half}: take at least {4 * self.pairs}"
            )
        if self.pairs > self.keys:
            raise ValueError(f"{self.pairs} pairs need as many distinct keys; keys is {self.keys}")
        if self.alignment == 2 and self.sequence_length % 4:
            raise ValueError(f"alignment 2 needs a sequence_length that is a multiple of 4; got {self.sequence_length}")
        longest = self.sequence_length - half - 1
        if self.min_distance > longest:
            raise ValueError(
                f"min_distance {self.min_distance} does not fit sequence_length {self.sequence_length}: "
                f"at most {longest}, or a sequence_length of at least {2 * self.min_distance + 2}"
            )
        return self


DataConfig = Annotated[TextConfig | RecallConfig, Field(discriminator="task")]
"""The `data:` part of a recipe. A field type; outside a model validate with `pydantic.TypeAdapter(DataConfig)`."""
