"""The splice against OpenCLIP's own forward with a hook that replaces a block's output, and finite differences.

Towers: the shipped scene-s16, and tiny random ones of OpenCLIP's own kind and of timm.
"""

from copy import copy, deepcopy
from functools import cache, partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from torch import nn, tensor

from clipshift_core import scenes
from clipshift_core.encoder import Encoder
from clipshift_core.sae import BatchTopK, PublishedTopK, TopK
from clipshift_core.sae_kernels import Codes
from clipshift_core.splice import Splice, SpliceError, State, tail

RELATIVE = 1e-6
"""fp32: largest difference of two ways of computing the same embedding, relative to its largest entry."""
MODEL = Path(__file__).parents[1] / "data" / "models" / "scene-s16"
TEXT = {"context_length": 8, "vocab_size": 9, "width": 16, "heads": 1, "layers": 1}
VISION = {"image_size": 48, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}


def made(model, size, name="tiny"):
    """An encoder of a model whose random weights are spread, so that its attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.6 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.05
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.eval().requires_grad_(False)
    model.visual.preprocess_cfg = {"size": size, "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic"}
    return Encoder(model, name, name=name, weights_hash="ab" * 32, precision="fp32")


def own(**vision):
    """A tower of OpenCLIP's own kind."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(24, VISION | vision, TEXT)
    model.visual.final_ln_after_pool = vision.get("final_ln_after_pool", False)
    return made(model, 48)


def coca(**vision):
    """CoCa, whose embeddings OpenCLIP would divide by their length by default."""
    torch.manual_seed(0)
    pooler = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 3, "output_tokens": True}
    decoder = {"context_length": 8, "vocab_size": 9, "width": 16, "heads": 1, "layers": 1}
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    return made(open_clip.coca_model.CoCa(24, decoder, text, VISION | pooler | vision), 48, "coca")


def of_timm(pool="token", trunk=None, size=160):
    """OpenCLIP's adapter of timm's smallest vision transformer, or with another trunk put in."""
    torch.manual_seed(0)
    vision = {"timm_model_name": "test_vit", "timm_pool": pool, "image_size": 160}
    model = open_clip.model.CustomTextCLIP(24, vision, TEXT)
    if trunk is not None:
        model.visual.trunk, model.visual.image_size = trunk, (size, size)
        model.visual.head = nn.Linear(trunk.num_features, 24, bias=False)
    return made(model, size, "timm")


def rotary(**settings):
    """A trunk whose blocks are handed rotary positions."""
    options = {"depth": 2, "img_size": 56, "num_classes": 0, "embed_dim": 48, "num_heads": 3, **settings}
    return timm.create_model("eva02_tiny_patch14_224", pretrained=False, **options)


TOWERS = {
    "class token": lambda: own(),
    "layer scale, last norm after pooling": lambda: own(ls_init_value=0.3, final_ln_after_pool=True),
    "qk norm": lambda: own(qk_norm=True),
    "mean over patches": lambda: own(pool_type="avg"),
    "mean, then norm": lambda: own(pool_type="avg", final_ln_after_pool=True),
    "coca": coca,
    "coca, mean over queries": lambda: coca(pool_type="avg", final_ln_after_pool=True),
    "timm, class token": lambda: of_timm(),
    "timm, mean": lambda: of_timm("avg"),
    "timm, attention pooling": lambda: of_timm(
        trunk=timm.create_model("test_vit", num_classes=0, global_pool="map", class_token=False)
    ),
    "timm, rotary": lambda: of_timm(trunk=rotary(global_pool="token"), size=56),
    "timm, rotary by block, registers": lambda: of_timm(
        trunk=rotary(global_pool="avg", num_reg_tokens=2, rope_type="mixed"), size=56
    ),
}


@cache
def tower(name):
    return TOWERS[name]() if name in TOWERS else Encoder.load(str(MODEL), device="cpu")


def pictures(encoder, n=4):
    """Scenes, at the size of the encoder's input."""
    return np.stack([scenes.render(scenes.sample(seed), encoder.image_size) for seed in range(n)])


def blocks_of(encoder):
    visual = encoder.model.visual
    return visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks


@torch.no_grad()
def through_openclip(encoder, images, layer, change=lambda stream: stream):
    """OpenCLIP's own forward, in which a hook puts `change(output)` in place of a block's output; and that output."""
    kept = []

    def replace(block, args, output):
        kept.append(output)
        return change(output)

    handle = blocks_of(encoder)[layer].register_forward_hook(replace)
    pixels = encoder.preprocess(images)
    embedding = encoder.model.encode_image(pixels.to(next(encoder.model.visual.parameters()).dtype), normalize=False)
    handle.remove()
    return embedding, kept[0]


def dictionary(encoder, images, layer, token, kind=TopK, n_latents=48, k=6):
    """An autoencoder of random directions about the activations' mean, of about their scale."""
    stream = through_openclip(encoder, images, layer)[1].float()
    n_patches = int(np.prod(encoder.grid))
    rows = (stream[:, :1] if token == "class" else stream[:, -n_patches:]).flatten(0, 1)
    sae = kind(stream.shape[2], n_latents, k, seed=1)
    with torch.no_grad():
        if kind is not PublishedTopK:
            sae.b_dec.copy_(rows.mean(0))
        sae.W_dec.mul_(torch.linspace(0.6, 1.2, n_latents)[:, None])  # lengths that differ show in energy and ablation
        if kind is BatchTopK:
            sae.threshold.copy_(sae.pre_activations(rows).flatten().quantile(1 - k / n_latents))
    return sae


def spliced(name, layer, token, kind=TopK, n=4):
    encoder = tower(name)
    images = pictures(encoder, n)
    return Splice(encoder, dictionary(encoder, images, layer, token, kind), layer, token), images


def difference(found, wanted):
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return float((found - wanted).detach().abs().max() / wanted.abs().max())


# The tail -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TOWERS, "scene-s16"])
def test_the_tail_is_what_the_tower_does(name):
    encoder = tower(name)
    images = pictures(encoder, 3)
    for layer in range(encoder.n_blocks):
        wanted, stream = through_openclip(encoder, images, layer)
        follows = tail(encoder, layer)
        assert difference(follows(stream), wanted) < RELATIVE
        assert follows.layer == layer == tail(encoder, layer - encoder.n_blocks).layer
        assert len(follows.blocks) == encoder.n_blocks - 1 - layer
        stream.requires_grad_()
        follows(stream).square().sum().backward()
        reads_first = follows.reads != "spatial" or follows.n_before == 0
        assert stream.grad[:, 0].any() == (layer < encoder.n_blocks - 1 or reads_first)
    assert follows.n_before == stream.shape[1] - np.prod(encoder.grid)
    if follows.needs_class_alone:
        assert difference(follows(stream[:, :1]), wanted) < RELATIVE


def test_which_tokens_the_head_reads():
    reads = {name: tail(tower(name), -1).reads for name in TOWERS}
    assert [reads[name] for name in ("class token", "timm, class token", "timm, rotary")] == ["class"] * 3
    assert reads["mean over patches"] == reads["mean, then norm"] == reads["timm, mean"] == "spatial"
    assert reads["timm, attention pooling"] == "spatial" and reads["coca"] == "all"
    assert tail(tower("timm, rotary by block, registers"), 0).n_before == 3


def test_a_direction_through_norm_and_projection():
    encoder = tower("class token")
    visual, directions = encoder.model.visual, torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    d = directions.numpy()
    normed = (d - d.mean(1, keepdims=True)) / np.sqrt(d.var(1, keepdims=True) + visual.ln_post.eps)
    wanted = (normed * visual.ln_post.weight.numpy() + visual.ln_post.bias.numpy()) @ visual.proj.numpy()
    for layer in (0, -1):
        np.testing.assert_allclose(tail(encoder, layer).lens(directions), wanted, rtol=1e-4, atol=1e-5)
    mean = tower("mean over patches")
    assert tail(mean, -1).lens(directions).shape == (5, 24)


def no_part(name, remove):
    encoder = TOWERS[name]()
    remove(encoder.model.visual)
    return encoder


def with_output(encoder, change):
    """A tower that does something with its embedding that nobody knows of."""
    encoder.model.visual.register_forward_hook(lambda module, args, output: change(output))
    return encoder


UNKNOWN = {
    "no norm": (lambda: no_part("class token", lambda v: delattr(v, "ln_post")), "found no ln_post"),
    "no head": (lambda: no_part("timm, class token", lambda v: delattr(v, "head")), r"\(TimmModel\): found no head"),
    "no blocks": (lambda: no_part("timm, mean", lambda v: delattr(v.trunk, "blocks")), "visual.trunk .* no blocks"),
    "pooling": (lambda: no_part("class token", lambda v: setattr(v, "pool_type", "none")), "it pools by 'none'"),
    "two poolers": (
        lambda: own(attentional_pool="parallel", attn_pooler_heads=2, width=24, head_width=12),
        "its part attn_pool_contrastive is not one",
    ),
    "a step behind": (
        lambda: with_output(own(), lambda y: 1.001 * y),
        r"block 1 differs by 1\.0e-03 .* more than 1e-05",
    ),
    "not finite": (lambda: with_output(own(), lambda y: y * float("nan")), "differs by nan"),
}


@pytest.mark.parametrize("make, message", UNKNOWN.values(), ids=UNKNOWN)
def test_a_tail_that_cannot_be_read_is_named(make, message):
    encoder = make()
    with pytest.raises(SpliceError, match=message):
        tail(encoder, 1)


# The splice ---------------------------------------------------------------------------------------------------------

PLACES = [
    ("scene-s16", -1, "class", TopK),
    ("scene-s16", 2, "class", BatchTopK),
    ("scene-s16", -2, "spatial", TopK),
    ("scene-s16", 0, "spatial", BatchTopK),
    ("class token", 0, "class", PublishedTopK),
    ("mean over patches", -1, "spatial", TopK),
    ("coca", -1, "class", TopK),
    ("coca", -1, "spatial", BatchTopK),
    ("coca, mean over queries", 0, "spatial", TopK),
    ("timm, class token", -1, "class", TopK),
    ("timm, mean", -1, "spatial", TopK),
    ("timm, attention pooling", 0, "spatial", TopK),
    ("timm, rotary", 0, "class", TopK),
    ("timm, rotary by block, registers", 0, "spatial", TopK),
]


def rewritten(splice, stream, indices, values, error):
    """A stream with sum_j a_j d_j + b_dec + error in the spliced tokens, by dense products."""
    dense = torch.zeros(len(values), splice.sae.n_latents).scatter_add_(1, indices, values)
    rows = dense @ splice.sae.W_dec.detach() + splice.sae.b_dec.detach() + error
    n = 1 if splice.token == "class" else int(np.prod(splice.encoder.grid))
    out = stream.clone()
    place = slice(0, 1) if splice.token == "class" else slice(stream.shape[1] - n, None)
    out[:, place] = rows.unflatten(0, (len(stream), n))
    return out


@pytest.mark.parametrize("name, layer, token, kind", PLACES)
def test_embeds_as_openclip_with_its_block_replaced(name, layer, token, kind):
    splice, images = spliced(name, layer, token, kind)
    state = splice.read(images)
    own_embedding, stream = through_openclip(splice.encoder, images, layer)
    # The encoder has two ways, whose embeddings differ by rounding: the state is read on one of them.
    fast = splice.encoder.encode(images).embedding
    of_the_same_pass, other = (fast, own_embedding) if splice.tail.needs_class_alone else (own_embedding, fast)
    assert difference(splice.embed(state), of_the_same_pass) < RELATIVE
    assert difference(splice.embed(state), other) < 5 * RELATIVE
    assert state.codes.values.count_nonzero() > len(images) and state.error.abs().max() > 0.01
    # Other values, half of them deleted: the codes and the error are what the oracle makes of its own stream.
    x = stream[:, :1] if token == "class" else stream[:, -int(np.prod(splice.encoder.grid)) :]
    x = x.flatten(0, 1)
    dense = state.codes.dense(splice.sae.n_latents)
    torch.testing.assert_close(
        dense, splice.sae.encode_eager(x).dense(splice.sae.n_latents).detach(), atol=2e-4, rtol=0
    )
    error = x - (dense @ splice.sae.W_dec + splice.sae.b_dec).detach()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(state.codes.values.shape, generator=generator)
    values = state.codes.values * drawn.where(drawn > 0.5, 0)
    wanted, _ = through_openclip(
        splice.encoder, images, layer, lambda s: rewritten(splice, s, state.codes.indices, values, error)
    )
    assert difference(splice.embed(state, values), wanted) < 2e-5  # the codes of two forward passes differ, too
    assert difference(splice.embed(state, values), own_embedding) > 1e-3


def test_nothing_before_the_splice_runs_again_and_one_encode_is_enough(monkeypatch):
    splice, images = spliced("scene-s16", 2, "class")
    calls = []
    for index, block in enumerate(blocks_of(splice.encoder)):
        monkeypatch.setattr(block.attn, "forward", partial(counted, block.attn.forward, calls, index))
    state = splice.read(images)
    assert calls == [0, 1, 2, 3, 4]
    calls.clear()
    splice.embed(state)
    assert calls == [3, 4]


def counted(forward, calls, index, *args, **kwargs):
    calls.append(index)
    return forward(*args, **kwargs)


def test_of_the_last_block_the_class_token_alone(monkeypatch):
    encoder = tower("layer scale, last norm after pooling")
    wanted, stream = through_openclip(encoder, pictures(encoder), 1)
    block = blocks_of(encoder)[-1]
    assert tail(encoder, 1).blocks[0](stream).shape == (4, 1, 32)

    # Where OpenCLIP calls that part otherwise, the whole block.
    def attention(q_x, k_x=None, v_x=None, attn_mask=None):
        if k_x is not None:
            raise TypeError("attention() takes no keys")
        return block.attn(q_x, q_x, q_x)[0]

    monkeypatch.setattr(block, "attention", attention)
    whole = tail(encoder, 1)
    assert whole.blocks[0](stream).shape == (4, 10, 32)
    assert difference(whole(stream), wanted) < RELATIVE


def test_stored_activations_need_no_encoder(monkeypatch):
    splice, images = spliced("scene-s16", -1, "class")
    wanted, embedding = splice.read(images), splice.encoder.encode(images).embedding
    stored = splice.encoder.encode(images, capture=["token.-1"]).captured["token.-1"]
    monkeypatch.setattr(splice.encoder, "encode", None)
    found = splice.from_activations(stored.numpy())
    assert torch.equal(found.codes.indices, wanted.codes.indices) and torch.equal(found.error, wanted.error)
    assert difference(splice.embed(found), embedding) < RELATIVE


def in_double(name, layer, token, kind=TopK, n=3):
    """The same in float64: a tower, an autoencoder and a state made from the tower's own stream."""
    encoder = TOWERS[name]()
    images = pictures(encoder, n)
    sae = dictionary(encoder, images, layer, token, kind).double()
    encoder.model.visual.double()
    splice = Splice(encoder, sae, layer, token)
    return splice, splice.state_of(through_openclip(encoder, images, layer)[1]), images


@pytest.mark.parametrize(
    "name, layer, token",
    [("class token", -1, "class"), ("class token", 0, "spatial"), ("timm, rotary", 0, "class")],
)
def test_a_splice_in_double_gives_what_a_tower_in_double_does_and_leaves_its_own_as_it_is(name, layer, token):
    splice, images = spliced(name, layer, token)
    before, lens = splice.embed(splice.read(images)), splice.lens
    double = splice.in_double()
    tower = copy(splice.encoder)
    tower.model = deepcopy(tower.model)
    tower.model.visual.double()
    embedding, stream = through_openclip(tower, images, layer)
    found = double.embed(double.state_of(stream))
    assert found.dtype == double.lens.dtype == torch.float64 and difference(double.lens.float(), lens) < RELATIVE
    torch.testing.assert_close(found, embedding, rtol=1e-12, atol=1e-12)
    assert torch.equal(splice.embed(splice.read(images)), before) and splice.lens is lens
    assert {parameter.dtype for parameter in splice.encoder.model.parameters()} == {torch.float32}
    # it reads images as the other does, and takes that one's states
    for same in (double.read(images), splice.read(images).double()):
        assert torch.equal(same.latents, splice.read(images).latents)
        assert difference(double.embed(same).float(), before) < RELATIVE


@pytest.mark.parametrize(
    "name, layer, token",
    [("class token", -1, "class"), ("class token", 0, "spatial"), ("timm, rotary", 0, "class")],
)
def test_gradients_reach_the_values(name, layer, token):
    splice, state, _ = in_double(name, layer, token, n=2)
    assert torch.autograd.gradcheck(
        lambda values: splice.embed(state, values)[:, ::8], state.codes.values.clone().requires_grad_(), fast_mode=True
    )
    assert splice.sae.W_dec.grad is None


def test_units_by_hand():
    # Two images of two tokens with two slots: latents 7 and 2, then 2 alone; 5 and 7, then 7 and an unused slot.
    codes = Codes(tensor([[7, 2], [2, 0], [5, 7], [7, 9]]), tensor([[1.0, 2.0], [3.0, 0.0], [4.0, 5.0], [6.0, 0.0]]))
    splice, _ = spliced("class token", 0, "spatial")
    splice.sae.encode = lambda x: codes
    splice._place = slice(0, None)
    state = splice.state_of(torch.zeros(2, 2, 32))
    assert state.latents.tolist() == [[2, 7], [5, 7]] and state.on.all()
    assert state.by_latent(codes.values).tolist() == [[5.0, 1.0], [4.0, 11.0]]  # 2 + 3, 1; 4, 5 + 6
    assert state.by_latent(codes.values.expand(3, 4, 2)).shape == (3, 2, 2)
    kept = state.scaled(tensor([[0.0, 1.0], [1.0, 0.5]]))
    assert kept.tolist() == [[1.0, 0.0], [0.0, 0.0], [4.0, 2.5], [3.0, 0.0]]


def test_units_that_are_not_there():
    codes = Codes(tensor([[3, 1], [0, 0]]), tensor([[1.0, 0.0], [0.0, 0.0]]))
    slots = torch.arange(2).expand(2, 2)
    state = State(torch.zeros(2, 1, 4), codes, torch.zeros(2, 4), codes.indices, slots)
    assert state.on.tolist() == [[True, False], [False, False]]
    assert torch.equal(state.by_latent(codes.values), codes.values)
    assert torch.equal(state.scaled(torch.ones(2, 2)), codes.values)


def test_what_cannot_be_spliced_is_named():
    encoder, images = tower("class token"), pictures(tower("class token"))
    sae = TopK(32, 8, 2)
    with pytest.raises(SpliceError, match="token 'cls' is unknown; accepted: class, spatial"):
        Splice(encoder, sae, 0, "cls")
    with pytest.raises(SpliceError, match="layer 3: tiny has blocks 0 to 2"):
        Splice(encoder, sae, 3, "class")
    with pytest.raises(SpliceError, match="does not read its spatial tokens after its last block, 2"):
        Splice(encoder, sae, -1, "spatial")
    with pytest.raises(SpliceError, match="does not read its class tokens after its last block, 2"):
        Splice(tower("mean over patches"), sae, -1, "class")
    with pytest.raises(SpliceError, match="timm has no class token; accepted: spatial"):
        Splice(tower("timm, attention pooling"), TopK(64, 8, 2), 0, "class")
    with pytest.raises(SpliceError, match="an autoencoder of width 16; tiny has 32"):
        Splice(encoder, TopK(16, 8, 2), 0, "class")
    with pytest.raises(SpliceError, match="class tokens after block 0 of tiny: activations alone are enough for"):
        Splice(encoder, sae, 0, "class").from_activations(torch.zeros(2, 32))
    with pytest.raises(SpliceError, match=r"activations of shape \(2, 1, 32\); \(image, 32\) is wanted"):
        Splice(encoder, sae, -1, "class").from_activations(torch.zeros(2, 1, 32))
    with pytest.raises(SpliceError, match="no images"):
        Splice(encoder, sae, 0, "class").read(images[:0])
