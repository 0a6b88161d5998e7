"""Attention rows of any block of a vision tower, read in the same forward pass that makes the embedding.

A hook on a block's attention module sees the block's normalised input. The rows are computed again from that input
and the module's own query and key weights, in float32 whatever the precision of the pass, because no library hands
them out: their fused kernels never form them. Attention is softmax(q k^T / sqrt(d)), d the width of a head
(Vaswani et al. 2017).

Read are OpenCLIP's own towers (transformers, CoCa's pooler, the pooling of its ResNets) and its timm towers with
plain, rotary, grouped, EVA or relative-position attention and latent pooling. Whatever else is refused by name: a
module with a part that is not listed in `KNOWN_PARTS` could use it before the softmax, and its rows would then be
wrong without a sign. `data/models/OPENCLIP.md` lists every model of OpenCLIP and what can be read of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

POOL = "pool"
"""The name, among blocks, of the tower's attentional pooling."""

KNOWN_PARTS = {
    *("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "qkv", "q_proj", "k_proj", "q", "kv"),
    *("q_bias", "k_bias", "ln_q", "ln_k", "q_norm", "k_norm", "latent", "pos_embed", "positional_embedding"),
    "rel_pos",
    # Used after the softmax only: they do not change a row.
    *("v_proj_weight", "v_proj", "v_bias", "attn_drop", "head_scale", "gate", "norm", "ln_inner", "mlp"),
    *("out_proj", "c_proj", "proj", "out_drop", "proj_drop"),
}

Rows = Float[Tensor, "image head token"]
Matrix = Float[Tensor, "image head query token"]


class AttentionError(Exception):
    """Attention that cannot be read as asked: the module, what it lacks, and what would be accepted."""


@dataclass(frozen=True)
class _Tower:
    """Where a vision tower keeps its attention modules, by their paths below the tower."""

    blocks: tuple[str, ...]
    pool: str | None
    has_class_token: bool
    pooled_by: str
    """What the embedding is read from: "token", "attention", "avg", or the library's word for another pooling."""
    n_skipped: int = 1
    """First tokens that are not in the mean, in a tower pooled by "avg"."""


class _Found(dict):
    """The yielded dict: says why a block is not in it."""

    def __missing__(self, block):
        raise AttentionError(
            f"block {block!r} has no attention yet: it was not asked for, or no forward pass went through the tower's "
            "own modules since (Encoder.encode without capture takes its fast path, which does not)"
        )


@contextmanager
def captured_attention(
    visual: nn.Module, blocks: Sequence[int | str] = (-1,), rows: str = "cls"
) -> Iterator[dict[int | str, Rows | Matrix]]:
    """While open, every forward of `visual` fills the yielded dict, under each block's name as the caller wrote it.

    blocks: numbers from 0, negative ones from the end, or "pool" for the tower's attentional pooling.
    rows "cls": (image, head, token), the class token's row (no matrix is formed). For "pool", and for the *last* block
        of a tower that pools by attention, the row of the pooling's (first) query: what its embedding is read by. In a
        tower that averages its patches, the mean of their rows, in every block.
    rows "all": (image, head, query, token), one row a token, or a query of the pooling.
    Tokens in the tower's order: class token, registers, then patches, row by row. A ResNet's pooling has its mean
    token first. Float32, on the tower's device, without gradients; each row sums to 1.
    Raises AttentionError on entry, naming the module and its missing or unknown part.
    """
    if rows not in ("cls", "all"):
        raise AttentionError(f"rows {rows!r} is unknown; accepted: cls, all")
    found, handles = _Found(), []
    try:
        for block in blocks:
            handles.append(attach(visual, block, rows, partial(found.__setitem__, block)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def attach(visual: nn.Module, block: int | str, rows: str, keep: Callable[[Rows | Matrix], None]) -> RemovableHandle:
    """Call `keep` with the rows of one block at every forward, as `captured_attention` has them, until removed."""
    tower = _tower(visual)
    path = _path(visual, tower, block, rows)
    module = visual.get_submodule(path)
    _check(module, path)
    averages = tower.pooled_by == "avg" and path != tower.pool
    read = slice(tower.n_skipped, None) if averages else slice(0, 1)
    hook = partial(_keep, keep, path, None if rows == "all" else read)
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def n_blocks(visual: nn.Module) -> int:
    """Number of blocks whose attention `captured_attention` can be asked for (0 in a ResNet: only "pool")."""
    return len(_tower(visual).blocks)


def n_heads(visual: nn.Module) -> int:
    """Number of heads of each block (of the pooling in a tower without blocks)."""
    tower = _tower(visual)
    return visual.get_submodule((*tower.blocks, tower.pool)[0]).num_heads


def block_path(visual: nn.Module, block: int) -> str:
    """Path below the tower of block `block`, whose output is the residual stream after it."""
    return _tower(visual).blocks[block].removesuffix(".attn")


def has_class_token(visual: nn.Module) -> bool:
    """Whether the first token of the residual stream is a class token."""
    return _tower(visual).has_class_token


def patch_grid(visual: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches, at the tower's own image size."""
    tower = _tower(visual)
    if not tower.blocks:
        height, width = (visual.image_size,) * 2 if isinstance(visual.image_size, int) else visual.image_size
        return height // 32, width // 32
    owner = visual.trunk.patch_embed if hasattr(visual, "trunk") else visual
    rows, cols = owner.grid_size
    return rows, cols


def head_maps(rows: Rows, grid: tuple[int, int]) -> Float[Tensor, "image head row col"]:
    """Each head's row over the patches alone, as the grid of patches; tokens before the patches are left out.

    The values stay parts of the whole row: a map sums to 1 minus what goes to class token and registers.
    Raises AttentionError where there are fewer tokens than patches.
    """
    n_patches = grid[0] * grid[1]
    if rows.ndim != 3 or rows.shape[-1] < n_patches:
        raise AttentionError(f"rows of shape {tuple(rows.shape)}; wanted (image, head, {n_patches} tokens or more)")
    return rows[..., rows.shape[-1] - n_patches :].unflatten(-1, grid)


def to_map(rows: Rows, grid: tuple[int, int]) -> Float[Tensor, "image row col"]:
    """Mean over heads of `head_maps`: the attention map that the paper shows and compares."""
    return head_maps(rows, grid).mean(1)


def rollout(matrices: Sequence[Matrix]) -> Float[Tensor, "image query token"]:
    """Attention rollout (Abnar & Zuidema 2020): how much of each first token reaches each last one.

    `matrices`: rows="all" of consecutive blocks, first block first. Each is averaged over heads, half identity
    is mixed in for the residual stream, and the results are multiplied; rows sum to 1. A last matrix that is not square
    is a pooling's: its query comes from no token, so no identity is added to it. `rollout(m)[:, :1]` is the
    class token's (or pooling's) row in the shape that `to_map` takes. Raises AttentionError for no matrix.
    """
    if not matrices:
        raise AttentionError("rollout of no matrix; wanted one or more blocks with rows='all'")
    joint = None
    for matrix in matrices:
        mixed = matrix.mean(1)
        if mixed.shape[-2] == mixed.shape[-1]:
            mixed = mixed + torch.eye(mixed.shape[-1], device=mixed.device)
            mixed = mixed / mixed.sum(-1, keepdim=True)
        joint = mixed if joint is None else mixed @ joint
    return joint


def _tower(visual: nn.Module) -> _Tower:
    """The registry: one paragraph a family of towers. Raises AttentionError for a tower of none of them."""
    kind = type(visual).__name__
    if hasattr(visual, "attnpool"):
        return _Tower((), "attnpool", has_class_token=False, pooled_by="attention")

    if hasattr(visual, "class_embedding"):
        if getattr(visual, "attn_pool_contrastive", None) is not None:
            raise AttentionError(f"visual ({kind}): its part attn_pool_contrastive is not one that can be read")
        has_pool = getattr(visual, "attn_pool", None) is not None
        pooled_by = "attention" if has_pool else {"tok": "token"}.get(visual.pool_type, visual.pool_type)
        blocks = _block_paths(visual, "transformer.resblocks")
        return _Tower(blocks, "attn_pool.attn" if has_pool else None, has_class_token=True, pooled_by=pooled_by)

    if hasattr(visual, "trunk"):
        blocks = _block_paths(visual, "trunk.blocks")
        trunk = visual.trunk
        pool = "trunk.attn_pool" if getattr(trunk, "attn_pool", None) is not None else None
        pooled_by = "attention" if pool else getattr(trunk, "global_pool", "")
        n_skipped = 0 if getattr(trunk, "pool_include_prefix", False) else getattr(trunk, "num_prefix_tokens", 0)
        has_class_token = getattr(trunk, "cls_token", None) is not None
        return _Tower(blocks, pool, has_class_token, pooled_by, n_skipped)

    raise AttentionError(
        f"visual ({kind}): found none of class_embedding, trunk, attnpool; wanted a vision tower, as in model.visual"
    )


def _block_paths(visual: nn.Module, path: str) -> tuple[str, ...]:
    parent, _, name = path.rpartition(".")
    owner = visual.get_submodule(parent)
    blocks = getattr(owner, name, None)
    if blocks is None:
        raise AttentionError(f"visual.{parent} ({type(owner).__name__}): found no {name}")
    for index, block in enumerate(blocks):
        if not isinstance(getattr(block, "attn", None), nn.Module):
            raise AttentionError(f"visual.{path}.{index} ({type(block).__name__}): found no attn")
    return tuple(f"{path}.{index}.attn" for index in range(len(blocks)))


def _path(visual: nn.Module, tower: _Tower, block: int | str, rows: str) -> str:
    """Path of the module that `block` and `rows` mean; the rule of "cls" in a tower without a class token is here."""
    name, n = f"visual ({type(visual).__name__})", len(tower.blocks)
    if block == POOL:
        if tower.pool is None:
            raise AttentionError(f"{name}: found no attentional pooling; it pools by {tower.pooled_by!r}")
        return tower.pool
    if isinstance(block, str) or not -max(n, 1) <= block < max(n, 1):
        accepted = [f"{-n} to {n - 1}"] * (n > 0) + [repr(POOL)] * (tower.pool is not None)
        raise AttentionError(f"{name}: found no block {block!r}; accepted: {', '.join(accepted)}")
    if n == 0 or (rows == "cls" and block in (-1, n - 1) and tower.pooled_by == "attention"):
        if rows == "all":
            raise AttentionError(f"{name}: found no blocks; accepted: {POOL!r}")
        return tower.pool
    if rows == "all" or tower.pooled_by == "avg":
        return tower.blocks[block]
    if not tower.has_class_token:
        accepted = "the last block (its pooling), or rows='all'" if tower.pool else "rows='all'"
        raise AttentionError(f"{name}: found no class token for the row of block {block}; accepted: {accepted}")
    if block in (-1, n - 1) and tower.pooled_by != "token":
        raise AttentionError(
            f"{name}: pools by {tower.pooled_by!r}, so the class token's last row does not reach the embedding; "
            "accepted: an earlier block, or rows='all'"
        )
    return tower.blocks[block]


def _check(module: nn.Module, path: str) -> None:
    """Raise AttentionError unless every part of the attention module is known and queries and keys are found."""
    parts = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    parts |= {name for name, child in module.named_children() if not isinstance(child, nn.Identity)}
    where = f"visual.{path} ({type(module).__name__})"
    known = KNOWN_PARTS if hasattr(getattr(module, "rel_pos", None), "get_bias") else KNOWN_PARTS - {"rel_pos"}
    if unknown := sorted(parts - known):
        raise AttentionError(f"{where}: its part {unknown[0]} is not one that can be read")
    if not hasattr(module, "num_heads"):
        raise AttentionError(f"{where}: found no num_heads")
    if getattr(module, "batch_first", True) is False:
        raise AttentionError(f"{where}: takes tokens before images; wanted batch_first=True")
    if _projections(module) is None:
        wanted = "in_proj_weight, qkv, q_proj and k_proj, or q and kv"
        raise AttentionError(f"{where}: found no weights of queries and keys ({wanted})")


def _projections(module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None] | None:
    """Weights and biases of queries and keys, (out, in) and (out,), float32; None where there are none."""

    def part(name: str) -> Tensor | nn.Module | None:
        found = getattr(module, name, None)
        return found if isinstance(found, Tensor) or hasattr(found, "weight") else None

    def thirds(joint: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if joint is None else joint.chunk(3)[:2]

    if part("in_proj_weight") is not None or part("q_proj_weight") is not None:
        # torch keeps three weights, but still one bias, where queries and keys differ in width (CoCa's pooler).
        joint = part("in_proj_weight")
        weights = thirds(joint) if joint is not None else (module.q_proj_weight, module.k_proj_weight)
        biases = thirds(part("in_proj_bias"))
    elif part("qkv") is not None:
        weights = thirds(module.qkv.weight)
        biases = (part("q_bias"), part("k_bias")) if part("q_bias") is not None else thirds(module.qkv.bias)
    elif part("q_proj") is not None and part("k_proj") is not None:
        weights, biases = (module.q_proj.weight, module.k_proj.weight), (module.q_proj.bias, module.k_proj.bias)
    elif part("q") is not None and part("kv") is not None:
        half = len(module.kv.weight) // 2
        weights = module.q.weight, module.kv.weight[:half]
        biases = module.q.bias, None if module.kv.bias is None else module.kv.bias[:half]
    else:
        return None
    float_biases = [None if bias is None else bias.float() for bias in biases]
    return weights[0].float(), float_biases[0], weights[1].float(), float_biases[1]


def _keep(keep: Callable, path: str, read: slice | None, module: nn.Module, args: tuple, kwargs: dict):
    """The hook: compute the rows from the module's input and hand them, or the mean of those in `read`, to `keep`."""
    if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
        raise AttentionError(f"visual.{path}: was called with a mask; only attention over all tokens can be read")
    with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
        query, key = _inputs(module, args)
        first_alone = read == slice(0, 1)
        matrix = _matrix(module, query[:, :1] if first_alone else query, key, kwargs)
        keep(matrix if read is None else matrix[:, :, read].mean(2))


def _inputs(
    module: nn.Module, args: tuple
) -> tuple[Float[Tensor, "image_or_1 query width"], Float[Tensor, "image token width"]]:
    """What queries and keys are projected from, float32. A learned query is the same for all images."""
    x = args[0].float()
    if hasattr(module, "latent"):
        return module.latent.float(), x if module.pos_embed is None else x + module.pos_embed.float()
    if hasattr(module, "positional_embedding"):
        # OpenCLIP's ResNets: the query is the mean over the last feature map, which is also a token.
        patches = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([patches.mean(1, keepdim=True), patches], 1) + module.positional_embedding.float()
        return tokens, tokens
    return x, args[1].float() if len(args) > 1 else x


def _matrix(module: nn.Module, query: Tensor, key: Tensor, call: dict) -> Matrix:
    """softmax(q k^T / sqrt(d)) over the tokens of `key`, one row for each token of `query`, which are its first ones.

    call: what else the module was called with: a rotary position embedding, or a bias that the blocks share.
    """
    rope, own_bias = call.get("rope"), getattr(module, "rel_pos", None)
    bias = call.get("shared_rel_pos") if own_bias is None else own_bias.get_bias()
    q_weight, q_bias, k_weight, k_bias = _projections(module)
    heads = module.num_heads
    width = len(q_weight) // heads
    q_norm, k_norm = (
        getattr(module, f"{letter}_norm", None) or getattr(module, f"ln_{letter}", None) or nn.Identity()
        for letter in "qk"
    )
    q = F.linear(query, q_weight, q_bias).unflatten(-1, (-1, width)).transpose(1, 2)
    q = _normed(q_norm, q) / width**0.5
    plain = rope is None and bias is None and isinstance(k_norm, nn.Identity)
    if query.shape[1] == 1 and plain and len(k_weight) == len(q_weight):
        # q (W x + b) = (q W) x + q b, and the same q b for every token leaves the softmax unchanged: one row costs
        # one product a head instead of a key a token.
        folded = torch.einsum("ihqd,hdw->ihqw", q, k_weight.unflatten(0, (heads, width)))
        return (folded[:, :, 0] @ key.transpose(1, 2)).softmax(-1).unsqueeze(2)
    k = F.linear(key, k_weight, k_bias).unflatten(-1, (-1, width)).transpose(1, 2)
    k = _normed(k_norm, k)
    if rope is not None:
        q, k = (_rotated(part, rope, module) for part in (q, k))
    if k.shape[1] != heads:  # grouped queries: consecutive heads share a key
        k = k.repeat_interleave(heads // k.shape[1], 1)
    scores = q @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias[:, :, : q.shape[2]].float()).softmax(-1)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm in its own precision, back in float32."""
    return norm(x.to(next(norm.parameters(), x).dtype)).float()


def _rotated(x: Float[Tensor, "image head token d"], rope: Tensor, module: nn.Module) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of the tokens after the prefix; `rope` holds sines, then cosines.

    Pairs that turn together are neighbours, or a half apart where the module says `rotate_half`.
    """
    n_prefix = module.num_prefix_tokens
    prefix, patches = x[:, :, :n_prefix], x[:, :, n_prefix:]
    if patches.shape[2] == 0:
        return prefix  # the class token's row alone
    sine, cosine = rope.float().chunk(2, -1)
    if getattr(module, "rotate_half", False):
        a, b = patches.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).flatten(-2)
    return torch.cat([prefix, patches * cosine + turned * sine], 2)
