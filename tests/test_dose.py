"""Dose and response: the sweep against views drawn one by one, matching against a plain loop, the verdict's rule."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import xarray as xr
from PIL import Image
from skimage.metrics import structural_similarity

from clipshift_core import augment, dose, images, manifests, profiles, shift, stats
from clipshift_core.profiles import Profile

N, SIZE = 3, 48
RESAMPLING = {"n_resamples": 100, "seed": 0}


class Projector:
    """An encoder that is one fixed matrix: fast, and easy to repeat in numpy. It reads no tower, so the pass of
    `shift` captures nothing of it."""

    dim, device, precision, weights_hash, n_blocks = 6, "cpu", "fp32", "0" * 64, 0

    def __init__(self):
        weight = np.random.default_rng(0).normal(size=(SIZE * SIZE * 3, self.dim)) / SIZE
        self.weight = torch.from_numpy(weight.astype(np.float32))
        self.batches = []

    def encode(self, pixels, capture=()):
        self.batches.append(len(pixels))
        flat = torch.as_tensor(np.asarray(pixels)).reshape(len(pixels), -1).float() / 255
        return SimpleNamespace(embedding=flat @ self.weight, captured={})

    def readable(self, points):
        return []


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(1)
    for i in range(N):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60 + i, 50), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def manifest(source):
    return manifests.build(source, n_images=None, seed=0)


@pytest.fixture
def profile(source, tmp_path, monkeypatch) -> Profile:
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    return Profile(name="t", source=str(source), model="m/x", seed=5, image_size=SIZE, batch_size=16)


@pytest.fixture(scope="module")
def swept(source, manifest, tmp_path_factory) -> xr.Dataset:
    """All three images, measured once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "ROOT", tmp_path_factory.mktemp("run"))
        profile = Profile(name="t", source=str(source), model="m/x", seed=5, image_size=SIZE, batch_size=16)
        return dose.sweep(profile, manifest, Projector(), n_images=N).load()


def hand_made(mse: np.ndarray, l2: np.ndarray, severity: np.ndarray, ssim: np.ndarray | None = None) -> xr.Dataset:
    """A dataset of (image, augmentation, level) arrays for the first augmentations that have a dose; the others are
    copies of the first, so that all are there."""
    n_images, given, n_levels = mse.shape
    names = [*dose.DOSED, "horizontal_flip"]
    index = [min(i, given - 1) for i in range(len(names))]
    dims = ("image", "augmentation", "level")
    ssim = 1 - mse / 1000 if ssim is None else ssim
    held = {"mse": mse, "ssim": ssim, "l2": l2, "cosine_distance": l2 / 100}
    return xr.Dataset(
        {name: (dims, values[:, index]) for name, values in held.items()},
        {
            "image": [f"i{i}" for i in range(n_images)],
            "augmentation": names,
            "severity": (dims[1:], np.broadcast_to(severity, (len(names), n_levels))),
        },
    )


# the sweep


def test_every_augmentation_goes_from_nothing_through_published_to_beyond():
    assert tuple(dose.SEVERITIES) == tuple(augment.AUGMENTATIONS)
    for name, steps in dose.SEVERITIES.items():
        assert len(steps) == dose.N_LEVELS >= 8 and list(steps) == sorted(set(steps)), name
        assert steps[0] == 0 and 1 in steps and steps[-1] > 1, name


def test_against_views_drawn_one_by_one(swept, manifest, source):
    weight = Projector().weight.double().numpy()
    for row in manifest.images.iloc[:2].itertuples():
        pixels = images.resize(images.decode((source / row.path).read_bytes()), SIZE)
        origin = pixels.reshape(-1) / 255 @ weight
        for name, steps in dose.SEVERITIES.items():
            held = swept.sel(image=row.image_id, augmentation=name)
            assert held.severity.values.tolist() == list(steps)
            for level, severity in enumerate(steps):
                view = augment.view(pixels, name, seed=5, image_id=row.image_id, severity=severity)
                at = held.isel(level=level)
                embedding = view.reshape(-1) / 255 @ weight
                # a view that was pushed out of the frame is black, and this projector maps black to zero: cosine 0
                cosine = origin @ embedding / np.linalg.norm(origin) / (np.linalg.norm(embedding) or 1)
                similar = structural_similarity(pixels, view, channel_axis=-1, data_range=255)
                assert at.l2 == pytest.approx(np.linalg.norm(embedding - origin), rel=1e-4, abs=1e-5)
                assert at.cosine_distance == pytest.approx(1 - cosine, rel=1e-3, abs=1e-6)
                assert at.ssim == pytest.approx(similar, abs=1e-5)
                assert at.mse == pytest.approx(np.mean((view.astype(float) - pixels) ** 2), rel=1e-5)
    assert {str(v.dtype) for v in swept.data_vars.values()} == {"float32"}


def test_identity_is_exactly_no_shift_and_the_flip_is_a_step(swept):
    nothing = swept.isel(level=0)
    for name, value in {"l2": 0, "cosine_distance": 0, "mse": 0, "ssim": 1}.items():
        assert (nothing[name] == value).all(), name
    flip = swept.sel(augmentation="horizontal_flip")
    before = flip.severity.values < 0.5
    assert (flip.l2[:, before] == 0).all() and (flip.l2[:, ~before] > 0).all()
    np.testing.assert_allclose(flip.l2[:, ~before], np.tile(flip.l2[:, [-1]], (~before).sum()), rtol=1e-5)


def test_severity_one_is_the_one_pass(swept, profile, manifest):
    measured = shift.measure(profile, manifest, Projector())
    published = dose.published(swept).set_index(["image_id", "augmentation"])
    for name, ours in {"l2": published["l2"], "mse": published["mse"], "ssim": published["ssim"]}.items():
        theirs = shift.table(measured).set_index(["image_id", "augmentation"])[name]
        pd.testing.assert_series_equal(ours, theirs.loc[ours.index], check_dtype=False, rtol=1e-4, atol=1e-5)


def test_unchanged_views_are_not_encoded(swept, profile, manifest):
    encoder = Projector()
    dose.sweep(profile, manifest, encoder, n_images=N)
    assert sum(encoder.batches) == N + int((swept.mse > 0).sum())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


class Stops(Projector):
    """Raises in the second batch, as an interrupted run would."""

    def encode(self, pixels, capture=()):
        if self.batches:
            raise KeyboardInterrupt
        return super().encode(pixels)


def test_interrupted_goes_on_and_a_second_call_reads(profile, manifest):
    whole, seen = replace(profile, name="whole"), []
    first = dose.sweep(whole, manifest, Projector(), n_images=N, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)], "16 images of ten views make one image of 109 a batch"
    with pytest.raises(KeyboardInterrupt):
        dose.sweep(profile, manifest, Stops(), n_images=N)
    encoder = Projector()
    dose.sweep(profile, manifest, encoder, n_images=N, workers=3)
    assert len(encoder.batches) == 2 and contents(profile.run_dir) == contents(whole.run_dir)
    encoder = Projector()
    again = dose.sweep(profile, manifest, encoder, n_images=N)
    assert encoder.batches == [] and again.identical(first)


def test_takes_the_first_images(swept, profile, manifest):
    two = dose.sweep(profile, manifest, Projector(), n_images=2)
    assert list(two.image.values) == list(manifest.images["image_id"][:2])
    np.testing.assert_allclose(two.l2, swept.l2[:2], rtol=1e-4, atol=1e-5)
    more = dose.sweep(profile, manifest, Projector(), n_images=99)
    assert list(more.image.values) == list(manifest.images["image_id"])


def test_the_key_covers_severities(profile, manifest, monkeypatch):
    before = dose.open_arrays(profile, manifest, Projector()).path
    assert dose.open_arrays(replace(profile, batch_size=99), manifest, Projector()).path == before
    monkeypatch.setitem(dose.SEVERITIES, "blur", (*dose.SEVERITIES["blur"][:-1], 50))
    assert dose.open_arrays(profile, manifest, Projector()).path != before


def test_a_damaged_image_is_named(profile, manifest, source, tmp_path):
    for row in manifest.images.itertuples():
        (tmp_path / row.path).write_bytes((source / row.path).read_bytes())
    damaged = tmp_path / manifest.images["path"][1]
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with pytest.raises(shift.PassError, match="01.*its bytes have changed"):
        dose.sweep(profile, manifest, Projector(), n_images=N, base=tmp_path)


def test_table_and_curves(swept):
    table = dose.table(swept)
    assert list(table) == ["image_id", "augmentation", "severity", "l2", "cosine_distance", "ssim", "mse"]
    assert len(table) == N * 9 * dose.N_LEVELS
    curves = dose.curves(table, "l2", **RESAMPLING)
    assert list(curves["augmentation"].unique()) == list(dose.SEVERITIES)
    means = table.groupby(["augmentation", "severity"])["l2"].mean()
    for row in curves.itertuples():
        assert row.mean == pytest.approx(means[row.augmentation, row.severity]) and row.n == N
        assert row.low <= row.mean <= row.high
    one = dose.curves(table[table["image_id"] == table["image_id"][0]], "l2", **RESAMPLING)
    assert one[["low", "high"]].isna().all(axis=None) and one["mean"].notna().all()


# matching


def test_by_hand():
    """MSE 0, 4, 16 at severities 0, 1, 3 and L2 0, 2, 10. Level 9: its root 3 lies midway between 2 and 4, so the
    severity is 2 and L2 6. Level 1: half of the way from 0 to 2, severity 0.5 and L2 1."""
    data = hand_made(np.array([[[0, 4, 16.0]]]), np.array([[[0, 2, 10.0]]]), np.array([0, 1, 3.0]))
    for level, severity, l2 in ((9, 2, 6), (1, 0.5, 1), (16, 3, 10)):
        matched = dose.at_matched(data, "mse", level)
        assert list(matched["augmentation"]) == list(dose.DOSED) and "horizontal_flip" not in dose.DOSED
        for column, expected in {"severity": severity, "l2": l2, "cosine_distance": l2 / 100}.items():
            assert matched[column].to_numpy() == pytest.approx([expected] * 8), (level, column)
    assert dose.at_matched(data, "mse", 16.01)[["severity", "l2", "cosine_distance"]].isna().all(axis=None)


def test_the_first_crossing_counts():
    """MSE 0, 16, 4, 25: level 9 is crossed on the way up to 16 (root 3 of 4: three quarters), not on the way to 25."""
    data = hand_made(np.array([[[0, 16, 4, 25.0]]]), np.array([[[0, 4, 1, 8.0]]]), np.arange(4.0))
    assert dose.at_matched(data, "mse", 9)["l2"].to_numpy() == pytest.approx([3] * 8)
    # level 20 is first reached between 4 and 25: (sqrt 20 - 2) / 3 of the way from 1 to 8
    expected = 1 + 7 * (np.sqrt(20) - 2) / 3
    assert dose.at_matched(data, "mse", 20)["l2"].to_numpy() == pytest.approx([expected] * 8)


@pytest.mark.parametrize("by", ["mse", "ssim"])
def test_against_a_plain_loop(by):
    """Thirty images of ragged curves, of which some never reach the level."""
    rng = np.random.default_rng(3)
    shape = (30, 8, 9)
    mse = np.abs(np.cumsum(rng.normal(20, 60, shape), axis=-1))
    mse[..., 0] = 0
    ssim = 1 - mse / rng.uniform(300, 900, (30, 8, 1))
    l2, severity = rng.gamma(2, 3, shape), np.sort(rng.uniform(0, 4, 9))
    level = 150.0 if by == "mse" else 0.7
    data = hand_made(mse, l2, severity, ssim)
    matched = dose.at_matched(data, by, level)
    held = matched.set_index(["image_id", "augmentation"])
    target, never = level if by == "mse" else 1 - level, 0
    for i in range(30):
        for a, name in enumerate(dose.DOSED):
            distortion = mse[i, a] if by == "mse" else 1 - ssim[i, a]
            expected = (np.nan, np.nan)
            for k in range(1, 9):
                if distortion[k - 1] < target <= distortion[k]:
                    x = np.sqrt(distortion[[k - 1, k]])
                    expected = [np.interp(np.sqrt(target), x, y[[k - 1, k]]) for y in (severity, l2[i, a])]
                    break
            never += np.isnan(expected[0])
            row = held.loc[(f"i{i}", name)]
            np.testing.assert_allclose([row["severity"], row["l2"]], expected, rtol=1e-9)
    reach = dose.reach(matched)
    assert 0 < never < 240 and reach["never"].sum() == never and (reach["reached"] + reach["never"] == 30).all()
    whole = [f"i{i}" for i in range(30) if held.loc[f"i{i}"]["l2"].notna().all()]
    assert list(dose.complete(matched)["image_id"].unique()) == whole and 0 < len(whole) < 30
    assert list(reach["severity"]) == pytest.approx(
        list(matched.groupby("augmentation", sort=False)["severity"].median())
    )


def test_a_view_drawn_at_the_matched_severity_is_distorted_and_shifted_that_far(swept, manifest, source):
    """The whole point: the interpolated dose, when it is drawn, gives the level and the interpolated shift."""
    weight = Projector().weight.double().numpy()
    level = dose.levels(swept, "mse")[0.5]
    pixels = {
        row.image_id: images.resize(images.decode((source / row.path).read_bytes()), SIZE)
        for row in manifest.images.itertuples()
    }
    ratios = []
    for row in dose.complete(dose.at_matched(swept, "mse", level)).itertuples():
        image = pixels[row.image_id]
        view = augment.view(image, row.augmentation, seed=5, image_id=row.image_id, severity=row.severity)
        moved = np.linalg.norm((view.reshape(-1) / 255.0 - image.reshape(-1) / 255.0) @ weight)
        ratios.append((np.mean((view.astype(float) - image) ** 2) / level, row.l2 / moved))
    assert len(ratios) >= 16
    assert np.abs(np.log(ratios)).mean(axis=0) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize(("by", "level"), [("mse", 0), ("mse", -1), ("ssim", 1), ("mse", np.nan), ("psnr", 30)])
def test_no_level_is_refused(swept, by, level):
    with pytest.raises(ValueError, match="accepted"):
        dose.at_matched(swept, by, level)


def test_levels_are_the_quartiles_of_the_published_distortions():
    """Nine images under eight: MSE 10, 20, ... 90 at severity 1 for all but the last augmentation, which does nothing
    and is left out. Quartiles 30, 50, 70; SSIM runs the other way."""
    mse = np.zeros((9, 8, 3))
    mse[:, :7, 1] = 10 * np.arange(1, 10)[:, None]
    mse[:, :7, 2] = 1e4
    data = hand_made(mse, mse, np.array([0, 1, 2.0]), 1 - mse / 1e5)
    assert dose.levels(data, "mse") == pytest.approx({0.25: 30, 0.5: 50, 0.75: 70})
    assert dose.levels(data, "ssim") == pytest.approx({0.25: 0.9997, 0.5: 0.9995, 0.75: 0.9993})


# the verdict


@pytest.fixture(scope="module")
def ragged() -> xr.Dataset:
    """Twenty images whose shift grows with severity at a rate of the augmentation's own, and the MSE at another."""
    rng = np.random.default_rng(4)
    severity = np.array([0, 0.25, 0.5, 1, 2, 4, 8])
    strength, rate = rng.uniform(2, 20, (20, 8, 1)), np.array([8, 1, 7, 2, 6, 3, 5, 4.0])[None, :, None]
    distortion = strength * severity
    return hand_made(distortion**2, rate * distortion * rng.uniform(0.9, 1.1, (20, 8, 1)), severity)


def test_comparison_against_scipy(ragged):
    level = dose.levels(ragged, "mse")[0.5]
    found = dose.compare(ragged, "mse", level, **RESAMPLING)
    matched = dose.complete(dose.at_matched(ragged, "mse", level))
    kept = matched["image_id"].unique()
    before = ragged.sel(augmentation=list(dose.DOSED), image=kept).l2.isel(level=3).mean("image").to_series()
    after = matched.groupby("augmentation")["l2"].mean()
    tau = scipy.stats.kendalltau(before, after.loc[before.index]).statistic
    assert found.tau.mean == pytest.approx(tau) and found.tau.low <= tau <= found.tau.high
    ranks = found.table.set_index("augmentation")
    assert ranks["rank"].to_dict() == after.rank(ascending=False).astype(int).to_dict()
    assert ranks["published_rank"].to_dict() == before.rank(ascending=False).astype(int).to_dict()
    assert ranks["mean"].to_dict() == pytest.approx(after.to_dict())
    assert ranks["published_mean"].to_dict() == pytest.approx(before.to_dict())
    assert (ranks["n"] == len(kept)).all() and list(found.table["rank"]) == list(range(1, 9))


def test_the_rule_of_the_verdict():
    def of(low, high, n=20):
        return dose.verdict(stats.Interval((low + high) / 2, low, high), n)

    assert of(0.81, 1) == "survives" and of(0.1, 0.79) == "does not survive" and of(0.7, 0.9) == "undecided"
    assert of(0.81, 1, n=9) == of(0.1, 0.2, n=9) == of(np.nan, np.nan, n=1) == "unknown"
    assert {of(0.81, 1), of(0.1, 0.2), of(0.7, 0.9), of(1, 1, n=1)} == set(dose.VERDICTS)


def test_equal_orders_survive_and_opposite_ones_do_not():
    severity, steady = np.array([0, 0.5, 1, 2]), np.ones((12, 1, 1))
    rate, distortion = np.arange(1, 9.0)[None, :, None], 10 * severity
    same = hand_made(steady * distortion**2 * np.ones((1, 8, 1)), steady * rate * distortion, severity)
    found = dose.compare(same, "mse", 50, **RESAMPLING)
    assert found.verdict == "survives" and found.tau == (1, 1, 1)
    # what moves twice as far as published distorts ten times as much: the order turns round
    other = hand_made(steady * (10**rate * severity) ** 2, steady * 2**rate * severity, severity)
    found = dose.compare(other, "mse", 100, **RESAMPLING)
    assert found.verdict == "does not survive" and found.tau == (-1, -1, -1)


@pytest.mark.parametrize("n_images", [1, 3])
def test_few_images_give_no_verdict(ragged, n_images):
    rows = dose.verdicts(ragged.isel(image=slice(n_images)), **RESAMPLING)
    assert len(rows) == 12 and set(rows["verdict"]) == {"unknown"}
    if n_images == 1:
        assert rows[["low", "high"]].isna().all(axis=None)


def test_no_complete_image_is_said_and_not_made_up(ragged):
    found = dose.compare(ragged, "mse", 1e9, **RESAMPLING)
    assert found.table.empty and np.isnan(found.tau.mean) and found.verdict == "unknown"
    assert dose.along(ragged, "mse", 1e9).empty
    assert dose.reach(dose.at_matched(ragged, "mse", 1e9))["never"].tolist() == [20] * 8


def test_verdicts_are_those_of_each_comparison(ragged):
    rows = dose.verdicts(ragged, **RESAMPLING)
    assert list(rows.groupby("by", sort=False).size()) == [6, 6]
    for row in rows.itertuples():
        found = dose.compare(ragged, row.by, row.level, row.metric, **RESAMPLING)
        assert row.level == dose.levels(ragged, row.by)[row.quartile] and row.verdict == found.verdict
        assert (row.tau, row.low, row.high) == pytest.approx(tuple(found.tau), nan_ok=True)
        assert (row.most, row.least) == (found.table["augmentation"].iloc[0], found.table["augmentation"].iloc[-1])
        noise = found.table.set_index("augmentation").loc["noise"]
        assert (row.noise_published, row.noise_matched, row.n) == (noise["published_rank"], noise["rank"], noise["n"])


@pytest.mark.parametrize("by", ["mse", "ssim"])
def test_lines_pass_through_the_matched_means_and_end_where_an_image_is_lost(ragged, by):
    level = dose.levels(ragged, by)[0.5]
    lines = dose.along(ragged, by, level)
    middle = level if by == "mse" else 1 - level
    kept = dose.complete(dose.at_matched(ragged, by, level))
    here = lines[np.isclose(lines["distortion"], middle) & lines["augmentation"].isin(dose.DOSED)]
    expected = kept.groupby("augmentation")["l2"].mean()
    assert here.set_index("augmentation")["l2"].to_dict() == pytest.approx(expected.to_dict())
    furthest = ragged[by].max("level") if by == "mse" else 1 - ragged[by].min("level")
    reach = furthest.sel(image=kept["image_id"].unique()).min("image")
    for name, rows in lines.groupby("augmentation"):
        if name in dose.DOSED:
            assert middle <= rows["distortion"].max() <= reach.sel(augmentation=name) + 1e-9
            assert rows["distortion"].max() * 10**0.1 > min(reach.sel(augmentation=name), middle * 10**0.7 - 1e-9)
    flip = lines[lines["augmentation"] == "horizontal_flip"]
    published = ragged.sel(augmentation="horizontal_flip", image=kept["image_id"].unique()).isel(level=3)
    distortion = published.mse if by == "mse" else 1 - published.ssim
    assert flip[["distortion", "l2"]].to_numpy() == pytest.approx(np.array([[distortion.mean(), published.l2.mean()]]))


def test_tables_can_be_written(ragged):
    for table in (dose.verdicts(ragged, **RESAMPLING), dose.compare(ragged, "mse", 1e9, **RESAMPLING).table):
        table.to_csv(buffer := io.StringIO(), index=False)
        assert buffer.getvalue().splitlines()[0] == ",".join(table.columns)
