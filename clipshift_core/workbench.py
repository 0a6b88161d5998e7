"""What every notebook starts from: a profile opened, its images listed, its model loaded, its one pass measured.

bench = Workbench.open("02", profile, overrides)
bench.shifts          # the tidy table of the one pass; computed on the first run, read on the next
bench.show(figure, "l2-by-augmentation", alt="...")
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import UInt8

from clipshift_core import augment, canvas, files, images, manifests, provenance, shift, store, vocabulary
from clipshift_core.encoder import Encoder
from clipshift_core.manifests import Manifest
from clipshift_core.profiles import ROOT, Profile, named


@dataclass(frozen=True)
class Workbench:
    """One notebook's view of one run. Everything heavy is made when first asked for, and kept on disk if it can be."""

    notebook: str
    """The notebook's number; its figures and tables are named after it."""
    profile: Profile

    @classmethod
    def open(cls, notebook: str, profile: str | Path, overrides: Mapping[str, object] | None = None) -> "Workbench":
        """Read and check the profile, and have the browser started that draws figures. Raises ProfileError."""
        chosen = Profile.load(profile, dict(overrides or {}))
        chosen.check()
        canvas.warm_up()  # the first figure waits for it
        return cls(notebook, chosen)

    def changed(self, choices: Mapping[str, object]) -> "Workbench":
        """The same run with other choices, such as another model. Raises ProfileError."""
        chosen = replace(self.profile, **choices)
        chosen.check()
        return Workbench(self.notebook, chosen)

    @cached_property
    def manifest(self) -> Manifest:
        """The images of the run; listed and checked once for a source, then read."""
        profile = self.profile
        captions = ROOT / profile.captions if profile.captions else None
        read = [provenance.digest(path)["sha256"] for path in (profile.source_path, captions) if path]
        key = hashlib.sha256(json.dumps([*read, profile.n_images, profile.seed]).encode()).hexdigest()
        folder = profile.run_dir / "arrays" / f"manifest-{key[:12]}"
        if (folder / "manifest.parquet").exists() and (folder / "set_aside.parquet").exists():
            return Manifest.load(folder)
        made = manifests.build(profile.source_path, n_images=profile.n_images, seed=profile.seed, captions=captions)
        made.save(folder)
        return made

    @cached_property
    def encoder(self) -> Encoder:
        """The model of the run."""
        return self.load(self.profile.model)

    def load(self, name: str, **choices: str) -> Encoder:
        """A model by the string that names it in a profile; the digest of its weights is noted for the run's record.

        choices: device and precision, where not the profile's.
        """
        settings = {"device": self.profile.device, "precision": self.profile.precision}
        encoder = Encoder.load(*named(name), **(settings | choices))
        provenance.note_weights(self.profile, name, encoder.weights_hash)
        return encoder

    def directions(self, words: vocabulary.Vocabulary, encoder: Encoder) -> vocabulary.Directions:
        """`vocabulary.directions`, encoded once a run: a thousand words take minutes on a CPU."""
        made_from = {
            "weights": encoder.weights_hash,
            "phrases": list(words.words["phrase"]),
            "templates": list(words.templates),
        }
        held = store.open_store(
            self.profile.run_dir / "arrays",
            "texts",
            made_from,
            arrays={"direction": store.Array(("text", "feature"))},
            sizes={"text": len(words.words) + 1, "feature": encoder.dim},  # the last is the empty text
            chunk=len(words.words) + 1,
        )
        if held.missing():
            found = vocabulary.directions(words, encoder)
            held.write(0, {"direction": torch.cat([found.texts, found.empty[None]]).numpy()})
        texts = torch.from_numpy(held.dataset()["direction"].values)
        return vocabulary.Directions(texts[:-1], texts[-1])

    @cached_property
    def classes(self) -> vocabulary.Vocabulary | None:
        """The class names of the profile that the model can read; None where it names none."""
        if self.profile.classes is None:
            return None
        words, _ = vocabulary.readable(vocabulary.read(ROOT / self.profile.classes), self.encoder)
        if len(words.words) < 2:
            raise vocabulary.VocabularyError(
                f"{self.profile.classes}: {self.encoder.name} can read {len(words.words)} of its names; 2 are needed"
            )
        return words

    @cached_property
    def labels(self) -> pd.DataFrame | None:
        """The class of each image by zero-shot, None without classes: image_id, label, probability.

        The probability is the softmax of the cosines times the model's own scale.
        """
        if self.classes is None:
            return None
        texts = self.directions(self.classes, self.encoder).texts
        originals = F.normalize(torch.from_numpy(self.dataset["embedding"].sel(view="original").values), dim=1)
        probability, word = (self.encoder.logit_scale * originals @ texts.T).softmax(1).max(1)
        names = self.classes.words["word"].to_numpy()[word.numpy()]
        ids = self.dataset["image"].values
        return pd.DataFrame({"image_id": ids, "label": names, "probability": probability.numpy()})

    @cached_property
    def titles(self) -> pd.Series:
        """What each image is called, by image_id: its caption; without one its zero-shot label, or else its name."""
        table = self.manifest.images.set_index("image_id", drop=False)
        labels = self.labels
        otherwise = table["image_id"] if labels is None else labels.set_index("image_id")["label"] + " (zero-shot)"
        return table["caption"].fillna(otherwise)

    @cached_property
    def dataset(self) -> xr.Dataset:
        """The one pass: embeddings, metrics and attention of every view (the variables are `shift.measure`'s)."""
        return shift.measure(self.profile, self.manifest, self.encoder)

    @cached_property
    def tokens(self) -> xr.Dataset:
        """The class token of the first images after every block: token (image, view, block, width)."""
        _ = self.dataset  # the same pass writes both
        return shift.open_tokens(self.profile, self.manifest, self.encoder).dataset()

    @cached_property
    def shifts(self) -> pd.DataFrame:
        """One row per image and augmentation: image_id, augmentation, and the ten metrics of the pass."""
        return shift.table(self.dataset)

    @property
    def resampling(self) -> dict[str, int]:
        """The arguments of every bootstrap of the run."""
        return {"n_resamples": self.profile.n_bootstrap, "seed": self.profile.seed}

    def picture(self, image_id: str) -> UInt8[np.ndarray, "size size 3"]:
        """An image of the manifest as the pass sees it: decoded, upright, resized."""
        row = self.manifest.images.set_index("image_id", drop=False).loc[image_id]
        return images.resize(images.decode(manifests.read(row, self.profile.source_path)), self.profile.image_size)

    def views(self, image_id: str) -> UInt8[np.ndarray, "view size size 3"]:
        """The ten views of an image as the pass drew them, the original first."""
        return augment.views(self.picture(image_id), seed=self.profile.seed, image_id=image_id)

    def keep(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write a table to runs/<profile>/tables/NN-name.csv and return it, so that the cell shows it."""
        text = table.to_csv(index=False, float_format="%.9g")
        files.write({self.profile.run_dir / "tables" / f"{self.notebook}-{name}.csv": text.encode()})
        return table

    def show(self, figure: go.Figure, name: str, *, alt: str) -> go.Figure:
        """Export a figure to runs/<profile>/figures/NN-name.* and return it, so that the cell shows it."""
        canvas.use_renderer()
        made_by = {
            "commit": provenance.commit(),
            "notebook": self.notebook,
            "profile": self.profile.name,
            "digest": self.profile.digest,
        }
        canvas.export(figure, f"{self.notebook}-{name}", self.profile.run_dir / "figures", alt=alt, provenance=made_by)
        return figure
