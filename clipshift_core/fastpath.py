"""OpenCLIP's vision transformer, written out again for speed; the model's own forward is its oracle.

What is saved against `model.encode_image`, none of it changing the result beyond rounding:

- on a CPU, weights laid out once for oneDNN, with the activation and the residual sum inside the product;
- mean and standard deviation of the pixels folded into the patch embedding, which reads uint8 directly;
- in the last block only the class token's query, projection and MLP (nothing reads the other tokens);
- sub-batches whose activations stay in the cache.

The class token and its attention row can be captured in any block at next to no cost: both are in hand.

oneDNN's prepacked products are private torch operations, so nothing here is trusted: `encoder` compares a new
`FastVision` with the model itself and drops it when they differ.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

ROWS = 1600
"""Tokens in one sub-batch on a CPU: 768 x 3072 products run at peak up to here and lose up to half beyond
(the activations leave the last-level cache, and the allocator returns them to the system each time)."""


class NotFast(Exception):
    """The tower has a part this file does not know; the reason is in str."""


@dataclass(frozen=True)
class Linear:
    """y = act(x W^T + b), prepacked where `packed`, with products in the weight's own precision."""

    weight: Tensor
    bias: Tensor | None
    act: str = "none"
    """none, gelu (exact), gelu_tanh, or swish (x * sigmoid(x))."""
    packed: bool = False

    def __call__(self, x: Float[Tensor, "row in"], plus: Tensor | None = None) -> Float[Tensor, "row out"]:
        """The product; with `plus`, plus + product in the precision of `plus` (the residual stream)."""
        x = x.to(self.weight.dtype)
        if self.packed:
            if plus is not None and plus.dtype == x.dtype:
                return torch.ops.mkldnn._linear_pointwise.binary(x, plus, self.weight, self.bias, "add")
            name = "gelu" if self.act.startswith("gelu") else self.act
            kind = {"gelu": "none", "gelu_tanh": "tanh"}.get(self.act, "")
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], kind)
        else:
            y = F.linear(x, self.weight, self.bias)
            if self.act == "swish":
                y = F.silu(y, inplace=True)
            elif self.act != "none":
                y = F.gelu(y, approximate="tanh" if self.act == "gelu_tanh" else "none")
        return y if plus is None else plus + y


@dataclass(frozen=True)
class Norm:
    """Layer normalisation in float32."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Block:
    """One pre-norm transformer block; `query` is apart from `key_value` in the last one only."""

    norm_1: Norm
    qkv: Linear | None
    query: Linear | None
    key_value: Linear | None
    out: Linear
    norm_2: Norm
    up: Linear
    down: Linear


@dataclass(frozen=True)
class FastVision:
    """Callable twin of an OpenCLIP `VisionTransformer` with its pixel normalisation in front."""

    patch: Linear
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    first: Float[Tensor, " width"]
    """Class embedding plus its position."""
    position: Float[Tensor, "patch width"]
    norm_pre: Norm | None
    blocks: tuple[Block, ...]
    heads: int
    norm_post: Norm
    projection: Float[Tensor, "width dim"]

    @classmethod
    def build(cls, visual: nn.Module, mean: Sequence[float], std: Sequence[float], *, dtype: torch.dtype, packed: bool):
        """From an OpenCLIP `VisionTransformer` in float32. Products in `dtype`, everything else in float32.

        `mean`, `std`: per channel, for pixels in 0..1. Raises `NotFast` for a tower with other parts.
        """
        _refuse_unknown(visual)

        def linear(weight: Tensor, bias: Tensor | None, act: str = "none", dtype: torch.dtype = dtype) -> Linear:
            weight = weight.detach().to(dtype).contiguous()
            bias = None if bias is None else bias.detach().to(dtype).contiguous()
            if packed:
                weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            return Linear(weight, bias, act, packed)

        def scaled(layer: nn.Linear, by: Tensor) -> tuple[Tensor, Tensor | None]:
            return layer.weight * by.reshape(-1, 1), None if layer.bias is None else layer.bias * by.reshape(-1)

        *body, last = visual.transformer.resblocks
        blocks = [_block(block, linear, scaled, is_last=False) for block in body]
        blocks.append(_block(last, linear, scaled, is_last=True))

        # Pixel p in 0..255 becomes (p / 255 - mean) / std: a factor on the weight and a constant in the bias.
        kernel = visual.conv1.weight.double()
        channel = kernel.new_tensor(std).reshape(1, 3, 1, 1)
        constant = -(kernel * kernel.new_tensor(mean).reshape(1, 3, 1, 1) / channel).sum((1, 2, 3))
        by_pixel = (kernel / (255 * channel)).permute(0, 2, 3, 1).flatten(1)
        # 2.6 % of a ViT-B/32's products: kept in float32 in every precision.
        patch = linear(by_pixel, constant, dtype=torch.float32)
        position = visual.positional_embedding.detach()
        return cls(
            patch=patch,
            patch_size=tuple(visual.patch_size),
            grid=tuple(visual.grid_size),
            first=(visual.class_embedding + position[0]).detach(),
            position=position[1:],
            norm_pre=None if isinstance(visual.ln_pre, nn.Identity) else _norm(visual.ln_pre),
            blocks=tuple(blocks),
            heads=visual.transformer.resblocks[0].attn.num_heads,
            norm_post=_norm(visual.ln_post),
            projection=visual.proj.detach(),
        )

    def __call__(
        self, images: UInt8[Tensor, "image h w 3"], points: Mapping[str, tuple[str, int]] | None = None
    ) -> tuple[Float[Tensor, "image dim"], dict[str, Tensor]]:
        """Unnormalised, projected embeddings of images that have the tower's own size, and what was captured.

        points: what to capture in the same pass, by name: ("token", K) or ("attention", K), as in `hooks`.
        """
        points = points or {}
        step = len(images) if images.is_cuda else max(1, ROWS // (1 + len(self.position)))
        parts = [self._sub_batch(part, points) for part in images.split(max(1, step))]
        embedding = torch.cat([part for part, _ in parts])
        return embedding, {name: torch.cat([found[name] for _, found in parts]) for name in points}

    def _sub_batch(
        self, images: UInt8[Tensor, "image h w 3"], points: Mapping[str, tuple[str, int]]
    ) -> tuple[Float[Tensor, "image dim"], dict[str, Tensor]]:
        n, width = len(images), len(self.first)
        (rows, cols), (ph, pw) = self.grid, self.patch_size
        pixels = images[:, : rows * ph, : cols * pw].reshape(n, rows, ph, cols, pw, 3)
        pixels = pixels.transpose(2, 3).reshape(n * rows * cols, ph * pw * 3).float()
        x = torch.empty(n, 1 + rows * cols, width, device=images.device)
        x[:, 0] = self.first
        torch.add(self.patch(pixels).view(n, rows * cols, width), self.position, out=x[:, 1:])
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        found = {}
        for index, block in enumerate(self.blocks):
            x, attention = self._block(block, x, wants_attention=("attention", index) in points.values())
            seen = {("token", index): x[:, 0], ("attention", index): attention}
            found |= {name: seen[point].clone() for name, point in points.items() if point in seen}
        return self.norm_post(x[:, 0]) @ self.projection, found

    def _block(
        self, block: Block, x: Float[Tensor, "image token width"], *, wants_attention: bool
    ) -> tuple[Float[Tensor, "image token width"], Float[Tensor, "image head token"] | None]:
        """One block, and the class token's attention in it; the last one returns the class token alone."""
        n, tokens, width = x.shape
        h = block.norm_1(x).view(n * tokens, width)
        if block.qkv is not None:
            q, k, v = block.qkv(h).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        else:
            k, v = block.key_value(h).view(n, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            q = block.query(h.view(n, tokens, width)[:, 0]).view(n, 1, self.heads, -1).transpose(1, 2)
            x, tokens = x[:, :1], 1
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * tokens, width)
        attention = None
        if wants_attention:
            # the row alone: queries and keys are here, no library hands out the rest
            scores = q[:, :, :1].float() @ k.float().transpose(2, 3) / q.shape[-1] ** 0.5
            attention = scores[:, :, 0].softmax(-1)
        x = block.out(mixed, plus=x.reshape(n * tokens, width))
        x = block.down(block.up(block.norm_2(x)), plus=x)
        return x.view(n, tokens, width), attention


def check_views(size: int, n_images: int = 4) -> tuple[UInt8[Tensor, "viewimage size size 3"], int]:
    """Random blotches and five changed versions of them (noise, blur, contrast, mirror, shift), ordered by view."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n_images, 3, 7, 7, generator=generator)
    image = F.interpolate(coarse, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    views = (
        image,
        image + 0.5 * torch.randn(image.shape, generator=generator),
        F.avg_pool2d(image, 5, 1, 2),
        0.8 * image + 0.2 * image.mean((1, 2, 3), keepdim=True) + 0.05,
        image.flip(3),
        image.roll((size // 16, size // 16), (2, 3)),
    )
    pixels = (torch.cat(views).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous(), len(views)


@cache
def bfloat16_gain(device: torch.device) -> float:
    """How many times faster the device multiplies in bfloat16 than in float32; below 1, slower.

    From one product of a ViT-B's size, the best of five taken in turn. A CPU with instructions for bfloat16 gains a
    factor of about 2 and one without loses that or more, so that other work on the machine does not turn the answer.
    Raises RuntimeError where torch has no such product.
    """
    rows = 8 * ROWS if device.type == "cuda" else ROWS
    x, weight = torch.ones(rows, 768, device=device), torch.ones(3072, 768, device=device)
    operands = {dtype: (x.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(operands, float("inf"))
    for turn in range(6):  # the first warms up
        for dtype, pair in operands.items():
            start = time.perf_counter()
            F.linear(*pair)[0, 0].item()  # waits for the device
            if turn:
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def shift_error(mixed: Float[Tensor, "viewimage dim"], exact: Float[Tensor, "viewimage dim"], n_views: int) -> float:
    """Largest relative error, over the views, of the mean over images of 1 - cos(original, view).

    Rows are ordered by view, then image; view 0 is the original.
    """

    def shifts(embedding: Tensor) -> Tensor:
        unit = F.normalize(embedding.double(), dim=-1).unflatten(0, (n_views, -1))
        return 1 - (unit[1:] * unit[:1]).sum(-1).mean(1)

    exact = shifts(exact)
    return float(((shifts(mixed) - exact).abs() / exact).max())


def _norm(layer: nn.LayerNorm) -> Norm:
    return Norm(layer.weight.detach(), layer.bias.detach(), layer.eps)


def _block(block: nn.Module, linear, scaled, *, is_last: bool) -> Block:
    width = block.ln_1.weight.numel()
    attn, act = block.attn, block.mlp.gelu
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    one = torch.ones(1, device=weight.device)
    ls_1, ls_2 = getattr(block.ls_1, "gamma", one), getattr(block.ls_2, "gamma", one)
    up, up_bias, down = block.mlp.c_fc.weight, block.mlp.c_fc.bias, scaled(block.mlp.c_proj, ls_2)
    if type(act).__name__ == "QuickGELU":
        # z sigmoid(1.702 z) = swish(1.702 z) / 1.702: oneDNN fuses swish, so the factor goes into the weights.
        name, up, up_bias, down = "swish", up * 1.702, up_bias * 1.702, (down[0] / 1.702, down[1])
    else:
        name = "gelu" if act.approximate == "none" else "gelu_tanh"
    split = {
        "qkv": None if is_last else linear(weight, bias),
        "query": linear(weight[:width], bias[:width]) if is_last else None,
        "key_value": linear(weight[width:], bias[width:]) if is_last else None,
    }
    return Block(
        norm_1=_norm(block.ln_1),
        out=linear(*scaled(attn.out_proj, ls_1)),
        norm_2=_norm(block.ln_2),
        up=linear(up, up_bias, name),
        down=linear(*down),
        **split,
    )


def _refuse_unknown(visual: nn.Module) -> None:
    """Raise `NotFast` unless every part of the tower is one that this file reproduces."""

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise NotFast(what)

    kind = type(visual).__name__
    need(kind == "VisionTransformer" and hasattr(visual, "transformer"), f"its vision tower is a {kind}")
    need(getattr(visual, "attn_pool", None) is None, "it pools by attention")
    need(visual.pool_type == "tok", f"it pools by {visual.pool_type!r}, not by the class token")
    need(not visual.output_tokens and visual.proj is not None, "it returns tokens or has no projection")
    for block in visual.transformer.resblocks:
        kind = type(block).__name__
        need(kind == "ResidualAttentionBlock", f"its blocks are of kind {kind}")
        need(getattr(block.attn, "in_proj_weight", None) is not None, "its attention has no common in_proj_weight")
        need(block.attn.in_proj_bias is not None, "its attention has no bias")
        need(type(block.mlp.gelu).__name__ in ("GELU", "QuickGELU"), f"its activation is {block.mlp.gelu}")
