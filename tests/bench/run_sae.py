"""Speed of one training step of a sparse autoencoder against dense products: medians of alternating rounds.

    .venv/bin/python tests/bench/run_sae.py [rounds]

On a busy machine only one thread gives ratios worth reading (OMP_NUM_THREADS=1), those of processor time best.

Contestants, each a process of its own: ours; "dense", the same training with every product dense and autograd through
the whole matrix of pre-activations (`encode_eager`, `decode_eager`), all else equal; and the yardstick, paper B's
recipe. A step is all that happens to one batch: forward, backward, clipping, Adam, normalising. Then the gradients of
ours and of dense on the same batch, and what an epoch would cost if CLIP (ViT-B/32) encoded its images again each time.
Prints a table and writes runs/bench-sae.json.
"""

import json
import os
import resource
import sys
import time
from statistics import median

from contest import ask, n_threads, record, start

WIDTH, K, BATCH = 768, 64, 4096
SIZES = {30_000: 4.0, 4_096: 1.8}
"""Latents, and how many times faster than dense products ours has to be."""
CONTESTANTS = ("yardstick", "dense", "ours")


def main(n_rounds: int = 3) -> None:
    load = os.getloadavg()[0]
    result = {}
    print(
        f"one step, batch {BATCH:,}, width {WIDTH}, k {K}, {n_rounds} alternating rounds, {n_threads()} threads,"
        " medians"
    )
    print(f"{'latents':>8}{'':12}{'s':>8}{'times dense':>13}{'processor s':>13}{'times dense':>13}{'peak GiB':>10}")
    for n_latents, wanted in SIZES.items():
        workers = {name: start(__file__, name, n_latents) for name in CONTESTANTS}
        answers = {name: [] for name in workers}
        for _ in range(n_rounds):
            for name, worker in workers.items():
                answers[name].append(ask(worker))
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
        middle = {name: {key: median(a[key] for a in each) for key in each[0]} for name, each in answers.items()}
        times = {
            name: {key: middle["dense"][key] / each[key] for key in ("seconds", "processor")}
            for name, each in middle.items()
        }
        for name, each in middle.items():
            print(
                f"{n_latents:8,} {name:11}{each['seconds']:8.2f}{times[name]['seconds']:12.2f}x"
                f"{each['processor']:13.2f}{times[name]['processor']:12.2f}x"
                f"{each['peak_gib']:10.2f}{f'  wanted {wanted}' * (name == 'ours')}"
            )
        (gradients := start(__file__, "gradients", n_latents)).stdin.close()
        compared = json.loads(gradients.stdout.readline())
        print(f"{'':9}gradients differ by {compared['difference']:.1e} of their norm at the worst of four weights")
        result[str(n_latents)] = {"steps": answers, "times_dense": times, **compared}
    (clip := start(__file__, "clip", 0)).stdin.close()
    encoding = json.loads(clip.stdout.readline())["seconds_per_image"]
    step = median(each["seconds"] for each in result["30000"]["steps"]["ours"]) / BATCH
    result["seconds_per_image"] = {"encoding": encoding, "step at 30000": step}
    print(
        f"an epoch that encodes its images again takes {1 + encoding / step:.0f} times as long: {1e3 * encoding:.1f} ms"
        f" an image by ViT-B/32, {1e3 * step:.2f} ms a row by the step at 30,000 latents"
    )
    record("bench-sae", result, load)


def work(name: str, n_latents: int) -> None:
    """One contestant: a line in, one step timed (after one untimed), a line out."""
    import torch

    if name == "clip":
        return print(json.dumps({"seconds_per_image": clip_seconds()}), flush=True)
    # Rows as those of a residual stream are: few directions with most of the variance, centred and scaled.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, WIDTH, generator=generator) * torch.logspace(0, -1.5, WIDTH)
    x = x / x.square().mean().sqrt()
    if name == "gradients":
        return print(json.dumps(compared(n_latents, x)), flush=True)
    step = stepper(name, n_latents, x)
    step()
    for _ in sys.stdin:
        began, worked = time.perf_counter(), time.process_time()
        step()
        seconds, processor = time.perf_counter() - began, time.process_time() - worked
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "processor": processor, "peak_gib": peak}), flush=True)


def stepper(name: str, n_latents: int, x):
    import sae_yardstick

    from clipshift_core.sae import TopK
    from clipshift_core.sae_train import Recipe, Training

    if name == "yardstick":
        model = sae_yardstick.Yardstick(WIDTH, n_latents, K)
        adam = sae_yardstick.optimiser(model)
        return lambda: sae_yardstick.step(model, adam, x)

    class Dense(TopK):
        encode, decode = TopK.encode_eager, TopK.decode_eager

    made = (TopK if name == "ours" else Dense)(WIDTH, n_latents, K)
    training = Training(made, Recipe(n_steps=1000), 10**9)
    return lambda: training.update(x)


def compared(n_latents: int, x) -> dict:
    """Gradients by both ways, at the same kept entries: of two nearly equal, rounding decides which is kept."""
    import torch

    from clipshift_core.sae import TopK
    from clipshift_core.sae_kernels import Codes

    made = TopK(WIDTH, n_latents, K)
    weights = dict(made.named_parameters())
    codes = made.encode(x)
    ours = torch.autograd.grad((made.decode(codes) - x).square().mean(), weights.values())
    pre = made.pre_activations(x)
    kept = Codes(codes.indices, pre.gather(1, codes.indices).relu())
    dense = torch.autograd.grad((made.decode_eager(kept) - x).square().mean(), weights.values())
    difference = {name: float((a - b).norm() / b.norm()) for name, a, b in zip(weights, ours, dense, strict=True)}
    same = pre.detach().topk(K, dim=1).indices.sort(1).values == codes.indices.sort(1).values
    alike = float(same.all(1).float().mean())
    return {"difference": max(difference.values()), "by_weight": difference, "rows_kept_alike": alike}


def clip_seconds() -> float:
    """Of encoding one image by ViT-B/32, as `activations` does: the best of three batches."""
    import logging
    import warnings

    import numpy as np
    import open_clip

    from clipshift_core.encoder import Encoder

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # OpenCLIP says that the weights are random: here they are meant to be
    model = open_clip.create_model("ViT-B-32-quickgelu").eval().requires_grad_(False)
    encoder = Encoder(model, "ViT-B-32-quickgelu", name="random ViT-B/32", weights_hash="", precision="fp32")
    images = np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), dtype=np.uint8)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        encoder.encode(images, capture=["token.-1"])
        best = min(best, time.perf_counter() - began)
    return best / len(images)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], int(sys.argv[3]))
    else:
        main(*map(int, sys.argv[1:]))
