import hashlib
import io
import json
import tarfile

import cv2
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from clipshift_core import scenes
from clipshift_core.scenes import CUE_OF, KINDS, PLANTED, WORDS

MANY = [scenes.sample(seed) for seed in range(6000)]


def test_the_world_is_as_rich_as_promised():
    assert len(KINDS) >= 24 and len(scenes.COLOURS) >= 10 and len(scenes.BACKGROUNDS) >= 6
    kinds = [planted.kind for planted in PLANTED]
    assert len(PLANTED) >= 10 and {"co-occurrence", "artefact", "polysemy", "compound", "typography"} == set(kinds)
    assert {scene.kind for scene in MANY} == set(KINDS) and {scene.relation for scene in MANY} == {
        "",
        *scenes.RELATIONS,
    }


def test_same_seed_same_pixels():
    first, again = scenes.render(scenes.sample(5), 96), scenes.render(scenes.sample(5), 96)
    assert np.array_equal(first, again) and first.shape == (96, 96, 3) and first.dtype == np.uint8
    assert not np.array_equal(first, scenes.render(scenes.sample(6), 96))


def test_pixels_are_those_that_the_models_were_trained_on():
    # The drawing of one scene of each background, as text: a change here means that the models must be trained anew.
    drawings = [next(scene for scene in MANY if scene.background == name) for name in scenes.BACKGROUNDS]
    digest = hashlib.sha256("".join(map(scenes.svg, drawings)).encode()).hexdigest()
    assert digest[:16] == "2d0a6713c691c362"


@pytest.mark.parametrize("seed", range(4))
def test_a_small_drawing_is_a_large_one_made_small(seed):
    # Antialiasing at any size: area-averaging 384 px gives what is drawn at 96 px.
    scene = scenes.sample(seed)
    small, large = scenes.render(scene, 96), scenes.render(scene, 384)
    averaged = large.reshape(96, 4, 96, 4, 3).mean(axis=(1, 3))
    assert np.abs(averaged - small).mean() < 2.0
    assert structural_similarity(averaged, small.astype(float), channel_axis=2, data_range=255) > 0.98


def test_the_named_colour_is_the_colour_of_the_thing():
    # The same scene with another colour differs where the thing is, and there the median pixel has the named colour.
    for colour in scenes.COLOURS:
        scene = scenes.Scene(3, "apple", colour, "meadow")
        other = scenes.Scene(3, "apple", "black" if colour != "black" else "white", "meadow")
        pixels = scenes.render(scene, 96).astype(int)
        where = np.abs(pixels - scenes.render(other, 96)).sum(axis=2) > 60
        median = np.median(pixels[where], axis=0)
        distance = {}
        for name, (hue, lightness, saturation) in scenes.COLOURS.items():
            hls = np.uint8([[[round(hue * 180) % 180, round(lightness * 255), round(saturation * 255)]]])
            distance[name] = np.abs(cv2.cvtColor(hls, cv2.COLOR_HLS2RGB)[0, 0] - median).sum()
        assert min(distance, key=distance.get) == colour


def test_cues_are_planted_at_their_rates():
    rates = scenes.cue_rates(scenes.table(MANY))
    # Six thousand scenes give about 200 of a word; 4 standard errors of its share are a bound that chance keeps.
    spread = 4 * np.sqrt(rates["planted"] * (1 - rates["planted"]) / rates["n"])
    assert ((rates["share"] - rates["planted"]).abs() < spread).all()
    assert (rates["elsewhere"] < 0.03).all()


def test_without_planting_a_cue_tells_nothing_of_the_word():
    factors = scenes.table([scenes.sample(seed, planted=False) for seed in range(6000)])
    rates = scenes.cue_rates(factors)
    assert (rates["share"] - rates["elsewhere"]).abs().max() < 0.08


@pytest.mark.parametrize("planted", PLANTED, ids=lambda p: f"{p.word}-{p.cue}")
def test_counterfactuals_differ_in_class_and_cue_alone(planted):
    four = scenes.counterfactuals(planted, 17)
    assert list(four) == ["both", "class", "cue", "neither"]
    assert [scene.word == planted.word for scene in four.values()] == [True, True, False, False]
    has_cue = [planted.cue in scene.cues or planted.cue == scene.companion for scene in four.values()]
    assert has_cue == [True, False, True, False]
    same = {(scene.seed, scene.colour, scene.background, scene.relation) for scene in four.values()}
    assert len(same) == 1
    # Adding the cue changes the same pixels whether or not the class is there (where the thing does not cover them).
    both, alone, cue, neither = (scenes.render(scene, 96).astype(int) for scene in four.values())
    with_class = np.abs(both - alone).sum(axis=2) > 30
    without = np.abs(cue - neither).sum(axis=2) > 30
    assert with_class.any() and (with_class & without).sum() > 0.5 * without.sum()


def test_a_caption_tells_the_truth_and_no_cue():
    cues = {cue.removeprefix("sign:").lower() for cue, _ in CUE_OF.values()} - set(WORDS)
    for scene in MANY[:1500]:
        words = scenes.caption(scene).replace(",", "").split()
        assert not cues & set(words)
        named = set(words) & set(WORDS)
        assert named <= {scene.word, KINDS.get(scene.companion, "")}
        assert set(words) & set(scenes.COLOURS) <= {scene.colour, scene.companion_colour}
    assert len({scenes.caption(MANY[0], draw) for draw in range(40)}) > 5


def test_article():
    assert [scenes.article(word) for word in ("owl", "duck", "umbrella")] == ["an owl", "a duck", "an umbrella"]


def test_a_shard_holds_what_was_drawn(tmp_path):
    drawn = MANY[:3]
    path = scenes.write_shard(drawn, tmp_path / "a.tar", size=64)
    assert path.read_bytes() == scenes.write_shard(drawn, tmp_path / "b.tar", size=64).read_bytes()
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert members["scene-0001.txt"].decode() == scenes.caption(drawn[1])
    assert json.loads(members["scene-0002.json"])["colour"] == drawn[2].colour
    decoded = cv2.cvtColor(
        cv2.imdecode(np.frombuffer(io.BytesIO(members["scene-0000.jpg"]).read(), np.uint8), 1), cv2.COLOR_BGR2RGB
    )
    assert np.abs(decoded.astype(int) - scenes.render(drawn[0], 64)).mean() < 4  # JPEG's loss
