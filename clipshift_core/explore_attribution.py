"""The attribution explorer: an image and a prompt taken apart, and what deleting components does, at once.

`prompted` finds out, `AttributionExplorer` shows it, and `attribution_explorer` is what a notebook calls.
"""

import html
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go

from clipshift_core.attributed import EXACT
from clipshift_core.canvas import INK, MUTED, canvas, data_uri, numbers
from clipshift_core.dictionaries import Dictionaries
from clipshift_core.explore import Explorer, live
from clipshift_core.figures_attribution import METHOD_LOOKS, N_NAMED, NEGATIVE, POSITIVE, ZERO, _hatched
from clipshift_core.prompted import PromptError, Questions, Taken

CHOICES = tuple(name for name in METHOD_LOOKS if name not in (EXACT, "random"))
"""Methods that can be chosen: exact ablation stands beside each, and a random order explains nothing."""
OF_COSINE = ("integrated_gradients", "act_x_grad")
"""Those whose values are parts of the cosine; the others have units of their own, and an axis of their own."""
GREY = "#BDBDBD"
"""Of bars whose component is deleted."""
STAR = {"symbol": METHOD_LOOKS[EXACT].symbol, "size": 12, "line": {"width": 1, "color": "white"}}
LEFT, RIGHT = 280, 590
"""Pixels that controls and figures are wide."""


class AttributionExplorer(Explorer):
    """Components of one image's cosine with a prompt, and what is left of it when some are deleted."""

    def __init__(self, questions: Questions):
        self.questions = questions
        self._quiet, self._asked, self._own = False, None, ""
        self.taken: Taken | None = None
        """What is shown."""
        wide = {"width": f"{LEFT}px"}
        named = {"layout": wide, "style": {"description_width": "60px"}}
        options = [(name, i) for i, name in enumerate(questions.names)]
        self.image = ipywidgets.Dropdown(options=options, value=0, description="Image", **named)
        self.prompt = ipywidgets.Text(description="Prompt", continuous_update=False, **named)
        self.method = ipywidgets.Dropdown(
            options=[(METHOD_LOOKS[name].label, name) for name in CHOICES], description="Method", **named
        )
        self.ticks = [ipywidgets.Checkbox(description="delete", indent=False, layout=wide) for _ in range(N_NAMED)]
        self.none = ipywidgets.Button(description="Delete none", tooltip="Take back all deletions")
        self.none.on_click(lambda button: self.untick())
        self.picture, self.change, self.bars = live(_picture()), live(_change()), live(_bars())
        asked = [self.image, self.prompt, self.method]
        super().__init__(
            [*asked, *self.ticks, self.none],
            [ipywidgets.HBox([self.picture, self.change]), self.bars],
            watched=[*asked, *self.ticks],
        )

    @property
    def deleted(self) -> list[int]:
        """The latents whose boxes are ticked."""
        if self.taken is None:
            return []
        latents = self.taken.largest(N_NAMED)["latent"]
        return [int(latent) for latent, tick in zip(latents, self.ticks, strict=False) if tick.value]

    def ask(self) -> None:
        """As every explorer; what it changes in its own controls asks for nothing."""
        if not self._quiet:
            super().ask()

    def untick(self) -> None:
        """Take back all deletions, in one answer."""
        with self._quietly():
            for tick in self.ticks:
                tick.value = False
        self.ask()

    def answer(self) -> str:
        """Take the image apart anew where another question is asked, and delete what is ticked."""
        try:
            self._take()
        except PromptError as error:
            return f"{html.escape(str(error))} Shown is what was asked before."
        taken, gone = self.taken, self.deleted
        after, word = taken.without(gone), taken.word_without(gone)
        added = taken.cosine + taken.added_up(gone)
        for widget, (traces, layout) in (
            (self.change, change(taken.cosine, after, added, taken.word, word)),
            (self.bars, bars(taken.largest(N_NAMED), gone, self.method.value)),
        ):
            with widget.batch_update():
                for trace, wanted in zip(widget.data, traces, strict=True):
                    trace.update(wanted, overwrite=True)
                widget.update_layout(layout)
        return self._sentence(after, word, taken.added_up(gone))

    def static(self) -> go.Figure:
        """The first image, its own word and the first method, nothing deleted."""
        questions = self.questions
        prompt = questions.own(0)
        taken = questions.taken(0, prompt, CHOICES[0])
        figure = canvas(
            f"What makes this image similar to “{prompt}”?",
            f"The ten largest components by {METHOD_LOOKS[CHOICES[0]].label}: blue raises the cosine, hatched orange "
            "lowers it; star: exact ablation",
            height=560, showlegend=False, margin={"l": 20, "r": 30, "t": 96, "b": 60},
        )  # fmt: skip
        traces, layout = bars(taken.largest(N_NAMED), [], CHOICES[0])
        figure.add_bar(**traces[0])
        figure.add_scatter(**traces[1])
        figure.update_layout({name: wanted for name, wanted in layout.items() if name != "title"})
        figure.update_xaxes(domain=[0.52, 1])
        traces, layout = change(taken.cosine, taken.cosine, taken.cosine, taken.word, taken.word)
        figure.add_bar(**traces[0], xaxis="x3", yaxis="y3")
        figure.add_scatter(**traces[1], xaxis="x3", yaxis="y3")
        figure.update_layout(
            xaxis3={**layout["xaxis"], "domain": [0.12, 0.34], "anchor": "y3"},
            yaxis3={**layout["yaxis"], "domain": [0, 0.26], "anchor": "x3"},
        )
        figure.add_layout_image(
            source=data_uri(questions.picture(0), 256), xref="paper", yref="paper",
            x=0.01, y=1, sizex=0.28, sizey=0.64,
        )  # fmt: skip
        return figure

    def _take(self) -> None:
        """Take apart what image, prompt and method ask for; clear and name the boxes. Nothing where it is shown."""
        index, prompt, method = self.image.value, self.prompt.value, self.method.value
        own = self.questions.own(index)
        if prompt == self._own:  # nobody typed it: it follows the image
            prompt = own
        if (index, prompt, method) == self._asked:
            return
        taken = self.questions.taken(index, prompt, method)
        self.picture.layout.images[0].source = data_uri(self.questions.picture(index), 256)
        with self._quietly():
            self.prompt.value = prompt
            rows = list(taken.largest(N_NAMED).itertuples())
            for i, tick in enumerate(self.ticks):
                tick.value, tick.layout.display = False, None if i < len(rows) else "none"
                if i < len(rows):
                    tick.description = f"delete latent {rows[i].latent} ({_short(rows[i].label)})"
        self.taken, self._own, self._asked = taken, own, (index, prompt, method)

    def _sentence(self, after: float, word: str, added: float) -> str:
        taken, n = self.taken, len(self.deleted)
        prompt = html.escape(self.prompt.value)
        said = f"The cosine of the image with “{prompt}” is <b>{_number(taken.cosine)}</b>"
        if not n:
            first, method = next(taken.table.itertuples()), self.method.value
            of = "" if method in OF_COSINE else " in units of its own"
            return (
                f"{said}, and among all words the image is read as <b>{html.escape(taken.word)}</b>. The largest part "
                f"by {METHOD_LOOKS[method].label} is latent {first.latent} ({html.escape(first.label)}) with "
                f"{_number(first.value, '+')}{of}; exact ablation gives it {_number(first.exact, '+')}."
            )
        what = "the ticked component" if n == 1 else f"the {n} ticked components"
        alone = "" if n == 1 else f"; exact ablation of each alone adds up to {_number(added, '+')}"
        then = "still " if word == taken.word else ""
        return (
            f"{said}; without {what} it is <b>{_number(after)}</b>, a change of "
            f"<b>{_number(after - taken.cosine, '+')}</b>{alone}. Among all words the image is read as "
            f"<b>{html.escape(taken.word)}</b>, and after the deletion {then}as <b>{html.escape(word)}</b>."
        )

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False


def attribution_explorer(dictionaries: Dictionaries) -> ipywidgets.Widget:
    """The explorer of a run's dictionary; where there is none, a line that says why."""
    if dictionaries.left_out and dictionaries.bench.profile.sae is None:
        why = html.escape(dictionaries.left_out)
        return ipywidgets.HTML(f"<p>There is no dictionary to take images apart with: {why}.</p>")
    return AttributionExplorer(Questions(dictionaries))


# Drawing ------------------------------------------------------------------------------------------------------------


def bars(rows: pd.DataFrame, deleted: Sequence[int], method: str) -> tuple[list[dict], dict]:
    """Bars by the method and stars by exact ablation, one row a component, and their layout; deleted ones in grey.

    rows: columns latent, label, value, exact. Zero is in the same place for both: where the method has units of its
    own, the stars are read at the top.
    """
    values, exact = rows["value"].to_numpy(dtype=float), rows["exact"].to_numpy(dtype=float)
    gone = rows["latent"].isin(deleted).to_numpy()
    same, label = method in OF_COSINE, METHOD_LOOKS[method].label
    scale = 1.0 if same else np.abs(values).max(initial=1e-12) / np.abs(exact).max(initial=1e-12)
    ends = np.array([0.0, *exact, *values / scale])
    room = 0.06 * max(np.ptp(ends), 1e-6)
    limits = np.array([ends.min() - room, ends.max() + room])
    colours = [GREY if out else POSITIVE if up else NEGATIVE for out, up in zip(gone, values >= 0, strict=True)]
    at, names = list(range(len(rows))), [f"{_short(row.label)}, latent {row.latent}" for row in rows.itertuples()]
    bar = {
        "x": numbers(values), "y": at, "orientation": "h", "width": 0.6, "customdata": names,
        "marker": _hatched(colours, ["" if up else "/" for up in values >= 0]),
        "hovertemplate": f"%{{customdata}}<br>{label}: %{{x:.4g}}<extra></extra>",
    }  # fmt: skip
    star = {
        "x": numbers(exact), "y": at, "mode": "markers", "xaxis": "x2",
        "marker": {**STAR, "color": [MUTED if out else INK for out in gone]}, "customdata": names,
        "hovertemplate": "%{customdata}<br>exact ablation: %{x:.4g}<extra></extra>",
    }  # fmt: skip
    ticks = [
        f"<span style='color:{MUTED}'>deleted: {html.escape(name)}</span>" if out else html.escape(name)
        for name, out in zip(names, gone, strict=True)
    ]
    said = f"Bars: {label} (hatched: lowers); stars: exact ablation; grey: deleted"
    layout = {
        # no subtitle: a FigureWidget draws it over the title
        "title": {"text": f"What each component adds<br><span style='font-size:13px;color:{MUTED}'>{said}</span>"},
        "xaxis": {
            **ZERO, "title": {"text": "Part of the cosine" if same else f"{label.capitalize()}, in its own units"},
            "range": numbers(limits * scale), "nticks": 6,
        },
        "xaxis2": {
            "overlaying": "x", "side": "top", "range": numbers(limits), "visible": not same, "nticks": 6,
            "tickmode": "auto", "showgrid": False, "title": {"text": "Exact ablation: part of the cosine"},
        },
        "yaxis": {
            "tickvals": at, "ticktext": ticks, "range": [N_NAMED - 0.4, -0.6], "showgrid": False,
            "tickfont": {"size": 13},
        },
    }  # fmt: skip
    return [bar, star], layout


def change(before: float, after: float, added: float, word: str, word_after: str) -> tuple[list[dict], dict]:
    """The cosine as it is and with what is ticked deleted, beside the words; a star where single deletions add up."""
    ends = np.array([0.0, before, after, added])
    span = max(np.ptp(ends), 1e-3)
    texts = [f"{_number(value)}<br>\u00a0{html.escape(name)}" for value, name in ((before, word), (after, word_after))]
    bar = {
        "x": numbers([before, after]), "y": [0, 1], "orientation": "h", "width": 0.6,
        "marker": {"color": [INK, MUTED]}, "hovertemplate": "%{x:.4g}<extra></extra>",
    }  # fmt: skip
    star = {
        "x": numbers([max(0, before), max(0, after), added]), "y": [0, 1, 2], "mode": "markers+text",
        "text": [f"\u00a0{text}" for text in (*texts, _number(added))], "textposition": "middle right",
        "marker": {**STAR, "color": INK, "opacity": [0, 0, 1]}, "cliponaxis": False,
        "textfont": {"size": 13, "color": INK}, "hoverinfo": "skip",
    }  # fmt: skip
    layout = {
        "xaxis": {
            **ZERO, "title": {"text": "Cosine"}, "range": numbers([ends.min() - 0.05 * span, ends.max() + 0.5 * span]),
            "nticks": 4,
        },
        "yaxis": {
            "tickvals": [0, 1, 2], "ticktext": ["as it is", "without<br>the ticked", "if each change<br>added up"],
            "range": [2.5, -0.5], "showgrid": False, "tickfont": {"size": 13},
        },
    }  # fmt: skip
    return [bar, star], layout


def _picture() -> go.Figure:
    blank = data_uri(np.full((8, 8, 3), 255, np.uint8), 8)
    figure = canvas("", "", height=250, width=220, margin={"l": 0, "r": 6, "t": 10, "b": 20})
    figure.update_xaxes(visible=False, range=[0, 1]).update_yaxes(visible=False, range=[0, 1])
    figure.add_layout_image(source=blank, xref="paper", yref="paper", x=0, y=1, sizex=1, sizey=1)
    return figure


def _bars() -> go.Figure:
    figure = canvas("", "", height=460, width=RIGHT, showlegend=False)
    figure.update_layout(margin={"l": 205, "r": 20, "t": 130, "b": 50})
    figure.add_bar()
    return figure.add_scatter(xaxis="x2")


def _change() -> go.Figure:
    figure = canvas(
        "", "", height=250, width=RIGHT - 220, margin={"l": 10, "r": 20, "t": 10, "b": 40}, showlegend=False
    )
    figure.add_bar()
    return figure.add_scatter()


def _short(label: str) -> str:
    return textwrap.shorten(label, 20, placeholder=" …")


def _number(value: float, sign: str = "") -> str:
    """Three decimals, with the minus sign of the axes, and no sign before what rounds to zero."""
    return f"{round(value, 3) + 0:{sign}.3f}".replace("-", "−")
