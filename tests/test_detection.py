"""AUROC and F1 of many units at a time against scikit-learn, one pair at a time."""

import numpy as np
import pytest
from scipy.sparse import csc_array
from sklearn.metrics import f1_score, roc_auc_score

from clipshift_core import detection


def _units(kind: str, n: int = 60, n_units: int = 7) -> csc_array:
    """Few distinct values, so that ties decide; the last unit but one is never on."""
    rng = np.random.default_rng(len(kind))
    if kind == "dense":
        return csc_array(np.round(rng.standard_normal((n, 2)), 3))
    values = rng.integers(-3 if kind == "signed" else 0, 4, (n, n_units)) * (rng.random((n, n_units)) < 0.4) / 4
    values[:, -2] = 0
    return csc_array(values)


@pytest.fixture(scope="module")
def positive() -> np.ndarray:
    shown = np.random.default_rng(1).random((60, 4)) < [0.1, 0.3, 0.5, 0.9]
    assert shown.any(axis=0).all() and not shown.all(axis=0).any()
    return shown


def _best_f1(activation: np.ndarray, shown: np.ndarray) -> tuple[float, float]:
    """The best F1 over every threshold that makes a difference, and the largest threshold that reaches it."""
    scores = {t: f1_score(shown, activation >= t) for t in np.unique(activation)}
    best = max(scores.values())
    return best, max(t for t, score in scores.items() if np.isclose(score, best, rtol=1e-12))


@pytest.mark.parametrize("kind", ["sparse", "signed", "dense"])
def test_auroc_against_scikit_learn(kind, positive):
    units = _units(kind)
    found = detection.auroc(units, positive)
    for (u, f), value in np.ndenumerate(found):
        assert value == pytest.approx(roc_auc_score(positive[:, f], units.toarray()[:, u]), abs=1e-12)


@pytest.mark.parametrize("entries", [1, detection.ENTRIES])
@pytest.mark.parametrize("kind", ["sparse", "signed", "dense"])
def test_f1_against_scikit_learn_at_every_threshold(kind, entries, positive, monkeypatch):
    """With entries = 1 every unit is a part of its own."""
    monkeypatch.setattr(detection, "ENTRIES", entries)
    units = _units(kind)
    found, dense = detection.best_f1(units, positive), units.toarray()
    for (u, f), value in np.ndenumerate(found):
        best, at = _best_f1(dense[:, u], positive[:, f])
        assert value == pytest.approx(best, abs=1e-12)
        assert detection.threshold(dense[:, u], positive[:, f]) == at


def test_hand_worked():
    # on at 2 in two images that show it, at 1 in one that does not, off in one that shows it and in two that do not
    units = csc_array(np.array([[2.0], [2], [1], [0], [0], [0]]))
    shown = np.array([[1], [1], [0], [1], [0], [0]], bool)
    # of 3 x 3 pairs: each 2 beats all three others, the 0 loses to 1 and ties two zeros: (3 + 3 + 0 + 1/2 + 1/2) / 9
    assert detection.auroc(units, shown)[0, 0] == pytest.approx(7 / 9)
    # at t = 2: TP 2, called 2, shown 3: 4/5; at 1: 4/6; at 0: all six called, 6/9
    assert detection.best_f1(units, shown)[0, 0] == pytest.approx(4 / 5)
    assert detection.threshold(units.toarray()[:, 0], shown[:, 0]) == 2


def test_a_factor_that_all_or_none_show_has_no_auroc():
    units = _units("sparse")
    found = detection.auroc(units, np.array([[True, False]] * 60))
    assert np.isnan(found).all()
    assert np.isfinite(detection.best_f1(units, np.array([[True, False]] * 60))).all()


def test_explicit_zeros_are_zeros(positive):
    units = _units("sparse")
    written = csc_array((units.toarray().T.ravel(), (np.tile(np.arange(60), 7), np.repeat(np.arange(7), 60))), (60, 7))
    assert written.nnz == 420 > units.nnz
    np.testing.assert_array_equal(detection.auroc(written, positive), detection.auroc(units, positive))
    np.testing.assert_array_equal(detection.best_f1(written, positive), detection.best_f1(units, positive))


@pytest.mark.parametrize("kind", ["sparse", "signed", "dense"])
def test_draws_against_scikit_learn_on_the_repeated_images(kind, positive):
    rng = np.random.default_rng(3)
    counts = rng.multinomial(60, [1 / 60] * 60, size=5)
    units = _units(kind).toarray()
    for u, f in np.ndindex(units.shape[1], positive.shape[1]):
        found = detection.auroc_draws(units[:, u], positive[:, f], counts.astype(float))
        for draw, count in zip(found, counts, strict=True):
            y, x = np.repeat(positive[:, f], count), np.repeat(units[:, u], count)
            assert draw == pytest.approx(roc_auc_score(y, x), abs=1e-12)


def test_a_draw_without_positives_is_unknown():
    counts = np.array([[1.0, 1, 1], [0, 2, 1], [3, 0, 0]])
    found = detection.auroc_draws(np.array([1.0, 0, 0]), np.array([True, False, False]), counts)
    assert found[0] == 1 and np.isnan(found[1:]).all()


def test_thousands_of_units_take_no_loop_over_them(positive):
    """Units repeated a thousand times score as they did."""
    units = _units("sparse")
    many = csc_array(np.tile(units.toarray(), 1000))
    np.testing.assert_allclose(detection.auroc(many, positive), np.tile(detection.auroc(units, positive), (1000, 1)))
    np.testing.assert_allclose(
        detection.best_f1(many, positive), np.tile(detection.best_f1(units, positive), (1000, 1))
    )
