"""Attribution against finite differences, captum, scipy's quadrature and OpenCLIP's own forward with one latent zeroed.

The oracles run the whole tower with a hook that replaces a block's output (`test_splice.through_openclip`), in float64
where they take differences; nothing of them goes through the tail.
"""

from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from scipy.integrate import quad_vec
from test_splice import MODEL, dictionary, in_double, pictures, spliced, through_openclip
from torch import tensor

from clipshift_core.attribution import (
    METHODS,
    AttributionError,
    Target,
    ablation,
    act_x_grad,
    act_x_logit_lens,
    cosine,
    energy,
    integrated_gradients,
    logit,
    logit_lens,
    margin,
    nodes,
    probe,
    random,
)
from clipshift_core.encoder import Encoder
from clipshift_core.sae import BatchTopK, PublishedTopK, TopK
from clipshift_core.splice import Splice

TEXTS = torch.randn(26, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
PLACES = [
    ("class token", -1, "class", TopK),
    ("class token", 0, "class", BatchTopK),
    ("class token", 1, "spatial", TopK),
    ("mean over patches", -1, "spatial", PublishedTopK),
    ("timm, rotary", 0, "class", TopK),
    ("timm, rotary by block, registers", 0, "spatial", BatchTopK),
]


def predicted(splice, state, target, images, factors):
    """y for each row of `factors` (row, image, unit), which scale the units: by OpenCLIP's own forward and a hook."""
    n_images, n_units = state.latents.shape
    values, indices = (part.unflatten(0, (n_images, -1)) for part in (state.codes.values, state.codes.indices))
    unit = state.unit.unflatten(0, (n_images, -1))  # (image, token, slot)
    found = []
    for rows in factors.split(16):
        spread = rows[:, :, None].expand(-1, -1, values.shape[1], -1).gather(3, unit.expand(len(rows), -1, -1, -1))
        dense = torch.zeros(*spread.shape[:3], splice.sae.n_latents, dtype=values.dtype)
        dense.scatter_add_(3, indices.expand_as(spread), values * (spread - 1))
        moved = (dense @ splice.sae.W_dec.detach()).flatten(0, 1)
        n = moved.shape[1]
        place = slice(0, 1) if splice.token == "class" else slice(-n, None)

        def change(stream, moved=moved, place=place):
            stream = stream.clone()
            stream[:, place] += moved
            return stream

        repeated = np.concatenate([images] * len(rows))
        embedding, _ = through_openclip(splice.encoder, repeated, splice.layer, change)
        found.append(torch.stack([target(part) for part in embedding.unflatten(0, (len(rows), n_images))]))
    return torch.cat(found)


def each_unit(state, amount):
    """Rows of factors that move one unit at a time to `amount`, in all images at once."""
    n_images, n_units = state.latents.shape
    factors = torch.ones(n_units, n_images, n_units, dtype=torch.float64)
    factors[torch.arange(n_units), :, torch.arange(n_units)] = amount
    return factors


def slopes_by_differences(splice, state, target, images, factor=1.0, step=1e-5):
    """Central differences of y by each unit's factor about `factor`: (image, unit)."""
    ones = each_unit(state, 1.0)
    one_at_a_time = each_unit(state, 1 + step) - ones
    up = predicted(splice, state, target, images, factor * ones + one_at_a_time)
    down = predicted(splice, state, target, images, factor * ones - one_at_a_time)
    return ((up - down) / (2 * step)).T


# What is predicted --------------------------------------------------------------------------------------------------


def test_targets_by_hand():
    e = tensor([[3.0, 4.0], [0.0, 2.0]])  # lengths 5 and 2
    a, b = tensor([2.0, 0.0]), tensor([0.0, 0.5])
    torch.testing.assert_close(cosine(a)(e), tensor([0.6, 0.0]))
    torch.testing.assert_close(logit(b, 100.0)(e), tensor([80.0, 100.0]))
    torch.testing.assert_close(margin(a, b, 10.0)(e), tensor([-2.0, -10.0]))
    torch.testing.assert_close(probe(a, 1.0, normalised=False)(e), tensor([7.0, 1.0]))
    torch.testing.assert_close(probe(a, 1.0, normalised=True)(e), tensor([2.2, 1.0]))
    # A text for each image, and several for every image.
    torch.testing.assert_close(cosine(torch.stack([a, b]))(e), tensor([0.6, 1.0]))
    torch.testing.assert_close(cosine(torch.stack([a, b, a])[:, None])(e), tensor([[0.6, 0.0], [0.8, 1.0], [0.6, 0.0]]))
    several = probe(torch.stack([a, b])[:, None], tensor([[1.0], [2.0]]), normalised=False)
    torch.testing.assert_close(several(e), tensor([[7.0, 1.0], [4.0, 3.0]]))


TARGETS = {
    "cosine": cosine(TEXTS[0]),
    "a text an image": cosine(TEXTS[:4]),
    "several": logit(TEXTS[:5, None], 30.0),
    "margin": margin(TEXTS[0], TEXTS[1], 30.0),
    "probe": probe(TEXTS[2], 0.3, normalised=False),
    "a probe an image": probe(TEXTS[:4], TEXTS[:4, 0], normalised=True),
    "several probes": probe(TEXTS[:5, None], TEXTS[:5, :1], normalised=True),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_gradient_of_a_target(target):
    e = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.functional.jacobian(target, e).diagonal(dim1=-3, dim2=-2).movedim(-1, -2)
    torch.testing.assert_close(target.gradient(e), wanted)
    some = tensor([3, 0, 0])
    torch.testing.assert_close(target.at(some)(e[some]), target(e)[..., some])


def test_directions_of_other_shapes_are_refused():
    for direction in (torch.zeros(2, 2, 2, 2), torch.tensor(1.0), tensor([1.0, float("nan")])):
        with pytest.raises(AttributionError, match="finite numbers in"):
            Target(direction)
    for direction in (TEXTS[:5], TEXTS[0, :9], TEXTS[:5, None, :9]):
        with pytest.raises(
            AttributionError, match=r"embeddings of \(2, 24\); accepted: \(24,\), \(2, 24\) or \(text, 1, 24"
        ):
            cosine(direction)(torch.ones(2, 24))
    with pytest.raises(AttributionError, match=r"\(5, 24\) for embeddings of \(1, 24\)"):
        cosine(TEXTS[:5])(torch.ones(1, 24))


# Against finite differences, quadrature and deletion ------------------------------------------------------------------


@pytest.mark.parametrize("name, layer, token, kind", PLACES)
def test_act_x_grad_is_the_slope(name, layer, token, kind):
    splice, state, images = in_double(name, layer, token, kind, n=2)
    for target in (cosine(TEXTS[0]), probe(TEXTS[1], 0.5, normalised=False)):
        found = act_x_grad(splice, state, target)
        # The slope by a factor on a_j is a_j dy/da_j; zero where a unit is not on.
        wanted = slopes_by_differences(splice, state, target, images)
        scale = wanted.abs().max()
        assert scale > 1e-3 and torch.equal(found.latents, state.latents)
        assert (found.values - wanted).abs().max() < 1e-7 * scale
        assert not found.values[~state.on].any() and state.on.sum() > 5


@pytest.mark.parametrize("name, layer, token", [p[:3] for p in PLACES[:3]])
def test_integrated_gradients_are_scipys_integral(name, layer, token):
    splice, state, images = in_double(name, layer, token, n=2)
    target = margin(TEXTS[0], TEXTS[1], 30.0)
    wanted, _ = quad_vec(
        lambda t: slopes_by_differences(splice, state, target, images, t).numpy(), 0, 1, epsrel=1e-6, norm="max"
    )
    wanted, instant = torch.from_numpy(wanted), act_x_grad(splice, state, target).values
    scale = wanted.abs().max()
    errors = {}
    for rule in ("gausslegendre", "midpoint", "trapezoid"):
        found = integrated_gradients(splice, state, target, steps=24, rule=rule)
        errors[rule] = float((found.values - wanted).abs().max() / scale)
        assert found.gap.abs().max() < 24 * errors[rule] * scale + 1e-9
    assert errors["gausslegendre"] < 1e-6 and errors["midpoint"] < 0.01 and errors["trapezoid"] < 0.02
    # Paper B's public code gives act x grad's own values for integrated gradients.
    assert (wanted - instant).abs().max() > 0.05 * scale
    assert (found.values - instant).abs().max() > 0.05 * scale


@pytest.mark.parametrize("rule, theirs", [("gausslegendre", "gausslegendre"), ("midpoint", "riemann_middle")])
@pytest.mark.parametrize("name, layer, token", [PLACES[0][:3], PLACES[2][:3]])
def test_integrated_gradients_are_captums(name, layer, token, rule, theirs):
    """captum integrates over dense activations, which enter OpenCLIP's own forward through a hook on the block."""
    splice, state, images = in_double(name, layer, token, n=1)
    target, dictionary_rows = margin(TEXTS[0], TEXTS[1], 30.0), splice.sae.W_dec.detach()
    dense = state.codes.dense(splice.sae.n_latents)
    rest = splice.tokens(state).flatten(0, 1) - dense @ dictionary_rows

    def forward(activations):  # (step, token x latent)
        n = len(activations)
        tokens = activations.view(n, -1, splice.sae.n_latents) @ dictionary_rows + rest
        place = slice(0, 1) if token == "class" else slice(-tokens.shape[1], None)

        def change(stream):
            stream = stream.clone()
            stream[:, place] = tokens
            return stream

        with_gradients = through_openclip.__wrapped__
        embedding, _ = with_gradients(splice.encoder, np.concatenate([images] * n), splice.layer, change)
        return target(embedding)

    wanted = IntegratedGradients(forward).attribute(dense.reshape(1, -1), torch.zeros(1, dense.numel()).double(),
                                                    n_steps=20, method=theirs)  # fmt: skip
    by_latent = wanted.view(*dense.shape).sum(0)
    found = integrated_gradients(splice, state, target, steps=20, rule=rule)
    ours = torch.zeros_like(by_latent).scatter_add(0, found.latents[0], found.values[0])
    assert (ours - by_latent).abs().max() < 1e-7 * by_latent.abs().max()  # captum holds its steps in float32


def test_the_gap_is_what_the_units_lack_of_the_change():
    splice, state, images = in_double("class token", 0, "class", n=3)
    target = cosine(TEXTS[0])
    ends = predicted(
        splice, state, target, images, torch.ones(2, *state.latents.shape) * tensor([1.0, 0.0])[:, None, None]
    )
    gaps = []
    for steps in (1, 4, 16, 64):
        found = integrated_gradients(splice, state, target, steps=steps, rule="midpoint")
        torch.testing.assert_close(found.gap, found.values.sum(1) - (ends[0] - ends[1]), atol=1e-9, rtol=0)
        gaps.append(float(found.gap.abs().max()))
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] and gaps[3] < 1e-3 * gaps[0]


@pytest.mark.parametrize(
    "rule, exact, places, weights",
    [
        ("midpoint", 1, [0.25, 0.75], [0.5, 0.5]),
        ("trapezoid", 1, [0.0, 1.0], [0.5, 0.5]),
        ("gausslegendre", 3, [0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5], [0.5, 0.5]),
    ],
)
def test_rules(rule, exact, places, weights):
    found = nodes(2, rule)
    np.testing.assert_allclose(found, (places, weights))
    at, by = map(np.array, nodes(7, rule))
    assert at.min() >= 0 and at.max() <= 1
    for power in range(exact + 1):
        np.testing.assert_allclose(by @ at**power, 1 / (power + 1))
    for steps, name in ((0, rule), (2, "simpson"), (1, "trapezoid")):
        with pytest.raises(AttributionError, match="accepted: midpoint, trapezoid, gausslegendre"):
            nodes(steps, name)


@pytest.mark.parametrize("name, layer, token, kind", PLACES)
def test_ablation_is_openclip_with_one_latent_zeroed(name, layer, token, kind):
    splice, state, images = in_double(name, layer, token, kind, n=2)
    target = cosine(TEXTS[0])
    whole = predicted(splice, state, target, images, torch.ones(1, *state.latents.shape))
    wanted = (whole - predicted(splice, state, target, images, each_unit(state, 0.0))).T
    found = ablation(splice, state, target)
    assert (found.values - wanted).abs().max() < 1e-12 and wanted.abs().max() > 1e-3
    assert not found.values[~state.on].any()


@pytest.fixture(scope="module")
def scene():
    return Encoder.load(str(MODEL), device="cpu")


@pytest.mark.parametrize("layer, token", [(-1, "class"), (-2, "class"), (2, "spatial")])
def test_ablation_of_the_shipped_model(scene, layer, token):
    images = pictures(scene, 2)
    splice = Splice(scene, dictionary(scene, images, layer, token, n_latents=256, k=8), layer, token)
    state = splice.read(images)
    target = logit(scene.encode_text(["a duck", "a kite"])[0], scene.logit_scale)
    whole = predicted(splice, state, target, images, torch.ones(1, *state.latents.shape))
    wanted = (whole - predicted(splice, state, target, images, each_unit(state, 0.0).float())).T
    found = ablation(splice, state, target).values
    assert state.on.sum() >= 16 and wanted.abs().max() > 0.1  # of a logit of about 10
    assert (found - wanted).abs().max() < 1e-4


def test_memory_is_bounded_by_pairs_sent_at_a_time(monkeypatch):
    splice, images = spliced("class token", 0, "spatial")
    state, target = splice.read(images), cosine(TEXTS[:4])
    wanted = ablation(splice, state, target).values
    sizes = []
    through = splice.through
    monkeypatch.setattr(splice, "through", lambda stream, tokens: sizes.append(len(stream)) or through(stream, tokens))
    monkeypatch.setattr("clipshift_core.attribution.CHUNK_TOKENS", 35)  # three images of ten tokens
    torch.testing.assert_close(ablation(splice, state, target).values, wanted)
    assert max(sizes[1:]) == 3 and sum(sizes[1:]) == state.on.sum()


# The lens, energy and chance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer, token", [(-1, "class"), (0, "spatial")])
def test_the_lens_by_numpy(layer, token):
    splice, images = spliced("class token", layer, token)
    state, visual, d = splice.read(images), splice.encoder.model.visual, splice.sae.W_dec.detach().numpy()
    text = TEXTS[0].float().numpy()
    normed = (d - d.mean(1, keepdims=True)) / np.sqrt(d.var(1, keepdims=True) + visual.ln_post.eps)
    through = (normed * visual.ln_post.weight.numpy() + visual.ln_post.bias.numpy()) @ visual.proj.numpy()
    wanted = through @ text / np.linalg.norm(through, axis=1) / np.linalg.norm(text)
    lens = logit_lens(splice, state, cosine(TEXTS[0])).values
    on = state.on
    np.testing.assert_allclose(lens[on], wanted[state.latents[on]], rtol=1e-4, atol=1e-5)
    assert np.abs(wanted).max() > 0.3
    # Activations of each latent in each image, and those times the length of its decoder row, by a loop.
    activation = np.zeros((len(images), splice.sae.n_latents), np.float32)
    for row, (latents, values) in enumerate(zip(*state.codes, strict=True)):
        for latent, value in zip(latents.tolist(), values.tolist(), strict=True):
            activation[row // (len(state.codes.values) // len(images)), latent] += value
    of_unit = np.take_along_axis(activation, state.latents.numpy(), 1) * on.numpy()
    np.testing.assert_allclose(
        act_x_logit_lens(splice, state, cosine(TEXTS[0])).values, of_unit * lens.numpy(), rtol=1e-4
    )
    lengths = np.linalg.norm(d, axis=1)[state.latents]
    np.testing.assert_allclose(energy(splice, state, cosine(TEXTS[0])).values, of_unit * lengths, rtol=1e-5)
    assert lengths.std() > 0.1
    # Of a margin the margin; a scale scales it.
    both = [logit_lens(splice, state, cosine(text)).values for text in TEXTS[:2]]
    torch.testing.assert_close(
        logit_lens(splice, state, margin(TEXTS[0], TEXTS[1], 7.0)).values, 7 * (both[0] - both[1]), atol=1e-5, rtol=1e-4
    )


def test_random_depends_on_seed_image_and_latent_alone():
    splice, images = spliced("class token", 0, "spatial")
    target = cosine(TEXTS[0])

    def drawn(rows, **settings):
        state = splice.read(images[rows])
        values = random(splice, state, target, **settings).values
        return [
            dict(zip(latents[on].tolist(), numbers[on].tolist(), strict=True))
            for latents, numbers, on in zip(state.latents, values, state.on, strict=True)
        ]

    whole = drawn(slice(0, 4), seed=5)
    assert whole[2:] == drawn(slice(2, 4), seed=5, first=2)
    assert whole != drawn(slice(0, 4), seed=6)
    shared = set(whole[0]) & set(whole[1])
    assert shared and all(whole[0][latent] != whole[1][latent] for latent in shared)
    numbers = np.concatenate([list(row.values()) for row in whole])
    assert 0 <= numbers.min() < 0.2 and 0.8 < numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.15


# One interface --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer, token", [(-1, "class"), (0, "spatial")])
def test_several_texts_are_each_text_alone(method, layer, token):
    splice, state, _ = in_double("class token", layer, token, BatchTopK)
    call = partial(METHODS[method], splice, state, **({"steps": 2} if method == "integrated_gradients" else {}))
    n_images, n_units = state.latents.shape
    many = TEXTS[:26]  # more than the 24 dimensions of the embedding, where slopes are taken another way
    alone = torch.stack([call(logit(text, 9.0)).values for text in many])
    assert alone.shape == (26, n_images, n_units) and alone.abs().max() > 0
    assert not alone[:, ~state.on].any() and not state.on.all()
    for texts in (many[:3], many):
        found = call(logit(texts[:, None], 9.0))
        torch.testing.assert_close(found.values, alone[: len(texts)])
        assert found.gap is None or found.gap.shape == (len(texts), n_images)
    found = call(logit(many[:n_images], 9.0))
    torch.testing.assert_close(found.values, alone[torch.arange(n_images), torch.arange(n_images)])


@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_its_neighbours(method):
    splice, images = spliced("class token", 0, "spatial")
    state, one = splice.read(images), splice.read(images[:1])
    target = cosine(TEXTS[0])
    found, alone = METHODS[method](splice, state, target).values[0], METHODS[method](splice, one, target).values[0]
    torch.testing.assert_close(found[: len(alone)], alone, atol=1e-5, rtol=1e-4)
    assert not found[len(alone) :].any()


def test_where_y_is_linear_all_exact_methods_agree(monkeypatch):
    # A probe on the plain embedding, and a tail without its norm: y = w . (P x), so that each is a_j w . (P d_j).
    splice, state, _ = in_double("class token", -1, "class")
    projection = splice.encoder.model.visual.proj
    monkeypatch.setattr(splice, "through", lambda stream, tokens: tokens[:, 0] @ projection)
    target = probe(TEXTS[0], 2.0, normalised=False)
    wanted = state.codes.values * (splice.W_dec @ projection @ TEXTS[0])[state.codes.indices]
    for method in (act_x_grad, integrated_gradients, ablation):
        torch.testing.assert_close(method(splice, state, target).values, wanted)
    assert integrated_gradients(splice, state, target).gap.abs().max() < 1e-12
    assert wanted.std() > 0.01
