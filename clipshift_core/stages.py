"""What a run of a profile computes and stores, a row a stage, in the order of the notebooks: what `plan` prints.

The sizes of the stores follow from their layouts, which are written with the stages themselves (`shift.open_arrays`
and others); tests compare the two.
"""

import json
import math
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from clipshift_core import activations, augment, costs, dictionaries, dose, manifests, profiles, shift, stats, store
from clipshift_core import vocabulary as words
from clipshift_core.costs import Model, Speed
from clipshift_core.profiles import Profile

IMAGE_BYTES = 300_000
"""Of an image of Conceptual Captions as it lies on the web, assumed: img2dataset's notes on CC3M tell of 850 images a
second through a line of 2 Gbit/s, which is 0.29 MB each if the line was full."""
DEAD = 0.15
"""Share of its links that are dead, assumed: of the validation set 13,443 of 15,840 came in December 2023
(pixparse/cc3m-wds). It only grows."""
NOTEBOOK_SECONDS = 450
"""Kernels, figures and statistics of the series on 512 images, assumed: what a demo run took on two cores when its
arrays were there."""
NOTEBOOK_BYTES = 55_000_000
"""Executed notebooks, figures and tables, likewise; a demo run on this machine is looked at instead."""
RANKINGS = 100
"""Rankings with bootstrap intervals that take as long as all statistics of the series that grow with the images; a
rough count."""
ROW_BYTES = 160
"""Of a row of the tables of shifts, an image and an augmentation each."""
SCENE_SECONDS = 0.004
"""To draw a scene of the embedded world at 96 pixels (`activations.Source.of_scenes`)."""
N_AUDITED = 11_000
"""Scenes and lesions drawn for notebooks 11 and 12, counted in the stores of a demo run."""
BASE_MEMORY = 1.2e9
"""Of a kernel that has imported all it needs."""


class Stage(NamedTuple):
    """A row of `Plan.computed`."""

    notebook: str
    stage: str
    model: str
    count: int
    unit: str
    seconds: float
    """NaN where the model's configuration is not on this machine."""
    how: str
    """As of `costs.Speed`, or `assumed`, `unknown`, `done`."""


class Held(NamedTuple):
    """A row of `Plan.stored`."""

    notebook: str
    stage: str
    model: str
    bytes: float
    how: str
    """`exact` (arithmetic), `about`, `for a time`, `unknown` or `done`."""


class Images(NamedTuple):
    """What is known of a source without making its manifest."""

    n: int
    drawn: bool
    """Whether they are scenes of the embedded world."""
    download: dict[str, Any]
    """A row of `Plan.downloads`."""


def layout_bytes(arrays: Mapping[str, store.Array], sizes: Mapping[str, int], chunk: int) -> int:
    """Bytes of a store's chunks, as `store` lays them out: the last one is as long as the others."""
    (along,) = {array.dims[0] for array in arrays.values()}
    chunk = min(chunk, sizes[along])
    n_chunks = math.ceil(sizes[along] / chunk)
    rows = sum(
        math.prod(sizes[dim] for dim in array.dims[1:]) * np.dtype(array.dtype).itemsize for array in arrays.values()
    )
    return n_chunks * (chunk * rows + 1)  # one byte of `done` a chunk


def pass_bytes(profile: Profile, model: Model, n_images: int) -> dict[str, int]:
    """Bytes of the two stores of one pass, by stage: the layouts of `shift.open_arrays` and `shift.open_tokens`."""
    arrays = {"embedding": store.Array(("image", "view", "feature"))}
    arrays |= {name: store.Array(("image", "augmentation")) for name in shift.METRICS}
    sizes = {"image": n_images, "view": costs.VIEWS, "augmentation": costs.VIEWS - 1, "feature": model.dim}
    if model.has_map:
        arrays["attention_map"] = store.Array(("image", "view", "row", "col"))
        sizes |= {"row": model.grid[0], "col": model.grid[1]}
    if model.n_blocks:
        arrays["block_cosine"] = store.Array(("image", "augmentation", "block"))
        arrays["head_attention"] = store.Array(("image", "augmentation", "block", "head"))
        sizes |= {"block": model.n_blocks, "head": model.n_heads}
    found = {"shift": layout_bytes(arrays, sizes, profile.batch_size)}
    if model.n_blocks:
        tokens = {"token": store.Array(("image", "view", "block", "width"))}
        kept = {"image": min(n_images, profile.n_layers), "width": model.width}
        found["tokens"] = layout_bytes(tokens, sizes | kept, min(profile.batch_size, n_images))
    return found


def dose_bytes(profile: Profile, n_images: int) -> int:
    """Bytes of the store of one sweep over severities: the layout of `dose.open_arrays`."""
    sizes = {"image": n_images, "augmentation": len(dose.SEVERITIES), "level": dose.N_LEVELS}
    return layout_bytes(dose.LAYOUT, sizes, max(1, profile.batch_size * costs.VIEWS // dose.N_VIEWS))


def activation_bytes(model: Model, n_images: int, token: str) -> int:
    """Bytes of stored activations: the layout of `activations.stored`."""
    sizes = {"image": n_images, "token": math.prod(model.grid), "width": model.width}
    dims = ("image", "token", "width") if token == "spatial" else ("image", "width")
    row = 4 * math.prod(sizes[dim] for dim in dims[1:])
    chunk = max(1, min(activations.CHUNK_IMAGES, activations.CHUNK_BYTES // row))
    return layout_bytes({"activation": store.Array(dims)}, sizes, chunk)


def look(profile: Profile) -> Images:
    """How many images a profile has, of what kind, and what of them is to be fetched."""
    fetch = getattr(profile, "fetch", None)
    counted, drawn = _counted(profile.source_path, None if fetch else profile.n_images)
    wanted = profile.n_images
    row = {"what": "images", "state": "here", "bytes": 0.0, "note": f"{counted:,} in {profile.source}"}
    if counted and (not fetch or counted >= (wanted or 1)):
        n = min(counted, wanted or counted)
        return Images(n, drawn, row | {"note": f"{n:,} in {profile.source}"})
    if fetch and fetch.endswith(".tsv"):
        n_lines = _lines(profiles.ROOT / fetch)
        n = min(wanted or n_lines, int(n_lines * (1 - DEAD))) if n_lines else wanted or 0
        tried = f"{math.ceil(n / (1 - DEAD)):,} links tried"
        note = f"{n:,} of {IMAGE_BYTES / 1e6:g} MB each, {tried} (assumed: {DEAD:.0%} dead)"
        note += "" if n_lines else f"; {fetch} is not there yet"
        return Images(n, False, row | {"state": "to fetch", "bytes": float(n * IMAGE_BYTES), "note": note})
    if fetch:
        note = f"{_lines(profiles.ROOT / fetch):,} shards of {fetch}, whose sizes are not known here"
        return Images(wanted or 0, False, row | {"state": "to fetch", "bytes": math.nan, "note": note})
    note = f"nothing in {profile.source}" + (f"; counted as {wanted:,}" if wanted else "")
    is_world = profile.vocabulary == "world"
    return Images(wanted or 0, is_world, row | {"state": "missing", "bytes": math.nan, "note": note})


@dataclass(frozen=True)
class Work:
    """All that the rows are made from."""

    profile: Profile
    images: Images
    models: dict[str, Model | None]
    speeds: dict[str, Speed | None]
    drawing: costs.Drawing
    done: set[str]
    """Numbers of the notebooks that are up to date."""

    @property
    def on_gpu(self) -> bool:
        return self.profile.device != "cpu" and torch.cuda.is_available()

    def rows(self) -> tuple[list[Stage], list[Held]]:
        """What is computed and what is stored, without what is there."""
        stages, held = [], []
        for row in self._all():
            is_done = row.notebook[:2] in self.done
            if isinstance(row, Stage):
                stages.append(row._replace(seconds=0.0, how="done") if is_done else row)
            elif row.bytes or row.how == "unknown":
                held.append(row._replace(bytes=0.0, how="done") if is_done else row)
        return stages, held

    def _all(self) -> Iterator[Stage | Held]:
        profile, n = self.profile, self.images.n
        yield Stage("01", "images listed and decoded", "", n, "images", self._drawn(n, self.drawing.read), "measured")
        own = self.models[profile.model]
        sizes = [profile.image_size]
        if own and own.image_size != profile.image_size:
            sizes.append(own.image_size)
        for size in sizes:
            yield from self._pass("02", profile.model, size)
        n_dose = min(profile.n_dose, n)
        for size in sizes:
            at = "" if size == profile.image_size else f" at {size} px"
            drawing = (self.drawing.read + self.drawing.doses) * self._area(size)
            yield self._encoded("05", f"dose sweep{at}", profile.model, n_dose, dose.N_VIEWS, drawing)
            yield Held("05", f"dose sweep{at}", profile.model, dose_bytes(profile, n_dose) if n_dose else 0, "exact")
        for name in dict.fromkeys(profile.models):
            if name != profile.model:
                yield from self._pass("06", name, profile.image_size)
        if own is None or self._learns(own):
            yield from self._dictionary(own)
        held = _folder_bytes(profiles.ROOT / "runs" / "demo") + n * (costs.VIEWS - 1) * ROW_BYTES
        yield Held("13", "notebooks, figures, tables", "", held, "about")
        ranking = RANKINGS * _ranking(n, profile.n_bootstrap)
        note = "kernels, figures, statistics of all"
        yield Stage(
            "13", note, "", 15, "notebooks", (NOTEBOOK_SECONDS + ranking) * (15 - len(self.done)) / 15, "assumed"
        )

    def _pass(self, notebook: str, name: str, size: int) -> Iterator[Stage | Held]:
        n, at = self.images.n, "" if size == self.profile.image_size else f" at {size} px"
        metrics = max((speed.metrics for speed in self.speeds.values() if speed), default=0.0)
        drawing = (self.drawing.read + self.drawing.views) * self._area(size)
        yield self._encoded(notebook, f"the one pass{at}", name, n, costs.VIEWS, drawing, metrics * self._area(size))
        model = self.models[name]
        if model is None:
            yield Held(notebook, f"arrays of the pass{at}", name, math.nan, "unknown")
        elif n:
            parts = pass_bytes(self.profile, model, n)
            yield Held(notebook, f"arrays of the pass{at}", name, parts["shift"], "exact")
            if name == self.profile.model:  # of the others one image's are kept
                yield Held(notebook, f"class tokens{at}", name, parts.get("tokens", 0), "exact")

    def _dictionary(self, model: Model | None) -> Iterator[Stage | Held]:
        profile, drawn = self.profile, self.images.drawn
        n_learn, n_probe = self._n_learn, self._n_probe
        labeller = profile.labeller or profile.model
        each = SCENE_SECONDS * self._area(model.image_size if model else 224) if drawn else self.drawing.read
        yield self._encoded("07", "activations to learn from", profile.model, n_learn, 1, each)
        yield self._encoded("07", "activations to look at", profile.model, n_probe, 1, each)
        if model is None:
            yield Held("07", "activations and dictionary", profile.model, math.nan, "unknown")
        else:
            n_rows, batch, n_steps = self._training(model)
            spent = costs.step(model.width, profile.sae_latents, profile.sae_k, batch)
            what = f"dictionary: {profile.sae_latents:,} latents, batches of {batch}"
            yield Stage("07", what, profile.model, n_steps, "steps", n_steps * spent, "measured")
            held = sum(activation_bytes(model, n, profile.sae_token) for n in (n_learn, n_probe))
            yield Held("07", "activations", profile.model, held, "exact")
            yield Held("07", "dictionary", profile.model, _sae_bytes(profile, model), "exact")
            yield Held("07", "its checkpoint", profile.model, 3 * _sae_bytes(profile, model), "for a time")
        if profile.labeller:
            yield self._encoded("08", "images to label by", labeller, n_probe, 1, each)
        if profile.sae_patches and model:
            yield self._encoded("08", "activations of patches", profile.model, n_probe, 1, each)
            yield Held(
                "08", "activations of patches", profile.model, activation_bytes(model, n_probe, "spatial"), "exact"
            )
        n = _n_texts(profile)
        for name in dict.fromkeys([labeller] if drawn else [profile.model, labeller]):
            if n:
                speed = self.speeds[name]
                spent = n * speed.text if speed else math.nan
                yield Stage("08", "vocabulary read", name, n, "texts", spent, speed.how if speed else "unknown")
        if drawn:
            for name in [profile.model, *profile.models[: len(profile.sae_others)]]:
                yield self._encoded("11", "scenes and lesions of the audits", name, N_AUDITED, 1, each)
                if model := self.models[name]:
                    yield Held(
                        "11", "activations of the audits", name, activation_bytes(model, N_AUDITED, "class"), "about"
                    )

    def _learns(self, model: Model) -> bool:
        """Whether a dictionary is learned, as `dictionaries.Dictionaries.left_out` has it."""
        return bool(model.n_blocks) and (self.images.drawn or self.images.n >= dictionaries.LEAST)

    @property
    def _n_probe(self) -> int:
        held_back = math.ceil(dictionaries.HELD_BACK * self.images.n)
        if self.images.drawn:
            return self.profile.n_probe
        return self.images.n if self.profile.sae else held_back

    @property
    def _n_learn(self) -> int:
        held_back = math.ceil(dictionaries.HELD_BACK * self.images.n)
        return self.profile.sae_scenes if self.images.drawn else self.images.n - held_back

    def _training(self, model: Model) -> tuple[int, int, int]:
        """Rows, batch size and steps, as `dictionaries.learn` chooses them."""
        n_rows = self._n_learn * (math.prod(model.grid) if self.profile.sae_token == "spatial" else 1)
        smallest, largest = dictionaries.SMALLEST_BATCH, dictionaries.LARGEST_BATCH
        batch = min(max(n_rows // dictionaries.BATCHES, smallest), largest, n_rows)
        return n_rows, batch, self.profile.sae_epochs * (n_rows // batch)

    def _encoded(
        self, notebook: str, stage: str, name: str, n: int, n_views: int, drawing: float, metrics: float = 0.0
    ) -> Stage:
        """A model on views of images, while threads draw the next ones."""
        speed = self.speeds[name]
        if speed is None:
            return Stage(notebook, stage, name, n * n_views, "views", math.nan, "unknown")
        each = speed.image if n_views == 1 else n_views * speed.view
        encoding, drawn = n * (each + metrics), self._drawn(n, drawing)
        spent = max(encoding, drawn) if self.on_gpu else encoding + drawn  # on a CPU both want the same cores
        return Stage(notebook, stage, name, n * n_views, "views", spent, speed.how)

    def _drawn(self, n: int, each: float) -> float:
        return n * each / (os.cpu_count() or 1)

    def _area(self, size: int) -> float:
        return (size / self.profile.image_size) ** 2

    def memory(self) -> list[tuple[str, float, float]]:
        """The largest needs, and what this machine has."""
        profile, main = self.profile, float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        card = float(torch.cuda.get_device_properties(0).total_memory) if self.on_gpu else main
        rows, pixels = [], min(profile.batch_size, max(1, self.images.n)) * costs.VIEWS * profile.image_size**2 * 3
        known = {name: model for name, model in self.models.items() if model}
        if known:
            name = max(known, key=lambda name: known[name].n_parameters)
            # weights and their packed copy; a few batches as bytes; what the metrics hold of one as floats
            need = 2 * costs.BYTES * known[name].n_parameters + pixels * (2 + shift.AHEAD + 2 * costs.BYTES)
            rows.append((f"a batch of the pass, {name}", need + (0 if self.on_gpu else BASE_MEMORY), card))
        own = known.get(profile.model)
        if own and own.n_blocks:
            tokens = pass_bytes(profile, own, max(1, self.images.n))["tokens"]
            rows.append(
                ("class tokens of all blocks, read at once", BASE_MEMORY + tokens * (1 + 4 / own.n_blocks), main)
            )
        if own and self._learns(own):
            # weights, gradients and Adam's two moments
            need = 4 * _sae_bytes(profile, own) + self._training(own)[1] * profile.sae_latents * costs.BYTES * 2
            rows.append(("training the dictionary", BASE_MEMORY + need, main))
        return rows


def _counted(source: Path, most: int | None) -> tuple[int, bool]:
    """Images in a source, counting no further than `most`, and whether the first has the factors of a drawn scene."""
    n, drawn = 0, False
    for path in [source] if source.is_file() else sorted(source.rglob("*")) if source.is_dir() else []:
        if most is not None and n >= most:
            break
        if path.suffix.lower() != ".tar":
            n += path.suffix.lower() in manifests.SUFFIXES
            continue
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    suffix = os.path.splitext(member.name)[1].lower()
                    n += suffix in manifests.SUFFIXES
                    if suffix == ".json" and not drawn and n <= 2 and member.size < 2**20:
                        drawn = {"kind", "cues"} <= set(json.load(tar.extractfile(member)))
                    if most is not None and n > most:
                        break
        except (tarfile.TarError, OSError, ValueError, TypeError):
            continue  # the run names what is wrong with it
    return n, drawn


def _lines(file: Path) -> int:
    if not file.is_file():
        return 0
    with file.open("rb") as opened:
        return sum(1 for line in opened if line.strip())


def _n_texts(profile: Profile) -> int:
    """Prompts that one encoding of the vocabulary takes."""
    made = {"world": words.of_world, "imagenet": words.imagenet}.get(profile.vocabulary)
    if made is None and not (profiles.ROOT / profile.vocabulary).is_file():
        return 0
    found = made() if made else words.read(profiles.ROOT / profile.vocabulary)
    return (len(found.words) + 1) * len(found.templates)


def _sae_bytes(profile: Profile, model: Model) -> int:
    """Of its weights: two matrices and two biases."""
    return costs.BYTES * (2 * profile.sae_latents * model.width + profile.sae_latents + model.width)


def _ranking(n: int, n_resamples: int) -> float:
    """Seconds of one ranking of the nine augmentations over n images."""
    values = np.random.default_rng(0).random(9 * max(2, n))
    table = pd.DataFrame(
        {"image_id": np.repeat(np.arange(max(2, n)).astype(str), 9), "augmentation": [*augment.VIEWS[1:]] * max(2, n)}
    )
    return costs.seconds(
        lambda _: stats.ranking(table.assign(l2=values), "l2", n_resamples=n_resamples, seed=0), 1, most=1, threads=1
    )


def _folder_bytes(run: Path) -> int:
    """Of the notebooks, figures and tables of a run; where there is none, `NOTEBOOK_BYTES`."""
    files = [file for part in ("notebooks", "figures", "tables") for file in (run / part).rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) if len(files) > 100 else NOTEBOOK_BYTES
