# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 A dictionary: training a sparse autoencoder
#
# - a sparse autoencoder writes an activation of CLIP as a sum of few of many directions, its latents;
# - it is trained here on activations that were encoded once, and compared with the one that ships;
# - what it leaves out: normalised error, dead latents, and whether the model still names what it sees from the reconstruction alone.
#
# Paper B, method 1. The recipe is the modern one, not the paper's: `tests/bench/sae_yardstick.py` trains the paper's beside it.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
import pandas as pd
from IPython.display import Markdown, display

from clipshift_core import figures_components, sae_quality
from clipshift_core.canvas import short
from clipshift_core.dictionaries import Dictionaries
from clipshift_core.workbench import Workbench

bench = Workbench.open("07", profile, overrides)
dictionaries = Dictionaries(bench)
given = dictionaries.given
is_learned = not dictionaries.left_out
where = f"the {bench.profile.sae_token} token after block {dictionaries.layer} of **{bench.encoder.name}** (from 0)"
Markdown(
    f"The residual stream is read at {where}. The dictionary that the series goes on with is "
    + (f"the one that ships, `{bench.profile.sae}`." if given else "the one that is trained here.")
    + (f" Nothing is trained here: {dictionaries.left_out}." if not is_learned else "")
)

# %% [markdown]
# ## Activations, encoded once
#
# The paper's code runs CLIP over all images again in every epoch. Here each image is encoded once; what training reads are rows on
# disk, mapped into memory a few chunks at a time, in an order that depends on the seed and the epoch alone.

# %%
sets = ({"to look at": dictionaries.unseen} if given or is_learned else {}) | ({"to learn from": dictionaries.seen} if is_learned else {})
rows = [
    {"rows": name, "images": held.dataset().sizes["image"], "activations": held.n_rows, "width": held.width,
     "MiB": round(held.n_rows * held.width * 4 / 2**20, 1)}
    for name, held in sets.items()
]
bench.keep(pd.DataFrame(rows), "activations") if rows else Markdown(f"Left out: {dictionaries.left_out}.")

# %% [markdown]
# ## Training
#
# Activations are centred and scaled; decoder rows have length 1 and start equal to the encoder's; latents that have gone dead
# are taught to write what the others leave over. (`sae_train` has the whole recipe.)

# %%
known = {"shipped": given} if given else {}
known |= {"trained here": dictionaries.own} if is_learned else {}
recipes = [{"dictionary": name, **learned.sae.settings, **learned.recipe} for name, learned in known.items()]
bench.keep(pd.DataFrame(recipes), "recipes") if recipes else Markdown(f"Left out: {dictionaries.left_out}.")

# %% [markdown]
# Thousands of steps carry the last digits of one processor to the first ones of the result, so that a dictionary that is trained elsewhere is
# another one, as good. The cells that show the one trained here are therefore run, but not compared digit by digit, by `make test`.

# %% tags=["nbval-ignore-output"]
if known:
    histories = pd.concat([learned.history.assign(model=name) for name, learned in known.items()])
    display(bench.show(
        figures_components.sae_training(histories),
        "training",
        alt="Curves over the training steps: normalised error, auxiliary loss, latents on, dead latents, learning rate.",
    ))
else:
    display(Markdown(f"Left out, with all that follows: {dictionaries.left_out}."))

# %% [markdown]
# ## How well they write activations they have not seen
#
# Normalised error: the squared error over that of always answering with the mean, so that 0 is perfect and 1 is no better than the
# mean. (About zero instead of the mean, as it is often given, the same errors would look much smaller.)

# %%
if known:
    qualities = {name: sae_quality.quality(learned.sae, dictionaries.unseen.in_order()) for name, learned in known.items()}
    table = pd.DataFrame([{"dictionary": name, **found._asdict()} for name, found in qualities.items()]).drop(columns="firing")
    used = "shipped" if given else "trained here"
    bench.keep(table, "quality")
    row = table.set_index("dictionary").loc[used]
    display(Markdown(
        f"On {row['n_rows']:,} unseen rows the dictionary that the series goes on with leaves {short(row['nmse'])} of the variance, with "
        f"{row['l0']:.1f} latents on at a time; {row['n_dead']} of its latents are never on here and {row['n_dense']} in more than "
        f"{sae_quality.DENSE_FROM:.0%} of the rows."
    ))

# %% tags=["nbval-ignore-output"]
if known:
    display(table.round(4))
    display(bench.show(
        figures_components.firing({name: found.firing.numpy() for name, found in qualities.items()}),
        "firing",
        alt="Latents in falling order of how often they are on, one curve for each dictionary.",
    ))
    best = table.sort_values("nmse", kind="stable").iloc[0]
    display(Markdown(
        f"The dictionary **{best['dictionary']}** has the smaller error: {short(best['nmse'])} of the variance against {short(table['nmse'].max())}."
        if len(table) > 1 else "There is one dictionary, and nothing to compare it with."
    ))

# %% [markdown]
# ## What the error costs the model
#
# The strictest reader of a reconstruction is the model itself. So let it go on with the reconstruction in place of the activation:
# how many images does it still name rightly, and how far do its similarities move? `same` is the share of images that go to the same
# text as before, `moved` the mean absolute change of a cosine.

# %%
if known:
    tasks = dictionaries.tasks()
    kept = pd.concat([
        sae_quality.predictions(*dictionaries.embeddings(learned), tasks, **bench.resampling).assign(dictionary=name)
        for name, learned in known.items()
    ])
    bench.keep(kept[["dictionary", *kept.columns[:-1]]], "predictions")
    of_used = kept[kept["dictionary"] == used]
    display(of_used.drop(columns="dictionary").round(4))
    worst = of_used.loc[of_used["same"].idxmin()]
    display(Markdown(
        f"With the dictionary that the series goes on with, {worst['same']:.1%} of the images or more keep their text; the task that "
        f"suffers most is **{worst['task']}**"
        + (f", where accuracy changes by {worst['change']:+.3f} (95 % interval {worst['low']:+.3f} to {worst['high']:+.3f})" if worst["change"] == worst["change"] else "")
        + f". A cosine between an image and a text moves by {of_used['moved'].mean():.4f} on average. What the dictionary leaves out is not lost in the "
        f"notebooks on attribution: there the error is added back, so that the prediction is exactly the model's own."
    ))

# %% tags=["nbval-ignore-output"]
if known and kept["accuracy"].notna().all():
    display(bench.show(
        figures_components.predictions_kept(kept),
        "predictions",
        alt="Zero-shot accuracy of each task by the model itself and by the reconstruction of each dictionary.",
    ))
