"""The bundled vision-language model and its tokenizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cl_plugins.clip_glyph import NameTokenizer, create_clip_glyph
from cl_plugins.scenarios.glyphs import TEST_FACES, Stencils, glyph_classes, glyph_name, render, stream_classes
from cl_plugins.targets import find_sites

ROOT = Path(__file__).parent.parent


def test_tokens_of_a_name():
    tokenize = NameTokenizer(["LATIN", "A", "LETTER"])
    assert tokenize("Latin letter-A").tolist() == [[1, 3, 5, 4, 6] + [0] * 9]
    assert tokenize(["NOTHING A", ""]).tolist() == [[1, 2, 4, 6] + [0] * 10, [1, 6] + [0] * 12]
    long = tokenize("A " * 40)[0]
    assert long.tolist() == [1] + [4] * 12 + [6]


def test_the_vocabulary_knows_every_name():
    tokens = NameTokenizer()([glyph_name(c) for c in glyph_classes()])
    assert (tokens != 2).all()
    assert (tokens.argmax(1) == (tokens > 0).sum(1) - 1).all()


def test_zero_shot_on_characters_that_were_held_out():
    model, tokenize = create_clip_glyph()
    model.eval()
    characters = stream_classes(300)
    labels = np.repeat(np.arange(300), 3)
    images = render(Stencils(characters, TEST_FACES), labels, np.arange(900, dtype=np.uint64))
    with torch.no_grad():
        texts = F.normalize(model.encode_text(tokenize([glyph_name(c) for c in characters])), dim=1)
        predicted = (F.normalize(model.encode_image(images), dim=1) @ texts.T).argmax(1)
    assert (predicted == torch.from_numpy(labels)).float().mean() >= 0.5


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="`pretrained` must be a file of weights"):
        create_clip_glyph(pretrained=tmp_path / "none.safetensors")


def test_both_towers_have_all_sites():
    model, _ = create_clip_glyph(pretrained=False)
    assert len(find_sites(model)) == (6 + 3) * 4


@pytest.mark.slow
def test_pretraining(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "examples" / "pretrain_clip_glyph.py"), "--steps", "3", "--batch-size", "8"]
    done = subprocess.run([*words, "--out", str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "held_out_among_held_out" in done.stdout
    assert (tmp_path / "clip_glyph.safetensors").stat().st_size < 5_000_000
