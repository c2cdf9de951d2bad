"""Whatever bytes lie where a picture should: it is read as what it is, or refused in words."""

import io
import struct
import zlib

import numpy as np
import pytest
from helpers.fuzz import damaged, inputs
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from tune_bisenet.classes import CITYSCAPES, VOID
from tune_bisenet.data.packing import open_source
from tune_bisenet.data.png import HEADER_BYTES, decode_png, read_png_header
from tune_bisenet.data.source import SPLITS
from tune_bisenet.options import InputError

SIZE = (8, 12)


def encoded(picture: Image.Image, kind: str = "PNG", **how: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


def pictures() -> list[bytes]:
    """Return one picture of each kind that Pillow writes."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8))
    ids = Image.fromarray(rng.integers(0, 19, SIZE, np.uint8))
    palette = ids.convert("P")
    sixteen = Image.fromarray(rng.integers(0, 2**16, SIZE).astype(np.uint16))
    kinds = [colours, ids, palette, sixteen, colours.convert("RGBA"), ids.convert("LA"), ids.convert("1")]
    return [encoded(picture) for picture in kinds] + [encoded(palette, bits=4), encoded(colours, "JPEG")]


PICTURES = pictures()
RGB, GREY = PICTURES[:2]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@st.composite
def png_like(draw: st.DrawFn) -> bytes:
    """Return a picture with damaged bytes, or one in which chunks are lost, doubled, exchanged or damaged with care."""
    content = draw(st.sampled_from(PICTURES))
    if not content.startswith(b"\x89PNG") or draw(st.booleans()):
        return draw(damaged(content))
    chunks, start = [], 8
    while start < len(content):
        length = int.from_bytes(content[start : start + 4])
        chunks.append((content[start + 4 : start + 8], content[start + 8 : start + 8 + length]))
        start += 12 + length
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, len(chunks) - 1)) if chunks else 0
        kind, body = chunks[index] if chunks else (b"IHDR", b"")
        match draw(st.sampled_from(["damage", "damage", "lose", "double", "move", "new"])):
            case "damage":
                chunks[index : index + 1] = [(kind, draw(damaged(body)))]
            case "lose":
                del chunks[index : index + 1]
            case "double":
                chunks.append((kind, body))
            case "move":
                chunks.insert(0, (kind, body))
            case "new":
                kinds = [b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"zTXt", b"acTL", b"fdAT", b"XXXX"]
                chunks.insert(index, (draw(st.sampled_from(kinds)), draw(st.binary(max_size=64))))
    return content[:8] + b"".join(chunk(kind, body) for kind, body in chunks)


@inputs(300)
@given(content=png_like())
@example(
    content=RGB[:HEADER_BYTES]
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    + RGB[HEADER_BYTES:]
)
def test_a_png_is_decoded_at_the_size_and_kind_of_its_header_or_refused(content: bytes) -> None:
    try:
        header = read_png_header(content[:HEADER_BYTES])
        picture = decode_png(content)
    except ValueError as error:
        assert type(error) is ValueError, "a message, not an error of Python's own"
        return
    assert (picture.height, picture.width) == (header.height, header.width)
    if header.kind in ("8-bit grey", "8-bit RGB"):
        assert picture.mode == {"8-bit grey": "L", "8-bit RGB": "RGB"}[header.kind]


@inputs(100)
@given(content=png_like(), is_label=st.booleans(), kind=st.sampled_from(["labelIds", "labelTrainIds"]))
def test_frames_are_read_as_image_and_train_ids_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, is_label: bool, kind: str
) -> None:
    root = tmp_path_factory.getbasetemp() / "frames" / kind
    for split in SPLITS:
        for folder, ending, sound in (("leftImg8bit", "leftImg8bit", RGB), ("gtFine", f"gtFine_{kind}", GREY)):
            path = root / folder / split / "town" / f"a_{ending}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if split == "train" and is_label == (folder == "gtFine") else sound)
    try:
        source = open_source(str(root))
        frame = source.load("train", 0)
    except InputError as error:
        assert all(str(root) in problem for problem in error.problems)
        return
    assert frame.image.shape == (*source.frame_size, 3)
    assert frame.label.shape == source.frame_size
    assert frame.image.dtype == frame.label.dtype == np.uint8
    assert set(np.unique(frame.label).tolist()) <= {*range(len(CITYSCAPES)), VOID}
