"""The built-in streets: labelled frames of invented streets, so that nothing needs to be downloaded.

A street is laid out in metres (x right, y up from the ground, z ahead of the camera) and seen from a car. This module
decides what is where; `painter` makes it look like a picture. It knows nothing of files, of packing and of training.

How much there is of each class follows Cityscapes; `_DEALT`, `_ON_SIDEWALK` and `_ON_ROAD` hold the numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from tune_bisenet.classes import CITYSCAPES, VOID, ClassSet
from tune_bisenet.data.painter import (
    EYE_METRES,
    FOCAL_V,
    NEAR_METRES,
    PLAIN,
    Colour,
    FloatPair,
    Look,
    Outline,
    Painter,
    Texture,
    X,
    Y,
    Z,
    develop,
    rectangle,
    rounded,
)
from tune_bisenet.data.source import SPLITS, Frame, Split

GENERATOR_VERSION: Final = 1  # raise it with every change that moves a byte of any frame: every pack is made again

(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN) = range(10)
(SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE) = range(10, len(CITYSCAPES))

_DEALT: Final = {WALL: 5, FENCE: 7, RIDER: 2, TRUCK: 1, BUS: 1, TRAIN: 1, MOTORCYCLE: 1}
"""In how many scenes of every dozen a rare class is shown. Dealt, not drawn, so that no split lacks one."""

STONE: Final = ((150, 142, 128), (122, 86, 72), (186, 174, 152), (112, 112, 114), (168, 134, 104), (200, 196, 190))
GREYS: Final = ((88, 88, 92), (106, 104, 104), (122, 120, 118))
LEAVES: Final = ((62, 84, 42), (78, 92, 50), (48, 66, 40), (104, 102, 52), (96, 84, 58))
GRASS: Final = ((92, 112, 56), (118, 112, 70), (128, 110, 84))
METAL: Final = ((96, 98, 100), (136, 138, 138), (66, 72, 70))
LACQUER: Final = ((30, 31, 35), (92, 94, 98), (158, 160, 164), (212, 212, 212), (128, 30, 30), (38, 56, 110))
LIVERY: Final = ((196, 190, 180), (168, 50, 44), (190, 160, 50), (60, 90, 130), (90, 110, 90), (130, 130, 134))
CLOTH: Final = ((40, 42, 50), (62, 70, 96), (110, 100, 92), (140, 50, 50), (186, 180, 170), (70, 84, 70))
SKIN: Final = ((198, 156, 132), (150, 108, 84), (92, 66, 52))
ENAMEL: Final = ((196, 40, 40), (40, 80, 170), (222, 200, 60), (214, 214, 210))
LAMPS: Final = ((230, 60, 40), (240, 180, 60), (70, 220, 130))
HEAVEN: Final = ((232, 236, 240), (110, 156, 220), (190, 198, 206))
DARK: Final = ((30, 32, 36), (50, 56, 62))
"""RGB, 0 to 255; each thing varies one colour of its palette."""

FOLIAGE: Final = Texture(0.32)
MASONRY: Final = Texture(0.08, 0.9, 0.4, 0.93, 0.85, between=0.8, variety=0.06)
FACADE: Final = Texture(0.07, 2.4, 3.1, 0.5, 0.55, cell=0.45, variety=0.2)
SHOPS: Final = Texture(0.07, 4.1, 3.4, 0.8, 0.7, cell=0.4, variety=0.25)
PAVING: Final = Texture(0.08, 0.8, 0.8, 0.93, 0.9, between=0.82, variety=0.03)
SLATS: Final = Texture(0.08, 0.4, 9.0, 0.5, cell=0.6, between=1.1)
PANES: Final = Texture(0.10, 1.4, 9.0, 0.9, between=2.2, variety=0.2)

_FAR_METRES: Final = 120.0  # here the street is closed


@dataclass(frozen=True)
class Streets:
    """A `Source` of procedural streets: the same parameters give the same bytes, in any process."""

    num_train: int = 96
    num_val: int = 24
    frame_size: tuple[int, int] = (96, 192)
    seed: int = 0

    @property
    def name(self) -> str:
        return "streets"

    @property
    def fingerprint(self) -> str:
        return f"{self} v{GENERATOR_VERSION}"

    @property
    def frame_sizes(self) -> Mapping[Split, Sequence[tuple[int, int]]]:
        return {}

    @property
    def classes(self) -> ClassSet:
        return CITYSCAPES

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def names(self, split: Split) -> tuple[str, ...]:
        num_frames = {"train": self.num_train, "val": self.num_val}[split]
        return tuple(f"street_{self.seed}_{split}_{index:06d}" for index in range(num_frames))

    def describe_labels(self, split: Split) -> tuple[str, bool]:
        return f"They are drawn: {split} streets hold trainIds.", False

    def load(self, split: Split, index: int) -> Frame:
        return scene(self.seed, split, index, size=self.frame_size)


def scene(seed: int, split: Split, index: int, *, size: tuple[int, int]) -> Frame:
    """Draw one street. Its content depends on (seed, split, index) only; `size` is (height, width) in pixels."""
    split_number = SPLITS.index(split)
    oversampling = 2 if size[0] <= 512 else 1  # smooths edges where pixels are coarse
    rng = np.random.default_rng([seed, split_number, index])
    painter = Painter(rng, height=size[0] * oversampling, width=size[1] * oversampling)
    dozen, number = divmod(index, 12)
    dealer = np.random.default_rng([seed, split_number, dozen, 1])  # the 1 keeps it apart from the scenes' own streams
    _lay_out(painter, {label for label, share in _DEALT.items() if dealer.permutation(12)[number] < share})
    return develop(painter, oversampling)


PaintAt = Callable[[Painter, float, float], None]
"""Paints an object whose foot is at (x, z)."""

FlatFigure = Sequence[tuple[int, Sequence[Colour], Outline]]
"""A flat upright thing; of each part its class, its colours, and its outline in metres from the figure's foot."""

_PERSON: Final[FlatFigure] = (
    (PERSON, CLOTH, [(-0.22, 0), (-0.06, 0), (0.02, 0.7), (0.14, 0), (0.3, 0), (0.2, 0.95), (-0.2, 0.95)]),
    (PERSON, CLOTH, [(-0.2, 0.85), (0.2, 0.85), (0.32, 0.8), (0.25, 1.45), (-0.25, 1.45), (-0.32, 0.8)]),
    (PERSON, SKIN, rounded(0, 1.6, 0.14)),
)
_BICYCLE: Final[FlatFigure] = (
    *((BICYCLE, rim, rounded(hub, 0.35, r)) for rim, r in ((DARK, 0.35), (GREYS, 0.27)) for hub in (-0.5, 0.5)),
    (BICYCLE, LIVERY, [(-0.53, 0.35), (-0.2, 0.9), (0.36, 0.95), (0.5, 0.35), (0.3, 0.8), (-0.05, 0.3)]),
)
_MOTORCYCLE: Final[FlatFigure] = (
    *((MOTORCYCLE, DARK, rounded(hub, 0.32, 0.34)) for hub in (-0.7, 0.7)),
    (MOTORCYCLE, METAL, [(-0.6, 0.3), (0.5, 0.25), (0.65, 0.75), (-0.7, 0.75)]),
    (MOTORCYCLE, LACQUER, [(-0.95, 0.75), (-0.1, 0.7), (0.2, 0.6), (0.8, 0.6), (0.45, 1.1), (0.0, 0.95)]),
)
_RIDER: Final[FlatFigure] = (
    (RIDER, CLOTH, [(-0.3, 0.85), (0.1, 0.25), (0.22, 0.3), (0.15, 0.95), (-0.1, 1.0)]),
    (RIDER, CLOTH, [(-0.35, 0.85), (0.0, 0.85), (0.2, 1.2), (0.5, 1.0), (0.25, 1.5), (0.0, 1.5)]),
    (RIDER, SKIN + LIVERY, rounded(0.2, 1.65, 0.15)),
)
_POST: Final[FlatFigure] = ((POLE, METAL, rectangle((-0.1, 0.1), (0, 3))),)
_LAMP_POST: Final[FlatFigure] = tuple(
    (POLE, METAL, rectangle(*ab)) for ab in (((-0.1, 0.1), (0, 8)), ((0, 2), (7.8, 8)))
)
_ROUND_SIGN: Final[FlatFigure] = (*_POST, *((SIGN, ENAMEL, rounded(0, 2.8, radius)) for radius in (0.45, 0.25)))
_PANEL: Final[FlatFigure] = (*_POST, *((SIGN, ENAMEL, rectangle((-r, r), (2.7 - r, 2.7 + 2 * r))) for r in (0.42, 0.2)))
_LIGHTS: Final[FlatFigure] = tuple((LIGHT, (lamp,), rounded(0, 3.2 - 0.35 * i, 0.13)) for i, lamp in enumerate(LAMPS))
_TRAFFIC_LIGHT: Final[FlatFigure] = (*_POST, (LIGHT, DARK, rectangle((-0.22, 0.22), (2.3, 3.4))), *_LIGHTS)
_BIN: Final[FlatFigure] = ((VOID, METAL + LIVERY, [(-0.3, 0), (0.3, 0), (0.36, 1.1), (-0.36, 1.1)]),)


def _figure(p: Painter, x: float, z: float, *, figure: FlatFigure) -> None:
    """Paint the parts one over another; the figure is turned a little and may look left or right."""
    narrow = float(p.rng.choice((-1, 1)) * p.rng.uniform(0.6, 1.0))
    for label, palette, outline in figure:
        p.face(Z, z, [(x + narrow * across, up) for across, up in outline], Look(label, p.colour(palette)))


Stack = Sequence[tuple[tuple[Colour, ...], float, FloatPair, FloatPair, float, Texture]]
"""A vehicle's layers: colours, half the width, heights, setbacks from its two ends, how far it tapers, texture."""

_CAR: Final[Stack] = (
    (LACQUER, 0.9, (0.25, 0.95), (0.0, 0.0), 0.05, PLAIN),
    (DARK, 0.82, (0.94, 1.44), (0.2, 1.2), 0.22, PANES),
    (LACQUER, 0.62, (1.4, 1.5), (0.45, 1.5), 0.05, PLAIN),
)
_TRUCK: Final[Stack] = ((DARK, 1.1, (0.3, 0.9), (0, 0), 0, SLATS), (LIVERY, 1.25, (0.7, 3.5), (0, 1.8), 0, PLAIN))
_BUS: Final[Stack] = ((LIVERY, 1.25, (0.3, 3.1), (0, 0), 0, PLAIN), (DARK, 1.23, (1.4, 2.6), (0, 0), 0.05, PANES))
_TRAIN: Final[Stack] = ((LIVERY, 1.3, (0.2, 3.5), (0, 0), 0.3, PLAIN), (DARK, 1.2, (1.7, 2.8), (0, 0), 0.2, PANES))


def _vehicle(p: Painter, x: float, z: float, *, label: int, stack: Stack, length: float) -> None:
    """Paint shadow, layers (one palette, one colour), lamps, wheels. Left of our lane they come towards us."""
    p.face(Y, 0, rectangle((x - 1.1, x + 1.1), (z - 0.3, z + length)), Look(ROAD, (42, 41, 42)))
    colours, oncoming = {palette: p.colour(palette) for palette, *_ in stack[:2]}, x < -1.5
    tyre, lamp = Look(label, DARK[0]), Look(label, ENAMEL[3] if oncoming else LAMPS[0])
    for palette, half, heights, setbacks, taper, texture in stack:
        near, far = reversed(setbacks) if oncoming else setbacks
        look = Look(label, colours[palette], texture)
        p.box(look, (x - half, x + half), heights, (z + near, z + length - far), taper=taper)
    for outer in (x - 0.85, x + 0.6):
        p.face(Z, z, rectangle((outer, outer + 0.25), (0, 0.3)), tyre)
        p.face(Z, z, rectangle((outer, outer + 0.25), (0.65, 0.88)), lamp)
    for hub in (z + 0.8, z + length - 0.8) if abs(x) > 1.3 else ():
        p.face(X, x - float(np.sign(x)) * stack[0][1], rounded(0.33, hub, 0.33), tyre)


def _tree(p: Painter, x: float, z: float) -> None:
    height, radius = p.rng.uniform(5, 10), p.rng.uniform(1.4, 2.8)
    p.face(Z, z, rectangle((x - 0.16, x + 0.16), (0, 0.7 * height)), Look(VEGETATION, (76, 66, 56), MASONRY))
    _leaves(p, x, 0.7 * height, z, radii=(radius, 0.3 * height))


def _leaves(p: Painter, x: float, y: float, z: float, *, radii: FloatPair) -> None:
    """Paint a crown or a bush: ragged clumps of one colour, the upper ones in more light."""
    red, green, blue = p.colour(LEAVES)
    for light in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2):
        across, up = p.rng.uniform(-0.5, 0.5), light - 1 + p.rng.uniform(-0.3, 0.3)
        look = Look(VEGETATION, (red * light, green * light, blue * light), FOLIAGE, 400 / (z + 10))
        spokes = 0.7 + 0.12 * p.rng.standard_normal(16)
        p.face(Z, z, rounded(x + across * radii[0], y + up * radii[1], radii, spokes), look)


_ON_SIDEWALK: Final[Sequence[tuple[PaintAt, float, FloatPair, FloatPair]]] = (
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

_ON_ROAD: Final[dict[int, tuple[PaintAt, FloatPair]]] = {
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
    frame_bottom = EYE_METRES - (1 - p.vanishing_point[1]) / FOCAL_V  # at one metre ahead
    bonnet = rounded(0, frame_bottom - 0.1, (p.rng.uniform(0.6, 0.8), p.rng.uniform(0.12, 0.14)))
    p.face(Z, 1.0, bonnet, Look(VOID, p.colour(LACQUER), texels_per_metre=200))


def _ground(p: Painter, kerbs: dict[int, float]) -> None:
    """Paint the sky, what closes the street, pavement everywhere, the carriageway on it, and the markings on that."""
    sky = rectangle((-9e6, 9e6), (NEAR_METRES, 9e6))
    p.face(Y, 200, sky, Look(SKY, p.colour(HEAVEN), Texture(0.12), texels_per_metre=0.05))
    for x in range(-60, 60, 12):
        house = rectangle((x, x + 12), (0, p.rng.uniform(5, 16)))
        p.face(Z, _FAR_METRES, house, Look(BUILDING, p.colour(STONE), FACADE))
        _leaves(p, x + p.rng.uniform(0, 12), 3, _FAR_METRES, radii=(9, p.rng.uniform(3, 9)))
    p.face(Z, _FAR_METRES, rectangle((-5, 5), (0, 3)), Look(VOID, p.colour(GREYS)))  # nameless, so void
    left, right, whole = -kerbs[-1], kerbs[1], (NEAR_METRES, 400.0)
    p.face(Y, 0, rectangle((-300, 300), whole), Look(SIDEWALK, p.colour(GREYS), PAVING))
    p.face(Y, 0, rectangle((left - 0.25, right + 0.25), whole), Look(SIDEWALK, p.colour(STONE)))
    p.face(Y, 0, rectangle((left, right), whole), Look(ROAD, p.colour(GREYS)))
    crossing, chalk = p.rng.uniform(7, 40), Look(ROAD, p.colour(((176, 174, 168),)))
    for ahead in range(1, 80, 6):
        p.face(Y, 0, rectangle((-1.75, -1.6), (ahead, ahead + 3)), chalk)
    for stripe in np.arange(left + 0.3, right - 0.5, 1.0).tolist() if crossing < 16 else ():
        p.face(Y, 0, rectangle((stripe, stripe + 0.5), (crossing, crossing + 3)), chalk)


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
            p.face(Y, 0, rectangle((side * line, side * 200), z), Look(ROAD, p.colour(GREYS)))
    if p.rng.random() < 0.35:
        verge = rectangle((side * kerb, side * (kerb + p.rng.uniform(0.6, 1.6))), (8, 400))
        p.face(Y, 0, verge, Look(TERRAIN, p.colour(GRASS), FOLIAGE))


def _house(p: Painter, side: int, line: float, z: FloatPair) -> None:
    x, height = (side * (line + p.rng.uniform(0, 1)), side * (line + 14)), p.rng.uniform(10, 25)
    texture, shops = ((FACADE, SHOPS), (FACADE, FACADE), (MASONRY, SHOPS))[p.rng.integers(3)]
    p.box(Look(BUILDING, p.colour(STONE), texture), x, (0, height), z)
    p.box(Look(BUILDING, p.colour(STONE), shops), x, (0, 3.4), z)


def _garden(p: Painter, side: int, line: float, z: FloatPair, barrier: int) -> None:
    """Paint grass and trees behind a wall, a fence or a hedge, at times with a house at the back."""
    p.face(Y, 0, rectangle((side * (line - 1.2), side * 60), z), Look(TERRAIN, p.colour(GRASS), FOLIAGE))
    if p.rng.random() < 0.6:
        _house(p, side, line + 6, z)
    for _ in range(p.rng.integers(1, 4)):
        _tree(p, side * (line + p.rng.uniform(1.5, 5)), p.rng.uniform(*z))
    made_of = {WALL: (STONE, MASONRY), FENCE: (METAL + STONE, SLATS), VEGETATION: (LEAVES, FOLIAGE)}
    palette, texture = made_of[barrier]
    p.box(Look(barrier, p.colour(palette), texture), (side * line, side * (line + 0.4)), (0, p.rng.uniform(1.4, 3)), z)


def _things(p: Painter, kerbs: dict[int, float], dealt: set[int]) -> Iterator[tuple[PaintAt, float, float]]:
    """Yield every object on sidewalk and road, in no order: its painter, x, z."""
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
