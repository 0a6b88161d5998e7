"""Each claim against arithmetic by hand and a plain loop over resamples; the ledger on disk."""

import warnings
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.cluster import hierarchy
from scipy.spatial.distance import cosine as cosine_distance
from scipy.stats import spearmanr

from clipshift_core import augment, claims, stats
from clipshift_core.profiles import ROOT, Profile
from clipshift_core.stats import Interval

NINE = augment.VIEWS[1:]
SETTINGS = {"n_resamples": 200, "seed": 3}
COLOUR = ["color_jitter", "random_brightness_contrast"]
GEOMETRY = ["shift_scale_rotate", "perspective", "horizontal_flip", "elastic"]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def from_embeddings(embedding: np.ndarray, order=augment.VIEWS) -> xr.Dataset:
    """A pass with these embeddings (image, view, feature), the views in the given order, and scipy's distances."""
    at = [order.index(name) for name in NINE]
    pairs = [[(image[order.index("original")], image[k]) for k in at] for image in embedding.astype(float)]
    tables = {
        "l2": [[np.linalg.norm(v - o) for o, v in image] for image in pairs],
        "cosine": [[1 - cosine_distance(o, v) for o, v in image] for image in pairs],
    }
    variables = {name: (("image", "augmentation"), np.float32(values)) for name, values in tables.items()}
    variables["embedding"] = (("image", "view", "feature"), embedding)
    coords = {"view": list(order), "augmentation": list(NINE), "image": [f"i{k}" for k in range(len(embedding))]}
    return xr.Dataset(variables, coords)


def drawn(rng: np.random.Generator, n: int = 20, **strength: float) -> xr.Dataset:
    """Random originals, each view moved by its own strength."""
    original = rng.normal(size=(n, 1, 16))
    moves = np.array([strength.get(name, 0.3) for name in NINE])[:, None] * rng.normal(size=(n, 9, 16))
    return from_embeddings(np.float32(np.concatenate([original, original + moves], axis=1)))


def rows_of(dataset: xr.Dataset, **settings) -> dict[str, claims.Claim]:
    rows = claims.embedding_shifts(dataset, notebook="02", **(SETTINGS | settings))
    return {row.claim: row for row in rows}


# the statistics, one resample at a time


def slow_statistics(dataset: xr.Dataset, index: np.ndarray) -> dict[str, float]:
    """Every statistic of one resample, given as the indices of its images, from its definition."""
    part = dataset.isel(image=index)
    l2 = {name: float(part["l2"].sel(augmentation=name).astype(float).mean()) for name in NINE}
    moved = {name: float(1 - part["cosine"].sel(augmentation=name).astype(float).mean()) for name in NINE}
    views = {name: part["embedding"].sel(view=name).values.astype(float) for name in augment.VIEWS}
    three = ["noise", "perspective", "shift_scale_rotate"]
    originals = [
        cosine_distance(views["original"][a], views["original"][b])
        for a, b in combinations(range(len(index)), 2)
        if index[a] != index[b]
    ]
    unit = np.mean(originals) if originals else np.nan
    apart = {
        frozenset(pair): np.mean([cosine_distance(x, y) for x, y in zip(views[pair[0]], views[pair[1]], strict=True)])
        for pair in combinations(NINE, 2)
    }
    linkage = hierarchy.linkage([apart[frozenset(pair)] for pair in combinations(NINE, 2)], "ward")
    cluster = hierarchy.fcluster(linkage, 0.7 * linkage[-1, 2], "distance")
    across = [apart[frozenset((a, b))] for a in COLOUR for b in GEOMETRY]
    within = [apart[frozenset(p)] for p in (*combinations(COLOUR, 2), *combinations(GEOMETRY, 2))]
    assert (len(across), len(within)) == (8, 7)
    return {
        "A1a": min(l2[name] for name in three) - max(l2[name] for name in NINE if name not in three),
        "A1b": l2["noise"] - max(l2[name] for name in NINE if name != "noise"),
        "A2a": max(moved["random_brightness_contrast"], moved["horizontal_flip"]) / unit,
        "A2b": max(moved["elastic"], moved["perspective"]) / unit,
        "A4a": float(list(cluster).count(cluster[NINE.index("noise")]) == 1),
        "A4b": np.mean(across) - np.mean(within),
    }


def test_every_statistic_is_that_of_a_plain_loop(rng):
    dataset = drawn(rng, n=12, noise=0.55, perspective=0.5, shift_scale_rotate=0.4, elastic=0.1)
    settings = {"n_resamples": 40, "seed": 1}
    rows = rows_of(dataset, **settings)
    (index,) = stats._resamples(12, **settings)
    whole = slow_statistics(dataset, np.arange(12))
    slow = pd.DataFrame([slow_statistics(dataset, i) for i in index])
    assert list(rows) == ["A1a", "A1b", "A2a", "A2b", "A4a", "A4b"]
    assert 0 < slow["A4a"].mean() < 1  # or the share would test nothing
    for claim, row in rows.items():
        assert (row.n, row.notebook) == (12, "02")
        if claim == "A4a":
            assert row.value == pytest.approx(slow["A4a"].mean()) and np.isnan([row.ci_low, row.ci_high]).all()
            continue
        assert row.value == pytest.approx(whole[claim], abs=1e-6)
        limits = slow[claim].quantile([0.025, 0.975]).tolist()
        assert [row.ci_low, row.ci_high] == pytest.approx(limits, abs=1e-6)


def test_the_unit_of_a2_by_hand():
    """Originals at 0, 60 and 180 degrees: 1 - cos is 0.5, 2 and 1.5 for the three pairs.

    Each once: (0.5 + 2 + 1.5) / 3 = 4/3. Drawn 2, 1 and 0 times: the pairs of different images are all 0 with 60
    degrees, 0.5, whatever the copies. Drawn 2, 1 and 1 times: (2 * 0.5 + 2 * 2 + 1 * 1.5) / 5 = 1.3.
    """
    angle = np.radians([0, 60, 180])
    originals = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    moved = pd.DataFrame({"horizontal_flip": [0.1] * 4, "random_brightness_contrast": [0.2, 0.0, 0.0, 0.0]})
    ratio = claims._relative(moved[:3], originals)
    counts = np.array([[1.0, 1, 1], [2, 1, 0], [0, 0, 3], [0, 1, 2]])
    # largest mean move: 0.1 or 0.2 c_1 / 3
    expected = [0.1 / (4 / 3), 0.4 / 3 / 0.5, np.nan, 0.1 / 1.5]
    np.testing.assert_allclose(ratio(counts), expected, rtol=1e-12)
    with_copy = claims._relative(moved, np.vstack([originals, originals[:1]]))
    # a fourth image that looks like the first is another image: its pair counts, at distance 0
    np.testing.assert_allclose(with_copy(np.ones((1, 4))), [0.1 / ((2 * 0.5 + 2 * 2 + 1.5 + 0) / 6)], rtol=1e-12)
    same = claims._relative(moved[:3], np.tile(originals[1:2], (3, 1)))
    assert np.isnan(same(np.ones((1, 3)))).all()


def test_the_contrast_of_the_groups_by_hand():
    """Distances of 1 across the groups, 0.25 between the two colours and 0.5 in each of the geometry's six pairs.

    1 - (0.25 + 6 * 0.5) / 7; what lies between one of them and noise, blur or dropout does not count.
    """
    distance = []
    for a, b in combinations(NINE, 2):
        colours, known = (a in COLOUR) + (b in COLOUR), {a, b} <= {*COLOUR, *GEOMETRY}
        distance.append([0.5, 1.0, 0.25][colours] if known else 77.0)
    assert np.array(distance) @ claims._contrast(NINE) == pytest.approx(1 - 3.25 / 7)


# the verdicts


def test_a_world_like_the_papers_is_reproduced_and_its_opposite_is_not(rng):
    """Embeddings built so that every claim holds: noise far and alone, the colours one way, the geometry another."""
    n, dim = 30, 32
    original = rng.normal(size=(n, dim))
    way = {name: rng.normal(size=(n, dim)) for name in ("noise", "colour", "geometry")}
    size = dict.fromkeys(NINE, 0.12) | {"noise": 2.0, "perspective": 0.35, "shift_scale_rotate": 0.4}
    views = [original]
    for name in NINE:
        kind = "colour" if name in COLOUR else "geometry" if name in GEOMETRY else "noise" if name == "noise" else None
        views.append(original + size[name] * (way[kind] if kind else rng.normal(size=(n, dim))))
    like = np.float32(np.stack(views, axis=1))
    assert {row.verdict for row in rows_of(from_embeddings(like)).values()} == {"reproduced"}
    # with noise's embeddings given to brightness-contrast, and the other way about, none of the six holds
    at = [augment.VIEWS.index(name) for name in ("noise", "random_brightness_contrast", "elastic", "color_jitter")]
    swapped = like.copy()
    swapped[:, [at[0], at[1]]], swapped[:, [at[2], at[3]]] = like[:, [at[1], at[0]]], like[:, [at[0], at[2]]]
    assert {row.verdict for row in rows_of(from_embeddings(swapped)).values()} == {"not reproduced"}


def test_noise_alone_in_the_sample_but_not_in_its_resamples_is_not_reproduced(rng):
    def share(n):
        return rows_of(drawn(np.random.default_rng(n), n=6, noise=0.45), n_resamples=60)["A4a"]

    rows = [share(n) for n in range(12)]
    assert {row.verdict for row in rows if row.value < 0.95} == {"not reproduced"}
    assert any(0.5 < row.value < 0.95 for row in rows)
    certain = rows_of(drawn(rng, noise=3.0))["A4a"]
    assert (certain.value, certain.verdict) == (1.0, "reproduced")


def test_an_interval_that_touches_the_bound_does_not_reproduce():
    above = claims.Criterion("X1", "More", "Difference", bound=0.5)
    below = claims.Criterion("X2", "Less", "Ratio", bound=0.5, side="below")
    for interval, verdicts in [
        (Interval(0.7, 0.6, 0.8), ("reproduced", "not reproduced")),
        (Interval(0.7, 0.5, 0.8), ("not reproduced", "not reproduced")),
        (Interval(0.4, 0.3, 0.5), ("not reproduced", "not reproduced")),
        (Interval(0.4, 0.3, 0.49), ("not reproduced", "reproduced")),
        (Interval(0.7, np.nan, np.nan), ("not testable here",) * 2),
        (Interval(np.nan, 0.6, 0.8), ("not testable here",) * 2),
    ]:
        assert tuple(test.decide(interval, 9, "02").verdict for test in (above, below)) == verdicts
    row = below.decide(Interval(0.4, 0.3, 0.49), 9, "02")
    assert row.statistic == "Ratio; reproduced if the 95 % interval lies below 0.5"
    with pytest.raises(ValueError, match="X9.*'maybe'.*not testable here"):
        claims.Claim("X9", "", "", 0, 0, 0, 1, "maybe", "02")


def test_one_image_decides_nothing(rng):
    rows = rows_of(drawn(rng, n=1))
    assert {row.verdict for row in rows.values()} == {"not testable here"}
    assert np.isnan([[row.ci_low, row.ci_high] for row in rows.values()]).all()
    assert np.isfinite([rows[claim].value for claim in ("A1a", "A1b", "A4b")]).all()
    # one image has no other original, and nothing to draw again
    assert np.isnan([rows[claim].value for claim in ("A2a", "A2b", "A4a")]).all()
    metrics = drawn(rng, n=1)
    metrics = metrics.assign(edge=metrics["cosine"], detail=metrics["cosine"])
    assert {row.verdict for row in claims.preservation(metrics, notebook="04", **SETTINGS)} == {"not testable here"}


def test_originals_that_are_all_the_same_are_no_unit(rng):
    embedding = np.float32(rng.normal(size=(5, 10, 8)))
    embedding[:, 0] = embedding[0, 0]
    rows = rows_of(from_embeddings(embedding))
    assert rows["A2a"].verdict == rows["A2b"].verdict == "not testable here" != rows["A1a"].verdict


def test_the_order_of_the_views_and_the_size_of_a_slab_change_nothing(rng, monkeypatch):
    embedding = np.float32(rng.normal(size=(11, 10, 8)))
    rows = claims.table(rows_of(from_embeddings(embedding)).values())
    monkeypatch.setattr(claims, "SLAB", 4)
    pd.testing.assert_frame_equal(claims.table(rows_of(from_embeddings(embedding)).values()), rows, rtol=1e-12)
    order = list(rng.permutation(10))
    dataset = from_embeddings(embedding[:, order], [augment.VIEWS[k] for k in order])
    dataset = dataset.transpose("augmentation", "feature", "view", "image")
    pd.testing.assert_frame_equal(claims.table(rows_of(dataset).values()), rows, rtol=1e-12)


def test_preservation_is_spearmans_rho_over_all_pairs(rng):
    dataset = drawn(rng, n=15)
    noise = xr.DataArray(rng.normal(size=(15, 9)), dims=("image", "augmentation"))
    dataset = dataset.assign(edge=dataset["cosine"] ** 3, detail=dataset["cosine"] + 0.02 * noise)
    edge, detail = claims.preservation(dataset, notebook="04", **SETTINGS)
    assert (edge.claim, edge.value, edge.ci_low, edge.verdict) == ("A3a", 1, 1, "reproduced")
    pairs = {name: dataset[name].values.ravel() for name in ("detail", "cosine")}
    assert detail.value == pytest.approx(spearmanr(pairs["detail"], pairs["cosine"]).statistic, abs=1e-12)
    assert (detail.claim, detail.n, detail.notebook) == ("A3b", 15, "04")
    assert detail.ci_low < detail.value < detail.ci_high
    assert (detail.verdict == "reproduced") == (detail.ci_low > 0.7)
    weak = dataset.assign(edge=dataset["cosine"] + noise)
    assert claims.preservation(weak, notebook="04", **SETTINGS)[0].verdict == "not reproduced"


def test_what_is_not_finite_is_refused_by_name(rng):
    dataset = drawn(rng, n=3)
    dataset["l2"][1, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 27 values of 'l2'"):
        rows_of(dataset)
    dataset = drawn(rng, n=3)
    dataset["embedding"][2, 0, 0] = np.inf
    with pytest.raises(ValueError, match="images 0 to 2"):
        rows_of(dataset)


# the ledger


def claim(number: str, value: float = 0.25, notebook: str = "02") -> claims.Claim:
    return claims.Claim(number, "It, and more", "Mean; rule", value, np.nan, 1 / 3, 12, "not reproduced", notebook)


def test_the_ledger_replaces_the_rows_of_a_notebook_and_keeps_the_others(tmp_path):
    path = tmp_path / "runs" / "demo" / "claims.csv"
    assert tuple(claims.read(path).columns) == claims.COLUMNS and claims.read(path).empty
    first = claims.record(path, [claim("A4b"), claim("A1a")])
    assert list(first["claim"]) == ["A4b", "A1a"] and list(first["value"]) == [0.25, 0.25]
    claims.record(path, [claim("A3a", 0.5, "04")])
    claims.record(path, [claim("A4b", 0.125), claim("A2a")])
    ledger = claims.read(path)
    assert list(ledger["claim"]) == ["A2a", "A3a", "A4b"]  # 02 has nothing to say of A1a any more
    assert list(ledger["value"]) == [0.25, 0.5, 0.125]
    assert list(ledger["notebook"]) == ["02", "04", "02"]
    assert ledger["ci_low"].isna().all() and ledger["n"].tolist() == [12] * 3
    assert ledger["ci_high"].tolist() == pytest.approx([1 / 3] * 3, rel=1e-8)
    assert [file.name for file in path.parent.iterdir()] == ["claims.csv"]


def test_recording_twice_leaves_the_same_bytes(tmp_path):
    path, again = tmp_path / "claims.csv", tmp_path / "again.csv"
    claims.record(path, [claim("A1a"), claim("A2a", 1 / 7, "04")])
    before = path.read_bytes()
    assert before.startswith(b"claim,statement,statistic,value,ci_low,ci_high,n,verdict,notebook\nA1a,")
    claims.record(path, [claim("A1a"), claim("A2a", 1 / 7, "04")])
    claims.record(again, [claim("A2a", 1 / 7, "04")])
    claims.record(again, [claim("A1a")])
    assert path.read_bytes() == before == again.read_bytes()


def test_a_kill_while_writing_leaves_the_old_ledger(tmp_path, monkeypatch):
    path = tmp_path / "claims.csv"
    claims.record(path, [claim("A1a")])
    before = path.read_bytes()

    def killed(file, data):
        file.write_text("claim,stat")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", killed)
        claims.record(path, [claim("A2a")])
    assert path.read_bytes() == before
    claims.record(path, [claim("A2a", notebook="04")])
    assert list(claims.read(path)["claim"]) == ["A1a", "A2a"]


def test_what_cannot_be_tested_is_a_row_with_its_reason(tmp_path):
    (row,) = claims.left_out([claims.Criterion("B9a", "It", "Mean", 0.0)], "3 images are too few", notebook="11")
    ledger = claims.record(tmp_path / "claims.csv", [row])
    assert ledger.loc[0, ["claim", "statement", "notebook"]].tolist() == ["B9a", "It", "11"] and ledger.loc[0, "n"] == 0
    assert ledger.loc[0, "statistic"] == "Left out: 3 images are too few"
    assert ledger.loc[0, "verdict"] == "not testable here" and np.isnan(ledger.loc[0, "value"])


def test_what_is_no_ledger_is_not_overwritten(tmp_path):
    path = tmp_path / "claims.csv"
    path.write_text("image,label\n1,2\n")
    with pytest.raises(ValueError, match=r"claims\.csv.*image, label.*claim, statement"):
        claims.record(path, [claim("A1a")])
    assert path.read_text() == "image,label\n1,2\n"
    with pytest.raises(ValueError, match="A1a is given twice"):
        claims.record(tmp_path / "other.csv", [claim("A1a"), claim("A1a")])


# what stands beside the verdicts


def test_the_caveat_says_how_a_run_departs_from_the_papers_setting():
    assert claims.caveat(Profile.load("paper")) == ""
    assert claims.caveat(Profile.load("paper", {"n_images": 64, "source": str(ROOT / "data" / "cc3m")})) == ""
    demo = claims.caveat(Profile.load("demo"))
    assert demo.startswith(
        "This run's images are drawn scenes, not Conceptual Captions, and its model is scene-s16, not "
    )
    own = claims.caveat(Profile.load("paper", {"source": "my/photos"}))
    assert "images are those of my/photos, not Conceptual Captions: " in own and "model" not in own
    other = claims.caveat(Profile.load("paper", {"model": "ViT-B-16/openai"}))
    assert other.startswith("This run's model is ViT-B-16/openai, not OpenAI's ViT-B/32: ")
