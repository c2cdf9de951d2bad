"""The 19 Cityscapes classes: names, colours, and the map from `labelIds` to `trainIds`.

Source: Cordts et al., The Cityscapes Dataset (2016), and the label table of cityscapesScripts.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class StreetClass(NamedTuple):
    """A class that is trained and scored. Its index in `CLASSES` is its trainId."""

    name: str
    label_id: int
    colour: tuple[int, int, int]


CLASSES: Final = (
    StreetClass("road", 7, (128, 64, 128)),
    StreetClass("sidewalk", 8, (244, 35, 232)),
    StreetClass("building", 11, (70, 70, 70)),
    StreetClass("wall", 12, (102, 102, 156)),
    StreetClass("fence", 13, (190, 153, 153)),
    StreetClass("pole", 17, (153, 153, 153)),
    StreetClass("traffic light", 19, (250, 170, 30)),
    StreetClass("traffic sign", 20, (220, 220, 0)),
    StreetClass("vegetation", 21, (107, 142, 35)),
    StreetClass("terrain", 22, (152, 251, 152)),
    StreetClass("sky", 23, (70, 130, 180)),
    StreetClass("person", 24, (220, 20, 60)),
    StreetClass("rider", 25, (255, 0, 0)),
    StreetClass("car", 26, (0, 0, 142)),
    StreetClass("truck", 27, (0, 0, 70)),
    StreetClass("bus", 28, (0, 60, 100)),
    StreetClass("train", 31, (0, 80, 100)),
    StreetClass("motorcycle", 32, (0, 0, 230)),
    StreetClass("bicycle", 33, (119, 11, 32)),
)

NUM_CLASSES: Final = len(CLASSES)
CLASS_NAMES: Final = tuple(street_class.name for street_class in CLASSES)
VOID_LABELS: Final = {
    0: "unlabeled", 1: "ego vehicle", 2: "rectification border", 3: "out of roi", 4: "static", 5: "dynamic",
    6: "ground", 9: "parking", 10: "rail track", 14: "guard rail", 15: "bridge", 16: "tunnel", 18: "polegroup",
    29: "caravan", 30: "trailer",
}  # fmt: skip
"""The names of the labelIds that are not scored."""

VOID: Final = 255
"""The trainId of pixels that are neither trained on nor scored."""

MAX_LABEL_ID: Final = 33


def train_id_table() -> "NDArray[np.uint8]":
    """Return the look-up table `labelId -> trainId`, 256 entries; ids that are not scored give `VOID`."""
    import numpy as np  # late: a space needs names alone

    table = np.full(256, VOID, dtype=np.uint8)
    for train_id, street_class in enumerate(CLASSES):
        table[street_class.label_id] = train_id
    return table


def palette() -> "NDArray[np.uint8]":
    """Return RGB colours by trainId, shape (256, 3); void is black."""
    import numpy as np  # late, as above

    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[:NUM_CLASSES] = [street_class.colour for street_class in CLASSES]
    return colours
