from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize, one_hot, relu

from cl_plugins import fit_stream
from cl_plugins.callbacks import MaskedHead, NearestMean, RanPAC
from cl_plugins.closed_form import NearestMeanHead, RidgeHead
from cl_plugins.features import collect_features
from tests._helpers import PlainModule, quiet_trainer, tiny_stream


def _samples(n=60, dim=6, classes=4):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    return torch.randn(n, dim, generator=generator) + labels[:, None], labels


def test_nearest_mean_is_the_class_with_the_nearest_mean():
    features, labels = _samples()
    head = nn.Linear(6, 5)
    closed = NearestMeanHead(head).eval()
    for part in range(2):  # two tasks add up
        keep = labels // 2 == part
        closed.accumulate(features[keep], labels[keep])
    means = torch.stack([features[labels == c].mean(0) for c in range(4)])
    expected = normalize(features, dim=1) @ normalize(means, dim=1).T
    torch.testing.assert_close(head(features)[:, :4], expected)
    assert (head(features)[:, 4] < -1e3).all()  # no sample, no prediction


def test_ridge_over_tasks_equals_ridge_on_everything():
    features, labels = _samples()
    head = nn.Linear(6, 4)
    closed = RidgeHead(head, projection=32, ridge=0.5, seed=3).eval()
    for part in range(2):
        keep = labels // 2 == part
        closed.accumulate(features[keep], labels[keep])
    closed.solve()
    hidden = relu(features.double() @ closed.matrix.double())
    target = one_hot(labels, 4).double()
    weights = torch.linalg.solve(hidden.T @ hidden + 0.5 * torch.eye(32).double(), hidden.T @ target)
    torch.testing.assert_close(head(features).double(), hidden @ weights, atol=1e-4, rtol=1e-4)


def test_the_penalty_is_the_one_with_the_least_error_on_held_out_samples():
    features, labels = _samples(100)
    closed = RidgeHead(nn.Linear(6, 4), projection=16, seed=1)
    closed.accumulate(features, labels)
    held = torch.arange(100) % 5 == 4
    hidden = relu(features @ closed.matrix).double()
    target = one_hot(labels, 4).double()

    def error(ridge):
        a, b = hidden[~held], target[~held]
        weights = torch.linalg.lstsq(a.T @ a + ridge * torch.eye(16).double(), a.T @ b).solution
        return float((hidden[held] @ weights - target[held]).square().mean())

    assert closed.chosen == min(RidgeHead.GRID, key=error)


def test_logits_in_training_mode_stay_the_modules_own():
    head = nn.Linear(2, 2)
    closed = NearestMeanHead(head)
    closed.accumulate(torch.eye(2), torch.tensor([0, 1]))
    x = torch.randn(3, 2)
    torch.testing.assert_close(head(x), x @ head.weight.T + head.bias)


@pytest.mark.parametrize("method", [NearestMean, partial(RanPAC, projection=64)])
def test_alone_it_trains_nothing_and_behind_an_adapter_it_uses_its_features(method):
    module = PlainModule()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    result = fit_stream(quiet_trainer(callbacks=[method()]), module, tiny_stream())
    after = module.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert result.trainable_parameters == 0
    assert result.average_accuracy > 0.6

    trained = PlainModule()
    fit_stream(quiet_trainer(callbacks=[MaskedHead(), method()]), trained, tiny_stream())
    assert not torch.equal(trained.model.head.weight, before["model.head.weight"])


def test_order_of_callbacks_does_not_matter():
    results = []
    for order in (1, -1):
        torch.manual_seed(0)
        callbacks = [MaskedHead(), NearestMean()][::order]
        results.append(fit_stream(quiet_trainer(callbacks=callbacks), PlainModule(), tiny_stream()))
    assert torch.equal(results[0].correct, results[1].correct)


def test_the_head_is_restored_by_a_state_dict():
    module = PlainModule()
    fit_stream(quiet_trainer(callbacks=[RanPAC(projection=64)]), module, tiny_stream())
    fresh = PlainModule()
    RanPAC(projection=64).install(fresh)
    fresh.load_state_dict(module.state_dict())
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(fresh.eval()(x), module.eval()(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match="`projection` must be 0 or more, got -1"):
        RanPAC(projection=-1)
    with pytest.raises(ValueError, match="`ridge` must be above 0, or None to choose it, got 0"):
        RanPAC(ridge=0)


def test_features_are_what_enters_the_head():
    module = PlainModule().eval()
    loader = [(torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]))]
    features, labels = collect_features(module, module.model.head, loader)
    torch.testing.assert_close(features, module.model.forward_head(module.model.forward_features(loader[0][0]), True))
    assert labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="`loader` must give at least one batch"):
        collect_features(module, module.model.head, [])
    with pytest.raises(RuntimeError, match="never calls its classifier"):
        collect_features(module, nn.Linear(2, 2), loader)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_stream_without_a_fit_is_saved_by_the_trainer_and_read_back(tmp_path, precision):
    def run(ckpt_path=None):
        trainer, module = quiet_trainer(callbacks=[NearestMean()], precision=precision), PlainModule()
        return trainer, module, fit_stream(trainer, module, tiny_stream(), ckpt_path)

    trainer, module, result = run()
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    _, _, resumed = run(tmp_path / "final.ckpt")
    assert torch.equal(result.correct, resumed.correct)
    saved = torch.load(tmp_path / "final.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == module.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    other = PlainModule()
    fit_stream(quiet_trainer(callbacks=[NearestMean()]), other, tiny_stream(n_tasks=1))  # its structure
    other.load_state_dict(saved)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in saved.items())
