"""The factors against the scenes they were drawn from, baselines against scikit-learn, and planted bases recovered."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csc_array
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score, roc_auc_score

from clipshift_core import concepts, detection, ground_truth, scenes
from clipshift_core.scenes import Scene

SETTINGS = {"n_resamples": 100, "seed": 0}


@pytest.fixture(scope="module")
def some() -> list[Scene]:
    return [scenes.sample(seed) for seed in range(600)]


@pytest.fixture(scope="module")
def presence(some) -> pd.DataFrame:
    return ground_truth.factors(scenes.table(some))


@pytest.fixture(scope="module")
def first() -> np.ndarray:
    return ground_truth.halves(600, seed=0)


@pytest.fixture(scope="module")
def shown(presence, first) -> pd.DataFrame:
    return ground_truth.scored(presence, first)


# factors


def test_factors_are_what_the_scene_shows(some, presence):
    for i, scene in enumerate(some):
        expected = {("kind", scene.kind), ("colour", scene.colour), ("background", scene.background)}
        expected |= {("cue", cue) for cue in scene.cues}
        if scene.companion:
            expected |= {("kind", scene.companion), ("colour", scene.companion_colour), ("relation", scene.relation)}
        row = presence.iloc[i]
        assert set(row[row].index) == expected
    assert len(presence.columns) == 32 + 10 + 6 + 4 + 11 + 6


def test_factors_hand_worked():
    one = Scene(0, "duck", "red", "beach", "bat (club)", "blue", "left", ("ripples", "sign:TAXI"))
    two = Scene(1, "owl", "black", "night")
    table = ground_truth.factors(scenes.table([one, two]))
    expected = "kind duck, kind bat (club), colour red, colour blue, background beach, relation left, cue ripples"
    assert ", ".join(" ".join(key) for key in table.columns[table.iloc[0]]) == expected + ", cue sign:TAXI"
    assert table.iloc[1].sum() == 3
    with pytest.raises(ValueError, match="no kind, colour.*only drawn scenes"):
        ground_truth.factors(pd.DataFrame({"image_id": ["a"]}))


def test_halves_are_halves_and_differ_by_seed():
    first, again, other = (ground_truth.halves(101, seed=s) for s in (0, 0, 1))
    assert first.sum() == 50 and (first == again).all() and (first != other).any()


def test_too_rare_or_too_common_is_not_scored():
    first = np.arange(40) < 20
    table = pd.DataFrame(
        {
            ("f", "enough"): np.arange(40) % 4 == 0,  # five in each part
            ("f", "one part"): np.arange(40) < 10,
            ("f", "rare"): np.arange(40) % 5 == 0,  # four in each part
            ("f", "common"): np.arange(40) % 5 != 0,
        }
    )
    assert ground_truth.scored(table, first).columns.tolist() == [("f", "enough")]


# bases


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(50, 6, generator=rng) @ torch.randn(6, 6, generator=rng) + 3


def test_dictionary_holds_the_pooled_codes():
    indices = torch.tensor([[[0, 2]], [[2, 1]]])
    codes = concepts.pooled(indices, torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]), 4)
    assert ground_truth.dictionary(codes, 2, 4).toarray().tolist() == [[1, 0, 2, 0], [0, 0, 3, 0]]


def test_neurons_with_both_signs(x):
    np.testing.assert_array_equal(ground_truth.neurons(x).toarray(), np.hstack([x, -x]))


def test_random_dictionary_keeps_the_largest_projections(x):
    first = np.arange(50) < 20
    found = ground_truth.random_dictionary(x, first, n_latents=30, k=4, seed=5).toarray()
    every = ground_truth.random_dictionary(x, first, n_latents=30, k=30, seed=5).toarray()
    assert ((found > 0).sum(axis=1) <= 4).all() and (found >= 0).all()
    for row, full in zip(found, every, strict=True):
        assert set(np.flatnonzero(row)) <= set(np.argsort(-full)[:4])
        np.testing.assert_allclose(row[row > 0], full[row > 0], rtol=1e-5)
    # projections on unit vectors of what is left without the mean: a matrix of rank 6, rows no longer than x
    centred = x - x[:20].mean(0)
    assert (every <= torch.linalg.vector_norm(centred, dim=1, keepdim=True).numpy() + 1e-5).all()
    other = ground_truth.random_dictionary(x, first, n_latents=30, k=30, seed=6).toarray()
    assert (every != other).any() and (every > 0).any(axis=0).all()
    # the same directions whatever the images: twice the distance from the mean is twice the projection
    again = ground_truth.random_dictionary(2 * centred + 1, first, n_latents=30, k=30, seed=5).toarray()
    np.testing.assert_allclose(again, 2 * every, atol=1e-4)


def test_principal_components_against_scikit_learn(x):
    first = np.arange(50) < 30
    found = ground_truth.principal_components(x, first).toarray()
    expected = PCA(6).fit(x[:30].double().numpy()).transform(x.double().numpy())
    np.testing.assert_allclose(np.abs(found[:, :6]), np.abs(expected), atol=1e-4)
    np.testing.assert_array_equal(found[:, 6:], -found[:, :6])


# comparison


def _noisy(presence: pd.DataFrame, seed: int, noise: float = 0.05) -> np.ndarray:
    """A unit for each factor value: on where it shows, and in a share `noise` of the other images."""
    rng = np.random.default_rng(seed)
    return presence.to_numpy() * (1 + rng.random(presence.shape)) + (rng.random(presence.shape) < noise) * 0.5


def test_a_unit_for_each_factor_is_found(presence, shown, first):
    order = np.random.default_rng(0).permutation(shown.shape[1])
    units = _noisy(shown, 1)[:, order]
    found = ground_truth.compare({"planted": csc_array(units)}, presence, first, **SETTINGS)
    table, n = found.factors, shown.shape[1]
    assert [(f, v) for f, v in zip(table["factor"], table["value"], strict=True)] == list(shown.columns)
    assert order[table["unit"]].tolist() == list(range(n)) and table["own"].all()
    assert found.bases.iloc[0][["n_units", "n_on", "n_factors", "n_mixing"]].tolist() == [n, n, n, 0]
    assert found.bases.iloc[0]["n_detecting"] == n
    for i, row in table.iterrows():
        y, a = shown[~first].to_numpy()[:, i], units[~first]
        y1, a1 = shown[first].to_numpy()[:, i], units[first]
        assert row["n"] == y.sum()
        assert row["auroc"] == pytest.approx(roc_auc_score(y, a[:, row["unit"]]))
        if i % 30 == 0:
            assert row["auroc_first"] == pytest.approx(max(roc_auc_score(y1, column) for column in a1.T))
        assert row["f1"] == pytest.approx(f1_score(y, a[:, row["f1_unit"]] >= row["threshold"]))
        assert row["threshold"] == detection.threshold(a1[:, row["f1_unit"]], y1)
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"] and row["f1_low"] <= row["f1"] <= row["f1_high"]
    values = found.summary.set_index("measure")["value"]
    assert values["auroc"] == pytest.approx(table["auroc"].mean())
    assert values["f1"] == pytest.approx(table["f1"].mean())
    assert values["own"] == n and values["mixing"] == 0


def test_units_are_chosen_on_the_first_part_alone(presence, shown, first):
    """Units that know the first part and toss coins on the second score chance, however well they were chosen."""
    units = _noisy(shown, 1)
    units[~first] = np.random.default_rng(2).permutation(units[~first])
    table = ground_truth.compare({"fooled": csc_array(units)}, presence, first, **SETTINGS).factors
    assert table["auroc_first"].min() > 0.9 and abs(table["auroc"].mean() - 0.5) < 0.03 and not table["own"].any()
    by_f1 = detection.best_f1(csc_array(units[first]), shown[first].to_numpy())
    assert table["f1_unit"].tolist() == by_f1.argmax(axis=0).tolist() and table["f1"].mean() < 0.3 < by_f1.max()


def test_a_unit_that_is_best_for_two_values_is_no_ones_own(presence, first):
    """red and blue share a unit; green is detected by one of its own, which is best for a value it does not detect."""
    shown = presence[[("colour", c) for c in ("red", "blue", "green")]].copy()
    rng = np.random.default_rng(0)
    shown[("colour", "noise")] = rng.random(600) < 0.3
    red, blue, green, _ = shown.to_numpy().T
    units = csc_array(np.stack([red | blue, green], axis=1).astype(float))
    found = ground_truth.compare({"shared": units}, shown, first, **SETTINGS)
    table = found.factors.set_index("value")
    assert table.loc[["red", "blue"], "unit"].tolist() == [0, 0] and table.loc["red", "auroc"] > 0.9
    assert table["own"].tolist() == [False, False, True, False]
    assert found.bases["n_mixing"].tolist() == [1] and found.bases["n_detecting"].tolist() == [2]


def test_mixing_must_show_on_both_parts(presence, first):
    shown = presence[[("colour", c) for c in ("red", "blue")]]
    red, blue = shown.to_numpy().T
    for part, n_mixing in ((np.ones(600, bool), 1), (first, 0), (~first, 0)):
        unit = csc_array((red | (blue & part)).astype(float)[:, None])
        assert ground_truth.compare({"a": unit}, shown, first, **SETTINGS).bases["n_mixing"].tolist() == [n_mixing]


def test_what_goes_with_a_factor_is_not_mixed_with_it(presence, first):
    """ripples show beside most ducks: a unit for ducks finds both, but not ripples where there is no duck."""
    duck = presence[("kind", "duck")].to_numpy()
    rng = np.random.default_rng(4)
    shown = presence[[("kind", "duck")]].copy()
    shown[("cue", "beside")] = np.where(duck, rng.random(600) < 0.95, rng.random(600) < 0.02)
    beside = shown[("cue", "beside")].to_numpy()
    alone, both = duck.astype(float), (duck | beside).astype(float)
    for unit, n_mixing in ((alone, 0), (both, 1)):
        found = ground_truth.compare({"one": csc_array(unit[:, None])}, shown, first, detects=0.8, **SETTINGS)
        assert roc_auc_score(beside, unit) > 0.8 and roc_auc_score(duck, unit) > 0.8
        row = found.summary.set_index("measure").loc["mixing"]
        assert found.bases["n_mixing"].tolist() == [n_mixing] == [row["value"]] and row["low"] <= row["high"]


def test_differences_are_taken_on_the_same_images(presence, shown, first):
    good, bad = csc_array(_noisy(shown, 1)), csc_array(np.random.default_rng(0).random((600, 40)))
    bases = {"good": good, "same": good, "bad": bad}
    found = ground_truth.compare(bases, presence, first, **SETTINGS)
    table = found.summary.set_index(["basis", "measure"])
    columns = ["difference", "difference_low", "difference_high"]
    assert table.loc["good", columns].isna().all(axis=None)
    means, counts = ["auroc", "f1"], ["own", "mixing"]
    assert (table.loc[("same", means), columns] == 0).all(axis=None)  # were the draws not paired, they would spread
    assert (table.loc[("same", counts), "difference"] == 0).all()
    assert table.loc[(slice(None), counts), columns[1:]].isna().all(axis=None)
    auroc = table.loc[("bad", "auroc")]
    assert auroc["difference"] == pytest.approx(table.loc[("good", "auroc"), "value"] - auroc["value"])
    assert 0.3 < auroc["difference_low"] < auroc["difference"] < auroc["difference_high"] < 0.6
    assert found.bases["basis"].tolist() == list(bases)
    again = ground_truth.compare(bases, presence, first, **SETTINGS)
    pd.testing.assert_frame_equal(again.summary, found.summary)


def test_counts_run_from_the_certain_to_the_possible(presence, shown, first):
    """Noise that leaves many AUROCs near the bound: the count lies between those of the intervals' two ends."""
    units = csc_array(_noisy(shown, 1, noise=0.0) * (np.random.default_rng(5).random(shown.shape) < 0.8))
    found = ground_truth.compare({"near": units}, presence, first, **SETTINGS)
    table, row = found.factors, found.summary.set_index("measure").loc["own"]
    assert table["unit"].is_unique
    low, value, high = ((table[c] >= ground_truth.DETECTS).sum() for c in ("auroc_low", "auroc", "auroc_high"))
    assert (row["low"], row["value"], row["high"]) == (low, value, high) and low < value < high


def test_nothing_to_score_is_refused(presence, first):
    with pytest.raises(ValueError, match="0 factor values are shown by 5 images of each part"):
        ground_truth.compare({"a": csc_array((8, 1))}, presence[:8], np.arange(8) < 4, **SETTINGS)
