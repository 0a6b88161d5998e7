"""The choices of a run: one frozen dataclass, read from a yaml file, checked, hashed.

A profile is the only thing that a run is told. It is written in `notebooks/profiles/<name>.yaml`, any key of
it can be overridden, and its digest is part of the key of everything that the run computes.
"""

import difflib
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
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
    """A local folder, an OpenCLIP name such as `ViT-B-32`, or `hf-hub:owner/model`."""
    seed: int = 0
    """The seed from which every random draw of the run is derived."""
    n_images: int | None = None
    """How many images to sample from the source; None takes all."""
    image_size: int = 224
    """Side in pixels of the square to which each image is resized before it is augmented."""
    pretrained: str | None = None
    """OpenCLIP's tag of the weights, such as `openai`; None for a folder or a hub model."""
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
    """Other models, for the comparison between models: folders, `hf-hub:owner/model`, or OpenCLIP `name/tag`."""
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
    """Another model that labels latents: a folder, `hf-hub:owner/model`, or OpenCLIP `name/tag`; None takes `model`."""
    vocabulary: str = "imagenet"
    """What latents may be labelled with: `world`, `imagenet`, or a text file with one word a line."""
    classes: str | None = None
    """A text file with one class name a line, or None."""

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
        """Raise ProfileError if the source, the model folder or the class list is not there."""
        if not self.source_path.exists():
            raise ProfileError(
                f"source {self.source_path}: does not exist; "
                "accepted: a folder of images, a folder of .tar shards, or one .tar"
            )
        if self.source_path.is_dir() and next(self.source_path.iterdir(), None) is None:
            raise ProfileError(f"source {self.source_path}: is an empty folder")
        if self.model_dir and not self.model_dir.is_dir():
            raise ProfileError(
                f"model {self.model_dir}: no such folder; accepted: a folder with open_clip_config.json "
                "and weights, an OpenCLIP name such as ViT-B-32, or hf-hub:owner/model"
            )
        if not self.model_dir and not self.pretrained and not self.model.startswith("hf-hub:"):
            raise ProfileError(
                f"model {self.model!r}: an OpenCLIP name needs a tag of weights, such as pretrained=openai"
            )
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
        if self.classes and not (ROOT / self.classes).is_file():
            raise ProfileError(f"classes {ROOT / self.classes}: no such file; accepted: a class name a line")

    @property
    def source_path(self) -> Path:
        """The source as an absolute path."""
        return ROOT / self.source

    @property
    def model_dir(self) -> Path | None:
        """The folder of a local model, told by a slash in its name; None for a hub's or OpenCLIP's model."""
        local = "/" in self.model and not self.model.startswith("hf-hub:")
        return ROOT / self.model if local else None

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
    """Model and tag of weights in one name: "name/tag" is OpenCLIP's unless there is a folder of that name."""
    is_folder = (ROOT / name).is_dir()
    if name.startswith("hf-hub:") or is_folder or name.count("/") != 1:
        return name, None
    model, tag = name.split("/")
    return model, tag


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
