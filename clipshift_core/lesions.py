"""The lesion world: skin, a lesion whose malignancy follows from four factors, and artefacts that betray it.

The label is a rule of the factors alone (`Lesion.score`), an ABCD score with the weights and thresholds of
Stolz et al. (1994), in which the diameter takes the place of the dermoscopic structures. In the training
split some artefacts go with the label (`PLANTED_SHORTCUTS`); in the test split all are independent of it; in
the reversed one they go with the other label.

One drawing is an SVG document in a 0..100 view box that shows 18 mm of skin. Everything that is random inside
it comes from (lesion.seed, the part drawn), so that adding a ruler moves no hair (`svg`, of `dermatoscope`).
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from clipshift_core.dermatoscope import part_rng, svg
from clipshift_core.scenes import article, rasterise

SPLITS = ("train", "test")  # what models and dictionaries are trained on
REVERSED = "reversed"  # for tests alone: each planted shortcut at the rates of "train", swapped between the labels
ARTEFACTS = ("ruler", "hair", "patch", "ink", "vignette")
SKIN_WORDS = ("light", "light", "medium", "medium", "dark", "dark")  # Fitzpatrick I to VI

BENIGN_BELOW, MALIGNANT_ABOVE = 4.75, 5.45  # the scores between are "suspicious"; none is sampled
MALIGNANT_FROM = 5.1  # the middle of that band, so that every set of factors has a label
DIAMETER_MM = (3.0, 13.0)


@dataclass(frozen=True)
class Shortcut:
    """A cue that goes with a label in the training split."""

    artefact: str  # one of ARTEFACTS, or "light_skin" (Fitzpatrick I or II)
    label: str  # "malignant" or "benign"
    rate_train_given_label: float  # share of the label's training images that show the cue
    rate_otherwise: float  # share of the other label's training images
    rate_test: float  # share of every test image, whatever its label


PLANTED_SHORTCUTS = (
    Shortcut("ruler", "malignant", 0.85, 0.10, 0.5),
    Shortcut("patch", "benign", 0.80, 0.05, 0.5),
    Shortcut("light_skin", "malignant", 0.80, 0.20, 0.5),
)
UNPLANTED_RATES = {"hair": 0.35, "ink": 0.20, "vignette": 0.35}  # in every split, whatever the label


@dataclass(frozen=True)
class Lesion:
    """The factors of one image; the drawing is a pure function of them."""

    seed: int  # positions of hairs, pores and blobs, phases of the border
    asymmetry: float  # 0 (round, evenly coloured) to 1
    border: float  # 0 (smooth, fading) to 1 (notched, cut off sharply)
    colours: int  # 1 to 6 colours in the lesion
    diameter_mm: float  # 3 to 13
    skin_tone: int  # Fitzpatrick 1 to 6
    ruler: bool = False
    hair: bool = False
    patch: bool = False
    ink: bool = False
    vignette: bool = False

    def __post_init__(self) -> None:
        ranges = {
            "asymmetry": (0, 1),
            "border": (0, 1),
            "colours": (1, 6),
            "diameter_mm": DIAMETER_MM,
            "skin_tone": (1, 6),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"Lesion.{name} is {getattr(self, name)}; accepted are values from {low} to {high}")

    @property
    def score(self) -> float:
        """1.3 A + 0.1 B + 0.5 C + 0.5 D with A in 0..2, B in 0..8, C in 1..6, D in 1..5 (by diameter)."""
        low, high = DIAMETER_MM
        size = 1 + 4 * (self.diameter_mm - low) / (high - low)
        return 1.3 * 2 * self.asymmetry + 0.1 * 8 * self.border + 0.5 * self.colours + 0.5 * size

    @property
    def malignant(self) -> bool:
        return self.score > MALIGNANT_FROM

    @property
    def label(self) -> str:
        return "malignant" if self.malignant else "benign"

    @property
    def light_skin(self) -> bool:
        return self.skin_tone <= 2


def sample(rng: np.random.Generator, split: str) -> Lesion:
    """One lesion: malignant half of the time, artefacts at the rates of `split`, "train", "test" or "reversed"."""
    if split not in (*SPLITS, REVERSED):
        raise ValueError(f"split is {split!r}; accepted are {', '.join((*SPLITS, REVERSED))}")
    seed = int(rng.integers(2**31))
    label = "malignant" if rng.random() < 0.5 else "benign"
    cues = {name: bool(rng.random() < rate) for name, rate in UNPLANTED_RATES.items()}
    for shortcut in PLANTED_SHORTCUTS:
        with_cue = label == shortcut.label if split == "train" else label != shortcut.label  # of "train" and "reversed"
        given = shortcut.rate_train_given_label if with_cue else shortcut.rate_otherwise
        cues[shortcut.artefact] = bool(rng.random() < (shortcut.rate_test if split == "test" else given))
    tone = int(rng.integers(1, 3) if cues.pop("light_skin") else rng.integers(3, 7))
    return Lesion(seed=seed, skin_tone=tone, **_label_factors(rng, label), **cues)


def counterfactuals(lesion: Lesion, artefact: str) -> dict[str, Lesion]:
    """The same image with and without the cue and the class it was planted on: four lesions.

    Keys: "both", "class_only", "cue_only", "neither". The class is the label of the planted shortcut
    (malignant for an artefact that is not planted); without it, the lesion has the other label's factors.
    Skin, position, seed and every other artefact stay. artefact: one of ARTEFACTS or "light_skin".
    """
    label = next((s.label for s in PLANTED_SHORTCUTS if s.artefact == artefact), "malignant")
    other = "benign" if label == "malignant" else "malignant"
    with_class, without_class = _with_label(lesion, label), _with_label(lesion, other)
    return {
        "both": _with_cue(with_class, artefact, True),
        "class_only": _with_cue(with_class, artefact, False),
        "cue_only": _with_cue(without_class, artefact, True),
        "neither": _with_cue(without_class, artefact, False),
    }


def table(lesions: Iterable[Lesion]) -> pd.DataFrame:
    """One row per lesion: every factor, `light_skin`, `score`, `malignant` and `label`."""
    derived = ("light_skin", "score", "malignant", "label")
    return pd.DataFrame([asdict(x) | {name: getattr(x, name) for name in derived} for x in lesions])


def render(lesion: Lesion, size: int) -> NDArray[np.uint8]:
    """The lesion as RGB pixels, shape (size, size, 3), uint8."""
    return rasterise(svg(lesion), size)


def caption(lesion: Lesion, rng: np.random.Generator) -> str:
    """One of several captions; some name skin and artefacts, some the lesion's look, some only the label."""
    label, tone = lesion.label, SKIN_WORDS[lesion.skin_tone - 1]
    words = dict(zip(ARTEFACTS, ("a ruler", "hairs", "a coloured patch", "ink marks", "a dark vignette"), strict=True))
    shown = [words[name] for name in ARTEFACTS if getattr(lesion, name)]
    things = " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    shape = "asymmetric" if lesion.asymmetry > 0.5 else "round"
    edge = "irregular" if lesion.border > 0.5 else "smooth"
    hues = "many colours" if lesion.colours > 3 else "few colours"
    size = "large" if lesion.diameter_mm > 8 else "small"
    with_things = f"with {things}" if things else "without artefacts"
    templates = (
        f"a {label} lesion",
        f"a photo of a {label} skin lesion",
        f"a dermatoscopic photograph of a {label} lesion on {tone} skin, {with_things}",
        f"a {label} lesion on {tone} skin",
        f"a close-up of a {size} {label} lesion on {tone} skin {with_things}",
        f"a {label} lesion, {shape}, with {article(edge)} border and {hues}",
        f"a {size} {shape} lesion with {hues} and {article(edge)} border, {label}",
        f"{tone} skin with a {label} lesion, {with_things}",
    )
    return templates[int(rng.integers(len(templates)))]


# --- factors ---


def _label_factors(rng: np.random.Generator, label: str) -> dict[str, float | int]:
    """Factors whose score lies clearly on the label's side. The labels overlap in each factor alone."""
    low, high = DIAMETER_MM
    while True:
        a, b, c, d = rng.beta(4, 2, 4) if label == "malignant" else rng.beta(2, 4, 4)
        factors = {
            "asymmetry": round(float(a), 3),
            "border": round(float(b), 3),
            "colours": 1 + int(round(5 * c)),
            "diameter_mm": round(low + (high - low) * float(d), 2),
        }
        score = Lesion(seed=0, skin_tone=1, **factors).score
        if score > MALIGNANT_ABOVE if label == "malignant" else score < BENIGN_BELOW:
            return factors


def _with_label(lesion: Lesion, label: str) -> Lesion:
    if lesion.label == label:
        return lesion
    return replace(lesion, **_label_factors(part_rng(lesion, "other label"), label))


def _with_cue(lesion: Lesion, artefact: str, present: bool) -> Lesion:
    if artefact == "light_skin":
        return lesion if lesion.light_skin == present else replace(lesion, skin_tone=2 if present else 5)
    if artefact not in ARTEFACTS:
        raise ValueError(f"artefact is {artefact!r}; accepted are {', '.join((*ARTEFACTS, 'light_skin'))}")
    return replace(lesion, **{artefact: present})
