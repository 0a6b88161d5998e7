"""Readers given damaged files: nothing escapes them but their own error, nothing is printed, nothing takes long.

The examples are the same in every run. `FUZZ=100000 pytest tests/test_fuzz.py` draws so many others instead.
"""

import hashlib
import io
import json
import math
import os
import shutil
import struct
import tarfile
import time
import warnings

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipshift_core import captions, images, isic, manifests, sae_formats, sources
from clipshift_core.activations import Origin
from clipshift_core.isic import IsicError
from clipshift_core.manifests import Manifest, SourceError
from clipshift_core.sae import BatchTopK, SaeError, TopK
from clipshift_core.sae_train import Statistics

LONG = 5.0
"""Processor seconds that no small damaged file takes."""


def fuzz(n_examples):
    n_drawn = os.environ.get("FUZZ")
    return settings(
        max_examples=int(n_drawn or n_examples),
        derandomize=n_drawn is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def nothing_on_screen(capfd):
    """No warning of Python, no line on stdout or stderr, from C code either."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert capfd.readouterr() == ("", "")


def picture(height=12, width=17, channels=3):
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 30, (height, width, channels))
    return (np.stack([13 * x, 17 * y, 7 * (x + y), 9 * x][:channels], axis=-1) + noise).clip(0, 255).astype(np.uint8)


def encoded(pixels, format, **options):
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, format, **options)
    return out.getvalue()


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E] = 6, "of a picture"
GREY, FRAMES = Image.new("L", (9, 9), 77), {"save_all": True, "append_images": [Image.new("RGB", (17, 12), "red")]}
SEEDS = [
    *(encoded(picture(), format) for format in images.FORMATS),
    encoded(picture(), "JPEG", progressive=True, exif=EXIF),
    encoded(GREY.convert("CMYK"), "JPEG"),
    encoded(picture(), "MPO", **FRAMES),
    encoded(picture(channels=4), "PNG", exif=EXIF),
    encoded(picture(), "PNG", **FRAMES),
    encoded(GREY.convert("P"), "PNG", transparency=3),
    encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"),
    *(encoded(picture(), "TIFF", compression=c) for c in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
    encoded(GREY.convert("1"), "TIFF", compression="group4"),
    encoded(GREY, "TIFF", big_tiff=True),
    encoded(Image.fromarray(picture()), "GIF", **FRAMES),
    encoded(picture(channels=4), "WEBP", lossless=True, exif=EXIF),
    encoded(picture(), "WEBP", **FRAMES),
    encoded(picture(), "AVIF", **FRAMES),
    encoded(GREY.convert("P"), "BMP"),
    b"P3 3 2 255\n" + b" ".join(b"%d" % (14 * i) for i in range(18)),
    b"P6 3 2 200\n" + bytes(range(18)),
    b"P1 4 2 0 1 1 0 # and so on\n 1 0 0 1",
    b"P7\nWIDTH 2\nHEIGHT 2\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n" + bytes(range(12)),
    b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 1078, 40, 8, 2, 1, 8, 1, 0, 0, 0, 256, 0) + b"\7" * 1024
    + b"\5\1\0\3abc\0\0\0\2\1\0\7\2\0\1",
]  # fmt: skip
WHERE = st.floats(0, 1, exclude_max=True)
NUMBERS = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**24, 2**31 - 1, 2**31, 2**32 - 1])
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), WHERE, st.integers(1, 255)),
        st.tuples(st.just("delete"), WHERE, st.integers(1, 40)),
        st.tuples(st.just("insert"), WHERE, st.binary(min_size=1, max_size=12)),
        st.tuples(st.just("number"), WHERE, st.tuples(NUMBERS, st.sampled_from(["<H", ">H", "<I", ">I", "B"]))),
        st.tuples(st.just("repeat"), WHERE, st.integers(1, 60)),
        st.tuples(st.just("cut"), WHERE, st.none()),
    ),
    max_size=8,
)


def mutated(data, edits):
    data = bytearray(data)
    for what, where, how in edits:
        at = int(where * len(data))
        match what:
            case "flip" if data:
                data[at] ^= how
            case "delete":
                del data[at : at + how]
            case "insert":
                data[at:at] = how
            case "number":
                number = struct.pack(how[1], how[0] % 2 ** (8 * struct.calcsize(how[1])))
                data[at : at + len(number)] = number
            case "repeat":
                data[at:at] = data[at : at + how] * 3
            case "cut":
                del data[at:]
    return bytes(data)


def timed(what, *arguments, **named):
    began = time.thread_time()
    try:
        return what(*arguments, **named)
    finally:
        assert time.thread_time() - began < LONG


@fuzz(1000)
@given(st.sampled_from(SEEDS), EDITS, st.sampled_from(SEEDS), WHERE)
def test_images(data, edits, other, splice):
    data = mutated(data, edits)
    if splice > 0.8:
        data = data[: int(len(data) * splice)] + other[int(len(other) * splice) :]
    try:
        pixels = timed(images.decode, data)
    except images.Unreadable as reason:
        assert 5 < len(str(reason)) < 200 and "\n" not in str(reason)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


# Shards -------------------------------------------------------------------------------------------------------------


def shard(format):
    out, jpeg = io.BytesIO(), encoded(picture(), "JPEG")
    with tarfile.open(
        fileobj=out, mode="w", format=format, pax_headers={"comment": "x"} if format == 2 else None
    ) as tar:
        for name in ("a.jpg", "a.txt", "a.json", f"{'long/' * 30}b.jpg", "../é.jpg", "link.jpg"):
            info = tarfile.TarInfo(name)
            if name == "link.jpg":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
                continue
            data = {"txt": b"a caption", "json": b'{"kind": "duck", "n": 2}'}.get(name.rpartition(".")[2])
            data = jpeg + name.encode() if data is None else data
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


SHARDS = [shard(tarfile.PAX_FORMAT), shard(tarfile.GNU_FORMAT)]
FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "link": (157, 100),
}
FIELDS |= {"magic": (257, 8), "prefix": (345, 155), "sparse": (386, 110)}
CONTENTS = st.one_of(
    st.sampled_from([b"77777777777\0", b"00000000000\0", b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\xff" * 11]),
    st.sampled_from(
        [b"\xff" * 11 + b"\0", b"\x80" + b"\0" * 10 + b"\2", b"0000001750\0", b"\0" * 12, b"           \0"]
    ),
    st.sampled_from([b"S", b"x", b"g", b"L", b"K", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"V", b"\0", b"0", b"X"]),
    st.sampled_from([b"../../x.jpg\0", b"/etc/x.jpg\0", b"a.txt\0", b"a.json\0", b"a.jpg\0", b".\0", b"\0"]),
    st.binary(min_size=1, max_size=20),
)
HEADERS = st.lists(st.tuples(WHERE, st.sampled_from(list(FIELDS)), CONTENTS), max_size=4)


def reheaded(data, changes):
    """Fields of headers replaced, with the checksum that this needs: else tarfile would look no further."""
    data = bytearray(data)
    starts = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for where, field, content in changes:
        at = starts[int(where * len(starts))]
        first, length = FIELDS[field]
        data[at + first : at + first + min(length, len(content))] = content[:length]
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


PAX = [b"size=-1", b"size=99999999999999999999999", b"size=1e3", b"size=", b"path=../../e.jpg", b"path=", b"=", b"path"]
PAX += [b"GNU.sparse.map=0,1,x", b"GNU.sparse.major=1", b"GNU.sparse.size=-5", b"GNU.sparse.realsize=9", b"mtime=nan"]


@fuzz(400)
@given(st.sampled_from(SHARDS), HEADERS, st.booleans(), EDITS, st.lists(st.sampled_from(PAX), max_size=3))
def test_shards(tmp_path_factory, data, changes, damaged, edits, pax):
    data = reheaded(data, changes)
    if pax:
        records = b"".join(b"%d %s\n" % (len(line) + 4 + (len(line) > 6), line) for line in pax)
        header = tarfile.TarInfo("pax")
        header.size, header.type = len(records), b"x"
        data = header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + data
    folder = tmp_path_factory.mktemp("shards")
    (folder / "x.tar").write_bytes(mutated(data, edits) if damaged else data)
    try:
        manifest = timed(manifests.build, folder, n_images=None, seed=0)
    except SourceError as error:
        assert "\n" not in str(error)
    else:
        assert manifest.images["image_id"].is_unique
        for row in manifest.images.itertuples():
            assert hashlib.sha256(manifests.read(row, folder)).hexdigest() == row.sha256
            assert ".." not in row.image_id.split("/") and not row.image_id.startswith("/")
        manifest.save(folder)
        assert Manifest.load(folder).digest == manifest.digest
    assert {file.name for file in folder.iterdir()} <= {"x.tar", "manifest.parquet", "set_aside.parquet"}
    shutil.rmtree(folder)


# Captions and factors -----------------------------------------------------------------------------------------------

NAMES = ["a.jpg", "sub/b.png", "café.jpg", "a.png", "tab\there.png", "sub/a.jpg"]
FIELD = st.one_of(
    st.sampled_from([*NAMES, "a", "sub\\b.png", "./a.jpg", '"', '""', ";", "\r", "\0"]), st.text(max_size=9)
)
TABLES = st.lists(st.lists(FIELD, min_size=1, max_size=4), max_size=6)


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    for name in NAMES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder, sources.listing(folder)[0]


@fuzz(400)
@given(
    TABLES,
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"]),
    st.one_of(st.just([]), EDITS),
)
def test_captions(listed, table, by, end, encoding, edits):
    folder, items = listed
    text = end.join(by.join(row) for row in [["file", "caption"], *table])
    file = folder.parent / f"captions-{os.getpid()}.csv"
    file.write_bytes(mutated(text.encode(encoding, "replace"), edits))
    try:
        found = timed(captions.captioned, items, folder, file)
    except SourceError as error:
        assert str(file) in str(error) and "\n" not in str(error)
    else:
        for caption in (item.caption() for item in found):
            assert caption is None or (caption.isprintable() or not any(ord(c) < 32 for c in caption))


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
FACTORS = st.dictionaries(
    st.one_of(st.sampled_from(["n", "caption", "path", "image_id", ""]), st.text(max_size=5)), VALUES
)


@fuzz(100)
@given(st.lists(st.tuples(FACTORS, EDITS), min_size=1, max_size=3))
def test_factors(tmp_path_factory, factors):
    folder = tmp_path_factory.mktemp("factors")
    with tarfile.open(folder / "x.tar", "w") as tar:
        for i, (some, edits) in enumerate(factors):
            for name, data in (
                (f"{i}.png", encoded(np.full((4, 4, 3), 9 * i, np.uint8), "PNG")),
                (f"{i}.json", mutated(json.dumps(some).encode(), edits if len(edits) > 4 else [])),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    try:
        manifest = timed(manifests.build, folder, n_images=None, seed=0)
    except SourceError as error:
        assert "no image to use" in str(error)
    else:
        assert len(manifest.images) + len(manifest.set_aside) == len(factors)
        for column in manifest.images.select_dtypes("float"):
            assert not any(math.isinf(value) for value in manifest.images[column])
        manifest.save(folder)
        assert Manifest.load(folder).digest == manifest.digest
    shutil.rmtree(folder)


# Autoencoders -------------------------------------------------------------------------------------------------------

ORIGIN = Origin(model="m", weights_hash="a1" * 32, layer=4, token="class", data="d5" * 32)
SEEN = Statistics(torch.zeros(6), 1.0, 100)


@pytest.fixture(scope="module")
def dictionaries(tmp_path_factory):
    """Each format as the bytes of its files and what reads them."""
    folder, made = tmp_path_factory.mktemp("made"), TopK(width=6, n_latents=9, k=2)
    by_batch = BatchTopK(width=6, n_latents=9, k=2)
    sae_formats.save(folder / "ours", by_batch, ORIGIN, SEEN, {"n_steps": 7})
    sae_formats.save_saelens(folder / "saelens", by_batch, ORIGIN)
    sae_formats.save_published(folder / "published", made, ORIGIN)
    readers = {
        "ours": lambda at: sae_formats.load(at, model="m", weights_hash="a1" * 32, statistics=SEEN),
        "saelens": sae_formats.load_saelens,
        "published": lambda at: sae_formats.load_published(at / "sae.ckpt", at / "sae.yaml"),
    }
    return {
        kind: ({file.name: file.read_bytes() for file in sorted((folder / kind).iterdir())}, read)
        for kind, read in readers.items()
    }


def paths_in(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_in(inner, (*path, key))


@fuzz(400)
@given(
    st.sampled_from(["ours", "saelens", "published"]),
    st.tuples(EDITS, st.one_of(st.just([]), EDITS)),
    st.lists(st.tuples(WHERE, st.one_of(VALUES, st.sampled_from([-1, 10**12, 2**70, "topk", [], {}]))), max_size=2),
    st.booleans(),
)
def test_autoencoders(tmp_path_factory, dictionaries, kind, edits, changes, right_sum):
    files, read = dictionaries[kind]
    weights, described = sorted(files, key=lambda name: name.endswith((".json", ".yaml")))
    folder = tmp_path_factory.mktemp("sae")
    data = mutated(files[weights], edits[0])
    about = yaml.safe_load(files[described])
    for where, value in changes:
        *above, last = list(paths_in(about))[1:][int(where * (len(list(paths_in(about))) - 1))] or [None]
        at = about
        for key in above:
            at = at[key]
        at[last] = value
    if kind == "ours" and right_sum and isinstance(about, dict):  # else nothing would look at the weights
        about["sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(about).encode() if described.endswith("json") else yaml.safe_dump(about).encode()
    (folder / weights).write_bytes(data)
    (folder / described).write_bytes(mutated(text, edits[1]))
    try:
        timed(read, folder)
    except SaeError as error:
        assert "\n" not in str(error)
    shutil.rmtree(folder)


# ISIC ---------------------------------------------------------------------------------------------------------------

ROWS = ["ISIC_0,benign,p1,I,0", "ISIC_1,malignant,p2,III,1", "ISIC_2,benign,,,", '"ISIC_0",Malignant,p1,7,true']
CELL = st.one_of(
    st.sampled_from(["ISIC_0", "", "nan", "benign", "1", "0.0", "IV", '"', "a\\b.jpg", "="]), st.text(max_size=5)
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("isic")
    for i in range(3):
        Image.fromarray(np.full((4, 4, 3), 40 * i, np.uint8)).save(folder / f"ISIC_{i}.png")
    return folder


@fuzz(100)
@given(
    st.lists(st.one_of(st.sampled_from(ROWS), st.lists(CELL, max_size=6).map(",".join)), max_size=6),
    st.one_of(st.just([]), EDITS),
    st.sampled_from(["utf-8-sig", "utf-16", "utf-8"]),
)
def test_isic(photographs, rows, edits, encoding):
    text = "\n".join(["isic_id,benign_malignant,patient_id,fitzpatrick_skin_type,ruler", *rows])
    (photographs / "metadata.csv").write_bytes(mutated(text.encode(encoding, "replace"), edits))
    try:
        found = timed(isic.read, photographs)
    except IsicError as error:
        assert "\n" not in str(error)
    else:
        assert found.manifest.images["malignant"].dtype == bool
