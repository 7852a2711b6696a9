"""ContinualEvaluation: the right counts at the right steps, and training that does not notice."""

from __future__ import annotations

import importlib
import json
import random
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, default_collate

from cl_plugins import Task, fit_stream
from cl_plugins.batches import to_device
from cl_plugins.callbacks import (
    OVOR,
    BalancedEMA,
    CacheFeatures,
    ContinualEvaluation,
    FrozenBackbone,
    LoRA,
    MoRA,
    StreamCheckpoint,
)
from cl_plugins.evaluation import count_task, default_predict, evaluate_tasks
from cl_plugins.inside_tasks import InsideRow
from cl_plugins.plugin import ContinualCallback
from cl_plugins.pooled_evaluation import PooledLoader, sample_counts

from ._helpers import PlainModule, quiet_trainer, run_script, tiny_stream, tiny_vit


class Noisy(PlainModule):
    """A module that draws random numbers, also in evaluation, and keeps batch statistics."""

    def __init__(self):
        super().__init__(tiny_vit())
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.model.blocks[0].eval()  # one part is in eval mode all the time

    def forward(self, x):
        noise = 0 if self.training else 1e-3 * (torch.rand(1) + np.random.rand() + random.random()).item()
        return self.drop(self.norm(self.model(x))) + noise


METHODS = {
    "plain": lambda: [],
    "ema": lambda: [BalancedEMA("fixed", decay=0.9)],
    "mora": lambda: [MoRA(rank=2, dropout=0.1)],
    "ovor": lambda: [OVOR({"neighbors": 8}, lengths={0: 2}, head_epochs=1)],
    "lora": lambda: [LoRA(rank=2)],
    "cached": lambda: [FrozenBackbone(), CacheFeatures(progress=False)],
}


def _train(callbacks, module=None, stream=None, trainer_class=pl.Trainer, ckpt_path=None, **options):
    pl.seed_everything(3, verbose=False)
    module = PlainModule() if module is None else module
    trainer = quiet_trainer(trainer_class, callbacks=callbacks, max_epochs=2, **options)
    result = fit_stream(trainer, module, tiny_stream() if stream is None else stream, ckpt_path)
    drawn = (torch.rand(2).tolist(), np.random.rand(), random.random())
    return result, {k: v.clone() for k, v in module.state_dict().items()}, drawn


@pytest.mark.parametrize("method", METHODS)
def test_training_with_it_equals_training_without_it_bit_for_bit(method):
    kind = Noisy if method in ("plain", "ema") else PlainModule
    evaluation = ContinualEvaluation(3, max_samples_per_task=4)
    with_it, weights, drawn = _train([evaluation, *METHODS[method]()], kind())
    without, expected, drawn_without = _train(METHODS[method](), kind())
    assert drawn == drawn_without
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name
    assert with_it.correct.tolist() == without.correct.tolist()
    assert len(with_it.inside_tasks) >= 8
    assert not without.inside_tasks


class Watch(ContinualCallback):
    """Evaluates for itself, with the library's own evaluation of whole tasks, whenever a row comes."""

    training = "neutral"

    def __init__(self, stream, average=None):
        super().__init__()
        self.stream, self.average, self.checked = stream, average, 0

    def on_inside_row(self, trainer, pl_module, row):
        modes = [m.training for m in pl_module.modules()]
        if self.average is not None and self.average.average.running:
            with self.average.averaged(pl_module):
                own = evaluate_tasks(pl_module, self.stream, row.task, trainer=trainer)
        else:
            own = evaluate_tasks(pl_module, self.stream, row.task, trainer=trainer)
        assert [m.training for m in pl_module.modules()] == modes
        assert row.step == trainer.global_step
        for task, correct, total, in_task in zip(row.tasks, row.correct, row.total, row.correct_in_task, strict=True):
            assert (own.correct[task], own.total[task]) == (correct, total)
            assert own.correct_in_task[task] == in_task
        assert row.tasks == tuple(range(row.task + 1))
        self.checked += 1


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_rows_are_those_of_the_evaluation_of_whole_tasks_at_that_step(package):
    lightning = importlib.import_module(package)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_vit()

        def forward(self, x):
            return self.model(x)

        def training_step(self, batch, batch_idx):
            assert self.training
            return cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    stream = tiny_stream()
    watch = Watch(stream)
    result, _, _ = _train([ContinualEvaluation(3), watch], Module(), stream, lightning.Trainer)
    rows = result.inside_tasks
    assert watch.checked == len(rows)
    # 32 samples in batches of 8, two epochs: 8 steps a task
    assert [(r.step, r.task, r.end) for r in rows] == [
        (3, 0, False), (6, 0, False), (8, 0, True), (9, 1, False), (12, 1, False), (15, 1, False), (16, 1, True),
        (18, 2, False), (21, 2, False), (24, 2, False), (24, 2, True),
    ]  # fmt: skip
    assert rows[-1].correct == rows[-2].correct  # nothing finishes a task here
    assert len({r.correct for r in rows}) > 3  # the model really moves
    assert list(rows[-1].correct) == result.correct[-1].tolist()


def test_an_average_of_the_weights_is_what_is_evaluated():
    stream, ema = tiny_stream(), BalancedEMA("fixed", decay=0.97)
    averaged, _, _ = _train([ema, ContinualEvaluation(2), Watch(stream, ema)], stream=stream)
    ema = BalancedEMA("fixed", decay=0.97, evaluate="weights")
    plain, _, _ = _train([ema, ContinualEvaluation(2), Watch(stream)], stream=tiny_stream())
    assert [r.correct for r in averaged.inside_tasks] != [r.correct for r in plain.inside_tasks]
    assert averaged.correct.tolist() == plain.correct.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fixed_part_of_the_samples(workers):
    stream = tiny_stream(num_workers=workers, pin_memory=False)
    result, _, _ = _train([ContinualEvaluation(4, [0, 2], max_samples_per_task=4)], stream=stream)
    assert {r.tasks for r in result.inside_tasks} == {(0,), (0, 2)}
    assert {n for r in result.inside_tasks for n in r.total} == {4}
    again, _, _ = _train([ContinualEvaluation(4, [0, 2], max_samples_per_task=4)], stream=tiny_stream())
    assert [r.correct for r in again.inside_tasks] == [r.correct for r in result.inside_tasks]


def test_validation_data():
    stream = tiny_stream(validation_fraction=0.25)
    result, _, _ = _train([ContinualEvaluation(4, split="validation")], stream=stream)
    sizes = stream.validation.sizes()
    assert result.inside_tasks[-1].total == tuple(sizes)
    with pytest.raises(ValueError, match="`split` must be 'test' for"):
        _train([ContinualEvaluation(4, split="validation")])


def test_old_tasks_are_drawn_anew_and_the_task_under_way_is_always_there():
    result, _, _ = _train([ContinualEvaluation(2, tasks=2)], stream=tiny_stream(n_tasks=6))
    late = [r for r in result.inside_tasks if r.task >= 3 and not r.end]
    assert all(len(r.tasks) == 3 and r.tasks[-1] == r.task and r.sampled for r in late)
    assert len({r.tasks[:2] for r in late}) > 1
    ends = [r for r in result.inside_tasks if r.end]
    assert all(r.tasks == tuple(range(r.task + 1)) and not r.sampled for r in ends)  # counted anyway
    again, _, _ = _train([ContinualEvaluation(2, tasks=2)], stream=tiny_stream(n_tasks=6))
    assert [(r.tasks, r.correct) for r in again.inside_tasks] == [(r.tasks, r.correct) for r in result.inside_tasks]
    values = result.inside.metrics()
    assert values["anytime_average_accuracy@every=2"] is not None
    assert "min_accuracy[omit]@every=2" in values


class _Stop(Exception):
    pass


class _StopAt(ContinualCallback):
    training = "neutral"

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise _Stop


def _saved(folder, *more, **options):
    saver = StreamCheckpoint(folder, every_n_steps=2)
    return _train([ContinualEvaluation(3), *more, saver], enable_checkpointing=True, **options)


@pytest.mark.parametrize("stop", [7, 13, 14, 16])
def test_a_resume_inside_a_task_has_every_row_once(tmp_path, stop):
    whole, weights, _ = _saved(tmp_path / "a")
    with pytest.raises(_Stop):
        _saved(tmp_path / "b", _StopAt(stop))
    heard = []

    class Listen(ContinualCallback):
        training = "neutral"

        def on_inside_row(self, trainer, pl_module, row):
            heard.append((row.task, row.step, row.end))

    resumed, again, _ = _saved(tmp_path / "b", Listen(), ckpt_path="last")

    def plain(rows):
        return [{**r.to_dict(), "seconds": 0} for r in rows]

    assert plain(resumed.inside_tasks) == plain(whole.inside_tasks)
    assert heard == [(r.task, r.step, r.end) for r in whole.inside_tasks]  # saved ones are told again
    assert all(torch.equal(v, again[k]) for k, v in weights.items())


def test_the_result_file_holds_the_rows_and_the_numbers(tmp_path):
    result, _, _ = _train([ContinualEvaluation(3)])
    told = json.loads(result.save(tmp_path).read_text())["inside_tasks"]
    assert told["every_n_steps"] == 3
    assert [InsideRow.from_dict(r) for r in told["rows"]] == result.inside_tasks
    assert told["rows"][-1]["average_accuracy"] == pytest.approx(result.average_accuracy)
    assert told["metrics"] == result.inside.metrics()
    assert "inside_tasks" not in _train([])[0].to_dict()


def test_the_loggers_get_a_small_fixed_set_of_keys(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    _train([ContinualEvaluation(3, tasks=2)], stream=tiny_stream(n_tasks=6), logger=logger)
    logger.save()
    keys = set((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(","))
    assert {k for k in keys if k.startswith("cl/")} == {
        f"cl/inside/{k}" for k in ("average_accuracy", "old_accuracy", "current_accuracy", "half_width")
    }


def test_a_loop_of_ones_own_needs_no_stream_start():
    evaluation, module, stream = ContinualEvaluation(4), PlainModule(), tiny_stream()
    trainer = quiet_trainer(callbacks=[evaluation], max_epochs=1)
    trainer.fit(module, datamodule=stream)
    assert [(r.step, r.tasks) for r in evaluation.rows] == [(4, (0,))]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0,), "`every_n_steps` must be a whole number of 1 or more, got 0"),
        ((5, 1), "`tasks` must be a whole number of 2 or more, or 'seen', got 1"),
        ((5, "all"), "`tasks` must be 'seen', a list"),
        ((5, [0, 0]), "`tasks` must be distinct"),
        ((5, []), "`tasks` must be 'seen', a list"),
        ((5, "seen", 0), "`max_samples_per_task` must be a whole number of 1 or more"),
        ((5, "seen", None, 0, "train"), "`split` must be 'test' or 'validation'"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        ContinualEvaluation(*arguments)


def test_tasks_that_the_stream_does_not_have_and_two_of_them_are_refused():
    with pytest.raises(ValueError, match=r"`tasks` must be below the number of tasks of .* \(3\), got 3"):
        _train([ContinualEvaluation(5, [0, 3])])
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ContinualEvaluation`"):
        _train([ContinualEvaluation(5), ContinualEvaluation(6)])


# the pooled pass


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_counts_by_sample_add_up_to_the_counts_of_a_task(seed, several):
    draw = torch.Generator().manual_seed(seed)
    classes, n = 6, 9
    task = Task(1, (2, 3, 5))
    logits = torch.randn(n, classes, generator=draw).round(decimals=1)
    labels = torch.tensor(task.classes)[torch.randint(0, 3, (n,), generator=draw)]
    if several:
        labels = (torch.rand(n, classes, generator=draw) < 0.4).long()
    owner, seen = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([True, True, True, True, False, True])
    expected = count_task(
        nn.Identity(), [(logits, labels)], task, owner, seen, n_tasks=2, predict=lambda m, batch: batch[0]
    )
    own = torch.zeros(n, classes, dtype=torch.bool)
    own[:, list(task.classes)] = True
    assert sample_counts(logits, labels, own, seen).sum(1).tolist() == expected[:3].tolist()


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_the_shares_of_a_pool_are_its_samples_once_each(sizes, size, world):
    data = {t: TensorDataset(torch.arange(n) + 100 * t, torch.full((n,), t)) for t, n in enumerate(sizes)}
    loaders = {t: DataLoader(d, batch_size=size) for t, d in data.items()}
    chosen = sorted(data)[::2]
    found = []
    for rank in range(world):
        pool = PooledLoader(loaders, rank=rank, world_size=world)
        for tasks, (values, labels) in pool.batches(chosen):
            assert tasks.tolist() == labels.tolist()
            assert 1 <= len(values) <= size
            found += values.tolist()
    assert sorted(found) == sorted(v for t in chosen for v in data[t].tensors[0].tolist())


def _draws(image):
    return image + torch.rand(()) + np.random.rand() + random.random()


@pytest.mark.parametrize("options", [{"eval_transform": _draws}, {}, {"collate_fn": lambda s: default_collate(s)}])
def test_samples_of_joined_views_are_those_of_each_view(options):
    stream = tiny_stream(**options)
    loaders = {t: stream.test_loader(t) for t in (0, 2)}
    pool = PooledLoader(loaders)
    assert pool.pool.whole is not None
    tasks, batches = zip(*pool.batches([0, 2]), strict=True)
    expected = [batch for t in (0, 2) for batch in loaders[t]]
    for k in range(2):
        assert torch.equal(torch.cat([b[k] for b in batches]), torch.cat([b[k] for b in expected]))
    assert torch.cat(tasks).tolist() == [0] * 10 + [2] * 10
    assert PooledLoader({0: stream.test_loader(0), 1: tiny_stream(**options).test_loader(1)}).pool.whole is None


def test_a_head_that_is_too_narrow_is_named():
    class Narrow(PlainModule):
        def forward(self, x):
            return self.model(x)[:, :1]

        def training_step(self, batch, batch_idx):
            return self.model(batch[0]).sum() * 0

    with pytest.raises(ValueError, match="the head must have a row for every class, got 1 outputs for class 1"):
        _train([ContinualEvaluation(2)], Narrow())


def test_batches_of_namedtuples_keep_their_type():
    pair = namedtuple("pair", "inputs labels")
    moved = to_device({"a": [pair(torch.zeros(2), torch.ones(2, dtype=torch.int64))]}, torch.device("meta"))
    assert type(moved["a"][0]) is pair
    assert moved["a"][0].labels.device.type == "meta"
    assert default_predict(nn.Identity(), pair(torch.zeros(1, 2), torch.zeros(1))).shape == (1, 2)


# two processes

SCRIPT = """
import json, sys, torch
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from cl_plugins import fit_stream
from cl_plugins.callbacks import ContinualEvaluation
from cl_plugins.plugin import ContinualCallback
from tests._helpers import PlainModule, image_data, quiet_trainer, tiny_stream

class Watch(ContinualCallback):
    training = "neutral"
    def on_inside_row(self, trainer, pl_module, row):
        x, y = image_data(5, seed=1).tensors  # rank 0 counts all samples, with its own batch statistics
        modes = {m: m.training for m in pl_module.modules()}
        pl_module.eval()
        with torch.no_grad():
            named = pl_module(x)[:, : 2 * row.seen].argmax(1)
        for m, training in modes.items():
            m.training = training
        right = [int((named == y)[(y // 2) == t].sum()) for t in row.tasks]
        assert trainer.global_rank or row.end or right == list(row.correct), (right, row)

class Module(PlainModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.norm = nn.BatchNorm1d(6, momentum=0.9)
    def forward(self, x):
        return self.norm(self.model(x))

stream = tiny_stream(n_per_class=6, eval_batch_size=3, batch_size=2)
trainer = quiet_trainer(
    max_epochs=1, callbacks=[ContinualEvaluation(1), Watch()], devices=2,
    strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=False),
)
result = fit_stream(trainer, Module(), stream)
with open(f"{sys.argv[1]}/rank{trainer.global_rank}.json", "w") as file:
    json.dump([[r.step, r.end, list(r.correct), list(r.total)] for r in result.inside_tasks], file)
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_with_uneven_shares_sum_their_counts(tmp_path):
    run_script(SCRIPT, tmp_path, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first == second
    assert first[-1][3] == [10, 10, 10]
    assert [row[:2] for row in first] == [[3 * t + k, end] for t in range(3) for k, end in
                                          ((1, False), (2, False), (3, False), (3, True))]  # fmt: skip
    assert len({tuple(row[2]) for row in first}) > 4
