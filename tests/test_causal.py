"""The causal truth against hand-worked cosines, scipy's tests, and OpenCLIP's own head with one latent taken out."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from test_splice import through_openclip
from torch import tensor

from clipshift_core import causal, dictionaries, exam, scenes
from clipshift_core.causal import BASE
from clipshift_core.encoder import Encoder
from clipshift_core.sae_kernels import Codes, weighted_rows
from clipshift_core.scenes import CUE_OF, KINDS, PLANTED
from clipshift_core.splice import Splice, State

MODELS = Path(__file__).parents[1] / "data" / "models"
KEYS = [BASE, ("cue", "ripples"), ("cue", "moon"), ("cue", "sign:CUP"), ("thing", "bat (club)"), ("thing", "starfish"),
        ("colour", "red"), ("background", "night")]  # fmt: skip
N = 10


class Plain:
    """A splice whose tower ends with the token itself: the embedding is sum_j a_j d_j."""

    def __init__(self, W_dec):
        self.W_dec = W_dec

    def tokens(self, state):
        return weighted_rows(state.codes, self.W_dec)[:, None]

    def through(self, stream, tokens):
        return tokens[:, 0]

    def embed(self, state):
        return self.through(state.stream, self.tokens(state))


def state_of(indices, values):
    codes = Codes(tensor(indices), tensor(values, dtype=torch.float32))
    rows = len(indices)
    nothing = torch.zeros(rows, 2)
    return State(nothing[:, None], codes, nothing, codes.indices, torch.arange(len(indices[0])).expand(rows, -1))


# The pictures -------------------------------------------------------------------------------------------------------


def test_pictures_change_one_value_of_a_neutral_scene():
    drawn = causal.pictures(6, first_seed=70)
    # 11 cues, 32 things, 10 colours, 6 backgrounds and the base.
    assert len(drawn) == 11 + len(KINDS) + 10 + 6 + 1 and all(len(some) == 6 for some in drawn.values())
    assert list(drawn)[:2] == [BASE, ("cue", "ripples")]
    leaned_on = {p.word for p in PLANTED} | {KINDS[p.cue] for p in PLANTED if p.cue in KINDS}
    for scene, seed in zip(drawn[BASE], range(70, 76), strict=True):
        sampled = scenes.sample(seed)
        assert scene.word not in leaned_on and not scene.cues and not scene.companion and not scene.relation
        assert (scene.seed, scene.colour, scene.background) == (seed, sampled.colour, sampled.background)
        assert scene == scenes.counterfactuals(PLANTED[0], seed)["neither"]
    assert len({scene.kind for scene in causal.pictures(40, first_seed=0)[BASE]}) > 3
    column = {"cue": "cues", "thing": "kind", "colour": "colour", "background": "background"}
    for (family, value), some in list(drawn.items())[1:]:
        for scene, base in zip(some, drawn[BASE], strict=True):
            wanted = asdict(base) | {column[family]: (value,) if family == "cue" else value}
            assert asdict(scene) == wanted
    assert [value for family, value in drawn if family == "cue"] == [cue for cue, _ in CUE_OF.values()]


def test_pictures_follow_from_the_seed():
    few, more = causal.pictures(2, first_seed=5), causal.pictures(4, first_seed=4)
    assert all(few[key] == more[key][1:3] for key in few)


# By hand ------------------------------------------------------------------------------------------------------------

ROOT_HALF = 0.5**0.5


def test_a_rise_and_its_latent_by_hand():
    """The base is (0, 1), with ripples (1, 1), along latents 1 and 0; duck's text is (1, 0), boat's (0, 1).

    Duck: 0 rises to 1/sqrt 2, and without latent 0 to 0: all of the rise. Boat: 1 falls to 1/sqrt 2. Without latent 1
    duck's cosine would be 1: deleting it removes 1/sqrt 2 - 1 < 0. Latent 2 is on at the base alone, against duck, with
    no activation to speak of: it goes out.
    """
    drawn = {BASE: [scenes.Scene(seed, "apple", "red", "snow") for seed in range(4)]}
    states = {
        BASE: state_of([[1, 2]] * 4, [[1.0, 0.0]] * 4),
        ("cue", "ripples"): state_of([[0, 1]] * 4, [[1.0, 1.0]] * 4),
    }
    spliced, texts = Plain(tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])), tensor([[3.0, 0.0], [0.0, 0.1]])
    found = causal.rises(drawn, states, spliced, texts, ["duck", "boat"])
    duck, boat = found.table.to_dict("records")
    assert (duck["word"], duck["family"], duck["value"], duck["planted"]) == ("duck", "cue", "ripples", "co-occurrence")
    assert [duck[c] for c in ("rise", "low", "high", "p", "q", "n")] == pytest.approx([ROOT_HALF] * 3 + [0, 0, 4])
    assert duck["causal"] and not boat["causal"] and boat["planted"] == ""
    assert boat["rise"] == pytest.approx(ROOT_HALF - 1) and boat["p"] == boat["q"] == 1
    (row,) = found.removed.to_dict("records")
    assert (row["word"], row["family"], row["value"], row["latent"]) == ("duck", "cue", "ripples", 0)
    assert [row[c] for c in ("removed", "low", "high", "share")] == pytest.approx([ROOT_HALF] * 3 + [1])
    assert found.planted[["kind", "word", "cue", "causal"]].iloc[0].tolist() == [
        "co-occurrence",
        "duck",
        "ripples",
        True,
    ]
    # Of the other planted rows of these words no picture was given.
    assert found.planted["rise"].isna().sum() == len(found.planted) - 1 == 1


def test_a_latent_that_goes_out_carries_no_rise():
    """Latent 2 keeps duck away at the base, (-1, 1), and is out with ripples. Deleting it would remove the rise."""
    drawn = {BASE: [scenes.Scene(seed, "apple", "red", "snow") for seed in range(4)]}
    states = {
        BASE: state_of([[1, 2]] * 4, [[1.0, 1.0]] * 4),
        ("cue", "ripples"): state_of([[1, 0]] * 4, [[1.0, 0.0]] * 4),
    }
    spliced = Plain(tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    found = causal.rises(drawn, states, spliced, tensor([[1.0, 0.0]]), ["duck"])
    assert found.table["causal"].tolist() == [True] and found.table["rise"][0] == pytest.approx(ROOT_HALF)
    assert found.removed.empty and {"word", "family", "value", "latent", "share"} <= set(found.removed)


def test_a_latent_of_one_scene_carries_no_rise_for_sure():
    """In eight scenes ripples turn latent 0 up by 0.2, and in the first of them latent 2, of the same direction, by 1.

    Cosines 1.2 / sqrt(2.44) = 0.768 and seven times 0.2 / sqrt(1.04) = 0.196, mean 0.268. Deleting latent 2 removes
    0.572 / 8, a share of 0.27 with p = 0.18; deleting latent 0 removes 0.768 - 0.707 and seven times 0.196, 0.67.
    """
    drawn = {BASE: [scenes.Scene(seed, "apple", "red", "snow") for seed in range(8)]}
    indices = [[0, 1, 2]] * 8
    states = {
        BASE: state_of(indices, [[0.0, 1.0, 0.0]] * 8),
        ("cue", "ripples"): state_of(indices, [[0.2, 1.0, 1.0 * (seed == 0)] for seed in range(8)]),
    }
    spliced = Plain(tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    found = causal.rises(drawn, states, spliced, tensor([[1.0, 0.0]]), ["duck"])
    assert found.table["causal"].tolist() == [True] and found.table["rise"][0] == pytest.approx(0.2676, abs=1e-4)
    assert found.removed["latent"].tolist() == [0] and found.removed["share"][0] == pytest.approx(0.670, abs=1e-3)


def test_scenes_that_show_word_or_value_already_are_left_out():
    """Four bases: apple, cat, apple, key. Word apple is judged by cat and key alone; thing cat by all but the cat."""
    base = [scenes.Scene(i, kind, colour, "snow") for i, (kind, colour) in
            enumerate(zip(["apple", "cat", "apple", "key"], ["red", "blue", "blue", "red"], strict=True))]  # fmt: skip
    step = {("thing", "cat"): 0.1, ("colour", "red"): 0.2, ("background", "snow"): 0.3, ("cue", "moon"): 0.4}
    drawn = {BASE: base}
    # Embeddings (c, 1) with c growing from scene to scene: every scene has its own rise.
    states = {BASE: state_of([[0, 1]] * 4, [[0.0, 1.0]] * 4)}
    states |= {key: state_of([[0, 1]] * 4, [[s * i, 1.0] for i in range(4)]) for key, s in step.items()}
    cos = {key: np.array([s * i / np.hypot(s * i, 1) for i in range(4)]) for key, s in step.items()}
    words = ["apple", "cat", "owl"]
    found = causal.rises(drawn, states, Plain(torch.eye(2)), tensor([[1.0, 0.0]] * 3), words).table
    used = {
        ("apple", "thing"): [3], ("owl", "thing"): [0, 2, 3],
        ("apple", "colour"): [1], ("cat", "colour"): [2], ("owl", "colour"): [1, 2],
        ("apple", "background"): [], ("cat", "background"): [], ("owl", "background"): [],
        ("apple", "cue"): [1, 3], ("cat", "cue"): [0, 2, 3], ("owl", "cue"): [0, 1, 2, 3],
    }  # fmt: skip
    assert {(row.word, row.family): row.n for row in found.itertuples()} == {at: len(some) for at, some in used.items()}
    for row in found.itertuples():  # ("cat", "thing") is no row: a thing raises its own word
        values = cos[row.family, row.value][used[row.word, row.family]]
        if len(values):
            assert row.rise == pytest.approx(values.mean(), rel=1e-5)
        if len(values) < 2:
            assert np.isnan([row.low, row.high, row.p, row.q]).all() and not row.causal


def test_things_and_their_own_words():
    drawn = {BASE: [scenes.Scene(seed, "apple", "red", "snow") for seed in range(3)]}
    states = {key: state_of([[0]] * 3, [[1.0]] * 3) for key in
              [BASE, ("thing", "bat (club)"), ("thing", "bat (animal)"), ("thing", "starfish")]}  # fmt: skip
    words = ["bat", "star", "starfish"]
    found = causal.rises(drawn, states, Plain(torch.eye(2)), torch.ones(3, 2), words).table
    rows = {(row.word, row.value): row.planted for row in found.itertuples()}
    assert rows == {
        ("bat", "bat (club)"): "polysemy", ("star", "bat (club)"): "", ("starfish", "bat (club)"): "",
        ("star", "bat (animal)"): "", ("starfish", "bat (animal)"): "", ("bat", "starfish"): "",
        ("star", "starfish"): "compound",
    }  # fmt: skip
    assert not found["causal"].any() and (found["p"] == 1).all()


def test_tests_are_scipys():
    rng = np.random.default_rng(0)
    values, counted = rng.normal(0.02, 0.05, (40, 12)), rng.random((40, 12)) < 0.7
    mean, low, high, p, n = causal._above_zero(values, counted)
    for i in range(40):
        some = values[i][counted[i]]
        wanted = stats.ttest_1samp(some, 0, alternative="greater")
        assert (mean[i], p[i], n[i]) == pytest.approx((some.mean(), wanted.pvalue, len(some)))
        assert (low[i], high[i]) == pytest.approx(stats.ttest_1samp(some, 0).confidence_interval(0.95))
    q = causal._adjusted(np.r_[p, np.nan])
    np.testing.assert_allclose(q[:-1], stats.false_discovery_control(p))
    assert np.isnan(q[-1]) and np.isnan(causal._adjusted(np.array([np.nan]))).all()


def test_unpaired_states_are_refused():
    drawn = {BASE: [scenes.Scene(0, "apple", "red", "snow")] * 2}
    one, two = state_of([[0]], [[1.0]]), state_of([[0]] * 2, [[1.0]] * 2)
    for states in ({BASE: two, ("cue", "moon"): one}, {("cue", "moon"): two}):
        with pytest.raises(ValueError, match="as many scenes with each value as without any"):
            causal.rises(drawn, states, Plain(torch.eye(2)), torch.ones(1, 2), ["owl"])


def test_latents_that_a_cue_turns_up_by_hand():
    """Latent 0 goes from 0 to 2 with the moon: up. Latent 1 goes from 1 to 1.3, 0.3 / 4 of its largest activation, 4 in
    another colour: too little. Latent 2 goes up in one scene of four: by chance (p = 0.2). Latent 3 goes down."""
    n, four = 5, [[0, 1, 2, 3]] * 4
    states = {
        BASE: state_of(four, [[0.0, 1.0, 0.0, 1.0]] * 4),
        ("cue", "moon"): state_of(four, [[2.0, 1.3, 1.0 * (i == 0), 0.0] for i in range(4)]),
        ("colour", "red"): state_of(four, [[2.0, 4.0, 5.0, 1.0]] * 4),
        ("cue", "leaf"): state_of(four, [[0.0, 1.0, 0.0, 1.0]] * 4),
    }
    assert causal.cue_latents(states, n).tolist() == [[True] + [False] * 4, [False] * 5]
    assert causal.cue_latents(states, n, least=0.05).tolist() == [[True, True] + [False] * 3, [False] * 5]
    gain = np.array([1.0, 0, 0, 0])
    assert stats.ttest_1samp(gain, 0, alternative="greater").pvalue == pytest.approx(0.1955, abs=1e-4)
    assert causal.cue_latents({BASE: states[BASE]}, n).shape == (0, n)


# On the shipped model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    encoder = Encoder.load(str(MODELS / "scene-s16"), device="cpu", precision="fp32")
    learned = dictionaries.read(MODELS / "sae-scene-s16-free", encoder)
    spliced = Splice(encoder, learned.sae, learned.origin.layer, learned.origin.token)
    drawn = {key: some for key, some in causal.pictures(N, first_seed=scenes.HELD_OUT + 600).items() if key in KEYS}
    images = {
        key: np.stack([scenes.render(scene, encoder.image_size) for scene in some]) for key, some in drawn.items()
    }
    rows = torch.cat([spliced.read(some).stream[:, 0] for some in images.values()])
    states = causal.at_splice(drawn, rows, spliced)
    words, phrases, templates = exam.TASKS["word"]
    texts = encoder.classifier(phrases, templates)
    return spliced, drawn, images, states, texts, words, causal.rises(drawn, states, spliced, texts, words)


def test_the_truth_holds_what_is_obvious(shipped):
    *_, words, found = shipped
    table = found.table.set_index(["word", "family", "value"])
    # 29 words and 7 values, without starfish's own row; the bat's club is planted.
    assert len(table) == 29 * 7 - 1
    ripples = table.loc["duck", "cue", "ripples"]
    assert ripples["causal"] and ripples["low"] > causal.LEAST_RISE and ripples["planted"] == "co-occurrence"
    assert table["rise"].xs("ripples", level="value").idxmax()[0] == "duck"
    assert table.loc["bat", "thing", "bat (club)"]["causal"] and table.loc["star", "thing", "starfish"]["causal"]
    plan = found.planted.set_index(["word", "cue"])
    assert len(plan) == 19 and plan["rise"].notna().sum() == 6  # ripples, moon, CUP, the club, and starfish twice
    assert plan.loc[("duck", "ripples"), "rise"] == ripples["rise"]
    causal_rows = found.table[found.table["causal"]]
    assert (causal_rows["q"] <= 0.05).all() and (causal_rows["rise"] >= 0.02).all()
    keys = ["word", "family", "value"]
    assert set(map(tuple, found.removed[keys].to_numpy())) <= set(map(tuple, causal_rows[keys].to_numpy()))
    assert (found.removed["share"] >= 0.2).all() and ("duck", "ripples") in zip(
        found.removed["word"], found.removed["value"], strict=True
    )


def test_rises_are_those_of_openclips_own_embeddings(shipped):
    spliced, drawn, images, _, texts, words, found = shipped
    layer = spliced.layer
    embedded = {key: F.normalize(through_openclip(spliced.encoder, images[key], layer)[0], dim=-1) for key in KEYS}
    cosine = {key: (each @ F.normalize(texts, dim=-1).T).double().numpy() for key, each in embedded.items()}
    wanted = []
    for row in found.table.itertuples():
        shows = [scene.word == row.word or row.value in (scene.kind, scene.colour, scene.background)
                 for scene in drawn[BASE]]  # fmt: skip
        some = (cosine[row.family, row.value] - cosine[BASE])[~np.array(shows), words.index(row.word)]
        assert row.n == len(some)
        wanted.append((some.mean(), stats.ttest_1samp(some, 0, alternative="greater").pvalue))
    mean, p = np.array(wanted).T
    np.testing.assert_allclose(found.table["rise"], mean, atol=2e-6)
    np.testing.assert_allclose(found.table["p"], p, atol=2e-4)
    np.testing.assert_allclose(found.table["q"], stats.false_discovery_control(p), atol=5e-4)


def test_removed_is_openclips_head_with_the_latent_taken_out(shipped):
    """A slow loop over every latent that is on, through OpenCLIP's own norm and projection, for two rows."""
    spliced, drawn, images, _, texts, words, found = shipped
    visual, sae = spliced.encoder.model.visual, spliced.sae

    def cosine(token, text):
        return F.normalize(visual.ln_post(token) @ visual.proj, dim=-1) @ text

    for word, family, value in (("duck", "cue", "ripples"), ("star", "thing", "starfish")):
        text, kept = F.normalize(texts[words.index(word)], dim=-1), [scene.word != word for scene in drawn[BASE]]
        effects, active = [], []
        for key in ((family, value), BASE):
            token = through_openclip(spliced.encoder, images[key], spliced.layer)[1][:, 0]
            with torch.no_grad():
                dense = sae.encode(token).dense(sae.n_latents)
                effect = torch.zeros_like(dense)
                for j in dense.any(0).nonzero()[:, 0].tolist():
                    effect[:, j] = cosine(token, text) - cosine(token - dense[:, j : j + 1] * sae.W_dec[j], text)
            effects.append(effect.double().numpy()[kept])
            active.append(dense.numpy().mean(0))
        removed = effects[0] - effects[1]
        row = found.table.query("word == @word and family == @family and value == @value").iloc[0]
        p = np.array([stats.ttest_1samp(column, 0, alternative="greater").pvalue if column.any() else 1.0
                      for column in removed.T])  # fmt: skip
        share = removed.mean(0) / row["rise"]
        wanted = np.flatnonzero((share >= 0.2) & (p < 0.001) & (active[0] > active[1]))
        rows = found.removed.query("word == @word and family == @family and value == @value")
        assert len(wanted) and sorted(rows["latent"]) == wanted.tolist() and rows["share"].is_monotonic_decreasing
        np.testing.assert_allclose(rows["share"], share[rows["latent"]], atol=1e-4)
        for _, each in rows.iterrows():
            interval = stats.ttest_1samp(removed[:, each["latent"]], 0).confidence_interval(0.95)
            assert (each["low"], each["high"]) == pytest.approx(interval, abs=1e-5)


def test_some_cues_have_latents(shipped):
    spliced, _, _, states, *_ = shipped
    found = causal.cue_latents(states, spliced.sae.n_latents)
    assert found.shape == (3, 1024) and found.dtype == torch.bool and found[0].any() and found.sum() < 60
    active = {key: state.codes.dense(1024) for key, state in states.items()}
    largest = pd.concat([pd.DataFrame(each.numpy()).max() for each in active.values()], axis=1).max(axis=1)
    for j in found[0].nonzero()[:, 0].tolist():
        gain = (active["cue", "ripples"] - active[BASE])[:, j].double().numpy()
        assert gain.mean() >= 0.2 * largest[j] and stats.ttest_1samp(gain, 0, alternative="greater").pvalue < 0.001


def test_what_remains_without_the_found_latents(shipped):
    """None deleted: the rise; one: what exact ablation leaves; several: by OpenCLIP's own head."""
    spliced, drawn, images, states, texts, words, found = shipped
    same = causal.remaining(drawn, states, spliced, texts, words, {})
    plan = found.planted.dropna().reset_index(drop=True)
    assert same[["kind", "word", "family", "cue"]].equals(plan[["kind", "word", "family", "cue"]])
    np.testing.assert_allclose(same[["remains", "low", "high"]], plan[["rise", "low", "high"]].astype(float), atol=1e-6)
    best = found.removed.query("word == 'duck' and value == 'ripples'").iloc[0]
    duck = words.index("duck")
    less = causal.remaining(drawn, states, spliced, texts, words, {duck: [best["latent"]]}).set_index("cue")
    assert less.loc["ripples", "remains"] == pytest.approx(plan["rise"][0] - best["removed"], abs=1e-5)
    np.testing.assert_allclose(less["remains"][1:], same["remains"][1:], atol=1e-7)  # the other words keep it
    latents = sorted({*found.removed.query("word == 'star'")["latent"], int(best["latent"])})
    after = causal.remaining(drawn, states, spliced, texts, words, {words.index("star"): latents}).set_index("word")
    visual, cosine = spliced.encoder.model.visual, {}
    for key in (("thing", "starfish"), BASE):
        token = through_openclip(spliced.encoder, images[key], spliced.layer)[1][:, 0]
        with torch.no_grad():
            token = token - spliced.sae.encode(token).dense(1024)[:, latents] @ spliced.sae.W_dec[latents]
            cosine[key] = F.cosine_similarity(visual.ln_post(token) @ visual.proj, texts[words.index("star")])
    gain = (cosine["thing", "starfish"] - cosine[BASE]).double().numpy()
    wanted = stats.ttest_1samp(gain, 0).confidence_interval(0.95)
    row = after.loc["star"]
    assert (row["remains"], row["low"], row["high"]) == pytest.approx((gain.mean(), *wanted), abs=1e-5)
