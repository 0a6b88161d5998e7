"""Training: a planted dictionary, hand-worked losses, numpy for the statistics, and a run that is killed."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import tensor

from clipshift_core.sae import BatchTopK, Matryoshka, SaeError, TopK
from clipshift_core.sae_quality import quality
from clipshift_core.sae_train import HISTORY, Recipe, Training, free_of_parallel, losses, statistics, train


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on cores that others use wait for each other far longer than these small products take."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def planted(n_rows, n_atoms=48, width=24, active=3, seed=0):
    """Rows that are sums of few atoms, on top of a mean far larger than they are, and the atoms."""
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(n_atoms, width, generator=generator), dim=1)
    which = torch.rand(n_rows, n_atoms, generator=generator).topk(active, dim=1).indices
    strength = 5 + 10 * torch.rand(n_rows, active, generator=generator)
    mean = 40 * torch.randn(width, generator=generator)
    return (atoms[which] * strength[..., None]).sum(1) + mean, atoms


def shuffled(x, batch_size, seed=0):
    """As `train` wants its batches: any number of epochs, from any step on."""
    per_epoch = len(x) // batch_size

    def batches(first):
        step = first
        while True:
            epoch, place = divmod(step, per_epoch)
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 * seed + epoch))
            yield x[order[place * batch_size : (place + 1) * batch_size]]
            step += 1

    return batches


def small(kind=TopK, **settings):
    return kind(6, 24, 2, seed=1, **settings)


def short_run(checkpoint=None, *, n_steps=30, kind=TopK, batches=None, **settings):
    x, _ = planted(400, 12, 6, 2)
    recipe = Recipe(
        n_steps=n_steps, learning_rate=3e-3, warmup_steps=5, dead_after=200, checkpoint_every=7, record_every=4
    )
    made = small(kind, **settings)
    history = train(made, batches or shuffled(x, 40), statistics([x]), recipe, checkpoint=checkpoint, data="planted")
    return made, history


# What it learns -----------------------------------------------------------------------------------------------------


def test_a_planted_dictionary_is_recovered():
    x, atoms = planted(6000)
    made = TopK(24, 64, 3, seed=2)
    recipe = Recipe(n_steps=700, learning_rate=4e-3, warmup_steps=50, descent=0.5, dead_after=3000)
    history = train(made, shuffled(x, 256), statistics(x.split(1000)), recipe)
    best = (atoms @ made.W_dec.detach().T).max(1).values
    assert best.mean() >= 0.95, best
    found = quality(made, x.split(1000))
    assert found.nmse < 0.1 and history["nmse"].iloc[0] > 0.5
    assert list(history.columns) == list(HISTORY) and history["step"].iloc[-1] == 699


def test_the_auxiliary_loss_brings_dead_latents_back():
    """Half the dictionary starts where the other half always wins; without help it would stay there."""
    x, _ = planted(2000)
    n_dead = []
    for dead_after in (10**9, 1000):
        made = TopK(24, 64, 3, seed=2)
        with torch.no_grad():
            made.b_enc[:32] = -3.0
        recipe = Recipe(n_steps=250, learning_rate=4e-3, warmup_steps=10, dead_after=dead_after)
        train(made, shuffled(x, 200), statistics([x]), recipe)
        n_dead.append(quality(made, [x]).n_dead)
    assert n_dead[0] >= 30 and n_dead[1] <= n_dead[0] / 3, n_dead


@pytest.mark.parametrize("kind, settings", [(BatchTopK, {}), (Matryoshka, {"prefixes": [6, 24]})])
def test_the_variants_learn_too(kind, settings):
    x, _ = planted(400, 12, 6, 2)
    made, history = short_run(n_steps=300, kind=kind, **settings)
    found = quality(made, [x])
    assert found.nmse < 0.2 < history["nmse"].iloc[0]
    assert 1.0 < found.l0 < 3.0 and float(made.threshold) > 0.1  # k = 2 on average; in the units of x


# By hand ------------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    made = TopK(2, 3, 1)
    with torch.no_grad():
        made.W_enc.copy_(tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]]))
        made.W_dec.copy_(tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    x = tensor([[3.0, 2.0], [0.0, 1.0]])
    # codes: latent 0 takes 3, leaving (0, 2); latent 1 takes 1, leaving nothing. Mean square 4 / 4.
    found = losses(made, x, tensor([], dtype=torch.long))
    assert found.reconstruction.item() == 1.0 and found.auxiliary.item() == 0.0 and found.nmse.item() == 1.0
    # latent 2 dead, width / 2 = 1: codes 0.5 x 2 = 1 and 0.5; (0, 2) - (0.6, 0.8) = (-0.6, 1.2), -0.5 (0.6, 0.8)
    # squares 0.36 + 1.44 + 0.09 + 0.16 = 2.05, over the residual's 4; one of one is dead: counted in full
    made.b_dec.requires_grad_(False)
    found = losses(made, x, tensor([2]))
    assert found.auxiliary.item() == pytest.approx(2.05 / 4)
    found.auxiliary.backward()
    for parameter in (made.W_enc, made.W_dec):  # the residual is held fixed: only the dead latent learns
        assert not parameter.grad[:2].any() and parameter.grad[2].any()


def test_few_dead_latents_count_less():
    made, x = TopK(8, 16, 2), torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.b_enc[10:] = -2.0
    assert not made.encode(x).dense(16)[:, 10].any()
    only = losses(made, x, tensor([10]))
    left = (x - made(x)).detach()
    codes = (x @ made.W_enc[10] - 2).relu()[:, None]
    wanted = (left - codes * made.W_dec[10]).square().sum() / left.square().sum() / 4  # one dead of width / 2 = 4
    assert only.auxiliary.item() == pytest.approx(wanted.item())


def test_a_step_is_what_the_recipe_says():
    """Six steps against autograd through dense products and torch's plain Adam, some latents dead from the third on."""
    x = torch.randn(6, 10, 8, generator=torch.Generator().manual_seed(3)) * 4  # large enough to be clipped
    recipe = Recipe(n_steps=6, learning_rate=0.02, warmup_steps=2, descent=0.5, dead_after=20)
    ours = Training(TopK(8, 24, 2, seed=1), recipe, 60)
    plain = TopK(8, 24, 2, seed=1)
    adam = torch.optim.Adam(plain.parameters(), fused=False, foreach=False)
    off, clipped, helped = torch.zeros(24), [], []
    for step, batch in enumerate(x):
        ours.update(batch)
        dead = off >= 20
        codes = plain.encode_eager(batch)
        left = batch - plain.decode_eager(codes)
        loss = left.square().mean()
        n = min(4, int(dead.sum()))  # width / 2
        if n:
            values, indices = plain.pre_activations(batch).masked_fill(~dead, -torch.inf).topk(n)
            some = torch.zeros(10, 24).scatter(1, indices, values.relu()) @ plain.W_dec
            unexplained = (left.detach() - some).square().sum() / left.detach().square().sum()
            loss = loss + unexplained / 32 * min(1, int(dead.sum()) / 4)
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            grad, rows = plain.W_dec.grad, plain.W_dec
            grad -= (grad * rows).sum(1, keepdim=True) * rows
            total = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
            for p in plain.parameters():
                p.grad /= total.clamp_min(1.0)
            adam.param_groups[0]["lr"] = 0.02 * [0.5, 1, 1, 1, 2 / 3, 1 / 3][step]
            adam.step()
            plain.W_dec /= plain.W_dec.norm(dim=1, keepdim=True)
        off += 10
        off[codes.dense(24).any(0)] = 0
        clipped.append(float(total) > 1)
        helped.append(n)
        assert torch.equal(ours.off.float(), off)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(getattr(ours.sae, name), parameter, rtol=1e-4, atol=1e-5, msg=f"{name} {step}")
    assert any(clipped) and max(helped) > 0 and ours.step == 6


def test_a_gradient_free_of_its_parallel_part():
    gradient = tensor([[3.0, 4.0], [1.0, 1.0]])
    free_of_parallel(gradient, tensor([[1.0, 0.0], [0.6, 0.8]]))
    # (1, 1) . (0.6, 0.8) = 1.4; (1, 1) - 1.4 (0.6, 0.8) = (0.16, -0.12)
    torch.testing.assert_close(gradient, tensor([[0.0, 4.0], [0.16, -0.12]]))


def test_the_learning_rate_rises_stays_and_falls():
    recipe = Recipe(n_steps=100, warmup_steps=10, descent=0.2)
    # 2e-4 / sqrt(2^16 / 2^14) = 1e-4
    rates = [recipe.rate(step, 2**16) for step in (0, 4, 9, 50, 80, 90, 99)]
    assert rates == pytest.approx([1e-5, 5e-5, 1e-4, 1e-4, 1e-4, 5e-5, 5e-6])
    assert replace(recipe, learning_rate=0.01).rate(50, 2**16) == 0.01


@pytest.mark.parametrize("far", [0.0, 1e4])
def test_statistics_against_numpy(far):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7) + far
    found = statistics(x.split(8))
    exact = x.double().numpy()
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-6, atol=1e-6)
    assert found.scale == pytest.approx(exact.var(0).mean() ** 0.5, rel=1e-9) and found.n_rows == 50


@pytest.mark.parametrize("rows", [torch.ones(4, 3), torch.full((4, 3), float("nan"))])
def test_rows_without_a_spread_are_refused(rows):
    with pytest.raises(SaeError, match="spread of"):
        statistics([rows])


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(SaeError, match="no activations"):
        statistics([])


# Again and again ----------------------------------------------------------------------------------------------------


def test_the_finished_one_takes_activations_as_they_are():
    x, _ = planted(400, 12, 6, 2)
    made, history = short_run(n_steps=200)
    assert abs(float(x.mean())) > 1
    assert quality(made, [x]).nmse == pytest.approx(history["nmse"].iloc[-1], abs=0.05)
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(24))


def test_twice_the_same_bits():
    (one, first), (two, second) = short_run(), short_run()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert first.equals(second)


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
import test_sae_train as tests
tests.torch.set_num_threads(1)
x, _ = tests.planted(400, 12, 6, 2)
whole = tests.shuffled(x, 40)
def batches(first):
    for step, batch in enumerate(whole(first), first):
        print(step, flush=True)
        yield batch
tests.short_run(tests.Path(sys.argv[1]), batches=batches, kind=tests.BatchTopK)
"""


def test_killed_it_goes_on_and_ends_with_the_same_bytes(tmp_path):
    made, history = short_run(tmp_path / "whole", kind=BatchTopK)
    command = [sys.executable, "-c", WRITER, str(tmp_path / "killed"), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:  # kill -9 in step 18
        seen = [int(writer.stdout.readline()) for _ in range(19)]
        writer.send_signal(signal.SIGKILL)
    assert seen == list(range(19))
    asked = []
    x, _ = planted(400, 12, 6, 2)

    def batches(first):
        asked.append(first)
        return shuffled(x, 40)(first)

    again, gone_on = short_run(tmp_path / "killed", kind=BatchTopK, batches=batches)
    assert asked[0] in (14, 21)  # the last multiple of 7 before the kill, or one more if it came late
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert gone_on.equals(history)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    read, history_read = short_run(tmp_path / "killed", kind=BatchTopK)  # complete: read, not trained
    assert torch.equal(read.W_dec, made.W_dec) and torch.equal(read.b_dec, made.b_dec)
    assert torch.equal(read.threshold, made.threshold) and history_read.equals(history)
    assert not list(tmp_path.glob("*.partial"))


def test_a_checkpoint_holds_all_that_training_needs(tmp_path):
    short_run(tmp_path / "held")
    tensors = load_file(tmp_path / "held")
    weights = ("W_enc", "W_dec", "b_enc", "b_dec")
    moments = {f"adam.{name}.{key}" for name in weights for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(tensors) == {f"sae.{name}" for name in weights} | moments | {"off", "step", "history"}
    assert int(tensors["step"]) == 30 and tensors["history"].dtype == torch.float64


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    short_run(tmp_path / "held")
    with pytest.raises(SaeError, match=r"held: a checkpoint of .*\"n_steps\": 30.* this run is .*\"n_steps\": 31"):
        short_run(tmp_path / "held", n_steps=31)


def test_a_damaged_checkpoint_is_named(tmp_path):
    short_run(tmp_path / "held")
    (tmp_path / "held").write_bytes((tmp_path / "held").read_bytes()[:100])
    with pytest.raises(SaeError, match="held: cannot be read"):
        short_run(tmp_path / "held")


def test_a_pass_without_it_makes_a_latent_dead():
    recipe = Recipe(n_steps=1)
    assert [Training(small(), recipe, n).dead_after for n in (400, 10**8)] == [400, 10**7]
    assert Training(small(), replace(recipe, dead_after=7), 400).dead_after == 7


def test_batches_that_end_early_are_named():
    x, _ = planted(400, 12, 6, 2)
    with pytest.raises(SaeError, match="end at step 3 of 30"):
        short_run(batches=lambda first: iter(x.split(40)[:3]))


def test_progress_is_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPSHIFT_PROGRESS", str(tmp_path / "note"))
    short_run()
    assert (tmp_path / "note").read_text().startswith("SAE step 30 of 30, NMSE 0.")
