"""The lesion study of a run: the embeddings are the encoder's, a folder goes the same way, what is missing is said."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_isic import folder  # noqa: F401  (a fixture)

from clipshift_core import lesion_study, lesions, profiles
from clipshift_core.dictionaries import Dictionaries
from clipshift_core.lesion_case import Case
from clipshift_core.profiles import Profile
from clipshift_core.workbench import Workbench

SIZES = {"train": 60, "valid": 20, "biased": 30, "balanced": 40, "reversed": 20}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The lesion study of the demo, small, in a folder of its own."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles.Profile, "run_dir", property(lambda self: runs / self.name))
        patch.setattr(lesion_study.drawn, "__defaults__", (SIZES, lesion_study.FIRST))
        patch.setattr(lesion_study.world, "__defaults__", (SIZES,))
        patch.setattr(lesion_study.pairs, "__defaults__", (3, lesion_study.FIRST_PAIR, tuple(lesion_study.SIGNS)))

        def case(**overrides):
            return Case(Dictionaries(Workbench("12", Profile.load("demo", {"n_bootstrap": 100} | overrides))))

        yield case


def test_embeddings_and_tokens_are_the_encoders(opened):
    case = opened()
    _, drawn = lesion_study.drawn()
    encoder = case.dictionaries.bench.encoder
    pixels = np.stack([lesions.render(lesion, encoder.image_size) for lesion in drawn[:8]])
    found = encoder.encode(pixels, capture=["token.4"])
    torch.testing.assert_close(case.images.embeddings[:8], found.embedding, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.images.tokens[:8], found.captured["token.4"], atol=1e-5, rtol=1e-5)
    assert case.images.table["split"].value_counts().to_dict() == SIZES


def test_the_drawn_study_from_end_to_end(opened):
    case = opened()
    assert case.left_out == "" and case.no_dictionary == "" and case.split == "balanced"
    assert set(case.study.accuracy["reader"]) == {"probe", "text"}
    assert case.spliced.sae.n_latents == 512
    effects = case.effects()
    assert set(effects["artefact"]) == set(case.turned()["artefact"]) == set(lesion_study.SIGNS)
    assert case.latents.split == "balanced" and set(case.suppressed()["deleted"]) >= {"none", "artefacts", "random"}


def test_a_folder_of_lesions_with_a_dictionary_of_its_own(opened, folder):  # noqa: F811
    case = opened(lesions=str(folder), sae_lesions=None, sae_latents=64, sae_k=8, sae_epochs=1)
    assert len(case.found.manifest.set_aside) == 3 and case.split == "test" and not case.images.planted
    assert case.no_dictionary == "" and case.spliced.sae.n_latents == 64
    assert set(case.latents.factors["factor"]) == {*case.images.artefacts, "malignant"}
    assert case.study.accuracy["split"].unique().tolist() == ["test"]


def test_other_images_without_lesions_are_left_out(opened, tmp_path):
    (tmp_path / "a.png").touch()
    case = opened(source=str(tmp_path))
    case.dictionaries.bench.__dict__["manifest"] = SimpleNamespace(images=pd.DataFrame())
    assert "key `lesions`" in case.left_out
