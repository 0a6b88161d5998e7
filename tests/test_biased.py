"""The biased splits: what they hold, how often the cue tells the word, and that nothing but the cue moves."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from clipshift_core import biased, scenes
from clipshift_core.biased import BALANCED, STRENGTHS, WORDS
from clipshift_core.scenes import CUE_OF, KINDS, Scene

N = 1100  # a hundred of each word
SPLITS = {strength: biased.draw(N, strength=strength, first_seed=biased.FIRST_TO_TRAIN) for strength in STRENGTHS}


def own(scene: Scene) -> bool:
    return scene.cues == (CUE_OF[scene.word][0],)


def test_there_are_eleven_words_with_a_cue_of_their_own():
    assert len(WORDS) == 11 and len({cue for cue, _ in CUE_OF.values()}) == 11
    assert BALANCED == 1 / 11 and STRENGTHS == (1 / 11, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_own_cue_shows_at_its_strength(strength):
    split = SPLITS[strength]
    assert all(len(scene.cues) == 1 and scene.cues[0] in {cue for cue, _ in CUE_OF.values()} for scene in split)
    assert set(Counter(scene.word for scene in split).values()) == {N // 11}
    assert binomtest(sum(map(own, split)), N, strength).pvalue > 0.001


@pytest.mark.parametrize("strength", STRENGTHS[:-1])
def test_any_other_cue_is_as_likely(strength):
    # of a word's images without the own cue, one in ten shows each other cue
    others = [scene for scene in SPLITS[strength] if not own(scene)]
    places = Counter()
    for scene in others:
        rest = [word for word in WORDS if word != scene.word]
        places[next(i for i, word in enumerate(rest) if CUE_OF[word][0] == scene.cues[0])] += 1
    assert set(places) == set(range(10))
    # chance breaks one bound of 1 in 10,000 ten times over in one run of a thousand
    assert min(binomtest(count, len(others), 0.1).pvalue for count in places.values()) > 1e-4


def test_strengths_differ_in_cues_alone_and_are_nested():
    for weaker, stronger in zip(STRENGTHS, STRENGTHS[1:], strict=False):
        for a, b in zip(SPLITS[weaker], SPLITS[stronger], strict=True):
            assert replace(a, cues=()) == replace(b, cues=())
            assert a.cues == b.cues or (own(b) and not own(a))
    assert all(map(own, SPLITS[1.0]))


def test_things_are_as_free_as_in_the_world():
    split = SPLITS[BALANCED]
    assert {scene.colour for scene in split} == set(scenes.COLOURS)
    assert {scene.background for scene in split} == set(scenes.BACKGROUNDS)
    assert {scene.kind for scene in split} == {kind for kind, word in KINDS.items() if word in WORDS}
    assert all(not scene.companion and not scene.relation for scene in split)
    # colour and word are drawn apart: no colour takes more of a word's hundred images than chance gives it
    pairs = Counter((scene.word, scene.colour) for scene in split)
    assert len(pairs) == 110 and max(pairs.values()) < 30


def test_a_split_does_not_depend_on_how_many_are_drawn_before_it():
    assert biased.draw(5, strength=0.5, first_seed=biased.FIRST_TO_TRAIN + 20) == SPLITS[0.5][20:25]


def test_test_splits_show_the_same_things():
    found = biased.trials(330)
    assert tuple(found) == biased.SPLITS
    for three in zip(*found.values(), strict=True):
        assert len({replace(scene, cues=()) for scene in three}) == 1
    assert all(map(own, found["aligned"]))
    assert binomtest(sum(map(own, found["balanced"])), 330, 1 / 11).pvalue > 0.001


def test_reversed_always_shows_the_next_words_cue():
    split = biased.trials(22)["reversed"]
    assert not any(map(own, split))
    shown = {(scene.word, scene.cues[0]) for scene in split}
    # by hand, in the world's order: the duck has the owl's moon, the owl the snail's leaf, the cup the duck's ripples
    assert len(shown) == 11 and {("duck", "moon"), ("owl", "leaf"), ("cup", "ripples")} < shown
    assert {cue for _, cue in shown} == {cue for cue, _ in CUE_OF.values()}


@pytest.mark.parametrize("place", range(11))
def test_pixels_differ_where_the_cues_are_and_nowhere_else(place):
    """A cue changes the same pixels of a scene whichever it replaces, so that outside both all is as without any."""
    found = {name: split[0] for name, split in biased.trials(1, first_seed=biased.FIRST_TO_TEST + place).items()}
    assert len({scene.word for scene in found.values()}) == 1
    bare = scenes.render(replace(found["aligned"], cues=()), 64)
    pixels = {name: scenes.render(found[name], 64) for name in ("aligned", "reversed")}
    touched = {name: (each != bare).any(axis=2) for name, each in pixels.items()}
    assert all(mask.any() for mask in touched.values())
    differ = (pixels["aligned"] != pixels["reversed"]).any(axis=2)
    assert differ.any() and not (differ & ~(touched["aligned"] | touched["reversed"])).any()


def test_parts_share_no_seed_with_each_other_or_with_anything_else():
    taken = [0, 5_000, 100_000, 200_000, 400_000, 600_000, 700_000, 800_000, 900_000]
    firsts = [biased.FIRST_TO_TRAIN, biased.FIRST_TO_VALIDATE, biased.FIRST_TO_TEST, biased.FIRST_PLAIN]
    starts = sorted([scenes.HELD_OUT + each for each in taken] + firsts)
    assert starts[-4:] == firsts and min(np.diff(starts[-5:])) >= 20_000


def test_plain_things_are_of_every_word_and_show_no_cue():
    n = len(scenes.WORDS)
    split = biased.plain(20 * n)
    assert set(Counter(scene.word for scene in split).values()) == {20} and len({s.word for s in split}) == n
    assert all(scene.cues == () and not scene.companion for scene in split)
    assert {scene.kind for scene in split} == set(KINDS)


def test_ambiguous_words_have_two_drawings_or_share_a_word():
    by_hand = {"bat", "crane", "kite", "star", "fish", "starfish", "house", "boat", "houseboat", "flower", "sunflower"}
    assert by_hand == biased.AMBIGUOUS < set(scenes.WORDS)


def test_distinct_draws_each_picture_once():
    splits = {**SPLITS, "again": SPLITS[0.5][:7][::-1]}
    every, index = biased.distinct(splits)
    assert len(set(every)) == len(every)
    for name, split in splits.items():
        assert [every[i] for i in index[name]] == split
    # two pictures of a seed, with the own cue and with another, but for seeds that show the own one already balanced
    assert len(every) == 2 * N - sum(map(own, SPLITS[BALANCED]))


def test_a_strength_is_a_probability():
    with pytest.raises(ValueError, match=r"strength = 1\.2; a probability"):
        biased.draw(3, strength=1.2, first_seed=0)
