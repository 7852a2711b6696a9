"""Finding linear layers for adapters in timm, open_clip, Hugging Face and other models, and attaching to them.

No layer is replaced and no parameter renamed. Layers that their model computes around are dealt with: the raw
projections of ``nn.MultiheadAttention`` (:mod:`cl_plugins.adapters.adopted_attention`), the ``qkv`` of timm's EVA, BEiT
and SwinV2 with separate biases, and the fused evaluation path of ``nn.TransformerEncoderLayer``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from cl_plugins.adapters.adopted_attention import Slot, adopt, obstacle, release
from cl_plugins.adapters.delta import LinearDelta

QkvMode = Literal["split", "fused"]

DEFAULT_TARGETS = (
    r"(.*\.)?blocks\.\d+\.(attn\.(qkv|q_proj|k_proj|v_proj|proj)|mlp\.(fc1|fc1_g|fc1_x|fc2|w12|w3))",  # timm
    r"(.*\.)?resblocks\.\d+\.(attn\.(in_proj|out_proj)|mlp\.(c_fc|c_proj))",  # open_clip
    r"(.*\.)?layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj|out_proj)|mlp\.(fc1|fc2))",  # HF CLIP, LLaMA
    r"(.*\.)?h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))",  # GPT-2
    r"(.*\.)?layers\.\d+\.(self_attn\.in_proj|linear1|linear2)",  # nn.TransformerEncoder
)
"""Where adapters go when no targets are given: attention and MLP of every block, LLaMA's attention alone."""

_VIRTUAL_PARTS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
_FUSED_NAMES = ("qkv", "c_attn", "in_proj")


@dataclass(frozen=True)
class Site:
    """One place for an adapter.

    Attributes:
        name: dotted path of the layer, or of an attention layer followed by ``in_proj`` or ``out_proj``.
        layer: the module to attach to.
        slot: "output" of a linear layer, or the projection of an adopted attention layer.
        in_features: width of the input.
        out_features: width of one part of the output.
        parts: parts that get an adapter of their own.
        of: parts of the output: 3 for fused query, key and value, else 1.
        cures: (module, attribute, value) that make the model call the layer.
    """

    name: str
    layer: nn.Module
    slot: Literal["output"] | Slot
    in_features: int
    out_features: int
    parts: tuple[int, ...] = (0,)
    of: int = 1
    cures: tuple[tuple[nn.Module, str, Any], ...] = ()


def _linear_sizes(layer: nn.Module) -> tuple[int, int] | None:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    weight, nf = getattr(layer, "weight", None), getattr(layer, "nf", None)
    if type(layer).__name__ == "Conv1D" and isinstance(nf, int) and weight is not None and weight.ndim == 2:
        return int(weight.shape[0]), nf  # GPT-2's linear layer, stored the other way round
    return None


def _cures(path: str, modules: dict[str, nn.Module]) -> tuple[tuple[nn.Module, str, Any], ...]:
    """Settings of the layers above ``path`` that let it be called."""
    found: list[tuple[nn.Module, str, Any]] = []
    parts = path.split(".")
    parent = modules.get(".".join(parts[:-1]))
    if parts[-1] == "qkv" and getattr(parent, "q_bias", None) is not None and hasattr(parent, "qkv_bias_separate"):
        assert parent is not None
        found.append((parent, "qkv_bias_separate", True))
    for end in range(len(parts)):
        above = modules.get(".".join(parts[:end]))
        if isinstance(above, nn.TransformerEncoderLayer):
            found.append((above, "activation_relu_or_gelu", 0))  # 0 turns its fused path off and changes nothing else
        elif isinstance(above, nn.TransformerEncoder):
            found.append((above, "use_nested_tensor", False))
    return tuple(found)


def _sites(modules: dict[str, nn.Module], qkv_mode: QkvMode) -> tuple[dict[str, Site], dict[str, str]]:
    """Every possible site by name, and by name why something is none although it looks like one."""
    sites: dict[str, Site] = {}
    impossible: dict[str, str] = {}
    for path, layer in modules.items():
        prefix = f"{path}." if path else ""
        if isinstance(layer, nn.MultiheadAttention):
            reason = obstacle(layer)
            if reason is not None:
                impossible.update({prefix + n: f"{type(layer).__name__}: {reason}" for n in ("in_proj", "out_proj")})
                continue
            e, cures = layer.embed_dim, _cures(path, modules)
            joined = Site(prefix + "in_proj", layer, "in_proj", e, e, (0, 1, 2), 3, cures)
            sites[joined.name] = joined if qkv_mode == "split" else _fused(joined)
            sites[prefix + "out_proj"] = Site(prefix + "out_proj", layer, "out_proj", e, e, cures=cures)
        elif hasattr(layer, "in_proj_weight"):
            impossible[prefix + "in_proj"] = f"{type(layer).__name__}: it multiplies a raw `in_proj_weight` by itself"
        sizes = _linear_sizes(layer)
        if sizes is None or path in sites or path in impossible:
            continue
        width, out = sizes
        site = Site(path, layer, "output", width, out, cures=_cures(path, modules))
        if path.split(".")[-1] in _FUSED_NAMES and out == 3 * width and qkv_mode == "split":
            site = replace(site, out_features=width, parts=(0, 1, 2), of=3)
        sites[path] = site
    return sites, impossible


def _fused(site: Site) -> Site:
    return replace(site, out_features=site.out_features * site.of, parts=(0,), of=1)


def _matches(names: list[str], targets: str | Sequence[str] | None) -> Iterator[tuple[str, bool]]:
    """Names that the targets mean, and whether the user named them rather than a default."""
    if targets is None:
        patterns = [re.compile(p) for p in DEFAULT_TARGETS]
        yield from ((n, False) for n in names if any(p.fullmatch(n) for p in patterns))
    elif isinstance(targets, str):
        pattern = re.compile(targets)
        yield from ((n, True) for n in names if pattern.fullmatch(n))
    else:
        yield from ((n, True) for n in names if any(n == t or n.endswith(f".{t}") for t in targets))


def find_sites(
    module: nn.Module, targets: str | Sequence[str] | None = None, *, qkv_mode: QkvMode = "split"
) -> list[Site]:
    """The linear layers that adapters are to act on, in the model's order; nothing is changed.

    Args:
        module: any module; what is under its ``plugins`` is left out.
        targets: a string is a regular expression that a layer's whole dotted name must match, a list holds ends of
            dotted names, as in PEFT. Projections of ``nn.MultiheadAttention`` are named ``<path>.in_proj`` and
            ``<path>.out_proj``, or ``q_proj``, ``k_proj``, ``v_proj``; the path alone means all four. None for
            attention and MLP of every block, :data:`DEFAULT_TARGETS`.
        qkv_mode: "split" for an adapter each on query, key and value where one layer computes them, "fused" for one.

    Raises:
        ValueError: when nothing matches, naming what is near, or something that adapters cannot act on, saying why.

    Example:
        >>> from cl_plugins.backbones import vit_glyph
        >>> [s.name for s in find_sites(vit_glyph(), ["qkv", "fc2"])][:3]
        ['blocks.0.attn.qkv', 'blocks.0.mlp.fc2', 'blocks.1.attn.qkv']
    """
    if qkv_mode not in ("split", "fused"):
        raise ValueError(f"`qkv_mode` must be 'split' or 'fused', got {qkv_mode!r}")
    names = {n.replace("_orig_mod.", ""): m for n, m in module.named_modules()}  # as without `torch.compile`
    modules = {n: m for n, m in names.items() if n != "plugins" and not n.startswith("plugins.")}
    sites, impossible = _sites(modules, qkv_mode)
    virtual = {
        f"{name[: -len('in_proj')]}{projection}": (name, part)
        for name, site in sites.items()
        if site.slot == "in_proj" and site.of == 3
        for projection, part in _VIRTUAL_PARTS.items()
    }
    chosen: dict[str, set[int]] = {}
    for name, named in _matches(list(dict.fromkeys([*modules, *sites, *impossible, *virtual])), targets):
        if name in impossible:
            raise ValueError(f"`targets` must match layers that adapters can act on, got {name!r}, {impossible[name]}")
        if name in virtual:
            chosen.setdefault(virtual[name][0], set()).add(virtual[name][1])
        elif name in sites:
            chosen.setdefault(name, set()).update(sites[name].parts)
        elif isinstance(modules[name], nn.MultiheadAttention):
            for projection in ("in_proj", "out_proj"):
                if f"{name}.{projection}" in impossible:
                    raise ValueError(
                        f"`targets` must match layers that adapters can act on, got {name!r},"
                        f" {impossible[f'{name}.{projection}']}"
                    )
                chosen.setdefault(f"{name}.{projection}", set()).update(sites[f"{name}.{projection}"].parts)
        elif named:
            raise ValueError(_unfit(name, modules[name], [s for s in sites if s.startswith(f"{name}.")]))
    if not chosen:
        raise ValueError(_nothing(type(module).__name__, targets, list(sites)))
    return [
        site if tuple(sorted(chosen[name])) == site.parts else replace(site, parts=tuple(sorted(chosen[name])))
        for name, site in sites.items()
        if name in chosen
    ]


def _unfit(name: str, layer: nn.Module, inside: list[str]) -> str:
    why = f"it is no linear layer but holds some; name these, such as {inside[0]!r}" if inside else (
        "adapters act on nn.Linear, nn.MultiheadAttention and GPT-2's Conv1D"
    )  # fmt: skip
    return f"`targets` must match layers that adapters can act on, got {name!r}, a {type(layer).__name__}: {why}"


def _nothing(kind: str, targets: str | Sequence[str] | None, names: list[str]) -> str:
    if not names:
        return f"`{kind}` must hold linear layers for adapters to act on, found none"
    words = [] if targets is None else [targets] if isinstance(targets, str) else list(targets)
    leaves = list(dict.fromkeys(n.split(".")[-1] for n in names))
    near = [m for w in words for m in get_close_matches(w.split(".")[-1], leaves, n=2, cutoff=0.5)]
    near += [m for w in words for m in get_close_matches(w, names, n=2, cutoff=0.5)]
    hint = f"did you mean {' or '.join(map(repr, dict.fromkeys(near)))}? " if near else ""
    return (
        f"`targets` must match a linear layer of `{kind}`, got {targets!r} and no match; {hint}its linear layers end in"
        f" {', '.join(leaves[:12])}; a string must match the whole name, such as {names[0]!r}, a list against its end"
    )


class Attachment:
    """An adapter on a site.

    Args:
        site: from :func:`find_sites`.
        adapter: sizes and parts as the site's.
    """

    def __init__(self, site: Site, adapter: LinearDelta) -> None:
        self._site, self._adapter = site, adapter
        self._handle: RemovableHandle | None = None
        self._before = [(m, n, getattr(m, n)) for m, n, _ in site.cures if hasattr(m, n)]
        for owner, name, value in site.cures:
            setattr(owner, name, value)
        if site.slot == "output":
            self._handle = site.layer.register_forward_hook(adapter.hook, with_kwargs=True)
        else:
            assert isinstance(site.layer, nn.MultiheadAttention)
            adopt(site.layer, site.slot, adapter)

    def remove(self) -> None:
        """Leave the layer as it was found."""
        if self._handle is not None:
            self._handle.remove()
        elif isinstance(self._site.layer, nn.MultiheadAttention):
            release(self._site.layer, self._adapter)
        for owner, name, value in self._before:
            setattr(owner, name, value)
