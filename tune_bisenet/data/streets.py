"""The built-in streets: labelled frames of streets that exist nowhere, so that nothing must be downloaded.

A street is laid out in metres (x right, y up from the ground, z ahead of the camera) and seen from a car. All is flat
faces, painted back to front on a plate of face numbers; then the world point under each pixel gives texture and light.
It knows nothing of files, of packing and of training.

    scene -> _lay_out -> _ground, _frontage, _things -> Painter.face     what stands where, whatever the frame's size
          -> _develop -> _world_points, _textured, _lit, _photographed   what a camera makes of it

How much there is of each class follows Cityscapes; `_DEALT`, `_ON_SIDEWALK` and `_ON_ROAD` hold the numbers.
Legend: H x W pixels, P points of an outline.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tune_bisenet.data.classes import NUM_CLASSES, VOID
from tune_bisenet.data.source import SPLITS, Frame, Split

GENERATOR_VERSION: Final = 1  # raise it with every change that moves a byte of any frame: packed copies are made anew

(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN) = range(10)
(SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE) = range(10, NUM_CLASSES)

_DEALT: Final = {WALL: 5, FENCE: 7, RIDER: 2, TRUCK: 1, BUS: 1, TRAIN: 1, MOTORCYCLE: 1}
"""In how many scenes of every dozen a rare class is shown. Dealt, not drawn, so that no split goes without."""

_FOCAL_U, _FOCAL_V, _EYE_METRES = 1.1, 2.2, 1.25  # of frame width, of frame height; Cityscapes: 2262 px of 2048 x 1024
_NEAR_METRES, _FAR_METRES, _ENDLESS_METRES = 1.0, 120.0, 4000.0
_X, _Y, _Z = range(3)

Floats = NDArray[np.float32]
Pair = tuple[float, float]
Outline = Sequence[Pair]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Streets:
    """Procedural streets as a `Source`: the same parameters give the same bytes, in any process."""

    num_train: int = 96
    num_val: int = 24
    frame_size: tuple[int, int] = (96, 192)
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_val) < 1 or min(self.frame_size) < 16 or self.seed < 0:
            raise ValueError(f"{self}: each split needs 1 frame or more, each side 16 pixels or more, seed 0 or more")

    @property
    def name(self) -> str:
        return "streets"

    @property
    def fingerprint(self) -> str:
        return f"{self} v{GENERATOR_VERSION}"

    def names(self, split: Split) -> tuple[str, ...]:
        num_frames = {"train": self.num_train, "val": self.num_val}[split]
        return tuple(f"street_{self.seed}_{split}_{index:06d}" for index in range(num_frames))

    def load(self, split: Split, index: int) -> Frame:
        return scene(self.seed, split, index, size=self.frame_size)


def scene(seed: int, split: Split, index: int, *, size: tuple[int, int]) -> Frame:
    """One street. What stands in it depends on (seed, split, index) only; `size` is (height, width) in pixels."""
    split_number = SPLITS.index(split)
    oversampling = 2 if size[0] <= 512 else 1  # smooths edges where pixels are coarse
    rng = np.random.default_rng([seed, split_number, index])
    painter = Painter(rng, height=size[0] * oversampling, width=size[1] * oversampling)
    _lay_out(painter, _dealt_to(seed, split_number, index))
    return _develop(painter, oversampling)


def _dealt_to(seed: int, split_number: int, index: int) -> set[int]:
    """The rare classes that this scene shows; over every dozen scenes they come out as `_DEALT` says."""
    dozen, place = divmod(index, 12)
    rng = np.random.default_rng([seed, split_number, dozen, 1])  # the 1 keeps it apart from the scenes' own streams
    return {label for label, num_scenes in _DEALT.items() if rng.permutation(12)[place] < num_scenes}


# --- What faces look like.

_STONE: Final = ((150, 142, 128), (122, 86, 72), (186, 174, 152), (112, 112, 114), (168, 134, 104), (200, 196, 190))
_GREYS: Final = ((88, 88, 92), (106, 104, 104), (122, 120, 118))
_LEAVES: Final = ((62, 84, 42), (78, 92, 50), (48, 66, 40), (104, 102, 52), (96, 84, 58))
_GRASS: Final = ((92, 112, 56), (118, 112, 70), (128, 110, 84))
_METAL: Final = ((96, 98, 100), (136, 138, 138), (66, 72, 70))
_LACQUER: Final = ((30, 31, 35), (92, 94, 98), (158, 160, 164), (212, 212, 212), (128, 30, 30), (38, 56, 110))
_LIVERY: Final = ((196, 190, 180), (168, 50, 44), (190, 160, 50), (60, 90, 130), (90, 110, 90), (130, 130, 134))
_CLOTH: Final = ((40, 42, 50), (62, 70, 96), (110, 100, 92), (140, 50, 50), (186, 180, 170), (70, 84, 70))
_SKIN: Final = ((198, 156, 132), (150, 108, 84), (92, 66, 52))
_ENAMEL: Final = ((196, 40, 40), (40, 80, 170), (222, 200, 60), (214, 214, 210))
_LAMPS: Final = ((230, 60, 40), (240, 180, 60), (70, 220, 130))
_HEAVEN: Final = ((232, 236, 240), (110, 156, 220), (190, 198, 206))
_DARK: Final = ((30, 32, 36), (50, 56, 62))
"""RGB, 0 to 255; each thing varies one colour of its palette."""


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


_PLAIN: Final = Texture()
_FOLIAGE: Final = Texture(0.32)
_MASONRY: Final = Texture(0.08, 0.9, 0.4, 0.93, 0.85, between=0.8, variety=0.06)
_FACADE: Final = Texture(0.07, 2.4, 3.1, 0.5, 0.55, cell=0.45, variety=0.2)
_SHOPS: Final = Texture(0.07, 4.1, 3.4, 0.8, 0.7, cell=0.4, variety=0.25)
_PAVING: Final = Texture(0.08, 0.8, 0.8, 0.93, 0.9, between=0.82, variety=0.03)
_SLATS: Final = Texture(0.08, 0.4, 9.0, 0.5, cell=0.6, between=1.1)
_PANES: Final = Texture(0.10, 1.4, 9.0, 0.9, between=2.2, variety=0.2)


@cache
def _noise_tile() -> Floats:
    """Noise with equal power in every octave, (512, 512), mean 0, standard deviation 1; it repeats without a seam."""
    rng, tile = np.random.default_rng(0), np.zeros((512, 512))
    for step in (1, 2, 4, 8, 16, 32, 64, 128):
        layer = np.kron(rng.standard_normal((512 // step, 512 // step)), np.ones((step, step)))
        for axis in (0, 1):
            layer = np.mean([np.roll(layer, shift * step // 4, axis) for shift in range(4)], axis=0)
        tile += layer / layer.std()
    return np.asarray(tile / tile.std(), dtype=np.float32)


class Look(NamedTuple):
    """What a face is, and how it looks before any light falls on it."""

    label: int
    colour: Colour
    texture: Texture = _PLAIN
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
        points = [(*point[:axis], at, *point[axis:]) for point in outline]
        self._draw.polygon([self._pixel(*point) for point in points], fill=len(self.faces))
        self.faces.append((axis, at, *look))

    def box(self, look: Look, x: Pair, y: Pair, z: Pair, *, taper: float = 0.0) -> None:
        """Paint the sides of a box that we see: towards the road and towards us. `taper` metres narrow its top."""
        if min(x) > 0 or max(x) < 0:
            outline = [(y[0], z[0]), (y[0], z[1]), (y[1], z[1] - taper), (y[1], z[0] + taper)]
            self.face(_X, min(x, key=abs), outline, look)
        self.face(_Z, z[0], [(x[0], y[0]), (x[1], y[0]), (x[1] - taper, y[1]), (x[0] + taper, y[1])], look)

    def colour(self, palette: Sequence[Colour]) -> Colour:
        """A colour near one of the palette's."""
        red, green, blue = palette[int(self.rng.integers(len(palette)))]
        brightness, warmth = 1 + 0.12 * self.rng.standard_normal(), 0.04 * self.rng.standard_normal()
        return red * (brightness + warmth), green * brightness, blue * (brightness - warmth)

    def _pixel(self, *point: float) -> Pair:
        x, y, z = point
        across, down = _FOCAL_U * x / max(z, _NEAR_METRES), _FOCAL_V * (_EYE_METRES - y) / max(z, _NEAR_METRES)
        width, height = self.plate.size
        return (self.vanishing_point[0] + across) * width, (self.vanishing_point[1] + down) * height


Thing = Callable[[Painter, float, float], None]
"""Paints one whose foot is at (x, z)."""


def _rectangle(a: Pair, b: Pair) -> Outline:
    return [(a[0], b[0]), (a[1], b[0]), (a[1], b[1]), (a[0], b[1])]


def _round(x: float, y: float, radii: float | Pair, spokes: NDArray[np.float64] | float = 1.0) -> Outline:
    """16 points around (x, y); `spokes` stretch the radii, one for each point."""
    across, up = np.broadcast_to(radii, 2)
    angles = np.arange(16) * (np.pi / 8)
    points = np.stack([x + across * spokes * np.cos(angles), y + up * spokes * np.sin(angles)], axis=1)
    return [(float(a), float(b)) for a, b in points]


Figure = Sequence[tuple[int, Sequence[Colour], Outline]]
"""A flat upright thing; of each part its class, its colours, and its outline in metres from the figure's foot."""

_PERSON: Final[Figure] = (
    (PERSON, _CLOTH, [(-0.22, 0), (-0.06, 0), (0.02, 0.7), (0.14, 0), (0.3, 0), (0.2, 0.95), (-0.2, 0.95)]),
    (PERSON, _CLOTH, [(-0.2, 0.85), (0.2, 0.85), (0.32, 0.8), (0.25, 1.45), (-0.25, 1.45), (-0.32, 0.8)]),
    (PERSON, _SKIN, _round(0, 1.6, 0.14)),
)
_BICYCLE: Final[Figure] = (
    *((BICYCLE, rim, _round(hub, 0.35, r)) for rim, r in ((_DARK, 0.35), (_GREYS, 0.27)) for hub in (-0.5, 0.5)),
    (BICYCLE, _LIVERY, [(-0.53, 0.35), (-0.2, 0.9), (0.36, 0.95), (0.5, 0.35), (0.3, 0.8), (-0.05, 0.3)]),
)
_MOTORCYCLE: Final[Figure] = (
    *((MOTORCYCLE, _DARK, _round(hub, 0.32, 0.34)) for hub in (-0.7, 0.7)),
    (MOTORCYCLE, _METAL, [(-0.6, 0.3), (0.5, 0.25), (0.65, 0.75), (-0.7, 0.75)]),
    (MOTORCYCLE, _LACQUER, [(-0.95, 0.75), (-0.1, 0.7), (0.2, 0.6), (0.8, 0.6), (0.45, 1.1), (0.0, 0.95)]),
)
_RIDER: Final[Figure] = (
    (RIDER, _CLOTH, [(-0.3, 0.85), (0.1, 0.25), (0.22, 0.3), (0.15, 0.95), (-0.1, 1.0)]),
    (RIDER, _CLOTH, [(-0.35, 0.85), (0.0, 0.85), (0.2, 1.2), (0.5, 1.0), (0.25, 1.5), (0.0, 1.5)]),
    (RIDER, _SKIN + _LIVERY, _round(0.2, 1.65, 0.15)),
)
_POST: Final[Figure] = ((POLE, _METAL, _rectangle((-0.1, 0.1), (0, 3))),)
_LAMP_POST: Final[Figure] = tuple((POLE, _METAL, _rectangle(*ab)) for ab in (((-0.1, 0.1), (0, 8)), ((0, 2), (7.8, 8))))
_ROUND_SIGN: Final[Figure] = (*_POST, *((SIGN, _ENAMEL, _round(0, 2.8, radius)) for radius in (0.45, 0.25)))
_PANEL: Final[Figure] = (*_POST, *((SIGN, _ENAMEL, _rectangle((-r, r), (2.7 - r, 2.7 + 2 * r))) for r in (0.42, 0.2)))
_LIGHTS: Final[Figure] = tuple((LIGHT, (lamp,), _round(0, 3.2 - 0.35 * i, 0.13)) for i, lamp in enumerate(_LAMPS))
_TRAFFIC_LIGHT: Final[Figure] = (*_POST, (LIGHT, _DARK, _rectangle((-0.22, 0.22), (2.3, 3.4))), *_LIGHTS)
_BIN: Final[Figure] = ((VOID, _METAL + _LIVERY, [(-0.3, 0), (0.3, 0), (0.36, 1.1), (-0.36, 1.1)]),)


def _figure(p: Painter, x: float, z: float, *, figure: Figure) -> None:
    """Paint the parts one over another; the figure is turned a little and may look left or right."""
    narrow = float(p.rng.choice((-1, 1)) * p.rng.uniform(0.6, 1.0))
    for label, palette, outline in figure:
        p.face(_Z, z, [(x + narrow * across, up) for across, up in outline], Look(label, p.colour(palette)))


Stack = Sequence[tuple[tuple[Colour, ...], float, Pair, Pair, float, Texture]]
"""A vehicle's layers: colours, half the width, heights, setbacks from its two ends, how far it tapers, texture."""

_CAR: Final[Stack] = (
    (_LACQUER, 0.9, (0.25, 0.95), (0.0, 0.0), 0.05, _PLAIN),
    (_DARK, 0.82, (0.94, 1.44), (0.2, 1.2), 0.22, _PANES),
    (_LACQUER, 0.62, (1.4, 1.5), (0.45, 1.5), 0.05, _PLAIN),
)
_TRUCK: Final[Stack] = ((_DARK, 1.1, (0.3, 0.9), (0, 0), 0, _SLATS), (_LIVERY, 1.25, (0.7, 3.5), (0, 1.8), 0, _PLAIN))
_BUS: Final[Stack] = ((_LIVERY, 1.25, (0.3, 3.1), (0, 0), 0, _PLAIN), (_DARK, 1.23, (1.4, 2.6), (0, 0), 0.05, _PANES))
_TRAIN: Final[Stack] = ((_LIVERY, 1.3, (0.2, 3.5), (0, 0), 0.3, _PLAIN), (_DARK, 1.2, (1.7, 2.8), (0, 0), 0.2, _PANES))


def _vehicle(p: Painter, x: float, z: float, *, label: int, stack: Stack, length: float) -> None:
    """Paint shadow, layers (one palette, one colour), lamps, wheels. Left of our lane they come towards us."""
    p.face(_Y, 0, _rectangle((x - 1.1, x + 1.1), (z - 0.3, z + length)), Look(ROAD, (42, 41, 42)))
    colours, oncoming = {palette: p.colour(palette) for palette, *_ in stack[:2]}, x < -1.5
    tyre, lamp = Look(label, _DARK[0]), Look(label, _ENAMEL[3] if oncoming else _LAMPS[0])
    for palette, half, heights, setbacks, taper, texture in stack:
        near, far = reversed(setbacks) if oncoming else setbacks
        look = Look(label, colours[palette], texture)
        p.box(look, (x - half, x + half), heights, (z + near, z + length - far), taper=taper)
    for outer in (x - 0.85, x + 0.6):
        p.face(_Z, z, _rectangle((outer, outer + 0.25), (0, 0.3)), tyre)
        p.face(_Z, z, _rectangle((outer, outer + 0.25), (0.65, 0.88)), lamp)
    for hub in (z + 0.8, z + length - 0.8) if abs(x) > 1.3 else ():
        p.face(_X, x - float(np.sign(x)) * stack[0][1], _round(0.33, hub, 0.33), tyre)


def _tree(p: Painter, x: float, z: float) -> None:
    height, radius = p.rng.uniform(5, 10), p.rng.uniform(1.4, 2.8)
    p.face(_Z, z, _rectangle((x - 0.16, x + 0.16), (0, 0.7 * height)), Look(VEGETATION, (76, 66, 56), _MASONRY))
    _leaves(p, x, 0.7 * height, z, radii=(radius, 0.3 * height))


def _leaves(p: Painter, x: float, y: float, z: float, *, radii: Pair) -> None:
    """A crown or a bush: ragged clumps of one colour, the upper ones in more light."""
    red, green, blue = p.colour(_LEAVES)
    for light in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2):
        across, up = p.rng.uniform(-0.5, 0.5), light - 1 + p.rng.uniform(-0.3, 0.3)
        look = Look(VEGETATION, (red * light, green * light, blue * light), _FOLIAGE, 400 / (z + 10))
        spokes = 0.7 + 0.12 * p.rng.standard_normal(16)
        p.face(_Z, z, _round(x + across * radii[0], y + up * radii[1], radii, spokes), look)


_ON_SIDEWALK: Final[Sequence[tuple[Thing, float, Pair, Pair]]] = (
    (_tree, 2.0, (0.8, 1.4), (11, 60)),
    (partial(_figure, figure=_LAMP_POST), 1.2, (0.4, 0.6), (8, 60)),
    (partial(_figure, figure=_ROUND_SIGN), 0.45, (0.4, 0.7), (9, 40)),
    (partial(_figure, figure=_PANEL), 0.5, (0.4, 0.7), (9, 40)),
    (partial(_figure, figure=_TRAFFIC_LIGHT), 0.5, (0.4, 0.7), (9, 40)),
    (partial(_figure, figure=_PERSON), 3.2, (0.3, 3.5), (9, 35)),
    (partial(_figure, figure=_BICYCLE), 0.55, (0.5, 3.0), (9, 30)),
    (partial(_figure, figure=_BIN), 0.4, (0.6, 1.5), (9, 40)),
)
"""What, how many to expect on each side, how far from the kerb and how far ahead."""

_ON_ROAD: Final[dict[int, tuple[Thing, Pair]]] = {
    CAR: (partial(_vehicle, label=CAR, stack=_CAR, length=4.3), (14, 60)),
    RIDER: (partial(_figure, figure=[*_BICYCLE, *_RIDER]), (10, 20)),
    MOTORCYCLE: (partial(_figure, figure=[*_MOTORCYCLE, *_RIDER]), (10, 19)),
    TRUCK: (partial(_vehicle, label=TRUCK, stack=_TRUCK, length=9.0), (18, 30)),
    BUS: (partial(_vehicle, label=BUS, stack=_BUS, length=11.0), (18, 30)),
    TRAIN: (partial(_vehicle, label=TRAIN, stack=_TRAIN, length=28.0), (20, 34)),
}
"""What goes along the carriageway, and how far ahead."""


def _lay_out(p: Painter, dealt: set[int]) -> None:
    """Paint a street from the sky down to the bonnet."""
    kerbs = {-1: p.rng.uniform(4.2, 6.8), 1: p.rng.uniform(2.2, 4.8)}  # metres left and right of the camera
    _ground(p, kerbs)
    sides = dict(zip((-1, 1), p.rng.permutation((WALL, FENCE)).tolist(), strict=True))
    for side, kerb in kerbs.items():
        _frontage(p, side, kerb, sides[side] if sides[side] in dealt else VEGETATION)
    for thing, x, z in sorted(_things(p, kerbs, dealt), key=lambda placed: -placed[2]):
        thing(p, x, z)
    frame_bottom = _EYE_METRES - (1 - p.vanishing_point[1]) / _FOCAL_V  # at one metre ahead
    bonnet = _round(0, frame_bottom - 0.1, (p.rng.uniform(0.6, 0.8), p.rng.uniform(0.12, 0.14)))
    p.face(_Z, 1.0, bonnet, Look(VOID, p.colour(_LACQUER), texels_per_metre=200))


def _ground(p: Painter, kerbs: dict[int, float]) -> None:
    """Sky, what closes the street, pavement everywhere, the carriageway on it, and the markings on that."""
    sky = _rectangle((-9e6, 9e6), (_NEAR_METRES, 9e6))
    p.face(_Y, 200, sky, Look(SKY, p.colour(_HEAVEN), Texture(0.12), texels_per_metre=0.05))
    for x in range(-60, 60, 12):
        house = _rectangle((x, x + 12), (0, p.rng.uniform(5, 16)))
        p.face(_Z, _FAR_METRES, house, Look(BUILDING, p.colour(_STONE), _FACADE))
        _leaves(p, x + p.rng.uniform(0, 12), 3, _FAR_METRES, radii=(9, p.rng.uniform(3, 9)))
    p.face(_Z, _FAR_METRES, _rectangle((-5, 5), (0, 3)), Look(VOID, p.colour(_GREYS)))  # what nobody can name
    left, right, whole = -kerbs[-1], kerbs[1], (_NEAR_METRES, 400.0)
    p.face(_Y, 0, _rectangle((-300, 300), whole), Look(SIDEWALK, p.colour(_GREYS), _PAVING))
    p.face(_Y, 0, _rectangle((left - 0.25, right + 0.25), whole), Look(SIDEWALK, p.colour(_STONE)))
    p.face(_Y, 0, _rectangle((left, right), whole), Look(ROAD, p.colour(_GREYS)))
    crossing, chalk = p.rng.uniform(7, 40), Look(ROAD, p.colour(((176, 174, 168),)))
    for ahead in range(1, 80, 6):
        p.face(_Y, 0, _rectangle((-1.75, -1.6), (ahead, ahead + 3)), chalk)
    for stripe in np.arange(left + 0.3, right - 0.5, 1.0).tolist() if crossing < 16 else ():
        p.face(_Y, 0, _rectangle((stripe, stripe + 0.5), (crossing, crossing + 3)), chalk)


def _frontage(p: Painter, side: int, kerb: float, barrier: int) -> None:
    """Line one side with plots, the far ones first; the garden nearest to us has the `barrier`, others a hedge."""
    line, borders = kerb + p.rng.uniform(4.5, 9.5), np.cumsum(p.rng.uniform(8, 20, 14)).tolist()
    for number in reversed(range(13)):
        z, kind = (borders[number], borders[number + 1] - 0.3), p.rng.random()
        if kind < 0.25 or (number == 1 and barrier != VEGETATION):
            _garden(p, side, line, z, barrier if number <= 2 else VEGETATION)
        elif kind < 0.9:
            _house(p, side, line, z)
        else:  # a side street
            p.face(_Y, 0, _rectangle((side * line, side * 200), z), Look(ROAD, p.colour(_GREYS)))
    if p.rng.random() < 0.35:
        verge = _rectangle((side * kerb, side * (kerb + p.rng.uniform(0.6, 1.6))), (8, 400))
        p.face(_Y, 0, verge, Look(TERRAIN, p.colour(_GRASS), _FOLIAGE))


def _house(p: Painter, side: int, line: float, z: Pair) -> None:
    x, height = (side * (line + p.rng.uniform(0, 1)), side * (line + 14)), p.rng.uniform(10, 25)
    texture, shops = ((_FACADE, _SHOPS), (_FACADE, _FACADE), (_MASONRY, _SHOPS))[p.rng.integers(3)]
    p.box(Look(BUILDING, p.colour(_STONE), texture), x, (0, height), z)
    p.box(Look(BUILDING, p.colour(_STONE), shops), x, (0, 3.4), z)


def _garden(p: Painter, side: int, line: float, z: Pair, barrier: int) -> None:
    """Grass and trees behind a wall, a fence or a hedge, at times with a house at the back."""
    p.face(_Y, 0, _rectangle((side * (line - 1.2), side * 60), z), Look(TERRAIN, p.colour(_GRASS), _FOLIAGE))
    if p.rng.random() < 0.6:
        _house(p, side, line + 6, z)
    for _ in range(p.rng.integers(1, 4)):
        _tree(p, side * (line + p.rng.uniform(1.5, 5)), p.rng.uniform(*z))
    made_of = {WALL: (_STONE, _MASONRY), FENCE: (_METAL + _STONE, _SLATS), VEGETATION: (_LEAVES, _FOLIAGE)}
    palette, texture = made_of[barrier]
    p.box(Look(barrier, p.colour(palette), texture), (side * line, side * (line + 0.4)), (0, p.rng.uniform(1.4, 3)), z)


def _things(p: Painter, kerbs: dict[int, float], dealt: set[int]) -> Iterator[tuple[Thing, float, float]]:
    """Everything that stands on sidewalk or road, in no order: what, x, z."""
    for side, kerb in kerbs.items():
        for thing, mean_number, from_kerb, ahead in _ON_SIDEWALK:
            for _ in range(p.rng.poisson(mean_number)):
                yield thing, side * (kerb + p.rng.uniform(*from_kerb)), p.rng.uniform(*ahead)
        if kerb > 3.4 and p.rng.random() < 0.7:  # there is room to park
            for z in np.arange(p.rng.uniform(8, 14), 60, 5.8):
                if p.rng.random() < 0.65:
                    yield _ON_ROAD[CAR][0], side * (kerb - 1.1), float(z)
    for label in [CAR] * int(p.rng.integers(3)) + sorted(dealt & _ON_ROAD.keys()):
        thing, ahead = _ON_ROAD[label]
        yield thing, p.rng.choice((-3.0, 0.0)) + p.rng.uniform(-0.3, 0.3), p.rng.uniform(*ahead)


def _develop(p: Painter, oversampling: int) -> Frame:
    """Light the face of every pixel, and take the picture."""
    numbers = np.asarray(p.plate)
    faces = np.array(p.faces, dtype=_FACE)[numbers]
    points = _world_points(p, faces)
    radiance = _lit(p, faces, points, _textured(numbers, faces, points))
    middle = slice(oversampling // 2, None, oversampling)
    label = np.ascontiguousarray(faces["label"][middle, middle])
    radiance = radiance.reshape(len(label), oversampling, -1, oversampling, 3).mean(axis=(1, 3))
    return Frame(_photographed(p, radiance), label)


def _world_points(p: Painter, faces: NDArray[np.void]) -> Floats:
    """Where each pixel's ray meets the plane of its face: x, y, z in metres, (3, H, W)."""
    height, width = faces.shape
    u = ((np.arange(width) + 0.5) / width - p.vanishing_point[0]) / _FOCAL_U
    v = (p.vanishing_point[1] - (np.arange(height) + 0.5) / height) / _FOCAL_V
    ray = np.stack(np.broadcast_arrays(u, v[:, None], 1.0)).astype(np.float32)
    reach = faces["at"] - np.where(faces["axis"] == _Y, np.float32(_EYE_METRES), np.float32(0))
    along = np.choose(faces["axis"], ray)
    along[np.abs(along) < 1e-4] = 1e-4  # edge-on: an endless way off
    points = ray * np.clip(reach / along, _NEAR_METRES, _ENDLESS_METRES)
    points[_Y] += _EYE_METRES
    return np.asarray(points)


def _textured(numbers: NDArray[np.int32], faces: NDArray[np.void], points: Floats) -> Floats:
    """The brightness factor of every pixel's texture, (H, W)."""
    across = np.where(faces["axis"] == _X, points[_Z], points[_X])
    up = np.where(faces["axis"] == _Y, points[_Z], points[_Y])
    texels, tile = faces["texels"], _noise_tile()
    noise = tile[(up * texels).astype(int) + 37 * numbers & 511, (across * texels).astype(int) + 91 * numbers & 511]
    texture = Texture(*np.moveaxis(faces["texture"], -1, 0))
    column, row = across / texture.pitch_across, up / texture.pitch_up
    in_cell = np.abs(column % 1 - 0.5) <= texture.share_across / 2
    in_cell &= np.abs(row % 1 - 0.5) <= texture.share_up / 2
    cell = texture.cell + texture.variety * tile[column.astype(int) * 37 & 511, row.astype(int) * 91 & 511]
    return np.asarray(np.where(in_cell, cell, texture.between) * (1 + texture.roughness * noise))


def _lit(p: Painter, faces: NDArray[np.void], points: Floats, brightness: Floats) -> Floats:
    """Sun, shadow and haze on the faces' colours, (H, W, 3), 0 to about 1."""
    sun, sun_side, visibility = p.rng.uniform(0, 0.5), p.rng.choice((-1, 1)), p.rng.uniform(200, 2000)
    turned_away = (faces["axis"] == _X) & (faces["at"] * sun_side > 0)
    roofline = p.rng.uniform(-4, 6) + 1.5 * _noise_tile()[0][np.clip(points[_Z] * 6, 0, 511).astype(int)]
    in_shadow = (points[_X] * sun_side > roofline) & (points[_Y] < 0.01)
    light = brightness * (1 + sun * np.where(turned_away | in_shadow, np.float32(-0.9), np.float32(0.4)))
    haze = (points[_Z] / (points[_Z] + visibility))[..., None]
    radiance = faces["colour"] * light[..., None] * (1 - haze) + haze * np.asarray(_HEAVEN[2], np.float32)
    return np.asarray(radiance / 255, dtype=np.float32)


def _photographed(p: Painter, radiance: Floats) -> NDArray[np.uint8]:
    """Exposure, colour cast, contrast and grain: RGB (H, W, 3)."""
    exposure, contrast, grain = p.rng.uniform(0.65, 1.2), p.rng.uniform(0.1, 0.9), p.rng.uniform(0.01, 0.035)
    exposed = np.clip(radiance * np.float32(exposure * p.rng.normal(1, 0.05, 3)), 0, 1)
    exposed += contrast * (2 * exposed - 1) * exposed * (1 - exposed)
    exposed += grain * p.rng.standard_normal(exposed.shape, dtype=np.float32)
    return np.asarray(np.clip(exposed, 0, 1) * 255 + 0.5, dtype=np.uint8)
