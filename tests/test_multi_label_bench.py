"""cl-bench on a multi-label stream: the loss takes shown labels alone; methods that need one label are refused."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from cl_plugins.benchmark import run_benchmark
from cl_plugins.workloads.multi_label import shown_label_loss

TINY = {"n_classes": 4, "n_tasks": 2, "train_images": 48, "test_images": 16}


@pytest.mark.parametrize("method", ["finetune", "masked-finetune", "frozen-linear", "lora", "mora", "oneprompt", "ema"])
def test_methods_that_serve_it(method, tmp_path):
    result = run_benchmark(method, "multilabel-glyphs", epochs=1, data=TINY, out=tmp_path, device="cpu", progress=False)
    assert tuple(result.accuracy_matrix.shape) == (2, 2)
    assert not bool(result.accuracy_matrix[-1].isnan().any())


@pytest.mark.parametrize("method", ["ovor", "ranpac", "lst"])
def test_methods_that_need_one_label_are_refused(method, tmp_path):
    with pytest.raises(ValueError, match=r"must work on multi-label data.*one label per sample"):
        run_benchmark(method, "multilabel-glyphs", data=TINY, out=tmp_path, device="cpu", progress=False)


def test_hidden_labels_carry_no_loss_and_no_gradient():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([[1.0, 0.0, -1.0, -1.0]]).repeat(3, 1)
    loss = shown_label_loss(logits, targets)
    torch.testing.assert_close(loss, binary_cross_entropy_with_logits(logits[:, :2], targets[:, :2]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[:, 2:].any()
    assert gradient[:, :2].all()
