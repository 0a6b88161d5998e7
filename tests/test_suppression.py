"""Suppression against OpenCLIP's own forward with a hook, and tables worked by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from test_splice import difference, spliced, through_openclip
from torch import tensor

from clipshift_core import scenes, suppression
from clipshift_core.sae import BatchTopK
from clipshift_core.scenes import CUE_OF
from clipshift_core.suppression import NOTHING, Misleading, Predicted, outcome_table, random_instead, scores

TEXTS = torch.randn(5, 24, generator=torch.Generator().manual_seed(4))
PLACES = [
    ("class token", -1, "class"),
    ("class token", 0, "class"),
    ("class token", 1, "spatial"),
    ("mean over patches", -1, "spatial"),
]


def slowly(splice, images, suppressed):
    """The whole tower again for each class, its latents taken out by a hook on the block."""
    n_latents, n_patches = splice.sae.n_latents, int(np.prod(splice.encoder.grid))
    found = []
    for c, text in enumerate(TEXTS):
        kept = [j for j in range(n_latents) if j not in suppressed.get(c, ())]

        def change(stream, kept=kept):
            place = slice(0, 1) if splice.token == "class" else slice(-n_patches, None)
            dense = splice.sae.encode(stream[:, place].flatten(0, 1)).dense(n_latents)
            dense[:, kept] = 0
            stream = stream.clone()
            stream[:, place] -= (dense @ splice.sae.W_dec).unflatten(0, (len(stream), -1))
            return stream

        embedding, _ = through_openclip(splice.encoder, images, splice.layer, change)
        found.append(F.cosine_similarity(embedding, text, dim=1))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("name, layer, token", PLACES)
def test_each_class_is_scored_without_its_own_latents(name, layer, token):
    splice, images = spliced(name, layer, token, BatchTopK, n=3)
    state = splice.read(images)
    on = [state.latents[i][state.on[i]].tolist() for i in range(3)]
    # Class 0 loses the first image's last latent, class 2 three of the second's, class 3 nothing, class 4 one never on.
    silent = next(j for j in range(48) if j not in {j for some in on for j in some} or j == 47)
    suppressed = {0: on[0][-1:], 2: on[1][-3:], 3: [], 4: [silent]}
    found, plain = scores(splice, state, TEXTS, suppressed), scores(splice, state, TEXTS, {})
    assert difference(found, slowly(splice, images, suppressed)) < 1e-5
    assert difference(plain, slowly(splice, images, {})) < 1e-5
    assert torch.equal(found[:, [1, 3]], plain[:, [1, 3]])
    assert (found - plain)[0, 0].abs() > 1e-4 and (found - plain)[1, 2].abs() > 1e-4


def test_only_what_changes_is_embedded_again(monkeypatch):
    splice, images = spliced("class token", -1, "class", n=4)
    state, sizes, embed = splice.read(images), [], splice.embed
    monkeypatch.setattr(
        splice, "embed", lambda state, *values: sizes.append(len(state.stream)) or embed(state, *values)
    )
    latent = int(state.latents[2, 0])
    has = [i for i in range(4) if latent in state.latents[i][state.on[i]]]
    found = scores(splice, state, TEXTS, {1: [latent], 2: []})
    assert sizes == [4, len(has)]
    others = [i for i in range(4) if i not in has]
    assert torch.equal(found[others], scores(splice, state, TEXTS, {})[others])
    torch.testing.assert_close(found, scores(splice, state, 7 * TEXTS, {1: [latent, latent]}))


def test_a_latent_in_a_slot_without_activation_is_not_on():
    splice, images = spliced("class token", -1, "class", n=2)
    state = splice.read(images)
    values = state.codes.values.clone()
    values[:, 0] = 0
    state = state._replace(codes=state.codes._replace(values=values))
    suppressed = {0: state.latents[:, 0].tolist()}
    on = suppression.on_in_class(state, np.array([0, 1]), 3, 48)
    assert [set(on[c].nonzero()[:, 0].tolist()) for c in range(2)] == [
        set(state.latents[c][values[c] != 0].tolist()) for c in range(2)
    ]
    assert not on[2].any()
    if not set(suppressed[0]) & set(state.latents[:, 1:].flatten().tolist()):
        assert torch.equal(scores(splice, state, TEXTS, suppressed), scores(splice, state, TEXTS, {}))


def test_latents_on_in_a_tenth_of_a_class():
    """Class 0 has 20 images: latent 0 is on in all, 1 in two (a tenth), 2 in one; class 1 has one image, with 3."""
    splice, images = spliced("class token", -1, "class", n=1)
    state = splice.read(np.concatenate([images] * 21))
    indices, values = torch.zeros(21, 2, dtype=torch.long), torch.ones(21, 2)
    indices[:, 1], values[:, 1] = 9, 0
    indices[[0, 1], 1], values[[0, 1], 1] = 1, 0.5
    indices[2, 1], values[2, 1] = 2, 0.5
    indices[20] = tensor([3, 9])
    state = state._replace(codes=state.codes._replace(indices=indices, values=values), latents=indices,
                           unit=torch.arange(2).expand(21, 2))  # fmt: skip
    on = suppression.on_in_class(state, np.array([0] * 20 + [1]), 2, 12)
    assert on.nonzero().tolist() == [[0, 0], [0, 1], [1, 3]]


def test_random_sets_are_as_large_and_others():
    on = torch.zeros(3, 30, dtype=torch.bool)
    on[0, :12], on[1, 10:13], on[2, 20:] = True, True, True
    suppressed = {0: [1, 2, 29], 1: [10, 11], 2: []}
    drawn = random_instead(suppressed, on, seed=5)
    assert len(drawn) == suppression.N_DRAWS == 5 and drawn == random_instead(suppressed, on, seed=5)
    for each in drawn:
        assert len(set(each[0])) == 3 and set(each[0]) <= set(range(12)) - {1, 2}
        assert each[1] == [12] and each[2] == []  # of class 1 one other is left
    assert len({tuple(each[0]) for each in drawn}) > 1
    # A class's draw does not change with the classes it is made among.
    assert [each[0] for each in random_instead({0: [1, 2, 29]}, on, seed=5)] == [each[0] for each in drawn]
    assert drawn != random_instead(suppressed, on, seed=6)
    # Over many draws each of the ten others comes equally often: 3 / 10 of 2,000 draws, standard error 20.
    counts = np.bincount(
        [j for each in random_instead(suppressed, on, seed=0, n_draws=2000) for j in each[0]], minlength=12
    )
    assert counts[1] == counts[2] == 0 and (np.abs(np.delete(counts, [1, 2]) - 600) < 90).all()


def test_pairs_by_class():
    pairs = pd.DataFrame({"word": ["owl", "duck", "owl", "owl"], "latent": [7, 3, 2, 7], "value": list("abcd")})
    assert suppression.by_class(pairs, ["cat", "duck", "owl"]) == {2: [2, 7], 1: [3]}
    assert suppression.by_class(pairs[:0], ["cat"]) == {}


# Scenes -------------------------------------------------------------------------------------------------------------


def test_misleading_scenes_have_one_cue_of_another_word():
    base, given = suppression.misleading(40, first_seed=900)
    assert len(base) == 40 and all(not scene.cues for scene in base)
    for i, scene in enumerate(base):
        sampled = scenes.sample(900 + i)
        assert (scene.kind, scene.companion, scene.relation) == (sampled.kind, sampled.companion, sampled.relation)
        own = [each for each in given if each.base == i]
        wanted = [(word, (cue,)) for word, (cue, _) in CUE_OF.items() if word != scene.word]
        assert [(each.owner, each.scene.cues) for each in own] == wanted and len(wanted) in (10, 11)
        assert all(each.scene.kind == scene.kind and each.scene.seed == scene.seed for each in own)
    assert any(scene.companion for scene in base) and {scene.word in CUE_OF for scene in base} == {True, False}
    again, some = suppression.misleading(2, first_seed=901)
    assert again == base[1:3] and [each.scene for each in some] == [each.scene for each in given if each.base in (1, 2)]


def test_misled_is_right_before_and_the_cues_word_after():
    words = ["cat", "duck", "owl"]
    base = [scenes.Scene(0, "cat", "red", "snow"), scenes.Scene(1, "cat", "red", "snow")]
    given = [Misleading(base[i], owner, i) for i in (0, 1) for owner in ("duck", "owl")]
    # The first base is right, the second is taken for an owl. With duck's cue: duck, duck; with owl's: duck, owl.
    found = suppression.misled(np.array([0, 2]), np.array([1, 1, 1, 2]), given, base, words)
    assert found.tolist() == [True, False, False, False]


# The table ------------------------------------------------------------------------------------------------------------


def test_outcomes_by_hand():
    """Of four images nothing gets one right, the found set three; two random draws two and one, 3 / 8 in the mean."""
    truth = np.array([0, 1, 2, 2])
    by_set = {
        NOTHING: np.array([0, 0, 0, 0]),
        "found": np.array([0, 1, 2, 0]),
        "random": np.array([[0, 1, 0, 0], [1, 0, 2, 0]]),
    }
    nobody = Predicted(np.array([], int), {name: some[..., :0] for name, some in by_set.items()})
    table = outcome_table({"ordinary": Predicted(truth, by_set), "misled": nobody}, n_resamples=300, seed=0)
    assert list(zip(table["scenes"], table["suppressed"], strict=True)) == [
        (name, each) for name in ("ordinary", "misled") for each in by_set
    ]
    rows = table[table["scenes"] == "ordinary"].set_index("suppressed")
    assert rows["accuracy"].to_dict() == {NOTHING: 0.25, "found": 0.75, "random": 0.375} and (rows["n"] == 4).all()
    assert rows["difference"].to_dict() == {NOTHING: 0.0, "found": 0.5, "random": 0.125}
    nothing, random = rows.loc[NOTHING], rows.loc["random"]
    assert nothing["difference_low"] == nothing["difference_high"] == 0
    assert (rows["low"] <= rows["accuracy"]).all() and (rows["high"] >= rows["accuracy"]).all()
    assert random["low"] < 0.375 < random["high"] and random["difference_low"] < 0 < random["difference_high"]
    left = table[table["scenes"] == "misled"]
    assert (left["n"] == 0).all() and left.drop(columns=["scenes", "suppressed", "n"]).isna().all(axis=None)


def test_the_difference_is_paired():
    """Two sets right on the same half but for one image of 400: the interval of their difference is narrow, that of
    each accuracy is not (1.96 sqrt(1/4 / 400) = 0.049)."""
    truth, nothing = np.zeros(400, int), np.arange(400) % 2
    found = nothing.copy()
    found[1] = 0
    table = outcome_table({"a": Predicted(truth, {NOTHING: nothing, "found": found})}, n_resamples=2000, seed=0)
    row = table.iloc[1]
    assert row["difference"] == pytest.approx(1 / 400) and row["difference_high"] - row["difference_low"] < 0.011
    assert (row["high"] - row["low"]) / 2 == pytest.approx(0.049, rel=0.1)


def test_images_of_one_scene_are_drawn_together():
    """100 scenes of 9 images, all of a scene right or wrong alike: standard error 0.05 as of 100 images, not of 900."""
    truth, of = np.zeros(900, int), np.repeat(np.random.default_rng(0).permutation(100) * 3, 9)
    predicted = {NOTHING: (of // 3) % 2}
    both = {"together": Predicted(truth, predicted, of), "apart": Predicted(truth, predicted)}
    table = outcome_table(both, n_resamples=3000, seed=0).set_index("scenes")
    width = table["high"] - table["low"]
    assert (table["accuracy"] == 0.5).all()
    assert width["together"] == pytest.approx(2 * 1.96 * 0.05, rel=0.1) and width["apart"] == pytest.approx(
        2 * 1.96 * 0.5 / 30, rel=0.1
    )
    # Scenes of unequal size count by their images: 3 of 4.
    uneven = {"a": Predicted(np.zeros(4, int), {NOTHING: np.array([0, 0, 0, 1])}, np.array([5, 5, 5, 1]))}
    assert outcome_table(uneven, n_resamples=50, seed=0)["accuracy"][0] == 0.75


def test_intercepts_give_each_class_its_share():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    cosines = 0.1 * torch.randn(100, 3, generator=generator) + 0.2 * torch.nn.functional.one_hot(truth, 3)
    cosines[:, 1] -= 0.3  # a class that has lost a latent
    added = suppression.intercepts(cosines, truth, 20.0)
    shares = torch.softmax(20 * (cosines + added), dim=1).mean(0)
    # the first-order condition of maximum likelihood, but for the small penalty
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.01, rtol=0)
    assert added[1] - added[0] > 0.2
    before = (cosines.argmax(1) == truth).float().mean()
    assert ((cosines + added).argmax(1) == truth).float().mean() > before + 0.1
