"""Many latents deleted at a time, against the generic path, one variant after the other through the whole tail."""

import pytest
import torch
from test_attribution import TEXTS, predicted
from test_splice import in_double, spliced

from clipshift_core import attribution
from clipshift_core.attribution import AttributionError, cosine, evaluator, margin, probe
from clipshift_core.sae import BatchTopK, PublishedTopK, TopK

TARGETS = {
    "a text": cosine(TEXTS[0]),
    "a text an image": cosine(TEXTS[:4]),
    "margins": margin(TEXTS[:4], TEXTS[4:8], 30.0),
    "probe": probe(TEXTS[2], 0.3, normalised=False),
}


def variants(state, n=11, seed=0):
    """The units' values with about half of them deleted; of the first variant none, of the second all."""
    values = state.by_latent(state.codes.values)
    kept = torch.rand(len(values), n, values.shape[1], generator=torch.Generator().manual_seed(seed)) < 0.5
    kept[:, 0], kept[:, 1] = True, False
    return values[:, None] * kept


@pytest.mark.parametrize("chunk", [1, 30, 1600])  # one image at a time, two, all
@pytest.mark.parametrize("kind", [TopK, BatchTopK, PublishedTopK])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_all_variants_together_are_each_alone(target, kind, chunk, monkeypatch):
    splice, state, _ = in_double("class token", -1, "class", kind, n=4)
    monkeypatch.setattr(attribution, "CHUNK_TOKENS", chunk)
    sizes, tail = [], splice.tail
    assert tail.needs_class_alone
    values = variants(state)
    wanted = [target(splice.embed(state, each)) for each in values.unbind(1)]

    class Counted:
        needs_class_alone = True

        def __call__(self, stream):
            sizes.append(len(stream))
            return tail(stream)

    splice.tail = Counted()
    found = evaluator(splice, state, target)(values)
    torch.testing.assert_close(found, torch.stack(wanted, dim=1), atol=1e-12, rtol=1e-12)
    assert max(sizes) == 11 * {1: 1, 30: 2, 1600: 4}[chunk] and sum(sizes) == 44
    assert found.std(dim=1).min() > 1e-3


@pytest.mark.parametrize(
    "name, layer, token", [("class token", -1, "class"), ("class token", 0, "class"), ("class token", 1, "spatial")]
)
def test_deleted_units_by_openclip(name, layer, token):
    splice, state, images = in_double(name, layer, token, n=3)
    values = variants(state)
    wanted = predicted(splice, state, cosine(TEXTS[:3]), images, (values != 0).double().transpose(0, 1))
    found = evaluator(splice, state, cosine(TEXTS[:3]))(values)
    torch.testing.assert_close(found, wanted.T, atol=1e-12, rtol=0)


def test_no_gradient_is_kept_and_several_texts_are_refused():
    splice, images = spliced("class token", -1, "class")
    state = splice.read(images)
    values = variants(state).requires_grad_()
    assert not evaluator(splice, state, cosine(TEXTS[0]))(values).requires_grad
    with pytest.raises(AttributionError, match="one text is accepted"):
        evaluator(splice, state, cosine(TEXTS[:3, None]))(values)
