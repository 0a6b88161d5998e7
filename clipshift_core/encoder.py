"""Any OpenCLIP model on CPU or CUDA: images and texts in, unnormalised projected embeddings out.

OpenCLIP only logs a line when it keeps random weights or stretches a position embedding; here both are errors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from . import attention, checkpoints, hooks
from .checkpoints import EncoderError, first_lines
from .fastpath import FastVision, NotFast, bfloat16_gain, check_views, shift_error

PRECISIONS = ("auto", "fp32", "mixed")
MAX_SHIFT_ERROR = 0.03
"""`mixed` may move no augmentation's mean 1 - cosine by more than this part of its fp32 value."""
FAST_TOLERANCE = 1e-4
"""Largest difference of fast path and OpenCLIP's own forward, relative to the largest entry; measured 1e-6."""

Vision = Callable[..., tuple[Float[Tensor, "image dim"], dict[str, Tensor]]]
"""(pixels uint8 (image, size, size, 3), points) -> embeddings and what was captured."""


@dataclass(frozen=True)
class Encoded:
    """What one call of `Encoder.encode` found."""

    embedding: Float[Tensor, "image dim"]
    """Projected, unnormalised, float32, on the CPU."""
    captured: dict[str, Tensor]
    """One tensor a capture point, float32, on the CPU, first dimension image."""


class Encoder:
    """A loaded model; make one with `Encoder.load`.

    name: what was asked for, without the folders above it.  device: torch.device.
    precision: "fp32" or "mixed", as in use.
    dim, image_size: width of the embedding, side of the model's own square input in pixels.
    n_blocks, n_heads, width, grid: of the vision tower: blocks, heads in each, width of its residual stream, (rows,
        columns) of patches; all 0 for a tower that `attention` does not know.
    logit_scale: the factor on cosines (already exponentiated).
    weights_hash: SHA-256 (hex) of the one weights file where there is just one, else of the tensors.
    vision: "fast", or "plain: " and the reason why OpenCLIP's own forward is used.
    precision_error: largest relative error of a mean 1 - cosine by "mixed" in the check at loading; 0.0 for "fp32".
    refused: why "auto" did not take "mixed" on a GPU; empty where it did, and on a CPU.
    """

    def __init__(self, model: nn.Module, source: str, *, name: str, weights_hash: str, precision: str):
        """`model` in float32 on its device; `source` as OpenCLIP names it. Callers want `Encoder.load`."""
        self.model, self.name, self.weights_hash, self._source = model, name, weights_hash, source
        self.device = next(model.parameters()).device
        self.logit_scale = float(model.logit_scale.detach().exp())
        self._tokenizer: Callable[[list[str]], Tensor] | None = None
        settings = model.visual.preprocess_cfg
        height, width = np.broadcast_to(settings["size"], 2).tolist()
        if height != width:
            raise EncoderError(f"{name}: its images are {height} x {width}; only square inputs are supported")
        self.image_size: int = height
        self._mean, self._std = settings["mean"], settings["std"]
        self._mode = "bilinear" if settings["interpolation"] == "bilinear" else "bicubic"

        visual = model.visual
        try:
            self.n_blocks, self.n_heads = attention.n_blocks(visual), attention.n_heads(visual)
            self.grid = attention.patch_grid(visual)
        except attention.AttentionError:
            self.n_blocks, self.n_heads, self.grid = 0, 0, (0, 0)

        images, _ = check_views(self.image_size)
        first = {"token.0": hooks.Point("token", 0, False)} if self.n_blocks else {}
        reference, found = self._plain(images[:3].to(self.device), first)
        self.width: int = found["token.0"].shape[1] if first else 0
        if not reference.isfinite().all():
            raise EncoderError(f"{name}: its embeddings are not finite; the weights are damaged")
        self.dim: int = reference.shape[1]
        self._vision, self.vision = self._fast_or_plain(images[:3].to(self.device), reference)
        self.precision, self.precision_error, self.refused = "fp32", 0.0, ""
        if precision == "mixed" or (precision == "auto" and self.device.type == "cuda"):
            self.refused = self._take_mixed()
        if precision == "mixed" and self.refused:
            raise EncoderError(f"{name}: precision 'mixed' is refused: {self.refused}; accepted: fp32")

    @classmethod
    def load(cls, model: str, pretrained: str | None = None, *, device: str = "auto", precision: str = "auto"):
        """A model by local folder (open_clip_config.json and weights), "hf-hub:owner/model", or OpenCLIP's name.

        `pretrained`: with OpenCLIP's name only, its tag or a weights file (`checkpoints.SUFFIXES`).
        `precision`: "fp32"; "mixed" (bfloat16 products, float32 residual stream), refused where these products are
        slower than float32 ones or fail the check `MAX_SHIFT_ERROR`; "auto" is fp32 on a CPU, and on CUDA mixed
        unless that is refused. Raises EncoderError; never random weights.
        """
        if precision not in PRECISIONS:
            raise EncoderError(f"precision {precision!r} is unknown; accepted: {', '.join(PRECISIONS)}")
        place = _device(device)
        source = checkpoints.find(str(model), pretrained)
        with checkpoints.reach(source.name, source.needs_hub):
            weights = checkpoints.weights_of(source)
            shapes = checkpoints.shapes_in(source.name, weights) if weights is not None else {}
            with checkpoints.mapped(weights):
                loaded = open_clip.create_model(
                    source.model,
                    source.pretrained,
                    device=place,
                    pretrained_text=False,
                    require_pretrained=True,
                    weights_only=True,
                    **checkpoints.options(source),
                )
        loaded.eval().requires_grad_(False)
        if weights is not None:
            checkpoints.refuse_stretched(source.name, weights, shapes, loaded)
        digest = checkpoints.file_hash(weights) if weights is not None else checkpoints.tensor_hash(loaded)
        return cls(loaded, source.model, name=source.name, weights_hash=digest, precision=precision)

    def encode(self, images: UInt8[Tensor, "image h w 3"] | np.ndarray, capture: Sequence[str] = ()) -> Encoded:
        """Embeddings of RGB squares of any one size, in one pass. `capture`: points named in `hooks`.

        The class token and its attention rows come at next to no cost; other points, and towers that the fast path
        does not know, take OpenCLIP's own forward, in fp32 (same embeddings up to rounding). A batch may be of any
        size: an image's embedding depends on its neighbours by rounding only.
        """
        pixels = self._pixels(images)
        if not len(pixels):
            return Encoded(torch.empty(0, self.dim), {})
        points = {name: hooks.parse(self.model.visual, name) for name in capture}
        in_hand = all(p.kind != "residual" and p.block != "pool" and not p.all_rows for p in points.values())
        vision = self._vision if in_hand else self._plain
        embedding, found = vision(pixels, points)
        # Cloned outside inference mode: a caller may want gradients through them.
        return Encoded(
            embedding.float().cpu().clone(), {name: tensor.float().cpu().clone() for name, tensor in found.items()}
        )

    def readable(self, points: Sequence[str]) -> list[str]:
        """Those of `points` (named in `hooks`) that this tower has."""
        return hooks.readable(self.model.visual, points)

    def preprocess(self, images: UInt8[Tensor, "image h w 3"] | np.ndarray) -> Float[Tensor, "image 3 size size"]:
        """The model's input: as OpenCLIP's own transform makes it from the same images."""
        return self._normalised(self._pixels(images))

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "text dim"]:
        """Unnormalised projected embeddings of `texts`, float32, on the CPU. Always in fp32."""
        if isinstance(texts, str):
            raise EncoderError(f"texts is the single string {texts!r}; a list of strings is wanted")
        texts, found = list(texts), torch.empty(len(texts), self.dim)
        for start in range(0, len(texts), 256):
            part = slice(start, start + 256)
            with torch.no_grad():
                tokens = self.tokenizer(texts[part]).to(self.device)
                found[part] = self.model.encode_text(tokens, normalize=False).cpu()
        return found

    def classifier(self, classes: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "name dim"]:
        """Unit-norm class directions: each class the mean of its normalised prompts, by OpenCLIP's own function."""
        if isinstance(classes, str) or not classes:
            raise EncoderError(f"classes is {classes!r}; a list of one or more names is wanted")
        if isinstance(templates, str) or not templates or not all("{}" in template for template in templates):
            raise EncoderError(f"templates is {templates!r}; a list of texts with {{}} in each is wanted")
        weights = open_clip.build_zero_shot_classifier(
            self.model, self.tokenizer, list(classes), list(templates), device=self.device
        )
        return weights.T.float().cpu().contiguous()

    @property
    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """OpenCLIP's tokenizer of this model, loaded on first use (images alone need none)."""
        if self._tokenizer is None:
            needs_hub = checkpoints.needs_hub_for_texts(self._source)
            with checkpoints.reach(self.name, needs_hub, "its tokenizer "):
                self._tokenizer = open_clip.get_tokenizer(self._source)
        return self._tokenizer

    def _pixels(self, images: UInt8[Tensor, "image h w 3"] | np.ndarray) -> UInt8[Tensor, "image size size 3"]:
        """Checked, resized as OpenCLIP would (on the CPU: the same pixels for every device), on the device."""
        if not isinstance(images, Tensor):
            images = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        if (
            images.dtype != torch.uint8
            or images.ndim != 4
            or images.shape[3] != 3
            or images.shape[1] != images.shape[2]
        ):
            raise EncoderError(
                f"images of {images.dtype} and shape {tuple(images.shape)}; "
                "accepted: uint8 squares of shape (image, size, size, 3)"
            )
        if images.shape[1] != self.image_size and len(images):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images.cpu().permute(0, 3, 1, 2), size, mode=self._mode, antialias=True)
            images = images.permute(0, 2, 3, 1)
        return images.to(self.device)

    def _normalised(self, pixels: UInt8[Tensor, "image h w 3"]) -> Float[Tensor, "image 3 h w"]:
        """The three steps of torchvision's ToTensor and Normalize, in their order: equal to the last bit."""
        channels = pixels.permute(0, 3, 1, 2).float().contiguous()
        mean, std = (channels.new_tensor(values).reshape(3, 1, 1) for values in (self._mean, self._std))
        return channels.div_(255).sub_(mean).div_(std)

    def _plain(
        self,
        pixels: UInt8[Tensor, "image h w 3"],
        points: Mapping[str, hooks.Point] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Float[Tensor, "image dim"], dict[str, Tensor]]:
        """OpenCLIP's own forward: the oracle, and the way for towers that `fastpath` does not know."""
        # cuDNN's convolutions would otherwise round to TF32 in "fp32".
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(allow_tf32=False),
            torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None),
            hooks.captured(self.model.visual, tuple(points or ())) as found,
        ):
            # CoCa's would be divided by their length by default, those of the others not.
            return self.model.encode_image(self._normalised(pixels), normalize=False).float(), found

    def _fast_or_plain(self, pixels: Tensor, reference: Tensor) -> tuple[Vision, str]:
        """The fast path in fp32 if it gives `reference` for `pixels`, else the plain one and why."""

        def objection(found: Tensor) -> str:
            difference = float((found - reference).abs().max() / reference.abs().max())
            return "" if difference <= FAST_TOLERANCE else f"differs by {difference:.1e}"

        fast, _, objections = self._first_good(self._fast_ways(torch.float32), pixels, objection)
        if fast is None:
            return self._plain, f"plain: {objections[-1]}"
        return fast, f"fast, not prepacked: {objections[0]}" if objections else "fast"

    def _fast_ways(self, dtype: torch.dtype) -> list[Callable[[], Vision]]:
        """The fast path with prepacked weights, where torch has such a thing, and without."""
        packed = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        return [partial(self._build_fast, dtype, layout) for layout in ((True, False) if packed else (False,))]

    def _build_fast(self, dtype: torch.dtype, packed: bool) -> Vision:
        with torch.inference_mode():
            fast = FastVision.build(self.model.visual, self._mean, self._std, dtype=dtype, packed=packed)

        def run(
            pixels: UInt8[Tensor, "image h w 3"], points: Mapping[str, hooks.Point] | None = None
        ) -> tuple[Float[Tensor, "image dim"], dict[str, Tensor]]:
            with torch.inference_mode():
                return fast(pixels, {name: (point.kind, point.block) for name, point in (points or {}).items()})

        return run

    @staticmethod
    def _first_good(
        ways: Sequence[Callable[[], Vision]], pixels: Tensor, objection: Callable[[Tensor], str]
    ) -> tuple[Vision | None, Tensor | None, list[str]]:
        """The first way that can be built and run, and to whose embeddings of `pixels` there is no objection.

        With these embeddings, and what there is against each way before it; None and None where none is good.
        """
        objections = []
        for build in ways:
            try:
                vision = build()
                found = vision(pixels)[0]
            except (torch.OutOfMemoryError, torch.AcceleratorError):  # of a GPU: no matter of the way
                raise
            # oneDNN's private operations are gone, or take other arguments, in some torch; its packing and its
            # products refuse bfloat16 on processors without AVX-512.
            except (NotFast, AttributeError, RuntimeError, TypeError) as error:
                against = first_lines(error)
            else:
                against = objection(found)
            if not against:
                return vision, found, objections
            objections.append(against)
        return None, None, objections

    def _take_mixed(self) -> str:
        """Take bfloat16 products, or stay in fp32 where they are no faster or fail the check: returns why."""
        try:
            times = 1 / bfloat16_gain(self.device)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:  # no such product here
            return first_lines(error)
        if times >= 1:
            return f"on this {self.device.type} a product in bfloat16 takes {times:.2f} times as long as in float32"
        images, n_views = check_views(self.image_size)
        images = images.to(self.device)
        exact = self._vision(images)[0].cpu()

        def objection(found: Tensor) -> str:
            error = shift_error(found.cpu(), exact, n_views)
            more = f"it moves a mean 1 - cosine by {error:.1%}, more than {MAX_SHIFT_ERROR:.0%}"
            return "" if error <= MAX_SHIFT_ERROR else more

        ways = self._fast_ways(torch.bfloat16)
        if self.vision.startswith("plain"):
            ways = [lambda: partial(self._plain, dtype=torch.bfloat16)]
        elif self.vision != "fast":  # prepacked weights did not do in fp32
            ways = ways[-1:]
        mixed, found, objections = self._first_good(ways, images, objection)
        if mixed is None:
            return objections[-1]
        self._vision, self.precision = mixed, "mixed"
        self.precision_error = shift_error(found.cpu(), exact, n_views)
        return ""


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise EncoderError(f"device {device!r} is unknown; accepted: auto, cpu, cuda, cuda:N") from error
    if place.type not in ("cpu", "cuda"):
        raise EncoderError(f"device {device!r} is not supported; accepted: auto, cpu, cuda, cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise EncoderError(f"device {device!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices")
    return place
