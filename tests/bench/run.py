"""Speed of the one pass on ViT-B/32 (embeddings, attention and every metric) against the yardstick: medians of
alternating runs on all cores.

    .venv/bin/python tests/bench/run.py [rounds]

On a busy machine only one thread gives ratios worth reading: OMP_NUM_THREADS=1.

Every contestant is a process of its own, with the environment it would have: ours with the allocator settings that
the runner gives its kernels, the yardstick with none. Prints a table and writes runs/bench.json. The floor is the time
that the matrix products alone would take at the best rate measured here, counted over ten forward passes. Of our pass
the metrics are all that is not the encoder's; what capturing attention and class tokens costs is timed apart, on the
same views, and is a small difference of large times.
"""

import json
import logging
import os
import sys
import time
import warnings
from statistics import median

from contest import ALLOCATOR, ask, n_threads, record, start

N_IMAGES, N_VIEWS = 8, 10
CONTESTANTS = {"yardstick": {}, "ours, fp32": ALLOCATOR, "ours, mixed": ALLOCATOR}


def main(n_rounds: int = 5) -> None:
    load = os.getloadavg()[0]
    workers = {name: start(__file__, name, environment=environment) for name, environment in CONTESTANTS.items()}
    seconds = {name: [] for name in workers}
    parts = {name: [] for name in workers}
    gflops = []
    for _ in range(n_rounds):
        for name, worker in list(workers.items()):
            answer = ask(worker)
            if "refused" in answer:
                print(f"{name}: left out. {answer['refused']}")
                workers.pop(name).stdin.close()
                continue
            seconds[name].append(answer["seconds"])
            parts[name].append(answer["parts"])
            gflops.append(answer["gflops"])
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    per_image = {name: median(each) / N_IMAGES for name, each in seconds.items() if each}
    peak, gflop = max(gflops), gflop_per_image()
    floor = gflop / peak
    shares = {
        name: {part: median(each[part] for each in held) / (N_IMAGES * per_image[name]) for part in held[0]}
        for name, held in parts.items()
        if held and held[0]
    }
    result = {
        "shares_of_the_pass": shares,
        "ms_per_image": {name: 1e3 * each for name, each in per_image.items()},
        "images_per_second": {name: 1 / each for name, each in per_image.items()},
        "times_the_yardstick": {name: per_image["yardstick"] / each for name, each in per_image.items()},
        "share_of_fp32_floor": {name: floor / each for name, each in per_image.items()},
        "floor_ms_per_image": 1e3 * floor,
        "gflop_per_image": gflop,
        "gemm_peak_gflops_fp32": peak,
        "rounds": seconds,
        "images": N_IMAGES,
        "views": N_VIEWS,
    }

    print(
        f"ViT-B/32, random weights, {N_IMAGES} images x {N_VIEWS} views, {n_rounds} alternating rounds, "
        f"{n_threads()} threads, medians"
    )
    print(f"{'':14}{'ms/image':>10}{'images/s':>10}{'yardstick':>11}{'of floor':>10}")
    for name, each in per_image.items():
        ratio, share = per_image["yardstick"] / each, floor / each
        print(f"{name:14}{1e3 * each:10.0f}{1 / each:10.2f}{ratio:10.2f}x{share:10.0%}")
    for name, share in shares.items():
        said = ", ".join(f"{part} {each:.1%}" for part, each in share.items())
        print(f"{name}: of its pass, {said}")
    print(f"floor: {gflop:.0f} GFLOP an image at {peak:.0f} GFLOP/s in fp32 = {1e3 * floor:.0f} ms")
    record("bench", result, load)


def work(name: str) -> None:
    """One contestant: a line in, one batch timed (after one untimed), a line out."""
    import numpy as np

    # Libraries print on stdout; the answers have it to themselves.
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # OpenCLIP says that the weights are random: here they are meant to be
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N_IMAGES, 224, 224, 3), dtype=np.uint8)
    if name == "yardstick":
        from yardstick import build

        reference = build()

        def run(images):
            return reference(images), {}

    else:
        from clipshift_core.encoder import EncoderError

        try:
            run = ours(name.removeprefix("ours, "))
        except EncoderError as refused:  # "mixed", where the processor has no instructions for bfloat16
            sys.stdin.readline()
            answers.write(json.dumps({"refused": str(refused)}) + "\n")
            answers.flush()
            return
    run(images)
    for _ in sys.stdin:
        start = time.perf_counter()
        _, parts = run(images)
        seconds = time.perf_counter() - start - parts.pop("not counted", 0)
        answers.write(json.dumps({"seconds": seconds, "parts": parts, "gflops": gemm_gflops()}) + "\n")
        answers.flush()


def ours(precision: str):
    """A function images -> (what the pass stores, seconds by part)."""
    import numpy as np
    import open_clip

    from clipshift_core import shift
    from clipshift_core.augment import views
    from clipshift_core.encoder import Encoder

    model = open_clip.create_model("ViT-B-32-quickgelu").eval().requires_grad_(False)
    encoder = Encoder(model, "ViT-B-32-quickgelu", name="random ViT-B/32", weights_hash="", precision=precision)
    drawn = np.empty((N_IMAGES, N_VIEWS, 224, 224, 3), np.uint8)
    encode, encoding = encoder.encode, []

    def timed(*args, **more):
        start = time.perf_counter()
        found = encode(*args, **more)
        encoding.append(time.perf_counter() - start)
        return found

    encoder.encode = timed

    def run(images):
        for i, image in enumerate(images):
            drawn[i] = views(image, seed=0, image_id=str(i))
        encoding.clear()
        start = time.perf_counter()
        found = shift.compare(encoder, drawn)
        whole = time.perf_counter() - start
        for points in (["attention.-1"], shift.points_of(encoder), []):
            encoder.encode(drawn.reshape(-1, 224, 224, 3), capture=points)
        inside, last, every, bare = encoding
        parts = {
            "the encoder": bare,
            "the last block's attention": last - bare,
            "attention and class token of every block": every - bare,
            "all metrics": whole - inside,
            "not counted": last + every + bare,
        }
        return found, parts

    return run


def gemm_gflops() -> float:
    """Best rate of one float32 product of the encoder's largest layer, prepacked where torch can."""
    import torch

    x, w = torch.randn(800, 768), torch.randn(3072, 768)
    candidates = [lambda: torch.nn.functional.linear(x, w)]
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        packed = torch.ops.mkldnn._reorder_linear_weight(w, len(x))
        candidates.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    best = 0.0
    for product in candidates:
        for _ in range(10):
            start = time.perf_counter()
            product()
            best = max(best, 2e-9 * x.numel() * len(w) / (time.perf_counter() - start))
    return best


def gflop_per_image() -> float:
    """Counted by torch over OpenCLIP's own forward of ten views."""
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        visual = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32")).visual.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            visual(torch.empty(1, 3, 224, 224))
    return N_VIEWS * counter.get_total_flops() / 1e9


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
    else:
        main(*map(int, sys.argv[1:]))
