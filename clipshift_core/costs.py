"""What a model costs: where its weights are, its size and arithmetic by its configuration alone, its speed here.

Sizes are counted on torch's meta device, on which a model has shapes but no numbers. FLOPs are two for each
multiplication and addition of matrix products and convolutions, as `torch.utils.flop_counter` counts them and as
OpenCLIP's own table does (docs/model_profile.csv: 8.82 GFLOPs for an image by ViT-B-32). Nothing here asks a network.
"""

import io
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import open_clip
import skimage.data
import torch
from huggingface_hub import try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.model import set_model_preprocess_cfg
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clipshift_core import attention, augment, dose, hooks, images, preservation, sae_train, shift
from clipshift_core.encoder import Encoder
from clipshift_core.profiles import named
from clipshift_core.sae import TopK

BYTES = 4
"""Of a parameter: weights are published, and kept here, in float32."""
LARGEST_TIMED = 250_000_000
"""Parameters up to which a model is timed itself; a larger one is scaled by FLOPs, to save minutes and memory."""
SECONDS = 2.0
"""Roughly how long one measurement may take."""
MOMENTS = 4
CROWDED = 1.25
"""Load of a core above which others are at work as well: what is measured here keeps all cores busy by itself."""
VIEWS = len(augment.VIEWS)
PREPROCESS = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "interpolation": "bicubic"}


class Weights(NamedTuple):
    """Where the weights of a model are, and the configuration that goes with them."""

    state: str
    """`here`, `to fetch`, `missing` (no run could get them), or `unknown`."""
    place: str
    """For a person: the file, the repository, or why it is not known."""
    settings: dict[str, Any] | None
    """OpenCLIP's configuration; None where it is not on this machine."""


@dataclass(frozen=True)
class Model:
    """What the configuration of a model says of it."""

    dim: int
    """Width of the embedding."""
    image_size: int
    n_blocks: int
    """Of the vision tower, as `n_heads`, `width` and `grid`; all 0 for one that `attention` does not know."""
    n_heads: int
    width: int
    grid: tuple[int, int]
    has_map: bool
    """Whether the last block's attention can be read."""
    n_parameters: int
    image_flops: float
    """Of one image."""
    text_flops: float
    """Of one text."""


@dataclass(frozen=True)
class Speed:
    """Seconds of one model on this machine, at the size at which views are drawn."""

    view: float
    """A view encoded, with all that the pass captures."""
    image: float
    """An image encoded that comes in the model's own size."""
    text: float
    """A text encoded."""
    how: str
    """`measured`, `random weights` (measured with them), or `by FLOPs` (scaled)."""
    metrics: float = 0.0
    """The ten metrics of an image's nine views; 0 where only the encoding was timed."""


class Drawing(NamedTuple):
    """Seconds of one thread for an image."""

    read: float
    """Decoding and resizing it."""
    views: float
    """Drawing its ten views."""
    doses: float
    """Drawing every augmentation of it at every severity."""


def find(name: str) -> Weights:
    """The weights of a model, by the string that names it in a profile. Looks on this machine alone."""
    model, weights = named(name)
    if model.startswith("hf-hub:"):
        repository = model.removeprefix("hf-hub:")
        config = _cached(repository, "open_clip_config.json")
        if config is None:
            return Weights("unknown", f"{repository} is not in the cache, and only the hub knows its size", None)
        return _hub(repository, "", _settings(config))
    if Path(model).is_absolute():
        config = Path(model) / "open_clip_config.json"
        if not config.is_file():
            return Weights("missing", f"no open_clip_config.json in {model}", None)
        files = [path.name for path in sorted(Path(model).iterdir()) if path.suffix in (".safetensors", ".bin", ".pth")]
        return Weights(
            "here" if files else "missing", f"{model}/{files[0] if files else '(no weights)'}", _settings(config)
        )
    settings = open_clip.get_model_config(model.replace("/", "-"))
    if weights and Path(weights).is_absolute():
        return Weights("here" if Path(weights).is_file() else "missing", weights, settings)
    source = open_clip.get_pretrained_cfg(model.replace("/", "-"), weights) if weights else {}
    if source.get("hf_hub"):
        return _hub(*os.path.split(source["hf_hub"]), settings)
    if source.get("url"):
        file = Path("~/.cache/clip").expanduser() / os.path.basename(source["url"])
        return Weights("here", str(file), settings) if file.is_file() else Weights("to fetch", source["url"], settings)
    return Weights("missing", f"OpenCLIP lists no weights {weights!r} of {model}", settings)


def build(settings: dict[str, Any], device: str) -> nn.Module:
    """A model of a configuration with random weights; on "meta" with none. Raises ValueError where that takes a hub."""
    settings = deepcopy(settings)
    if "hf_model_name" in settings["text_cfg"]:
        raise ValueError(f"the text tower {settings['text_cfg']['hf_model_name']} is described on the hub alone")
    settings["vision_cfg"]["timm_model_pretrained"] = False
    custom = settings.pop("custom_text", False)
    kind = open_clip.CoCa if "multimodal_cfg" in settings else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.device(device):
        model = kind(**settings).eval().requires_grad_(False)
    set_model_preprocess_cfg(model, PREPROCESS | {"size": model.visual.image_size})
    return model


def model(settings: dict[str, Any]) -> Model:
    """Sizes and FLOPs of a configuration, counted without weights. Raises ValueError as `build` does."""
    made = build(settings, "meta")
    visual = made.visual
    try:
        blocks = attention.n_blocks(visual), attention.n_heads(visual)
        grid, points = attention.patch_grid(visual), ["token.0"] if blocks[0] else []
    except attention.AttentionError:
        blocks, grid, points = (0, 0), (0, 0), []
    size = int(np.max(visual.image_size))
    pixels = torch.empty(1, 3, size, size, device="meta")
    text = torch.zeros(1, made.context_length, dtype=torch.long, device="meta")
    with hooks.captured(visual, points) as found:
        image_flops, embedding = _flops(lambda: made.encode_image(pixels))
    text_flops, _ = _flops(lambda: made.encode_text(text))
    return Model(
        dim=embedding.shape[1],
        image_size=size,
        n_blocks=blocks[0],
        n_heads=blocks[1],
        width=found["token.0"].shape[1] if points else 0,
        grid=tuple(grid),
        has_map=grid != (0, 0) and bool(hooks.readable(visual, ["attention.-1"])),
        n_parameters=sum(p.numel() for p in made.parameters()),
        image_flops=image_flops,
        text_flops=text_flops,
    )


def timed(name: str, weights: Weights, *, size: int, device: str, precision: str, metrics: bool) -> Speed:
    """Encode a few batches: with weights in a folder or file of one's own, else with random ones (the same arithmetic;
    to load what is in a hub's cache would ask the hub first).

    size: side of the views in pixels. metrics: whether to time what the pass computes of the views as well. Raises
    EncoderError for a model that no run could use.
    """
    with _quiet():
        if weights.state == "here" and any(Path(part or "").is_absolute() for part in named(name)):
            encoder, how = Encoder.load(*named(name), device=device, precision=precision), "measured"
        else:
            place = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
            made = build(weights.settings, "cpu").to(place)
            # random weights may fail the check of "mixed", which the real ones pass: fp32 then, the slower way
            precision = "auto" if precision == "mixed" else precision
            encoder, how = Encoder(made, name, name=name, weights_hash="", precision=precision), "random weights"
    picture = images.resize(images.decode(photograph()), size)
    views = augment.views(picture, seed=0, image_id="0")
    points = shift.points_of(encoder)

    def encode(n: int) -> None:
        encoder.encode(np.resize(views, (n, *views.shape[1:])), capture=points)

    threads = torch.get_num_threads() if encoder.device.type == "cpu" else 0
    view = image = seconds(encode, VIEWS, most=320, threads=threads)
    if encoder.image_size != size:
        own = np.stack([images.resize(picture, encoder.image_size)] * 64)
        image = seconds(
            lambda n: encoder.encode(own[:n], capture=points), 8, most=64, limit=SECONDS / 2, threads=threads
        )
    context = encoder.model.context_length

    def read(n: int) -> None:
        with torch.inference_mode():
            encoder.model.encode_text(torch.ones(n, context, dtype=torch.long, device=encoder.device)).cpu()

    text, rest = seconds(read, 4, most=64, limit=SECONDS / 2, threads=threads), 0.0
    if metrics:

        def compare(n: int) -> None:
            pixels = torch.from_numpy(np.stack([views] * n)).to(encoder.device)
            preservation.of_pixels(pixels[:, 0], pixels[:, 1:])["mse"].cpu()

        rest = seconds(compare, 1, most=32, limit=SECONDS / 2, threads=threads)
    return Speed(view, image, text, how, rest)


def scaled(wanted: Model, known: Model, speed: Speed) -> Speed:
    """The speed of one model from another's, by FLOPs."""
    image, text = wanted.image_flops / known.image_flops, wanted.text_flops / known.text_flops
    return Speed(speed.view * image, speed.image * image, speed.text * text, "by FLOPs")


def drawing(size: int) -> Drawing:
    """Timed on one thread with a photograph, whose views and doses are drawn at `size`."""
    data, threads = photograph(), cv2.getNumThreads()
    picture = images.resize(images.decode(data), size)

    def many(draw: Callable[[], Any]) -> Callable[[int], None]:
        return lambda n: [draw() for _ in range(n)] and None

    cv2.setNumThreads(1)
    try:
        return Drawing(
            read=seconds(many(lambda: images.resize(images.decode(data), size)), 1, most=16, threads=1),
            views=seconds(many(lambda: augment.views(picture, seed=0, image_id="0")), 1, most=16, threads=1),
            doses=seconds(many(lambda: dose.doses(picture, seed=0, image_id="0")), 1, most=2, threads=1),
        )
    finally:
        cv2.setNumThreads(threads)


def photograph() -> bytes:
    """A photograph of 512 x 512 pixels as JPEG, as large as many on the web."""
    file = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).save(file, "JPEG", quality=90)
    return file.getvalue()


def step(width: int, n_latents: int, k: int, n_rows: int) -> float:
    """Seconds of one step of training a dictionary, a tenth of its latents dead, on batches of `n_rows`."""
    training = sae_train.Training(TopK(width, n_latents, k), sae_train.Recipe(n_steps=1000), n_rows)
    x = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(0))

    def one(_: int) -> None:
        training.off[: n_latents // 10] = training.dead_after
        training.update(x)

    return seconds(one, 1, most=1, threads=torch.get_num_threads())


def busy() -> float:
    """Processes that want a core, for each core there is, over the last minute."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def seconds(work: Callable[[int], Any], first: int, *, most: int, limit: float = SECONDS, threads: int = 0) -> float:
    """Seconds of one unit of work, in the quietest of a few moments.

    work is called with a number of units: `first` to warm up, then as often and with as many, at most `most`, as keep
    it to about `limit` seconds. The least is taken: what else the machine does can only add to it. Where others leave
    no core free, the clock says nothing: then it is the processor time of one thread, spread over `threads`. 0, for
    what an accelerator does, takes the clock all the same.
    """
    crowded = threads > 0 and busy() > CROWDED
    before = torch.get_num_threads()
    torch.set_num_threads(1 if crowded else before)
    try:
        _clock(work, first)
        once, spent = _clock(work, first)
        n = int(min(most, max(first, limit / MOMENTS / once * first)) // first * first)
        repeats = max(1, min(10 * MOMENTS, int(limit / (once * n / first))))
        found = [(once / first, spent / first)]
        for _ in range(repeats):
            once, spent = _clock(work, n)
            found.append((once / n, spent / n))
    finally:
        torch.set_num_threads(before)
    clock, processor = (min(each) for each in zip(*found, strict=True))
    return processor / threads if crowded else clock


def _clock(work: Callable[[int], Any], n: int) -> tuple[float, float]:
    """Seconds by the clock and of processor time."""
    began, spent = time.perf_counter(), time.process_time()
    work(n)
    return max(time.perf_counter() - began, 1e-9), max(time.process_time() - spent, 1e-9)


def _flops(forward: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    with FlopCounterMode(display=False) as counter:
        found = forward()
    return float(counter.get_total_flops()), found


def _hub(repository: str, file: str, settings: dict[str, Any] | None) -> Weights:
    """A repository's weights, in the order in which OpenCLIP asks for them."""
    first = file or HF_WEIGHTS_NAME
    safe = HF_SAFE_WEIGHTS_NAME if first == HF_WEIGHTS_NAME else os.path.splitext(first)[0] + ".safetensors"
    found = _cached(repository, safe) or _cached(repository, first)
    return Weights("here", str(found), settings) if found else Weights("to fetch", repository, settings)


def _cached(repository: str, file: str) -> Path | None:
    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None  # else it is not there, or known not to exist


def _settings(config: Path) -> dict[str, Any] | None:
    try:
        return json.loads(config.read_text(encoding="utf-8"))["model_cfg"]
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def _quiet():
    """Without OpenCLIP's remarks that weights are random, which is what is wanted here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
