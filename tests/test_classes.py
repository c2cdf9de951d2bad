"""The classes of a data set: what they map, and which mistakes in them are told."""

import numpy as np
import pytest
from pydantic import ValidationError

from tune_bisenet.classes import CITYSCAPES, MAX_CLASSES, VOID, ClassSet, LabelClass


def numbered(number: int) -> ClassSet:
    return ClassSet(classes=tuple(LabelClass(name=f"class {i}", id=255 - i) for i in range(number)))


def test_ids_map_to_the_places_of_their_classes_and_all_others_to_void() -> None:
    table = CITYSCAPES.train_id_table()
    assert [table[label_class.id] for label_class in CITYSCAPES.classes] == list(range(19))
    assert (table == VOID).sum() == 256 - 19


def test_a_class_may_have_the_id_255() -> None:
    assert numbered(2).train_id_table()[[255, 254, 0]].tolist() == [0, 1, VOID]


def test_the_known_ids_of_cityscapes_are_0_to_33_and_void() -> None:
    assert CITYSCAPES.known_ids == {*range(34), VOID}


def test_classes_without_a_colour_get_different_ones() -> None:
    colours = numbered(40).palette()
    assert len({tuple(colour) for colour in colours[:40].tolist()}) == 40
    assert not colours[40:].any()


def test_a_palette_has_the_colours_that_are_given() -> None:
    assert np.array_equal(CITYSCAPES.palette()[:2], [(128, 64, 128), (244, 35, 232)])


@pytest.mark.parametrize("number", [2, MAX_CLASSES])
def test_up_to_254_classes_are_allowed(number: int) -> None:
    assert len(numbered(number)) == number
    assert ClassSet.model_validate_json(numbered(number).model_dump_json()) == numbered(number)


@pytest.mark.parametrize("number", [0, 1, MAX_CLASSES + 1])
def test_other_numbers_are_refused(number: int) -> None:
    with pytest.raises(ValidationError, match="name 2 to 254"):
        numbered(number)


def test_all_mistakes_are_told_together() -> None:
    given = {
        "classes": [
            {"name": "road", "id": 7, "colour": [1, 2, 3]},
            {"name": "road", "id": 300, "colour": [1, 2, 3]},
            {"name": "a|b", "id": 7, "colour": [0, 0, 256]},
        ],
        "void": [7, -1],
    }
    with pytest.raises(ValidationError) as caught:
        ClassSet.model_validate(given)
    message = str(caught.value)
    words = (
        "name road is given 2",
        "300 is no byte",
        "'a|b'",
        "a|b: its colour",
        "id -1",
        "id 7 is given 3",
        "[1, 2, 3]",
    )
    assert not [word for word in words if word not in message]


@pytest.mark.parametrize("change", [{"id": "7"}, {"id": True}, {"color": [1, 2, 3]}, {"colour": [1, 2]}, {"name": 5}])
def test_values_of_other_types_and_unknown_keys_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ClassSet.model_validate({"classes": [{"name": "road", "id": 7} | change, {"name": "sky", "id": 2}]})
