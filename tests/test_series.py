"""The whole series on a folder of photographs, as a user would run it on her own: some of the files are damaged."""

import json
import shutil

import pandas as pd
import pytest
import skimage.data
from PIL import Image
from rich.console import Console

from clipshift_core import profiles
from clipshift_core.reproduce import overrides_from, run

NOTEBOOKS = sorted(path.stem for path in (profiles.ROOT / "notebooks").glob("[0-9]*.py"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("some photos")
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.jpg", quality=95)
    (folder / "cut off.jpg").write_bytes((folder / "coffee.jpg").read_bytes()[:9000])
    (folder / "empty.png").touch()
    overrides = overrides_from(["n_bootstrap=200"], "demo", {"images": str(folder)})
    result = run("demo", overrides, console=Console(quiet=True))
    yield result
    shutil.rmtree(result.profile.run_dir)


def test_every_notebook_ran_in_a_folder_of_its_own(finished):
    assert sorted(finished.executed) == NOTEBOOKS
    assert finished.profile.run_dir.name == "demo-some-photos0"
    assert finished.profile.run_dir != profiles.ROOT / "runs" / "demo"


def test_good_images_are_measured_and_bad_ones_set_aside_with_their_reason(finished):
    tables = finished.profile.run_dir / "tables"
    shifts = pd.read_csv(tables / "02-shifts.csv")
    assert sorted(shifts["image_id"].unique()) == ["astronaut", "chelsea", "coffee"] and len(shifts) == 27
    assert shifts["l2"].gt(0).all() and shifts["cosine"].between(-1, 1).all()
    aside = pd.read_csv(tables / "01-set-aside.csv").set_index("path")["reason"]
    assert sorted(aside.index) == ["cut off.jpg", "empty.png"] and aside.str.len().gt(3).all()


def test_what_needs_known_factors_is_left_out_by_name(finished):
    folder = finished.profile.run_dir
    assert not list((folder / "figures").glob("00-zero-shot*"))
    assert (folder / "figures" / "02-ranking.html").exists()
    notebook = json.loads((folder / "notebooks" / "00_start_here.ipynb").read_text())
    assert "Left out: the images of this run come without known factors" in json.dumps(notebook)
