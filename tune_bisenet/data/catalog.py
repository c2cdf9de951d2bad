"""The data sets a person can name."""

from pathlib import Path

from tune_bisenet.arguments import STREETS
from tune_bisenet.data.cityscapes import open_cityscapes
from tune_bisenet.data.source import Source
from tune_bisenet.data.streets import Streets


def open_source(name: str) -> Source:
    """The built-in streets, or a folder in Cityscapes layout. Raises DataError with all that is wrong with it."""
    return Streets() if name == STREETS else open_cityscapes(Path(name))
