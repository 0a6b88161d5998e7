"""Examples against sorting everything, scores against loops over pairs, clusters against all splits there are."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from clipshift_core import concepts


def _codes(shape: tuple[int, ...], n_latents: int, seed: int = 0, levels: int = 6) -> tuple[Tensor, Tensor]:
    """Codes with distinct latents in a row, many equal values, and unused slots (any latent, value 0)."""
    rng = np.random.default_rng(seed)
    n_rows, k = int(np.prod(shape[:-1])), shape[-1]
    indices = np.stack([rng.permutation(n_latents)[:k] for _ in range(n_rows)])
    values = rng.integers(0, levels, (n_rows, k)) / 4
    indices[values == 0] = 0
    return torch.from_numpy(indices).view(shape), torch.from_numpy(values).float().view(shape)


def _dense(indices: Tensor, values: Tensor, n_latents: int, over: str = "max") -> np.ndarray:
    """Each image's activations, (image, latent), entry by entry."""
    if indices.ndim == 2:
        indices, values = indices[:, None], values[:, None]
    n_images, n_tokens, k = indices.shape
    found = np.zeros((n_images, n_tokens, n_latents))
    for i, t, s in np.ndindex(n_images, n_tokens, k):
        found[i, t, indices[i, t, s]] += max(float(values[i, t, s]), 0)
    return found.max(axis=1) if over == "max" else found.mean(axis=1)


def _batches(indices: Tensor, values: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(indices.split(size), values.split(size), strict=True))


# examples


def test_hand_worked():
    # image 0: latent 2 at 3; image 1: latent 2 at 5 and latent 0 at 1; image 2: latent 2 at 3, a tie with image 0
    indices = torch.tensor([[2, 0], [2, 0], [2, 1]])
    values = torch.tensor([[3.0, 0.0], [5.0, 1.0], [3.0, 0.0]])
    found = concepts.examples([(indices, values)], 4, n_examples=2)
    assert found.image.tolist() == [[1, -1], [-1, -1], [1, 0], [-1, -1]]
    assert found.value.tolist() == [[1, 0], [0, 0], [5, 3], [0, 0]]
    assert found.frequency.tolist() == pytest.approx([1 / 3, 0, 1, 0])
    assert found.mean.tolist() == pytest.approx([1 / 3, 0, 11 / 3, 0])
    assert found.max.tolist() == [1, 0, 5, 0] and found.n_images == 3


def test_over_tokens_hand_worked():
    # one image of two tokens: latent 0 at 4 and off, latent 1 at 1 and 3: maxima 4 and 3, means 2 and 2
    indices, values = torch.tensor([[[0, 1], [1, 0]]]), torch.tensor([[[4.0, 1.0], [3.0, 0.0]]])
    assert concepts.examples([(indices, values)], 2, n_examples=1).max.tolist() == [4, 3]
    assert concepts.examples([(indices, values)], 2, n_examples=1, over="mean").max.tolist() == [2, 2]


@pytest.mark.parametrize("waiting", [0, concepts.WAITING])
@pytest.mark.parametrize(("shape", "over"), [((90, 4), "max"), ((60, 5, 3), "max"), ((60, 5, 3), "mean")])
def test_equal_sorting_everything_whatever_the_batches(shape, over, waiting, monkeypatch):
    """Values are few, so that ties decide; with waiting = 0 candidates are merged in again and again."""
    monkeypatch.setattr(concepts, "WAITING", waiting)
    n_latents, n = 12, 4
    indices, values = _codes(shape, n_latents)
    dense = _dense(indices, values, n_latents, over).astype(np.float32)
    for size in (1, 7, 1000):
        found = concepts.examples(_batches(indices, values, size), n_latents, n_examples=n, over=over)
        for latent in range(n_latents):
            order = sorted(np.flatnonzero(dense[:, latent]), key=lambda i, a=dense[:, latent]: (-a[i], i))[:n]
            assert found.image[latent].tolist() == [*order, *[-1] * (n - len(order))]
            assert found.value[latent].tolist() == [*dense[order, latent], *[0] * (n - len(order))]
        np.testing.assert_allclose(found.frequency, (dense > 0).mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(found.mean, dense.mean(axis=0), rtol=1e-6)


def test_a_latent_is_off_where_its_value_is_negative():
    found = concepts.examples([(torch.tensor([[0, 1]]), torch.tensor([[-2.0, 1.0]]))], 2, n_examples=1)
    assert found.image.tolist() == [[-1], [0]] and found.frequency.tolist() == [0, 1]


def test_pooled_holds_every_activation_once():
    indices, values = _codes((40, 6, 3), 9)
    for over in ("max", "mean"):
        image, latent, value = concepts.pooled(indices, values, 9, over)
        written = np.zeros((40, 9))
        np.add.at(written, (image.numpy(), latent.numpy()), value.numpy())
        np.testing.assert_allclose(written, _dense(indices, values, 9, over), rtol=1e-6)
        assert len(value) == (written > 0).sum() and (image.diff() >= 0).all()


@pytest.mark.parametrize(
    ("indices", "values", "over", "message"),
    [
        (torch.zeros(2, 3).long(), torch.zeros(2, 4), "max", "both must be"),
        (torch.full((2, 3), 5), torch.ones(2, 3), "max", "latents 5 to 5: 0 to 4 are accepted"),
        (torch.zeros(2, 3).long(), torch.full((2, 3), torch.nan), "max", "NaN or infinite"),
        (torch.zeros(2, 3).long(), torch.ones(2, 3), "sum", "'max' or 'mean'"),
    ],
)
def test_refuses_what_are_no_codes(indices, values, over, message):
    with pytest.raises(ValueError, match=message):
        concepts.examples([(indices, values)], 5, over=over)
    with pytest.raises(ValueError, match="no codes"):
        concepts.examples([], 5)


def test_heat_maps_are_the_activations_at_each_patch():
    indices, values = _codes((5, 6, 3), 7)
    maps = concepts.heat_maps(indices, values, 3, (2, 3))
    for i, row, col in np.ndindex(5, 2, 3):
        on = indices[i, 3 * row + col] == 3
        assert maps[i, row, col] == values[i, 3 * row + col][on].sum()
    assert maps.sum() > 0
    with pytest.raises(ValueError, match="leave the class token out"):
        concepts.heat_maps(indices, values, 3, (2, 2))


# scores


@pytest.fixture(scope="module")
def embeddings() -> Tensor:
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) + 0.7


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Examples of six latents: twelve, twelve, five, two, one, none."""
    rows = torch.full((6, 12), -1)
    for latent, n in enumerate((12, 12, 5, 2, 1, 0)):
        rows[latent, :n] = torch.randperm(50, generator=torch.Generator().manual_seed(latent))[:n]
    return rows


def _pairs(vectors: np.ndarray) -> list[float]:
    cosine = cosine_similarity(vectors)
    return [cosine[i, j] for i, j in itertools.permutations(range(len(vectors)), 2)]


def test_clarity_is_the_mean_cosine_of_pairs(embeddings, images):
    mean, n = concepts.mean_embedding(embeddings, images), (images >= 0).sum(1)
    found = concepts.clarity(mean, n)
    for latent in range(4):
        expected = np.mean(_pairs(embeddings[images[latent, : n[latent]]].numpy()))
        assert found[latent] == pytest.approx(expected, abs=1e-5)
    assert found[4:].isnan().all() and mean[5].isnan().all()
    # the lengths of the embeddings do not matter
    scaled = concepts.mean_embedding(embeddings * torch.arange(1, 51)[:, None], images)
    torch.testing.assert_close(scaled[:5], mean[:5])


def test_clarity_hand_worked():
    # (|mean|^2 - 1/n) n / (n - 1): two orthogonal, |mean|^2 = 1/2: 0; two the same: 1; two opposite: -1;
    # three at right angles, |mean|^2 = 1/3: 0
    axes = torch.eye(3)
    axes = torch.cat([axes, -axes[:1]])
    rows = torch.tensor([[0, 1, -1], [0, 0, -1], [0, 3, -1], [0, 1, 2]])
    found = concepts.clarity(concepts.mean_embedding(axes, rows), torch.tensor([2, 2, 2, 3]))
    assert found.tolist() == pytest.approx([0, 1, -1, 0], abs=1e-6)


def test_nearest_against_every_pair(embeddings, images):
    mean = concepts.mean_embedding(embeddings, images[[0, 5, 1, 2, 3, 4]])  # the second has no examples
    known = [0, 2, 3, 4, 5]
    expected = cosine_similarity(mean[known])
    np.fill_diagonal(expected, -2)
    for chunk in (2, 1024):
        found = concepts.nearest(mean, chunk=chunk)
        assert found.latent[known].tolist() == [known[i] for i in expected.argmax(axis=1)]
        np.testing.assert_allclose(found.cosine[known], expected.max(axis=1), atol=1e-5)
        assert found.latent[1] == -1 and found.cosine[1].isnan()
        assert found.redundancy == pytest.approx(expected.max(axis=1).mean(), abs=1e-5)
    alone = concepts.nearest(mean[:2])
    assert alone.latent.tolist() == [-1, -1] and alone.cosine.isnan().all()


def test_similarity_is_the_cosine(embeddings):
    a, b = embeddings[:5], embeddings[5:9]
    np.testing.assert_allclose(concepts.similarity(a, b), cosine_similarity(a, b), atol=1e-6)


def _spread(vectors: np.ndarray, second: np.ndarray) -> float:
    return sum(((v - v.mean(axis=0)) ** 2).sum() for v in (vectors[second], vectors[~second]) if len(v))


def test_two_means_against_every_split():
    """Nine vectors can be split in 255 ways; the best of them is the truth that k-means looks for."""
    vectors = torch.nn.functional.normalize(torch.randn(40, 9, 4, generator=torch.Generator().manual_seed(1)), dim=2)
    second = concepts.two_means(vectors, torch.ones(40, 9, dtype=torch.bool)).numpy()
    splits = [np.array(bits, bool) for bits in itertools.product([0, 1], repeat=8) if any(bits)]
    ratio = []
    for v, found in zip(vectors.double().numpy(), second, strict=True):
        best = min(_spread(v, np.append(split, False)) for split in splits)
        ratio.append(_spread(v, found) / best)
    assert np.mean(np.array(ratio) < 1 + 1e-6) > 0.9 and max(ratio) < 1.05


def test_polysemanticity_against_scikit_learn():
    """Two clouds about random centres, which k-means finds from any start worth the name."""
    rng = np.random.default_rng(2)
    centres = rng.standard_normal((6, 2, 32))
    points = np.concatenate(
        [c + 0.3 * rng.standard_normal((n, 32)) for pair in centres for c, n in zip(pair, (13, 7), strict=True)]
    )
    rows = torch.arange(120).view(6, 20)
    found = concepts.polysemanticity(torch.from_numpy(points), rows, chunk=4)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    for latent in range(6):
        fitted = KMeans(2, n_init=10, random_state=0).fit(unit[rows[latent]])
        expected = 1 - cosine_similarity(fitted.cluster_centers_)[0, 1]
        assert found[latent] == pytest.approx(expected, abs=1e-5)
    assert found.min() > 0.4


def test_polysemanticity_hand_worked():
    # two and three along two axes at right angles: centres are the axes, 1 - cos 90 = 1; opposite: 1 + 1 = 2;
    # all the same: 0; one example: unknown
    points = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    rows = torch.tensor([[0, 0, 1, 1, 1], [0, 2, 2, -1, -1], [1, 1, 1, 1, -1], [0, -1, -1, -1, -1]])
    found = concepts.polysemanticity(5 * points, rows)
    assert found[:3].tolist() == pytest.approx([1, 2, 0], abs=1e-6) and found[3].isnan()


def test_mono_score_against_a_loop_over_pairs(embeddings):
    indices, values = _codes((50, 3, 4), 8)
    values[indices == 5] = 0  # on in no image
    dense, cosine = _dense(indices, values, 8), cosine_similarity(embeddings)
    for size in (1, 50):
        batches = list(zip(indices.split(size), values.split(size), embeddings.split(size), strict=True))
        found = concepts.mono_score(batches, 8)
        for latent in (0, 1, 2, 3, 4, 6, 7):
            a = dense[:, latent]
            pairs = list(itertools.permutations(range(50), 2))
            expected = sum(a[i] * a[j] * cosine[i, j] for i, j in pairs) / sum(a[i] * a[j] for i, j in pairs)
            assert found[latent] == pytest.approx(expected, abs=1e-5)
        assert found[5].isnan()


def test_mono_score_hand_worked():
    # activations 1 and 2 on orthogonal images, 1 on a third along the first: a_i a_j cos_ij: (0,1) 0, (0,2) 1, (1,2) 0;
    # a_i a_j: 2, 1, 2; so 1/5. A latent on in one image alone is unknown.
    batch = (torch.tensor([[0], [0], [0], [1]]), torch.tensor([[1.0], [2.0], [1.0], [3.0]]), torch.eye(3)[[0, 1, 0, 2]])
    found = concepts.mono_score([batch], 2)
    assert found[0] == pytest.approx(1 / 5, abs=1e-6) and found[1].isnan()


def test_equal_activations_make_mono_score_the_clarity(embeddings):
    indices = torch.arange(50)[:, None] // 10
    found = concepts.examples([(indices, torch.ones(50, 1))], 5, n_examples=10)
    table = concepts.describe(found, embeddings)
    mono = concepts.mono_score([(indices, torch.ones(50, 1), embeddings)], 5)
    np.testing.assert_allclose(table["clarity"], mono, atol=1e-5)


def test_describe_looks_at_the_first_examples_alone(embeddings):
    indices, values = _codes((50, 6), 30, levels=40)
    found = concepts.examples([(indices, values)], 31, n_examples=15)
    table = concepts.describe(found, embeddings, n_examples=5)
    assert table["latent"].tolist() == list(range(31)) and table["n_examples"].max() == 5
    few = found.image[3, :5]
    assert table["clarity"][3] == pytest.approx(np.mean(_pairs(embeddings[few].numpy())), abs=1e-5)
    never = table.iloc[30]
    assert never["frequency"] == 0 and np.isnan(never["clarity"]) and np.isnan(never["redundancy"])
    assert (table["nearest"] < 0).tolist() == [False] * 30 + [True]
