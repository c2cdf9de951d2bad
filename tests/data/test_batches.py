"""Batches are the packed rows, in any order; augmentation depends on (seed, epoch), and moves image and label together.

Shapes: N images of a split, B of a batch, H x W pixels.
"""

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tune_bisenet.classes import VOID
from tune_bisenet.config import Augment
from tune_bisenet.data import batches
from tune_bisenet.data.batches import AugmentDraw, augment_batch, epoch_draw, epoch_order, load_frames, normalise
from tune_bisenet.data.packed import DamagedPackError, Packed, PackedSplit, open_packed

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
STILL = Augment(min_scale=1.0, max_scale=1.0, flip=0.0, jitter=0.0)
HEIGHT, WIDTH = 48, 96
CPU = torch.device("cpu")


def scaled(scale: float, *, flip: float = 0.0) -> Augment:
    return Augment(min_scale=scale, max_scale=scale, flip=flip, jitter=0.0)


def random_images(batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)


def random_labels(batch: int = 4, ids: tuple[int, ...] = (0, 5, 18, VOID)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.tensor(ids, dtype=torch.uint8)[torch.randint(len(ids), (batch, HEIGHT, WIDTH), generator=generator)]


def by_hand(images: Tensor) -> Tensor:
    """Normalise as torchvision's models want it: (value / 255 - mean) / std, channel by channel."""
    return (images.float() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


def levels(normalised: Tensor) -> Tensor:
    """Convert normalised pixels back to 0 .. 255, as floats."""
    return (normalised * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)) * 255


def augmented(
    augment: Augment, images: Tensor, labels: Tensor, *, seed: int = 0, epoch: int = 1
) -> tuple[Tensor, Tensor]:
    return augment_batch(images, labels, epoch_draw(augment, len(images), seed=seed, epoch=epoch))


# --- frames -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def empty_device() -> Iterator[None]:
    """Leave nothing resident behind: tests share a process as trials do."""
    yield
    batches._resident.clear()


def bytes_of(split: PackedSplit) -> int:
    return len(split) * (split.images[0].nbytes + split.labels[0].nbytes)


@pytest.mark.parametrize("room", [0, 10**9], ids=["read from the pack", "resident"])
def test_batches_hold_copies_of_the_packed_rows_they_were_asked_for(tiny_data: Packed, room: int) -> None:
    order = [5, 0, 7, 0, 3]
    for _ in range(2):
        train, _val = load_frames(tiny_data, CPU, room=room)
        found = list(train.batches(torch.tensor(order), 2))
        assert [len(images) for images, _labels in found] == [2, 2, 1]
        images, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        assert (images.dtype, images.shape) == (torch.uint8, (5, 3, 64, 128))
        assert (labels.dtype, labels.shape) == (torch.uint8, (5, 64, 128))
        for row, index in enumerate(order):
            assert images[row].tolist() == tiny_data.train.images[index].tolist()
            assert labels[row].tolist() == tiny_data.train.labels[index].tolist()
        for part in (part for batch in found for part in batch):
            part.zero_()  # changes neither the pack nor what is resident


def test_a_validation_label_keeps_its_own_resolution(small_data: Packed) -> None:
    _train, val = load_frames(small_data, CPU, room=0)
    ((images, labels),) = val.batches(torch.tensor([1, 2]), 2)
    assert images.shape == (2, 3, 32, 64)
    assert labels.shape == (2, 64, 128)
    assert labels[1].tolist() == small_data.val.labels[2].tolist()


def test_batches_hold_labels_of_one_size_and_such_a_split_is_not_resident(small_data: Packed) -> None:
    sizes = [(64, 128), (64, 128), (64, 128), (40, 96)]
    labels = [label[:h, :w] for label, (h, w) in zip(small_data.val.labels, sizes, strict=True)]
    data = replace(small_data, digest="mixed", val=replace(small_data.val, labels=labels, label_sizes=sizes))
    _train, val = load_frames(data, CPU, room=10**9)
    order = torch.tensor([3, 0, 1, 2])
    found = list(val.batches(order, 2))
    assert [tuple(labels.shape) for _images, labels in found] == [(1, 40, 96), (2, 64, 128), (1, 64, 128)]
    rows = [row for _images, labels in found for row in labels]
    assert all(np.array_equal(row, labels[index]) for row, index in zip(rows, order.tolist(), strict=True))
    assert ("mixed", "val", CPU) not in batches._resident


def test_frames_reach_a_device_through_two_buffers_of_bounded_size(
    tiny_data: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = tiny_data.train.images
    for rows, chunk in ((1, 1), (3, 3 * arrays[0].nbytes + 1), (len(arrays), 2**26)):
        monkeypatch.setattr(batches, "CHUNK_BYTES", chunk)
        with AllocatedBytes() as allocated:
            copied = batches._copy_to(CPU, arrays)
        assert np.array_equal(copied.numpy(), np.stack([*arrays]))
        assert allocated.sizes == [copied.nbytes, *2 * [rows * arrays[0].nbytes]]


class AllocatedBytes(TorchDispatchMode):
    """Records the bytes of each tensor that is made empty."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if "empty" in str(operation):
            self.sizes.append(result.nbytes)
        return result


def resident_tensors() -> dict[str, int]:
    return {name: images.data_ptr() for (_digest, name, _device), (images, _labels) in batches._resident.items()}


def test_trials_of_a_process_share_frames_and_those_of_other_packs_make_room(
    tiny_data: Packed, small_data: Packed
) -> None:
    both = sum(bytes_of(split) for data in (tiny_data, small_data) for split in (data.train, data.val))
    load_frames(tiny_data, CPU, room=both)
    first = resident_tensors()
    load_frames(small_data, CPU, room=both)
    assert len(batches._resident) == 4
    load_frames(tiny_data, CPU, room=both)
    assert resident_tensors() == first, "nothing was copied again"
    load_frames(small_data, CPU, room=both - 1)
    digests = Counter(digest for digest, _name, _device in batches._resident)
    assert digests == {small_data.digest: 2, tiny_data.digest: 1}, "no more is dropped than has to be"


def test_frames_never_take_more_than_their_room_and_the_training_split_comes_first(tiny_data: Packed) -> None:
    train, val = bytes_of(tiny_data.train), bytes_of(tiny_data.val)
    for room, expected in (
        (train + val, ["train", "val"]),
        (train + val - 1, ["train"]),
        (train - 1, ["val"] if val < train else []),
        (-1, []),  # training alone takes more than the share
    ):
        load_frames(tiny_data, CPU, room=room)
        assert sorted(resident_tensors()) == expected, room


def test_damaged_frames_do_not_become_resident(tiny_data: Packed, tmp_path: Path) -> None:
    path = tmp_path / "pack"
    shutil.copytree(tiny_data.path, path)
    data = open_packed(path)
    content = bytearray((path / "train.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "train.arrow").write_bytes(content)
    with pytest.raises(DamagedPackError):
        load_frames(data, CPU, room=10**9)
    assert batches._resident == {}


def test_the_next_batch_is_read_while_one_is_used_and_none_beyond() -> None:
    began = [threading.Event() for _ in range(4)]

    def read(number: int) -> int:
        began[number].set()
        if number == 3:
            raise DamagedPackError("damaged")
        return number

    values = batches._read_ahead(read, range(4))
    for number in range(3):
        assert next(values) == number
        assert began[number + 1].wait(timeout=60)
        assert not any(event.is_set() for event in began[number + 2 :])
    with pytest.raises(DamagedPackError):  # where its batch is due, not before
        next(values)
    assert list(batches._read_ahead(read, [])) == []


# --- randomness -------------------------------------------------------------------------------------------------


def test_one_seed_and_epoch_always_give_the_same_batch() -> None:
    first = augmented(Augment(), random_images(), random_labels(), seed=3, epoch=7)
    torch.manual_seed(12345)  # nothing depends on torch's own state
    before = torch.get_rng_state()
    second = augmented(Augment(), random_images(), random_labels(), seed=3, epoch=7)
    epoch_order(10, seed=0, epoch=1)
    assert torch.equal(torch.get_rng_state(), before), "nor changes it"
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("seed", "epoch"), [(3, 8), (4, 7), (7, 3)])
def test_another_seed_or_epoch_gives_other_choices(seed: int, epoch: int) -> None:
    draws = epoch_draw(Augment(), 16, seed=3, epoch=7), epoch_draw(Augment(), 16, seed=seed, epoch=epoch)
    assert not torch.equal(draws[0].window, draws[1].window)
    assert not torch.equal(draws[0].brightness, draws[1].brightness)
    assert not torch.equal(epoch_order(64, seed=3, epoch=7), epoch_order(64, seed=seed, epoch=epoch))


@pytest.mark.parametrize("num_images", [1, 2, 97, 2975])
def test_an_epoch_visits_every_image_once(num_images: int) -> None:
    assert epoch_order(num_images, seed=0, epoch=3).sort().values.tolist() == list(range(num_images))


def test_augmenting_an_image_does_not_depend_on_its_batch() -> None:
    draw = epoch_draw(Augment(), 8, seed=0, epoch=1)
    images, labels = random_images(8), random_labels(8)
    whole = augment_batch(images, labels, draw)
    for size in (1, 2, 4):
        parts = [
            augment_batch(*(part[i : i + size] for part in (images, labels)), draw[i : i + size])
            for i in range(0, 8, size)
        ]
        assert torch.allclose(torch.cat([image for image, _ in parts]), whole[0], atol=1e-5)
        assert torch.equal(torch.cat([label for _, label in parts]), whole[1])


def test_scales_flips_and_factors_fill_their_ranges() -> None:
    draw = epoch_draw(Augment(min_scale=0.5, max_scale=2.0, flip=0.25, jitter=0.4), 4000, seed=0, epoch=1)
    scale, flipped = 1 / draw.window[:, 1, 1], draw.window[:, 0, 0] < 0
    assert 0.5 <= scale.min() < 0.51
    assert 1.98 < scale.max() <= 2.0001
    assert scale.mean().item() == pytest.approx(1.25, abs=0.03)  # uniform, as public implementations draw it
    assert (scale < 1).float().mean().item() == pytest.approx(1 / 3, abs=0.03)
    assert flipped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    for factors in (draw.brightness, draw.contrast, draw.saturation):
        assert 0.6 <= factors.min() < 0.61
        assert 1.39 < factors.max() <= 1.4001


def test_choices_are_uncorrelated() -> None:
    draw = epoch_draw(Augment(min_scale=1.1, max_scale=2.0), 4000, seed=0, epoch=1)
    shown = draw.window[:, 1, 1]
    flipped = (draw.window[:, 0, 0] < 0).float()
    across, down = draw.window[:, 0, 2] / (1 - shown), draw.window[:, 1, 2] / (1 - shown)
    choices = torch.stack([shown, flipped, across, down, draw.brightness, draw.contrast, draw.saturation])
    assert (choices.corrcoef() - torch.eye(7)).abs().max() < 0.06


def test_a_crop_is_inside_the_image_or_contains_it() -> None:
    window = epoch_draw(Augment(min_scale=0.5, max_scale=2.0, flip=0.5), 2000, seed=0, epoch=1).window
    reach, offset = window[:, [0, 1], [0, 1]].abs(), window[:, :, 2]
    inside = reach <= 1
    assert ((reach + offset.abs())[inside] <= 1 + 1e-6).all()
    assert ((reach - offset.abs())[~inside] >= 1 - 1e-6).all()


# --- geometry ---------------------------------------------------------------------------------------------------


def test_without_scale_and_jitter_only_a_flip_changes_image_and_label_together() -> None:
    images, labels = random_images(), random_labels()
    out, out_labels = augmented(STILL, images, labels)
    assert torch.allclose(out, by_hand(images), atol=1e-3)  # sampling between pixels costs a few float32 bits
    assert torch.equal(out_labels, labels)
    out, out_labels = augmented(scaled(1.0, flip=1.0), images, labels)
    assert torch.allclose(out, by_hand(images.flip(3)), atol=1e-3)
    assert torch.equal(out_labels, labels.flip(2))


def test_a_scale_of_2_shows_a_quarter_of_the_image_twice_as_large() -> None:
    labels = torch.zeros(8, HEIGHT, WIDTH, dtype=torch.uint8)
    labels[:, 10:20, 30:50] = 1
    _, out = augmented(scaled(2.0), random_images(8), labels)
    inner = out[:, 1:-1, 1:-1]
    whole = [image for image, part in zip(out, inner, strict=True) if image.any() and image.sum() == part.sum()]
    assert whole, "no draw showed the whole rectangle"
    for image in whole:
        rows, columns = image.nonzero(as_tuple=True)
        assert (rows.max() - rows.min() + 1).item() == pytest.approx(20, abs=1)
        assert (columns.max() - columns.min() + 1).item() == pytest.approx(40, abs=1)


def beside_void(void: Tensor, *, frame: float) -> Tensor:
    """Return B x H x W: pixels that are or touch void; around the crop all is void if `frame` is 1."""
    framed = torch.nn.functional.pad(void.float().unsqueeze(1), (1, 1, 1, 1), value=frame)
    return torch.nn.functional.max_pool2d(framed, 3, stride=1).squeeze(1) > 0


def test_pixels_outside_the_image_are_0_and_void() -> None:
    images, labels = random_images(8), random_labels(8, ids=(0, 5, 18))
    out, out_labels = augmented(scaled(0.5), images, labels)
    void = out_labels == VOID
    assert void.float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert not out[~beside_void(~void, frame=0.0).unsqueeze(1).expand_as(out)].any()


@pytest.mark.parametrize("augment", [Augment(), Augment(min_scale=0.5, max_scale=0.9), scaled(1.7, flip=0.5)])
def test_labels_never_blend_and_every_id_survives(augment: Augment) -> None:
    _, labels = augmented(augment, random_images(8), random_labels(8, ids=(0, 18)))
    assert set(labels.unique().tolist()) <= {0, 18, VOID}
    assert labels.dtype == torch.uint8
    ids = (*range(19), VOID)
    _, labels = augmented(scaled(1.3), random_images(8), random_labels(8, ids=ids))
    assert set(labels.unique().tolist()) == set(ids)


@pytest.mark.parametrize("augment", [scaled(0.75, flip=0.5), scaled(1.37, flip=0.5), scaled(2.0, flip=0.5)])
def test_each_pixel_and_its_label_come_from_the_same_position(augment: Augment) -> None:
    """Red is the column and green the row, and so are two labels: each must be the whole number next to its colour."""
    columns = torch.arange(WIDTH, dtype=torch.uint8).expand(8, HEIGHT, WIDTH)
    rows = torch.arange(HEIGHT, dtype=torch.uint8).unsqueeze(1).expand(8, HEIGHT, WIDTH)
    images = torch.stack([columns, rows, rows], dim=1)
    out, labelled_columns = augmented(augment, images, columns)
    _, labelled_rows = augmented(augment, images, rows)
    inside = ~beside_void(labelled_columns == VOID, frame=1.0)  # at an edge the image may fade to the mean
    assert inside.float().mean() > 0.3
    for channel, labelled in ((0, labelled_columns), (1, labelled_rows)):
        distance = (levels(out)[:, channel] - labelled.float())[inside].abs()
        assert distance.max() < 0.5 + 0.02


# --- colour -----------------------------------------------------------------------------------------------------


def test_normalisation_uses_the_mean_and_deviation_of_imagenet() -> None:
    images = random_images()
    assert torch.allclose(normalise(images), by_hand(images), atol=1e-6)
    grey = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    assert normalise(grey).flatten().tolist() == pytest.approx(
        [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rel=1e-6
    )


def with_factors(images: Tensor, *, brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0) -> Tensor:
    """Return the images (B x 3 x H x W, 0 .. 255) after these factors and nothing else."""
    still = epoch_draw(STILL, len(images), seed=0, epoch=1)
    factors = (torch.full((len(images),), factor) for factor in (brightness, contrast, saturation))
    out, _ = augment_batch(images, random_labels(len(images)), AugmentDraw(still.window, *factors))
    return levels(out)


def test_brightness_multiplies_contrast_and_saturation_stretch_around_the_mean_and_each_pixels_grey() -> None:
    images = random_images() // 2 + 60
    grey = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    mean = grey.mean((2, 3), keepdim=True)
    dark = random_images() // 2
    assert torch.allclose(with_factors(dark, brightness=1.4), dark * 1.4, atol=0.1)
    assert torch.allclose(with_factors(images, contrast=0.7), mean + 0.7 * (images - mean), atol=0.1)
    assert torch.allclose(with_factors(images, saturation=0.6), grey + 0.6 * (images - grey), atol=0.1)


def test_colours_stay_between_0_and_255_and_jitter_of_0_changes_none() -> None:
    strongest = with_factors(random_images(), brightness=1.4, contrast=1.4, saturation=1.4)
    assert strongest.min() > -0.1
    assert strongest.max() < 255.1
    draw = epoch_draw(STILL, 100, seed=0, epoch=1)
    for factors in (draw.brightness, draw.contrast, draw.saturation):
        assert (factors == 1.0).all()
