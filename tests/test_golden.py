"""Numbers of the demo that must not move: 24 images of the shipped sample through the shipped model."""

import pytest

from clipshift_core import manifests, profiles, shift, stats
from clipshift_core.encoder import Encoder
from clipshift_core.profiles import Profile


@pytest.fixture(scope="module")
def shifts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        chosen = Profile.load("demo", {"n_images": 24, "batch_size": 12, "precision": "fp32", "device": "cpu"})
        source, model = chosen.source_path, chosen.model_dir
        monkeypatch.setattr(profiles, "ROOT", tmp_path_factory.mktemp("golden"))
        manifest = manifests.build(source, n_images=24, seed=0)
        yield shift.table(shift.measure(chosen, manifest, Encoder.load(str(model)), base=source))


def test_shift_of_each_image_and_augmentation(shifts, dataframe_regression):
    # Another processor or another torch moves a float32 embedding in the sixth digit.
    dataframe_regression.check(shifts, default_tolerance={"rtol": 2e-4, "atol": 2e-5})


def test_means_and_intervals(shifts, dataframe_regression):
    summary = stats.bootstrap_table(shifts, "l2", n_resamples=500, seed=0)
    dataframe_regression.check(summary, default_tolerance={"rtol": 2e-4, "atol": 2e-5})
