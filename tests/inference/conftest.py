"""A small search's folder, trained once for all tests of what is done with its winner."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.rows import plain_manifest, plain_row
from PIL import Image
from winners import STREETS

from tune_bisenet.classes import CITYSCAPES
from tune_bisenet.data.packing import prepare_packed
from tune_bisenet.records import TrialRecord, TrialSpec, best_of, write_manifest, write_trial
from tune_bisenet.storage import Storage
from tune_bisenet.training import checkpoint, engine


@pytest.fixture(scope="session")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two rows on streets of 96 x 192 pixels, trained at 64 x 128; 100 MB, removed at the end."""
    root = tmp_path_factory.mktemp("winner")
    runs = {
        name: plain_row(name, lr=lr, warmup=1, num_epochs=2, image_size=(64, 128), batch_size=4)
        for name, lr in (("r01", 0.01), ("r02", 0.03))
    }
    folder = Storage.at(str(root / "results" / "small"))
    data = prepare_packed(STREETS, image_size=(64, 128), cache_dir=root / "cache")
    digests = {"64x128": data.digest}
    write_manifest(
        folder,
        plain_manifest(
            name="small", trials=runs, data={"digests": digests, "train_images": 8, "val_images": len(data.val)}
        ),
    )
    for name, run in runs.items():
        training = engine.begin(run, data, device=torch.device("cpu"), precision="fp32", backbone=None)
        epochs = []
        (folder / name).make()
        for end in engine.fit(training):
            epochs.append(end.epoch)
            if best_of(epochs) is end.epoch:
                checkpoint.save_best(checkpoint.state_of(training), end.epoch, folder / name, identity="small")
        write_trial(folder, TrialRecord.of_spec(TrialSpec(trial=name, run=run), epochs))
    assert folder.local_path
    yield folder.local_path
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same streets in Cityscapes layout, with labelIds and a test split without labels."""
    root = tmp_path_factory.mktemp("frames")
    table = np.zeros(256, dtype=np.uint8)
    table[: len(CITYSCAPES)] = [entry.id for entry in CITYSCAPES.classes]
    for split in ("train", "val"):
        for index in range(len(STREETS.names(split))):
            image, label = STREETS.load(split, index)
            for top, kind, pixels in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", "gtFine_labelIds", table[label]),
            ):
                folder = root / top / split / "town"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"town_{index:06d}_000019_{kind}.png")
    test = root / "leftImg8bit" / "test" / "town"
    test.mkdir(parents=True)
    Image.fromarray(STREETS.load("val", 0).image).save(test / "town_000000_000019_leftImg8bit.png")
    return root
