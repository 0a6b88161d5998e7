"""The yardstick for sparse autoencoders: paper B's recipe, plainly, from the facts of its paper and its public code.

    .venv/bin/python tests/bench/sae_yardstick.py [epochs]

trains it and ours on class tokens of the embedded model (12,000 drawn scenes, equal width, k, data and epochs) and
measures both on 4,000 other scenes; dead latents are those that never come on in the scenes trained on.

Top-k of the signed pre-activations of a weight-normed linear layer with bias; a decoder of unit columns without bias;
dense products; loss 100 x MSE between the L2-normalised input and reconstruction; AdamW (eps 1e-7, weight decay 0.01),
learning rate 2e-4, cut to a tenth after 24/30 and again after 28/30 of the epochs; gradients clipped to norm 1; batches
of 32. Inputs as they are: no centring, no scaling. Nothing is done about dead latents. Float32, where the public code
has 16-bit autocast.
"""

import sys
import time

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
    """By numbers held together, for small x: nmse about the mean; nmse_fitted, after the best common factor on x_hat
    (its loss sees directions alone and leaves the length open); mean cosine; n_dead, never other than zero."""
    z = model.latents(x)
    x_hat, x = model(x).double(), x.double()
    total = (x - x.mean(0)).square().sum()
    factor = (x * x_hat).sum() / x_hat.square().sum()
    return {
        "nmse": float((x - x_hat).square().sum() / total),
        "nmse_fitted": float((x - factor * x_hat).square().sum() / total),
        "cosine": float(F.cosine_similarity(x, x_hat, dim=1).mean()),
        "n_dead": int((z != 0).any(0).logical_not().sum()),
    }


def main(n_epochs: int = 20) -> None:
    from clipshift_core.activations import Source, stored
    from clipshift_core.encoder import Encoder
    from clipshift_core.profiles import ROOT
    from clipshift_core.sae import TopK
    from clipshift_core.sae_quality import quality as quality_of_ours
    from clipshift_core.sae_train import Recipe, statistics
    from clipshift_core.sae_train import train as train_ours
    from clipshift_core.scenes import HELD_OUT

    encoder = Encoder.load(str(ROOT / "data" / "models" / "scene-s16"), device="cpu")
    seen, unseen = (
        stored(Source.of_scenes(seeds, encoder.image_size), encoder, -1, "class", ROOT / "runs" / "bench-sae")
        for seeds in (range(12_000), range(HELD_OUT, HELD_OUT + 4_000))
    )
    x, new = (torch.cat(list(each.in_order())) for each in (seen, unseen))
    print(f"{n_epochs} epochs; {'':19}{'nmse':>8}{'fitted':>8}{'cosine':>8}{'dead':>6}{'seconds':>9}")
    for n_latents, k in ((1024, 16), (4096, 32)):
        began = time.perf_counter()
        model = train(Yardstick(x.shape[1], n_latents, k), x, n_epochs)
        seconds = time.perf_counter() - began
        found = quality(model, new) | {"n_dead": quality(model, x)["n_dead"]}
        show("yardstick", n_latents, k, found, seconds)

        began = time.perf_counter()
        ours = TopK(x.shape[1], n_latents, k)
        recipe = Recipe(n_steps=n_epochs * (len(x) // 128), learning_rate=5e-4 / (n_latents / 2**14) ** 0.5)
        train_ours(ours, lambda first: seen.batches(first, batch_size=128, seed=0), statistics(seen.in_order()), recipe)
        seconds = time.perf_counter() - began
        on_new = quality_of_ours(ours, unseen.in_order())
        found = on_new._asdict() | {"nmse_fitted": on_new.nmse, "n_dead": quality_of_ours(ours, seen.in_order()).n_dead}
        show("ours", n_latents, k, found, seconds)


def show(name: str, n_latents: int, k: int, found: dict, seconds: float) -> None:
    numbers = f"{found['nmse']:8.4f}{found['nmse_fitted']:8.4f}{found['cosine']:8.4f}{found['n_dead']:6,}{seconds:9.0f}"
    print(f"{name:10} {n_latents:6,} latents, k {k:3}{numbers}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
