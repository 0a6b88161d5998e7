"""Training a sparse autoencoder on stored activations; it can be killed at any time and ends with the same bits.

The recipe is the modern one (Gao et al. 2024): the activations centred and scaled to unit variance, the decoder's
gradient freed of its part along each row and the rows brought back to length 1, Adam with a learning rate of
2e-4 / sqrt(n_latents / 2^14), warm-up and a descent at the end, gradients clipped to norm 1, and latents that have
gone dead taught to write what the others leave over. CLIP is not run here: batches come from `activations`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipshift_core.progress import note
from clipshift_core.sae import SaeError, TopK
from clipshift_core.sae_kernels import Codes, weighted_rows

AUXILIARY = 1 / 32
"""Weight of the auxiliary loss."""
LARGEST_GRADIENT = 1.0
MOST_ROWS_OFF = 10_000_000
HISTORY = ("step", "learning_rate", "nmse", "auxiliary", "l0", "n_dead")


class Statistics(NamedTuple):
    """What a set of activations is centred and scaled by."""

    mean: Float[Tensor, " width"]
    scale: float
    """Root mean square of the components of x - mean."""
    n_rows: int


def statistics(batches: Iterable[Float[Tensor, "row width"]]) -> Statistics:
    """Of all rows of an iterator, in float64 sums."""
    n_rows, total, squares, origin = 0, 0.0, 0.0, 0.0
    for batch in batches:
        origin = batch[0].double() if n_rows == 0 else origin  # a difference of large sums would lose digits
        moved = batch.double() - origin
        n_rows, total, squares = n_rows + len(batch), total + moved.sum(0), squares + float(moved.square().sum())
    if not n_rows:
        raise SaeError("no activations: there is nothing to learn from")
    mean = total / n_rows
    scale = (max(0.0, squares / n_rows - float(mean.square().sum())) / len(mean)) ** 0.5
    if not 0 < scale < float("inf"):
        raise SaeError(f"the activations have a spread of {scale}: finite rows that differ are wanted")
    return Statistics((origin + mean).float(), scale, n_rows)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train."""

    n_steps: int
    learning_rate: float | None = None
    """The highest; None is 2e-4 / sqrt(n_latents / 2^14)."""
    warmup_steps: int = 100
    descent: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    dead_after: int | None = None
    """A latent that has been off for so many rows is dead: it is taught by the auxiliary loss. None is as many rows as
    there are activations, at most `MOST_ROWS_OFF`."""
    checkpoint_every: int = 500
    """Steps."""
    record_every: int = 20
    """Steps from one row of the history to the next."""

    def rate(self, step: int, n_latents: int) -> float:
        """The learning rate of a step."""
        highest = self.learning_rate or 2e-4 / (n_latents / 2**14) ** 0.5
        left = (self.n_steps - step) / max(1.0, self.descent * self.n_steps)
        return highest * min(1.0, (step + 1) / max(1, self.warmup_steps), left)


def train(
    sae: TopK,
    batches: Callable[[int], Iterator[Float[Tensor, "row width"]]],
    seen: Statistics,
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    data: str = "",
) -> pd.DataFrame:
    """Train `sae` in place, from its start or from `checkpoint`, and return the history as a table.

    batches: called with a step, iterates over the batches from that step on (`activations.Activations.batches`).
    seen: of the activations; the finished autoencoder takes and gives them as they are, not centred, not scaled.
    data: names the batches (the key of the activations, the batch size); a checkpoint of others is refused.

    Columns of the history: step, learning_rate, nmse (of the batch), auxiliary (loss), l0, n_dead. Raises SaeError for
    batches that end early, and for a checkpoint that another run has made.
    """
    state = Training(sae, recipe, seen.n_rows, _made_from(sae, seen, recipe, data))
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint)
    device = sae.b_dec.device
    mean, stream = seen.mean.to(device), batches(state.step)
    for step in range(state.step, recipe.n_steps):
        batch = next(stream, None)
        if batch is None:
            raise SaeError(f"the batches end at step {step} of {recipe.n_steps}; give more epochs or fewer steps")
        x = (batch.to(device, torch.float32) - mean) / seen.scale
        found = state.update(x)
        if step % recipe.record_every == 0 or step + 1 == recipe.n_steps:
            state.history.append([step, recipe.rate(step, sae.n_latents), *map(float, found)])
            note(f"SAE step {step + 1} of {recipe.n_steps}, NMSE {found[0]:.3f}, {found[-1]:.0f} dead")
        if checkpoint is not None and (state.step % recipe.checkpoint_every == 0 or state.step == recipe.n_steps):
            state.save(checkpoint)
    sae.rescale(mean, seen.scale)
    return pd.DataFrame(state.history, columns=HISTORY).astype({"step": int, "n_dead": int})


class Losses(NamedTuple):
    """What one batch, centred and scaled, is trained by."""

    reconstruction: Float[Tensor, ""]
    """Mean square of the residuals, over the parts that count: in these units the normalised MSE."""
    auxiliary: Float[Tensor, ""]
    """What the dead latents leave of the residual, relative to it; 0 where none is dead."""
    nmse: Float[Tensor, ""]
    """Mean square of the last residual: without the other prefixes of a Matryoshka."""
    codes: Codes


def losses(sae: TopK, x: Float[Tensor, "row width"], dead: Int[Tensor, " some"]) -> Losses:
    """The losses of a batch. The auxiliary one has the dead latents' largest width / 2 codes write the residual, which
    is held fixed, without b_dec, which is in the reconstruction already; where fewer are dead it counts less."""
    codes = sae.training_codes(x)
    residuals = sae.residuals(x, codes)
    nmse = residuals[-1].detach().square().mean()
    auxiliary = x.new_zeros(())
    if len(dead):
        some = sae.width // 2
        left = residuals[-1].detach()
        unexplained = left - weighted_rows(sae.codes_among(x, dead, some), sae.W_dec)
        auxiliary = min(1.0, len(dead) / some) * unexplained.square().mean() / nmse.clamp_min(1e-12)
    return Losses(residuals.square().mean(), auxiliary, nmse, codes)


@torch.no_grad()
def free_of_parallel(gradient: Float[Tensor, "latent width"], rows: Float[Tensor, "latent width"]) -> None:
    """Take from each row of the gradient, in place, its part along that unit row, which could only stretch it."""
    along = torch.linalg.vecdot(gradient, rows)
    gradient.addcmul_(rows, along[:, None], value=-1)


class Training:
    """A training under way, and all that a checkpoint holds: weights, Adam's moments, for how many rows each latent has
    been off, the step, the history."""

    def __init__(self, sae: TopK, recipe: Recipe, n_rows: int, made_from: str = ""):
        self.sae, self.recipe, self.made_from = sae, recipe, made_from
        self.dead_after = recipe.dead_after or min(n_rows, MOST_ROWS_OFF)
        self.trained = {name: p for name, p in sae.named_parameters() if p.requires_grad}
        self.adam = torch.optim.Adam(self.trained.values(), fused=True)  # several times faster than the other ways
        self.off = torch.zeros(sae.n_latents, dtype=torch.long, device=sae.b_dec.device)
        self.step, self.history = 0, []

    def update(self, x: Float[Tensor, "row width"]) -> tuple[Tensor, ...]:
        """One step on a centred and scaled batch; returns what the history wants of it."""
        dead = (self.off >= self.dead_after).nonzero()[:, 0]
        found = losses(self.sae, x, dead)
        self.adam.zero_grad(set_to_none=True)
        (found.reconstruction + AUXILIARY * found.auxiliary).backward()
        free_of_parallel(self.sae.W_dec.grad, self.sae.W_dec)
        torch.nn.utils.clip_grad_norm_(self.trained.values(), LARGEST_GRADIENT)
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.rate(self.step, self.sae.n_latents)
        self.adam.step()
        self.sae.normalise()
        on = found.codes.values > 0
        self.off += len(x)
        self.off[found.codes.indices[on]] = 0
        self.step += 1
        return found.nmse, found.auxiliary.detach(), on.sum() / len(x), torch.tensor(len(dead))

    def save(self, path: Path) -> None:
        """Write it beside its place and rename it, so that a kill leaves the old one or the new one."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.trained.items():
            tensors |= {f"adam.{name}.{key}": tensor for key, tensor in self.adam.state[parameter].items()}
        tensors |= {"off": self.off, "step": torch.tensor(self.step)}
        tensors |= {"history": torch.tensor(self.history, dtype=torch.float64)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, {"of": self.made_from})
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote. Raises SaeError if that cannot be read or was made from something else."""
        try:
            with safe_open(path, "pt", device=str(self.off.device)) as held:
                made_from = (held.metadata() or {}).get("of")
                tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise SaeError(f"{path}: cannot be read: {error}; delete it to train anew") from None
        if made_from != self.made_from:
            raise SaeError(f"{path}: a checkpoint of {made_from}, this run is {self.made_from}; delete it, or move it")
        self.sae.load_state_dict({k.removeprefix("sae."): t for k, t in tensors.items() if k.startswith("sae.")})
        for name, parameter in self.trained.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.adam.state[parameter] = {key: tensors[f"adam.{name}.{key}"] for key in keys}
        self.off, self.step = tensors["off"], int(tensors["step"])
        self.history = tensors["history"].tolist()


def _made_from(sae: TopK, seen: Statistics, recipe: Recipe, data: str) -> str:
    """All that a run's bits depend on but the machine, as json; not how often it is checkpointed."""
    choices = {key: value for key, value in asdict(recipe).items() if key != "checkpoint_every"}
    mean = hashlib.sha256(seen.mean.cpu().numpy().tobytes()).hexdigest()
    start = hashlib.sha256(sae.W_enc.detach().cpu().numpy().tobytes()).hexdigest()
    activations = {"mean": mean, "scale": seen.scale, "n_rows": seen.n_rows, "data": data}
    made_from = {"variant": sae.variant, **sae.settings, "start": start, **choices, **activations}
    return json.dumps(made_from, sort_keys=True)
