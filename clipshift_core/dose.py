"""Dose and response: every augmentation at a dozen severities, and all of them at the same pixel distortion.

At their published parameters the augmentations differ in strength as much as in kind: elastic displaces pixels by a
fifth of a pixel, noise destroys the image. So each is swept from nothing to far beyond its published parameters, and
the shifts are read off, image by image, where the distortion of the pixels (mean squared error, or SSIM) is the same.

A flip has no dose. It is swept as a step, and left out of what is matched.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float32, UInt8

from clipshift_core import augment, metrics, preservation, shift, stats, store
from clipshift_core.manifests import Manifest
from clipshift_core.profiles import Profile

if TYPE_CHECKING:
    from clipshift_core.encoder import Encoder

CODE_VERSION = 1
"""Raised by hand whenever the same inputs would give other numbers; `shift.CODE_VERSION` counts as well."""

SEVERITIES = {
    "noise": (0, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2),
    "blur": (0, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 10, 20, 40),
    "color_jitter": (0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 12),
    "shift_scale_rotate": (0, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.35, 0.6, 1, 2, 4),
    "horizontal_flip": (0, 0.1, 0.2, 0.3, 0.4, 0.49, 0.5, 0.6, 0.8, 1, 1.5, 2),
    "elastic": (0, 0.5, 1, 1.5, 2, 3, 5, 8, 12, 20, 40, 80),
    "perspective": (0, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.35, 0.6, 1, 2, 4),
    "random_brightness_contrast": (0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20),
    "coarse_dropout": (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6),
}
"""Twelve severities each, 0 (the image itself) and 1 (as published) among them, and so spaced that all but the flip
pass through the same distortions: a fraction of the published noise does what takes many times the published blur."""
N_LEVELS = 12
N_VIEWS = 1 + len(SEVERITIES) * N_LEVELS
"""Of an image: itself, and every augmentation at every severity."""

DOSED = tuple(name for name in SEVERITIES if name != "horizontal_flip")
"""What can be matched."""

LAYOUT = {name: store.Array(("image", "augmentation", "level")) for name in ("l2", "cosine_distance", "ssim", "mse")}
By = Literal["mse", "ssim"]
QUARTILES = (0.25, 0.5, 0.75)
SURVIVES = 0.8
"""Kendall's tau above which two orders are taken for one: of eight items, two of the 28 pairs may then differ."""
VERDICTS = ("survives", "does not survive", "undecided", "unknown")
FEWEST = 10
"""Images that a verdict takes; an interval drawn from fewer is hardly one."""
COMPARED = ["augmentation", "rank", "mean", "low", "high", "separated", "published_rank", "published_mean", "n"]


class Comparison(NamedTuple):
    """The published ranking against the one at matched distortion, of the same images."""

    table: pd.DataFrame
    """Columns COMPARED, sorted by rank, which with mean, low, high and separated is stats.ranking's at the level."""
    tau: stats.Interval
    """Kendall's tau between the two orders."""
    verdict: str
    """See `verdict`."""


def sweep(
    profile: Profile,
    manifest: Manifest,
    encoder: "Encoder",
    *,
    n_images: int,
    base: Path | None = None,
    progress: Callable[[int, int], None] = shift.show,
    workers: int | None = None,
) -> xr.Dataset:
    """Shift and distortion of the first `n_images` of the manifest, each augmentation at each severity.

    Variables, float32 (image, augmentation, level), against the original: l2 (units of the embedding), cosine_distance
    (1 - cosine), ssim, mse (squared grey levels). The coordinate severity (augmentation, level) holds SEVERITIES. A
    view whose pixels are the original's (severity 0, or a flip before its step) is not encoded: its shift is exactly 0.

    Stored, resumed and read as the one pass is; the other arguments and the errors are those of `shift.measure`.
    """
    part = replace(manifest, images=manifest.images.iloc[:n_images])
    arrays = open_arrays(profile, part, encoder)
    missing = arrays.missing()
    spans = [arrays.span(index) for index in missing]
    n_all = len(part.images)
    n_done = n_all - sum(span.stop - span.start for span in spans)
    base = profile.source_path if base is None else base
    with shift.drawn(profile, part, base, spans, workers, views=doses) as batches:
        for index, span, views in zip(missing, spans, batches, strict=True):
            arrays.write(index, _compare(encoder, views))
            n_done += span.stop - span.start
            progress(n_done, n_all)
    severity = np.array(list(SEVERITIES.values()), float)
    return arrays.dataset().assign_coords(severity=(("augmentation", "level"), severity))


def open_arrays(profile: Profile, manifest: Manifest, encoder: "Encoder") -> store.Store:
    """The store of this sweep of all images of `manifest`, whatever of it is on disk.

    One chunk holds about as many views as a batch of the one pass: memory is the same.
    """
    made_from = shift.made_from(profile, manifest, encoder)
    return store.open_store(
        profile.run_dir / "arrays",
        "dose",
        made_from | {"dose_code": CODE_VERSION, "severities": SEVERITIES},
        arrays=LAYOUT,
        sizes={
            "image": list(manifest.images["image_id"]),
            "augmentation": list(SEVERITIES),
            "level": N_LEVELS,
        },
        chunk=max(1, profile.batch_size * len(augment.VIEWS) // N_VIEWS),
    )


def table(dataset: xr.Dataset) -> pd.DataFrame:
    """One row per image, augmentation and severity: image_id, augmentation, severity, and the four variables."""
    frame = dataset[list(LAYOUT)].astype(float).to_dataframe().reset_index().rename(columns={"image": "image_id"})
    return frame[["image_id", "augmentation", "severity", *LAYOUT]]


def curves(table: pd.DataFrame, value: str, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Columns augmentation, severity, mean, std, low, high, n: the mean of `value` over images along each curve."""
    parts = []
    for name, rows in table.groupby("augmentation", sort=False, observed=True):
        means = stats.bootstrap_table(rows, value, by="severity", n_resamples=n_resamples, seed=seed)
        parts.append(means.assign(augmentation=name))
    return pd.concat(parts, ignore_index=True)[["augmentation", "severity", "mean", "std", "low", "high", "n"]]


def published(dataset: xr.Dataset) -> pd.DataFrame:
    """The rows of `table` at severity 1."""
    rows = table(dataset)
    return rows[rows["severity"] == 1].reset_index(drop=True)


def levels(dataset: xr.Dataset, by: By) -> dict[float, float]:
    """Distortions at which to match, from weak to strong, by quantile: the quartiles of the published distortion.

    Over all pairs of an image and an augmentation that has a dose, at severity 1; pairs that are not distorted at all
    are left out. In the units of `by`, so that SSIM falls from one to the next. NaN where nothing is distorted.
    """
    rows = published(dataset)
    rows = rows[rows["augmentation"].isin(DOSED) & (rows["mse"] > 0)]
    return {q: float(rows[by].quantile(q if by == "mse" else 1 - q)) for q in QUARTILES}


def at_matched(dataset: xr.Dataset, by: By, level: float) -> pd.DataFrame:
    """The shift of each image under each augmentation of DOSED where its distortion is `level`, interpolated.

    Columns image_id, augmentation, severity (the dose that it takes), l2, cosine_distance. An image's distortion need
    not grow with the severity (corners that are pulled further may meet pixels that fit better); the first crossing is
    taken. Between the two severities around it all three run straight in the root of the distortion, since small doses
    distort quadratically and shift linearly. NaN where no severity reaches the level: nothing is extrapolated.
    Raises ValueError for another measure, or a level that is no distortion.
    """
    if by not in get_args(By):
        raise ValueError(f"by={by!r}: one of {', '.join(get_args(By))} is accepted")
    if not (level > 0 if by == "mse" else level < 1):
        raise ValueError(f"{by} {level}: a distortion is accepted, an MSE above 0 or an SSIM below 1")
    return _at(dataset, by, level if by == "mse" else 1 - level)


def _at(dataset: xr.Dataset, by: By, target: float) -> pd.DataFrame:
    """`at_matched` for a distortion of `target`: MSE, or 1 - SSIM."""
    part = dataset.sel(augmentation=list(DOSED)).transpose("image", "augmentation", "level")
    distortion = part["mse"].values.astype(float) if by == "mse" else 1 - part["ssim"].values.astype(float)
    beyond = distortion >= target
    crossed = beyond.any(axis=-1)
    after = np.where(crossed, beyond.argmax(axis=-1), 1)

    def take(values: np.ndarray, index: np.ndarray) -> np.ndarray:
        values = np.broadcast_to(values, distortion.shape)
        return np.take_along_axis(values, index[..., None], axis=-1)[..., 0].astype(float)

    low, high = (np.sqrt(np.clip(take(distortion, index), 0, None)) for index in (after - 1, after))
    weight = np.where(crossed, (np.sqrt(target) - low) / np.where(crossed, high - low, 1), np.nan)
    found = {
        name: take(part[name].values, after - 1) * (1 - weight) + take(part[name].values, after) * weight
        for name in ("severity", "l2", "cosine_distance")
    }
    pairs = pd.MultiIndex.from_product([part["image"].values, DOSED], names=["image_id", "augmentation"])
    return pd.DataFrame({name: values.ravel() for name, values in found.items()}, index=pairs).reset_index()


def complete(matched: pd.DataFrame) -> pd.DataFrame:
    """The rows of the images that reach the level under every augmentation: those that can be compared."""
    reached = matched.groupby("image_id")["l2"].transform(lambda shifts: shifts.notna().all())
    return matched[reached].reset_index(drop=True)


def reach(matched: pd.DataFrame) -> pd.DataFrame:
    """Columns augmentation, severity (median of what the level takes), reached, never: images by augmentation."""
    groups = matched.groupby("augmentation", sort=False)
    found = groups.agg(severity=("severity", "median"), reached=("l2", "count"), never=("l2", lambda x: x.isna().sum()))
    return found.reset_index()


def along(dataset: xr.Dataset, by: By, level: float) -> pd.DataFrame:
    """Mean shift against distortion: columns augmentation, distortion (MSE, or 1 - SSIM), l2, cosine_distance.

    At 21 distortions, ten a decade, from a twentieth of `level` to five times it. Over the images that are complete at
    `level`, and only where all of them reach, so that a line is one set of images from end to end. The flip's one row
    is its published mean. Empty where no image is complete.
    """
    kept = complete(at_matched(dataset, by, level))["image_id"].unique()
    part = dataset.sel(image=kept)
    middle = level if by == "mse" else 1 - level
    shifts = ["l2", "cosine_distance"]
    rows = []
    for distortion in middle * 10.0 ** (np.arange(-13, 8) / 10) if len(kept) else []:
        groups = _at(part, by, distortion).groupby("augmentation", sort=False)[shifts]
        rows.append(groups.mean()[groups.count().eq(len(kept))].dropna().assign(distortion=distortion))
    flip = published(part)[lambda rows: ~rows["augmentation"].isin(DOSED)]
    flip = flip.assign(distortion=flip["mse"] if by == "mse" else 1 - flip["ssim"])
    rows.append(flip.groupby("augmentation")[[*shifts, "distortion"]].mean())
    return pd.concat(rows).reset_index()[["augmentation", "distortion", *shifts]]


def compare(
    dataset: xr.Dataset, by: By, level: float, metric: str = "l2", *, n_resamples: int, seed: int
) -> Comparison:
    """Does the published ranking, by l2 or cosine_distance, survive where all distort alike?

    Both rankings are of the images that reach `level` under every augmentation, and of DOSED; with no such image the
    table is empty and tau NaN.
    """
    settings = {"n_resamples": n_resamples, "seed": seed}
    matched = complete(at_matched(dataset, by, level))
    before = published(dataset)
    before = before[before["image_id"].isin(matched["image_id"]) & before["augmentation"].isin(DOSED)]
    if matched.empty:
        return Comparison(pd.DataFrame(columns=COMPARED), stats.Interval(*[float("nan")] * 3), "unknown")
    wide = [rows.pivot(index="image_id", columns="augmentation", values=metric) for rows in (before, matched)]
    tau = stats.rank_agreement(*wide, **settings)
    first = stats.ranking(before, metric, **settings)[["augmentation", "rank", "mean"]].add_prefix("published_")
    second = stats.ranking(matched, metric, **settings)
    joined = second.merge(first, left_on="augmentation", right_on="published_augmentation")
    return Comparison(joined[COMPARED], tau, verdict(tau, len(wide[0])))


def verdict(tau: stats.Interval, n_images: int) -> str:
    """The rule: "survives" where the interval of tau lies above SURVIVES, "does not survive" where it lies below.

    "undecided" where it holds SURVIVES, "unknown" with fewer than FEWEST images.
    """
    if n_images < FEWEST:
        return "unknown"
    if tau.low > SURVIVES:
        return "survives"
    return "does not survive" if tau.high < SURVIVES else "undecided"


def verdicts(dataset: xr.Dataset, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """One row for each measure of distortion, quartile and metric of the shift.

    Columns by, quartile, level, metric, n (images compared), tau, low, high, verdict, most and least (the augmentation
    that moves most, least, at the level), noise_published and noise_matched (the rank of noise among the eight).
    """
    rows = []
    for by in get_args(By):
        for quartile, level in levels(dataset, by).items():
            for metric in ("l2", "cosine_distance"):
                found = compare(dataset, by, level, metric, n_resamples=n_resamples, seed=seed)
                rows.append({"by": by, "quartile": quartile, "level": level, "metric": metric} | _summary(found))
    return pd.DataFrame(rows)


def _summary(found: Comparison) -> dict[str, Any]:
    ranks = found.table.set_index("augmentation")
    held = {"n": 0, "tau": found.tau.mean, "low": found.tau.low, "high": found.tau.high, "verdict": found.verdict}
    if ranks.empty:
        return held | {"most": None, "least": None, "noise_published": pd.NA, "noise_matched": pd.NA}
    noise = {"noise_published": ranks["published_rank"]["noise"], "noise_matched": ranks["rank"]["noise"]}
    return held | {"n": int(ranks["n"].iloc[0]), "most": ranks.index[0], "least": ranks.index[-1]} | noise


def _compare(
    encoder: "Encoder", views: UInt8[np.ndarray, "image 1+view height width 3"]
) -> dict[str, Float32[np.ndarray, "image augmentation level"]]:
    """Distortion and shift of all views after the first, which is the original."""
    pixels = torch.from_numpy(views)
    original, drawn = pixels[:, 0], pixels[:, 1:]
    there = pixels.to(encoder.device)
    kernels = {"mse": preservation.mse, "ssim": preservation.ssim}
    found = {name: kernel(there[:, 0], there[:, 1:]).cpu() for name, kernel in kernels.items()}
    changed = found["mse"] > 0
    embedding = encoder.encode(torch.cat([original, drawn[changed]])).embedding
    origin, moved = embedding[: len(original)][changed.nonzero()[:, 0]], embedding[len(original) :]
    for name, values in {"l2": metrics.l2(moved, origin), "cosine_distance": 1 - metrics.cosine(moved, origin)}.items():
        found[name] = torch.zeros(changed.shape)
        found[name][changed] = values.float()
    shape = (len(original), len(SEVERITIES), N_LEVELS)
    return {name: found[name].reshape(shape).numpy() for name in LAYOUT}


def doses(
    image: UInt8[np.ndarray, "height width 3"], *, seed: int, image_id: str
) -> UInt8[np.ndarray, "1+view height width 3"]:
    """The image and, in the order of the arrays, every augmentation of it at every severity."""
    out = np.empty((N_VIEWS, *image.shape), np.uint8)
    out[0] = image
    doses = ((name, severity) for name, steps in SEVERITIES.items() for severity in steps)
    for slot, (name, severity) in zip(out[1:], doses, strict=True):
        slot[...] = augment.view(image, name, seed=seed, image_id=image_id, severity=severity)
    return out
