"""Discovery against hand-worked decoys, plain loops and simulated nulls; scores against scikit-learn and sets."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from clipshift_core import reliance, stats

SETTINGS = {"n_resamples": 200, "seed": 5}
WORDS = ["owl", "bat", "cup"]
N_LATENTS = 12


def _tensor(values) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


@pytest.fixture(scope="module")
def units() -> dict[str, Tensor]:
    """Of three classes 7, 5 and 9 images, in no order, each with 5 of 12 latents, of which one slot may be empty."""
    rng = np.random.default_rng(2)
    classes = rng.permutation(np.repeat([0, 1, 2], [7, 5, 9]))
    latents = np.stack([rng.permutation(N_LATENTS)[:5] for _ in classes])
    values = rng.standard_normal(latents.shape) + 0.5
    values[rng.random(latents.shape) < 0.1] = 0
    alignment = rng.uniform(-0.1, 0.3, (3, N_LATENTS))
    alignment[:, 3] = np.nan
    decoys = np.where(values != 0, rng.standard_normal((4, *latents.shape)), 0)
    found = {"latents": latents, "values": values, "decoys": decoys, "classes": classes, "alignment": alignment}
    return {name: _tensor(each) for name, each in found.items()}


@pytest.fixture(scope="module")
def found(units) -> reliance.Discovery:
    return reliance.discover(**units, words=WORDS, **SETTINGS, q=0.6)


def _ranked(units: dict[str, Tensor], scores: Tensor, **options) -> reliance.Ranking:
    at = (units["latents"], scores, units["classes"], units["alignment"])
    return reliance.ranked(*at, WORDS, **options)


def _loop(units: dict[str, Tensor], scores: Tensor) -> dict[tuple[str, int], list[float]]:
    """For every candidate its score in each image of the class, one image at a time."""
    each = {}
    for c, word in enumerate(WORDS):
        own = [i for i in range(len(scores)) if units["classes"][i] == c]
        known = [a for a in units["alignment"][c].tolist() if not np.isnan(a)]
        for j in range(N_LATENTS):
            row, n_on = [], 0
            for i in own:
                here = [s for s in range(5) if units["latents"][i, s] == j and units["values"][i, s] != 0]
                row.append(float(scores[i, here[0]]) if here else 0.0)
                n_on += len(here)
            relative = float(units["alignment"][c, j]) / max(known)
            if n_on >= 3 and relative < 0.5:
                each[word, j] = row
    return each


# discovery


def test_candidates_and_means_are_those_of_a_loop(units, found):
    own = _loop(units, units["values"])
    table = found.table.set_index(["word", "latent"])
    assert len(own) > 10 and set(table.index) == set(own) and not any(j == 3 for _, j in own)
    assert table["attribution"].to_dict() == pytest.approx({key: np.mean(row) for key, row in own.items()}, abs=1e-12)
    for (word, j), row in table.iterrows():
        c = WORDS.index(word)
        of_class = units["classes"] == c
        holds = ((units["latents"] == j) & (units["values"] != 0))[of_class]
        assert row["n"] == int(of_class.sum()) and row["n_on"] == int(holds.sum())
        aligned = units["alignment"][c].numpy()
        assert row["relative"] == pytest.approx(aligned[j] / np.nanmax(aligned)) and row["alignment"] == aligned[j]
    decoys = [np.mean(row) for draw in units["decoys"] for row in _loop(units, draw).values()]
    assert np.sort(found.decoys) == pytest.approx(np.sort([d for d in decoys if d > 0]), abs=1e-12)


def test_q_values_are_those_of_a_loop_over_thresholds(units, found):
    decoys = np.array([[np.mean(row) for row in _loop(units, draw).values()] for draw in units["decoys"]])
    scores = found.table["attribution"].to_numpy()

    def fdr(t: float) -> float:
        return np.mean([(draw >= t).sum() for draw in decoys]) / (scores >= t).sum()

    expected = [min([fdr(t) for t in scores if 0 < t <= s] + [1.0]) for s in scores]
    assert found.table["fdr"].tolist() == pytest.approx(expected, abs=1e-12)
    good = [t for t in scores if t > 0 and fdr(t) <= 0.6]
    assert good and found.threshold == min(good)
    assert found.table["found"].tolist() == (scores >= found.threshold).tolist()
    assert 0 < found.table["found"].sum() < len(scores)


def test_intervals_are_the_bootstrap_of_the_class(units, found):
    own, n_held = _loop(units, units["values"]), 0
    for row in found.table.itertuples():
        values = np.array(own[row.word, row.latent])
        interval = stats.bootstrap(lambda counts, v=values: counts @ v / len(v), row.n, **SETTINGS)
        assert (row.low, row.high) == pytest.approx(interval[1:], abs=1e-12)
        n_held += row.low <= row.attribution <= row.high
    assert n_held == len(found.table)


def _by_hand(scores: list[float], decoys: list[list[float]], q: float) -> reliance.Discovery:
    """One class of three images, in each of which every latent is on with its score; latent n means the class."""
    n = len(scores)
    latents = torch.arange(n).repeat(3, 1)
    each = torch.tensor(decoys, dtype=torch.float64)[:, None].repeat(1, 3, 1)
    alignment = torch.tensor([[0.1] * n + [1.0]])
    values = torch.tensor(scores, dtype=torch.float64).repeat(3, 1)
    classes = torch.zeros(3, dtype=torch.long)
    return reliance.discover(latents, values, each, classes, alignment, ["owl"], q=q, **SETTINGS)


def test_hand_worked_threshold():
    scores, decoys = [8.0, 6, 5, 3, 2, -1], [[7, 1, 0, 0, 0, -2], [4, 2, 1, 0, 0, -9.0]]
    # t = 8: decoys >= 8 are 0 and 0, of 1 score           0 / 1
    # t = 6: 1 and 0, mean 1/2, of 2 scores               1/4
    # t = 5: 1 and 0, mean 1/2, of 3                      1/6
    # t = 3: 1 and 1, mean 1, of 4                        1/4
    # t = 2: 1 and 2, mean 3/2, of 5                      3/10
    # the lowest at or below each score: 0, 1/6, 1/6, 1/4, 3/10; what is not positive is never found
    found = _by_hand(scores, decoys, q=0.2)
    assert found.table["fdr"].tolist() == pytest.approx([0, 1 / 6, 1 / 6, 1 / 4, 3 / 10, 1])
    assert found.table["latent"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found.threshold == 5 and found.table["found"].tolist() == [True] * 3 + [False] * 3
    assert np.sort(found.decoys).tolist() == [1, 1, 2, 4, 7]
    # a rate that is reached exactly finds
    assert _by_hand(scores, decoys, q=0.3).threshold == 2 and _by_hand(scores, decoys, q=0.25).threshold == 3
    assert _by_hand(scores, decoys, q=0.01).threshold == 8


def test_nothing_is_found_where_decoys_score_as_much():
    found = _by_hand([2.0, 1, -1], [[3, 3, 3.0]], q=0.5)
    # 3 decoys of 1 and of 2 scores: 3 and 3/2, but a rate is at most 1
    assert found.table["fdr"].tolist() == [1, 1, 1]
    assert found.threshold == np.inf and not found.table["found"].any()
    nothing = _by_hand([], [[]], q=0.5)
    assert len(nothing.table) == 0 and nothing.threshold == np.inf and list(nothing.table) == list(found.table)


def test_equal_scores_stand_by_word_and_latent():
    classes = torch.arange(2).repeat_interleave(3)
    latents, alignment = torch.tensor([[4, 2]]).repeat(6, 1), torch.eye(2, 5)
    ones, decoys = torch.ones(6, 2), torch.zeros(1, 6, 2)
    found = reliance.discover(latents, ones, decoys, classes, alignment, ["owl", "bat"], **SETTINGS)
    assert list(zip(found.table["word"], found.table["latent"], strict=True)) == [
        ("bat", 2), ("bat", 4), ("owl", 2), ("owl", 4),
    ]  # fmt: skip
    assert found.threshold == 1 and found.table["found"].all()


def test_relative_alignment_by_hand():
    alignment = torch.tensor([[0.1, torch.nan, 0.4], [-0.3, 0.2, -0.1], [-0.3, torch.nan, -0.1]])
    expected = [[0.25, np.nan, 1], [-1.5, 1, -0.5], [np.nan] * 3]
    np.testing.assert_allclose(reliance.relative(alignment), expected, rtol=1e-6)


def test_a_class_that_no_latent_means_has_no_candidates():
    classes, ones = torch.zeros(3, dtype=torch.long), torch.ones(3, 2)
    for row in ([-0.2, -0.1], [0.0, -0.1], [np.nan, np.nan]):
        at = (torch.tensor([[0, 1]]).repeat(3, 1), ones, classes, torch.tensor([row]), ["owl"])
        assert len(reliance.ranked(*at).candidates) == 0


def test_a_unit_may_be_on_with_a_score_of_nothing(units):
    on = units["values"] != 0
    scores = units["values"].clone()
    scores[:, 0] = 0
    plain, told = _ranked(units, scores), _ranked(units, scores, on=on)
    whole = _ranked(units, units["values"])
    assert len(plain.candidates) < len(whole.candidates)
    pd.testing.assert_frame_equal(told.candidates, whole.candidates)
    expected = {key: np.mean(row) for key, row in _loop(units, scores).items()}
    keys = list(zip(told.candidates["word"], told.candidates["latent"], strict=True))
    assert dict(zip(keys, told.means, strict=True)) == pytest.approx(expected)


def test_a_latent_in_two_slots_is_on_once_and_counts_whole():
    latents = torch.zeros(3, 2, dtype=torch.long)
    values = torch.tensor([[1.0, 2], [3, 0], [0, 0]])
    at = (torch.zeros(3, dtype=torch.long), torch.tensor([[0.1, 1.0]]), ["owl"])
    # on in two images, though in three slots
    assert len(reliance.ranked(latents, values, *at).candidates) == 0
    values[2] = torch.tensor([6.0, 0])
    assert reliance.ranked(latents, values, *at).means.tolist() == [(3 + 3 + 6) / 3]


def _simulated(seed: int, *, texts_for: str, n_signals: int) -> tuple[int, int]:
    """(found, falsely found): 8 classes of 8 images, each with 6 of its class's 15 latents.

    What a latent adds to any text is drawn from one normal distribution for all texts, except for the signals.
    """
    rng = np.random.default_rng(seed)
    classes = np.repeat(np.arange(8), 8)
    latents = np.stack([rng.permutation(15)[:6] + 15 * c for c in classes])
    effects = rng.standard_normal((8, 121))
    signal = np.zeros((8, 121), dtype=bool)
    signal[np.arange(n_signals) % 8, 15 * (np.arange(n_signals) % 8) + np.arange(n_signals) // 8] = True
    amounts = rng.gamma(4, 0.25, latents.shape)
    n_draws, shape = 20, (8, 1) if texts_for == "class" else (64, 1)
    step = rng.integers(1, 8, (n_draws, *shape[:1]))
    other = (classes + (step[:, classes] if texts_for == "class" else step)) % 8
    alignment = np.full((8, 121), 0.1)
    alignment[:, -1] = 1
    found = reliance.discover(
        _tensor(latents), _tensor(amounts * (effects + 6 * signal)[classes[:, None], latents]),
        _tensor(amounts * effects[other[:, :, None], latents]), _tensor(classes), _tensor(alignment),
        [str(c) for c in range(8)], n_resamples=2, seed=0,
    ).table.query("found")  # fmt: skip
    hits = signal[found["word"].astype(int), found["latent"]]
    return len(found), int((~hits).sum())


def test_the_false_discovery_rate_is_what_was_asked_for():
    """Decoys that ask one other text for all images of a class: near 0.1; standard error of 40 runs about 0.015."""
    n_found, n_false = np.array([_simulated(seed, texts_for="class", n_signals=16) for seed in range(40)]).T
    assert n_found.mean() - n_false.mean() > 8  # of 16
    assert (n_false / np.maximum(n_found, 1)).mean() < 0.15


def test_nothing_planted_is_seldom_something_found():
    runs = np.array([_simulated(seed, texts_for="class", n_signals=0) for seed in range(40)])
    assert (runs[:, 0] > 0).mean() < 0.3 and runs[:, 0].mean() < 0.6
    # a text drawn anew for each image averages out: the docstring says that the rate does not hold then
    runs = np.array([_simulated(seed, texts_for="image", n_signals=0) for seed in range(15)])
    assert (runs[:, 0] > 0).mean() > 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": 1.0}, "false-discovery rate of 1.0"),
        ({"decoys": torch.zeros(21, 5)}, r"\(draw, 21, 5\)"),
        ({"decoys": torch.zeros(0, 21, 5)}, "1 draw or more"),
        ({"decoys": torch.full((1, 21, 5), torch.nan)}, "decoys are NaN"),
        ({"values": torch.full((21, 5), torch.nan)}, "scores are NaN"),
        ({"classes": torch.zeros(5, dtype=torch.long)}, "are accepted"),
        ({"classes": torch.full((21,), 3)}, "classes from 3 to 3: 0 to 2"),
        ({"latents": torch.full((21, 5), 12)}, "latents from 12 to 12: 0 to 11"),
        ({"words": ["owl", "bat", "bat"]}, "2 of them distinct"),
    ],
)
def test_what_cannot_be_used_is_refused(units, change, message):
    with pytest.raises(ValueError, match=message):
        reliance.discover(**{**units, "words": WORDS, **SETTINGS, **change})


# scores


@pytest.fixture(scope="module")
def truth(units) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Four true candidates, one of them for two values; a truth that is no candidate; five planted, two can be hit."""
    keys = list(_loop(units, units["values"]))
    some = [keys[i] for i in (1, 4, 8, 9)]
    rows = [(*some[0], "cue", "moon", 0.6), (*some[0], "thing", "leaf", 0.2), (*some[1], "cue", "moon", 0.3)]
    rows += [(*some[2], "cue", "sign", 0.9), (*some[3], "cue", "sign", 0.5), ("owl", 3, "cue", "frame", 0.7)]
    truth = pd.DataFrame(rows, columns=["word", "latent", "family", "value", "share"])
    planted = [("co-occurrence", some[0][0], "cue", "moon"), ("typography", some[2][0], "cue", "sign")]
    planted += [
        ("artefact", "owl", "cue", "frame"),
        ("artefact", "cup", "cue", "lamp"),
        ("compound", "bat", "thing", "x"),
    ]
    return truth, pd.DataFrame(planted, columns=["kind", "word", "family", "cue"])


@pytest.fixture(scope="module")
def rankings(units) -> dict[str, reliance.Ranking]:
    on = units["values"] != 0
    scores = {"act_x_grad": units["values"], "random": _tensor(np.random.default_rng(0).random(on.shape)) * on}
    scores["activation_frequency"] = on.double()
    return {method: _ranked(units, each, on=on) for method, each in scores.items()}


def _by_loop(candidates: list, means: np.ndarray, truth: pd.DataFrame, planted: pd.DataFrame, k: int) -> list[float]:
    """The four measures, from scikit-learn and sets."""
    true = set(zip(truth["word"], truth["latent"], strict=True))
    is_true = [key in true for key in candidates]
    best = sorted(range(len(means)), key=lambda i: (-means[i], *candidates[i]))[:k]
    best = {candidates[i] for i in best}

    def hit(word, family, value) -> bool:
        rows = truth[(truth["word"] == word) & (truth["family"] == family) & (truth["value"] == value)]
        return any((row.word, row.latent) in best for row in rows.itertuples())

    causes = set(zip(truth["word"], truth["family"], truth["value"], strict=True))
    return [
        average_precision_score(is_true, means),
        np.mean([key in true for key in best]),
        np.mean([hit(row.word, row.family, row.cue) for row in planted.itertuples()]),
        np.mean([hit(*cause) for cause in causes]),
    ]


@pytest.mark.parametrize("k", [1, 3, 6, 50])
def test_measures_are_those_of_scikit_learn_and_sets(units, rankings, truth, k):
    table = reliance.score_table(rankings, *truth, n_found=k, n_resamples=3, seed=0)
    assert list(table) == ["method", "measure", "value", "low", "high", "n"] and set(table["n"]) == {21}
    candidates = list(_loop(units, units["values"]))
    for method, ranking in rankings.items():
        keys = list(zip(ranking.candidates["word"], ranking.candidates["latent"], strict=True))
        assert sorted(keys) == keys and set(keys) == set(candidates)
        mine = table[table["method"] == method].set_index("measure")["value"]
        assert mine[list(reliance.MEASURES)].tolist() == pytest.approx(_by_loop(keys, ranking.means, *truth, k))
    chance = table[table["method"] == "chance"]
    assert chance["measure"].tolist() == ["average precision", "precision"]
    assert chance["value"].tolist() == [4 / len(candidates)] * 2 and chance["low"].isna().all()


def test_intervals_are_percentiles_over_images_drawn_within_classes(rankings, truth):
    table = reliance.score_table(rankings, *truth, n_found=4, n_resamples=25, seed=1)
    for method in ("act_x_grad", "activation_frequency"):
        ranking, draws = rankings[method], []
        scores, n = ranking.scores.toarray(), ranking.candidates["n"].to_numpy()
        keys = list(zip(ranking.candidates["word"], ranking.candidates["latent"], strict=True))
        for counts in next(reliance._within_classes(ranking.classes, 25, 25, seed=1)).astype(int):
            # the drawn images as a table of their own
            means = np.repeat(scores, counts, axis=0).sum(axis=0) / n
            draws.append(_by_loop(keys, means, *truth, 4))
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        mine = table[table["method"] == method]
        assert mine["low"].tolist() == pytest.approx(low) and mine["high"].tolist() == pytest.approx(high)
        assert (mine["high"] - mine["low"]).max() > 0.2


@pytest.mark.parametrize("entries", [1, 400])
def test_resamples_keep_the_sizes_of_the_classes_and_not_of_the_chunks(rankings, truth, entries, monkeypatch):
    classes = rankings["random"].classes
    whole = np.concatenate(list(reliance._within_classes(classes, 50, 50, seed=3)))
    parts = np.concatenate(list(reliance._within_classes(classes, 50, 7, seed=3)))
    np.testing.assert_array_equal(parts, whole)
    for c, n in enumerate([7, 5, 9]):
        assert (whole[:, classes == c].sum(axis=1) == n).all() and whole[:, classes == c].std(axis=0).min() > 0
    settings = {"n_found": 4, "n_resamples": 60, "seed": 1}
    table = reliance.score_table(rankings, *truth, **settings)
    monkeypatch.setattr(reliance, "CHUNK_ENTRIES", entries)
    pd.testing.assert_frame_equal(reliance.score_table(rankings, *truth, **settings), table)


def test_hand_worked_scores():
    # one class of two images; means of latents 0 to 3: 4, 3, 3, 1; true: 1 and 3
    candidates = pd.DataFrame({"word": "owl", "latent": range(4), "n": 2, "n_on": 2, "alignment": 0.1, "relative": 0.1})
    scores = reliance.csr_array(np.array([[8.0, 6, 0, 1], [0, 0, 6, 1]]))
    ranking = reliance.Ranking(candidates, scores, np.zeros(2, dtype=int))
    truth = pd.DataFrame(
        {"word": "owl", "family": "cue", "value": ["moon", "leaf"], "latent": [1, 3], "share": [0.6, 0.4]}
    )
    planted = pd.DataFrame({"kind": "artefact", "word": "owl", "family": "cue", "cue": ["leaf", "moon", "tie", "bow"]})
    table = reliance.score_table({"mine": ranking}, truth, planted, n_found=2, n_resamples=50, seed=0)
    # 1 of the 3 that score 3 or more is true, 2 of the 4 that score 1 or more: (1/3 + 2/4) / 2; the two best are 0 and
    # 1, which comes before its equal 2; of four planted the moon is hit, of two causes one; 2 of 4 candidates are true
    assert table["value"].tolist() == pytest.approx([5 / 12, 1 / 2, 1 / 4, 1 / 2, 1 / 2, 1 / 2])
    ordered = ranking.table(2)
    assert ordered["latent"].tolist() == [0, 1, 2, 3] and ordered["attribution"].tolist() == [4, 3, 3, 1]
    places = reliance.ranks(ordered, truth, planted)
    assert list(places) == ["kind", "word", "cue", "rank", "latent", "share", "found"]
    assert places["rank"].tolist() == [4, 2, pd.NA, pd.NA] and places["latent"].tolist() == [3, 1, pd.NA, pd.NA]
    assert places["found"].tolist() == [False, True, False, False]
    np.testing.assert_array_equal(places["share"], [0.4, 0.6, np.nan, np.nan])


def test_the_first_of_several_hits_is_the_rank(found, truth):
    rows = truth[0].assign(family="cue", value="moon", share=np.arange(6) / 10)
    planted = pd.DataFrame({"kind": "artefact", "word": WORDS, "family": "cue", "cue": "moon"}, index=[7, 7, 9])
    places = reliance.ranks(found.table, rows, planted).set_index("word")
    keys = list(zip(found.table["word"], found.table["latent"], strict=True))
    for word in WORDS:
        at = [
            i
            for i, key in enumerate(keys)
            if key[0] == word and key in set(zip(rows["word"], rows["latent"], strict=True))
        ]
        assert places.loc[word, "rank"] == at[0] + 1 and places.loc[word, "latent"] == keys[at[0]][1]
        assert places.loc[word, "found"] == found.table["found"][at[0]]


def test_nothing_true_nothing_planted_nothing_found(rankings, truth):
    nothing = [each[:0].astype(object) for each in truth]
    table = reliance.score_table(rankings, *nothing, n_found=3, n_resamples=9, seed=0)
    mine = table[table["method"] == "random"].set_index("measure")
    assert mine["value"].isna().tolist() == [True, False, True, True] and mine.loc["precision", "value"] == 0
    assert table[table["method"] == "chance"]["value"].tolist() == [0, 0]
    assert reliance.ranks(rankings["random"].table(1), *nothing).empty
    assert reliance.ranks(rankings["random"].table(1), nothing[0], truth[1])["rank"].isna().all()
    none = reliance.score_table(rankings, *truth, n_found=0, n_resamples=9, seed=0)
    none = none[none["method"] == "random"].set_index("measure")["value"]
    assert np.isnan(none["precision"]) and none["recall"] == none["recall of causal"] == 0


def test_single_images_leave_the_intervals_unknown():
    candidates = pd.DataFrame({"word": ["a", "b"], "latent": 0, "n": 1, "n_on": 1, "alignment": 0.1, "relative": 0.1})
    ranking = reliance.Ranking(candidates, reliance.csr_array(np.eye(2)), np.arange(2))
    truth = pd.DataFrame({"word": ["a"], "family": "cue", "value": "x", "latent": 0, "share": 0.5})
    planted = pd.DataFrame({"kind": "artefact", "word": ["a"], "family": "cue", "cue": "x"})
    table = reliance.score_table({"mine": ranking}, truth, planted, n_found=1, n_resamples=9, seed=0)
    assert table["value"].notna().all() and table["low"].isna().all()


def test_methods_with_other_candidates_are_refused(units, rankings, truth):
    scores = units["values"].clone()
    scores[:, 0] = 0
    with pytest.raises(ValueError, match="'mine' ranks"):
        reliance.score_table({**rankings, "mine": _ranked(units, scores)}, *truth, n_found=1, n_resamples=9, seed=0)
    with pytest.raises(ValueError, match="0 rankings"):
        reliance.score_table({}, *truth, n_found=1, n_resamples=9, seed=0)
