"""Recipes: what a method needs beside its callbacks (optimizer, learning rate, epochs), one YAML file a method.

A file holds ``description``, ``callbacks`` (a list of ``class`` and ``init``), training settings (fields of
:class:`~cl_plugins.recipes.Recipe`) and ``scenarios`` with settings that replace the general ones there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from cl_plugins._text import did_you_mean

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """Everything that a benchmark run needs to know about a method on a scenario.

    Attributes:
        method: the recipe's name.
        description: one sentence.
        callbacks: classes of ``cl_plugins.callbacks`` with their arguments, ``{"class": ..., "init": {...}}``.
        backbone: a timm model's name.
        pretrained: start from pretrained weights.
        epochs: per task.
        epochs_per_task: one number per task, in place of ``epochs``; empty for ``epochs`` everywhere.
        steps: gradient steps per task, in place of ``epochs``; None for epochs.
        batch_size: training samples per step.
        optimizer: "adam", "adamw" or "sgd".
        lr: base learning rate.
        weight_decay: of the optimizer.
        betas: of Adam and AdamW.
        gradient_clip: largest norm of the gradients; 0 for no limit.
        schedule: "constant", "cosine" (to 0 over a task, per epoch, or per step where ``steps`` is set) or "ovor"
            (CODA-Prompt's and OVOR's).
        joint: train on all tasks at once, as an upper bound.
        source: where the settings come from.
    """

    method: str
    description: str
    callbacks: tuple[Mapping[str, Any], ...] = ()
    backbone: str = "vit_glyph"
    pretrained: bool = True
    epochs: int = 5
    epochs_per_task: tuple[int, ...] = ()
    steps: int | None = None
    batch_size: int = 64
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clip: float = 0.0
    schedule: str = "constant"
    joint: bool = False
    source: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", ("adam", "adamw", "sgd")), ("schedule", ("constant", "cosine", "ovor"))):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(allowed)}, got {value!r}{did_you_mean(value, allowed)}"
                )
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of 1 or more, got {value!r}")
        lengths = [*self.epochs_per_task, *([] if self.steps is None else [self.steps])]
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
            raise ValueError(
                "`epochs_per_task` and `steps` must be whole numbers of 1 or more,"
                f" got {self.epochs_per_task!r} and {self.steps!r}"
            )
        if self.steps is not None and self.epochs_per_task:
            raise ValueError(
                "`steps` must be None when `epochs_per_task` is given; one of them says how long a task is"
            )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"`betas` must be two numbers in [0, 1), got {self.betas!r}")
        if not self.gradient_clip >= 0:
            raise ValueError(f"`gradient_clip` must be 0 or more, got {self.gradient_clip!r}")
        if not isinstance(self.lr, int | float) or not self.lr > 0:
            raise ValueError(f"`lr` must be a number above 0, got {self.lr!r}; write 1.0e-3, not 1e-3, in YAML")


_SETTINGS = {f.name for f in fields(Recipe)} - {"method", "description", "callbacks"}


def recipe_names() -> list[str]:
    """Names of all methods that have a recipe."""
    return sorted(p.stem for p in _FOLDER.glob("*.yaml"))


def load_recipe(method: str, scenario: str | None = None) -> Recipe:
    """The recipe of a method, with the settings for a scenario where the file has some.

    Raises:
        ValueError: for an unknown method, with the nearest known one.

    Example:
        >>> load_recipe("ovor", "split-digits").method
        'ovor'
    """
    path = _FOLDER / f"{method}.yaml"
    if method not in recipe_names():
        raise ValueError(f"`method` must be a known method, got {method!r}{did_you_mean(method, recipe_names())}")
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    overrides = content.pop("scenarios", {}) or {}
    content = {**content, **(overrides.get(scenario) or {})}
    for name in ("callbacks", "epochs_per_task", "betas"):
        if name in content:
            content[name] = tuple(content[name] or ())
    return Recipe(method=method, **content)


def with_options(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """The recipe with some settings replaced: a field of :class:`Recipe`, or an argument of a callback.

    An option such as ``lr`` is a setting; ``head_epochs`` goes to every callback of the recipe that takes it,
    ``OVOR.head_epochs`` to that class alone, and ``outliers.noise_scale`` into the mapping that is the argument
    ``outliers``.

    Raises:
        ValueError: for an option that nothing takes.
    """
    settings = {k: v for k, v in options.items() if k in _SETTINGS}
    callbacks = [{"class": c["class"], "init": dict(c.get("init") or {})} for c in recipe.callbacks]
    accepted = {id(c): callback_arguments(c["class"]) for c in callbacks}
    for key, value in options.items():
        if key in settings:
            continue
        owner, _, name = key.rpartition(".")
        holders = [c for c in callbacks if owner in accepted[id(c)]]
        for callback in holders:
            callback["init"][owner] = {**(callback["init"].get(owner) or {}), name: value}
        takers = holders or [c for c in callbacks if name in accepted[id(c)] and owner in ("", c["class"])]
        if not takers:
            known = sorted(_SETTINGS | {a for arguments in accepted.values() for a in arguments})
            raise ValueError(f"`--set {key}` must name an option of {recipe.method!r}{did_you_mean(name, known)}")
        for callback in takers if not holders else []:
            callback["init"][name] = value
    return replace(recipe, callbacks=tuple(callbacks), **settings)


def callback_arguments(name: str) -> set[str]:
    """Names of the arguments of a class in ``cl_plugins.callbacks``.

    Raises:
        ValueError: for an unknown class.
    """
    import importlib
    import inspect

    module = importlib.import_module("cl_plugins.callbacks")
    if name not in module.__all__:
        raise ValueError(f"`class` must be in cl_plugins.callbacks, got {name!r}{did_you_mean(name, module.__all__)}")
    return set(inspect.signature(getattr(module, name).__init__).parameters) - {"self"}
