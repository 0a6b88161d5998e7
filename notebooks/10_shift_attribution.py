# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 Which components an augmentation destroys, and which it invents
#
# - the bridge between the two papers: the change in an image's similarity to its text, as a sum over the latents of the dictionary;
# - a fingerprint of each of the nine augmentations: what it destroys and what it invents;
# - on how few latents a shift rests;
# - whether giving a view its lost latents back repairs the prediction.
#
# This project's own question; neither paper asks it.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
from IPython.display import Markdown, display

from clipshift_core import figures_shift_attribution as figures
from clipshift_core import repair, shift_attribution
from clipshift_core.canvas import label, n_images
from clipshift_core.dictionaries import Dictionaries
from clipshift_core.shifted import by_kind, shifted, turnover
from clipshift_core.workbench import Workbench

bench = Workbench.open("10", profile, overrides)
dictionaries = Dictionaries(bench)
reason = dictionaries.not_shifted
found = None if reason else shifted(dictionaries)
Markdown(
    f"Left out: {reason}." if reason else
    f"{n_images([found.n_images])}, each with its nine views, as the one pass of notebook 02 drew and encoded them; the dictionary of notebook 08, "
    f"{dictionaries.used.sae.n_latents:,} latents after the last block. Asked of each image: the cosine with "
    + ("the word of the thing in it." if dictionaries.drawn else "the word that the model gives it.")
)

# %% [markdown]
# ## A shift as a sum
#
# Between the activation of an image and that of its view lies a straight path. The gradient of the similarity, integrated along it,
# gives every latent its part of the change, (activation after - activation before) x direction . gradient; what the dictionary does not write
# is one more part, named *error*. The parts sum to the change: nothing is left over but the quadrature's *gap*.

# %%
if found:
    account = bench.keep(shift_attribution.account_table(found.shifts, **bench.resampling), "account")
    display(bench.show(
        figures.account(account),
        "account",
        alt="For each augmentation the mean change in similarity, split into what latents lose, what they gain, and the error's part.",
    ))
    wide = account.pivot(index="augmentation", columns="quantity", values="mean")
    worst, gap = wide["change"].idxmin(), max(float(shift.gap.abs().max()) for shift in found.shifts.values())
    display(Markdown(
        f"**{label(worst)}** costs most: the similarity changes by {wide.loc[worst, 'change']:+.3f} on average, of which latents lose "
        f"{wide.loc[worst, 'lost']:+.3f} and gain {wide.loc[worst, 'gained']:+.3f}, and {wide.loc[worst, 'error']:+.3f} is the error's. "
        f"The parts of every image and view sum to its change to {'within 0.0001' if gap < 1e-4 else f'{gap:.0e}'}."
    ))

# %% [markdown]
# ## Destroyed and invented
#
# What an augmentation takes from the latents of an image, and what it adds, as a share of the activation that they have. A dictionary that
# always has the same number of latents on turns as many on as it turns off; how much they weigh, and what they stand for, is what differs.

# %%
if found:
    kinds = dictionaries.components.set_index("latent")["kind"]
    bench.keep(turnover(found.shifts, **bench.resampling), "turnover")
    kinds_turned = bench.keep(by_kind(found.shifts, kinds, **bench.resampling), "turnover-by-kind")
    lost = kinds_turned[kinds_turned["quantity"] == "lost"].pivot(index="augmentation", columns="kind", values="mean")
    whole = lost.sum(axis=1)
    hit = lost.loc[:, lost.max() > 0.005].div(whole, axis=0)
    display(bench.show(
        figures.turned_over(kinds_turned[kinds_turned["kind"].isin(hit)]),
        "turnover",
        alt="For each augmentation the share of latent activation that it takes and adds, stacked by what the latents stand for.",
    ))
    most = {kind: hit[kind].idxmax() for kind in hit}
    display(Markdown(
        f"**{label(whole.idxmax())}** takes most, {whole.max():.0%} of an image's latent activation; {label(whole.idxmin())} least, {whole.min():.0%}. "
        "Of what is taken, the largest share falls on " + "; ".join(
            f"*{kind}* latents under {label(name)} ({hit.loc[name, kind]:.0%})" for kind, name in most.items()
        ) + "."
    ))

# %% [markdown]
# ## The latents that carry each shift
#
# `part` is what a latent adds to the mean change in similarity; `destroyed` and `invented` are the shares of images in which it goes off, and
# comes on.

# %%
if found:
    prints = shift_attribution.fingerprints(found.shifts, n_shown=8, **bench.resampling)
    names = dictionaries.components.set_index("latent")["label"].fillna("no label")
    prints.insert(2, "label", prints["latent"].map(names))
    bench.keep(prints, "fingerprints")
    display(bench.show(
        figures.fingerprints(prints, names.to_dict()),
        "fingerprints",
        alt="For each augmentation the latents that carry its shift, by label, with their mean part of the change.",
    ))

# %%
if found:
    firsts = prints.drop_duplicates("augmentation")
    shared = prints.groupby("latent")["augmentation"].nunique().sort_values(ascending=False, kind="stable")
    common = names[shared.index[0]]
    display(firsts[["augmentation", "label", "latent", "part", "part_low", "part_high", "destroyed", "invented"]].round(3))
    display(Markdown(
        "The latent that moves the similarity most: " + "; ".join(
            f"{label(row.augmentation)}: *{row.label}* ({row.part:+.4f}, {row.part_low:+.4f} to {row.part_high:+.4f})" for row in firsts.itertuples()
        ) + f". Latent {shared.index[0]} (*{common}*) is among the first eight of {shared.iloc[0]} of the {len(found.shifts)} augmentations; "
        f"{(shared == 1).sum()} of the {len(shared)} latents named here belong to one augmentation alone."
    ))

# %% [markdown]
# ## On how few latents a shift rests
#
# The smallest number of latents that make up half, and nine tenths, of the sum of the absolute parts of an image.

# %%
if found:
    few = bench.keep(shift_attribution.concentration_table(found.shifts, **bench.resampling), "concentration")
    display(bench.show(
        figures.concentration(few),
        "concentration",
        alt="For each augmentation the number of latents that make up half and nine tenths of the change of an image.",
    ))
    mean = few.pivot(index="augmentation", columns="quantity", values="mean")
    display(Markdown(
        f"Half of an image's shift rests on {mean['half'].min():.1f} to {mean['half'].max():.1f} latents on average, nine tenths on "
        f"{mean['ninety'].min():.1f} to {mean['ninety'].max():.1f}, of {mean['latents'].min():.1f} to {mean['latents'].max():.1f} that change. "
        f"It is most concentrated under {label(mean['half'].idxmin())}, least under {label(mean['half'].idxmax())}."
    ))

# %% [markdown]
# ## Repair
#
# Give the latents that cost most their activations of the original back, in the view's own forward pass, and ask again. Beside them as many
# random ones of those that are on in either. If the parts mean what they say, the few must repair much more than the random. More than all of
# the lost similarity can come back: what the view has gained stays. Images are drawn with all nine of their views.

# %%
if found:
    repaired = bench.keep(repair.table(found.repaired(), of=found.of, **bench.resampling), "repair")
    display(bench.show(
        figures.repair(repaired),
        "repair",
        alt="Share of the lost similarity, and of the turned predictions, that restored latents bring back, top against random.",
    ))
    share = repaired.set_index(["measure", "chosen", "size"])
    difference = share.loc[("target", "top - random", 5)]
    turned = share.loc[("predictions", "top - random", 5)]
    bounds = "{share:.0%} ({low:.0%} to {high:.0%})".format
    display(Markdown(
        f"Over all nine augmentations, five restored latents bring back **{bounds(**share.loc[('target', 'top', 5)])}** of the lost similarity, five "
        f"random ones {bounds(**share.loc[('target', 'random', 5)])}: a difference of {bounds(**difference)}. Of the "
        f"{int(turned['n'])} views whose predicted word is not the original's, five restored latents turn {bounds(**share.loc[('predictions', 'top', 5)])} back, "
        f"five random ones {bounds(**share.loc[('predictions', 'random', 5)])}. "
        f"{'The repair is clear.' if difference['low'] > 0 and turned['low'] > 0 else 'The repair is not clear.'}"
    ))
