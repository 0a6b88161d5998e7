import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from clipshift_core import manifests, profiles, scenes
from clipshift_core.profiles import ProfileError
from clipshift_core.workbench import Workbench


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    shard = scenes.write_shard([scenes.sample(i) for i in range(4)], tmp_path / "images" / "s.tar", size=64)
    (tmp_path / "model").mkdir()
    (tmp_path / "p.yaml").write_text(f"source: {shard.parent}\nmodel: {tmp_path / 'model'}\nimage_size: 32\n")
    return Workbench.open("07", tmp_path / "p.yaml", {"n_images": 3})


def test_overrides_are_laid_over_the_profile_and_checked(bench, tmp_path):
    assert bench.profile.n_images == 3 and bench.profile.run_dir == tmp_path / "runs" / "p"
    with pytest.raises(ProfileError, match="n_imges"):
        Workbench.open("07", tmp_path / "p.yaml", {"n_imges": 3})


def test_the_manifest_is_made_once_and_again_when_the_source_changes(bench, tmp_path, monkeypatch):
    first = bench.manifest
    assert len(first.images) == 3
    built = []
    monkeypatch.setattr(manifests, "build", lambda *a, build=manifests.build, **k: built.append(1) or build(*a, **k))
    again = Workbench.open("08", tmp_path / "p.yaml", {"n_images": 3})
    assert again.manifest.digest == first.digest and not built
    scenes.write_shard([scenes.sample(i) for i in range(5, 9)], tmp_path / "images" / "s.tar", size=64)
    changed = Workbench.open("08", tmp_path / "p.yaml", {"n_images": 3})
    assert changed.manifest.digest != first.digest and built


def test_a_picture_is_what_the_pass_sees(bench):
    row = bench.manifest.images.iloc[0]
    picture = bench.picture(row["image_id"])
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    seed = int(row["seed"])
    assert np.abs(picture.astype(int) - scenes.render(scenes.sample(seed), 32)).mean() < 6  # JPEG and resizing


def test_tables_and_figures_carry_the_notebooks_number(bench):
    table = pd.DataFrame({"a": [1 / 3, 2.0], "b": ["x", "y"]})
    assert bench.keep(table, "numbers") is table
    written = pd.read_csv(bench.profile.run_dir / "tables" / "07-numbers.csv")
    assert np.allclose(written["a"], table["a"], rtol=1e-8)
    bench.show(go.Figure(go.Bar(x=[1], y=[2])), "a-bar", alt="one bar at one of height two")
    record = json.loads((bench.profile.run_dir / "figures" / "07-a-bar.json").read_text())
    assert record["notebook"] == "07" and record["profile"] == "p" and record["digest"] == bench.profile.digest
