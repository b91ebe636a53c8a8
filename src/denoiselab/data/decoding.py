"""From an image file to pixels of one shape, or in one line why there is no way."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

Crop = Literal["fit", "adm"]
OnCorrupt = Literal["fail", "skip"]

KINDS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no other is opened: for some, Pillow starts a program
MAX_PIXELS = 100_000_000  # width times height, far above what sets for training hold; one may take 12 bytes to decode
MAX_RLE_PIXELS = 2**23  # of a BMP with run lengths, which Pillow decodes in Python
MAX_SCANS = 100  # of a JPEG: each goes over all pixels, however few bytes it has; encoders make about 10
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")  # of those that a segment of some length follows, and the end
TURNS = {  # EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImageError(ValueError):
    """A file that is no image which can be decoded: one line, which begins with its name."""

    def __init__(self, line: str) -> None:
        # a loader's worker hands an error on as the text of its whole traceback, which ends in the line
        super().__init__(line.rstrip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


def check_crop(crop: Crop, size: tuple[int, int]) -> None:
    """See to it that images of `size` (height, width) can be cut in that way.

    Raises:
        ValueError: otherwise.
    """
    if crop not in ("fit", "adm"):
        raise ValueError(f"crop={crop}: must be fit or adm")
    if crop == "adm" and size[0] != size[1]:
        raise ValueError(f"crop=adm: cuts squares, not {size[0]}x{size[1]}; use crop=fit")


def check_on_corrupt(on_corrupt: OnCorrupt) -> None:
    """See to it that this is one of the two ways to treat broken files.

    Raises:
        ValueError: otherwise.
    """
    if on_corrupt not in ("fail", "skip"):
        raise ValueError(f"on_corrupt={on_corrupt}: must be fail or skip")


def to_grey_or_rgb(image: Image.Image, channels: int) -> Image.Image:
    """The image upright (EXIF orientation) in 8-bit grey (channels 1, luma of ITU-R 601) or RGB (channels 3).

    Transparency is composited on white; 16 bits become 8 (grey is rounded, of colours Pillow keeps the upper byte);
    palettes, CMYK and the rest go through RGB, without regard to colour profiles.

    Raises:
        BrokenImageError: if the pixels have no fixed range (32-bit integers or floats).
    """
    turn = _orientation(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = _deep_grey(image)
    elif image.mode in ("I", "F"):
        raise BrokenImageError("has 32-bit pixels, which have no fixed range")
    if turn in TURNS:
        image = image.transpose(TURNS[turn])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def _orientation(image: Image.Image) -> int:
    """How the camera was held, of EXIF; notes that make no sense spoil no picture."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # of many kinds
        return 1


def _deep_grey(image: Image.Image) -> Image.Image:
    """16-bit grey in 8 bits; what is transparent is white."""
    tags = getattr(image, "tag_v2", {})  # of TIFF, which may fill fewer bits, and count from white
    full = 2 ** tags.get(258, (16,))[0] - 1
    levels = np.arange(full + 1)
    if tags.get(262) == 0:
        levels = full - levels
    if isinstance(transparent := image.info.get("transparency"), int):
        levels[transparent] = full
    table = np.full(2**16, 255)  # what Pillow's lookup takes
    table[: full + 1] = np.round(levels * 255 / full)
    return image.convert("I").point(table.tolist(), "L")


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image so that it covers `size` (height, width) and cut out the centre, in one go.

    Pillow's bicubic filter antialiases when it shrinks; an image that has the size already is left as it is.
    """
    if image.size == size[::-1]:
        return image
    return ImageOps.fit(image, size[::-1], method=Image.Resampling.BICUBIC)


def adm_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The same as Dhariwal & Nichol 2021 do it for ImageNet (`center_crop_arr` of the code of ADM, used by DiT and SiT).

    While it stays as large, the image is halved by averaging 2x2 pixels; then its shorter side is scaled to that of the
    square with the bicubic filter, to whole pixels, and the centre is cut out.

    Raises:
        BrokenImageError: if the image is so narrow that its longer side would get out of hand.
    """
    side = size[0]
    assert size == (side, side)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    _check_pixels(width, height, MAX_PIXELS, " when it is scaled")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def decode(path: Path, *, channels: int, size: tuple[int, int], crop: Crop = "fit") -> Tensor:
    """Read an image file, scale it so that it covers `size` and cut out the centre.

    What a file is, its first bytes say and not its name. Of several frames or pages the first is taken.

    Args:
        path: of the file.
        channels: 1 (grey) or 3 (RGB).
        size: (height, width) in pixels.
        crop: how to scale and cut: `fit` or, for a square, `adm_crop`.

    Returns:
        uint8 of shape (channels, height, width).

    Raises:
        BrokenImageError: if the file is missing, is no whole image of `KINDS`, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with _open(path) as file:
            plain = to_grey_or_rgb(_load(file), channels)
        plain = (adm_crop if crop == "adm" else fit)(plain, size)
    except Exception as error:  # Pillow's decoders raise many kinds
        name = str(path)
        raise BrokenImageError(f"{name if name.isprintable() else ascii(name)} {_reason(error)}") from error
    return torch.from_numpy(np.array(plain)).reshape(*size, channels).permute(2, 0, 1).contiguous()


def _open(path: Path) -> IO[bytes]:
    """The file, if there is something in it; a pipe would wait for ever."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise BrokenImageError("is no file")
    if found.st_size == 0:
        raise BrokenImageError("is empty")
    return path.open("rb")


def _load(file: IO[bytes]) -> Image.Image:
    """The first frame of an image of `KINDS`; how large it is is looked at before it is decoded.

    `Image.open` would not say how many pixels too large an image has.
    """
    Image.init()
    start = file.read(16)
    for kind in KINDS:
        reader, accepts = Image.OPEN[kind]
        if accepts is not None and accepts(start) is True:
            file.seek(0)
            image = reader(file, "")
            _check_costs(image, file)
            image.load()
            return image
    raise BrokenImageError(f"is no image ({', '.join(KINDS)})")


def _check_costs(image: Image.Image, file: IO[bytes]) -> None:
    """Refuse what would take memory or time out of all proportion.

    Raises:
        BrokenImageError: saying what there is too much of.
    """
    _check_pixels(*image.size, MAX_PIXELS)
    if isinstance(image, BmpImageFile) and image.info.get("compression") in (1, 2):
        _check_pixels(*image.size, MAX_RLE_PIXELS, " in run lengths")
    if isinstance(image, TiffImageFile):  # a tile may be larger than the image
        width, height = (int(image.tag_v2.get(tag, 0)) for tag in (322, 323))
        _check_pixels(width, height, MAX_PIXELS, " in a tile")
    if isinstance(image, JpegImageFile):
        file.seek(0)
        if _scans(file.read()) > MAX_SCANS:
            raise BrokenImageError(f"has more than {MAX_SCANS} scans")


def _scans(data: bytes) -> int:
    """How many scans a JPEG has, at most one more than `MAX_SCANS` of them; what follows its end does not count."""
    scans, place = 0, 2
    while scans <= MAX_SCANS and (marker := _MARKER.search(data, place)) is not None and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return scans


def _check_pixels(width: int, height: int, most: int, where: str = "") -> None:
    if width * height > most:
        raise BrokenImageError(f"has {width}x{height} pixels{where}, more than {most:,}")


def _reason(error: Exception) -> str:
    """Why a file cannot be decoded, in a few plain words: what Pillow says may name objects by their addresses."""
    if isinstance(error, BrokenImageError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, OSError) and error.errno and error.strerror:
        return f"cannot be read ({error.strerror.lower()})"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    return "is cut short" if "truncated" in str(error).lower() else "is damaged or cut short"
