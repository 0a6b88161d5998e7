# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 Layers and models
#
# - where along the depth the shift grows: the class token after every block, by cosine distance and by linear CKA;
# - which heads still attend to the same places;
# - whether another model ranks the nine augmentations alike, and whether the same images are fragile in both.
#
# Beyond the paper: a layer-wise study and a comparison between models are future work that paper A names. Blocks and heads come
# from the same one pass as everything else; every other model sees the same pixels. Blocks and heads are counted from 0.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
import torch
from IPython.display import Markdown, display

from clipshift_core import figures_layers, layers
from clipshift_core.canvas import in_order, label, n_images
from clipshift_core.workbench import Workbench


def bounds(row):
    return f"{row['low']:.2f} to {row['high']:.2f}" if row["low"] == row["low"] else "interval unknown"


def names(these):
    return ", ".join(label(name) for name in in_order(these)) or "none"


bench = Workbench.open("06", profile, overrides)
encoder, n_blocks = bench.encoder, bench.encoder.n_blocks
Markdown(f"The model is **{encoder.name}**: {n_blocks} blocks of {encoder.n_heads} heads; {n_images([len(bench.manifest.images)])}.")

# %% [markdown]
# ## Block by block
#
# The embedding is read from one token, the class token, which every block rewrites (in a tower without one, the mean over tokens
# stands for it). How far is it, after each block, from where it is for the original image?

# %%
blocks = layers.by_block(bench.dataset, **bench.resampling)
if len(blocks):
    bench.keep(blocks, "blocks")
    figure = figures_layers.block_lines(blocks)
    alt = "Mean cosine distance of the class token after each block, one line for each augmentation, with 95 % intervals."
    display(bench.show(figure, "class-token-by-block", alt=alt))
else:
    display(Markdown(f"Left out: the blocks of {encoder.name} cannot be read."))

# %%
half = bench.keep(layers.half_way(bench.dataset, **bench.resampling), "half-way")
if half["block"].notna().any():
    early, late = (half.loc[index] for index in (half["block"].idxmin(), half["block"].idxmax()))
    at_first = half.loc[half["block"] == 0, "augmentation"]
    display(half.round(2))
    display(Markdown(
        f"After block 0, half of the distance after the last block ({blocks['block'].max()}) is already there for: {names(at_first)}. "
        + (f"It takes longest for **{label(late['augmentation'])}**, until block {late['block']:.2f} ({bounds(late)})."
           if late["block"] > early["block"] else "")
    ))

# %% [markdown]
# ### Relative to the distance between images
#
# Before the first block the class token is the same for every image, so early distances are small whatever happens to the image.
# Divided by the mean distance between two *different* originals after the same block, they can be compared along the depth:
# 0 is not moved, 1 is moved as far as another image lies. (Intervals by jackknife over the images whose tokens are kept.)

# %%
relative = layers.relative_distance(bench.tokens) if n_blocks else blocks
if relative["mean"].notna().any():
    bench.keep(relative, "relative-distance")
    figure = figures_layers.block_lines(relative, "relative")
    alt = "Distance of the class token after each block over that between two images, one line for each augmentation."
    display(bench.show(figure, "class-token-relative", alt=alt))
    first, last = (relative[relative["block"] == block].set_index("augmentation") for block in (relative["block"].min(), relative["block"].max()))
    ahead = last["mean"].idxmax()
    display(Markdown(
        f"Two different images lie {first['between'].iloc[0]:.2f} apart after the first block and {last['between'].iloc[0]:.2f} after the "
        f"last. Measured by that, what an augmentation does **fades** with depth (last interval below the first) for: "
        f"{names(last.index[last['high'] < first['low']])}. It **grows** (last interval above the first) for: "
        f"{names(last.index[last['low'] > first['high']])}. At the end {label(ahead)} has moved the token furthest, by "
        f"{last.loc[ahead, 'mean']:.2f} ({bounds(last.loc[ahead])}) of the distance to another image."
    ))
else:
    display(Markdown("Left out: it needs at least two images and a tower whose blocks can be read."))

# %% [markdown]
# ## How much of the representation is left: linear CKA
#
# Cosine compares an image with its own view. Centred kernel alignment (Kornblith et al. 2019) asks instead whether the *geometry*
# of all images is kept: which images lie near which. It is 1 if the views are arranged like the originals, up to rotation and scale,
# and 0 if they are unrelated. As published it is biased upwards when images are not many more than features, so we take the
# unbiased form of HSIC (Song et al. 2007; Nguyen et al. 2021). Its intervals are the jackknife's: a bootstrap draws images twice,
# and twins look like structure, which brings the bias back.

# %%
cka = layers.block_cka(bench.tokens) if n_blocks else blocks.assign(cka=[])
if cka["cka"].notna().any():
    bench.keep(cka, "cka")
    alt = "Heatmap of the debiased linear CKA between the class tokens of views and originals, augmentation by block."
    display(bench.show(figures_layers.cka_heatmap(cka), "cka", alt=alt))
    alt = "One minus linear CKA of the class tokens after each block, one line for each augmentation, with 95 % intervals."
    display(bench.show(figures_layers.block_lines(cka, "cka"), "cka-by-block", alt=alt))
else:
    display(Markdown("Left out: it needs at least four different images and a tower whose blocks can be read."))

# %%
if cka["cka"].notna().any():
    end = cka[cka["block"] == cka["block"].max()].set_index("augmentation").sort_values("cka", kind="stable")
    least, most = end.iloc[0], end.iloc[-1]
    token = torch.from_numpy(bench.tokens["token"].values[:, 0, int(cka["block"].max())])
    wrong = [layers.linear_cka(token, token.roll(1, 0), debiased=debiased).item() for debiased in (False, True)]
    display(Markdown(
        f"After the last block **{label(end.index[0])}** keeps least of the arrangement (CKA {least['cka']:.2f}, {bounds(least)}) and "
        f"{label(end.index[-1])} most ({most['cka']:.3f}). What the bias would do here, with {n_images([len(token)])} of width "
        f"{token.shape[1]}: compared with the *wrong* images (each with the next), the published form still gives {wrong[0]:.3f}, "
        f"the debiased one {wrong[1]:.3f}; and for {label(end.index[0])} it gives {least['biased']:.3f} instead of {least['cka']:.3f}."
    ))

# %% [markdown]
# ## Head by head
#
# Attention similarity, 1 / (1 + MSE) of the two min-max normalised maps, for each head's class-token row by itself (the paper
# averages the heads of the last block). Maps are compared place by place, as published: attention that follows a flipped or shifted
# object counts as moved.

# %%
heads = layers.by_head(bench.dataset, **bench.resampling)
if len(heads):
    bench.keep(heads, "heads")
    alt = "Nine heatmaps, one for each augmentation: mean attention similarity of every head of every block."
    display(bench.show(figures_layers.head_heatmap(heads), "heads", alt=alt))
else:
    display(Markdown(f"Left out: the heads of {encoder.name} cannot be read."))

# %%
if len(heads):
    mean = heads.groupby(["block", "head"])["mean"].mean().sort_values(kind="stable")
    wide = heads.pivot(index="augmentation", columns=["block", "head"], values="mean")
    spread = wide.max(axis=1) - wide.min(axis=1)
    gone = layers.left_out(bench.dataset, "head_attention")
    display(mean.head(5).reset_index().round(4))
    display(Markdown(
        f"Over all augmentations, head {mean.index[0][1]} of block {mean.index[0][0]} stays in place least (mean similarity "
        f"{mean.iloc[0]:.3f}) and head {mean.index[-1][1]} of block {mean.index[-1][0]} most ({mean.iloc[-1]:.3f}). Heads differ most "
        f"under {label(spread.idxmax())} (from {wide.loc[spread.idxmax()].min():.3f} to {wide.loc[spread.idxmax()].max():.3f}) and least "
        f"under {label(spread.idxmin())}. "
        + (f"Left out, because their heads cannot be read: blocks {', '.join(map(str, gone))}." if gone else "All blocks could be read.")
    ))

# %% [markdown]
# ## Other models
#
# The same pass for each other model of the profile: same images, same drawn views, pixel for pixel. Embeddings of different models
# have different lengths, so a mean L2 means nothing across them; its *ranking* does, and so does L2 over the typical distance
# (root mean square) between the same model's embeddings of two different images, in the table (NaN if there is only one image).

# %%
compared = layers.compare_models(bench, bench.profile.models)
models = list(compared["model"].unique())
if len(models) > 1:
    by_model = bench.keep(layers.by_model(compared, **bench.resampling), "models")
    agreement = bench.keep(layers.model_agreement(compared, **bench.resampling), "model-agreement")
    alt = "Ranks of the nine augmentations by mean L2, from model to model, with Kendall's tau between the rankings."
    display(bench.show(figures_layers.model_ranks(by_model, agreement), "model-ranks", alt=alt))
    display(by_model.pivot(index="augmentation", columns="model", values="mean").loc[in_order(by_model["augmentation"]), models].round(3))
else:
    display(Markdown(f"Left out: the profile lists no other model than {encoder.name} (key `models`)."))

# %%
if len(models) > 1:
    by_rank = by_model.sort_values("rank", kind="stable").groupby("model", sort=False)["augmentation"]
    firsts = [f"{model}: {', '.join(label(name) for name in rows[:3])}" for model, rows in by_rank]
    taus = [f"{row['model']} and {row['other']} {row['tau']:.2f} ({bounds(row)})" for _, row in agreement.iterrows()]
    alt = "Mean cosine distance in one model against the other, one point for each augmentation, with 95 % intervals."
    display(bench.show(figures_layers.model_scatter(by_model), "model-against-model", alt=alt))
    display(Markdown(f"First three places, {'; '.join(firsts)}. Kendall's tau between the rankings: {'; '.join(taus)}."))

# %% [markdown]
# ### Are the same images fragile in both?
#
# Rankings of means may agree though the models stumble over different images. So, for each augmentation: Spearman's rho over
# images between the L2 shift in one model and in the other.

# %%
if len(models) > 1:
    images = bench.keep(layers.image_agreement(compared, **bench.resampling), "image-agreement")
    display(images.round(2))
    known = images.dropna()
    if len(known):
        best, worst = (images.loc[index] for index in (known["rho"].idxmax(), known["rho"].idxmin()))
        display(Markdown(
            f"Between models, the images agree most under **{label(best['augmentation'])}** (rho {best['rho']:.2f}, {bounds(best)}) and "
            f"least under {label(worst['augmentation'])} ({worst['rho']:.2f}, {bounds(worst)}). In {(known['low'] > 0).sum()} of "
            f"{len(images)} cases the interval lies above 0, where an image that is fragile in one model tends to be so in the other."
        ))
    else:
        display(Markdown(f"{n_images(images['n'])} cannot tell: an interval needs at least four."))
