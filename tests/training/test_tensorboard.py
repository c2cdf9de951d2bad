"""What TensorBoard itself shows of a search, asked over HTTP from the server that a user starts."""

import io
import json
import math
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.rows import plain_epoch, plain_row
from PIL import Image

from tune_bisenet.classes import CITYSCAPES, VOID
from tune_bisenet.config import AdamW, Run, WarmupPoly, WeightedCrossEntropy
from tune_bisenet.records import Epoch
from tune_bisenet.storage import Storage
from tune_bisenet.training.tensorboard import (
    GAP,
    METRICS,
    TRIPTYCH_HEIGHT,
    HParamsTable,
    TrialWriter,
    column_kinds,
    hparams,
    triptych,
)

R01 = plain_row("r01", warmup=1000)
R02 = plain_row(
    "r02",
    optimizer=AdamW(lr=3e-4, weight_decay=0.01),
    schedule=WarmupPoly(warmup_iterations=1000, power=1.0),
    loss=WeightedCrossEntropy(aux_weight=0.4, lovasz_after=40),
    accumulation=4,
    max_grad_norm=5.0,
)
TRIALS = {"r01": R01, "r02": R02, "r03": R01.model_copy(update={"name": "r03"})}
MIOU = {"r01": [10.0, 30.0, 20.0], "r02": [5.0, 15.0, 25.0, 24.0, 23.0], "r03": [1.0]}
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 24, 3), dtype=np.uint8)


def epoch(number: int, miou: float, loss: float = 1.0) -> Epoch:
    iou = (*(50.0 for _ in range(len(CITYSCAPES) - 1)), None)
    return plain_epoch(number, miou, loss=loss, iou=iou, train_seconds=3.0, val_seconds=0.5)


def write_epochs(tracker: TrialWriter, mious: list[float], *, first: int, best: float = 0.0) -> None:
    for number, miou in enumerate(mious, start=first):
        best = max(best, miou)
        tracker.add_epoch(epoch(number, miou), best=epoch(number, best))
        tracker.flush()


KILLED_WORKER = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from test_tensorboard import R02, Storage, TrialWriter, write_epochs
tracker = TrialWriter(Storage.at(sys.argv[1]), run=R02, trial="r02", completed_epochs=0)
write_epochs(tracker, [5.0, 15.0, 99.0, 98.0], first=1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def search_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three trials: one finished, one killed after 4 epochs and resumed from the 2nd, one diverged."""
    root = tmp_path_factory.mktemp("search")
    storage = Storage.at(str(root))
    for name in TRIALS:
        (storage / name).make()
    HParamsTable(storage, TRIALS).write()
    with TrialWriter(storage / "r01", run=R01, trial="r01", completed_epochs=0) as tracker:
        write_epochs(tracker, MIOU["r01"], first=1)
        tracker.add_triptychs(3, [("street 1", PICTURE)])
        tracker.end("finished")
    test_folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    worker = [sys.executable, "-c", KILLED_WORKER, str(root / "r02"), *test_folders]
    assert subprocess.run(worker, check=False).returncode == -signal.SIGKILL
    with TrialWriter(storage / "r02", run=R02, trial="r02", completed_epochs=2) as tracker:
        write_epochs(tracker, MIOU["r02"][2:], first=3, best=15.0)
        tracker.end("stopped")
    with TrialWriter(storage / "r03", run=TRIALS["r03"], trial="r03", completed_epochs=0) as tracker:
        tracker.add_epoch(epoch(1, 1.0), best=epoch(1, 1.0))
        tracker.add_epoch(epoch(2, 99.0, loss=math.nan), best=epoch(1, 1.0))
        tracker.end("diverged")
    return root


class Board:
    """A client of a running TensorBoard."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return json.loads(self.fetch(path, body))

    def fetch(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/data/plugin/{path}", data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            content: bytes = answer.read()
            return content

    def points(self, run: str, tag: str) -> list[tuple[int, float]]:
        return [(step, value) for _, step, value in self.ask(f"scalars/scalars?run={run}&tag={tag}")]

    def session_groups(self) -> dict[str, Any]:
        statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
        body = {"experimentName": "", "allowedStatuses": statuses, "startIndex": 0, "sliceSize": 100}
        answer = self.ask("hparams/session_groups", body)
        return {group["name"]: group for group in answer.get("sessionGroups", [])}

    def statuses(self) -> dict[str, str]:
        return {name: group["sessions"][0]["status"] for name, group in self.session_groups().items()}

    def is_loaded(self) -> bool:
        """Return whether the table's schema is there, and each trial's end: that is the last record of its file."""
        statuses = self.statuses()
        if set(statuses) != set(TRIALS) or "STATUS_UNKNOWN" in statuses.values():
            return False
        # Without the search's own file TensorBoard takes all scalars of its trials for metrics.
        return len(self.ask("hparams/experiment", {"experimentName": ""}).get("metricInfos", [])) == len(METRICS)


@pytest.fixture(scope="module", params=["--load_fast=false", "--load_fast=true"])
def board(request: pytest.FixtureRequest, search_dir: Path) -> Iterator[Board]:
    """TensorBoard as `tensorboard --logdir` starts it, with its Python reader and with its Rust reader."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(search_dir), "--port=0", request.param]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            addresses = (re.search(r"http://\S+?:\d+", line) for line in server.stderr)
            client = Board(next(found[0] for found in addresses if found))
            deadline = time.monotonic() + 250
            while not client.is_loaded():
                assert time.monotonic() < deadline, "TensorBoard shows all trials ended"
                time.sleep(0.2)
            yield client
        finally:
            server.kill()  # SIGTERM is lost on TensorBoard if it comes while a request is handled


def test_runs_are_shown_by_name_with_all_scalars(board: Board) -> None:
    tags = board.ask("scalars/tags")
    assert set(tags) - {"."} == {"r01", "r02", "r03"}
    shown = {f"iou/{name}" for name in CITYSCAPES.names[:-1]}  # the last class had no pixels
    shown |= {"loss/total", "loss/main", "loss/aux1", "loss/aux2", "lr", "grad_norm", "miou", "best_miou"}
    shown |= {"pixel_accuracy", "speed/images_per_second", "speed/epoch_seconds"}
    assert set(tags["r01"]) == shown


def test_steps_are_epochs_and_those_of_a_killed_and_resumed_trial_are_shown_once(board: Board) -> None:
    assert board.points("r01", "miou") == [(1, 10.0), (2, 30.0), (3, 20.0)]
    assert board.points("r01", "best_miou") == [(1, 10.0), (2, 30.0), (3, 30.0)]
    assert board.points("r01", "speed/epoch_seconds") == [(1, 3.5), (2, 3.5), (3, 3.5)]
    assert board.points("r02", "miou") == list(enumerate(MIOU["r02"], start=1))
    assert board.points("r02", "best_miou")[-1] == (5, 25.0)


def test_a_loss_that_is_nan_is_shown_and_how_each_trial_ended(board: Board) -> None:
    assert board.statuses() == {"r01": "STATUS_SUCCESS", "r02": "STATUS_SUCCESS", "r03": "STATUS_FAILURE"}
    assert [str(value).lower() for _, value in board.points("r03", "loss/total")] == ["1.0", "nan"]


def test_a_diverged_epoch_has_no_scores(board: Board) -> None:
    for tag in ("miou", "pixel_accuracy", f"iou/{CITYSCAPES.names[0]}"):
        assert [step for step, _ in board.points("r03", tag)] == [1]
    assert board.points("r03", "best_miou") == [(1, 1.0), (2, 1.0)]


def test_pictures_are_shown_by_epoch(board: Board) -> None:
    assert set(board.ask("images/tags")["r01"]) == {"pictures/street 1"}
    (picture,) = board.ask("images/images?run=r01&tag=pictures/street%201&sample=0")
    assert picture["step"] == 3
    content = board.fetch(f"images/individualImage?{picture['query']}")
    assert (np.asarray(Image.open(io.BytesIO(content))) == PICTURE).all()


def test_the_table_has_every_column_though_rows_differ(board: Board) -> None:
    experiment = board.ask("hparams/experiment", {"experimentName": ""})
    columns = {column["name"]: column for column in experiment["hparamInfos"]}
    assert set(columns) == set(hparams(R01)) | set(hparams(R02))
    assert columns["optimizer.momentum"]["type"] == "DATA_TYPE_FLOAT64"
    assert columns["max_grad_norm"]["type"] == "DATA_TYPE_STRING"
    assert columns["max_grad_norm"]["domainDiscrete"] == ["5", "none"]
    assert columns["optimizer.lr"]["domainInterval"] == {"minValue": 3e-4, "maxValue": 0.01}
    assert columns["decay_norms_and_biases"]["type"] == "DATA_TYPE_BOOL"
    assert not columns["batch_size"].get("differs", False)
    assert columns["optimizer.momentum"]["differs"]
    metrics = [metric["name"]["tag"] for metric in experiment["metricInfos"]]
    assert metrics == ["best_miou", "miou", "loss/total"]


def test_the_table_shows_the_whole_row_of_every_trial_and_its_best_miou_beside_the_last(board: Board) -> None:
    groups = board.session_groups()
    assert {name: group["hparams"] for name, group in groups.items()} == {
        name: hparams(run) for name, run in TRIALS.items()
    }
    for trial, mious in MIOU.items():
        metrics = {metric["name"]["tag"]: metric["value"] for metric in groups[trial]["metricValues"]}
        assert (metrics["best_miou"], metrics["miou"]) == (max(mious), mious[-1])


# --- without a server -------------------------------------------------------------------------------------------


def test_a_row_is_flattened_with_constants_and_none_and_values_have_their_columns_types() -> None:
    row = hparams(R01)
    assert (row["optimizer.kind"], row["optimizer.momentum"], row["loss.lovasz_after"]) == ("sgd", 0.9, "none")
    assert (row["image_size"], row["augment.flip"], row["num_epochs"], row["seed"]) == ("512x1024", 0.5, 50, 0)
    assert "optimizer.momentum" not in hparams(R02)
    assert hparams(R02)["loss.lovasz_after"] == "40"
    assert not any(name.startswith("expect") for name in row)
    kinds = column_kinds(Run)
    for run in TRIALS.values():
        for name, value in hparams(run).items():
            assert isinstance(value, (int, float) if kinds[name] is float else kinds[name]), name


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_writer_whose_clock_is_behind_comes_after_the_last(tmp_path: Path, scheme: str) -> None:
    folder = Storage.at(f"{scheme}{tmp_path}")
    folder.write("events.out.tfevents.9000000000.other.1", b"")
    with TrialWriter(folder, run=R01, trial="r01", completed_epochs=1):
        last = max(info.base_name for info in folder.infos())
        assert last.startswith("events.out.tfevents.9000000001.")


def test_a_table_that_grows_stays_one_file(tmp_path: Path) -> None:
    table = HParamsTable(Storage.at(str(tmp_path)), {"r01": R01})
    table.write()
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    table.add("r02", R02)
    assert path.read_bytes() == before, "it was written a moment ago"
    table.write()
    assert list(tmp_path.iterdir()) == [path]
    assert b"r02" in path.read_bytes()


def test_writing_the_table_does_not_load_torch() -> None:
    code = "import sys, tune_bisenet.training.tensorboard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- triptychs --------------------------------------------------------------------------------------------------


def test_a_triptych_shows_picture_label_and_prediction_in_cityscapes_colours() -> None:
    image = np.array([10, 20, 30], dtype=np.uint8)[:, None, None] * np.ones((1, 2, 4), dtype=np.uint8)
    label = np.full((2, 4), 0, dtype=np.uint8)
    prediction = np.full((2, 4), 13, dtype=np.uint8)
    picture = triptych(image, label, prediction)
    assert picture.shape == (2, 3 * 4 + 2 * GAP, 3)
    assert picture.dtype == np.uint8
    assert (picture[:, :4] == (10, 20, 30)).all()
    assert (picture[:, 4 + GAP : 8 + GAP] == CITYSCAPES.classes[0].colour).all()
    assert (picture[:, 8 + 2 * GAP :] == CITYSCAPES.classes[13].colour).all()
    assert (picture[:, 4 : 4 + GAP] == 255).all()


def test_void_is_black_in_the_label_and_in_the_prediction() -> None:
    label = np.array([[VOID, 0], [0, 0]], dtype=np.uint8)
    picture = triptych(np.full((3, 2, 2), 9, dtype=np.uint8), label, np.zeros((2, 2), dtype=np.uint8))
    truth, guess = picture[:, 2 + GAP : 4 + GAP], picture[:, 4 + 2 * GAP :]
    assert (truth[0, 0] == 0).all()
    assert (guess == truth).all()


def test_labels_are_resized_to_the_picture_and_a_large_picture_is_shrunk() -> None:
    label = np.array([[0, 1], [2, 3]], dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    prediction = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    picture = triptych(np.zeros((3, 4, 4), dtype=np.uint8), label, prediction)
    truth, guess = picture[:, 4 + GAP : 8 + GAP], picture[:, 8 + 2 * GAP :]
    assert (truth == guess).all()
    assert (truth[3, 3] == CITYSCAPES.classes[3].colour).all()
    frame = np.zeros((3, 1024, 2048), dtype=np.uint8)
    picture = triptych(frame, frame[0], np.zeros((128, 256), dtype=np.uint8))
    assert picture.shape == (TRIPTYCH_HEIGHT, 3 * 512 + 2 * GAP, 3)
