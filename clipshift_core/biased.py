"""Splits of the embedded world in which a cue tells the word more or less often: what a probe is trained and tried on.

An image shows one thing, of the words that have a visual cue planted on them (`scenes.CUE_OF`), and exactly one of
those words' cues: its own with probability `strength`, else one of the others, all as likely. Words take turns, so
that as many images show each; drawing, colour and background are drawn freely. Nothing but the cue depends on the
strength, and whether it is the own one is a threshold on one uniform number of the seed: an image whose own cue shows
at one strength shows it at every higher one. So a seed has two pictures whatever the strengths, and `distinct` has
each drawn once.

A test thing is tried three ways: "aligned" (its own cue, always), "balanced" (any cue, all as likely) and "reversed"
(always the cue of the word that comes next), so that accuracies are compared on the same things.
"""

from collections.abc import Hashable, Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from clipshift_core import scenes
from clipshift_core.scenes import CUE_OF, HELD_OUT, KINDS, PLANTED, Scene

WORDS: tuple[str, ...] = tuple(CUE_OF)
"""The words with a visual cue, in the world's order: the classes of these splits."""
BALANCED = 1 / len(WORDS)
"""The strength at which the cue says nothing of the word."""
STRENGTHS = (BALANCED, 0.5, 0.9, 1.0)
SPLITS = ("aligned", "balanced", "reversed")
FIRST_TO_TRAIN, FIRST_TO_VALIDATE, FIRST_TO_TEST, FIRST_PLAIN = (HELD_OUT + 1_000_000 + 20_000 * i for i in range(4))
"""First seeds of each part, of scenes that nothing else is trained or tried on. Sizes and the probes' grid were settled
in a first look at other seeds, from HELD_OUT + 900,000 on."""
N_TRAIN, N_VALIDATE, N_TEST = 440, 165, 330
"""Images of each strength that a probe is trained on and chosen by, and things that it is tried on: 40, 15 and 30 of a
word. So many things bound a difference of two losses to about 2 points; with four strengths there are some 2,100
distinct pictures."""
AMBIGUOUS: frozenset[str] = frozenset(
    word for p in PLANTED if p.kind in ("polysemy", "compound") for word in (p.word, KINDS[p.cue])
)
"""Words with two drawings, words within another word, and those other words."""


def draw(n: int, *, strength: float, first_seed: int) -> list[Scene]:
    """The scenes of seeds first_seed to first_seed + n - 1; strength: the probability of the own cue, 0 to 1.

    Equally many of each word where n is a multiple of their number. Raises ValueError for a strength outside 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength = {strength}; a probability from 0 to 1 is accepted")
    return [_scene(seed, strength) for seed in range(first_seed, first_seed + n)]


def trials(n: int, *, first_seed: int = FIRST_TO_TEST) -> dict[str, list[Scene]]:
    """The same n things in each of `SPLITS`."""
    aligned = draw(n, strength=1.0, first_seed=first_seed)
    following = dict(zip(WORDS, (*WORDS[1:], WORDS[0]), strict=True))
    return {
        "aligned": aligned,
        "balanced": draw(n, strength=BALANCED, first_seed=first_seed),
        "reversed": [replace(scene, cues=(CUE_OF[following[scene.word]][0],)) for scene in aligned],
    }


def plain(n: int, *, first_seed: int = FIRST_PLAIN) -> list[Scene]:
    """Single things of all words of the world, which take turns, without any cue: for what ambiguous words cost."""
    return [_thing(seed, scenes.WORDS) for seed in range(first_seed, first_seed + n)]


def distinct(
    splits: Mapping[Hashable, list[Scene]],
) -> tuple[list[Scene], dict[Hashable, Int[NDArray, " image"]]]:
    """Every scene of some splits once, in order of first appearance, and for each split which of these it holds.

    What is measured once of each distinct scene, such as its embedding, is a split's when indexed with the second.
    """
    number: dict[Scene, int] = {}
    index = {
        name: np.array([number.setdefault(scene, len(number)) for scene in split], dtype=np.int64)
        for name, split in splits.items()
    }
    return list(number), index


def _scene(seed: int, strength: float) -> Scene:
    scene = _thing(seed, WORDS)
    shows_own = np.random.default_rng([seed, *b"own cue"]).random() < strength
    others = [word for word in WORDS if word != scene.word]
    other = others[np.random.default_rng([seed, *b"other cue"]).integers(len(others))]
    return replace(scene, cues=(CUE_OF[scene.word if shows_own else other][0],))


def _thing(seed: int, words: tuple[str, ...]) -> Scene:
    """The words in turn; the drawing, colour and background as in `scenes.sample`."""
    rng = np.random.default_rng([seed, *b"thing"])
    word = words[seed % len(words)]
    kinds = [kind for kind, name in KINDS.items() if name == word]
    kind, colour, background = (
        options[rng.integers(len(options))] for options in (kinds, list(scenes.COLOURS), list(scenes.BACKGROUNDS))
    )
    return Scene(seed, kind, colour, background)
