"""Tokenizers: loaded, or learnt from the documents and cached.

The learnt ones are byte-level: every text, whatever its script, comes back from its tokens unchanged. Text that looks
like a special token is read as plain text, so no document can forge the end of a document.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from rich.console import Console
from rich.progress import Progress

from inlay.data.config import BpeTokenizer, ByteTokenizer, PretrainedTokenizer, TokenizerConfig
from inlay.data.problems import DataError
from inlay.data.sources import Document
from inlay.files import write_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
_BATCH = 64


def load_tokenizer(
    config: TokenizerConfig, documents: Iterable[Document], cache_dir: Path | str | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer that `config` asks for.

    Args:
        config: which one.
        documents: training documents a BPE learns from; not touched otherwise.
        cache_dir: where learnt tokenizers are kept, under a hash of `config` and the documents' texts;
            `default_cache_dir()` when not given.

    Raises:
        DataError: the tokenizer cannot be loaded, or there is no document to learn from.
    """
    if isinstance(config, PretrainedTokenizer):
        return load_pretrained_tokenizer(config.name_or_path)
    if isinstance(config, ByteTokenizer):
        return _wrap(_byte_level(tokenizers.models.BPE(_byte_vocabulary(), [])))
    texts = [document.text for document in islice(documents, config.max_documents)]
    if not texts:
        raise DataError("no training document to learn a tokenizer from")
    folder = Path(cache_dir or default_cache_dir()) / "tokenizers" / _fingerprint(config, texts)
    if not folder.is_dir():
        write_folder(folder, _train_bpe(config, texts).save_pretrained)
    return load_pretrained_tokenizer(folder)


def default_cache_dir() -> Path:
    """`$INLAY_CACHE`, or `~/.cache/inlay`."""
    return Path(os.environ.get("INLAY_CACHE") or Path.home() / ".cache" / "inlay")


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document], *, add_eos: bool, total: int | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each document's name and token ids (`[tokens]`, int32), in order, tokenised in batches.

    Args:
        tokenizer: puts what it puts around any text (a BOS, say).
        documents: read as the result is, a batch ahead.
        add_eos: close each document with the EOS token, unless the tokenizer has done so itself.
        total: number of documents; with it a terminal shows the progress.

    Raises:
        DataError: `add_eos` with a tokenizer that has no EOS token.
    """
    eos = tokenizer.eos_token_id
    if add_eos and eos is None:
        raise DataError("the tokenizer has no end-of-sequence token: set add_eos: false")
    iterator = iter(documents)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=total is None or not console.is_terminal) as progress:
        task = progress.add_task("tokenising", total=total)
        while batch := list(islice(iterator, _BATCH)):
            encoded = tokenizer([document.text for document in batch], return_attention_mask=False, verbose=False)
            for document, ids in zip(batch, encoded["input_ids"], strict=True):
                if add_eos and (not ids or ids[-1] != eos):
                    ids.append(eos)
                yield document.name, np.asarray(ids, dtype=np.int32)
            progress.update(task, advance=len(batch))


def padding_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id to pad with. Padding is masked and has no label, so EOS or 0 does where there is no padding token."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def load_pretrained_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer that lies in a folder or on the hub.

    Raises:
        DataError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # a missing folder, no network, a gated repository: many kinds
        raise DataError(f"cannot load the tokenizer {name_or_path}: {error}") from error


def _byte_vocabulary() -> dict[str, int]:
    return {symbol: index for index, symbol in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}


def _byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _train_bpe(config: BpeTokenizer, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = _byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size - 2,  # the special tokens are put behind
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    wrapped = _wrap(tokenizer)
    if len(wrapped) < config.vocab_size:
        logger.warning("the documents hold only %d of %d symbols for the tokenizer", len(wrapped), config.vocab_size)
    return wrapped


def _wrap(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _fingerprint(config: BpeTokenizer, texts: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{tokenizers.__version__} {config.model_dump_json()}".encode())
    for text in texts:
        content = text.encode("utf-8")
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.hexdigest()[:24]
