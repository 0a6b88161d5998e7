"""The encoder against OpenCLIP's own forward, its transforms, transformers' CLIP and hand-worked averages.

All weights are random: small models saved as the local folders that `Encoder.load` reads.
"""

import hashlib
import json
import pickle
import socket
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from clipshift_core import checkpoints, hooks
from clipshift_core import encoder as room
from clipshift_core.attention import AttentionError
from clipshift_core.encoder import Encoder, EncoderError
from clipshift_core.fastpath import Linear, shift_error

RELATIVE = 1e-5
"""fp32: largest difference of two ways of computing the same embedding, relative to its largest entry."""

VISION = {"image_size": 64, "layers": 3, "width": 96, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": 9, "width": 64, "heads": 2, "layers": 2, "hf_tokenizer_name": "local"}
TEXT |= {"pool_type": "eos", "eos_id": 8}
WORDS = ["<pad>", "<start>", "<unk>", "a", "photo", "of", "duck", "bat"]


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def save_model(folder, vision=None, text=None, seed=0, **top):
    """A folder as OpenCLIP's local-dir wants it, with random weights that are not all at their initial scale."""
    folder.mkdir(exist_ok=True)
    words = Tokenizer(models.WordLevel(dict(zip(WORDS, range(8), strict=True)), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<end>"])
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 8)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<start>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = {"embed_dim": 48, "vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {}), **top}
    pixels = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tiny(folder):
    return Encoder.load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def oracle(folder):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval().requires_grad_(False), transform


def squares(n=5, size=64, seed=0):
    """Smooth colour fields with one noisy corner, uint8 (n, size, size, 3)."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.standard_normal((n, size, size, 3)), (0, size / 8, size / 8, 0))
    field = 128 + 60 * field / field.std((1, 2, 3), keepdims=True)
    field[:, : size // 4, : size // 4] += 60 * rng.standard_normal((n, size // 4, size // 4, 3))
    return field.clip(0, 255).astype(np.uint8)


def through_openclip(model, transform, images):
    """OpenCLIP's own embeddings; CoCa's would have length 1 if nothing were said."""
    return model.encode_image(torch.stack([transform(Image.fromarray(image)) for image in images]), normalize=False)


# --- images -----------------------------------------------------------------------------------------------


def test_preprocess_is_openclips_own_at_the_models_size(tiny, oracle):
    images = squares()
    wanted = torch.stack([oracle[1](Image.fromarray(image)) for image in images])
    assert torch.equal(tiny.preprocess(images), wanted)


PIXELS = [
    {"interpolation": interpolation, "resize_mode": mode, "mean": [0.0] * 3, "std": [1.0] * 3}
    for interpolation in ("bicubic", "bilinear")
    for mode in ("shortest", "longest", "squash")
]


@pytest.mark.parametrize("pixels", PIXELS, ids=lambda pixels: f"{pixels['resize_mode']} {pixels['interpolation']}")
def test_preprocess_by_the_models_own_settings(tmp_path, pixels):
    folder = save_model(tmp_path / "model")
    rewrite(folder, preprocess_cfg=pixels)
    transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
    found = Encoder.load(str(folder), device="cpu")
    for size in (64, 150, 40):
        images = squares(2, size)
        wanted = torch.stack([transform(Image.fromarray(image)) for image in images])
        difference = (found.preprocess(images) - wanted).abs()
        assert difference.max() <= (size != 64) * 1.001 / 255 and (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("size", [[64, 96], [96, 64]])
def test_a_model_of_images_that_are_not_square_is_refused(tmp_path, size):
    folder = save_model(tmp_path / "model", {"image_size": size})
    with pytest.raises(EncoderError, match=f"model: its images are {size[0]} x {size[1]}; only square inputs are"):
        Encoder.load(str(folder), device="cpu")


@pytest.mark.parametrize("size", [96, 224, 40])
def test_preprocess_resizes_as_openclip_within_one_grey_level(tiny, oracle, size):
    images = squares(3, size)
    wanted = torch.stack([oracle[1](Image.fromarray(image)) for image in images])
    difference = (tiny.preprocess(images) - wanted).abs()
    assert difference.max() <= 1.001 / 255 / 0.2  # one level over the smallest standard deviation
    assert (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize(
    "vision, top",
    [
        ({}, {}),
        ({}, {"quick_gelu": True}),
        ({"ls_init_value": 0.3, "no_ln_pre": True}, {}),
        ({"ls_init_value": 0.3}, {"quick_gelu": True}),
        ({"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}, {}),
        ({"patch_size": 24, "patch_dropout": 0.5}, {}),
        ({"layers": 1}, {}),
    ],
)
def test_fast_path_equals_openclip(tmp_path, vision, top):
    folder = save_model(tmp_path / "model", vision, **top)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval().requires_grad_(False)
    found = Encoder.load(str(folder), device="cpu")
    assert found.vision == "fast" and found.precision == "fp32"
    images = squares()
    assert relative(found.encode(images).embedding, through_openclip(model, transform, images)) < RELATIVE


SMALL_COCA = {
    "custom_text": True,
    "multimodal_cfg": {"width": 64, "context_length": 12, "vocab_size": 9, "heads": 2, "layers": 1},
}
PLAIN = {
    "resnet": ({"layers": [1, 1, 1, 1], "width": 16, "head_width": 16}, {}, {}, "ModifiedResNet"),
    "mean": ({"pool_type": "avg"}, {}, {}, "'avg'"),
    "attention": ({"attentional_pool": True, "attn_pooler_heads": 4}, {}, {}, "attention"),
    "custom blocks": ({"qk_norm": True}, {}, {}, "CustomResidualAttentionBlock"),
    "coca": (
        {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        {"embed_cls": True, "output_tokens": True},
        SMALL_COCA,
        "attention",
    ),
    "timm": ({"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}, {}, {}, "TimmModel"),
}


@pytest.mark.parametrize("vision, text, top, reason", PLAIN.values(), ids=PLAIN)
def test_other_towers_take_openclips_own_forward(tmp_path, vision, text, top, reason):
    folder = save_model(tmp_path / "model", vision, text, **top)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval().requires_grad_(False)
    found = Encoder.load(str(folder), device="cpu")
    assert found.vision.startswith("plain: ") and reason in found.vision
    images = squares(3, found.image_size)
    assert relative(found.encode(images).embedding, through_openclip(model, transform, images)) < RELATIVE
    assert found.encode_text(["a duck"]).shape == (1, 48)


def test_equals_transformers_clip_with_the_same_weights(tmp_path):
    folder = save_model(tmp_path / "model", quick_gelu=True)
    stored = load_file(folder / "open_clip_model.safetensors")
    config = CLIPConfig(
        projection_dim=48,
        vision_config={
            **{"image_size": 64, "patch_size": 16, "hidden_size": 96, "intermediate_size": 384},
            **{"num_hidden_layers": 3, "num_attention_heads": 3, "hidden_act": "quick_gelu"},
        },
        text_config={
            **{"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"vocab_size": 9, "max_position_embeddings": 12, "eos_token_id": 8, "hidden_act": "quick_gelu"},
        },
    )
    other = CLIPModel(config).eval().requires_grad_(False)
    missing = other.load_state_dict(for_transformers(stored), strict=False)
    assert not missing.unexpected_keys and all("position_ids" in key for key in missing.missing_keys)
    found = Encoder.load(str(folder), device="cpu")

    images = squares()
    out = other.visual_projection(other.vision_model(pixel_values=found.preprocess(images)).pooler_output)
    assert relative(found.encode(images).embedding, out) < RELATIVE
    tokens = found.tokenizer(["a photo of a duck", "bat"])
    out = other.text_projection(other.text_model(input_ids=tokens).pooler_output)
    assert relative(found.encode_text(["a photo of a duck", "bat"]), out) < RELATIVE


def for_transformers(stored):
    """OpenCLIP's tensors under the names of transformers' CLIPModel."""
    state = {"logit_scale": stored["logit_scale"]}
    towers = {"vision": ("visual.transformer.", 3), "text": ("transformer.", 2)}
    for tower, (prefix, n_layers) in towers.items():
        for layer in range(n_layers):
            here, there = f"{prefix}resblocks.{layer}.", f"{tower}_model.encoder.layers.{layer}."
            pairs = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
            for old, new in {**pairs, "attn.out_proj": "self_attn.out_proj"}.items():
                for kind in ("weight", "bias"):
                    state[f"{there}{new}.{kind}"] = stored[f"{here}{old}.{kind}"]
            for kind in ("weight", "bias"):
                parts = stored[f"{here}attn.in_proj_{kind}"].chunk(3)
                for name, part in zip("qkv", parts, strict=True):
                    state[f"{there}self_attn.{name}_proj.{kind}"] = part
    vision, text = "vision_model.embeddings.", "text_model.embeddings."
    state[vision + "class_embedding"] = stored["visual.class_embedding"]
    state[vision + "patch_embedding.weight"] = stored["visual.conv1.weight"]
    state[vision + "position_embedding.weight"] = stored["visual.positional_embedding"]
    state[text + "token_embedding.weight"] = stored["token_embedding.weight"]
    state[text + "position_embedding.weight"] = stored["positional_embedding"]
    for kind in ("weight", "bias"):
        # "pre_layrnorm" is how transformers spells it.
        state[f"vision_model.pre_layrnorm.{kind}"] = stored[f"visual.ln_pre.{kind}"]
        state[f"vision_model.post_layernorm.{kind}"] = stored[f"visual.ln_post.{kind}"]
        state[f"text_model.final_layer_norm.{kind}"] = stored[f"ln_final.{kind}"]
    state["visual_projection.weight"] = stored["visual.proj"].T
    state["text_projection.weight"] = stored["text_projection"].T
    return state


def test_an_embedding_depends_on_its_batch_by_rounding_only(tiny):
    images = squares(150)  # more than one sub-batch of 1600 tokens: 17 tokens an image
    together = tiny.encode(images).embedding
    alone = torch.cat([tiny.encode(images[i : i + 1]).embedding for i in (0, 93, 94, 149)])
    assert relative(together[[0, 93, 94, 149]], alone) < RELATIVE
    order = np.random.default_rng(0).permutation(150)
    assert relative(tiny.encode(images[order]).embedding, together[order]) < RELATIVE
    assert torch.equal(tiny.encode(images).embedding, together)


def test_accepts_any_layout_and_an_empty_batch(tiny):
    images = squares()
    wanted = tiny.encode(images).embedding
    read_only = images.copy()
    read_only.flags.writeable = False
    assert torch.equal(tiny.encode(read_only).embedding, wanted)
    assert torch.equal(tiny.encode(torch.from_numpy(images)).embedding, wanted)
    assert torch.equal(tiny.encode(images[:, :, ::-1].copy()[:, :, ::-1]).embedding, wanted)
    assert tiny.encode(images[:0]).embedding.shape == (0, 48)
    assert wanted.dtype == torch.float32 and not wanted.is_inference()


@pytest.mark.parametrize(
    "bad",
    [
        squares()[0],
        squares().astype(np.float32),
        squares()[..., :1],
        squares()[:, :32],
        squares().transpose(0, 3, 1, 2),
    ],
    ids=["one image", "float", "grey", "not square", "channels first"],
)
def test_refuses_what_is_not_a_batch_of_rgb_squares(tiny, bad):
    with pytest.raises(EncoderError, match=r"accepted: uint8 squares of shape"):
        tiny.encode(bad)


def test_the_class_token_and_its_attention_come_with_the_embedding(tiny):
    """Out of the fast path, against hooks on OpenCLIP's own forward (torch's `need_weights` is the oracle of those)."""
    images, points = squares(), ("token.0", "token.-1", "attention.1", "attention.-1", "attention.2")
    found = tiny.encode(images, capture=points)
    with hooks.captured(tiny.model.visual, (*points, "attention.2.all")) as wanted, torch.inference_mode():
        tiny.model.encode_image(tiny.preprocess(images))
    assert tiny.vision == "fast" and set(found.captured) == set(points)
    for point in points:
        assert found.captured[point].shape == wanted[point].shape
        assert relative(found.captured[point], wanted[point]) < RELATIVE
    assert torch.equal(found.captured["attention.-1"], found.captured["attention.2"])
    assert relative(found.captured["attention.2"], wanted["attention.2.all"][:, :, 0]) < RELATIVE
    assert torch.equal(found.embedding, tiny.encode(images).embedding)
    assert (tiny.n_blocks, tiny.n_heads, tiny.grid) == (3, 3, (4, 4))
    with pytest.raises(AttentionError, match="found no attentional pooling"):
        tiny.encode(images, capture=("attention.pool",))


def test_which_points_a_tower_has(tiny):
    offered = ["residual.0", "token.-3", "attention.2", "attention.1.all"]
    refused = ["token.3", "attention.-4", "attention.pool", "tokens.1", "residual.0.all", "attention."]
    assert hooks.readable(tiny.model.visual, offered + refused) == offered


def test_captures_the_residual_stream(tiny, oracle):
    images = squares()
    found = tiny.encode(images, capture=("residual.0", "residual.2"))
    inputs = torch.stack([oracle[1](Image.fromarray(image)) for image in images])
    wanted = oracle[0].visual.forward_intermediates(inputs, output_fmt="NLC", output_extra_tokens=True)
    for layer in (0, 2):
        parts = wanted["image_intermediates_prefix"][layer], wanted["image_intermediates"][layer]
        assert relative(found.captured[f"residual.{layer}"], torch.cat(parts, 1)) < RELATIVE
    assert relative(found.embedding, tiny.encode(images).embedding) < RELATIVE
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        tiny.encode(images, capture=("residual.3",))


# --- texts ------------------------------------------------------------------------------------------------


def test_texts_and_classifier_equal_openclip(tiny, folder, oracle):
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    texts = ["a photo of a duck", "bat", ""] * 100
    assert torch.equal(tokenizer(["a duck"])[0], torch.tensor([1, 3, 6, 8] + 8 * [0]))
    wanted = oracle[0].encode_text(tokenizer(texts))
    assert relative(tiny.encode_text(texts), wanted) < RELATIVE
    assert tiny.encode_text([]).shape == (0, 48)

    templates = ["a photo of a {}", "a {}", "{}"]
    found = tiny.classifier(["duck", "bat"], templates)
    for name, row in zip(["duck", "bat"], found, strict=True):
        each = oracle[0].encode_text(tokenizer([template.format(name) for template in templates]))
        mean = (each / each.norm(dim=1, keepdim=True)).mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-6)
    library = open_clip.build_zero_shot_classifier(oracle[0], tokenizer, ["duck", "bat"], templates)
    assert torch.allclose(found, library.T, atol=1e-6)


def test_refuses_a_string_for_a_list_and_a_template_without_a_place(tiny):
    with pytest.raises(EncoderError, match="single string"):
        tiny.encode_text("duck")
    with pytest.raises(EncoderError, match="classes"):
        tiny.classifier("duck", ["{}"])
    with pytest.raises(EncoderError, match="templates"):
        tiny.classifier(["duck"], ["a photo"])


# --- precision and the fast path's guard ------------------------------------------------------------------


def numpy_views(images, seed=0):
    """Original, noise, blur, brighter, mirrored, shifted: uint8 (view, image, h, w, 3)."""
    rng = np.random.default_rng(seed)
    real = images.astype(float)
    views = [
        real,
        real + 255 * 0.6 * rng.standard_normal(real.shape),
        gaussian_filter(real, (0, 1.5, 1.5, 0)),
        real * 1.15 + 10,
        real[:, :, ::-1],
        np.roll(real, 9, axis=2),
    ]
    return np.stack([view.clip(0, 255).astype(np.uint8) for view in views])


def shifts(embedding, n_views):
    """Mean over images of 1 - cosine with the original, one number a view, in float64."""
    unit = np.asarray(embedding, float)
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).reshape(n_views, -1, unit.shape[1])
    return np.array([np.mean([1 - a @ b for a, b in zip(unit[0], view, strict=True)]) for view in unit[1:]])


prepacks = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def bfloat16_is_fast(monkeypatch):
    """As if it were, so that its numbers are tested on every processor; test_machines.py has the real choice."""
    monkeypatch.setattr(room, "bfloat16_gain", lambda device: 2.0)


def test_mixed_keeps_every_mean_shift_within_three_per_cent(folder, bfloat16_is_fast):
    torch.manual_seed(0)
    # A ViT-B/32 of two thirds the width: its tokens and its depth, in half the time.
    vision = {"image_size": 224, "layers": 12, "width": 512, "head_width": 64, "patch_size": 32}
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, vision_cfg=vision, quick_gelu=True)
    model.eval().requires_grad_(False)
    mixed = Encoder(model, "", name="like B/32", weights_hash="", precision="mixed")
    assert mixed.vision == "fast" and mixed.precision == "mixed" and mixed.precision_error <= 0.03
    views = numpy_views(squares(3, 224))
    flat = views.reshape(-1, 224, 224, 3)
    wanted, rounded = model.encode_image(mixed.preprocess(flat)), mixed.encode(flat).embedding
    assert relative(rounded, wanted) > 1e-4  # really bfloat16
    error = np.abs(shifts(rounded, len(views)) / shifts(wanted, len(views)) - 1)
    assert error.max() <= 0.03, error


def test_mixed_of_a_plain_tower_is_checked_too(tmp_path, bfloat16_is_fast):
    folder = save_model(tmp_path / "model", {"pool_type": "avg"})
    images = squares()
    mixed = Encoder.load(str(folder), device="cpu", precision="mixed")
    difference = relative(mixed.encode(images).embedding, Encoder.load(str(folder)).encode(images).embedding)
    assert mixed.precision == "mixed" and 1e-4 < difference < 0.1


def test_mixed_that_fails_its_check_is_refused(folder, monkeypatch, bfloat16_is_fast):
    monkeypatch.setattr(room, "MAX_SHIFT_ERROR", 1e-9)
    with pytest.raises(EncoderError, match="moves a mean 1 - cosine by .* more than 0%; accepted: fp32"):
        Encoder.load(str(folder), device="cpu", precision="mixed")


def test_mixed_that_is_slower_is_refused_and_auto_does_not_ask(folder, monkeypatch):
    monkeypatch.setattr(room, "bfloat16_gain", lambda device: 0.4)
    with pytest.raises(EncoderError) as refused:
        Encoder.load(str(folder), device="cpu", precision="mixed")
    assert str(refused.value) == (
        "tiny: precision 'mixed' is refused: on this cpu a product in bfloat16 takes 2.50 times as long as in float32; "
        "accepted: fp32"
    )
    monkeypatch.setattr(room, "bfloat16_gain", lambda device: pytest.fail("measured for nothing"))
    assert Encoder.load(str(folder), device="cpu").precision == "fp32"


@prepacks
def test_bfloat16_that_cannot_be_prepacked_is_multiplied_as_it_is(folder, monkeypatch, bfloat16_is_fast):
    def pack(weight, rows):
        if weight.dtype == torch.bfloat16:
            raise RuntimeError("bf16 path needs the cpu support avx512bw")
        return packed(weight, rows)

    packed = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", pack)
    mixed = Encoder.load(str(folder), device="cpu", precision="mixed")
    exact = Encoder.load(str(folder), device="cpu").encode(squares()).embedding
    assert mixed.vision == "fast" and mixed.precision == "mixed" and mixed.precision_error <= 0.03
    assert 1e-4 < relative(mixed.encode(squares()).embedding, exact) < 0.1


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("vision", [{}, {"pool_type": "avg"}], ids=["fast", "plain"])
def test_bfloat16_that_cannot_be_multiplied_is_refused(tmp_path, monkeypatch, vision, measured):
    def multiply(x, weight, bias=None):
        # inside torch.autocast the operands are rounded later
        if torch.bfloat16 in (x.dtype, weight.dtype) or torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no such product here")
        return product(x, weight, bias)

    product = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", multiply)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # no prepacked ones either
    # uncached; or as if an earlier product had been possible
    monkeypatch.setattr(room, "bfloat16_gain", room.bfloat16_gain.__wrapped__ if measured else lambda device: 2.0)
    folder = save_model(tmp_path / "model", vision)
    with pytest.raises(EncoderError) as refused:
        Encoder.load(str(folder), device="cpu", precision="mixed")
    assert str(refused.value) == "model: precision 'mixed' is refused: no such product here; accepted: fp32"


@prepacks
def test_weights_that_did_not_do_prepacked_are_not_prepacked_for_mixed(folder, monkeypatch, bfloat16_is_fast):
    def pack(weight, rows):
        asked.append(weight.dtype)
        return packed(weight * 1.003, rows)

    asked, packed = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", pack)
    mixed = Encoder.load(str(folder), device="cpu", precision="mixed")
    assert mixed.vision.startswith("fast, not prepacked: differs by") and mixed.precision == "mixed"
    assert set(asked) == {torch.float32}


@pytest.mark.parametrize("vision", [{}, {"pool_type": "avg"}], ids=["fast", "plain"])
def test_a_gpu_that_is_full_is_no_reason_for_another_precision(tmp_path, monkeypatch, bfloat16_is_fast, vision):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = Encoder.load(str(save_model(tmp_path / "model", vision)), device="cpu")
    monkeypatch.setattr(room, "FastVision", type("", (), {"build": full}))
    monkeypatch.setattr(found, "_plain", full)
    with pytest.raises(torch.OutOfMemoryError):
        found._take_mixed()


def test_shift_error_by_hand():
    # One image, two views. exact: 1 - cos is 1 and 1 - 0.6 = 0.4; mixed: 1 - 0.6 = 0.4 for the second view as well,
    # but 1 - 0.28 = 0.72 for the first: errors 28 % and 0 %.
    exact = torch.tensor([[2.0, 0.0], [0.0, 3.0], [3.0, 4.0]])
    mixed = torch.tensor([[1.0, 0.0], [7.0, 24.0], [0.6, -0.8]])
    assert shift_error(mixed, exact, 3) == pytest.approx(0.28, abs=1e-6)


def test_a_missing_private_operation_is_replaced_by_the_public_one(folder, oracle, monkeypatch):
    def gone(*args):
        raise AttributeError("no such operation")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", gone)
    found = Encoder.load(str(folder), device="cpu")
    assert found.vision == "fast, not prepacked: no such operation"
    assert relative(found.encode(squares()).embedding, through_openclip(*oracle, squares())) < RELATIVE


def test_a_fast_path_that_gives_other_numbers_is_not_used(folder, oracle, monkeypatch):
    right = Linear.__call__
    monkeypatch.setattr(Linear, "__call__", lambda self, x, plus=None: right(self, x, plus) * 1.001)
    found = Encoder.load(str(folder), device="cpu")
    assert found.vision.startswith("plain: differs by")
    assert relative(found.encode(squares()).embedding, through_openclip(*oracle, squares())) < RELATIVE


# --- loading ----------------------------------------------------------------------------------------------


def test_says_what_was_loaded(tiny, folder):
    weights = (folder / "open_clip_model.safetensors").read_bytes()
    assert tiny.weights_hash == hashlib.sha256(weights).hexdigest()
    assert (tiny.name, tiny.dim, tiny.image_size, tiny.device.type) == ("tiny", 48, 64, "cpu")
    stored = load_file(folder / "open_clip_model.safetensors")["logit_scale"]
    assert tiny.logit_scale == pytest.approx(float(stored.exp()))


def test_half_precision_weights_load_as_float32(folder, tmp_path):
    other = save_model(tmp_path / "half")
    stored = load_file(folder / "open_clip_model.safetensors")
    save_file({key: value.half() for key, value in stored.items()}, other / "open_clip_model.safetensors")
    found = Encoder.load(f"local-dir:{other}", device="cpu")
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}
    assert torch.equal(found.model.visual.proj, stored["visual.proj"].half().float())


def rewrite(folder, preprocess_cfg=None, **vision):
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"] |= vision
    config["preprocess_cfg"] |= preprocess_cfg or {}
    path.write_text(json.dumps(config))


def spoil_not_finite(folder):
    path = folder / "open_clip_model.safetensors"
    save_file(load_file(path) | {"visual.proj": torch.full((96, 48), torch.nan)}, path)


def spoil_truncated(folder):
    path = folder / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


SPOILED = {
    "no config": (lambda folder: (folder / "open_clip_config.json").unlink(), "open_clip_config.json"),
    "broken config": (lambda folder: (folder / "open_clip_config.json").write_text("{"), "cannot be loaded"),
    "no weights": (lambda folder: (folder / "open_clip_model.safetensors").unlink(), "has no weights"),
    "other width": (lambda folder: rewrite(folder, width=64), "size mismatch"),
    "more layers": (lambda folder: rewrite(folder, layers=4), "Missing key"),
    "other image size": (lambda folder: rewrite(folder, image_size=96), "visual.positional_embedding is .17, 96."),
    "unknown key": (lambda folder: rewrite(folder, depth=4), "depth"),
    "truncated": (spoil_truncated, "cannot be loaded"),
    "not finite": (spoil_not_finite, "not finite"),
}


@pytest.mark.parametrize("spoil, message", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_folder_is_one_clear_error(tmp_path, spoil, message):
    spoil(save_model(tmp_path / "model"))
    with pytest.raises(EncoderError, match=message) as caught:
        Encoder.load(str(tmp_path / "model"), device="cpu")
    assert "model" in str(caught.value) and "\n" not in str(caught.value)


# --- weights files ----------------------------------------------------------------------------------------


class Bomb:
    """What, unpickled, would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "code of the weights file ran"))


def explosive(path, target):
    """Weights files that hold code, in the three forms that torch reads pickles in."""
    state = {"logit_scale": torch.ones(()), "visual.proj": Bomb(target)}
    return {
        "torch.save": lambda: torch.save({"state_dict": state}, path),
        "before torch 1.6": lambda: torch.save(state, path, _use_new_zipfile_serialization=False),
        "pickle": lambda: path.write_bytes(pickle.dumps(Bomb(target), protocol=2)),
    }


@pytest.fixture
def small(monkeypatch):
    """The name of a small model, as if OpenCLIP had it; with the pixels of SigLIP in two of its three tags."""
    config = {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", config)
    tags = {name: {"mean": (0.5,) * 3, "std": (0.5,) * 3, "hf_hub": "some/model/"} for name in ("one", "two")}
    tags["three"] = {"mean": (0.4,) * 3, "std": (0.3,) * 3, "quick_gelu": True, "hf_hub": "some/other/"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", tags)
    return "small"


@pytest.mark.parametrize("form", explosive(None, None))
@pytest.mark.parametrize("name", ["weights.pt", "pytorch_model.bin", "open_clip_model.pth"])
def test_nothing_in_a_weights_file_is_executed(tmp_path, small, form, name):
    target = tmp_path / "written"
    folder = save_model(tmp_path / "model")
    (folder / "open_clip_model.safetensors").unlink()
    explosive(folder / name, target)[form]()
    asked = [(small, str(folder / name))]
    if not name.endswith(".pt"):  # OpenCLIP does not look for these in a folder
        asked += [(str(folder),), (f"local-dir:{folder}",)]
    for arguments in asked:
        with pytest.raises(EncoderError, match=f"{name} cannot be loaded: .*nothing but tensors is read") as caught:
            Encoder.load(*arguments, device="cpu")
        assert "\n" not in str(caught.value) and not target.exists()


def test_the_bombs_would_go_off(tmp_path):
    """What the test above refuses really is code."""
    for index, form in enumerate(explosive(None, None)):
        target, path = tmp_path / f"written {index}", tmp_path / "weights.pt"
        explosive(path, target)[form]()
        if form == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert target.exists()


def training_checkpoint(state):
    """As OpenCLIP's own training writes it, from a model that was distributed."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    wrapped = {f"module.{key}": value for key, value in state.items()}
    return {"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": optimizer}


WRITTEN = {
    "safetensors": ("weights.safetensors", save_file),
    "pt": ("weights.pt", torch.save),
    "bin": ("weights.bin", torch.save),
    "before torch 1.6": ("weights.pth", partial(torch.save, _use_new_zipfile_serialization=False)),
    "training": ("epoch_3.pt", lambda state, path: torch.save(training_checkpoint(state), path)),
    "half": ("half.pt", lambda state, path: torch.save({key: value.half() for key, value in state.items()}, path)),
}


@pytest.mark.parametrize("name, write", WRITTEN.values(), ids=WRITTEN)
def test_a_weights_file_of_ones_own(tmp_path, folder, small, name, write):
    stored = load_file(folder / "open_clip_model.safetensors")
    write(stored, tmp_path / name)
    found = Encoder.load(small, str(tmp_path / name), device="cpu")
    assert found.name == f"small@{name}" and found.vision == "fast"
    assert found.weights_hash == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    state = found.model.state_dict()
    for key, value in stored.items():
        assert torch.equal(state[key], value.half().float() if "half" in name else value)
    # The pixels of most of the tags, and the activation of the name.
    grey = found.preprocess(np.full((1, 64, 64, 3), 128, np.uint8))
    assert grey.unique().tolist() == pytest.approx([(128 / 255 - 0.5) / 0.5], abs=1e-6)
    assert type(found.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"


@pytest.mark.parametrize("key", ["visual.positional_embedding", "positional_embedding"])
@pytest.mark.parametrize("name", ["safetensors", "pt", "training", "before torch 1.6"])
def test_a_stretched_position_embedding_is_an_error_in_any_file(tmp_path, folder, small, name, key):
    stored = load_file(folder / "open_clip_model.safetensors")
    stored[key] = torch.zeros(26, 96) if "visual" in key else torch.zeros(16, 64)  # 5 x 5 patches; 16 words
    name, write = WRITTEN[name]
    write(stored, tmp_path / name)
    here = "17, 96" if "visual" in key else "12, 64"
    with pytest.raises(EncoderError, match=rf"{key} is \[\d+, \d+\] in {name}, but \[{here}\] by the config"):
        Encoder.load(small, str(tmp_path / name), device="cpu")


def test_a_stretched_text_position_of_an_older_class_is_an_error(tmp_path, folder, small, monkeypatch):
    """OpenCLIP renames such a file's text tower while it loads; the names in the file are the old ones."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS[small], "custom_text", True)
    stored = load_file(folder / "open_clip_model.safetensors")
    torch.save(stored, tmp_path / "old.pt")
    assert torch.equal(
        Encoder.load(small, str(tmp_path / "old.pt"), device="cpu").model.text.positional_embedding,
        stored["positional_embedding"],
    )
    torch.save(stored | {"positional_embedding": torch.zeros(16, 64)}, tmp_path / "old.pt")
    with pytest.raises(EncoderError, match=r"positional_embedding is \[16, 64\] in old.pt, but \[12, 64\]"):
        Encoder.load(small, str(tmp_path / "old.pt"), device="cpu")


def scripted(state, path):
    """A TorchScript archive of a module with these tensors and, as in OpenAI's archives, a size among them."""
    root = torch.nn.Module()
    root.register_buffer("input_resolution", torch.tensor(64))
    for key, value in state.items():
        *owners, last = key.split(".")
        owner = root
        for name in owners:
            if not hasattr(owner, name):
                owner.add_module(name, torch.nn.Module())
            owner = getattr(owner, name)
        owner.register_parameter(last, torch.nn.Parameter(value, requires_grad=False))
    torch.jit.save(torch.jit.script(root), path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_torchscript_archive_is_refused_with_a_way_that_works(tmp_path, folder, small):
    stored, archive, made = load_file(folder / "open_clip_model.safetensors"), tmp_path / "B-32.pt", tmp_path / "new.pt"
    scripted(stored, archive)
    with pytest.raises(EncoderError, match=r"B-32.pt cannot be loaded: it is a TorchScript archive") as caught:
        Encoder.load(small, str(archive), device="cpu")
    way = str(caught.value).split("makes of it: ")[1]
    exec(way, {"torch": torch, "FILE": archive, "NEW": made})
    assert torch.equal(Encoder.load(small, str(made), device="cpu").model.visual.proj, stored["visual.proj"])


UNREAD_FILES = {
    "no names": ("weights.pt", lambda path: torch.save([torch.ones(2)], path), "holds no tensors under names"),
    "no tensors": ("weights.pt", lambda path: torch.save({"epoch": 3}, path), "holds no tensors under names"),
    "empty": ("weights.pt", lambda path: path.touch(), "weights.pt cannot be loaded"),
    "text": ("weights.bin", lambda path: path.write_text("version https://git-lfs"), "weights.bin cannot be loaded"),
    "cut zip": (
        "weights.pt",
        lambda path: (torch.save({"a": torch.ones(9999)}, path), path.write_bytes(path.read_bytes()[:9999])),
        "weights.pt cannot be loaded",
    ),
    "text as safetensors": ("weights.safetensors", lambda path: path.write_text("<html>"), "cannot be loaded"),
    "numpy": ("weights.npz", lambda path: np.savez(path, a=np.ones(2)), "accepted: .safetensors, .pt, .pth, .bin"),
    "other tensors": ("weights.pt", lambda path: torch.save({"a": torch.ones(2)}, path), "Missing key"),
    "not there": (
        "weights.pt",
        lambda path: None,
        "no such file; wanted for small: one, two, three, or a weights file",
    ),
}


@pytest.mark.parametrize("name, write, message", UNREAD_FILES.values(), ids=UNREAD_FILES)
def test_a_file_that_is_no_weights_file_is_one_clear_error(tmp_path, small, name, write, message):
    write(tmp_path / name)
    with pytest.raises(EncoderError, match=message) as caught:
        Encoder.load(small, str(tmp_path / name), device="cpu")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_the_hash_of_the_file_that_openclip_takes_of_several(tmp_path):
    folder = save_model(tmp_path / "model")
    stored = load_file(folder / "open_clip_model.safetensors")
    torch.save({key: torch.zeros_like(value) for key, value in stored.items()}, folder / "open_clip_pytorch_model.bin")
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    found = Encoder.load(str(folder), device="cpu")
    assert found.weights_hash == hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()
    assert torch.equal(found.model.visual.proj, stored["visual.proj"])


def test_weights_are_not_held_twice_while_they_load(tmp_path, small, folder, monkeypatch):
    """A pickle's tensors are read in place: torch maps the file, when it is looked at and when it is loaded."""
    path, mapped, from_file = tmp_path / "weights.pt", [], torch.UntypedStorage.from_file
    torch.save(load_file(folder / "open_clip_model.safetensors"), path)

    def counted(name, *arguments, **options):
        mapped.append(name)
        return from_file(name, *arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", counted)
    Encoder.load(small, str(path), device="cpu")
    assert mapped == [str(path)] * 2
    torch.load(path, weights_only=True)
    assert len(mapped) == 2  # and not from then on


# --- the hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that nobody listens for, an empty cache, and a count of the requests that are tried."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return address


@pytest.mark.parametrize("arguments", [("ViT-B-32", "openai"), ("hf-hub:timm/whatever",), ("hf-hub:nonsense",)])
def test_a_hub_out_of_reach_is_one_clear_error_at_once(hub, arguments):
    start = time.perf_counter()
    with pytest.raises(EncoderError, match=f"{'/'.join(arguments)}: cannot be fetched from {hub} .*refused") as caught:
        Encoder.load(*arguments, device="cpu")
    assert time.perf_counter() - start < 3 and "name its folder" in str(caught.value)
    assert "\n" not in str(caught.value) and not huggingface_hub.constants.HF_HUB_OFFLINE


def in_cache(folder, cache, owner="some", model="model"):
    """The files of a folder as the hub's client keeps them after it has fetched them."""
    kept = cache / f"models--{owner}--{model}"
    snapshot = kept / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    for path in folder.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())


def test_what_the_hub_gave_once_is_loaded_without_it(hub, folder, tmp_path, tiny, small):
    in_cache(folder, tmp_path / "cache")
    start = time.perf_counter()
    by_repository = Encoder.load("hf-hub:some/model", device="cpu")
    by_tag = Encoder.load(small, "one", device="cpu")
    assert time.perf_counter() - start < 5
    assert (by_repository.name, by_tag.name) == ("hf-hub:some/model", "small/one")
    assert by_repository.weights_hash == by_tag.weights_hash == tiny.weights_hash
    assert torch.equal(by_repository.encode(squares()).embedding, tiny.encode(squares()).embedding)
    assert by_tag.preprocess(np.full((1, 64, 64, 3), 255, np.uint8)).unique().tolist() == [1.0]


def test_a_spoiled_model_in_the_hubs_cache_is_not_called_missing(hub, tmp_path):
    held = save_model(tmp_path / "held")
    rewrite(held, layers=4)
    in_cache(held, tmp_path / "cache")
    with pytest.raises(EncoderError, match="hf-hub:some/model: cannot be loaded by OpenCLIP: .*Missing key"):
        Encoder.load("hf-hub:some/model", device="cpu")


def test_a_pickle_with_code_from_the_hub_is_refused(hub, folder, tmp_path):
    held, target = tmp_path / "held", tmp_path / "written"
    held.mkdir()
    (held / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    explosive(held / "open_clip_pytorch_model.bin", target)["torch.save"]()
    in_cache(held, tmp_path / "cache")
    with pytest.raises(EncoderError, match=r"hf-hub:some/model: open_clip_pytorch_model.bin cannot be loaded"):
        Encoder.load("hf-hub:some/model", device="cpu")
    assert not target.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ViT-B-32",), "random weights; accepted: openai, "),
        (("ViT-B-32", "openia"), "'openia' is unknown for ViT-B-32; accepted: openai, "),
        (("ViT-B32", "openai"), "nearest names: .*ViT-B-32"),
        (("./nowhere",), "nowhere: no such folder"),
        (("local-dir:nowhere",), "nowhere: no such folder"),
        (("hf-hub:some/model", "openai"), "brings its own weights"),
    ],
)
def test_a_wrong_name_is_one_clear_error(arguments, message):
    with pytest.raises(EncoderError, match=message):
        Encoder.load(*arguments)


def test_a_wrong_device_or_precision_is_one_clear_error(folder):
    for device in ("gpu", "cuda:99", "mps"):
        with pytest.raises(EncoderError, match=f"device '{device}'"):
            Encoder.load(str(folder), device=device)
    with pytest.raises(EncoderError, match="accepted: auto, fp32, mixed"):
        Encoder.load(str(folder), precision="bf16")
    with pytest.raises(EncoderError, match="leave pretrained empty"):
        Encoder.load(str(folder), "openai")


def test_weights_trained_with_quick_gelu_get_it(tiny, folder, monkeypatch):
    asked = []

    def create_model(*arguments, **options):
        asked.append(options)
        return tiny.model

    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: folder / "open_clip_model.safetensors")
    monkeypatch.setattr(checkpoints, "_out_of_reach", lambda: "")
    for tag in ("openai", "laion2b_s34b_b79k"):
        assert Encoder.load("ViT-B-32", tag, device="cpu").name == f"ViT-B-32/{tag}"
    assert [options["force_quick_gelu"] for options in asked] == [True, False]
    assert all(options["require_pretrained"] and options["weights_only"] for options in asked)


# --- CUDA -------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_cpu(folder, tiny):
    images = squares(20)
    wanted = tiny.encode(images).embedding
    exact = Encoder.load(str(folder), device="cuda", precision="fp32")
    assert exact.vision == "fast" and relative(exact.encode(images).embedding, wanted) < RELATIVE
    assert relative(exact.encode_text(["a duck"]), tiny.encode_text(["a duck"])) < RELATIVE
    auto = Encoder.load(str(folder), device="cuda")
    fast = room.bfloat16_gain(auto.device) > 1  # since Ampere
    assert auto.precision == ("mixed" if fast else "fp32") and auto.precision_error <= 0.03
    views = numpy_views(squares(4))
    flat = views.reshape(-1, 64, 64, 3)
    found, true = (shifts(each.encode(flat).embedding, len(views)) for each in (auto, tiny))
    assert np.abs(found / true - 1).max() <= 0.03
