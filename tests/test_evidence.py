"""Evidence beside findings: drawn toy pictures whose maps, places and repetitions are known by construction."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats as scipy_stats

from clipshift_core import evidence as ev
from clipshift_core.concepts import Examples

SIZE, CELL = 40, 8
"""A picture of 5 x 5 cells of 8 pixels each."""
CORNER, MIDDLE = (0, 4), (2, 2)


def picture(seed: int, *red: tuple[int, int]) -> np.ndarray:
    """Grey noise of its own, without any red, and these cells red all over."""
    noise = np.random.default_rng(seed).integers(40, 120, (SIZE, SIZE, 1))
    out = np.repeat(noise, 3, axis=2).astype(np.uint8)
    for row, col in red:
        out[row * CELL : (row + 1) * CELL, col * CELL : (col + 1) * CELL] = (220, 20, 20)
    return out


def redness(images: np.ndarray) -> torch.Tensor:
    """Latent 0: share of strongly red pixels; latent 1: share of white ones, 255 in all channels."""
    images = images.astype(int)
    red = (images[..., 0] - images[..., 1] > 150).mean((1, 2))
    return torch.from_numpy(np.stack([red, (images == 255).all(-1).mean((1, 2))], 1)).float()


# Where ------------------------------------------------------------------------------------------------------------


def test_covering_takes_what_lies_in_the_cell():
    # two of two red cells: covering either takes half of the redness, covering any other takes nothing
    lost = ev.covered([picture(0, CORNER, MIDDLE), picture(1, CORNER)], 0, redness)
    wanted = torch.zeros(2, 5, 5)
    wanted[0, 0, 4] = wanted[0, 2, 2] = 0.5
    wanted[1, 0, 4] = 1.0
    assert torch.equal(lost, wanted)


def test_covering_takes_nothing_from_a_latent_that_is_off():
    assert torch.equal(ev.covered([picture(0)], 0, redness), torch.zeros(1, 5, 5))
    assert ev.covered([], 0, redness).shape == (0, 5, 5)


def test_cells_cover_every_pixel_of_a_size_that_five_does_not_divide():
    whole = np.full((23, 23, 3), 9, np.uint8)
    whole[:12] = 200  # the mean colour is neither of the two
    views = ev._with_cells_covered(whole)
    assert views.shape == (26, 23, 23, 3) and np.array_equal(views[0], whole)
    times = (views[1:] != whole).any(-1).sum(0)
    assert np.array_equal(times, np.ones((23, 23)))


def test_the_views_are_encoded_in_batches_and_come_back_in_order(monkeypatch):
    pictures = [picture(k, (k, k)) for k in range(5)]
    whole = ev.covered(pictures, 0, redness)
    monkeypatch.setattr(ev, "BATCH", 7)
    assert torch.equal(ev.covered(pictures, 0, redness), whole)
    assert [tuple(np.unravel_index(int(m.argmax()), (5, 5))) for m in whole] == [(k, k) for k in range(5)]


def test_one_place_is_fixed_and_many_places_are_not():
    same = ev.covered([picture(k, CORNER) for k in range(4)], 0, redness)
    assert ev.fixed(same) == pytest.approx(1)
    # maps with one cell of 25 each: two of them correlate by (0 - 1/25^2) / (1/25 - 1/25^2) = -1/24
    apart = ev.covered([picture(k, (k, k)) for k in range(4)], 0, redness)
    assert ev.fixed(apart) == pytest.approx(-1 / 24)


def test_fixed_is_the_mean_correlation_of_two_maps():
    maps = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 5, 5)))
    r = [scipy_stats.pearsonr(maps[a].ravel(), maps[b].ravel())[0] for a in range(5) for b in range(a)]
    assert ev.fixed(maps) == pytest.approx(np.mean(r))
    # a map that does not vary has no correlation and is left out
    assert ev.fixed(torch.cat([maps, torch.full((1, 5, 5), 0.3)])) == pytest.approx(np.mean(r))
    assert np.isnan(ev.fixed(maps[:1])) and np.isnan(ev.fixed(maps[:0]))


def test_border_is_the_share_of_the_loss_in_outer_cells():
    corner, both = [picture(0, CORNER)], [picture(1, CORNER, MIDDLE)]
    assert ev.border(ev.covered(corner, 0, redness)) == 1
    assert ev.border(ev.covered(both, 0, redness)) == 0.5
    assert ev.border(ev.covered([*corner, *both], 0, redness)) == 0.75  # mean over images
    assert ev.border(ev.covered([picture(2, MIDDLE)], 0, redness)) == 0
    assert ev.border(torch.ones(3, 5, 5)) == pytest.approx(ev.by_chance()) == 16 / 25
    gains = torch.zeros(1, 5, 5)
    gains[0, 2, 2], gains[0, 0, 0] = 0.4, -5.0  # a cell that brings more counts as 0
    assert ev.border(gains) == 0
    assert np.isnan(ev.border(torch.zeros(2, 5, 5))) and np.isnan(ev.border(torch.empty(0, 5, 5)))


# Repetition -------------------------------------------------------------------------------------------------------


def stamped(seed: int, pattern: np.ndarray | None = None) -> np.ndarray:
    """Noise of its own with a patch in the corner: the same one, or where none is given one of its own."""
    out = picture(seed)
    own = np.random.default_rng(1000 + seed).integers(0, 255, (CELL, CELL, 3))
    out[:CELL, -CELL:] = own if pattern is None else pattern
    return out


def test_a_stamp_repeats_and_a_thing_of_its_own_does_not():
    maps = torch.zeros(1, 5, 5)
    maps[0, 0, 4] = 0.8
    pattern = np.random.default_rng(7).integers(0, 255, (CELL, CELL, 3))
    assert ev.repeats([stamped(k, pattern) for k in range(6)], maps) == pytest.approx(1)
    assert abs(ev.repeats([stamped(k) for k in range(6)], maps)) < 0.1
    # a third of the loss on the stamp, two thirds on noise that is every picture's own
    maps[0, 2, 2] = 1.6
    assert ev.repeats([stamped(k, pattern) for k in range(6)], maps) == pytest.approx(1 / 3, abs=0.06)


def test_repeats_is_a_mean_correlation_of_pixels_less_their_channel_means():
    pictures = [stamped(k, np.random.default_rng(7).integers(0, 255, (CELL, CELL, 3)) // (1 + k)) for k in range(3)]
    maps = torch.zeros(2, 5, 5)
    maps[:, 0, 4], maps[0, 1, 1] = 0.5, 0.25  # weights 0.5 and 0.125 by the mean over images
    means = []
    for row, col in ((0, 4), (1, 1)):
        cells = [p[row * CELL :, col * CELL :][:CELL, :CELL].astype(float) for p in pictures]
        flat = [(c - c.mean((0, 1))).ravel() for c in cells]
        means.append(
            np.mean(
                [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(flat, flat[1:] + flat[:1], strict=True)]
            )
        )
    assert ev.repeats(pictures, maps) == pytest.approx((0.5 * means[0] + 0.125 * means[1]) / 0.625)


def test_a_cell_that_brings_more_in_one_image_takes_no_weight_from_its_loss_in_another():
    pattern = np.random.default_rng(7).integers(0, 255, (CELL, CELL, 3))
    pictures = [stamped(k, pattern) for k in range(2)]
    maps = torch.zeros(2, 5, 5)
    maps[0, 0, 4], maps[0, 2, 2], maps[1, 2, 2] = 0.4, 0.4, -0.4
    # the noise in the middle keeps its loss in the first image: as much weight as the stamp
    assert ev.repeats(pictures, maps) == pytest.approx(0.5, abs=0.15)


def test_repeats_is_unknown_without_two_images_or_without_a_loss():
    maps = torch.ones(1, 5, 5)
    assert np.isnan(ev.repeats([picture(0)], maps))
    assert np.isnan(ev.repeats([picture(0), picture(1)], -maps))
    plain = np.full((SIZE, SIZE, 3), 90, np.uint8)  # nothing in it that could repeat
    assert ev.repeats([plain, plain], maps) == 0


# Strength and groups ----------------------------------------------------------------------------------------------


def examples(*values: list[float]) -> Examples:
    value = torch.tensor(values)
    image = torch.where(value > 0, torch.arange(value.shape[1]), -1)
    return Examples(image, value, torch.ones(len(value)), torch.ones(len(value)), 100)


def test_presence_compares_with_the_best_examples():
    best = ev.best_activation(examples([4.0, 2.0, 3.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]))
    assert best[:2].tolist() == [3, 5] and best[2].isnan()
    # on in two of three images with 1 and 2, mean 1.5, over a best of 3
    assert ev.presence(torch.tensor([1.0, 0.0, 2.0]), 3.0) == pytest.approx(0.5)
    assert np.isnan(ev.presence(torch.zeros(3), 3.0))


def test_only_the_first_examples_count():
    best = ev.best_activation(examples([2.0] * ev.SHOWN + [1.0] * 30))
    assert best.tolist() == [2]


def test_split_is_one_by_chance_and_large_for_two_groups():
    rng = np.random.default_rng(0)
    cloud = torch.from_numpy(rng.normal(size=(60, 8)) + 3)
    on = torch.arange(60) < 24
    assert 0.5 < ev.split(cloud, on) < 2
    moved = cloud.clone()
    moved[on] += torch.tensor([6.0, 0, 0, 0, 0, 0, 0, 0])
    assert ev.split(moved, on) > 5


def test_split_is_the_distance_of_means_over_that_of_random_groups():
    # two unit vectors at a right angle, each twice: apart as groups 1 - cos 90 = 1. Every other choice of two of four
    # mixes both, with means alike: 1 - 1 = 0, so that the mean over draws is the share of draws that hit the split.
    e = torch.eye(2).repeat_interleave(2, 0)
    on = torch.tensor([True, True, False, False])
    generator = torch.Generator().manual_seed(3)
    hits = [on[torch.randperm(4, generator=generator)].tolist() for _ in range(ev.N_DRAWS)]
    share = np.mean([h in ([True, True, False, False], [False, False, True, True]) for h in hits])
    assert ev.split(e, on, seed=3) == pytest.approx(1 / share)


def test_split_needs_two_images_on_either_side():
    e = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert np.isnan(ev.split(e, torch.arange(5) < 1)) and np.isnan(ev.split(e, torch.arange(5) < 4))
    assert np.isfinite(ev.split(e, torch.arange(5) < 2))


# Words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, label, shared",
    [
        ("star", "starfish", "star"),
        ("starfish", "fish", "fish"),
        ("cat", "Egyptian cat", "cat"),
        ("cabbage butterfly", "butterfly", "butterfly"),
        ("ice-cream", "cream", "cream"),
        ("bat", "hat", ""),
        ("ox", "fox", ""),  # two letters
        ("duck", "leaf", ""),
        ("duck", None, ""),
        ("nan", np.nan, ""),
        ("duck", "duck", "duck"),
    ],
)
def test_shared_text(word, label, shared):
    assert ev.shared_text(word, label) == shared


@pytest.mark.parametrize("word, size", [("cup", 64), ("fish", 64), ("houseboat", 64), ("a long name of a moth", 224)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_words_are_written_within_the_picture(word, size, place):
    ground = np.full((size, size, 3), 100, np.uint8)
    out = ev.with_word(ground, word, place)
    changed = (out != ground).any(-1)
    rows, cols = np.nonzero(changed)
    assert (ground == 100).all() and rows.min() >= 0 and rows.max() < size
    assert cols.min() >= 2 and cols.max() <= size - 3  # nothing is cut off at the sides
    board = out[changed]
    assert (board > 240).all(1).any() and (board < 90).all(1).any()
    middle = (rows.min() + rows.max()) / 2 / size
    assert np.ptp(rows) < 0.34 * size and abs(middle - (0.17, 0.5, 0.83)[place]) < 0.12


def test_the_word_itself_must_bring_the_latent():
    """A toy encoder that reads: latent 0 is how much black ink there is, latent 1 the same for any word."""
    words, classes = ["i", "mmmm", "llll", "tree"], torch.tensor([0, 1, 2, 3] * 6)
    grounds = [np.full((64, 64, 3), 120, np.uint8)] * 24

    def see(images):
        ink = (images < 60).all(-1).any((1, 2))
        wide = (images == 255).all(-1).any(1).sum(1)  # columns that the board covers
        return torch.from_numpy(np.stack([wide * 1.0, ink * 1.0], 1)).float()

    findings = pd.DataFrame({"word": ["i", "mmmm", "mmmm"], "latent": [0, 0, 1]})
    found = ev.written(findings, words, classes, grounds.__getitem__, see)
    chosen = [grounds[0]] * 3
    width = {w: float(see(np.stack([ev.with_word(p, w, k) for k, p in enumerate(chosen)]))[:, 0].mean()) for w in words}
    others = (width["i"] + width["llll"] + width["tree"]) / 3
    assert found[1] == pytest.approx(width["mmmm"] - others)
    assert found[0] < 0 < found[1] and found[2] == 0  # "i" is the narrowest board; any word brings ink


def test_images_of_the_class_itself_are_no_ground_for_its_word():
    words, classes = ["red", "blue"], torch.tensor([0, 1] * 6)
    grounds = [picture(k, MIDDLE) if k % 2 == 0 else picture(k) for k in range(12)]

    def see(images):  # reacts to any word, but on red images alone
        white = (images == 255).all(-1).any((1, 2))
        return torch.from_numpy((white * (redness(images)[:, 0].numpy() > 0) * images[:, 20, 20, 1])[:, None]).float()

    findings = pd.DataFrame({"word": ["red"], "latent": [0]})
    assert ev.written(findings, words, classes, grounds.__getitem__, see).tolist() == [0]
    one = ev.written(findings, ["red"], torch.zeros(12).long(), grounds.__getitem__, see)
    assert one.isnan().all()


# The rule ---------------------------------------------------------------------------------------------------------

PLAIN = {
    "word": "snail", "label": "below", "share_on": 0.95, "presence": 0.9, "reads": 0.0, "fixed": 0.1, "border": 0.3,
    "repeats": 0.0, "shared_text": "", "split": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, kind, because",
    [
        ({}, "other", "on the thing itself: border 0.30"),
        ({"presence": 0.4, "border": 0.9, "repeats": 0.9}, "other", "presence 0.40"),
        ({"border": 0.7}, "co-occurrence", "border 0.70"),
        ({"border": 0.7, "repeats": 0.4}, "artefact", "repeats 0.40"),
        ({"share_on": 0.5, "split": 2.0}, "polysemy", "in 50%, unlike the rest: split 2.0"),
        ({"share_on": 0.9, "split": 2.0}, "other", "border 0.30"),
        ({"share_on": 0.5, "split": 1.1}, "other", "border 0.30"),
        ({"share_on": 0.5, "split": 2.0, "border": 0.6}, "co-occurrence", "border 0.60"),
        ({"shared_text": "snail", "label": "sea snail", "repeats": 0.4}, "compound", "“snail”"),
        ({"shared_text": "snail", "label": "snail", "border": 0.7}, "co-occurrence", "border 0.70"),
        ({"reads": 0.5, "shared_text": "snail", "label": "sea snail"}, "typography", "reads 0.50"),
    ],
)
def test_kinds_by_hand(change, kind, because):
    found = ev.judge(PLAIN | change)
    assert found.kind == kind in ev.KINDS and because in found.because


@pytest.mark.parametrize("name", ["presence", "reads", "fixed", "border", "repeats", "split", "share_on"])
def test_what_is_unknown_decides_nothing(name):
    found = ev.judge(PLAIN | {name: np.nan})
    assert found.kind == "other" and "nan" not in found.because


# The whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy() -> dict:
    """Two classes of twelve: "mark" always has the same red corner, "thing" a red cell in the middle at half strength.

    Latent 0 is redness; it stands for a whole red cell, 1/25 of a picture.
    """
    pictures = [picture(k, CORNER) for k in range(12)]
    for k in range(12, 24):
        half = picture(k)
        if k % 2:
            half[2 * CELL : 2 * CELL + 4, 2 * CELL : 3 * CELL] = (220, 20, 20)
        pictures.append(half)
    activations = redness(np.stack(pictures))[:, :1]
    return {
        "words": ["mark", "thing"],
        "examples": examples([1 / 25] * 5, [0.5] * 5),
        "labels": pd.Series(["a red patch", "paper"], index=[0, 1]),
        "latents": torch.zeros(24, 1).long(),
        "activations": activations,
        "contributions": activations * torch.linspace(1, 2, 24)[:, None],
        "classes": torch.arange(24) // 12,
        "embeddings": torch.randn(24, 4, generator=torch.Generator().manual_seed(0)),
        "read": pictures.__getitem__,
        "see": redness,
    }


FINDINGS = pd.DataFrame(
    {"word": ["mark", "thing"], "latent": [0, 0], "n": [12, 12], "n_on": [12, 6], "attribution": [0.3, 0.1]},
    index=[7, 4],
)


def test_evidence_of_a_toy_world(toy):
    found = ev.evidence(FINDINGS, **toy)
    assert list(found.table) == [*FINDINGS, "label", *ev.SEEN, "kind", "because"]
    mark, thing = (row for _, row in found.table.iterrows())
    assert (mark["share_on"], thing["share_on"]) == (1, 0.5)
    assert (mark["presence"], thing["presence"]) == (pytest.approx(1), pytest.approx(0.5))
    assert (mark["border"], thing["border"]) == (1, 0)
    assert (mark["fixed"], thing["fixed"]) == (pytest.approx(1), pytest.approx(1))
    # a written word adds no red; at most it covers some, and one board more than another
    assert max(abs(mark["reads"]), abs(thing["reads"])) < 0.1 and mark["label"] == "a red patch"
    # the corner is red all over: it has no pixels that differ from its mean, so that nothing there repeats
    assert mark["repeats"] == 0 and (mark["kind"], thing["kind"]) == ("co-occurrence", "other")
    # the largest contributions first: the weights rise with the image's number, and even ones of "thing" are off
    assert found.images.tolist() == [[11, 10, 9, 8, 7, 6], [23, 21, 19, 17, 15, 13]]
    assert found.maps.shape == (2, 6, 5, 5) and (found.maps[0, :, 0, 4] == 1).all()


def test_evidence_keeps_to_the_first_findings_and_to_images_that_are_there(toy):
    one = ev.evidence(FINDINGS, **toy, most=1)
    assert list(one.table["word"]) == ["mark"] and one.maps.shape[0] == 1
    few = toy | {"contributions": torch.where(torch.arange(24)[:, None] < 2, toy["contributions"], 0.0)}
    found = ev.evidence(FINDINGS, **few)
    assert found.images[0].tolist() == [1, 0, -1, -1, -1, -1] and found.images[1].eq(-1).all()
    assert found.maps[0, 2:].isnan().all() and found.maps[0, :2].isfinite().all()
    assert found.table["border"].isna().tolist() == [False, True]
    assert len(ev.evidence(FINDINGS[:0], **toy).table) == 0


def test_a_stamp_in_the_corner_is_an_artefact(toy):
    def read(k):
        out = picture(k, CORNER)
        out[:4, -4:] = (255, 10, 10)  # a lighter quarter of it: now there are pixels to repeat
        return out

    found = ev.evidence(FINDINGS[:1], **toy | {"read": read}).table.iloc[0]
    assert found["repeats"] == pytest.approx(1) and found["kind"] == "artefact"
