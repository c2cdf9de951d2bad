"""Read PNG files as what they mean: size and kind from the header, pixels without what is stored beside them.

Pillow re-scales grey of 1 to 4 bits, cuts colour of 16 bits to 8, and refuses files with a large profile or text. So
the kind is read here, and only chunks that make pixels are given to Pillow. Errors are ValueErrors that continue the
file's name: "is empty (0 bytes): ...".
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from PIL import Image

HEADER_BYTES: Final = 33  # the signature, and the chunk IHDR with its checksum
MAX_FRAME_PIXELS: Final = 64 * 2**20
"""A small file can unfold to gigabytes."""

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES: Final = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
_OTHER_FORMATS: Final = {
    b"\xff\xd8\xff": "a JPEG",
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"RIFF": "a WebP",
    b"P5": "a PGM",
    b"P6": "a PPM",
}
_COPY_AGAIN: Final = "unpack or copy it again, or remove the frame"


class PngHeader(NamedTuple):
    """Holds what a PNG says of its pixels. `kind` is depth and colour, such as `8-bit RGB` or `4-bit palette`."""

    height: int
    width: int
    kind: str


def read_png_header(content: bytes) -> PngHeader:
    """Return the header of a PNG from its first `HEADER_BYTES`. ValueError if it is none, damaged or absurdly large."""
    if not content:
        raise ValueError(f"is empty (0 bytes): {_COPY_AGAIN}.")
    if not content.startswith(_SIGNATURE):
        if content.startswith(b"version https://git-lfs"):
            raise ValueError("is a pointer of Git LFS, not the file itself: fetch it with git lfs pull.")
        for magic, name in _OTHER_FORMATS.items():
            if content.startswith(magic):
                raise ValueError(
                    f"is {name}, whatever its name says: save it as PNG, and make a label from its original again: its "
                    "ids may have changed."
                )
        raise ValueError(f"cannot be read as PNG (it does not begin as one): {_COPY_AGAIN}.")
    if len(content) < HEADER_BYTES:
        raise ValueError(f"cannot be read as PNG (it ends within its header): {_COPY_AGAIN}.")
    width, height, depth, colour_type = struct.unpack(">IIBB", content[16:26])
    checksum = int.from_bytes(content[29:33])
    if content[12:16] != b"IHDR" or zlib.crc32(content[12:29]) != checksum or 0 in (width, height):
        raise ValueError(f"cannot be read as PNG (its header is damaged): {_COPY_AGAIN}.")
    if width * height > MAX_FRAME_PIXELS:
        raise ValueError(
            f"claims more than {MAX_FRAME_PIXELS:,} pixels, the most a frame may have: remove or replace it."
        )
    return PngHeader(height, width, f"{depth}-bit {_COLOUR_TYPES.get(colour_type, 'of unknown colours')}")


def decode_png(content: bytes) -> Image.Image:
    """Decode a PNG whose header is right. ValueError if its pixels are damaged."""
    try:
        with Image.open(io.BytesIO(b"".join(_pixel_chunks(content))), formats=("PNG",)) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:  # all that Pillow raises
        raise ValueError(f"cannot be read as PNG ({error}): {_COPY_AGAIN}.") from error


def _pixel_chunks(content: bytes) -> Iterator[bytes]:
    """Yield the signature and the chunks without which there is no picture: those in capitals, says the standard.

    ValueError if there is a second header: Pillow would decode by that one, and it was not checked.
    """
    yield content[: len(_SIGNATURE)]
    start = len(_SIGNATURE)
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4])
        if start >= HEADER_BYTES and content[start + 4 : start + 8] == b"IHDR":
            raise ValueError("it has two headers")
        if content[start + 4 : start + 5].isupper():
            yield content[start:end]
        start = end
