"""What `Encoder.load` is asked for, found and looked at before a model is built from it.

A model is a folder for OpenCLIP, a repository on the hub, or OpenCLIP's name with one of its tags or with a weights
file. Nothing in a weights file is executed: safetensors, or a pickle of which torch reads tensors alone. What OpenCLIP
would do in silence (keep random weights, stretch a position embedding, take the wrong pixels' mean) is an error, or
done rightly, here.
"""

import difflib
import hashlib
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.serialization import config as serialization

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
"""Weights files that are read; all but the first are pickles."""
HUB_TIMEOUT = 5.0
"""Seconds until the hub counts as out of reach: its own client tries for half a minute and more, for each file."""

UNSCRIPTED = (
    "torch.save({key: value for key, value in torch.jit.load(FILE).state_dict().items() if value.is_floating_point()}, "
    "NEW)"
)
"""Makes a file of tensors of a TorchScript archive; OpenAI's hold sizes, as whole numbers, beside the weights."""

Shapes = dict[str, tuple[int, ...]]


class EncoderError(Exception):
    """A model that cannot be loaded or used as asked: the value, and what would be accepted."""


@dataclass(frozen=True)
class Source:
    """A model that was asked for."""

    model: str
    """As OpenCLIP is to be asked for it."""
    pretrained: str | None
    """OpenCLIP's tag, or a weights file; None for what brings its own weights."""
    name: str
    """For reports: what was asked for, without the folders above it."""

    @property
    def needs_hub(self) -> bool:
        """Whether its weights come from the hub, or from the cache of what came from there."""
        return self.model.startswith("hf-hub:") or (self.pretrained is not None and bool(self.tag))

    @property
    def tag(self) -> dict[str, Any]:
        """What OpenCLIP knows of the tag; empty where there is none."""
        return open_clip.get_pretrained_cfg(self.model.replace("/", "-"), self.pretrained) if self.pretrained else {}


# Names --------------------------------------------------------------------------------------------------------------


def find(model: str, pretrained: str | None) -> Source:
    """What the two arguments of `Encoder.load` mean, without asking the hub. Raises EncoderError."""
    if model.startswith("hf-hub:"):
        _refuse_tag(model, pretrained)
        return Source(model, None, model)
    names = open_clip.list_models()
    if model.replace("/", "-") in names:
        return Source(model, pretrained, f"{model}{_known_weights(model, pretrained)}")
    folder = Path(model.removeprefix("local-dir:"))
    if folder.is_dir():
        _refuse_tag(model, pretrained)
        if not (folder / "open_clip_config.json").is_file():
            raise EncoderError(f"{folder}: has no open_clip_config.json; a folder saved for OpenCLIP is wanted")
        return Source(f"local-dir:{folder}", None, folder.resolve().name)
    if model.startswith("local-dir:") or "/" in model or os.sep in model or model.startswith("."):
        raise EncoderError(f"{folder}: no such folder; a folder with open_clip_config.json and weights is wanted")
    near = ", ".join(difflib.get_close_matches(model, names, n=3, cutoff=0.3)) or "open_clip.list_models()"
    raise EncoderError(f"model {model!r} is neither a folder nor known to OpenCLIP; nearest names: {near}")


def _refuse_tag(model: str, pretrained: str | None) -> None:
    if pretrained is not None:
        raise EncoderError(f"pretrained {pretrained!r} with {model}: it brings its own weights; leave pretrained empty")


def _known_weights(model: str, pretrained: str | None) -> str:
    """Tag or file as the name's end; an error if OpenCLIP would keep random weights. A tag goes before a file."""
    tags = open_clip.list_pretrained_tags_by_model(model.replace("/", "-"))
    accepted = f"{', '.join(tags)}, or a weights file" if tags else "a weights file"
    if pretrained is None:
        raise EncoderError(f"model {model!r} without pretrained would have random weights; accepted: {accepted}")
    if pretrained in tags:
        return f"/{pretrained}"
    if os.path.isfile(pretrained):
        return f"@{Path(pretrained).name}"
    if Path(pretrained).suffix in SUFFIXES:
        raise EncoderError(f"{pretrained}: no such file; wanted for {model}: {accepted}")
    raise EncoderError(f"pretrained {pretrained!r} is unknown for {model}; accepted: {accepted}")


def needs_hub_for_texts(model: str) -> bool:
    """Whether OpenCLIP's tokenizer of a model (`Source.model`) comes from the hub, or from its cache."""
    if model.startswith("local-dir:") or not model:
        return False
    text = {} if model.startswith("hf-hub:") else open_clip.get_model_config(model.replace("/", "-"))["text_cfg"]
    return model.startswith("hf-hub:") or "siglip" in model.lower() or bool(text.get("hf_tokenizer_name"))


def options(source: Source) -> dict[str, Any]:
    """What OpenCLIP does not ask of a tag or file by itself, as arguments of its `create_model`.

    Weights trained with QuickGELU get it (OpenCLIP only warns). A file's pixels are normalised as most of the tags of
    the model's name have it: OpenCLIP would take OpenAI's mean and deviation for whatever file.
    """
    if source.pretrained is None or source.tag:
        return {"force_quick_gelu": bool(source.tag.get("quick_gelu"))}
    name = source.model.replace("/", "-")
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    known = Counter((tag["mean"], tag["std"]) for tag in tags if "mean" in tag and "std" in tag)
    if not known:
        return {}
    mean, std = known.most_common(1)[0][0]
    return {"force_preprocess_cfg": {"mean": mean, "std": std}}


# Files --------------------------------------------------------------------------------------------------------------


@contextmanager
def reach(name: str, needs_hub: bool, part: str = "") -> Iterator[None]:
    """While open, the hub's own client asks its cache alone where the hub is out of reach or the user wants that.

    Any error in there, of OpenCLIP or of torch with a spoiled file, becomes an EncoderError of one line about `part`.
    """
    silent, constants = "", huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    if needs_hub:
        silent = "HF_HUB_OFFLINE is set" if before else _out_of_reach()
    constants.HF_HUB_OFFLINE = before or bool(silent)
    try:
        yield
    except EncoderError:
        raise
    # A broken config or weights file may raise anything in there; all of it ends in the one line.
    except Exception as error:
        if silent and isinstance(error, OSError):  # FileNotFoundError, where a file could not be fetched
            raise EncoderError(
                f"{name}: {part}cannot be fetched from {constants.ENDPOINT} ({silent}) and is not in the hub's cache; "
                "fetch it where there is a network, and name its folder, or OpenCLIP's name and its file"
            ) from error
        raise EncoderError(f"{name}: {part}cannot be loaded by OpenCLIP: {first_lines(error)}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _out_of_reach() -> str:
    """Why the hub does not answer; empty where it does."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:  # of the client's own library, which has changed with its versions
        return first_lines(error)
    return ""


def weights_of(source: Source) -> Path | None:
    """The one file of the weights, fetched if need be; None where OpenCLIP does not say which it takes."""
    if source.model.startswith("hf-hub:"):
        return Path(open_clip.pretrained.download_pretrained_from_hf(source.model.removeprefix("hf-hub:")))
    if source.pretrained is not None:
        return Path(open_clip.download_pretrained(source.tag) if source.tag else source.pretrained)
    folder = Path(source.model.removeprefix("local-dir:"))
    held = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin", ".pth")]
    if not held:
        raise EncoderError(f"{folder}: has no weights; open_clip_model.safetensors is wanted beside its config")
    if len(held) > 1:  # OpenCLIP's own choice among several, which is not public
        choose = getattr(open_clip.factory, "_find_checkpoint_in_dir", None)
        return Path(choose(folder)) if choose else None
    return held[0]


def shapes_in(name: str, weights: Path) -> Shapes:
    """The shape of every tensor in a weights file, without loading it and without running anything in it.

    OpenCLIP's training checkpoints are read too: tensors under "state_dict", with "module." before their names.
    Raises EncoderError for a file that holds code, and for one that cannot be read.
    """
    if weights.suffix not in SUFFIXES:
        raise EncoderError(f"{name}: {weights.name} is no weights file that is read; accepted: {', '.join(SUFFIXES)}")
    if weights.suffix == ".safetensors":
        try:
            with safe_open(weights, "pt") as stored:
                return {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise EncoderError(f"{name}: {weights.name} cannot be loaded: {first_lines(error)}") from error
    try:
        if _is_torchscript(weights):
            raise EncoderError(
                f"{name}: {weights.name} cannot be loaded: it is a TorchScript archive, which holds code beside its "
                "weights; accepted: OpenCLIP's tag (openai, for OpenAI's), or, where you trust the archive, what this "
                f"makes of it: {UNSCRIPTED}"
            )
        with mapped(weights):
            held = torch.load(weights, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)|global[: ]+`?([\w.]+)", str(error))
        asks = f"it asks for {next(filter(None, asked.groups()))}" if asked else "it holds more than tensors"
        raise EncoderError(
            f"{name}: {weights.name} cannot be loaded: {asks}, and from a pickle nothing but tensors is read, for code "
            "in it would run; accepted: safetensors, or a file made by torch.save(model.state_dict(), FILE)"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise EncoderError(f"{name}: {weights.name} cannot be loaded: {first_lines(error)}") from error
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(held, dict) or not any(isinstance(value, torch.Tensor) for value in held.values()):
        raise EncoderError(f"{name}: {weights.name} cannot be loaded: it holds no tensors under names")
    tensors = {key: value for key, value in held.items() if isinstance(value, torch.Tensor)}
    return {key.removeprefix("module."): tuple(value.shape) for key, value in tensors.items()}


def _is_torchscript(weights: Path) -> bool:
    if not zipfile.is_zipfile(weights):
        return False
    with zipfile.ZipFile(weights) as archive:
        return any(Path(entry).name == "constants.pkl" for entry in archive.namelist())


@contextmanager
def mapped(weights: Path | None) -> Iterator[None]:
    """While open, torch reads pickled weights in place: beside the model no second copy of them is held in memory."""
    with serialization.patch({"load.mmap": weights is not None and zipfile.is_zipfile(weights)}):
        yield


def refuse_stretched(name: str, weights: Path, shapes: Shapes, model: nn.Module) -> None:
    """OpenCLIP interpolates position embeddings of another size in silence: an error here."""
    state = model.state_dict()
    for key, there in shapes.items():
        # a checkpoint of one class of OpenCLIP's models in another: the text tower's names have a "text." more
        here = next((tuple(state[own].shape) for own in (key, f"text.{key}") if own in state), there)
        if there != here and key.endswith("positional_embedding"):
            raise EncoderError(
                f"{name}: {key} is {list(there)} in {weights.name}, but {list(here)} by the config (image_size, "
                "patch_size or context_length differ); a config that matches the weights is wanted"
            )


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_hash(model: nn.Module) -> str:
    """SHA-256 over name, shape and float32 bytes of every tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def first_lines(error: BaseException) -> str:
    """What an error says, in one line: torch lists a hundred mismatched tensors under a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
