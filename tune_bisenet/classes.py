"""The classes that labels are made of: names, colours, and the map from the ids in label files to `trainIds`.

`CITYSCAPES` are the 19 that are trained unless the data say otherwise. Source: Cordts et al., The Cityscapes Dataset
(2016), and the label table of cityscapesScripts.
"""

import colorsys
from collections import Counter
from typing import TYPE_CHECKING, Final, Self

from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, model_validator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VOID: Final = 255
"""The trainId of pixels that are neither trained on nor scored. In label files this id is void, too, unless a class
has it."""
MAX_CLASSES: Final = 254
"""Predictions and labels are bytes, and one more row than classes is counted."""


class LabelClass(BaseModel):
    """A class that is trained and scored. Its index in a `ClassSet` is its trainId."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: StrictStr
    id: StrictInt
    """What its pixels are in label files, 0 to 255."""
    colour: tuple[StrictInt, StrictInt, StrictInt] | None = None
    """Red, green and blue, 0 to 255; None for one that `ClassSet.colours` chooses."""


class ClassSet(BaseModel):
    """The classes of a data set in the order of their trainIds, as `classes.json` has them.

    Raises pydantic's ValidationError, a ValueError: of several mistakes in the values it names all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: tuple[LabelClass, ...]
    void: tuple[StrictInt, ...] = ()
    """The ids in label files that are known and neither trained on nor scored, beside 255."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := _class_problems(self):
            raise ValueError("\n".join(problems))
        return self

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names by trainId."""
        return tuple(label_class.name for label_class in self.classes)

    @property
    def colours(self) -> tuple[tuple[int, int, int], ...]:
        """Return RGB by trainId; a class that names no colour is given one by its number."""
        return tuple(label_class.colour or _colour_of(train_id) for train_id, label_class in enumerate(self.classes))

    @property
    def known_ids(self) -> frozenset[int]:
        """Return the ids that label files may hold."""
        return frozenset({label_class.id for label_class in self.classes} | {*self.void, VOID})

    def train_id_table(self) -> "NDArray[np.uint8]":
        """Return the look-up table from ids in label files to trainIds, 256 entries; all others give `VOID`."""
        import numpy as np  # late: a space needs names alone

        table = np.full(256, VOID, dtype=np.uint8)
        for train_id, label_class in enumerate(self.classes):
            table[label_class.id] = train_id
        return table

    def palette(self) -> "NDArray[np.uint8]":
        """Return RGB colours by trainId, shape (256, 3); void is black."""
        import numpy as np  # late, as above

        colours = np.zeros((256, 3), dtype=np.uint8)
        colours[: len(self)] = self.colours
        return colours


def _class_problems(given: ClassSet) -> list[str]:
    """Return all that is wrong with a set whose values have the right types."""
    problems = []
    if not 2 <= len(given.classes) <= MAX_CLASSES:
        problems.append(f"{len(given.classes)} classes: name 2 to {MAX_CLASSES}.")
    for label_class in given.classes:
        name = label_class.name
        if not (0 < len(name) <= 40 and name.isprintable() and name == name.strip()) or set(name) & set('<>&|,"`'):
            problems.append(
                f"the name {name!r}: it must be 1 to 40 printed characters without a blank at its ends or any of "
                '< > & | , " `.'
            )
        if not 0 <= label_class.id <= 255:
            problems.append(f"{name}: its id {label_class.id} is no byte. Choose one from 0 to 255.")
        if not all(0 <= value <= 255 for value in label_class.colour or ()):
            problems.append(f"{name}: its colour must be red, green and blue from 0 to 255, as [128, 64, 128].")
    problems += [f"void: the id {i} is no byte. Choose one from 0 to 255." for i in given.void if not 0 <= i <= 255]
    ids = [label_class.id for label_class in given.classes] + list(given.void)
    colours = [label_class.colour for label_class in given.classes if label_class.colour is not None]
    repeated = [
        *((f"the name {name}", number) for name, number in Counter(given.names).items()),
        *((f"the id {label_id}", number) for label_id, number in Counter(ids).items()),
        *((f"the colour {list(colour)}", number) for colour, number in Counter(colours).items()),
    ]
    problems += [f"{what} is given {number} times: give each once." for what, number in repeated if number > 1]
    return problems


def _colour_of(train_id: int) -> tuple[int, int, int]:
    """Return a colour by its number: hues a golden section apart, of three brightnesses in turn."""
    hue, brightness = (train_id * 0.618034) % 1.0, (0.95, 0.75, 0.55)[train_id % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.65, brightness))
    return red, green, blue


VOID_LABELS: Final = {
    0: "unlabeled", 1: "ego vehicle", 2: "rectification border", 3: "out of roi", 4: "static", 5: "dynamic",
    6: "ground", 9: "parking", 10: "rail track", 14: "guard rail", 15: "bridge", 16: "tunnel", 18: "polegroup",
    29: "caravan", 30: "trailer",
}  # fmt: skip
"""The names of the labelIds of Cityscapes that are not scored."""

CITYSCAPES: Final = ClassSet(
    classes=(
        LabelClass(name="road", id=7, colour=(128, 64, 128)),
        LabelClass(name="sidewalk", id=8, colour=(244, 35, 232)),
        LabelClass(name="building", id=11, colour=(70, 70, 70)),
        LabelClass(name="wall", id=12, colour=(102, 102, 156)),
        LabelClass(name="fence", id=13, colour=(190, 153, 153)),
        LabelClass(name="pole", id=17, colour=(153, 153, 153)),
        LabelClass(name="traffic light", id=19, colour=(250, 170, 30)),
        LabelClass(name="traffic sign", id=20, colour=(220, 220, 0)),
        LabelClass(name="vegetation", id=21, colour=(107, 142, 35)),
        LabelClass(name="terrain", id=22, colour=(152, 251, 152)),
        LabelClass(name="sky", id=23, colour=(70, 130, 180)),
        LabelClass(name="person", id=24, colour=(220, 20, 60)),
        LabelClass(name="rider", id=25, colour=(255, 0, 0)),
        LabelClass(name="car", id=26, colour=(0, 0, 142)),
        LabelClass(name="truck", id=27, colour=(0, 0, 70)),
        LabelClass(name="bus", id=28, colour=(0, 60, 100)),
        LabelClass(name="train", id=31, colour=(0, 80, 100)),
        LabelClass(name="motorcycle", id=32, colour=(0, 0, 230)),
        LabelClass(name="bicycle", id=33, colour=(119, 11, 32)),
    ),
    void=tuple(VOID_LABELS),
)
