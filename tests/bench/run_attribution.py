"""Cost of attributing an image and testing its orders against paper B's protocol: medians of alternating rounds.

    .venv/bin/python tests/bench/run_attribution.py [rounds]

On a busy machine only one thread gives ratios worth reading: OMP_NUM_THREADS=1.

ViT-B/32 with random weights, a dictionary of 30,000 latents (k 64) after its last block, the class token, the cosine to
a text for each image. All do six methods and the deletion of 0 to 5 latents in the order of each. The yardstick
(`attribution_yardstick`) runs the whole image encoder 42 times. Ours encodes an image once, or starts from its stored
class token; its integrated gradients are real ones, at the default number of steps, and insertion comes along. Exact
ablation, ours alone, is timed apart. What depends on the dictionary alone, its logit lens, is in hand on both sides.

Contestants are processes of their own, with the batches that suit them. Where both mean the same, their curves on the
same images are compared. Prints tables and writes runs/bench-attribution.json.
"""

import json
import logging
import os
import sys
import time
import warnings
from statistics import median

from contest import ALLOCATOR, ask, n_threads, record, start

WIDTH, DIM, N_LATENTS, K = 768, 512, 30_000, 64
CONTESTANTS = {"yardstick": (8, {}), "ours, one encode": (32, ALLOCATOR), "ours, cached": (256, ALLOCATOR)}
"""Images in a batch, and environment."""
WANTED = {"ours, one encode": 40, "ours, cached": 1500}
"""How many times less than the yardstick each has to cost."""
ALIKE = ("act_x_grad", "act_x_logit_lens", "energy")
"""Methods that mean the same on both sides and put no latent that is off in front."""


def main(n_rounds: int = 3) -> None:
    load = os.getloadavg()[0]
    workers = {name: start(__file__, name, environment=environment) for name, (_, environment) in CONTESTANTS.items()}
    answers = {name: [] for name in workers}
    for _ in range(n_rounds):
        for name, worker in workers.items():
            answers[name].append(ask(worker))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    n_images = {name: n for name, (n, _) in CONTESTANTS.items()}
    ms = {name: 1e3 * median(a["seconds"] for a in each) / n_images[name] for name, each in answers.items()}
    times = {name: ms["yardstick"] / each for name, each in ms.items()}
    parts = {
        name: {part: 1e3 * median(a["parts"][part] for a in each) / n_images[name] for part in each[0]["parts"]}
        for name, each in answers.items()
    }
    theirs, ours = (answers[name][0]["curves"] for name in ("yardstick", "ours, one encode"))
    difference = max(
        abs(a - b)
        for method in ALIKE
        for rows in zip(theirs[method], ours[method], strict=False)
        for a, b in zip(*rows, strict=True)
    )

    print(
        f"ViT-B/32, random weights, {N_LATENTS:,} latents, k {K}, {n_rounds} alternating rounds, {n_threads()} threads,"
        " medians"
    )
    print(f"{'':18}{'batch':>6}{'ms/image':>10}{'yardstick':>12}")
    for name, each in ms.items():
        wanted = f"  wanted {WANTED[name]:,}" if name in WANTED else ""
        print(f"{name:18}{n_images[name]:6}{each:10.2f}{times[name]:11,.0f}x{wanted}")
    print(f"deletion curves differ by {difference:.1e} at most: {', '.join(ALIKE)}")
    columns = [name for name in parts if parts[name]]
    print(f"\n{'ms/image':24}" + "".join(f"{name:>18}" for name in columns))
    for part in parts["ours, one encode"]:
        row = "".join(f"{parts[name][part]:18.3f}" if part in parts[name] else f"{'':18}" for name in columns)
        print(f"{part:24}{row}" + "  (apart)" * (part == "ablation"))

    result = {
        "ms_per_image": ms,
        "times_less_than_the_yardstick": times,
        "wanted": WANTED,
        "parts_ms_per_image": parts,
        "largest_difference_of_curves": difference,
        "rounds": {name: [a["seconds"] for a in each] for name, each in answers.items()},
        "images": n_images,
    }
    record("bench-attribution", result, load)


def work(name: str) -> None:
    """One contestant: a line in, one batch timed (after one untimed), a line out."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    # Libraries print on stdout; the answers have it to themselves.
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # OpenCLIP says that the weights are random: here they are meant to be
    n_images = CONTESTANTS[name][0]
    # The same images and texts for all, the yardstick's first; as many more as a contestant's batch has.
    images = np.random.default_rng(0).integers(0, 256, (n_images, 224, 224, 3), dtype=np.uint8)
    texts = np.random.default_rng(1).standard_normal((n_images, DIM), np.float32)
    encoder, sae = made(images[: CONTESTANTS["yardstick"][0]])
    texts = F.normalize(torch.from_numpy(texts), dim=1)
    with torch.no_grad():
        build = yardstick if name == "yardstick" else ours
        run = build(encoder, sae, images, texts, cached=name == "ours, cached")
    run()
    for _ in sys.stdin:
        answers.write(json.dumps(run()) + "\n")
        answers.flush()


def made(images):
    """Encoder and dictionary, both random; the dictionary in the units of the class token, as a trained one is."""
    import open_clip
    import torch

    from clipshift_core.encoder import Encoder
    from clipshift_core.sae import TopK

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval().requires_grad_(False)
    encoder = Encoder(model, "ViT-B-32-quickgelu", name="random ViT-B/32", weights_hash="", precision="fp32")
    x = encoder.encode(images, capture=["token.-1"]).captured["token.-1"]
    sae = TopK(WIDTH, N_LATENTS, K).requires_grad_(False)
    sae.rescale(x.mean(0), float(x.std(0).square().mean().sqrt()))
    return encoder, sae


def yardstick(encoder, sae, images, texts, *, cached: bool):
    """A function that gives seconds and curves; its images are decoded and normalised beforehand."""
    from attribution_yardstick import Yardstick

    reference = Yardstick(encoder.model.visual, dict(sae.named_parameters()), sae.k, texts)
    pixels = encoder.preprocess(images)

    def run() -> dict:
        began = time.perf_counter()
        found = reference(pixels)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "parts": {}, "curves": {name: found[name].tolist() for name in ALIKE}}

    return run


def ours(encoder, sae, images, texts, *, cached: bool):
    """A function that gives seconds, in all and by part, and curves."""
    import torch

    from clipshift_core import attribution, faithfulness
    from clipshift_core.splice import Splice

    splice, target = Splice(encoder, sae, -1, "class"), attribution.cosine(texts)
    splice.lens  # noqa: B018 (made on first use)
    # Stored class tokens: drawn with the mean of real ones, about as far apart. What they are makes no difference.
    spread = sae.b_dec + torch.randn(len(images), WIDTH, generator=torch.Generator().manual_seed(2))

    def run() -> dict:
        parts = {}

        def timed(part: str, call):
            began = time.perf_counter()
            found = call()
            parts[part] = time.perf_counter() - began
            return found

        x = spread
        if not cached:
            x = timed("encoder", lambda: encoder.encode(images, capture=["token.-1"]).captured["token.-1"])
        state = timed("codes", lambda: splice.from_activations(x))
        scores = {
            name: timed(name, lambda method=method: method(splice, state, target).values)
            for name, method in attribution.METHODS.items()
        }
        del scores["ablation"]
        amounts = state.by_latent(state.codes.values)
        evaluate = attribution.evaluator(splice, state, target)
        steps = faithfulness.PUBLISHED_STEPS
        curves = timed("deletion and insertion", lambda: faithfulness.curves(amounts, scores, evaluate, steps=steps))
        found = {name: curves.deletion[curves.methods.index(name)].tolist() for name in ALIKE}
        return {"seconds": sum(parts.values()) - parts["ablation"], "parts": parts, "curves": found}

    return run


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
    else:
        main(*map(int, sys.argv[1:]))
