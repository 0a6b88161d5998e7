"""The component explorer: find a latent by its label or by the factor it tells best, and see what it stands for.

`Components` knows one dictionary's latents, `portrait` draws one of them, `ComponentExplorer` puts a search in front.
"""

import html
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from scipy.sparse import csc_array

from clipshift_core import attention, attribution, concepts, detection, ground_truth
from clipshift_core.activations import Activations
from clipshift_core.canvas import INK, PALETTE, WIDTH, canvas, data_uri, n_images, numbers, short
from clipshift_core.dictionaries import Dictionaries, Learned, codes_of, heat_maps
from clipshift_core.explore import Explorer, live
from clipshift_core.figures_attention import overlay
from clipshift_core.splice import Splice, SpliceError, State

SORTS = {"Alignment": "alignment", "Clarity": "clarity", "Frequency": "frequency"}
"""What latents are sorted by, the highest first."""
TOKENS = {"class": "class token", "spatial": "patches"}
SHOWN, DRIVEN, NAMED = 8, 6, 3
"""Examples and classes that are drawn, and classes that are named in the table."""
ROOM, CAPTION = 580, 24
"""Pixels for a row of examples, and for what is written below them."""
COLUMNS = {"class": 4, "spatial": 8}
"""Examples in a row; those of patches are small, so that their maps and all else stay on one screen."""
TILE = ROOM // 4
"""Pixels of a picture at most."""
NARROW = ROOM + 20
"""Width of the figure beside the controls."""


@dataclass(frozen=True, eq=False)
class Components:
    """The latents of one dictionary, looked at with the run's probe; all is made when first asked for, and kept."""

    dictionaries: Dictionaries
    learned: Learned

    @cached_property
    def held(self) -> Activations:
        """The probe's activations, as the dictionary reads them."""
        origin = self.learned.origin
        return self.dictionaries.activations(self.dictionaries.probe.source, origin.layer, origin.token)

    @cached_property
    def examples(self) -> concepts.Examples:
        """The probe's images that activate each latent most, by the largest activation of their tokens."""
        return concepts.examples(codes_of(self.learned.sae, self.held), self.learned.sae.n_latents)

    @cached_property
    def units(self) -> csc_array:
        """Each image's activation of each latent, (image, latent), the largest of its tokens."""
        codes = map(torch.cat, zip(*codes_of(self.learned.sae, self.held), strict=True))
        n_latents = self.learned.sae.n_latents
        return ground_truth.dictionary(concepts.pooled(*codes, n_latents), self.examples.n_images, n_latents)

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row a latent: latent, label, kind, clarity, alignment, frequency, factor and auroc (of drawn scenes only),
        drives (the classes that it raises most, at most `NAMED`).

        factor is the factor value that it tells best on one half of the images, auroc how well it does on the other
        half; unknown for a latent that is on in fewer than `ground_truth.AT_LEAST` of the first.
        """
        columns = ["latent", "label", "kind", "clarity", "alignment", "frequency"]
        table = self.dictionaries.described(self.examples)[columns].copy()
        if self.dictionaries.drawn:
            table["factor"], table["auroc"] = self._factors()
        most = self.driven.columns.to_numpy()[np.argsort(-self.driven.to_numpy(), axis=1, kind="stable")[:, :NAMED]]
        raised = [tuple(word for word in words if self.driven.at[j, word] > 0) for j, words in enumerate(most)]
        return table.assign(drives=raised)

    @cached_property
    def driven(self) -> pd.DataFrame:
        """A row a latent, a column a class: mean act x grad to the class's text over all images of the class, those
        included on which the latent is off. Without columns where `undriven` says why."""
        if isinstance(self._spliced, str):
            return pd.DataFrame(index=range(self.learned.sae.n_latents))
        images, first, words = self.dictionaries.probe.images, 0, []
        for state in self._states(self._spliced):
            with torch.no_grad():
                embeddings = F.normalize(self._spliced.embed(state).cpu(), dim=1)
            asked = self.dictionaries.asked(images.iloc[first : first + len(embeddings)], embeddings)
            if not words:
                words, n = asked.words, torch.zeros(len(asked.words))
                total = torch.zeros(len(words), self.learned.sae.n_latents)
            target = attribution.cosine(asked.texts[asked.index])
            latents, values, _ = attribution.act_x_grad(self._spliced, state, target)
            classes = asked.index[:, None].expand_as(latents)
            total.index_put_((classes, latents.cpu()), values.cpu(), accumulate=True)
            n += torch.bincount(asked.index, minlength=len(words))
            first += len(embeddings)
        seen = n > 0
        mean = (total[seen] / n[seen, None]).T.numpy()
        return pd.DataFrame(mean, columns=[word for word, some in zip(words, seen.tolist(), strict=True) if some])

    @property
    def undriven(self) -> str:
        """Why no latent can be said to drive a class; empty where it can."""
        return self._spliced if isinstance(self._spliced, str) else ""

    def search(self, text: str = "", sort: str = "alignment") -> pd.DataFrame:
        """The rows of `table` with the text in their label or best factor, in any case, the highest of `sort` first."""
        if sort not in SORTS.values():
            raise ValueError(f"sort {sort!r}: {', '.join(SORTS.values())} are accepted")
        searched = [self.table[name] for name in ("label", "factor") if name in self.table]
        found = [column.fillna("").str.contains(text.strip(), case=False, regex=False) for column in searched]
        rows = self.table[np.logical_or.reduce(found)]
        return rows.sort_values(sort, ascending=False, na_position="last", kind="stable")

    @property
    def first(self) -> int:
        """The latent that is shown at first."""
        return int(self.search()["latent"].iloc[0])

    @cached_property
    def picture(self) -> Callable[[int], str]:
        """An image of the probe by its number, as a data URI."""
        return lru_cache(maxsize=4096)(lambda image: data_uri(self._read(image), TILE))

    @cached_property
    def mapped(self) -> Callable[[int], list[str]]:
        """The examples of a latent, each with where in it the latent is on, as data URIs."""

        def drawn(latent: int) -> list[str]:
            images = shown(self.examples.image[latent])
            maps = heat_maps(self.learned, self.held, images, latent, self.dictionaries.bench.encoder.grid)
            return [data_uri(overlay(self._read(i), m), TILE) for i, m in zip(images, maps, strict=True)]

        return lru_cache(maxsize=1024)(drawn)

    def _read(self, image: int) -> UInt8[np.ndarray, "size size 3"]:
        return self.dictionaries.probe.source.read(image)

    def _factors(self) -> tuple[list[str | None], list[float]]:
        presence = ground_truth.factors(self.dictionaries.probe.images)
        first = ground_truth.halves(len(presence), seed=self.dictionaries.bench.profile.seed)
        presence = ground_truth.scored(presence, first)
        if presence.empty:
            return [None] * self.units.shape[1], [np.nan] * self.units.shape[1]
        shows, rows = presence.to_numpy(), np.arange(self.units.shape[1])
        best = detection.auroc(self.units[first], shows[first]).argmax(axis=1)
        scores = detection.auroc(self.units[~first], shows[~first])[rows, best]
        on = np.asarray((self.units[first] > 0).sum(axis=0)) >= ground_truth.AT_LEAST
        names = [f"{factor} {value}" for factor, value in presence.columns]
        return [names[b] if o else None for b, o in zip(best, on, strict=True)], np.where(on, scores, np.nan).tolist()

    @cached_property
    def _spliced(self) -> Splice | str:
        try:
            return self.dictionaries.spliced(self.learned)
        except SpliceError as error:
            return str(error)

    def _states(self, spliced: Splice, batch_size: int = 64) -> Iterator[State]:
        """The probe at the splice, from stored activations wherever the tower's stream is made of them."""
        bench, source = self.dictionaries.bench, self.dictionaries.probe.source
        n_before, has_class = spliced.tail.n_before, attention.has_class_token(bench.encoder.model.visual)
        if spliced.tail.needs_class_alone or n_before != has_class:  # registers are not stored
            yield from self.dictionaries.states(spliced, source)
            return
        tokens = ["class", "spatial"] if has_class else ["spatial"]
        held = [self.dictionaries.activations(source, spliced.layer, token).dataset()["activation"] for token in tokens]
        for start in range(0, len(source.ids), batch_size):
            parts = [torch.from_numpy(each[start : start + batch_size].values) for each in held]
            yield spliced.state_of(torch.cat([each if each.ndim == 3 else each[:, None] for each in parts], dim=1))


def shown(images: torch.Tensor) -> list[int]:
    """The first examples that there are."""
    return [i for i in images.tolist() if i >= 0][:SHOWN]


def portrait(components: Components, latent: int, *, width: int = NARROW) -> go.Figure:
    """One latent: its examples with their activations, where in them it is on (of patches), and the classes it drives.

    The classes stand below the examples, or beside them where `width` has room.
    """
    row, examples = components.table.loc[latent], shown(components.examples.image[latent])
    token, beside = components.learned.origin.token, width > NARROW + 200
    columns, spatial = COLUMNS[token], token == "spatial"
    cell = ROOM / columns
    pitch = cell * (1 + spatial) + CAPTION
    high, wide, bars = round(pitch * SHOWN / columns), width - 20, 22 * DRIVEN
    plot = max(high, bars + 30) if beside else high + 56 + bars
    how = "The images that activate it most, with the activation" if examples else "No image activates it"
    if spatial and examples:
        how += "; below each where, from dark to bright"
    figure = canvas(
        f"Latent {latent}: {_short(_name(row['label']), 40)}", how, height=plot + 132, width=width, showlegend=False
    )
    figure.update_layout(margin={"l": 10, "r": 10, "t": 76, "b": 56})

    places = [(i % columns + 0.5, pitch * (i // columns)) for i in range(len(examples))]
    tiles = [(x, y, components.picture(i)) for (x, y), i in zip(places, examples, strict=True)]
    if spatial:
        tiles += [(x, y + cell, uri) for (x, y), uri in zip(places, components.mapped(latent), strict=True)]
    figure.layout.images = [
        {
            "source": uri, "xref": "x", "yref": "y", "x": x, "y": y, "sizex": 0.95, "sizey": 0.95 * cell,
            "xanchor": "center", "yanchor": "top",
        }
        for x, y, uri in tiles
    ]  # fmt: skip
    figure.add_scatter(
        x=[x for x, _ in places],
        y=[y + pitch - 0.6 * CAPTION for _, y in places],
        mode="text",
        text=[short(float(value)) for value in components.examples.value[latent, : len(examples)]],
        customdata=[components.dictionaries.probe.source.ids[i] for i in examples],
        hovertemplate="image %{customdata}: activation %{text}<extra></extra>",
        textfont={"size": 13},
    )
    figure.update_layout(
        xaxis={"visible": False, "domain": [0, ROOM / wide], "range": [0, columns], "fixedrange": True},
        yaxis={"visible": False, "domain": [1 - high / plot, 1], "range": [high, 0], "fixedrange": True},
    )

    driven = components.driven.loc[latent]
    most = driven.loc[driven.abs().sort_values(ascending=False, kind="stable").index[:DRIVEN]].sort_values(
        kind="stable"
    )
    most = most[most != 0]
    figure.add_bar(
        x=numbers(most),
        y=list(range(DRIVEN - len(most), DRIVEN)),
        orientation="h",
        marker={"color": [PALETTE[0] if value > 0 else PALETTE[1] for value in most]},
        text=[f"{value:+.2g}" for value in most],
        textposition="outside",
        cliponaxis=False,
        customdata=list(most.index),
        hovertemplate="%{customdata}: %{x:+.3g}<extra></extra>",
        xaxis="x2",
        yaxis="y2",
    )
    low, top = (min(0.0, *most), max(0.0, *most)) if len(most) else (0.0, 1.0)
    start = (ROOM if beside else 0) + 130
    pixel = (top - low) / (wide - start - 70 * ((low < 0) + (top > 0)))  # 70 pixels for what is written at a bar's end
    figure.update_layout(
        xaxis2={
            "domain": [start / wide, 1],
            "anchor": "y2",
            "title": {"text": "Mean act x grad (in cosine)" if len(most) else ""},
            "range": numbers([low - 70 * pixel * (low < 0), top + 70 * pixel * (top > 0)]),
            "nticks": 4,
            "exponentformat": "e",
            "showticklabels": len(most) > 0,
            "fixedrange": True,
        },
        yaxis2={
            "domain": [0, (plot - 30 if beside else bars) / plot],
            "anchor": "x2",
            "automargin": False,
            "showgrid": False,
            "range": [-0.6, DRIVEN - 0.4],
            "tickvals": list(range(DRIVEN - len(most), DRIVEN)),
            "ticktext": [_short(word, 16) for word in most.index],
            "fixedrange": True,
        },
    )
    what = f"The {len(most)} classes it drives most" if len(most) else "It drives no class"
    what = "What it drives is unknown" if components.undriven else what.replace("The 1 classes", "The class")
    figure.add_annotation(
        text=f"<b>{what}</b>", xref="x2 domain", yref="y2 domain", x=0, y=1, xanchor="left", yanchor="bottom",
        yshift=4, showarrow=False, font={"size": 14},
    )  # fmt: skip
    figure.add_shape(type="line", xref="x2", yref="y2 domain", x0=0, x1=0, y0=0, y1=1, line={"color": INK, "width": 1})
    return figure


def _name(label: str | float) -> str:
    return label if isinstance(label, str) else "no label, it is never on"


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else textwrap.shorten(words, most, placeholder=" …") or words[: most - 1] + "…"


def _known(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "unknown"


class ComponentExplorer(Explorer):
    """Search on the left; the chosen latent's portrait on the right; its scores in words below."""

    def __init__(self, dictionaries: Dictionaries):
        profile = dictionaries.bench.profile
        learned = [dictionaries.used] + ([dictionaries.patches] if profile.sae_patches else [])
        self.components = {TOKENS[each.origin.token]: Components(dictionaries, each) for each in reversed(learned)}
        self.components = dict(reversed(self.components.items()))
        for each in self.components.values():  # now, so that no later change of a control waits for it
            each.table  # noqa: B018
        style, layout = {"description_width": "58px"}, {"width": "296px"}
        self.text = ipywidgets.Text(
            description="Search", placeholder="a label or a factor", continuous_update=False, style=style, layout=layout
        )
        self.sort = ipywidgets.Dropdown(options=SORTS, description="Sort by", style=style, layout=layout)
        self.which = ipywidgets.Dropdown(
            options=list(self.components), description="Tokens", style=style, layout=layout
        )
        self.listed = ipywidgets.Select(rows=12, description="Latents", style=style, layout=layout)
        self.listing, self.asked_for = False, None
        self.figure = live(portrait(self.found, self.found.first))
        asked = [self.text, self.sort, *([self.which] if len(self.components) > 1 else [])]
        super().__init__([*asked, self.listed], [self.figure], watched=[*asked, self.listed])

    @property
    def found(self) -> Components:
        """The dictionary that is looked at."""
        return self.components[self.which.value]

    def ask(self) -> None:
        """As every explorer, but for the list itself, whose first latent is chosen while it is made."""
        if not self.listing:
            super().ask()

    def answer(self) -> str:
        wanted = self.which.value, self.text.value, self.sort.value
        if wanted != self.asked_for:
            self._list()
            self.asked_for = wanted
        if self.listed.value is None:
            return (
                f"No latent of the {self.which.value} has <i>{html.escape(self.text.value.strip())}</i> in its label"
                f"{' or best factor' if 'factor' in self.found.table else ''}; the figure stays as it was."
            )
        self._draw(portrait(self.found, self.listed.value))
        return self._said(self.listed.value)

    def static(self) -> go.Figure:
        components = next(iter(self.components.values()))
        return portrait(components, components.first, width=WIDTH)

    def _list(self) -> None:
        """Offer what matches, and choose the first of it."""
        rows = self.found.search(self.text.value, self.sort.value)
        self.listing = True
        try:
            self.listed.options = [
                (f"latent {latent}: {_short(label, 24)} (clarity {_known(clarity)})", latent)
                if isinstance(label, str)
                else (f"latent {latent}: never on", latent)
                for latent, label, clarity in zip(rows["latent"], rows["label"], rows["clarity"], strict=True)
            ]
            self.listed.index = 0 if len(rows) else None
        finally:
            self.listing = False

    def _draw(self, new: go.Figure) -> None:
        with self.figure.batch_update():
            self.figure.layout.images = new.layout.images
            for name in ("title", "height", "xaxis", "yaxis", "xaxis2", "yaxis2", "annotations"):
                self.figure.layout[name] = new.layout[name]
            for old, trace in zip(self.figure.data, new.data, strict=True):
                old.update(trace.to_plotly_json())

    def _said(self, latent: int) -> str:
        found, row = self.found, self.found.table.loc[latent]
        said = f"<b>Latent {latent}: {html.escape(_name(row['label']))}</b>"
        if not row["frequency"]:
            return f"{said} in {n_images([found.examples.n_images])}."
        said += (
            f" ({html.escape(row['kind'])}). Alignment {_known(row['alignment'])}, clarity {_known(row['clarity'])}, "
            f"on in {short(100 * row['frequency'])} % of {n_images([found.examples.n_images])}."
        )
        if isinstance(row.get("factor"), str):
            said += (
                f" The factor it tells best on one half of them is <b>{html.escape(row['factor'])}</b>, with an AUROC "
                f"of {_known(row['auroc'])} on the other half."
            )
        if found.undriven:
            return f"{said} What it drives is unknown: {html.escape(found.undriven)}."
        raised = [f"{html.escape(word)} ({found.driven.at[latent, word]:+.2g})" for word in row["drives"]]
        return f"{said} It raises {'most: ' + ', '.join(raised) if raised else 'no class'}."


def component_explorer(dictionaries: Dictionaries) -> ComponentExplorer | ipywidgets.HTML:
    """The explorer of a run's dictionaries, or why there is none."""
    if not dictionaries.bench.profile.sae and dictionaries.left_out:
        return ipywidgets.HTML(f"<p>There are no components to explore, for {html.escape(dictionaries.left_out)}.</p>")
    return ComponentExplorer(dictionaries)
