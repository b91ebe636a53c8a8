from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from denoiselab.data import decoding
from denoiselab.data.decoding import BrokenImageError, decode
from stand_ins import random_images

KINDS = "BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"
RAMP = np.arange(16, dtype=np.uint8).reshape(4, 4) * 15


def pixels(path, **changes):
    """Of a file, with the channels last."""
    values = {"channels": 3, "size": (4, 4), **changes}
    return decode(path, **values).permute(1, 2, 0).numpy()


def reason(path, **changes):
    """Why a file cannot be decoded: what comes after its name."""
    with pytest.raises(BrokenImageError) as caught:
        pixels(path, **changes)
    line = str(caught.value)
    assert line.startswith(f"{path} ")
    assert "\n" not in line
    assert " object" not in line
    return line.removeprefix(f"{path} ")


def encoded(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def png(width, height, depth, colour, rows, *chunks):
    """A PNG file, bit by bit: Pillow writes no 16-bit colours and no sizes that are not there."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in parts)


def deep(values, more=0):
    """8-bit values in 16 bits, the upper byte first."""
    return (values.astype(int) * 257 + more).astype(">u2")


# -- pixels of every kind --


def test_16_bit_grey(tmp_path):
    turned = np.rot90(RAMP, -1)
    files = {
        "a.png": (png(4, 4, 16, 0, deep(RAMP)), RAMP),
        "a.pgm": (b"P5 4 4 65535\n" + deep(RAMP).tobytes(), RAMP),
        "plain.pgm": (b"P2 4 4 65535\n" + " ".join(map(str, deep(RAMP).flat)).encode(), RAMP),
        "ten_bits.pgm": (b"P5 4 4 1020\n" + (RAMP * 4.0).astype(">u2").tobytes(), RAMP),
        "a.tif": (encoded(Image.fromarray(deep(RAMP).astype("<u2")), "TIFF"), RAMP),
        "white_is_0.tif": (encoded(Image.fromarray(deep(RAMP).astype("<u2")), "TIFF", tiffinfo={262: 0}), 255 - RAMP),
        "turned.tif": (encoded(Image.fromarray(deep(RAMP).astype("<u2")), "TIFF", tiffinfo={274: 6}), turned),
        "rounded.png": (png(4, 4, 16, 0, deep(RAMP, 128)), RAMP),
        "rounded_up.png": (png(4, 4, 16, 0, deep(RAMP, 129)), RAMP + 1),
    }
    for name, (data, wanted) in files.items():
        (tmp_path / name).write_bytes(data)
        for channels in (1, 3):
            got = pixels(tmp_path / name, channels=channels)
            assert (got == wanted[:, :, None]).all(), name


def test_16_bit_colours_and_transparency(tmp_path):
    rgb = random_images(1, 4)[0]
    opaque, grey_alpha = np.full((4, 4, 1), 255, np.uint8), np.stack([RAMP, 255 - RAMP], -1)
    key = (b"tRNS", struct.pack(">HHH", *deep(rgb[1, 2])))
    keyed = rgb.copy()
    keyed[1, 2] = 255
    over_white = 255 - (255.0 - RAMP) * (255.0 - RAMP) / 255
    files = {
        "rgb.png": (png(4, 4, 16, 2, deep(rgb)), rgb),
        "rgb.ppm": (b"P6 4 4 65535\n" + deep(rgb).tobytes(), rgb),
        "rgba.png": (png(4, 4, 16, 6, deep(np.concatenate([rgb, opaque], -1))), rgb),
        "keyed.png": (png(4, 4, 16, 2, deep(rgb), key), keyed),
        "grey_alpha.png": (png(4, 4, 16, 4, deep(grey_alpha)), over_white[:, :, None]),
        "keyed_grey.png": (
            png(4, 4, 16, 0, deep(RAMP), (b"tRNS", struct.pack(">H", 257 * 30))),
            np.where(RAMP == 30, 255, RAMP)[:, :, None],
        ),
    }
    for name, (data, wanted) in files.items():
        (tmp_path / name).write_bytes(data)
        assert np.abs(pixels(tmp_path / name) - wanted).max() <= (name == "grey_alpha.png"), name


def test_palettes_are_exact(tmp_path):
    colours, indices = random_images(1, 4)[0].reshape(16, 3), RAMP // 15
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    for name, kind, how in [("a.png", "PNG", {}), ("a.gif", "GIF", {}), ("a.bmp", "BMP", {}), ("a.tif", "TIFF", {})]:
        (tmp_path / name).write_bytes(encoded(image, kind, **how))
        assert (pixels(tmp_path / name) == colours[indices]).all(), name
    (tmp_path / "b.png").write_bytes(encoded(image, "PNG", transparency=bytes([0] + [255] * 15)))
    wanted = colours[indices].copy()
    wanted[0, 0] = 255
    assert (pixels(tmp_path / "b.png") == wanted).all()


def test_inks(tmp_path):
    inks = {"red": (0, 255, 255, 0), "green": (255, 0, 255, 0), "grey": (0, 0, 0, 155), "violet": (128, 255, 0, 0)}
    wanted = {"red": (255, 0, 0), "green": (0, 255, 0), "grey": (100, 100, 100), "violet": (127, 0, 255)}
    for name, ink in inks.items():
        for kind in ("JPEG", "TIFF"):
            path = tmp_path / f"{name}.{kind}"
            path.write_bytes(encoded(Image.new("CMYK", (16, 16), ink), kind))
            assert np.abs(pixels(path, size=(16, 16)).astype(int) - wanted[name]).max() <= 3, (name, kind)


def test_the_first_of_several_frames(tmp_path):
    first, *others = (Image.fromarray(image) for image in random_images(3, 16))
    for name, kind, how in [
        ("a.webp", "WEBP", {"lossless": True}),
        ("a.png", "PNG", {}),
        ("a.tif", "TIFF", {}),
    ]:
        (tmp_path / name).write_bytes(encoded(first, kind, save_all=True, append_images=others, **how))
        with Image.open(tmp_path / name) as image:
            assert image.n_frames == 3
        assert (pixels(tmp_path / name, size=(16, 16)) == np.array(first)).all(), name
    grey, *others = (Image.fromarray(np.full((4, 4), 100, np.uint8) + RAMP // s) for s in (3, 5, 7))
    (tmp_path / "a.gif").write_bytes(encoded(grey, "GIF", save_all=True, append_images=others))
    assert (pixels(tmp_path / "a.gif", channels=1)[:, :, 0] == np.array(grey)).all()
    (tmp_path / "two.jpg").write_bytes(encoded(first, "MPO", save_all=True, append_images=others))
    (tmp_path / "one.jpg").write_bytes(encoded(first, "JPEG"))
    assert (pixels(tmp_path / "two.jpg") == pixels(tmp_path / "one.jpg")).all()


def test_a_wrong_extension_does_not_matter(tmp_path):
    image = random_images(1, 16)[0]
    for kind in ("PNG", "BMP", "PPM", "TIFF", "GIF"):
        path = tmp_path / f"{kind}.jpg"
        path.write_bytes(encoded(Image.fromarray(image), kind))
        assert np.abs(pixels(path, size=(16, 16)).astype(int) - image).max() <= (255 if kind == "GIF" else 0), kind


def test_notes_of_a_camera_that_make_no_sense_spoil_no_picture(tmp_path):
    image = Image.fromarray(random_images(1, 4)[0])
    nonsense = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\1\x01\x12\0\7\0\0\0\1\xff\xff\0\0\0\0\0\0"  # an orientation of 255 bytes
    for name, exif in [("a.png", nonsense), ("b.png", b"Exif\0\0no notes at all, but long enough for some")]:
        image.save(tmp_path / name, exif=exif)
        assert (pixels(tmp_path / name) == np.array(image)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path, orientation):
    corners = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac"}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.array([[1, 2], [3, 4]], np.uint8)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    shown = ["abcd"[v - 1] for v in pixels(tmp_path / "a.png", channels=1, size=(2, 2)).flat]
    assert "".join(shown) == corners


# -- what cannot be decoded --


def test_what_is_no_image(tmp_path):
    image = Image.fromarray(random_images(1, 16)[0])
    kinds = f"is no image ({KINDS})"
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for ever
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("nothing.png")
    for name, data in [
        ("empty.png", b""),
        ("text.png", b"this is no image"),
        ("short.png", b"x"),
        ("eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"),
        ("jpeg_2000.jpg", encoded(image, "JPEG2000")),
        ("icon.png", encoded(image, "ICO")),
        ("float.tif", encoded(Image.new("F", (4, 4)), "TIFF")),
        ("long.tif", encoded(Image.new("I", (4, 4)), "TIFF")),
        ("nothing_wide.png", png(0, 4, 8, 0, [])),
    ]:
        (tmp_path / name).write_bytes(data)
    wanted = {
        "missing.png": "is missing",
        "dangling.png": "is missing",
        "loop.png": "cannot be read (too many levels of symbolic links)",
        "folder.png": "is no file",
        "pipe.png": "is no file",
        "empty.png": "is empty",
        **dict.fromkeys(["text.png", "short.png", "eps.png", "jpeg_2000.jpg", "icon.png"], kinds),
        **dict.fromkeys(["float.tif", "long.tif"], "has 32-bit pixels, which have no fixed range"),
        "nothing_wide.png": "is damaged or cut short",
    }
    assert {name: reason(tmp_path / name) for name in wanted} == wanted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS.split(", "))
def test_what_is_cut_short_is_refused(tmp_path, kind):
    data = encoded(Image.fromarray(random_images(1, 40)[0]), kind)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    pixels(path)
    for part in (0.02, 0.1, 0.3, 0.5, 0.8, 0.97):
        path.write_bytes(data[: int(part * len(data))])
        assert reason(path) in ("is cut short", "is damaged or cut short", f"is no image ({KINDS})"), part
    path.write_bytes(data[: len(data) // 2])
    if kind not in ("WEBP", "TIFF"):
        assert reason(path) == "is cut short"


@pytest.mark.filterwarnings("ignore")  # Pillow has its own words for some of it
def test_damage_of_any_kind_is_one_line(tmp_path):
    """Bytes that are changed at random: either the file can be decoded still, or `reason` finds its line as it should be."""
    rng, path, refused = np.random.default_rng(0), tmp_path / "a.png", 0
    image = Image.fromarray(random_images(1, 24)[0])
    for kind in KINDS.split(", "):
        data = np.frombuffer(encoded(image, kind), np.uint8)
        for _ in range(25):
            spoilt = data.copy()
            where = rng.integers(0, min(len(data), 200), 3)
            spoilt[where] = rng.integers(0, 256, 3)
            path.write_bytes(spoilt.tobytes())
            try:
                assert pixels(path).shape == (4, 4, 3)
            except BrokenImageError:
                assert reason(path)
                refused += 1
    assert refused > 30


def test_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: loaded.append(image))
    jpeg = bytearray(encoded(Image.new("L", (16, 16)), "JPEG"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", 60000, 50000)  # height, width
    tags = [(256, 99999), (257, 88888), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 8)]
    tiff = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags)
    files = {
        "20000x10000": png(20000, 10000, 1, 0, []),
        "10001x10000": png(10001, 10000, 8, 2, []),
        "50000x60000": bytes(jpeg),
        "30000x30000": b"P6 30000 30000 255\n",
        "65535x65535": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
        "99999x88888": tiff + bytes(4),
    }
    for size, data in files.items():
        (tmp_path / size).write_bytes(data)
        assert reason(tmp_path / size) == f"has {size} pixels, more than 100,000,000"
    assert loaded == []


def test_the_limit_is_below_pillows_and_holds_whatever_pillows_is_set_to(tmp_path, monkeypatch):
    assert decoding.MAX_PIXELS < 2 * Image.MAX_IMAGE_PIXELS  # where it raises
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 12)
    path = tmp_path / "a.png"
    Image.new("L", (4, 3)).save(path)
    assert pixels(path, size=(3, 4)).shape == (3, 4, 3)
    Image.new("L", (13, 1)).save(path)
    assert reason(path) == "has 13x1 pixels, more than 12"


def test_16_bit_grey_and_transparency_take_a_few_bytes_a_pixel(tmp_path):
    """In a process of its own, whose peak is its own."""
    grey = np.zeros((4000, 4000), ">u2")
    (tmp_path / "grey.png").write_bytes(png(4000, 4000, 16, 0, grey))
    (tmp_path / "rgba.png").write_bytes(png(4000, 4000, 8, 6, grey.view(np.uint8).repeat(2, 1)))
    program = """
import re, sys
from pathlib import Path
from denoiselab.data.decoding import decode

def peak():  # of this program alone, in kB; the system's other number is also that of the one that started it
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

small, *large = map(Path, sys.argv[1:])
decode(small, channels=3, size=(4, 4))
for path in large:
    before = peak()
    decode(path, channels=3, size=(4, 4))
    print((peak() - before) * 1024 / 4000**2)
"""
    (tmp_path / "small.png").write_bytes(png(4, 4, 16, 0, deep(RAMP)))
    names = [str(tmp_path / f"{name}.png") for name in ("small", "grey", "rgba")]
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=True)
    assert all(float(bytes_a_pixel) < 14 for bytes_a_pixel in done.stdout.split())


def test_every_level_of_16_bits_is_rounded_as_it_should_be(tmp_path):
    levels = np.arange(2**16).reshape(256, 256).astype(">u2")
    (tmp_path / "a.png").write_bytes(png(256, 256, 16, 0, levels))
    found = pixels(tmp_path / "a.png", channels=1, size=(256, 256))[:, :, 0]
    assert (found == np.round(levels / 257.0)).all()


def test_what_few_bytes_make_expensive_is_refused(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: loaded.append(image))
    lengths = struct.pack("<IiiHHIIiiII", 40, 2**23 + 1, 1, 1, 8, 1, 0, 0, 0, 256, 0)  # a BMP with run lengths
    tags = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (277, 1), (322, 16384), (323, 16384), (324, 8), (325, 8)]
    tiff = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags)
    jpeg = encoded(Image.fromarray(random_images(1, 16)[0]), "JPEG", progressive=True)
    end, scan = jpeg.rindex(b"\xff\xd9"), jpeg.rindex(b"\xff\xda")
    hidden = b"\xff\xe1\0\4\xff\xd9"  # an end within a segment is none
    files = {
        "has 8388609x1 pixels in run lengths, more than 8,388,608": b"BM"
        + struct.pack("<IHHI", 0, 0, 0, 1078)
        + lengths,
        "has 16384x16384 pixels in a tile, more than 100,000,000": tiff + bytes(4),
        "has more than 100 scans": jpeg[:scan] + hidden + 100 * jpeg[scan:end] + jpeg[end:],
    }
    for i, (line, data) in enumerate(files.items()):
        (tmp_path / str(i)).write_bytes(data + bytes(2000))
        assert reason(tmp_path / str(i)) == line
    assert loaded == []


def test_scans_of_other_pictures_in_a_file_do_not_count(tmp_path):
    image = Image.fromarray(random_images(1, 16)[0])
    for jpeg in (encoded(image, "JPEG", progressive=True), encoded(image, "JPEG", quality=100)):
        exif = b"\xff\xe1" + struct.pack(">H", 2 + 2 * 120) + b"\xff\xda" * 120
        (tmp_path / "a.jpg").write_bytes(jpeg)
        (tmp_path / "b.jpg").write_bytes(jpeg[:2] + exif + jpeg[2:] + b"\0\2" + b"\xff\xda\0\2" * 120)
        assert (pixels(tmp_path / "a.jpg") == pixels(tmp_path / "b.jpg")).all()
        assert decoding._scans(jpeg) == jpeg.count(b"\xff\xda")


def test_a_thread_of_an_image_is_not_blown_up(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (60000, 1), 7).save(path)
    assert (
        reason(path, crop="adm", size=(256, 256)) == "has 15360000x256 pixels when it is scaled, more than 100,000,000"
    )
    assert (pixels(path, size=(256, 256)) == 7).all()


def test_chunks_that_unpack_to_more_than_they_should_are_refused(tmp_path):
    for name in (b"zTXt", b"iCCP"):
        (tmp_path / "a.png").write_bytes(
            png(4, 4, 16, 0, deep(RAMP), (name, b"a\0\0" + zlib.compress(bytes(50_000_000))))
        )
        assert reason(tmp_path / "a.png") == "is damaged or cut short"


def test_names_stay_in_one_line(tmp_path):
    for name in ("new\nline.png", "bytes\udcff.png", "\x1b[31mred.png"):
        with pytest.raises(BrokenImageError) as caught:
            decode(tmp_path / name, channels=3, size=(4, 4))
        assert str(caught.value) == f"{str(tmp_path / name)!a} is missing"
    assert reason(tmp_path / "ä ö.png") == "is missing"


def test_the_line_survives_the_way_out_of_a_worker():
    """A loader hands an error on as its whole traceback."""
    wrapped = (
        "Caught BrokenImageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n\n"
        "denoiselab.data.decoding.BrokenImageError: /a/b c.png is cut short\n"
    )
    assert str(BrokenImageError(wrapped)) == "/a/b c.png is cut short"
    assert str(pickle.loads(pickle.dumps(BrokenImageError("a is empty")))) == "a is empty"
    assert isinstance(BrokenImageError("a is empty"), ValueError)


def test_nothing_of_the_decoder_is_left_open(tmp_path):
    (tmp_path / "a.png").write_bytes(png(4, 4, 16, 0, deep(RAMP)))
    (tmp_path / "b.png").write_bytes(encoded(Image.fromarray(RAMP), "PNG")[:-40])
    (tmp_path / "c.png").write_bytes(b"none")
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        pixels(tmp_path / "a.png")
        for name in "bc":
            reason(tmp_path / f"{name}.png")
    assert len(os.listdir("/dev/fd")) == before
