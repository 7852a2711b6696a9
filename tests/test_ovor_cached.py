"""OVOR's head epochs over a feature cache: the numbers of training on images, and a backbone that rests meanwhile."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from cl_plugins import fit_stream
from cl_plugins.cached_rows import PhasedLoader, uncached
from cl_plugins.callbacks import (
    OVOR,
    BalancedEMA,
    CacheFeatures,
    ContinualEvaluation,
    FrozenBackbone,
    NearestMean,
    RanPAC,
)
from tests._helpers import PlainModule, StopAt, quiet_trainer, run_script, tiny_stream, tiny_vit

SMALL = {"neighbors": 5, "n_boundary": 6, "draws": 30, "per_class": 10, "batch_size": 8}
EPOCHS, HEAD_EPOCHS = 5, 3
STEPS = 4 * EPOCHS  # of a task: 32 samples in batches of 8
CHECK = 8  # the first batch of a split is run once more with gradients on, to see that none arrive


def ovor(**options) -> OVOR:
    return OVOR(SMALL, **{"lengths": {0: 4, 1: 6}, "head_epochs": HEAD_EPOCHS, **options})


class Counting(PlainModule):
    """Counts images that pass the first block and notes the prompt after each epoch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(tiny_vit(seed=seed), weight_decay=0.1)
        self.images, self.prompts = 0, []
        self.model.blocks[0].register_forward_hook(self._count)

    def _count(self, block, args, output) -> None:
        self.images += len(output)

    def on_train_epoch_end(self) -> None:
        self.prompts.append(torch.cat([p.detach().flatten() for p in self.plugins["one_prompt"].parameters()]))


def run(*extra, method=None, module=None, ckpt_path=None, saving=(), stream=None, method_first=False, trainer=None):
    pl.seed_everything(5, verbose=False)
    module = module or Counting()
    method = method or ovor()
    stream = stream or tiny_stream()
    callbacks = [method, *extra, *saving] if method_first else [*extra, method, *saving]
    options = {"max_epochs": EPOCHS, "enable_checkpointing": bool(saving), **(trainer or {})}
    trainer = quiet_trainer(callbacks=callbacks, **options)
    return module, method, fit_stream(trainer, module, stream, ckpt_path), stream


def same(module, other, atol=1e-5) -> None:
    expected = other.state_dict()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("budget", [0, 1 << 30])
@pytest.mark.parametrize("method_first", [False, True])
def test_cached_head_epochs_equal_those_on_images(tmp_path: Path, budget: int, method_first: bool) -> None:
    plain, expected_method, expected, _ = run()
    cache = CacheFeatures(tmp_path, byte_budget=budget, keep_training_data=True, progress=False)
    module, method, result, stream = run(cache, method_first=method_first)
    assert result.correct.tolist() == expected.correct.tolist()
    same(module, plain)
    for event, other in zip(method.report_events(module), expected_method.report_events(plain), strict=True):
        assert event["value"] == pytest.approx(other["value"], abs=1e-4)
    saved = 3 * (32 * (HEAD_EPOCHS - 1) - CHECK)  # one pass fills the cache
    assert plain.images - module.images == saved
    for task in range(3):
        prompts = module.prompts[task * EPOCHS : (task + 1) * EPOCHS]
        changes = [not torch.equal(a, b) for a, b in pairwise(prompts)]
        assert changes == [True] * (EPOCHS - HEAD_EPOCHS - 1) + [False] * HEAD_EPOCHS
    assert "train_dataloader" not in vars(stream)
    assert module.plugins["taps"].reader is None
    assert list(tmp_path.iterdir()) == []  # the features are those of one task and run


def test_without_the_stream_runner_the_prompt_trains_all_the_same() -> None:
    modules = [Counting(), Counting()]
    for module, extra in zip(modules, ([], [CacheFeatures(progress=False)]), strict=True):
        pl.seed_everything(5, verbose=False)
        stream = tiny_stream()
        stream.task = 0
        trainer = quiet_trainer(max_epochs=EPOCHS, callbacks=[ovor(), *extra], limit_val_batches=0)
        with pytest.warns(UserWarning, match="CacheFeatures does nothing") if extra else nullcontext():
            trainer.fit(module, datamodule=stream)
    assert not torch.equal(modules[1].prompts[0], modules[1].prompts[1])
    assert torch.equal(modules[0].prompts[-1], modules[1].prompts[-1])


@pytest.mark.parametrize("budget", [pytest.param(0, marks=pytest.mark.slow), 1 << 30])
@pytest.mark.parametrize("step", [6, 9, 14, 18, STEPS + 13])
def test_resume_is_exact_in_every_phase(tmp_path: Path, step: int, budget: int) -> None:
    """Steps 6: prompt; 9: the first head epoch, whose features are being collected; 14 and 18: the next ones."""

    def go(callbacks, ckpt_path=None, seed=0):
        cache = CacheFeatures(byte_budget=budget, progress=False)
        save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, save_last=True)
        return run(cache, saving=[*callbacks, save], ckpt_path=ckpt_path, module=Counting(seed))

    whole, first, expected, _ = go([])
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    with pytest.raises(RuntimeError, match="power failure"):
        go([StopAt(step)])
    resumed, second, result, _ = go([], "last", seed=1)
    assert torch.equal(result.correct, expected.correct)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert first.report_events(whole) == second.report_events(resumed)


def test_a_callback_serves_a_second_run_after_one_that_failed() -> None:
    cache = CacheFeatures(progress=False)
    with pytest.raises(RuntimeError, match="power failure"):
        run(cache, StopAt(STEPS - 1))
    other = run(cache, method=ovor(seed=1))[0]  # another prompt
    same(other, run(method=ovor(seed=1))[0])


def test_an_entry_of_the_same_weights_and_other_images_is_refused(tmp_path: Path) -> None:
    module, method = Counting(), ovor()
    method.install(module)
    method.prompt(module).frozen = True
    for transform in (None, lambda x: x.flip(-1)):
        cached = CacheFeatures(tmp_path, progress=False).open(module, tiny_stream(train_transform=transform))
        rows = iter(cached.phased_train_dataloader(lambda: True))
        if transform is None:
            assert next(rows)[0].dtype == torch.int64
        else:
            with pytest.raises(ValueError, match="stale: `transform`"):
                next(rows)


def test_views_are_augmentation_seeds_of_the_head_epochs() -> None:
    def noisy(x):
        return x + torch.randn(x.shape)

    images = {}
    for views in (1, 2, HEAD_EPOCHS, 10):
        module, *_ = run(CacheFeatures(views=views, progress=False), stream=tiny_stream(train_transform=noisy))
        images[views] = module.images
    assert images[2] - images[1] == 3 * 32
    assert images[10] == images[HEAD_EPOCHS] == images[1] + 3 * 32 * (HEAD_EPOCHS - 1)  # what no epoch sees is free
    plain, *_ = run(stream=tiny_stream(train_transform=noisy))
    module, *_ = run(CacheFeatures(views=EPOCHS, progress=False), stream=tiny_stream(train_transform=noisy))
    same(module, plain)


def test_others_beside_it_read_images() -> None:
    """Averages swap weights, observers test inside tasks, closed-form heads read the features of the trained prompt."""
    for extra in ([BalancedEMA("fixed", decay=0.5)], [ContinualEvaluation(3)], [NearestMean()], [RanPAC(8, depth=1)]):
        runs = []
        for cache in ([], [CacheFeatures(progress=False)]):
            runs.append(run(*cache, *extra))
        (module, _, result, _), (plain, _, expected, _) = reversed(runs)
        assert result.correct.tolist() == expected.correct.tolist()
        same(module, plain, atol=1e-3)
        assert module.images < plain.images


def test_a_hand_written_loop_reads_the_cache() -> None:
    ends = []
    for cached in (False, True):
        module, method, stream = Counting(), ovor(), tiny_stream()
        method.install(module)
        method.start_task(module, stream.tasks[0])
        optimizer = module.configure_optimizers()
        module.train()
        for x, y in stream.train_dataloader():
            optimizer.zero_grad()
            cross_entropy(module(x), y).backward()
            optimizer.step()
        cache = CacheFeatures(progress=False)
        if cached:
            with pytest.raises(RuntimeError, match="prompts, norms or other weights there still train"):
                cache.open(module, stream).test_loader(0)
        method.prompt(module).frozen = True
        stream.task = 0
        loader = cache.open(module, stream).train_dataloader() if cached else stream.train_dataloader()
        before = module.images
        for epoch in range(1, 4):
            loader.sampler.set_epoch(epoch)
            assert method.head_phase(module, loader, optimizer, stream.tasks[0], epoch) is not None
        assert module.images - before == (0 if cached else 3 * 32)
        ends.append(module.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


def test_features_that_are_collected_once_are_computed_once() -> None:
    plain, _, expected, _ = run(method=ovor(refresh_features=False))
    module, _, result, _ = run(CacheFeatures(progress=False), method=ovor(refresh_features=False))
    assert result.correct.tolist() == expected.correct.tolist()
    same(module, plain)
    assert module.images == plain.images + 3 * CHECK


def test_loaders_that_do_not_count_are_refused() -> None:
    plain = DataLoader(tiny_stream().train_dataloader().dataset, batch_size=4)
    with pytest.raises(TypeError, match=r"must count epochs and batches .* got a DataLoader with a SequentialSampler"):
        PhasedLoader(plain, lambda epoch: plain, lambda: True)
    with pytest.raises(TypeError, match=r"got a list with a NoneType; .* or leave CacheFeatures out"):
        PhasedLoader([plain], lambda epoch: plain, lambda: True)


def test_overfitting_batches_reads_images() -> None:
    ends = [run(*cache, trainer={"overfit_batches": 2})[0] for cache in ([], [CacheFeatures(progress=False)])]
    same(ends[1], ends[0])


def test_a_head_phase_that_trains_the_prompt_after_all_is_refused() -> None:
    class Moving(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with torch.no_grad():
                next(pl_module.plugins["one_prompt"].parameters()).add_(1.0)

    with pytest.raises(ValueError, match="'train-0' in memory are stale: `weights`"):
        run(CacheFeatures(progress=False), Moving())


def test_workers_end_with_the_fit() -> None:
    import multiprocessing

    class Watch(pl.Callback):
        alive = 0

        def on_train_batch_end(self, *_):
            self.alive = max(self.alive, len(multiprocessing.active_children()))

    watch, stream = Watch(), tiny_stream(n_tasks=2, num_workers=1)
    run(CacheFeatures(progress=False), watch, stream=stream)
    assert watch.alive == 1
    assert not multiprocessing.active_children()


class Normalizing(Counting):
    def forward(self, x):
        return self.model((x - x.mean((1, 2, 3), keepdim=True)) / 2)


class Turning(Counting):
    def forward(self, x):
        return self.model(x.flip(0))


class Mixing(Counting):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x.flip(0)), y)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (
            Normalizing,
            r"`Normalizing.forward`, and its transfer hooks, must hand the input .* got \w+Error",
        ),
        (Turning, r"`Turning.forward`, .* got rows \[\[1, 0\]\] for rows \[0, 1\]; put what changes images"),
    ],
)
def test_a_module_that_changes_its_input_is_told_before_anything_trains(kind, match) -> None:
    module = kind()
    with pytest.raises(RuntimeError, match=match):
        run(CacheFeatures(progress=False), module=module)
    assert module.prompts == []


@pytest.mark.parametrize("method", [None, FrozenBackbone])
def test_a_step_that_mixes_its_batch_is_told_at_the_first_rows(method) -> None:
    with pytest.raises(RuntimeError, match="must give its batch to the backbone in the batch's order"):
        run(CacheFeatures(progress=False), module=Mixing(), method=method and method())


def test_an_epoch_decides_at_its_first_batch() -> None:
    images, head = tiny_stream().train_dataloader(), []
    rows = tiny_stream().train_loader_for_features(0)
    loader = PhasedLoader(images, lambda epoch: rows, lambda: bool(head))
    assert len(loader) == len(images)
    assert loader.sampler is images.sampler
    assert uncached(loader) is images
    assert not hasattr(loader, "worker_init_fn")
    epoch = iter(loader)
    head.append(True)
    assert torch.equal(next(epoch)[0], next(iter(rows))[0])
    head.clear()
    assert not torch.equal(next(iter(loader))[0], next(iter(rows))[0])


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_plugins._cache_files import EntryFile

    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EntryFile, "write", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match="No space left"):
        run(CacheFeatures(byte_budget=0, progress=False))
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys
from pathlib import Path
import torch
from pytorch_lightning.strategies import DDPStrategy
from cl_plugins import fit_stream
from cl_plugins.callbacks import OVOR, CacheFeatures
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit


class Plain(PlainModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


processes, out = int(sys.argv[1]), Path(sys.argv[2])
settings = {"neighbors": 5, "n_boundary": 6, "draws": 30, "per_class": 10, "batch_size": 8}
strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False) if processes == 2 else "auto"
callbacks = [OVOR(settings, lengths={0: 4, 1: 6}, head_epochs=2), CacheFeatures(out / "cache", progress=False)]
trainer = quiet_trainer(
    max_epochs=4, callbacks=callbacks, devices=processes, strategy=strategy, precision="64-true"
)
module = Plain(tiny_vit()).double()
stream = tiny_stream(n_per_class=8, batch_size=8 // processes, n_tasks=2)
result = fit_stream(trainer, module, stream, seed=1)
state = {k: v.cpu() for k, v in module.state_dict().items()}
torch.save({"state": state, "correct": result.correct}, out / f"{processes}-rank{trainer.global_rank}.pt")
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_batch(tmp_path: Path) -> None:
    runs = {}
    for processes in (2, 1):
        run_script(SCRIPT, tmp_path, processes, tmp_path)
        files = [tmp_path / f"{processes}-rank{r}.pt" for r in range(processes)]
        runs[processes] = [torch.load(f, weights_only=True) for f in files]
    (alone,), (first, second) = runs[1], runs[2]
    for key, value in alone["state"].items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        assert torch.allclose(first["state"][key], value, rtol=1e-7, atol=1e-9), key
    assert torch.equal(first["correct"], alone["correct"])
