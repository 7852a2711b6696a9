"""Side networks against the numbers of the reference implementations, in float64."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy, linear

from cl_plugins.adapters.hierarchical_side import HierarchicalSide
from cl_plugins.adapters.ladder import LadderSide
from cl_plugins.adapters.sherl import Consolidator, EmbeddingConsolidator
from cl_plugins.adapters.side_pruning import prune_chain, vit_chain
from cl_plugins.backbones import find_backbone
from cl_plugins.side_network import TapRecord
from cl_plugins.taps import BackboneTaps
from tests._golden import golden_files

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


class Golden(dict):
    """Tensors of a file by name, its configuration beside them."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            super().__init__({key: file.get_tensor(key) for key in list(file.keys())})
            self.meta = {k: json.loads(v) if v[:1] in "[0123456789" else v for k, v in file.metadata().items()}

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)}


def _close(got, expected, what):
    torch.testing.assert_close(got, expected, **TOLERANCE, msg=lambda m: f"{what}: {m}")


def _load(module, weights, rename):
    """Every golden weight has a place and every place a weight."""
    state = {rename(k): v for k, v in weights.items() if rename(k) is not None}
    module.load_state_dict(state, strict=True)


def _check_gradients(module, gradients, rename):
    own = dict(module.named_parameters())
    expected = {rename(k): v for k, v in gradients.items() if rename(k) is not None}
    assert {k for k, p in own.items() if p.grad is not None} == set(expected)
    for name, value in expected.items():
        _close(own[name].grad, value, f"gradient of {name}")


def _renamer(*pairs):
    def rename(name):
        for old, new in pairs:
            if name.startswith(old):
                return None if new is None else new + name.removeprefix(old)
        return name

    return rename


@pytest.mark.parametrize("path", golden_files("side", "lst_ladder*"), ids=lambda p: p.stem)
def test_ladder_golden(path):
    golden = Golden(path)
    meta = golden.meta
    layers = None if meta["layers"] in ("None", None) else meta["layers"]
    kind = {"schedule-linear": "linear", "schedule-hyperbolic": "hyperbolic"}.get(meta["gate"], meta["gate"])
    side = LadderSide(
        meta["d"], meta["h"], meta["L"], reduction=meta["r"], layers=layers, gate=kind,
        temperature=meta["gate_T"], fuse="after" if meta["after"] == "True" else "before",
    ).double()  # fmt: skip
    rename = _renamer(
        ("side_first_downsample", "first"), ("side_downsamples", "down"), ("side_block", "blocks"),
        ("side_gate_params", "gates"), ("final_side_layer_norm", "norm"), ("side_final_upsample", "up"),
        ("block.", None), ("final_layer_norm", None), ("head", None),
    )  # fmt: skip
    dropped = {f"gates.{i}" for i in range(meta["L"]) if i not in side.layers}
    _load(side, golden.under("w."), lambda n: None if rename(n) in dropped else rename(n))

    vit = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=meta["d"], depth=meta["L"], num_heads=meta["h"], num_classes=0
    ).double()
    vit.blocks.load_state_dict(golden.under("w.block."), strict=True)
    taps = {0: golden["in.embed"]}
    for i, block in enumerate(vit.eval().blocks):
        taps[i + 1] = block(taps[i]).detach()
        _close(taps[i + 1], golden[f"tap.{i + 1}"], f"tap {i + 1}")

    stream = side.first(taps[0])
    for i in range(meta["L"]):
        _close(stream, golden[f"side_state.{i}"], f"stream into layer {i}")
        if i in side.layers:
            stream = side.layer(i, stream, taps[i + 1])
    _close(side.stream(taps), stream, "stream")
    _close(side.norm(stream), golden["out.side_last"], "last state")

    feature = side(TapRecord(taps), torch.zeros(0))
    head = {k: v.clone().requires_grad_() for k, v in golden.under("w.head.").items()}
    logits = linear(feature, head["weight"], head["bias"])
    loss = cross_entropy(logits, golden["in.label"].long())
    for name, value in (("feat", feature), ("logits", logits), ("loss", loss.reshape(1))):
        _close(value, golden[f"out.{name}"], name)
    loss.backward()
    _check_gradients(side, golden.under("g."), rename)
    for name, parameter in head.items():
        _close(parameter.grad, golden[f"g.head.{name}"], f"gradient of head.{name}")


def _prune_cases(golden):
    """Chain, weights, importance, points of the keep ratio and expected weights of each case in a file."""
    meta = golden.meta
    if "L" in meta:

        def fix(named):
            return {k.replace("patch_embed_T", "patch_embed"): v.T if "_T" in k else v for k, v in named.items()}

        steps = 4 if meta["version"] == 5 else 1
        importance = fix(golden.under("in.imp.")) if meta["fisher"] == "True" else None
        chain = vit_chain(meta["L"])
        yield chain, fix(golden.under("in.w.")), importance, steps, fix(golden.under("out.w.")), "keep."
        return
    weights = golden.under("in.")
    chain = [
        (name.removesuffix(".weight"),) for name in sorted(weights, key=lambda n: int("".join(filter(str.isdigit, n))))
    ]
    for version in ("v2", "v5"):
        expected = golden.under(f"out.{version}.")
        if expected:
            steps = meta["v5_iterations"] if version == "v5" else 1
            yield chain, weights, None, steps, expected, f"keep.{version}."


@pytest.mark.parametrize("path", golden_files("side", "lst_prune*"), ids=lambda p: p.stem)
def test_pruning_golden(path):
    golden = Golden(path)
    cases = list(_prune_cases(golden))
    assert cases
    for chain, weights, importance, steps, expected, keep in cases:
        pruned, kept = prune_chain(weights, chain, golden.meta["r"], importance, steps)
        assert set(pruned) == set(expected)
        for name, value in expected.items():
            _close(pruned[name], value, name)
        known = golden.under(keep)
        if known:
            for i in range(len(known)):
                assert kept[len(kept) - len(known) + i].tolist() == known[str(i)].sort().values.tolist(), (
                    f"kept rows {i}"
                )


_SHERL_NAMES = {
    "gated": _renamer(
        ("hor_block", "down"), ("guide_block.fc_attn", "score"), ("fc_out", "out"), ("gate_params", "alpha")
    ),
    "norm": _renamer(
        ("guide_block.fc_attn", "score"), ("fc_out.1", "out"), ("fc_out.2", "norm"), ("gate_params", "alpha")
    ),
    "mlp": _renamer(
        ("guide_block.fc_attn", "score"), ("guide_block.mlp", "mlp"), ("fc_out", "out"), ("norm_out", "norm"),
        ("gate_params", "alpha"),
    ),
    "embedding": _renamer(
        ("hor_block_last.fc", "guide"), ("guide_block.spatial_attn", "token_score"),
        ("guide_block.layer_attn", "tap_score"), ("guide_block.gate_parameters", "gates"), ("fc_out", "out"),
    ),
}  # fmt: skip


def _sherl_kind(golden):
    if any(k.startswith("w.hor_block_last") for k in golden):
        return "embedding"
    if any(k.startswith("w.hor_block.0.norm") for k in golden):
        return "mlp"
    return "norm" if "w.hor_block.0.fc.0.weight" in golden else "gated"


def _sherl_rename(kind):
    def rename(name):
        if name.startswith("hor_block.") and kind != "gated":  # hor_block.j.fc[.0], .fc.1 or .norm
            _, j, _, *rest = name.split(".")
            if kind == "embedding":
                return f"down.{j}.{rest[-1]}"
            second = ".norm." in name or (kind == "norm" and rest[0] == "1")
            return f"down.{j}.{int(second)}.{name.rpartition('.')[2]}"
        return _SHERL_NAMES[kind](name)

    return rename


@pytest.mark.parametrize("path", golden_files("side", "sherl_*"), ids=lambda p: p.stem)
def test_sherl_golden(path):
    golden = Golden(path)
    meta, kind = golden.meta, _sherl_kind(golden)
    taps = [golden[f"in.tap.{j}"].requires_grad_() for j in range(meta["K"])]
    last = golden["in.last"].requires_grad_()
    if kind == "embedding":
        gated = "w.guide_block.gate_parameters" in golden
        side = EmbeddingConsolidator(meta["d"], meta["w"], meta["K"], meta["embed"], gated=gated)
    else:
        side = Consolidator(meta["d"], meta["w"], meta["K"], variant=kind)
    side = side.double().eval()
    rename = _sherl_rename(kind)
    _load(side, golden.under("w."), rename)
    if kind == "embedding":
        out = side(taps, last[:, 0], golden.get("in.mask"), golden.get("in.position"))
    else:
        out = side(taps, last)
    _close(out, golden["out"], "output")
    (out * golden["cotangent"]).sum().backward()
    _check_gradients(side, golden.under("g."), rename)
    _close(last.grad, golden["gin.last"], "gradient of the stream")
    for j, tap in enumerate(taps):
        _close(tap.grad, golden[f"gin.tap.{j}"], f"gradient of tap {j}")


def _hst_rename(meta):
    stage_of = [(s, j) for s in range(4) for j in range(meta["m_depths"][s])]
    position = {f"m_block{s + 1}.{j}": i for i, (s, j) in enumerate(stage_of)}

    def rename(name):
        parts = name.split(".")
        if name.startswith("m_embeddings."):
            return f"registers.{parts[1]}"
        if name.startswith("m_patch_embed"):
            return f"embed.{int(parts[0][-1]) - 1}." + ".".join(parts[1:])
        if name.startswith("T_Bridge_"):
            return f"bridge.{int(parts[0][-1]) - 1}.{parts[1]}"
        if name.startswith("m_proj_norm"):
            return f"blocks.{int(parts[0].removeprefix('m_proj_norm')) - 1}.norm_meta.{parts[1]}"
        if name.startswith("m_block"):
            rest = ".".join(parts[2:]).replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
            return f"blocks.{position['.'.join(parts[:2])]}.{rest}"
        if name.startswith("m_norm"):
            return f"norm.{int(parts[0][-1]) - 1}.{parts[1]}"
        return f"batch_norm.{parts[1]}" if name.startswith("fc_norm") else None

    return rename


@pytest.mark.parametrize("path", golden_files("side", "hst_*"), ids=lambda p: p.stem)
def test_hierarchical_golden(path):
    golden = Golden(path)
    meta, rename = golden.meta, _hst_rename(golden.meta)
    vit = VisionTransformer(
        img_size=meta["img_size"], patch_size=meta["patch_size"], embed_dim=meta["embed_dim"], depth=meta["depth"],
        num_heads=meta["num_heads"], num_classes=0,
    ).double()  # fmt: skip
    weights = golden.under("w.")
    backbone_names = {n for n in weights if n.startswith(("cls_token", "pos_embed", "patch_embed", "blocks", "norm."))}
    vit.load_state_dict({n: weights[n] for n in backbone_names}, strict=True)
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(name.startswith("blocks.") and ".norm" in name)
    side = HierarchicalSide(
        meta["embed_dim"], meta["depth"], registers=meta["metaG_num"], widths=meta["m_embed_dims"],
        heads=meta["m_c_num_heads"], depths=meta["m_depths"],
    ).double().train(meta["mode"] == "train")  # fmt: skip
    _load(side, {**weights, **golden.under("buf_in.")}, rename)

    taps = BackboneTaps(find_backbone(vit)).attach()
    taps.want(side.tap_indices, image=True)
    taps.frozen, taps.registers = False, list(side.registers)
    vit.forward_features(golden["in.image"])
    record = taps.take()
    for i in range(meta["depth"]):
        _close(record.taps[i + 1], golden[f"mid.block_out.{i}"], f"output of block {i}")
    levels = copy.deepcopy(side).pyramid(record)
    for s, level in enumerate(levels):
        _close(level.flatten(2).transpose(1, 2), golden[f"mid.stage_out.{s + 1}"], f"level {s + 1}")
    _close(levels[-1].flatten(2).mean(2), golden["out.pooled"], "pooled")

    feature = side(record, torch.zeros(0))
    head = {k: v.clone().requires_grad_() for k, v in golden.under("w.head.").items()}
    logits = linear(feature, head["weight"], head["bias"])
    loss = cross_entropy(logits, golden["in.label"].long())
    for name, value in (("fc_norm", feature), ("logits", logits), ("loss", loss.reshape(1))):
        _close(value, golden[f"out.{name}"], name)
    loss.backward()
    gradients = golden.under("g.")
    _check_gradients(side, gradients, rename)
    trained = {n: p.grad for n, p in vit.named_parameters() if p.grad is not None}
    assert set(trained) == {n for n in gradients if n.startswith("blocks.")}
    for name, gradient in trained.items():
        _close(gradient, gradients[name], f"gradient of {name}")
    for name, parameter in head.items():
        _close(parameter.grad, gradients[f"head.{name}"], f"gradient of head.{name}")
    buffers = dict(side.named_buffers())
    for name, value in golden.under("buf_out.").items():
        _close(buffers[rename(name)], value, f"buffer {name}")
