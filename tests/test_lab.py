"""The explorers as a person uses them: JupyterLab by `make lab`, in headless Chromium driven by Playwright."""

import json
import os
from pathlib import Path

import jupytext
import lab
import nbformat
import pytest
from PIL import Image
from playwright import sync_api as playwright

from clipshift_core import canvas
from clipshift_core.profiles import ROOT

pytestmark = pytest.mark.browser

TOY = """
import ipywidgets, plotly.graph_objects as go
from clipshift_core.explore import Explorer

class Toy(Explorer):
    def __init__(self):
        self.height = ipywidgets.IntSlider(3, 0, 9, description="Height")
        self.name = ipywidgets.Text("bars", description="Name", continuous_update=False)
        self.last = ipywidgets.Checkbox(True, description="Last")
        self.colour = ipywidgets.Dropdown(options=["grey", "teal"], description="Colour")
        self.figure = go.FigureWidget(go.Bar(x=["a", "b", "c"]), {"width": 500, "height": 300})
        controls = [self.height, self.name, self.last, self.colour]
        super().__init__(controls, [self.figure], watched=controls)

    def answer(self):
        if self.name.value == "nothing":
            raise ValueError("no bar is named nothing")
        with self.figure.batch_update():
            self.figure.data[0].y = [1, 2, self.height.value if self.last.value else 0]
            self.figure.data[0].marker.color = self.colour.value
        return f"{self.name.value}: {self.height.value}, {self.colour.value}, {self.last.value}"
"""


FEW = {"n_images": 24, "n_probe": 100, "n_bootstrap": 100}
ELSEWHERE = """
import pathlib
from clipshift_core.profiles import Profile
Profile.run_dir = property(lambda profile: pathlib.Path("run").resolve())
""".strip()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=canvas.find_browser()[0])
        yield started
        started.close()


@pytest.fixture(scope="module")
def running(browser, tmp_path_factory):
    with lab.started(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture(scope="module")
def new_page(browser):
    def new_page():
        page = browser.new_page(viewport={"width": 1600, "height": 1100})
        page.set_default_timeout(lab.SECONDS * 1000)
        return page

    return new_page


@pytest.fixture(scope="module")
def keep(tmp_path_factory):
    """Saves a screenshot under a name, and beside it how long an explorer's answers took."""
    folder = Path(os.environ.get("CLIPSHIFT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)

    def keep(page, name, explorer=None):
        page.screenshot(path=folder / f"{name}.png")
        if explorer:
            (folder / f"{name}.json").write_text(json.dumps({"milliseconds": explorer.milliseconds}))

    return keep


@pytest.fixture(scope="module")
def explorers(running, new_page):
    """The notebook of the explorers, run on few images; its run leaves nothing in runs/."""
    node = jupytext.read(ROOT / "notebooks" / "14_explorers.py", fmt="py:percent")
    parameters = next(cell for cell in node.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = f"{ELSEWHERE}\n{parameters.source}\noverrides = {FEW}"
    done = lab.write(running.folder / "explorers.ipynb", node)
    book = lab.Notebook(new_page(), running.address("explorers.ipynb"))
    book.run_all(done)
    return book


def test_make_lab_opens_the_start_page(running, new_page, keep):
    page = new_page()
    page.goto(running.opened())
    page.wait_for_url(f"{running.url}lab/tree/00_start_here.ipynb")
    playwright.expect(page.get_by_role("heading", name="00 Start here")).to_be_visible()
    listed = page.locator(".jp-DirListing-itemText")
    playwright.expect(listed.filter(has_text="01_dataset_sampling.ipynb")).to_be_visible()
    keep(page, "start-page")
    page.close()


def test_a_toy_answers_says_what_went_wrong_and_is_heard(running, new_page, keep):
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (TOY.strip(), "Toy()")])
    done = lab.write(running.folder / "toy.ipynb", node)
    book = lab.Notebook(new_page(), running.address("toy.ipynb"))
    book.run_all(done)
    toy = book.explorer("Height")
    assert toy.said() == "bars: 3, grey, True"
    pictures = toy.seen()
    toy.press("Height", "ArrowRight", "ArrowRight")
    pictures = toy.moved(pictures)
    toy.choose("Colour", "teal")
    pictures = toy.moved(pictures)
    toy.press("Last", "Space")
    pictures = toy.moved(pictures)
    toy.write("Name", "columns")
    assert toy.said() == "columns: 5, teal, False" and toy.trouble() == ""
    assert lab.changed(pictures, toy.seen()) == 0
    keep(book.page, "toy", toy)
    toy.write("Name", "nothing", said=".clipshift-trouble")
    assert "no bar is named nothing" in toy.trouble() and toy.said() == "columns: 5, teal, False"
    assert book.errors == []
    book.page.evaluate("console.error('heard'); setTimeout(() => { throw new Error('thrown') })")
    lab.wait_until(lambda: book.page.wait_for_timeout(50) or len(book.errors) == 2, "an error was not heard")
    assert "heard" in book.errors[0] and "thrown" in book.errors[1]
    book.page.close()


def test_a_dropdown_keeps_its_keys(explorers):
    shift = explorers.explorer("Severity")
    chosen = []
    for key in ("ArrowDown", "ArrowUp"):
        shift.control("Augmentation").press(key)
        explorers.page.wait_for_timeout(1000)
        chosen.append(shift.chosen("Augmentation"))
    assert chosen == ["Gaussian blur", "Gaussian noise"]


def test_the_shift_explorer(explorers, keep, tmp_path):
    shift = explorers.explorer("Severity")
    first = shift.said()
    assert first.startswith("Gaussian noise at severity 1.0")
    pictures = shift.seen()
    shift.press("Severity", "ArrowRight", "ArrowRight")
    assert shift.said().startswith("Gaussian noise at severity 1.2")
    pictures = shift.moved(pictures)
    shift.choose("Augmentation", "Colour jitter")
    assert shift.said().startswith("Colour jitter at severity 1.2")
    pictures = shift.moved(pictures)
    shift.choose("Image", 1)
    pictures = shift.moved(pictures)
    keep(explorers.page, "shift", shift)
    Image.linear_gradient("L").save(tmp_path / "mine.png")
    shift.upload("Upload an image", tmp_path / "mine.png")
    shift.moved(pictures)
    assert shift.chosen("Image") == "Uploaded: mine.png"
    assert shift.trouble() == ""
    keep(explorers.page, "shift-uploaded", shift)
    (tmp_path / "none.png").write_text("no image")
    shift.upload("Upload an image", tmp_path / "none.png", said=".clipshift-trouble")
    assert "none.png cannot be read" in shift.trouble()
    assert explorers.errors == []


def test_the_component_explorer(explorers, keep):
    components = explorers.explorer("Sort by")
    pictures = components.seen()
    components.choose("Latents", 1)
    pictures = components.moved(pictures)
    components.choose("Sort by", "Frequency")
    pictures = components.moved(pictures)
    components.write("Search", "cat")
    assert ": cat" in components.said()
    components.moved(pictures)
    components.write("Search", "no such label")
    assert components.said().startswith("No latent") and components.trouble() == ""
    components.write("Search", "duck")
    keep(explorers.page, "components", components)
    assert explorers.errors == []


def test_the_attribution_explorer(explorers, keep):
    attribution = explorers.explorer("Prompt")
    pictures = attribution.seen()
    attribution.write("Prompt", "a duck")
    assert "with “a duck”" in attribution.said()
    pictures = attribution.moved(pictures)
    attribution.press("delete latent", "Space")
    assert "without the ticked component" in attribution.said()
    pictures = attribution.moved(pictures)
    keep(explorers.page, "attribution", attribution)
    attribution.choose("Method", 1)
    pictures = attribution.moved(pictures)
    attribution.press("delete latent", "Space")
    attribution.after(attribution.root.get_by_role("button", name="Delete none").click)
    assert "without" not in attribution.said()
    attribution.write("Prompt", " ")
    assert "The prompt is empty" in attribution.said() and attribution.trouble() == ""
    assert explorers.errors == []
