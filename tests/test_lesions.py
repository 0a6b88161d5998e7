"""The lesion world: the rule, the planted rates, counterfactuals, the same pixels again."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from clipshift_core import lesions
from clipshift_core.lesions import ARTEFACTS, PLANTED_SHORTCUTS, Lesion


def draw(n: int, split: str = "train", seed: int = 0) -> list[Lesion]:
    rng = np.random.default_rng(seed)
    return [lesions.sample(rng, split) for _ in range(n)]


def test_the_rule_by_hand():
    # A 2 x 0.5, B 8 x 0.25, C 4, D at 8 mm is the middle of 1..5: 1.3 + 0.2 + 2 + 1.5
    lesion = Lesion(seed=1, asymmetry=0.5, border=0.25, colours=4, diameter_mm=8.0, skin_tone=1)
    assert lesion.score == pytest.approx(1.3 * 1 + 0.1 * 2 + 0.5 * 4 + 0.5 * 3)
    assert not lesion.malignant and replace(lesion, colours=5).malignant  # 5.0 and 5.5 around 5.1
    assert replace(lesion, skin_tone=6, ruler=True, patch=True).score == lesion.score


def test_no_factor_outside_its_range():
    with pytest.raises(ValueError, match="asymmetry is 1.5.*0 to 1"):
        Lesion(seed=0, asymmetry=1.5, border=0, colours=1, diameter_mm=5, skin_tone=1)
    with pytest.raises(ValueError, match="'valid'.*train, test, reversed"):
        lesions.sample(np.random.default_rng(0), "valid")


@pytest.mark.parametrize("split", (*lesions.SPLITS, lesions.REVERSED))
def test_rates_are_the_stated_ones(split):
    table = lesions.table(draw(6000, split))
    assert abs(table.malignant.mean() - 0.5) < 0.02
    assert not table.score.between(lesions.BENIGN_BELOW, lesions.MALIGNANT_ABOVE).any()
    for planted in PLANTED_SHORTCUTS:
        given = table[planted.artefact][table.label == planted.label].mean()
        otherwise = table[planted.artefact][table.label != planted.label].mean()
        stated = (planted.rate_train_given_label, planted.rate_otherwise)
        if split == "test":
            stated = (planted.rate_test, planted.rate_test)
        if split == "reversed":
            stated = (planted.rate_otherwise, planted.rate_train_given_label)
        # five standard errors of a share of about 3,000 images
        assert (given, otherwise) == pytest.approx(stated, abs=5 * 0.5 / np.sqrt(3000))
    for artefact, rate in lesions.UNPLANTED_RATES.items():
        assert table.groupby("label")[artefact].mean().to_numpy() == pytest.approx([rate, rate], abs=0.046)


def test_splits_that_are_trained_on_stay_as_they_were():
    """Factors of a lesion of "train" and of "test", written down before there was a third split."""
    assert lesions.SPLITS == ("train", "test")
    assert [hashlib.sha256(repr(draw(500, split)).encode()).hexdigest()[:16] for split in lesions.SPLITS] == [
        "47f5d556db1c34f2",
        "929651104e634bf0",
    ]


def test_the_split_changes_the_planted_artefacts_alone():
    """One seed in each split: label, factors and all that is not planted are the same, for the draws are as many."""
    planted = {"ruler": False, "patch": False, "skin_tone": 3}
    for seed in range(30):
        made = [lesions.sample(np.random.default_rng(seed), split) for split in (*lesions.SPLITS, lesions.REVERSED)]
        assert len({replace(lesion, **planted) for lesion in made}) == 1


def test_no_single_factor_gives_the_label_away():
    table = lesions.table(draw(3000, "test"))
    for factor in ("asymmetry", "border", "colours", "diameter_mm"):
        cuts = np.quantile(table[factor], np.linspace(0.05, 0.95, 19))
        best = max(((table[factor] > cut) == table.malignant).mean() for cut in cuts)
        assert best < 0.9, factor


def test_same_lesion_same_pixels_at_any_size():
    lesion = draw(1)[0]
    for size in (48, 97):
        image = lesions.render(lesion, size)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert np.array_equal(image, lesions.render(replace(lesion), size))
    assert not np.array_equal(lesions.render(lesion, 48), lesions.render(replace(lesion, seed=lesion.seed + 1), 48))


@pytest.mark.parametrize("artefact", (*ARTEFACTS, "light_skin"))
def test_counterfactuals_change_what_they_say(artefact):
    label = next((s.label for s in PLANTED_SHORTCUTS if s.artefact == artefact), "malignant")
    for lesion in draw(6, seed=3):
        four = lesions.counterfactuals(lesion, artefact)
        assert {k: (x.label == label, getattr(x, artefact)) for k, x in four.items()} == {
            "both": (True, True),
            "class_only": (True, False),
            "cue_only": (False, True),
            "neither": (False, False),
        }
        assert any(x == lesion for x in four.values()) or artefact == "light_skin"
        assert four == lesions.counterfactuals(lesion, artefact)
        skin, other = replace(four["both"], skin_tone=1), replace(four["cue_only"], skin_tone=1)
        assert skin.seed == other.seed and {k: getattr(skin, k) for k in ARTEFACTS} == {
            k: getattr(other, k) for k in ARTEFACTS
        }


@pytest.mark.parametrize("artefact", ("ruler", "hair", "patch", "vignette"))
def test_an_artefact_moves_nothing_else(artefact):
    """Outside the pixels that an artefact covers on plain skin, drawing it leaves all else as it was."""

    def touched(lesion: Lesion) -> np.ndarray:
        without, present = (lesions.render(replace(lesion, **{artefact: v}), 96).astype(int) for v in (False, True))
        return np.abs(present - without).max(2)

    bare = Lesion(seed=11, asymmetry=0.8, border=0.7, colours=5, diameter_mm=9.0, skin_tone=2)
    rich = replace(bare, **dict.fromkeys(ARTEFACTS, True))
    assert touched(bare).max() > 50
    assert not ((touched(rich) > 2) & (touched(bare) == 0)).any()  # 2: rounding where a hair and a shade blend


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_every_artefact_is_visible(artefact):
    for lesion in draw(8, seed=5):
        without, present = (lesions.render(replace(lesion, **{artefact: v}), 96).astype(int) for v in (False, True))
        assert (np.abs(present - without).max(2) > 20).mean() > 0.005


def test_captions_tell_the_truth():
    rng = np.random.default_rng(0)
    seen = {}
    for lesion in draw(40, seed=7):
        for _ in range(20):
            caption = lesions.caption(lesion, rng)
            assert lesion.label in caption
            for word, shown in (("ruler", lesion.ruler), ("hairs", lesion.hair), ("patch", lesion.patch)):
                assert shown or word not in caption
            for tone in set(lesions.SKIN_WORDS) - {lesions.SKIN_WORDS[lesion.skin_tone - 1]}:
                assert f"{tone} skin" not in caption
            seen.setdefault("artefacts" if " with" in caption and "on" in caption else "label", caption)
    assert set(seen) == {"artefacts", "label"}


def test_the_drawing_stays_light():
    for lesion in draw(50):
        document = lesions.svg(replace(lesion, **dict.fromkeys(ARTEFACTS, True)))
        drawn = sum(document.count(f"<{tag}") for tag in ("path", "circle", "rect", "g ", "radialG", "linearG"))
        assert drawn < 60 and "<filter" not in document and "<text" not in document
