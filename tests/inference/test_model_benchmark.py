"""A model is timed at the sizes asked for, beside what others published."""

from pathlib import Path

import pytest

from tune_bisenet.inference.benchmark import PUBLISHED, main


def test_each_size_is_timed_and_published_speeds_stand_beside(search: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(search), "--device", "cpu", "--sizes", "64x128,32x64"]) == 0
    printed = capsys.readouterr().out
    assert "torch fp32, CPU" in printed
    assert all(size in printed for size in ("64x128", "32x64"))
    assert all(one.hardware in printed for one in PUBLISHED)


@pytest.mark.parametrize("sizes", ["100x200", "64", "64x128x3", "0x32"])
def test_sizes_are_checked(search: Path, sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(search), "--sizes", sizes])
    assert "multiples of 32" in capsys.readouterr().err
