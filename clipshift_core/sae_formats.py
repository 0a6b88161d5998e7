"""Sparse autoencoders on disk: our own format, SAELens' and that of paper B's code.

Ours is a folder that says what the dictionary is good for, and loading checks it all:

    sae.safetensors   W_enc and W_dec (n_latents, width), b_enc, b_dec; threshold for BatchTopK and Matryoshka; float32
    sae.json          format, variant, settings, origin (`activations.Origin`), statistics (mean, scale, n_rows of the
                      activations it was trained on), recipe, and the sha256 of sae.safetensors

SAELens, version 6: cfg.json and sae_weights.safetensors with W_enc (width, n_latents), W_dec (n_latents, width), b_enc,
b_dec, and threshold (n_latents,) where the architecture is jumprelu.

Paper B's code: a torch checkpoint whose "state_dict" holds two layers under weight normalisation, encoder.0.weight_g
(n_latents, 1), encoder.0.weight_v (n_latents, width), encoder.0.bias, decoder.weight_g (1, n_latents) and
decoder.weight_v (width, n_latents), beside a yaml with sae_k, sae_hidden_dim, sae_layer_idx, sae_token and model_name.

Nothing is unpickled: a torch checkpoint is read with `weights_only`.
"""

import hashlib
import io
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors
from torch import Tensor

from clipshift_core import files
from clipshift_core.activations import Origin
from clipshift_core.sae import VARIANTS, BatchTopK, PublishedTopK, SaeError, TopK
from clipshift_core.sae_train import Statistics

FORMAT = 1
NEAR = 1e-3
"""Statistics count as the same up to this part of the scale."""
TOKENS_THERE = {"class": "cls", "spatial": "spatial"}
"""What paper B's configs call our kinds of token."""


class Loaded(NamedTuple):
    """An autoencoder of our own format."""

    sae: TopK
    origin: Origin
    statistics: Statistics
    """Of the activations it was trained on."""
    recipe: dict[str, Any]
    """How it was trained, as it was saved."""


class Imported(NamedTuple):
    """An autoencoder of another format, with what that says about it; which weights it is for no file says."""

    sae: TopK
    about: dict[str, Any]


def _of_files(read: Callable[..., Any]) -> Callable[..., Any]:
    """A reader from which damaged files draw nothing but SaeError: a value may be of any kind, wherever it stands."""

    @wraps(read)
    def reading(file: Path, *arguments: Any, **named: Any) -> Any:
        try:
            return read(file, *arguments, **named)
        except SaeError:
            raise
        except Exception as error:
            raise SaeError(f"{file}: is damaged: {type(error).__name__}: {_line(error)}") from error

    return reading


# Ours ------------------------------------------------------------------------------------------------------------


def save(
    folder: Path, sae: TopK, origin: Origin, statistics: Statistics, recipe: Mapping[str, Any] | None = None
) -> Path:
    """Write a finished autoencoder and all that it may be used on; returns the folder."""
    tensors = _bytes(sae.state_dict())
    about = {
        "format": FORMAT,
        "variant": sae.variant,
        "settings": sae.settings,
        "origin": asdict(origin),
        "statistics": statistics._replace(mean=statistics.mean.tolist())._asdict(),
        "recipe": dict(recipe or {}),
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    return _write(folder, {"sae.safetensors": tensors, "sae.json": _text(about)})


@_of_files
def load(
    folder: Path,
    *,
    model: str,
    weights_hash: str,
    layer: int | None = None,
    token: str | None = None,
    data: str | None = None,
    statistics: Statistics | None = None,
) -> Loaded:
    """Read what `save` wrote, for use on the activations that are named.

    model, weights_hash: of the encoder (`Encoder.name`, `Encoder.weights_hash`). layer, token: as in `Origin`, where
    the caller has a place in mind; else the place is read off the result. data and statistics: of the activations,
    where they have to be those of the training; held-out ones have others. Raises SaeError, naming the file, the value
    and what was wanted, for anything that differs or is damaged.
    """
    file = folder / "sae.json"
    about = _json(file)
    try:
        held = Origin(**about["origin"])
        seen = Statistics(
            torch.tensor(about["statistics"]["mean"]), *(about["statistics"][k] for k in ("scale", "n_rows"))
        )
        variant, settings, recipe, sha256 = (about[key] for key in ("variant", "settings", "recipe", "sha256"))
    except (KeyError, TypeError, ValueError) as error:
        raise SaeError(f"{file}: is no description of an autoencoder: {error!r}") from None
    _same(file, "format", about.get("format"), FORMAT)
    wanted = {"model": model, "weights_hash": weights_hash, "layer": layer, "token": token, "data": data}
    for name, value in wanted.items():
        if value is not None:
            _same(file, name, getattr(held, name), value)
    if variant not in VARIANTS:
        raise SaeError(f"{file}: variant {variant!r} is unknown; accepted: {', '.join(VARIANTS)}")
    _same(file, "sha256 of sae.safetensors", sha256, _sha256(folder / "sae.safetensors"))
    sae = _made(file, VARIANTS[variant], settings, _safetensors(folder / "sae.safetensors"))
    if seen.mean.shape != (sae.width,) or not seen.mean.isfinite().all() or not 0 < seen.scale < float("inf"):
        raise SaeError(
            f"{file}: statistics of shape {tuple(seen.mean.shape)} and scale {seen.scale}; width {sae.width}"
        )
    if statistics is not None:
        apart = float((seen.mean - statistics.mean.cpu()).abs().max())
        if apart > NEAR * seen.scale or abs(seen.scale - statistics.scale) > NEAR * seen.scale:
            raise SaeError(
                f"{file}: trained on activations of scale {seen.scale:.6g}, these have {statistics.scale:.6g}; the "
                f"means are up to {apart:.3g} apart"
            )
    return Loaded(sae, held, seen, recipe)


# SAELens ---------------------------------------------------------------------------------------------------------


def save_saelens(folder: Path, sae: TopK, origin: Origin) -> Path:
    """Write an autoencoder for SAELens: TopK as topk, BatchTopK and Matryoshka as jumprelu, as it does with its own."""
    if isinstance(sae, PublishedTopK):
        raise SaeError("a published autoencoder lets negative codes pass, which no architecture of SAELens does")
    kind = {"architecture": "topk", "k": sae.k, "rescale_acts_by_decoder_norm": False}
    tensors = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    if isinstance(sae, BatchTopK):
        kind = {"architecture": "jumprelu"}
        tensors["threshold"] = sae.threshold.expand(sae.n_latents)
    metadata = {
        "sae_lens_version": "6.0.0",  # of this layout; without it SAELens takes the file for an older one
        "model_name": origin.model,
        "hook_name": f"visual.transformer.resblocks.{origin.layer}",
        "k": sae.k,
        "origin": asdict(origin),
    }
    config = {
        **kind,
        "d_in": sae.width,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    return _write(folder, {"sae_weights.safetensors": _bytes(tensors), "cfg.json": _text(config)})


@_of_files
def load_saelens(folder: Path) -> Imported:
    """Read a topk, or a jumprelu of one threshold, of SAELens 6; `about` is its metadata.

    Options that we do not have are folded into the weights: rescaling by the decoder's norms, an encoder that does not
    subtract b_dec. Raises SaeError for an architecture or an option that cannot be.
    """
    file = folder / "cfg.json"
    config = _json(file)
    metadata = config.get("metadata") or {}
    for name in ("normalize_activations", "reshape_activations"):
        _same(file, name, config.get(name, "none"), "none")
    architecture = config.get("architecture")
    if architecture not in ("topk", "jumprelu"):
        raise SaeError(f"{file}: architecture {architecture!r} is not read; accepted: topk, jumprelu")
    k = config.get("k") if architecture == "topk" else metadata.get("k")
    if not isinstance(k, int):
        raise SaeError(f"{file}: k is {k!r}; a whole number is wanted (of a jumprelu in its metadata)")
    tensors = {name: tensor.float() for name, tensor in _safetensors(folder / "sae_weights.safetensors").items()}
    missing = {"W_enc", "W_dec", "b_enc", "b_dec"} - tensors.keys()
    if missing:
        raise SaeError(f"{folder / 'sae_weights.safetensors'}: lacks {', '.join(sorted(missing))}")
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    if config.get("rescale_acts_by_decoder_norm"):  # codes times |W_dec[j]|, decoded by W_dec[j] / |W_dec[j]|
        norm = tensors["W_dec"].norm(dim=1).clamp_min(1e-8)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norm[:, None], tensors["b_enc"] * norm
        tensors["W_dec"] = tensors["W_dec"] / norm[:, None]
    if not config.get("apply_b_dec_to_input", True):  # W x + b = W (x - b_dec) + (b + W b_dec)
        tensors["b_enc"] = tensors["b_enc"] + tensors["W_enc"] @ tensors["b_dec"]
    if architecture == "jumprelu":
        levels = tensors["threshold"].relu().unique() if "threshold" in tensors else torch.empty(0)
        if len(levels) != 1:
            raise SaeError(f"{file}: {len(levels)} different thresholds; one for all latents is accepted")
        tensors["threshold"] = levels[0]
    settings = {"width": config.get("d_in"), "n_latents": config.get("d_sae"), "k": k}
    return Imported(_made(file, TopK if architecture == "topk" else BatchTopK, settings, tensors), metadata)


# Paper B's code --------------------------------------------------------------------------------------------------


def save_published(folder: Path, sae: TopK, origin: Origin) -> Path:
    """Write sae.ckpt and sae.yaml for paper B's code.

    That code has no decoder bias. Where ours has one, it travels as one more latent that is always on, with a code of
    2^20, above all others, and a decoder column of b_dec / 2^20; k grows by one. That code has no ReLU either: the two
    agree where a row has k positive pre-activations. Raises SaeError for BatchTopK and Matryoshka, which it lacks.
    """
    if isinstance(sae, BatchTopK):
        raise SaeError(f"variant {sae.variant!r}: paper B's code has top-k alone")
    W_enc, b_enc, W_dec, k = sae.W_enc.detach(), sae.b_enc.detach(), sae.W_dec.detach(), sae.k
    b_enc = b_enc - W_enc @ sae.b_dec.detach()
    if sae.b_dec.any():
        always = 2.0**20
        W_enc, b_enc = torch.cat([W_enc, W_enc.new_zeros(1, sae.width)]), torch.cat([b_enc, b_enc.new_tensor([always])])
        W_dec, k = torch.cat([W_dec, sae.b_dec.detach()[None] / always]), k + 1
    tensors = {"encoder.0.bias": b_enc}
    tensors["encoder.0.weight_g"], tensors["encoder.0.weight_v"] = _weight_normed(W_enc)
    g, v = _weight_normed(W_dec)
    tensors["decoder.weight_g"], tensors["decoder.weight_v"] = g.T, v.T
    state = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    torch.save({"state_dict": state}, checkpoint := io.BytesIO())
    config = {
        "sae_k": k,
        "sae_hidden_dim": len(b_enc),
        "sae_layer_idx": origin.layer,
        "sae_token": TOKENS_THERE[origin.token],
        "model_name": origin.model,
        "ckpt_path": "sae.ckpt",
    }
    return _write(folder, {"sae.ckpt": checkpoint.getvalue(), "sae.yaml": yaml.safe_dump(config).encode()})


@_of_files
def load_published(checkpoint: Path, config: Path) -> Imported:
    """Read a checkpoint of paper B's code and its yaml; `about` has layer (as given, from the end if negative), token
    and model.

    Raises SaeError for files that are not of this layout, in place of the random weights that code would go on with.
    """
    try:
        about = yaml.safe_load(config.read_text(encoding="utf-8"))
        settings = {"n_latents": about["sae_hidden_dim"], "k": about["sae_k"]}
        token = {there: ours for ours, there in TOKENS_THERE.items()}[about["sae_token"]]
        about = {"layer": about["sae_layer_idx"], "token": token, "model": about["model_name"]}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        raise SaeError(f"{config}: is no config of an autoencoder: {_line(error)}") from None
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        W_enc = F.normalize(state["encoder.0.weight_v"], dim=1, eps=0.0) * state["encoder.0.weight_g"]
        W_dec = (F.normalize(state["decoder.weight_v"], dim=0, eps=0.0) * state["decoder.weight_g"]).T
        tensors = {
            "W_enc": W_enc,
            "W_dec": W_dec,
            "b_enc": state["encoder.0.bias"],
            "b_dec": W_enc.new_zeros(W_enc.shape[1]),
        }
    except (OSError, EOFError, KeyError, TypeError, IndexError, RuntimeError, pickle.UnpicklingError) as error:
        raise SaeError(f"{checkpoint}: is no checkpoint of paper B's code: {_line(error)}") from None
    settings["width"] = W_enc.shape[1]
    return Imported(_made(checkpoint, PublishedTopK, settings, {k: t.float() for k, t in tensors.items()}), about)


def _weight_normed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Length and direction of each row; a row of zeros keeps a direction, for its layer divides by the length of it."""
    length = weight.norm(dim=1, keepdim=True)
    direction = torch.where(length > 0, weight, F.one_hot(torch.tensor(0), weight.shape[1]).to(weight))
    return length, direction


# Both ways -------------------------------------------------------------------------------------------------------


def _made(file: Path, kind: type[TopK], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TopK:
    try:
        wanted, shape = (settings["n_latents"], settings["width"]), tuple(tensors["W_dec"].shape)
        if shape != wanted:  # before room is made for as many as a damaged file may say
            raise ValueError(f"W_dec has the shape {shape}")
        sae = kind(**settings)
        sae.load_state_dict(tensors)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise SaeError(f"{file}: its weights are not a {kind.__name__} of {settings}: {_line(error)}") from None
    for name, tensor in sae.state_dict().items():
        if not tensor.isfinite().all():
            raise SaeError(f"{file}: {name} is not finite")
    return sae


def _same(file: Path, name: str, held: object, wanted: object) -> None:
    if held != wanted:
        raise SaeError(f"{file}: {name} is {held!r}, wanted is {wanted!r}")


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors({name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()})


def _text(about: Mapping[str, Any]) -> bytes:
    return (json.dumps(about, indent=1) + "\n").encode()


def _write(folder: Path, parts: Mapping[str, bytes]) -> Path:
    try:
        files.write({folder / name: data for name, data in parts.items()})
    except OSError as error:
        raise SaeError(f"{error.filename or folder}: cannot be written: {error.strerror}") from error
    return folder


def _json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SaeError(f"{file}: cannot be read: {_line(error)}") from None
    if not isinstance(read, dict):
        raise SaeError(f"{file}: is no description of an autoencoder")
    return read


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise SaeError(f"{file}: cannot be read: {_line(error)}") from None


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise SaeError(f"{file}: cannot be read: {error.strerror}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
