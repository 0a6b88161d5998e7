"""The one pass: paired, the same whatever the workers, batches and kills, and against numpy by hand."""

import io
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from threadpoolctl import threadpool_info

from clipshift_core import augment, images, manifests, profiles, shift
from clipshift_core.profiles import Profile

N, SIZE = 7, 32


class Projector:
    """An encoder that is one fixed matrix: fast, and easy to repeat in numpy."""

    dim, device, precision, weights_hash = 6, "cpu", "fp32", "0" * 64
    n_blocks = n_heads = 0

    def __init__(self):
        weight = np.random.default_rng(0).normal(size=(SIZE * SIZE * 3, self.dim)) / SIZE
        self.weight = torch.from_numpy(weight.astype(np.float32))
        self.batches = []

    def readable(self, points):
        return []

    def encode(self, pixels, capture=()):
        self.batches.append(len(pixels))
        flat = torch.as_tensor(np.asarray(pixels)).reshape(len(pixels), -1).float() / 255
        return SimpleNamespace(embedding=flat @ self.weight, captured={})


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(1)
    for i in range(N):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40 + i, 36), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def manifest(source):
    return manifests.build(source, n_images=None, seed=0)


@pytest.fixture
def profile(source, tmp_path, monkeypatch) -> Profile:
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    return Profile(name="t", source=str(source), model="m/x", seed=5, image_size=SIZE, batch_size=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_against_numpy_by_hand(profile, manifest, source):
    encoder = Projector()
    dataset = shift.measure(profile, manifest, encoder)
    for row in manifest.images.itertuples():
        pixels = images.resize(images.decode((source / row.path).read_bytes()), SIZE)
        drawn = [augment.view(pixels, name, seed=5, image_id=row.image_id) for name in augment.VIEWS]
        e = np.stack(drawn).reshape(10, -1).astype(np.float64) / 255 @ encoder.weight.double().numpy()
        held = dataset.sel(image=row.image_id)
        unit = e / np.linalg.norm(e, axis=1, keepdims=True)
        np.testing.assert_allclose(held.embedding, e, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(held.l2, np.linalg.norm(e[1:] - e[0], axis=1), rtol=1e-4)
        np.testing.assert_allclose(held.l2_normalised, np.linalg.norm(unit[1:] - unit[0], axis=1), rtol=1e-4)
        np.testing.assert_allclose(held.cosine, unit[1:] @ unit[0], rtol=1e-5)
    assert tuple(dataset.view.values) == augment.VIEWS and tuple(dataset.augmentation.values) == augment.VIEWS[1:]
    assert {str(v.dtype) for v in dataset.data_vars.values()} == {"float32"}


def test_each_batch_is_one_forward_pass_of_all_views(profile, manifest):
    encoder, seen = Projector(), []
    shift.measure(profile, manifest, encoder, progress=lambda done, total: seen.append((done, total)))
    assert encoder.batches == [30, 30, 10]
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_what_is_complete_is_read_not_computed(profile, manifest):
    first = shift.measure(profile, manifest, Projector())
    encoder = Projector()
    again = shift.measure(profile, manifest, encoder)
    assert encoder.batches == [] and again.identical(first)


def test_workers_change_no_byte(profile, manifest):
    stores = []
    for workers in (1, 5):
        other = replace(profile, name=f"workers{workers}")
        shift.measure(other, manifest, Projector(), workers=workers)
        stores.append(contents(other.run_dir))
    assert stores[0] == stores[1]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batch_size_changes_no_result(profile, manifest, batch_size):
    """Only the last digits: a matrix product of another height sums in another order."""
    one = shift.measure(profile, manifest, Projector())
    other = shift.measure(replace(profile, name="b", batch_size=batch_size), manifest, Projector())
    for name in one.data_vars:
        np.testing.assert_allclose(one[name], other[name], rtol=2e-5, atol=2e-6)


def test_other_images_and_their_order_change_no_result(profile, manifest):
    """A pass over a shuffled part of the manifest gives each image the numbers of the whole pass."""
    whole = shift.measure(profile, manifest, Projector())
    part = replace(manifest, images=manifest.images.sample(4, random_state=3))
    measured = shift.measure(profile, part, Projector())
    assert list(measured.image.values) == list(part.images.image_id)
    for name in whole.data_vars:
        expected = whole[name].sel(image=list(part.images.image_id))
        np.testing.assert_allclose(measured[name], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("changed", ["seed", "image_size", "weights", "precision", "manifest", "augmentations"])
def test_the_key_covers(profile, manifest, changed, monkeypatch):
    before, encoder = shift.made_from(profile, manifest, Projector()), Projector()
    assert shift.made_from(replace(profile, batch_size=2, name="n"), manifest, encoder) == before
    match changed:
        case "seed" | "image_size":
            profile = replace(profile, **{changed: 99})
        case "weights":
            encoder.weights_hash = "1" * 64
        case "precision":
            encoder.precision = "mixed"
        case "manifest":
            manifest = replace(manifest, images=manifest.images[1:])
        case "augmentations":
            stronger = replace(augment.AUGMENTATIONS["blur"], parameters={"blur_limit": (3, 9)})
            monkeypatch.setitem(augment.AUGMENTATIONS, "blur", stronger)
    assert shift.made_from(profile, manifest, encoder) != before


class Stops(Projector):
    """Raises in the nth batch, as an interrupted run would."""

    def __init__(self, after: int):
        super().__init__()
        self.after = after

    def encode(self, pixels, capture=()):
        if len(self.batches) == self.after:
            raise KeyboardInterrupt
        return super().encode(pixels)


def test_interrupted_goes_on_where_it_stopped(profile, manifest):
    whole = replace(profile, name="whole")
    shift.measure(whole, manifest, Projector())
    with pytest.raises(KeyboardInterrupt):
        shift.measure(profile, manifest, Stops(after=2))
    encoder = Projector()
    seen = []
    shift.measure(profile, manifest, encoder, progress=lambda *at: seen.append(at))
    assert encoder.batches == [10] and seen == [(7, 7)]
    assert contents(profile.run_dir) == contents(whole.run_dir)


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_shift as t
t.profiles.ROOT = Path(sys.argv[2])
manifest = t.manifests.build(Path(sys.argv[3]), n_images=None, seed=0)
profile = t.Profile(name="t", source=sys.argv[3], model="m/x", seed=5, image_size=t.SIZE, batch_size=3)
t.shift.measure(profile, manifest, t.Projector(), progress=lambda *at: os.kill(os.getpid(), t.signal.SIGKILL))
"""


def test_killed_after_each_batch_ends_with_the_same_bytes(profile, manifest, source, tmp_path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), str(source)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    encoder = Projector()
    shift.measure(profile, manifest, encoder)
    assert encoder.batches == [30, 10], "one of three batches was done before the kill"
    whole = replace(profile, name="whole")
    shift.measure(whole, manifest, Projector())
    assert contents(profile.run_dir) == contents(whole.run_dir)


@pytest.mark.parametrize("damage", ["gone", "cut off", "another image"])
def test_an_image_that_changed_since_is_named(profile, tmp_path, damage):
    folder = tmp_path / "mine"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    manifest = manifests.build(folder, n_images=None, seed=0)
    match damage:
        case "gone":
            (folder / "b.png").unlink()
        case "cut off":
            (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:200])
        case "another image":
            (folder / "b.png").write_bytes((folder / "c.png").read_bytes())
    with pytest.raises(shift.PassError, match=r"image b \(b\.png of .*mine\): .*manifest"):
        shift.measure(replace(profile, source=str(folder)), manifest, Projector())


def test_at_most_two_batches_are_drawn_ahead(profile, manifest, monkeypatch):
    """When batch k is encoded, no image beyond batch k + 2 has been asked for."""
    read, asked = manifests.read, []

    def watched(row, base):
        asked.append(row["image_id"])
        return read(row, base)

    monkeypatch.setattr(manifests, "read", watched)
    encoder, ahead = Projector(), []
    encode = encoder.encode

    def counted(pixels, capture=()):
        ahead.append(len(asked) - len(encoder.batches))
        return encode(pixels)

    encoder.encode = counted
    shift.measure(replace(profile, batch_size=1), manifest, encoder)
    assert len(asked) == N and max(ahead) <= 1 + shift.AHEAD


def test_table_is_tidy(profile, manifest):
    dataset = shift.measure(profile, manifest, Projector())
    table = shift.table(dataset)
    assert list(table.columns) == ["image_id", "augmentation", *shift.METRICS]
    assert len(table) == N * 9
    # this encoder has no attention
    assert table.attention.isna().all() and not table.drop(columns="attention").isna().any().any()
    assert list(table.augmentation[:9]) == list(augment.VIEWS[1:])
    row = table[(table.image_id == "05") & (table.augmentation == "elastic")]
    assert row.cosine.item() == dataset.cosine.sel(image="05", augmentation="elastic").item()
    pd.testing.assert_frame_equal(table, pd.read_parquet(_saved(table)))


def _saved(table: pd.DataFrame) -> io.BytesIO:
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return buffer


def test_drawing_threads_start_no_others_and_put_back_what_was(profile, manifest):
    def pools() -> list[int]:
        return [cv2.getNumThreads()] + [x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"]

    before, inside = pools(), []
    shift.measure(profile, manifest, Projector(), progress=lambda *at: inside.append(pools()))
    assert pools() == before and {count for counts in inside for count in counts} == {1}


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """OpenCLIP's own class with random weights: two blocks of two heads, 2 x 2 patches."""
    import open_clip  # here, because the process that is killed imports this file and needs none of it
    from safetensors.torch import save_file

    from clipshift_core.encoder import Encoder

    folder = tmp_path_factory.mktemp("tower")
    vision = {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 1, "layers": 1}
    model = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    save_file(open_clip.model.CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    return Encoder.load(str(folder), device="cpu")


def drawn_by_hand(profile, row):
    pixels = images.resize(images.decode(manifests.read(row, profile.source_path)), profile.image_size)
    return [augment.view(pixels, name, seed=5, image_id=row["image_id"]) for name in augment.VIEWS]


def test_with_a_real_model(profile, manifest, tower):
    """The stored numbers are those of one image at a time."""
    dataset = shift.measure(profile, manifest, tower)
    for row in manifest.images.to_dict("records")[:3]:
        for name, view in zip(augment.VIEWS, drawn_by_hand(profile, row), strict=True):
            held = dataset.embedding.sel(image=row["image_id"], view=name)
            np.testing.assert_allclose(held, tower.encode(view[None]).embedding[0], rtol=1e-4, atol=1e-5)


def normalised(x):
    return (x - x.min()) / (x.max() - x.min())


def test_every_metric_is_of_the_same_view(profile, manifest, tower):
    """Pixels by scikit-image and numpy, attention by hooks on the model's own forward, for two images by hand."""
    from skimage.metrics import mean_squared_error, structural_similarity

    from clipshift_core import hooks

    dataset = shift.measure(profile, manifest, tower)
    points = ("attention.0", "attention.1", "residual.0", "residual.1")
    for row in manifest.images.to_dict("records")[:2]:
        views, seen = drawn_by_hand(profile, row), []
        for view in views:
            with hooks.captured(tower.model.visual, points) as found, torch.no_grad():
                tower.model.encode_image(tower.preprocess(view[None]))
            seen.append({point: held[0].numpy() for point, held in found.items()})
        for name, view, own in zip(augment.VIEWS[1:], views[1:], seen[1:], strict=True):
            held = dataset.sel(image=row["image_id"], augmentation=name)
            ssim = structural_similarity(views[0], view, channel_axis=-1, data_range=255)
            np.testing.assert_allclose(held.ssim, ssim, atol=1e-5)
            np.testing.assert_allclose(held.mse, mean_squared_error(views[0], view), rtol=1e-5)
            wrapped = ((view - views[0]) ** 2).reshape(4, 8, 4, 24).astype(float).mean((1, 3))
            np.testing.assert_allclose(held.patch_published, (1 / (1 + wrapped / 255**2)).mean(), atol=1e-6)
            assert held.patch <= held.patch_published + 1e-6
            for block in (0, 1):
                a, b = (each[f"residual.{block}"][0] for each in (seen[0], own))
                cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                np.testing.assert_allclose(held.block_cosine.sel(block=block), cosine, atol=1e-5)
                for head in (0, 1):
                    a, b = (each[f"attention.{block}"][head, 1:] for each in (seen[0], own))
                    alike = 1 / (1 + ((normalised(a) - normalised(b)) ** 2).mean())
                    np.testing.assert_allclose(held.head_attention.sel(block=block, head=head), alike, atol=1e-4)
            maps = [each["attention.1"][:, 1:].mean(0).reshape(2, 2) for each in (seen[0], own)]
            stored = dataset.attention_map.sel(image=row["image_id"], view=name)
            np.testing.assert_allclose(stored, maps[1], atol=1e-6)
            a, b = (normalised(cv2.resize(each, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)) for each in maps)
            np.testing.assert_allclose(held.attention, 1 / (1 + ((a - b) ** 2).mean()), atol=1e-4)


def test_the_class_tokens_of_the_first_images(profile, manifest, tower):
    """Kept by the same pass; asking for more of them later encodes again only what is missing."""
    few = replace(profile, n_layers=4)
    dataset = shift.measure(few, manifest, tower)
    held = shift.open_tokens(few, manifest, tower).dataset()
    assert held.token.shape == (4, 10, 2, 32) and list(held.image.values) == list(manifest.images.image_id[:4])
    row = manifest.images.to_dict("records")[3]
    views = np.stack(drawn_by_hand(profile, row))
    wanted = tower.encode(views, capture=("residual.0", "residual.1")).captured
    for block in (0, 1):
        np.testing.assert_allclose(held.token[3, :, block], wanted[f"residual.{block}"][:, 0], rtol=1e-4, atol=1e-5)
    seen = []
    again = shift.measure(profile, manifest, tower, progress=lambda done, total: seen.append(done))
    assert seen == [3, 6, 7] and again.identical(dataset)
    assert shift.open_tokens(profile, manifest, tower).dataset().token.shape == (7, 10, 2, 32)
    assert shift.measure(few, manifest, tower, progress=lambda *at: pytest.fail("encoded again")) is not None


DRAWN = {
    "noise": 85.868,
    "blur": 13.092,
    "color_jitter": 25.604,
    "shift_scale_rotate": 51.376,
    "horizontal_flip": 109.333,
    "elastic": 41.634,
    "perspective": 54.314,
    "random_brightness_contrast": 42.865,
    "coarse_dropout": 35.488,
}
"""Mean absolute change of a fixed image by each view, as CODE_VERSION 2 (and 1) draws them."""


def test_other_pixels_need_another_code_version():
    """If this fails on purpose, raise shift.CODE_VERSION, or stored passes of older code will be read as new."""
    rows, columns = np.mgrid[:64, :64]
    pixels = np.stack([4 * rows, 4 * columns, (rows // 8 + columns // 8) % 2 * 200], -1).astype(np.uint8)
    views = augment.views(pixels, seed=0, image_id="fixed").astype(float)
    changes = dict(zip(augment.VIEWS[1:], np.abs(views[1:] - views[0]).mean((1, 2, 3)), strict=True))
    assert shift.CODE_VERSION == 2 and changes == pytest.approx(DRAWN, rel=0.01)
