"""The choices of a run: one frozen dataclass, read from a yaml file, checked, hashed.

A profile is the only thing that a run is told. It is written in `notebooks/profiles/<name>.yaml`, any key of
it can be overridden, and its digest is part of the key of everything that the run computes.
"""

import difflib
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import get_args

import yaml

ROOT = Path(__file__).resolve().parents[1]
"""The repository: relative paths in a profile start here, and `runs/` is here."""

PRECISIONS = ("auto", "fp32", "mixed")


class ProfileError(ValueError):
    """A profile that cannot be run; the message names the file, the value and what would be accepted."""


@dataclass(frozen=True)
class Profile:
    """Every choice that a run makes. Fields without a default must be in the file."""

    name: str
    """Names the folder of the run, `runs/<name>`; a profile file need not give it, its own name is taken."""
    source: str
    """Where images come from: a folder of images, a folder of web-dataset shards, or one .tar shard."""
    model: str
    """A folder, `hf-hub:owner/model`, OpenCLIP's `NAME/TAG` such as `ViT-B-32/openai`, or `NAME@FILE`, a checkpoint
    file of that architecture. All keys that name models take these."""
    seed: int = 0
    """The seed from which every random draw of the run is derived."""
    n_images: int | None = None
    """How many images to sample from the source; None takes all."""
    fetch: str | None = None
    """A .tsv of captions and URLs, or a .txt of URLs of shards: where it is there, the source is filled from it before
    the first notebook (room `fetch`)."""
    fetch_allow: list = field(default_factory=list)
    """`host:port` of servers that images may be fetched from though their address is private, such as a mirror here."""
    captions: str | None = None
    """A CSV with the columns file and caption, which wins over what the source itself holds."""
    image_size: int = 224
    """Side in pixels of the square to which each image is resized before it is augmented."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    precision: str = "auto"
    """`auto`, `fp32` or `mixed`."""
    batch_size: int = 32
    """Images (not views) in one forward pass."""
    n_bootstrap: int = 2000
    """Resamples behind each confidence interval."""
    n_heatmap: int = 24
    """Images shown in the heatmaps."""
    n_layers: int = 2000
    """Images whose class token is kept after every block (the paper measures all but the embedding on 2,000)."""
    n_dose: int = 64
    """Images swept over severities."""
    models: list = field(default_factory=list)
    """Other models, for the comparison between models."""
    sae: str | None = None
    """Folder of the sparse autoencoder that the series goes on with; None takes the one that the run trains."""
    sae_patches: str | None = None
    """Folder of another one, on the tokens of the patches, to see where in an image latents are on."""
    sae_reference: str | None = None
    """Folder of the one that reliance is looked for with, best learned from images in which what is suspected goes
    separately from the classes; None takes the one that the series goes on with."""
    sae_others: list = field(default_factory=list)
    """The same for `models`, one each, as far as they are to be looked at."""
    sae_lesions: str | None = None
    """The same for the lesion study; None learns one from half of its images."""
    lesions: str | None = None
    """Folder of lesions with their metadata (`isic`); None draws them where the images are drawn scenes."""
    sae_layer: int = -1
    """Block after which sparse autoencoders read the residual stream, from 0 or from the end with a minus."""
    sae_token: str = "class"
    """`class` or `spatial`: which tokens of the residual stream they read."""
    sae_latents: int = 30_000
    """Latents of the one trained in the run, as published."""
    sae_k: int = 64
    """Latents that may be on in a row of activations, as published."""
    sae_epochs: int = 30
    """Times that training sees each row of activations, as published."""
    sae_scenes: int = 8000
    """Scenes drawn to train on, where the images are drawn scenes; others train on their own images."""
    n_probe: int = 2000
    """Scenes drawn to look at the latents with, where the images are drawn scenes."""
    labeller: str | None = None
    """Another model that labels latents; None takes `model`."""
    vocabulary: str = "imagenet"
    """What latents may be labelled with: `world`, `imagenet`, or a text file with one word a line."""
    classes: str | None = None
    """A text file with one class name a line: what images are asked for, and called where they have no caption."""

    def __post_init__(self):
        for key in fields(self):
            value, allowed = getattr(self, key.name), get_args(key.type) or (key.type,)
            if type(value) not in allowed:  # exact: True is no number
                names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in allowed)
                raise ProfileError(f"{key.name} = {value!r}: must be {names}")
        for key, lowest in _LOWEST.items():
            value = getattr(self, key)
            if value is not None and value < lowest:
                raise ProfileError(f"{key} = {value}: must be at least {lowest}")
        for key, (pattern, accepted) in _PATTERNS.items():
            value = getattr(self, key)
            if value is not None and not re.fullmatch(pattern, value):
                raise ProfileError(f"{key} = {value!r}: must be {accepted}")

    @classmethod
    def load(cls, profile: str | Path, overrides: dict | None = None) -> "Profile":
        """Read `notebooks/profiles/<profile>.yaml`, or the path of a yaml file, and lay `overrides` over it.

        Raises ProfileError for a file that is missing or no mapping, an unknown or missing key, a wrong type
        or a value out of range.
        """
        path = _path(profile)
        try:
            written = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ProfileError(f"profile {path}: cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(written, dict):
            raise ProfileError(f"profile {path}: must be a mapping of keys to values")
        for origin, choices in ((f"profile {path}", written), ("overrides", overrides or {})):
            for key in choices:
                if key not in KEYS:
                    raise ProfileError(f"{origin}: unknown key {key!r}{_hint(key)}")
        choices = {"name": path.stem} | written | (overrides or {})
        missing = [key for key in ("source", "model") if key not in choices]
        if missing:
            raise ProfileError(f"profile {path}: needs a value for {' and '.join(missing)}")
        try:
            return cls(**choices)
        except ProfileError as error:
            raise ProfileError(f"profile {path}: {error}") from None

    def check(self) -> None:
        """Raise ProfileError if the source, a model or any other file that is named is not there."""
        if not self.listing:
            or_fetched = f"; or fetch {ROOT / self.fetch}, which is not there either" if self.fetch else ""
            if not self.source_path.exists():
                raise ProfileError(
                    f"source {self.source_path}: does not exist; "
                    f"accepted: a folder of images, a folder of .tar shards, or one .tar{or_fetched}"
                )
            if self.source_path.is_dir() and next(self.source_path.iterdir(), None) is None:
                raise ProfileError(f"source {self.source_path}: is an empty folder{or_fetched}")
        for key, names in (("model", [self.model]), ("models", self.models), ("labeller", [self.labeller])):
            for name in filter(None, names):
                _check_model(key, name)
        given = [(key, getattr(self, key)) for key in DICTIONARIES] + [("sae_others", each) for each in self.sae_others]
        for key, folder in given:
            if folder and not (ROOT / folder / "sae.json").is_file():
                raise ProfileError(f"{key} {ROOT / folder}: has no sae.json; accepted: such a folder, or null")
        if self.lesions and not (ROOT / self.lesions).is_dir():
            raise ProfileError(f"lesions {ROOT / self.lesions}: no such folder; accepted: images with a metadata.csv")
        if self.vocabulary not in ("world", "imagenet") and not (ROOT / self.vocabulary).is_file():
            raise ProfileError(
                f"vocabulary {ROOT / self.vocabulary}: no such file; accepted: world, imagenet, or a word a line"
            )
        for key, accepted in (("classes", "a class name a line"), ("captions", "a CSV with the columns file, caption")):
            file = getattr(self, key)
            if file and not (ROOT / file).is_file():
                raise ProfileError(f"{key} {ROOT / file}: no such file; accepted: {accepted}")

    @property
    def source_path(self) -> Path:
        """The source as an absolute path."""
        return ROOT / self.source

    @property
    def listing(self) -> Path | None:
        """The file that says what is to be fetched, if it is there. (A source that is filled by hand needs none.)"""
        path = ROOT / self.fetch if self.fetch else None
        return path if path and path.is_file() else None

    @property
    def model_dir(self) -> Path | None:
        """The folder of a local model; None for any other."""
        model, _ = named(self.model)
        return Path(model) if Path(model).is_absolute() else None

    @property
    def run_dir(self) -> Path:
        """The folder of everything that a run of this profile makes."""
        return ROOT / "runs" / self.name

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical json of all fields: equal choices, equal digest."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


KEYS = tuple(field.name for field in fields(Profile))
DICTIONARIES = ("sae", "sae_patches", "sae_reference", "sae_lesions")
"""Keys of dictionaries, each of which fits one model alone."""

_LOWEST = {
    "seed": 0,
    "n_images": 1,
    "image_size": 16,  # below this coarse dropout's holes no longer fit into the image
    "batch_size": 1,
    "n_bootstrap": 100,
    "n_heatmap": 1,
    "n_layers": 1,
    "n_dose": 1,
    "sae_latents": 1,
    "sae_k": 1,
    "sae_epochs": 1,
    "sae_scenes": 100,
    "n_probe": 20,
}
_PATTERNS = {
    "name": (r"[A-Za-z0-9][A-Za-z0-9._-]*", "letters, digits, '.', '_' and '-' (it names a folder)"),
    "source": (r".+", "a path"),
    "model": (r".+", "a folder or a name"),
    "device": (r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"),
    "sae_token": ("class|spatial", "class or spatial"),
    "precision": ("|".join(PRECISIONS), ", ".join(PRECISIONS)),
}


def profiles_dir() -> Path:
    """Where the profiles live that are called by name."""
    return ROOT / "notebooks" / "profiles"


def named(name: str) -> tuple[str, str | None]:
    """What `Encoder.load` takes as model and pretrained, from the one string that names a model; paths are absolute."""
    local = ROOT / name.removeprefix("local-dir:")
    if name.startswith("hf-hub:"):
        return name, None
    if name.startswith("local-dir:") or local.is_dir():
        return str(local), None
    for sign in "@/":
        model, found, weights = name.partition(sign) if sign == "@" else name.rpartition(sign)
        if found and model.replace("/", "-") in _architectures():
            return model, str(ROOT / weights) if sign == "@" else weights
    return (name if name.replace("/", "-") in _architectures() else str(local)), None


def _check_model(key: str, name: str) -> None:
    """Raise ProfileError for a model that cannot be there. Whether OpenCLIP knows a tag is seen when it is loaded."""
    model, weights = named(name)
    if model.startswith("hf-hub:"):
        return
    if Path(model).is_absolute() and not Path(model).is_dir():
        near = difflib.get_close_matches(re.split("[/@]", name)[0], _architectures(), n=3)
        raise ProfileError(
            f"{key} {model}: no such folder; accepted: a folder with open_clip_config.json and weights, "
            "hf-hub:owner/model, OpenCLIP's NAME/TAG such as ViT-B-32/openai, or NAME@FILE"
            + (f" (near this name: {', '.join(near)})" if near else "")
        )
    if not Path(model).is_absolute() and not weights:
        raise ProfileError(f"{key} {name!r}: an OpenCLIP name needs a tag of weights, such as {name}/openai")
    if weights and Path(weights).is_absolute() and not Path(weights).is_file():
        raise ProfileError(f"{key} {name!r}: no checkpoint file {weights}")


@cache
def _architectures() -> tuple[str, ...]:
    """The names that OpenCLIP has a configuration of, from its files: importing it takes seconds."""
    package = Path(find_spec("open_clip").submodule_search_locations[0])
    return tuple(sorted(path.stem for path in (package / "model_configs").glob("*.json")))


def _path(profile: str | Path) -> Path:
    is_file = str(profile).endswith((".yaml", ".yml"))
    path = Path(profile) if is_file else profiles_dir() / f"{profile}.yaml"
    if not path.is_file():
        known = sorted(known.stem for known in profiles_dir().glob("*.yaml"))
        raise ProfileError(f"profile {str(profile)!r}: no file {path}; accepted: {', '.join(known)}, or a .yaml file")
    return path


def _hint(key: str) -> str:
    close = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; accepted: {', '.join(KEYS)}"
