"""The lesion study's tables against pandas, scikit-learn and arithmetic; its drawings are what they are said to be."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

from clipshift_core import lesion_study, lesions, scenes
from clipshift_core.activations import Source
from clipshift_core.attribution import Target
from clipshift_core.encoder import Encoder
from clipshift_core.lesion_study import FIRST, FIRST_PAIR, SIGNS, Images
from clipshift_core.profiles import ROOT

SETTINGS = {"n_resamples": 400, "seed": 0}


@pytest.fixture(scope="module")
def encoder():
    return Encoder.load(str(ROOT / "data" / "models" / "scene-s16"), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def images():
    """Numbers, not pictures: 4 dimensions, of which the first goes with the label and the second with the cue."""
    rng = np.random.default_rng(1)
    n = 600
    malignant, split = rng.random(n) < 0.5, rng.choice(["train", "valid", "biased", "balanced"], n)
    table = pd.DataFrame({"split": split, "malignant": malignant})
    table["cue"] = rng.random(n) < np.where(split == "balanced", 0.5, np.where(malignant, 0.8, 0.2))
    table["other"] = rng.random(n) < 0.4
    table["seldom known"] = pd.array(np.where(rng.random(n) < 0.6, rng.random(n) < 0.5, None), dtype="boolean")
    x = rng.normal(size=(n, 4)) + np.column_stack([malignant, table["cue"], table["other"], table["cue"]])
    embeddings = torch.from_numpy(x).float()
    return Images(table, embeddings, None, ("cue", "other", "seldom known"), {"cue": 1, "other": -1})


@pytest.fixture(scope="module")
def readers(images):
    text = Target(torch.tensor([1.0, 0.3, 0.0, 0.0]), bias=-0.4)
    return {"probe": lesion_study.probe_reader(images), "text": text}


@pytest.fixture(scope="module")
def made(images, readers):
    return lesion_study.study(images, readers, **SETTINGS)


def test_amplification_by_hand():
    """Eight images, the cue on the first four. Labels 1 1 1 0 | 1 0 0 0: a gap of 3/4 - 1/4 = 0.5. Called are
    1 1 1 1 | 1 0 0 0: 4/4 - 1/4 = 0.75. The reader adds 0.25 to what the labels have."""
    label, call = (np.array([int(x) for x in text], float) for text in ("11101000", "11111000"))
    cue = np.array([1.0] * 4 + [0.0] * 4)
    every = np.ones((1, 8))
    assert lesion_study.gap(label, cue)(every) == pytest.approx(0.5)
    assert lesion_study.gap(call, cue)(every) == pytest.approx(0.75)
    assert lesion_study.gap(call - label, cue)(every) == pytest.approx(0.25)
    # the second artefact is on the first two and the last two: calls 3/4 ... 2/4 of (1,1,0,0), 3/4 of (1,1,1,0)
    second = np.array([1, 1, 0, 0, 0, 0, 1, 1], float)
    assert lesion_study.gap(call, second)(every) == pytest.approx(0.5 - 0.75)
    both = lesion_study.mean_gap(call, {"a": cue, "b": second}, {"a": 1, "b": -1})
    assert both(every) == pytest.approx((0.75 + 0.25) / 2)
    # drawn twice: the fourth (1, with the cue) and the fifth (1, without); gone the first and the last
    counts = np.array([[0, 1, 1, 2, 2, 1, 1, 0]], float)
    assert lesion_study.gap(call, cue)(counts) == pytest.approx(4 / 4 - 2 / 4)


def test_a_side_without_images_is_unknown():
    cue = np.array([1.0, 1.0, np.nan])
    assert np.isnan(lesion_study.gap(np.array([1.0, 0.0, 1.0]), cue)(np.ones((1, 3)))).all()


def test_the_probe_is_scikit_learns(images):
    x = torch.nn.functional.normalize(images.embeddings, dim=1).numpy()
    train, valid = (images.table["split"].to_numpy() == name for name in ("train", "valid"))
    y = images.table["malignant"].to_numpy()
    margin = lesion_study.probe_reader(images)(images.embeddings).numpy()
    fits = [LogisticRegression(C=10.0**c, max_iter=5000).fit(x[train], y[train]) for c in range(-4, 5)]
    scores = [accuracy_score(y[valid], fit.predict(x[valid])) for fit in fits]
    assert margin == pytest.approx(fits[int(np.argmax(scores))].decision_function(x), abs=1e-4)


def test_tables_are_what_pandas_makes_of_the_calls(images, readers, made):
    called = made.called
    assert made.accuracy[["split", "reader"]].to_numpy().tolist() == [
        [split, reader] for split in lesion_study.tests(images.table) for reader in readers
    ]
    for row in made.accuracy.itertuples():
        part = called[called["split"] == row.split]
        assert row.accuracy == pytest.approx(accuracy_score(part["malignant"], part[row.reader]))
        assert row.low <= row.accuracy <= row.high and row.n == len(part)
    for name, target in readers.items():
        assert called[f"{name}_margin"].to_numpy() == pytest.approx(target(images.embeddings).numpy(), abs=1e-6)
        assert (called[name] == (called[f"{name}_margin"] > 0)).all()
    assert len(made.gaps) == 2 * 3 * 2
    for row in made.gaps.itertuples():
        part = called[(called["split"] == row.split) & called[row.artefact].notna()]
        means = part.groupby(part[row.artefact].astype(bool))[[row.reader, "malignant"]].mean()
        found, labels = means.loc[True] - means.loc[False]
        assert (row.value, row.labels) == pytest.approx((found, labels))
        assert row.amplification == pytest.approx(found - labels)
        assert row.planted == (row.artefact in images.planted)
        assert (row.n_with, row.n_without) == (part[row.artefact].sum(), (~part[row.artefact].astype(bool)).sum())
        # two shares' own standard errors: the interval is about 2 x 1.96 of them wide
        share = means[row.reader]
        error = np.sqrt(sum(p * (1 - p) / n for p, n in zip(share, (row.n_without, row.n_with), strict=True)))
        assert row.high - row.low == pytest.approx(2 * 1.96 * error, rel=0.25)


def test_mean_gaps_carry_the_signs(made):
    for row in made.means[made.means["reader"] != "probe - text"].itertuples():
        some = made.gaps[(made.gaps["split"] == row.split) & (made.gaps["reader"] == row.reader)].set_index("artefact")
        for name in ("value", "labels", "amplification"):
            wanted = (some.loc["cue", name] - some.loc["other", name]) / 2
            assert getattr(row, name) == pytest.approx(wanted)
        assert row.low < row.value < row.high and row.amplification_low < row.amplification_high
    values = made.means.pivot(index="split", columns="reader", values="value")
    assert (values["probe"] - values["text"]).to_numpy() == pytest.approx(values["probe - text"].to_numpy())


def test_effects_are_differences_of_pairs():
    table = pd.DataFrame(
        [(0, "ruler", "malignant", 0, 1), (0, "ruler", "benign", 2, 3), (1, "ruler", "malignant", 4, 5),
         (1, "ruler", "benign", 6, 7)],
        columns=["lesion", "artefact", "label", "without", "with"],
    )  # fmt: skip
    # pairs: 1 -> 2 stays malignant; -1 -> 1 becomes it; -2 -> -3 stays benign; 1 -> -1 becomes benign
    margin = np.array([1.0, 2, -1, 1, -2, -3, 1, -1])
    found = lesion_study.effects(table, {"text": margin}, **SETTINGS).set_index(["label", "measure"])
    assert found.loc[("both", "logit"), "value"] == pytest.approx(((1 + 2) / 2 + (-1 - 2) / 2) / 2)
    assert found.loc[("malignant", "logit"), "value"] == pytest.approx((1 - 1) / 2)
    assert found.loc[("benign", "logit"), "value"] == pytest.approx((2 - 2) / 2)
    assert found.loc[("both", "flips"), "value"] == pytest.approx(2 / 4)
    assert found.loc[("both", "to_malignant"), "value"] == pytest.approx(1 / 4)
    probability = torch.sigmoid(torch.from_numpy(margin)).numpy()
    assert found.loc[("both", "probability"), "value"] == pytest.approx(np.diff(probability)[::2].mean())
    assert set(found["n"]) == {2}
    # two lesions: all resamples' means lie between theirs, 1.5 and -1.5
    assert tuple(found.loc[("both", "logit"), ["low", "high"]]) == pytest.approx((-1.5, 1.5))


def test_drawn_as_said():
    sizes = {"train": 300, "valid": 10, "biased": 300, "balanced": 300, "reversed": 300}
    table, made = lesion_study.drawn(sizes)
    assert table["split"].value_counts().to_dict() == sizes and len(made) == len(table)
    assert [lesion.malignant for lesion in made] == table["malignant"].tolist()
    assert (table["large"] == [lesion.diameter_mm > 8 for lesion in made]).all()
    assert (table["many_colours"] == [lesion.colours > 3 for lesion in made]).all()
    shares = table.groupby(["split", "malignant"])[list(SIGNS)].mean().unstack()
    for shortcut in lesions.PLANTED_SHORTCUTS:
        strength = SIGNS[shortcut.artefact] * (shortcut.rate_train_given_label - shortcut.rate_otherwise)
        for split, wanted in (("train", strength), ("biased", strength), ("balanced", 0), ("reversed", -strength)):
            found = shares.loc[split, (shortcut.artefact, True)] - shares.loc[split, (shortcut.artefact, False)]
            assert found == pytest.approx(wanted, abs=0.18)  # three standard errors or more


def test_nothing_was_seen_before():
    n = sum(lesion_study.SIZES.values())
    assert scenes.HELD_OUT + 500_000 < FIRST and FIRST + n < FIRST_PAIR
    assert n + 8 * lesion_study.N_PAIRS < 2200  # at most: what the study costs is drawing


def test_pairs_differ_by_the_cue_alone():
    found = lesion_study.pairs(5)
    # as malignant and as benign, the lesion itself (its cues as they are) and each of three cues turned over
    assert len(found.table) == 5 * 3 * 2 and len(set(found.drawings)) == len(found.drawings) == 5 * 2 * (1 + 3)
    for row in found.table.itertuples():
        # `with` is a word of Python's: itertuples names it by its place
        without, cue = found.drawings[row.without], found.drawings[row[5]]
        assert without.label == cue.label == row.label
        assert (getattr(without, row.artefact), getattr(cue, row.artefact)) == (False, True)
        turned = "skin_tone" if row.artefact == "light_skin" else row.artefact
        assert {name for name, value in asdict(cue).items() if asdict(without)[name] != value} == {turned}


def test_the_text_reader_asks_the_prompts(encoder):
    """The mean of each class's normalised prompts, by hand; and one pass gives embeddings and class tokens."""
    _, made = lesion_study.drawn({"balanced": 3})
    source = Source.of_drawings(made, encoder.image_size)
    embeddings, tokens = lesion_study.encoded(source, encoder, batch_size=2)
    pixels = np.stack([source.read(i) for i in range(3)])
    plain = encoder.encode(pixels, capture=["token.4"])
    assert torch.allclose(embeddings, plain.embedding, atol=1e-5)
    assert torch.allclose(tokens, plain.captured["token.4"], atol=1e-4)
    mean = {}
    for name in ("benign", "malignant"):
        prompts = [f"a {name} lesion", f"a photo of a {name} skin lesion",
                   f"a dermatoscopic photograph of a {name} lesion"]  # fmt: skip
        mean[name] = torch.nn.functional.normalize(encoder.encode_text(prompts), dim=1).mean(0)
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    cosine = {name: unit @ each / each.norm() for name, each in mean.items()}
    wanted = encoder.logit_scale * (cosine["malignant"] - cosine["benign"])
    assert torch.allclose(lesion_study.text_reader(encoder)(embeddings), wanted, atol=1e-3)
