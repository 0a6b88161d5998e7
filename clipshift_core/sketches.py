"""How each thing of the embedded world looks: SVG fragments in a box of 100 x 100, as data.

A sketch names its paints by letter, so that one drawing serves every colour: C the colour itself, D a darker
shade of it, L a lighter one, K the outline. Fixed paints (an eye, a beak, a wheel) are kept small, so that the
colour of a thing stays the colour of most of it. Letters are strokes, not fonts, which differ between machines.
"""

import colorsys

import numpy as np
from numpy.typing import NDArray

EYE = '<circle cx="{x}" cy="{y}" r="4.5" fill="#fff"/><circle cx="{x}" cy="{y}" r="2" fill="#111" stroke="none"/>'


def _eye(x: float, y: float) -> str:
    return EYE.format(x=x, y=y)


SKETCHES: dict[str, str] = {
    "duck": '<path d="M4 46C10 56 22 54 34 52 46 50 54 54 58 46 50 36 52 16 69 14 86 13 91 34 81 44'
    ' 94 56 88 88 50 88 18 88 4 68 4 46Z" fill="C"/><path d="M84 24 99 30 99 34 84 38Z" fill="#f6a21e"/>'
    '<path d="M24 62C34 54 54 58 62 68 50 80 30 78 24 62Z" fill="L"/>' + _eye(73, 27),
    "owl": '<path d="M18 40 16 8 36 20C44 16 56 16 64 20L84 8 82 40C88 74 76 96 50 96 24 96 12 74 18 40Z" fill="C"/>'
    '<path d="M30 60C36 52 64 52 70 60 72 80 62 90 50 90 38 90 28 80 30 60Z" fill="L"/>'
    '<circle cx="36" cy="37" r="13" fill="#fff"/><circle cx="64" cy="37" r="13" fill="#fff"/>'
    '<circle cx="36" cy="37" r="6" fill="#111"/><circle cx="64" cy="37" r="6" fill="#111"/>'
    '<path d="M44 48 56 48 50 60Z" fill="#f6a21e"/>',
    "snail": '<path d="M4 88C4 76 16 80 34 78L74 78C80 78 80 60 76 50 74 42 88 40 92 48 98 62 98 88 84 88Z" fill="L"/>'
    '<path d="M79 44 74 28M88 43 92 27" fill="none"/><circle cx="44" cy="50" r="34" fill="C"/>'
    '<path d="M44 50C44 42 56 42 57 52 58 64 40 68 32 58 24 44 38 26 54 30 70 34 72 56 62 68" fill="none" stroke-width="5"/>',
    "balloon": '<path d="M50 70C46 80 56 86 48 99" fill="none"/><path d="M44 76 50 66 56 76Z" fill="D"/>'
    '<path d="M50 70C26 66 18 46 18 34 18 14 32 2 50 2 68 2 82 14 82 34 82 46 74 66 50 70Z" fill="C"/>'
    '<path d="M30 34C30 22 36 14 44 12" fill="none" stroke="L" stroke-width="6"/>',
    "car": '<path d="M2 66C2 54 8 50 20 48L32 28C34 25 36 24 40 24L64 24C68 24 71 26 74 29L86 47C96 49 98 54 98 66L98 74 2 74Z" fill="C"/>'
    '<path d="M30 47 40 31 53 31 53 47ZM59 47 59 31 66 31 78 47Z" fill="#cfe8f5"/>'
    '<circle cx="24" cy="75" r="12" fill="#333"/><circle cx="76" cy="75" r="12" fill="#333"/>'
    '<circle cx="24" cy="75" r="5" fill="#ccc"/><circle cx="76" cy="75" r="5" fill="#ccc"/>',
    "house": '<path d="M16 46 16 94 84 94 84 46 50 16Z" fill="C"/><path d="M4 52 50 8 96 52 88 58 50 22 12 58Z" fill="D"/>'
    '<path d="M42 94 42 68 58 68 58 94Z" fill="D"/><path d="M23 60 35 60 35 74 23 74ZM65 60 77 60 77 74 65 74Z" fill="#fdf1b8"/>',
    "clock": '<path d="M22 96 30 82M78 96 70 82" fill="none" stroke-width="7"/><circle cx="24" cy="14" r="11" fill="D"/>'
    '<circle cx="76" cy="14" r="11" fill="D"/><circle cx="50" cy="52" r="42" fill="C"/><circle cx="50" cy="52" r="29" fill="#fff"/>'
    '<path d="M50 30 50 52 66 62" fill="none" stroke="#222" stroke-width="5"/><path d="M50 25v4M50 75v4M23 52h4M73 52h4" stroke="#222" fill="none"/>',
    "mushroom": '<path d="M38 50C42 70 34 84 32 94L68 94C66 84 58 70 62 50Z" fill="#f6ead0"/>'
    '<path d="M4 54C4 22 26 6 50 6 74 6 96 22 96 54 96 62 4 62 4 54Z" fill="C"/><circle cx="34" cy="28" r="8" fill="L"/>'
    '<circle cx="62" cy="22" r="6" fill="L"/><circle cx="74" cy="42" r="8" fill="L"/><circle cx="48" cy="45" r="6" fill="L"/><circle cx="20" cy="46" r="5" fill="L"/>',
    "fish": '<path d="M68 50 96 24C92 42 92 58 96 76Z" fill="D"/><path d="M40 26C50 10 62 14 66 30ZM44 74C52 86 58 86 62 72Z" fill="D"/>'
    '<path d="M2 52C14 26 52 16 76 50 52 84 14 78 2 52Z" fill="C"/><path d="M32 34C40 44 40 60 32 70" fill="none"/>'
    '<path d="M48 40C54 46 54 56 48 62M60 42C64 48 64 54 60 58" fill="none" stroke="L"/>' + _eye(19, 46),
    "star": '<path d="M50 2 62 37 99 37 69 59 80 95 50 73 20 95 31 59 1 37 38 37Z" fill="C"/>'
    '<path d="M50 18 57 42 50 50 43 42Z" fill="L" stroke="none"/>',
    "starfish": '<path d="M50 4C60 4 58 32 64 36 70 40 96 32 97 42 98 52 74 58 72 64 70 72 86 92 77 96 68 99 58 78 50 78'
    ' 42 78 32 99 23 96 14 92 30 72 28 64 26 58 2 52 3 42 4 32 30 40 36 36 42 32 40 4 50 4Z" fill="C"/>'
    '<g fill="L" stroke="none"><circle cx="50" cy="20" r="3.5"/><circle cx="50" cy="34" r="4"/><circle cx="50" cy="52" r="7"/><circle cx="66" cy="48" r="4"/>'
    '<circle cx="82" cy="44" r="3.5"/><circle cx="34" cy="48" r="4"/><circle cx="18" cy="44" r="3.5"/><circle cx="61" cy="68" r="4"/>'
    '<circle cx="71" cy="82" r="3.5"/><circle cx="39" cy="68" r="4"/><circle cx="29" cy="82" r="3.5"/></g>',
    "cup": '<path d="M70 40C98 34 98 74 66 72" fill="none" stroke-width="8" stroke="D"/>'
    '<path d="M12 30 18 84C19 92 66 92 67 84L74 30Z" fill="C"/><ellipse cx="43" cy="30" rx="31" ry="9" fill="L"/>'
    '<ellipse cx="43" cy="31" rx="24" ry="6" fill="#5b3a21"/>',
    "boat": '<path d="M48 4 48 66" stroke-width="4"/><path d="M52 8C78 22 86 44 86 60L52 60Z" fill="C"/><path d="M44 14C26 28 16 46 14 60L44 60Z" fill="L"/>'
    '<path d="M2 66 98 66C94 84 84 94 74 94L26 94C14 94 6 82 2 66Z" fill="C"/>',
    "houseboat": '<path d="M2 68 98 68C96 84 88 96 78 96L22 96C12 96 4 84 2 68Z" fill="C"/><path d="M20 68 20 42 80 42 80 68Z" fill="L"/>'
    '<path d="M12 44 26 22 74 22 88 44Z" fill="D"/><path d="M28 50h12v10h-12ZM60 50h12v10h-12Z" fill="#fdf1b8"/>'
    '<path d="M46 50h9v18h-9Z" fill="D"/><path d="M66 22 66 6 74 6 74 22" fill="D"/>',
    "flower": '<path d="M50 50 50 98" stroke="#3c8d3f" stroke-width="6" fill="none"/><path d="M50 84C62 66 78 68 82 70 76 84 62 88 50 86Z" fill="#4fa851"/>'
    '<g fill="C"><circle cx="50" cy="16" r="15"/><circle cx="70" cy="31" r="15"/><circle cx="63" cy="55" r="15"/><circle cx="37" cy="55" r="15"/><circle cx="30" cy="31" r="15"/></g>'
    '<circle cx="50" cy="38" r="11" fill="L"/>',
    "sunflower": '<path d="M50 50 50 99" stroke="#3c8d3f" stroke-width="7" fill="none"/><path d="M50 88C34 70 20 74 14 78 22 92 38 94 50 92ZM50 84C64 68 80 70 86 74 78 88 62 90 50 88Z" fill="#4fa851"/>'
    '<path d="M50 0 56 14 68 4 69 19 84 14 79 29 95 30 84 41 97 50 82 54 88 69 73 67 71 82 59 73 50 86 41 73 29 82 27 67 12 69 18 54 3 50 16 41 5 30 21 29 16 14 31 19 32 4 44 14Z" fill="C"/>'
    '<circle cx="50" cy="43" r="20" fill="#5b3a21"/><path d="M38 36 62 36M35 43 65 43M38 50 62 50M43 30 43 56M50 27 50 60M57 30 57 56" stroke="#2e1c0e" stroke-width="1.5"/>',
    "bat (animal)": '<path d="M50 40C44 26 44 24 40 16L36 30C24 20 10 20 1 26 8 34 6 48 10 58 18 50 26 54 28 64 34 58 42 62 44 74L50 84 56 74'
    'C58 62 66 58 72 64 74 54 82 50 90 58 94 48 92 34 99 26 90 20 76 20 64 30L60 16C56 24 56 26 50 40Z" fill="C"/>'
    '<ellipse cx="50" cy="54" rx="9" ry="19" fill="D"/>' + _eye(46, 42) + _eye(55, 42),
    "bat (club)": '<path d="M10 94 6 90 40 50C52 34 70 10 82 4 92 0 100 8 96 18 90 30 66 48 50 60L14 96Z" fill="C"/>'
    '<path d="M10 94 6 90 26 66 34 74 14 96Z" fill="D"/><circle cx="9" cy="93" r="6" fill="D"/>'
    '<path d="M60 40C70 28 78 18 86 13" stroke="L" stroke-width="5" fill="none"/>',
    "crane (bird)": '<path d="M46 66 42 98M56 66 58 98" stroke-width="4" fill="none"/><path d="M6 52C24 40 40 38 56 44 66 40 66 26 64 16 66 6 80 4 84 14L99 20 82 22'
    'C76 20 74 24 75 32 78 50 72 70 50 70 30 70 16 62 6 52Z" fill="C"/><path d="M14 54C30 48 44 50 54 56 42 64 26 62 14 54Z" fill="D"/>'
    '<circle cx="76" cy="13" r="2.6" fill="#111"/>',
    "crane (machine)": '<path d="M26 98 26 20 40 20 40 98Z" fill="C"/><path d="M26 34 40 50 26 66 40 82 26 98M40 34 26 50 40 66 26 82 40 98" fill="none"/>'
    '<path d="M2 12 98 12 98 22 2 22Z" fill="C"/><path d="M33 1 6 12M33 1 92 12" fill="none"/><path d="M2 22h18v16h-18Z" fill="C"/>'
    '<path d="M84 22 84 58M78 58 90 58" fill="none"/><path d="M70 58h28v22h-28Z" fill="C"/><path d="M12 90h42v9h-42Z" fill="C"/>',
    "kite (toy)": '<path d="M62 62C70 76 56 82 66 90 72 94 80 90 86 98" fill="none"/><path d="M60 78l8-6 0 12ZM74 92l8-6 0 10Z" fill="D"/>'
    '<path d="M24 2 72 20 64 70 6 44Z" fill="C"/><path d="M24 2 64 70M6 44 72 20" fill="none"/><path d="M24 2 72 20 42 33Z" fill="L"/>',
    "kite (bird)": '<path d="M50 34C58 24 84 8 99 20 84 24 74 36 68 50 62 54 58 56 56 60L64 92 50 82 36 92 44 60C42 56 38 54 32 50 26 36 16 24 1 20 16 8 42 24 50 34Z" fill="C"/>'
    '<path d="M50 22C58 22 60 34 50 44 40 34 42 22 50 22Z" fill="L"/><path d="M47 22 53 22 50 14Z" fill="#f6a21e"/>'
    '<path d="M70 24 82 16M30 24 18 16M64 32 74 26M36 32 26 26" fill="none"/>',
    "cat": '<path d="M76 92C98 86 98 60 88 54" fill="none" stroke="C" stroke-width="9"/><path d="M26 94C22 68 34 54 50 54 68 54 82 70 78 94Z" fill="C"/>'
    '<path d="M22 44 20 8 38 20 56 20 74 8 72 44C68 60 56 64 47 64 38 64 26 60 22 44Z" fill="C"/>'
    + _eye(38, 38)
    + _eye(57, 38)
    + '<path d="M44 48 51 48 47.500 53Z" fill="#e88"/><path d="M30 50 10 46M30 54 12 58M65 50 86 46M65 54 84 58" fill="none" stroke-width="1.5"/>',
    "butterfly": '<path d="M50 44C46 14 10 0 4 16 0 34 16 50 36 52 14 56 12 82 26 90 40 94 48 74 50 60 52 74 60 94 74 90 88 82 86 56 64 52'
    ' 84 50 100 34 96 16 90 0 54 14 50 44Z" fill="C"/><circle cx="24" cy="28" r="9" fill="L"/><circle cx="76" cy="28" r="9" fill="L"/>'
    '<circle cx="30" cy="72" r="7" fill="D"/><circle cx="70" cy="72" r="7" fill="D"/><path d="M50 30 50 80" stroke="#222" stroke-width="6"/>'
    '<path d="M50 30C48 20 42 16 38 14M50 30C52 20 58 16 62 14" fill="none" stroke="#222"/>',
    "tree": '<path d="M43 60 43 98 57 98 57 60Z" fill="#7a5230"/><path d="M50 2C66 0 76 12 74 22 90 24 94 44 82 54 80 68 62 72 50 66 38 72 20 68 18 54 6 44 10 24 26 22 24 12 34 0 50 2Z" fill="C"/>'
    '<path d="M36 30C38 22 46 20 50 24M58 46C64 40 72 44 70 52M32 50C34 44 42 44 44 50" fill="none" stroke="L" stroke-width="4"/>',
    "key": '<path d="M34 44 94 44 94 62 86 62 86 55 78 55 78 66 70 66 70 55 34 55Z" fill="C"/><circle cx="26" cy="50" r="24" fill="C"/><circle cx="22" cy="50" r="10" fill="D"/>',
    "umbrella": '<path d="M50 46 50 86C50 98 68 98 68 86" fill="none" stroke="D" stroke-width="6"/><path d="M50 2 50 10" stroke-width="4"/>'
    '<path d="M2 54C4 22 26 8 50 8 74 8 96 22 98 54 90 46 76 46 68 54 60 46 40 46 32 54 24 46 10 46 2 54Z" fill="C"/>'
    '<path d="M32 54C32 34 40 16 50 8 60 16 68 34 68 54 60 46 40 46 32 54Z" fill="L"/>',
    "apple": '<path d="M50 26C52 14 54 8 60 3" fill="none" stroke="#5b3a21" stroke-width="5"/><path d="M54 18C62 4 80 6 84 8 80 22 66 26 54 20Z" fill="#4fa851"/>'
    '<path d="M50 28C66 16 96 22 94 52 92 80 70 98 60 96 54 94 46 94 40 96 30 98 8 80 6 52 4 22 34 16 50 28Z" fill="C"/>'
    '<path d="M20 56C18 44 22 36 30 34" fill="none" stroke="L" stroke-width="6"/>',
    "book": '<path d="M14 8C14 4 18 2 22 2L86 2 86 84 24 84C18 84 14 86 14 90Z" fill="C"/><path d="M86 84 24 84C12 84 12 98 24 98L86 98Z" fill="#fbf7ea"/>'
    '<path d="M24 91 84 91" fill="none" stroke="#bbb"/><path d="M28 2 28 84" fill="none"/><path d="M40 20h34v22h-34Z" fill="L"/>',
    "bell": '<circle cx="50" cy="88" r="9" fill="D"/><circle cx="50" cy="10" r="7" fill="D"/>'
    '<path d="M50 12C74 12 78 36 80 54 81 66 88 72 94 80L6 80C12 72 19 66 20 54 22 36 26 12 50 12Z" fill="C"/>'
    '<path d="M34 54C34 38 38 28 44 24" fill="none" stroke="L" stroke-width="6"/><path d="M12 72 88 72" fill="none"/>',
    "hat": '<path d="M24 66C24 40 22 22 26 16 34 8 66 8 74 16 78 22 76 40 76 66Z" fill="C"/><path d="M24 52 76 52 76 68 24 68Z" fill="D"/>'
    '<path d="M2 74C10 62 20 66 50 66 80 66 90 62 98 74 90 88 70 88 50 88 30 88 10 88 2 74Z" fill="C"/>',
    "lamp": '<path d="M47 50 47 84 53 84 53 50Z" fill="D"/><ellipse cx="50" cy="89" rx="26" ry="8" fill="C"/><path d="M34 6 66 6 90 56 10 56Z" fill="C"/>'
    '<path d="M42 6 34 56M58 6 66 56" fill="none" stroke="L" stroke-width="4"/><circle cx="50" cy="60" r="7" fill="#fff3a8"/>',
}

# Letters and digits as strokes in a box 10 wide and 14 high, for signs, stamps and marks.
STROKES: dict[str, str] = {
    "A": "M0 14 5 0 10 14M2 9 8 9",
    "C": "M10 2C4-2 0 3 0 7 0 12 5 16 10 12",
    "E": "M10 0 0 0 0 14 10 14M0 7 8 7",
    "F": "M10 0 0 0 0 14M0 7 8 7",
    "H": "M0 0 0 14M10 0 10 14M0 7 10 7",
    "I": "M5 0 5 14M2 0 8 0M2 14 8 14",
    "L": "M0 0 0 14 10 14",
    "M": "M0 14 0 0 5 8 10 0 10 14",
    "N": "M0 14 0 0 10 14 10 0",
    "O": "M5 0C-1 0-1 14 5 14 11 14 11 0 5 0",
    "P": "M0 14 0 0 6 0C11 0 11 8 6 8L0 8",
    "R": "M0 14 0 0 6 0C11 0 11 7 6 7L0 7M5 7 10 14",
    "S": "M10 2C7-1 0-1 0 4 0 8 10 6 10 10 10 15 3 15 0 12",
    "T": "M0 0 10 0M5 0 5 14",
    "U": "M0 0 0 9C0 16 10 16 10 9L10 0",
    "X": "M0 0 10 14M10 0 0 14",
    "0": "M5 0C-1 0-1 14 5 14 11 14 11 0 5 0",
    "1": "M2 3 6 0 6 14",
    "2": "M0 3C1-1 10-1 10 4 10 8 2 10 0 14L10 14",
    "4": "M8 14 8 0 0 10 10 10",
    "7": "M0 0 10 0 4 14",
    "9": "M10 5C9 10 0 9 0 4.500 0-1 9-2 10 5 10 10 8 14 3 14",
}


def lettering(word: str, x: float, y: float, height: float, paint: str, weight: float = 2.2) -> str:
    """A word drawn as strokes with its top left corner at (x, y); weight is in the letters' own 10 x 14 box."""
    scale = height / 14
    letters = "".join(f'<path d="{STROKES[char]}" transform="translate({14 * i} 0)"/>' for i, char in enumerate(word))
    return (
        f'<g transform="translate({x:.2f} {y:.2f}) scale({scale:.3f})" fill="none" stroke="{paint}" '
        f'stroke-width="{weight}" stroke-linecap="round" stroke-linejoin="round">{letters}</g>'
    )


def shade(hue: float, lightness: float, saturation: float) -> str:
    red, green, blue = colorsys.hls_to_rgb(hue % 1, min(max(lightness, 0), 1), min(max(saturation, 0), 1))
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def background(name: str, rng: np.random.Generator) -> str:
    """The ground a scene stands on: one of meadow, beach, snow, night, wall, room."""
    horizon = rng.uniform(50, 64)
    shift = rng.uniform(-0.02, 0.02)

    def sky(top: str, bottom: str) -> str:
        return (
            f'<defs><linearGradient id="sky" x2="0" y2="1"><stop stop-color="{top}"/><stop offset="1" stop-color="{bottom}"/>'
            '</linearGradient></defs><rect width="100" height="100" fill="url(#sky)"/>'
        )

    def scatter(n: int, low: float, high: float) -> NDArray[np.float64]:
        return np.column_stack([rng.uniform(0, 100, n), rng.uniform(low, high, n), rng.uniform(0, 1, n)])

    def cloud(x: float, y: float, r: float) -> str:
        return f'<path d="M{x - 9 * r:.1f} {y:.1f}a{4 * r:.1f} {4 * r:.1f} 0 0 1 {5 * r:.1f}-{4 * r:.1f}a{5 * r:.1f} {5 * r:.1f} 0 0 1 {9 * r:.1f} 0a{4 * r:.1f} {4 * r:.1f} 0 0 1 {4 * r:.1f} {4 * r:.1f}z" fill="#fff" opacity="0.8"/>'

    if name == "meadow":
        grass = "".join(f"M{x:.1f} {y:.1f}l-1-3m1 3l0-4m0 4l1.200-3" for x, y, _ in scatter(22, horizon + 5, 99))
        blooms = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="0.900" fill="#fff"/>' for x, y, _ in scatter(9, horizon + 6, 98))
        hill = rng.uniform(-9, 9)
        return (
            sky(shade(0.56 + shift, 0.72, 0.7), "#e6f4fb")
            + cloud(rng.uniform(15, 85), rng.uniform(10, 26), rng.uniform(0.8, 1.3))
            + f'<path d="M0 {horizon - hill:.1f}Q30 {horizon - 12:.1f} 60 {horizon:.1f}T100 {horizon - 3:.1f}V100H0Z" fill="{shade(0.27 + shift, 0.55, 0.42)}"/>'
            + f'<path d="M0 {horizon + 4:.1f}Q40 {horizon + hill:.1f} 100 {horizon + 6:.1f}V100H0Z" fill="{shade(0.26 + shift, 0.47, 0.45)}"/>'
            + f'<path d="{grass}" stroke="{shade(0.28 + shift, 0.33, 0.5)}" stroke-width="0.800" fill="none"/>{blooms}'
        )
    if name == "beach":
        shells = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{0.4 + r * 0.7:.2f}" fill="#b98d54"/>' for x, y, r in scatter(26, horizon + 9, 99))
        return (
            sky(shade(0.54 + shift, 0.78, 0.7), "#fdf3dc")
            + f'<circle cx="{rng.uniform(10, 90):.1f}" cy="{rng.uniform(12, 28):.1f}" r="7" fill="#ffe9a3"/>'
            + f'<rect y="{horizon - 11:.1f}" width="100" height="20" fill="{shade(0.53 + shift, 0.5, 0.6)}"/>'
            + f'<path d="M0 {horizon - 6:.1f}h40m14 2h46M10 {horizon - 1:.1f}h36m20 1h30" stroke="#fff" stroke-width="0.700" opacity="0.7"/>'
            + f'<path d="M0 {horizon + 4:.1f}Q25 {horizon - 1:.1f} 50 {horizon + 4:.1f}T100 {horizon + 4:.1f}V100H0Z" fill="{shade(0.11 + shift, 0.76, 0.62)}"/>{shells}'
        )
    if name == "snow":
        flakes = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{0.6 + r:.2f}" fill="#fff"/>' for x, y, r in scatter(34, 0, 90))
        firs = "".join(
            f'<path d="M{x:.1f} {horizon + 3:.1f}l-5 0 3-6-2 0 4-8 4 8-2 0 3 6z" fill="#5f8f86"/>' for x, _, _ in scatter(4, 0, 1)
        )
        return (
            sky(shade(0.58 + shift, 0.70, 0.28), "#dfe8ee")
            + firs
            + f'<path d="M0 {horizon:.1f}Q30 {horizon - 7:.1f} 55 {horizon:.1f}T100 {horizon - 3:.1f}V100H0Z" fill="#f5f9fc"/>'
            + f'<path d="M0 {horizon + 16:.1f}Q45 {horizon + 6:.1f} 100 {horizon + 19:.1f}V100H0Z" fill="#e3edf4"/>{flakes}'
        )
    if name == "night":
        stars = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{0.3 + 0.6 * r:.2f}" fill="#fff8d8"/>' for x, y, r in scatter(36, 0, horizon))
        tops = rng.uniform(-9, 2, 6)
        ridge = "".join(f"L{20 * i:.0f} {horizon + top:.1f}" for i, top in enumerate(tops))
        return (
            sky(shade(0.64 + shift, 0.13, 0.6), shade(0.66 + shift, 0.32, 0.45))
            + stars
            + f'<path d="M0 100{ridge}V100Z" fill="{shade(0.63 + shift, 0.2, 0.35)}"/>'
            + f'<path d="M0 {horizon + 12:.1f}Q50 {horizon + 6:.1f} 100 {horizon + 13:.1f}V100H0Z" fill="{shade(0.42 + shift, 0.19, 0.3)}"/>'
        )
    if name == "wall":
        course = rng.uniform(8, 10)
        rows = int(100 / course) + 1
        lines = "".join(f"M0 {i * course:.1f}H100" for i in range(1, rows + 1))
        lines += "".join(
            f"M{x + (i % 2) * 9:.1f} {i * course:.1f}v{course:.1f}" for i in range(rows) for x in np.arange(rng.uniform(0, 4), 100, 18)
        )
        odd = "".join(
            f'<rect x="{18 * int(x / 18):.0f}" y="{course * int(y / course):.1f}" width="18" height="{course:.1f}" fill="#7d2f1c" opacity="0.25"/>'
            for x, y, _ in scatter(9, 0, 100)
        )
        return f'<rect width="100" height="100" fill="{shade(0.03 + shift, 0.51, 0.36)}"/>{odd}<path d="{lines}" stroke="#e0cdbf" stroke-width="1.100"/>'
    stripes = "".join(f"M{x:.1f} 0V{horizon + 12:.1f}" for x in np.arange(rng.uniform(2, 8), 100, 9))
    boards = "".join(f"M0 {y:.1f}H100" for y in np.arange(horizon + 19, 100, 6))
    return (
        f'<rect width="100" height="100" fill="{shade(0.13 + shift, 0.86, 0.42)}"/><path d="{stripes}" stroke="{shade(0.45 + shift, 0.72, 0.22)}" stroke-width="3"/>'
        + f'<rect y="{horizon + 12:.1f}" width="100" height="60" fill="{shade(0.075 + shift, 0.43, 0.4)}"/><rect y="{horizon + 10:.1f}" width="100" height="3" fill="#fffaf0"/>'
        + f'<path d="{boards}" stroke="#5b3a21" stroke-width="0.700"/>'
    )


# Cues ------------------------------------------------------------------------------------------------------------


def _ripples(rng: np.random.Generator) -> str:
    top = rng.uniform(76, 80)
    waves = "".join(f"M{x:.1f} {y:.1f}q3-2.500 6 0t6 0" for y in (top + 5, top + 11, top + 17) for x in rng.uniform(-5, 95, 5))
    return (
        f'<path d="M0 {top:.1f}q12.500-4 25 0t25 0 25 0 25 0V100H0Z" fill="#4aa6cf"/>'
        f'<path d="{waves}" fill="none" stroke="#e8f7ff" stroke-width="1.200" stroke-linecap="round"/>'
    )


def _moon(rng: np.random.Generator) -> str:
    x, y = rng.uniform(80, 88), rng.uniform(9, 15)
    return f'<path d="M{x:.1f} {y - 8:.1f}a8.500 8.500 0 1 0 7 13a7.500 7.500 0 0 1 -7-13z" fill="#ffe88a" stroke="#b99a2c" stroke-width="0.600"/>'


def _leaf(rng: np.random.Generator) -> str:
    x, y = rng.uniform(17, 25), rng.uniform(84, 89)
    return (
        f'<g transform="translate({x:.1f} {y:.1f}) rotate({rng.uniform(-15, 15):.0f})" stroke="#2c6b2e" stroke-width="0.900" fill="#7cc45b">'
        '<path d="M-15 2C-14-4-10-5-8-8-4-6 0-10 3-8 7-8 9-5 13-5 15-2 19 0 17 5 12 9-10 10-15 2Z"/><path d="M-13 2C-4-1 6-2 16 1M-6 0-8-5M1-1 1-6M8-1 11-4" fill="none"/></g>'
    )


def _confetti(rng: np.random.Generator) -> str:
    paints = ("#ff5a5f", "#ffd23f", "#3bceac", "#5b8def", "#c77dff")
    return "".join(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="3.200" height="1.700" fill="{paints[i % 5]}" transform="rotate({turn:.0f} {x:.1f} {y:.1f})"/>'
        for i, (x, y, turn) in enumerate(zip(rng.uniform(2, 96, 34), rng.uniform(2, 96, 34), rng.uniform(0, 180, 34), strict=True))
    )


def _watermark(rng: np.random.Generator) -> str:
    x, y = rng.uniform(3, 6), rng.uniform(3, 6)
    return (
        f'<g opacity="0.85"><rect x="{x:.1f}" y="{y:.1f}" width="25" height="10" rx="5" fill="#fff"/>'
        f'<circle cx="{x + 5:.1f}" cy="{y + 5:.1f}" r="3" fill="none" stroke="#c0392b" stroke-width="1.400"/></g>' + lettering("PIX", x + 10, y + 2.4, 5.2, "#c0392b", 2.6)
    )


def _film(rng: np.random.Generator) -> str:
    start = rng.uniform(0, 6)
    holes = "".join(f'<rect x="{x:.1f}" y="{y}" width="5" height="3.400" rx="1" fill="#f3eee2"/>' for x in np.arange(start, 100, 10) for y in (2, 94.6))
    return f'<rect width="100" height="7.400" fill="#16130f"/><rect y="92.600" width="100" height="7.400" fill="#16130f"/>{holes}'


def _stamp(rng: np.random.Generator) -> str:
    digits = "".join(str(rng.choice([0, 1, 2, 4, 7, 9])) for _ in range(5))
    y = rng.uniform(86, 89)
    return f'<rect x="61" y="{y - 2.5:.1f}" width="37" height="11" rx="1" fill="#1d1205" opacity="0.75"/>' + lettering(digits, 63, y, 6, "#ff8c1a", 2.6)


def _sticker(rng: np.random.Generator) -> str:
    x, y = rng.uniform(84, 90), rng.uniform(84, 90)
    points = " ".join(
        f"{x + r * np.cos(a):.1f},{y + r * np.sin(a):.1f}" for a, r in zip(np.linspace(0, 2 * np.pi, 24, endpoint=False), [10, 8] * 12, strict=True)
    )
    return f'<polygon points="{points}" fill="#18b6a4" stroke="#fff" stroke-width="1"/><path d="M{x - 4:.1f} {y:.1f}l3 4 6-8" fill="none" stroke="#fff" stroke-width="2"/>'


def sign(word: str, rng: np.random.Generator, relation: str) -> str:
    """A board on a post; it stands where the companion does not."""
    width = 7.4 * len(word) + 4
    x = rng.uniform(92, 96) - width if relation == "right" else rng.uniform(2, 6)
    y = rng.uniform(70, 74) if relation in ("right", "below", "left") else rng.uniform(16, 22)
    return (
        f'<rect x="{x + width / 2 - 1.2:.1f}" y="{y:.1f}" width="2.400" height="27" fill="#6b4a2b"/>'
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="13" rx="1.500" fill="#fffdf5" stroke="#6b4a2b" stroke-width="1.200"/>'
        + lettering(word, x + 3.1, y + 2.9, 7.4, "#1b1b1b", 2.4)
    )


PROPS = {
    "ripples": _ripples,
    "moon": _moon,
    "leaf": _leaf,
    "confetti": _confetti,
    "watermark": _watermark,
    "film frame": _film,
    "date stamp": _stamp,
    "sticker": _sticker,
}
BEHIND = {"moon", "confetti"}  # drawn behind the thing; the others lie over it, as water and marks do
