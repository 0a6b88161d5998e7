"""The dictionary of a run: what it is learned from and looked at with, the one that ships, the one trained here."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from clipshift_core import (
    activations,
    attention,
    concepts,
    exam,
    sae_formats,
    sae_quality,
    sae_train,
    scenes,
    store,
    vocabulary,
)
from clipshift_core.activations import Activations, Origin, Source
from clipshift_core.encoder import Encoder
from clipshift_core.profiles import ROOT, ProfileError
from clipshift_core.progress import note
from clipshift_core.sae import SaeError, TopK
from clipshift_core.sae_kernels import Codes
from clipshift_core.splice import Splice, State
from clipshift_core.vocabulary import Vocabulary

if TYPE_CHECKING:
    from clipshift_core.workbench import Workbench

FIRST_TO_LEARN = 1_000_000
"""Seed of the first scene that a dictionary is learned from: behind all that the embedded models were trained on."""
FIRST_TO_LOOK_AT = scenes.HELD_OUT + 200_000
"""Seed of the first scene that a dictionary is looked at with: nothing is ever trained from here on."""
LEAST = 100
"""Images of a run below which no dictionary is learned from them."""
HELD_BACK = 0.1
"""Share of a run's own images that are kept for looking, where scenes cannot be drawn anew."""
BATCHES, SMALLEST_BATCH, LARGEST_BATCH = 100, 32, 4096
"""An epoch has this many batches, as far as their size stays within the bounds."""


class Learned(NamedTuple):
    """A dictionary and how it came about."""

    sae: TopK
    statistics: sae_train.Statistics
    history: pd.DataFrame
    """As of `sae_train.train`."""
    recipe: dict
    origin: Origin
    """Which activations it writes."""


class Probe(NamedTuple):
    """The images that a dictionary is looked at with: none that it was learned from."""

    source: Source
    images: pd.DataFrame
    """A row an image: image_id, and for drawn scenes their factors."""


class Asked(NamedTuple):
    """One text for each image, among several."""

    words: list[str]
    texts: Float[Tensor, "word dim"]
    """Directions of length 1."""
    index: Int[Tensor, " image"]
    """Of each image's word."""


def learn(
    held: Activations,
    *,
    n_latents: int,
    k: int,
    n_epochs: int,
    seed: int,
    folder: Path,
    checkpoint: Path,
    device: torch.device | str = "cpu",
) -> Learned:
    """Train a `TopK` on stored activations and save it to `folder` with its history; read it there if it is complete.

    device: where it is trained; it comes back on the CPU. A checkpoint lets a killed training go on. Raises SaeError
    for a folder that holds another dictionary.
    """
    seen = sae_train.statistics(held.in_order())
    batch_size = min(max(held.n_rows // BATCHES, SMALLEST_BATCH), LARGEST_BATCH, held.n_rows)
    recipe = sae_train.Recipe(n_steps=n_epochs * (held.n_rows // batch_size))
    made = asdict(recipe) | {"n_epochs": n_epochs, "batch_size": batch_size, "seed": seed}
    if not (folder / "sae.json").exists():
        sae = TopK(held.width, n_latents, k, seed=seed).to(device)
        data = json.dumps([held.origin.data, batch_size, seed])
        history = sae_train.train(
            sae,
            lambda first: held.batches(first, batch_size=batch_size, seed=seed),
            seen,
            recipe,
            checkpoint=checkpoint,
            data=data,
        )
        folder.mkdir(parents=True, exist_ok=True)
        history.to_csv(folder / "history.csv", index=False, float_format="%.6g")
        sae_formats.save(folder, sae, held.origin, seen, made)  # last: its sae.json says that all is there
        checkpoint.unlink(missing_ok=True)
    origin = held.origin
    loaded = sae_formats.load(
        folder, model=origin.model, weights_hash=origin.weights_hash, layer=origin.layer, token=origin.token,
        data=origin.data, statistics=seen,
    )  # fmt: skip
    wanted, there = {"n_latents": n_latents, "k": k} | made, loaded.sae.settings | loaded.recipe
    for name, value in wanted.items():
        if there.get(name) != value:
            raise SaeError(f"{folder}: holds a dictionary of {name} {there.get(name)!r}, wanted is {value!r}; move it")
    return Learned(loaded.sae, loaded.statistics, pd.read_csv(folder / "history.csv"), loaded.recipe, loaded.origin)


@dataclass(frozen=True)
class Dictionaries:
    """The dictionaries of one run; everything is made when first asked for, and kept on disk."""

    bench: "Workbench"

    @property
    def drawn(self) -> bool:
        """Whether the run's images are drawn scenes, of which there are as many as one likes."""
        return {"kind", "cues"} <= set(self.bench.manifest.images.columns)

    @property
    def layer(self) -> int:
        """Block after which the residual stream is read, from 0."""
        layer, n_blocks = self.bench.profile.sae_layer, self.bench.encoder.n_blocks
        if n_blocks and not -n_blocks <= layer < n_blocks:
            raise ProfileError(f"sae_layer = {layer}: {self.bench.encoder.name} has blocks 0 to {n_blocks - 1}")
        return layer % max(1, n_blocks)

    @property
    def left_out(self) -> str:
        """Why nothing can be learned from the run's images; empty where something can."""
        n, encoder, profile = len(self.bench.manifest.images), self.bench.encoder, self.bench.profile
        if not encoder.n_blocks:
            return f"the blocks of {encoder.name} cannot be read"
        if profile.sae_token == "class" and not attention.has_class_token(encoder.model.visual):
            return f"{encoder.name} has no class token (the key `sae_token` takes spatial, too)"
        return (
            "" if self.drawn or n >= LEAST else f"too few images to learn a dictionary from ({n}, of at least {LEAST})"
        )

    @property
    def not_shifted(self) -> str:
        """Why shifts cannot be taken apart by the dictionary in use; empty where they can."""
        if self.bench.profile.sae is None and self.left_out:
            return self.left_out
        n_blocks, token = self.bench.encoder.n_blocks, self.bench.profile.sae_token
        is_last = (self.layer, token) == (n_blocks - 1, "class")
        return (
            ""
            if is_last
            else f"the run keeps class tokens alone, and its dictionary reads {token} tokens after block {self.layer}"
        )

    @cached_property
    def learned_from(self) -> Source:
        """What the run's own dictionary is learned from: scenes drawn for it, or nine in ten of the run's images."""
        if self.drawn:
            seeds = range(FIRST_TO_LEARN, FIRST_TO_LEARN + self.bench.profile.sae_scenes)
            return Source.of_scenes(seeds, self.bench.encoder.image_size)
        return self._own(~self._held_back, self.bench.encoder.image_size)

    @cached_property
    def probe(self) -> Probe:
        """Other scenes; the tenth of the run's images that is kept back; all of them for a dictionary that is given."""
        return self.probe_at(self.bench.encoder.image_size)

    @cached_property
    def labeller(self) -> Encoder:
        """The model that labels: the profile's, or the one that is looked into."""
        name = self.bench.profile.labeller
        return self.bench.encoder if name is None else self.bench.load(name)

    @cached_property
    def vocabulary(self) -> tuple[Vocabulary, pd.DataFrame]:
        """The words that the labeller can read, and those it cannot (word, phrase, reason)."""
        name = self.bench.profile.vocabulary
        made = {"world": vocabulary.of_world, "imagenet": vocabulary.imagenet}.get(name)
        return vocabulary.readable(made() if made else vocabulary.read(ROOT / name), self.labeller)

    @cached_property
    def examples(self) -> concepts.Examples:
        """The probe's images that activate each latent of the dictionary in use most."""
        return concepts.examples(codes_of(self.used.sae, self.unseen), self.used.sae.n_latents)

    @cached_property
    def components(self) -> pd.DataFrame:
        """A row a latent of the dictionary in use: the columns of `concepts.describe` and of `vocabulary.labels`."""
        return self.described(self.examples)

    def described(self, found: concepts.Examples) -> pd.DataFrame:
        """Scores and labels of latents by their examples in the probe."""
        words, labeller = self.vocabulary[0], self.labeller
        mean = concepts.mean_embedding(self.label_embeddings, found.image[:, : concepts.SHOWN])
        labels = vocabulary.labels(mean, self.bench.directions(words, labeller), words)
        return concepts.describe(found, self.label_embeddings).merge(labels, on="latent")

    @cached_property
    def words(self) -> Vocabulary:
        """What images of unknown content are asked for: the profile's classes, or else the vocabulary."""
        if self.bench.classes is not None:
            return vocabulary.readable(self.bench.classes, self.labeller)[0]
        return vocabulary.readable(self.vocabulary[0], self.bench.encoder)[0]

    def asked(self, images: pd.DataFrame, embeddings: Float[Tensor, "image dim"]) -> Asked:
        """What is asked of each image: its own word where that is known, else the word that the model gives it."""
        if self.drawn:
            words, phrases, templates = exam.TASKS["word"]
            truth = torch.tensor(pd.Categorical(images["word"], categories=words).codes).long()
            return Asked(list(words), self.bench.encoder.classifier(phrases, templates), truth)
        texts = self.bench.directions(self.words, self.bench.encoder).texts
        return Asked(list(self.words.words["word"]), texts, (embeddings @ texts.T).argmax(1))

    def tasks(self) -> dict[str, sae_quality.Task]:
        """The world's zero-shot tasks for drawn scenes; the words of the vocabulary, of unknown truth, for others."""
        encoder, table, found = self.bench.encoder, self.probe.images, {}
        if not self.drawn:
            return {"label": sae_quality.Task(self.bench.directions(self.words, encoder).texts, None)}
        for task, (values, phrases, templates) in exam.TASKS.items():
            truth = torch.tensor(pd.Categorical(table[task], categories=values).codes).long()
            found[task] = sae_quality.Task(encoder.classifier(phrases, templates), truth)
        return found

    @cached_property
    def seen(self) -> Activations:
        """The activations that the run's own dictionary is learned from."""
        return self.activations(self.learned_from)

    @cached_property
    def unseen(self) -> Activations:
        """Those of the probe."""
        return self.activations(self.probe.source)

    @cached_property
    def own(self) -> Learned:
        """The dictionary that the run trains itself."""
        profile = self.bench.profile
        key = [self.seen.origin.data, profile.sae_latents, profile.sae_k, profile.sae_epochs, profile.seed]
        folder = self.arrays / f"sae-{store.digest(key)[:12]}"
        return learn(
            self.seen, n_latents=profile.sae_latents, k=profile.sae_k, n_epochs=profile.sae_epochs, seed=profile.seed,
            folder=folder, checkpoint=folder.with_suffix(".safetensors"), device=self.bench.encoder.device,
        )  # fmt: skip

    @cached_property
    def given(self) -> Learned | None:
        """The dictionary that the profile names; None where it names none. Raises SaeError for one of another model."""
        profile, encoder = self.bench.profile, self.bench.encoder
        if profile.sae is None:
            return None
        return read(ROOT / profile.sae, encoder, self.layer, profile.sae_token)

    @cached_property
    def patches(self) -> Learned | None:
        """The dictionary of the patches' tokens that the profile names; None where it names none."""
        folder = self.bench.profile.sae_patches
        return None if folder is None else read(ROOT / folder, self.bench.encoder, token="spatial")

    @property
    def used(self) -> Learned:
        """The one that the series goes on with: the given one, or else the run's own."""
        return self.given or self.own

    @cached_property
    def label_embeddings(self) -> Float[Tensor, "image dim"]:
        """What the labeller makes of the probe's images."""
        encoder = self.bench.encoder
        if self.labeller is encoder and (self.layer, self.bench.profile.sae_token) == (encoder.n_blocks - 1, "class"):
            return self.embeddings(self.used)[0]
        return self.labelled(lambda size: self.probe_at(size).source)

    def labelled(self, source_at: Callable[[int], Source]) -> Float[Tensor, "image dim"]:
        """What the labeller makes of images, given at the size that it reads."""
        source = source_at(self.labeller.image_size)
        held = store.open_store(
            self.arrays, "embeddings", {"code": activations.CODE_VERSION, "images": source.made_from,
                                        "weights": self.labeller.weights_hash, "precision": self.labeller.precision},
            arrays={"embedding": store.Array(("image", "feature"))},
            sizes={"image": list(source.ids), "feature": self.labeller.dim}, chunk=256,
        )  # fmt: skip
        for index in held.missing():
            span = held.span(index)
            pixels = np.stack([source.read(i) for i in range(span.start, span.stop)])
            held.write(index, {"embedding": self.labeller.encode(pixels).embedding.numpy()})
            note(f"labeller: image {span.stop} of {len(source.ids)}")
        return torch.from_numpy(held.dataset()["embedding"].values)

    def embeddings(self, learned: Learned) -> tuple[Float[Tensor, "image dim"], Float[Tensor, "image dim"]]:
        """The probe's embeddings by its activations, and by their reconstructions."""
        spliced = self.spliced(learned)
        before, after = [], []
        with torch.no_grad():
            for state in self.states(spliced, self.probe.source):
                before.append(spliced.embed(state).cpu())
                after.append(spliced.embed(state._replace(error=torch.zeros_like(state.error))).cpu())
        return torch.cat(before), torch.cat(after)

    def spliced(self, learned: Learned) -> Splice:
        """A dictionary in the forward pass of the run's model, at its own place."""
        return Splice(self.behind, learned.sae, learned.origin.layer, learned.origin.token)

    @cached_property
    def behind(self) -> Encoder:
        """The model where dictionaries are spliced into it: on the CPU, since little of it follows a late block."""
        encoder = self.bench.encoder
        if encoder.device.type == "cpu":
            return encoder
        return self.bench.load(self.bench.profile.model, device="cpu", precision="fp32")

    def states(self, spliced: Splice, source: Source, batch_size: int = 64) -> Iterator[State]:
        """A source's images at the splice, batch by batch; from stored activations where those are all that is read."""
        if spliced.tail.needs_class_alone:
            for rows in self.activations(source, spliced.layer, spliced.token).in_order():
                yield spliced.from_activations(rows)
            return
        point = f"residual.{spliced.layer}"
        for start in range(0, len(source.ids), batch_size):
            numbers = range(start, min(start + batch_size, len(source.ids)))
            found = self.bench.encoder.encode(np.stack([source.read(i) for i in numbers]), capture=[point])
            yield spliced.state_of(found.captured[point])

    def activations(self, source: Source, layer: int | None = None, token: str | None = None) -> Activations:
        """Of any images, at the place that the profile names or at another one."""
        layer, token = self.layer if layer is None else layer, token or self.bench.profile.sae_token
        return activations.stored(source, self.bench.encoder, layer, token, self.arrays)

    @property
    def arrays(self) -> Path:
        """Where the run keeps what takes long to make."""
        return self.bench.profile.run_dir / "arrays"

    @cached_property
    def _held_back(self) -> NDArray[np.bool_]:
        n = len(self.bench.manifest.images)
        order = np.random.default_rng([self.bench.profile.seed, *b"held back"]).permutation(n)
        return order < HELD_BACK * n

    def _own(self, some: NDArray[np.bool_], size: int) -> Source:
        manifest = replace(self.bench.manifest, images=self.bench.manifest.images[some])
        return Source.of_manifest(manifest, self.bench.profile.source_path, size)

    def probe_at(self, size: int) -> Probe:
        """The probe in another size."""
        if self.drawn:
            seeds = range(FIRST_TO_LOOK_AT, FIRST_TO_LOOK_AT + self.bench.profile.n_probe)
            source = Source.of_scenes(seeds, size)
            table = scenes.table([scenes.sample(seed) for seed in seeds])
            return Probe(source, table.assign(image_id=list(source.ids)))
        looked_at = np.ones_like(self._held_back) if self.bench.profile.sae else self._held_back
        return Probe(self._own(looked_at, size), self.bench.manifest.images[looked_at])


def codes_of(sae: TopK, held: Activations) -> Iterator[Codes]:
    """The codes of stored activations, images in order: (image, slot), or (image, token, slot) of spatial tokens."""
    shape = held.held.layout["activation"].shape[1:-1]
    for rows in held.in_order(1024 * int(np.prod(shape))):
        with torch.no_grad():
            codes = sae.encode(rows)
        yield Codes(*(part.reshape(-1, *shape, part.shape[-1]) for part in codes))


def heat_maps(
    learned: Learned, held: Activations, images: Sequence[int], latent: int, grid: tuple[int, int]
) -> Float[np.ndarray, "image row col"]:
    """Where a latent of a dictionary of spatial tokens is on in some of the images of `held`."""
    rows = torch.from_numpy(held.dataset()["activation"].values[list(images)])
    with torch.no_grad():
        codes = learned.sae.encode(rows.flatten(0, 1))
    indices, values = (part.unflatten(0, rows.shape[:2]) for part in codes)
    return concepts.heat_maps(indices, values, latent, grid).numpy()


def read(folder: Path, encoder: Encoder, layer: int | None = None, token: str | None = None) -> Learned:
    """A dictionary that `learn` wrote, for use with this encoder; raises SaeError for one of another model or place."""
    loaded = sae_formats.load(folder, model=encoder.name, weights_hash=encoder.weights_hash, layer=layer, token=token)
    return Learned(loaded.sae, loaded.statistics, pd.read_csv(folder / "history.csv"), loaded.recipe, loaded.origin)
