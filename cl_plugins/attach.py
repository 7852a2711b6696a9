"""Putting modules beside a user's model without renaming one of its parameters, and proving that they are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Plugins(nn.ModuleDict):
    """Container that an ``nn.Sequential`` may call as one of its layers, where it changes nothing."""

    def forward(self, x: Any) -> Any:
        """The input."""
        return x


def plugin_modules(module: nn.Module) -> nn.ModuleDict:
    """The container ``module.plugins`` for everything this library adds, made at first use.

    Raises:
        RuntimeError: when the module already has an attribute ``plugins`` of its own.
    """
    container = getattr(module, "plugins", None)
    if container is None:
        container = _Plugins()
        module.plugins = container
    if not isinstance(container, nn.ModuleDict):
        raise RuntimeError(
            f"`{type(module).__name__}.plugins` must be free for adapters, got {type(container).__name__}; rename yours"
        )
    return container


def freeze(module: nn.Module, except_: Iterable[nn.Module] = ()) -> None:
    """Turn gradients off for all parameters of ``module`` but those of ``except_``, whose flags stay as they are."""
    kept = {id(p) for m in except_ for p in m.parameters()}
    for parameter in module.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
            parameter.grad = None  # a stale gradient would still be applied by an optimizer


@contextmanager
def known_classes(module: nn.Module, own: Tensor) -> Iterator[None]:
    """Tell plugins that let one task alone answer which classes are compared when the task is known.

    Inside they give logits of these classes, too, below all of the task that they choose.

    Args:
        module: the one with the plugins; nothing happens where none chooses.
        own: ``(samples, classes)`` bool, or ``(1, classes)`` where all samples have the same.
    """
    plugins = getattr(module, "plugins", None)
    held = plugins.values() if isinstance(plugins, nn.ModuleDict) else ()
    told: list[Any] = [plugin for plugin in held if hasattr(plugin, "known_classes")]
    for plugin in told:
        plugin.known_classes = own
    try:
        yield
    finally:
        for plugin in told:
            plugin.known_classes = None


class EvalGuard(nn.Module):
    """Keeps a frozen backbone in eval mode although its parent, or a part of it, is switched to training.

    Dropout, drop-path and batch statistics of a frozen network would make its features random or drift.

    Args:
        model: the backbone; the guard is a forward pre-hook on it.

    Example:
        >>> import torch
        >>> backbone = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> guard = EvalGuard(backbone)
        >>> _ = backbone.train()(torch.zeros(1, 2))
        >>> backbone.training
        False
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model.eval()
        plugins = getattr(model, "plugins", None)  # where the backbone is the user's module itself
        own = {id(m) for m in plugins.modules()} if isinstance(plugins, nn.ModuleDict) else set()
        self._parts = tuple(m for m in model.modules() if id(m) not in own)  # a tuple, so that no weight is saved twice
        self._handle = model.register_forward_pre_hook(self._keep)

    def _keep(self, model: nn.Module, args: Any) -> None:
        if any(part.training for part in self._parts):
            plugins: Any = getattr(model, "plugins", None)
            adapters_train = isinstance(plugins, nn.ModuleDict) and plugins.training
            model.eval()
            if adapters_train:
                plugins.train()

    def remove(self) -> None:
        """Let the model follow its parent's mode again."""
        self._handle.remove()


def own_memory(feature: Tensor) -> Tensor:
    """``feature``, copied where it is a view that keeps more than itself in memory, as a class token does all tokens.

    Example:
        >>> tokens = torch.zeros(2, 197, 192)
        >>> own_memory(tokens[:, 0]).untyped_storage().nbytes(), own_memory(tokens) is tokens  # 2 * 192 * 4
        (1536, True)
    """
    compiling = torch.compiler.is_compiling()  # a compiled graph cannot ask for a storage's size
    view = compiling or feature.untyped_storage().nbytes() > feature.numel() * feature.element_size()
    return feature.clone() if view else feature


class OwnFeature(nn.Module):
    """Gives a classifier a feature in memory of its own, so that its weight's gradient keeps nothing else alive.

    Args:
        head: the classifier; a forward pre-hook on it copies what is a view of more.

    Example:
        >>> head, given = nn.Linear(4, 2), []
        >>> own = OwnFeature(head)
        >>> _ = head.register_forward_pre_hook(lambda head, args: given.append(args[0].untyped_storage().nbytes()))
        >>> _ = head(torch.zeros(3, 5, 4)[:, 0])
        >>> given  # 3 * 4 * 4 bytes, not 5 times as many
        [48]
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._handle = head.register_forward_pre_hook(_own)

    def remove(self) -> None:
        """Give the classifier its input as it is again."""
        self._handle.remove()


def _own(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(own_memory(a) for a in args)


class CallCheck:
    """Finds adapters that a forward pass never reaches: they would train nothing, silently.

    Temporary hooks count calls between construction and :meth:`verify`.

    Args:
        modules: name and module of everything that must be called.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._calls = dict.fromkeys(modules, 0)
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(lambda *_, name=name: self._count(name)) for name, module in modules.items()
        ]

    def _count(self, name: str) -> None:
        self._calls[name] += 1

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def verify(self) -> dict[str, int]:
        """Remove the hooks and return the number of calls by name.

        Raises:
            RuntimeError: naming every module without a call.
        """
        self.close()
        silent = [name for name, n in self._calls.items() if n == 0]
        if silent:
            raise RuntimeError(
                f"{len(silent)} of {len(self._calls)} adapters were never called in the first training batch:"
                f" {', '.join(silent[:8])}{', ...' if len(silent) > 8 else ''}; the model bypasses these layers,"
                " choose other ones"
            )
        return dict(self._calls)
