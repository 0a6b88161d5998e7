"""The dry run: its arithmetic against stores as they are laid out, built models, hand counts and OpenCLIP's table."""

import io
import math
import os
import socket
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from clipshift_core import activations, augment, costs, dose, manifests, plan, profiles, shift, stages
from clipshift_core.costs import Model
from clipshift_core.encoder import Encoder, EncoderError
from clipshift_core.profiles import Profile

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}
N, SIZE = 7, 32


class Shape(SimpleNamespace):
    """What the layouts of the stores ask of an encoder."""

    def readable(self, points):
        return points if self.n_blocks else []


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with a source of seven images and no runs."""
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(N):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


@pytest.fixture
def profile(root) -> Profile:
    return Profile(name="t", source="photos", model="m", image_size=SIZE, batch_size=3, n_layers=5, device="cpu")


@pytest.fixture
def quick(monkeypatch):
    """Measurements that take no time, and a network that refuses to be asked."""

    def refuse(*_, **__):
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    speed = costs.Speed(view=2.0, image=1.0, text=0.5, how="measured", metrics=0.25)
    monkeypatch.setattr(costs, "timed", lambda *_, **__: speed)
    monkeypatch.setattr(costs, "drawing", lambda _: costs.Drawing(read=0.5, views=1.5, doses=3.0))
    monkeypatch.setattr(costs, "step", lambda *_: 0.1)
    monkeypatch.setattr(stages, "_ranking", lambda *_: 0.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def on_disk(made) -> int:
    """Bytes of all chunks of a store's arrays, without its attributes and labels."""
    return sum(f.stat().st_size for name in made.layout for f in (made.path / name / "c").rglob("*") if f.is_file())


def written(made) -> int:
    """Bytes of a store with every chunk written."""
    arrays = {name: array for name, array in made.layout.items() if name != "done"}
    for index in range(made.n_chunks):
        n = made.span(index).stop - made.span(index).start
        made.write(index, {name: np.zeros((n, *array.shape[1:]), "f4") for name, array in arrays.items()})
    return on_disk(made)


@pytest.mark.parametrize("n_blocks", [0, 2])
def test_bytes_of_a_pass_are_those_of_its_stores(profile, root, n_blocks):
    manifest = manifests.build(root / "photos", n_images=None, seed=0)
    about = {"dim": 6, "n_blocks": n_blocks, "n_heads": 3 if n_blocks else 0, "width": 5, "grid": (4, 2)}
    encoder = Shape(**about, device="cpu", precision="fp32", weights_hash="0")
    model = Model(**about, image_size=SIZE, has_map=n_blocks > 0, n_parameters=1, image_flops=1, text_flops=1)
    found = stages.pass_bytes(profile, model, N)
    assert found["shift"] == written(shift.open_arrays(profile, manifest, encoder))
    if n_blocks:
        assert found["tokens"] == written(shift.open_tokens(profile, manifest, encoder))
    assert set(found) == {"shift", *(["tokens"] if n_blocks else [])}
    assert stages.dose_bytes(profile, N) == written(dose.open_arrays(profile, manifest, encoder))


def test_bytes_of_activations_are_those_of_their_store(root):
    made = costs.build(TINY, "cpu")
    encoder = Encoder(made, "tiny", name="tiny", weights_hash="0", precision="fp32")
    manifest = manifests.build(root / "photos", n_images=None, seed=0)
    source = activations.Source.of_manifest(manifest, root / "photos", SIZE)
    for token in activations.TOKENS:
        held = activations.stored(source, encoder, -1, token, root / "arrays").held
        assert stages.activation_bytes(costs.model(TINY), N, token) == on_disk(held)


def test_layout_by_hand():
    # 7 rows in chunks of 3: 3 chunks of 3 rows x (2 x 4 + 5 x 1) bytes, and a byte each of `done`
    arrays = {"a": stages.store.Array(("image", "x")), "b": stages.store.Array(("image", "y"), "uint8")}
    assert stages.layout_bytes(arrays, {"image": 7, "x": 2, "y": 5}, 3) == 3 * (3 * 13 + 1)
    assert stages.layout_bytes(arrays, {"image": 2, "x": 2, "y": 5}, 3) == 2 * 13 + 1  # a chunk is no longer than all


def test_a_model_counted_without_weights_is_the_model_that_is_built():
    counted, made = costs.model(TINY), costs.build(TINY, "cpu")
    assert counted.n_parameters == sum(p.numel() for p in made.parameters())
    with torch.no_grad():
        assert made.encode_image(torch.zeros(1, 3, SIZE, SIZE)).shape[1] == counted.dim == 16
    assert (counted.n_blocks, counted.n_heads, counted.width, counted.grid) == (2, 3, 24, (4, 4))
    assert counted.has_map and counted.image_size == SIZE


def test_flops_of_one_product_and_of_openclips_table():
    layer = nn.Linear(7, 5, device="meta")
    assert costs._flops(lambda: layer(torch.empty(3, 7, device="meta")))[0] == 2 * 3 * 7 * 5
    # docs/model_profile.csv of OpenCLIP: ViT-B-32 151.28 million parameters, 8.82 GFLOPs an image, 5.96 a text
    # (4.4 billion multiplications and additions, as papers count); ViT-L-14 427.62, 162.03, 13.3
    known = (("ViT-B-32", 151.28, 8.82, 5.96), ("ViT-L-14", 427.62, 162.03, 13.3), ("RN50", 102.01, 12.22, 5.96))
    for name, millions, image, text in known:
        found = costs.model(open_clip.get_model_config(name))
        assert found.n_parameters / 1e6 == pytest.approx(millions, abs=0.005)
        assert found.image_flops / 1e9 == pytest.approx(image, abs=0.005)
        assert found.text_flops / 1e9 == pytest.approx(text, abs=0.005)


def test_scaled_by_flops_only():
    known, wanted = costs.model(TINY), costs.model(TINY | {"vision_cfg": TINY["vision_cfg"] | {"layers": 4}})
    found = costs.scaled(wanted, known, costs.Speed(view=3.0, image=2.0, text=1.0, how="measured"))
    ratio = wanted.image_flops / known.image_flops
    assert 1.5 < ratio < 2 and found.view == 3 * ratio and found.image == 2 * ratio and found.text == 1
    assert found.how == "by FLOPs"


def test_timed_is_the_forward_pass():
    weights = costs.Weights("to fetch", "", TINY)
    speed = costs.timed("tiny", weights, size=SIZE, device="cpu", precision="fp32", metrics=True)
    assert speed.how == "random weights" and 0 < speed.view < 1 and 0 < speed.text < 1 and 0 < speed.metrics < 10


def test_seconds_are_those_of_one_unit(monkeypatch):
    clock, calls = [0.0], []

    def work(n):
        calls.append(n)
        clock[0] += 0.1 * n + (5 if len(calls) == 1 else 0)  # the first call warms up

    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])
    assert costs.seconds(work, 2, most=50) == pytest.approx(0.1)
    assert clock[0] < 5 + 2 * costs.SECONDS and max(calls) <= 50


def test_seconds_on_a_machine_that_others_use(monkeypatch):
    """Then processor time counts, here of one thread, spread over four cores; not for what an accelerator does."""
    clock, threads = SimpleNamespace(wall=0.0, spent=0.0), []

    def work(n):
        threads.append(torch.get_num_threads())
        clock.wall, clock.spent = clock.wall + 2.0 * n, clock.spent + 0.2 * n

    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock.wall)
    monkeypatch.setattr(costs.time, "process_time", lambda: clock.spent)
    monkeypatch.setattr(costs, "busy", lambda: 3.0)
    before = torch.get_num_threads()
    assert costs.seconds(work, 1, most=5, threads=4) == pytest.approx(0.2 / 4)
    assert set(threads) == {1} and torch.get_num_threads() == before
    assert costs.seconds(work, 1, most=5) == pytest.approx(2.0)
    monkeypatch.setattr(costs, "busy", lambda: 0.5)
    assert costs.seconds(work, 1, most=5, threads=4) == pytest.approx(2.0)


def test_where_weights_are(root, monkeypatch):
    monkeypatch.setattr(costs, "try_to_load_from_cache", lambda repository, file: None)
    assert costs.find("ViT-B-32/openai")[:2] == ("to fetch", "timm/vit_base_patch32_clip_224.openai")
    assert costs.find("ViT-B-32/none").state == "missing"
    assert costs.find("hf-hub:a/b").state == "unknown" and costs.find("hf-hub:a/b").settings is None
    assert costs.find("ViT-B-32@w.safetensors").state == "missing"
    (root / "w.safetensors").touch()
    assert costs.find("ViT-B-32@w.safetensors")[:2] == ("here", str(root / "w.safetensors"))
    (root / "folder").mkdir()
    assert costs.find("folder").state == "missing"
    (root / "folder" / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 3}}')
    assert costs.find("folder").state == "missing" and costs.find("folder").settings == {"embed_dim": 3}
    (root / "folder" / "open_clip_model.safetensors").touch()
    assert costs.find("folder").state == "here"
    cached = {"open_clip_config.json": root / "folder" / "open_clip_config.json", "open_clip_model.safetensors": "x"}
    monkeypatch.setattr(costs, "try_to_load_from_cache", lambda repository, file: str(cached.get(file, "")) or None)
    assert costs.find("hf-hub:a/b") == ("here", "x", {"embed_dim": 3})


def test_times_of_a_plan_by_hand(root, quick, monkeypatch):
    monkeypatch.setattr(costs, "find", lambda name: costs.Weights("to fetch", name, TINY))
    chosen = Profile(name="t", source="photos", model="m", image_size=SIZE, n_images=5, n_dose=2, device="cpu")
    found = plan.plan(chosen)
    times = found.computed.set_index("stage")["seconds"]
    # 5 images: 10 views of 2 s and 0.25 s of metrics each; drawing takes (0.5 + 1.5) s of one of two cores
    assert times["the one pass"] == 5 * (10 * 2 + 0.25) + 5 * 2 / 2
    # 2 images: 109 views of 2 s each, (0.5 + 3) s of one of two cores
    assert times["dose sweep"] == 2 * 109 * 2 + 2 * 3.5 / 2
    assert not any("dictionary" in stage for stage in times.index)  # 5 images are too few to learn one from
    assert found.seconds == pytest.approx(times.sum())
    hours = replace(found, computed=found.computed.assign(seconds=7200 / len(times)), disk_free=10**9)
    assert "(1.0 GB free), 2.0 to 3.0 h on " in plan.total(hours)  # half as much again
    assert found.download_bytes == costs.BYTES * costs.model(TINY).n_parameters
    assert found.store_bytes == found.stored["bytes"].sum()


def test_steps_of_the_dictionary_are_those_of_learn(root, quick, monkeypatch):
    monkeypatch.setattr(costs, "find", lambda name: costs.Weights("to fetch", name, TINY))
    monkeypatch.setattr(stages, "_counted", lambda *_: (13_312, False))
    chosen = Profile(name="t", source="photos", model="m", image_size=SIZE, labeller="other", sae_latents=300)
    rows = plan.plan(chosen).computed.set_index(["stage", "model"])
    # a tenth of 13,312, 1,332, is held back; 11,980 rows in batches of 119 make 100 steps an epoch, of 30
    assert rows.loc[("dictionary: 300 latents, batches of 119", "m"), ["count", "seconds"]].tolist() == [3000, 300.0]
    assert rows.loc[("activations to learn from", "m"), "count"] == 11_980
    assert rows.loc[("images to label by", "other"), "count"] == 1332
    held = plan.plan(chosen).stored.set_index("stage")["bytes"]
    assert held["dictionary"] == 4 * (2 * 300 * 24 + 300 + 24)


def test_what_is_done_takes_nothing(root, quick, monkeypatch):
    monkeypatch.setattr(costs, "find", lambda name: costs.Weights("here", name, TINY))
    chosen = Profile(name="t", source="photos", model="m", image_size=SIZE, device="cpu")
    found = plan.plan(chosen, done={"02_embedding_shifts"})
    rows = found.computed.set_index("stage")
    assert (
        rows.loc["the one pass", ["seconds", "how"]].tolist() == [0.0, "done"] and rows.loc["dose sweep", "seconds"] > 0
    )
    assert found.stored.set_index("stage").loc["class tokens", "how"] == "done" and found.download_bytes == 0


def test_nothing_there_and_nothing_written(root, quick, monkeypatch):
    """No images, no weights, an unknown hub model: rows that say so, no network, no file."""
    monkeypatch.setattr(costs, "try_to_load_from_cache", lambda repository, file: None)
    names = {"model": "hf-hub:a/b", "models": ["ViT-B-32/openai", "nowhere/at/all"], "labeller": "ViT-B-32/openai"}
    chosen = Profile(name="t", source="absent", n_images=2000, **names)
    before = sorted(root.rglob("*"))
    found = plan.plan(chosen)
    console = Console(width=110, record=True, file=io.StringIO())
    plan.show(found, console)
    text = console.export_text()
    assert sorted(root.rglob("*")) == before
    state = found.downloads.set_index("what")["state"]
    assert state.to_dict() == {
        "images": "missing", "hf-hub:a/b": "unknown", "ViT-B-32/openai": "to fetch", "nowhere/at/all": "missing",
    }  # fmt: skip
    assert found.download_bytes == 4 * 151_277_313
    assert math.isnan(found.computed.set_index("model")["seconds"]["hf-hub:a/b"].iloc[0])
    assert "nothing in absent; counted as 2,000; a run would stop there" in " ".join(text.split())
    assert "about 610 MB and what is unknown to download" in " ".join(text.split())


def test_images_of_a_table_of_links(root, quick):
    (root / "cc.tsv").write_text("".join(f"a caption\thttp://x/{i}.jpg\n" for i in range(1000)))
    given = {"fetch": "cc.tsv", "n_images": 500, "vocabulary": "imagenet"}
    wanted = SimpleNamespace(source_path=root / "absent", source="absent", **given)
    found = stages.look(wanted)
    # 500 images take 500 / 0.85 = 588.2 links
    assert (
        found.n == 500 and found.download["bytes"] == 500 * stages.IMAGE_BYTES and "589 links" in found.download["note"]
    )
    wanted.n_images = None
    assert stages.look(wanted).n == 850  # 15 % of 1,000 links are taken for dead
    wanted.source_path, wanted.n_images = root / "photos", 4
    assert stages.look(wanted)[:2] == (4, False) and stages.look(wanted).download["state"] == "here"


def test_shipped_scenes_are_known_as_drawn():
    found = stages.look(Profile.load("demo"))
    assert found.n == 512 and found.drawn and found.download["state"] == "here"


def test_what_does_not_fit_is_warned_of(root, quick, monkeypatch):
    monkeypatch.setattr(costs, "find", lambda name: costs.Weights("here", name, TINY))
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(os, "sysconf", lambda name: 2**10)  # a machine of 1 MiB
    said = " ".join(plan.plan(Profile(name="t", source="photos", model="m", image_size=SIZE, device="cpu")).warnings)
    assert "1.0 kB free" in said and "a batch of the pass, m takes about 1.2 GB of memory and there are 1.0 MB" in said


def test_an_empty_source_of_unknown_number_and_damaged_weights(root, quick, monkeypatch):
    def damaged(*_, **__):
        raise EncoderError("damaged")

    monkeypatch.setattr(costs, "find", lambda name: costs.Weights("here", name, TINY))
    monkeypatch.setattr(costs, "timed", damaged)
    found = plan.plan(Profile(name="t", source="absent", model="m", image_size=SIZE))
    assert found.computed["seconds"].isna().any() and "without what is unknown" in plan.total(found)
    assert found.computed["count"].drop(found.computed.index[-1]).sum() == 0


def test_two_digits():
    assert [plan.size(n) for n in (0, 12, 999, 1e6, 6.05e8, 1.234e10, math.nan)] == [
        "0", "12 bytes", "1.0 kB", "1.0 MB", "600 MB", "12 GB", "unknown",
    ]  # fmt: skip
    assert [plan.duration(s) for s in (0, 0.3, 4.04, 89, 95, 5000, 5400, 1e6)] == [
        "0 s", "under 1 s", "4.0 s", "89 s", "1.6 min", "83 min", "1.5 h", "280 h",
    ]  # fmt: skip


def test_views_are_those_of_the_pass():
    assert costs.VIEWS == len(augment.VIEWS) == 10 and dose.N_VIEWS == 109


def test_small_gpu_profile_can_be_planned(quick, monkeypatch):
    monkeypatch.setattr(costs, "try_to_load_from_cache", lambda repository, file: None)
    monkeypatch.setattr(stages, "_counted", lambda *_: (0, False))
    found = plan.plan(Profile.load("gpu-small"))
    assert found.computed["seconds"].notna().all() and (found.downloads["state"] != "unknown").all()
    assert found.store_bytes > 1e8
