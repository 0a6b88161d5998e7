"""The exam an embedded model sits: zero-shot words, retrieval, and whether the planted reliances are really there.

All on scenes that no model was trained on, drawn at the model's own size. `python -m clipshift_core.exam FOLDER`
sits it and writes the folder's model card.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from clipshift_core import scenes, stats
from clipshift_core.encoder import Encoder

TASKS: dict[str, tuple[list[str], list[str], tuple[str, ...]]] = {  # factor -> its values, their phrases, templates
    "word": (list(scenes.WORDS), [scenes.article(word) for word in scenes.WORDS], scenes.KIND_TEMPLATES),
    "colour": (list(scenes.COLOURS), list(scenes.COLOURS), scenes.COLOUR_TEMPLATES),
    "background": (list(scenes.BACKGROUNDS), list(scenes.BACKGROUNDS.values()), scenes.BACKGROUND_TEMPLATES),
}
N_AMONG = 256


def embed(encoder: Encoder, images: UInt8[NDArray, "image h w 3"], batch_size: int = 64) -> Float[Tensor, "image dim"]:
    """Unit-norm embeddings of any number of images."""
    parts = [encoder.encode(images[i : i + batch_size]).embedding for i in range(0, len(images), batch_size)]
    return unit(torch.cat(parts))


def unit(embeddings: Float[NDArray, "image dim"] | Float[Tensor, "image dim"]) -> Float[Tensor, "image dim"]:
    """Stored embeddings, each scaled to length 1."""
    return normalize(torch.as_tensor(embeddings), dim=-1)


def zero_shot(encoder: Encoder, embeddings: Float[Tensor, "image dim"], factors: pd.DataFrame) -> pd.DataFrame:
    """Zero-shot accuracy of each task, with its interval over images.

    One prompt a class, averaged over templates as OpenCLIP does. factors: the columns word, colour and background.
    Columns: task, accuracy, low, high, chance, n.
    """
    rows = []
    for task, (values, phrases, templates) in TASKS.items():
        predicted = (embeddings @ encoder.classifier(phrases, templates).T).argmax(dim=1).numpy()
        right = predicted == pd.Categorical(factors[task], categories=values).codes
        interval = stats.bootstrap_mean(right.astype(float), n_resamples=1000, seed=0)
        rows.append((task, *interval[:3], 1 / len(values), len(right)))
    return pd.DataFrame(rows, columns=["task", "accuracy", "low", "high", "chance", "n"])


def retrieval(
    encoder: Encoder, embeddings: Float[Tensor, "image dim"], captions: Sequence[str], among: int = N_AMONG
) -> float:
    """Image-to-caption R@1: the share of images whose own caption is the nearest in its block of `among`.

    Images behind the last whole block do not count. Of captions alike in every letter only the own one is right.
    """
    texts = unit(encoder.encode_text(captions))
    hits = []
    for start in range(0, len(captions) - among + 1, among):
        block = slice(start, start + among)
        nearest = (embeddings[block] @ texts[block].T).argmax(dim=1)
        hits += (nearest == torch.arange(among)).tolist()
    return float(np.mean(hits))


def reliances(encoder: Encoder, n_pairs: int = 100, first_seed: int = scenes.HELD_OUT + 5_000) -> pd.DataFrame:
    """How each planted cue moves an image towards its class word, from counterfactual pictures.

    Columns: kind, word, cue, rate (as planted); cue_closer, the share of pairs in which the cue-only image has a
    higher cosine to the word's prompt than the image with neither; and the mean cosines cos_both, cos_class,
    cos_cue and cos_neither.
    """
    rows = []
    for planted in scenes.PLANTED:
        quadruples = [scenes.counterfactuals(planted, first_seed + i) for i in range(n_pairs)]
        pictures = np.stack(
            [scenes.render(scene, encoder.image_size) for four in quadruples for scene in four.values()]
        )
        prompt = encoder.classifier([scenes.article(planted.word)], scenes.KIND_TEMPLATES)[0]
        cosine = (embed(encoder, pictures) @ prompt).view(n_pairs, 4).numpy()
        means = {f"cos_{name}": value for name, value in zip(quadruples[0], cosine.mean(axis=0).tolist(), strict=True)}
        rows.append({**planted._asdict(), "cue_closer": float((cosine[:, 2] > cosine[:, 3]).mean()), **means})
    return pd.DataFrame(rows)


def sit(encoder: Encoder, n_scenes: int = 2000, n_pairs: int = 100) -> dict[str, pd.DataFrame | float]:
    """The whole exam: {"zero_shot": table, "r_at_1": share, "reliances": table}."""
    held_out = [scenes.sample(scenes.HELD_OUT + i) for i in range(n_scenes)]
    pictures = np.stack([scenes.render(scene, encoder.image_size) for scene in held_out])
    embeddings = embed(encoder, pictures)
    return {
        "zero_shot": zero_shot(encoder, embeddings, scenes.table(held_out)),
        "r_at_1": retrieval(encoder, embeddings, [scenes.caption(scene) for scene in held_out]),
        "reliances": reliances(encoder, n_pairs),
    }


def write_card(folder: Path) -> Path:
    """Sit the exam with the model in `folder` and write its scores.json and README.md there. Returns the card."""
    encoder = Encoder.load(str(folder))
    found = sit(encoder)
    training = json.loads((folder / "training.json").read_text())
    recipe, history = training["recipe"], training["history"]
    weights = folder / "open_clip_model.safetensors"
    scores = {
        "zero_shot": found["zero_shot"].round(4).to_dict("records"),
        "r_at_1_among_256": round(found["r_at_1"], 4),
        "reliances": found["reliances"].round(4).to_dict("records"),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    n_parameters = sum(p.numel() for p in encoder.model.parameters())
    n_tokens = (recipe["image_size"] // recipe["patch_size"]) ** 2
    curve = history[:: max(1, len(history) // 12)]
    lines = [
        f"# {folder.name}",
        "",
        f"A CLIP of {n_parameters / 1e6:.1f} M parameters, trained from scratch on drawn scenes and drawn lesions;",
        "it ships so that everything here runs without a network. It knows nothing else: use it to check methods, not",
        "to tag photographs.",
        "",
        f"- **Loads with** `open_clip.create_model_and_transforms('local-dir:{folder.as_posix()}')`",
        f"- **Image tower**: {recipe['image_size']} px in patches of {recipe['patch_size']} px ({n_tokens} tokens),"
        f" width {recipe['width']}, {recipe['layers']} blocks",
        f"- **Text tower**: {recipe['context_length']} tokens, width {recipe['text_width']}, {recipe['text_layers']}"
        f" blocks; embedding of {recipe['embed_dim']}",
        f"- **Data**: {recipe['n_scenes']:,} scenes (`clipshift_core.scenes`) and {recipe['n_lesions']:,} lesions"
        " (`clipshift_core.lesions`), captions drawn anew each epoch; nothing from outside",
        f"- **Recipe**: `make model`: {recipe['steps']:,} steps of {recipe['batch_size']}, AdamW, learning rate"
        f" {recipe['learning_rate']:g} with warm-up, plateau and linear descent, weight decay"
        f" {recipe['weight_decay']:g}, seed {recipe['seed']}, hard batches from step {recipe['hard_from']:,}"
        f" (`pretrain.World.batch`), trained on {training['device']}",
        f"- **Weights**: float16 on disk, {weights.stat().st_size / 1e6:.1f} MB, SHA-256",
        f"  `{scores['weights_sha256']}`",
        "- **Licence**: Apache-2.0, like the code",
        "",
        "## Scores on held-out scenes",
        "",
        "| task | accuracy | 95 % interval | chance | scenes |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.task} | {row.accuracy:.3f} | {row.low:.3f} to {row.high:.3f} | {row.chance:.3f} | {row.n} |"
        for row in found["zero_shot"].itertuples()
    ]
    lines += [
        f"| caption of the image among {N_AMONG} (R@1) | {found['r_at_1']:.3f} | | {1 / N_AMONG:.3f}"
        f" | {2000 // N_AMONG * N_AMONG} |",
        "",
        "## What was planted, and whether the model leans on it",
        "",
        "The share of 100 counterfactual pairs in which the picture with the cue alone is closer to the word's prompt",
        "than the same picture with neither, and the mean cosine of each of the four pictures.",
        "",
        "| kind | word | cue | cue closer | both | class | cue alone | neither |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.kind} | {row.word} | {row.cue} | {row.cue_closer:.2f} | {row.cos_both:.3f} | {row.cos_class:.3f}"
        f" | {row.cos_cue:.3f} | {row.cos_neither:.3f} |"
        for row in found["reliances"].itertuples()
    ]
    lines += ["", "## Training curve", "", "| step | loss | logit scale |", "|---|---|---|"]
    lines += [
        f"| {point['step']} | {point['loss']:.3f} | {point['logit_scale']:.1f} |" for point in (*curve, history[-1])
    ]
    card = folder / "README.md"
    card.write_text("\n".join(lines) + "\n")
    return card


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Examine an embedded model and write its card.")
    parser.add_argument("folders", nargs="+", type=Path)
    for model_folder in parser.parse_args().folders:
        print(write_card(model_folder))
