"""Curves against re-evaluation variant by variant and by hand, areas against numpy, agreement against scipy."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import Tensor

from clipshift_core import faithfulness, stats

SETTINGS = {"n_resamples": 500, "seed": 3}
WEIGHTS = torch.tensor([[1.0, 2.0, -1.0, 4.0], [3.0, 1.0, 1.0, 5.0]])
VALUES = torch.tensor([[1.0, 2.0, 3.0, 0.0], [2.0, 0.0, 1.0, 1.0]])
SCORES = {"product": VALUES * WEIGHTS, "energy": VALUES}


def _evaluate(values: Tensor) -> Tensor:
    """10 + sum of weight x value: the contributions are 1, 4, -3 and 6, 1, 5 (the other slots are empty)."""
    return 10 + (values * WEIGHTS[:, None]).sum(-1)


def _random(n_images: int = 40, n_slots: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Values of which a third is empty, weights that raise the target on the whole, scores near and far from them."""
    made = torch.Generator().manual_seed(seed)
    values = torch.rand(n_images, n_slots, generator=made) + 0.1
    values[torch.rand(n_images, n_slots, generator=made) < 1 / 3] = 0
    weights = torch.randn(n_images, n_slots, generator=made) + 0.7
    noise = torch.randn(n_images, n_slots, generator=made)
    return values, weights, {"exact": values * weights, "near": values * weights + 0.3 * noise, "random": noise}


# curves


def test_hand_worked():
    found = faithfulness.curves(VALUES, SCORES, _evaluate, steps=[0, 1, 2, 3])
    assert found.methods == ("product", "energy")
    assert found.none.tolist() == [10, 10] and found.every.tolist() == [12, 22]
    # by product: image 0 deletes 4, 1, -3 from 12; image 1 deletes 6, 5, 1 from 22
    assert found.deletion[0].tolist() == [[12, 8, 7, 10], [22, 16, 11, 10]]
    assert found.insertion[0].tolist() == [[10, 14, 15, 12], [10, 16, 21, 22]]
    # by energy: image 0 deletes values 3, 2, 1, so -3, 4, 1; image 1 its 2, so 6, then 1 before 5 (tied, in order)
    assert found.deletion[1].tolist() == [[12, 15, 11, 10], [22, 16, 15, 10]]
    # mean height of deletion by product: (12/2 + 8 + 7 + 10/2) / 3 and (22/2 + 16 + 11 + 10/2) / 3
    assert found.areas["deletion"][0].tolist() == pytest.approx([26 / 3, 43 / 3])


def test_steps_are_shares_of_what_an_image_has_or_numbers():
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    scores = {"a": torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(2, 1)}
    by_share = faithfulness.curves(values, scores, lambda v: v.sum(-1), steps=2)
    assert by_share.steps.tolist() == [0, 0.5, 1]
    # half of four is two; half of one is rounded up to one
    assert by_share.deletion[0].tolist() == [[4, 2, 0], [1, 0, 0]]
    by_number = faithfulness.curves(values, scores, lambda v: v.sum(-1), steps=faithfulness.PUBLISHED_STEPS)
    assert by_number.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert by_number.insertion[0].tolist() == [[0, 1, 2, 3, 4, 4], [0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("chunk", [1, 2000, faithfulness.CHUNK_ENTRIES])
def test_equals_zeroing_one_by_one_whatever_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(faithfulness, "CHUNK_ENTRIES", chunk)
    values, weights, scores = _random()
    seen = []

    def evaluate(changed: Tensor) -> Tensor:
        seen.append(changed.shape[1])
        return (changed * weights[:, None]).sum(-1).tanh()

    found = faithfulness.curves(values, scores, evaluate, steps=4)
    assert sum(seen) == 2 + 3 * 2 * 3 and max(seen) == max(1, min(chunk // values.numel(), 20))  # ends are known
    for m, score in enumerate(scores.values()):
        for i in range(len(values)):
            on = [s for s in range(values.shape[1]) if values[i, s] != 0]
            order = sorted(on, key=lambda s: -float(score[i, s]))
            for step in range(5):
                cut = int(np.floor(step / 4 * len(on) + 0.5))
                for kind, kept in (("deletion", order[cut:]), ("insertion", order[:cut])):
                    y = np.tanh(sum(float(values[i, s] * weights[i, s]) for s in kept))
                    assert getattr(found, kind)[m, i, step] == pytest.approx(y, abs=1e-6)


def test_what_is_off_takes_no_part():
    scores = {name: torch.where(VALUES == 0, torch.nan, score) for name, score in SCORES.items()}
    with_nan = faithfulness.curves(VALUES, scores, _evaluate, steps=[0, 1, 2, 3])
    np.testing.assert_array_equal(
        with_nan.deletion, faithfulness.curves(VALUES, SCORES, _evaluate, steps=[0, 1, 2, 3]).deletion
    )


def test_order_of_images_and_slots_does_not_matter():
    values, weights, scores = _random()
    images, slots = torch.randperm(len(values)), torch.randperm(values.shape[1])

    def run(which):
        def evaluate(v):
            return (v * which(weights)[:, None]).double().sum(-1)

        return faithfulness.curves(which(values), {m: which(s) for m, s in scores.items()}, evaluate)

    first, second = run(lambda x: x), run(lambda x: x[images][:, slots])
    np.testing.assert_allclose(second.deletion, first.deletion[:, images.numpy()], atol=1e-9)
    areas = [faithfulness.normalised(c).areas["insertion"] for c in (first, second)]
    np.testing.assert_allclose(np.sort(areas[0]), np.sort(areas[1]), atol=1e-9)


def test_joined_is_all_images_at_once():
    values, weights, scores = _random()
    whole = faithfulness.curves(values, scores, lambda v: (v * weights[:, None]).sum(-1))
    parts = []
    for rows in torch.arange(len(values)).split(13):
        some = {method: score[rows] for method, score in scores.items()}
        parts.append(faithfulness.curves(values[rows], some, lambda v, r=rows: (v * weights[r, None]).sum(-1)))
    for one, other in zip(faithfulness.joined(parts)[1:], whole[1:], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(ValueError, match="other steps"):
        faithfulness.joined([whole, whole._replace(steps=whole.steps * 2)])


@pytest.mark.parametrize(
    ("values", "scores", "message"),
    [
        (torch.ones(3), {}, "values of shape"),
        (torch.tensor([[torch.inf]]), {}, "finite"),
        (torch.ones(2, 3), {"a": torch.ones(2, 2)}, r"'a' have shape \(2, 2\)"),
        (torch.ones(2, 3), {"a": torch.full((2, 3), torch.nan)}, "'a' are NaN"),
    ],
)
def test_bad_input_is_refused(values, scores, message):
    with pytest.raises(ValueError, match=message):
        faithfulness.curves(values, scores, _evaluate)


def test_bad_steps_and_targets_are_refused():
    for steps in (0, [0], [1, 1], [-1, 2]):
        with pytest.raises(ValueError, match="steps"):
            faithfulness.curves(VALUES, SCORES, _evaluate, steps=steps)
    with pytest.raises(ValueError, match="evaluate returned shape"):
        faithfulness.curves(VALUES, SCORES, lambda v: v)
    with pytest.raises(ValueError, match="values of the target are NaN"):
        faithfulness.curves(VALUES, SCORES, lambda v: v.sum(-1) * torch.nan)


# over a class


def test_class_hand_worked():
    # class 7: images 0 and 2; latent 5 has scores 4 and off, mean 2; latent 1 has 1 and 5, mean 3; latent 3 off and 1
    # class 2: image 1 alone, latent 5 before latent 3
    indices = torch.tensor([[5, 1], [3, 5], [1, 3]])
    values = torch.ones(3, 2)
    scores = {"a": torch.tensor([[4.0, 1.0], [0.5, 2.0], [5.0, 1.0]])}
    classes = torch.tensor([7, 2, 7])
    found = faithfulness.class_curves(
        indices, values, scores, classes, lambda v: (v * scores["a"][:, None]).sum(-1), steps=[0, 1, 2, 3]
    )
    # class 7 deletes latent 1, then 5, then 3: image 0 loses 1, 4 and nothing, image 2 loses 5, nothing and 1
    assert found.deletion[0].tolist() == [[5, 4, 0, 0], [2.5, 0.5, 0, 0], [6, 1, 1, 0]]
    assert found.insertion[0].tolist() == [[0, 1, 5, 5], [0, 2, 2.5, 2.5], [0, 5, 5, 6]]


def test_class_equals_ranking_each_class_alone():
    values, weights, scores = _random(seed=1)
    rng = np.random.default_rng(0)
    indices = torch.from_numpy(np.stack([rng.permutation(14)[:9] for _ in range(40)]))
    classes = torch.from_numpy(rng.integers(3, size=40)) * 10
    classes[0] = 99
    values[0] = 0  # an image that is a class of its own, with nothing in it
    found = faithfulness.class_curves(
        indices, values, scores, classes, lambda v: (v * weights[:, None]).sum(-1), steps=5
    )
    for m, score in enumerate(scores.values()):
        for name in (0, 10, 20):
            members = (classes == name).nonzero()[:, 0].tolist()
            total = np.zeros(14)
            for i in members:
                for s in range(9):
                    total[indices[i, s]] += float(score[i, s]) * bool(values[i, s] != 0)
            used = {int(indices[i, s]) for i in members for s in range(9) if values[i, s] != 0}
            order = sorted(used, key=lambda latent, t=total: -t[latent])
            for step in range(6):
                gone = set(order[: int(np.floor(step / 5 * len(order) + 0.5))])
                for i in members:
                    y = sum(float(values[i, s] * weights[i, s]) for s in range(9) if int(indices[i, s]) not in gone)
                    assert found.deletion[m, i, step] == pytest.approx(y, abs=1e-5)
    assert not found.deletion[:, 0].any()


def test_an_image_as_its_own_class_deletes_a_latent_at_all_its_tokens():
    # latent 4 at two tokens with scores 2 and 2, together before latent 1 with 3
    indices, values = torch.tensor([[4, 1, 4]]), torch.tensor([[1.0, 10.0, 100.0]])
    scores = {"a": torch.tensor([[2.0, 3.0, 2.0]])}
    found = faithfulness.class_curves(indices, values, scores, torch.tensor([0]), lambda v: v.sum(-1), steps=[0, 1, 2])
    assert found.deletion[0, 0].tolist() == [111, 10, 0]


def test_class_of_bad_shape_is_refused():
    with pytest.raises(ValueError, match="classes of shape"):
        faithfulness.class_curves(VALUES.long(), VALUES, SCORES, torch.zeros(3).long(), _evaluate)


# normalised


def test_normalised_leaves_out_what_latents_do_not_raise():
    # spans 2, 12, -3 and 0.5; the median of their sizes is 2.5, a quarter of it 0.625
    y = np.array([[10.0, 12], [10, 22], [10, 7], [10, 10.5]])
    found = faithfulness.Curves(("a",), np.array([0.0, 1.0]), y[:, 0], y[:, 1], y[None, :, ::-1], y[None])
    scaled = faithfulness.normalised(found)
    assert scaled.n_left_out == 2 and scaled.none.tolist() == [0, 0] and scaled.every.tolist() == [1, 1]
    assert scaled.deletion[0].tolist() == [[1, 0], [1, 0]] and scaled.areas["insertion"].tolist() == [[0.5, 0.5]]
    assert faithfulness.area_table(scaled, **SETTINGS)["n_left_out"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="in no image do the latents"):
        faithfulness.normalised(found._replace(none=y[2:, 1], every=y[2:, 1]))


def test_additive_target_has_the_areas_of_its_sorted_shares():
    """Where y is a sum, no order beats that by the true contributions, and the area is that of a cumulative sum."""
    values, weights, scores = _random(seed=2)
    found = faithfulness.normalised(
        faithfulness.curves(values, scores, lambda v: (v * weights[:, None]).sum(-1), steps=9)
    )
    areas = found.areas
    assert (areas["deletion"][0] <= areas["deletion"][1:] + 1e-6).all()
    assert (areas["insertion"][0] >= areas["insertion"][1:] - 1e-6).all()
    full = torch.ones(1, 4)
    shares = {"a": torch.tensor([[0.4, 0.1, 0.3, 0.2]])}
    one = faithfulness.curves(full, shares, lambda v: (v * shares["a"][:, None]).sum(-1), steps=4)
    # insertion climbs 0, 0.4, 0.7, 0.9, 1
    np.testing.assert_allclose(one.areas["insertion"], np.trapezoid([[[0, 0.4, 0.7, 0.9, 1]]], dx=0.25), atol=1e-7)


# tables


def test_tables_hold_means_and_intervals_over_images():
    values, weights, scores = _random()
    found = faithfulness.curves(values, scores, lambda v: (v * weights[:, None]).sum(-1), steps=4)
    table = faithfulness.curve_table(found, **SETTINGS)
    assert list(table.columns) == ["kind", "method", "step", "mean", "low", "high", "n"] and len(table) == 2 * 3 * 5
    row = table.query("kind == 'insertion' and method == 'near' and step == 0.25").iloc[0]
    here = found.insertion[1, :, 1]
    oracle = scipy.stats.bootstrap((here,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    assert row["mean"] == pytest.approx(here.mean()) and row["n"] == 40
    assert [row["low"], row["high"]] == pytest.approx(list(oracle), abs=0.3 * here.std() / np.sqrt(40))
    areas = faithfulness.area_table(found, **SETTINGS)
    assert list(areas.columns) == ["kind", "method", "mean", "low", "high", "n", "n_left_out"]
    each = np.trapezoid(found.deletion[2], np.linspace(0, 1, 5), axis=1)
    assert areas.iloc[2][["kind", "method", "mean"]].tolist() == ["deletion", "random", pytest.approx(each.mean())]


def test_differences_are_paired_by_image():
    """Two methods that differ by 0.1 +- 0.01 on images that differ by 10: only a paired interval can tell."""
    rng = np.random.default_rng(0)
    image = rng.normal(0, 10, 60)
    a, b = image + 0.1 + rng.normal(0, 0.01, 60), image
    y = np.stack([a, b])[..., None].repeat(2, axis=2)
    found = faithfulness.Curves(("a", "b"), np.array([0.0, 1.0]), image, image, y, -y)
    table = faithfulness.difference_table(found, **SETTINGS)
    assert list(table["kind"]) == ["deletion", "insertion"]
    assert list(table.columns) == ["kind", "method", "reference", "mean", "low", "high", "p", "share", "n"]
    assert 0.09 < table["low"][0] < 0.1 < table["high"][0] < 0.11 and table["high"][1] < -0.09
    oracle = stats.paired_difference(a, b, **SETTINGS)
    assert table.iloc[0, 3:].tolist() == pytest.approx(list(oracle))


def test_against_every_pair_or_one():
    values = {name: np.arange(4.0) * k for k, name in enumerate("abc")}
    pairs = faithfulness.against(values, **SETTINGS)
    assert list(zip(pairs["method"], pairs["reference"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    one = faithfulness.against(values, reference="b", **SETTINGS)
    assert one["method"].tolist() == ["a", "c"] and one["mean"].tolist() == [-1.5, 1.5]
    values["a"] = np.array([np.nan, 0, 0, 9])
    assert faithfulness.against(values, reference="b", **SETTINGS).iloc[0][["mean", "n"]].tolist() == [1, 3]
    with pytest.raises(ValueError, match="accepted: a, b, c"):
        faithfulness.against(values, reference="d", **SETTINGS)


def test_mean_intervals_cover_the_truth_and_know_when_they_cannot():
    rng = np.random.default_rng(1)
    many = pd.RangeIndex(300, name="k")
    found = faithfulness.mean_intervals(rng.exponential(size=(300, 60)), index=many, **SETTINGS)
    assert 0.88 < ((found["low"] <= 1) & (found["high"] >= 1)).mean() < 0.98
    one = pd.Index([0], name="k")
    single = faithfulness.mean_intervals(np.array([[2.0]]), index=one, **SETTINGS)
    assert single["mean"][0] == 2 and single[["low", "high"]].isna().all(axis=None)
    assert faithfulness.mean_intervals(np.zeros((1, 0)), index=one, **SETTINGS)["mean"].isna().all()
    equal = faithfulness.mean_intervals(np.full((1, 7), 0.1), index=one, **SETTINGS)
    assert equal[["mean", "low", "high"]].iloc[0].tolist() == pytest.approx([0.1] * 3, rel=1e-12)


# agreement


def test_agreement_equals_scipys():
    values, weights, scores = _random(seed=4)
    scores["coarse"] = (scores["near"] * 2).round()  # ties
    exact = scores.pop("exact")
    found = faithfulness.agreement(values, scores, exact, k=3)
    for m, score in enumerate(scores.values()):
        for i in range(len(values)):
            on = values[i] != 0
            a, b = score[i][on].double().numpy(), exact[i][on].double().numpy()
            assert found.rho[m, i] == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-9)
            if on.sum() > 3:
                mine, best = (set(np.argsort(-x, kind="stable")[:3]) for x in (a, b))
                assert found.overlap[m, i] == pytest.approx(len(mine & best) / 3)
            else:
                assert np.isnan(found.overlap[m, i])
    table = faithfulness.agreement_table(found, **SETTINGS)
    assert list(table.columns) == ["measure", "method", "mean", "low", "high", "n"]
    assert table["mean"][0] == pytest.approx(np.nanmean(found.rho[0])) and table["mean"][0] > 0.7
    assert table["low"][1] < 0 < table["high"][1]  # random scores


def test_agreement_is_unknown_where_nothing_is_ordered():
    # one latent on, equal scores, and a reversed order
    values = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    scores = {"a": torch.tensor([[1.0, 5.0, 6.0], [2.0, 2.0, 2.0], [1.0, 2.0, 3.0]])}
    found = faithfulness.agreement(values, scores, torch.tensor([[1.0, 2.0, 3.0]] * 2 + [[3.0, 2.0, 1.0]]), k=2)
    np.testing.assert_allclose(found.rho, [[np.nan, np.nan, -1]])
    # the two best by score are slots 1 and 2, by effect 0 and 1; equal scores take the first two, 0 and 1 against 1, 2
    np.testing.assert_allclose(found.overlap, [[np.nan, 0.5, 0.5]])
    table = faithfulness.agreement_table(found, **SETTINGS)
    assert table["n"].tolist() == [1, 2] and table["mean"].tolist() == [pytest.approx(-1), 0.5]
    assert np.isnan(table["low"][0])


def test_a_mean_of_fifths_is_the_same_number_in_any_order_of_the_images():
    """188 fifths over 64 images are 0.5875, which a hair less shows as 0.587; plain sums give several numbers."""
    rng = np.random.default_rng(0)
    fifths = np.repeat([1, 2, 3, 4, 5], [8, 12, 24, 16, 4]) / 5
    assert round(5 * fifths.sum()) == 188 and len(fifths) == 64
    orders = np.stack([rng.permutation(fifths) for _ in range(50)])
    assert len(set(orders.mean(axis=1))) > 1
    index = pd.Index(range(50), name="order")
    assert set(faithfulness.mean_intervals(orders, n_resamples=10, seed=0, index=index)["mean"]) == {0.5875}
