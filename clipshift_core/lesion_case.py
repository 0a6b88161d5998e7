"""The lesion study of a run: drawn lesions, or a user's folder, through one model. Notebook 12's second half."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from clipshift_core import isic, lesion_latents, lesion_study
from clipshift_core.activations import Source
from clipshift_core.attribution import Target
from clipshift_core.dictionaries import LEAST, Dictionaries, learn, read
from clipshift_core.lesion_latents import Latents
from clipshift_core.lesion_study import LEARNED_FROM, Images, Pairs, Study
from clipshift_core.profiles import ROOT
from clipshift_core.splice import Splice, tail


@dataclass(frozen=True)
class Case:
    """Everything is made when first asked for; activations are kept on disk."""

    dictionaries: Dictionaries

    @property
    def folder(self) -> str | None:
        """The profile's folder of lesions."""
        return self.dictionaries.bench.profile.lesions

    @property
    def left_out(self) -> str:
        """Why there is no study; empty where there is."""
        if self.folder or self.dictionaries.drawn:
            return ""
        return "this run looks at a user's images, and the profile names no folder of lesions (key `lesions`)"

    @cached_property
    def found(self) -> isic.Isic | None:
        """What the folder holds; None for drawn lesions."""
        return isic.read(ROOT / self.folder) if self.folder else None

    @cached_property
    def images(self) -> Images:
        """The lesions, embedded, with labels, splits and artefacts."""
        size = self.dictionaries.bench.encoder.image_size
        if self.found is None:
            return lesion_study.world(self._encoded, size)
        return isic.images(self.found, self._encoded, size, seed=self.dictionaries.bench.profile.seed)

    @cached_property
    def readers(self) -> dict[str, Target]:
        """A probe that is trained on biased lesions, and zero-shot text."""
        return {
            "probe": lesion_study.probe_reader(self.images),
            "text": lesion_study.text_reader(self.dictionaries.bench.encoder),
        }

    @cached_property
    def study(self) -> Study:
        """What the readers call malignant, and how that hangs on the artefacts."""
        return lesion_study.study(self.images, self.readers, **self.dictionaries.bench.resampling)

    @cached_property
    def pairs(self) -> tuple[Pairs, Float[Tensor, "drawing dim"], Float[Tensor, "drawing width"] | None]:
        """Drawn lesions with and without each planted artefact, their embeddings and class tokens."""
        made = lesion_study.pairs()
        source = Source.of_drawings(made.drawings, self.dictionaries.bench.encoder.image_size)
        return made, *self._encoded(source)

    def effects(self) -> pd.DataFrame:
        """What adding an artefact alone does to each reader."""
        made, embeddings, _ = self.pairs
        margins = {name: target(embeddings).double().numpy() for name, target in self.readers.items()}
        return lesion_study.effects(made.table, margins, **self.dictionaries.bench.resampling)

    def turned(self) -> pd.DataFrame:
        """The latents that adding an artefact alone turns up most."""
        made, _, tokens = self.pairs
        return lesion_latents.turned(self.spliced, tokens, made.table, **self.dictionaries.bench.resampling)

    @property
    def no_dictionary(self) -> str:
        """Why nothing is taken apart; empty where it is."""
        if self.images.tokens is None or not tail(self.dictionaries.behind, -1).needs_class_alone:
            return f"{self.dictionaries.bench.encoder.name} reads more than a class token after its last block"
        n = int(self.images.table["split"].isin(LEARNED_FROM).sum())
        if self.dictionaries.bench.profile.sae_lesions is None and n < LEAST:
            return f"{n} lesions are too few to learn a dictionary from (at least {LEAST})"
        return ""

    @cached_property
    def spliced(self) -> Splice:
        """The dictionary that the profile names, or one learned from the images that the probe is made from."""
        bench = self.dictionaries.bench
        profile, encoder, layer = bench.profile, bench.encoder, bench.encoder.n_blocks - 1
        if profile.sae_lesions:
            return self.dictionaries.spliced(read(ROOT / profile.sae_lesions, encoder, layer, "class"))
        if self.found is None:
            _, drawn = lesion_study.drawn({split: lesion_study.SIZES[split] for split in LEARNED_FROM})
            source = Source.of_drawings(drawn, encoder.image_size)
        else:
            source = self._of(np.flatnonzero(self.images.table["split"].isin(LEARNED_FROM)))
        held, folder = self.dictionaries.activations(source, layer, "class"), self.dictionaries.arrays / "sae-lesions"
        learned = learn(
            held, n_latents=profile.sae_latents, k=profile.sae_k, n_epochs=profile.sae_epochs, seed=profile.seed,
            folder=folder, checkpoint=folder.with_suffix(".safetensors"),
        )  # fmt: skip
        return self.dictionaries.spliced(learned)

    @property
    def split(self) -> str:
        """The test split that latents are chosen on: where artefacts say nothing, if that is known."""
        return "balanced" if self.found is None else lesion_study.tests(self.images.table)[0]

    @cached_property
    def latents(self) -> Latents:
        """What the latents stand for, and how much of each reader hangs on them."""
        factors = lesion_study.FACTORS if self.found is None else ("malignant",)
        return lesion_latents.latents(
            self.images, self.readers, self.spliced, factors=factors, split=self.split,
            **self.dictionaries.bench.resampling,
        )  # fmt: skip

    def suppressed(self) -> pd.DataFrame:
        """What the readers call without the latents of the artefacts."""
        return lesion_latents.suppressed(
            self.images, self.readers, self.spliced, self.latents, **self.dictionaries.bench.resampling
        )

    def _of(self, rows: NDArray) -> Source:
        manifest = self.found.manifest
        some = manifest.images.iloc[rows].reset_index(drop=True)
        encoder = self.dictionaries.bench.encoder
        return Source.of_manifest(replace(manifest, images=some), self.found.folder, encoder.image_size)

    def _encoded(self, source: Source) -> tuple[Float[Tensor, "image dim"], Float[Tensor, "image width"] | None]:
        """As `lesion_study.encoded`, from disk where class tokens are all that the embedding is made of."""
        encoder = self.dictionaries.bench.encoder
        if not encoder.n_blocks or not (behind := tail(self.dictionaries.behind, -1)).needs_class_alone:
            return lesion_study.encoded(source, encoder)
        held = self.dictionaries.activations(source, encoder.n_blocks - 1, "class")
        tokens = torch.cat(list(held.in_order()))
        with torch.no_grad():
            return behind(tokens[:, None]), tokens
