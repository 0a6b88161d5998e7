import hashlib
import json
from dataclasses import fields

import pytest
import yaml

from clipshift_core import profiles
from clipshift_core.profiles import Profile, ProfileError

SMALL = {"source": "photos", "model": "models/tiny"}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with one profile, `small`, whose images and model are there."""
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    (tmp_path / "notebooks" / "profiles" / "small.yaml").write_text(yaml.safe_dump(SMALL))
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    return tmp_path


@pytest.mark.parametrize("name", ["demo", "gpu-small", "paper"])
def test_shipped_profiles_are_sound(name):
    profile = Profile.load(name)
    assert profile.name == name and profile.image_size == 224
    assert profile.run_dir == profiles.ROOT / "runs" / name


def test_paper_profile_is_the_paper_setting():
    paper = Profile.load("paper")
    assert (paper.model, paper.n_images) == ("ViT-B-32/openai", 13312)
    assert (paper.n_layers, paper.sae_latents, paper.sae_k, paper.sae_epochs) == (2000, 30_000, 64, 30)


def test_a_file_of_ones_own_is_read_as_is(root):
    (root / "mine.yaml").write_text("source: s\nmodel: m\nseed: 3\n")
    assert Profile.load(root / "mine.yaml") == Profile(name="mine", source="s", model="m", seed=3)


def test_overrides_win_and_none_is_a_value(root):
    profile = Profile.load("small", {"n_images": 5, "classes": None, "name": "other"})
    assert (profile.n_images, profile.classes, profile.run_dir) == (5, None, root / "runs" / "other")


def test_digest_is_of_every_field(root):
    profile = Profile.load("small")
    by_hand = {field.name: getattr(profile, field.name) for field in fields(profile)}
    assert profile.digest == hashlib.sha256(json.dumps(by_hand, sort_keys=True).encode()).hexdigest()
    changes = {"seed": 1, "n_images": 2, "device": "cpu", "captions": "x", "classes": "c", "batch_size": 1}
    assert len({Profile.load("small", {key: value}).digest for key, value in changes.items()}) == len(changes)


@pytest.mark.parametrize(
    "overrides, said",
    [
        ({"n_image": 1}, "unknown key 'n_image'; did you mean 'n_images'?"),
        ({"zzz": 1}, "unknown key 'zzz'; accepted: name, source"),
        ({"seed": True}, "seed = True: must be int"),
        ({"seed": "1"}, "seed = '1': must be int"),
        ({"n_images": 1.5}, "n_images = 1.5: must be int or null"),
        ({"source": None}, "source = None: must be str"),
        ({"n_images": 0}, "n_images = 0: must be at least 1"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
        ({"device": "gpu"}, "device = 'gpu': must be auto, cpu, cuda or cuda:N"),
        ({"precision": "bf16"}, "precision = 'bf16': must be auto, fp32, mixed"),
        ({"name": "../up"}, "name = '../up': must be letters"),
    ],
)
def test_wrong_values_are_refused_in_one_line(root, overrides, said):
    with pytest.raises(ProfileError) as refused:
        Profile.load("small", overrides)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("- 1\n", "must be a mapping"),
        ("a: [1\n", "cannot be read"),
        ("source: s\n", "needs a value for model"),
        ("sorce: s\n", "did you mean 'source'?"),
    ],
)
def test_unsound_files_are_refused_by_name(root, text, said):
    (root / "bad.yaml").write_text(text)
    with pytest.raises(ProfileError) as refused:
        Profile.load(root / "bad.yaml")
    assert said in str(refused.value) and "bad.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_unknown_profile_names_the_known(root):
    with pytest.raises(ProfileError, match="accepted: small, or a .yaml file"):
        Profile.load("smal")


def test_a_model_has_one_name(root):
    named = profiles.named
    assert named("ViT-B-16/openai") == ("ViT-B-16", "openai") and named("ViT-B/16/openai") == ("ViT-B/16", "openai")
    assert named("models/tiny") == named("local-dir:models/tiny") == (str(root / "models/tiny"), None)
    assert named("hf-hub:timm/vit") == ("hf-hub:timm/vit", None)
    assert named("ViT-B-16@own/epoch_3.pt") == ("ViT-B-16", str(root / "own/epoch_3.pt"))
    assert named("ViT-B-16") == ("ViT-B-16", None) and named("models/none") == (str(root / "models/none"), None)
    (root / "ViT-B-16" / "openai").mkdir(parents=True)  # a folder that is there wins
    assert named("ViT-B-16/openai") == (str(root / "ViT-B-16/openai"), None)


def test_check_passes_for_what_is_there(root):
    Profile.load("small").check()
    others = {"models": ["ViT-B/16/openai"], "labeller": "local-dir:models/tiny"}
    Profile.load("small", {"model": "ViT-B-32/openai"} | others).check()
    Profile.load("small", {"model": "hf-hub:someone/model"}).check()
    Profile.load("small", {"source": "photos/a.png"}).check()


@pytest.mark.parametrize(
    "overrides, said",
    [
        ({"source": "nowhere"}, "nowhere: does not exist"),
        ({"source": "models/tiny"}, "is an empty folder"),
        ({"model": "models/none"}, "none: no such folder"),
        ({"model": "ViT-B-32"}, "needs a tag of weights"),
        ({"model": "ViT-B-32@weights.pt"}, "no checkpoint file .*weights.pt"),
        ({"model": "ViT-B32/openai"}, "ViT-B32/openai: no such folder; .*near this name: ViT-B-32"),
        ({"models": ["models/none"]}, "models .*none: no such folder"),
        ({"labeller": "ViT-B-32"}, "labeller 'ViT-B-32': an OpenCLIP name needs a tag"),
        ({"classes": "names.txt"}, "names.txt: no such file"),
        ({"captions": "captions.csv"}, "captions.csv: no such file"),
        ({"source": "nowhere", "fetch": "links.tsv"}, "nowhere: does not exist; .*or fetch .*links.tsv, which is not"),
    ],
)
def test_check_refuses_what_is_not_there(root, overrides, said):
    with pytest.raises(ProfileError, match=said):
        Profile.load("small", overrides).check()
