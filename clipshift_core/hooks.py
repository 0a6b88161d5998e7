"""Capture points inside a vision tower, read in the forward pass that makes the embedding.

    residual.K       (image, token, width): the residual stream after block K, tokens in the tower's order
    token.K          (image, width): its class token; the mean over tokens in a tower without one
    attention.K      (image, head, token): the class token's attention in block K, or the mean of the patches' where
                     the tower averages them (see `attention`)
    attention.K.all  (image, head, query, token): every token's
    attention.pool   (image, head, token): the attentional pooling's

K counts from 0, or from the end with a minus: `attention.-1` is what the embedding is read by.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from clipshift_core import attention

POINT = re.compile(r"(residual|token)\.(-?\d+)|(attention)\.(-?\d+|pool)(\.all)?")


class Point(NamedTuple):
    """A capture point, taken apart."""

    kind: str
    """residual, token or attention."""
    block: int | str
    """From 0, or "pool"."""
    all_rows: bool


def parse(visual: nn.Module, point: str) -> Point:
    """What `point` means in this tower, with K counted from 0. Raises ValueError for one it does not have."""
    match, n = POINT.fullmatch(point), attention.n_blocks(visual)
    if not match:
        raise ValueError(
            f"capture point {point!r} is unknown; "
            "accepted: residual.K, token.K, attention.K, attention.K.all, attention.pool"
        )
    block = match[2] or match[4]
    if block == attention.POOL:
        return Point("attention", block, bool(match[5]))
    if not -n <= int(block) < n and not (n == 0 and point == "attention.-1"):
        offered = f"blocks 0 to {n - 1}" if n else "no blocks"
        raise ValueError(f"capture point {point!r} is unknown; a {type(visual).__name__} has {offered}")
    return Point(match[1] or match[3], int(block) % max(n, 1), bool(match[5]))


@contextmanager
def captured(visual: nn.Module, points: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While open, every forward of `visual` fills the yielded dict, point by point, under the names asked for.

    Raises ValueError for a point that this tower does not have, AttentionError for attention that cannot be read.
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in points:
            point = parse(visual, name)
            keep = partial(found.__setitem__, name)
            if point.kind == "attention":
                handle = attention.attach(visual, point.block, "all" if point.all_rows else "cls", keep)
            else:
                block = visual.get_submodule(attention.block_path(visual, point.block))
                handle = block.register_forward_hook(
                    partial(_keep, keep, point.kind, attention.has_class_token(visual))
                )
            stack.callback(handle.remove)
        yield found


def _keep(keep: Callable, kind: str, has_class_token: bool, module: nn.Module, args: tuple, output: Tensor) -> None:
    if kind == "token":
        output = output[:, 0] if has_class_token else output.mean(1)
    keep(output)


def readable(visual: nn.Module, points: Sequence[str]) -> list[str]:
    """Those of `points` that `captured` can give for this tower."""
    good = []
    for point in points:
        try:
            with captured(visual, [point]):
                good.append(point)
        except (ValueError, attention.AttentionError):
            continue
    return good
