"""A run's shifts taken apart: against the embeddings of the one pass, and counts by hand."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import xarray as xr

from clipshift_core import augment, profiles, shifted
from clipshift_core.dictionaries import Asked, read
from clipshift_core.encoder import Encoder
from clipshift_core.shift_attribution import Shift
from clipshift_core.splice import Splice

FOLDER = profiles.ROOT / "data" / "models"
SETTINGS = {"n_resamples": 100, "seed": 0}


@pytest.fixture(scope="module")
def encoded():
    """Ten views of five pictures of noise and blocks, encoded: class tokens, embeddings; and the splice."""
    encoder = Encoder.load(str(FOLDER / "scene-s16"), device="cpu", precision="fp32")
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    found = encoder.encode(small.repeat(12, 1).repeat(12, 2), capture=["token.-1"])
    spliced = Splice(encoder, read(FOLDER / "sae-scene-s16", encoder).sae, -1, "class")
    tokens, embeddings = (each.unflatten(0, (5, 10)) for each in (found.captured["token.-1"], found.embedding))
    return spliced, tokens.numpy(), F.normalize(embeddings, dim=2)


@pytest.fixture(scope="module")
def found(encoded):
    spliced, tokens, embeddings = encoded
    texts = F.normalize(torch.randn(3, embeddings.shape[2], generator=torch.Generator().manual_seed(1)), dim=1)
    asked = Asked(["a", "b", "c"], texts, torch.tensor([0, 2, 1, 1, 0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shifted, "CHUNK", 2)
        yield shifted.Shifted(spliced, tokens, asked, seed=0)


def test_parts_sum_to_what_the_pass_itself_measured(found, encoded):
    embeddings = encoded[2]
    texts = found.asked.texts[found.asked.index]
    assert list(found.shifts) == list(augment.VIEWS[1:])
    for view, shift in enumerate(found.shifts.values(), 1):
        wanted = ((embeddings[:, view] - embeddings[:, 0]) * texts).sum(1)
        assert (shift.part.sum(1) + shift.error - wanted).abs().max() < 1e-4
        assert (shift.view - (embeddings[:, view] * texts).sum(1)).abs().max() < 1e-5


def test_all_restored_leaves_the_error_alone(found, encoded):
    """With all latents back, x1 + sum (a0 - a1) d = x_hat(x0) + error of x1."""
    repaired = found.repaired()
    assert list(found.of) == list(range(5)) * 9 and len(repaired.target.view) == 45
    spliced, tokens, _ = encoded
    x0, x1 = (torch.from_numpy(tokens[3, view])[None] for view in (0, 4))
    with torch.no_grad():
        x = spliced.sae(x0) + x1 - spliced.sae(x1)
        wanted = found.embed(x) @ found.asked.texts[found.asked.index[3]]
    assert repaired.target.every[3 * 5 + 3] == pytest.approx(float(wanted[0]), abs=1e-5)


def made(before, after):
    before, after = torch.tensor(before), torch.tensor(after)
    nothing = torch.zeros(len(before))
    latent = torch.arange(before.shape[1]).expand_as(before)
    return Shift(latent, before, after, torch.zeros_like(before), nothing, nothing, nothing, nothing)


def test_turnover_by_hand():
    # image 0 loses latent 0 (2) and a third of latent 1 (1 of 3), gains latent 2 (4); image 1 does not change
    shifts = {"blur": made([[2.0, 3.0, 0.0], [1.0, 0.0, 1.0]], [[0.0, 2.0, 4.0], [1.0, 0.0, 1.0]])}
    table = shifted.turnover(shifts, **SETTINGS).set_index("quantity")["mean"]
    assert table.to_dict() == {"destroyed": 0.5, "invented": 0.5, "before": 2, "lost": 1.5, "gained": 2}
    kinds = pd.Series(["thing", "colour", None], index=[0, 1, 2])
    share = shifted.by_kind(shifts, kinds, **SETTINGS).set_index(["quantity", "kind"])["mean"]
    # of 5: 2 and 1 lost, 4 gained; halved by the image that stays
    expected = {("lost", "thing"): 0.2, ("lost", "colour"): 0.1, ("gained", "no label"): 0.4}
    for key, value in share.items():
        assert value == pytest.approx(expected.get(key, 0))


def test_what_is_asked_comes_with_the_images_that_were_kept(encoded):
    """Tokens of the first images alone: the words and the embeddings must be those of the same images."""
    spliced, tokens, embeddings = encoded
    images = pd.DataFrame({"image_id": [f"i{k}" for k in range(5)]})
    coords = {"image": list(images["image_id"]), "view": list(augment.VIEWS)}
    dataset = {"embedding": xr.DataArray(embeddings.numpy(), coords, ("image", "view", "feature"))}
    kept = xr.DataArray(tokens[:, :, None], coords, ("image", "view", "block", "width"))[:3]
    seen = {}

    def asked(table, of):
        seen.update(table=table, of=of)
        return Asked(["a"], torch.eye(1, 128), torch.zeros(len(of), dtype=torch.long))

    bench = SimpleNamespace(
        encoder=spliced.encoder, tokens={"token": kept}, dataset=dataset, manifest=SimpleNamespace(images=images),
        profile=SimpleNamespace(seed=0),
    )  # fmt: skip
    learned = read(FOLDER / "sae-scene-s16", spliced.encoder)
    made = shifted.shifted(SimpleNamespace(bench=bench, used=learned, asked=asked, spliced=lambda given: spliced))
    assert made.n_images == 3 and list(seen["table"]["image_id"]) == ["i0", "i1", "i2"]
    torch.testing.assert_close(seen["of"], embeddings[:3, 0])
