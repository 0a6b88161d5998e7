"""Attention rows against torch's need_weights, transformers' eager CLIP and timm's own unfused softmax.

All weights are random, spread wider than at initialisation so that the rows are far from uniform. Towers have the
width and the tokens of the named models but few blocks; one ViT-B-32 is whole.
"""

from collections import OrderedDict

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from test_encoder import for_transformers
from torch import nn
from transformers import CLIPConfig, CLIPModel

from clipshift_core.attention import (
    AttentionError,
    captured_attention,
    head_maps,
    n_blocks,
    patch_grid,
    rollout,
    to_map,
)

TOLERANCE = 1e-5
"""fp32: largest difference of two ways of computing the same weight, which lies in 0..1."""

TEXT = {"context_length": 12, "vocab_size": 9, "width": 64, "heads": 2, "layers": 2}
"""A small text tower, where one is needed for a whole model."""


def spread(module, seed=0):
    """Random parameters of a scale at which a softmax row has a few large entries; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.2 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.04
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def own_tower(name, layers=2, **settings):
    """OpenCLIP's own VisionTransformer of a named model, with `layers` blocks."""
    vision = open_clip.get_model_config(name)["vision_cfg"] | {"layers": layers, **settings}
    torch.manual_seed(0)
    return spread(open_clip.CLIP(48, vision, TEXT).visual)


def timm_tower(name, depth=2, **settings):
    """The timm model under the trunk of a named model, with `depth` blocks (OpenCLIP's TimmModel takes no depth)."""
    vision = open_clip.get_model_config(name)["vision_cfg"]
    options = {"num_classes": 0, "global_pool": vision["timm_pool"], "depth": depth, **settings}
    torch.manual_seed(0)
    trunk = timm.create_model(vision["timm_model_name"], pretrained=False, **options)
    return spread(nn.Sequential(OrderedDict(trunk=trunk)))


def pixels(visual, n=2):
    size = visual.image_size if hasattr(visual, "image_size") else visual.trunk.patch_embed.img_size
    height, width = np.broadcast_to(size, 2).tolist()
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def block_inputs(visual, images):
    """Each block's input, and what follows the last, by plain hooks on the blocks."""
    blocks = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks
    seen = []
    handles = [block.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for block in blocks]
    visual(images)
    for handle in handles:
        handle.remove()
    return seen


def torch_weights(query, key, q, k, v, heads):
    """nn.MultiheadAttention's own weights with the given (weight, bias) pairs."""
    width = len(q[0])
    judge = nn.MultiheadAttention(width, heads, batch_first=True, kdim=key.shape[-1], vdim=key.shape[-1])
    with torch.no_grad():
        if judge.in_proj_weight is not None:
            judge.in_proj_weight.copy_(torch.cat([q[0], k[0], v[0]]))
        else:
            for part, (weight, _) in zip("qkv", (q, k, v), strict=True):
                getattr(judge, f"{part}_proj_weight").copy_(weight)
        judge.in_proj_bias.copy_(torch.cat([q[1], k[1], v[1]]))
        return judge(query, key, key, need_weights=True, average_attn_weights=False)[1]


def close(found, wanted):
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert wanted.std() > 0.2 / wanted.shape[-1]  # the rows are not uniform
    assert (found - wanted).abs().max() < TOLERANCE
    assert (found.sum(-1) - 1).abs().max() < TOLERANCE
    return True


# --- OpenCLIP's own towers --------------------------------------------------------------------------------


def check_against_torch(visual, images, every, rows):
    """All blocks against nn.MultiheadAttention's need_weights on the input that the same block gets."""
    inputs = block_inputs(visual, images)
    for index, block in enumerate(visual.transformer.resblocks):
        x = block.ln_1(inputs[index])
        wanted = block.attn(x, x, x, need_weights=True, average_attn_weights=False)[1]
        assert close(every[index], wanted) and close(rows[index], wanted[:, :, 0])


def test_every_block_of_a_whole_tower_equals_torchs_weights():
    visual = own_tower("ViT-B-32", 12)
    images = pixels(visual)
    plain = visual(images)
    with captured_attention(visual, range(12), "all") as every, captured_attention(visual, [*range(12), -1]) as rows:
        assert torch.equal(visual(images), plain)  # the embedding of the same pass
    check_against_torch(visual, images, every, rows)
    assert torch.equal(rows[-1], rows[11])
    assert to_map(rows[-1], patch_grid(visual)).shape == (2, 7, 7)


@pytest.mark.parametrize("name, quick", [("ViT-B-32", True), ("ViT-B-16", False), ("ViT-L-14", True)])
def test_equals_transformers_eager_clip_and_torchs_weights(name, quick):
    vision = open_clip.get_model_config(name)["vision_cfg"] | {"layers": 3}
    torch.manual_seed(0)
    model = spread(open_clip.CLIP(48, vision, TEXT, quick_gelu=quick))
    act = "quick_gelu" if quick else "gelu"
    config = CLIPConfig(
        projection_dim=48,
        vision_config={
            **{"image_size": 224, "patch_size": vision["patch_size"], "hidden_size": vision["width"]},
            **{"intermediate_size": 4 * vision["width"], "num_hidden_layers": 3, "hidden_act": act},
            "num_attention_heads": vision["width"] // 64,
        },
        text_config={
            **{"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"vocab_size": 9, "max_position_embeddings": 12, "eos_token_id": 8, "hidden_act": act},
        },
        attn_implementation="eager",
    )
    other = CLIPModel(config).eval()
    problems = other.load_state_dict(for_transformers(model.state_dict()), strict=False)
    assert not problems.unexpected_keys and all("position_ids" in key for key in problems.missing_keys)
    images = pixels(model.visual, 1)
    with torch.no_grad():
        wanted = other.vision_model(pixel_values=images, output_attentions=True).attentions
    with (
        captured_attention(model.visual, range(3), "all") as every,
        captured_attention(model.visual, range(3)) as rows,
    ):
        model.encode_image(images)
    for index in range(3):
        assert close(every[index], wanted[index]) and close(rows[index], wanted[index][:, :, 0])
    check_against_torch(model.visual, images, every, rows)


def test_blocks_that_normalise_queries_and_keys():
    visual = own_tower("ViT-B-32", qk_norm=True)
    images = pixels(visual)
    with captured_attention(visual, [1], "all") as found:
        visual(images)
    block = visual.transformer.resblocks[1]
    q, k, _ = nn.functional.linear(
        block.ln_1(block_inputs(visual, images)[1]), block.attn.in_proj_weight, block.attn.in_proj_bias
    ).chunk(3, -1)
    q, k = (part.unflatten(-1, (12, 64)).transpose(1, 2) for part in (q, k))
    wanted = (block.attn.ln_q(q) @ block.attn.ln_k(k).mT / 8).softmax(-1)
    assert close(found[1], wanted)
    with captured_attention(visual, [1]) as rows:
        visual(images)
    assert close(rows[1], wanted[:, :, 0])


def mean_rows(visual, unfused, n_before):
    """Every block's cls row in a tower that averages its patches, against the mean of their rows by the oracle."""
    with captured_attention(visual, [0, 1, -1]) as rows, captured_attention(visual, [0, 1], "all") as every:
        visual(pixels(visual))
    for block in (0, 1):
        assert close(every[block], unfused[block])
        assert close(rows[block], unfused[block][:, :, n_before:].mean(2))
    assert torch.equal(rows[-1], rows[1])
    return rows[-1]


def test_a_mean_of_rows_where_patches_are_averaged():
    """CLIPA: the class token is a token like others, and the embedding is the mean over the patches alone."""
    visual = own_tower("ViT-L-14-CLIPA", width=128, head_width=64, image_size=56)
    inputs = block_inputs(visual, pixels(visual))
    wanted = []
    for index, block in enumerate(visual.transformer.resblocks):
        x = block.ln_1(inputs[index])
        wanted.append(block.attn(x, x, x, need_weights=True, average_attn_weights=False)[1])
    rows = mean_rows(visual, wanted, n_before=1)
    assert to_map(rows, patch_grid(visual)).shape == (2, 4, 4)


def test_cocas_pooler_is_read_for_the_last_block():
    # 96 wide, pooled into 48: torch keeps separate weights for queries and keys.
    visual = spread(
        VisionTransformer(64, 16, 96, 2, 3, 4.0, attentional_pool=True, attn_pooler_queries=5, output_dim=48)
    )
    images, pool = pixels(visual), visual.attn_pool
    kept = []
    handle = visual.transformer.register_forward_hook(lambda module, args, output: kept.append(output))
    with captured_attention(visual, [-1, "pool", 0]) as rows, captured_attention(visual, ["pool", -1], "all") as every:
        visual(images)
    handle.remove()
    x, query = pool.ln_k(kept[0]), pool.ln_q(pool.query).expand(2, -1, -1)
    wanted = pool.attn(query, x, x, need_weights=True, average_attn_weights=False)[1]
    assert close(every["pool"], wanted) and close(rows["pool"], wanted[:, :, 0])
    assert torch.equal(rows[-1], rows["pool"])
    assert every[-1].shape == (2, 3, 17, 17) and rows[0].shape == (2, 3, 17)


def test_a_resnets_pooling():
    visual = spread(open_clip.modified_resnet.ModifiedResNet([1, 1, 1, 1], 48, heads=8, image_size=96, width=16))
    images, pool, kept = pixels(visual), visual.attnpool, []
    nn.init.normal_(pool.positional_embedding)
    handle = pool.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with captured_attention(visual) as rows:
        visual(images)
    handle.remove()
    x = kept[0].flatten(2).mT
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding
    pairs = [(layer.weight, layer.bias) for layer in (pool.q_proj, pool.k_proj, pool.v_proj)]
    assert close(rows[-1], torch_weights(x, x, *pairs, heads=8)[:, :, 0])
    assert n_blocks(visual) == 0 and patch_grid(visual) == (3, 3)
    assert to_map(rows[-1], patch_grid(visual)).shape == (2, 3, 3)


# --- timm towers ------------------------------------------------------------------------------------------


def timm_weights(visual, images):
    """The matrices that timm's own unfused attention hands to its dropout, block by block."""
    seen, handles = [], []
    for block in visual.trunk.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output)))
    visual(images)
    for handle, block in zip(handles, visual.trunk.blocks, strict=True):
        handle.remove()
        block.attn.fused_attn = True
    return seen


def test_siglip_blocks_and_pooling():
    visual = timm_tower("ViT-B-16-SigLIP")
    images, pool, kept = pixels(visual), visual.trunk.attn_pool, []
    nn.init.normal_(pool.latent)
    handle = pool.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    plain = visual(images)
    with captured_attention(visual, [0, 1, "pool"], "all") as every, captured_attention(visual, [-1]) as rows:
        assert torch.equal(visual(images), plain)
    handle.remove()
    inputs, unfused = block_inputs(visual, images), timm_weights(visual, images)
    for index, block in enumerate(visual.trunk.blocks):
        x, weights, biases = block.norm1(inputs[index]), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        wanted = torch_weights(x, x, *zip(weights, biases, strict=True), heads=12)
        assert close(every[index], wanted) and close(every[index], unfused[index])
    pairs = [*zip(pool.kv.weight.chunk(2), pool.kv.bias.chunk(2), strict=True)]
    wanted = torch_weights(pool.latent.expand(2, -1, -1), kept[0], (pool.q.weight, pool.q.bias), *pairs, heads=12)
    assert close(every["pool"], wanted) and close(rows[-1], wanted[:, :, 0])
    assert to_map(rows[-1], patch_grid(visual)).shape == (2, 14, 14)
    assert (to_map(rows[-1], (14, 14)).sum((1, 2)) - 1).abs().max() < TOLERANCE  # every token is a patch


NARROW = {"embed_dim": 192, "num_heads": 3}
UNFUSED = {
    "EVA02-B-16": ("EVA02-B-16", {}),
    "queries, keys and values apart": ("EVA02-B-16", NARROW | {"qkv_fused": False}),
    "no rope, no inner norm": ("EVA02-B-16", NARROW | {"use_rot_pos_emb": False, "scale_attn_inner": False}),
    "registers": ("EVA02-B-16", NARROW | {"num_reg_tokens": 3}),
    "halves, normalised": ("EVA02-B-16", NARROW | {"rope_rotate_half": True, "qk_norm": True}),
    "a rope for each head and block": ("EVA02-B-16", NARROW | {"rope_type": "mixed"}),
    "grouped": ("EVA02-B-16", NARROW | {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1}),
    "EVA01-g-14": ("EVA01-g-14", NARROW),
    "PE-Core-T-16-384": ("PE-Core-T-16-384", {}),
    "MobileCLIP2-L-14": ("MobileCLIP2-L-14", NARROW),
}


@pytest.mark.parametrize("name, settings", UNFUSED.values(), ids=UNFUSED)
def test_equals_timms_own_unfused_attention(name, settings):
    visual = timm_tower(name, **settings)
    images = pixels(visual)
    plain = visual(images)
    with captured_attention(visual, [0, 1], "all") as every, captured_attention(visual, [0, 1]) as rows:
        assert torch.equal(visual(images), plain)
    unfused = timm_weights(visual, images)
    for block in (0, 1):
        assert close(every[block], unfused[block])
        if block == 0 or visual.trunk.attn_pool is None:
            assert close(rows[block], unfused[block][:, :, 0])
    assert n_blocks(visual) == 2
    assert head_maps(rows[1], patch_grid(visual)).shape[2:] == tuple(visual.trunk.patch_embed.grid_size)


RELATIVE_POSITIONS = {
    "own to each block": {},
    "shared": {"shared_rel_pos": True},
    "a table": {"rel_pos_type": "bias"},
}


@pytest.mark.parametrize("settings", RELATIVE_POSITIONS.values(), ids=RELATIVE_POSITIONS)
def test_relative_positions(settings):
    visual = timm_tower("vit_relpos_medium_patch16_cls_224", **NARROW, img_size=64, global_pool="token", **settings)
    images, unfused = pixels(visual), timm_weights(visual, pixels(visual))
    with captured_attention(visual, [0, 1], "all") as every, captured_attention(visual, [0, 1]) as rows:
        visual(images)
    for block in (0, 1):
        assert close(every[block], unfused[block]) and close(rows[block], unfused[block][:, :, 0])
    with captured_attention(visual, [0], "all") as without:
        visual.trunk.blocks[0].attn(torch.zeros(1, 17, 192), shared_rel_pos=torch.zeros(1, 3, 17, 17))
    assert settings != {"shared_rel_pos": True} or (without[0] - 1 / 17).abs().max() < TOLERANCE


@pytest.mark.parametrize("settings, n_before", [({}, 0), ({"reg_tokens": 2}, 2), ({"class_token": True}, 1)])
def test_timms_mean_over_patches(settings, n_before):
    visual = timm_tower("vit_medium_patch16_gap_256", **NARROW, img_size=64, global_pool="avg", **settings)
    rows = mean_rows(visual, timm_weights(visual, pixels(visual)), n_before)
    assert to_map(rows, patch_grid(visual)).shape == (2, 4, 4)


def test_timms_mean_over_patches_and_the_tokens_before_them():
    visual = timm_tower("vit_medium_patch16_gap_256", **NARROW, img_size=64, global_pool="avg", reg_tokens=2)
    visual.trunk.pool_include_prefix = True
    mean_rows(visual, timm_weights(visual, pixels(visual)), 0)


def test_vitamins_mean_over_patches():
    visual = timm_tower("ViTamin-S", global_pool="avg", img_size=64)
    mean_rows(visual, timm_weights(visual, pixels(visual)), 0)


def test_a_tower_with_both_class_token_and_pooling_is_read_by_its_pooling():
    visual = timm_tower("PE-Core-T-16-384")
    with captured_attention(visual, [-1, "pool", 0]) as rows:
        visual(pixels(visual, 1))
    assert torch.equal(rows[-1], rows["pool"])
    assert rows[0].shape == (1, 3, 577) and rows[-1].shape == (1, 8, 577)  # 24 x 24 patches and the class token


def test_openclips_own_adapter_of_a_timm_tower():
    visual = spread(open_clip.timm_model.TimmModel("test_vit", 8, image_size=160, pool="token"))
    images = pixels(visual, 3)
    with captured_attention(visual) as rows:
        visual(images)
    assert close(rows[-1], timm_weights(visual, images)[-1][:, :, 0])
    assert to_map(rows[-1], patch_grid(visual)).shape == (3, 10, 10)


# --- maps and rollout -------------------------------------------------------------------------------------


def test_maps_by_hand():
    # One image, two heads; a class token and a register before 2 x 3 patches.
    rows = torch.tensor([[[0.3, 0.1, 0.0, 0.1, 0.2, 0.0, 0.1, 0.2], [0.1, 0.1, 0.2, 0.1, 0.0, 0.2, 0.1, 0.2]]])
    heads = head_maps(rows, (2, 3))
    assert torch.equal(heads[0, 1], torch.tensor([[0.2, 0.1, 0.0], [0.2, 0.1, 0.2]]))
    assert torch.allclose(to_map(rows, (2, 3))[0], torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2]]))
    with pytest.raises(AttentionError, match=r"\(1, 2, 8\); wanted \(image, head, 9 tokens or more\)"):
        to_map(rows, (3, 3))
    with pytest.raises(AttentionError, match="wanted"):
        to_map(rows[0], (2, 3))


def test_rollout_by_hand():
    # Heads' means [[1, 0], [.5, .5]] and [[0, 1], [1, 0]]; with half identity [[1, 0], [.25, .75]] and all halves.
    first = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]])
    second = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    assert torch.allclose(rollout([first]), torch.tensor([[[1.0, 0.0], [0.25, 0.75]]]))
    assert torch.allclose(rollout([first, second]), torch.tensor([[[0.625, 0.375], [0.625, 0.375]]]))
    # A pooling that looks at the second token only: that token's row.
    pooling = torch.tensor([[[[0.0, 1.0]]]])
    assert torch.allclose(rollout([first, pooling]), torch.tensor([[[0.25, 0.75]]]))
    with pytest.raises(AttentionError, match="no matrix"):
        rollout([])


def test_rollout_of_a_tower():
    visual = own_tower("ViT-B-32", 3)
    with captured_attention(visual, range(3), "all") as found:
        visual(pixels(visual))
    joint = rollout([found[index] for index in range(3)])
    wanted = torch.stack([torch.eye(50)] * 2).double()
    for index in range(3):
        wanted = (found[index].double().mean(1) + torch.eye(50)) / 2 @ wanted
    assert (joint - wanted).abs().max() < TOLERANCE and (joint.sum(-1) - 1).abs().max() < TOLERANCE
    assert to_map(joint[:, :1], patch_grid(visual)).shape == (2, 7, 7)


# --- precision, hooks, errors -----------------------------------------------------------------------------


def test_any_precision_gives_float32_rows_near_the_exact_ones():
    visual = own_tower("ViT-B-32", 1)
    images = pixels(visual)
    with captured_attention(visual) as exact:
        visual(images)
    with captured_attention(visual) as mixed, torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        visual(images)
    with captured_attention(visual) as half, torch.inference_mode():
        visual.bfloat16()(images.bfloat16())
    for found in (mixed[-1], half[-1]):
        assert found.dtype == torch.float32 and (found.sum(-1) - 1).abs().max() < TOLERANCE
        assert (found - exact[-1]).abs().max() < 0.05 and found.shape == exact[-1].shape


def test_no_gradient_and_no_hook_is_left_behind():
    visual = own_tower("ViT-B-32", 1).requires_grad_(True)
    with pytest.raises(RuntimeError, match="from inside"), captured_attention(visual) as found:
        visual(pixels(visual))
        raise RuntimeError("from inside")
    assert not found[-1].requires_grad
    with pytest.raises(AttentionError), captured_attention(visual, [0, 7]):
        pass
    assert not any(module._forward_pre_hooks for module in visual.modules())


def test_what_was_not_read_is_an_error_and_not_a_key_error():
    with captured_attention(own_tower("ViT-B-32", 1)) as found:
        pass
    with pytest.raises(AttentionError, match="no forward pass went through"):
        found[-1]


def part_missing(remove):
    visual = own_tower("ViT-B-32", 1)
    remove(visual.transformer.resblocks[0])
    return visual


class WithBias(nn.Module):
    """An attention that adds something before its softmax."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.rel_pos = 2, nn.Linear(4, 12), nn.Linear(1, 1)


UNREADABLE = {
    "no tower": (lambda: nn.Linear(2, 2), {}, r"visual \(Linear\): found none of class_embedding, trunk, attnpool"),
    "a whole model": (lambda: open_clip.CLIP(8, {"layers": 1}, TEXT), {}, r"visual \(CLIP\): .* as in model.visual"),
    "no blocks": (
        lambda: open_clip.timm_model.TimmModel("resnet18", 8, pool="avg"),
        {},
        r"visual.trunk \(ResNet\): found no blocks",
    ),
    "no attn": (
        lambda: part_missing(lambda block: delattr(block, "attn")),
        {},
        r"visual.transformer.resblocks.0 \(ResidualAttentionBlock\): found no attn",
    ),
    "no weights": (
        lambda: part_missing(lambda block: setattr(block.attn, "in_proj_weight", None)),
        {},
        r"visual.transformer.resblocks.0.attn \(MultiheadAttention\): found no weights of queries and keys",
    ),
    "unknown part": (
        lambda: part_missing(lambda block: setattr(block, "attn", WithBias())),
        {},
        r"visual.transformer.resblocks.0.attn \(WithBias\): its part rel_pos is not one that can be read",
    ),
    "cosine attention": (
        lambda: own_tower("ViT-B-32", 1, scaled_cosine_attn=True),
        {},
        "its part logit_scale is not one",
    ),
    "no such block": (lambda: own_tower("ViT-B-32", 2), {"blocks": [2]}, "found no block 2; accepted: -2 to 1$"),
    "no pooling": (lambda: own_tower("ViT-B-32", 1), {"blocks": ["pool"]}, "no attentional pooling; .* 'token'"),
    "no class token": (
        lambda: timm_tower("ViT-B-16-SigLIP"),
        {"blocks": [0]},
        r"found no class token for the row of block 0; accepted: the last block \(its pooling\), or rows='all'",
    ),
    "class token not read": (
        lambda: timm_tower("MobileCLIP2-L-14", **NARROW, global_pool="max"),
        {},
        "pools by 'max', so the class token's last row does not reach the embedding",
    ),
    "rows": (lambda: own_tower("ViT-B-32", 1), {"rows": "CLS"}, "rows 'CLS' is unknown; accepted: cls, all"),
}


@pytest.mark.parametrize("make, asked, message", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_named(make, asked, message):
    visual = make()
    with pytest.raises(AttentionError, match=message), captured_attention(visual, **asked):
        pass


def test_a_mask_is_refused():
    visual = own_tower("ViT-B-32", 1)
    block = visual.transformer.resblocks[0]
    with captured_attention(visual), pytest.raises(AttentionError, match="called with a mask"):
        block(torch.randn(1, 50, 768), attn_mask=torch.zeros(50, 50))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_cpu():
    for visual in (own_tower("ViT-B-32", 2), timm_tower("EVA02-B-16")):
        images = pixels(visual)
        with captured_attention(visual, [0, 1]) as wanted:
            visual(images)
        visual.cuda()
        with captured_attention(visual, [0, 1]) as found:
            visual(images.cuda())
        for block in (0, 1):
            assert found[block].is_cuda and (found[block].cpu() - wanted[block]).abs().max() < 1e-4
