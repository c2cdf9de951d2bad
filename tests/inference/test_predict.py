"""Pictures and videos are labelled into a folder; what is broken is named and skipped."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from winners import STREETS

from tune_bisenet.inference.model import load
from tune_bisenet.inference.predict import main


def test_a_folder_of_pictures_of_several_sizes_is_labelled(search: Path, tmp_path: Path) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    (pictures / "day").mkdir(parents=True)
    street = Image.fromarray(STREETS.load("val", 0).image)
    street.save(pictures / "a.png")
    street.resize((131, 77)).save(pictures / "day" / "b.jpg")
    (pictures / "notes.txt").write_text("no picture")
    assert main([str(search), str(pictures), "--out", str(out)]) == 0
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert found == ["a_mask.png", "a_overlay.png", "day/b_mask.png", "day/b_overlay.png"]
    with Image.open(out / "day" / "b_overlay.png") as overlay, Image.open(out / "a_mask.png") as mask:
        assert overlay.size == (131, 77)
        assert np.array_equal(np.asarray(mask), np.asarray(load(search).predict(street).mask))


def test_a_broken_picture_is_named_and_the_others_are_labelled(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.fromarray(STREETS.load("val", 0).image).save(tmp_path / "whole.png")
    out = tmp_path / "out"
    assert main([str(search), str(tmp_path / "broken.png"), str(tmp_path / "whole.png"), "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert "broken.png cannot be read as a picture" in told.err
    assert "1 file labelled" in told.out
    assert (out / "whole_mask.png").exists()


def test_names_that_would_meet_and_what_is_missing_are_told_together(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "a.jpg"):
        Image.fromarray(STREETS.load("val", 0).image).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    files = [str(tmp_path / name) for name in ("a.png", "a.jpg", "gone.png", "empty")]
    assert main([str(search), *files, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert all(part in told for part in ("would all be written to", "there is no", "neither pictures nor videos"))
    assert not (tmp_path / "out").exists()


def write_video(path: Path, *, num_frames: int, size: tuple[int, int]) -> None:
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
        for index in range(num_frames):
            image = Image.fromarray(STREETS.load("val", index).image).resize((size[1], size[0]))
            sink.mux(stream.encode(av.VideoFrame.from_image(image)))
        sink.mux(stream.encode())


def test_a_video_keeps_its_size_rate_and_number_of_frames(search: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "drive.mp4", num_frames=4, size=(98, 130))
    out = tmp_path / "out"
    assert main([str(search), str(tmp_path / "drive.mp4"), "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["drive_overlay.mp4"]
    with av.open(str(out / "drive_overlay.mp4")) as video:
        stream = video.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
        assert (len(frames), frames[0].shape, stream.average_rate) == (4, (98, 130, 3), 10)
    with av.open(str(tmp_path / "drive.mp4")) as video:
        first = next(video.decode(video.streams.video[0])).to_ndarray(format="rgb24")
    expected = np.asarray(load(search).predict(first).overlay)
    assert np.abs(frames[0].astype(int) - expected).mean() < 12  # H.264 loses a little


def test_a_broken_video_leaves_nothing(search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert main([str(search), str(tmp_path / "broken.mp4"), "--out", str(tmp_path / "out")]) == 1
    assert "broken.mp4 cannot be read as a video" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
