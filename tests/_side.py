"""What tests of side networks share: small methods, modules and images."""

from __future__ import annotations

import torch
from open_clip.transformer import VisionTransformer as ClipTower
from torch import nn
from torch.nn.functional import cross_entropy

from cl_plugins import Task, fit_stream
from cl_plugins.callbacks import (
    HierarchicalSideTuning,
    LadderSideTuning,
    LeanHierarchicalSideTuning,
    Sherl,
    SideTuning,
)
from tests._helpers import quiet_trainer, tiny_stream, tiny_vit

PYRAMID = {"widths": (8, 8, 8, 16), "heads": (1, 2, 2, 2)}
METHODS = {
    "lst": lambda **o: LadderSideTuning(reduction=2, **o),
    "sherl": lambda **o: Sherl(reduction=4, **o),
    "lean-hst": lambda **o: LeanHierarchicalSideTuning(**PYRAMID, **o),
    "side-tuning": lambda **o: SideTuning(width=4, **o),
}
ALL_METHODS = {**METHODS, "hst": lambda **o: HierarchicalSideTuning(**PYRAMID, **o)}


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


def train(module, method, stream=None, **options):
    stream = tiny_stream() if stream is None else stream
    trainer = quiet_trainer(callbacks=[method, *options.pop("callbacks", [])], **options)
    return fit_stream(trainer, module, stream)


def backward_saving_outside(module: nn.Module, inputs: torch.Tensor) -> None:
    """A backward pass that reaches the side network at work; no tensor is saved while the backbone runs."""
    taps, while_running = module.plugins["taps"], []

    def pack(tensor):
        while_running.append(taps.running)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = cross_entropy(module(inputs), torch.tensor([0, 1, 0]))
    assert while_running
    assert not any(while_running)
    loss.backward()
    own = module.plugins["side"].active.parameters()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in own)
