# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 Dose and response
#
# - each augmentation at twelve severities, from nothing to far beyond the published parameters: how the shift grows;
# - how much the published parameters distort the pixels, which differs from augmentation to augmentation;
# - the augmentations compared where they all distort the pixels alike, and whether the paper's ranking survives.
#
# Beyond the paper, which compares the nine at one severity each. A view keeps its draw along the curve: the same angle, hole
# or noise field, only scaled. Severity 0 is the image itself, severity 1 the published parameters.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
from dataclasses import replace

import pandas as pd
from IPython.display import Markdown, display

from clipshift_core import augment, dose, figures_dose, stats
from clipshift_core.canvas import label, n_images
from clipshift_core.figures_dose import level_name
from clipshift_core.workbench import Workbench

bench = Workbench.open("05", profile, overrides)
n_dose = bench.profile.n_dose
sweep = dose.sweep(bench.profile, bench.manifest, bench.encoder, n_images=n_dose).load()
bench.keep(dose.table(sweep), "sweep").head(12).round(3)

# %% [markdown]
# ## The severities
#
# What severity multiplies, and how far it has to go, is each augmentation's own. A flip has no half: it is a step at 0.5.

# %%
severities = [", ".join(f"{s:g}" for s in steps) for steps in dose.SEVERITIES.values()]
scaled = [augment.AUGMENTATIONS[name].dose for name in dose.SEVERITIES]
with pd.option_context("display.max_colwidth", None):
    display(pd.DataFrame({"scaled": scaled, "severities": severities}, index=[label(name) for name in dose.SEVERITIES]))

# %% [markdown]
# ## Shift against severity

# %%
curves = bench.keep(dose.curves(dose.table(sweep), "l2", **bench.resampling), "curves")
bench.show(
    figures_dose.dose_curves(curves),
    "dose-curves",
    alt="Mean L2 distance against severity with 95 % intervals, one panel for each of the nine augmentations.",
)

# %%
at_one = curves[curves["severity"] == 1].set_index("augmentation")["mean"]
share = (at_one / curves.groupby("augmentation")["mean"].max()).drop("horizontal_flip").dropna().sort_values(kind="stable")
everyone = n_images([sweep.sizes["image"]])
Markdown(
    f"Over {everyone}: at its published severity **{label(share.index[-1])}** has gone {share.iloc[-1]:.0%} of "
    f"the way to the largest shift of its curve, **{label(share.index[0])}** {share.iloc[0]:.0%}."
)

# %% [markdown]
# ## How much the published parameters distort the pixels

# %%
published = dose.published(sweep)
means = published.groupby("augmentation", sort=False)[["mse", "ssim", "l2", "cosine_distance"]].mean()
bench.keep(means.sort_values("mse", ascending=False, kind="stable").reset_index(), "published-distortion").round({"mse": 1, "ssim": 3, "l2": 3, "cosine_distance": 4})

# %%
wide = {name: published.pivot(index="image_id", columns="augmentation", values=name) for name in ("mse", "ssim", "l2")}
alike = stats.rank_agreement(wide["mse"], wide["l2"], **bench.resampling)
strongest, weakest = means["mse"].idxmax(), means["mse"].idxmin()


def interval(x):
    return f"{x.low:.2f} to {x.high:.2f}" if x.low <= x.high else "one image leaves the interval unknown"


Markdown(
    f"As published, **{label(strongest)}** distorts the pixels most (mean MSE {means['mse'].max():,.0f}) and **{label(weakest)}** "
    f"least ({means['mse'].min():,.0f}). The order by MSE and the order by L2 distance agree with Kendall's tau {alike.mean:.2f} "
    f"({interval(alike)})."
)

# %% [markdown]
# ## At the same distortion
#
# The levels at which to compare are not chosen by hand: they are the quartiles of the distortions that the published parameters
# make, over all pairs of an image and an augmentation. For each image the shift is read off where its curve first reaches the
# level, by interpolation between two severities. An image that an augmentation cannot distort that far (a flat image cannot be
# blurred) is counted and left out; nothing is extrapolated. The flip has no dose and is left out by name.

# %%
levels = {by: dose.levels(sweep, by) for by in ("mse", "ssim")}
middle = {by: held[0.5] for by, held in levels.items()}
matched = {by: dose.at_matched(sweep, by, level) for by, level in middle.items()}
for by in matched:
    bench.keep(matched[by], f"matched-{by}")
columns = {level_name(by, level): dose.reach(matched[by]).set_index("augmentation") for by, level in middle.items()}
pd.concat(columns, axis=1).rename(index=label).round(3)

# %% [markdown]
# `severity` is the median dose that the level takes; `reached` and `never` count images. The levels are the medians; weaker and
# stronger ones follow below.

# %%
bench.show(
    figures_dose.shift_against_distortion(dose.along(sweep, "mse", middle["mse"]), "mse", middle["mse"]),
    "shift-against-mse",
    alt="Mean L2 distance against the mean squared error of the pixels, one line for each augmentation.",
)

# %%
bench.show(
    figures_dose.shift_against_distortion(dose.along(sweep, "ssim", middle["ssim"]), "ssim", middle["ssim"]),
    "shift-against-ssim",
    alt="Mean L2 distance against one minus the structural similarity, one line for each augmentation.",
)

# %% [markdown]
# ## Does the ranking survive?
#
# The published ranking and the one at the same distortion are compared on the same images and augmentations, by Kendall's tau
# with its interval over images. The rule, set beforehand: the ranking *survives* where the whole interval lies above 0.8 (of
# eight augmentations, at most two of the 28 pairs change places), *does not survive* where all of it lies below, and is
# *undecided* otherwise; with fewer than ten images the verdict is *unknown*.

# %%
found = {by: dose.compare(sweep, by, level, **bench.resampling) for by, level in middle.items()}
bench.show(
    figures_dose.matched_ranking(found["mse"].table, "mse", middle["mse"]),
    "matched-ranking-mse",
    alt="The ranking of eight augmentations by L2 distance as published, joined to the ranking at the same squared error.",
)

# %%
bench.show(
    figures_dose.matched_ranking(found["ssim"].table, "ssim", middle["ssim"]),
    "matched-ranking-ssim",
    alt="The ranking of eight augmentations by L2 distance as published, joined to the ranking at the same SSIM.",
)

# %%
for by, (ranks, tau, verdict) in found.items():
    bench.keep(ranks, f"matched-ranking-{by}")
    if ranks.empty:
        display(Markdown(f"No image reaches an {level_name(by, middle[by])} under every augmentation. Verdict: **{verdict}**."))
        continue
    noise, first, least = ranks.set_index("augmentation").loc["noise"], ranks.iloc[0], ranks.iloc[-1]
    display(Markdown(
        f"At an {level_name(by, middle[by])}, reached under all eight by {first['n']} of {everyone}, "
        f"**{label(first['augmentation'])}** moves the embedding most (mean L2 {first['mean']:.2f}; place {first['published_rank']} as "
        f"published) and **{label(least['augmentation'])}** least ({least['mean']:.2f}; place {least['published_rank']} as "
        f"published). Noise goes from place {noise['published_rank']} to {noise['rank']}. Kendall's tau between the two orders is "
        f"{tau.mean:.2f} ({interval(tau)}). Does the published ranking survive? Verdict: **{verdict}**."
    ))

# %% [markdown]
# ## At weaker and stronger levels, and by angle
#
# The same for each quartile, and for the cosine distance (1 - cosine), which the length of the embedding does not enter.
# The stronger the level, the fewer the images (`n`) that every augmentation can distort that far.

# %%
names = {name: label(name) for name in dose.DOSED}
verdicts = bench.keep(dose.verdicts(sweep, **bench.resampling), "verdicts")
verdicts.replace(names).round(2)

# %%
def places(table):
    reached = table[table["n"] > 0]
    most = " or ".join(names[name] for name in reached["most"].unique()) or "(no image reaches any level)"
    return most, f"{(reached['noise_matched'] == 1).sum()} of {len(reached)}"


counts = [f"{name} in {(verdicts['verdict'] == name).sum()}" for name in dose.VERDICTS]
Markdown(
    f"Of {len(verdicts)} comparisons, the published ranking {', '.join(counts)}. What moves the embedding most at the same "
    f"distortion is {places(verdicts)[0]}; noise does in {places(verdicts)[1]} comparisons that have an image."
)

# %% [markdown]
# ## Is it the size at which the pixels are compared?
#
# A model with a smaller input shrinks each view first. That averages noise away, which the distortion of the full-size pixels
# still counts. So the same sweep once more, with every image resized to the model's own input *before* it is augmented and
# compared: then the model sees the very pixels whose distortion is matched.

# %%
drawn, own = bench.profile.image_size, bench.encoder.image_size
if drawn != own:
    at_own = replace(bench.profile, image_size=own)
    again = dose.verdicts(dose.sweep(at_own, bench.manifest, bench.encoder, n_images=n_dose).load(), **bench.resampling)
    display(bench.keep(again, "verdicts-own-size").replace(names).round(2))
    noise = again.set_index(["by", "quartile", "metric"]).loc[("mse", 0.5, "l2")]
    display(Markdown(
        f"Drawn and compared at {own} px, what moves the embedding most at the same distortion is {places(again)[0]}; noise does in "
        f"{places(again)[1]} (at {drawn} px in {places(verdicts)[1]}). At the median MSE noise goes from place "
        f"{noise['noise_published']} to {noise['noise_matched']}. The published ranking survives in "
        f"{(again['verdict'] == 'survives').sum()} of {len(again)} comparisons."
    ))
else:
    display(Markdown(f"Left out: the model's own input is {own} px, the size at which the views are drawn."))
