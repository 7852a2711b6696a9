"""OVOR's head epochs over a feature cache: the numbers of training on images, and a backbone that rests meanwhile."""

from __future__ import annotations

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
from cl_plugins.callbacks import OVOR, BalancedEMA, CacheFeatures, ContinualEvaluation, NearestMean, RanPAC
from cl_plugins.feature_cache import FeatureCache
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


def run(*extra, method=None, module=None, ckpt_path=None, saving=(), stream=None, method_first=False):
    pl.seed_everything(5, verbose=False)
    module = module or Counting()
    method = method or ovor()
    stream = stream or tiny_stream()
    callbacks = [method, *extra, *saving] if method_first else [*extra, method, *saving]
    trainer = quiet_trainer(max_epochs=EPOCHS, callbacks=callbacks, enable_checkpointing=bool(saving))
    return module, method, fit_stream(trainer, module, stream, ckpt_path), stream


def same(module, other, atol=1e-5) -> None:
    expected = other.state_dict()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("method_first", [False, True])
def test_cached_head_epochs_equal_those_on_images(tmp_path: Path, folder: bool, method_first: bool) -> None:
    plain, expected_method, expected, _ = run()
    cache = CacheFeatures(tmp_path if folder else None, progress=False)
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
    assert list(tmp_path.iterdir()) == []  # nothing will read features of these prompts again


def test_without_the_stream_runner_the_prompt_trains_all_the_same() -> None:
    modules = [Counting(), Counting()]
    for module, extra in zip(modules, ([], [CacheFeatures(progress=False)]), strict=True):
        pl.seed_everything(5, verbose=False)
        stream = tiny_stream()
        stream.task = 0
        quiet_trainer(max_epochs=EPOCHS, callbacks=[ovor(), *extra], limit_val_batches=0).fit(module, datamodule=stream)
    assert not torch.equal(modules[1].prompts[0], modules[1].prompts[1])
    assert torch.equal(modules[0].prompts[-1], modules[1].prompts[-1])


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("step", [6, 9, 14, 18, STEPS + 13])
def test_resume_is_exact_in_every_phase(tmp_path: Path, step: int, folder: bool) -> None:
    """Steps 6: prompt; 9: the first head epoch, whose features are being collected; 14 and 18: the next ones."""

    def go(name, callbacks, ckpt_path=None, seed=0):
        cache = CacheFeatures(tmp_path / name if folder else None, progress=False)
        save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=1, save_last=True)
        return run(cache, saving=[*callbacks, save], ckpt_path=ckpt_path, module=Counting(seed))

    whole, first, expected, _ = go("whole", [])
    for path in (tmp_path / "saved").glob("*.ckpt"):
        path.unlink()
    with pytest.raises(RuntimeError, match="power failure"):
        go("cache", [StopAt(step)])
    head_epoch = step % STEPS > 4 * (EPOCHS - HEAD_EPOCHS)
    assert len(list((tmp_path / "cache").glob("*.json"))) == (head_epoch and folder)
    resumed, second, result, _ = go("cache", [], "last", seed=1)
    assert torch.equal(result.correct, expected.correct)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert first.report_events(whole) == second.report_events(resumed)
    if folder:
        assert list((tmp_path / "cache").iterdir()) == []


def test_runs_of_other_seeds_share_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power failure"):
        run(CacheFeatures(tmp_path, progress=False), saving=[StopAt(STEPS - 1)])
    left = sorted(p.name for p in tmp_path.iterdir())
    assert len(left) == 2
    other = run(CacheFeatures(tmp_path, progress=False), method=ovor(seed=1))[0]  # another prompt
    same(other, run(method=ovor(seed=1))[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == left


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
    for views in (1, HEAD_EPOCHS):
        module, *_ = run(CacheFeatures(views=views, progress=False), stream=tiny_stream(train_transform=noisy))
        images[views] = module.images
    assert images[HEAD_EPOCHS] - images[1] == 3 * 32 * (HEAD_EPOCHS - 1)


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
        PhasedLoader(plain, lambda: plain, lambda: True)


def test_an_epoch_decides_at_its_first_batch() -> None:
    images, head = tiny_stream().train_dataloader(), []
    rows = tiny_stream().train_loader_for_features(0)
    loader = PhasedLoader(images, lambda: rows, lambda: bool(head))
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
    with pytest.raises(OSError, match="No space left"):
        run(CacheFeatures(tmp_path, progress=False))
    assert list(tmp_path.iterdir()) == []
    assert FeatureCache(tmp_path).folder == tmp_path


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


cache, processes, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
settings = {"neighbors": 5, "n_boundary": 6, "draws": 30, "per_class": 10, "batch_size": 8}
strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False) if processes == 2 else "auto"
cached = CacheFeatures(None if cache == "memory" else out / "cache", progress=False)
filled, fill = [], cached.cache.fill
cached.cache.fill = lambda key, *args, **kwargs: filled.append(key.name) or fill(key, *args, **kwargs)
callbacks = [OVOR(settings, lengths={0: 4, 1: 6}, head_epochs=2), cached]
trainer = quiet_trainer(
    max_epochs=4, callbacks=callbacks, devices=processes, strategy=strategy, precision="64-true"
)
module = Plain(tiny_vit()).double()
stream = tiny_stream(n_per_class=8, batch_size=8 // processes, n_tasks=2)
result = fit_stream(trainer, module, stream, seed=1)
state = {k: v.cpu() for k, v in module.state_dict().items()}
torch.save({"state": state, "correct": result.correct, "filled": torch.tensor(len(filled))},
           out / f"{processes}-rank{trainer.global_rank}.pt")
"""


@pytest.mark.ddp
@pytest.mark.parametrize("cache", ["folder", pytest.param("memory", marks=pytest.mark.slow)])
def test_two_processes_equal_one_with_the_same_batch(tmp_path: Path, cache: str) -> None:
    runs = {}
    for processes in (2, 1):
        run_script(SCRIPT, tmp_path, cache, processes, tmp_path)
        files = [tmp_path / f"{processes}-rank{r}.pt" for r in range(processes)]
        runs[processes] = [torch.load(f, weights_only=True) for f in files]
    (alone,), (first, second) = runs[1], runs[2]
    assert (int(first["filled"]), int(second["filled"])) == ((2, 0) if cache == "folder" else (2, 2))
    for key, value in alone["state"].items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        assert torch.allclose(first["state"][key], value, rtol=1e-7, atol=1e-9), key
    assert torch.equal(first["correct"], alone["correct"])
