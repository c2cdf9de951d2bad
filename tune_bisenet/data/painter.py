"""Paint flat faces in perspective and photograph them: how the built-in streets come to look like a picture.

The world is in metres: x right, y up from the ground, z ahead of the camera. A `Painter` paints faces back to front on
a plate of face numbers; then `develop` takes texture and light from the world point under each pixel. It refuses to
know what a street is, what stands in it and what the labels mean.

A change that moves a byte of any frame raises `GENERATOR_VERSION` in `streets`.
Legend: H x W pixels, P points of an outline.
"""

from collections.abc import Sequence
from functools import cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tune_bisenet.data.source import Frame

FOCAL_U, FOCAL_V, EYE_METRES = 1.1, 2.2, 1.25  # of frame width, of frame height; Cityscapes: 2262 px of 2048 x 1024
NEAR_METRES, _ENDLESS_METRES = 1.0, 4000.0
X, Y, Z = range(3)

FloatArray = NDArray[np.float32]
FloatPair = tuple[float, float]
Outline = Sequence[FloatPair]
Colour = tuple[float, float, float]  # RGB, 0 to 255

_HAZE: Final[Colour] = (190, 198, 206)


class Texture(NamedTuple):
    """Brightness over a face: noise, and cells (bricks, windows, slats) that differ from what lies between them."""

    roughness: float = 0.07
    pitch_across: float = 1.0  # metres from cell to cell; along the ground, `up` means ahead
    pitch_up: float = 1.0
    share_across: float = 1.0  # of the pitch, that the cell fills
    share_up: float = 1.0
    cell: float = 1.0  # brightness factors
    between: float = 1.0
    variety: float = 0.0  # from cell to cell


PLAIN: Final = Texture()


@cache
def _noise_tile() -> FloatArray:
    """Return noise of equal power in every octave, (512, 512), mean 0, standard deviation 1; it repeats seamlessly."""
    rng, tile = np.random.default_rng(0), np.zeros((512, 512))
    for step in (1, 2, 4, 8, 16, 32, 64, 128):
        layer = np.kron(rng.standard_normal((512 // step, 512 // step)), np.ones((step, step)))
        for axis in (0, 1):
            layer = np.mean([np.roll(layer, shift * step // 4, axis) for shift in range(4)], axis=0)
        tile += layer / layer.std()
    return np.asarray(tile / tile.std(), dtype=np.float32)


class Look(NamedTuple):
    """Says what a face is, and how it looks before any light falls on it."""

    label: int
    colour: Colour
    texture: Texture = PLAIN
    texels_per_metre: float = 24.0


_FACE: Final = np.dtype(
    [("axis", "i4"), ("at", "f4"), ("label", "u1"), ("colour", "f4", 3), ("texture", "f4", 8), ("texels", "f4")]
)
"""A painted face: the plane it lies in (world coordinate number `axis` is `at` metres), and its look."""


class Painter:
    """Paints faces over one another in perspective, and remembers which face every pixel shows."""

    def __init__(self, rng: np.random.Generator, *, height: int, width: int) -> None:
        self.rng = rng
        self.vanishing_point = (rng.uniform(0.38, 0.62), rng.uniform(0.38, 0.46))  # u, v as shares of width, height
        self.faces: list[tuple[float | Colour | Texture, ...]] = []
        self.plate = Image.new("I", (width, height))
        self._draw = ImageDraw.Draw(self.plate)

    def face(self, axis: int, at: float, outline: Outline, look: Look) -> None:
        """Paint a face. `outline` (P, 2) holds the two other world coordinates, in the order x, y, z."""
        width, height = self.plate.size
        pixels = []
        for point in outline:
            coordinates = list(point)
            coordinates.insert(axis, at)
            x, y, z = coordinates
            across, down = FOCAL_U * x / max(z, NEAR_METRES), FOCAL_V * (EYE_METRES - y) / max(z, NEAR_METRES)
            pixels.append(((self.vanishing_point[0] + across) * width, (self.vanishing_point[1] + down) * height))
        self._draw.polygon(pixels, fill=len(self.faces))
        self.faces.append((axis, at, *look))

    def box(self, look: Look, x: FloatPair, y: FloatPair, z: FloatPair, *, taper: float = 0.0) -> None:
        """Paint the sides of a box that we see: towards the road and towards us. `taper` metres narrow its top."""
        if min(x) > 0 or max(x) < 0:
            outline = [(y[0], z[0]), (y[0], z[1]), (y[1], z[1] - taper), (y[1], z[0] + taper)]
            self.face(X, min(x, key=abs), outline, look)
        self.face(Z, z[0], [(x[0], y[0]), (x[1], y[0]), (x[1] - taper, y[1]), (x[0] + taper, y[1])], look)

    def colour(self, palette: Sequence[Colour]) -> Colour:
        """Draw a colour near one of the palette's."""
        red, green, blue = palette[int(self.rng.integers(len(palette)))]
        brightness, warmth = 1 + 0.12 * self.rng.standard_normal(), 0.04 * self.rng.standard_normal()
        return red * (brightness + warmth), green * brightness, blue * (brightness - warmth)


def rectangle(a: FloatPair, b: FloatPair) -> Outline:
    """Return the corners of `a[0]` to `a[1]` by `b[0]` to `b[1]`."""
    return [(a[0], b[0]), (a[1], b[0]), (a[1], b[1]), (a[0], b[1])]


def rounded(x: float, y: float, radii: float | FloatPair, spokes: NDArray[np.float64] | float = 1.0) -> Outline:
    """Return 16 points around (x, y); `spokes` stretch the radii, one for each point."""
    across, up = np.broadcast_to(radii, 2)
    angles = np.arange(16) * (np.pi / 8)
    points = np.stack([x + across * spokes * np.cos(angles), y + up * spokes * np.sin(angles)], axis=1)
    return [(float(a), float(b)) for a, b in points]


def develop(p: Painter, oversampling: int) -> Frame:
    """Light the face of every pixel, and take the picture."""
    numbers = np.asarray(p.plate)
    faces = np.array(p.faces, dtype=_FACE)[numbers]
    points = _world_points(p, faces)
    radiance = _lit(p, faces, points, _textured(numbers, faces, points))
    middle = slice(oversampling // 2, None, oversampling)
    label = np.ascontiguousarray(faces["label"][middle, middle])
    radiance = radiance.reshape(len(label), oversampling, -1, oversampling, 3).mean(axis=(1, 3))
    return Frame(_photographed(p, radiance), label)


def _world_points(p: Painter, faces: NDArray[np.void]) -> FloatArray:
    """Return where each pixel's ray meets the plane of its face: x, y, z in metres, (3, H, W)."""
    height, width = faces.shape
    u = ((np.arange(width) + 0.5) / width - p.vanishing_point[0]) / FOCAL_U
    v = (p.vanishing_point[1] - (np.arange(height) + 0.5) / height) / FOCAL_V
    ray = np.stack(np.broadcast_arrays(u, v[:, None], 1.0)).astype(np.float32)
    reach = faces["at"] - np.where(faces["axis"] == Y, np.float32(EYE_METRES), np.float32(0))
    along = np.choose(faces["axis"], ray)
    along[np.abs(along) < 1e-4] = 1e-4  # edge-on: as far away as can be
    points = ray * np.clip(reach / along, NEAR_METRES, _ENDLESS_METRES)
    points[Y] += EYE_METRES
    return np.asarray(points)


def _textured(numbers: NDArray[np.int32], faces: NDArray[np.void], points: FloatArray) -> FloatArray:
    """Return the brightness factor of every pixel's texture, (H, W)."""
    across = np.where(faces["axis"] == X, points[Z], points[X])
    up = np.where(faces["axis"] == Y, points[Z], points[Y])
    texels, tile = faces["texels"], _noise_tile()
    noise = tile[(up * texels).astype(int) + 37 * numbers & 511, (across * texels).astype(int) + 91 * numbers & 511]
    texture = Texture(*np.moveaxis(faces["texture"], -1, 0))
    column, row = across / texture.pitch_across, up / texture.pitch_up
    in_cell = np.abs(column % 1 - 0.5) <= texture.share_across / 2
    in_cell &= np.abs(row % 1 - 0.5) <= texture.share_up / 2
    cell = texture.cell + texture.variety * tile[column.astype(int) * 37 & 511, row.astype(int) * 91 & 511]
    return np.asarray(np.where(in_cell, cell, texture.between) * (1 + texture.roughness * noise))


def _lit(p: Painter, faces: NDArray[np.void], points: FloatArray, brightness: FloatArray) -> FloatArray:
    """Put sun, shadow and haze on the faces' colours: (H, W, 3), 0 to about 1."""
    sun, sun_side, visibility = p.rng.uniform(0, 0.5), p.rng.choice((-1, 1)), p.rng.uniform(200, 2000)
    turned_away = (faces["axis"] == X) & (faces["at"] * sun_side > 0)
    roofline = p.rng.uniform(-4, 6) + 0.6 * _noise_tile()[0][np.clip(points[Z] * 6, 0, 511).astype(int)]
    in_shadow = (points[X] * sun_side > roofline) & (points[Y] < 0.01)
    light = brightness * (1 + sun * np.where(turned_away | in_shadow, np.float32(-0.9), np.float32(0.4)))
    haze = (points[Z] / (points[Z] + visibility))[..., None]
    radiance = faces["colour"] * light[..., None] * (1 - haze) + haze * np.asarray(_HAZE, np.float32)
    return np.asarray(radiance / 255, dtype=np.float32)


def _photographed(p: Painter, radiance: FloatArray) -> NDArray[np.uint8]:
    """Apply exposure, colour cast, contrast and grain: RGB (H, W, 3)."""
    exposure, contrast, grain = p.rng.uniform(0.65, 1.2), p.rng.uniform(0.1, 0.9), p.rng.uniform(0.01, 0.035)
    exposed = np.clip(radiance * np.float32(exposure * p.rng.normal(1, 0.05, 3)), 0, 1)
    exposed += contrast * (2 * exposed - 1) * exposed * (1 - exposed)
    exposed += grain * p.rng.standard_normal(exposed.shape, dtype=np.float32)
    return np.asarray(np.clip(exposed, 0, 1) * 255 + 0.5, dtype=np.uint8)
