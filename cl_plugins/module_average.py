"""An average of what a module trains: chosen by name, moved by its optimizers' steps, put in and out of the module.

Rules and formulas: :mod:`cl_plugins.ema_rules`. Buffers, such as the statistics of batch normalization, are not
averaged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from cl_plugins.ema import BalancedAverager


class ParameterFilter:
    """Which parameters take part: what trains, by regular expressions and by owner.

    Args:
        include: regular expression; only names it finds.
        exclude: regular expression; no names it finds.
        plugins: only what lies under ``module.plugins[name]`` for these names.

    Raises:
        TypeError: when ``plugins`` is one string.
        ValueError: for a faulty regular expression.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> list(ParameterFilter(include="weight", exclude="^1").of(net))
        ['0.weight']
    """

    def __init__(
        self, include: str | None = None, exclude: str | None = None, plugins: Sequence[str] | None = None
    ) -> None:
        if isinstance(plugins, str):
            raise TypeError(f"`plugins` must be a list of names, got {plugins!r}; write [{plugins!r}]")
        self._include, self._exclude = _pattern("include", include), _pattern("exclude", exclude)
        self._prefixes = None if plugins is None else tuple(f"plugins.{name}." for name in plugins)

    def of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        return {
            name: p
            for name, p in module.named_parameters()
            if p.requires_grad
            and (self._prefixes is None or name.startswith(self._prefixes))
            and (self._include is None or self._include.search(name))
            and not (self._exclude is not None and self._exclude.search(name))
        }


def _pattern(name: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ValueError(f"`{name}` must be a regular expression, got {text!r}: {error}") from None


class ModuleAverage:
    """The average of a module's parameters from the first step of a training to its end.

    WHEN: :meth:`begin` once the module is complete, loaded and on its device; :meth:`attach` when its optimizers
    exist; from then on every real step moves the average, because the hook sits behind the step itself: after
    unscaling and clipping, once per accumulation window, not at all for a step that a gradient scaler skips.

    Args:
        averager: does the averaging.
        chosen: which parameters take part.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=1.0)
        >>> average = ModuleAverage(BalancedAverager("fixed"), ParameterFilter())
        >>> average.begin(net)
        >>> average.attach(net, [sgd])
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> _ = sgd.step()
        >>> average.averager.steps
        [1]
    """

    def __init__(self, averager: BalancedAverager, chosen: ParameterFilter) -> None:
        self.averager = averager
        self.chosen = chosen
        self.running = False
        self._parameters: list[nn.Parameter] = []  # in the averager's order
        self._held: dict[int, tuple[list[int], list[int]]] = {}  # by optimizer: tensors, and the group of each
        self._handles: list[RemovableHandle] = []
        self._size = -1
        self._backup: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def attached(self) -> bool:
        """Whether steps of optimizers move the average."""
        return bool(self._handles)

    @property
    def swapped(self) -> bool:
        """Whether an average stands in for the weights."""
        return self._backup is not None

    def begin(self, module: nn.Module, state: dict[str, Any] | None = None) -> None:
        """Begin at the present weights, or go on from a saved state.

        Raises:
            RuntimeError: when nothing trains, or the state names parameters that the module lacks.
        """
        self.end()
        if not self.chosen.of(module):
            raise RuntimeError(
                "there is no trainable parameter to average; check `requires_grad`, `include`, `exclude` and `plugins`"
            )
        if state is not None:
            self._parameters = _named(module, state["names"])
            self.averager.load_state_dict(state, [p.detach() for p in self._parameters])
        self._join(module)
        self.running = True

    def end(self) -> None:
        """Forget the average and leave the optimizers."""
        self.swap_out()
        self.detach()
        self.averager.clear()
        self._parameters = []
        self.running = False

    def _join(self, module: nn.Module) -> None:
        known = set(self.averager.names)
        new = {n: p for n, p in self.chosen.of(module).items() if n not in known}
        self.averager.join(list(new), [p.detach() for p in new.values()])
        self._parameters.extend(new.values())

    def stale(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether :meth:`attach` is due: never called yet, or an optimizer got further parameters since."""
        return not self._handles or _size(optimizers) != self._size

    def attach(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Hook the steps of the optimizers; parameters that began to train meanwhile join at their present values.

        Raises:
            RuntimeError: when no optimizer holds an averaged parameter.
        """
        self.detach()
        self._join(module)
        order = {id(p): i for i, p in enumerate(self._parameters)}
        for optimizer in optimizers:
            groups = enumerate(optimizer.param_groups)
            held = [(order[id(p)], g) for g, group in groups for p in group["params"] if id(p) in order]
            if held:
                self._held[id(optimizer)] = ([i for i, _ in held], [g for _, g in held])
                self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if not self._handles:
            raise RuntimeError(
                f"no optimizer holds any of the {len(order)} parameters to be averaged, such as"
                f" {self.averager.names[0]!r}; let `configure_optimizers` take them"
            )
        self._size = _size(optimizers)

    def detach(self) -> None:
        """Leave the optimizers; the average stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._held.clear()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return  # fused optimizers skip inside their step; only they have the attribute, so only they wait for it
        index, groups = self._held[id(optimizer)]
        parameters = [self._parameters[i] for i in index]
        grads = [p.grad for p in parameters]
        if not any(self.averager.steps[i] for i in index) and all(g is None for g in grads):
            raise RuntimeError(
                f"`{type(optimizer).__name__}` made a step although none of its {len(grads)} averaged parameters has a"
                " gradient; balanced averaging reads them, so use an optimizer that does not shard or hide gradients"
            )
        rates = None
        if self.averager.rule.name == "dimension_free":
            rates = [float(optimizer.param_groups[g]["lr"]) for g in groups]
        self.averager.update([p.detach() for p in parameters], grads, index, rates)

    @torch.no_grad()
    def swap_in(self, module: nn.Module, state: dict[str, Any] | None = None) -> None:
        """Put the average, or a saved one, in place of the weights.

        Raises:
            RuntimeError: when one is in place already, or the module lacks a parameter.
        """
        if self._backup is not None:
            raise RuntimeError("an average is in place already; leave the first block before entering a second")
        names = self.averager.names if state is None else state["names"]
        averages = self.averager.averages if state is None else state["averages"]
        weights = [p.detach() for p in _named(module, names)]
        self._backup = (weights, [w.clone() for w in weights])
        torch._foreach_copy_(weights, list(averages))

    @torch.no_grad()
    def swap_out(self) -> None:
        """Put the weights back, bit by bit; without effect when they are in place."""
        if self._backup is not None:
            weights, saved = self._backup
            torch._foreach_copy_(weights, saved)
            self._backup = None

    @torch.no_grad()
    def finalize(self, module: nn.Module) -> None:
        """Make the average the weights."""
        self.swap_out()
        self.averager.copy_to([p.detach() for p in _named(module, self.averager.names)])


def put_average(state: Mapping[str, Any], module: nn.Module) -> None:
    """Write the averages of a saved state into a module.

    Raises:
        RuntimeError: when the module lacks a parameter.
    """
    with torch.no_grad():
        for parameter, average in zip(_named(module, state["names"]), state["averages"], strict=True):
            parameter.copy_(average)


def _named(module: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    parameters = dict(module.named_parameters())
    lost = [n for n in names if n not in parameters]
    if lost:
        raise RuntimeError(
            f"the average holds {len(lost)} parameters that the module lacks, such as {lost[0]!r};"
            " build the module as it was when the average was made"
        )
    return [parameters[n] for n in names]


def _size(optimizers: Sequence[Optimizer]) -> int:
    return sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
