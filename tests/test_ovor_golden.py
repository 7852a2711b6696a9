"""OVOR against numbers of the published code, see tests/golden/ovor/README.md."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from cl_plugins import Task
from cl_plugins.adapters.prefix_prompt import PrefixPrompt
from cl_plugins.callbacks.ovor import OVOR
from cl_plugins.features import collect_features
from cl_plugins.head_phase import head_step, outlier_batches
from cl_plugins.heads import HeadMask
from cl_plugins.neighbors import boundary_samples, kth_neighbor_distance, normalize_rows
from cl_plugins.outliers import VirtualOutliers, energy, ovor_learning_rate, vor_loss
from tests._golden import golden_files


def cases(pattern: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", golden_files("ovor", f"{pattern}.safetensors"), ids=lambda p: p.stem)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in list(f.keys())}, f.metadata() or {}


def in_double(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v.double() for k, v in tensors.items() if k.startswith(prefix)}


def settings_of(meta: dict[str, str], **more: object) -> VirtualOutliers:
    return VirtualOutliers(
        neighbors=int(meta["K"]),
        n_boundary=int(meta["select"]),
        draws=int(meta["sample_from"]),
        noise_scale=float(meta["cov"]),
        per_class=int(meta["num_per_class"]),
        **more,
    )


@cases("synthesis_*")
def test_golden_synthesis(path: Path) -> None:
    t, meta = read(path)
    settings, n_classes = settings_of(meta), len(json.loads(meta["class_sizes"]))
    unit = normalize_rows(t["features"])
    assert_close(kth_neighbor_distance(unit, unit, settings.neighbors), t["id_kth_sqdist"], atol=1e-5, rtol=1e-5)
    edge = boundary_samples(t["features"], settings.neighbors, settings.n_boundary)
    assert set(edge.tolist()) == set(t["boundary_ids"].tolist())
    scores = kth_neighbor_distance(settings.noise_scale * t["noise"], unit, settings.neighbors)
    assert_close(scores, t["noise_kth_sqdist"], atol=1e-4, rtol=1e-5)

    for features in (t["features"], t["features"].double()):
        out = settings.synthesize(features, n_classes, t["noise"])
        assert_close(out.rows.repeat_interleave(out.counts, 0), t["outliers"].to(features.dtype), atol=1e-6, rtol=1e-6)
        assert torch.equal(out.candidate.repeat_interleave(out.counts), t["outliers_noise_index"])
        multiplicity = torch.zeros(settings.draws, dtype=torch.int64).index_add(0, out.candidate, out.counts)
        assert torch.equal(multiplicity, t["outliers_multiplicity"])

    n_batches = -(-len(t["features"]) // settings.batch_size)
    assert n_batches == int(meta["id_batches"])
    batches = [rows.repeat_interleave(counts, 0) for rows, counts in outlier_batches(out, n_batches)]
    assert {len(b) for b in batches} == {int(meta["ood_batch_size"])}
    expected = t["outliers"][: n_batches * int(meta["ood_batch_size"])].double()
    assert_close(torch.cat(batches), expected, atol=1e-6, rtol=1e-6)


@cases("variant_synthesis_*")
@pytest.mark.parametrize(("tag", "normalize"), [("raw", False), ("normed", True)])
def test_golden_boundary_mode(path: Path, tag: str, normalize: bool) -> None:
    t, meta = read(path)
    expected, scores = t[f"outliers_{tag}"], t[f"outliers_{tag}_kth_sqdist"]
    n_classes = len(expected) // int(meta["num_per_class"])
    settings = settings_of(meta, mode="boundary", normalize_candidates=normalize)
    out = settings.synthesize(t["features"], n_classes, t["noise"])
    assert_close(out.scores, scores.sort(descending=True).values, atol=5e-5, rtol=1e-5)
    assert out.counts.eq(1).all()
    assert len(out.rows) == len(expected)
    assert torch.cdist(out.rows.double(), expected.double()).argmin(1).unique().numel() == len(expected)  # as sets
    assert torch.cdist(out.rows.double(), expected.double()).amin(1).max() < 1e-4


@cases("vor_loss*")
def test_golden_loss_and_its_gradient(path: Path) -> None:
    t, _ = read(path)
    tags = [k.removesuffix(".params") for k in t if k.endswith(".params")]
    assert tags
    for tag in tags:
        id_threshold, ood_threshold, weight, huber = t[f"{tag}.params"].tolist()
        id_logits, ood_logits = (t[k].double().requires_grad_() for k in ("id_logits", "ood_logits"))
        terms = vor_loss(
            id_logits,
            ood_logits,
            id_threshold=id_threshold,
            ood_threshold=ood_threshold,
            id_weight=weight,
            ood_weight=weight,
            huber=bool(huber),
        )
        assert_close(terms.loss, t[f"{tag}.loss"], atol=1e-12, rtol=1e-12)
        assert_close(terms.id_energy, t[f"{tag}.id_score"])
        assert_close(terms.ood_energy, t[f"{tag}.ood_score"])
        assert_close((energy(id_logits) - id_threshold).relu(), t[f"{tag}.id_hinge"])
        assert_close((ood_threshold - energy(ood_logits)).relu(), t[f"{tag}.ood_hinge"])
        assert_close(terms.id_active, (t[f"{tag}.id_hinge"] > 0).double().mean())
        assert_close(terms.ood_active, (t[f"{tag}.ood_hinge"] > 0).double().mean())
        grad_id, grad_ood = torch.autograd.grad(terms.loss, (id_logits, ood_logits))
        assert_close(grad_id, t[f"{tag}.grad_id"], atol=1e-12, rtol=1e-12)
        assert_close(grad_ood, t[f"{tag}.grad_ood"], atol=1e-12, rtol=1e-12)


@cases("vor_step_*")
def test_golden_head_steps(path: Path) -> None:
    t, meta = read(path)
    columns = torch.arange(int(meta["subset_start"]), int(meta["subset_end"]))
    others = sorted(set(range(int(meta["n_total"]))) - set(columns.tolist()))
    settings = VirtualOutliers(
        id_threshold=float(meta["thres_id"]),
        ood_threshold=float(meta["thres_ood"]),
        id_weight=float(meta["lmda"]),
        ood_weight=float(meta["lmda"]),
        huber=meta["huber"] == "True",
    )
    head = nn.Linear(int(meta["D"]), int(meta["n_total"])).double()
    head.load_state_dict({"weight": t["W0"].double(), "bias": t["b0"].double()})
    betas = tuple(map(float, meta["betas"].split(",")))
    optimizer = torch.optim.Adam(head.parameters(), betas=betas, eps=float(meta["eps"]))
    seen: list[tuple[Tensor, Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append((head.weight.grad.clone(), head.bias.grad.clone())))
    for i in range(len(t["loss"])):
        optimizer.param_groups[0]["lr"] = t["lr"][i].item()
        ids, oods, targets = t["ids"][i].double(), t["oods"][i].double(), t["targets"][i] - columns[0]
        accuracy = 100 * (head(ids)[:, columns].argmax(1) == targets).double().mean()
        means = head_step(head, ids, targets, columns, oods, None, optimizer, settings)
        assert_close(means.loss, t["loss"][i], atol=1e-12, rtol=1e-12)
        assert_close(means.id_energy, t["id_score"][i])
        assert_close(means.ood_energy, t["ood_score"][i])
        assert_close(accuracy, t["acc"][i])
        assert_close(seen[i][0], t["grad_W"][i], atol=1e-12, rtol=1e-12)
        assert_close(seen[i][1], t["grad_b"][i], atol=1e-12, rtol=1e-12)
        assert_close(head.weight.detach(), t["W_after"][i], atol=1e-9, rtol=0)
        assert_close(head.bias.detach(), t["b_after"][i], atol=1e-9, rtol=0)
        assert torch.equal(head.weight[others], t["W0"].double()[others])
        assert head.weight.grad is None


@cases("oneprompt_block*")
def test_golden_block(path: Path) -> None:
    t, meta = read(path)
    dim, heads, length = int(meta["D"]), int(meta["heads"]), 2 * int(meta["prefix_tokens_each"])
    norm = partial(nn.LayerNorm, eps=float(meta["norm_eps"]))
    ratio = t["weights.mlp.fc1.bias"].numel() / dim
    block = Block(dim, heads, mlp_ratio=ratio, qkv_bias=True, norm_layer=norm).double().requires_grad_(False)
    block.load_state_dict(in_double(t, "weights."))
    prompt = PrefixPrompt(dim, {0: length}).double()
    values = prompt.slot(0).prompt
    values.data.copy_(t["prompt"])
    x = t["x"].double().requires_grad_()
    assert_close(block(x), t["y_noprompt"], atol=1e-9, rtol=0)

    prompt.attach([block])
    y = block(x)
    assert_close(y, t["y"], atol=1e-9, rtol=0)
    assert_close(block.attn(x), t["attn_out_of_raw_x"], atol=1e-9, rtol=0)
    grad_prompt, grad_x = torch.autograd.grad((y * t["cotangent"]).sum(), (values, x))
    assert_close(grad_prompt, t["grad_prompt"], atol=1e-8, rtol=1e-8)
    assert_close(grad_x, t["grad_x"], atol=1e-8, rtol=1e-8)

    # the reference's attention map, prefix columns first, applied to [P_v; v], gives the same output
    v = block.attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, heads, -1)[:, :, 2].transpose(1, 2)
    prefix = values[length // 2 :].view(-1, heads, dim // heads).transpose(0, 1).expand(len(x), -1, -1, -1)
    mixed = t["attn_map"] @ torch.cat([prefix, v], 2)
    expected = block.attn.proj(mixed.transpose(1, 2).flatten(2))
    assert_close(block.attn(block.norm1(x)), expected, atol=1e-9, rtol=0)

    prompt.frozen = True
    assert not block(x.detach()).requires_grad


def vit_of(tensors: dict[str, Tensor], meta: dict[str, str], n_classes: int) -> VisionTransformer:
    dim = int(meta["D"])
    vit = VisionTransformer(
        img_size=int(meta["img"]),
        patch_size=int(meta["patch"]),
        embed_dim=dim,
        depth=int(meta["depth"]),
        num_heads=int(meta["heads"]),
        mlp_ratio=tensors["vit.blocks.0.mlp.fc1.bias"].numel() / dim,
        num_classes=n_classes,
    ).double()
    result = vit.load_state_dict(in_double(tensors, "vit."), strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) <= {"head.weight", "head.bias"}
    return vit


def prompts_of(tensors: dict[str, Tensor], prefix: str) -> dict[int, tuple[str, Tensor]]:
    """Block index to name and value of each stored prompt."""
    found = {k: re.fullmatch(re.escape(prefix) + r"[ge]_p_(\d+)", k) for k in tensors}
    return {int(m[1]): (k[len(prefix) :], tensors[k].double()) for k, m in found.items() if m}


@cases("oneprompt_vit_*")
def test_golden_vit(path: Path) -> None:
    t, meta = read(path)
    n_classes, depth = int(meta["n_classes"]), int(meta["depth"])
    vit = vit_of(t, meta, n_classes).requires_grad_(False)
    vit.head.load_state_dict(in_double(t, "head."))
    vit.head.requires_grad_()
    images, targets = t["images"].double(), t["targets"]
    assert_close(vit.forward_head(vit.forward_features(images), pre_logits=True), t["out.cls_feature_noprompt"])

    stored = prompts_of(t, "prompt.")
    lengths = {b: len(v) for b, (_, v) in stored.items() if b < depth}
    prompt = PrefixPrompt(int(meta["D"]), lengths).double().attach(vit)
    for block in lengths:
        prompt.slot(block).prompt.data.copy_(stored[block][1])
    outputs: list[Tensor] = []
    handles = [b.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in vit.blocks]
    tokens = vit.forward_features(images)
    for handle in handles:
        handle.remove()
    assert_close(torch.stack(outputs), t["out.block_outputs"], atol=1e-9, rtol=0)
    assert_close(tokens, t["out.tokens"], atol=1e-9, rtol=0)
    assert_close(vit.forward_head(tokens, pre_logits=True), t["out.cls_feature"], atol=1e-9, rtol=0)
    assert_close(vit(images), t["out.logits"], atol=1e-9, rtol=0)

    HeadMask(vit.head).start(range(int(meta["subset_start"]), int(meta["subset_end"])))
    loss = cross_entropy(vit(images), targets)
    assert_close(loss, t["out.loss"].view(()), atol=1e-9, rtol=0)
    assert t["out.prompt_loss"].item() == 0
    loss.backward()
    for block, (name, value) in stored.items():
        grad = prompt.slot(block).prompt.grad if block < depth else torch.zeros_like(value)
        assert_close(grad, t[f"grad.prompt.{name}"].double(), atol=1e-7, rtol=1e-6)
    for name, parameter in vit.head.named_parameters():
        assert_close(parameter.grad, t[f"grad.head.{name}"], atol=1e-9, rtol=0)
    assert all(p.grad is None for n, p in vit.named_parameters() if not n.startswith("head."))


@cases("schedule*")
def test_golden_schedule(path: Path) -> None:
    t, meta = read(path)
    for key, expected in t.items():
        total = int(key.removeprefix("lr_K"))
        got = [ovor_learning_rate(e, total, float(meta["base_lr"])) for e in range(total)]
        assert_close(torch.tensor(got, dtype=torch.float64), expected, atol=1e-15, rtol=1e-12)


@cases("trajectory*")
def test_golden_trajectory(path: Path) -> None:
    t, meta = read(path)
    n_tasks, per_task, batch = int(meta["tasks"]), int(meta["classes_per_task"]), int(meta["batch"])
    _, ce_epochs, head_epochs = json.loads(meta["epochs"])
    vit = vit_of(t, meta, n_tasks * per_task)
    stored = prompts_of(t, "init.prompt.")
    settings = VirtualOutliers(
        neighbors=int(meta["ood_K"]),
        n_boundary=int(meta["ood_select"]),
        draws=int(meta["ood_sample_from"]),
        noise_scale=float(meta["ood_cov"]),
        per_class=int(meta["ood_num_per_class"]),
        batch_size=int(meta["ood_id_bsz"]),
        id_threshold=float(meta["thres_id"]),
        ood_threshold=float(meta["thres_ood"]),
        id_weight=float(meta["lmda"]),
        ood_weight=float(meta["lmda"]),
    )
    method = OVOR(settings, lengths={b: len(v) for b, (_, v) in stored.items()})
    method.install(vit)
    for block, (_, value) in stored.items():
        method.prompt(vit).slot(block).prompt.data.copy_(value)
    vit.head.load_state_dict(in_double(t, "init.head."))

    def check(stage: str) -> None:
        for block, (_, value) in prompts_of(t, f"{stage}.prompt.").items():
            assert_close(method.prompt(vit).slot(block).prompt.detach(), value, atol=2e-6, rtol=0)
        assert_close(vit.head.weight.detach(), t[f"{stage}.last.weight"], atol=2e-6, rtol=0)
        assert_close(vit.head.bias.detach(), t[f"{stage}.last.bias"], atol=2e-6, rtol=0)

    for k in range(n_tasks):
        task = Task(k, tuple(range(k * per_task, (k + 1) * per_task)))
        columns = torch.tensor(task.classes)
        before = vit.head.weight.detach().clone()
        method.start_task(vit, task)
        images, labels = t[f"task{k}.images"].double(), t[f"task{k}.labels"]
        loader = list(zip(images.split(batch), labels.split(batch), strict=True))
        optimizer = torch.optim.Adam((p for p in vit.parameters() if p.requires_grad), lr=float(meta["base_lr"]))
        losses: list[Tensor] = []
        rates: list[float] = []
        vit.train()
        for epoch in range(ce_epochs + head_epochs):
            rate = ovor_learning_rate(epoch, ce_epochs + head_epochs, float(meta["base_lr"]))
            optimizer.param_groups[0]["lr"] = rate
            if epoch < ce_epochs:
                for x, y in loader:
                    loss = cross_entropy(vit(x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.detach())
                    rates.append(rate)
                continue
            j = epoch - ce_epochs
            if j == 0:
                check(f"task{k}.after_ce")
            # features and outliers of this epoch
            features, feature_labels = collect_features(vit, vit.head, loader)
            order = feature_labels.sort(stable=True).indices
            key = f"task{k}.ood_epoch{j}"
            assert torch.equal(feature_labels[order], t[f"{key}.feature_labels"])
            assert_close(features[order].double(), t[f"{key}.features"], atol=1e-5, rtol=1e-5)
            out = settings.synthesize(t[f"{key}.features"], per_task, t["noise"])
            assert_close(out.rows.repeat_interleave(out.counts, 0), t[f"{key}.outliers"], atol=1e-6, rtol=1e-6)
            for i in range(j * len(loader), (j + 1) * len(loader)):
                step = f"task{k}.ood_step{i}"
                ids, targets, oods = t[f"{step}.ids"], t[f"{step}.targets"] - columns[0], t[f"{step}.oods"]
                means = head_step(vit.head, ids, targets, columns, oods, None, optimizer, settings)
                assert_close(means.id_energy, t[f"task{k}.id_score"][i], atol=2e-6, rtol=0)
                assert_close(means.ood_energy, t[f"task{k}.ood_score"][i], atol=2e-6, rtol=0)
                losses.append(means.loss)
                rates.append(rate)
        assert_close(torch.stack(losses), t[f"task{k}.loss_per_step"], atol=2e-6, rtol=0)
        assert_close(torch.tensor(rates, dtype=torch.float64), t[f"task{k}.lr_per_step"], atol=1e-15, rtol=1e-9)
        check(f"task{k}.after_task")
        others = sorted(set(range(n_tasks * per_task)) - set(task.classes))
        assert torch.equal(vit.head.weight.detach()[others], before[others])

        vit.eval()
        for j in range(k + 1):
            x, y = t[f"task{j}.test_images"].double(), t[f"task{j}.test_labels"]
            with torch.no_grad():
                logits = vit(x)
            own = torch.arange(j * per_task, (j + 1) * per_task)
            scale = 100.0 if t["acc_cil"].max() > 1 else 1.0
            assert_close(scale * (logits.argmax(1) == y).double().mean(), t["acc_cil"][k, j])
            assert_close(scale * (own[logits[:, own].argmax(1)] == y).double().mean(), t["acc_til"][k, j])
            if k == n_tasks - 1:
                assert_close(logits, t[f"final_logits.task{j}"], atol=5e-6, rtol=0)
