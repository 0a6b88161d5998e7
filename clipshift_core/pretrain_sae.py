"""The dictionaries that ship: `python -m clipshift_core.pretrain_sae [NAME ...]` (or `make model`) trains them anew.

Scenes are drawn and encoded once, to disk; drawing, encoding and training go on where they were killed.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from clipshift_core import pretrain, sae_quality, scenes
from clipshift_core.activations import Activations, Source, stored
from clipshift_core.dictionaries import FIRST_TO_LEARN, FIRST_TO_LOOK_AT, Learned, learn
from clipshift_core.encoder import Encoder
from clipshift_core.profiles import ROOT

WORLDS = {
    "planted": "scenes drawn for it",
    "free": "scenes drawn for it, in which every cue is independent of the class",
    "lesions": "lesions drawn for it, in which every artefact is independent of the label",
}
"""What a dictionary may be learned from."""


@dataclass(frozen=True)
class Recipe:
    """What makes one of the dictionaries that ship."""

    name: str
    model: str
    layer: int
    token: str
    n_latents: int
    k: int
    n_images: int
    n_epochs: int
    world: str = "planted"
    """One of `WORLDS`."""
    seed: int = 0


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("sae-scene-s16", "scene-s16", -1, "class", 1024, 16, n_images=60_000, n_epochs=40),
        Recipe("sae-scene-xs12", "scene-xs12", -1, "class", 1024, 16, n_images=60_000, n_epochs=40),
        Recipe("sae-scene-s16-patches", "scene-s16", -2, "spatial", 1024, 16, n_images=12_000, n_epochs=20),
        Recipe("sae-scene-s16-free", "scene-s16", -1, "class", 1024, 16, n_images=30_000, n_epochs=40, world="free"),
        Recipe("sae-scene-xs12-free", "scene-xs12", -1, "class", 1024, 16, n_images=30_000, n_epochs=40, world="free"),
        Recipe(
            "sae-scene-s16-lesions", "scene-s16", -1, "class", 512, 16, n_images=12_000, n_epochs=40, world="lesions"
        ),
    )
}


def source(world: str, seeds: range, size: int) -> Source:
    """Images of one of `WORLDS`, by seed."""
    if world == "planted":
        return Source.of_scenes(seeds, size)
    if world == "free":
        return Source.of_drawings([scenes.sample(seed, planted=False) for seed in seeds], size)
    return Source.of_drawings([pretrain.lesion_of(seed, "test") for seed in seeds], size)


def train(recipe: Recipe, out: Path, work: Path) -> Path:
    """Train what ships into `out/NAME`, with its card; `work` holds activations and checkpoint. Returns the folder."""
    encoder = Encoder.load(str(ROOT / "data" / "models" / recipe.model), device="cpu", precision="fp32")
    seeds = range(FIRST_TO_LEARN, FIRST_TO_LEARN + recipe.n_images)
    layer = recipe.layer % encoder.n_blocks
    held = stored(source(recipe.world, seeds, encoder.image_size), encoder, layer, recipe.token, work)
    folder = out / recipe.name
    # Beside what ships, which is replaced once there is something to replace it by.
    learned = learn(
        held, n_latents=recipe.n_latents, k=recipe.k, n_epochs=recipe.n_epochs, seed=recipe.seed,
        folder=work / recipe.name, checkpoint=work / f"{recipe.name}.safetensors",
    )  # fmt: skip
    seeds = range(FIRST_TO_LOOK_AT, FIRST_TO_LOOK_AT + 4000)
    unseen = stored(source(recipe.world, seeds, encoder.image_size), encoder, layer, recipe.token, work)
    found = sae_quality.quality(learned.sae, unseen.in_order())
    shutil.copytree(work / recipe.name, folder, dirs_exist_ok=True)
    (folder / "README.md").write_text(card(recipe, learned, found, held, folder), encoding="utf-8")
    return folder


def card(recipe: Recipe, learned: Learned, found: sae_quality.Quality, held: Activations, folder: Path) -> str:
    """The card of a dictionary that ships."""
    about = json.loads((folder / "sae.json").read_text())
    sampled = learned.history.iloc[:: max(1, len(learned.history) // 12)]
    curve = "\n".join(
        f"| {row.step} | {row.nmse:.4f} | {row.auxiliary:.3f} | {row.n_dead} |" for row in sampled.itertuples()
    )
    tokens = "the class token" if recipe.token == "class" else "the tokens of the patches"
    size = (folder / "sae.safetensors").stat().st_size / 1e6
    return f"""# {recipe.name}

A sparse autoencoder of {recipe.n_latents:,} latents, of which {recipe.k} at most write an activation: the residual
stream of [`{recipe.model}`](../{recipe.model}/README.md) after block {held.origin.layer} (from 0), {tokens}.
It ships so that everything here runs without training; it fits that model's weights alone, and loading checks that.

- **Loads with** `clipshift_core.dictionaries.read(folder, encoder, {held.origin.layer}, "{recipe.token}")`; the format
  is in `clipshift_core/sae_formats.py`, which also writes SAELens' and paper B's
- **Data**: {recipe.n_images:,} {WORLDS[recipe.world]} (seeds from
  {FIRST_TO_LEARN:,}), {held.n_rows:,} rows; the model was trained on none of them
- **Recipe**: `make model`: {recipe.n_epochs} epochs in batches of {learned.recipe["batch_size"]:,}, seed {recipe.seed},
  warm-up and descent, unit-norm decoder, auxiliary loss for dead latents (`clipshift_core.sae_train`)
- **Weights**: float32, {size:.1f} MB, SHA-256
  `{about["sha256"]}`
- **Licence**: Apache-2.0, like the code

## Quality on 4,000 others that neither it nor the model has seen

| normalised MSE | cosine | latents on (L0) | never on | on in more than {sae_quality.DENSE_FROM:.0%} |
|---|---|---|---|---|
| {found.nmse:.4f} | {found.cosine:.4f} | {found.l0:.1f} | {found.n_dead} | {found.n_dense} |

## Training curve

| step | normalised MSE of the batch | auxiliary loss | dead |
|---|---|---|---|
{curve}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the dictionaries that ship.")
    parser.add_argument("names", nargs="*", default=list(RECIPES), help=f"which of {', '.join(RECIPES)}; default all")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "models")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "dictionaries")
    args = parser.parse_args()
    for name in args.names:
        if name not in RECIPES:
            parser.error(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
        train(RECIPES[name], args.out, args.work)


if __name__ == "__main__":
    main()
