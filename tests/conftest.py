"""Settings of all tests: one thread each, since they run beside each other, and no hub is asked for anything."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

from tests._browser import CHROMIUM, Page

torch.set_num_threads(1)


@pytest.fixture
def page():
    """A tab of a real browser that must have logged and requested nothing when its test ends."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    tab = Page()
    try:
        yield tab
        tab.check()
    finally:
        tab.close()
