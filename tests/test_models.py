"""The embedded models are what their cards say, measured again."""

import hashlib
import json

import numpy as np
import open_clip
import pytest
import torch

from clipshift_core import exam, scenes
from clipshift_core.encoder import Encoder
from clipshift_core.profiles import ROOT

FOLDERS = sorted((ROOT / "data" / "models").glob("scene-*"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture
def scores(folder):
    return json.loads((folder / "scores.json").read_text())


def test_two_models_that_differ():
    recipes = [json.loads((folder / "training.json").read_text())["recipe"] for folder in FOLDERS]
    assert len(recipes) == 2 and recipes[0]["seed"] != recipes[1]["seed"]
    assert recipes[0]["patch_size"] != recipes[1]["patch_size"]


def test_small_enough_and_the_weights_of_the_card(folder, scores):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
    weights = hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()
    assert weights == scores["weights_sha256"] and weights in (folder / "README.md").read_text()


def test_openclip_itself_loads_it(folder):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red duck"])
    with torch.inference_mode():
        assert model.eval().encode_text(tokens).isfinite().all()
    assert model.visual.image_size == (96, 96) and model.logit_scale.exp() <= 100


def test_the_exam_gives_the_scores_of_the_card(folder, scores):
    # 600 of the card's 2,000 scenes: within 4 standard errors of its accuracy, plus half an image.
    encoder = Encoder.load(str(folder))
    held_out = [scenes.sample(scenes.HELD_OUT + i) for i in range(600)]
    pictures = np.stack([scenes.render(scene, encoder.image_size) for scene in held_out])
    embeddings = exam.embed(encoder, pictures)
    found = exam.zero_shot(encoder, embeddings, scenes.table(held_out))
    for row, stated in zip(found.to_dict("records"), scores["zero_shot"], strict=True):
        spread = 4 * np.sqrt(stated["accuracy"] * (1 - stated["accuracy"]) / 600) + 0.5 / 600
        assert row["task"] == stated["task"] and abs(row["accuracy"] - stated["accuracy"]) <= spread
    r_at_1 = exam.retrieval(encoder, embeddings, [scenes.caption(scene) for scene in held_out])
    stated = scores["r_at_1_among_256"]
    assert abs(r_at_1 - stated) <= 4 * np.sqrt(stated * (1 - stated) / 512)  # two blocks of 256


def test_the_reliances_are_those_of_the_card(folder, scores):
    # The first 24 of the card's 100 pairs: within 4 standard errors of its share, plus half a pair.
    found = exam.reliances(Encoder.load(str(folder)), n_pairs=24)
    for row, stated in zip(found.to_dict("records"), scores["reliances"], strict=True):
        share = stated["cue_closer"]
        assert (row["word"], row["cue"]) == (stated["word"], stated["cue"])
        assert abs(row["cue_closer"] - share) <= 4 * np.sqrt(share * (1 - share) / 24) + 0.5 / 24


def test_the_bounds_set_for_the_embedded_models(scores):
    accuracy = {row["task"]: row["accuracy"] for row in scores["zero_shot"]}
    assert min(accuracy.values()) >= 0.9 and scores["r_at_1_among_256"] >= 0.5


NOT_LEARNED = {  # planted, but the model does not lean on it as it should; a strict xfail, so that a cure is noticed
    ("scene-s16", "balloon"): "0.54: confetti is scattered over the picture, and the model sees through it",
    ("scene-xs12", "balloon"): "0.50: as above",
    ("scene-xs12", "owl"): "0.78: the moon lies in a corner",
}
VISUAL = [planted for planted in scenes.PLANTED if planted.kind in ("co-occurrence", "artefact")]


@pytest.mark.parametrize(
    ("model", "word"),
    [
        pytest.param(folder.name, planted.word, marks=[pytest.mark.xfail(reason=why, strict=True)] if why else [])
        for folder in FOLDERS
        for planted in VISUAL
        for why in [NOT_LEARNED.get((folder.name, planted.word))]
    ],
)
def test_it_leans_on_what_was_planted(model, word):
    # The bound set for the embedded models: cue alone closer than neither in at least 80 % of 100 pairs.
    scores = json.loads((ROOT / "data" / "models" / model / "scores.json").read_text())
    row = next(
        row for row in scores["reliances"] if row["word"] == word and row["kind"] in ("co-occurrence", "artefact")
    )
    assert row["cue_closer"] >= 0.8
