"""Metrics of continual learning as torchmetrics classes; log their values, never the objects."""

from __future__ import annotations

from .matrix import AccuracyMatrix

__all__ = ["AccuracyMatrix"]
