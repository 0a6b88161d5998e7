"""The yardstick for sparse autoencoders: paper B's recipe, plainly, from the facts of its paper and its public code.

Top-k of the signed pre-activations of a weight-normed linear layer with bias; a decoder of unit columns without bias;
dense products; loss 100 x MSE between the L2-normalised input and reconstruction; AdamW (eps 1e-7, weight decay 0.01),
learning rate 2e-4, cut to a tenth after 24/30 and again after 28/30 of the epochs; gradients clipped to norm 1; batches
of 32. Inputs as they are: no centring, no scaling. Nothing is done about dead latents. Float32, where the public code
has 16-bit autocast.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class Yardstick(nn.Module):
    def __init__(self, width: int, n_latents: int, k: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = weight_norm(nn.Linear(width, n_latents))
            directions = nn.Linear(n_latents, width, bias=False).weight.detach()
        self.directions = nn.Parameter(directions)
        self.width, self.n_latents, self.k = width, n_latents, k

    def latents(self, x):
        z = self.encoder(x)
        values, indices = z.topk(self.k, dim=1)
        return torch.zeros_like(z).scatter(1, indices, values)

    def forward(self, x):
        return F.linear(self.latents(x), F.normalize(self.directions, dim=0))


def optimiser(model):
    return torch.optim.AdamW(model.parameters(), lr=2e-4, eps=1e-7)


def step(model, adam, x):
    """One step of training on a batch."""
    unit = [F.normalize(each, dim=-1) for each in (model(x), x)]
    loss = 100 * F.mse_loss(*unit)
    adam.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    return float(loss.detach())


def train(model, x, n_epochs: int, *, batch_size: int = 32, seed: int = 0):
    """Train on the rows of `x` for so many epochs."""
    adam = optimiser(model)
    drops = [n_epochs * 24 // 30, n_epochs * 28 // 30]
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, drops, gamma=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            step(model, adam, x[rows])
        schedule.step()
    return model


@torch.no_grad()
def quality(model, x) -> dict[str, float]:
    """nmse about the mean, mean cosine, dead latents (never other than zero), by numbers held together: for small x."""
    z = model.latents(x)
    x_hat = model(x)
    mean = x.double().mean(0)
    return {
        "nmse": float((x.double() - x_hat).square().sum() / (x.double() - mean).square().sum()),
        "cosine": float(F.cosine_similarity(x.double(), x_hat.double(), dim=1).mean()),
        "n_dead": int((z != 0).any(0).logical_not().sum()),
    }
