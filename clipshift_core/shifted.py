"""The nine shifts of a run's images taken apart into the latents of its dictionary: what notebook 10 starts from.

The activations are the class tokens that the one pass kept after the last block; no image is encoded again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clipshift_core import augment, repair, shift_attribution
from clipshift_core.dictionaries import Asked, Dictionaries
from clipshift_core.sae_kernels import Codes
from clipshift_core.shift_attribution import Shift
from clipshift_core.splice import Splice

CHUNK = 256
"""Images that are taken apart at a time."""


class Views(NamedTuple):
    """Some images and one view of each."""

    numbers: Int[np.ndarray, " image"]
    """Of the images, within the run."""
    x: tuple[Float[Tensor, "image width"], Float[Tensor, "image width"]]
    """Activations of the image, and of its view."""
    codes: tuple[Codes, Codes]
    target: Callable[[Float[Tensor, "image dim"]], Float[Tensor, " image"]]
    """From embeddings of length 1 to the cosine with what is asked of each image."""


@dataclass(frozen=True)
class Shifted:
    """The shifts of a run; made by `shifted`."""

    spliced: Splice
    tokens: Float[np.ndarray, "image view width"]
    """Class tokens after the last block."""
    asked: Asked
    seed: int
    parts: dict[str, list[Shift]] = field(default_factory=dict)

    @property
    def n_images(self) -> int:
        return len(self.tokens)

    @cached_property
    def shifts(self) -> dict[str, Shift]:
        """The change in every image's cosine to its text, by augmentation."""
        for augmentation in augment.VIEWS[1:]:
            self.parts[augmentation] = [
                shift_attribution.decompose(*some.x, *some.codes, self.spliced.W_dec, self.embed, some.target)
                for some in self.views(augmentation)
            ]
        return {augmentation: shift_attribution.joined(parts) for augmentation, parts in self.parts.items()}

    def repaired(self) -> repair.Repair:
        """What restored latents bring back, augmentation after augmentation, in each all images."""
        settings, found = {"directions": self.asked.texts, "seed": self.seed}, []
        for number, augmentation in enumerate(self.shifts):
            for some, part in zip(self.views(augmentation), self.parts[augmentation], strict=True):
                found.append(
                    repair.repair(
                        part, some.x[1], *some.codes, self.spliced.W_dec, self.embed, some.target,
                        original=self.embed(some.x[0]), images=some.numbers + number * self.n_images, **settings,
                    )
                )  # fmt: skip
        return repair.joined(found)

    @property
    def of(self) -> Int[np.ndarray, " view"]:
        """The image that each row of `repaired` is a view of."""
        return np.tile(np.arange(self.n_images), len(self.shifts))

    def embed(self, x: Float[Tensor, "image width"]) -> Float[Tensor, "image dim"]:
        """From the last block's class token to the embedding, of length 1."""
        return F.normalize(self.spliced.tail(x[:, None]), dim=1)

    def views(self, augmentation: str) -> Iterator[Views]:
        """All images with one of their views, some at a time."""
        at = augment.VIEWS.index(augmentation)
        for start in range(0, self.n_images, CHUNK):
            numbers = np.arange(start, min(start + CHUNK, self.n_images))
            x = tuple(torch.from_numpy(self.tokens[numbers, view]) for view in (0, at))
            texts = self.asked.texts[self.asked.index[numbers]]
            with torch.no_grad():
                codes = tuple(self.spliced.sae.encode(each) for each in x)
            yield Views(numbers, x, codes, lambda embedding, texts=texts: (embedding * texts).sum(1))


def shifted(dictionaries: Dictionaries) -> Shifted:
    """The shifts of the images whose class tokens the run has kept, by the dictionary in use.

    Raises SpliceError for a dictionary that is not one of class tokens after the last block.
    """
    bench, spliced = dictionaries.bench, dictionaries.spliced(dictionaries.used)
    kept = bench.tokens["token"].isel(block=-1)
    images = bench.manifest.images.iloc[: len(kept)]
    embeddings = bench.dataset["embedding"].sel(image=kept["image"].values, view="original")
    asked = dictionaries.asked(images, F.normalize(torch.from_numpy(embeddings.values), dim=1))
    return Shifted(spliced, kept.values, asked, bench.profile.seed)


def turnover(shifts: dict[str, Shift], *, n_resamples: int, seed: int) -> pd.DataFrame:
    """How much of an image's latents goes, and how much comes: columns augmentation, quantity, mean, low, high, n.

    Quantities: lost and gained, activation that latents lose and gain; destroyed (on, then off) and invented (off, then
    on), numbers of latents, which are equal for a dictionary that always has k on; before, the latents on in the image.
    """
    counts = {}
    for augmentation, shift in shifts.items():
        was, is_on, more = shift.before > 0, shift.after > 0, shift.after - shift.before
        found = {"destroyed": was & ~is_on, "invented": is_on & ~was, "before": was}
        found |= {"lost": -more.clamp_max(0), "gained": more.clamp_min(0)}
        counts[augmentation] = {name: each.sum(1).double() for name, each in found.items()}
    return shift_attribution.quantity_table(counts, n_resamples, seed)


def by_kind(shifts: dict[str, Shift], kinds: pd.Series, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Of the activation that an image's latents have, the share that goes, and that comes, by kind of the latents.

    kinds: what each latent's label is, by latent (`vocabulary`'s kinds). Columns augmentation, quantity, kind, mean,
    low, high, n; quantity is lost or gained, and the parts of all kinds sum to the whole share.
    """
    tables = []
    for kind, latents in kinds.fillna("no label").groupby(kinds.fillna("no label")).groups.items():
        some, counts = torch.tensor(np.asarray(latents)), {}
        for augmentation, shift in shifts.items():
            here = torch.isin(shift.latent, some)
            more, whole = (shift.after - shift.before) * here, shift.before.sum(1)
            parts = {"lost": -more.clamp_max(0).sum(1), "gained": more.clamp_min(0).sum(1)}
            counts[augmentation] = {name: (each / whole).double() for name, each in parts.items()}
        table = shift_attribution.quantity_table(counts, n_resamples, seed)
        table.insert(2, "kind", kind)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
