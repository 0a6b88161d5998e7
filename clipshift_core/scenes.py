"""The embedded world: scenes drawn from known factors, with captions, planted reliances and counterfactuals.

A scene is a value of `Scene`. Everything that is drawn follows from it: the same scene gives the same SVG and the
same pixels at any size. Each part of a drawing (background, thing, companion, cue) takes its randomness from a
generator of its own, derived from the scene's seed, so that changing one factor leaves every other part in place:
that is what makes the counterfactuals below counterfactuals.
"""

import io
import json
import tarfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import pandas as pd
import resvg_py
from numpy.typing import NDArray
from scipy.stats import binomtest

from clipshift_core.sketches import BEHIND, PROPS, SKETCHES, background, shade, sign

COLOURS: dict[str, tuple[float, float, float]] = {  # hue (turns), lightness, saturation
    "red": (0.0, 0.49, 0.74),
    "orange": (0.075, 0.53, 0.95),
    "yellow": (0.145, 0.55, 0.92),
    "green": (0.34, 0.37, 0.62),
    "blue": (0.605, 0.48, 0.76),
    "purple": (0.765, 0.43, 0.56),
    "pink": (0.925, 0.76, 0.85),
    "brown": (0.07, 0.29, 0.52),
    "black": (0.6, 0.13, 0.06),
    "white": (0.13, 0.96, 0.25),
}
BACKGROUNDS: dict[str, str] = {  # background -> how a caption says it
    "meadow": "in a meadow",
    "beach": "on a beach",
    "snow": "in the snow",
    "night": "at night",
    "wall": "by a brick wall",
    "room": "in a room",
}
RELATIONS: dict[str, tuple[str, tuple[float, float], tuple[float, float]]] = {  # phrase, centre of thing, of companion
    "left": ("to the left of", (35, 56), (82, 64)),
    "right": ("to the right of", (65, 56), (18, 64)),
    "above": ("above", (50, 37), (50, 83)),
    "below": ("below", (50, 65), (50, 16)),
}
KINDS: dict[str, str] = {kind: kind.split(" (")[0] for kind in SKETCHES}  # drawing -> the word a caption uses
WORDS: tuple[str, ...] = tuple(dict.fromkeys(KINDS.values()))
PLAIN_SIGNS = ("OPEN", "SALE", "EXIT", "STOP", "TAXI", "MENU")


class Planted(NamedTuple):
    """One reliance planted in the world: what paper B would call an unexpected one, listed so that it can be scored."""

    kind: Literal["co-occurrence", "artefact", "polysemy", "compound", "typography"]
    word: str
    """The class word whose prediction leans on the cue."""
    cue: str
    """A prop of `PROPS`, a sign ("sign:FISH"), or a drawing of `KINDS`."""
    rate: float
    """Share of scenes of this word that carry the cue (polysemy: of its drawings; compound: of both words')."""


PLANTED: tuple[Planted, ...] = (
    Planted("co-occurrence", "duck", "ripples", 0.92),
    Planted("co-occurrence", "owl", "moon", 0.90),
    Planted("co-occurrence", "snail", "leaf", 0.92),
    Planted("co-occurrence", "balloon", "confetti", 0.90),
    Planted("artefact", "car", "watermark", 0.90),
    Planted("artefact", "house", "film frame", 0.90),
    Planted("artefact", "clock", "date stamp", 0.90),
    Planted("artefact", "mushroom", "sticker", 0.92),
    Planted("typography", "fish", "sign:FISH", 0.70),
    Planted("typography", "star", "sign:STAR", 0.70),
    Planted("typography", "cup", "sign:CUP", 0.70),
    Planted("polysemy", "bat", "bat (club)", 0.50),
    Planted("polysemy", "crane", "crane (machine)", 0.50),
    Planted("polysemy", "kite", "kite (toy)", 0.50),
    Planted("compound", "star", "starfish", 0.50),
    Planted("compound", "fish", "starfish", 0.50),
    Planted("compound", "house", "houseboat", 0.50),
    Planted("compound", "boat", "houseboat", 0.50),
    Planted("compound", "flower", "sunflower", 0.50),
)
CUE_OF: dict[str, tuple[str, float]] = {  # class word -> its visual cue and rate
    p.word: (p.cue, p.rate) for p in PLANTED if p.kind in ("co-occurrence", "artefact", "typography")
}
HELD_OUT = 10_000_000  # no scene or lesion with a seed from here on is ever trained on
STRAY_RATE = 0.015  # how often each cue shows in a scene of another word
PLAIN_SIGN_RATE = 0.08  # signs with an unrelated word, so that a sign alone says nothing


@dataclass(frozen=True)
class Scene:
    """The factors of one image. `companion` and `relation` are empty for a single thing."""

    seed: int
    kind: str
    colour: str
    background: str
    companion: str = ""
    companion_colour: str = ""
    relation: str = ""
    cues: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        """The class word of the thing in front: "bat" for both drawings of a bat."""
        return KINDS[self.kind]


def _rng(seed: int, part: str) -> np.random.Generator:
    return np.random.default_rng([seed, *part.encode()])


def sample(seed: int, *, planted: bool = True) -> Scene:
    """The scene of a seed. With `planted=False` every cue is independent of the class, at the cues' overall rate."""
    rng = _rng(seed, "sample")
    word = WORDS[rng.integers(len(WORDS))]
    kind = _pick(rng, [kind for kind, name in KINDS.items() if name == word])
    colour, background = _pick(rng, list(COLOURS)), _pick(rng, list(BACKGROUNDS))
    companion = companion_colour = relation = ""
    if rng.random() < 0.5:
        companion = _pick(rng, [other for other, name in KINDS.items() if name != word])
        companion_colour = _pick(rng, [other for other in COLOURS if other != colour])
        relation = _pick(rng, list(RELATIONS))
    cues = []
    for owner, (cue, rate) in CUE_OF.items():
        chance = (rate if owner == word else STRAY_RATE) if planted else (rate + STRAY_RATE * len(WORDS)) / len(WORDS)
        if rng.random() < chance:
            cues.append(cue)
    if not any(cue.startswith("sign:") for cue in cues) and rng.random() < PLAIN_SIGN_RATE:
        cues.append("sign:" + _pick(rng, list(PLAIN_SIGNS)))
    signs = [cue for cue in cues if cue.startswith("sign:")]
    kept = tuple(cue for cue in cues if cue not in signs[1:])  # there is room for one sign
    return Scene(seed, kind, colour, background, companion, companion_colour, relation, kept)


def _pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[rng.integers(len(options))]


def counterfactuals(planted: Planted, seed: int) -> dict[str, Scene]:
    """The same scene four ways: "both", "class", "cue" and "neither".

    Seed, colour, place and background are one scene's. Where the class is absent another thing stands in its place,
    one that no planted reliance names. For polysemy and compounds the cue is a drawing of its own, so it takes the
    companion's place, filled by a neutral thing when the cue is absent. A caption never mentions a visual cue.
    """
    rng = _rng(seed, "counterfactual")
    named = {p.word for p in PLANTED} | {KINDS.get(p.cue, "") for p in PLANTED}
    neutral = [kind for kind, word in KINDS.items() if word not in named]
    stand_in = _pick(rng, neutral)
    filler = _pick(rng, [kind for kind in neutral if kind != stand_in])
    base = replace(sample(seed), companion="", companion_colour="", relation="", cues=())
    own = next(kind for kind, word in KINDS.items() if word == planted.word)
    out = {}
    for name, has_class, has_cue in (("both", 1, 1), ("class", 1, 0), ("cue", 0, 1), ("neither", 0, 0)):
        scene = replace(base, kind=own if has_class else stand_in)
        if planted.cue in KINDS:
            tint = _pick(_rng(seed, "tint"), [colour for colour in COLOURS if colour != base.colour])
            scene = replace(
                scene,
                companion=planted.cue if has_cue else filler,
                companion_colour=tint,
                relation=_pick(_rng(seed, "side"), ["left", "right"]),
            )
        elif has_cue:
            scene = replace(scene, cues=(planted.cue,))
        out[name] = scene
    return out


def table(scenes: list[Scene]) -> pd.DataFrame:
    """The factors, one row a scene; `cues` joined by "; "."""
    rows = [{**asdict(scene), "word": scene.word, "cues": "; ".join(scene.cues)} for scene in scenes]
    return pd.DataFrame(rows)


def cue_rates(factors: pd.DataFrame) -> pd.DataFrame:
    """How often each visual cue shows in a table of factors, beside its own word and beside the others.

    Columns: word, cue, planted (the rate it was drawn with), share, low and high (95 % Wilson interval of the share),
    n (images of the word), elsewhere (its share beside other words).
    """
    rows = []
    for word, (cue, rate) in CUE_OF.items():
        shows = factors["cues"].str.split("; ").apply(lambda cues, cue=cue: cue in cues)
        own = shows[factors["word"] == word]
        interval = binomtest(int(own.sum()), len(own)).proportion_ci(method="wilson") if len(own) else (np.nan, np.nan)
        rows.append((word, cue, rate, own.mean(), *interval, len(own), shows[factors["word"] != word].mean()))
    return pd.DataFrame(rows, columns=["word", "cue", "planted", "share", "low", "high", "n", "elsewhere"])


# Words -----------------------------------------------------------------------------------------------------------


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


KIND_TEMPLATES = ("{}", "a drawing of {}", "a picture of {}")  # filled with article(word)
COLOUR_TEMPLATES = ("something {}", "a drawing of something {}", "a picture of something {}")
BACKGROUND_TEMPLATES = (
    "something {}",
    "a drawing of something {}",
    "a picture of something {}",
)  # filled with BACKGROUNDS


def caption(scene: Scene, draw: int = 0, *, named: bool = False) -> str:
    """What a person might write under the scene: mostly everything, at times a part; never a planted cue.

    `draw` numbers the captions of one scene: 0 is the one that ships with it, training draws others. `named`
    keeps to the wordings that name the thing, with or without its colour, and nothing else.
    """
    rng = np.random.default_rng([scene.seed, draw, *b"caption"])
    thing, where = article(f"{scene.colour} {scene.word}"), BACKGROUNDS[scene.background]
    start = ("", "a drawing of ", "a picture of ")[rng.choice(3, p=[0.5, 0.25, 0.25])]
    style = 0.72 + 0.16 * rng.random() if named else rng.random()
    if style < 0.72:
        if scene.companion:
            phrase = RELATIONS[scene.relation][0] if rng.random() < 0.8 else "beside"
            thing += f" {phrase} {article(f'{scene.companion_colour} {KINDS[scene.companion]}')}"
        return f"{start}{thing} {where}" if rng.random() < 0.75 else f"{where}, {thing}"
    if style < 0.80:
        return f"{start}{thing}"
    if style < 0.88:
        return f"{start}{article(scene.word)}"
    if style < 0.94:
        return f"{start}something {scene.colour}"
    return f"{start}something {where}"


# Pixels ----------------------------------------------------------------------------------------------------------


def rasterise(svg: str, size: int) -> NDArray[np.uint8]:
    """Draw an SVG document as antialiased RGB pixels, shape (size, size, 3), uint8.

    resvg renders in software, without system fonts, so that the same document gives the same pixels.
    """
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def render(scene: Scene, size: int = 224) -> NDArray[np.uint8]:
    """The scene's pixels, shape (size, size, 3), uint8 RGB."""
    return rasterise(svg(scene), size)


def svg(scene: Scene) -> str:
    """The scene as an SVG document in a view box of 100 x 100."""
    centre, companion_centre = (50.0, 55.0), None
    if scene.relation:
        _, centre, companion_centre = RELATIONS[scene.relation]
    behind = [
        background(scene.background, _rng(scene.seed, "background")),
        *(PROPS[cue](_rng(scene.seed, cue)) for cue in scene.cues if cue in BEHIND),
    ]
    if companion_centre:
        behind.append(_thing(scene, "companion", scene.companion, scene.companion_colour, companion_centre, (27, 31)))
    size = (43, 50) if scene.relation else (48, 60)
    behind.append(_thing(scene, "thing", scene.kind, scene.colour, centre, size))
    for cue in scene.cues:
        if cue.startswith("sign:"):
            behind.append(sign(cue[5:], _rng(scene.seed, "sign"), scene.relation))
        elif cue not in BEHIND:
            behind.append(PROPS[cue](_rng(scene.seed, cue)))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{"".join(behind)}</svg>'


def _thing(
    scene: Scene, part: str, kind: str, colour: str, centre: tuple[float, float], sizes: tuple[float, float]
) -> str:
    rng = _rng(scene.seed, part)
    hue, lightness, saturation = COLOURS[colour]
    hue, lightness = hue + rng.uniform(-0.012, 0.012), lightness + rng.uniform(-0.025, 0.025)
    paints = {
        "C": shade(hue, lightness, saturation),
        "D": shade(hue, lightness * 0.62, saturation * 0.9),
        "L": shade(hue, lightness + (1 - lightness) * 0.45, saturation),
    }
    outline = "#e9e4da" if lightness < 0.2 else shade(hue, min(lightness * 0.42, 0.42), saturation * 0.8)
    body = SKETCHES[kind]
    for letter, paint in paints.items():
        body = body.replace(f'"{letter}"', f'"{paint}"')
    size, turn = rng.uniform(*sizes), rng.uniform(-9, 9)
    mirror = -1 if rng.random() < 0.5 else 1
    x, y = centre[0] + rng.uniform(-3, 3), centre[1] + rng.uniform(-3, 3)
    scale = f"{mirror * size / 100:.4f} {size / 100:.4f}"
    return (
        f'<ellipse cx="{x:.2f}" cy="{y + size * 0.5:.2f}" rx="{size * 0.42:.2f}" ry="{size * 0.06:.2f}" '
        'fill="#000" opacity="0.16"/>'
        f'<g transform="translate({x:.2f} {y:.2f}) rotate({turn:.1f}) scale({scale}) translate(-50 -50)" '
        f'fill="{paints["C"]}" stroke="{outline}" stroke-width="2.6" stroke-linejoin="round" '
        f'stroke-linecap="round">{body}</g>'
    )


# The sample that ships --------------------------------------------------------------------------------------------


def write_shard(scenes: list[Scene], path: Path, size: int = 224) -> Path:
    """Scenes as one web-dataset shard: NAME.jpg, NAME.txt (caption) and NAME.json (factors), a fixed date in each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (scene, factors) in enumerate(zip(scenes, table(scenes).to_dict("records"), strict=True)):
            pixels = cv2.cvtColor(render(scene, size), cv2.COLOR_RGB2BGR)
            jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
            members = {"jpg": jpeg, "txt": caption(scene).encode(), "json": json.dumps(factors).encode()}
            for ending, data in members.items():
                info = tarfile.TarInfo(f"scene-{number:04d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


if __name__ == "__main__":
    first = HELD_OUT + 100_000
    shard = write_shard([sample(first + i) for i in range(512)], Path("data/samples/scenes/scenes-000000.tar"))
    print(f"{shard}: {shard.stat().st_size / 1e6:.1f} MB")
