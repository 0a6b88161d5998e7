"""Where along a model's depth, and in which heads, the shift arises, and whether other models shift alike.

Blocks and heads are counted from 0, as in `hooks`. A block that the tower does not give holds NaN in the pass, and is
left out here; `left_out` names it.
"""

from collections.abc import Sequence
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from clipshift_core import metrics, stats
from clipshift_core.workbench import Workbench


def linear_cka(
    x: Float[Tensor, "*batch image p"], y: Float[Tensor, "*batch image q"], *, debiased: bool = True
) -> Float[Tensor, "*batch"]:
    """Linear centred kernel alignment of two representations of the same images: 1 alike, 0 unrelated.

    HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)), unchanged by rotation, shift and isotropic scaling of either side
    (Kornblith et al. 2019). As published HSIC is |X'Y|_F^2 of the centred features. That is biased: of n unrelated
    images it tends to 1 as width grows beyond n. `debiased` takes the unbiased HSIC of Song et al. (2007), as Nguyen et
    al. (2021) do; -1 to 1, and NaN for fewer than 4 images. NaN too where one side is the same for all images.
    """
    return _cka(_pair(x, y), debiased)


def cka_interval(
    x: Float[Tensor, "*batch image p"], y: Float[Tensor, "*batch image q"], *, level: float = 0.95
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Debiased linear CKA with its jackknife interval over images: value, low, high.

    No bootstrap: an image drawn twice is a pair of images that are exactly alike, which the unbiased HSIC takes for
    structure, so that every resample lies too high. Each image is left out once instead (in closed form: no
    second product of matrices), on the scale of Fisher's z = atanh(CKA), which keeps the interval within -1 to 1.
    The interval is NaN for fewer than 5 images.
    """
    return _interval(_pair(x, y), level)


def block_cka(tokens: xr.Dataset, *, level: float = 0.95) -> pd.DataFrame:
    """Alignment of each view's class tokens with the originals', after every block, over the images of `tokens`.

    Columns block, augmentation, cka (debiased), low, high, biased (as published), n.
    """
    rows, names = [], list(tokens["view"].values[1:])
    for block, token in _tokens(tokens):
        pair = _pair(token[None, :, 0], token[:, 1:].transpose(0, 1))
        found = [*_interval(pair, level), _cka(pair, debiased=False)]
        rows += [(block, *row, len(token)) for row in zip(names, *(values.tolist() for values in found), strict=True)]
    return pd.DataFrame(rows, columns=["block", "augmentation", "cka", "low", "high", "biased", "n"])


def relative_distance(tokens: xr.Dataset, *, level: float = 0.95) -> pd.DataFrame:
    """Mean cosine distance of view and original after every block, over that between two different originals.

    0 not moved, 1 moved as far as another image lies. Before the first block every image has the same class token, so
    that early cosine distances are small whatever happens to the image; this ratio takes that out. Columns block,
    augmentation, mean, low, high (jackknife over images, both means at once), between (the denominator), n. NaN
    for fewer than 2 images, the interval for fewer than 3.
    """
    rows, names = [], list(tokens["view"].values[1:])
    for block, token in _tokens(tokens):
        unit, n = metrics.unit(token).numpy(), len(token)
        distance = 1 - (unit[:, 1:] * unit[:, :1]).sum(axis=-1)
        total = unit[:, 0].sum(axis=0)
        without = total - unit[:, 0]
        between = _mean_of_pairs(total @ total, n)
        value = _over(distance.mean(axis=0), between)
        each = _over((distance.sum(axis=0) - distance) / max(n - 1, 1), _mean_of_pairs((without**2).sum(-1), n - 1))
        low, high = _jackknife(value, each.T, level)
        found = zip(names, value, np.maximum(low, 0), high, strict=True)
        rows += [(block, *row, float(between), n) for row in found]
    return pd.DataFrame(rows, columns=["block", "augmentation", "mean", "low", "high", "between", "n"])


def by_block(dataset: xr.Dataset, *, n_resamples: int, seed: int, level: float = 0.95) -> pd.DataFrame:
    """Mean cosine distance (1 - cosine) of the class tokens of view and original after every block.

    Columns block, augmentation, mean, low, high (bootstrap over images), n.
    """
    distance = 1 - _readable(dataset, "block_cosine")
    return _tidy(distance, n_resamples, seed, level)


def by_head(dataset: xr.Dataset, *, n_resamples: int, seed: int, level: float = 0.95) -> pd.DataFrame:
    """Mean attention similarity of every head between view and original, 0.5 to 1.

    Columns block, head, augmentation, mean, low, high (bootstrap over images), n.
    """
    similarity = _readable(dataset, "head_attention")
    return _tidy(similarity, n_resamples, seed, level)


def half_way(dataset: xr.Dataset, *, n_resamples: int, seed: int, level: float = 0.95) -> pd.DataFrame:
    """The block at which the mean cosine distance first reaches half of what it is after the last block.

    Columns augmentation, block, low, high (bootstrap over images), n. Between two blocks it is interpolated; 0 if the
    first block is already there. NaN for a view that is not moved at all.
    """
    distance = 1 - _readable(dataset, "block_cosine")
    n, rows = distance.sizes["image"], []
    for name in distance["augmentation"].values if distance.size else ():
        values = distance.sel(augmentation=name).values
        found = stats.bootstrap(
            lambda c, v=values: _half(c @ v / n), n, n_resamples=n_resamples, seed=seed, level=level
        )
        rows.append((name, *found, n))
    return pd.DataFrame(rows, columns=["augmentation", "block", "low", "high", "n"])


def left_out(dataset: xr.Dataset, name: str) -> list[int]:
    """The blocks of which `name` (block_cosine, head_attention) holds NaN: this tower does not give them.

    Raises KeyError where the pass has no such variable at all, as for a tower without blocks.
    """
    return np.flatnonzero(~_finite(dataset[name])).tolist()


def compare_models(bench: Workbench, models: Sequence[str]) -> pd.DataFrame:
    """The same pass, on the same images and the same pixels, for the profile's model and for each of `models`.

    models: as a profile names them. One with the same weights as an earlier one is left
    out. Columns model, image_id, augmentation, l2, scale (root mean square distance of the model's embeddings of two
    different originals, in units of its embedding; NaN for one image), distance (1 - cosine).
    Raises ProfileError or EncoderError for a model that cannot be loaded, ValueError if the pixels differ.
    """
    tables, seen = [_shifts_of(bench, bench.encoder.name)], {bench.encoder.weights_hash: bench.encoder.name}
    for name in models:
        other = bench.changed({"model": name, "n_layers": 1})  # the class tokens of all blocks take much disk
        if other.encoder.weights_hash in seen:
            continue
        # two folders may end in the same name
        known = name if other.encoder.name in seen.values() else other.encoder.name
        seen[other.encoder.weights_hash] = known
        tables.append(_shifts_of(other, known))
        same = list(tables[-1]["image_id"]) == list(tables[0]["image_id"])
        if not same or not np.allclose(tables[-1]["mse"], tables[0]["mse"], rtol=1e-4):
            raise ValueError(f"{known} was not given the pixels of {bench.encoder.name}; delete the run's arrays")
    return pd.concat(tables, ignore_index=True).drop(columns="mse")


def by_model(table: pd.DataFrame, *, n_resamples: int, seed: int, level: float = 0.95) -> pd.DataFrame:
    """Each model's ranking by mean L2, the largest first, from `compare_models`.

    Columns model, augmentation, rank, mean, low, high (L2 over the model's own scale, which is taken as known),
    distance, distance_low, distance_high (mean cosine distance), n.
    """
    parts, bounds = [], ["mean", "low", "high"]
    for model, rows in table.groupby("model", sort=False):
        settings = {"n_resamples": n_resamples, "seed": seed, "level": level}
        found = stats.bootstrap_table(rows, "l2", **settings)
        rank = found["mean"].rank(ascending=False, method="first").astype(int)
        found[bounds] /= rows["scale"].iloc[0]
        angle = stats.bootstrap_table(rows, "distance", **settings)[bounds]
        found[["distance", "distance_low", "distance_high"]] = angle
        parts.append(found.assign(model=model, rank=rank))
    order = ["model", "augmentation", "rank", *bounds, "distance", "distance_low", "distance_high", "n"]
    return pd.concat(parts, ignore_index=True)[order]


def model_agreement(table: pd.DataFrame, *, n_resamples: int, seed: int, level: float = 0.95) -> pd.DataFrame:
    """Kendall's tau between the rankings of every two models, the same images drawn again for both.

    Columns model, other, tau, low, high, n.
    """
    wide, rows = _wide(table), []
    for a, b in combinations(wide, 2):
        tau = stats.rank_agreement(wide[a], wide[b], n_resamples=n_resamples, seed=seed, level=level)
        rows.append((a, b, *tau, len(wide[a])))
    return pd.DataFrame(rows, columns=["model", "other", "tau", "low", "high", "n"])


def image_agreement(table: pd.DataFrame, *, n_resamples: int, seed: int, level: float = 0.95) -> pd.DataFrame:
    """Are the images that an augmentation moves far in one model those that it moves far in another?

    Spearman's rho over images between the shifts of every two models, for each augmentation. Columns model, other,
    augmentation, rho, low, high (bootstrap over images), n. The interval is NaN for fewer than 4 images.
    """
    wide, rows = _wide(table), []
    for (a, b), name in product(combinations(wide, 2), next(iter(wide.values()))):
        pair = [wide[model][[name]].to_numpy() for model in (a, b)]
        rho = stats.correlation(*pair, n_resamples=n_resamples, seed=seed, level=level)
        low, high = (rho.low, rho.high) if len(pair[0]) >= 4 else (np.nan, np.nan)
        rows.append((a, b, name, rho.mean, low, high, len(pair[0])))
    return pd.DataFrame(rows, columns=["model", "other", "augmentation", "rho", "low", "high", "n"])


def _centred(x: Tensor) -> Float[Tensor, "*batch image width"]:
    """Float64, mean over images 0; from the first image, so that what is the same for all is zero to the last bit."""
    x = x.double() - x[..., :1, :].double()
    return x - x.mean(-2, keepdim=True)


def _alignment(x: Tensor, y: Tensor) -> Float[Tensor, "*batch image"]:
    """x_i' (X'Y) y_i = sum_j (x_i.x_j)(y_i.y_j) of centred features; summed over i it is |X'Y|_F^2.

    By whichever of X'Y (p x q) and the Gram matrices (n x n) is smaller.
    """
    if x.shape[-1] * y.shape[-1] <= x.shape[-2] ** 2:
        return ((x @ (x.mT @ y)) * y).sum(-1)
    return ((x @ x.mT) * (y @ y.mT)).sum(-1)


class _Pair(NamedTuple):
    """Two representations, centred, and the products of matrices behind every form of their CKA."""

    x: Float[Tensor, "*batch image p"]
    y: Float[Tensor, "*batch image q"]
    xy: Float[Tensor, "*batch image"]
    """`_alignment` of the two, and of each with itself."""
    xx: Float[Tensor, "*batch image"]
    yy: Float[Tensor, "*batch image"]


def _pair(x: Tensor, y: Tensor) -> _Pair:
    x, y = _centred(x), _centred(y)
    return _Pair(x, y, _alignment(x, y), _alignment(x, x), _alignment(y, y))


def _cka(pair: _Pair, debiased: bool) -> Float[Tensor, "*batch"]:
    x, y, *products = pair
    if x.shape[-2] < (4 if debiased else 2):
        return torch.full(pair.xy.shape[:-1], torch.nan, dtype=torch.float64)
    if debiased:
        products = [_hsic(*both, s) for both, s in zip(((x, y), (x, x), (y, y)), products, strict=True)]
    else:
        products = [s.sum(-1) for s in products]
    return _quotient(*products, x, y)


def _interval(pair: _Pair, level: float) -> tuple[Tensor, Tensor, Tensor]:
    x, y, *products = pair
    value = _cka(pair, debiased=True)
    if x.shape[-2] < 5:
        return value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan)
    products = [_hsic_without(*both, s) for both, s in zip(((x, y), (x, x), (y, y)), products, strict=True)]
    each = _quotient(*products, x[..., None, :, :], y[..., None, :, :])
    limit = 1 - 1e-9  # a view that is the original has CKA 1 up to rounding, whose atanh is infinite
    low, high = _jackknife(*(np.arctanh(z.clamp(-limit, limit).numpy()) for z in (value, each)), level)
    return value, torch.as_tensor(np.tanh(low)), torch.as_tensor(np.tanh(high)).maximum(value)


def _hsic(x: Tensor, y: Tensor, s: Float[Tensor, "*batch image"]) -> Float[Tensor, "*batch"]:
    """Unbiased HSIC of centred features with their `_alignment` s, up to a factor that depends on n alone.

    It is tr(K~L~) + 1'K~1 1'L~1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K~L~1, where K~ is the Gram matrix with a zero
    diagonal (Song et al. 2007, equation 5). Centring leaves it as it is, and makes 1'K~ minus the diagonal k, so
    that no K is needed: |X'Y|_F^2 - n / (n - 2) k.l + sum(k) sum(l) / ((n - 1)(n - 2)).
    """
    k, l, n = x.square().sum(-1), y.square().sum(-1), x.shape[-2]
    return s.sum(-1) - n / (n - 2) * (k * l).sum(-1) + k.sum(-1) * l.sum(-1) / ((n - 1) * (n - 2))


def _hsic_without(x: Tensor, y: Tensor, s: Float[Tensor, "*batch image"]) -> Float[Tensor, "*batch image"]:
    """The unbiased `_hsic` of the others, with each image left out in turn.

    Without image i the mean moves by -x_i / (n - 1). With c = 1 / (n - 1) and a = n c,
    |X'Y|^2 becomes |X'Y|^2 - 2 a s_i + a^2 k_i l_i, sum(k) becomes sum(k) - a k_i, and k.l becomes
    sum_j (k_j + 2c K_ij + c^2 k_i)(l_j + 2c L_ij + c^2 l_i) - a^4 k_i l_i, whose sums over K_ij alone vanish.
    """
    k, l, n = x.square().sum(-1), y.square().sum(-1), x.shape[-2]
    c, m = 1 / (n - 1), n - 1
    a, sum_k, sum_l = n * c, k.sum(-1, keepdim=True), l.sum(-1, keepdim=True)
    k_of_l = (x @ (x.mT @ l[..., None]))[..., 0]  # sum_j K_ij l_j
    l_of_k = (y @ (y.mT @ k[..., None]))[..., 0]
    whole = s.sum(-1, keepdim=True) - 2 * a * s + a**2 * k * l
    diagonal = (k * l).sum(-1, keepdim=True) + 2 * c * (k_of_l + l_of_k) + c**2 * (k * sum_l + l * sum_k + 4 * s)
    diagonal = diagonal + (n * c**4 - a**4) * k * l
    return whole - m / (m - 2) * diagonal + (sum_k - a * k) * (sum_l - a * l) / ((m - 1) * (m - 2))


def _quotient(xy: Tensor, xx: Tensor, yy: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """xy / sqrt(xx yy) within -1 to 1; NaN where one of them is no more than a rounding error of its own terms."""
    known = [product > 1e-12 * z.square().sum((-2, -1)) ** 2 for product, z in ((xx, x), (yy, y))]
    return torch.where(known[0] & known[1], xy / (xx * yy).clamp(min=0).sqrt(), torch.nan).clamp(-1, 1)


def _jackknife(value: NDArray, each: NDArray, level: float) -> tuple[NDArray, NDArray]:
    """Interval of `value` from its values (*batch, image) with each image left out: Student's t, n - 1 degrees."""
    n = each.shape[-1]
    if n < 3:
        return np.full_like(value, np.nan), np.full_like(value, np.nan)
    error = np.sqrt((n - 1) * each.var(axis=-1))
    reach = scipy.stats.t.ppf((1 + level) / 2, n - 1) * error
    return value - reach, value + reach


def _tokens(tokens: xr.Dataset):
    """(block, its class tokens (image, view, width), float64) for every block that holds no NaN."""
    held = torch.from_numpy(tokens["token"].values)
    for block in range(held.shape[2]):
        token = held[:, :, block].double()
        if token.isfinite().all():
            yield block, token


def _mean_of_pairs(square_of_sum: NDArray, n: int) -> NDArray:
    """Mean cosine distance of every two of n unit vectors, from the squared length of their sum: no n x n."""
    return 1 - (square_of_sum - n) / (n * (n - 1)) if n > 1 else np.full_like(square_of_sum, np.nan)


def _over(a: NDArray, b: NDArray) -> NDArray:
    """a / b, image by image; NaN where b is zero, which it is up to rounding if all images are alike."""
    b = np.where(np.asarray(b) > 1e-12, b, np.nan)
    return a / (b[:, None] if b.ndim else b)


def _readable(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """A variable of the pass in float64, labelled, without blocks that are NaN; empty for a tower without blocks."""
    if name not in dataset:
        dims = [*dataset["l2"].dims, "block", *(["head"] if name == "head_attention" else [])]
        shape = [*dataset["l2"].shape, *(0 for _ in dims[2:])]
        return xr.DataArray(np.empty(shape), dict(dataset["l2"].coords), dims)
    values = dataset[name].astype(np.float64).load()
    values = values.assign_coords(
        {dim: np.arange(values.sizes[dim]) for dim in ("block", "head") if dim in values.dims}
    )
    return values.isel(block=_finite(values))


def _finite(values: xr.DataArray) -> NDArray[np.bool_]:
    """Which blocks hold no NaN: the kernels give none for what could be read."""
    return np.isfinite(values).all([dim for dim in values.dims if dim != "block"]).values


def _tidy(values: xr.DataArray, n_resamples: int, seed: int, level: float) -> pd.DataFrame:
    """Means over images with bootstrap intervals; blocks first, then heads, then augmentations."""
    order = [dim for dim in ("block", "head", "augmentation") if dim in values.dims]
    n = values.sizes["image"]
    flat = values.transpose("image", *order).values.reshape(n, -1)
    table = pd.DataFrame(product(*(values[dim].values.tolist() for dim in order)), columns=order)
    table["mean"] = flat.mean(axis=0)
    table[["low", "high"]] = np.nan
    if n > 1 and len(table):
        draws = stats.bootstrap_draws(lambda counts: counts @ flat / n, n, n_resamples=n_resamples, seed=seed)
        table["low"], table["high"] = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return table.assign(n=n)


def _half(profile: Float[np.ndarray, "batch block"]) -> NDArray[np.float64]:
    """Where each row first reaches half of its last value, in blocks, linearly between two of them."""
    half = profile[:, -1] / 2
    first = (profile >= half[:, None]).argmax(axis=1)
    row = np.arange(len(profile))
    before, after = profile[row, np.maximum(first - 1, 0)], profile[row, first]
    part = np.divide(half - before, after - before, out=np.zeros(len(profile)), where=after > before)
    return np.where(half > 0, np.where(first > 0, first - 1 + part, 0.0), np.nan)


def _shifts_of(bench: Workbench, name: str) -> pd.DataFrame:
    original = torch.from_numpy(bench.dataset["embedding"][:, 0].values).double()
    n, table = len(original), bench.shifts
    # the mean of |a - b|^2 over pairs is 2 / (n - 1) times the sum of |a - mean|^2
    scale = (2 * (original - original.mean(0)).square().sum() / (n - 1)).sqrt().item() if n > 1 else np.nan
    table = table.assign(model=name, scale=scale, distance=1 - table["cosine"])
    return table[["model", "image_id", "augmentation", "l2", "scale", "distance", "mse"]]


def _wide(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Each model's L2 (image, augmentation), images and augmentations in the same order for all."""
    order = table["augmentation"].unique()
    return {
        model: rows.pivot(index="image_id", columns="augmentation", values="l2")[order]
        for model, rows in table.groupby("model", sort=False)
    }
