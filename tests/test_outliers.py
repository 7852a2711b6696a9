"""Virtual outliers and their loss as pure functions."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss
from torch.testing import assert_close

from cl_plugins.head_phase import FeatureTap, local_targets, outlier_batches, tune_head
from cl_plugins.neighbors import kth_neighbor_distance, normalize_rows
from cl_plugins.outliers import OutlierSet, VirtualOutliers, energy, ovor_learning_rate, synthesize_outliers, vor_loss


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_scores(candidates: Tensor, features: Tensor, k: int) -> Tensor:
    """Squared distance to the k-th nearest normalized feature, one candidate at a time."""
    unit = torch.stack([f / f.norm() for f in features])
    return torch.stack([(unit - c).square().sum(1).sort().values[k - 1] for c in candidates])


def test_neighbor_distance_is_that_of_a_sort() -> None:
    queries, points = draw(37, 8).double(), draw(50, 8, seed=1).double()
    expected = torch.cdist(queries, points).square().sort(1).values
    for k in (1, 7, 50):
        assert_close(kth_neighbor_distance(queries, points, k), expected[:, k - 1])
    with pytest.raises(ValueError, match=r"`k` must be in \[1, 50\], the number of points, got 51"):
        kth_neighbor_distance(queries, points, 51)
    assert kth_neighbor_distance(queries[:0], points, 3).shape == (0,)


def test_neighbor_distance_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, points = draw(37, 8), draw(50, 8, seed=1)
    whole = kth_neighbor_distance(queries, points, 5)
    monkeypatch.setattr("cl_plugins.neighbors._CHUNK", 150)
    assert_close(kth_neighbor_distance(queries, points, 5), whole)


def test_reference_mode_equals_scoring_every_copy() -> None:
    features, noise = draw(80, 12), draw(40, 12, seed=1)
    out = synthesize_outliers(features, noise, 47, neighbors=6, n_boundary=10, noise_scale=0.5)
    candidates = (0.5 * noise).repeat(10, 1)
    kept = slow_scores(candidates, features, 6).sort(descending=True, stable=True).indices[:47]
    expected = candidates[kept]
    assert out.counts.tolist() == [10, 10, 10, 10, 7]
    assert_close(out.rows.repeat_interleave(out.counts, 0), expected)
    assert_close(out.rows, 0.5 * noise[out.candidate])


@pytest.mark.parametrize("normalize", [True, False])
def test_boundary_mode_equals_scoring_every_candidate(normalize: bool) -> None:
    features, noise = draw(60, 6) * 3, draw(20, 6, seed=1)
    out = synthesize_outliers(
        features, noise, 25, neighbors=5, n_boundary=8, mode="boundary", normalize_candidates=normalize
    )
    edge = slow_scores(normalize_rows(features), features, 5).topk(8).indices
    candidates = (features[edge][:, None] + 0.1 * noise).flatten(0, 1)
    scored = normalize_rows(candidates) if normalize else candidates
    scores = slow_scores(scored, features, 5)
    assert_close(out.scores, scores.topk(25).values, atol=1e-4, rtol=1e-4)
    assert_close(
        slow_scores(normalize_rows(out.rows) if normalize else out.rows, features, 5), out.scores, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("mode", ["reference", "boundary"])
def test_order_of_the_features_does_not_matter(mode: str) -> None:
    features, noise = draw(60, 6), draw(20, 6, seed=1)
    shuffled = features[torch.randperm(60, generator=torch.Generator().manual_seed(3))]
    first, second = (
        synthesize_outliers(f, noise, 15, neighbors=5, n_boundary=7, mode=mode) for f in (features, shuffled)
    )
    assert_close(first.rows, second.rows)
    assert torch.equal(first.counts, second.counts)


def test_few_samples_zero_features_and_few_candidates() -> None:
    noise = draw(20, 6)
    with pytest.warns(UserWarning, match="`neighbors` is 50 but the task has 3 samples"):
        out = synthesize_outliers(draw(3, 6, seed=1), noise, 8)
    assert out.counts.tolist() == [3, 3, 2]  # 3 repeats at most
    for mode in ("reference", "boundary"):
        out = synthesize_outliers(torch.zeros(9, 6), noise, 30, neighbors=2, n_boundary=4, mode=mode)
        assert out.rows.isfinite().all()
        assert out.scores.isfinite().all()
        assert int(out.counts.sum()) == 30
        out = synthesize_outliers(draw(9, 6), noise, 10_000, neighbors=2, n_boundary=4, mode=mode)
        assert int(out.counts.sum()) == 4 * 20
        one = synthesize_outliers(draw(9, 6), noise, 1, neighbors=2, n_boundary=4, mode=mode)
        assert one.rows.shape == (1, 6)
        empty = synthesize_outliers(torch.zeros(0, 6), noise, 10, mode=mode)
        assert empty.rows.shape == (0, 6)


def test_low_precision_and_autocast_are_computed_in_float32() -> None:
    features, noise = draw(80, 12).bfloat16(), draw(40, 12, seed=1)
    expected = synthesize_outliers(features.float(), noise, 20, neighbors=6)
    assert expected.rows.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(synthesize_outliers(features, noise, 20, neighbors=6).rows, expected.rows)
        terms = vor_loss(features[:, :4], features[:9, 4:8])
    assert_close(terms.loss, vor_loss(features[:, :4].float(), features[:9, 4:8].float()).loss)
    assert terms.loss.dtype == torch.float32
    assert synthesize_outliers(features.double(), noise, 20, neighbors=6).rows.dtype == torch.float64


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"`mode` must be one of .* got 'npos'"):
        synthesize_outliers(draw(5, 2), draw(5, 2), 4, mode="npos")
    with pytest.raises(ValueError, match=r"matrices of one width, got shapes \(5, 2\) and \(5, 3\)"):
        synthesize_outliers(draw(5, 2), draw(5, 3), 4)
    with pytest.raises(ValueError, match="`n_out` must be 1 or more, got 0"):
        synthesize_outliers(draw(5, 2), draw(5, 2), 0)
    with pytest.raises(ValueError, match=r"`epoch` must be in \[0, 5\), got 5"):
        ovor_learning_rate(5, 5, 0.1)
    assert ovor_learning_rate(0, 1, 0.1) == 0.1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"neighbors": 0}, "`neighbors` must be an integer of 1 or more, got 0"),
        ({"batch_size": 2.5}, "`batch_size` must be an integer"),
        ({"noise_scale": -1.0}, "`noise_scale` must be a finite number of 0 or more"),
        ({"ood_weight": float("nan")}, "`ood_weight` must be a finite number"),
        ({"id_threshold": float("inf")}, "`id_threshold` must be a finite energy"),
        ({"mode": "NPOS"}, "`mode` must be one of"),
    ],
)
def test_bad_settings(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        VirtualOutliers(**options)


@pytest.mark.parametrize("huber", [True, False])
def test_loss_against_torch_functions(huber: bool) -> None:
    id_logits, ood_logits = 4 * draw(9, 3).double(), 4 * draw(5, 3, seed=1).double()
    terms = vor_loss(id_logits, ood_logits, id_threshold=-4, ood_threshold=-2, id_weight=0.3, ood_weight=2, huber=huber)
    hinges = (-id_logits.logsumexp(1) + 4).relu(), (-2 + ood_logits.logsumexp(1)).relu()
    rho = [huber_loss(h, torch.zeros_like(h)) if huber else h.square().mean() for h in hinges]
    assert_close(terms.loss, 0.3 * rho[0] + 2 * rho[1])
    assert_close(terms.id_active, (hinges[0] > 0).double().mean())
    assert_close(terms.ood_energy, energy(ood_logits).mean())


def test_counts_weigh_like_repeated_rows_and_no_outlier_adds_nothing() -> None:
    id_logits, ood_logits, counts = 4 * draw(6, 3), 4 * draw(3, 3, seed=1), torch.tensor([5, 1, 2])
    weighted = vor_loss(id_logits, ood_logits, ood_counts=counts)
    for got, expected in zip(weighted, vor_loss(id_logits, ood_logits.repeat_interleave(counts, 0)), strict=True):
        assert_close(got, expected)
    some = torch.tensor([1, 0, 2, 0, 0, 3])
    assert_close(
        vor_loss(id_logits, ood_logits, id_counts=some).loss,
        vor_loss(id_logits.repeat_interleave(some, 0), ood_logits).loss,
    )
    empty = torch.zeros(0, 3, requires_grad=True)
    terms = vor_loss(id_logits, empty)
    assert_close(terms.loss, vor_loss(id_logits, empty.detach(), ood_weight=0.0).loss)
    assert terms.ood_active == 0
    terms.loss.backward()


def test_outlier_batches_skip_the_remainder_and_start_again() -> None:
    rows = torch.arange(3.0)[:, None]
    outliers = OutlierSet(rows, torch.tensor([4, 4, 3]), rows[:, 0], torch.arange(3))
    got = [(r[:, 0].tolist(), c.tolist()) for r, c in outlier_batches(outliers, 2)]
    assert got == [([0, 1], [4, 1]), ([1, 2], [3, 2])]
    assert [r.item() for r, _ in outlier_batches(outliers, 13)] == [0] * 4 + [1] * 4 + [2] * 3 + [0] * 2
    nothing = OutlierSet(rows[:0], outliers.counts[:0], rows[:0, 0], outliers.counts[:0])
    assert [len(r) for r, _ in outlier_batches(nothing, 2)] == [0, 0]


def test_the_generator_alone_decides() -> None:
    settings, features = VirtualOutliers(neighbors=5, draws=30), draw(40, 6)
    before = torch.get_rng_state()
    first, again, other = (settings.synthesize(features, 2, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, other.rows)


def test_labels_become_positions_in_the_task() -> None:
    assert local_targets(torch.tensor([9, 7, 9, 2]), (7, 2, 9)).tolist() == [2, 0, 2, 1]
    with pytest.raises(ValueError, match=r"classes of the task, \(7, 2\), got \[3, 9\]"):
        local_targets(torch.tensor([9, 3, 7]), (7, 2))
    with pytest.raises(TypeError, match=r"vector of class indices, got torch.float32 of shape \(2, 3\)"):
        local_targets(torch.zeros(2, 3), (7, 2))


@pytest.mark.parametrize("bias", [True, False])
def test_tuning_moves_only_the_rows_of_the_task(bias: bool) -> None:
    head, settings = nn.Linear(6, 5, bias=bias), VirtualOutliers(neighbors=3, draws=20, n_boundary=4, batch_size=8)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.5)
    head(draw(4, 6)).sum().backward()
    optimizer.step()  # moments for all rows
    old = head.weight.detach().clone()
    labels = torch.tensor([4, 1] * 15)
    means = tune_head(head, draw(30, 6, seed=2), labels, (4, 1), optimizer, settings, torch.Generator())
    assert torch.equal(head.weight[[0, 2, 3]], old[[0, 2, 3]])
    assert not torch.isclose(head.weight[[1, 4]], old[[1, 4]]).any()
    assert all(v.ndim == 0 and v.isfinite() for v in means)
    assert head.weight.grad is None


def test_tuning_lowers_loss_and_energy_of_samples() -> None:
    head, features = nn.Linear(6, 2), 3 * draw(60, 6)
    settings = VirtualOutliers(neighbors=5, draws=50, noise_scale=1.0, ood_threshold=0.0, batch_size=16)
    optimizer, generator = torch.optim.Adam(head.parameters(), lr=0.05), torch.Generator().manual_seed(0)
    labels = (features[:, 0] > 0).long()
    runs = [tune_head(head, features, labels, (0, 1), optimizer, settings, generator) for _ in range(20)]
    assert runs[-1].loss < runs[0].loss
    assert runs[-1].id_energy < runs[0].id_energy


def test_one_class_no_sample_and_any_callable_head() -> None:
    settings = VirtualOutliers(neighbors=3, draws=20, n_boundary=4)
    head = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    means = tune_head(head, draw(9, 6), torch.full((9,), 2), (2,), optimizer, settings, torch.Generator())
    assert means.loss.isfinite()
    with pytest.warns(UserWarning, match="no features were collected"):
        assert tune_head(head, draw(0, 6), torch.zeros(0), (2,), optimizer, settings, torch.Generator()) is None

    deep = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(deep.parameters(), lr=0.1)
    before = deep[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune_head(deep, draw(9, 6), torch.tensor([0, 1, 2] * 3), (0, 1, 2), optimizer, settings, torch.Generator())
    assert not torch.equal(deep[0].weight, before)


def test_tap_keeps_features_only_while_on_and_training() -> None:
    head = nn.Linear(6, 3)
    tap, x = FeatureTap(head), draw(4, 6).requires_grad_()
    with pytest.raises(RuntimeError, match="must call the module's classifier"):
        tap.take()
    head(x)
    tap.on = True
    head(x)
    head(x + 1)
    tap.eval()
    head(x)
    kept = tap.take()
    assert torch.equal(kept, torch.cat([x, x + 1]).detach())
    assert not kept.requires_grad
    tap.train()
    tap.remove()
    head(x)
    with pytest.raises(RuntimeError):
        tap.take()


MEMORY = """
import resource, sys, torch
from cl_plugins.outliers import VirtualOutliers
settings = VirtualOutliers(mode=sys.argv[1])
features, noise = torch.randn(5000, 768), torch.randn(600, 768)
settings.synthesize(features[:200], 10, noise)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
settings.synthesize(features, 10, noise)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs")
@pytest.mark.parametrize("mode", ["reference", "boundary"])
def test_peak_memory_stays_under_100_mb(mode: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True)
    assert int(done.stdout) < 100 * 1024  # in KiB
