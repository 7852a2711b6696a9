"""Figures for the Trainer's loggers, by what a logger can do and not by what it is called.

==============  ==========================================================================================
TensorBoard     ``experiment.add_figure(tag, figure, global_step)``
W&B             ``log_image(key, images, step)``, which wraps the figure in a ``wandb.Image``
MLflow          ``experiment.log_figure(run_id, figure, artifact_file)``, an artifact ``<key>/step-<n>.png``
CSV and others  take none
==============  ==========================================================================================
"""

from __future__ import annotations

from typing import Any


def takes_figures(logger: Any) -> bool:
    """Whether :func:`log_figure` has a way into ``logger``."""
    return _way(logger) is not None


def _way(logger: Any) -> str | None:
    if callable(getattr(logger, "log_image", None)):
        return "log_image"
    experiment = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_figure", None)):
        return "add_figure"
    if callable(getattr(experiment, "log_figure", None)) and getattr(logger, "run_id", None) is not None:
        return "log_figure"
    return None


def log_figure(logger: Any, key: str, figure: Any, step: int) -> bool:
    """Hand a matplotlib figure to a logger.

    WHEN: on the first process alone; loggers stand for nothing on the others.

    Args:
        logger: one of ``trainer.loggers``.
        key: name of the figure, such as ``"cl/accuracy_matrix"``.
        figure: stays open.
        step: the optimizer step that it belongs to.

    Returns:
        Whether the logger took it.

    Example:
        >>> from pytorch_lightning.loggers import CSVLogger
        >>> log_figure(CSVLogger("logs"), "cl/accuracy_matrix", None, 0)
        False
    """
    way = _way(logger)
    if way == "log_image":
        logger.log_image(key, [figure], step=step)
    elif way == "add_figure":
        logger.experiment.add_figure(key, figure, global_step=step, close=False)
        logger.experiment.flush()  # no fit follows the last task, whose end would write it
    elif way == "log_figure":
        logger.experiment.log_figure(logger.run_id, figure, f"{key}/step-{step}.png")
    return way is not None
