"""Small versions of every model that OpenCLIP lists, and what this package can read of each.

    python tests/open_clip_models.py    writes data/models/OPENCLIP.md

A small version has the classes and the options of the listed model (pooling, rotary positions, layer scale, quick GELU,
and so on) and random weights; it has two blocks, a narrow stream and an image of a few patches. Models that differ in
size alone become the same small one, which is built and measured once. Text towers are replaced by a tiny one of
OpenCLIP's own kind: those of Hugging Face need configurations from its hub, and nothing here reads a text tower.
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import open_clip
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.models import vitamin
from torch import nn

from clipshift_core.attention import AttentionError, block_path
from clipshift_core.attribution import act_x_grad, cosine
from clipshift_core.encoder import Encoder
from clipshift_core.fastpath import check_views
from clipshift_core.sae import TopK
from clipshift_core.splice import Splice, SpliceError, tail

COVERAGE = Path(__file__).parents[1] / "data" / "models" / "OPENCLIP.md"
COMMAND = "python tests/open_clip_models.py"
DIM = 64
"""Width of the embedding, and of timm's streams: where a tower has no projection the two are one."""
RELATIVE = 1e-5
"""Largest difference of two ways of computing the same embedding in float32, relative to its largest entry."""

TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1, "mlp_ratio": 2.0}
DECODER = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
# Options of a text tower that a tiny one can have too.
TEXT_OPTIONS = ("ls_init_value", "embed_cls", "no_causal_mask", "proj_type", "proj_bias", "output_tokens")
TEXT_OPTIONS += ("norm_kwargs", "act_kwargs")

NARROW = {"embed_dim": DIM, "num_heads": 4, "depth": 2}
TRUNKS = {
    "vit_base_mci": {"depth": 2},  # its stem has the width written in
    "vit_": NARROW,
    "eva": NARROW,
    "vitamin_": NARROW,
    "convnext_": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, DIM)},
    "swin_": {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)},
    "fastvit_mci": {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, DIM)},
    "fastvit_mci3": {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 16, 32, 32, DIM)},
    "fastvit_mci4": {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 16, 32, 32, DIM)},
}
"""What makes a timm architecture small, by the longest beginning of its name that is here."""


# Building -----------------------------------------------------------------------------------------------------------


def small_settings(name: str) -> dict:
    """What `open_clip.create_model` is given in place of a listed model's own configuration."""
    config = open_clip.get_model_config(name)
    vision, text = dict(config["vision_cfg"]), config["text_cfg"]
    if "timm_model_name" in vision:
        trunk = vision["timm_model_name"]
        by_patch = [3 * size for size in (14, 16, 32) if f"patch{size}" in trunk]
        vision["image_size"] = by_patch[0] if by_patch else 48 if trunk.startswith(("vit", "eva")) else 64
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
    else:
        vision |= {"layers": 2, "width": 32, "head_width": 16, "image_size": 3 * vision["patch_size"]}
        if vision.get("attentional_pool"):
            vision["attn_pooler_queries"] = 5
    settings = {
        "embed_dim": DIM if "vit_base_mci" not in vision.get("timm_model_name", "") else 48,
        "vision_cfg": vision,
        "text_cfg": TEXT | {key: text[key] for key in TEXT_OPTIONS if key in text},
    }
    if "multimodal_cfg" in config:
        settings["multimodal_cfg"] = DECODER
    return settings


@contextmanager
def small_trunks(image_size: int) -> Iterator[None]:
    """While open, timm builds its models small: OpenCLIP hands it no sizes."""
    create, create_vitamin = timm.create_model, vitamin._create_vitamin

    def small(name: str, **options) -> nn.Module:
        known = [beginning for beginning in TRUNKS if name.startswith(beginning)]
        options |= TRUNKS[max(known, key=len)] if known else {}
        if not name.startswith(("convnext", "fastvit")):
            options["img_size"] = image_size
        return create(name, **options)

    def small_vitamin(name: str, embed_cfg=None, **options) -> nn.Module:
        stem = {"embed_dim": (16, 32, DIM), "depths": (1, 1, 1), "stem_width": 16}
        return create_vitamin(name, embed_cfg=dataclasses.replace(embed_cfg, **stem), **options)

    timm.create_model, vitamin._create_vitamin = small, small_vitamin
    try:
        yield
    finally:
        timm.create_model, vitamin._create_vitamin = create, create_vitamin


def build(name: str, settings: dict) -> Encoder:
    """The small model, its random weights spread so that attention is far from uniform."""
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # of the random weights, which are meant
    with small_trunks(settings["vision_cfg"]["image_size"]):
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False, **settings)
    logging.disable(logging.NOTSET)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.6 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.05
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.eval().requires_grad_(False)
    return Encoder(model, name, name=name, weights_hash="", precision="fp32")


# Measuring ----------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What one model can be read for; the reason that the code gives where it cannot, else ""."""

    tower: str
    """Class of the vision tower, or of timm's trunk in it."""
    encode: str = ""
    attention: str = ""
    """Of the last block, or of the pooling."""
    dictionary: str = ""
    """Splice and attribution."""


def measure(name: str) -> Found:
    """Everything once for each structure. Raises AssertionError where something is read, and read wrongly."""
    config = open_clip.get_model_config(name)
    options = {key: config[key] for key in ("quick_gelu", "custom_text", "init_logit_bias") if key in config}
    structure = json.dumps([small_settings(name), options], sort_keys=True)
    if structure not in _MEASURED:
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for products this small, more of them cost ten times the time
        try:
            _MEASURED[structure] = _measure_anew(name)
        finally:
            torch.set_num_threads(n_threads)
    return _MEASURED[structure]


_MEASURED: dict[str, Found] = {}
"""By what makes two models the same small one."""


def _measure_anew(name: str) -> Found:
    settings = small_settings(name)
    try:
        encoder = build(name, settings)
    except Exception as error:  # of OpenCLIP, timm or torch: whatever it is, the list says it
        return Found("", encode=f"{type(error).__name__}: {error}")
    visual = encoder.model.visual
    found = Found(type(getattr(visual, "trunk", visual)).__name__)
    check_embedding(encoder)
    try:
        check_attention(encoder)
    except (AttentionError, ValueError) as error:
        found = found._replace(attention=str(error).replace(name, "it"))
    try:
        for layer in range(encoder.n_blocks) or [-1]:
            check_dictionary(encoder, build(name, settings), layer)
    except SpliceError as error:
        found = found._replace(dictionary=str(error).removeprefix(f"{name}: ").replace(name, "it"))
    return found


def pictures(encoder: Encoder) -> torch.Tensor:
    """Three random blotches, uint8 (3, size, size, 3)."""
    return check_views(encoder.image_size)[0][:3]


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest, relative to the largest entry."""
    assert found.shape == wanted.shape
    return float((found - wanted).detach().abs().max() / wanted.abs().max())


def check_embedding(encoder: Encoder) -> None:
    """The embeddings are OpenCLIP's own, unnormalised, of what its own transform makes of the images."""
    images = pictures(encoder)
    settings = PreprocessCfg(**encoder.model.visual.preprocess_cfg)
    transform = image_transform_v2(settings, is_train=False)
    pixels = torch.stack([transform(Image.fromarray(image.numpy())) for image in images])
    with torch.no_grad():
        wanted = encoder.model.encode_image(pixels, normalize=False)
    assert wanted.isfinite().all() and difference(wanted[:1], wanted[1:2]) > 1e-3
    assert difference(encoder.encode(images).embedding, wanted) < RELATIVE


def check_attention(encoder: Encoder) -> None:
    """Rows of the last block or of the pooling sum to 1 and depend on the image; so do the matrices of the first."""
    points = ["attention.-1", *encoder.readable(["attention.pool", "attention.0.all"])]
    for rows in encoder.encode(pictures(encoder), capture=points).captured.values():
        assert rows.shape[0] == 3 and (rows >= 0).all() and (rows.sum(-1) - 1).abs().max() < 1e-5
        assert (rows[0] - rows[1]).abs().max() > 1e-3 / rows.shape[-1]


def check_dictionary(encoder: Encoder, double: Encoder, layer: int) -> None:
    """A splice gives the tower's own embedding; act x grad sums to a finite difference through the tower.

    The sum over units of a_j dy/da_j is the slope of y as all codes grow together. encoder, double: the same model
    twice; the second becomes float64, for the difference.
    """
    images = pictures(encoder)
    follows = tail(encoder, layer)
    token = "class" if not follows.blocks and follows.reads != "spatial" and follows.n_before else "spatial"
    stream = encoder.encode(images, capture=[f"residual.{layer}"]).captured[f"residual.{layer}"]
    sae = TopK(encoder.width, 24, 4, seed=1)
    with torch.no_grad():
        sae.b_dec.copy_(stream.flatten(0, 1).mean(0))
    splice = Splice(encoder, sae, layer, token)
    state = splice.read(images)
    assert state.codes.values.count_nonzero() and state.error.abs().max() > 0.01
    assert difference(splice.embed(state), encoder.encode(images).embedding) < RELATIVE

    visual = double.model.visual.double()
    splice = Splice(double, sae.double(), layer, token)
    pixels = double.preprocess(images).double()
    state = splice.state_of(through(visual, layer, pixels)[1])
    target = cosine(torch.randn(DIM, generator=torch.Generator().manual_seed(2)).double()[: double.dim])
    values = act_x_grad(splice, state, target).values
    assert values.isfinite().all() and (values != 0).any(1).all()
    written = splice.tokens(state) - splice.tokens(state, torch.zeros_like(state.codes.values))
    place = slice(0, 1) if token == "class" else slice(follows.n_before, None)

    def grown(by: float) -> torch.Tensor:
        """y with the codes times 1 + by."""
        return target(through(visual, layer, pixels, (place, by * written))[0])

    slope = (grown(1e-4) - grown(-1e-4)) / 2e-4
    assert (values.sum(1) - slope).abs().max() < 1e-5 * values.abs().sum(1).max()
    assert slope.abs().max() > 1e-6


@torch.no_grad()
def through(
    visual: nn.Module, layer: int, pixels: torch.Tensor, plus: tuple[slice, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tower's own embedding, with something added to some tokens after a block; and the stream there."""
    kept = []

    def change(block: nn.Module, args: tuple, stream: torch.Tensor) -> torch.Tensor:
        kept.append(stream)
        if plus is not None:
            stream = stream.clone()
            stream[:, plus[0]] += plus[1]
        return stream

    handle = visual.get_submodule(block_path(visual, layer)).register_forward_hook(change)
    embedding = visual(pixels)
    handle.remove()
    return embedding[0] if isinstance(embedding, tuple) else embedding, kept[0]


# The list -----------------------------------------------------------------------------------------------------------


def table(found: dict[str, Found]) -> str:
    """The text of data/models/OPENCLIP.md."""
    parts = ("encode", "attention", "dictionary")
    counts = Counter(part for each in found.values() for part in parts if not getattr(each, part))
    whole = sum(each == Found(each.tower) for each in found.values())
    lines = [
        "# What is read of each of OpenCLIP's models",
        "",
        f"Made by `{COMMAND}` with OpenCLIP {open_clip.__version__} and timm {timm.__version__}: each",
        "configuration that `open_clip.list_models()` lists is built small, with its own classes and options, random",
        "weights and a tiny text tower (those of Hugging Face need its hub), and measured.",
        "`tests/test_open_clip_models.py` does it again and compares.",
        "",
        f"Of {len(found)} configurations, {whole} are read whole.",
        "",
        "| | read | what it means |",
        "|---|---|---|",
        f"| encode | {counts['encode']} | the embeddings equal OpenCLIP's own, from its own transform's pixels |",
        f"| attention | {counts['attention']} | rows of the last block, or of attentional pooling; each sums to 1 |",
        f"| dictionary | {counts['dictionary']} | an autoencoder spliced in after each block gives the tower's own "
        "embedding, and attributions (act x grad) add up to a finite difference through the tower in float64 |",
        "",
        "| configuration | vision tower | encode | attention | dictionary | reason where not |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in found.items():
        marks = ["no" if getattr(each, part) else "yes" for part in parts]
        reasons = dict.fromkeys(filter(None, (getattr(each, part) for part in parts)))
        lines.append(f"| {name} | {each.tower} | {' | '.join(marks)} | {'; '.join(reasons)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    COVERAGE.write_text(table({name: measure(name) for name in open_clip.list_models()}))
