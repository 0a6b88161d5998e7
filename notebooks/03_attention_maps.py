# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 Attention maps
#
# - where the class token looks in the last block, on originals and on their nine views;
# - how much each augmentation shifts that map, ranked, with intervals;
# - what single heads look at, and what attention rollout through all blocks says instead.
#
# Paper A, measures 4 and 9 (its figure 1). The rows come from the same forward pass as the embeddings. As published, a map is the
# class token's row over the patches, mean over heads, resized to the image and min-max normalised, and the similarity of two maps
# is 1 / (1 + their mean squared difference). So 0.5 is the least that it can be.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
import numpy as np
from IPython.display import Markdown, display

from clipshift_core import attention, augment, figures, figures_attention, stats
from clipshift_core.canvas import label
from clipshift_core.workbench import Workbench

bench = Workbench.open("03", profile, overrides)
dataset, encoder = bench.dataset, bench.encoder
is_readable = "attention_map" in dataset
Markdown(
    f"The vision tower of `{encoder.name}` has {encoder.n_blocks} blocks of {encoder.n_heads} heads over {encoder.grid[0]} x "
    f"{encoder.grid[1]} patches; its attention is {'read' if is_readable else '**not readable, so this notebook is empty**'}."
)

# %% [markdown]
# ## Original against nine views

# %%
if is_readable:
    ids = list(bench.manifest.images["image_id"][:3])
    pictures = np.stack([bench.views(image_id) for image_id in ids])
    display(bench.show(
        figures_attention.attention_overlays(
            pictures, dataset.attention_map.sel(image=ids).values, augment.VIEWS, similarity=dataset.attention.sel(image=ids).values
        ),
        "attention-overlays",
        alt="Three images and their nine views, each with the last block's attention laid over and its similarity to the original's.",
    ))

# %% [markdown]
# ## How much each augmentation shifts the map

# %%
if is_readable:
    ranking = stats.ranking(bench.shifts, "attention", largest_first=False, **bench.resampling)
    bench.keep(ranking, "attention-ranking")
    display(bench.show(
        figures.ranking(ranking, "attention"),
        "attention-ranking",
        alt="The nine augmentations sorted by attention similarity, least similar first, with 95 % intervals.",
    ))

# %%
if is_readable:
    display(bench.show(
        figures.metric_density(bench.shifts, "attention"),
        "attention-density",
        alt="Kernel densities of the attention similarity over images, one ridge per augmentation.",
    ))

# %%
if is_readable:
    wide = {name: bench.shifts.pivot(index="image_id", columns="augmentation", values=name) for name in ("attention", "cosine")}
    agreement = stats.rank_agreement(wide["attention"], wide["cosine"], **bench.resampling)
    first, last = ranking.iloc[0], ranking.iloc[-1]
    display(Markdown(
        f"**{label(first['augmentation'])}** shifts the attention most (mean similarity {first['mean']:.3f}, 95 % interval "
        f"{first['low']:.3f} to {first['high']:.3f}), **{label(last['augmentation'])}** least ({last['mean']:.3f}). "
        f"{ranking['separated'].sum()} of the {len(ranking) - 1} neighbouring pairs are separated. The order by attention and the "
        f"order by cosine of the embedding agree with Kendall's tau {agreement.mean:.2f} ({agreement.low:.2f} to {agreement.high:.2f})."
    ))

# %% [markdown]
# ## Head by head
#
# The mean over heads hides that heads look at different things, and that they are shifted to different degrees. One image
# and the views that shift its heads least and most:

# %%
if is_readable:
    of_one = dataset.attention.sel(image=ids[0]).to_series()
    chosen = ["original", of_one.idxmax(), of_one.idxmin()]
    rows = encoder.encode(pictures[0], capture=["attention.-1"]).captured["attention.-1"]
    index = [augment.VIEWS.index(name) for name in chosen]
    maps = attention.head_maps(rows[index], encoder.grid).numpy()
    display(bench.show(
        figures_attention.head_maps(pictures[0, index], maps, chosen),
        "attention-by-head",
        alt="One image and two of its views; beside each the mean attention and that of every head of the last block.",
    ))

# %%
if is_readable and encoder.n_blocks:
    heads = dataset.head_attention.mean("image").isel(block=-1).to_pandas()
    heads.columns = [f"head {head}" for head in heads.columns]
    display(bench.keep(heads.round(4).reset_index(), "head-similarity"))
    mean = heads.mean()
    display(Markdown(
        f"Over all images and augmentations, **{mean.idxmin()}** of the last block is shifted most (mean similarity {mean.min():.3f}) "
        f"and **{mean.idxmax()}** least ({mean.max():.3f})."
        if len(mean) > 1 else "The block has one head."
    ))

# %% [markdown]
# ## Last block or all of them
#
# The last block's row says what the class token takes from patches that have already exchanged what they know. Attention
# rollout (Abnar and Zuidema 2020) multiplies the blocks, half identity each for the residual stream.

# %%
blocks = [f"attention.{block}.all" for block in range(encoder.n_blocks)]
is_rollable = is_readable and bool(blocks) and encoder.readable(blocks) == blocks
if is_rollable:
    through = encoder.encode(pictures[:, 0], capture=blocks).captured
    joint = attention.to_map(attention.rollout([through[block] for block in blocks])[:, :1], encoder.grid).numpy()
    display(bench.show(
        figures_attention.rollout_and_last(pictures[:, 0], dataset.attention_map.sel(image=ids, view="original").values, joint),
        "attention-rollout",
        alt="Three pictures, the attention of the last block, and the rollout through all blocks.",
    ))
else:
    display(Markdown("Left out: the matrices of this tower's blocks cannot be read."))

# %%
if is_rollable:
    ends = dataset.attention_map.sel(image=ids, view="original").values.reshape(len(ids), -1)
    alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(ends, joint.reshape(len(ids), -1), strict=True)]
    display(Markdown(
        f"On these {len(ids)} pictures the two correlate patch by patch with {', '.join(f'{value:.2f}' for value in alike)}: "
        f"{'the rollout tells much the same story' if min(alike) > 0.7 else 'a picture of the last block alone is not the whole story'}."
    ))
