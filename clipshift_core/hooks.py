"""Capture points inside a vision tower. This slice has one: the residual stream after a block."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def captured(visual: nn.Module, points: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While open, every forward of `visual` fills the yielded dict, point by point.

    "residual.K": (image, token, width), the residual stream after block K (from 0), class token first.
    Raises ValueError for a point that this tower does not have.
    """
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", ())
    found: dict[str, Tensor] = {}
    handles = []
    try:
        for point in points:
            match = re.fullmatch(r"residual\.(\d+)", point)
            if not match or int(match[1]) >= len(blocks):
                known = f"residual.0 to residual.{len(blocks) - 1}" if blocks else "nothing"
                raise ValueError(f"capture point {point!r} is unknown; a {type(visual).__name__} offers {known}")

            def keep(module: nn.Module, args: tuple, output: Tensor, point: str = point) -> None:
                found[point] = output

            handles.append(blocks[int(match[1])].register_forward_hook(keep))
        yield found
    finally:
        for handle in handles:
            handle.remove()
