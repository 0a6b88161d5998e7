"""The kernels against scipy, one pair of vectors at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial import distance

from clipshift_core import metrics

KERNELS = [metrics.l2, metrics.l2_normalised, metrics.cosine]


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(5, 9, 32, generator=rng)
    return a, a + 0.3 * torch.randn(5, 9, 32, generator=rng)


def test_equal_scipy_vector_by_vector(pair):
    a, b = pair
    for index in np.ndindex(5, 9):
        u, v = a[index].double().numpy(), b[index].double().numpy()
        assert metrics.l2(a, b)[index] == pytest.approx(distance.euclidean(u, v), rel=1e-12)
        assert metrics.cosine(a, b)[index] == pytest.approx(1 - distance.cosine(u, v), rel=1e-12)
        chord = distance.euclidean(u / np.linalg.norm(u), v / np.linalg.norm(v))
        assert metrics.l2_normalised(a, b)[index] == pytest.approx(chord, rel=1e-12)


def test_hand_worked():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    assert metrics.l2(a, b).item() == pytest.approx(2**0.5)
    assert metrics.cosine(a, b).item() == pytest.approx(24 / 25)
    assert metrics.l2_normalised(a, b).item() == pytest.approx(2**0.5 / 5)
    assert metrics.cosine(a, -a).item() == -1.0


@pytest.mark.parametrize("kernel", KERNELS)
def test_broadcasts_and_returns_float64_for_any_precision(kernel, pair):
    a, b = pair
    assert torch.equal(kernel(a[:, :1], b), kernel(a[:, :1].expand_as(b), b))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        low = kernel(a.to(dtype), b.to(dtype))
        assert low.dtype == torch.float64
        assert torch.equal(low, kernel(a.to(dtype).double(), b.to(dtype).double()))


def test_sums_in_float64():
    """In float32 arithmetic 1 - cos of two vectors this close is off by more than its own size."""
    a = torch.ones(4096)
    b = a.clone()
    b[0] += 2**-10
    u, v = a.double().numpy(), b.double().numpy()
    expected = 0.5 * distance.sqeuclidean(u / np.linalg.norm(u), v / np.linalg.norm(v))
    assert (1 - metrics.cosine(a, b)).item() == pytest.approx(expected, rel=1e-4)
    assert metrics.l2_normalised(a, b).item() ** 2 / 2 == pytest.approx(expected, rel=1e-9)


def test_zero_vector_convention():
    zero, one = torch.zeros(3), torch.tensor([0.0, 2.0, 0.0])
    assert metrics.cosine(zero, one).item() == 0 == metrics.cosine(zero, zero).item()
    assert metrics.l2_normalised(zero, one).item() == 1
    assert metrics.l2_normalised(zero, zero).item() == 0 == metrics.l2(zero, zero).item()


finite = arrays(np.float32, (2, 8), elements=st.floats(-(2.0**99), 2.0**99, width=32))


@given(finite)
@settings(deadline=None)
def test_bounds_and_symmetry_for_any_finite_vectors(x):
    a, b = torch.from_numpy(x)
    assert -1 <= metrics.cosine(a, b) <= 1
    assert 0 <= metrics.l2_normalised(a, b) <= 2 + 1e-12
    assert metrics.l2(a, b) >= 0
    for kernel in KERNELS:
        assert kernel(a, b) == kernel(b, a)


def test_pairwise_distance_equals_a_loop_over_scipy(pair):
    embeddings = torch.cat(pair, dim=1)[:, ::3]
    n, views = embeddings.shape[:2]
    expected = np.zeros((views, views))
    for image in embeddings.double().numpy():
        expected += distance.cdist(image, image, "cosine") / n
    for chunk in (1, 2, 1024):
        result = metrics.pairwise_cosine_distance(embeddings, chunk=chunk)
        np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)
        assert torch.equal(result, result.T)
        assert (result.diagonal() == 0).all()


def test_pairwise_distance_of_a_zero_embedding_is_one():
    embeddings = torch.zeros(1, 3, 4)
    embeddings[0, 1:, 0] = 1
    expected = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)
    assert torch.equal(metrics.pairwise_cosine_distance(embeddings), expected)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 4)])
def test_pairwise_distance_refuses_no_images(shape):
    with pytest.raises(ValueError, match="at least one image"):
        metrics.pairwise_cosine_distance(torch.zeros(shape))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_on_cuda(pair):
    a, b = (x.cuda() for x in pair)
    for kernel in KERNELS:
        torch.testing.assert_close(kernel(a, b).cpu(), kernel(*pair), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        metrics.pairwise_cosine_distance(a).cpu(), metrics.pairwise_cosine_distance(pair[0]), rtol=0, atol=1e-12
    )
