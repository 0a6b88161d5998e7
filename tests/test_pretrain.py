import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from clipshift_core import pretrain, scenes
from clipshift_core.pretrain import Recipe, World

TINY = Recipe("tiny", 3, 32, 16, 32, 1, n_scenes=700, n_lesions=40, steps=6, batch_size=8, hard_from=2, warmup_steps=2)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    pretrain.drawn(TINY, folder, workers=1)
    return folder


def test_images_are_those_of_the_world(work):
    images = pretrain.drawn(TINY, work)
    assert np.array_equal(images[5], scenes.render(scenes.sample(5), 32))
    assert np.array_equal(images[-1], pretrain.lesions.render(pretrain.lesion_of(39), 32))


def test_a_killed_training_ends_with_the_same_bits(work, tmp_path, monkeypatch):
    whole = pretrain.train(TINY, tmp_path / "whole", work, device="cpu", checkpoint_every=2)
    for checkpoint in work.glob("tiny-*.pt"):
        checkpoint.unlink()
    rate = pretrain.learning_rate

    def killed_in_step_5(recipe, step):
        if step == 5:
            raise KeyboardInterrupt
        return rate(recipe, step)

    monkeypatch.setattr(pretrain, "learning_rate", killed_in_step_5)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(TINY, tmp_path / "killed", work, device="cpu", checkpoint_every=2)
    monkeypatch.setattr(pretrain, "learning_rate", rate)
    torch.manual_seed(99)  # whatever happened in between
    again = pretrain.train(TINY, tmp_path / "killed", work, device="cpu", checkpoint_every=2)
    first, second = (load_file(folder / "open_clip_model.safetensors") for folder in (whole, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((again / "training.json").read_text())["recipe"]["steps"] == 6


def test_openclip_loads_what_was_trained(work, tmp_path):
    folder = pretrain.train(TINY, tmp_path / "tiny", work, device="cpu")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red duck", "a starfish on a beach"])
    assert tokens.shape == (2, TINY.context_length)
    assert model.encode_text(tokens).shape == (2, TINY.embed_dim)


def test_a_compound_is_read_as_its_parts():
    world = World.of(replace(TINY, n_lesions=0))
    tokenizer = pretrain.train_tokenizer([world.caption(row, 0) for row in range(700)], 32)
    read = tokenizer.tokenize
    assert read("starfish") == read("star") + read("fish") == ["star", "fish"]
    assert read("houseboat") == ["house", "boat"] and read("sunflower")[-1] == "flower"
    assert "<unk>" not in read("a zebra, 42 years old") and "<unk>" in read("日本")


def test_a_hard_batch_shares_the_colour_and_names_the_thing():
    world = World.of(TINY)
    rows, captions = world.batch(4)
    inside = [world.scenes[row] for row in rows if row < TINY.n_scenes]
    assert len({scene.colour for scene in inside}) <= 1 and len(rows) == 8
    assert all(scene.word in text for scene, text in zip(inside, captions, strict=False))
    again = World.of(TINY).batch(4)
    assert np.array_equal(again[0], rows) and again[1] == captions


def test_ordinary_batches_of_an_epoch_use_every_image_once():
    world = World.of(replace(TINY, hard_from=10**9))
    rows = np.concatenate([world.batch(step)[0] for step in range(740 // 8)])
    assert len(set(rows.tolist())) == len(rows)


def test_learning_rate_rises_stays_and_falls():
    recipe = replace(TINY, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [pretrain.learning_rate(recipe, step) for step in range(100)]
    # warm-up: (0 + 1) / 10; plateau until step 70; then (100 - step) / 30
    assert rates[0] == pytest.approx(0.1) and rates[10] == rates[70] == 1.0
    assert rates[85] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 30)
