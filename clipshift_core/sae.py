"""Sparse autoencoders: a dictionary of directions, of which few at a time write an activation.

    codes            a = ReLU(top k of W_enc (x - b_dec) + b_enc)
    reconstruction   x_hat = sum_j a_j W_dec[j] + b_dec

`TopK` is paper B's (Gao et al. 2024); its siblings differ in which codes they keep or in what has to be reconstructed.
Only the kept codes are ever held: the encoder's product is taken a few rows at a time, and all that follows runs
through the kernels of `sae_kernels`. `encode_eager` and `decode_eager` say the same by dense products: their oracle.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipshift_core.sae_kernels import Codes, at_chosen, weighted_rows

CHUNK_ENTRIES = 2**24
"""Pre-activations held at a time (64 MiB in float32)."""


class SaeError(ValueError):
    """An autoencoder that cannot be made, trained or read as asked: the value, and what would be accepted."""


class TopK(nn.Module):
    """Keeps the `k` largest pre-activations of each row, and of these the positive ones.

    W_enc, W_dec: (n_latents, width), a row per latent; b_enc: (n_latents,); b_dec: (width,). Decoder rows start as
    random unit vectors drawn from `seed`, encoder rows equal to them, biases at zero.
    """

    variant = "topk"

    def __init__(self, width: int, n_latents: int, k: int, *, seed: int = 0):
        super().__init__()
        if not 1 <= k <= n_latents:
            raise SaeError(f"k = {k}: 1 to n_latents = {n_latents} is accepted")
        self.width, self.n_latents, self.k = width, n_latents, k
        drawn = torch.randn(n_latents, width, generator=torch.Generator().manual_seed(seed))
        self.W_dec = nn.Parameter(F.normalize(drawn, dim=1))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(width))

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make an autoencoder of this shape."""
        return {"width": self.width, "n_latents": self.n_latents, "k": self.k}

    def encode(self, x: Float[Tensor, "row width"]) -> Codes:
        """The codes of each row; gradients flow to `x` and the weights through the kept entries."""
        return self._kept(x, self._largest(x, self.k))

    def training_codes(self, x: Float[Tensor, "row width"]) -> Codes:
        """The codes by which the batch is reconstructed in training: here those of `encode`."""
        return self.encode(x)

    def codes_among(self, x: Float[Tensor, "row width"], latents: Int[Tensor, " some"], k: int) -> Codes:
        """The `k` largest codes of each row among some latents alone: what the auxiliary loss is made of."""
        return self._kept(x, self._largest(x, min(k, len(latents)), latents))

    def decode(self, codes: Codes) -> Float[Tensor, "row width"]:
        """The reconstruction."""
        return weighted_rows(codes, self.W_dec) + self.b_dec

    def forward(self, x: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        return self.decode(self.encode(x))

    def residuals(self, x: Float[Tensor, "row width"], codes: Codes) -> Float[Tensor, "part row width"]:
        """What each reconstruction that counts in the loss leaves of `x`; the last one is the whole one's."""
        return (x - self.decode(codes))[None]

    def pre_activations(self, x: Float[Tensor, "row width"]) -> Float[Tensor, "row latent"]:
        """All of them at once: for small batches."""
        return torch.addmm(self.b_enc, x - self.b_dec, self.W_enc.T)

    def encode_eager(self, x: Float[Tensor, "row width"]) -> Codes:
        """The oracle of `encode`: autograd through the whole matrix of pre-activations."""
        values, indices = self.pre_activations(x).topk(self.k, dim=1)
        return Codes(indices, self._activate(values))

    def decode_eager(self, codes: Codes) -> Float[Tensor, "row width"]:
        """The oracle of `decode`: a dense product."""
        return codes.dense(self.n_latents) @ self.W_dec + self.b_dec

    @torch.no_grad()
    def rescale(self, mean: Float[Tensor, " width"], scale: float) -> None:
        """Turn an autoencoder of (x - mean) / scale into the one of x that does the same, in place.

        ReLU and top-k commute with a positive factor, so that only the biases change:
        scale (W_enc ((x - mean) / scale - b_dec) + b_enc) = W_enc (x - (mean + scale b_dec)) + scale b_enc.
        """
        self.b_dec.mul_(scale).add_(mean)
        self.b_enc.mul_(scale)

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring each decoder row back to length 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @staticmethod
    def _activate(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return values.relu()

    def _kept(self, x: Float[Tensor, "row width"], chosen: Codes) -> Codes:
        values = at_chosen(x, self.W_enc, self.b_enc, self.b_dec, chosen)
        return Codes(chosen.indices, self._activate(values))

    @torch.no_grad()
    def _largest(self, x: Float[Tensor, "row width"], k: int, among: Int[Tensor, " some"] | None = None) -> Codes:
        indices = torch.empty(len(x), k, dtype=torch.long, device=x.device)
        values = x.new_empty(len(x), k)
        for rows, pre in self._chunks(x, among):
            torch.topk(pre, k, dim=1, out=(values[rows], indices[rows]))
        return Codes(indices if among is None else among[indices], values)

    def _chunks(
        self, x: Float[Tensor, "row width"], among: Int[Tensor, " some"] | None = None
    ) -> Iterator[tuple[slice, Float[Tensor, "few latent"]]]:
        """The pre-activations of a few rows at a time, always in the same memory."""
        weight, bias = (self.W_enc, self.b_enc) if among is None else (self.W_enc[among], self.b_enc[among])
        n_rows = max(1, CHUNK_ENTRIES // len(bias))
        memory = x.new_empty(min(n_rows, len(x)), len(bias))
        for start in range(0, len(x), n_rows):
            part = x[start : start + n_rows] - self.b_dec
            yield slice(start, start + len(part)), torch.addmm(bias, part, weight.T, out=memory[: len(part)])


class PublishedTopK(TopK):
    """As paper B's public code has it: the k largest pass with their sign, and nothing is added to the decoder's sum.

    For checkpoints of that code (`sae_formats.load_published`). The two kinds agree wherever a row has k positive
    pre-activations.
    """

    variant = "published"

    def __init__(self, width: int, n_latents: int, k: int, *, seed: int = 0):
        super().__init__(width, n_latents, k, seed=seed)
        self.b_dec.requires_grad_(False)

    def rescale(self, mean: Float[Tensor, " width"], scale: float) -> None:
        if mean.any():
            raise SaeError(
                f"a mean of length {mean.norm():.3g}: a published autoencoder has no decoder bias to hold it"
            )
        super().rescale(mean, scale)

    @staticmethod
    def _activate(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return values


class BatchTopK(TopK):
    """Keeps the k n largest positive pre-activations of a batch of n rows (Bussmann et al. 2024).

    Rows that need more codes get more. Outside training a row must not depend on its neighbours: there, codes are kept
    that exceed `threshold`, the running mean over training of the smallest one kept.
    """

    variant = "batchtopk"
    PACE = 0.01
    """Share of a batch in the running mean."""

    def __init__(self, width: int, n_latents: int, k: int, *, seed: int = 0):
        super().__init__(width, n_latents, k, seed=seed)
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, x: Float[Tensor, "row width"]) -> Codes:
        """The codes above `threshold`; as many slots as the fullest row has codes."""
        return self._kept(x, self._above(x, float(self.threshold), None))

    def training_codes(self, x: Float[Tensor, "row width"]) -> Codes:
        """The k n largest codes of the batch; moves `threshold`."""
        codes = self._kept(x, self._above(x, 0.0, self.k * len(x)))
        smallest = codes.values.detach()[codes.values > 0]
        if len(smallest):
            moved = self.threshold.lerp(smallest.min(), self.PACE)
            self.threshold.copy_(torch.where(self.threshold == 0, smallest.min(), moved))
        return codes

    def encode_eager(self, x: Float[Tensor, "row width"]) -> Codes:
        pre = self.pre_activations(x)
        return Codes(torch.arange(self.n_latents).expand(len(x), -1), torch.where(pre > self.threshold, pre, 0.0))

    def rescale(self, mean: Float[Tensor, " width"], scale: float) -> None:
        super().rescale(mean, scale)
        self.threshold.mul_(scale)

    @torch.no_grad()
    def _above(self, x: Float[Tensor, "row width"], floor: float, most: int | None) -> Codes:
        """The entries above `floor`, at most the `most` largest of them, by row and padded to the fullest."""
        row, latent, value = (torch.empty(0, dtype=t, device=x.device) for t in (torch.long, torch.long, x.dtype))
        for rows, pre in self._chunks(x):
            more = (pre > floor).nonzero(as_tuple=True)
            row, latent = torch.cat([row, more[0] + rows.start]), torch.cat([latent, more[1]])
            value = torch.cat([value, pre[more]])
            if most is not None and len(value) > most:
                best = value.topk(most).indices.sort().values
                row, latent, value = row[best], latent[best], value[best]
                floor = float(value.min())
        count = torch.bincount(row, minlength=len(x))
        slot = torch.arange(len(row), device=x.device) - (count.cumsum(0) - count)[row]
        shape = (len(x), max(1, int(count.max()))) if len(x) else (0, 1)
        indices, values = torch.zeros(shape, dtype=torch.long, device=x.device), x.new_zeros(shape)
        indices[row, slot], values[row, slot] = latent, value
        return Codes(indices, values)


class Matryoshka(BatchTopK):
    """BatchTopK whose first latents alone must reconstruct too (Bussmann et al. 2025).

    prefixes: how many of the first latents each reconstruction has, growing, the last of them all. The mean of their
    errors is the loss, which keeps general concepts in the first latents from being split up by the later ones.
    """

    variant = "matryoshka"

    def __init__(self, width: int, n_latents: int, k: int, *, prefixes: Iterable[int], seed: int = 0):
        super().__init__(width, n_latents, k, seed=seed)
        self.prefixes = tuple(prefixes)
        if not self.prefixes or list(self.prefixes) != sorted({*self.prefixes, n_latents}) or self.prefixes[0] < 1:
            raise SaeError(f"prefixes {self.prefixes}: numbers that grow from 1 or more to {n_latents} are accepted")

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "prefixes": list(self.prefixes)}

    def residuals(self, x: Float[Tensor, "row width"], codes: Codes) -> Float[Tensor, "part row width"]:
        left, parts, first = x - self.b_dec, [], 0
        for last in self.prefixes:
            inside = (codes.indices >= first) & (codes.indices < last)
            left = left - weighted_rows(Codes(codes.indices, codes.values * inside), self.W_dec)
            parts.append(left)
            first = last
        return torch.stack(parts)


VARIANTS: dict[str, type[TopK]] = {kind.variant: kind for kind in (TopK, BatchTopK, Matryoshka, PublishedTopK)}
