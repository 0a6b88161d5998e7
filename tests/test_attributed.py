"""Attribution over a run's images: one image taken apart, and the methods over several batches."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from clipshift_core import attributed, dictionaries, profiles, scenes
from clipshift_core.attribution import METHODS
from clipshift_core.dictionaries import Dictionaries
from clipshift_core.workbench import Workbench


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("run")
        patch.setattr(profiles.Profile, "run_dir", property(lambda self: folder))
        chosen = profiles.Profile.load("demo", {"n_probe": 70, "n_images": 20, "device": "cpu", "precision": "fp32"})
        yield Dictionaries(Workbench("09", chosen))


def test_one_image_is_taken_apart(run):
    one = attributed.one_image(run)
    table = run.probe.images
    planted = {(p.word, p.cue) for p in scenes.PLANTED if p.kind == "co-occurrence"}
    index = next(
        i for i, row in enumerate(table.itertuples()) if any((row.word, c) in planted for c in row.cues.split("; "))
    )
    assert np.array_equal(one.picture, run.probe.source.read(index)) and one.text == table["word"][index]
    assert one.contributions["value"].is_monotonic_decreasing and len(one.contributions) == run.used.sae.k
    # the cosine again, by the encoder and OpenCLIP's classifier alone
    encoder = run.bench.encoder
    text = encoder.classifier([scenes.article(one.text)], scenes.KIND_TEMPLATES)[0]
    embedding = encoder.encode(one.picture[None]).embedding[0]
    assert one.total == pytest.approx(float(torch.cosine_similarity(embedding, text, dim=0)), abs=1e-5)
    # deleting the strongest latent, by hand
    sae, row = run.used.sae, one.contributions.iloc[0]
    x = encoder.encode(one.picture[None], capture=["token.-1"]).captured["token.-1"]
    with torch.no_grad():
        dense = sae.encode(x).dense(sae.n_latents)[0]
        visual = encoder.model.visual
        without = visual.ln_post(x[0] - dense[int(row["latent"])] * sae.W_dec[int(row["latent"])]) @ visual.proj
    assert row["exact"] == pytest.approx(one.total - float(torch.cosine_similarity(without, text, dim=0)), abs=1e-5)
    assert all(len(few) <= 3 for few in one.examples) and any(one.examples)  # of 70 images
    assert len(one.examples) == len(one.contributions)


def test_batches_do_not_matter(run, monkeypatch):
    whole = attributed.attributed(run, run.used, n_images=70)
    assert whole.curves.methods == tuple(METHODS) and whole.curves.none.shape == (70,)
    assert whole.agreement.methods == tuple(m for m in METHODS if m != attributed.EXACT)
    assert whole.n_units == pytest.approx(16, abs=0.01) and np.abs(whole.gap).max() < 1e-4
    monkeypatch.setattr(dictionaries.Activations, "in_order", in_small_batches(dictionaries.Activations.in_order))
    parts = attributed.attributed(run, run.used)
    np.testing.assert_allclose(parts.curves.deletion, whole.curves.deletion, atol=1e-5)
    np.testing.assert_allclose(parts.agreement.rho, whole.agreement.rho, atol=1e-9)


def test_a_class_of_one_image_is_that_image(run):
    """Where no two images share a word, the order over a class is the image's own."""
    whole = attributed.attributed(run, run.used)
    words = run.probe.images["word"]
    alone = (~words.duplicated(keep=False)).to_numpy()
    assert alone.any() and not alone.all()
    by_class = attributed.attributed_by_class(run, run.used)
    np.testing.assert_allclose(by_class.every, whole.curves.every, atol=1e-5)
    for method, mine, own in zip(by_class.methods, by_class.deletion, whole.curves.deletion, strict=True):
        if method != "random":  # scores of equal latents may come in another order
            np.testing.assert_allclose(mine[alone], own[alone], atol=1e-4, err_msg=method)
    assert np.abs(by_class.deletion[0][~alone] - whole.curves.deletion[0][~alone]).max() > 1e-3


def in_small_batches(in_order):
    return lambda self, batch_size=4096: in_order(self, 32)


def test_the_run_is_told_what_it_is_asked(run):
    table = run.probe.images
    asked = run.asked(table, torch.zeros(len(table), 128))
    assert [asked.words[i] for i in asked.index.tolist()] == table["word"].tolist()
    other = Dictionaries(SimpleNamespace(**{**vars(run.bench), "manifest": SimpleNamespace(images=pd.DataFrame())}))
    assert not other.drawn
