"""The shift explorer: an image, an augmentation, its severity, and what they do to the model's view of it.

Beside each other: the image and its view, where the model looks in either, how far the embedding moved among the run's
images, and the latents whose activation changed most. A look is made by `Viewer`, which knows no widget.
"""

import hashlib
import html
import textwrap
from functools import cached_property
from typing import NamedTuple

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from clipshift_core import attention, augment, images, metrics, shift_attribution
from clipshift_core.canvas import LABELS, WIDTH, canvas, n_images, short
from clipshift_core.dictionaries import Asked, Dictionaries
from clipshift_core.explore import Explorer
from clipshift_core.figures_look import COMPARED, bars, densities, pictures, place, refresh, widget
from clipshift_core.splice import Splice

OFFERED = 100
"""Images of the run that can be chosen."""
BESIDE = 620
"""Pixels of the figures beside the controls."""


class Seen(NamedTuple):
    """A picture, and what the model made of it."""

    picture: UInt8[np.ndarray, "size size 3"]
    embedding: Float[Tensor, " dim"]
    """Unnormalised."""
    attention: Float[np.ndarray, "row col"]
    """The last block's class-token row, mean over heads; NaN for a tower whose attention cannot be read."""
    token: Float[Tensor, " width"] | None
    """Class token after the last block, where the dictionary in use reads it."""


class Look(NamedTuple):
    """An image beside one view of it."""

    image_id: str
    augmentation: str
    severity: float
    original: Seen
    view: Seen
    cosine: float
    l2: float
    """In units of the embedding."""
    changed: pd.DataFrame | None
    """A row a latent that is on in either, most changed first: latent, label, before, after (activations), part.

    part is what the latent adds to `change`. None where no dictionary takes shifts apart.
    """
    asked: str
    """The word that the image is compared with; empty without a dictionary."""
    change: float
    """In the cosine with that word, view minus original; NaN without a dictionary."""


class Viewer:
    """Looks at a run's images, and at uploaded ones; an image's own half is made once."""

    def __init__(self, dictionaries: Dictionaries):
        self.dictionaries, self.bench = dictionaries, dictionaries.bench
        self._uploaded: dict[str, UInt8[np.ndarray, "size size 3"]] = {}
        self._originals: dict[str, Seen] = {}

    def look(self, image_id: str, augmentation: str, severity: float) -> Look:
        """`augmentation` of an image at `severity`: 0 is the image itself, 1 the view that the one pass drew of it."""
        if image_id not in self._originals:
            known = image_id in self._uploaded
            self._originals[image_id] = self._seen(self._uploaded[image_id] if known else self.bench.picture(image_id))
        original, seed = self._originals[image_id], self.bench.profile.seed
        drawn = augment.view(original.picture, augmentation, seed=seed, image_id=image_id, severity=severity)
        view = self._seen(drawn)
        moved = (float(metric(view.embedding, original.embedding)) for metric in (metrics.cosine, metrics.l2))
        latents = self._changed(image_id, original, view)
        return Look(image_id, augmentation, severity, original, view, *moved, *latents)

    def upload(self, data: bytes) -> str:
        """Take a file's image in; the name to look at it by, which follows from its bytes alone. Raises Unreadable."""
        image_id = f"upload-{hashlib.sha256(data).hexdigest()[:12]}"
        self._uploaded[image_id] = images.resize(images.decode(data), self.bench.profile.image_size)
        return image_id

    def population(self, augmentation: str) -> dict[str, Float[np.ndarray, " image"]]:
        """Cosine and L2 of the run's images under one augmentation, as the one pass measured them at severity 1."""
        return {metric: self._by_augmentation[augmentation][metric].to_numpy(float) for metric in COMPARED}

    @cached_property
    def left_out(self) -> str:
        """Why no latents are shown; empty where they are."""
        return self.dictionaries.not_shifted

    @cached_property
    def _by_augmentation(self) -> dict[str, pd.DataFrame]:
        return dict(list(self.bench.shifts.groupby("augmentation")))

    @cached_property
    def _spliced(self) -> Splice:
        return self.dictionaries.spliced(self.dictionaries.used)

    @cached_property
    def _labels(self) -> pd.Series:
        return self.dictionaries.components.set_index("latent")["label"].fillna("no label")

    @cached_property
    def _asked(self) -> Asked:
        table, dataset = self.bench.manifest.images, self.bench.dataset
        embeddings = dataset["embedding"].sel(image=table["image_id"].values, view="original").values
        return self.dictionaries.asked(table, F.normalize(torch.from_numpy(embeddings), dim=1))

    @cached_property
    def _points(self) -> dict[str, str]:
        """What is captured of the model."""
        encoder, wanted = self.bench.encoder, {"attention": "attention.-1"}
        if not self.left_out:
            wanted["token"] = f"token.{encoder.n_blocks - 1}"
        there = encoder.readable(list(wanted.values()))
        return {what: point for what, point in wanted.items() if point in there}

    def _seen(self, picture: UInt8[np.ndarray, "size size 3"]) -> Seen:
        encoder, points = self.bench.encoder, self._points
        found = encoder.encode(picture[None], capture=list(points.values()))
        held = {what: found.captured[point] for what, point in points.items()}
        where = attention.to_map(held["attention"], encoder.grid)[0].numpy() if "attention" in held else None
        where = np.full((1, 1), np.nan) if where is None else where
        return Seen(picture, found.embedding[0], where, held["token"][0] if "token" in held else None)

    def _changed(self, image_id: str, original: Seen, view: Seen) -> tuple[pd.DataFrame | None, str, float]:
        """`Look.changed`, `Look.asked` and `Look.change`; an uploaded image is asked for the word it fits best."""
        if self.left_out:
            return None, "", np.nan
        spliced, asked = self._spliced, self._asked
        if image_id in self._uploaded:
            word = int((asked.texts @ original.embedding).argmax())
        else:
            word = int(asked.index[self.bench.manifest.images["image_id"].tolist().index(image_id)])
        x = [seen.token[None].to(spliced.W_dec) for seen in (original, view)]
        with torch.no_grad():
            codes = [spliced.sae.encode(each) for each in x]
        text = asked.texts[word].to(spliced.W_dec)
        shift = shift_attribution.decompose(
            *x, *codes, spliced.W_dec,
            lambda each: F.normalize(spliced.tail(each[:, None]), dim=1), lambda embedding: embedding @ text,
        )  # fmt: skip
        table = pd.DataFrame({name: getattr(shift, name)[0].cpu().numpy() for name in ("latent", "before", "after")})
        table["part"] = shift.part[0].cpu().numpy()
        table.insert(1, "label", table["latent"].map(self._labels))
        table = table[table["latent"] >= 0]
        moved, highest = (table["after"] - table["before"]).abs(), table[["before", "after"]].max(axis=1)
        table = table.iloc[np.lexsort([-highest, -moved])].reset_index(drop=True)
        return table, asked.words[word], float(shift.change[0])


class ShiftExplorer(Explorer):
    """Choose or upload an image, an augmentation and its severity; see what they do.

    image, upload, augmentation, severity: the controls.  viewer: what makes the looks.
    """

    def __init__(self, dictionaries: Dictionaries):
        self.viewer = Viewer(dictionaries)
        offered = dictionaries.bench.manifest.images["image_id"].head(OFFERED)
        self._options = _options(dictionaries.bench.titles[offered])
        style = {"style": {"description_width": "108px"}, "layout": {"width": "290px"}}
        self.image = ipywidgets.Dropdown(options=self._options, description="Image", **style)
        self.upload = ipywidgets.FileUpload(
            accept="image/*", multiple=False, description="Upload an image", layout={"width": "290px"}
        )
        choices = [(LABELS[name], name) for name in augment.AUGMENTATIONS]
        self.augmentation = ipywidgets.Dropdown(options=choices, description="Augmentation", **style)
        self.severity = ipywidgets.FloatSlider(
            1.0, min=0.0, max=2.0, step=0.1, readout_format=".1f", description="Severity", continuous_update=False,
            **style,
        )  # fmt: skip
        self.dose = ipywidgets.HTML()
        self.upload.observe(self._take, names="value")

        first = self._default()
        whole, self.bars = [(0, 1, 0, 1)], None
        self.pictures = widget(
            pictures(first), whole, width=BESIDE, height=206, margin={"l": 8, "r": 8, "t": 8, "b": 4}
        )
        self.densities = widget(
            densities(first, self.viewer.population(first.augmentation)), [(0, 0.47, 0, 1), (0.53, 1, 0, 1)],
            width=BESIDE, height=190, margin={"l": 16, "r": 16, "t": 46, "b": 48},
        )  # fmt: skip
        if first.changed is None:
            below = ipywidgets.HTML(f"<p>No latents are shown: {html.escape(self.viewer.left_out)}.</p>")
        else:
            margin = {"l": 150, "r": 16, "t": 36, "b": 48}
            below = self.bars = widget(bars(first), whole, width=BESIDE, height=330, margin=margin)
        shown = [self.pictures, self.densities, below]
        watched = [self.image, self.augmentation, self.severity]
        super().__init__([self.image, self.upload, self.augmentation, self.severity, self.dose], shown, watched=watched)

    def answer(self) -> str:
        severity = round(self.severity.value, 1)  # a slider's steps add up to 1.0000000000000002
        look = self.viewer.look(self.image.value, self.augmentation.value, severity)
        made = [
            (self.pictures, pictures(look)),
            (self.densities, densities(look, self.viewer.population(look.augmentation))),
            *([(self.bars, bars(look))] if self.bars else []),
        ]
        for figure, parts in made:  # after all of them are made: what fails, fails before any has changed
            refresh(figure, parts)
        self.dose.value = f"<p>Severity scales {html.escape(augment.AUGMENTATIONS[look.augmentation].dose)}.</p>"
        return sentence(look, self.viewer)

    def static(self) -> go.Figure:
        look, has_latents = self._default(), not self.viewer.left_out
        caption = dict((value, text) for text, value in self._options)[look.image_id]
        figure = canvas(
            "What an augmentation does to the model's view of an image",
            f"{textwrap.shorten(caption, 70, placeholder=' …')}; {_named(look)}",
            height=864 if has_latents else 632,
            showlegend=False,
            margin={"l": 12, "r": 12, "t": 84, "b": 56},
        )
        low = figure.layout.height - 84 - 56

        def box(left: float, right: float, top: float, bottom: float) -> tuple[float, float, float, float]:
            """Pixels from the top left corner of what is drawn, as shares."""
            return left / (WIDTH - 24), right / (WIDTH - 24), 1 - bottom / low, 1 - top / low

        boxes = [box(0, WIDTH - 24, 0, 300)]
        if has_latents:
            boxes += [box(8, 400, 378, 378 + 128), box(8, 400, low - 128, low), box(570, 930, 378, low)]
        else:
            boxes += [box(8, 450, 378, low), box(490, 930, 378, low)]
        parts = [*pictures(look), *densities(look, self.viewer.population(look.augmentation))]
        parts += bars(look) if has_latents else []
        for number, (part, where) in enumerate(zip(parts, boxes, strict=True), 1):
            place(figure, part, number, where)
        return figure

    def _default(self) -> Look:
        return self.viewer.look(self._options[0][1], next(iter(augment.AUGMENTATIONS)), 1.0)

    def _take(self, change: dict) -> None:
        """An uploaded image becomes the one that is looked at; of a file that is none, the reason is said."""
        for file in change["new"]:
            try:
                image_id = self.viewer.upload(bytes(file["content"]))
            except images.Unreadable as reason:
                name = html.escape(file["name"])
                self.trouble.value = f"<p><b>{name} cannot be read:</b> {html.escape(str(reason))}.</p>"
                return
            others = [(text, value) for text, value in self.image.options if value != image_id]
            # the first option is the one that a dropdown chooses when it is given new ones
            self.image.options = [(f"Uploaded: {file['name']}", image_id), *others]


def sentence(look: Look, viewer: Viewer) -> str:
    """What a look shows, in a sentence of HTML."""
    cosines, lengths = viewer.population(look.augmentation).values()
    further = (float(np.mean(cosines > look.cosine)), float(np.mean(lengths < look.l2)))
    said = (
        f"<b>{_named(look)}</b>: cosine {short(look.cosine)}, further from the original than {further[0]:.0%} of the "
        f"run's {n_images([len(cosines)])} at severity 1; L2 distance {short(look.l2)}, further than {further[1]:.0%}."
    )
    if look.changed is None:
        return said
    lost = look.changed["after"] - look.changed["before"]
    most = look.changed.loc[lost.idxmin()] if len(lost) and lost.min() < 0 else None
    said += (
        " No latent lost activation"
        if most is None
        else f" Latent {most['latent']} (<i>{html.escape(most['label'])}</i>) lost most, {short(most['before'])} to "
        f"{short(most['after'])}"
    )
    return f"{said}; the cosine with <i>{html.escape(look.asked)}</i> changes by {look.change:+.3f}."


def _named(look: Look) -> str:
    return f"{LABELS[look.augmentation]} at severity {look.severity:.1f}"


def _options(titles: pd.Series) -> list[tuple[str, str]]:
    """Label and image id of images, from their titles by image id."""
    return [(name if text == name else f"{name}: {text}", name) for name, text in titles.items()]
