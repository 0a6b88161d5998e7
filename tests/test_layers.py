"""CKA against explicit Gram matrices, intervals against leaving out by hand, depth and models against small worlds."""

import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import xarray as xr

from clipshift_core import augment, layers, profiles, scenes, stats
from clipshift_core.profiles import ProfileError
from clipshift_core.workbench import Workbench

SETTINGS = {"n_resamples": 1000, "seed": 2}
NINE = list(augment.VIEWS[1:])


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def gram_cka(x: np.ndarray, y: np.ndarray, debiased: bool) -> float:
    """From n x n Gram matrices, term by term as in Kornblith et al. and in Song et al., equation 5."""
    n = len(x)

    def hsic(k, l):
        if not debiased:
            h = np.eye(n) - 1 / n
            return np.trace(k @ h @ l @ h)
        k, l, one = k - np.diag(np.diag(k)), l - np.diag(np.diag(l)), np.ones(n)
        terms = (
            np.trace(k @ l),
            one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2)),
            2 / (n - 2) * (one @ k @ l @ one),
        )
        return (terms[0] + terms[1] - terms[2]) / (n * (n - 3))

    k, l = x @ x.T, y @ y.T
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def cka(x: np.ndarray, y: np.ndarray, **options) -> float:
    return layers.linear_cka(torch.from_numpy(x), torch.from_numpy(y), **options).item()


# alignment


def test_three_images_by_hand():
    """Centred x = (-1, 0, 1), y = (-1, -1, 2): X'Y = 1 + 0 + 2 = 3, X'X = 2, Y'Y = 6; 9 / sqrt(4 * 36) = 3/4."""
    assert cka(np.array([[5.0], [6], [7]]), np.array([[1.0], [1], [4]]), debiased=False) == pytest.approx(0.75)


def test_four_images_by_hand():
    """x = (-1, -1, 1, 1), y = (-1, 1, -1, 1), k = l = (1, 1, 1, 1). X'Y = 0, so HSIC(x, y) is, up to its factor,
    0 - 4/2 * 4 + 16 / (3 * 2) = -16/3; X'X = 4, so HSIC(x, x) = HSIC(y, y) = 16 - 8 + 8/3 = 32/3; CKA = -1/2."""
    x, y = np.array([[-1.0], [-1], [1], [1]]), np.array([[-1.0], [1], [-1], [1]])
    assert cka(x, y) == pytest.approx(-0.5) and cka(x, y, debiased=False) == 0


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize(("n", "p", "q"), [(30, 4, 9), (9, 30, 40), (12, 4, 40), (4, 3, 3)])
def test_equals_explicit_gram_matrices(rng, n, p, q, debiased):
    x = rng.normal(size=(n, p)) + 3
    y = x[:, :1] + rng.normal(size=(n, q)) - 5
    assert cka(x, y, debiased=debiased) == pytest.approx(gram_cka(x, y, debiased), rel=1e-9)


def test_batches_are_taken_one_by_one(rng):
    x, y = rng.normal(size=(1, 3, 20, 6)), rng.normal(size=(2, 3, 20, 30))
    together = layers.linear_cka(torch.from_numpy(x), torch.from_numpy(y))
    assert together.shape == (2, 3)
    for view, block in itertools.product(range(2), range(3)):
        assert together[view, block].item() == pytest.approx(gram_cka(x[0, block], y[view, block], True), rel=1e-9)


@pytest.mark.parametrize("debiased", [True, False])
def test_rotation_shift_and_one_scale_change_nothing_a_scale_for_each_feature_does(rng, debiased):
    x = rng.normal(size=(25, 6))
    y = x + 0.5 * rng.normal(size=(25, 6))
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    same = cka(x, y, debiased=debiased)
    assert cka(7 * x @ rotation + 100, 0.01 * y - 3, debiased=debiased) == pytest.approx(same, rel=1e-9)
    assert abs(cka(x * np.arange(1, 7), y, debiased=debiased) - same) > 0.01


def test_unrelated_images_have_no_alignment_once_debiased(rng):
    x, y = rng.normal(size=(2, 50, 60, 160))
    debiased = layers.linear_cka(torch.from_numpy(x), torch.from_numpy(y))
    biased = layers.linear_cka(torch.from_numpy(x), torch.from_numpy(y), debiased=False)
    # for Gaussians the biased one tends to p / (p + n) = 160 / 220
    assert biased.mean() == pytest.approx(160 / 220, abs=0.01) and biased.min() > 0.7
    assert abs(debiased.mean()) < 3 * debiased.std() / np.sqrt(50) < 0.03


def test_too_few_images_and_images_that_are_all_alike():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for n, known in ((1, (0, 0)), (2, (1, 0)), (3, (1, 0)), (4, (1, 1))):
        both = [layers.linear_cka(x[:n], x[:n], debiased=d).item() for d in (False, True)]
        np.testing.assert_allclose(both, [1 if k else np.nan for k in known])
    for options in ({"debiased": True}, {"debiased": False}):
        assert layers.linear_cka(x, torch.full((6, 2), 0.1), **options).isnan()
    # images that all lie equally far apart have no structure: the unbiased HSIC is zero but for rounding
    assert layers.linear_cka(torch.eye(6), torch.eye(6)).isnan()


# its interval


def population(width: int, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Scales of Gaussian x, the map of y = x A + noise, and the CKA of their covariances (no sample)."""
    scale = np.arange(1, width + 1) ** -0.5
    a = np.eye(width) + 0.3 * rng.normal(size=(width, width)) / np.sqrt(width)
    xx = np.diag(scale**2)
    yy = a.T @ xx @ a + noise**2 * np.eye(width)
    return scale, a, ((xx @ a) ** 2).sum() / np.sqrt((xx**2).sum() * (yy**2).sum())


def test_interval_covers_the_known_alignment_where_a_bootstrap_does_not(rng):
    scale, a, truth = population(80, 0.6, rng)
    x = rng.normal(size=(200, 48, 80)) * scale
    y = torch.from_numpy(x @ a + 0.6 * rng.normal(size=x.shape))
    x = torch.from_numpy(x)
    value, low, high = layers.cka_interval(x, y)
    assert value.mean().item() == pytest.approx(truth, abs=0.02)
    assert 0.92 < ((low <= truth) & (truth <= high)).double().mean() <= 0.99
    drawn = [layers.linear_cka(x[:40, i], y[:40, i]) for i in torch.from_numpy(rng.integers(48, size=(60, 48)))]
    low, high = torch.stack(drawn).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
    assert ((low <= truth) & (truth <= high)).double().mean() < 0.2  # what duplicates do to it


@pytest.mark.parametrize(("n", "p", "q"), [(30, 4, 5), (7, 20, 30), (5, 2, 2)])
def test_interval_equals_leaving_each_image_out_by_hand(rng, n, p, q):
    x = rng.normal(size=(n, p)) + 2
    y = rng.normal(size=(n, q)) + x[:, :1] * 2
    without = np.arctanh([gram_cka(np.delete(x, i, 0), np.delete(y, i, 0), True) for i in range(n)])
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    reach = scipy.stats.t(n - 1).interval(0.9)[1] * error
    expected = np.tanh(np.arctanh(gram_cka(x, y, True)) + [0, -reach, reach])
    found = layers.cka_interval(torch.from_numpy(x), torch.from_numpy(y), level=0.9)
    assert [v.item() for v in found] == pytest.approx(list(expected), rel=1e-8)


def test_interval_of_the_same_and_of_too_few():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert [v.item() for v in layers.cka_interval(x, 2 * x)] == pytest.approx([1, 1, 1], abs=1e-9)
    value, low, high = layers.cka_interval(x[:4], x[:4])
    assert value.item() == pytest.approx(1) and low.isnan() and high.isnan()


# depth


@pytest.fixture
def tokens(rng) -> xr.Dataset:
    """Six images, three views, three blocks of width 8; the last view is the original; block 1 cannot be read."""
    token = rng.normal(size=(6, 1, 3, 8)) + 2 + 0.3 * rng.normal(size=(6, 3, 3, 8))
    token[:, 2] = token[:, 0]
    token[:, :, 1] = np.nan
    return xr.Dataset({"token": (("image", "view", "block", "width"), token)}, {"view": ["original", "noise", "blur"]})


def test_block_cka_by_view_and_block(tokens):
    table, token = layers.block_cka(tokens), tokens["token"].values
    assert list(table["block"]) == [0, 0, 2, 2] and list(table["augmentation"]) == ["noise", "blur"] * 2
    assert set(table["n"]) == {6}
    for row in table.itertuples():
        x, y = token[:, 0, row.block], token[:, ["original", "noise", "blur"].index(row.augmentation), row.block]
        assert row.cka == pytest.approx(gram_cka(x, y, True)) and row.biased == pytest.approx(gram_cka(x, y, False))
        assert row.low <= row.cka <= row.high
    assert table.loc[table["augmentation"] == "blur", ["cka", "low", "high", "biased"]].to_numpy() == pytest.approx(1)


def cosine_distance(a: np.ndarray, b: np.ndarray) -> float:
    return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def ratio(token: np.ndarray, view: int) -> float:
    moved = np.mean([cosine_distance(image[0], image[view]) for image in token])
    return moved / np.mean([cosine_distance(a[0], b[0]) for a, b in itertools.combinations(token, 2)])


def test_relative_distance_pair_by_pair(tokens):
    table = layers.relative_distance(tokens).set_index(["block", "augmentation"])
    for block in (0, 2):
        token = tokens["token"].values[:, :, block]
        pairs = [cosine_distance(a[0], b[0]) for a, b in itertools.combinations(token, 2)]
        without = [ratio(np.delete(token, i, 0), 1) for i in range(6)]
        reach = scipy.stats.t(5).interval(0.95)[1] * np.sqrt(5 * np.var(without))
        row = table.loc[(block, "noise")]
        assert row["mean"] == pytest.approx(ratio(token, 1)) and row["between"] == pytest.approx(np.mean(pairs))
        assert row["high"] == pytest.approx(row["mean"] + reach)
        assert row["low"] == pytest.approx(max(row["mean"] - reach, 0))
        assert table.loc[(block, "blur"), ["mean", "low", "high"]].to_numpy() == pytest.approx(0, abs=1e-12)
    assert len(table) == 4


@pytest.mark.parametrize("n", [1, 2, 3])
def test_depth_of_few_images_is_unknown_and_not_wrong(tokens, n):
    few = tokens.isel(image=slice(n))
    assert layers.block_cka(few)[["cka", "low", "high"]].isna().all(axis=None)
    table = layers.relative_distance(few)
    assert table["mean"].notna().all() == (n > 1) and table["low"].notna().all() == (n > 2)


def dataset_of(distance: np.ndarray, heads: np.ndarray | None = None) -> xr.Dataset:
    held = {"block_cosine": (("image", "augmentation", "block"), (1 - distance).astype(np.float32))}
    if heads is not None:
        held["head_attention"] = (("image", "augmentation", "block", "head"), heads.astype(np.float32))
    return xr.Dataset(held, {"augmentation": NINE[: distance.shape[1]]})


def test_blocks_and_heads_hold_means_and_intervals(rng):
    heads = rng.uniform(0.5, 1, size=(40, 2, 3, 4))
    heads[:, :, 1] = np.nan
    dataset = dataset_of(rng.uniform(size=(40, 2, 3)), heads)
    assert layers.left_out(dataset, "block_cosine") == [] and layers.left_out(dataset, "head_attention") == [1]
    blocks, by_head = layers.by_block(dataset, **SETTINGS), layers.by_head(dataset, **SETTINGS)
    assert list(blocks.columns) == ["block", "augmentation", "mean", "low", "high", "n"] and len(blocks) == 6
    assert list(by_head["block"].unique()) == [0, 2] and len(by_head) == 2 * 4 * 2
    for row in itertools.chain(blocks.itertuples(), by_head.itertuples()):
        where = {"augmentation": NINE.index(row.augmentation), "block": row.block}
        if hasattr(row, "head"):
            values = dataset["head_attention"].isel(**where, head=row.head).values
        else:
            values = 1 - dataset["block_cosine"].isel(**where).values
        assert row.mean == pytest.approx(values.mean(), rel=1e-5) and row.n == 40
        oracle = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
        assert [row.low, row.high] == pytest.approx(list(oracle), abs=0.3 * values.std() / np.sqrt(40))


def test_one_image_and_no_readable_block():
    one = dataset_of(np.full((1, 2, 3), 0.25))
    table = layers.by_block(one, **SETTINGS)
    assert list(table["mean"]) == [0.25] * 6 and table[["low", "high"]].isna().all(axis=None)
    assert layers.half_way(one, **SETTINGS)[["low", "high"]].isna().all(axis=None)
    without = xr.Dataset({"l2": (("image", "augmentation"), np.ones((5, 2)))}, {"augmentation": NINE[:2]})
    assert layers.by_block(without, **SETTINGS).empty and layers.by_head(without, **SETTINGS).empty
    assert layers.half_way(without, **SETTINGS).empty  # a tower without blocks
    none = dataset_of(np.full((5, 2, 3), np.nan))
    assert layers.left_out(none, "block_cosine") == [0, 1, 2]
    assert layers.by_block(none, **SETTINGS).empty and layers.half_way(none, **SETTINGS).empty


def test_half_way_by_hand():
    """0.1, 0.2, 0.6, 1: half of 1 lies 0.3 of 0.4 beyond block 1, at 1.75. 0.6, 0.9, 0.7, 0.8 is there at block 0.
    0.2, 0.1, 0.1, 0.4 is there at block 0, though it turns back. 0, 0, 0.2, 0.4 arrives at block 2. 0 never moves."""
    profiles = np.array([[0.1, 0.2, 0.6, 1], [0.6, 0.9, 0.7, 0.8], [0.2, 0.1, 0.1, 0.4], [0, 0, 0.2, 0.4], [0] * 4])
    table = layers.half_way(dataset_of(np.repeat(profiles[None], 6, axis=0)), **SETTINGS)
    assert list(table["augmentation"]) == NINE[:5]
    np.testing.assert_allclose(table["block"], [1.75, 0, 0, 2, np.nan], atol=1e-5)
    np.testing.assert_allclose(table[["low", "high"]].T, [table["block"]] * 2, atol=1e-6)


def test_half_way_is_of_the_mean_over_the_images_drawn():
    """Half of the images move at block 0 and half at block 2: the mean is 0.5, 0.5, 1, the half lies at block 0, and
    a resample with fewer early ones, 0.5 - e, needs e / (0.5 + e) of the way from block 1 to block 2."""
    distance = np.repeat([[[1.0, 1, 1]], [[0.0, 0, 1]]], 20, axis=0)
    row = layers.half_way(dataset_of(distance), **SETTINGS).iloc[0]
    early = np.random.default_rng(0).binomial(40, 0.5, 100_000) / 40
    oracle = np.quantile(np.where(early >= 0.5, 0, 1 + (0.5 - early) / (1 - early)), 0.975)
    assert row["block"] == row["low"] == 0 and row["high"] == pytest.approx(oracle, abs=0.05)


# models


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Five images at 64 px in a run of its own, with the two models that ship."""
    root, patch = tmp_path_factory.mktemp("run"), pytest.MonkeyPatch()
    models = profiles.ROOT / "data" / "models"
    (root / "models").symlink_to(models)
    patch.setattr(profiles, "ROOT", root)
    scenes.write_shard([scenes.sample(i) for i in range(5)], root / "images" / "s.tar", size=64)
    (root / "p.yaml").write_text("source: images\nmodel: models/scene-s16\nimage_size: 64\nn_layers: 5\n")
    yield Workbench.open("06", root / "p.yaml")
    patch.undo()


@pytest.fixture(scope="module")
def compared(bench) -> pd.DataFrame:
    return layers.compare_models(bench, ["models/scene-s16", "models/scene-xs12"])


def test_models_see_the_same_images_and_the_profiles_own_is_not_compared_with_itself(bench, compared):
    assert list(compared["model"].unique()) == ["scene-s16", "scene-xs12"] and len(compared) == 2 * 5 * 9
    own, other = (rows.reset_index(drop=True) for _, rows in compared.groupby("model"))
    pd.testing.assert_series_equal(own["l2"], bench.shifts["l2"])
    assert own[["image_id", "augmentation"]].equals(other[["image_id", "augmentation"]])
    assert not np.allclose(own["l2"], other["l2"], rtol=0.05)
    np.testing.assert_allclose(own["distance"], 1 - bench.shifts["cosine"], atol=1e-6)
    original = bench.dataset["embedding"].values[:, 0].astype(float)
    squares = [((a - b) ** 2).sum() for a, b in itertools.combinations(original, 2)]
    assert own["scale"].unique() == pytest.approx([np.sqrt(np.mean(squares))])


def test_the_pass_and_its_tokens_tell_the_same_depth(bench):
    blocks, relative = layers.by_block(bench.dataset, **SETTINGS), layers.relative_distance(bench.tokens)
    np.testing.assert_allclose(relative["mean"] * relative["between"], blocks["mean"], atol=1e-6)
    assert list(relative["block"]) == list(blocks["block"]) and set(blocks["block"]) == set(range(5))


def test_a_model_that_is_not_there_and_other_pixels_are_refused(bench, monkeypatch):
    with pytest.raises(ProfileError, match="models/of/nobody"):
        layers.compare_models(bench, ["models/of/nobody"])
    moved = pd.DataFrame({"image_id": ["a"], "mse": [1.0]})
    tables = iter([moved, moved.assign(mse=1.1)])
    monkeypatch.setattr(layers, "_shifts_of", lambda *_: next(tables))
    with pytest.raises(ValueError, match="scene-xs12 was not given the pixels of scene-s16"):
        layers.compare_models(bench, ["models/scene-xs12"])


def shifts_of(rng, n: int) -> pd.DataFrame:
    """Two models that agree but for noise, over n images, in shuffled order; each with a scale of its own."""
    base = rng.gamma(4, 1, size=(n, 9)) * np.arange(1, 10)
    rows = []
    for model, scale in (("a", 2.0), ("b", 50.0)):
        values = scale * base * rng.gamma(9, 1 / 9, size=base.shape)
        for i, j in itertools.product(range(n), range(9)):
            rows.append((model, f"i{i}", NINE[j], values[i, j], scale, values[i, j] / 1000))
    table = pd.DataFrame(rows, columns=["model", "image_id", "augmentation", "l2", "scale", "distance"])
    return table.sample(frac=1, random_state=0, ignore_index=True)


def test_rankings_and_their_agreement(rng):
    table = shifts_of(rng, 30)
    ranks = layers.by_model(table, **SETTINGS)
    means = table.groupby(["model", "augmentation"])[["l2", "distance"]].mean()
    for row in ranks.itertuples():
        interval = stats.bootstrap_mean(
            table.loc[(table["model"] == row.model) & (table["augmentation"] == row.augmentation), "l2"], **SETTINGS
        )
        scale = {"a": 2.0, "b": 50.0}[row.model]
        assert [row.mean, row.low, row.high] == pytest.approx([v / scale for v in interval])
        assert row.distance_low < row.distance < row.distance_high
        assert row.distance == pytest.approx(means.loc[(row.model, row.augmentation), "distance"])
        assert row.rank == (means.loc[row.model, "l2"] >= means.loc[(row.model, row.augmentation), "l2"]).sum()
    agreement = layers.model_agreement(table, **SETTINGS)
    assert len(agreement) == 1 and set(agreement.loc[0, ["model", "other"]]) == {"a", "b"}
    tau = scipy.stats.kendalltau(means.loc["a", "l2"], means.loc["b", "l2"]).statistic
    assert agreement.loc[0, "tau"] == pytest.approx(tau) and agreement.loc[0, "low"] <= tau <= agreement.loc[0, "high"]


def test_agreement_over_images_is_spearmans(rng):
    table = shifts_of(rng, 40)
    found = layers.image_agreement(table, **SETTINGS)
    assert sorted(found["augmentation"]) == sorted(NINE)
    for row in found.itertuples():
        wide = table[table["augmentation"] == row.augmentation].pivot(index="image_id", columns="model", values="l2")
        assert row.rho == pytest.approx(scipy.stats.spearmanr(wide["a"], wide["b"]).statistic)
        oracle = scipy.stats.bootstrap(
            (wide["a"], wide["b"]),
            lambda a, b: scipy.stats.spearmanr(a, b).statistic,
            paired=True,
            vectorized=False,
            n_resamples=300,
            method="percentile",
            rng=0,
        ).confidence_interval
        assert [row.low, row.high] == pytest.approx(list(oracle), abs=0.1)


@pytest.mark.parametrize("n", [1, 3])
def test_models_on_few_images(rng, n):
    table = shifts_of(rng, n)
    assert len(layers.by_model(table, **SETTINGS)) == 18
    assert np.isnan(layers.model_agreement(table, **SETTINGS).loc[0, "low"]) == (n == 1)
    found = layers.image_agreement(table, **SETTINGS)
    assert found[["low", "high"]].isna().all(axis=None) and found["rho"].isna().all() == (n == 1)
