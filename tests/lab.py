"""JupyterLab in headless Chromium, used as a person uses it: what the tests of the explorers stand on.

JupyterLab is started by the recipe of `make lab`, on a copy of notebooks/, so that nothing committed is written to.
"""

import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import nbformat
import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from clipshift_core.profiles import ROOT
from clipshift_core.series import KERNELSPEC

SECONDS = 120
"""The longest anything may take: a kernel has to start, and to import torch."""

TOO_SLOW = "[anywidget] Failed to initialize model."
"""Anywidget gives a widget two seconds to load; on a busy machine plotly's 5 MB can take longer, and the figure then
hears of no change. A person would run the cells again, and so do we, once."""

expect.set_options(timeout=SECONDS * 1000)


def recipe() -> list[str]:
    """The command of `make lab`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    shown = subprocess.run(["make", "-n", "lab"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    (line,) = (line for line in shown.stdout.splitlines() if "jupyter lab" in line)
    return shlex.split(line.replace(".venv/bin/python", sys.executable))


def write(path: Path, node: nbformat.NotebookNode) -> Path:
    """Write a notebook without its outputs; returns the file that its last cell will write."""
    done = path.with_suffix(".done")
    node.cells.append(nbformat.v4.new_code_cell(f"open({done.name!r}, 'w').close()"))
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    node.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC})
    nbformat.write(node, path)
    return done


class Lab:
    """A running JupyterLab.  folder: what it serves.  url: where, with a slash at the end."""

    def __init__(self, folder: Path, url: str, opened: Path):
        self.folder, self.url, self._opened = folder, url, opened

    def opened(self) -> str:
        """What it had the user's browser open."""
        wait_until(lambda: self._opened.exists() and self._opened.read_text().endswith("\n"), "no browser was opened")
        return self._opened.read_text().strip()

    def address(self, name: str) -> str:
        """Of a notebook, in a workspace of its own."""
        return f"{self.url}lab/workspaces/{Path(name).stem}/tree/{name}"


@contextmanager
def started(folder: Path) -> Iterator[Lab]:
    """`make lab` in an empty folder, with a browser that only notes what it is told to open. Ended whatever happens.

    Raises RuntimeError, with what JupyterLab said, if it does not answer.
    """
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    shutil.copy(ROOT / "jupytext.toml", folder)
    noted, browser = folder / "opened", folder / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" >{shlex.quote(str(noted))}\n')
    browser.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*recipe(), "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += ["--IdentityProvider.token=", "--log-level=WARN"]
    log = folder / "lab.log"
    with log.open("w") as said:
        environment = os.environ | _of_its_own(folder / "jupyter") | {"BROWSER": f"{browser} %s"}
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}/"
    try:
        wait_until(lambda: server.poll() is not None or _answers(f"{url}api"), "JupyterLab does not answer")
        if server.poll() is not None:
            raise RuntimeError(f"{shlex.join(command)} ended: {log.read_text()}")
        yield Lab(folder / "notebooks", url, noted)
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _of_its_own(folder: Path) -> dict[str, str]:
    """The environment that keeps the user's settings out, and with them what they would change."""
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    # else it asks its makers for news
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    places |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    return {name: str(folder / place) for name, place in places.items()}


def _answers(url: str) -> bool:
    try:
        return urlopen(url, timeout=2).status == 200
    except OSError:
        return False


def wait_until(holds: Callable[[], bool], otherwise: str) -> None:
    """Raises RuntimeError if it does not come to hold."""
    end = time.monotonic() + SECONDS
    while not holds():
        if time.monotonic() > end:
            raise RuntimeError(f"{otherwise} within {SECONDS} s")
        time.sleep(0.05)


class Notebook:
    """A notebook in a page of the browser.  errors: what the console reported and what was thrown, all of it."""

    def __init__(self, page: Page, address: str):
        self.page, self.errors = page, []
        page.set_default_timeout(SECONDS * 1000)
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(address)
        # what else tells of the kernel says idle before there is one
        ready = page.locator("#jp-main-statusbar").get_by_text("| Idle")
        expect(ready).to_be_visible(timeout=SECONDS * 1000)

    def run_all(self, done: Path) -> None:
        """Run > Run All Cells, until the last cell has written `done`; once more where a widget came too slowly.

        Raises RuntimeError if the end is not reached.
        """
        for attempt in range(2):
            done.unlink(missing_ok=True)
            self.page.get_by_role("menuitem", name="Run", exact=True).click()
            self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            wait_until(done.exists, "the notebook did not come to its end")
            self.page.wait_for_timeout(2500)  # until the last widget has come, or is reported
            if attempt or not any(TOO_SLOW in error for error in self.errors):
                return
            self.errors.clear()

    def explorer(self, control: str) -> "Explored":
        """The explorer with a control of that description, once it has answered, scrolled into view."""
        named = self.page.get_by_text(control, exact=True)
        found = self.page.locator(".jp-OutputArea .clipshift-explorer").filter(has=named)
        self.page.locator(".jp-WindowedPanel-outer").first.hover()
        end = time.monotonic() + SECONDS
        while not found.count():  # cells out of view are not on the page at all
            self.page.mouse.wheel(0, 500)
            self.page.wait_for_timeout(200)
            if time.monotonic() > end:
                raise RuntimeError(f"no explorer with a control {control!r} within {SECONDS} s")
        found.scroll_into_view_if_needed()
        return Explored(found)


class Explored:
    """One explorer, as a person meets it. Each action waits until the sentence has changed.

    milliseconds: from each action until then, as the browser and Playwright see it.
    """

    def __init__(self, root: Locator):
        self.root, self.page, self.milliseconds = root, root.page, []
        expect(root.locator(".js-plotly-plot .main-svg").first).to_be_visible()
        expect(root.locator(".clipshift-said p")).to_be_visible()

    def control(self, description: str) -> Locator:
        """What takes the keyboard in the first control whose description begins so."""
        named = self.page.locator("label", has_text=re.compile(rf"^\s*{re.escape(description)}"))
        row = self.root.locator(".widget-inline-hbox").filter(has=named).first
        return row.locator("select, input:not([type=hidden]), .noUi-handle").first

    def chosen(self, description: str) -> str:
        """The words of what is chosen in a dropdown."""
        words = self.control(description).evaluate("select => select.selectedOptions[0].label")
        return words.replace("\xa0", " ")  # what ipywidgets makes of a space

    def said(self) -> str:
        return self.root.locator(".clipshift-said").inner_text()

    def trouble(self) -> str:
        return self.root.locator(".clipshift-trouble").inner_text()

    def seen(self) -> np.ndarray:
        """The pixels of the figures: uint8 (height, width, 3)."""
        shown = self.root.locator(":scope > .widget-hbox > .widget-vbox").nth(1)
        return np.asarray(Image.open(io.BytesIO(shown.screenshot())).convert("RGB"))

    def moved(self, before: np.ndarray) -> np.ndarray:
        """The pixels, once 1,000 of them are others than before. Raises RuntimeError if they stay."""
        wait_until(lambda: changed(before, self.seen()) > 1000, "the figures stay as they were")
        return self.seen()

    def choose(self, description: str, option: str | int) -> None:
        """By its words or its number."""
        which = {"index": option} if isinstance(option, int) else {"label": option}
        self.after(lambda: self.control(description).select_option(**which))

    def press(self, description: str, *keys: str) -> None:
        """Each key waits for its own answer."""
        for key in keys:
            self.after(lambda key=key: self.control(description).press(key))

    def write(self, description: str, text: str, *, said: str = ".clipshift-said") -> None:
        """Over what is there, then Enter."""
        self.control(description).press("ControlOrMeta+a")
        self.page.keyboard.type(text)
        self.after(lambda: self.page.keyboard.press("Enter"), said)

    def upload(self, button: str, path: Path, *, said: str = ".clipshift-said") -> None:
        with self.page.expect_file_chooser() as chooser:
            self.root.get_by_role("button", name=button).click()
        self.after(lambda: chooser.value.set_files(path), said)

    def after(self, action: Callable[[], object], said: str = ".clipshift-said") -> None:
        """Act, and wait until what is said there has changed."""
        where = self.root.locator(said)
        before, began = where.inner_text(), time.perf_counter()
        action()
        expect(where).not_to_have_text(before)
        self.milliseconds.append(round(1000 * (time.perf_counter() - began)))


def changed(before: np.ndarray, after: np.ndarray) -> int:
    """How many pixels changed; all of them where the size did."""
    return int((before != after).any(-1).sum()) if before.shape == after.shape else after[..., 0].size
