"""Latents of lesions against scikit-learn, against the forward pass written out, and against loops."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from clipshift_core import dictionaries, lesion_latents, lesion_study
from clipshift_core.attribution import Target
from clipshift_core.encoder import Encoder
from clipshift_core.lesion_study import SIGNS
from clipshift_core.profiles import ROOT
from clipshift_core.splice import Splice

MODELS = ROOT / "data" / "models"
SETTINGS = {"n_resamples": 200, "seed": 0}
NAMES = [*SIGNS, "ink", "large"]


@pytest.fixture(scope="module")
def encoder():
    return Encoder.load(str(MODELS / "scene-s16"), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def splice(encoder):
    return Splice(encoder, dictionaries.read(MODELS / "sae-scene-s16-lesions", encoder, 4, "class").sae, 4, "class")


@pytest.fixture(scope="module")
def images(encoder):
    encode = partial(lesion_study.encoded, encoder=encoder)
    made = lesion_study.world(encode, encoder.image_size, {"biased": 30, "balanced": 90})
    return made._replace(artefacts=(*SIGNS, "ink"))


@pytest.fixture(scope="module")
def readers(encoder, images):
    direction = torch.nn.functional.normalize(images.embeddings[0] - images.embeddings[1], dim=0)
    middle = torch.nn.functional.normalize(images.embeddings, dim=1).mean(0) @ direction
    probe = Target(direction, bias=-float(middle))
    return {"probe": probe, "text": lesion_study.text_reader(encoder)}


@pytest.fixture(scope="module")
def found(images, readers, splice):
    return lesion_latents.latents(images, readers, splice, factors=["large"], **SETTINGS)


@pytest.fixture(scope="module")
def codes(images, splice):
    return splice.sae.encode(images.tokens).dense(splice.sae.n_latents).detach().numpy()


def margin(splice, target, tokens, codes, gone=()):
    """The forward pass written out: the token without some latents' rows, final norm, projection, the reader."""
    visual = splice.encoder.model.visual
    with torch.no_grad():
        less = torch.from_numpy(codes[:, list(gone)]) @ splice.sae.W_dec[list(gone)]
        embedding = visual.ln_post(tokens - less) @ visual.proj
        unit = torch.nn.functional.normalize(embedding, dim=1)
        return (unit @ target.direction + target.bias).numpy()


def halves(images, found):
    balanced = (images.table["split"] == "balanced").to_numpy(copy=True)
    return found.chosen_by, balanced & ~found.chosen_by


def test_areas_are_scikit_learns(images, found, codes):
    first, second = halves(images, found)
    assert first.sum() == second.sum() == 45 and not (first & second).any()
    assert found.latents["latent"].tolist() == np.flatnonzero((codes[first] > 0).any(0)).tolist()

    def area(part, latent, name):
        return roc_auc_score(images.table.loc[part, name], codes[part, latent])

    for row in found.latents.iloc[::15].itertuples():
        areas = {name: area(first, row.latent, name) for name in NAMES}
        best = max(areas, key=areas.get)
        assert row.auroc_first == pytest.approx(areas[best])
        assert row.factor == (best if areas[best] >= lesion_latents.DETECTS else "none")
        assert row.auroc == pytest.approx(area(second, row.latent, best))
        assert row.frequency == pytest.approx((codes[first, row.latent] > 0).mean())
    for row in found.factors.iloc[::2].itertuples():
        assert row.n_latents == (found.latents["factor"] == row.factor).sum()
        assert row.auroc_first == pytest.approx(max(area(first, j, row.factor) for j in found.latents["latent"]))
        assert row.auroc == pytest.approx(area(second, row.latent, row.factor))


def test_refused_without_tokens_or_on_a_split_that_is_not_there(images, readers, splice):
    with pytest.raises(ValueError, match="'test'.*the test splits biased, balanced"):
        lesion_latents.latents(images, readers, splice, split="test", **SETTINGS)
    with pytest.raises(ValueError, match="no class tokens"):
        lesion_latents.latents(images._replace(tokens=None), readers, splice, **SETTINGS)


def test_an_unknown_artefact_is_left_out(codes):
    cue = pd.array([True, False, None] * 40, dtype="boolean")
    found = lesion_latents.aurocs(codes, pd.DataFrame({"a": cue, "never": pd.array([False] * 120, dtype="boolean")}))
    known = ~cue.isna()
    best = np.argmax(codes.std(0))
    assert found[best, 0] == pytest.approx(roc_auc_score(cue[known].astype(bool), codes[known, best]))
    assert np.isnan(found[:, 1]).all()


def test_shares_and_drivers_are_what_deleting_each_takes(images, readers, splice, found, codes):
    _, second = halves(images, found)
    tokens, on = images.tokens[torch.from_numpy(second)], codes[second]
    for name, target in readers.items():
        whole = margin(splice, target, tokens, on)
        parts = np.stack([whole - margin(splice, target, tokens, on, [j]) for j in range(on.shape[1])], axis=1)
        size, table = np.abs(parts).mean(0), found.drivers[found.drivers["reader"] == name]
        assert table["latent"].tolist()[:3] == np.argsort(-size)[:3].tolist()
        top = table["latent"].tolist()
        assert table["size"].to_numpy() == pytest.approx(size[top], rel=1e-3)
        assert table["part"].to_numpy() == pytest.approx(parts.mean(0)[top], rel=1e-3)
        assert table["share"].to_numpy() == pytest.approx(size[top] / size.sum(), rel=1e-3)
        shares = found.shares[found.shares["reader"] == name].set_index("factor")
        for factor in NAMES:
            assert shares.loc[factor, "share"] == pytest.approx(size[found.of([factor])].sum() / size.sum(), abs=1e-4)
        assert shares.loc["artefacts", "share"] == pytest.approx(shares.loc[list(images.artefacts), "share"].sum())
        assert shares.loc[[*NAMES, "none"], "share"].sum() == pytest.approx(1)
        assert (shares["low"] <= shares["share"]).all() and (shares["share"] <= shares["high"]).all()


def test_deleting_is_subtracting_rows(images, readers, splice, found, codes):
    table = lesion_latents.suppressed(images, readers, splice, found, n_draws=4, **SETTINGS)
    gone = found.of(SIGNS)
    assert gone and table["measure"].nunique() == 2 + len(SIGNS) and table["deleted"].nunique() == 5
    values = table.set_index(["reader", "split", "measure", "deleted"])["value"].sort_index()
    _, second = halves(images, found)
    label = images.table["malignant"].to_numpy()
    for name, target in readers.items():
        for split, here in (("balanced", second), ("biased", (images.table["split"] == "biased").to_numpy(copy=True))):
            for deleted, latents in (("none", []), ("artefacts", gone)):
                call = margin(splice, target, images.tokens[torch.from_numpy(here)], codes[here], latents) > 0
                assert values[name, split, "accuracy", deleted] == pytest.approx((call == label[here]).mean())
                gaps = []
                for artefact, sign in SIGNS.items():
                    cue = images.table.loc[here, artefact].to_numpy()
                    gaps.append(sign * (call[cue].mean() - call[~cue].mean()))
                    assert values[name, split, f"gap of {artefact}", deleted] == pytest.approx(sign * gaps[-1])
                assert values[name, split, "mean gap", deleted] == pytest.approx(np.mean(gaps))
            for measure in table["measure"].unique():
                one = values[name, split, measure]
                assert one["artefacts - none"] == pytest.approx(one["artefacts"] - one["none"])
                assert one["artefacts - random"] == pytest.approx(one["artefacts"] - one["random"])


def test_what_a_cue_turns_up(splice):
    """Two lesions' drawings made up of decoder rows: the cue adds latent 7 and takes latent 3."""
    width = splice.sae.W_dec.shape[1]
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.normal(scale=5, size=(8, width))).float()
    pairs = pd.DataFrame({"lesion": [0, 0, 1, 1], "artefact": "ruler", "without": [0, 2, 4, 6], "with": [1, 3, 5, 7]})
    tokens[1::2] += 200 * splice.sae.W_dec[7].detach()
    found = lesion_latents.turned(splice, tokens, pairs, **SETTINGS)
    dense = splice.sae.encode(tokens).dense(splice.sae.n_latents).detach().numpy()
    change = dense[1::2] - dense[::2]
    assert found["latent"].iloc[0] == 7 and found["rank"].tolist() == list(range(1, 11))
    assert found["change"].to_numpy() == pytest.approx(np.sort(change.mean(0))[::-1][:10], abs=1e-4)
    assert found["up"].iloc[0] == (change[:, 7] > 0).mean() == 1
    # two lesions: the interval's ends are the two lesions' own means
    ends = sorted(change[:, 7].reshape(2, 2).mean(1))
    assert tuple(found.loc[0, ["low", "high"]]) == pytest.approx(tuple(ends), abs=1e-3)
