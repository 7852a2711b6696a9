import copy
import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.nn.functional import cross_entropy

from cl_plugins import ContinualCallback, Task, end_task, fit_stream, start_task
from cl_plugins.callbacks import ForgettingTracker, FrozenBackbone, MaskedHead
from cl_plugins.evaluation import evaluate_tasks
from cl_plugins.plugin import Row
from cl_plugins.result import StreamResult
from tests._helpers import PlainModule, StopAt, image_data, quiet_trainer, tiny_stream, tiny_vit


class Recorder(ContinualCallback):
    training = "neutral"

    def __init__(self):
        super().__init__()
        self.calls = []

    def on_stream_start(self, trainer, pl_module, stream):
        self.calls.append("stream start")

    def on_task_start(self, trainer, pl_module, task):
        super().on_task_start(trainer, pl_module, task)
        self.calls.append(f"task {task.index} start")

    def on_train_start(self, trainer, pl_module):
        self.calls.append("train")
        self.steps = trainer.estimated_stepping_batches

    def on_task_end(self, trainer, pl_module, task):
        self.calls.append(f"task {task.index} end")

    def on_row(self, trainer, pl_module, row):
        self.calls.append(f"row {row.after}")

    def on_stream_end(self, trainer, pl_module, result):
        self.calls.append("stream end")


def test_hooks_come_in_order_and_every_task_gets_all_its_epochs():
    recorder = Recorder()
    trainer = quiet_trainer(callbacks=[recorder])
    result = fit_stream(trainer, PlainModule(), tiny_stream(), evaluate_initial=True)
    expected = ["stream start", "row -1"]
    for k in range(3):
        expected += [f"task {k} start", "train", f"task {k} end", f"row {k}"]
    assert recorder.calls == [*expected, "stream end"]
    assert trainer.global_step == 3 * 2 * 4  # tasks x epochs x batches of 8 in 32 samples
    assert recorder.steps == 8  # schedulers see one task
    assert result.initial is not None
    assert result.correct.shape == (3, 3)


def test_accuracy_equals_a_plain_loop_with_uneven_last_batches():
    stream, module = tiny_stream(), PlainModule()
    result = fit_stream(quiet_trainer(callbacks=[MaskedHead()]), module, stream)
    data, labels = image_data(5, seed=1).tensors
    module.eval()
    with torch.no_grad():
        logits = module(data)
    for task in stream.tasks:
        keep = torch.isin(labels, torch.tensor(task.classes))
        expected = sum(int(logits[i].argmax()) == int(labels[i]) for i in keep.nonzero()[:, 0])
        assert int(result.correct[-1, task.index]) == expected
        own = list(task.classes)
        known = sum(own[int(logits[i, own].argmax())] == int(labels[i]) for i in keep.nonzero()[:, 0])
        assert result.rows[-1].correct_in_task[task.index] == known
    assert result.total[-1].tolist() == [10, 10, 10]
    assert sum(sum(line) for line in result.rows[-1].confusion) == 30


def test_predictions_name_only_seen_classes():
    module, stream = PlainModule(), tiny_stream()
    with torch.no_grad():
        module.model.head.bias[4:] = 1e6  # the last task's classes, not seen yet
    row = evaluate_tasks(module, stream, 0)
    assert row.total == (10, None, None)
    assert sum(row.confusion[0][1:]) == 0


def test_modes_and_gradients_are_as_before_an_evaluation():
    module = PlainModule().train()
    module.model.blocks[0].eval()
    modes = [m.training for m in module.modules()]
    evaluate_tasks(module, tiny_stream(), -1)
    assert [m.training for m in module.modules()] == modes
    assert torch.is_grad_enabled()


def test_a_loop_of_your_own_gives_the_same_numbers():
    results = []
    for by_hand in (False, True):
        pl.seed_everything(3, verbose=False)
        module, stream, trainer = PlainModule(), tiny_stream(), quiet_trainer(callbacks=[MaskedHead()])
        if by_hand:
            rows = []
            for task in stream.tasks:
                start_task(trainer, module, stream, task.index)
                trainer.fit(module, datamodule=stream)
                rows.append(end_task(trainer, module, stream, task.index))
            results.append([r.correct for r in rows])
        else:
            results.append([r.correct for r in fit_stream(trainer, module, stream).rows])
    assert results[0] == results[1]


class Counting(PlainModule):
    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_train_epoch_start(self):
        self.epochs.append(self.current_epoch)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val", cross_entropy(self(x), y))


def test_early_stopping_starts_anew_with_each_task():
    module = Counting()
    module.lr = 0.0
    stop = EarlyStopping("val", patience=1, min_delta=1.0)
    trainer = quiet_trainer(max_epochs=9, callbacks=[stop])
    fit_stream(trainer, module, tiny_stream(validation_fraction=0.25))
    assert module.epochs == [0, 1] * 3


def test_model_checkpoint_starts_anew_with_each_task(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val", save_top_k=1)
    trainer = quiet_trainer(callbacks=[checkpoint], enable_checkpointing=True)
    fit_stream(trainer, Counting(), tiny_stream(validation_fraction=0.25))
    assert len(list(tmp_path.glob("*.ckpt"))) >= 2  # a later task's best does not have to beat the first task's


class Harder(Counting):
    """Its second task never reaches the score of its first."""

    def validation_step(self, batch, batch_idx):
        self.log("score", [0.9, 0.6][self.trainer.datamodule.task] + 0.01 * self.current_epoch)


@pytest.mark.filterwarnings("error:The dirpath has changed")
@pytest.mark.parametrize("logger", [False, True])
def test_the_best_of_a_later_task_is_kept_where_lightning_chooses_the_folder(tmp_path, logger):
    checkpoint = ModelCheckpoint(monitor="score", mode="max", save_top_k=1, filename="{step}-{score:.2f}")
    logger = CSVLogger(tmp_path) if logger else False
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "logger": logger}
    trainer = quiet_trainer(callbacks=[checkpoint], **options)
    fit_stream(trainer, Harder(), tiny_stream(n_tasks=2, validation_fraction=0.25))
    best = Path(checkpoint.best_model_path)
    assert best.name.endswith("score=0.61.ckpt")
    assert float(checkpoint.best_model_score) == pytest.approx(0.61)
    assert list(checkpoint.best_k_models) == [checkpoint.kth_best_model_path] == [str(best)]
    assert sorted(p.name[-9:-5] for p in best.parent.glob("*.ckpt")) == ["0.61", "0.91"]


@pytest.mark.parametrize("step", [3, 8, 11, 20])
def test_a_resumed_stream_equals_an_uninterrupted_one(tmp_path, step):
    def run(callbacks, ckpt_path=None):
        pl.seed_everything(5, verbose=False)
        module = PlainModule(weight_decay=0.1)
        save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, save_last=True)
        trainer = quiet_trainer(callbacks=[MaskedHead(), *callbacks, save], enable_checkpointing=True)
        return module, fit_stream(trainer, module, tiny_stream(), ckpt_path)

    whole, expected = run([])
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    with pytest.raises(RuntimeError, match="power failure"):
        run([StopAt(step)])
    resumed, result = run([], "last")
    assert torch.equal(result.correct, expected.correct)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_of_another_stream_is_refused(tmp_path):
    def trainer():
        return quiet_trainer(callbacks=[ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True)

    fit_stream(trainer(), PlainModule(), tiny_stream())
    with pytest.raises(ValueError, match="`ckpt_path` must belong to this stream"):
        fit_stream(trainer(), PlainModule(), tiny_stream(n_tasks=2), "last")
    with pytest.raises(FileNotFoundError, match=r"must be a checkpoint file or 'last', got 'none\.ckpt'"):
        fit_stream(trainer(), PlainModule(), tiny_stream(), "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="must be a checkpoint written by fit_stream"):
        fit_stream(trainer(), PlainModule(), tiny_stream(), tmp_path / "other.ckpt")


def test_no_checkpoint_to_resume_from(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no \.ckpt file"):
        fit_stream(quiet_trainer(default_root_dir=tmp_path), PlainModule(), tiny_stream(), "last")


def test_last_takes_what_this_trainer_would_have_written_and_says_what_it_took(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(ckpt_path=None, logger=True, stop=9, **options):
        callbacks = [StopAt(stop), ModelCheckpoint(every_n_train_steps=2)]
        logger = CSVLogger(".", version=logger if isinstance(logger, str) else None) if logger else False
        trainer = quiet_trainer(callbacks=callbacks, logger=logger, enable_checkpointing=True, **options)
        with pytest.raises(RuntimeError, match="power failure"):
            fit_stream(trainer, PlainModule(), tiny_stream(), ckpt_path)

    run(logger=False, default_root_dir=tmp_path / "another experiment")
    with pytest.raises(FileNotFoundError, match=r"found no \.ckpt file in .*lightning_logs.version_0.checkpoints"):
        run("last")
    run()
    capsys.readouterr()
    run("last", stop=11)
    path = Path("lightning_logs", "version_0", "checkpoints", "epoch=1-step=8.ckpt")
    assert capsys.readouterr().err.count(f"resuming from {path} (task 0, step 8)\n") == 1
    with pytest.raises(ValueError, match=r"got those of 2: lightning_logs.version_0.checkpoints, .*version_1.*; give"):
        run("last", stop=13)
    run("last", logger="version_1", stop=13)  # its own folder
    assert "version_1" in capsys.readouterr().err
    run(Path("lightning_logs", "version_1", "checkpoints", "epoch=0-step=12.ckpt"), stop=13)
    assert "step=12.ckpt (task 1, step 12)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_steps": 5}, "`max_steps` counts over the whole stream"),
        ({"reload_dataloaders_every_n_epochs": 1}, "`reload_dataloaders_every_n_epochs` must be 0"),
        ({"strategy": "ddp_spawn", "devices": 2}, "`strategy` must not spawn processes"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        fit_stream(quiet_trainer(**options), PlainModule(), tiny_stream())


class Untrained(PlainModule):
    """One whose forward is wrong; it must not come to training."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("trained")


class WithoutForward(Untrained):
    forward = pl.LightningModule.forward


class TakesLabels(Untrained):
    def forward(self, x, y):
        return self.model(x)


@pytest.mark.parametrize(
    ("module", "got"),
    [
        (WithoutForward, "a WithoutForward without `forward`"),
        (TakesLabels, "a `forward` that cannot be called so: .*'y'"),
    ],
)
def test_a_forward_that_the_evaluation_cannot_call_is_named_before_training(module, got):
    text = rf"`forward` must give logits .* got {got}.*; or pass `predict=lambda module, batch: \.\.\.` to fit_stream"
    with pytest.raises(TypeError, match=text):
        fit_stream(quiet_trainer(), module(), tiny_stream())
    with pytest.raises(AssertionError, match="trained"):
        fit_stream(quiet_trainer(), module(), tiny_stream(), predict=lambda module, batch: module.model(batch[0]))


@pytest.mark.parametrize("batches", [True, 2])
def test_a_short_trial_is_refused_with_what_stands_for_it(batches):
    text = rf"`fast_dev_run` ends training .* got {batches}; use `limit_train_batches=1, max_epochs=1`"
    with pytest.raises(ValueError, match=text):
        fit_stream(quiet_trainer(fast_dev_run=batches), PlainModule(), tiny_stream())


def test_arguments_of_another_kind_are_named():
    trainer, module, stream = quiet_trainer(), PlainModule(), tiny_stream()
    with pytest.raises(TypeError, match="got LightningDataModule without `tasks`, `n_classes`"):
        fit_stream(trainer, module, pl.LightningDataModule())
    with pytest.raises(TypeError, match=r"got list without .*`tasks`.*; call fit_stream\(trainer, module, stream\)"):
        fit_stream(trainer, module, [stream.train_dataloader()])
    with pytest.raises(TypeError, match="`trainer` must be a Trainer, got PlainModule; call"):
        fit_stream(module, trainer, stream)
    with pytest.raises(TypeError, match="`module` must be a LightningModule, got ClassIncremental; call"):
        fit_stream(trainer, stream, module)


def test_streams_with_faults_are_refused():
    stream = tiny_stream()
    stream.tasks = [Task(0, (0, 1)), Task(1, (1, 2))]
    with pytest.raises(ValueError, match="must not share classes, got class 1 in task 0 and task 1"):
        fit_stream(quiet_trainer(), PlainModule(), stream)
    stream.tasks = [Task(1, (0, 1))]
    with pytest.raises(ValueError, match="must be in order: task at position 0 has index 1"):
        fit_stream(quiet_trainer(), PlainModule(), stream)


def test_a_head_that_is_too_small_is_named():
    with pytest.raises(ValueError, match="must be rows of the head, 0 to 3"):
        fit_stream(quiet_trainer(callbacks=[MaskedHead()]), PlainModule(tiny_vit(num_classes=4)), tiny_stream())


class Diverging(PlainModule):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("nan") if self.trainer.global_step == 10 else 1.0)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_finished_rows():
    tracker = ForgettingTracker()
    with pytest.raises(FloatingPointError, match="the training loss must stay finite, got NaN or infinity in epoch 0"):
        fit_stream(quiet_trainer(callbacks=[tracker]), Diverging(), tiny_stream())
    matrix = tracker.matrix.compute()
    assert not torch.isnan(matrix[0, 0])


class HeadOnly(PlainModule):
    def configure_optimizers(self):
        return torch.optim.Adam(self.model.blocks.parameters(), lr=1e-3)


def test_parameters_in_no_optimizer_are_named():
    with pytest.raises(
        RuntimeError, match=r"2 parameters of `FrozenBackbone` are in no optimizer: head.weight, head.bias"
    ):
        fit_stream(quiet_trainer(callbacks=[FrozenBackbone()]), HeadOnly(), tiny_stream())


class ExtraTerm(ContinualCallback):
    def extra_loss(self, module):
        return 0.3 * module.model.head.weight.square().sum()


class OwnTerm(PlainModule):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.3 * self.model.head.weight.square().sum()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_extra_loss_equals_one_that_the_module_adds(accumulate):
    modules = []
    for callbacks, cls in (([ExtraTerm()], PlainModule), ([], OwnTerm)):
        pl.seed_everything(0, verbose=False)
        module = cls()
        fit_stream(quiet_trainer(callbacks=callbacks, accumulate_grad_batches=accumulate), module, tiny_stream())
        modules.append(module)
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())


def test_training_without_a_task_is_refused():
    from torch.utils.data import DataLoader

    with pytest.raises(RuntimeError, match="`MaskedHead` must know the task before training"):
        quiet_trainer(callbacks=[MaskedHead()]).fit(PlainModule(), DataLoader(image_data(4), batch_size=8))


def test_trainer_fit_with_the_stream_as_data_module_trains_its_current_task():
    stream, module = tiny_stream(), PlainModule()
    stream.task = 1
    quiet_trainer(callbacks=[MaskedHead()]).fit(module, datamodule=stream)
    assert module.plugins["head_mask"].seen() == list(stream.tasks[1].classes)


def test_only_the_head_trains_and_only_its_own_rows():
    module = PlainModule(weight_decay=0.3)
    before = copy.deepcopy(module.state_dict())
    stream = tiny_stream(n_tasks=2)
    trainer = quiet_trainer(callbacks=[FrozenBackbone()])
    start_task(trainer, module, stream, 0)
    trainer.fit(module, datamodule=stream)
    changed = {k for k, v in before.items() if not torch.equal(v, module.state_dict()[k])}
    assert changed == {"model.head.weight", "model.head.bias"}
    others = list(stream.tasks[1].classes)
    assert torch.equal(module.model.head.weight[others], before["model.head.weight"][others])


def test_the_global_random_state_is_left_alone_between_tasks():
    trainer, module, stream = quiet_trainer(callbacks=[MaskedHead()]), PlainModule(), tiny_stream()
    state = torch.get_rng_state()
    start_task(trainer, module, stream, 0)
    end_task(trainer, module, stream, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_result_saves_numbers_that_other_tools_can_read(tmp_path):
    import json

    result = fit_stream(quiet_trainer(callbacks=[MaskedHead()]), PlainModule(), tiny_stream())
    content = json.loads(result.save(tmp_path, method="masked-finetune").read_text())
    matrix = torch.tensor([[math.nan if c is None else c for c in row] for row in content["accuracy_matrix"]])
    assert content["average_accuracy"] == pytest.approx(float(matrix[-1].mean()))
    assert content["accuracy_matrix"][0][1] is None
    assert content["forgetting"] == pytest.approx(
        float(torch.stack([matrix[j:2, j].max() - matrix[2, j] for j in range(2)]).mean())
    )
    assert result.to_frame().shape == (3, 3)


def test_a_long_stream_keeps_the_newest_confusions_alone_and_saves_its_rows_whole():
    from cl_plugins.stream_state import rows_from_state, rows_to_state

    def rows(n):
        result = StreamResult([Task(i, (i,)) for i in range(n)])
        for k in range(3):
            counts = tuple(i if i <= k else None for i in range(n))
            result.add(Row(k, counts, counts, counts, ((k,) * n,) * n, 0.5))
        return result.rows

    assert [len(r.confusion) for r in rows(100)] == [100, 100, 100]
    assert [len(r.confusion) for r in rows(101)] == [0, 0, 101]
    for n in (2, 101):
        assert rows_from_state(rows_to_state(rows(n))) == rows(n)
    assert rows_from_state(rows_to_state([])) == []


class Remembering(PlainModule):
    """A module whose state holds a tensor that it lacks at the start."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state

    def training_step(self, batch, batch_idx):
        self.seen = torch.ones(2) if self.seen is None else self.seen + 1
        return super().training_step(batch, batch_idx)


def test_a_resume_has_the_users_weights_in_place_before_plugins_start(tmp_path):
    class Look(ContinualCallback):
        training = "neutral"

        def start_task(self, module, task):
            self.bias = module.model.head.bias.detach().clone()

    def run(callbacks, ckpt_path=None):
        torch.manual_seed(0 if ckpt_path is None else 1)
        module = Remembering()
        save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, save_last=True)
        trainer = quiet_trainer(callbacks=[*callbacks, save], enable_checkpointing=True)
        fit_stream(trainer, module, tiny_stream(n_tasks=1), ckpt_path)
        return module

    whole = run([])
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    with pytest.raises(RuntimeError, match="power failure"):
        run([StopAt(5)])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    look = Look()
    resumed = run([look], "last")
    assert torch.equal(look.bias, saved["model.head.bias"])
    assert torch.equal(resumed.seen, whole.seen)
    assert torch.equal(resumed.model.head.bias, whole.model.head.bias)
