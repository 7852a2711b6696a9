"""Side networks beside a frozen backbone: formulas, sizes, memory, regimes, checkpoints."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from open_clip.transformer import VisionTransformer as ClipTower
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from cl_plugins import Task, fit_stream
from cl_plugins.adapters.alpha_side import AlphaSide
from cl_plugins.adapters.hierarchical_side import HierarchicalFeatures, HierarchicalSide, stage_depths
from cl_plugins.adapters.ladder import LadderSide, SideBlock, kept_layers, scheduled_gate
from cl_plugins.adapters.sherl import Consolidator, SherlSide, consolidate, redundancy
from cl_plugins.adapters.side_pruning import canonical_weights, fisher_importance, initialize_ladder, prune_chain
from cl_plugins.backbones import Backbone, find_backbone, vit_glyph
from cl_plugins.callbacks import (
    CacheFeatures,
    HierarchicalSideTuning,
    LadderSideTuning,
    LeanHierarchicalSideTuning,
    NearestMean,
    Sherl,
    SideTuning,
)
from cl_plugins.decay import exempt_from_decay
from cl_plugins.heads import HIDDEN_LOGIT
from cl_plugins.side_routing import TaskRouter
from cl_plugins.taps import BackboneTaps, TapRecord, TokenLayout, patch_grid, run_late, tapping
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit

PYRAMID = {"widths": (8, 8, 8, 16), "heads": (1, 2, 2, 2)}
METHODS = {
    "lst": lambda **o: LadderSideTuning(reduction=2, **o),
    "sherl": lambda **o: Sherl(reduction=4, **o),
    "lean-hst": lambda **o: LeanHierarchicalSideTuning(**PYRAMID, **o),
    "side-tuning": lambda **o: SideTuning(width=4, **o),
}


def clip_tower(batch_first: bool = True) -> ClipTower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = ClipTower(image_size=8, patch_size=4, width=16, layers=4, heads=2, mlp_ratio=4.0, output_dim=12)
    tower.transformer.batch_first = batch_first
    for block in tower.transformer.resblocks:
        block.attn.batch_first = batch_first
    return tower


class ClipModule(nn.Module):
    def __init__(self, tower: ClipTower) -> None:
        super().__init__()
        self.tower = tower
        self.classifier = nn.Linear(12, 6)

    def forward(self, x):
        return self.classifier(self.tower(x))


def images(n: int = 3, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def started(method, module=None, tasks=1):
    """A module with the method at work in its last task."""
    module = tiny_vit(depth=4) if module is None else module
    for k in range(tasks):
        method.install(module)
        method.start_task(module, Task(k, (2 * k, 2 * k + 1)))
    return module


def saved_bytes(run) -> int:
    """Bytes of distinct storages that autograd keeps in a run, without parameters and buffers of the model."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        own = run()
    return sum(size for pointer, size in kept.items() if pointer not in own)


# sizes

VIT = {"Ti": (192, 3, 12), "S": (384, 6, 12), "B": (768, 12, 12), "L": (1024, 16, 24)}


@pytest.mark.parametrize(
    ("reduction", "drop", "expected"),
    [
        (4, "none", (0.469, 1.860, 7.406, 25.78)),
        (8, "none", (0.152, 0.598, 2.376, 8.171)),
        (8, "quarter", (0.116, 0.458, 1.820, 6.194)),
        (8, "half", (0.081, 0.318, 1.263, 4.217)),
        (16, "none", (0.055, 0.216, 0.857, 2.906)),
    ],
)
def test_ladder_has_the_published_size(reduction, drop, expected):
    for (dim, heads, depth), millions in zip(VIT.values(), expected, strict=True):
        with torch.device("meta"):
            side = LadderSide(dim, heads, depth, reduction=reduction, layers=kept_layers(depth, drop))
        assert sum(p.numel() for p in side.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4 if millions < 10 else 6e-3)


@pytest.mark.parametrize(("dim", "expected"), [(192, 605_864), (384, 658_856), (768, 764_840)])
def test_pyramid_has_the_published_size(dim, expected):
    side = HierarchicalSide(dim, 12)
    norms_of_the_backbone = 12 * 4 * dim
    assert sum(p.numel() for p in side.parameters()) + norms_of_the_backbone == expected


@pytest.mark.parametrize(("dim", "reduction", "millions"), [(768, 2, 7.39), (768, 4, 2.81), (768, 8, 1.18), (768, 16, 0.54), (384, 8, 0.297), (192, 8, 0.075)])  # fmt: skip
def test_consolidator_has_the_published_size(dim, reduction, millions):
    with torch.device("meta"):
        side = Consolidator(dim, dim // reduction, 12)
    assert sum(p.numel() for p in side.parameters()) / 1e6 == pytest.approx(millions, abs=5.5e-3 if millions > 0.3 else 6e-4)


# taps


@pytest.mark.parametrize("batch_first", [True, False])
def test_taps_are_the_tokens_between_the_blocks(batch_first):
    for module in (tiny_vit(depth=3).double(), clip_tower(batch_first).double()):
        x = images().double()
        found = find_backbone(module)
        with tapping(found, range(len(found.blocks) + 1)) as taps:
            module.train()
            got = module.forward_features(x) if found.kind == "timm" else module(x)
            record = taps.take()
        assert not module.training
        assert all(not t.requires_grad for t in record.taps.values())
        if found.kind == "timm":
            stream = module.norm_pre(module.patch_drop(module._pos_embed(module.patch_embed(x))))
            expected = module.norm(stream.clone())
        else:
            stream = module._embeds(x)
        for i, block in enumerate(found.blocks):
            torch.testing.assert_close(record.taps[i], stream)
            stream = block(stream) if batch_first or found.kind == "timm" else block(stream.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(record.taps[len(found.blocks)], stream)
        expected = module.norm(stream) if found.kind == "timm" else module._pool(stream)[0] @ module.proj
        torch.testing.assert_close(got, expected)
        late = run_late(found, record.taps[len(found.blocks) - 1], 1)
        torch.testing.assert_close(late, module.forward_head(expected, pre_logits=True) if found.kind == "timm" else expected)


@pytest.mark.parametrize("name", METHODS)
def test_no_tensor_of_the_backbone_is_saved_for_backward(name):
    module = started(METHODS[name](regime="shared")).train()
    taps = module.plugins["taps"]
    while_running = []

    def pack(tensor):
        while_running.append(taps._running)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = cross_entropy(module(images()), torch.tensor([0, 1, 0]))
    assert while_running
    assert not any(while_running)
    loss.backward()
    side = module.plugins["side"].active
    assert all(p.grad is None for n, p in module.named_parameters() if not n.startswith(("plugins.", "head.")))
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in side.parameters())


def test_backbone_is_in_eval_mode_inside_the_training_step():
    modes = []

    class Watching(PlainModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            modes.append((self.training, self.model.training, self.model.blocks[0].training))
            return loss

    module = Watching(tiny_vit(depth=4))
    fit_stream(quiet_trainer(callbacks=[METHODS["lst"]()]), module, tiny_stream())
    assert set(modes) == {(True, False, False)}


def test_memory_ratio_of_a_ladder_to_full_fine_tuning():
    def vit():
        return vit_glyph(num_classes=10, img_size=64, embed_dim=128, depth=6, num_heads=4)

    def run(module):
        x = images(2, 64)
        cross_entropy(module(x), torch.tensor([0, 1]))
        return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), x)}

    full, ladder, sherl = vit(), vit(), vit()
    for module, method in ((ladder, LadderSideTuning(8, "none")), (sherl, Sherl(8))):
        method.install(module)
        method.start_task(module, Task(0, tuple(range(10))))
    reference = saved_bytes(lambda: run(full.train()))
    assert saved_bytes(lambda: run(ladder.train())) <= 0.22 * reference
    assert saved_bytes(lambda: run(sherl.train())) <= 0.27 * reference  # one of 6 blocks is late, one of 12 as published


def test_a_pass_without_the_backbone_is_told():
    class Bypass(PlainModule):
        def forward(self, x):
            return self.model.head(self.model.norm(self.model.blocks(self.model.patch_embed(x))).mean(1))

    module = started(METHODS["lst"](), Bypass(tiny_vit(depth=4)))
    with pytest.raises(RuntimeError, match="`forward_features` must run before its classifier"):
        module(images())


def test_two_adapters_cannot_take_the_same_method():
    vit = tiny_vit()
    vit.forward_features = vit.forward_features
    with pytest.raises(RuntimeError, match="another adapter replaced it"):
        BackboneTaps(find_backbone(vit)).attach()


# formulas, against small independent versions


def test_ladder_against_a_written_out_version():
    side = LadderSide(16, 2, 4, reduction=2, layers=[0, 3]).double()
    with torch.no_grad():
        side.gates["0"].fill_(0.03)
    taps = {i: torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    s = side.first(taps[0])
    for i in (0, 3):
        mu = 1 / (1 + torch.exp(-side.gates[str(i)] / 0.1))
        s = mu * s + (1 - mu) * side.down[str(i)](taps[i + 1])
        block = side.blocks[str(i)]
        q, k, v = (t.unflatten(2, (2, 4)) for t in block.attn.qkv(block.norm1(s)).split(8, 2))
        weights = torch.einsum("bqhc,bkhc->bhqk", q, k).div(2.0).softmax(-1)
        s = s + block.attn.proj(torch.einsum("bhqk,bkhc->bqhc", weights, v).flatten(2))
        s = s + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(s))))
    torch.testing.assert_close(side(TapRecord(taps), taps[0]), side.up(side.norm(s))[:, 0])


def test_gate_variants():
    taps = {i: torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    stream, step = torch.ones(1, 3, 4), None
    for gate, weight in (("one", 1.0), ("linear", 0.1), ("hyperbolic", 0.9), ("learnable", 0.5)):
        side = LadderSide(8, 2, 2, reduction=2, gate=gate)
        step = side.down["0"](taps[1])
        torch.testing.assert_close(side._fuse("0", stream, taps[1]), weight * stream + (1 - weight) * step)
    side = LadderSide(8, 2, 2, reduction=2, gate="none")
    torch.testing.assert_close(side._fuse("0", stream, taps[1]), stream + side.down["0"](taps[1]))
    side.set_epoch(3, 10)
    assert scheduled_gate("hyperbolic", 3, 10) == 0.25
    assert scheduled_gate("hyperbolic", 30, 40) == 0.1
    after = LadderSide(8, 2, 2, reduction=2, fuse="after")
    expected = 0.5 * after.blocks["0"](stream) + 0.5 * after.down["0"](taps[1])
    torch.testing.assert_close(after.layer(0, stream, taps[1]), expected)


def test_redundancy_against_loops():
    z = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    merged = consolidate(z, scores)
    for b in range(2):
        for n in range(3):
            rows = z[:, b, n]
            r = [sum(max(float(F.cosine_similarity(rows[j], rows[k], 0)), 0.0) for k in range(4)) for j in range(4)]
            torch.testing.assert_close(redundancy(z)[:, b, n], torch.tensor(r, dtype=torch.float64), atol=1e-5, rtol=1e-5)
            q = [max(float(scores[j, b, n]), 0.0) / r[j] for j in range(4)]
            expected = sum(q[j] / (sum(q) + 1e-6) * rows[j] for j in range(4))
            torch.testing.assert_close(merged[b, n], expected, atol=1e-5, rtol=1e-5)


def test_identity_start_of_sherl_is_the_frozen_model():
    vit = tiny_vit(depth=4)
    found = find_backbone(vit)
    expected = vit.eval().forward_head(vit.forward_features(images()), pre_logits=True)
    with tapping(found, range(5)) as taps:
        vit.forward_features(images())
        record = taps.take()
    side = SherlSide(found, reduction=4, late=2, gate_init="identity")
    torch.testing.assert_close(side(record, expected), expected, rtol=1e-5, atol=1e-5)
    default = SherlSide(found, reduction=4, late=2)
    tokens = default.merge([record.taps[i] for i in range(3)])
    assert not torch.allclose(tokens, record.taps[2])  # the gate is shut: nothing but the random adapter at first
    assert Consolidator(8, 4, 3, score_bias=0.5).score.bias.item() == 0.5


def test_bridge_and_resize_commute():
    maps = torch.randn(2, 6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bridge = nn.Linear(6, 4).double()
    wide = F.interpolate(maps, size=(12, 12), mode="bilinear", align_corners=False)
    narrow = bridge(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    narrow = F.interpolate(narrow, size=(12, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(bridge(wide.permute(0, 2, 3, 1)), narrow.permute(0, 2, 3, 1))


def test_pruning_keeps_the_rows_that_matter():
    weights = {"a.weight": torch.randn(8, 3), "n.weight": torch.arange(8.0), "b.weight": torch.randn(4, 8)}
    importance = {"a.weight": torch.zeros(8, 3), "b.weight": torch.ones(4, 8)}
    importance["a.weight"][[1, 6]] = 1e-30  # a product of such numbers underflows float32
    pruned, kept = prune_chain({**weights}, [("a",), ("n",), ("b",)], 4, importance)
    assert kept[0].tolist() == [1, 6]
    assert torch.equal(pruned["a.weight"], weights["a.weight"][[1, 6]])
    assert pruned["n.weight"].tolist() == [1.0, 6.0]
    assert torch.equal(pruned["b.weight"], weights["b.weight"][kept[1]][:, [1, 6]])


@pytest.mark.parametrize("build", [lambda: tiny_vit(depth=2), clip_tower])
def test_ladder_starts_with_rows_of_the_backbone(build):
    found = find_backbone(build())
    side = LadderSide(16, 2, len(found.blocks), reduction=2, layers=[1])
    initialize_ladder(side, found, 2)
    fc2 = canonical_weights(found)["blocks.1.mlp.fc2.weight"]
    rows = side.blocks["1"].mlp.fc2.weight
    for row in rows:  # each row of the side is part of a row of the backbone
        assert any(set(row.tolist()) <= set(full.tolist()) for full in fc2)
    assert all(g.item() == 0 for g in side.gates.values())


def test_fisher_information_is_the_sum_of_squared_gradients():
    layer = nn.Linear(3, 2).requires_grad_(False)
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    got = fisher_importance({"w": layer.weight}, lambda i: cross_entropy(layer(x[i : i + 1]), y[i : i + 1]), range(5))
    p = (x @ layer.weight.T + layer.bias).softmax(1) - F.one_hot(y, 2)
    expected = (p[:, :, None] * x[:, None]).square().sum(0)
    torch.testing.assert_close(got["w"], expected.double(), rtol=1e-5, atol=1e-7)
    assert not layer.weight.requires_grad
    with pytest.raises(ValueError, match="at least one batch"):
        fisher_importance({"w": layer.weight}, lambda i: i, [])


def test_router_is_the_shared_covariance_classifier():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat(40)
    x = torch.randn(6, 4, generator=g)[labels] * 2 + torch.randn(240, 4, generator=g) * torch.tensor([0.1, 1, 1, 2])
    router, parts = TaskRouter(6, 4, shrinkage=0.0), TaskRouter(6, 4, shrinkage=0.0)
    router.accumulate(x, labels)
    for c in range(6):  # class by class gives the same sums
        parts.accumulate(x[labels == c], labels[labels == c])
    torch.testing.assert_close(router.factor, parts.factor)
    means = torch.stack([x[labels == c].mean(0) for c in range(6)])
    centered = x - means[labels]
    precision = torch.linalg.inv(centered.T @ centered / 240)
    d = x[:, None] - means
    expected = -0.5 * torch.einsum("ncd,de,nce->nc", d, precision, d)
    torch.testing.assert_close(router.class_scores(x), expected, rtol=1e-3, atol=1e-3)
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    p = router.log_probabilities(x, owner, 3).exp()
    torch.testing.assert_close(p, expected.softmax(1).unflatten(1, (3, 2)).sum(2), rtol=1e-3, atol=1e-3)


# regimes


def _train(module, method, stream=None, **options):
    stream = tiny_stream() if stream is None else stream
    trainer = quiet_trainer(callbacks=[method, *options.pop("callbacks", [])], **options)
    return fit_stream(trainer, module, stream)


@pytest.mark.parametrize("name", METHODS)
def test_per_task_logits_of_the_first_task_stay_bit_equal(name):
    class Watch(pl.Callback):
        logits: list[torch.Tensor]

        def on_fit_end(self, trainer, pl_module):
            bank = pl_module.plugins["side"]
            bank.known_task = 0
            with torch.no_grad():
                self.logits.append(pl_module.eval()(images(5))[:, [0, 1]].clone())
            bank.known_task = None

    watch = Watch()
    watch.logits = []
    module = PlainModule(tiny_vit(depth=4), weight_decay=0.1)
    result = _train(module, METHODS[name](regime="per_task"), callbacks=[watch])
    assert len(module.plugins["side"].sides) == 3
    assert all(torch.equal(watch.logits[0], later) for later in watch.logits[1:])
    assert result.forgetting >= 0


def test_frozen_side_networks_keep_every_bit_and_gates_do_not_decay():
    module = PlainModule(tiny_vit(depth=4), weight_decay=0.5)
    method = METHODS["lst"](regime="per_task_dense")
    states = []

    class Keep(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            states.append(copy.deepcopy(pl_module.plugins["side"].state_dict()))

    _train(module, method, callbacks=[Keep()])
    for before, after in zip(states, states[1:], strict=False):
        names = [n for n in before if n.startswith(("sides.", "mix."))]
        assert names
        assert all(torch.equal(before[n], after[n]) for n in names)
    bank = module.plugins["side"]
    assert [len(m) for m in bank.mix] == [2, 3, 4]
    assert not any(p.requires_grad for s in bank.sides[:2] for p in s.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_exempt_parameters_move_as_without_decay(optimizer):
    values = []
    for decay, exempt in ((0.0, False), (0.3, True), (0.3, False)):
        gate, weight = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        steps = optimizer([gate, weight], lr=0.1, weight_decay=decay)
        handles = exempt_from_decay([gate], steps) if exempt else []
        for _ in range(3):
            gate.grad, weight.grad = torch.ones(1), torch.ones(1)
            steps.step()
        for handle in handles:
            handle.remove()
        values.append((gate.item(), weight.item()))
    assert values[0][0] == pytest.approx(values[1][0], abs=1e-6)
    assert values[1][1] == pytest.approx(values[2][1])
    assert abs(values[2][1] - values[0][1]) > 1e-3 or optimizer is torch.optim.Adam
    assert exempt_from_decay([gate], torch.optim.SGD([gate], lr=1.0)) == []


def test_first_session_trains_once():
    module = PlainModule(tiny_vit(depth=4))
    states = []

    class Keep(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            states.append({n: p.detach().clone() for n, p in pl_module.plugins["side"].named_parameters()})

    start = started(METHODS["lst"](regime="first_session"))
    _train(module, METHODS["lst"](regime="first_session"), callbacks=[Keep()])
    assert all(torch.equal(states[0][n], states[2][n]) for n in states[0])
    assert any(not torch.equal(states[0][n], p) for n, p in start.plugins["side"].named_parameters())


def test_batch_statistics_follow_the_regime():
    for regime, moves in (("shared", False), ("per_task", True)):
        module = PlainModule(tiny_vit(depth=4))
        means = []

        class Keep(pl.Callback):
            def __init__(self, means) -> None:
                self.means = means

            def on_fit_end(self, trainer, pl_module):
                bank = pl_module.plugins["side"]
                self.means.append([s.batch_norm.running_mean.clone() for s in bank.sides])

        _train(module, METHODS["lean-hst"](regime=regime), callbacks=[Keep(means)])
        assert all(torch.equal(means[0][0], later[0]) for later in means[1:])  # those of the first task stay
        assert len(means[2]) == (3 if moves else 1)
        assert not torch.equal(means[0][0], torch.zeros(16))


@pytest.mark.parametrize("routing", ["prototype", "logits", "both"])
@pytest.mark.parametrize("regime", ["per_task", "per_task_dense"])
def test_routing_against_a_written_out_version(routing, regime):
    module = PlainModule(tiny_vit(depth=4))
    _train(module, METHODS["lst"](regime=regime, routing=routing, seed=3))
    bank, head = module.plugins["side"], module.model.head
    x = images(7)
    with torch.no_grad():
        got = module.eval()(x)
        bank.bypass = True
        record_base = []
        handle = head.register_forward_pre_hook(lambda _, args: record_base.append(args[0]))
        module(x)
        record, base = bank.taps.take(), record_base[0]
        handle.remove()
        bank.bypass = False
        features = bank.features(record, base, 2)
        if regime == "per_task":
            torch.testing.assert_close(features[1], bank.side(1)(record, base))
        else:
            raw = [bank.side(i)(record, base) for i in range(3)]
            w = bank.mix[2].softmax(0)
            torch.testing.assert_close(features[2], w[0] * base + w[1] * raw[0] + w[2] * raw[1] + w[3] * raw[2])
        rows = torch.cat([F.linear(f, head.weight[[2 * t, 2 * t + 1]], head.bias[[2 * t, 2 * t + 1]]) for t, f in enumerate(features)], 1)
        rows = rows / bank.temperature
        p_task = bank.router.log_probabilities(base, bank.owner, 3).exp()
        if routing == "logits":
            torch.testing.assert_close(got, rows)
        elif routing == "prototype":
            chosen = p_task.argmax(1)
            mask = torch.arange(6)[None] // 2 == chosen[:, None]
            torch.testing.assert_close(got, rows.masked_fill(~mask, HIDDEN_LOGIT), rtol=1e-4, atol=1e-5)
        else:
            inside = rows.unflatten(1, (3, 2)).softmax(2) * p_task[:, :, None]
            torch.testing.assert_close(got, (rows.softmax(1) + inside.flatten(1)).log(), rtol=1e-4, atol=1e-4)


def test_routing_needs_a_fitted_router():
    module = started(METHODS["lst"](regime="per_task"), tasks=2).eval()
    with pytest.raises(RuntimeError, match="the router must be fitted"):
        module(images())
    with pytest.raises(ValueError, match="classes of their own, got classes \\[0\\] twice"):
        METHODS["lst"](regime="per_task").start_task(module, Task(2, (0, 4)))


def test_warm_start_continues_from_the_side_network_before():
    warm, cold = (started(METHODS["lst"](regime="per_task", warm_start=w), tasks=1) for w in (True, False))
    for module, w in ((warm, True), (cold, False)):
        side = module.plugins["side"].active
        with torch.no_grad():
            side.up.weight.fill_(7.0)
        METHODS["lst"](regime="per_task", warm_start=w).start_task(module, Task(1, (2, 3)))
    assert (warm.plugins["side"].active.up.weight == 7.0).all()
    assert not (cold.plugins["side"].active.up.weight == 7.0).any()


def test_closed_form_classifier_on_the_feature_of_the_first_session():
    module = PlainModule(tiny_vit(depth=4))
    result = _train(module, METHODS["lst"](regime="first_session"), callbacks=[NearestMean()])
    assert result.average_accuracy > 0.5
    assert (module.plugins["nearest_mean"].count > 0).all()


def test_fisher_start_differs_from_magnitude_and_needs_the_stream():
    weights = {}
    for init in ("magnitude", "fisher", "random"):
        method, module = METHODS["lst"](init=init, fisher_samples=8), PlainModule(tiny_vit(depth=4))
        stream = tiny_stream()
        started(method, module)
        method.initialize(module, stream.train_loader_for_features(0))
        weights[init] = module.plugins["side"].active.blocks["1"].mlp.fc1.weight.detach()
        assert module.plugins["taps"].frozen
        assert not module.plugins["side"].bypass
    assert not torch.equal(weights["magnitude"], weights["fisher"])
    assert not torch.equal(weights["magnitude"], weights["random"])


def test_distillation_brings_the_side_network_to_the_backbone():
    def distance(epochs):
        method, module = SideTuning(width=8, distill_epochs=epochs, distill_lr=1e-2), PlainModule(tiny_vit(depth=4))
        stream = tiny_stream()
        started(method, module)
        method.initialize(module, stream.train_loader_for_features(0))
        bank = module.plugins["side"]
        x = torch.cat([x for x, _ in stream.train_loader_for_features(0)])
        with torch.no_grad():
            bank.bypass = True
            base = module.model.forward_head(module.model.forward_features(x), pre_logits=True)
            return float(bank.active.distillation_loss(bank.taps.take(), base))

    assert distance(20) < 0.5 * distance(0)


def test_published_pyramid_trains_registers_and_norms():
    module = PlainModule(tiny_vit(depth=4))
    start = copy.deepcopy(module.model.state_dict())
    method = HierarchicalSideTuning(**PYRAMID)
    _train(module, method)
    end = module.model.state_dict()
    moved = {n for n in start if not torch.equal(start[n], end[n])}
    assert moved == {f"blocks.{i}.{n}.{p}" for i in range(4) for n in ("norm1", "norm2") for p in ("weight", "bias")} | {
        "head.weight", "head.bias",
    }  # fmt: skip
    fresh = started(HierarchicalSideTuning(**PYRAMID))
    registers = zip(module.plugins["side"].active.registers, fresh.plugins["side"].active.registers, strict=True)
    assert all(not torch.equal(a, b) for a, b in registers)
    with pytest.raises(ValueError, match="`regime` must be one of shared, first_session"):
        HierarchicalSideTuning(regime="per_task")


def test_published_pyramid_freezes_after_the_first_session():
    module = PlainModule(tiny_vit(depth=4))
    norms = []

    class Keep(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            norms.append(pl_module.model.blocks[0].norm1.weight.detach().clone())

    _train(module, HierarchicalSideTuning(**PYRAMID, regime="first_session"), callbacks=[Keep()])
    assert torch.equal(norms[0], norms[2])
    assert not torch.equal(norms[0], torch.ones(16))


# open_clip, dense outputs, copies and checkpoints


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_open_clip_towers(name, batch_first):
    options = {"layers": "none"} if name == "lst" else {"widths": (4, 4, 4, 8), "heads": (1, 2, 2, 2)} if name == "lean-hst" else {}
    method = METHODS[name](regime="shared") if name not in ("lst", "lean-hst") else (
        LadderSideTuning(reduction=2, **options) if name == "lst" else LeanHierarchicalSideTuning(**options)
    )  # fmt: skip
    module = started(method, ClipModule(clip_tower(batch_first))).train()
    logits = module(images())
    assert (logits[:, 2:] == HIDDEN_LOGIT).all()
    cross_entropy(logits, torch.tensor([0, 1, 0])).backward()
    side = module.plugins["side"].active
    assert all(p.grad is not None for p in side.parameters() if p.numel() > 1)
    assert all(p.grad is None for p in module.tower.parameters())
    if name == "lst":
        bank = method.bank(module)
        bank.bypass = True
        module(images())
        feature = side(bank.taps.take(), torch.zeros(0)) @ module.tower.proj
        expected = F.linear(feature, module.classifier.weight, module.classifier.bias)
        torch.testing.assert_close(expected[:, :2], logits[:, :2])


def test_dense_features_follow_timm():
    encoder = HierarchicalFeatures(vit_glyph(num_classes=0), widths=(16, 16, 32, 48), heads=(2, 2, 4, 4))
    maps = encoder.train()(torch.zeros(2, 3, 64, 64, requires_grad=True)[:, :, :32, :32])
    assert [m.shape[1] for m in maps] == encoder.feature_info.channels() == [16, 16, 32, 48]
    assert [32 // m.shape[2] for m in maps] == encoder.feature_info.reduction()
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is None for p in encoder.model.parameters())
    assert encoder.side.embed[0].conv[0].weight.grad is not None
    with pytest.raises(ValueError, match="`registers` must be 0"):
        HierarchicalFeatures(vit_glyph(num_classes=0), registers=1)


@pytest.mark.parametrize("name", METHODS)
def test_state_restores_the_number_of_side_networks(name):
    module = PlainModule(tiny_vit(depth=4))
    _train(module, METHODS[name](regime="per_task_dense"))
    fresh = started(METHODS[name](regime="per_task_dense"), PlainModule(tiny_vit(depth=4, seed=1)))
    fresh.load_state_dict(module.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images()), module.eval()(images()))
    flags = [[p.requires_grad for p in m.plugins["side"].parameters()] for m in (fresh, module)]
    assert flags[0] == flags[1]
    fewer = started(METHODS[name](regime="per_task_dense"), PlainModule(tiny_vit(depth=4)))
    module.load_state_dict(fewer.state_dict(), strict=True)
    assert len(module.plugins["side"].sides) == len(module.plugins["side"].mix) == 1


@pytest.mark.parametrize("name", ["lst", "sherl", "hst"])
def test_base_names_stay_and_copies_work(name):
    method = HierarchicalSideTuning(**PYRAMID) if name == "hst" else METHODS[name]()
    module = tiny_vit(depth=4)
    names = set(module.state_dict())
    started(method, module)
    assert {n for n in module.state_dict() if not n.startswith("plugins.")} == names
    copied = copy.deepcopy(module).eval()
    with torch.no_grad():
        before = module.eval()(images())
        for parameter in module.parameters():
            parameter.zero_()
        assert torch.equal(copied(images()), before)  # the copy has side networks, taps and backbone of its own
    compiled = torch.compile(copied, backend="eager")
    torch.testing.assert_close(compiled(images()), before)


@pytest.mark.parametrize("cache", [False, True])
def test_resume_inside_a_task_equals_an_uninterrupted_run(tmp_path, cache):
    def callbacks():
        extra = [CacheFeatures(progress=False)] if cache else []
        return [METHODS["lst"](regime="per_task"), *extra]

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if pl_module.plugins["side"].started == 2 and trainer.current_epoch == 0:
                raise InterruptedError

    straight = PlainModule(tiny_vit(depth=4))
    fit_stream(quiet_trainer(callbacks=callbacks()), straight, tiny_stream())
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1, save_on_train_epoch_end=True)
    with pytest.raises(InterruptedError):
        trainer = quiet_trainer(callbacks=[*callbacks(), save, Stop()], enable_checkpointing=True)
        fit_stream(trainer, PlainModule(tiny_vit(depth=4)), tiny_stream())
    resumed = PlainModule(tiny_vit(depth=4, seed=5))
    trainer = quiet_trainer(callbacks=[*callbacks(), ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True)
    fit_stream(trainer, resumed, tiny_stream(), ckpt_path="last")
    assert len(resumed.plugins["side"].sides) == 3
    for (name, a), (_, b) in zip(straight.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


# bad input


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: LadderSide(16, 2, 2, reduction=3), "`reduction` must divide the width of a head, 8, got 3"),
        (lambda: LadderSide(16, 2, 2, reduction=2, layers=[2]), r"`layers` must be distinct blocks in order, 0 to 1"),
        (lambda: LadderSide(16, 2, 2, reduction=2, gate="lernable"), "did you mean 'learnable'"),
        (lambda: LadderSide(16, 2, 2, reduction=2, fuse="in"), "`fuse` must be 'before' or 'after'"),
        (lambda: LadderSide(16, 2, 2, reduction=2, temperature=0), "`temperature` must be above 0"),
        (lambda: kept_layers(2, "three-quarters"), "`drop` must leave a layer"),
        (lambda: Consolidator(8, 4, 1), "`n_taps` must be 2 or more"),
        (lambda: Consolidator(8, 4, 2, variant="gate"), "did you mean 'gated'"),
        (lambda: Consolidator(8, 4, 2, gate_init="one"), "`gate_init` must be"),
        (lambda: SherlSide(find_backbone(tiny_vit()), late=2), "`late` must leave a block for the taps, 1 to 1"),
        (lambda: SherlSide(find_backbone(tiny_vit()), reduction=5), "`reduction` must divide the backbone's width, 16"),
        (lambda: HierarchicalSide(16, 2), "`depth` must give each of the 4 stages a block"),
        (lambda: HierarchicalSide(16, 4, depths=(1, 1, 1, 2)), "`depths` must be 4 numbers that sum to 4"),
        (lambda: HierarchicalSide(16, 4, widths=(3, 4, 4, 4), heads=(2, 2, 2, 2)), "multiples of `heads`"),
        (lambda: AlphaSide(4, merge="alfa"), "did you mean 'alpha'"),
        (lambda: prune_chain({"a.weight": torch.ones(2, 2)}, [("a",)], 0.5), "`reduction` must be 1 or more"),
        (lambda: TaskRouter(2, 2, shrinkage=2.0), "`shrinkage` must be from 0 to 1"),
        (lambda: LadderSideTuning(regime="pertask"), "did you mean 'per_task'"),
        (lambda: LadderSideTuning(init="fischer"), "did you mean 'fisher'"),
        (lambda: LadderSideTuning(layers="quater"), "did you mean 'quarter'"),
        (lambda: SideTuning(routing="logit"), "did you mean 'logits'"),
        (lambda: SideTuning(distill_lr=0.0), "`distill_lr` must be above 0"),
        (lambda: LeanHierarchicalSideTuning(drop_path=1.0), "`drop_path` must be"),
        (lambda: HierarchicalSideTuning(registers=0), "LeanHierarchicalSideTuning does without them"),
        (lambda: LadderSideTuning(reduction=16).install(tiny_vit(depth=4)), "`reduction` must divide the width of a head"),
        (lambda: LadderSideTuning(2, layers=[9]).install(tiny_vit(depth=4)), r"`layers` must be .* 0 to 3, got \[9\]"),
        (lambda: LeanHierarchicalSideTuning().install(tiny_vit(depth=4)), "`widths` must end with at most 16"),
        (lambda: LadderSideTuning().install(nn.Linear(2, 2)), "must hold a transformer backbone"),
        (lambda: LadderSideTuning().bank(tiny_vit()), "`install` must come first"),
        (lambda: patch_grid(5, 8, 8), "must fill a grid"),
    ],
)  # fmt: skip
def test_bad_input_is_told(call, match):
    with pytest.raises((ValueError, RuntimeError), match=match):
        call()


def test_taps_out_of_range_are_told():
    with pytest.raises(ValueError, match=r"`indices` must be taps of the backbone, 0 to 2, got \[3\]"):
        BackboneTaps(find_backbone(tiny_vit())).want([3])


def test_a_backbone_that_cannot_be_pruned_is_told():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([SideBlock(8, 2, 16)])
            self.norm = nn.LayerNorm(8)

    with pytest.raises(ValueError, match="use init='random'"):
        canonical_weights(Backbone("", Odd(), "timm", (), 8, 2))


def test_stage_depths_and_layouts():
    assert [sum(stage_depths(d)) for d in (4, 5, 7, 12, 24)] == [4, 5, 7, 12, 24]
    tokens = torch.arange(12.0).view(1, 4, 3)
    assert TokenLayout(1, "token").reduce(tokens).tolist() == [[0.0, 1.0, 2.0]]
    assert TokenLayout(1, "avg").reduce(tokens).tolist() == [[6.0, 7.0, 8.0]]
    reduced = TokenLayout(1, "token").reduce(tokens)
    assert reduced.untyped_storage().nbytes() == 12  # a slice would keep all tokens alive
