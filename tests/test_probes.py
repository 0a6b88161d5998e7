"""Probes against scikit-learn's own search and probabilities, shares against autograd, tables by hand and in numpy."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.preprocessing import normalize
from test_splice import MODEL, spliced, through_openclip
from torch import tensor

from clipshift_core import attribution, exam, probes, scenes
from clipshift_core.encoder import Encoder
from clipshift_core.probes import Answers, Reader

SETTINGS = {"n_resamples": 200, "seed": 0}
GRID = (0.01, 0.1, 1.0, 10.0, 100.0)


def toy(n, n_classes, seed, dim=8, noise=1.2):
    """Clouds about one random centre a class, of any length, and the names of their classes."""
    centres = np.random.default_rng(7).standard_normal((n_classes, dim))
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    x = (centres[y] + noise * rng.standard_normal((n, dim))) * rng.uniform(0.5, 20, (n, 1))
    return x, np.array(["owl", "bat", "cup", "fish"])[y]


@pytest.mark.parametrize("n_classes", [2, 4])
def test_fit_finds_what_scikit_learns_own_search_finds(n_classes):
    (x, y), (valid_x, valid_y) = toy(120, n_classes, 0), toy(60, n_classes, 1)
    found = probes.fit(x, y, valid_x, valid_y, grid=GRID[::-1])
    which = PredefinedSplit([-1] * len(x) + [0] * len(valid_x))
    both = normalize(np.concatenate([x, valid_x]))
    search = GridSearchCV(LogisticRegression(max_iter=5000), {"C": GRID}, cv=which, refit=False)
    search.fit(both, [*y, *valid_y])
    assert search.best_params_ == {"C": found.C}
    assert list(found.validation["C"]) == list(GRID) and set(found.validation["n"]) == {60}
    assert found.validation["accuracy"].tolist() == pytest.approx(search.cv_results_["mean_test_score"])
    assert found.validation["accuracy"].nunique() > 1  # else nothing was chosen
    model = LogisticRegression(C=found.C, max_iter=5000).fit(normalize(x), y)
    assert found.classes == tuple(model.classes_) and found.weight.shape == (n_classes, 8)
    assert found.predict(valid_x).tolist() == model.predict(normalize(valid_x)).tolist()
    softmax = np.exp(found.logits(valid_x))
    softmax /= softmax.sum(axis=1, keepdims=True)
    assert softmax == pytest.approx(model.predict_proba(normalize(valid_x)), abs=1e-9)


def test_of_equally_accurate_ones_the_strongest_regularisation_is_taken():
    (x, y), (valid_x, valid_y) = toy(40, 2, 0, noise=0.01), toy(20, 2, 1, noise=0.01)
    found = probes.fit(x, y, valid_x, valid_y, grid=(10.0, 0.5, 1.0))
    assert found.validation["accuracy"].tolist() == [1, 1, 1] and found.C == 0.5


def test_what_cannot_be_fitted_is_named():
    x, y = toy(8, 4, 0)
    with pytest.raises(ValueError, match=r"holds the class \['owl'\] alone"):
        probes.fit(x, ["owl"] * 8, x, y)
    with pytest.raises(ValueError, match=r"labels \['moth'\]: accepted are bat, cup, fish, owl"):
        probes.fit(x, y, x[:1], ["moth"])
    with pytest.raises(ValueError, match=r"0 values of C"):
        probes.fit(x, y, x, y, grid=())
    with pytest.raises(ValueError, match="finite numbers"):
        probes.fit(x * np.nan, y, x, y)
    with pytest.raises(ValueError, match="2 classes, 3 directions"):
        probes.text(["a", "b"], np.eye(3))


# Readers ----------------------------------------------------------------------------------------------------------


def reader():
    return Reader(("a", "b", "c"), np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0]]), np.array([0.5, 0.0, -1.0]))


def test_logits_by_hand():
    # (3, 4) has the direction (0.6, 0.8): 0.6 + 0.5; 2 x 0.8; -1.8 + 0.8 - 1
    assert reader().logits([[3.0, 4.0]]) == pytest.approx(np.array([[1.1, 1.6, -2.0]]))
    assert reader().predict([[3.0, 4.0], [1.0, 0.0]]).tolist() == ["b", "a"]
    assert reader().right([[3.0, 4.0], [1.0, 0.0]], ["b", "b"]).tolist() == [True, False]


def test_targets_read_the_logit_of_each_image():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    index, labels = np.array([0, 1, 2, 2, 1, 0]), list("abccba")
    logits = reader().logits(x.numpy())
    own = logits[np.arange(6), index]
    assert reader().target(labels)(x).numpy() == pytest.approx(own, rel=1e-5)
    others = np.array([np.delete(row, i).mean() for row, i in zip(logits, index, strict=True)])
    assert reader().contrast(labels)(x).numpy() == pytest.approx(own - others, rel=1e-4)


def test_contrast_of_two_classes_is_the_regressions_own_logit():
    (x, y), (valid_x, valid_y) = toy(60, 2, 0), toy(30, 2, 1)
    found = probes.fit(x, y, valid_x, valid_y)
    decision = LogisticRegression(C=found.C, max_iter=5000).fit(normalize(x), y).decision_function(normalize(x))
    contrast = found.contrast([found.classes[1]] * 60)(torch.from_numpy(x).float())
    assert contrast.numpy() == pytest.approx(decision, rel=1e-3, abs=1e-5)


def test_text_is_the_zero_shot_classifier():
    encoder = Encoder.load(str(MODEL), device="cpu")
    words = [*scenes.CUE_OF]
    directions = encoder.classifier([scenes.article(word) for word in words], scenes.KIND_TEMPLATES)
    drawn = [scenes.sample(seed) for seed in range(12)]
    embeddings = exam.embed(encoder, np.stack([scenes.render(scene, encoder.image_size) for scene in drawn]))
    wanted = (embeddings @ directions.T).argmax(1).tolist()
    found = probes.text(words, 3 * directions).predict(7 * embeddings)
    assert found.tolist() == [words[i] for i in wanted]


def test_readers_in_another_order_of_classes_read_the_same_class():
    # a probe's classes are sorted, those of text as they come: an image is asked for by its label
    x, (a, b, c) = torch.randn(3, 2), zip(reader().weight, reader().bias, strict=True)
    other = Reader(("c", "b", "a"), *(np.array(part) for part in zip(c, b, a, strict=True)))
    for read in ("target", "contrast"):
        ours, theirs = (getattr(each, read)("abb")(x).numpy() for each in (reader(), other))
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert reader().right(x, list("abc")).tolist() == other.right(x, list("abc")).tolist()


# Accuracy ---------------------------------------------------------------------------------------------------------


def by_hand() -> Answers:
    """Four things; the probe loses the second and third where the cue misleads, text the third, and gains the last."""
    strong = {"aligned": [1, 1, 1, 0], "reversed": [1, 0, 0, 0]}
    text = {"aligned": [1, 1, 1, 0], "reversed": [1, 1, 0, 1]}
    weak = {"aligned": [1, 1, 1, 1], "reversed": [1, 1, 1, 1]}
    as_bool = [{name: np.array(right, dtype=bool) for name, right in each.items()} for each in (weak, strong, text)]
    return Answers({0.5: as_bool[0], 0.9: as_bool[1]}, as_bool[2])


def test_losses_by_hand():
    found = by_hand()
    assert found.loss("probe", 0.9).tolist() == [0, 1, 1, 0]
    assert found.loss("text", 0.9).tolist() == [0, 0, 1, -1]
    assert found.loss_difference(0.9).tolist() == [0, 1, 0, 1]
    table = probes.loss_table(found, **SETTINGS).set_index(["strength", "reader"])
    assert table["loss"].to_dict() == {
        (0.5, "probe"): 0, (0.5, "text"): 0, (0.5, "probe - text"): 0,
        (0.9, "probe"): 0.5, (0.9, "text"): 0, (0.9, "probe - text"): 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match="accepted: probe, text"):
        found.loss("probes", 0.9)


def test_differences_are_paired():
    # A probe that loses what text loses, and one thing in ten more: its difference is known far better than either.
    rng = np.random.default_rng(0)
    right, more = rng.random(400) < 0.5, np.arange(400) % 10 == 0
    always = np.ones(400, dtype=bool)
    found = Answers(
        {0.9: {"aligned": always, "reversed": right & ~more}}, {"aligned": always, "reversed": right | more}
    )
    table = probes.loss_table(found, **SETTINGS).set_index("reader")
    draws = np.random.default_rng(1).integers(400, size=(4000, 400))
    wanted = np.quantile(more[draws].mean(axis=1), [0.025, 0.975])
    assert table.loc["probe - text", "loss"] == pytest.approx(0.1)
    assert table.loc["probe - text", ["low", "high"]].tolist() == pytest.approx(wanted, abs=0.008)
    width = table["high"] - table["low"]
    assert width["probe - text"] < 0.7 * np.hypot(width["probe"], width["text"])  # of the difference, were it unpaired


def test_answers_and_their_table():
    x, truth = np.array([[3.0, 4.0], [1.0, 0.0]]), ["b", "b"]
    found = probes.answers({0.9: reader()}, probes.text("ab", np.eye(2)), {"aligned": x, "reversed": -x}, truth)
    # reversed: (-0.6, -0.8) has logits -0.1, -1.6, 0.0 and (-1, 0) has -0.5, 0, 2; text (-0.6, -0.8) and (-1, 0)
    assert found.probe[0.9]["aligned"].tolist() == [True, False]
    assert found.probe[0.9]["reversed"].tolist() == [False, False]
    assert found.text["aligned"].tolist() == [True, False] and found.text["reversed"].tolist() == [False, True]
    table = probes.accuracy_table(found, **SETTINGS)
    assert table[["reader", "split", "accuracy", "n"]].to_numpy().tolist()[:3] == [
        ["probe", "aligned", 0.5, 2], ["probe", "reversed", 0.0, 2], ["text", "aligned", 0.5, 2],
    ]  # fmt: skip
    assert (
        table["strength"].tolist()[:2] == [0.9, 0.9] and table["strength"].isna().tolist() == [False] * 2 + [True] * 2
    )
    assert ((table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])).all()
    with pytest.raises(ValueError, match="the same things in each"):
        probes.answers({}, reader(), {"aligned": x, "reversed": x[:1]}, truth)


def test_a_probe_leans_on_a_cue_and_text_that_ignores_it_does_not():
    """Axes: class, cue, noise. The cue is cleaner than the class, so that a probe of a biased split takes it."""
    rng = np.random.default_rng(3)
    y = np.arange(400) % 2

    def shown(cue, noise=0.7):
        sign, place = 2 * y - 1, 2 * cue - 1
        return np.stack([sign + noise * rng.standard_normal(400), place, np.ones(400)], axis=1)

    splits = {"aligned": shown(y), "reversed": shown(1 - y)}
    own = rng.random(400) < 0.9
    biased, balanced = shown(np.where(own, y, 1 - y)), shown(rng.integers(2, size=400))
    trained = {0.5: probes.fit(balanced, y, balanced, y), 0.9: probes.fit(biased, y, biased, y)}
    text = probes.text([0, 1], np.array([[-1.0, 0, 0], [1.0, 0, 0]]))
    found = probes.answers(trained, text, splits, y.tolist())
    table = probes.loss_table(found, **SETTINGS).set_index(["strength", "reader"])
    assert table.loc[(0.9, "probe - text"), "low"] > 0.1
    assert abs(table.loc[(0.5, "probe - text"), "loss"]) < 0.1 and abs(table.loc[(0.9, "text"), "loss"]) < 0.08


# Attribution ------------------------------------------------------------------------------------------------------


def attributed(bias=0.0):
    splice, images = spliced("class token", -1, "class", n=5)
    made = torch.Generator().manual_seed(2)
    weight = torch.randn(3, 24, generator=made).double().numpy()
    return splice, images, Reader(("a", "b", "c"), weight, np.array([0.3, -0.2, 0.5]) + bias)


def dense_gradients(splice, images, reader, index):
    """a_j dy/da_j of every latent by autograd, from OpenCLIP's own norm and projection: (image, latent)."""
    visual = splice.encoder.model.visual
    stream = through_openclip(splice.encoder, images, splice.layer)[1][:, 0]
    codes = splice.sae.encode(stream)
    dense = torch.zeros(len(images), splice.sae.n_latents).scatter_(1, codes.indices, codes.values)
    error = (stream - splice.sae.decode(codes)).detach()
    leaf = dense.detach().requires_grad_()
    embedding = visual.ln_post(leaf @ splice.sae.W_dec + splice.sae.b_dec + error) @ visual.proj
    unit = embedding / embedding.norm(dim=1, keepdim=True)
    logits = unit @ tensor(reader.weight).float().T + tensor(reader.bias).float()
    own = logits[torch.arange(len(images)), torch.tensor(index)]
    (own - (logits.sum(1) - own) / (len(reader.classes) - 1)).sum().backward()
    return (leaf.detach() * leaf.grad).abs().double().numpy()


@pytest.mark.parametrize("by_image", [False, True])
def test_shares_against_autograd(by_image):
    splice, images, reader = attributed()
    index, n = np.array([0, 1, 2, 1, 0]), splice.sae.n_latents
    spurious = np.random.default_rng(0).random((5, n) if by_image else n) < 0.4
    size = dense_gradients(splice, images, reader, index)
    wanted = (size * spurious).sum(axis=1) / size.sum(axis=1)
    found = probes.spurious_share(splice, splice.read(images), reader.contrast("abcba"), spurious)
    assert 0.05 < found.min() < found.max() < 0.95
    assert found == pytest.approx(wanted, rel=1e-3)


def test_shares_by_exact_ablation_do_not_depend_on_the_bias():
    # The oracle ablates in a dense loop, without units.
    splice, images, reader = attributed()
    index, n = np.array([0, 1, 2, 1, 0]), splice.sae.n_latents
    spurious = np.arange(n) % 3 == 0
    state = splice.read(images)
    target = attribution.Target(
        torch.from_numpy(reader.weight[index] - (reader.weight.sum(0) - reader.weight[index]) / 2).float()
    )
    whole, size = target(splice.embed(state)), np.zeros((5, n))
    for j in range(n):
        without = target(splice.embed(state, state.codes.values * (state.codes.indices != j)))
        size[:, j] = (whole - without).abs().detach().double()
    wanted = (size * spurious).sum(axis=1) / size.sum(axis=1)
    for bias in (0.0, 50.0):
        shifted = attributed(np.array([bias, 0.0, -bias]))[2]
        found = probes.spurious_share(splice, state, shifted.contrast("abcba"), spurious, method="ablation")
        assert found == pytest.approx(wanted, rel=1e-3)


def test_shares_by_hand(monkeypatch):
    # units of latents 3, 0, 5 with 1, -3, 0 and of 1, 2, 4 with nothing: spurious 0 and 4 have 3 of 4, and unknown
    made = attribution.Attribution(tensor([[3, 0, 5], [1, 2, 4]]), tensor([[1.0, -3, 0], [0, 0, 0]]))
    monkeypatch.setitem(attribution.METHODS, "act_x_grad", lambda *_: made)
    splice, images, reader = attributed()
    spurious = np.isin(np.arange(splice.sae.n_latents), [0, 4])
    state = splice.read(images[:2])
    found = probes.spurious_share(splice, state, reader.contrast("ab"), spurious)
    assert found[0] == 0.75 and np.isnan(found[1])
    for wrong in (spurious.astype(int), spurious[:-1], np.tile(spurious, (3, 1))):
        with pytest.raises(ValueError, match=r"accepted: bool of \(48,\) or \(2, 48\)"):
            probes.spurious_share(splice, state, reader.contrast("ab"), wrong)


def test_share_table_leaves_out_what_one_reader_does_not_know():
    weak, strong = np.array([0.1, 0.2, np.nan, 0.3]), np.array([0.2, 0.4, 0.9, 0.6])
    table = probes.share_table({0.5: weak, 0.9: strong}, np.array([0.1, 0.1, 0.1, 0.4]), **SETTINGS)
    assert table["reader"].tolist() == ["probe", "probe", "text", "probe - text", "probe - text"]
    assert table["share"].tolist() == pytest.approx([0.2, 0.4, 0.2, 0.0, 0.2]) and set(table["n"]) == {3}
    assert table["strength"].fillna(-1).tolist() == [0.5, 0.9, -1, 0.5, 0.9]


# Ambiguity --------------------------------------------------------------------------------------------------------


def test_ambiguity_by_hand():
    words = ["bat", "bat", "owl", "owl", "owl", "kite"]
    right = {"text": np.array([0, 1, 1, 1, 0, 0], bool), "probe": np.array([1, 1, 1, 0, 0, 1], bool)}
    table = probes.ambiguity(right, words, {"bat", "kite"}, **SETTINGS).set_index("reader")
    # text errs on 2 of 3 ambiguous and 1 of 3 others, the probe on none and 2 of 3
    assert table.loc["text", ["ambiguous", "other", "difference"]].tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert table.loc["probe", ["ambiguous", "other", "difference"]].tolist() == pytest.approx([0, 2 / 3, -2 / 3])
    assert table.loc["text - probe", "difference"] == pytest.approx(1.0)
    assert set(table["n_ambiguous"]) == set(table["n_other"]) == {3}
    with pytest.raises(ValueError, match="0 images of ambiguous words, 6 of others"):
        probes.ambiguity(right, words, {"moth"}, **SETTINGS)
    assert list(probes.ambiguity({"text": right["text"]}, words, {"bat"}, **SETTINGS)["reader"]) == ["text"]


def test_ambiguity_interval_against_a_plain_bootstrap():
    rng = np.random.default_rng(5)
    is_ambiguous = np.arange(300) % 3 == 0
    right = rng.random(300) > np.where(is_ambiguous, 0.3, 0.1)
    table = probes.ambiguity(
        {"text": right}, np.where(is_ambiguous, "bat", "owl"), {"bat"}, n_resamples=2000, seed=0
    )  # fmt: skip
    draws = []
    for index in np.random.default_rng(6).integers(300, size=(2000, 300)):
        wrong, group = ~right[index], is_ambiguous[index]
        draws.append(wrong[group].mean() - wrong[~group].mean())
    assert table.loc[0, ["low", "high"]].tolist() == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.012)
    assert isinstance(table, pd.DataFrame) and table.loc[0, "difference"] > 0.1
