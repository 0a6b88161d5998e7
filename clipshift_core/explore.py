"""What the explorers share: controls beside figures, one sentence that answers, and no bare traceback.

An explorer answers whatever its controls ask: `answer` changes its figures and returns a sentence with the numbers. It
is a widget; where there is no kernel, `static` is what it shows at first, as a plain figure.
"""

import html
import time
from collections.abc import Sequence

import anywidget
import ipywidgets
import plotly.graph_objects as go

from clipshift_core.canvas import CONFIG


class _Keys(anywidget.AnyWidget):
    """Keeps the keys that are pressed in an explorer there: JupyterLab takes a focused list's arrows for its own."""

    _esm = """
    function render({ el }) {
      let waiting = requestAnimationFrame(function attach() {
        const explorer = el.closest(".clipshift-explorer");
        if (explorer) explorer.addEventListener("keydown", (event) => event.stopPropagation());
        else waiting = requestAnimationFrame(attach);
      });
      return () => cancelAnimationFrame(waiting);
    }
    export default { render };
    """


def live(figure: go.Figure) -> go.FigureWidget:
    """The figure as a widget, without plotly's bar of buttons."""
    widget = go.FigureWidget(figure)
    widget._config = CONFIG | {"displayModeBar": False}  # plotly has no public way to it
    return widget


class Explorer(ipywidgets.VBox):
    """Controls on the left, figures on the right, the answer below.

    Subclasses make their controls and figures, call this, and have `answer` and `static`.
    controls, shown: in reading order.  watched: the controls whose value is asked about; a change of any asks anew.
    """

    def __init__(
        self,
        controls: Sequence[ipywidgets.Widget],
        shown: Sequence[ipywidgets.Widget],
        *,
        watched: Sequence[ipywidgets.Widget],
    ):
        self.said, self.trouble = ipywidgets.HTML(), ipywidgets.HTML()
        self.said.add_class("clipshift-said")
        self.trouble.add_class("clipshift-trouble")
        left = ipywidgets.VBox(list(controls), layout={"width": "300px", "flex": "0 0 auto"})
        right = ipywidgets.VBox(list(shown), layout={"flex": "1 1 auto"})
        super().__init__([ipywidgets.HBox([left, right]), self.said, self.trouble, _Keys()])
        self.add_class("clipshift-explorer")
        self.seconds = 0.0
        """How long the last answer took."""
        for control in watched:
            control.observe(lambda change: self.ask(), names="value")
        self.ask()

    def ask(self) -> None:
        """Answer what the controls ask. What goes wrong is said below the figures, which stay as they were."""
        began = time.perf_counter()
        try:
            self.said.value, self.trouble.value = f"<p>{self.answer()}</p>", ""
        except Exception as error:  # a kernel callback has no one else to tell
            self.trouble.value = f"<p><b>That did not work.</b> {html.escape(f'{type(error).__name__}: {error}')}</p>"
        self.seconds = time.perf_counter() - began

    def answer(self) -> str:
        """Change the figures to what the controls ask for, and say it in a sentence of HTML."""
        raise NotImplementedError

    def static(self) -> go.Figure:
        """The default state as a plain figure."""
        raise NotImplementedError
