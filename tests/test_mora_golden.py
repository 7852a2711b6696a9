"""Golden numbers of the rank-1 experts and of the vision-language loss.

``c*`` files hold a layer with its banks, ``loss_*`` files a batch of features (so do files of any prefix with the same
contents); settings come from ``meta.json`` beside them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cl_plugins.adapters.rank_experts import ExpertOptions, RankExperts
from cl_plugins.targets import Attachment, find_sites
from cl_plugins.vision_language import contrastive_loss
from tests._golden import golden_files

FILES = golden_files("mora", "*.npz")


def _keys(path: Path) -> set[str]:
    with np.load(path) as data:
        return set(data.files)


LOSSES = [p for p in FILES if p.name.startswith("loss") or "image_features" in _keys(p)]
LAYERS = [p for p in FILES if p not in LOSSES]


def _load(path: Path, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict]:
    with np.load(path) as data:
        tensors = {k: torch.from_numpy(np.asarray(data[k])) for k in data.files}
    meta = json.loads((path.parent / "meta.json").read_text())[path.stem]
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}, meta


def _layer(
    data: dict[str, torch.Tensor], meta: dict, evaluation: str, *, new: bool = True
) -> tuple[nn.Linear, RankExperts]:
    """The base layer with a bank attached as the callback attaches it."""
    out, width = data["W"].shape
    model = nn.Sequential(nn.Linear(width, out, bias="b" in data)).to(data["W"].dtype)
    layer = model[0]
    layer.weight.data = data["W"]
    if "b" in data:
        layer.bias.data = data["b"]
    options = ExpertOptions(
        rank=meta["r"], top_k=meta["k"], temperature=meta["tau"], threshold=meta["delta"], scaling=meta["scaling"],
        evaluation=evaluation,
    )  # fmt: skip
    bank = RankExperts(width, out, options, dtype=data["W"].dtype)
    for task in range(meta["T"]):
        bank.grow(task)
    values = {
        "old_keys": data["A_old"],
        "new_keys": data["A_new"],
        "old_values": data["B_old"].T,
        "new_values": data["B_new"].T,
    }
    if not new:  # the state before the last growth: the newest of the old experts stand where the new ones do
        r = meta["r"]
        bank = RankExperts(width, out, options, dtype=data["W"].dtype)
        for task in range(meta["T"] - 1):
            bank.grow(task)
        keys, old = data["A_old"], data["B_old"].T
        values = {"old_keys": keys[:-r], "new_keys": keys[-r:], "old_values": old[:-r], "new_values": old[-r:]}
    with torch.no_grad():
        for name, value in values.items():
            getattr(bank, name).copy_(value[None])
    Attachment(find_sites(model, ["0"])[0], bank)
    return layer, bank.train(meta["training"])


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 5e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("evaluation", ["dense", "bag"])
@pytest.mark.parametrize("path", LAYERS, ids=lambda p: p.stem)
def test_golden_layer(path: Path, evaluation: str, dtype: torch.dtype) -> None:
    data, meta = _load(path, dtype)
    layer, bank = _layer(data, meta, evaluation)
    atol = _tolerance(dtype)
    x = data["x"].clone().requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, data["y"], atol=atol, rtol=0)
    torch.testing.assert_close(bank(x), data["delta"], atol=atol, rtol=0)
    torch.testing.assert_close(y - bank(x), data["y_base"], atol=atol, rtol=0)

    index, _, weight = bank.select(x)
    assert index.shape[-1] == meta["k_effective"] == data["sel"].shape[-1]
    spread = torch.zeros_like(data["w"]).scatter_(-1, index[..., 0, :], weight[..., 0, :])
    regular = torch.ones(data["w"].shape[:-1], dtype=torch.bool)
    if meta["zero_row"]:  # on a token of zeros all scores tie
        regular.view(-1)[0] = False
    assert torch.equal(index[..., 0, :][regular], data["sel"][regular])
    torch.testing.assert_close(spread[regular], data["w"][regular], atol=20 * atol, rtol=0)
    if dtype == torch.float64:  # in float32 the smallest weights underflow
        counts = (weight[..., 0, :] > 0).sum(-1).flatten()[regular.flatten()]
        assert counts.tolist() == torch.tensor(meta["n_active_per_token"])[regular.flatten()].tolist()

    if "grad_x" in data:
        (y * data["cotangent"]).sum().backward()
        for own, name in (
            (x.grad, "grad_x"),
            (bank.new_keys.grad[0], "grad_A_new"),
            (bank.new_values.grad[0].T, "grad_B_new"),
        ):
            bound = 1e-7 if dtype == torch.float64 else 1e-4 * max(1.0, data[name].abs().max().item())
            torch.testing.assert_close(own, data[name], atol=bound, rtol=0)
    else:
        y.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in (bank.new_keys, bank.new_values, x))
    assert bank.old_keys.grad is None
    assert bank.old_values.grad is None


@pytest.mark.parametrize("path", [p for p in LAYERS if "y_without_new" in _keys(p)], ids=lambda p: p.stem)
def test_golden_layer_before_growth(path: Path) -> None:
    data, meta = _load(path, torch.float64)
    layer, _ = _layer(data, meta, "dense", new=False)
    torch.testing.assert_close(layer(data["x"]), data["y_without_new"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", [p for p in LAYERS if "sel" in _keys(p)], ids=lambda p: p.stem)
def test_golden_responses(path: Path) -> None:
    data, meta = _load(path, torch.float64)
    _, bank = _layer(data, meta, "dense")
    _, score, _ = bank.select(data["x"])
    expected = data["s"].gather(-1, data["sel"])
    torch.testing.assert_close(score[..., 0, :], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", LOSSES, ids=lambda p: p.stem)
def test_golden_loss(path: Path) -> None:
    data, meta = _load(path, torch.float64)
    images = data["image_features"].clone().requires_grad_()
    texts = data["text_features"].clone().requires_grad_()
    n_seen = meta["n_seen"]
    loss = contrastive_loss(images, texts[n_seen:], data["labels"] - n_seen, meta["logit_scale"], n_seen)
    torch.testing.assert_close(loss.image_to_text, data["loss_i2t"], atol=1e-12, rtol=0)
    torch.testing.assert_close(loss.text_to_image, data["loss_t2i"], atol=1e-12, rtol=0)
    torch.testing.assert_close(loss.total, data["loss"], atol=1e-12, rtol=0)
    loss.total.backward()
    torch.testing.assert_close(images.grad, data["grad_image_features"], atol=1e-7, rtol=0)
    torch.testing.assert_close(texts.grad, data["grad_text_features"], atol=1e-7, rtol=0)
