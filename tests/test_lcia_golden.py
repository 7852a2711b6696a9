"""Golden numbers of balanced averaging and of grouping by instructions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cl_plugins.ema import BalancedAverager
from cl_plugins.ema_rules import Rule, eq45_weight, eq60_sums, guard, make_rule
from cl_plugins.instruction_groups import InstructionGroups
from tests._golden import golden_files

FILES = golden_files("lcia", "*.npz")
CODEBOOKS = golden_files("lcia", "codebook_*.json")


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as data:
        return dict(data)


def _names(data: dict[str, np.ndarray]) -> list[str]:
    return [k.removeprefix("grad/") for k in data if k.startswith("grad/")]


def _rule(data: dict[str, np.ndarray]) -> Rule:
    """The code base follows from the numbers: its fallback is the first weight, its kappa solves the formula."""
    fallback = float(data[f"alpha/{_names(data)[0]}"][0])
    solved = []
    for n in _names(data):
        alpha, a, b, c = (data[f"{k}/{n}"] for k in ("alpha", "norm_a", "norm_b", "norm_c"))
        dynamic = ~np.isclose(alpha, fallback, rtol=1e-3) & np.isfinite(a)
        solved += list((alpha * a * c / (1 + b))[dynamic])
    toolbox = len(solved) > 0 and abs(np.log(np.median(solved) / 0.01)) < abs(np.log(np.median(solved) / 2.0))
    return make_rule("toolbox" if toolbox else "released", fallback=round(fallback, 6))


def _is_bfloat16(data: dict[str, np.ndarray]) -> bool:
    """True when every recorded weight is a bfloat16 number stored upcast."""
    tensors = [torch.from_numpy(data[f"theta/{n}"]) for n in _names(data)]
    return all(torch.equal(t, t.bfloat16().float()) for t in tensors)


def _grad(data: dict[str, np.ndarray], name: str, step: int, dtype: torch.dtype) -> torch.Tensor | None:
    if not data[f"has_grad/{name}"][step]:
        return None
    return torch.from_numpy(data[f"grad/{name}"][step]).to(dtype)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_averages(path: Path) -> None:
    data = _load(path)
    names = _names(data)
    low = _is_bfloat16(data)
    dtype = torch.bfloat16 if low else torch.float32
    averager = BalancedAverager(_rule(data), start="after_first_step", dtype=dtype)
    theta = {n: torch.from_numpy(data[f"theta/{n}"]).to(dtype) for n in names}
    averager.join(names, [theta[n][0] for n in names])
    weights = [theta[n][0] for n in names]
    for step in range(len(data[f"alpha/{names[0]}"])):
        weights = [theta[n][step + 1].clone() for n in names]
        alpha = averager.update(weights, [_grad(data, n, step, dtype) for n in names])
        for k, n in enumerate(names):
            expected = float(data[f"alpha/{n}"][step])
            assert float(alpha[k]) == pytest.approx(expected, rel=1e-2 if low else 2e-5), (n, step)
            target = torch.from_numpy(data[f"ema/{n}"][step])
            close = 2**-8 if low else 1e-6
            torch.testing.assert_close(averager.averages[k].float(), target, rtol=close, atol=1e-6, equal_nan=True)
    averager.copy_to(weights)
    for weight, n in zip(weights, names, strict=True):
        final = torch.from_numpy(data[f"final/{n}"])
        torch.testing.assert_close(weight.float(), final, rtol=2**-8 if low else 1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_sums(path: Path) -> None:
    """The recorded L1 norms, from the recorded averages, so that errors cannot add up."""
    data = _load(path)
    low = _is_bfloat16(data)
    for n in _names(data):
        for step in range(1, len(data[f"alpha/{n}"])):
            if data[f"exc/{n}"][step] or np.isnan(data[f"norm_a/{n}"][step]):
                continue
            a = np.abs(data[f"theta/{n}"][step + 1].astype(np.float64) - data[f"ema/{n}"][step - 1]).sum()
            b = np.abs(data[f"grad/{n}"][step].astype(np.float64)).sum()
            c = np.abs(data[f"grad/{n}"][step].astype(np.float64) - data[f"grad/{n}"][step - 1]).sum()
            expected = [float(data[f"norm_{k}/{n}"][step]) for k in "abc"]
            assert [a, b, c] == pytest.approx(expected, rel=2e-2 if low else 1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_frozen_parameters_have_no_average(path: Path) -> None:
    data = _load(path)
    frozen = [k.removeprefix("theta/") for k in data if k.startswith("theta/") and f"grad/{k[6:]}" not in data]
    for n in frozen:
        assert np.array_equal(data[f"final/{n}"], data[f"theta/{n}"][-1])
        assert f"ema/{n}" not in data


DERIVED = sorted(
    {(p, k.split("_alpha/")[0]) for p in FILES for k in _load(p) if k.startswith("derived_") and "_alpha/" in k}
)


@pytest.mark.parametrize(("path", "form"), DERIVED, ids=lambda x: x.stem if isinstance(x, Path) else x)
def test_golden_paper_forms(path: Path, form: str) -> None:
    """Each step from the recorded course of the average, so that a rounding residue in one step cannot spread."""
    data = _load(path)
    for n in _names(data):
        theta = torch.from_numpy(data[f"theta/{n}"]).double()
        grads = torch.from_numpy(data[f"grad/{n}"]).double()
        alphas = data[f"{form}_alpha/{n}"]
        average = theta[0].clone()
        residual = torch.zeros((), dtype=torch.float64)
        for step, expected in enumerate(alphas):
            weight, offset = theta[step + 1], theta[step + 1] - average
            if step == 0:
                alpha = torch.tensor([0.01]).double()
            else:
                g, q = grads[step], grads[step - 1]
                a, c = offset.abs().sum(), (g - q).abs().sum()
                if form.endswith("eq60_secant"):
                    top, bottom = eq60_sums(weight, average, theta[step], g, q)
                    raw = 1 - top / bottom
                elif form.endswith("eq45_scalar_plus1"):
                    raw = eq45_weight(residual, a, 1 + g.abs().sum(), c)
                else:
                    raw = eq45_weight(residual, a, (g + 1).abs().sum(), c)
                alpha, _ = guard(raw.reshape(1), 0.01)
            if residual > 1e-9 or step == 0 or form.endswith("eq60_secant"):
                assert float(alpha) == pytest.approx(expected, rel=1e-6), (n, step)
            average = (1 - expected) * average + expected * weight
            residual = (weight - average).abs().sum()
        torch.testing.assert_close(
            average, torch.from_numpy(data[f"{form}_ema_last/{n}"]), rtol=1e-9, atol=1e-9, equal_nan=True
        )


@pytest.mark.parametrize(("path", "form"), DERIVED, ids=lambda x: x.stem if isinstance(x, Path) else x)
def test_golden_paper_forms_in_the_averager(path: Path, form: str) -> None:
    """The float32 averager over the whole course, on tensors whose first step moved: no residue of rounding."""
    data = _load(path)
    rule = next(r for mark, r in (("eq60", "eq60"), ("elem", "eq45_elementwise"), ("scalar", "eq45")) if mark in form)
    for n in _names(data):
        theta = torch.from_numpy(data[f"theta/{n}"])
        if float((theta[1] - theta[0]).abs().sum()) < 1e-6:
            continue
        averager = BalancedAverager(rule)
        averager.join([n], [theta[0]])
        for step, expected in enumerate(data[f"{form}_alpha/{n}"]):
            alpha = averager.update([theta[step + 1]], [_grad(data, n, step, torch.float32)])
            if rule != "eq60":  # its denominator cancels, which float32 does not bear; the float64 test covers it
                assert float(alpha) == pytest.approx(expected, rel=2e-4), (n, step)


@pytest.mark.parametrize("path", CODEBOOKS, ids=lambda p: p.stem)
def test_golden_codebook(path: Path) -> None:
    book = json.loads(path.read_text())
    groups = InstructionGroups("tfidf-pair", threshold=book["threshold"], unmatched="last")
    for event in book["events"]:
        match = groups.match(event["instructions"])
        assert list(match.scores) == pytest.approx(event["mean_similarity_per_group"], abs=1e-9)
        if event["split"] == "train":
            assert match.expanded == event["expanded"]
            assert match.group + 1 == event["group"]
            groups.commit(match)
        else:
            assert groups.allocate(event["instructions"]).group + 1 == event["group"]
    stored = [sorted(texts) for texts in groups.groups]
    assert stored == [
        sorted(texts) for _, texts in sorted(book["codebook_after"].items(), key=lambda kv: _number(kv[0]))
    ]


def _number(name: str) -> int:
    return int("".join(ch for ch in name if ch.isdigit()))
