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

from clipshift_core import exam, fetch, figures_world, scenes, sources
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
bench.keep(manifest.images.assign(path=manifest.images["path"].map(sources.printable)), "manifest").head(8)

# %% [markdown]
# ## Links
#
# Conceptual Captions is a list of links to other people's servers, and many of them are gone. Where the profile names such a list (key `fetch`), its links are tried
# in the order of their rank until the sample is full.

# %%
if bench.profile.listing:
    fetched = fetch.report(bench.profile.source_path)
    display(bench.keep(fetched.outcomes, "links").round(3))
    display(Markdown(fetched.summary))
else:
    display(Markdown("Left out: the images of this run were not fetched from a list of links."))

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
# ## Labels in place of captions
#
# Where the profile names classes (`CLASSES=file.txt`, a name a line), every image gets the nearest one by zero-shot, with its probability
# among them. The series calls an image by it where a caption is missing, and the notebooks on attribution ask for it.

# %%
if bench.labels is not None:
    of_class = bench.keep(bench.labels, "labels").groupby("label")["probability"].agg(["size", "median"])
    display(of_class.sort_values("size", ascending=False, kind="stable").head(12).round(3))
    display(Markdown(f"{len(of_class)} of {len(bench.classes.words)} classes are the label of at least one image."))
else:
    display(Markdown("Left out: the profile names no classes."))

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
