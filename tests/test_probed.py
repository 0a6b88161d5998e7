"""The probes of one model: every split seen once, by the encoder's own numbers; shares that are shares."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from clipshift_core import audit, biased, exam, profiles, scenes
from clipshift_core.audit import Audit
from clipshift_core.dictionaries import Dictionaries
from clipshift_core.probed import Probed
from clipshift_core.profiles import Profile
from clipshift_core.workbench import Workbench


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles.Profile, "run_dir", property(lambda self: folder / self.name))
        for name, value in (("N_TRAIN", 88), ("N_VALIDATE", 22), ("N_TEST", 33), ("STRENGTHS", (0.5, 0.9))):
            patch.setattr(biased, name, value)
        patch.setattr(audit, "N_SCENES", 20)
        chosen = Profile.load("demo", {"n_probe": 110, "n_bootstrap": 100})
        yield Probed(Audit(Dictionaries(Workbench("12", chosen))))


def test_every_split_is_what_the_encoder_makes_of_its_scenes(probed):
    encoder = probed.audit.dictionaries.bench.encoder
    for name in ("reversed", ("train", 0.9)):
        drawn = probed.splits[name][:12]
        wanted = exam.embed(encoder, np.stack([scenes.render(scene, encoder.image_size) for scene in drawn]))
        torch.testing.assert_close(probed.embeddings[name][:12], wanted, atol=2e-6, rtol=0)
    assert {len(x) for name, x in probed.embeddings.items() if name in biased.SPLITS} == {33}


def test_probes_are_trained_on_their_own_words(probed):
    reader, x = probed.readers[0.9], probed.embeddings
    y = [scene.word for scene in biased.draw(88, strength=0.9, first_seed=biased.FIRST_TO_TRAIN)]
    oracle = LogisticRegression(C=reader.C, max_iter=5000).fit(x["train", 0.9].numpy(), y)
    assert (oracle.predict(x["balanced"].numpy()) == reader.predict(x["balanced"])).all()
    right = probed.answers.probe[0.9]["balanced"]
    assert (right == (oracle.predict(x["balanced"].numpy()) == np.array(probed.truth))).all() and right.mean() > 0.7
    assert set(probed.answers.probe) == {0.5, 0.9}


def test_text_is_the_zero_shot_reader_of_these_words(probed):
    encoder = probed.audit.dictionaries.bench.encoder
    texts = encoder.classifier([scenes.article(word) for word in biased.WORDS], scenes.KIND_TEMPLATES)
    called = np.array(biased.WORDS)[(probed.embeddings["aligned"] @ texts.T).argmax(1)]
    assert (probed.answers.text["aligned"] == (called == probed.truth)).all()


def test_shares_fall_on_the_latents_that_cues_turn_up(probed):
    assert probed.spurious.shape == (1024,) and 0 < probed.spurious.sum() < 60
    share = probed.share(probed.text)
    assert share.shape == (33,) and ((share >= 0) & (share <= 1)).all() and share.max() > 0
    codes = probed.states["balanced"].codes
    touched = (torch.from_numpy(probed.spurious)[codes.indices] & (codes.values != 0)).any(1).numpy()
    assert (share[~touched] == 0).all()


def test_named_rightly_over_all_words(probed):
    called = np.array(scenes.WORDS)[(probed.audit.embeddings @ probed.audit.asked.texts.T).argmax(1)]
    images = probed.audit.dictionaries.probe.images
    assert (probed.words == images["word"]).all()
    assert (probed.right == (called == images["word"].to_numpy())).all() and probed.right.mean() > 0.85
