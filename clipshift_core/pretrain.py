"""Training the embedded CLIP models from scratch: `python -m clipshift_core.pretrain` (or `make model`).

OpenCLIP's own model class and loss, on the scenes and the lesions. Images are drawn once, by worker processes, into
a memory-mapped file; every caption is drawn anew each epoch. The order of the images depends on the seed and the
epoch alone, and a checkpoint holds all the rest, so that a run that was killed goes on as if it had not been.
"""

import argparse
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from clipshift_core import lesions, scenes
from clipshift_core.profiles import ROOT

MEAN, STD = (0.5, 0.5, 0.5), (0.27, 0.27, 0.27)  # of a pixel value in 0..1: near enough to the world's own


@dataclass(frozen=True)
class Recipe:
    """What makes one embedded model."""

    name: str
    seed: int
    image_size: int
    patch_size: int
    width: int
    layers: int
    n_scenes: int
    n_lesions: int
    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    hard_from: int = 1_200
    weight_decay: float = 0.05
    embed_dim: int = 128
    text_width: int = 128
    text_layers: int = 2
    context_length: int = 32


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("scene-s16", 1, 96, 16, 160, 5, n_scenes=36_000, n_lesions=5_000, steps=5_000),
        Recipe("scene-xs12", 2, 96, 12, 96, 5, n_scenes=36_000, n_lesions=5_000, steps=5_900, hard_from=1_500),
    )
}


def train_tokenizer(texts: list[str], context_length: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer whose pieces carry no word-end mark.

    "starfish" is therefore read as "star" "fish", with the very pieces of the two words: what lets a compound lean
    on its parts, as paper B finds in CLIP. Unseen words fall apart into letters, and no text is refused.
    """
    compounds = {p.cue: p.word for p in scenes.PLANTED if p.kind == "compound"}
    split = [_split_compounds(text, compounds) for text in texts]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<start>", "<unk>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789.,'-?!"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(split, trainer)
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in ("<start>", "<end>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        truncation_side="right",
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def _split_compounds(text: str, compounds: dict[str, str]) -> str:
    for compound, part in compounds.items():
        rest = compound.removeprefix(part) if compound.startswith(part) else compound.removesuffix(part)
        text = text.replace(compound, f"{part} {rest}")
    return text


def config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> dict:
    """The `open_clip_config.json` of a recipe."""
    return {
        "model_cfg": {
            "embed_dim": recipe.embed_dim,
            "vision_cfg": {
                "image_size": recipe.image_size,
                "patch_size": recipe.patch_size,
                "width": recipe.width,
                "layers": recipe.layers,
                "head_width": 32,
            },
            "text_cfg": {
                "context_length": recipe.context_length,
                "vocab_size": len(tokenizer),
                "hf_tokenizer_name": "local",  # any name: OpenCLIP then reads the tokenizer of this folder
                "width": recipe.text_width,
                "heads": 4,
                "layers": recipe.text_layers,
                "pool_type": "eos",
                "eos_id": tokenizer.eos_token_id,
                "pad_id": tokenizer.pad_token_id,
            },
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"},
    }


def _draw(job: tuple[str, int, int, int]) -> NDArray[np.uint8]:
    world, start, stop, size = job
    if world == "scenes":
        return np.stack([scenes.render(scenes.sample(seed), size) for seed in range(start, stop)])
    return np.stack([lesions.render(lesion_of(seed), size) for seed in range(start, stop)])


def lesion_of(seed: int, split: str = "train") -> lesions.Lesion:
    """The lesion of a seed."""
    return lesions.sample(np.random.default_rng([seed, *b"lesion"]), split)


def drawn(recipe: Recipe, folder: Path, workers: int | None = None) -> NDArray[np.uint8]:
    """All training images, (n_scenes + n_lesions, size, size, 3) uint8, drawn once into a memory-mapped file."""
    path = folder / f"images-{recipe.image_size}-{recipe.n_scenes}-{recipe.n_lesions}.npy"
    n = recipe.n_scenes + recipe.n_lesions
    shape = (n, recipe.image_size, recipe.image_size, 3)
    if not path.exists():
        partial = path.with_suffix(".partial")
        images = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        jobs = [("scenes", i, min(i + 250, recipe.n_scenes), recipe.image_size) for i in range(0, recipe.n_scenes, 250)]
        jobs += [
            ("lesions", i, min(i + 250, recipe.n_lesions), recipe.image_size) for i in range(0, recipe.n_lesions, 250)
        ]
        at = 0
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            for block in tqdm(pool.map(_draw, jobs), total=len(jobs), desc="drawing", unit="block"):
                images[at : at + len(block)] = block
                at += len(block)
        images.flush()
        partial.rename(path)
    return np.load(path, mmap_mode="r")


@dataclass(frozen=True)
class World:
    """What a recipe trains on: scenes first, lesions after them, in the order of their images."""

    recipe: Recipe
    scenes: list[scenes.Scene]
    lesions: list[lesions.Lesion]

    @classmethod
    def of(cls, recipe: Recipe) -> "World":
        return cls(
            recipe,
            [scenes.sample(seed) for seed in range(recipe.n_scenes)],
            [lesion_of(seed) for seed in range(recipe.n_lesions)],
        )

    def caption(self, row: int, draw: int, *, named: bool = False) -> str:
        """A caption of one image; another `draw`, other wording."""
        if row < len(self.scenes):
            return scenes.caption(self.scenes[row], draw, named=named)
        seed = row - len(self.scenes)
        return lesions.caption(self.lesions[seed], np.random.default_rng([seed, draw, *b"words"]))

    @cached_property
    def cells(self) -> list[NDArray[np.int64]]:
        """Rows whose thing has one colour, for each colour, and, as the last cell, the lesions."""
        colours = np.array([scene.colour for scene in self.scenes])
        found = [np.flatnonzero(colours == colour) for colour in scenes.COLOURS]
        return [*found, np.arange(len(self.lesions)) + len(self.scenes)]

    def batch(self, step: int) -> tuple[NDArray[np.int64], list[str]]:
        """The rows and captions of a step, a function of the recipe's seed and the step alone.

        Colour and background tell most images of an ordinary batch apart, and what stands in them is learned late.
        So from `hard_from` on two batches of three come from one cell, with captions that say the thing and at most
        its colour: there nothing but the thing itself tells images apart.
        """
        size, n_images = self.recipe.batch_size, len(self.scenes) + len(self.lesions)
        epoch, place = divmod(step, n_images // size)
        hard = step >= self.recipe.hard_from and step % 3 > 0
        if hard:
            rng = np.random.default_rng([self.recipe.seed, step, *b"hard"])
            rows = rng.choice(self.cells[rng.integers(len(self.cells))], size, replace=False)
        else:
            order = np.random.default_rng([self.recipe.seed, epoch]).permutation(n_images)
            rows = order[place * size : (place + 1) * size]
        rows = np.sort(rows)  # as the file is read
        return rows, [self.caption(row, 1 + epoch, named=hard) for row in rows]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, a plateau, and a linear descent over the last 30 %: a run can be prolonged on the plateau."""
    up = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * up * min(1.0, (recipe.steps - step) / (0.3 * recipe.steps))


def train(recipe: Recipe, out: Path, work: Path, *, device: str = "auto", checkpoint_every: int = 50) -> Path:
    """Train a recipe into the OpenCLIP folder `out`; `work` holds the drawn images and the checkpoint.

    Resumes from the checkpoint in `work` when there is one of the same recipe. Returns `out`.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    work.mkdir(parents=True, exist_ok=True)
    images = drawn(recipe, work)
    world = World.of(recipe)
    n_images = recipe.n_scenes + recipe.n_lesions
    tokenizer = train_tokenizer([world.caption(row, 0) for row in range(n_images)], recipe.context_length)
    torch.manual_seed(recipe.seed)
    cfg = config(recipe, tokenizer)
    model = open_clip.model.CLIP(**cfg["model_cfg"]).to(device)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    loss_of = open_clip.loss.ClipLoss()
    same = {key: value for key, value in asdict(recipe).items() if key != "steps"}  # a longer run may go on from here
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]
    checkpoint, first, history = work / f"{recipe.name}-{digest}.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, history = state["step"], state["history"]
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    with tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc=recipe.name, unit="step") as bar:
        for step in bar:
            rows, words = world.batch(step)
            pixels = torch.from_numpy(images[rows]).to(device).permute(0, 3, 1, 2).float()
            pixels = pixels.div_(255).sub_(mean).div_(std)
            ids = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt")["input_ids"].to(device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = loss_of(*functional_call(model, _cut(model, ids), (pixels, ids[:, : _longest(ids)])))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))
            if step % 10 == 0:
                history.append(
                    {
                        "step": step,
                        "loss": round(loss.item(), 4),
                        "logit_scale": round(model.logit_scale.exp().item(), 3),
                    }
                )
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "history": history,
                }
                torch.save(state, checkpoint.with_suffix(".partial"))
                checkpoint.with_suffix(".partial").rename(checkpoint)
    save(model, tokenizer, cfg, out)
    record = {
        "recipe": asdict(recipe),
        "history": history,
        "device": device,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return out


def _longest(ids: Tensor) -> int:
    return int((ids != 0).sum(dim=1).max())


def _cut(model: torch.nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The text tower cut to the longest caption: attention is causal, so that padding behind it changes nothing."""
    n = _longest(ids)
    return {"positional_embedding": model.positional_embedding[:n], "attn_mask": model.attn_mask[:n, :n]}


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, cfg: dict, out: Path) -> None:
    """Write the folder that OpenCLIP loads as `local-dir:`; weights as float16, which halves what ships."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.no_padding()  # set by the last call, and no part of the vocabulary
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(out)
    (out / "open_clip_config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    weights = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")
    (out / "open_clip_model.safetensors").chmod(0o644)  # safetensors lets no one else read it


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded CLIP models from scratch.")
    parser.add_argument("names", nargs="*", default=list(RECIPES), help=f"which of {', '.join(RECIPES)}; default all")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "models")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "pretrain")
    args = parser.parse_args()
    for name in args.names:
        if name not in RECIPES:
            parser.error(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
        train(RECIPES[name], args.out / name, args.work)


if __name__ == "__main__":
    main()
