# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 Preservation
#
# - what a view keeps of its original, by the paper's five similarity metrics: cosine of the embedding, attention, patches, edges, details;
# - the published patch similarity beside the corrected one, and what its wrapping integers do to the conclusion;
# - which metrics go together, over pairs of image and augmentation, between augmentations, and within an image;
# - the same pixel metrics on photographs.
#
# Paper A, measures 2 and 4 to 8 (its figures 3 to 5), claim A3. Every metric of a view is measured on the same pixels: the paper's
# public code draws the augmentations again for the pixel metrics, so that they are not those of the stored embeddings.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
from itertools import combinations

import numpy as np
import pandas as pd
import skimage.data
import torch
from IPython.display import Markdown, display

from clipshift_core import (
    augment,
    claims,
    figures,
    figures_correlation,
    figures_preservation,
    images,
    preservation,
    shift,
    stats,
)
from clipshift_core.canvas import SIMILARITIES, label
from clipshift_core.workbench import Workbench

bench = Workbench.open("04", profile, overrides)
shifts = bench.shifts.dropna(axis=1, how="all")  # a tower whose attention cannot be read has none
measured = [name for name in shift.METRICS if name in shifts]
five = [name for name in SIMILARITIES if name in shifts]
Markdown(f"{len(shifts):,} views of {shifts['image_id'].nunique()} images; metrics: {', '.join(map(label, measured))}.")

# %% [markdown]
# ## The five metrics of each augmentation

# %%
summary = pd.concat([stats.bootstrap_table(shifts, name, **bench.resampling).assign(metric=name) for name in measured])
bench.keep(summary, "summary")
summary.pivot(index="augmentation", columns="metric", values="mean").loc[list(augment.VIEWS[1:]), measured].round(3)

# %%
bench.show(
    figures.metric_heatmap(shifts, ["l2", *five, "ssim"], by="cosine"),
    "metrics-sorted",
    alt="Heatmap of seven metrics per augmentation, sorted by the cosine similarity of the embedding.",
)

# %%
bench.show(
    figures_preservation.radar(summary),
    "radar",
    alt="Radar plots of the similarity metrics, one panel per augmentation with the others in grey.",
)

# %%
bench.show(
    figures_preservation.comparison_bars(summary),
    "comparison-bars",
    alt="Bars of the similarity metrics of every augmentation with 95 % intervals, one panel per metric.",
)

# %%
ranks = summary[summary["metric"].isin(five)].pivot(index="augmentation", columns="metric", values="mean")[five].rank()
odd = (ranks.max(axis=1) - ranks.min(axis=1)).idxmax()
Markdown(
    f"The metrics do not agree on what is harmless. Ranked from least (1) to most similar (9), **{label(odd)}** ranges from place "
    f"{ranks.loc[odd].min():.0f} ({label(ranks.loc[odd].idxmin())}) to place {ranks.loc[odd].max():.0f} ({label(ranks.loc[odd].idxmax())})."
)

# %% [markdown]
# ## Patch similarity, as published and corrected
#
# The published code subtracts arrays of unsigned bytes, so the difference and its square wrap modulo 256. No square modulo 256 is
# larger than 249, so the value cannot fall below 1 / (1 + 249 / 255²) = 0.99618, whatever the two images are.

# %%
bench.show(
    figures_preservation.kernels_side_by_side(summary),
    "patch-kernels",
    alt="Patch similarity of each augmentation with the published and with the corrected kernel, and its rank under both.",
)

# %%
wide = {name: shifts.pivot(index="image_id", columns="augmentation", values=name) for name in measured}
agreement = stats.rank_agreement(wide["patch_published"], wide["patch"], **bench.resampling)
means = summary.pivot(index="augmentation", columns="metric", values="mean")
span = means[["patch_published", "patch"]].agg(["min", "max"])
both = {name: means[name].rank() for name in ("patch_published", "patch")}
moved = (both["patch_published"] - both["patch"]).abs().idxmax()
Markdown(
    f"As published, the nine lie between {span.loc['min', 'patch_published']:.4f} and {span.loc['max', 'patch_published']:.4f}: "
    f"nothing seems to touch a patch. Corrected, they lie between {span.loc['min', 'patch']:.3f} and {span.loc['max', 'patch']:.3f}. The "
    f"wrap changes the order, too: **{label(moved)}** goes from place {both['patch_published'][moved]:.0f} to "
    f"{both['patch'][moved]:.0f} of 9 (1 is least similar), and the two orders agree with Kendall's tau {agreement.mean:.2f} "
    f"({agreement.low:.2f} to {agreement.high:.2f})."
)

# %% [markdown]
# ## Which metrics go together

# %%
pairs = list(combinations(["l2", *five, "ssim"], 2))
together = {
    over: pd.DataFrame([
        {"metric_a": a, "metric_b": b, **stats.correlation(wide[a], wide[b], over=over, **bench.resampling)._asdict()} for a, b in pairs
    ])
    for over in ("pairs", "augmentations", "within")
}
correlations = bench.keep(pd.concat([table.assign(over=over) for over, table in together.items()]), "correlations")
bench.show(
    figures_correlation.correlation_heatmap(together["pairs"], statistic="Spearman's rho over all pairs of an image and an augmentation"),
    "correlations",
    alt="Lower triangle of Spearman correlations between seven metrics over image-augmentation pairs, with 95 % intervals.",
)

# %%
bench.show(
    figures_correlation.correlation_heatmap(together["augmentations"], statistic="Spearman's rho between the means of the augmentations"),
    "correlations-between-augmentations",
    alt="Lower triangle of Spearman correlations between the augmentations' means of seven metrics, with 95 % intervals.",
)

# %%
bench.show(
    figures_preservation.overall(
        shifts,
        summary,
        together["pairs"].query("metric_b != 'ssim'"),  # the paper's own metrics
        statistic="Spearman's rho over image-augmentation pairs",
    ),
    "overall",
    alt="Four panels: mean L2 per augmentation, cosine over images, means of the five metrics, and their correlations.",
)

# %% [markdown]
# ## Does keeping edges and details mean keeping the embedding?

# %%
bench.show(
    figures_correlation.metric_scatter(shifts, "edge", "cosine"),
    "edge-against-cosine",
    alt="Cosine similarity against edge preservation, one point per image and augmentation, with the means.",
)

# %%
bench.show(
    figures_correlation.metric_scatter(shifts, "detail", "cosine"),
    "detail-against-cosine",
    alt="Cosine similarity against detail preservation, one point per image and augmentation, with the means.",
)

# %%
ledger = claims.preservation(bench.dataset, notebook=bench.notebook, **bench.resampling)
claims.record(bench.profile.run_dir / "claims.csv", ledger)
display(claims.table(ledger)[["claim", "statement", "value", "ci_low", "ci_high", "verdict"]].round(3))
with_cosine = correlations[(correlations["metric_a"] == "cosine") & correlations["metric_b"].isin(["edge", "detail"])]
said = [
    f"{label(row.metric_b).lower()} {row.mean:.2f} ({row.low:.2f} to {row.high:.2f})" for row in with_cosine.itertuples() if row.over == "within"
]
Markdown(
    f"A3: {'; '.join(f'**{row.verdict}** ({row.claim}, rho {row.value:.2f})' for row in ledger)}. Within one image, across its nine views, "
    f"the mean rho with the cosine is: {', '.join(said)}. {claims.caveat(bench.profile)}"
)

# %% [markdown]
# ## On photographs
#
# Five photographs that come with scikit-image, whatever images the run has: the pixel metrics need no model. `mse wrapped` is the
# mean squared difference that the published code sees.

# %%
names = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field")
photographs = [images.resize(getattr(skimage.data, name)(), bench.profile.image_size) for name in names]
drawn = np.stack([augment.views(photo, seed=bench.profile.seed, image_id=name) for photo, name in zip(photographs, names, strict=True)])
pixels = torch.from_numpy(drawn)
kept = {name: scores.mean(0).numpy() for name, scores in preservation.of_pixels(pixels[:, 0], pixels[:, 1:]).items()}
kept["mse wrapped"] = ((drawn[:, 1:] - drawn[:, :1]) ** 2).mean((0, 2, 3, 4))
photos = pd.DataFrame({"augmentation": augment.VIEWS[1:], **kept})
bench.keep(photos, "photographs").round(4)

# %%
of = photos.set_index("augmentation")
worst = of["mse"].idxmax()
Markdown(
    f"On these {len(names)} photographs **{label(worst)}** has a mean squared error of {of.loc[worst, 'mse']:,.0f}, of which the wrap leaves "
    f"{of.loc[worst, 'mse wrapped']:.0f}: its patch similarity reads {of.loc[worst, 'patch_published']:.4f} as published and "
    f"{of.loc[worst, 'patch']:.3f} corrected. From {label(of['ssim'].idxmin())} to "
    f"{label(of['ssim'].idxmax())} the SSIM goes from {of['ssim'].min():.3f} to {of['ssim'].max():.3f}: the nine are not compared at the "
    f"same strength. `05_dose_response` does that."
)
