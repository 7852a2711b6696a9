"""OnePrompt and OVOR as callbacks: what trains when, with Trainers and hand-written loops."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from open_clip.transformer import VisionTransformer as ClipTower
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from cl_plugins import Task, fit_stream
from cl_plugins.callbacks.one_prompt import OnePrompt
from cl_plugins.callbacks.ovor import OVOR
from cl_plugins.outliers import VirtualOutliers
from tests._helpers import PlainModule, StopAt, quiet_trainer, tiny_stream, tiny_vit

SMALL = {"neighbors": 5, "n_boundary": 6, "draws": 30, "per_class": 10, "batch_size": 8}
LENGTHS = {0: 4, 1: 6}


def ovor(**options) -> OVOR:
    return OVOR(SMALL, **{"lengths": LENGTHS, "head_epochs": 1, **options})


class Recorder(pl.Callback):
    """Copies prompts and classifier at the end of each epoch, before validation, and after each task."""

    def __init__(self, method: OnePrompt) -> None:
        self.method = method
        self.epochs: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        prompts = torch.cat([p.detach().flatten() for p in self.method.prompt(pl_module).parameters()])
        self.epochs.append((trainer.current_epoch, prompts.clone(), pl_module.model.head.weight.detach().clone()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_phase_trains_its_own_part(accumulate: int) -> None:
    pl.seed_everything(0, verbose=False)
    module, method = PlainModule(weight_decay=0.2), ovor(head_epochs=2)
    backbone = copy.deepcopy({k: v for k, v in module.model.state_dict().items() if not k.startswith("head.")})
    start = module.model.head.weight.detach().clone()
    record, stream = Recorder(method), tiny_stream()
    trainer = quiet_trainer(max_epochs=4, callbacks=[method, record], accumulate_grad_batches=accumulate)
    fit_stream(trainer, module, stream)
    assert [epoch for epoch, *_ in record.epochs] == [0, 1, 2, 3] * 3
    previous = (None, start)
    for index, (epoch, prompts, weight) in enumerate(record.epochs):
        classes = list(stream.tasks[index // 4].classes)
        others = sorted(set(range(6)) - set(classes))
        assert torch.equal(weight[others], previous[1][others])  # whatever weight decay says
        assert not (weight[classes] == previous[1][classes]).all(1).any()
        if previous[0] is not None:
            assert torch.equal(prompts, previous[0]) == (epoch >= 2)
        previous = prompts, weight
    for name, value in backbone.items():
        assert torch.equal(module.model.state_dict()[name], value), name
    assert all(p.grad is None for n, p in module.model.named_parameters() if not n.startswith("head."))
    assert not method.prompt(module).frozen


def test_trainer_and_hand_written_loop_agree() -> None:
    stream, task = tiny_stream(), 1
    modules = [PlainModule(tiny_vit(seed=4)) for _ in range(2)]
    methods = [ovor() for _ in range(2)]

    class Fixed(pl.LightningDataModule):
        tasks = stream.tasks
        task = 1

        def train_dataloader(self):
            return stream.train_loader_for_features(task)

    trainer = quiet_trainer(max_epochs=3, callbacks=[methods[0]])
    trainer.fit(modules[0], datamodule=Fixed())

    module, method = modules[1], methods[1]
    method.install(module)
    method.start_task(module, stream.tasks[task])
    optimizer, loader = module.configure_optimizers(), stream.train_loader_for_features(task)
    module.train()
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(module(x), y).backward()
            optimizer.step()
    means = method.head_phase(module, loader, optimizer, stream.tasks[task], epoch=2)
    assert means is not None
    for name, value in modules[0].state_dict().items():
        torch.testing.assert_close(value, module.state_dict()[name], atol=1e-5, rtol=1e-5, msg=name)
    events = {e["name"]: e for e in methods[0].report_events(modules[0])}
    assert set(events) == {f"ovor/{k}" for k in ("loss", "id_energy", "ood_energy", "id_active", "ood_active")}
    assert events["ovor/loss"]["task"] == task
    assert events["ovor/loss"]["x"] == [2]
    assert events["ovor/loss"]["value"] == pytest.approx([means.loss.item()], abs=1e-5)
    assert events["ovor/id_active"]["value"] == [1.0]


class Scheduled(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, float, bool]] = []

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        optimizer.register_step_pre_hook(self.note)
        return [optimizer], [StepLR(optimizer, 1, gamma=0.1)]

    def note(self, optimizer, *_) -> None:
        if self.model.head.weight.grad is not None:
            alone = all(p.grad is None for n, p in self.named_parameters() if "head" not in n)
            self.steps.append((self.current_epoch, optimizer.param_groups[0]["lr"], alone))


def test_head_epoch_uses_its_own_learning_rate() -> None:
    module, stream = Scheduled(), tiny_stream()
    trainer = quiet_trainer(max_epochs=4, callbacks=[ovor(head_epochs=2)])
    stream.task = 0
    trainer.fit(module, datamodule=stream)
    n_steps = len(stream.train_dataloader())
    assert [alone for *_, alone in module.steps] == [False] * 2 * n_steps + [True] * 2 * n_steps
    for epoch, rate, _ in module.steps:
        assert rate == pytest.approx(0.01 * 0.1**epoch)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.1**4)


def test_features_once_makes_all_passes_in_one_epoch() -> None:
    module, stream = Scheduled(), tiny_stream()
    method = ovor(head_epochs=3, refresh_features=False)
    trainer = quiet_trainer(max_epochs=5, callbacks=[method])
    stream.task = 0
    trainer.fit(module, datamodule=stream)
    assert sum(alone for *_, alone in module.steps) == 3 * len(stream.train_dataloader())
    assert {epoch for epoch, _, alone in module.steps if alone} == {2}
    assert trainer.current_epoch == 3
    losses = next(e for e in method.report_events(module) if e["name"] == "ovor/loss")
    assert losses["x"] == [2, 3, 4]
    assert len(set(losses["value"])) == 3


def test_default_is_a_fifth_of_the_epochs() -> None:
    for epochs, head_epochs in ((2, 1), (5, 1), (20, 4), (50, 10)):
        method = OVOR(SMALL, lengths=LENGTHS)
        trainer = quiet_trainer(max_epochs=epochs, limit_train_batches=1, callbacks=[method])
        stream = tiny_stream()
        stream.task = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PlainModule, "on_train_start", lambda self: setattr(self.trainer, "should_stop", True))
            trainer.fit(PlainModule(), datamodule=stream)
        assert method._first_head_epoch == epochs - head_epochs


@pytest.mark.parametrize("step", [6, 10, 12, 30])
def test_resume_inside_a_head_epoch_is_exact(tmp_path: Path, step: int) -> None:
    def run(callbacks, ckpt_path=None):
        pl.seed_everything(5, verbose=False)
        module, method = PlainModule(weight_decay=0.1), ovor()
        save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, save_last=True)
        trainer = quiet_trainer(max_epochs=3, callbacks=[method, *callbacks, save], enable_checkpointing=True)
        return module, method, fit_stream(trainer, module, tiny_stream(), ckpt_path)

    whole, first, expected = run([])
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    with pytest.raises(RuntimeError, match="power failure"):
        run([StopAt(step)])
    resumed, second, result = run([], "last")
    assert torch.equal(result.correct, expected.correct)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert first.report_events(whole) == second.report_events(resumed)


def test_features_once_and_a_resume_behind_their_epoch(tmp_path: Path) -> None:
    """A checkpoint of the epoch that made all passes: training was over, though nobody had said so yet."""

    class Stop(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            raise RuntimeError("power failure")

    def run(callbacks, ckpt_path=None):
        pl.seed_everything(5, verbose=False)
        module, method = PlainModule(), ovor(head_epochs=3, refresh_features=False)
        save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
        trainer = quiet_trainer(max_epochs=5, callbacks=[method, save, *callbacks], enable_checkpointing=True)
        return module, method, fit_stream(trainer, module, tiny_stream(n_tasks=2), ckpt_path)

    whole, first, expected = run([])
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    with pytest.raises(RuntimeError, match="power failure"):
        run([Stop()])
    resumed, second, result = run([], "last")
    assert torch.equal(result.correct, expected.correct)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert first.report_events(whole) == second.report_events(resumed)


def test_a_callback_reports_its_last_run_alone() -> None:
    method = ovor()
    reports = []
    for _ in range(2):
        module = PlainModule()
        fit_stream(quiet_trainer(max_epochs=2, callbacks=[method]), module, tiny_stream())
        reports.append([e["x"] for e in method.report_events(module)])
    assert reports[0] == reports[1]


def test_one_forward_pass_per_image() -> None:
    vit, method = tiny_vit(), OnePrompt(LENGTHS)
    method.install(vit)
    method.start_task(vit, Task(0, (0, 1)))
    calls: list[int] = []
    vit.patch_embed.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    for mode in (True, False):
        vit.train(mode)
        vit(torch.zeros(5, 3, 8, 8))
    assert calls == [5, 5]


def test_backbone_stays_in_evaluation_mode_also_when_it_is_the_module() -> None:
    vit, method = tiny_vit(), OnePrompt(LENGTHS)
    method.install(vit)
    method.start_task(vit, Task(0, (0, 1)))
    method.start_task(vit, Task(1, (2, 3)))
    vit.train()
    hidden = [(vit(torch.zeros(1, 3, 8, 8)) == -1e4)[0].tolist()]
    assert not vit.blocks[0].training
    vit.eval()
    hidden.append((vit(torch.zeros(1, 3, 8, 8)) == -1e4)[0].tolist())
    assert hidden == [[True, True, False, False, True, True], [False] * 4 + [True] * 2]


def test_install_twice_copies_and_strict_state_dict() -> None:
    module, method = PlainModule(), ovor()
    keys = set(module.state_dict())
    method.install(module)
    count = len(list(module.modules()))
    method.install(module)
    assert len(list(module.modules())) == count
    assert keys < set(module.state_dict())
    other = copy.deepcopy(module)
    fresh = PlainModule(tiny_vit(seed=9))
    ovor(seed=3).install(fresh)
    fresh.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(2, 3, 8, 8)
    method.start_task(other, Task(0, (0, 1)))
    with torch.no_grad():
        method.prompt(other).slot(0).prompt.zero_()
    assert torch.equal(module(x), fresh(x))
    assert not torch.equal(module(x), other(x))
    other.train()
    method._tap(other).on = True
    other(x)
    assert method._tap(other).take().shape == (2, 16)


def test_prompt_start_depends_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    values = []
    for seed in (0, 0, 1):
        module = PlainModule()
        method = OnePrompt(LENGTHS, seed=seed)
        method.install(module)
        values.append(method.prompt(module).slot(0).prompt.detach())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


class WithClip(PlainModule):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.visual = ClipTower(image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp_ratio=2, output_dim=16)
        self.classifier = nn.Linear(16, 6)

    def forward(self, x):
        return self.classifier(self.visual(x))


def test_open_clip_backbone_and_bfloat16() -> None:
    pl.seed_everything(1, verbose=False)
    module, method = WithClip(), ovor()
    before = module.visual.transformer.resblocks[0].attn.in_proj_weight.detach().clone()
    trainer = quiet_trainer(max_epochs=3, callbacks=[method], precision="bf16-mixed")
    result = fit_stream(trainer, module, tiny_stream())
    assert torch.equal(module.visual.transformer.resblocks[0].attn.in_proj_weight, before)
    assert result.average_accuracy >= 0
    assert all(math.isfinite(v) for e in method.report_events(module) for v in e["value"])
    assert len(method.report_events(module)) == 3 * 5


class DictModule(PlainModule):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch["image"]), batch["class"])


class DictOVOR(OVOR):
    def targets(self, batch):
        return batch["class"]


def fit_batches(module: pl.LightningModule, method: OVOR, batches: list) -> None:
    trainer = quiet_trainer(callbacks=[method])
    method.on_task_start(trainer, module, Task(0, (0, 1)))
    trainer.fit(module, DataLoader(batches, batch_size=None))


def test_other_batches_through_targets() -> None:
    batches = [{"image": torch.randn(4, 3, 8, 8), "class": torch.tensor([0, 1, 1, 0])} for _ in range(3)]
    method = DictOVOR(SMALL, lengths=LENGTHS)
    module = DictModule()
    fit_batches(module, method, batches)
    assert len(method.report_events(module)) == 5


class TwoViews(PlainModule):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x), y) + cross_entropy(self(x.flip(-1)), y)


def test_faults_of_the_training_step_are_named() -> None:
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])
    with pytest.raises(RuntimeError, match="one feature per label, got 8 features for 4 labels"):
        fit_batches(TwoViews(), ovor(), [(x, y)])
    with pytest.raises(ValueError, match=r"labels must be classes of the task, \(0, 1\), got \[5\]"):
        fit_batches(PlainModule(), ovor(), [(x, y), (x, torch.tensor([0, 5, 1, 1]))])


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="`head_epochs` must be 1 or more, got 0; for none use OnePrompt"):
        OVOR(head_epochs=0)
    with pytest.raises(ValueError, match="must be even"):
        OnePrompt({0: 3})
    with pytest.raises(TypeError, match="unexpected keyword argument 'cov'"):
        OVOR({"cov": 1.0})
    with pytest.raises(RuntimeError, match="`install` must come first"):
        OnePrompt().prompt(PlainModule())
    with pytest.raises(ValueError, match="`head_epochs` must leave an epoch for the prompt, got 2 of 2"):
        fit_batches(PlainModule(), ovor(head_epochs=2), [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))])
    assert OVOR(VirtualOutliers(draws=7)).outliers.draws == 7


def test_warnings() -> None:
    method, vit = ovor(), tiny_vit()
    method.install(vit)
    with pytest.warns(UserWarning, match="task 2 has one class: its cross-entropy is always 0"):
        method.start_task(vit, Task(2, (4,)))
    with pytest.warns(UserWarning, match="task 2 ended without a head epoch"):
        method.end_task(vit, Task(2, (4,)))
    means = method.head_phase(
        vit, [(torch.randn(9, 3, 8, 8), torch.full((9,), 4))], torch.optim.Adam(vit.parameters()), Task(2, (4,))
    )
    assert means is not None
    assert means.loss.isfinite()
