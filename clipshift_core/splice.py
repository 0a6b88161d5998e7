"""An autoencoder spliced into a vision tower's forward pass, and the part of the tower that follows it.

The residual stream after a block is written as x = sum_j a_j d_j + b_dec + error. The error, what the dictionary leaves
of x, is added back as a constant, so that the tower's output is its own until a code a_j is changed. What lies before
the splice runs once; `Tail`, what lies behind it, is the tower's own modules again, and differentiable.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from clipshift_core import attention, hooks
from clipshift_core.activations import TOKENS
from clipshift_core.fastpath import check_views
from clipshift_core.sae import TopK
from clipshift_core.sae_kernels import Codes, weighted_rows

if TYPE_CHECKING:  # OpenCLIP takes seconds to import, and nothing of it is called by name here
    from clipshift_core.encoder import Encoder

TOLERANCE = 1e-5
"""Largest difference of a tail's embedding and the tower's own, relative to the largest entry."""

Stream = Float[Tensor, "image token width"]


class SpliceError(ValueError):
    """A tower that cannot be spliced as asked: the part that was not found, or the value and what is accepted."""


# What follows a block ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tail:
    """What a tower does with its residual stream after block `layer`; made by `tail`."""

    layer: int
    """From 0."""
    blocks: tuple[Callable[[Stream], Stream], ...]
    """The blocks behind it."""
    head: Callable[[Stream], Float[Tensor, "image dim"]]
    """Final norm, pooling and projection."""
    reads: Literal["class", "spatial", "all"]
    """The tokens of the last block that the head reads."""
    n_before: int
    """Tokens in front of the patches: class token and registers."""

    def __call__(self, stream: Stream) -> Float[Tensor, "image dim"]:
        """The unnormalised projected embedding, in the tower's precision (`Encoder`: float32).

        After the last block of a tower that reads its class token alone, a stream of just that token will do.
        """
        for block in self.blocks:
            stream = block(stream)
        return self.head(stream[:, :1] if self.reads == "class" else stream)

    @property
    def needs_class_alone(self) -> bool:
        return not self.blocks and self.reads == "class"

    def lens(self, directions: Float[Tensor, "row width"]) -> Float[Tensor, "row dim"]:
        """Directions of the stream taken through the head alone, as if each were the whole of every token it reads."""
        n_tokens = 1 if self.reads == "class" else self.n_before + 1
        return self.head(directions[:, None].expand(-1, n_tokens, -1))


def tail(encoder: "Encoder", layer: int) -> Tail:
    """What the tower does after block `layer` (from 0, or from the end with a minus).

    For OpenCLIP's own VisionTransformer, CoCa's pooler included, and for its timm towers with blocks. The blocks get
    whatever else the tower hands them (rotary positions), recorded in one forward pass. On other images the result is
    compared with the tower's own embedding: SpliceError where they differ by more than `TOLERANCE`, and for a tower
    with a part missing, which it names.
    """
    visual, name = encoder.model.visual, encoder.name
    try:
        n_blocks, has_class_token = attention.n_blocks(visual), attention.has_class_token(visual)
    except attention.AttentionError as error:
        raise SpliceError(f"{name}: {error}") from error
    if not -n_blocks <= layer < n_blocks:
        offered = f"blocks 0 to {n_blocks - 1}" if n_blocks else "no blocks"
        raise SpliceError(f"layer {layer}: {name} has {offered}")
    layer %= n_blocks
    head = _head(visual, name)

    parameter = next(visual.parameters())
    images, _ = check_views(encoder.image_size)
    pixels = encoder.preprocess(images[:5]).to(parameter.device, parameter.dtype)
    blocks = _recorded(visual, range(layer + 1, n_blocks), pixels[:2])
    point = f"residual.{layer}"
    with torch.no_grad(), hooks.captured(visual, [point]) as found:
        wanted = encoder.model.encode_image(pixels[2:], normalize=False)
    stream = found[point]
    n_before = stream.shape[1] - int(np.prod(encoder.grid))
    if n_before < int(has_class_token):
        raise SpliceError(f"{name}: {stream.shape[1]} tokens after block {layer}; its patches are {encoder.grid}")
    made = Tail(layer, blocks, head, _read_by(head, stream, n_before), n_before)
    if made.reads == "class" and blocks and type(blocks[-1].func).__name__ == "ResidualAttentionBlock":
        # Only the class token leaves the last block: its query, projection and MLP are all of it that is needed.
        short = replace(made, blocks=(*blocks[:-1], partial(_class_alone, blocks[-1].func, **blocks[-1].keywords)))
        # Built from the block's parts, which a version of OpenCLIP may name or call otherwise.
        with suppress(AttributeError, TypeError, RuntimeError):
            if _difference(short, stream, wanted) <= TOLERANCE:
                return short
    difference = _difference(made, stream, wanted)
    if not difference <= TOLERANCE:
        raise SpliceError(
            f"{name}: what follows block {layer} differs by {difference:.1e} from the tower's own embedding, more than "
            f"{TOLERANCE:g}: something happens behind its blocks that is not known here"
        )
    return made


@torch.no_grad()
def _difference(made: Tail, stream: Stream, wanted: Float[Tensor, "image dim"]) -> float:
    return float((made(stream) - wanted).abs().max() / wanted.abs().max())


def _class_alone(block: nn.Module, stream: Stream, **call: Any) -> Float[Tensor, "image 1 width"]:
    """The class token behind one of OpenCLIP's plain blocks."""
    normed = block.ln_1(stream)
    x = stream[:, :1] + block.ls_1(block.attention(normed[:, :1], normed, normed, **call))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _recorded(visual: nn.Module, indices: Sequence[int], pixels: Float[Tensor, "image 3 h w"]) -> tuple[Callable, ...]:
    """Blocks with the arguments that the tower hands them beside the stream."""
    blocks = [visual.get_submodule(attention.block_path(visual, index)) for index in indices]
    calls: dict[int, dict[str, Any]] = {}

    def keep(index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if len(args) != 1:
            raise SpliceError(f"block {indices[index]} ({type(block).__name__}) is called with {len(args)} arguments")
        calls[index] = kwargs

    handles = [block.register_forward_pre_hook(partial(keep, i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            visual(pixels)
    finally:
        for handle in handles:
            handle.remove()
    # Cloned: a tower may have cached them in inference mode, and no gradient passes through such tensors.
    held = {
        index: {key: value.clone() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        for index, kwargs in calls.items()
    }
    return tuple(partial(block, **held[index]) for index, block in enumerate(blocks))


def _read_by(head: Callable[[Stream], Tensor], stream: Stream, n_before: int) -> Literal["class", "spatial", "all"]:
    """The tokens whose gradient through the head is not zero."""
    tokens = stream.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(head(tokens).square().sum(), tokens)
    read = gradient.abs().sum((0, 2)) > 0
    if not read[1:].any():
        return "class"
    return "all" if read[:n_before].any() else "spatial"


def _head(visual: nn.Module, name: str) -> Callable[[Stream], Float[Tensor, "image dim"]]:
    """Final norm, pooling and projection: one paragraph a family of towers."""
    kind = type(visual).__name__

    def part(owner: nn.Module, path: str, attribute: str) -> Any:
        if not hasattr(owner, attribute):
            raise SpliceError(f"{name}: {path} ({type(owner).__name__}): found no {attribute}")
        return getattr(owner, attribute)

    if hasattr(visual, "trunk"):
        trunk, projection = visual.trunk, part(visual, "visual", "head")
        norm, pooled = part(trunk, "visual.trunk", "norm"), part(trunk, "visual.trunk", "forward_head")
        return lambda stream: projection(pooled(norm(stream)))

    norm, projection = part(visual, "visual", "ln_post"), part(visual, "visual", "proj")
    pooling, norm_last = part(visual, "visual", "pool_type"), part(visual, "visual", "final_ln_after_pool")
    if pooling not in ("tok", "avg"):
        raise SpliceError(f"{name}: visual ({kind}): it pools by {pooling!r}; accepted: 'tok', 'avg'")
    if (pool := part(visual, "visual", "attn_pool")) is not None:
        norm_last = False

    def own_head(stream: Stream) -> Float[Tensor, "image dim"]:
        if pool is not None:  # CoCa's: learned queries in place of the tokens, the first of them pooled
            stream = pool(stream)
        if pooling == "tok":
            pooled = norm(stream[:, 0])
        else:
            pooled = norm(stream[:, 1:].mean(1)) if norm_last else norm(stream[:, 1:]).mean(1)
        return pooled if projection is None else pooled @ projection

    return own_head


# The autoencoder in between -----------------------------------------------------------------------------------------


class State(NamedTuple):
    """A batch of images at the splice: all that `Splice.embed` needs, on the tower's device.

    A unit of attribution is a latent of an image: with class tokens one slot of its codes; with spatial tokens the
    latent in all tokens of the image, units in the order of the latents and padded to the fullest image.
    """

    stream: Stream
    """The residual stream after the block; the class token alone where nothing else is read."""
    codes: Codes
    """A row an image for class tokens; for spatial ones a row a token, token by token of the first image, then on."""
    error: Float[Tensor, "row width"]
    """What the dictionary leaves of each row: constant."""
    latents: Int[Tensor, "image unit"]
    """The latent of each unit; any latent where `on` is False."""
    unit: Int[Tensor, "row slot"]
    """The unit, within its image, that each code belongs to."""

    @property
    def on(self) -> Bool[Tensor, "image unit"]:
        """Which units are there: those with a code other than zero."""
        return self.by_latent((self.codes.values != 0).float()) > 0

    def by_latent(self, values: Float[Tensor, "*text row slot"]) -> Float[Tensor, "*text image unit"]:
        """Sums over the codes of each unit: over tokens, with spatial ones."""
        lead, (n_images, n_units) = values.shape[:-2], self.latents.shape
        unit = self.unit.reshape(n_images, -1).expand(*lead, -1, -1)
        values = values.reshape(*lead, n_images, -1)
        return values.new_zeros(*lead, n_images, n_units).scatter_add(-1, unit, values)

    def double(self) -> "State":
        """The same numbers in float64, for a splice `in_double`."""
        codes = self.codes._replace(values=self.codes.values.double())
        return self._replace(stream=self.stream.double(), codes=codes, error=self.error.double())

    def scaled(self, factor: Float[Tensor, "image unit"]) -> Float[Tensor, "row slot"]:
        """The codes' values, each times the factor of its unit: 0 deletes a latent from an image, 1 keeps it."""
        spread = factor.to(self.codes.values).gather(1, self.unit.reshape(len(factor), -1))
        return self.codes.values * spread.view_as(self.codes.values)


class Splice:
    """An autoencoder after one block of a tower, in the class token or in the spatial ones.

    encoder, sae: on one device.  layer: from 0, or from the end with a minus.  token: as in `activations.TOKENS`.
    Raises SpliceError where the tower's tail cannot be read, the widths differ, or the tower does not read these
    tokens after this block at all.
    """

    def __init__(self, encoder: "Encoder", sae: TopK, layer: int, token: str):
        if token not in TOKENS:
            raise SpliceError(f"token {token!r} is unknown; accepted: {', '.join(TOKENS)}")
        self.encoder, self.sae, self.token = encoder, sae, token
        self.tail = tail(encoder, layer)
        self.layer = self.tail.layer
        if token == "class" and not attention.has_class_token(encoder.model.visual):
            raise SpliceError(f"{encoder.name} has no class token; accepted: spatial")
        if not self.tail.blocks and self.tail.reads not in (token, "all"):
            raise SpliceError(
                f"{encoder.name} does not read its {token} tokens after its last block, {self.layer}: no latent in "
                f"them has an effect; accepted: {self.tail.reads} tokens, or an earlier block"
            )
        if sae.width != encoder.width:
            raise SpliceError(f"an autoencoder of width {sae.width}; {encoder.name} has {encoder.width}")
        self.W_dec, self.b_dec = sae.W_dec.detach(), sae.b_dec.detach()
        if self.W_dec.device.type != torch.device(encoder.device).type:
            raise SpliceError(f"the autoencoder is on {self.W_dec.device}, {encoder.name} on {encoder.device}")
        self._place = slice(0, 1) if token == "class" else slice(self.tail.n_before, None)

    def in_double(self) -> "Splice":
        """The same with float64 from the splice on, for differences that float32 would drown: one latent often moves a
        prediction by less than a thousandth, and the order of such effects is then that of its rounding."""
        visual = deepcopy(self.encoder.model.visual).double()
        encoder, model = copy(self.encoder), copy(self.encoder.model)
        model._modules = {**model._modules, "visual": visual}  # the other parts, and the tower itself, stay as they are
        encoder.model = model
        made = copy(self)
        made.tail, made.sae = tail(encoder, self.layer), deepcopy(self.sae).double()
        made.W_dec, made.b_dec = made.sae.W_dec.detach(), made.sae.b_dec.detach()
        made.__dict__.pop("lens", None)
        return made

    def read(self, images: UInt8[Tensor, "image h w 3"] | np.ndarray) -> State:
        """Encode images once, up to the splice and with the codes there.

        Class tokens after the last block take the encoder's fast path; all else OpenCLIP's own forward in float32.
        """
        if not len(images):
            raise SpliceError("no images; one or more are wanted")
        point = f"{'token' if self.tail.needs_class_alone else 'residual'}.{self.layer}"
        found = self.encoder.encode(images, capture=[point]).captured[point]
        return self.state_of(found[:, None] if found.ndim == 2 else found)

    def from_activations(self, x: Float[Tensor, "image width"] | np.ndarray) -> State:
        """The same from stored class tokens of the last block: the tower does not run."""
        if not (self.tail.needs_class_alone and self.token == "class"):
            raise SpliceError(
                f"{self.token} tokens after block {self.layer} of {self.encoder.name}: activations alone are enough "
                "for class tokens after the last block of a tower that reads nothing else; use read"
            )
        x = torch.as_tensor(x)
        if x.ndim != 2 or x.shape[1] != self.sae.width or not len(x):
            raise SpliceError(f"activations of shape {tuple(x.shape)}; (image, {self.sae.width}) is wanted")
        return self.state_of(x[:, None])

    @torch.no_grad()
    def state_of(self, stream: Stream) -> State:
        """The same from a residual stream after this block, as `hooks` captures it."""
        stream = stream.to(self.W_dec)
        x = stream[:, self._place].flatten(0, 1)
        codes = self.sae.encode(x)
        error = x - self.sae.decode(codes)
        if self.token == "class":
            return State(stream, codes, error, codes.indices, _slots(codes))
        return State(stream, codes, error, *_units(codes, len(stream), self.sae.n_latents))

    def embed(self, state: State, values: Float[Tensor, "row slot"] | None = None) -> Float[Tensor, "image dim"]:
        """The unnormalised embedding with `values` in place of the codes' own; gradients flow to them."""
        return self.through(state.stream, self.tokens(state, values))

    def tokens(self, state: State, values: Float[Tensor, "row slot"] | None = None) -> Stream:
        """The spliced tokens: sum_j values_j d_j + b_dec + error."""
        codes = Codes(state.codes.indices, state.codes.values if values is None else values)
        return (weighted_rows(codes, self.W_dec) + self.b_dec + state.error).unflatten(0, (len(state.stream), -1))

    def through(self, stream: Stream, tokens: Stream) -> Float[Tensor, "image dim"]:
        """The embedding of a stream with the spliced tokens in their place."""
        start, stop, _ = self._place.indices(stream.shape[1])
        return self.tail(torch.cat([stream[:, :start], tokens, stream[:, stop:]], 1))

    @cached_property
    def lens(self) -> Float[Tensor, "latent dim"]:
        """Each decoder direction through final norm and projection: what the logit lens reads."""
        with torch.no_grad():
            return self.tail.lens(self.W_dec)


def _slots(codes: Codes) -> Int[Tensor, "row slot"]:
    return torch.arange(codes.indices.shape[1], device=codes.indices.device).expand_as(codes.indices)


def _units(codes: Codes, n_images: int, n_latents: int) -> tuple[Int[Tensor, "image unit"], Int[Tensor, "row slot"]]:
    """`State.latents` and `State.unit` of spatial tokens: the latents that are on anywhere in each image."""
    row, slot = codes.values.nonzero(as_tuple=True)
    image = row // (len(codes.values) // n_images)
    keys, unit_of = (image * n_latents + codes.indices[row, slot]).unique(return_inverse=True)
    owner = keys // n_latents
    count = torch.bincount(owner, minlength=n_images)
    place = torch.arange(len(keys), device=keys.device) - (count.cumsum(0) - count)[owner]
    latents = torch.zeros(n_images, max(1, int(count.max())), dtype=torch.long, device=keys.device)
    latents[owner, place] = keys % n_latents
    unit = torch.zeros_like(codes.indices)  # a code of zero adds nothing to whatever it is counted with
    unit[row, slot] = place[unit_of]
    return latents, unit
