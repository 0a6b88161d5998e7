"""Files: each format there and back, read by the other side's own words, and refused where it does not fit."""

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from clipshift_core.activations import Origin
from clipshift_core.sae import BatchTopK, Matryoshka, PublishedTopK, SaeError, TopK
from clipshift_core.sae_formats import load, load_published, load_saelens, save, save_published, save_saelens
from clipshift_core.sae_train import statistics

WIDTH, N, K = 6, 20, 3
ORIGIN = Origin("scene-s16", "a1" * 32, 4, "class", "d5" * 32)
RIGHT = {"model": "scene-s16", "weights_hash": "a1" * 32, "layer": 4, "token": "class"}
KINDS = [(TopK, {}), (PublishedTopK, {}), (BatchTopK, {}), (Matryoshka, {"prefixes": [4, 20]})]
X = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0)) * 3 + 2
SEEN = statistics([X])


def random(kind=TopK, **settings):
    made = kind(WIDTH, N, K, seed=1, **settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        made.normalise()
        if isinstance(made, BatchTopK):
            made.threshold.fill_(0.8)
    return made


def same(one, two, x=X, **tolerance):
    torch.testing.assert_close(one.encode(x).dense(one.n_latents), two.encode(x).dense(two.n_latents), **tolerance)
    torch.testing.assert_close(one(x), two(x), **tolerance)


def edit(file, change):
    about = json.loads(file.read_text())
    change(about)
    file.write_text(json.dumps(about))


# Ours ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, settings", KINDS)
def test_there_and_back_to_the_bit(kind, settings, tmp_path):
    made = random(kind, **settings)
    folder = save(tmp_path / "one", made, ORIGIN, SEEN, {"n_steps": 7})
    held = load(folder, **RIGHT, data="d5" * 32, statistics=SEEN)
    assert type(held.sae) is kind and held.sae.settings == made.settings
    assert held.origin == ORIGIN and held.recipe == {"n_steps": 7}
    assert torch.equal(held.statistics.mean, SEEN.mean) and held.statistics[1:] == SEEN[1:]
    same(held.sae, made, rtol=0, atol=0)
    again = save(tmp_path / "two", held.sae, held.origin, held.statistics, held.recipe)
    for name in ("sae.safetensors", "sae.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.parametrize(
    "name, value",
    [
        ("model", "ViT-B-32/openai"),
        ("weights_hash", "b2" * 32),
        ("layer", 3),
        ("token", "spatial"),
        ("data", "e6" * 32),
    ],
)
def test_what_it_was_not_made_for_is_refused_by_name_and_value(name, value, tmp_path):
    folder = save(tmp_path, random(), ORIGIN, SEEN)
    with pytest.raises(SaeError) as error:
        load(folder, **(RIGHT | {name: value}))
    for part in ("sae.json", name, repr(value), repr(getattr(ORIGIN, name))):
        assert part in str(error.value)


def test_activations_of_another_scale_or_mean_are_refused(tmp_path):
    folder = save(tmp_path, random(), ORIGIN, SEEN)
    with pytest.raises(SaeError, match=f"scale {SEEN.scale:.6g}, these have {2 * SEEN.scale:.6g}"):
        load(folder, **RIGHT, statistics=SEEN._replace(scale=2 * SEEN.scale))
    with pytest.raises(SaeError, match="means are up to 0.5 apart"):
        load(folder, **RIGHT, statistics=SEEN._replace(mean=SEEN.mean + 0.5))


def overwrite(file):
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)


def edited(**changes):
    return lambda folder: edit(folder / "sae.json", lambda about: about.update(changes))


def edited_in(part, change):
    return lambda folder: edit(folder / "sae.json", lambda about: change(about[part]))


DAMAGE = {
    "other weights": (lambda folder: overwrite(folder / "sae.safetensors"), "sha256"),
    "no weights": (lambda folder: (folder / "sae.safetensors").unlink(), "sae.safetensors: cannot be read"),
    "no json": (lambda folder: (folder / "sae.json").unlink(), "sae.json: cannot be read"),
    "half a json": (lambda folder: (folder / "sae.json").write_text("{"), "sae.json: cannot be read"),
    "a list": (lambda folder: (folder / "sae.json").write_text("[]"), "no description"),
    "origin": (edited_in("origin", lambda origin: origin.pop("layer")), "no description.*layer"),
    "format": (edited(format=2), "format is 2, wanted is 1"),
    "variant": (edited(variant="gated"), "variant 'gated'.*accepted: topk"),
    "settings": (edited_in("settings", lambda settings: settings.update(width=7)), "not a TopK of .*'width': 7"),
    "text for a number": (edited_in("statistics", lambda seen: seen.update(scale="1")), "is damaged: TypeError"),
    "a size beyond memory": (edited_in("settings", lambda settings: settings.update(n_latents=10**12)), "W_dec has"),
    "nested without end": (lambda folder: (folder / "sae.json").write_text("[" * 10**5), "sae.json: cannot be read"),
    "mean": (edited_in("statistics", lambda seen: seen["mean"].pop()), r"statistics of shape \(5,\)"),
    "scale": (edited_in("statistics", lambda seen: seen.update(scale=0.0)), "scale 0.0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(damage, tmp_path):
    folder = save(tmp_path, random(), ORIGIN, SEEN)
    do, said = DAMAGE[damage]
    do(folder)
    with pytest.raises(SaeError, match=said):
        load(folder, **RIGHT)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    made = random()
    with torch.no_grad():
        made.b_enc[3] = float("nan")
    with pytest.raises(SaeError, match="b_enc is not finite"):
        load(save(tmp_path, made, ORIGIN, SEEN), **RIGHT)


# SAELens ------------------------------------------------------------------------------------------------------------


def as_saelens_runs_it(folder, x):
    """SAELens 6's own words: encode, decode of its TopKSAE and JumpReLUSAE."""
    config, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    pre = (x - w["b_dec"] * config["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    norm = w["W_dec"].norm(dim=-1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(len(w["W_dec"]))
    pre = pre * norm
    if config["architecture"] == "topk":
        top = torch.topk(pre, k=config["k"], dim=-1)
        codes = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    else:
        codes = pre.relu() * (pre > w["threshold"].relu())
    return codes, (codes / norm) @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("kind, settings", [KINDS[0], *KINDS[2:]])
def test_saelens_there_and_back(kind, settings, tmp_path):
    made = random(kind, **settings)
    folder = save_saelens(tmp_path / "one", made, ORIGIN)
    tensors = load_file(folder / "sae_weights.safetensors")
    assert tensors["W_enc"].shape == (WIDTH, N) and tensors["W_dec"].shape == (N, WIDTH)
    assert set(tensors) == {"W_enc", "W_dec", "b_enc", "b_dec"} | ({"threshold"} if kind is not TopK else set())
    codes, out = as_saelens_runs_it(folder, X)
    torch.testing.assert_close(made.encode(X).dense(N), codes)
    torch.testing.assert_close(made(X), out)
    imported = load_saelens(folder)
    same(imported.sae, made, rtol=0, atol=0)
    assert imported.about["origin"]["weights_hash"] == "a1" * 32 and imported.about["model_name"] == "scene-s16"
    assert imported.about["hook_name"] == "visual.transformer.resblocks.4"
    again = save_saelens(tmp_path / "two", imported.sae, Origin(**imported.about["origin"]))
    for name in ("sae_weights.safetensors", "cfg.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.parametrize("option", [{"apply_b_dec_to_input": False}, {"rescale_acts_by_decoder_norm": True}])
def test_saelens_options_are_folded_into_the_weights(option, tmp_path):
    folder = save_saelens(tmp_path, random(), ORIGIN)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_dec"] = tensors["W_dec"] * torch.linspace(0.5, 2, N)[:, None]
    save_file(tensors, folder / "sae_weights.safetensors")
    edit(folder / "cfg.json", lambda config: config.update(option))
    codes, out = as_saelens_runs_it(folder, X)
    imported = load_saelens(folder).sae
    torch.testing.assert_close(imported.encode(X).dense(N), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(imported(X), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"architecture": "gated"}, "architecture 'gated' is not read; accepted: topk, jumprelu"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm', wanted is 'none'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ({"k": None}, "k is None"),
        ({"d_sae": 19}, "its weights are not a TopK of .*'n_latents': 19"),
        ({"architecture": "jumprelu"}, "0 different thresholds"),
    ],
)
def test_saelens_files_that_cannot_be_ours_are_refused(change, said, tmp_path):
    folder = save_saelens(tmp_path, random(), ORIGIN)
    edit(folder / "cfg.json", lambda config: config.update(change))
    with pytest.raises(SaeError, match=f"cfg.json: {said}"):
        load_saelens(folder)


def test_several_thresholds_or_lost_tensors_are_refused(tmp_path):
    folder = save_saelens(tmp_path, random(BatchTopK), ORIGIN)
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"threshold": torch.linspace(1, 2, N)}, folder / "sae_weights.safetensors")
    with pytest.raises(SaeError, match="20 different thresholds; one for all latents"):
        load_saelens(folder)
    del tensors["b_enc"], tensors["W_dec"]
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(SaeError, match="lacks W_dec, b_enc"):
        load_saelens(folder)
    with pytest.raises(SaeError, match="lets negative codes pass"):
        save_saelens(tmp_path, random(PublishedTopK), ORIGIN)


# Paper B's code -----------------------------------------------------------------------------------------------------


class Published(nn.Module):
    """The layout as torch's own modules have it, in today's weight normalisation under the old names."""

    def __init__(self, width, n_latents, k):
        super().__init__()
        self.k = k
        self.encoder = nn.Sequential(weight_norm(nn.Linear(width, n_latents)))
        self.decoder = weight_norm(nn.Linear(n_latents, width, bias=False), dim=1)

    def forward(self, x):
        z = self.encoder(x)
        top = z.topk(self.k, dim=1)
        codes = torch.zeros_like(z).scatter(1, top.indices, top.values)
        return codes, self.decoder(codes)

    NAMES = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}

    def old_state(self):
        state = self.state_dict()
        for old, new in self.NAMES.items():
            state = {name.replace(new, old): tensor for name, tensor in state.items()}
        return state

    def load_old_state(self, state):
        for old, new in self.NAMES.items():
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
        self.load_state_dict(state)


CONFIG = {"sae_k": K, "sae_hidden_dim": N, "sae_layer_idx": -1, "sae_token": "cls", "model_name": "clip_vit_b32"}


def published_files(tmp_path, **changes):
    torch.manual_seed(0)
    theirs = Published(WIDTH, N, K)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        theirs.encoder[0].bias.sub_(3)
    # as Lightning writes it, with more beside it than the weights
    torch.save({"epoch": 30, "state_dict": theirs.old_state(), "loops": {}}, tmp_path / "last.ckpt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"lr": 2e-4} | changes))
    return theirs, (tmp_path / "last.ckpt", tmp_path / "config.yaml")


def test_a_published_checkpoint_does_the_same_here(tmp_path):
    theirs, files = published_files(tmp_path)
    imported = load_published(*files)
    codes, out = theirs(X)
    assert (codes < 0).any()  # which this layout lets pass
    torch.testing.assert_close(imported.sae.encode(X).dense(N), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(imported.sae(X), out, rtol=1e-5, atol=1e-5)
    assert imported.about == {"layer": -1, "token": "class", "model": "clip_vit_b32"}


def test_published_there_and_back(tmp_path):
    _, files = published_files(tmp_path)
    imported = load_published(*files).sae
    folder = save_published(tmp_path / "out", imported, ORIGIN)
    again = load_published(folder / "sae.ckpt", folder / "sae.yaml")
    same(again.sae, imported, rtol=1e-6, atol=1e-6)
    assert again.about == {"layer": 4, "token": "class", "model": "scene-s16"}
    theirs = Published(WIDTH, N, K)
    theirs.load_old_state(torch.load(folder / "sae.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(theirs(X)[1], imported(X), rtol=1e-5, atol=1e-5)


def test_ours_runs_in_their_layout_with_its_bias_as_one_more_latent(tmp_path):
    made = random()
    x = X[(made.encode(X).values > 0).all(1)]  # where k are positive
    assert len(x) > 10 and made.b_dec.any()
    folder = save_published(tmp_path, made, ORIGIN)
    theirs = Published(WIDTH, N + 1, K + 1)
    theirs.load_old_state(torch.load(folder / "sae.ckpt", weights_only=True)["state_dict"])
    codes, out = theirs(x)
    assert (codes[:, N] == 2.0**20).all()
    torch.testing.assert_close(codes[:, :N], made.encode(x).dense(N), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, made(x), rtol=1e-5, atol=1e-5)
    back = load_published(folder / "sae.ckpt", folder / "sae.yaml").sae
    assert (back.n_latents, back.k) == (N + 1, K + 1)
    torch.testing.assert_close(back(x), made(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(SaeError, match="variant 'batchtopk'"):
        save_published(tmp_path, random(BatchTopK), ORIGIN)


class Payload:
    def __reduce__(self):
        return (print, ("code that ran",))


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path, capsys):
    _, (checkpoint, config) = published_files(tmp_path)
    checkpoint.write_bytes(pickle.dumps({"state_dict": Payload()}, protocol=2))
    with pytest.raises(SaeError, match="last.ckpt: is no checkpoint of paper B's code"):
        load_published(checkpoint, config)
    torch.save({"state_dict": Payload()}, checkpoint)
    with pytest.raises(SaeError, match="last.ckpt: is no checkpoint of paper B's code"):
        load_published(checkpoint, config)
    assert "code that ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"sae_hidden_dim": 21}, "last.ckpt: its weights are not a PublishedTopK of .*'n_latents': 21"),
        ({"sae_k": 50}, "k = 50"),
        ({"sae_token": "patch"}, "config.yaml: is no config.*patch"),
    ],
)
def test_a_config_that_does_not_fit_its_checkpoint_is_refused(changes, said, tmp_path):
    _, files = published_files(tmp_path, **changes)
    with pytest.raises(SaeError, match=said):
        load_published(*files)


def test_files_of_another_layout_are_refused_in_place_of_random_weights(tmp_path):
    _, (checkpoint, config) = published_files(tmp_path)
    torch.save({"state_dict": nn.Linear(3, 4).state_dict()}, checkpoint)
    with pytest.raises(SaeError, match="no checkpoint of paper B's code: 'encoder.0.weight_v'"):
        load_published(checkpoint, config)
    with pytest.raises(SaeError, match="gone.ckpt: is no checkpoint"):
        load_published(tmp_path / "gone.ckpt", config)
    config.write_text("- a list")
    with pytest.raises(SaeError, match="config.yaml: is no config"):
        load_published(checkpoint, config)


def test_a_latent_without_a_direction_stays_finite_in_their_layout(tmp_path):
    made = random()
    with torch.no_grad():
        made.W_enc[2] = 0
        made.W_dec.copy_(F.normalize(made.W_dec, dim=1))
    folder = save_published(tmp_path, made, ORIGIN)
    assert not load_published(folder / "sae.ckpt", folder / "sae.yaml").sae.W_enc[2].any()
