"""What every recipe has in common: sections that refuse unknown keys, a YAML file with overrides, errors with a fix.

A recipe is a pydantic model. Any value can be overridden by its path (``trainer.max_steps=100``), and a wrong key or
value is named with its place and, for an unknown key, its nearest neighbour among those that exist there.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from transformers import TrainingArguments

from inlay.fastweight import InlayError
from inlay.train.kinds import NAMES, RecipeKind, kind_of

R = TypeVar("R", bound="RunRecipe")

_OWNED = {
    "output_dir": "runs are named by `name` and kept under --runs",
    "seed": "use the recipe's own `seed`",
    "data_seed": "use the recipe's own `seed`",
    "resume_from_checkpoint": "use --resume",
    "logging_dir": "TensorBoard files go to the run's directory",
    "remove_unused_columns": "batches keep every column that the run's data has",
    "label_names": "labels are `labels`",
}


_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_WHOLE = (*_COUNTS, "max_steps")


class RecipeError(InlayError, ValueError):
    """A recipe that cannot be run; the message names file, key and fix."""


class Section(BaseModel):
    """A part of a recipe, or all of it: unknown keys are refused, and what is read does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_trainer(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` when transformers' ``TrainingArguments`` takes every one and none is the run's own to set.

    A strategy that YAML read as false is the ``no`` that was written, and ``1e3`` steps are 1,000.

    Raises:
        ValueError: Names the key, and what is meant or to be used in its place.
    """
    known = {field.name: field.default for field in dataclasses.fields(TrainingArguments) if field.init}
    for key, value in arguments.items():
        if key in _OWNED:
            raise ValueError(f"{key!r} is set by the run: {_OWNED[key]}")
        if key not in known:
            raise ValueError(f"unknown key {key!r}{nearest(key, known)}")
        if _is_number(known[key]) and not _is_number(value):
            raise ValueError(f"{key} takes a number; got {value!r}")
        if key in _WHOLE and value != int(value):
            raise ValueError(f"{key} takes a whole number; got {value!r}")
        if key in _COUNTS and value < 1:
            raise ValueError(f"{key} is at least 1; got {value!r}")
        if key == "max_steps" and value == 0:  # which the Trainer takes for one
            raise ValueError("max_steps is 0; say how many, or leave it out to go by num_train_epochs")
    return {key: _meant(key, value) for key, value in arguments.items()}


def _meant(key: str, value: Any) -> Any:
    """What was written, of a value that YAML reads as something else."""
    if value is False and key.endswith("_strategy"):
        return "no"
    return int(value) if key in _WHOLE else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class RunRecipe(Section):
    """A whole recipe: what those of every kind have."""

    kind: ClassVar[RecipeKind | None] = None
    """Which kind its files are of; None where commands take none of it."""

    free_when_resumed: ClassVar[frozenset[str]] = frozenset({"trainer"})
    """The sections in which a run that is resumed may differ from what it was before."""

    elsewhere: ClassVar[Mapping[str, str]] = {}
    """Keys that a recipe does not have but its users know from elsewhere, by place: what to do instead."""

    trainer_check: ClassVar[Callable[[dict[str, Any]], dict[str, Any]]] = check_trainer
    """Takes the trainer section, or raises ``ValueError``."""

    name: str = Field(pattern=r"^[\w+-][\w.+-]*$")
    """Names the run's directory."""

    seed: int = Field(default=0, ge=0)
    """Fixes initial weights, the order of batches and all else that is drawn."""

    trainer: dict[str, Any] = Field(default_factory=dict)
    """Arguments of transformers' ``TrainingArguments`` by their own names."""

    @field_validator("trainer")
    @classmethod
    def _trainer_takes_these(cls, value: dict[str, Any]) -> dict[str, Any]:
        return cls.trainer_check(value)

    def kept_when_resumed(self) -> dict[str, Any]:
        """What must be as it was before, within the free sections too."""
        optimizer = {"trainer.optim": self.trainer.get("optim")}
        return self.model_dump(exclude={*self.free_when_resumed, "name"}) | optimizer


def read_recipe(kind: type[R], path: str | Path, overrides: Sequence[str] = ()) -> R:
    """Read a recipe of this kind, apply ``overrides`` (``"section.key=value"``, values in YAML) and check it.

    Raises:
        RecipeError: The file is missing or no YAML mapping, or a key or value is wrong; names the key and, for an
            unknown one, its nearest neighbour. Or it is a recipe of another kind; names the commands that take it.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        hint = f"; it is a folder, a run's recipe is {path / 'recipe.yaml'}" if path.is_dir() else ""
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: no valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections; this file holds a {type(raw).__name__}")
    found = kind_of(raw)
    if kind.kind is not None and found not in (kind.kind, None):
        name, commands = NAMES[found]
        wanted = NAMES[kind.kind][0]
        raise RecipeError(f"{path} is a recipe of {name}, for {commands}; here one of {wanted} is asked for")
    raw.setdefault("name", re.sub(r"[^\w.+-]+", "-", path.stem))
    for override in overrides:
        _override(raw, override)
    return check_recipe(kind, raw, str(path))


def check_recipe(kind: type[R], raw: dict[str, Any], source: str = "recipe") -> R:
    """Check a recipe of this kind given as a dictionary. Raises :class:`RecipeError`."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {_explain(kind, problem)}" for problem in error.errors()]
        raise RecipeError(f"{source} is no valid recipe:\n" + "\n".join(lines)) from error


def dump_recipe(recipe: BaseModel) -> str:
    """The recipe as YAML that :func:`read_recipe` reads back to the same recipe."""
    said = recipe.model_dump(mode="json", exclude_defaults=True)
    return str(yaml.dump(said, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number, which YAML 1.1 does only with a point and a sign; refuses a key that comes twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping, each of whose keys stands there once."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} comes twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that :class:`_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)$"),
        list("-+0123456789."),
    )


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"{override!r} is no override; write section.key=value, e.g. trainer.max_steps=100")
    *sections, key = path.split(".")
    target = raw
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise RecipeError(f"{override!r}: {section!r} is a value, not a section")
    try:
        target[key] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is no YAML: {error}") from error


def _explain(kind: type[BaseModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join(_without_tags(kind, location))
    if problem["type"] == "extra_forbidden":
        if issubclass(kind, RunRecipe) and where in kind.elsewhere:
            return f"{where}: no key of ours: {kind.elsewhere[where]}"
        return f"{where}: unknown key{nearest(location[-1], _fields_at(kind, location[:-1]))}"
    if problem["type"] == "missing":
        return f"{where}: is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def nearest(key: str, known: Iterable[str]) -> str:
    """``; did you mean …?`` of the known key that is most like ``key``, or a list of them if none is."""
    known = sorted(known)
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known are {', '.join(known)}"


def _fields_at(kind: type[BaseModel], location: Sequence[str]) -> set[str]:
    """Names of the fields that exist at a place of the recipe."""
    models: list[type[BaseModel]] = [kind]
    for step in location:
        inner = [
            m for model in models if step in model.model_fields for m in _models(model.model_fields[step].annotation)
        ]
        # A step that is no field is an index into a list, or the tag or name of a union's member.
        tagged = [m for m in models if any(_is_tag(f.annotation, step) for f in m.model_fields.values())]
        named = [m for m in models if m.__name__ == step]
        models = inner or tagged or named or (models if step.isdecimal() else [])
    return {name for model in models for name in model.model_fields}


def _without_tags(kind: type[BaseModel], location: Sequence[str]) -> list[str]:
    """A place as a recipe writes it: without the tags by which unions chose a member."""
    return [
        step
        for depth, step in enumerate(location)
        if depth == len(location) - 1 or step.isdecimal() or step in _fields_at(kind, location[:depth])
    ]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold, in a list too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _is_tag(annotation: Any, tag: str) -> bool:
    return get_origin(annotation) is Literal and tag in get_args(annotation)
