"""What methods own, without the model they stand beside, as one safetensors file; for every method.

A checkpoint holds the whole module and what is needed to train on. This file holds the adapters, buffers and classifier
alone, with the grown structure, and is data only. It is loaded into a fresh base model with the same callbacks::

    export_adapters(module, [method], "adapters.safetensors")

    fresh, method = MyModule(), OVOR()  # the same base model
    load_adapters(fresh, [method], "adapters.safetensors")
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cl_plugins._reading import read_safetensors

if TYPE_CHECKING:
    from cl_plugins.plugin import ContinualCallback

FORMAT = 1
_HEADER = "cl_plugins_trained"


def _names(callbacks: Iterable[ContinualCallback]) -> list[str]:
    """Class names of the methods, those that change nothing left out."""
    return sorted(type(c).__name__ for c in callbacks if c.training != "neutral")


def _owned(module: nn.Module, callbacks: Sequence[ContinualCallback]) -> set[str]:
    """Keys of the state dict that belong to the methods."""
    own = {id(p) for c in callbacks for p in c.own_parameters(module).values()}
    keys = {k for k in module.state_dict() if k.startswith("plugins.")}
    return keys | {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in own}


def _checksum(tensors: Iterable[tuple[str, Any]]) -> int:
    """CRC-32 of names and bytes."""
    total = 0
    for name, value in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        if isinstance(value, Tensor) and value.numel():
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total = zlib.crc32(flat.numpy().data, total)
    return total


def check_owned(module: nn.Module, callbacks: Sequence[ContinualCallback]) -> None:
    """Raise a ValueError when something trains that a file of adapters would not hold."""
    owned = _owned(module, callbacks)
    outside = [n for n, p in module.named_parameters() if p.requires_grad and n not in owned]
    if outside:
        raise ValueError(
            f"`callbacks` must own everything that trains, got {len(outside)} other parameters, {outside[0]!r} first;"
            " save a checkpoint of the whole module instead"
        )


def export_adapters(module: nn.Module, callbacks: Sequence[ContinualCallback], path: str | Path) -> Path:
    """Write what the methods own, whole or not at all.

    Args:
        module: the trained module.
        callbacks: the methods that are installed in it.
        path: the file, ``.safetensors``.

    Returns:
        The file.

    Raises:
        ValueError: when parameters outside the methods' own are trained, which a file of adapters would not hold.

    Example:
        >>> import copy, tempfile
        >>> from cl_plugins import Task
        >>> from cl_plugins.backbones import vit_glyph
        >>> from cl_plugins.callbacks import LoRA
        >>> net, method = vit_glyph(num_classes=4), LoRA(rank=2)
        >>> fresh = copy.deepcopy(net)
        >>> method.install(net)
        >>> method.start_task(net, Task(0, (0, 1)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = export_adapters(net, [method], f"{folder}/adapters.safetensors")
        ...     load_adapters(fresh, [LoRA(rank=2)], file)
        >>> all(torch.equal(v, fresh.state_dict()[k]) for k, v in net.state_dict().items())
        True
    """
    check_owned(module, callbacks)
    owned, state = _owned(module, callbacks), module.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key in owned:
        value = state[key]
        if isinstance(value, Tensor):
            tensors[key] = value.detach().cpu().contiguous().clone()
        else:
            plain[key] = value
    base = _checksum((k, v) for k, v in state.items() if k not in owned)
    header = {"format": FORMAT, "methods": _names(callbacks), "base": base, "plain": plain}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, str(temporary), metadata={"format": "pt", _HEADER: json.dumps(header)})
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    metadata, tensors = read_safetensors(path)
    try:
        header = json.loads(metadata.get(_HEADER, ""))
    except (ValueError, RecursionError):
        header = None
    kinds = {"format": int, "methods": list, "base": int, "plain": dict}
    if not isinstance(header, dict) or any(not isinstance(header.get(k), kind) for k, kind in kinds.items()):
        raise ValueError(f"`path` must be a file written by `export_adapters`, got {str(path)!r} without its header")
    if header["format"] > FORMAT:
        raise ValueError(f"`path` must be in format {FORMAT} or older, got {header['format']!r}; update the library")
    return header, tensors


def load_adapters(module: nn.Module, callbacks: Sequence[ContinualCallback], path: str | Path) -> None:
    """Install the methods in a module and load what :func:`export_adapters` wrote, with the grown structure.

    Args:
        module: a base model with the same weights as the one that was trained, as the user builds it.
        callbacks: methods with the same settings as those that were trained.
        path: the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file of something else, of other methods, or of another base model.
        RuntimeError: when names or shapes do not fit.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` must be a file written by `export_adapters`, got {str(path)!r}")
    header, tensors = _read(Path(path))
    if header["methods"] != _names(callbacks):
        raise ValueError(f"`callbacks` must be those of the file, {header['methods']}, got {_names(callbacks)}")
    held = {**tensors, **header["plain"]}
    for callback in callbacks:
        callback.install(module)
    base = {k: v for k, v in module.state_dict().items() if not k.startswith("plugins.") and k not in held}
    if _checksum(base.items()) != header["base"]:
        raise ValueError(
            "`module` must have the base weights that the adapters were trained on, got others;"
            " build it with the same pretrained weights, or seed its initialization likewise"
        )
    module.load_state_dict({**base, **held})
