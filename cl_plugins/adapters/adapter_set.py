"""The adapters of a model as one module, saved and loaded as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cl_plugins._reading import read_safetensors
from cl_plugins.adapters.delta import LinearDelta
from cl_plugins.targets import Attachment, Site

FORMAT = 1
"""Version of the adapter files that this library writes and reads."""
_EXTRA = "_extra_state"


class AdapterSet(nn.ModuleDict):
    """Adapters by site; their keys are the sites' names with ``__`` for dots.

    A state that does not fit (other layers, another rank) is refused before anything is loaded.

    Args:
        sites: from :func:`cl_plugins.targets.find_sites`.
        make: an adapter for a site.
    """

    def __init__(self, sites: Sequence[Site], make: Callable[[Site], LinearDelta]) -> None:
        super().__init__({site.name.replace(".", "__"): make(site) for site in sites})
        self.names = {site.name.replace(".", "__"): site.name for site in sites}

    def attach(self, sites: Sequence[Site]) -> None:
        """Let the adapters act on their sites."""
        self.attachments = [Attachment(s, a) for s, a in zip(sites, self.by_site().values(), strict=True)]

    def detach(self) -> None:
        """Give the layers back as they were; the adapters stay in this module."""
        while self.attachments:
            self.attachments.pop().remove()

    def by_site(self) -> dict[str, LinearDelta]:
        """Site name and adapter, in the model's order."""
        return {self.names[key]: adapter for key, adapter in self.items() if isinstance(adapter, LinearDelta)}

    def refuse(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Compare states of adapters, by key, with these adapters.

        Raises:
            RuntimeError: naming what differs.
        """
        if set(states) != set(self.names):
            sides = {
                "saved": [k.replace("__", ".") for k in states if k not in self.names],
                "here": [name for key, name in self.names.items() if key not in states],
            }
            only = [f"only {w}: {', '.join(n[:4])}{', ...' * (len(n) > 4)}" for w, n in sides.items() if n]
            raise RuntimeError(f"the saved adapters are on other layers, {'; '.join(only)}; use the same `targets`")
        for key, state in states.items():
            adapter = self[key]
            assert isinstance(adapter, LinearDelta)
            reason = adapter.refusal(state)
            if reason is not None:
                raise RuntimeError(f"the saved adapter of {self.names[key]!r} does not fit: {reason}")

    def check_root(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *unused: Any) -> None:
        """Hook of the whole model: refuse a state with adapters that do not fit while all weights are untouched."""
        path = next(n for n, m in module.named_modules() if m is self)
        states: dict[str, dict[str, Tensor]] = {}
        for name, value in state_dict.items():
            if name.startswith(f"{prefix}{path}."):
                key, _, rest = name.removeprefix(f"{prefix}{path}.").partition(".")
                states.setdefault(key, {})[rest] = value
        if states:
            self.refuse(states)


def save_adapters(adapters: AdapterSet, path: str | Path, method: str, settings: Mapping[str, Any]) -> None:
    """Write the adapters alone, with the settings that they need, as safetensors.

    Args:
        adapters: what to save.
        path: the file.
        method: name of the method.
        settings: plain values; a file with other ones is loaded with a warning.
    """
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    for name, adapter in adapters.by_site().items():
        for key, value in adapter.state_dict().items():
            if key == _EXTRA:
                extra[name] = value.tolist()
            else:
                tensors[f"{name}.{key}"] = value.detach().cpu().contiguous()
    header = {
        "format": FORMAT,
        "method": method,
        "settings": dict(settings),
        "sites": list(adapters.by_site()),
        "extra": extra,
    }
    save_file(tensors, str(path), metadata={"format": "pt", "cl_plugins": json.dumps(header)})


def read_adapters(path: str | Path, method: str) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Header and states by site name of a file of :func:`save_adapters`.

    Raises:
        ValueError: for a file of something else.
    """
    metadata, tensors = read_safetensors(path)
    if "cl_plugins" not in metadata:
        raise ValueError(f"`path` must be a file written by `export_adapters`, got {str(path)!r} without its header")
    header = _header(metadata["cl_plugins"], path)
    if header["method"] != method or header["format"] > FORMAT:
        raise ValueError(
            f"`path` must hold adapters of {method!r} in format {FORMAT} or older, got {header['method']!r}"
            f" in format {header['format']}"
        )
    states: dict[str, dict[str, Tensor]] = {name: {} for name in header["sites"]}
    for key, tensor in tensors.items():
        name = max((n for n in states if key.startswith(f"{n}.")), key=len, default=None)
        if name is None:
            raise ValueError(f"`path` must name the layer of each tensor, got {key!r} in {str(path)!r} without one")
        states[name][key.removeprefix(f"{name}.")] = tensor
    for name, value in header["extra"].items():
        states[name][_EXTRA] = torch.tensor(value, dtype=torch.int64)
    return header, states


def _integers(value: Any) -> bool:
    """Whether a JSON value is a whole number of 64 bits, or lists of such of one shape."""
    if isinstance(value, list):
        lengths = {len(v) if isinstance(v, list) else -1 for v in value}
        return len(lengths) <= 1 and all(map(_integers, value))
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _header(text: str, path: str | Path) -> dict[str, Any]:
    """The header of an adapter file.

    Raises:
        ValueError: when a part of it is missing or of another kind.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    kinds = {"format": int, "method": str, "settings": dict, "sites": list, "extra": dict}
    wrong = [k for k, kind in kinds.items() if not isinstance(header, dict) or not isinstance(header.get(k), kind)]
    if not wrong:
        assert isinstance(header, dict)
        sites, extra = header["sites"], header["extra"]
        wrong += [] if all(isinstance(s, str) for s in sites) else ["sites"]
        wrong += [] if all(name in sites and _integers(v) for name, v in extra.items()) else ["extra"]
    if wrong:
        raise ValueError(f"`path` must have a whole header, got {str(path)!r} with a faulty `{wrong[0]}` in it")
    checked: dict[str, Any] = header
    return checked


def _endings(names: Sequence[str]) -> dict[str, str]:
    """Names without the path that all of them share, so that a model fits wherever it sits in a module."""
    split = [n.split(".") for n in names]
    shared = 0
    while all(len(s) > shared + 1 for s in split) and len({s[shared] for s in split}) == 1:
        shared += 1
    return {".".join(s[shared:]): name for s, name in zip(split, names, strict=True)}


def load_adapters(adapters: AdapterSet, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load what :func:`read_adapters` gave, all or nothing.

    Raises:
        RuntimeError: naming what does not fit; no weight is changed.
    """
    own, saved = _endings(list(adapters.by_site())), _endings(list(states))
    by_key = {
        own[e].replace(".", "__") if e in own else name.replace(".", "__"): states[name] for e, name in saved.items()
    }
    adapters.refuse(by_key)
    for key, state in by_key.items():
        adapters[key].load_state_dict(dict(state))
