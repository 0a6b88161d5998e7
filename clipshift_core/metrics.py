"""How far an embedding moved: kernels over the last dimension, for any batch shape and any device.

All sums are float64 whatever the input's precision, because the interesting cosines differ from 1 in the
third or fourth digit. Convention for a zero vector: it has no direction, so its unit vector is zero too. Its cosine
with anything is then 0 and its distance from any unit vector 1; no kernel here yields NaN for finite input.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def unit(x: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
    """Vectors of length 1 in the same directions, float64; a zero vector stays zero."""
    x = x.double()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1.0)


def l2(a: Float[Tensor, "*batch feature"], b: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch"]:
    """|a - b|, in units of the embedding itself: the published distance, taken before normalisation."""
    return torch.linalg.vector_norm(a.double() - b.double(), dim=-1)


def l2_normalised(a: Float[Tensor, "*batch feature"], b: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch"]:
    """Distance of the unit vectors, 0 to 2: the length of the chord, sqrt(2 - 2 cos) without its cancellation."""
    return torch.linalg.vector_norm(unit(a) - unit(b), dim=-1)


def cosine(a: Float[Tensor, "*batch feature"], b: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch"]:
    """Cosine similarity a.b / (|a| |b|), -1 to 1 (rounding beyond 1 is cut off)."""
    return (unit(a) * unit(b)).sum(dim=-1).clamp(-1.0, 1.0)


def pairwise_cosine_distance(
    embeddings: Float[Tensor, "image view feature"], *, chunk: int = 1024
) -> Float[Tensor, "view view"]:
    """Mean over images of 1 - cosine between every two views of the same image, 0 to 2; the diagonal is exactly 0.

    The mean over images and the sum over features are one matrix product, taken `chunk` images at a time, so
    that the float64 copy stays small. Raises ValueError where there is no image.
    """
    if embeddings.ndim != 3 or len(embeddings) == 0:
        raise ValueError(f"expected (image, view, feature) with at least one image, got {tuple(embeddings.shape)}")
    n_images, n_views, _ = embeddings.shape
    total = torch.zeros(n_views, n_views, dtype=torch.float64, device=embeddings.device)
    for part in embeddings.split(chunk):
        flat = unit(part).transpose(0, 1).reshape(n_views, -1)
        total += flat @ flat.T
    distance = (1 - total / n_images).clamp(0.0, 2.0).fill_diagonal_(0.0)
    return (distance + distance.T) / 2  # a matrix product is symmetric up to rounding only
