import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipshift_core import images
from clipshift_core.images import Unreadable, decode, resize


def picture(height=40, width=56, channels=3, seed=0):
    """Smooth and textured at once, no symmetry, all sides different."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([4 * x + y, 255 - 5 * y, 3 * x + 2 * y, 255 - 4 * x][:channels], axis=-1)
    return np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8)


def encoded(pixels, format, mode=None, **options):
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(out, format, **options)
    return out.getvalue()


def by_cv2(data, flags=cv2.IMREAD_COLOR_RGB):
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


@pytest.fixture(autouse=True)
def nothing_on_screen(capfd):
    """No warning of Python, no line on stdout or stderr, from C code either."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 60, "progressive": True, "subsampling": 0}),
        ("PNG", {}),
    ],
)
def test_common_files_decode_to_the_pixels_of_opencv(mode, format, options):
    data = encoded(picture(), format, mode, **options)
    np.testing.assert_array_equal(decode(data), by_cv2(data))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_pixels_back(format):
    pixels = decode(encoded(picture(), format, **({"lossless": True} if format == "WEBP" else {})))
    np.testing.assert_array_equal(pixels, picture())
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous


def test_transparency_is_composited_over_white():
    rgba = picture(channels=4)
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    expected = alpha * colour + (1 - alpha) * 255
    for format in ("PNG", "TIFF"):
        assert np.abs(decode(encoded(rgba, format)) - expected).max() <= 1
    grey_alpha = Image.fromarray(rgba).convert("LA")
    grey = np.asarray(grey_alpha)[..., :1].astype(float)
    assert np.abs(decode(encoded(grey_alpha, "PNG")) - (alpha * grey + (1 - alpha) * 255)).max() <= 1


def test_palettes_with_and_without_a_transparent_entry():
    indices = (np.arange(40 * 56).reshape(40, 56) % 3).astype(np.uint8)
    palette = np.array([[200, 10, 30], [5, 120, 240], [90, 90, 0]], np.uint8)
    image = Image.frombytes("P", (56, 40), indices.tobytes())
    image.putpalette(palette.tobytes())
    for format in ("PNG", "GIF", "BMP", "TIFF"):
        np.testing.assert_array_equal(decode(encoded(image, format)), palette[indices])
    for format in ("PNG", "GIF"):
        seen = np.where((indices == 1)[..., None], 255, palette[indices])
        np.testing.assert_array_equal(decode(encoded(image, format, transparency=1)), seen)


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.linspace(0, 65535, 40 * 56).reshape(40, 56).round().astype(np.uint16)
    for suffix in (".png", ".tiff"):
        data = cv2.imencode(suffix, deep)[1].tobytes()
        np.testing.assert_array_equal(decode(data), np.rint(deep / 257)[..., None].repeat(3, axis=-1))
        assert decode(data).max() == 255
    pgm = b"P5 56 40 65535\n" + deep.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(pgm)[..., 0], np.rint(deep / 257))
    colour = np.stack([deep, deep[::-1], deep[:, ::-1]], axis=-1)
    for suffix in (".png", ".tiff"):
        data = cv2.imencode(suffix, cv2.cvtColor(colour, cv2.COLOR_RGB2BGR))[1].tobytes()
        assert np.abs(decode(data) - colour / 257).max() < 1
        assert decode(data).max() == 255


def test_cmyk_and_ycck_jpegs():
    cmyk = np.broadcast_to(np.array([30, 140, 80, 60], np.uint8), (32, 32, 4))
    data = encoded(Image.frombytes("CMYK", (32, 32), cmyk.tobytes()), "JPEG", quality=100)
    expected = (1 - np.array([30, 140, 80]) / 255) * (255 - 60)
    assert np.abs(decode(data) - expected).max() <= 2

    marker = data.index(b"Adobe")
    assert data[marker + 11] == 0  # the transform of Adobe's marker: 0 is CMYK as it is, 2 is YCCK
    ycck = data[: marker + 11] + b"\2" + data[marker + 12 :]
    y, cb, cr, k = 255 - np.array([30, 140, 80, 60.0])  # Adobe stores the inverse
    red, green, blue = y + 1.402 * (cr - 128), y - 0.344 * (cb - 128) - 0.714 * (cr - 128), y + 1.772 * (cb - 128)
    cmy = np.clip([red, green, blue], 0, 255)  # its two inversions, of the inks and of Y, undo each other
    assert np.abs(decode(ycck) - (255 - cmy) * k / 255).max() <= 3
    for jpeg in (data, ycck):
        assert np.abs(decode(jpeg) - by_cv2(jpeg).astype(int)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    p = picture()
    upright = [p, p[:, ::-1], p[::-1, ::-1], p[::-1], p.swapaxes(0, 1)]
    upright += [np.rot90(p, -1), p[::-1, ::-1].swapaxes(0, 1), np.rot90(p)]  # the eight of the Exif standard
    for format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode(encoded(p, format, exif=exif)), upright[orientation - 1])
    webp = encoded(p, "WEBP", exif=exif, lossless=True)
    np.testing.assert_array_equal(decode(webp), upright[orientation - 1])
    jpeg = encoded(p, "JPEG", exif=exif)
    np.testing.assert_array_equal(decode(jpeg), by_cv2(jpeg))  # OpenCV applies it too


def test_damaged_exif_does_not_cost_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encoded(picture(), "JPEG", exif=exif))
    at = data.index(b"Exif\0\0") + 6
    data[at : at + 20] = b"\xff" * 20
    assert decode(bytes(data)).shape == (40, 56, 3)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format):
    first, second = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (20, 10), (0, 0, 255))
    data = encoded(first, format, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(decode(data).astype(int) - [255, 0, 0]).max() <= 2


def png_that_declares(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(12_000, 12_000), (15_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_by_their_header(size, monkeypatch):
    def no(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(images, "_rgb", no)
    with pytest.raises(Unreadable, match=r"declares .*134,217,728"):
        decode(png_that_declares(*size))


def test_a_large_image_within_the_limit_is_read_in_silence(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 56 - 1)  # where Pillow warns
    assert decode(encoded(picture(), "PNG")).shape == (40, 56, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF"])
def test_files_cut_off_anywhere_are_unreadable(format):
    data = encoded(picture(), format)
    for share in (0.02, 0.3, 0.5, 0.8, 0.95):
        with pytest.raises(Unreadable) as caught:
            decode(data[: int(len(data) * share)])
        assert 5 < len(str(caught.value)) < 160
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n", "its PNG header is broken or cut off"),
        (b"not an image at all", "not an image that is read here"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "a HEIC photograph"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image that is read here"),
        (encoded(picture(), "JPEG")[:300], "cut off: the JPEG ends early"),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "TIFF of mode F has no defined white"),
    ],
)
def test_reasons_are_for_people(data, reason):
    with pytest.raises(Unreadable, match=reason):
        decode(data)


SAMPLES = [
    *(encoded(picture(12, 17), format) for format in images.FORMATS),
    encoded(picture(12, 17), "JPEG", progressive=True),
    encoded(picture(12, 17, 4), "PNG"),
    encoded(picture(12, 17), "TIFF", compression="tiff_lzw"),
    encoded(Image.new("RGB", (9, 9)), "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]),
    cv2.imencode(".png", np.full((9, 9), 40_000, np.uint16))[1].tobytes(),
]
EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6)), max_size=8)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SAMPLES), EDITS, st.floats(0.5, 1))
def test_bytes_of_any_kind_give_pixels_or_unreadable(data, edits, keep):
    data = bytearray(data)
    for where, what in edits:
        at = int(where * len(data))
        data[at : at + len(what)] = what
    try:
        pixels = decode(bytes(data[: int(len(data) * keep)]))
    except Unreadable as reason:
        assert 5 < len(str(reason)) < 200
    else:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3


@given(st.binary(max_size=200))
def test_noise_is_unreadable(data):
    with pytest.raises(Unreadable):
        decode(data)


@pytest.mark.parametrize(("height", "width"), [(300, 500), (64, 48), (1000, 3)])
def test_resize_is_antialiased_bicubic_without_crop(height, width):
    source = picture(height, width)
    ours = resize(source, 224)
    tensor = torch.from_numpy(source).permute(2, 0, 1)[None].double()
    oracle = torch.nn.functional.interpolate(tensor, (224, 224), mode="bicubic", antialias=True)
    oracle = oracle[0].permute(1, 2, 0).clamp(0, 255).numpy()
    assert ours.shape == (224, 224, 3)
    assert ours.dtype == np.uint8
    assert np.abs(ours - oracle).max() <= 2  # Pillow rounds to 8 bits between its two passes
    assert np.abs(ours - oracle).mean() < 0.4
    assert resize(ours, 224) is ours
