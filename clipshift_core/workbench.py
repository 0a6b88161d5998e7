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
import xarray as xr
from jaxtyping import UInt8

from clipshift_core import augment, canvas, images, manifests, provenance, shift
from clipshift_core.encoder import Encoder
from clipshift_core.manifests import Manifest
from clipshift_core.profiles import Profile


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
        source = provenance.digest(self.profile.source_path)["sha256"]
        key = hashlib.sha256(json.dumps([source, self.profile.n_images, self.profile.seed]).encode()).hexdigest()
        folder = self.profile.run_dir / "arrays" / f"manifest-{key[:12]}"
        if (folder / "manifest.parquet").exists() and (folder / "set_aside.parquet").exists():
            return Manifest.load(folder)
        made = manifests.build(self.profile.source_path, n_images=self.profile.n_images, seed=self.profile.seed)
        made.save(folder)
        return made

    @cached_property
    def encoder(self) -> Encoder:
        """The model of the run."""
        model = str(self.profile.model_dir or self.profile.model)
        return Encoder.load(
            model, self.profile.pretrained, device=self.profile.device, precision=self.profile.precision
        )

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
        folder = self.profile.run_dir / "tables"
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{self.notebook}-{name}.csv", index=False, float_format="%.9g")
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
