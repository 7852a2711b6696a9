"""Glyphs: characters rendered from the fonts that matplotlib ships, as an endless and always present image source.

Nothing is stored and nothing is downloaded. A class is a Unicode code point, its label is the character's Unicode name,
its domain the Unicode block, its style the font face. An image is a pure function of ``(code point, face, seed)``:

    stencil = the character at 64 x 64 pixels in one of 16 faces (DejaVu Sans / Sans Mono / Serif, STIX)
    image   = noise + contrast * blur(pool2(affine(stencil)))                      (3, 32, 32), values in [0, 1]

Faces are split between train, validation and test, so no test image is a training image whatever its seed.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ._seeds import mix

TRAIN_FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralItalic",
)  # fmt: skip
VALIDATION_FACES = ("DejaVuSansMono-Oblique", "STIXGeneralBolIta")
TEST_FACES = ("DejaVuSans-BoldOblique", "DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneralBol")
FACES = TRAIN_FACES + VALIDATION_FACES + TEST_FACES
SPLIT_FACES = {"train": TRAIN_FACES, "validation": VALIDATION_FACES, "test": TEST_FACES}

_STENCIL = 64  # side of the unaugmented character in pixels; the image is half of it
_FONT_SIZE = 48
_BASELINE = 47
_MINIMUM_FACES = 10
_N_PRETRAIN = 400


def _font_path(face: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


@functools.lru_cache(maxsize=len(FACES))
def _charmap(face: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_path(face))).get_charmap())


def _draw(code_point: int, face: str) -> NDArray[np.uint8]:
    """The character in white on black, ``(64, 64)``; shrunk when it is wider or taller than the canvas."""
    from PIL import Image, ImageDraw, ImageFont

    text = chr(code_point)
    size = _FONT_SIZE
    while True:
        font = ImageFont.truetype(str(_font_path(face)), size, layout_engine=ImageFont.Layout.BASIC)
        left, top, right, bottom = font.getbbox(text, anchor="ms")
        if size <= 12 or (right - left <= _STENCIL - 4 and _BASELINE + top >= 2 and _BASELINE + bottom <= _STENCIL - 2):
            break
        size -= 2
    canvas = Image.new("L", (_STENCIL, _STENCIL))
    ImageDraw.Draw(canvas).text((_STENCIL / 2 - (left + right) / 2, _BASELINE), text, fill=255, font=font, anchor="ms")
    return np.asarray(canvas, dtype=np.uint8)


@functools.lru_cache(maxsize=1)
def glyph_classes() -> tuple[int, ...]:
    """Code points that can be told apart: in at least ten faces, not a digit, mark or space, no two drawn alike.

    Of code points that DejaVu Sans draws identically (Latin A, Greek Alpha, Cyrillic A) the lowest stays.

    Returns:
        About 2,300 code points in ascending order.
    """
    count: dict[int, int] = {}
    for face in FACES:
        for code_point in _charmap(face):
            count[code_point] = count.get(code_point, 0) + 1
    kept, drawn = [], set()
    for code_point in sorted(c for c, n in count.items() if n >= _MINIMUM_FACES):
        if unicodedata.category(chr(code_point))[0] in "MZC" or unicodedata.category(chr(code_point)) == "Nd":
            continue
        if code_point not in _charmap("DejaVuSans") or not unicodedata.name(chr(code_point), ""):
            continue
        if not all(sum(code_point in _charmap(f) for f in faces) for faces in SPLIT_FACES.values()):
            continue
        stencil = _draw(code_point, "DejaVuSans")
        key = stencil.tobytes()
        if stencil.max() > 0 and key not in drawn:
            drawn.add(key)
            kept.append(code_point)
    return tuple(kept)


@functools.lru_cache(maxsize=1)
def _shuffled_classes() -> tuple[int, ...]:
    order = np.random.Generator(np.random.PCG64(20251)).permutation(len(glyph_classes()))
    return tuple(glyph_classes()[i] for i in order)


def pretraining_classes() -> tuple[int, ...]:
    """The 400 code points on which the bundled backbones were pretrained; no stream contains them."""
    return _shuffled_classes()[:_N_PRETRAIN]


def stream_classes(n: int | None = None) -> tuple[int, ...]:
    """The first ``n`` code points that streams may use (all when None), disjoint from :func:`pretraining_classes`.

    Raises:
        ValueError: when more classes are asked for than there are.
    """
    usable = _shuffled_classes()[_N_PRETRAIN:]
    if n is not None and not 1 <= n <= len(usable):
        raise ValueError(f"`n` must be between 1 and {len(usable)}, the number of glyph classes, got {n!r}")
    return usable[:n]


def glyph_name(code_point: int) -> str:
    """The Unicode name, such as ``"GREEK SMALL LETTER ALPHA WITH TONOS"``."""
    return unicodedata.name(chr(code_point))


class Stencils:
    """Unaugmented characters, drawn at first use and kept.

    Args:
        code_points: one per class, in label order.
        faces: names out of :data:`FACES`; a class uses those that contain its character.
    """

    def __init__(self, code_points: Sequence[int], faces: Sequence[str]) -> None:
        self.code_points = tuple(code_points)
        self.faces = tuple(faces)
        self._available = [tuple(i for i, f in enumerate(self.faces) if c in _charmap(f)) for c in self.code_points]
        for code_point, available in zip(self.code_points, self._available, strict=True):
            if not available:
                raise ValueError(f"`faces` must contain the character U+{code_point:04X}, got {self.faces!r}")
        self._images = np.zeros((len(self.code_points), len(self.faces), _STENCIL, _STENCIL), np.uint8)
        self._drawn = np.zeros((len(self.code_points), len(self.faces)), bool)
        self._n_available = np.array([len(a) for a in self._available])

    def take(self, labels: NDArray[np.int64], choice: NDArray[np.float64]) -> Tensor:
        """Stencils ``(batch, 1, 64, 64)`` in [0, 1] for ``labels`` with the face picked by ``choice`` in [0, 1)."""
        positions = (choice * self._n_available[labels]).astype(np.int64)
        faces = np.array([self._available[y][p] for y, p in zip(labels, positions, strict=True)], np.int64)
        for y, f in zip(labels, faces, strict=True):
            if not self._drawn[y, f]:
                self._images[y, f] = _draw(self.code_points[y], self.faces[f])
                self._drawn[y, f] = True
        return torch.from_numpy(self._images[labels, faces])[:, None].float() / 255


def uniforms(seeds: NDArray[np.uint64], n: int) -> NDArray[np.float64]:
    """``(batch, n)`` uniform numbers in [0, 1), row i a function of ``seeds[i]`` alone."""
    with np.errstate(over="ignore"):
        counters = mix(seeds)[:, None] + np.arange(n, dtype=np.uint64)[None] * np.uint64(0xD1342543DE82EF95)
    numbers: NDArray[np.float64] = (mix(counters) >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    return numbers


def render(stencils: Stencils, labels: NDArray[np.int64], seeds: NDArray[np.uint64], strength: float = 1.0) -> Tensor:
    """Images of ``labels``, one per seed.

    Args:
        stencils: the characters and faces to draw from.
        labels: ``(batch,)`` positions in ``stencils.code_points``.
        seeds: ``(batch,)`` one 64-bit word an image; equal seed, equal image.
        strength: factor on rotation, shear, scale, shift, blur and noise; 0 leaves the plain character.

    Returns:
        ``(batch, 3, 32, 32)`` float32 in [0, 1]; the three channels are equal.
    """
    u = uniforms(seeds, 16)
    base = stencils.take(labels, u[:, 0])  # (batch, 1, 64, 64)
    angle = np.deg2rad(15) * (2 * u[:, 1] - 1) * strength
    shear = 0.2 * (2 * u[:, 2] - 1) * strength
    scale_x = 1 + strength * (0.5 * u[:, 3] - 0.35)  # above 1 shrinks the character
    scale_y = 1 + strength * (0.5 * u[:, 4] - 0.35)
    shift = 0.12 * (2 * u[:, 5:7] - 1) * strength
    cos, sin = np.cos(angle), np.sin(angle)
    theta = np.stack(
        [
            np.stack([scale_x * cos, scale_x * (shear * cos - sin), shift[:, 0]], 1),
            np.stack([scale_y * sin, scale_y * (shear * sin + cos), shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(torch.from_numpy(theta).float(), list(base.shape), align_corners=False)
    image = F.avg_pool2d(F.grid_sample(base, grid, align_corners=False), 2)  # (batch, 1, 32, 32)
    blurred = F.interpolate(
        F.avg_pool2d(image, 4), scale_factor=4, mode="bilinear", align_corners=False
    )  # 8x8 and back
    softened = F.avg_pool2d(F.pad(image, (1, 1, 1, 1)), 3, stride=1)
    kind = torch.from_numpy(u[:, 7])[:, None, None, None]
    image = torch.where(kind < 0.3 * strength, blurred, torch.where(kind < 0.6 * strength, softened, image))
    peak = image.amax((1, 2, 3), keepdim=True).clamp_min(0.2)
    contrast = torch.from_numpy(1 - 0.5 * u[:, 8] * strength).float()[:, None, None, None]
    image = image / peak * contrast
    pixels = uniforms(mix(seeds ^ np.uint64(0x5851F42D4C957F2D)), image[0].numel())
    amplitude = torch.from_numpy(0.25 * u[:, 9] ** 2 * strength).float()[:, None, None, None]
    noise = torch.from_numpy(pixels).float().view_as(image) - 0.5
    return (image + amplitude * noise).clamp(0, 1).expand(-1, 3, -1, -1).contiguous()
