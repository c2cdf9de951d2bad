"""The winner is found, loaded and lets pictures of any size be labelled; what cannot be used is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from winners import STREETS

from tune_bisenet.classes import CITYSCAPES
from tune_bisenet.config import check_image_size
from tune_bisenet.data.packing import resize_image
from tune_bisenet.inference.model import load, network_size, read_checkpoint
from tune_bisenet.options import InputError
from tune_bisenet.records import read_trial
from tune_bisenet.storage import Storage
from tune_bisenet.training import engine


@pytest.fixture(scope="module")
def street() -> np.ndarray:
    return STREETS.load("val", 1).image


def test_the_best_trial_of_a_search_is_loaded_with_what_is_known_of_it(search: Path) -> None:
    records = [read_trial(Storage.at(str(search)) / name) for name in ("r01", "r02")]
    best = max((record for record in records if record), key=lambda record: record.state.best_miou or 0.0)
    model = load(search)
    assert model.card.trial == best.spec.trial
    assert model.card.miou == best.state.best_miou
    assert (model.card.search, model.card.data, len(model.classes)) == ("small", "streets", 19)
    assert load(search, run="r02").card.trial == "r02"
    assert load(search / "r01").card.trial == load(search / "r01" / "best.pt").card.trial == "r01"


def test_a_prediction_is_that_of_validation_at_the_size_of_the_picture(search: Path, street: np.ndarray) -> None:
    model = load(search, run="r01")
    _card, network = read_checkpoint(Storage.at(str(search / "r01")), "best.pt")
    images = torch.from_numpy(resize_image(street, (64, 128)))[None]
    expected = engine.predict(network, images, (96, 192), precision="fp32")[0].numpy()
    found = model.predict(street)
    assert np.array_equal(found.class_ids, expected)
    assert np.array_equal(np.asarray(found.mask), CITYSCAPES.palette()[expected])
    assert found.overlay.size == (192, 96)


def test_a_file_a_picture_an_array_and_a_tensor_are_the_same(search: Path, street: np.ndarray, tmp_path: Path) -> None:
    model = load(search)
    Image.fromarray(street).save(tmp_path / "street.png")
    ids = model.predict(street).class_ids
    others = [str(tmp_path / "street.png"), Image.fromarray(street), torch.from_numpy(street).permute(2, 0, 1)]
    assert all(np.array_equal(model.predict(other).class_ids, ids) for other in others)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (97, 61), (333, 500)])
def test_any_size_is_labelled_at_its_own(search: Path, size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    assert load(search).predict(picture).class_ids.shape == size


@pytest.mark.parametrize(
    ("picture", "expected"),
    [((1024, 2048), (512, 1024)), ((512, 1024), (512, 1024)), ((1080, 1920), (544, 960)), ((1, 10_000), (64, 72_416))],
)
def test_a_picture_is_given_to_the_network_with_as_many_pixels_as_in_training(
    picture: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert network_size(picture, (512, 1024)) == check_image_size(expected)


@pytest.mark.parametrize("picture", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), "no.png"])
def test_what_is_no_picture_is_refused(search: Path, picture: object) -> None:
    with pytest.raises(InputError, match=r"uint8 RGB|no\.png cannot be read"):
        load(search).predict(picture)  # type: ignore[arg-type]


def test_what_is_no_model_is_named_with_what_to_do(search: Path, tmp_path: Path) -> None:
    for address, run, message in (
        (search, "r09", "those that have one are r01, r02"),
        (search / "r01" / "best.pt", "r01", "leave --run out"),
        (tmp_path, None, "there is no model in"),
        (tmp_path, "r01", "no search in"),
        (tmp_path / "model.onnx", None, "there is no file"),
    ):
        with pytest.raises(InputError, match=message):
            load(address, run=run)


def test_a_damaged_checkpoint_is_named(search: Path, tmp_path: Path) -> None:
    content = bytearray((search / "r01" / "best.pt").read_bytes())
    content[1000] ^= 1
    (tmp_path / "best.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"best\.pt is not the best epoch of a trial .*SHA-256"):
        load(tmp_path / "best.pt")


def test_loading_leaves_the_random_numbers_alone(search: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load(search)
    assert torch.rand(1) == expected
