"""Data: documents read, tokenised and packed so that each token knows its document; generated recall; questions
about contexts, read or generated."""

from inlay.data.config import (
    BpeTokenizer,
    ByteTokenizer,
    DataConfig,
    PretrainedTokenizer,
    RecallConfig,
    TextConfig,
    TokenizerConfig,
)
from inlay.data.facts import FactsDataset, facts_context, facts_tokenizer
from inlay.data.loading import Data, PackedStream, load_data
from inlay.data.packing import collate, pack_documents
from inlay.data.problems import DataError
from inlay.data.qa import QAData, load_qa
from inlay.data.qa_config import DatasetQAConfig, FactsConfig, JsonlConfig, QAConfig, SquadConfig
from inlay.data.qa_sources import QAExample
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
    "DatasetQAConfig",
    "Document",
    "FactsConfig",
    "FactsDataset",
    "JsonlConfig",
    "MemoryStatistics",
    "PackedStream",
    "PackingStatistics",
    "PretrainedTokenizer",
    "QAConfig",
    "QAData",
    "QAExample",
    "RecallConfig",
    "RecallDataset",
    "SquadConfig",
    "TextConfig",
    "TokenizerConfig",
    "collate",
    "facts_context",
    "facts_tokenizer",
    "load_data",
    "load_qa",
    "load_tokenizer",
    "pack_documents",
]
