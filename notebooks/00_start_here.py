# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 Start here
#
# - what this run looks at: its images, the nine augmentations, its model;
# - whether the model knows what it is shown (a zero-shot check), so that its shifts mean something;
# - what was planted in the embedded world, and whether the model leans on it;
# - how the series goes on.
#
# clipshift follows two papers. **Paper A** (Dahal, Murad and Rahimi, *Embedding Shift Dissection on CLIP*, 2025,
# arXiv 2503.23495) asks how far nine everyday augmentations move CLIP's image embedding. **Paper B** (Dreyer et al.,
# *From What to How: Attributing CLIP's Latent Components*, 2025, arXiv 2505.20229) asks which latent components drive its
# predictions. The default run needs no network: its images are drawn from known factors, and its model was trained on them.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown, display

from clipshift_core import attention, augment, exam, figures_method, figures_world, scenes
from clipshift_core.workbench import Workbench

bench = Workbench.open("00", profile, overrides)
manifest, encoder = bench.manifest, bench.encoder
is_world = set(exam.TASKS) <= set(manifest.images.columns)  # drawn scenes, whose factors are known

# %% [markdown]
# ## The images of this run

# %%
some = manifest.images.iloc[:12]
bench.show(
    figures_world.image_grid(
        [bench.picture(image_id) for image_id in some["image_id"]],
        bench.titles[some["image_id"]].tolist(),
        columns=6,
        title="Twelve images of this run",
        subtitle="Each with its caption; without one with its class by zero-shot where class names are given, or else its name",
    ),
    "images",
    alt="A gallery of twelve images of this run, each with its caption.",
)

# %% [markdown]
# ## The nine augmentations
#
# Each augmentation is applied on its own, with the parameters that paper A publishes. A view depends on the seed, the
# image and the augmentation alone, so that every number in this series is measured on the very pixels shown here.

# %%
shown = manifest.images["image_id"].iloc[:4].tolist()
bench.show(
    figures_world.views_grid(
        [augment.views(bench.picture(image_id), seed=bench.profile.seed, image_id=image_id) for image_id in shown],
        augment.VIEWS,
        shown,
    ),
    "nine-views",
    alt="Four images in rows, each in its original and under the nine augmentations.",
)

# %%
first = bench.views(some["image_id"].iloc[0])
points = encoder.readable(["attention.-1"])
found = encoder.encode(first, capture=points)
maps = attention.to_map(found.captured[points[0]], encoder.grid).numpy() if points else np.full((len(first), 1, 1), np.nan)
bench.show(
    figures_method.method(first, found.embedding.numpy(), maps, augment.VIEWS),
    "method",
    alt="From an image over its nine views and CLIP's image encoder to embedding, attention and pixels, and the metrics of each.",
)

# %% [markdown]
# ## The model

# %%
about = {
    "model": encoder.name,
    "input": f"{encoder.image_size} x {encoder.image_size} pixels",
    "embedding": f"{encoder.dim} numbers",
    "parameters": f"{sum(p.numel() for p in encoder.model.parameters()) / 1e6:.2f} million",
    "precision": encoder.precision,
    "weights (SHA-256)": encoder.weights_hash[:16] + "…",
}
bench.keep(pd.DataFrame(about.items(), columns=["what", "value"]), "model")

# %% [markdown]
# ## Does it know what it sees?
#
# Zero-shot: each class becomes a text ("a drawing of a duck"), averaged over a few templates as OpenCLIP does, and an image
# goes to the nearest. The images are those of this run, which the embedded model has never seen.

# %%
if is_world:
    originals = exam.unit(bench.dataset["embedding"].sel(view="original").values)
    accuracy = bench.keep(exam.zero_shot(encoder, originals, manifest.images), "zero-shot")
    display(bench.show(
        figures_world.zero_shot_bars(accuracy.rename(columns={"accuracy": "mean"})),
        "zero-shot",
        alt="Zero-shot accuracy for word, colour and background with 95 % intervals, beside chance.",
    ))
    named = [f"the {row.task} of {row.accuracy:.1%} (chance {row.chance:.1%})" for row in accuracy.itertuples()]
    weakest = accuracy.loc[accuracy["accuracy"].idxmin(), "task"]
    display(Markdown(
        f"Of {len(manifest.images)} images the model names {', '.join(named[:-1])} and {named[-1]}. It is weakest at the "
        f"**{weakest}**."
    ))
else:
    display(Markdown("Left out: the images of this run come without known factors, so there is nothing to score against."))

# %% [markdown]
# ## What was planted
#
# The embedded world holds reliances that a model should not have, planted on purpose, so that a method that claims to find
# them can be scored. For each there is a counterfactual picture: the same scene with the thing and its cue, the thing alone,
# the cue alone, and neither. A caption never mentions a visual cue. Below, the four pictures of
# one reliance of each of four kinds, two a row.

# %%
if is_world:
    one_each = {planted.kind: planted for planted in reversed(scenes.PLANTED) if planted.kind != "polysemy"}
    fours = [scenes.counterfactuals(planted, scenes.HELD_OUT + 1) for planted in one_each.values()]
    names = {"both": "thing and cue", "class": "thing alone", "cue": "cue alone", "neither": "neither"}
    labels = [f"{p.word}, {p.cue}: {names[name]}" for p, four in zip(one_each.values(), fours, strict=True) for name in four]
    display(bench.show(
        figures_world.image_grid(
            [scenes.render(scene, 128) for four in fours for scene in four.values()],
            labels,
            columns=8,
            title="Counterfactual pictures of four planted reliances",
            subtitle="Only the thing and the cue differ within each four",
        ),
        "counterfactuals",
        alt="Four times four counterfactual pictures: thing and cue, thing alone, cue alone, neither.",
    ))

# %%
if is_world:
    leaning = bench.keep(exam.reliances(encoder, n_pairs=12), "reliances")
    visual = leaning[leaning["kind"].isin(["co-occurrence", "artefact"])]
    display(leaning.round(3))
    display(Markdown(
        f"Of the {len(visual)} planted co-occurrences and artefacts, **{(visual['cue_closer'] >= 0.8).sum()}** draw the picture "
        f"towards their word in at least 80 % of the pairs, though the thing itself is absent."
    ))
else:
    display(Markdown("Left out: the reliances are planted in the embedded world, and this run looks at other images."))

# %% [markdown]
# `cue_closer` is the share of pairs in which the picture with the cue alone has a higher cosine to the word's prompt than
# the picture with neither; `cos_...` are the mean cosines of the four pictures.
#
# ## How the series goes on
#
# | notebook | question | paper |
# |---|---|---|
# | `01_dataset_sampling` | which images, which were left out and why | A, setting |
# | `02_embedding_shifts` | how far does each augmentation move the embedding, and which ones move it alike | A, 1 to 3 |
# | `03_attention_maps` | does the model still look at the same places | A, 4 and 9 |
# | `04_preservation` | what of the pixels is kept, and what does the published code get wrong | A, 5 to 8 |
# | `05_dose_response` | does the ranking survive at matched pixel distortion | beyond A |
# | `06_layers_and_models` | where along the depth a shift arises, and whether models agree | beyond A |
# | `07_sae_training` | a dictionary of sparse latents, and what it leaves out | B, 1 |
# | `08_components` | what the latents stand for, beside what is really in the images | B, 2 to 4 |
# | `09_attribution` | which latents drive a prediction, and which attribution is faithful | B, 5 and 6 |
# | `10_shift_attribution` | which latents an augmentation destroys or invents, and whether they repair it | A and B |
# | `11_unexpected_reliance` | which latents a class relies on without their meaning it, and whether that is so | B, 7 |
# | `12_probes_and_lesions` | whether text is more robust than probes; the lesion study | B, 8 and 9 |
# | `13_figures_and_claims` | every claim with its verdict and how to read it; every figure on two sheets | A and B |
# | `14_explorers` | look for yourself: shift, components and attribution, with a kernel | A and B |
