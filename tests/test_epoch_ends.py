"""A stream that is stopped around the end of an epoch, or goes on behind the last step of a task, loses nothing."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from cl_plugins import fit_stream
from cl_plugins.callbacks import MaskedHead, StreamCheckpoint
from cl_plugins.checkpoint_files import checkpoint_files
from cl_plugins.task_length import TaskLength
from tests._helpers import PlainModule, quiet_trainer, tiny_stream
from tests.test_stream_checkpoint import Fail, Scheduled


class EpochHooks(PlainModule):
    """One that has something to do at each epoch's end, as many have."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(4))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x + 0.1 * torch.randn_like(x), y), batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", PlainModule.training_step(self, batch, batch_idx))

    def on_train_epoch_start(self):
        self.calls[0] += 1

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.calls[1] += 1

    def on_validation_epoch_end(self):
        self.calls[2] += 1

    def on_train_epoch_end(self):
        self.calls[3] += 1
        with torch.no_grad():
            for parameter in self.model.blocks.parameters():  # the classifier is the method's
                parameter.mul_(0.99)


def _run(folder, *callbacks, module=EpochHooks, resume=None, every=1, epochs=3, batch_size=8):
    pl.seed_everything(5, verbose=False)
    module = module()
    classes = [[0, 1], [2, 3, 4, 5]]  # 3 and 6 steps an epoch with batches of 8
    stream = tiny_stream(n_tasks=None, classes=classes, validation_fraction=0.25, batch_size=batch_size)
    trainer = quiet_trainer(
        callbacks=[MaskedHead(), *callbacks, StreamCheckpoint(folder, every_n_steps=every)],
        enable_checkpointing=True,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        max_epochs=epochs,
    )
    fit_stream(trainer, module, stream, resume)
    return module


def _same(first, second):
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


KINDS = {
    "epochs": lambda: [],
    "stopping early": lambda: [EarlyStopping("val_loss", patience=1, min_delta=10.0)],
    "ending inside an epoch": lambda: [TaskLength(steps=8)],
}
STEPS = {"epochs": 27, "stopping early": 18, "ending inside an epoch": 16}
EPOCHS = {"epochs": 6, "stopping early": 4, "ending inside an epoch": 5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {kind: _run(tmp_path_factory.mktemp("whole"), *KINDS[kind]()) for kind in KINDS}


MOMENTS = [(kind, step) for kind in KINDS for step in (2, 3, 4, 6, 8, 9, 11, 14, 15, 16, 21) if step < STEPS[kind]]


@pytest.mark.parametrize(("kind", "step"), MOMENTS)
def test_what_belongs_to_an_epochs_end_is_done_once(tmp_path, whole, kind, step):
    starts, batches, validations, ends = whole[kind].calls.tolist()
    assert (batches, starts, validations, ends) == (STEPS[kind], *(EPOCHS[kind],) * 3)
    with pytest.raises(RuntimeError, match="power failure"):
        _run(tmp_path, *KINDS[kind](), Fail(step))
    _same(whole[kind], _run(tmp_path, *KINDS[kind](), resume="last"))


def test_a_hook_that_stands_on_the_module_itself_stays_there_and_runs_before_each_save(tmp_path):
    ran = []

    def hooked():
        module = Scheduled()
        module.on_train_batch_end = lambda *args: ran.append(int(module.global_step))
        return module

    module = _run(tmp_path, module=hooked, epochs=1)
    assert ran == list(range(1, 10))
    assert module.__dict__["on_train_batch_end"].__name__ == "<lambda>"


@pytest.mark.parametrize("step", [1, 2, 4])
def test_epochs_of_one_step_are_saved_inside_tasks_too(tmp_path, step):
    options = {"batch_size": 200, "module": Scheduled}
    whole = _run(tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="power failure"):
        _run(tmp_path, Fail(step), **options)
    assert [f"-step-{step}.ckpt" in p.name for p in checkpoint_files(tmp_path)][-1]
    _same(whole, _run(tmp_path, resume="last", **options))


STOPS = [(9, None), (9, 11), (9, 15), (9, 17), (3, None), (3, 5), (3, 7), (15, 18)]


@pytest.mark.parametrize(("first", "second"), STOPS)
def test_a_checkpoint_of_lightnings_behind_an_epochs_last_step_leaves_what_follows_whole(tmp_path, first, second):
    options = {"module": Scheduled, "every": 2}
    whole = _run(tmp_path / "whole", **options)
    theirs = ModelCheckpoint(tmp_path / "theirs", every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(RuntimeError, match="power failure"):
        _run(tmp_path / "first", theirs, Fail(first + 1), **options)
    (resume,) = (tmp_path / "theirs").glob(f"*step={first}.ckpt")
    if second is not None:
        with pytest.raises(RuntimeError, match="power failure"):
            _run(tmp_path, Fail(second), resume=resume, **options)
        resume = "last"
    _same(whole, _run(tmp_path, resume=resume, **options))
