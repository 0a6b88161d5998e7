"""How the lesion world is drawn: skin, lesion and artefacts as one SVG document, 18 mm wide.

Each part draws its positions and shapes from a generator of its own, given by (lesion.seed, part). Parts are kept
to few elements and no filter, because a training set needs tens of thousands of drawings.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from clipshift_core.lesions import Lesion

UNITS_PER_MM = 100 / 18  # of the 0..100 view box

# Fitzpatrick I to VI: skin, its shaded side, its pores and lines
SKIN = (
    ("#f8dfd2", "#edc5b3", "#d79f8a"),
    ("#f1cfb8", "#e2b296", "#c98f70"),
    ("#e0b48f", "#cd9a72", "#ad7650"),
    ("#c4935f", "#ad7a49", "#8a5a32"),
    ("#96643d", "#7d4f2d", "#5c371d"),
    ("#643f29", "#4f2f1e", "#341c10"),
)
# the lesion's own brown, then the colours that variegation adds, in the order in which they appear
BASE_BROWN = ("#a9744a", "#9f6a42", "#8f5a35", "#744425", "#4c2a16", "#2c160b")  # per skin tone
ADDED_COLOURS = ("#4a2814", "#1c1210", "#a8434a", "#71839f", "#eadcd3")  # brown, black, red, grey-blue, white
PATCH_COLOURS = ("#2f6fb5", "#2f9e68", "#e8b62c", "#e4763a", "#c74a86")
HAIR_COLOURS = ("#7a5a3a", "#5a3a20", "#3a2618", "#1f1612")

PARTS = ("skin", "place", "outline", "blobs", "dots", "network", "ruler", "hair", "patch", "ink", "other label")


def part_rng(lesion: "Lesion", part: str) -> np.random.Generator:
    """The generator of one part of one lesion."""
    return np.random.default_rng([lesion.seed, PARTS.index(part)])


def svg(lesion: "Lesion") -> str:
    """The drawing as an SVG document in a 0..100 view box, under 60 elements and without filters."""
    parts = [_skin(lesion), _mole(lesion)]
    drawers = {"ink": _ink, "hair": _hair, "vignette": _vignette, "patch": _patch, "ruler": _ruler}
    parts += [draw(lesion) for name, draw in drawers.items() if getattr(lesion, name)]
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{"".join(parts)}</svg>'


def _gradient(name: str, stops: Iterable[tuple[float, str, float]], box: str = "") -> str:
    """A radial gradient of (offset, colour, opacity) stops; `box` holds further attributes."""
    marks = "".join(f'<stop offset="{o}" stop-color="{c}" stop-opacity="{a:.2f}"/>' for o, c, a in stops)
    return f'<radialGradient id="{name}" {box}>{marks}</radialGradient>'


def _spline(points: NDArray[np.float64]) -> str:
    """A closed Catmull-Rom spline through points of shape (n, 2), as cubic Bezier path data."""
    before, after = np.roll(points, 1, 0), np.roll(points, -1, 0)
    beyond = np.roll(points, -2, 0)
    curves = np.hstack([points + (after - before) / 6, after - (beyond - points) / 6, after]).tolist()
    segments = "".join("C{:.2f} {:.2f} {:.2f} {:.2f} {:.2f} {:.2f}".format(*curve) for curve in curves)
    return f"M{points[0, 0]:.2f} {points[0, 1]:.2f}{segments}Z"


def _specks(centres: NDArray[np.float64], sizes: NDArray[np.float64]) -> str:
    """Path data of many diamonds in one path: at a pixel's size they look like discs, and cost less."""
    rows = np.column_stack([centres[:, 0] - sizes, centres[:, 1], sizes]).tolist()
    return "".join(f"M{x:.2f} {y:.2f}l{r:.2f}-{r:.2f} {r:.2f} {r:.2f}-{r:.2f} {r:.2f}z" for x, y, r in rows)


def _skin(lesion: "Lesion") -> str:
    """Light from one side, mottling, pores, freckles and short skin lines in two crossing directions."""
    light, shade, pore = SKIN[lesion.skin_tone - 1]
    rng = part_rng(lesion, "skin")
    turn = rng.uniform(0, 2 * math.pi)
    dx, dy = 50 * math.cos(turn), 50 * math.sin(turn)
    ends = f'x1="{50 - dx:.1f}" y1="{50 - dy:.1f}" x2="{50 + dx:.1f}" y2="{50 + dy:.1f}"'
    pores = _specks(rng.uniform(0, 100, (60, 2)), rng.uniform(0.3, 0.6, 60))
    freckles = _specks(rng.uniform(0, 100, (6, 2)), rng.uniform(0.6, 1.3, 6))
    family = turn + rng.choice([0.5, 1.6], 44) + rng.normal(0, 0.15, 44)
    dashes = np.column_stack([rng.uniform(-4, 100, (44, 2)), 7 * np.cos(family), 7 * np.sin(family)]).tolist()
    lines = "".join(f"M{x:.1f} {y:.1f}l{u:.1f} {v:.1f}" for x, y, u, v in dashes)
    mottles = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r * k:.1f}" fill="{pore}" fill-opacity="0.06"/>'
        for x, y, r in np.column_stack([rng.uniform(0, 100, (2, 2)), rng.uniform(22, 36, 2)]).tolist()
        for k in (1, 0.75)
    )
    return (
        f'<linearGradient id="skin" gradientUnits="userSpaceOnUse" {ends}>'
        f'<stop offset="0" stop-color="{light}"/><stop offset="1" stop-color="{shade}"/></linearGradient>'
        f'<rect width="100" height="100" fill="url(#skin)"/>{mottles}'
        f'<path d="{lines}" stroke="{pore}" stroke-width="0.5" stroke-opacity="0.28"/>'
        f'<path d="{pores}{freckles}" fill="{pore}" fill-opacity="0.5"/>'
    )


def _outline(lesion: "Lesion") -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Centre (2,), border relative to it (48, 2), and the direction in which asymmetry pulls (radians)."""
    centre = 50 + part_rng(lesion, "place").uniform(-6, 6, 2)
    rng = part_rng(lesion, "outline")
    theta = np.arange(48) * 2 * math.pi / 48
    pull = rng.uniform(0, 2 * math.pi)
    phases, weights = rng.uniform(0, 2 * math.pi, 16), rng.normal(0, 1, 14) / np.sqrt(np.arange(4, 18))
    low = 0.14 * np.cos(theta - pull) + 0.2 * np.cos(2 * theta - phases[0]) + 0.15 * np.cos(3 * theta - phases[1])
    high = sum(weights[i] * np.cos((4 + i) * theta - phases[2 + i]) for i in range(14)) / np.linalg.norm(weights)
    ellipse = 0.06 * np.cos(2 * (theta - pull))  # even a benign lesion is no circle
    shape = 1 + ellipse + lesion.asymmetry * low + (0.01 + 0.17 * lesion.border**1.3) * high
    shape = np.clip(shape, 0.35, None)
    shape *= lesion.diameter_mm * UNITS_PER_MM / 2 / np.sqrt(np.mean(shape**2))  # asymmetry changes no area
    return centre, shape[:, None] * np.column_stack([np.cos(theta), np.sin(theta)]), pull


def _mole(lesion: "Lesion") -> str:
    """The lesion: a fading border, a graded body, blobs of further colours, pigment network and dots."""
    (cx, cy), outline, pull = _outline(lesion)
    brown, dark = BASE_BROWN[lesion.skin_tone - 1], ADDED_COLOURS[0]
    fade = 0.3 + 0.7 * (1 - lesion.border)  # a smooth border fades, an irregular one is cut off sharply
    body = _spline(outline)
    rings = "".join(
        f'<path d="{body}" transform="scale({1 + grow * fade:.3f})" fill="{brown}" fill-opacity="0.2"/>'
        for grow in (0.18, 0.1, 0.03)
    )
    fx, fy = 0.22 * lesion.asymmetry * math.cos(pull), 0.22 * lesion.asymmetry * math.sin(pull)
    focus = f'cx="{0.5 + fx:.3f}" cy="{0.5 + fy:.3f}" r="0.6"'
    shades = [(0, dark, 0.95), (0.5, brown, 0.95), (1, brown, 0.35 + 0.55 * lesion.border)]
    rng = part_rng(lesion, "dots")
    n_dots = 8 + int(14 * lesion.asymmetry)
    spread = rng.normal(0, 1, n_dots) * (0.5 + 2.5 * (1 - lesion.asymmetry))
    rim = outline[((pull + spread) * 48 / (2 * math.pi)).astype(int) % 48]
    dots = _specks(rim * np.sqrt(rng.uniform(0.05, 0.8, (n_dots, 1))), rng.uniform(0.4, 1.0, n_dots))
    return (
        f'<g transform="translate({cx:.2f} {cy:.2f})">{rings}{_gradient("body", shades, focus)}'
        f'<path d="{body}" fill="url(#body)"/>{_network(lesion, outline, dark)}'
        f'{_blobs(lesion, outline, pull)}<path d="{dots}" fill="#1c1210" fill-opacity="0.7"/></g>'
    )


def _network(lesion: "Lesion", outline: NDArray[np.float64], colour: str) -> str:
    """The pigment network: jittered honeycomb walls inside four fifths of the border."""
    rng = part_rng(lesion, "network")
    pitch = 4.2
    rows, columns = np.mgrid[-7:8, -7:8]
    y = rows * pitch + (rows + columns) % 2 * pitch / 3
    jitter = rng.normal(0, 0.35, (15, 15, 2))
    corners = np.stack([columns * pitch * 0.87, y], -1) + jitter
    turn = np.arctan2(corners[..., 1], corners[..., 0]) * 48 / (2 * math.pi)
    inside = np.linalg.norm(corners, axis=-1) < 0.8 * np.linalg.norm(outline, axis=1)[turn.astype(int) % 48]
    walls = ""
    for i, j in np.argwhere(inside[:-1, :-1]).tolist():
        (x, y), (u, v) = corners[i, j].tolist(), corners[i, j + 1].tolist()
        if inside[i, j + 1]:
            walls += f"M{x:.1f} {y:.1f}L{u:.1f} {v:.1f}"
        if (i + j) % 2 == 1 and inside[i + 1, j]:
            u, v = corners[i + 1, j].tolist()
            walls += f"M{x:.1f} {y:.1f}L{u:.1f} {v:.1f}"
    return f'<path d="{walls}" stroke="{colour}" stroke-width="0.8" stroke-opacity="0.32"/>'


def _blobs(lesion: "Lesion", outline: NDArray[np.float64], pull: float) -> str:
    """Two soft blobs of every colour beyond the first, inside the border, to one side as asymmetry grows."""
    rng = part_rng(lesion, "blobs")
    mean_radius = lesion.diameter_mm * UNITS_PER_MM / 2
    drift = 0.2 * lesion.asymmetry * np.array([math.cos(pull), math.sin(pull)])
    drawn = []
    for i, colour in enumerate(ADDED_COLOURS[: lesion.colours - 1]):
        drawn.append(_gradient(f"blob{i}", [(0, colour, 0.95), (0.5, colour, 0.75), (1, colour, 0)]))
        turns = pull + i * 2.4 + np.array([0.0, 2.6]) + rng.normal(0, 0.3, 2)  # golden angle: colours spread out
        for turn, far, wide in zip(turns, rng.uniform(0.35, 0.6, 2), rng.uniform(0.34, 0.48, 2), strict=True):
            rim = outline[int(turn * 48 / (2 * math.pi)) % 48]
            near = np.linalg.norm(rim) / mean_radius  # smaller where the border is close
            wobble = 1 + 0.22 * rng.normal(0, 1, (9, 1))
            circle = np.arange(9)[:, None] * 2 * math.pi / 9
            edge = wobble * np.hstack([np.cos(circle), np.sin(circle)]) * wide * mean_radius * min(near, 1)
            drawn.append(f'<path d="{_spline(rim * far + drift * mean_radius + edge)}" fill="url(#blob{i})"/>')
    return "".join(drawn)


def _ruler(lesion: "Lesion") -> str:
    """A translucent scale along one side, one tick per millimetre of the drawing's own scale."""
    side = int(part_rng(lesion, "ruler").integers(4))
    ticks = "".join(
        f"M{i * UNITS_PER_MM + 2:.2f} 90v{4.6 if i % 5 else 8:.1f}" for i in range(int(100 / UNITS_PER_MM) + 1)
    )
    return (
        f'<g transform="rotate({90 * side} 50 50)">'
        '<path d="M0 89h100v11H0z" fill="#f7f5ee" fill-opacity="0.86"/>'
        '<path d="M0 89h100" stroke="#8d8a80" stroke-width="0.6"/>'
        f'<path d="{ticks}" stroke="#151515" stroke-width="1.1"/></g>'
    )


def _hair(lesion: "Lesion") -> str:
    """Two thicknesses of bent hairs that lie roughly one way."""
    rng = part_rng(lesion, "hair")
    colour = HAIR_COLOURS[int(rng.integers(2)) if lesion.light_skin else 3]
    lean = rng.uniform(0, math.pi)
    strands = ["", ""]
    for i in range(int(rng.integers(9, 15))):
        x, y = rng.uniform(5, 95, 2)
        turn, half = lean + rng.normal(0, 0.35), rng.uniform(16, 40)
        dx, dy = half * math.cos(turn), half * math.sin(turn)
        bend = rng.normal(0, 0.45)
        strands[i % 2] += (
            f"M{x - dx:.1f} {y - dy:.1f}Q{x - dy * bend:.1f} {y + dx * bend:.1f} {x + dx:.1f} {y + dy:.1f}"
        )
    return "".join(
        f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="{w}" stroke-opacity="0.9" stroke-linecap="round"/>'
        for d, w in zip(strands, (0.75, 1.2), strict=True)
    )


def _patch(lesion: "Lesion") -> str:
    """A round coloured sticker in one corner, with a fine shadow."""
    rng = part_rng(lesion, "patch")
    colour = PATCH_COLOURS[int(rng.integers(len(PATCH_COLOURS)))]
    x, y = np.array([9.0, 9.0]) + rng.uniform(-4, 4, 2)
    x, y = (x if rng.random() < 0.5 else 100 - x), (y if rng.random() < 0.5 else 100 - y)
    r = rng.uniform(17, 22)
    return (
        _gradient("gloss", [(0, "#fff", 0.35), (0.6, "#fff", 0.06), (1, "#000", 0.22)], 'cx="0.4" cy="0.35" r="0.7"')
        + f'<circle cx="{x + 0.8:.2f}" cy="{y + 1:.2f}" r="{r:.2f}" fill="#000" fill-opacity="0.18"/>'
        + f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{r:.2f}" fill="{colour}"/>'
        + f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{r:.2f}" fill="url(#gloss)"/>'
    )


def _ink(lesion: "Lesion") -> str:
    """Dashes of a surgical marker around the lesion."""
    rng = part_rng(lesion, "ink")
    (cx, cy), outline, _ = _outline(lesion)
    reach = min(np.linalg.norm(outline, axis=1).max() + 5, 43)
    start = rng.uniform(0, 2 * math.pi)
    marks = ""
    for turn in start + np.arange(4) * math.pi / 2 + rng.normal(0, 0.15, 4):
        a, b = turn - 0.3, turn + 0.3 + rng.uniform(-0.1, 0.1)
        marks += (
            f"M{cx + reach * math.cos(a):.2f} {cy + reach * math.sin(a):.2f}"
            f"A{reach:.2f} {reach:.2f} 0 0 1 {cx + reach * math.cos(b):.2f} {cy + reach * math.sin(b):.2f}"
        )
    return "".join(
        f'<path d="{marks}" fill="none" stroke="#4a1f86" stroke-width="{width}" stroke-opacity="{opacity}" '
        'stroke-linecap="round"/>'
        for width, opacity in ((3.4, 0.22), (2, 0.75))
    )


def _vignette(lesion: "Lesion") -> str:
    """The dark surround of a dermatoscope's round field of view; only where it is not clear."""
    box = 'gradientUnits="userSpaceOnUse" cx="50" cy="50" r="72"'
    stops = [(0.63, "#050404", 0), (0.71, "#050404", 0.55), (0.77, "#050404", 0.97), (1, "#050404", 1)]
    ring = "M0 0h100v100H0zM5 50a45 45 0 0 0 90 0a45 45 0 0 0-90 0z"
    return _gradient("vignette", stops, box) + f'<path d="{ring}" fill-rule="evenodd" fill="url(#vignette)"/>'
