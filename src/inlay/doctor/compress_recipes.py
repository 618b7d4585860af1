"""``inlay doctor RECIPE`` where the recipe is one of soft tokens: its data and its decoder, examined before training.

A decoder that the recipe trains first is taken from the cache. Where it is not there yet, the same architecture with
random weights stands in for it: lengths, layout, labels, slots and a batch learnt by heart need no trained one. What it
would answer does, and is said not to have been examined.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import set_seed

from inlay.data import load_qa
from inlay.data.facts import facts_tokenizer
from inlay.data.qa_config import FactsConfig
from inlay.doctor.compress import examine_compression
from inlay.doctor.compress_case import CompressCase
from inlay.doctor.diagnosis import Diagnosis
from inlay.doctor.examine import Progress
from inlay.train.base_lm import base_outcome, build_base_lm, untrained_lm
from inlay.train.compress import build_task, load_decoder
from inlay.train.compress_recipe import CompressRecipe
from inlay.train.directory import training_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def examine_compress_recipe(
    recipe: CompressRecipe, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> Diagnosis:
    """Say whether the recipe's compressor will learn, and what it will be measured against.

    Args:
        recipe: A checked recipe.
        cache_dir: Where trained decoders are kept; the library's cache directory when not given.
        progress: Called with the name of each examination before it is made.

    Raises:
        DataError: The data cannot be read.
        InlayError: Layout, compressor and decoder do not go together.
    """
    tell = progress or (lambda name: None)
    tell("data")
    data = load_qa(recipe.data)
    tell("decoder")
    set_seed(recipe.seed)
    outcome = base_outcome(recipe, cache_dir=cache_dir) if recipe.base is not None else None
    trained = recipe.base is None or outcome is not None
    model, tokenizer = _decoder(recipe, trained, cache_dir)
    task = build_task(recipe, model.to(training_device(recipe.trainer)).eval(), tokenizer).eval()
    return examine_compression(CompressCase(task, data.train, data.eval, trained, outcome), progress=progress)


def _decoder(recipe: CompressRecipe, trained: bool, cache_dir: Path | None) -> tuple[Any, PreTrainedTokenizerFast]:
    """Decoder and tokenizer; where it is yet to be trained, one of random weights stands in."""
    if recipe.decoder.config is None:
        return load_decoder(recipe)
    if trained:
        return build_base_lm(recipe, Console(quiet=True), cache_dir=cache_dir)
    assert isinstance(recipe.data, FactsConfig)  # a recipe with base is refused otherwise
    tokenizer = facts_tokenizer(recipe.data)
    return untrained_lm(recipe, tokenizer), tokenizer
