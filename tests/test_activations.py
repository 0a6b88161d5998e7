"""Activations: against OpenCLIP's own forward, the same after a kill, and every row once an epoch in a kept order."""

import hashlib
from dataclasses import dataclass

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clipshift_core import activations, manifests, scenes, store
from clipshift_core.activations import ActivationError, Activations, Origin, Source, activations_of, stored
from clipshift_core.encoder import Encoder

N, SIZE = 9, 48


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    vision = {"image_size": SIZE, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 9, "width": 16, "heads": 1, "layers": 1}
    model = open_clip.model.CLIP(24, vision, text).eval().requires_grad_(False)
    model.visual.preprocess_cfg = {"size": SIZE, "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic"}
    return Encoder(model, "tiny", name="tiny", weights_hash="ab" * 32, precision="fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(1)
    for i in range(N):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60 + i, 50), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return Source.of_manifest(manifests.build(folder, n_images=None, seed=0), folder, SIZE)


def stream(encoder, source, layer):
    """Every token after a block, by a hook of its own around OpenCLIP's own forward."""
    kept = []
    block = encoder.model.visual.transformer.resblocks[layer]
    handle = block.register_forward_hook(lambda module, args, output: kept.append(output))
    embedding = encoder.model.encode_image(encoder.preprocess(np.stack([source.read(i) for i in range(N)])))
    handle.remove()
    return kept[0], embedding


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# Encoding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer, from_end", [(0, -3), (2, -1)])
def test_stored_activations_are_openclips_own(tiny, source, tmp_path, layer, from_end):
    tokens, _ = stream(tiny, source, layer)
    of_class = stored(source, tiny, layer, "class", tmp_path, batch_size=4)
    spatial = stored(source, tiny, from_end, "spatial", tmp_path, batch_size=4)
    assert of_class.dataset()["activation"].dims == ("image", "width")
    assert spatial.dataset()["activation"].dims == ("image", "token", "width")
    np.testing.assert_allclose(of_class.dataset()["activation"], tokens[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(spatial.dataset()["activation"], tokens[:, 1:], rtol=1e-4, atol=1e-5)
    assert list(spatial.dataset()["image"].values) == [str(i) for i in range(N)] == list(source.ids)
    assert (of_class.n_rows, of_class.width) == (N, 32) and (spatial.n_rows, spatial.width) == (9 * N, 32)
    assert spatial.origin == Origin("tiny", "ab" * 32, layer, "spatial", spatial.held.group.attrs["key"])
    assert of_class.origin.data != spatial.origin.data


def test_what_is_stored_is_read_and_what_was_killed_goes_on(tiny, source, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "CHUNK_IMAGES", 2)
    whole = stored(source, tiny, 1, "class", tmp_path / "whole", batch_size=1)
    assert whole.held.n_chunks == 5

    def read_or_die(i):
        if i == 6:
            raise KeyboardInterrupt
        return source.read(i)

    with pytest.raises(KeyboardInterrupt):
        stored(Source(source.ids, source.made_from, read_or_die), tiny, 1, "class", tmp_path / "killed", batch_size=1)
    asked = []

    def read_and_tell(i):
        asked.append(i)
        return source.read(i)

    again = Source(source.ids, source.made_from, read_and_tell)
    stored(again, tiny, 1, "class", tmp_path / "killed", batch_size=1)
    assert 0 < len(set(asked)) < N and {6, 7, 8} <= set(asked)
    one, two = (next((tmp_path / name).iterdir()) for name in ("whole", "killed"))
    assert one.name == two.name and contents(one) == contents(two)
    asked.clear()
    stored(again, tiny, 1, "class", tmp_path / "killed", batch_size=1)
    assert asked == []


def test_scenes_are_drawn_as_they_are_read(tiny, tmp_path):
    seeds = range(scenes.HELD_OUT, scenes.HELD_OUT + 3)
    source = Source.of_scenes(seeds, SIZE)
    drawn = np.stack([scenes.render(scenes.sample(seed), SIZE) for seed in seeds])
    held = stored(source, tiny, -1, "class", tmp_path)
    wanted = tiny.encode(drawn, capture=["token.2"]).captured["token.2"]
    np.testing.assert_allclose(np.concatenate(list(held.in_order())), wanted, rtol=1e-4, atol=1e-5)
    assert list(held.dataset()["image"].values) == [str(seed) for seed in seeds]


def test_an_iterator_of_images_needs_no_store(tiny, source):
    images = np.stack([source.read(i) for i in range(N)])
    found = torch.cat(list(activations_of(iter([images[:4], images[4:]]), tiny, 1, "spatial")))
    np.testing.assert_allclose(found, stream(tiny, source, 1)[0][:, 1:], rtol=1e-4, atol=1e-5)


def test_an_image_that_changed_is_named(tiny, folder, tmp_path):
    manifest = manifests.build(folder, n_images=None, seed=0)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "4.png").write_bytes((folder / "5.png").read_bytes())
    with pytest.raises(ActivationError, match=r"image 4 \(4.png of .*its bytes have changed"):
        stored(Source.of_manifest(manifest, copy, SIZE), tiny, 0, "class", tmp_path / "out")


def test_what_does_not_exist_is_refused(tiny, source, tmp_path):
    with pytest.raises(ActivationError, match="layer 3: tiny has blocks 0 to 2"):
        stored(source, tiny, 3, "class", tmp_path)
    with pytest.raises(ActivationError, match="token 'cls' is unknown; accepted: class, spatial"):
        stored(source, tiny, 0, "cls", tmp_path)
    with pytest.raises(ActivationError, match="no images"):
        stored(Source([], {}, source.read), tiny, 0, "class", tmp_path)


# Batches ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbered:
    """Stored rows whose two components are their number and its negative."""

    tmp_path: object

    def make(self, n_images, chunk, n_tokens=None):
        shape = (n_images, 2) if n_tokens is None else (n_images, n_tokens, 2)
        dims = ("image", "width") if n_tokens is None else ("image", "token", "width")
        held = store.open_store(
            self.tmp_path, "activations", {"n": n_images}, arrays={"activation": store.Array(dims)},
            sizes=dict(zip(dims, shape, strict=True)), chunk=chunk,
        )  # fmt: skip
        number = np.arange(np.prod(shape[:-1]), dtype=np.float32).reshape(shape[:-1])
        values = np.stack([number, -number], -1)
        for index in held.missing():
            held.write(index, {"activation": values[held.span(index)]})
        return Activations(held, Origin("m", "0" * 64, 0, "class", "k"))


@pytest.fixture
def numbered(tmp_path):
    return Numbered(tmp_path).make


def take(batches, n):
    taken = [next(batches) for _ in range(n)]
    assert all(torch.equal(batch[:, 0], -batch[:, 1]) for batch in taken)
    return [batch[:, 0].int().tolist() for batch in taken]


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("n_tokens", [None, 4])
def test_an_epoch_has_every_row_once(numbered, n_tokens, window):
    held = numbered(23, 5, n_tokens)  # 23 or 92 rows, the last chunk short
    n = held.n_rows
    per_epoch = n // 7
    found = take(held.batches(batch_size=7, seed=1, window=window), 2 * per_epoch)
    for epoch in (found[:per_epoch], found[per_epoch:]):
        rows = sum(epoch, [])
        assert len(rows) == len(set(rows)) == per_epoch * 7 and set(rows) <= set(range(n))
    assert found[:per_epoch] != found[per_epoch:]


@pytest.mark.parametrize("window", [1, 2, 100])
def test_batches_can_be_taken_up_at_any_step(numbered, window):
    held = numbered(50, 6)
    whole = take(held.batches(batch_size=8, seed=3, window=window), 20)
    for first in (1, 5, 6, 11, 12, 17):
        assert take(held.batches(first, batch_size=8, seed=3, window=window), 3) == whole[first : first + 3]
    assert take(held.batches(batch_size=8, seed=4, window=window), 20) != whole


def test_rows_are_shuffled_across_the_chunks_of_a_window_and_chunks_across_the_epoch(numbered):
    held = numbered(100, 10)
    first = take(held.batches(batch_size=10, seed=0, window=4), 10)
    assert all(len({row // 10 for row in batch}) > 2 for batch in first[:4])
    windows = [{row // 10 for batch in first[i : i + 4] for row in batch} for i in (0, 4)]
    assert len(windows[0]) == len(windows[1]) == 4 and not windows[0] & windows[1]
    assert windows[0] != {0, 1, 2, 3}


def test_all_rows_in_order(numbered):
    held = numbered(23, 5, 4)
    batches = list(held.in_order(6))
    assert torch.cat(batches)[:, 0].tolist() == list(range(92)) and {b.dtype for b in batches} == {torch.float32}
    assert max(map(len, batches)) == 6


def test_only_a_window_is_read(numbered, monkeypatch):
    held = numbered(100, 10)
    read = []
    whole = Activations.chunk
    monkeypatch.setattr(Activations, "chunk", lambda self, i: read.append(i) or whole(self, i))
    next(held.batches(batch_size=10, seed=0, window=2))
    assert len(read) == 2
    assert isinstance(whole(held, 0).base, np.memmap) or isinstance(whole(held, 0), np.memmap)


def test_a_batch_larger_than_all_is_refused(numbered):
    with pytest.raises(ActivationError, match="batch_size 24: there are 23 rows"):
        next(numbered(23, 5).batches(batch_size=24, seed=0))


def test_the_key_names_images_and_weights(tiny, source, tmp_path):
    held = stored(source, tiny, 0, "class", tmp_path)
    made_from = held.held.group.attrs["made_from"]
    assert made_from["weights"] == "ab" * 32 and made_from["layer"] == 0 and made_from["token"] == "class"
    assert made_from["images"]["manifest"] and held.origin.data == store.digest(made_from)
    assert len(hashlib.sha256().hexdigest()) == len(held.origin.data)
