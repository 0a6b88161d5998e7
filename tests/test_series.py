"""The whole series on a user's own images: three photographs among damaged files, and a single one."""

import json
import shutil

import pandas as pd
import pytest
import skimage.data
from PIL import Image
from rich.console import Console

from clipshift_core import claims, ledger, profiles
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


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One photograph, with a caption and classes of its owner's, for a model that no dictionary fits."""
    folder = tmp_path_factory.mktemp("single")
    (folder / "photo").mkdir()
    Image.fromarray(skimage.data.chelsea()).save(folder / "photo" / "chelsea.png")
    (folder / "captions.csv").write_text("file,caption\nchelsea.png,a <b>tabby</b> cat & her whiskers\n")
    (folder / "classes.txt").write_text("cat\nduck\nboat\n")
    given = {"images": folder / "photo", "captions": folder / "captions.csv", "classes": folder / "classes.txt"}
    given |= {"model": profiles.ROOT / "data" / "models" / "scene-xs12"}
    overrides = overrides_from(["n_bootstrap=100", "vocabulary=world"], "demo", {k: str(v) for k, v in given.items()})
    result = run("demo", overrides, console=Console(quiet=True))
    yield result
    shutil.rmtree(result.profile.run_dir)


@pytest.mark.slow
def test_one_image_is_enough(single):
    assert sorted(single.executed) == NOTEBOOKS
    tables = single.profile.run_dir / "tables"
    assert pd.read_csv(tables / "01-manifest.csv")["caption"].tolist() == ["a <b>tabby</b> cat & her whiskers"]
    labels = pd.read_csv(tables / "01-labels.csv")
    assert len(labels) == 1 and labels["label"].isin(["cat", "duck", "boat"]).all()
    assert labels["probability"].between(1 / 3, 1).all()


@pytest.mark.slow
def test_of_one_image_no_claim_is_decided_and_every_row_says_why(single):
    found = claims.read(single.profile.run_dir / "claims.csv").set_index("claim")
    assert set(found.index) == set(ledger.MEANINGS) | set(ledger.SAME)
    assert found["verdict"].eq("not testable here").all()
    without_dictionary = found.loc[[name for name in found.index if name[:2] in ("B1", "B2", "B3")], "statistic"]
    assert without_dictionary.str.startswith("Left out: ").all() and without_dictionary.str.contains("1, of at").any()


@pytest.mark.slow
def test_a_users_markup_is_text(single):
    page = (single.profile.run_dir / "figures" / "00-images.html").read_text()
    # plotly's json writes these four signs as numbers
    for code, sign in (("\\u0026", "&"), ("\\u003c", "<"), ("\\u003e", ">"), ("\\u002f", "/")):
        page = page.replace(code, sign)
    assert "&lt;b&gt;tabby&lt;/b&gt; cat &amp; her" in page and "<b>tabby" not in page
