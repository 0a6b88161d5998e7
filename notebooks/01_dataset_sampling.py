# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 Dataset sampling
#
# - which images this run uses, drawn how, and what was left out and why;
# - what their captions are like;
# - for drawn scenes: how the factors are spread, and whether the planted cues occur at their stated rates.
#
# Paper A draws 13,312 images of Conceptual Captions (2,000 of them for the metrics beyond the embedding) and resizes each to
# 224 x 224. Here an image's rank in the sample is a hash of the seed and its name: the same seed gives the same sample, and
# images added to the source do not reshuffle the others.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
from IPython.display import Markdown, display

from clipshift_core import exam, figures_world, scenes
from clipshift_core.workbench import Workbench

bench = Workbench.open("01", profile, overrides)
manifest = bench.manifest
is_world = set(exam.TASKS) <= set(manifest.images.columns)

# %% [markdown]
# ## What was drawn, and what was left out

# %%
display(Markdown(f"**{manifest.summary}** (seed {bench.profile.seed})."))
bench.keep(manifest.set_aside, "set-aside")
manifest.set_aside if len(manifest.set_aside) else Markdown("Nothing had to be set aside.")

# %%
bench.keep(manifest.images, "manifest").head(8)

# %% [markdown]
# ## Sizes and captions

# %%
sides = manifest.images[["width", "height"]].describe().loc[["min", "50%", "max"]].rename(index={"50%": "median"})
n_words = manifest.images["caption"].dropna().str.split().str.len()
display(sides.astype(int))
Markdown(
    f"{len(n_words)} of {len(manifest.images)} images have a caption"
    + (f", of {n_words.min()} to {n_words.max()} words (median {n_words.median():.0f})." if len(n_words) else ".")
)

# %% [markdown]
# ## Factors
#
# Known for drawn scenes only. The word is what a caption calls the thing: both drawings of a bat are a "bat".

# %%
if is_world:
    display(bench.show(
        figures_world.factor_counts(manifest.images, ["word", "colour", "background", "relation"]),
        "factors",
        alt="How many images of the sample show each word, colour, background and relation.",
    ))
else:
    display(Markdown("Left out: the images of this run come without known factors."))

# %% [markdown]
# ## Are the cues where they were planted?
#
# For each visual cue: how often it stands beside its own word, and how often beside any other, with 95 % intervals over the
# images of this sample.

# %%
if is_world:
    rates = bench.keep(scenes.cue_rates(manifest.images), "cue-rates")
    inside = (rates["low"] <= rates["planted"]) & (rates["planted"] <= rates["high"])
    display(rates.round(3))
    display(Markdown(
        f"The planted rate lies within the sample's 95 % interval for **{inside.sum()} of {len(rates)}** cues. Beside other "
        f"words a cue shows in {rates['elsewhere'].mean():.1%} of the images on average."
    ))
else:
    display(Markdown("Left out: nothing is planted in the images of this run."))
