"""Data: documents read, tokenised and packed so that each token knows its document, and generated recall."""

from inlay.data.config import (
    BpeTokenizer,
    ByteTokenizer,
    DataConfig,
    PretrainedTokenizer,
    RecallConfig,
    TextConfig,
    TokenizerConfig,
)
from inlay.data.loading import Data, PackedStream, load_data
from inlay.data.packing import collate, pack_documents
from inlay.data.problems import DataError
from inlay.data.recall import RecallDataset
from inlay.data.sources import Document
from inlay.data.statistics import DataStatistics, MemoryStatistics, PackingStatistics
from inlay.data.tokenizer import load_tokenizer

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "Data",
    "DataConfig",
    "DataError",
    "DataStatistics",
    "Document",
    "MemoryStatistics",
    "PackedStream",
    "PackingStatistics",
    "PretrainedTokenizer",
    "RecallConfig",
    "RecallDataset",
    "TextConfig",
    "TokenizerConfig",
    "collate",
    "load_data",
    "load_tokenizer",
    "pack_documents",
]
