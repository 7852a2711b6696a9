"""Registered streams, glyph images, and streams inside both Lightning packages."""

import importlib
import json

import numpy as np
import pytest
import pytorch_lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset, default_collate

from cl_plugins.scenarios import ClassIncremental, build_scenario, data_names, scenario_info, scenario_names
from cl_plugins.scenarios.glyph_data import GlyphSource, load_glyphs
from cl_plugins.scenarios.glyphs import SPLIT_FACES, glyph_name, pretraining_classes, stream_classes
from cl_plugins.task import Stream
from tests._helpers import image_data, tiny_stream

PACKAGES = ["pytorch_lightning", "lightning.pytorch"]


def module_class(package):
    lightning = pytest.importorskip(package)

    class Recorder(lightning.LightningModule):
        """Keeps the batches it was given."""

        def __init__(self, stop_after=None):
            super().__init__()
            self.layer = torch.nn.Linear(192, 6)
            self.seen = {"train": [], "val": [], "test": []}
            self.stop_after = stop_after

        def _note(self, part, batch):
            self.seen[part].append((batch[0].sum().item(), batch[1].tolist()))

        def training_step(self, batch, batch_idx):
            self._note("train", batch)
            if self.stop_after is not None and len(self.seen["train"]) > self.stop_after:
                raise ZeroDivisionError
            return cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

        def validation_step(self, batch, batch_idx):
            self._note("val", batch)

        def test_step(self, batch, batch_idx, dataloader_idx=0):
            self._note("test", batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    return Recorder


def trainer_of(package, **options):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return importlib.import_module(package).Trainer(**{**defaults, **options})


def noisy(x):
    return x + torch.rand_like(x)


def recording_stream(**options):
    return tiny_stream(n_tasks=2, validation_fraction=0.25, train_transform=noisy, **options)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_trainer_takes_the_stream_as_its_datamodule(package):
    stream = recording_stream()
    stream.task = 1
    module, trainer = module_class(package)(), trainer_of(package, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=stream)
    by_hand, expected = stream.train_dataloader(), []
    for epoch in range(2):
        by_hand.sampler.set_epoch(epoch)
        expected += [(x.sum().item(), y.tolist()) for x, y in by_hand]
    assert module.seen["train"] == expected
    assert module.seen["val"] == [(x.sum().item(), y.tolist()) for x, y in stream.val_dataloader()] * 2
    trainer.test(module, datamodule=stream, verbose=False)
    assert [len(y) for _, y in module.seen["test"]] == [7, 7, 1] * 2


@pytest.mark.parametrize("package", PACKAGES)
def test_a_stream_without_validation_data_trains(package):
    module = module_class(package)()
    trainer_of(package, max_epochs=1).fit(module, datamodule=tiny_stream(2))
    assert len(module.seen["train"]) == 6
    assert module.seen["val"] == []


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("options", [{"every_n_train_steps": 1}, {"every_n_epochs": 1}])
def test_training_goes_on_bit_for_bit_from_every_checkpoint(package, options, tmp_path):
    recorder = module_class(package)
    keep = importlib.import_module(package).callbacks.ModelCheckpoint(
        dirpath=tmp_path, save_top_k=-1, filename="{step}", **options
    )

    def fit(**more):
        module = recorder()
        stream = recording_stream()
        stream.task = 1
        ckpt_path = more.pop("ckpt_path", None)
        trainer_of(package, max_epochs=3, **more).fit(module, datamodule=stream, ckpt_path=ckpt_path)
        return module.seen["train"]

    straight = fit(callbacks=[keep], enable_checkpointing=True)
    assert len(straight) == 15
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == (15 if "every_n_train_steps" in options else 3)
    for path in files[:: 1 if package == PACKAGES[0] else 4]:
        step = torch.load(path, weights_only=True)["global_step"]
        assert fit(ckpt_path=path) == straight[step:]


def test_a_checkpoint_of_another_stream_is_refused(tmp_path):
    stream = recording_stream()
    trainer = trainer_of(PACKAGES[0], max_epochs=1)
    recorder = module_class(PACKAGES[0])
    trainer.fit(recorder(), datamodule=stream)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = recording_stream(order_seed=1)
    with pytest.raises(
        ValueError, match=r"must belong to this stream, got one whose classes differ.*same scenario, class"
    ):
        trainer_of(PACKAGES[0]).fit(recorder(), datamodule=other, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="got one whose sizes differ"):
        tiny_stream(2).load_state_dict({**recording_stream().state_dict(), "seeds": tiny_stream(2).seeds})


def test_state_keeps_the_task():
    stream, again = tiny_stream(), tiny_stream()
    stream.task = 2
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert again.task == 2


@pytest.mark.parametrize("index", [-1, 3, 1.0, True, "1"])
def test_a_task_that_is_not_there_is_refused(index):
    with pytest.raises(ValueError, match="`task` must be an integer from 0 to 2, got "):
        tiny_stream().task = index


def test_overfitting_on_a_batch_works_with_the_stream():
    module = module_class(PACKAGES[0])()
    with pytest.warns(UserWarning, match="requested to overfit"):
        trainer_of(PACKAGES[0], overfit_batches=1).fit(module, datamodule=recording_stream())
    assert len(module.seen["train"]) == 2
    assert module.seen["train"][0][1] == module.seen["train"][1][1]


def test_features_are_read_in_a_fixed_order_without_augmentation():
    stream = recording_stream(drop_last=True)
    first, second = ([x for x, _ in stream.train_loader_for_features(0)] for _ in range(2))
    assert torch.equal(torch.cat(first), torch.cat(second))
    source = image_data(16).tensors[0]
    assert torch.equal(torch.cat(first), source[stream.train.of(0)])


def test_a_small_task_is_not_dropped_whole():
    stream = ClassIncremental((image_data(3), image_data(2)), n_tasks=6, batch_size=8, drop_last=True)
    assert len(list(stream.train_dataloader())) == 1
    assert len(tiny_stream(2, drop_last=True, batch_size=9).train_dataloader()) == 5


def test_a_custom_collate_gets_samples():
    stream = build_scenario("split-digits", batch_size=4, collate_fn=len)
    assert list(stream.train_dataloader())[:2] == [4, 4]


def test_ten_names_are_known_with_their_needs():
    assert {"split-digits", "split-glyphs-100", "split-glyphs-1000", "split-cifar100"} <= set(scenario_names())
    assert {"digits", "glyphs-100", "cifar100", "imagenet-r", "cub200"} <= set(data_names())
    for name in scenario_names():
        info = scenario_info(name)
        assert info.description
        assert info.sizes
    assert scenario_info("split-glyphs-100").needs == ""
    assert "download=True" in scenario_info("split-cifar100").needs


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(
        ValueError, match="`name` must be a known scenario, got 'split-digit'; did you mean 'split-digits'"
    ):
        build_scenario("split-digit")
    with pytest.raises(ValueError, match="`data` must be a known data set, got 'glyph-100'; did you mean 'glyphs-100'"):
        ClassIncremental("glyph-100")


def test_split_digits():
    stream = build_scenario("split-digits", batch_size=1000)
    assert isinstance(stream, Stream)
    assert [t.classes for t in stream.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert stream.tasks[2].class_names == ("four", "five")
    images, labels = next(iter(stream.train_dataloader()))
    assert images.shape[1:] == (3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert labels.dtype == torch.int64
    sizes = stream.provenance()["sizes"]
    assert (sum(sizes["train"]), sum(sizes["validation"]), sum(sizes["test"])) == (1433, 0, 364)
    json.dumps(stream.provenance())


def test_split_glyphs_100():
    stream = build_scenario("split-glyphs-100")
    assert stream.provenance()["sizes"] == {"train": [600] * 10, "validation": [100] * 10, "test": [200] * 10}
    assert stream.tasks[0].class_names == tuple(glyph_name(c) for c in stream_classes(10))
    stream.task = 4
    images, labels = next(iter(stream.train_dataloader()))
    assert images.shape == (32, 3, 32, 32)
    assert set(labels.tolist()) <= set(range(40, 50))
    assert not set(stream_classes()) & set(pretraining_classes())


def test_split_glyphs_1000_is_built_without_rendering():
    stream = build_scenario("split-glyphs-1000")
    assert len(stream.tasks) == 100
    assert {len(t.classes) for t in stream.tasks} == {10}
    assert sum(stream.provenance()["sizes"]["train"]) == 20_000


def test_a_glyph_image_is_a_function_of_split_class_number_and_seed():
    source = GlyphSource(stream_classes(6), "train", 5)
    every = np.arange(30)
    together = source.read_batch(every)
    alone = torch.cat([GlyphSource(stream_classes(6), "train", 5).read_batch(every[i : i + 1]) for i in (29, 3, 7)])
    assert torch.equal(together[[29, 3, 7]], alone)
    more = GlyphSource(stream_classes(8), "train", 9)  # further classes and images change nothing
    assert torch.equal(more.read_batch(np.array([9 * 2 + 4])), together[[14]])
    assert not torch.equal(GlyphSource(stream_classes(6), "train", 5, seed=1).read_batch(every[:1]), together[:1])
    assert not torch.equal(GlyphSource(stream_classes(6), "test", 5).read_batch(every[:1]), together[:1])
    assert len({image.numpy().tobytes() for image in together}) == 30
    assert torch.equal(source[3][0], together[3])
    assert source[14][1] == 2


def test_no_font_is_in_two_splits():
    faces = [f for split in SPLIT_FACES.values() for f in split]
    assert len(faces) == len(set(faces)) == 16


@pytest.mark.parametrize(
    ("options", "text"),
    [({"split": "dev"}, "`split` must be one of"), ({"per_class": 0}, "`per_class` must be 1 or more, got 0")],
)
def test_faulty_glyph_arguments_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        GlyphSource(stream_classes(2), **{"split": "train", "per_class": 1, **options})
    assert load_glyphs(3, 1, 0, 1).validation is None


def test_a_stream_survives_worker_processes():
    stream = build_scenario("split-glyphs-100", num_workers=1, batch_size=100)
    plain = build_scenario("split-glyphs-100", batch_size=100)
    for (x, y), (a, b) in zip(stream.train_dataloader(), plain.train_dataloader(), strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", PACKAGES)
def test_a_command_line_config_builds_the_stream(package, tmp_path):
    cli = pytest.importorskip(f"{package}.cli")
    recorder = module_class(package)
    config = {
        "class_path": "cl_plugins.scenarios.ClassIncremental",
        "init_args": {"data": "split-digits", "n_tasks": 2, "batch_size": 16, "data_seed": 3},
    }
    built = cli.LightningCLI(
        recorder,
        importlib.import_module(package).LightningDataModule,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        args={"data": config, "trainer": {"logger": False, "accelerator": "cpu"}},
    )
    assert [len(t.classes) for t in built.datamodule.tasks] == [5, 5]
    assert built.datamodule.batch_size == 16
    assert built.datamodule.data_seed == 3


def test_both_packages_are_served_by_one_class():
    assert issubclass(ClassIncremental, pytorch_lightning.LightningDataModule)
    lightning = pytest.importorskip("lightning.pytorch")
    assert issubclass(ClassIncremental, lightning.LightningDataModule)


def test_batches_of_a_tensor_data_set_are_its_samples_one_by_one():
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(40, 3, generator=draw), torch.arange(40) % 4
    extra = torch.arange(40.0)
    for tensors in ((images, labels), (images, labels, extra)):
        stream = ClassIncremental(TensorDataset(*tensors), test=TensorDataset(*tensors), n_tasks=2, batch_size=7)
        before = torch.get_rng_state()
        for loader in (stream.train_loader_for_features(1), stream.test_loader(1)):
            view, seen = loader.dataset, []
            for batch in loader:
                assert isinstance(batch, list)
                seen.append(batch)
            at = view.indices
            joined = [torch.cat(part) for part in zip(*seen, strict=True)]
            order = joined[0][:, 0].argsort()
            wanted = default_collate([view[k] for k in range(len(view))])
            assert [part.dtype for part in joined] == [part.dtype for part in wanted]
            for mine, own in zip(joined, wanted, strict=True):
                assert torch.equal(mine[order], own[wanted[0][:, 0].argsort()])
            assert torch.equal(wanted[0], images[torch.from_numpy(at)])
            whole = view.__getitems__([len(view) + 1, 0])  # a number counts epochs, too
            assert torch.equal(view.collate(whole)[0], images[torch.from_numpy(at[[1, 0]])])
        assert torch.equal(torch.get_rng_state(), before)
