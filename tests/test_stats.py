"""Intervals, tests, linkage and densities against scipy, and what they say about one or three images."""

import warnings
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from scipy.cluster import hierarchy

from clipshift_core import stats

SETTINGS = {"n_resamples": 2000, "seed": 3}


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def tidy(wide: dict[str, np.ndarray]) -> pd.DataFrame:
    return pd.concat(
        [
            pd.DataFrame({"image_id": [f"i{k}" for k in range(len(v))], "augmentation": name, "l2": v})
            for name, v in wide.items()
        ],
        ignore_index=True,
    )


# intervals


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bootstrap_mean_equals_scipys_percentile_interval(rng, level):
    values = rng.gamma(2.0, size=200)
    result = stats.bootstrap_mean(values, n_resamples=20_000, seed=0, level=level)
    oracle = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", confidence_level=level, rng=rng
    ).confidence_interval
    assert result.mean == pytest.approx(values.mean(), rel=1e-12)
    error = values.std() / np.sqrt(200)
    assert [result.low, result.high] == pytest.approx(list(oracle), abs=0.05 * error)


def test_interval_covers_the_true_mean_as_often_as_it_says(rng):
    draws = rng.exponential(size=(400, 60))
    hits = [low <= 1 <= high for _, low, high in (stats.bootstrap_mean(d, n_resamples=400, seed=1) for d in draws)]
    assert 0.89 < np.mean(hits) < 0.98


def test_interval_depends_on_seed_and_values_alone(rng):
    values = rng.normal(size=50)
    first = stats.bootstrap_mean(values, **SETTINGS)
    assert first == stats.bootstrap_mean(rng.permutation(values), **SETTINGS)
    assert first != stats.bootstrap_mean(values, n_resamples=2000, seed=4)


def test_batches_of_resamples_change_nothing():
    """13,312 images need several batches; together they are the rows of one generator."""
    n = 400_000
    rows = np.concatenate(list(stats._resamples(n, 5, seed=9)))
    whole = stats._generator(9, "bootstrap").integers(n, size=(5, n))
    np.testing.assert_array_equal(rows, whole)


def test_one_and_three_and_equal_images():
    one = stats.bootstrap_mean([2.5], **SETTINGS)
    assert one.mean == 2.5 and np.isnan([one.low, one.high]).all()
    three = stats.bootstrap_mean([1.0, 2.0, 6.0], **SETTINGS)
    assert (three.mean, three.low, three.high) == (3.0, 1.0, 6.0)
    assert stats.bootstrap_mean([4.0] * 10, **SETTINGS) == (4.0, 4.0, 4.0)


@pytest.mark.parametrize(
    ("values", "message"), [([], "at least one image"), ([1.0, np.nan], "1 of 2 values"), ([[1.0]], "1-dimensional")]
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        stats.bootstrap_mean(values, **SETTINGS)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="n_resamples"):
        stats.bootstrap_mean([1.0, 2.0], n_resamples=0, seed=0)
    with pytest.raises(ValueError, match="level"):
        stats.bootstrap_mean([1.0, 2.0], n_resamples=10, seed=0, level=95)


def test_bootstrap_table_is_one_row_a_group_in_order_of_appearance(rng):
    data = {"noise": rng.normal(8, 1, 40), "blur": rng.normal(2, 1, 40), "elastic": rng.normal(1, 0.1, 30)}
    result = stats.bootstrap_table(tidy(data), "l2", **SETTINGS)
    assert list(result.columns) == ["augmentation", "mean", "std", "low", "high", "n"]
    assert list(result["augmentation"]) == list(data)
    assert list(result["n"]) == [40, 40, 30]
    for row in result.itertuples():
        values = data[row.augmentation]
        assert (row.mean, row.low, row.high) == stats.bootstrap_mean(values, **SETTINGS)
        assert row.std == pytest.approx(np.std(values, ddof=1))
    single = stats.bootstrap_table(tidy({"blur": np.array([2.0])}), "l2", **SETTINGS).iloc[0]
    assert single["mean"] == 2 and single[["std", "low", "high"]].isna().all()


def test_bootstrap_of_counts_is_that_of_the_drawn_images(rng):
    values = rng.gamma(2.0, size=30)
    as_counts = stats.bootstrap(lambda counts: counts @ values / 30, 30, **SETTINGS)
    by_index = stats.bootstrap_mean(np.sort(values), **SETTINGS)
    assert as_counts.mean == pytest.approx(by_index.mean, rel=1e-12)
    # the same resamples of another order of the images: equal up to the noise of 2,000 draws
    assert [as_counts.low, as_counts.high] == pytest.approx([by_index.low, by_index.high], abs=0.1 * values.std())
    in_order = np.sort(values)
    exact = stats.bootstrap(lambda counts: counts @ in_order / 30, 30, **SETTINGS)
    np.testing.assert_allclose(exact, by_index, rtol=1e-12)


def test_bootstrap_draws_are_one_value_a_resample_whatever_the_statistic(rng):
    values = rng.normal(size=(25, 3))
    draws = stats.bootstrap_draws(lambda counts: (counts @ values).max(axis=1) / 25, 25, **SETTINGS)
    (index,) = stats._resamples(25, **SETTINGS)
    slow = [values[i].mean(axis=0).max() for i in index]
    np.testing.assert_allclose(draws, slow, rtol=1e-12)


def test_bootstrap_leaves_out_resamples_without_a_value():
    # of two images the statistic is known only where both are drawn, and then it is 1
    both = stats.bootstrap(lambda counts: np.where(counts.min(axis=1) > 0, 1.0, np.nan), 2, **SETTINGS)
    assert both == (1, 1, 1)
    assert np.isnan(stats.bootstrap(lambda counts: np.full(len(counts), np.nan), 2, **SETTINGS)).all()
    assert np.isnan(stats.bootstrap(lambda counts: counts.sum(axis=1), 1, **SETTINGS)[1:]).all()


# paired tests


def test_sign_flip_is_scipys_exact_permutation_test(rng):
    a, b = rng.normal(0.5, 1, 9), rng.normal(0, 1, 9)
    oracle = scipy.stats.permutation_test(
        (a - b,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert stats.paired_difference(a, b, **SETTINGS).p == pytest.approx(oracle.pvalue, abs=1e-12)


def test_random_sign_flips_agree_with_the_t_test(rng):
    for shift in (0.0, 0.15, 0.25):
        a = rng.normal(size=150)
        b = a - shift + rng.normal(size=150)
        result = stats.paired_difference(a, b, n_resamples=20_000, seed=0)
        assert result.p == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, abs=0.02)
        assert result.mean == pytest.approx((a - b).mean())
        assert result[:3] == stats.bootstrap_mean(a - b, n_resamples=20_000, seed=0)


def test_share_direction_and_floor(rng):
    b = rng.normal(size=100)
    a = b + np.where(np.arange(100) < 90, 1.0, 0.0)
    result = stats.paired_difference(a, b, **SETTINGS)
    assert (result.share, result.n) == (0.9, 100)
    assert result.p == 1 / 2001
    assert stats.paired_difference(b, a, **SETTINGS).mean == pytest.approx(-result.mean)


def test_false_positives_of_the_paired_test_are_as_rare_as_promised(rng):
    p = [stats.paired_difference(d, 0 * d, n_resamples=199, seed=5).p for d in rng.normal(size=(300, 25))]
    assert 0.01 < np.mean(np.array(p) <= 0.05) < 0.09


def test_paired_difference_of_few_or_equal_images():
    assert stats.paired_difference([3.0], [1.0], **SETTINGS).p == 1.0
    assert np.isnan(stats.paired_difference([3.0], [1.0], **SETTINGS).low)
    assert stats.paired_difference([3.0, 4.0, 5.0], [1.0, 1.0, 1.0], **SETTINGS).p == 0.25
    equal = stats.paired_difference([1.0] * 40, [1.0] * 40, **SETTINGS)
    assert equal == (0, 0, 0, 1.0, 0.0, 40)
    with pytest.raises(ValueError, match="paired by image"):
        stats.paired_difference([1.0, 2.0], [1.0], **SETTINGS)


# ranking


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04, made monotone
    assert stats.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert stats.holm([0.9, 0.5]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == []


def test_ranking_separates_what_differs_and_not_what_does_not(rng):
    base = rng.gamma(9.0, size=120)
    data = {
        "blur": base + rng.normal(0, 0.5, 120),
        "noise": base + 6,
        "elastic": base + rng.normal(0, 0.5, 120),
        "coarse_dropout": base + 2 + rng.normal(0, 0.5, 120),
    }
    result = stats.ranking(tidy(data), "l2", **SETTINGS)
    assert list(result["rank"]) == [1, 2, 3, 4]
    assert list(result["augmentation"][:2]) == ["noise", "coarse_dropout"]
    assert list(result["separated"][:3]) == [True, True, False]
    assert result["separated"].isna().tolist() == [False, False, False, True]
    assert result["p_holm"].tolist()[:3] == stats.holm(result["p"].tolist()[:3])
    for row, following in pairwise(result.itertuples()):
        assert row.next == following.augmentation
        assert row.difference == pytest.approx(row.mean - following.mean)
        assert row.difference_low <= row.difference <= row.difference_high
    assert result["share"][0] == pytest.approx((data["noise"] > data["coarse_dropout"]).mean())


def test_ranking_smallest_first_is_the_mirror_image(rng):
    table = tidy({"blur": rng.normal(1, 1, 30), "noise": rng.normal(2, 1, 30), "elastic": rng.normal(0, 1, 30)})
    up = stats.ranking(table, "l2", largest_first=False, **SETTINGS)
    assert up["mean"].is_monotonic_increasing
    down = stats.ranking(table.assign(l2=-table["l2"]), "l2", **SETTINGS)
    assert list(up["augmentation"]) == list(down["augmentation"])
    np.testing.assert_allclose(up["difference"][:2], down["difference"][:2])
    assert (up["difference"][:2] > 0).all()


@pytest.mark.parametrize("n", [1, 3])
def test_ranking_of_few_images_separates_nothing(n):
    table = tidy({"blur": np.arange(n) + 1.0, "noise": np.arange(n) + 9.0, "elastic": np.zeros(n)})
    result = stats.ranking(table, "l2", **SETTINGS)
    assert list(result["augmentation"]) == ["noise", "blur", "elastic"]
    assert not result["separated"][:2].any()


def test_ranking_names_what_is_missing():
    table = tidy({"blur": np.ones(3), "noise": np.ones(2)})
    with pytest.raises(ValueError, match="'i2'.*'noise'"):
        stats.ranking(table, "l2", **SETTINGS)


# rank agreement


@pytest.mark.parametrize("method", ["kendall", "spearman"])
def test_rank_agreement_is_scipys_on_the_means_with_ties(rng, method):
    oracle = {"kendall": scipy.stats.kendalltau, "spearman": scipy.stats.spearmanr}[method]
    for _ in range(5):
        a, b = rng.integers(0, 3, (1, 9)).astype(float), rng.integers(0, 4, (1, 9)).astype(float)
        result = stats.rank_agreement(a, b, method=method, **SETTINGS)
        assert result.mean == pytest.approx(oracle(a[0], b[0]).statistic, abs=1e-12)
        assert np.isnan(result.low)


def test_rank_agreement_interval_draws_the_same_images_for_both(rng):
    a = rng.normal(size=(40, 6)) + 0.2 * np.arange(6)
    assert stats.rank_agreement(a, 2 * a + 1, **SETTINGS) == (1.0, 1.0, 1.0)
    assert stats.rank_agreement(a, -a, method="spearman", **SETTINGS).high == pytest.approx(-1.0)
    b = rng.normal(size=(40, 6)) + 0.2 * np.arange(6)
    result = stats.rank_agreement(a, b, n_resamples=4000, seed=0)
    index = rng.integers(40, size=(1000, 40))
    slow = [scipy.stats.kendalltau(a[i].mean(axis=0), b[i].mean(axis=0)).statistic for i in index]
    assert [result.low, result.high] == pytest.approx(np.quantile(slow, [0.025, 0.975]).tolist(), abs=0.14)


def test_items_with_equal_values_tie_in_every_resample(rng):
    for n in (3, 40, 333):
        a = np.tile(rng.normal(size=(n, 1)), 11)
        assert np.isnan(stats.rank_agreement(a, rng.normal(size=(n, 11)), **SETTINGS)).all()


def test_rank_agreement_of_no_order_is_unknown():
    assert np.isnan(stats.rank_agreement(np.ones((5, 4)), np.arange(20.0).reshape(5, 4), **SETTINGS)).all()
    with pytest.raises(ValueError, match="same images and items"):
        stats.rank_agreement(np.ones((5, 4)), np.ones((5, 3)), **SETTINGS)
    with pytest.raises(ValueError, match="kendall"):
        stats.rank_agreement(np.ones((5, 4)), np.ones((5, 4)), method="pearson", **SETTINGS)


# correlation

ORACLES = {"spearman": scipy.stats.spearmanr, "pearson": scipy.stats.pearsonr}


def slow_correlation(a: np.ndarray, b: np.ndarray, over: str, method: str) -> float:
    oracle = ORACLES[method]
    if over == "pairs":
        return oracle(a.ravel(), b.ravel()).statistic
    if over == "augmentations":
        return oracle(a.mean(axis=0), b.mean(axis=0)).statistic
    return np.mean([oracle(x, y).statistic for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("method", ["spearman", "pearson"])
@pytest.mark.parametrize("over", ["pairs", "augmentations", "within"])
@pytest.mark.parametrize("ties", [False, True])
def test_correlation_is_scipys_and_its_interval_that_of_a_plain_loop(rng, over, method, ties):
    a = rng.normal(size=(20, 9)) + 0.3 * np.arange(9)
    b = a + rng.normal(size=(20, 9))
    if ties:
        a, b = a.round(), (2 * b).round()
    settings = {"n_resamples": 200, "seed": 3}
    result = stats.correlation(a, b, over=over, method=method, **settings)
    assert result.mean == pytest.approx(slow_correlation(a, b, over, method), abs=1e-12)
    (index,) = stats._resamples(20, **settings)
    if over == "within":  # a mean of values by image, which bootstrap_mean sorts first
        each = np.sort([ORACLES[method](x, y).statistic for x, y in zip(a, b, strict=True)])
        slow = [each[i].mean() for i in index]
    else:
        slow = [slow_correlation(a[i], b[i], over, method) for i in index]
    assert [result.low, result.high] == pytest.approx(np.quantile(slow, [0.025, 0.975]).tolist(), abs=1e-9)


def test_the_three_views_of_a_correlation_differ_where_they_should():
    """Brighter images score higher on both sides, but within an image the two metrics oppose each other."""
    between, item = 10.0 * np.arange(6)[:, None], np.arange(4.0)
    a, b = between + item, between - item
    assert stats.correlation(a, b, over="within", **SETTINGS) == (-1, -1, -1)
    assert stats.correlation(a, b, over="augmentations", **SETTINGS).high == pytest.approx(-1)
    # ranks in a: image by image, 4 each; in b reversed within each image: d = 3, 1, 1, 3 and
    # rho = 1 - 6 * 6 * 20 / (24 * (24^2 - 1)) = 1 - 720 / 13800
    assert stats.correlation(a, b, **SETTINGS).mean == pytest.approx(1 - 720 / 13800, abs=1e-12)


def test_correlation_does_not_depend_on_how_its_resamples_are_parted(rng, monkeypatch):
    a = rng.normal(size=(40, 9))
    b = a + rng.normal(size=(40, 9))
    whole = stats.correlation(a, b, **SETTINGS)
    for part in (1, 1000, 10**9):
        monkeypatch.setattr(stats, "_PART", part)
        np.testing.assert_allclose(stats.correlation(a, b, **SETTINGS), whole, rtol=1e-12)


@pytest.mark.parametrize("method", ["spearman", "pearson"])
def test_correlation_with_something_constant_is_unknown(rng, method):
    # 0.1 does not sum to a multiple of itself exactly
    a, flat = rng.normal(size=(7, 9)), np.full((7, 9), 0.1)
    for over in ("pairs", "augmentations", "within"):
        assert np.isnan(stats.correlation(a, flat, over=over, method=method, **SETTINGS)).all()
    partly = a.copy()
    partly[0] = 0.1
    assert stats.correlation(partly, -partly, over="within", method=method, **SETTINGS).mean == pytest.approx(-1)
    # of two images the one that is flat is a resample of its own
    pairs = stats.correlation(partly[:2], partly[:2], method=method, **SETTINGS)
    assert pairs == pytest.approx((1, 1, 1))


def test_correlation_of_one_image_has_no_interval_and_bad_arguments_are_refused():
    a = np.arange(9.0)[None]
    for over in ("pairs", "augmentations", "within"):
        one = stats.correlation(a, a**2, over=over, **SETTINGS)
        assert one.mean == pytest.approx(1) and np.isnan(one[1:]).all()
    with pytest.raises(ValueError, match="same images and items"):
        stats.correlation(np.ones((5, 4)), np.ones((5, 3)), **SETTINGS)
    with pytest.raises(ValueError, match="1 of 9 values"):
        stats.correlation(a, np.where(a == 3, np.nan, a), **SETTINGS)
    with pytest.raises(ValueError, match="pearson"):
        stats.correlation(a, a, method="kendall", **SETTINGS)
    with pytest.raises(ValueError, match="'images'"):
        stats.correlation(a, a, over="images", **SETTINGS)


# linkage


def test_ward_by_hand():
    # two pairs at distance 1 and 2, far apart
    points = np.array([0.0, 1.0, 10.0, 12.0])
    distance = np.abs(points[:, None] - points)
    linkage = stats.ward(distance)
    assert linkage[:2, 2].tolist() == [1.0, 2.0]
    # between clusters of size 2 with centroids 0.5 and 11: sqrt(2 * 2 * 2 / (2 + 2)) * 10.5
    assert linkage[2, 2] == pytest.approx(np.sqrt(2) * 10.5)
    assert stats.cut_height(linkage) == pytest.approx(0.7 * np.sqrt(2) * 10.5)
    assert stats.clusters(linkage).tolist() in ([1, 1, 2, 2], [2, 2, 1, 1])
    assert set(stats.clusters(linkage, share=1.0)) == {1}
    assert len(set(stats.clusters(linkage, share=0.1))) == 3


def test_clusters_are_those_that_scipy_colours(rng):
    points = rng.normal(size=(9, 3))
    linkage = stats.ward(np.linalg.norm(points[:, None] - points, axis=-1))
    drawn = hierarchy.dendrogram(linkage, no_plot=True, color_threshold=stats.cut_height(linkage))
    by_colour = {leaf: colour for leaf, colour in zip(drawn["leaves"], drawn["leaves_color_list"], strict=True)}
    cluster = stats.clusters(linkage)
    for i in range(9):
        for j in range(9):
            if by_colour[i] != "C0" and by_colour[j] != "C0":  # C0: a leaf on its own above the cut
                assert (by_colour[i] == by_colour[j]) == (cluster[i] == cluster[j])


def test_ward_of_equal_views_is_one_cluster_and_bad_matrices_are_refused():
    assert stats.clusters(stats.ward(np.zeros((4, 4)))).tolist() == [1, 1, 1, 1]
    for bad in (np.zeros((1, 1)), np.zeros((2, 3)), np.array([[0, 1], [2, 0]]), np.ones((2, 2))):
        with pytest.raises(ValueError, match="distances"):
            stats.ward(bad)


# density


def test_density_is_scipys(rng):
    for n in (3, 50, 5000):
        values = rng.gamma(3.0, size=n)
        grid = np.linspace(-2, 20, 300)
        np.testing.assert_allclose(
            stats.density(values, grid), scipy.stats.gaussian_kde(values)(grid), rtol=1e-9, atol=1e-14
        )


@pytest.mark.parametrize("values", [[0.7], [0.7] * 20, [0.1 + 0.2, 0.3] * 10])
def test_density_of_equal_values_is_a_narrow_bell_of_area_one(values):
    grid = np.linspace(0, 1, 201)
    result = stats.density(values, grid)
    assert np.trapezoid(result, grid) == pytest.approx(1, abs=1e-6)
    assert grid[result.argmax()] == pytest.approx(values[0], abs=0.005)
    assert result[np.abs(grid - values[0]) > 0.05].max() < 1e-6
