"""What a sparse autoencoder is computed by: sums over the few latents that are on.

Everything, both ways, is one primitive, torch's `embedding_bag`: a weighted sum of rows. Decoding sums rows of the
decoder for each row of the batch; the gradient of the encoder sums rows of the batch for each latent. It beats dense
products at every size measured (`tests/bench/run_sae.py`, on a CPU), so there is no switch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


class Codes(NamedTuple):
    """The latents that are on, row by row; what is not listed is zero."""

    indices: Int[Tensor, "row slot"]
    """Latents, from 0. A slot that a row has no use for holds any latent and the value 0."""
    values: Float[Tensor, "row slot"]
    """Their activations, in the units of the input (decoder rows have length 1)."""

    def dense(self, n_latents: int) -> Float[Tensor, "row latent"]:
        """The same with every zero written out."""
        return self.values.new_zeros(len(self.values), n_latents).scatter_add(1, self.indices, self.values)


def weighted_rows(codes: Codes, weight: Float[Tensor, "latent width"]) -> Float[Tensor, "row width"]:
    """For each row the sum over its codes of value x weight[index]; touched rows of `weight` get a gradient."""
    return F.embedding_bag(codes.indices, weight, per_sample_weights=codes.values, mode="sum")


def at_chosen(
    x: Float[Tensor, "row width"],
    W_enc: Float[Tensor, "latent width"],
    b_enc: Float[Tensor, " latent"],
    b_dec: Float[Tensor, " width"],
    chosen: Codes,
) -> Float[Tensor, "row slot"]:
    """The pre-activations W_enc (x - b_dec) + b_enc at `chosen`, which holds their values already.

    What this adds is the way back: gradients run through these entries alone, as autograd's would through `topk`.
    """
    return _AtChosen.apply(x, W_enc, b_enc, b_dec, *chosen)


class _AtChosen(torch.autograd.Function):
    """Pre-activations at chosen entries, already computed; backward through these entries alone."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, indices, values):
        ctx.save_for_backward(x, W_enc, b_dec, indices)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, W_enc, b_dec, indices = ctx.saved_tensors
        of_x = of_W_enc = of_b_enc = of_b_dec = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            of_x = F.embedding_bag(indices, W_enc, per_sample_weights=gradient.contiguous(), mode="sum")
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            # The entries by latent instead of by row; sorted stably, for sums in a fixed order give the same bits.
            latents, order = indices.flatten().sort(stable=True)
            starts = torch.searchsorted(latents, torch.arange(len(W_enc), device=indices.device))
            rows, weights = order // indices.shape[1], gradient.flatten()[order]
            ones = x.new_ones(len(x), 1)
            of_W_enc, of_b_enc = (
                F.embedding_bag(rows, of, starts, per_sample_weights=weights, mode="sum") for of in (x - b_dec, ones)
            )
            of_b_enc = of_b_enc[:, 0]
        if ctx.needs_input_grad[3]:
            of_b_dec = -of_x.sum(0)  # not through the sums by latent: they cancel, and take its digits along
        return of_x, of_W_enc, of_b_enc, of_b_dec, None, None
