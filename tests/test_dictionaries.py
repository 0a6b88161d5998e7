"""Which images a dictionary sees, and that those which ship are what their cards say."""

import copy
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score

from clipshift_core import activations, attributed, dictionaries, profiles, sae_quality, scenes
from clipshift_core.activations import Source
from clipshift_core.audit import Audit
from clipshift_core.dictionaries import Dictionaries
from clipshift_core.encoder import Encoder
from clipshift_core.pretrain import RECIPES as MODELS
from clipshift_core.pretrain_sae import RECIPES, source
from clipshift_core.profiles import ProfileError
from clipshift_core.sae import SaeError
from clipshift_core.shifted import shifted
from clipshift_core.workbench import Workbench

FOLDER = profiles.ROOT / "data" / "models"


@pytest.fixture(scope="module")
def encoders():
    return {name: Encoder.load(str(FOLDER / name), device="cpu", precision="fp32") for name in MODELS}


@pytest.fixture
def open_run(monkeypatch, tmp_path):
    """A run of the demo in a folder of its own."""

    def opened(**overrides):
        chosen = profiles.Profile.load("demo", overrides)
        where = {key: getattr(chosen, key) for key in ("source", "model", *profiles.DICTIONARIES)}
        there = {key: value and str(profiles.ROOT / value) for key, value in where.items()}
        chosen = profiles.Profile.load("demo", overrides | there)
        monkeypatch.setattr(profiles.Profile, "run_dir", property(lambda self: tmp_path / self.name))
        return Dictionaries(Workbench("07", chosen))

    return opened


def test_scenes_to_learn_from_were_never_trained_on_and_never_looked_at(open_run):
    found = open_run(sae_scenes=300, n_probe=50)
    learned = {int(seed) for seed in found.learned_from.ids}
    looked_at = {int(seed) for seed in found.probe.source.ids}
    assert len(learned) == 300 and len(looked_at) == 50
    assert min(learned) >= max(recipe.n_scenes for recipe in MODELS.values())
    assert max(learned) < scenes.HELD_OUT <= min(looked_at)
    assert max(r.n_images for r in RECIPES.values()) + dictionaries.FIRST_TO_LEARN < scenes.HELD_OUT


def test_a_block_that_is_not_there_is_refused(open_run):
    assert open_run(sae_layer=-2).layer == 3
    with pytest.raises(ProfileError, match="sae_layer = 5: scene-s16 has blocks 0 to 4"):
        _ = open_run(sae_layer=5).layer


def test_own_images_are_split_without_overlap(open_run, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(120):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i:03}.png")
    found = open_run(source=str(folder), n_images=120, sae=None, sae_patches=None)
    learned, looked_at = set(found.learned_from.ids), set(found.probe.source.ids)
    assert (len(learned), len(looked_at)) == (108, 12) and not learned & looked_at
    assert list(found.probe.images["image_id"]) == list(found.probe.source.ids)
    given = open_run(source=str(folder), n_images=120)  # it has seen none of them
    assert len(given.probe.source.ids) == 120


def test_a_few_images_are_left_out_by_name(open_run, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
    assert open_run(source=str(folder)).left_out == "too few images to learn a dictionary from (3, of at least 100)"


def test_learned_once_then_read_and_refused_elsewhere(encoders, tmp_path):
    source = Source.of_scenes(range(200), 96)
    held = activations.stored(source, encoders["scene-s16"], -1, "class", tmp_path)
    settings = {"n_latents": 32, "k": 4, "n_epochs": 2, "seed": 0}
    places = {"folder": tmp_path / "sae", "checkpoint": tmp_path / "c.safetensors"}
    made = dictionaries.learn(held, **settings, **places)
    assert made.history["step"].iloc[-1] == made.recipe["n_steps"] - 1 == 2 * (200 // 32) - 1
    before = (places["folder"] / "sae.safetensors").stat().st_mtime_ns
    again = dictionaries.learn(held, **settings, **places)
    assert (places["folder"] / "sae.safetensors").stat().st_mtime_ns == before
    assert torch.equal(again.sae.W_enc, made.sae.W_enc)
    with pytest.raises(SaeError, match="holds a dictionary of k 4, wanted is 5"):
        dictionaries.learn(held, **settings | {"k": 5}, **places)
    read = dictionaries.read(places["folder"], encoders["scene-s16"])
    assert (read.origin.layer, read.origin.token) == (4, "class")
    for encoder, place in ((encoders["scene-xs12"], {}), (encoders["scene-s16"], {"token": "spatial"})):
        with pytest.raises(SaeError, match="wanted is"):
            dictionaries.read(places["folder"], encoder, **place)


def test_codes_come_image_by_image(encoders, tmp_path):
    held = activations.stored(Source.of_scenes(range(3), 96), encoders["scene-s16"], 3, "spatial", tmp_path)
    sae = dictionaries.read(FOLDER / "sae-scene-s16-patches", encoders["scene-s16"]).sae
    (codes,) = dictionaries.codes_of(sae, held)
    assert codes.indices.shape == (3, 36, sae.k)
    tokens = held.dataset()["activation"].values
    one = sae.encode(torch.from_numpy(tokens[2, 7:8]))
    assert codes.indices[2, 7].tolist() == one.indices[0].tolist()
    assert torch.allclose(codes.values[2, 7], one.values[0], atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_what_ships_is_as_good_as_its_card_says(name, encoders, tmp_path):
    recipe, card = RECIPES[name], (FOLDER / name / "README.md").read_text()
    encoder = encoders[recipe.model]
    learned = dictionaries.read(FOLDER / name, encoder, recipe.layer % encoder.n_blocks, recipe.token)
    assert learned.sae.settings == {"width": encoder.width, "n_latents": recipe.n_latents, "k": recipe.k}
    seeds = range(dictionaries.FIRST_TO_LOOK_AT, dictionaries.FIRST_TO_LOOK_AT + 500)
    held = activations.stored(
        source(recipe.world, seeds, encoder.image_size), encoder, recipe.layer, recipe.token, tmp_path
    )
    found = sae_quality.quality(learned.sae, held.in_order())
    stated = re.search(r"never on \|.*\n\|[-|]*\n\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", card)
    nmse, cosine, l0 = map(float, stated.groups())
    # 500 of its 4,000 scenes: the mean over them scatters by a few per cent
    assert found.nmse == pytest.approx(nmse, rel=0.1) and found.cosine == pytest.approx(cosine, abs=0.01)
    assert found.l0 == pytest.approx(l0, rel=0.05)


def test_predictions_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(60, 5, generator=generator)
    after = before + 0.7 * torch.randn(60, 5, generator=generator)
    texts = torch.nn.functional.normalize(torch.randn(4, 5, generator=generator), dim=1)
    truth = torch.randint(4, (60,), generator=generator)
    tasks = {"known": sae_quality.Task(texts, truth), "unknown": sae_quality.Task(texts, None)}
    table = sae_quality.predictions(before, after, tasks, n_resamples=200, seed=0).set_index("task")
    choices = [(each @ texts.T).argmax(1) for each in (before, after)]
    known = table.loc["known"]
    assert known["accuracy"] == pytest.approx(accuracy_score(truth, choices[0]))
    assert known["accuracy_after"] == pytest.approx(accuracy_score(truth, choices[1]))
    assert known["change"] == pytest.approx(known["accuracy_after"] - known["accuracy"])
    assert known["low"] <= known["change"] <= known["high"] and known["low"] < known["high"]
    assert known["same"] == pytest.approx(accuracy_score(*choices)) == table.loc["unknown", "same"]
    cosine = np.array([[float(torch.cosine_similarity(x, t, dim=0)) for t in texts] for x in before])
    assert known["similarity"] == pytest.approx(
        np.mean([row[t] for row, t in zip(cosine, truth, strict=True)]), abs=1e-6
    )
    assert table.loc["unknown", ["accuracy", "change", "similarity"]].isna().all()
    still = sae_quality.predictions(before, 3 * before, tasks, n_resamples=200, seed=0)
    assert still["same"].eq(1).all() and still["moved"].max() < 1e-6  # a length changes no cosine


def test_histories_and_recipes_ship(encoders):
    for name in RECIPES:
        history = pd.read_csv(FOLDER / name / "history.csv")
        assert history["step"].is_monotonic_increasing and history["nmse"].iloc[-1] < history["nmse"].iloc[0]


class Elsewhere:
    """A model on a GPU, as far as a machine without one can tell: it encodes, and its weights are nowhere to be had."""

    def __init__(self, encoder):
        self.encoder, self.device = encoder, torch.device("cuda")
        self.model = copy.deepcopy(encoder.model).to("meta")

    def __getattr__(self, name):
        return getattr(self.encoder, name)


def test_a_model_on_a_gpu_is_only_asked_to_encode(open_run, encoders, tmp_path):
    found = open_run(n_probe=100, n_images=4, n_bootstrap=100)
    bench = found.bench
    bench.__dict__["encoder"] = encoders["scene-s16"]
    _ = bench.tokens  # the one pass itself takes its pixels to the device
    bench.__dict__["encoder"] = Elsewhere(encoders["scene-s16"])
    bench.__dict__["load"] = lambda name, **choices: encoders[Path(name).name]
    assert found.behind is encoders["scene-s16"] and found.left_out == ""
    assert found.embeddings(found.used)[0].isfinite().all()
    assert attributed.attributed(found, found.used, n_images=4).n_units > 0
    assert attributed.attributed(found, found.patches, n_images=2).n_units > 0
    assert shifted(found).n_images == 4
    assert Audit(found).discovery.table["attribution"].notna().all()
