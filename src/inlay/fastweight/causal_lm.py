"""What has to be known of a transformers model to call it, whatever wraps it and whatever version it is of.

transformers 5.24 calls the KV cache ``cache`` among a forward's arguments and outputs. Before it was
``past_key_values``, as it still is in models that bring code of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import Cache

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")
"""What forwards of models, blocks and attention modules call the KV cache."""


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other as it is."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def forward_arguments(model: Any) -> tuple[str, ...]:
    """Names of the arguments that a module's forward takes, in order; of the model inside, for a PEFT model."""
    return tuple(inspect.signature(base_model(model).forward).parameters)


def cache_argument(model: Any) -> str | None:
    """What a module's forward (or ``generate``) calls the KV cache; None where it takes none."""
    return next((name for name in forward_arguments(model) if name in CACHE_ARGUMENTS), None)


def with_cache(model: Any, cache: Cache) -> dict[str, Cache]:
    """The keyword argument by which ``model`` is given ``cache``.

    Raises:
        TypeError: It takes none.
    """
    name = cache_argument(model)
    if name is None:
        raise TypeError(f"the forward of {type(base_model(model)).__name__} takes no KV cache")
    return {name: cache}


def cache_among(values: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the arguments or the outputs of a forward; None where there is none."""
    return next((value for value in values.values() if isinstance(value, Cache)), None)
