"""The autoencoders against hand-worked examples, autograd through dense products, gradcheck and numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import tensor

from clipshift_core import sae as room
from clipshift_core.sae import BatchTopK, Matryoshka, PublishedTopK, SaeError, TopK
from clipshift_core.sae_kernels import Codes, weighted_rows
from clipshift_core.sae_quality import quality

WEIGHTS = {
    "W_enc": tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
    "b_enc": tensor([0.0, 0.0, -0.5]),
    "W_dec": tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]),
    "b_dec": tensor([1.0, 0.0]),
}
X = tensor([[3.0, 1.0], [0.0, 0.0]])
# x - b_dec: (2, 1) and (-1, 0)
# pre-activations: (2, 1, 2 + 1 - 0.5 = 2.5) and (-1, 0, -1 + 0 - 0.5 = -1.5)


def by_hand(kind, k, **settings):
    made = kind(2, 3, k, **settings)
    with torch.no_grad():
        for name, value in WEIGHTS.items():
            getattr(made, name).copy_(value)
    return made


def random(kind, width=7, n_latents=20, k=4, dtype=torch.float64, **settings):
    """An autoencoder away from its tied start, and some rows for it."""
    made = kind(width, n_latents, k, seed=3, **settings).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return made, torch.randn(11, width, generator=generator, dtype=dtype)


def gradients(made, x, way):
    """Of a loss that is not symmetric in its entries, with respect to the rows and every weight."""
    x = x.clone().requires_grad_()
    codes = getattr(made, f"encode{way}")(x)
    out = getattr(made, f"decode{way}")(codes)
    aim = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    wanted = {"x": x} | {name: p for name, p in made.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((out - aim).pow(2).sum() + out[0].sum(), list(wanted.values()))
    return {"out": out.detach()} | dict(zip(wanted, found, strict=True))


# By hand ------------------------------------------------------------------------------------------------------------


def test_top_k_by_hand():
    made = by_hand(TopK, 2)
    codes = made.encode(X)
    assert codes.indices[0].tolist() == [2, 0] and codes.values[0].tolist() == [2.5, 2.0]
    assert codes.values[1].tolist() == [0.0, 0.0]  # the two largest are 0 and -1
    # 2.5 (0.6, 0.8) + 2 (1, 0) + b_dec = (1.5 + 2 + 1, 2); nothing on: b_dec
    torch.testing.assert_close(made.decode(codes), tensor([[4.5, 2.0], [1.0, 0.0]]))
    assert codes.dense(3).tolist() == [[2.0, 0.0, 2.5], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(made(X), made.decode(codes))


def test_published_by_hand_lets_negative_values_pass():
    made = PublishedTopK(2, 3, 2)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec"):
            getattr(made, name).copy_(WEIGHTS[name])
    codes = made.encode(tensor([[-1.0, 0.0]]))  # pre-activations (-1, 0, -1.5)
    assert codes.dense(3).tolist() == [[-1.0, 0.0, 0.0]]
    assert made.decode(codes).tolist() == [[-1.0, 0.0]]
    assert not made.b_dec.requires_grad
    with pytest.raises(SaeError, match="mean of length 5"):
        made.rescale(tensor([3.0, 4.0]), 1.0)


def test_batch_top_k_by_hand():
    made = by_hand(BatchTopK, 1)
    codes = made.training_codes(X)  # the 1 x 2 largest of all: 2.5 and 2, both of the first row
    assert codes.dense(3).tolist() == [[2.0, 0.0, 2.5], [0.0, 0.0, 0.0]]
    assert float(made.threshold) == 2.0
    # x = (2, 1), (1, 1): pre-activations (1, 1, 1 + 1 - 0.5) and (0, 1, 0.5); the two largest: 1.5 and one of the ones
    codes = made.training_codes(tensor([[2.0, 1.0], [1.0, 1.0]]))
    assert sorted(codes.values.flatten().tolist())[-2:] == [1.0, 1.5]
    assert float(made.threshold) == pytest.approx(0.99 * 2.0 + 0.01 * 1.0)
    assert made.encode(X).dense(3).tolist() == [[2.0, 0.0, 2.5], [0.0, 0.0, 0.0]]  # all above 1.99, whatever k
    assert made.encode(X[1:]).indices.shape == (1, 1)  # nothing is on: one empty slot
    assert made.encode(X[:0]).dense(3).shape == (0, 3)


def test_matryoshka_by_hand():
    made = by_hand(Matryoshka, 1, prefixes=[1, 3])
    codes = made.training_codes(X)
    # row 1: x - b_dec = (2, 1); latent 0 takes 2 (1, 0): (0, 1) is left; latent 2 takes 2.5 (0.6, 0.8): (-1.5, -1)
    # row 2: x - b_dec = (-1, 0) is left by both
    wanted = tensor([[[0.0, 1.0], [-1.0, 0.0]], [[-1.5, -1.0], [-1.0, 0.0]]])
    torch.testing.assert_close(made.residuals(X, codes), wanted)
    torch.testing.assert_close(made.residuals(X, codes)[-1], X - made.decode(codes))


@pytest.mark.parametrize("prefixes", [[], [3, 1], [1, 2], [0, 3], [1, 1, 3], [1, 4]])
def test_prefixes_that_do_not_grow_to_the_last_latent_are_refused(prefixes):
    with pytest.raises(SaeError, match="prefixes"):
        Matryoshka(2, 3, 1, prefixes=prefixes)


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(SaeError, match=f"k = {k}: 1 to n_latents = 3"):
        TopK(2, 3, k)


def test_among_some_latents_alone():
    made = by_hand(TopK, 1)
    codes = made.codes_among(X[:1], tensor([0, 1]), 5)
    assert codes.dense(3).tolist() == [[2.0, 1.0, 0.0]]
    codes = made.codes_among(X[:1], tensor([1, 2]), 1)
    assert codes.dense(3).tolist() == [[0.0, 0.0, 2.5]]


# Against dense products ---------------------------------------------------------------------------------------------

KINDS = [(TopK, {}), (PublishedTopK, {}), (BatchTopK, {}), (Matryoshka, {"prefixes": [3, 20]})]


@pytest.mark.parametrize("entries", [1, 20 * 4, 2**24])  # one row at a time; three chunks, the last one short; one
@pytest.mark.parametrize("kind, settings", KINDS)
def test_sparse_and_eager_agree_both_ways(kind, settings, entries, monkeypatch):
    monkeypatch.setattr(room, "CHUNK_ENTRIES", entries)
    made, x = random(kind, **settings)
    if isinstance(made, BatchTopK):
        made.threshold.fill_(0.7)
    sparse, eager = gradients(made, x, ""), gradients(made, x, "_eager")
    assert sparse.keys() == eager.keys() and len(sparse) == (5 if kind is PublishedTopK else 6)
    for name, wanted in eager.items():
        torch.testing.assert_close(sparse[name], wanted, rtol=1e-12, atol=1e-12, msg=name)


def test_float32_gradients_agree_to_a_millionth():
    made, x = random(TopK, 64, 512, 16, torch.float32)
    x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(1))
    sparse, eager = gradients(made, x, ""), gradients(made, x, "_eager")
    for name, wanted in eager.items():
        assert float((sparse[name] - wanted).norm() / wanted.norm()) < 1e-6, name


def test_gradcheck():
    made, x = random(TopK)

    def run(x, *weights):
        return torch.func.functional_call(made, dict(zip(names, weights, strict=True)), (x,))

    names = [name for name, _ in made.named_parameters()]
    inputs = [x.requires_grad_(), *(p.detach().requires_grad_() for p in made.parameters())]
    assert torch.autograd.gradcheck(run, inputs, eps=1e-7, atol=1e-6)


def test_the_batch_keeps_the_largest_codes_however_it_is_cut(monkeypatch):
    made, x = random(BatchTopK)
    pre = made.pre_activations(x).detach().numpy()
    smallest = np.sort(pre.ravel())[-4 * len(x)]
    for entries in (20, 60, 2**24):
        monkeypatch.setattr(room, "CHUNK_ENTRIES", entries)
        kept = made.training_codes(x).dense(20).detach().numpy()
        np.testing.assert_allclose(kept, np.where(pre >= smallest, pre, 0.0), rtol=1e-12)


def test_a_latent_that_is_nowhere_on_has_no_gradient():
    made, x = random(TopK)
    codes = made.encode(x)
    made.decode(codes).square().sum().backward()
    off = torch.ones(20, dtype=torch.bool)
    off[codes.indices[codes.values > 0]] = False
    assert 0 < off.sum() < 20
    for parameter in (made.W_enc, made.W_dec, made.b_enc):
        assert not parameter.grad[off].any() and parameter.grad[~off].any()


def test_weights_and_values_alone_can_be_differentiated():
    codes = Codes(tensor([[0, 2]]), tensor([[2.0, 3.0]]))
    weight = tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]], requires_grad=True)
    weighted_rows(codes, weight).sum().backward()
    assert weight.grad.tolist() == [[2.0, 2.0], [0.0, 0.0], [3.0, 3.0]]
    values = codes.values.requires_grad_()
    weighted_rows(Codes(codes.indices, values), weight.detach()).backward(tensor([[10.0, 1.0]]))
    assert values.grad.tolist() == [[10.0, 1.0]]


@pytest.mark.parametrize("kind, settings", KINDS)
def test_rescaled_it_does_the_same_to_activations_as_they_are(kind, settings):
    made, x = random(kind, **settings)
    mean, scale = torch.zeros(7) if kind is PublishedTopK else torch.arange(7.0, dtype=torch.float64), 3.5
    if isinstance(made, BatchTopK):
        made.threshold.fill_(0.7)
    codes, out = made.encode(x), made(x)
    made.rescale(mean, scale)
    raw = x * scale + mean
    torch.testing.assert_close(made.encode(raw).dense(20), codes.dense(20) * scale)
    torch.testing.assert_close(made(raw), out * scale + mean)


def test_the_start_is_tied_of_unit_length_and_a_function_of_the_seed():
    made = TopK(5, 9, 2, seed=4)
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(9))
    assert torch.equal(made.W_enc, made.W_dec) and not made.b_enc.any() and not made.b_dec.any()
    assert torch.equal(TopK(5, 9, 2, seed=4).W_dec, made.W_dec)
    assert not torch.equal(TopK(5, 9, 2, seed=5).W_dec, made.W_dec)
    with torch.no_grad():
        made.W_dec.mul_(3)
    made.normalise()
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(9))


# Quality ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [0.0, 3000.0])  # far from zero, where float32 sums of squares would be lost
def test_quality_against_numpy(far):
    made, x = random(TopK, dtype=torch.float32)
    made.rescale(torch.full((7,), far), 1.0)
    x = x + far
    found = quality(made, x.split(3))
    codes = made.encode_eager(x).dense(20).detach().numpy().astype(np.float64)
    x_hat, x = made.decode_eager(made.encode_eager(x)).detach().double().numpy(), x.double().numpy()
    assert found.nmse == pytest.approx(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-4)
    cosine = (x * x_hat).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(x_hat, axis=1)
    assert found.cosine == pytest.approx(cosine.mean(), abs=1e-6)
    share = (codes > 0).mean(0)
    np.testing.assert_allclose(found.firing, share, rtol=1e-6)
    assert found.l0 == pytest.approx(share.sum()) and found.n_rows == 11
    assert found.n_dead == (share == 0).sum() > 0 and found.n_dense == (share > 0.1).sum() > 0


def test_quality_of_the_mean_is_one_and_of_the_identity_zero():
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) + 5
    mean = TopK(2, 4, 4)
    with torch.no_grad():
        mean.b_dec.copy_(x.mean(0))
        mean.W_enc.zero_()
    assert quality(mean, [x]).nmse == pytest.approx(1.0, rel=1e-6)
    exact = TopK(2, 4, 4)
    directions = torch.cat([torch.eye(2), -torch.eye(2)])  # x = max(x, 0) - max(-x, 0), component by component
    with torch.no_grad():
        exact.W_enc.copy_(directions), exact.W_dec.copy_(directions)
    assert quality(exact, x.split(7)).nmse == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(SaeError, match="no batches"):
        quality(exact, [])


def test_of_an_eager_step_the_sparse_one_holds_a_fraction():
    """The whole matrix of pre-activations is never a tensor that autograd keeps."""
    made, _ = random(TopK, 8, 4096, 4, torch.float32)
    x = torch.randn(256, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        F.mse_loss(made(x), x)
    assert max(kept) <= made.W_enc.numel() < 256 * 4096
