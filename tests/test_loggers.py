"""The Trainer's loggers: real TensorBoard and CSV files; W&B offline and a local MLflow store where installed."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from cl_plugins import fit_stream
from cl_plugins.callbacks import ForgettingTracker
from cl_plugins.logger_figures import log_figure, takes_figures
from tests._helpers import PlainModule, quiet_trainer, tiny_stream

KEYS = [f"cl/{name}" for name in (
    "average_accuracy", "average_incremental_accuracy", "learning_accuracy", "forgetting", "backward_transfer",
    "current_accuracy",
)]  # fmt: skip


def _run(*loggers, **options):
    tracker = ForgettingTracker(**options)
    trainer = quiet_trainer(callbacks=[tracker], max_epochs=1, logger=list(loggers))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        result = fit_stream(trainer, PlainModule(), tiny_stream())
    return result, tracker


def _final(result):
    return {key: getattr(result, key[3:]) for key in KEYS[:-1]}


def test_csv_has_the_fixed_keys_and_the_final_values(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version=0)
    assert not takes_figures(logger)
    result, tracker = _run(logger)
    with open(tmp_path / "run" / "version_0" / "metrics.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["cl/average_accuracy"]]
    assert set(lines[0]) == {*KEYS, "step"}
    assert len(lines) == 3
    assert lines[0]["cl/forgetting"] == ""  # undefined with one task, and so not written
    assert {k: float(lines[-1][k]) for k in _final(result)} == pytest.approx(_final(result))
    assert tracker.values() == pytest.approx({k: float(lines[-1][k]) for k in KEYS})


def test_tensorboard_has_scalars_and_the_matrix(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    result, _ = _run(logger)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "version_0"), size_guidance={"images": 0}).Reload()
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("cl/")} == set(KEYS)
    assert {k: events.Scalars(k)[-1].value for k in _final(result)} == pytest.approx(_final(result), abs=1e-6)
    images = events.Images("cl/accuracy_matrix")
    assert [e.step for e in images] == [e.step for e in events.Scalars("cl/average_accuracy")]
    picture = Image.open(io.BytesIO(images[-1].encoded_image_string)).convert("L")
    assert picture.size == (640, 560)
    low, high = picture.getextrema()
    assert low < 80 < 200 < high  # it is drawn


class Taker(CSVLogger):
    """A logger of the user that takes figures as W&B's does."""

    def __init__(self, folder):
        super().__init__(folder)
        self.taken = []

    def log_image(self, key, images, step=None):
        (figure,) = images
        self.taken.append((key, step, np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)))


def test_what_is_drawn_is_the_matrix_so_far(tmp_path):
    logger = Taker(tmp_path)
    result, _ = _run(logger)
    accuracy = np.where(result.correct >= 0, result.correct / result.total, np.nan)
    assert [(key, step) for key, step, _ in logger.taken] == [("cl/accuracy_matrix", 4 * n) for n in (1, 2, 3)]
    for rows, (_, _, drawn) in enumerate(logger.taken, 1):
        np.testing.assert_allclose(drawn, accuracy[:rows], rtol=1e-6)


def test_figures_can_be_switched_off(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _run(TensorBoardLogger(tmp_path, name="run", version=0), figures=False)
    assert accumulator.EventAccumulator(str(tmp_path / "run" / "version_0")).Reload().Tags()["images"] == []


def test_a_long_stream_is_drawn_once_at_its_end(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr("cl_plugins.callbacks.tracker._DRAWN", 1)
    _run(TensorBoardLogger(tmp_path, name="run", version=0))
    folder = str(tmp_path / "run" / "version_0")
    images = accumulator.EventAccumulator(folder, size_guidance={"images": 0}).Reload().Images("cl/accuracy_matrix")
    assert len(images) == 2  # after the first task, and at the end


def test_mlflow_has_scalars_and_the_matrix(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from pytorch_lightning.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for it
    uri = (tmp_path / "runs").as_uri()
    client = mlflow.tracking.MlflowClient(uri)
    client.create_experiment("cl", artifact_location=(tmp_path / "files").as_uri())
    logger = MLFlowLogger("cl", tracking_uri=uri)
    result, _ = _run(logger)
    known = client.get_run(logger.run_id).data.metrics
    assert {k for k in known if k.startswith("cl/")} == set(KEYS)
    assert {k: known[k] for k in _final(result)} == pytest.approx(_final(result))
    assert len(client.list_artifacts(logger.run_id, "cl/accuracy_matrix")) == 3
    picture = Image.open(next((tmp_path / "files").rglob("step-*.png")))
    assert picture.size == (640, 560)


def test_wandb_offline_has_scalars_and_the_matrix(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger("run", save_dir=tmp_path, offline=True, settings=wandb.Settings(console="off"))
    result, _ = _run(logger)
    known = dict(logger.experiment.summary)
    wandb.finish()
    assert {k for k in known if k.startswith("cl/")} == {*KEYS, "cl/accuracy_matrix"}
    assert {k: known[k] for k in _final(result)} == pytest.approx(_final(result))
    assert len(list(tmp_path.rglob("accuracy_matrix*.png"))) == 3


def test_a_logger_without_a_way_in_takes_nothing():
    class Bare:
        experiment = object()

    assert not log_figure(Bare(), "cl/x", None, 0)
