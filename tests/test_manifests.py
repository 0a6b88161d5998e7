import io
import json
import os
import tarfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clipshift_core.images import decode
from clipshift_core.manifests import Manifest, SourceError, build, read


def picture(seed, format="PNG", size=(9, 7)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def folder_of(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def shard_of(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def ids(manifest):
    return list(manifest.images.image_id)


def reasons(manifest):
    return dict(zip(manifest.set_aside.image_id, manifest.set_aside.reason, strict=True))


def check_bytes(manifest, source):
    """Each row leads to the very bytes that were hashed, by whatever kind of row."""
    import hashlib

    for (_, series), named in zip(manifest.images.iterrows(), manifest.images.itertuples(), strict=True):
        data = read(series, source)
        assert data == read(named, source) == read(series.to_dict(), source)
        assert hashlib.sha256(data).hexdigest() == series["sha256"]
        assert decode(data).shape == (series["height"], series["width"], 3)


def test_a_folder_with_everything_in_it(tmp_path):
    files = {
        "b/two.PNG": picture(2),
        "b/two.txt": "\ufeffA  second\npicture ",
        "one.jpg": picture(1, "JPEG", (20, 30)),
        "one.jpeg": picture(3, "JPEG"),
        "grey.d/x.y.webp": picture(4, "WEBP"),
        "copy.png": picture(2),
        "cut.jpg": picture(5, "JPEG")[:200],
        "empty.png": b"",
        "page.jpg": "<html>not found</html>",
        "phone.heic": b"\0\0\0\x18ftypheic" + b"\0" * 40,
        ".hidden.png": picture(6),
        "._one.jpg": b"\0\5\x16\7",
        ".thumbnails/t.png": picture(7),
        "notes.md": "no image",
    }
    manifest = build(folder_of(tmp_path, files), n_images=None, seed=0)
    kept = {"b/two", "copy"} & set(ids(manifest))
    assert len(kept) == 1
    assert set(ids(manifest)) == kept | {"one.jpg", "one.jpeg", "grey.d/x.y"}
    assert ids(manifest) == sorted(ids(manifest))
    assert reasons(manifest) == {
        ({"b/two", "copy"} - kept).pop(): f"the same bytes as {kept.copy().pop()}",
        "cut": "cut off: the JPEG ends early",
        "empty": "the file is empty",
        "page": "a web page or a drawing in text, not pixels",
        "phone": "a HEIC photograph or a video: convert it to JPEG or PNG",
    }
    assert manifest.n_listed == 9
    assert manifest.summary == "9 listed, 4 used, 5 set aside"
    one = manifest.images.set_index("image_id").loc["one.jpg"]
    assert (one["width"], one["height"], one["offset"], one["size"]) == (30, 20, 0, len(files["one.jpg"]))
    assert pd.isna(one["caption"])
    check_bytes(manifest, tmp_path)


def test_captions_beside_the_image_and_in_a_table(tmp_path):
    files = {f"sub/{name}.png": picture(i) for i, name in enumerate("abc")}
    files |= {"sub/a.txt": " a dog\n on grass ", "sub/b.txt": "replaced", "captions.csv": "caption,file\n"}
    files["captions.csv"] += '"a, ""quoted"" cat","./sub\\b.png"\nof nothing,gone.png\n,sub/c.png\n'
    manifest = build(folder_of(tmp_path, files), n_images=None, seed=0)
    assert list(manifest.images.caption.fillna("-")) == ["a dog on grass", 'a, "quoted" cat', "-"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name,text\nx.png,hello\n", r"captions.csv: has the columns \['name', 'text'\]; file and caption"),
        ("", "captions.csv: has the columns None"),
        ("file,caption\ny.png,hello\n", "captions.csv: names none of the images; it has y.png, not x.png"),
    ],
)
def test_a_caption_table_that_cannot_be_meant(tmp_path, table, message):
    with pytest.raises(SourceError, match=message):
        build(folder_of(tmp_path, {"x.png": picture(0), "captions.csv": table}), n_images=None, seed=0)


def test_links_pipes_and_closed_files(tmp_path):
    source = folder_of(tmp_path / "source", {"in/a.png": picture(0), "in/b.png": picture(1)})
    outside = folder_of(tmp_path / "outside", {"c.png": picture(2)})
    (source / "in" / "loop").symlink_to(source)
    (source / "again").symlink_to(source / "in")
    (source / "out").symlink_to(outside)
    (source / "file.png").symlink_to(outside / "c.png")
    (source / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "pipe.jpg")
    (source / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(3))
    manifest = build(source, n_images=None, seed=0)
    assert len(manifest.images) == 3
    found = reasons(manifest)
    assert found["broken.png"] == "a link that leads nowhere"
    assert found["pipe.jpg"] == "not a regular file"
    assert found["caf\\udce9.png"] == "its name is not valid UTF-8"
    assert sum(reason.startswith("the same bytes as") for reason in found.values()) == 1
    manifest.save(tmp_path / "saved")


FACTORS = [
    {
        "kind": "duck",
        "n": 2,
        "at": [1, 2],
        "round": True,
        "caption": "from json",
        "path": "/etc",
        "mixed": 1,
        "none": None,
    },
    {"kind": "crane", "n": 3, "at": [3], "round": False, "big": 2**70, "bad": "\ud800", "mixed": "one"},
]


def test_a_shard_with_captions_and_factors(tmp_path):
    members = {
        "./s/000.jpg": picture(0, "JPEG"),
        "./s/000.json": json.dumps(FACTORS[0]),
        "./s/001.PNG": picture(1),
        "./s/001.txt": "a crane",
        "./s/001.json": json.dumps(FACTORS[1]),
        "./s/002.webp": picture(2, "WEBP"),
        "./s/003.png": picture(3),
        "./s/003.json": "[1, 2]",
        "./s/004.png": picture(4)[:60],
        "./s/readme.txt": "x",
    }
    source = shard_of(tmp_path / "demo.tar", members)
    manifest = build(source, n_images=None, seed=0)
    table = manifest.images.set_index("image_id")
    assert list(table.index) == ["s/000", "s/001", "s/002"]
    assert list(table.caption.fillna("-")) == ["from json", "a crane", "-"]
    assert set(table.path) == {"demo.tar"}  # a factor cannot take a column of ours
    assert list(table.loc["s/001", ["kind", "n", "at", "big"]]) == ["crane", 3, "[3]", str(2**70)]
    assert list(table["mixed"].fillna("-")) == ["1", "one", "-"]
    assert table.loc["s/001", "bad"] == "\\ud800"
    assert reasons(manifest).keys() == {"s/003", "s/004"}
    assert reasons(manifest)["s/003"] == "its .json of factors is a list, not an object"
    check_bytes(manifest, source)
    check_bytes(manifest, tmp_path)

    again = build(tmp_path, n_images=None, seed=0)  # its folder is the same source
    pd.testing.assert_frame_equal(again.images, manifest.images)
    assert again.digest == manifest.digest

    manifest.save(tmp_path / "saved")
    loaded = Manifest.load(tmp_path / "saved")
    pd.testing.assert_frame_equal(loaded.images, manifest.images)
    pd.testing.assert_frame_equal(loaded.set_aside, manifest.set_aside)
    assert (loaded.n_listed, loaded.digest) == (5, manifest.digest)


def test_shards_that_number_from_zero_each(tmp_path):
    for i in range(3):
        shard_of(tmp_path / f"part-{i}.tar", {"000.png": picture(i), f"own-{i}.png": picture(10 + i)})
    manifest = build(tmp_path, n_images=None, seed=0)
    assert ids(manifest) == ["own-0", "own-1", "own-2", "part-0/000", "part-1/000", "part-2/000"]
    check_bytes(manifest, tmp_path)


def test_a_shard_that_ends_early(tmp_path):
    source = shard_of(tmp_path / "x.tar", {f"{i}.png": picture(i) for i in range(6)})
    whole = build(source, n_images=None, seed=0)
    source.write_bytes(source.read_bytes()[: 3 * 1024 + 600])  # in the fourth member's bytes
    manifest = build(source, n_images=None, seed=0)
    assert ids(manifest) == ids(whole)[:3]
    assert "damaged or ends early" in reasons(manifest)["x.tar"]
    assert "ends early" in reasons(manifest)["3"]
    with pytest.raises(SourceError, match=r"x.tar ends early: \d+ of \d+ bytes at 3,584"):
        read(whole.images.iloc[3], source)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_shards_are_refused_in_one_line(tmp_path, mode):
    for name in ("x.tar", f"x.tar.{mode[2:]}"):
        source = shard_of(tmp_path / name, {"0.png": picture(0)}, mode)
        for given in (source, tmp_path):
            with pytest.raises(SourceError, match="compressed by (gzip|bzip2|xz); unpack it") as caught:
                build(given, n_images=None, seed=0)
            assert "\n" not in str(caught.value)
        source.unlink()


def test_sources_that_cannot_be_used(tmp_path):
    folder = folder_of(tmp_path / "f", {"notes.md": "x"})
    broken = folder_of(tmp_path / "g", {"a.png": b"", "b.png": b"zzz"})
    mixed = folder_of(tmp_path / "m", {"a.png": picture(0)})
    shard_of(mixed / "b.tar", {"0.png": picture(0)})
    cases = {
        tmp_path / "missing": "no such folder or .tar shard",
        folder: r"no image to use among 0 listed \(looked for names that end in .jpg",
        folder / "notes.md": "a folder of images, a .tar shard or a folder of shards is accepted",
        broken: "no image to use among 2 listed; the first: ",
        mixed: r"holds shards \(b.tar\) and images \(a.png\)",
        folder_of(tmp_path / "e", {"x.tar": b""}) / "x.tar": "the shard is damaged or ends early",
    }
    for source, message in cases.items():
        with pytest.raises(SourceError, match=message) as caught:
            build(source, n_images=None, seed=0)
        assert str(source) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="n_images 0"):
        build(mixed, n_images=0, seed=0)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """150 images, one in ten empty, three copies."""
    files = {f"{i:03}.png": b"" if i % 10 == 0 else picture(i % 146) for i in range(1, 151)}
    return folder_of(tmp_path_factory.mktemp("many"), files)


def test_a_sample_depends_on_seed_and_id_alone(many, tmp_path):
    everything = build(many, n_images=None, seed=0)
    assert len(everything.images) == 150 - 15 - 3
    small, large = build(many, n_images=20, seed=0), build(many, n_images=50, seed=0)
    assert (len(small.images), len(large.images)) == (20, 50)
    assert set(ids(small)) < set(ids(large)) < set(ids(everything))
    assert set(reasons(small)) <= set(reasons(large)) <= set(reasons(everything))
    assert small.summary.startswith("150 listed, 20 used")
    assert ids(build(many, n_images=20, seed=0)) == ids(small)
    assert set(ids(build(many, n_images=20, seed=1))) != set(ids(small))

    more = folder_of(tmp_path, {path.name: path.read_bytes() for path in many.iterdir()})
    folder_of(more, {f"new/{i}.png": picture(1000 + i) for i in range(10)})
    grown = ids(build(more, n_images=20, seed=0))
    assert set(grown) <= set(ids(large)) | {f"new/{i}" for i in range(10)}
    assert len(set(grown) & set(ids(small))) >= 15


def test_only_what_is_needed_is_decoded(many, monkeypatch):
    from clipshift_core import manifests

    looked_at = []
    monkeypatch.setattr(manifests, "_check", lambda *a, check=manifests._check: looked_at.append(a) or check(*a))
    build(many, n_images=5, seed=0)
    assert len(looked_at) <= 32


def test_fewer_than_asked_for_is_no_error(many):
    assert len(build(many, n_images=10_000, seed=0).images) == 132


def test_the_digest_follows_contents_not_places(tmp_path):
    files = {f"{i}.png": picture(i) for i in range(3)}
    one, other = folder_of(tmp_path / "one", files), folder_of(tmp_path / "other", files)
    digest = build(one, n_images=None, seed=0).digest
    assert build(other, n_images=None, seed=0).digest == digest
    (other / "1.txt").write_text("a caption")
    assert build(other, n_images=None, seed=0).digest != digest
    (one / "2.png").write_bytes(picture(77))
    assert build(one, n_images=None, seed=0).digest != digest


def captions_of(manifest):
    return dict(zip(manifest.images.image_id, manifest.images.caption.fillna("-"), strict=True))


def test_a_table_that_the_user_gives_wins_and_the_rest_keep_what_they_have(tmp_path):
    files = {f"{name}.png": picture(i) for i, name in enumerate(("a", "b", "sub/c", "d"))}
    files |= {
        "a.txt": "beside a",
        "b.txt": "beside b",
        "captions.csv": "file,caption\nsub/c.png,theirs\nd.png,theirs\n",
    }
    source = folder_of(tmp_path / "s", files)
    mine = tmp_path / "mine.csv"
    mine.write_text("caption,file\nmine,a\nmine,./sub\\c.png\nnowhere,z.png\n,d.png\n")
    manifest = build(source, n_images=None, seed=0, captions=mine)
    assert captions_of(manifest) == {"a": "mine", "b": "beside b", "sub/c": "mine", "d": "-"}
    assert manifest.digest != build(source, n_images=None, seed=0).digest


EXCEL = "file{0}caption\r\na.png{0}Ein Hund\r\nb.png{0}\u00dcber Gras\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        EXCEL.format(",").encode(),
        EXCEL.format(",").encode("utf-8-sig"),
        EXCEL.format(";").encode("utf-8-sig"),
        EXCEL.format("\t").encode("utf-16"),
        ("sep=;\r\n" + EXCEL.format(";")).encode("utf-8-sig"),
        EXCEL.format(",").replace("file", '"File "').replace("\r\n", "\r").encode(),
        EXCEL.format(",").replace("\r\n", ",,\r\n").encode(),
    ],
    ids=["UTF-8", "BOM", "semicolons", "Unicode text", "sep=", "old Mac", "empty columns"],
)
def test_tables_as_excel_writes_them(tmp_path, data):
    source = folder_of(tmp_path / "s", {"a.png": picture(0), "b.png": picture(1)})
    (tmp_path / "mine.csv").write_bytes(data)
    found = build(source, n_images=None, seed=0, captions=tmp_path / "mine.csv")
    assert captions_of(found) == {"a": "Ein Hund", "b": "Über Gras"}


def test_a_table_names_members_of_shards_by_name_or_id(tmp_path):
    for i in range(2):
        shard_of(tmp_path / "s" / f"part-{i}.tar", {"./000.png": picture(i), f"own-{i}.jpg": picture(9 + i, "JPEG")})
    mine = tmp_path / "mine.csv"
    mine.write_text(
        "file,caption\npart-0/000,by id\npart-1/000.png,by shard and name\nown-0,by stem\nown-1.jpg,by name\n"
    )
    found = captions_of(build(tmp_path / "s", n_images=None, seed=0, captions=mine))
    assert found == {
        "own-0": "by stem",
        "own-1": "by name",
        "part-0/000": "by id",
        "part-1/000": "by shard and name",
    }
    mine.write_text("file,caption\n000.png,which one\n")
    with pytest.raises(
        SourceError, match=r"mine.csv: 000.png names 2 images \(part-0/000, part-1/000\); say which, in"
    ):
        build(tmp_path / "s", n_images=None, seed=0, captions=mine)
    mine.write_text("file,caption\nx.png,a\n")
    with pytest.raises(SourceError, match="mine.csv: names none of the images; it has x.png, not part-0/000"):
        build(tmp_path / "s", n_images=None, seed=0, captions=mine)


def test_names_that_look_the_same_are_told_apart_or_found_by_either_spelling(tmp_path):
    composed, apart = "caf\u00e9.png", "cafe\u0301.png"
    mine = tmp_path / "mine.csv"
    mine.write_text(f"file,caption\n{composed},composed\n{apart},apart\n")
    both = folder_of(tmp_path / "both", {composed: picture(0), apart: picture(1)})
    found = build(both, n_images=None, seed=0, captions=mine).images
    assert dict(zip(found.path, found.caption, strict=True)) == {composed: "composed", apart: "apart"}
    mine.write_text(f"file,caption\n{composed},composed\n")
    one = folder_of(tmp_path / "one", {apart: picture(1)})  # as macOS has it, while the table is from elsewhere
    assert list(build(one, n_images=None, seed=0, captions=mine).images.caption) == ["composed"]
