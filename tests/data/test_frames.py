"""Batches are the packed rows, asked for in any order."""

import torch

from tune_bisenet.data.frames import Frames
from tune_bisenet.data.packed import Packed

CPU = torch.device("cpu")


def test_a_batch_holds_the_packed_rows_it_was_asked_for(tiny_data: Packed) -> None:
    frames = Frames(tiny_data.train, CPU)
    images, labels = frames.batch(torch.tensor([5, 0, 7, 0]))
    assert (images.dtype, images.shape) == (torch.uint8, (4, 3, 64, 128))
    assert (labels.dtype, labels.shape) == (torch.uint8, (4, 64, 128))
    for row, index in enumerate([5, 0, 7, 0]):
        assert images[row].tolist() == tiny_data.train.images[index].tolist()
        assert labels[row].tolist() == tiny_data.train.labels[index].tolist()


def test_a_validation_label_keeps_its_own_resolution(small_data: Packed) -> None:
    images, labels = Frames(small_data.val, CPU).batch(torch.tensor([1, 2]))
    assert images.shape == (2, 3, 32, 64)
    assert labels.shape == (2, 64, 128)
    assert labels[1].tolist() == small_data.val.labels[2].tolist()


def test_a_split_is_as_long_as_what_was_packed(tiny_data: Packed) -> None:
    assert len(Frames(tiny_data.train, CPU)) == 8
    assert len(Frames(tiny_data.val, CPU)) == 4


def test_writing_into_a_batch_leaves_the_pack_alone(tiny_data: Packed) -> None:
    frames = Frames(tiny_data.train, CPU)
    images, labels = frames.batch(torch.tensor([3]))
    before = images.clone(), labels.clone()
    images.zero_()
    labels.zero_()
    again = frames.batch(torch.tensor([3]))
    assert torch.equal(again[0], before[0])
    assert torch.equal(again[1], before[1])
