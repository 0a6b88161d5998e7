# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 What the components stand for
#
# - each latent of the dictionary by the images that activate it most, with a label from a vocabulary;
# - how clear, how redundant, how ambiguous the latents are, by paper B's scores;
# - against the truth: which known factors of the drawn world have a latent of their own, beside raw neurons and two other baselines;
# - where in an image a latent is on.
#
# Paper B, methods 2 to 4; the comparison with known factors is our own.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
import torch
from IPython.display import Markdown, display

from clipshift_core import concepts, exam, figures_components, ground_truth
from clipshift_core.canvas import n_images
from clipshift_core.dictionaries import Dictionaries, codes_of, heat_maps
from clipshift_core.workbench import Workbench


def pictures(images):
    return [dictionaries.probe.source.read(image) for image in images if image >= 0]


bench = Workbench.open("08", profile, overrides)
dictionaries = Dictionaries(bench)
is_there = bool(bench.profile.sae) or not dictionaries.left_out
Markdown(
    f"The dictionary: **{dictionaries.used.sae.n_latents:,} latents** on the {bench.profile.sae_token} token after block {dictionaries.layer} of "
    f"{bench.encoder.name}, looked at with {n_images([len(dictionaries.probe.images)])} that it was not learned from. "
    f"Labels come from {dictionaries.labeller.name}."
    if is_there else f"Left out: there is no dictionary to look at, for {dictionaries.left_out}."
)

# %% [markdown]
# ## Examples, labels and scores
#
# The examples of a latent are the images that activate it most. Their mean embedding is compared with every text of a vocabulary; the
# best text is the label, and its cosine minus that of the empty text the *alignment*. *Clarity* is the mean cosine between two
# examples, *polysemanticity* how far the examples fall into two unlike groups, *redundancy* the cosine with the most similar other latent.

# %%
if is_there:
    sae, found = dictionaries.used.sae, dictionaries.examples
    components = bench.keep(dictionaries.components, "components")
    display(components.sort_values("alignment", ascending=False, kind="stable").head(12).round(3))

# %%
if is_there:
    on = components[components["n_examples"] >= concepts.SHOWN]
    display(bench.show(
        figures_components.frequency_and_clarity(components),
        "frequency-and-clarity",
        alt="One point a latent: the share of images on which it is on against the clarity of its examples.",
    ))
    everything = dictionaries.label_embeddings
    chance = concepts.clarity(exam.unit(everything).mean(0)[None], torch.tensor([len(everything)])).item()
    kinds = on["kind"].value_counts()
    display(Markdown(
        f"{(components['frequency'] > 0).sum():,} of {len(components):,} latents are on in at least one of {n_images([found.n_images])}, "
        f"{len(on):,} in {concepts.SHOWN} or more. Of these the median clarity is **{on['clarity'].median():.2f}**; two images at random have a "
        f"cosine of {chance:.2f}. Mean redundancy is {on['redundancy'].mean():.2f}, median polysemanticity {on['polysemanticity'].median():.2f}. "
        f"Labels by kind: {', '.join(f'{kind} {count}' for kind, count in kinds.items())}."
        if len(on) else f"No latent is on in {concepts.SHOWN} images or more: too few images for the scores."
    ))

# %% [markdown]
# ### Clear ones
#
# The best aligned latent of each of six labels, and the images that activate it most.

# %%
if is_there:
    best = (on if len(on) else components[components["frequency"] > 0]).sort_values("alignment", ascending=False, kind="stable")
    best = best.drop_duplicates("label").head(6)
    display(bench.show(
        figures_components.component_gallery(best, [pictures(found.image[latent, :8].tolist()) for latent in best["latent"]]),
        "clear-components",
        alt="Six latents, a row each: label, scores and the eight images that activate it most.",
    ))

# %% [markdown]
# ### Ambiguous ones
#
# Those whose examples fall into the most unlike two groups. An autoencoder does not promise one meaning a latent.

# %%
if is_there:
    split = (on if len(on) else components[components["n_examples"] > 1]).sort_values("polysemanticity", ascending=False, kind="stable").head(4)
    if len(split):
        display(bench.show(
            figures_components.component_gallery(
                split, [pictures(found.image[latent, :8].tolist()) for latent in split["latent"]],
                title="The latents with the most unlike examples",
            ),
            "ambiguous-components",
            alt="Four latents of high polysemanticity, a row each, with the eight images that activate each most.",
        ))

# %% [markdown]
# ## Against the truth
#
# Every factor of a drawn scene is known, so a latent can be *scored*. For each factor value (a duck, something red, snow, a watermark)
# the best unit is chosen on one half of the images and scored on the other, by the area under the ROC curve and by F1. A value has a
# unit *of its own* if that unit detects it (AUROC of 0.9 or more) and is the best unit of no other value that it detects; a unit *mixes* if it
# detects two values, each also where the other is absent. The same for the neurons of the residual stream, for a dictionary of random
# directions of the same size, and for principal components.

# %%
is_known = is_there and dictionaries.drawn and bench.profile.sae_token == "class"
if is_known:
    x = torch.cat(list(dictionaries.unseen.in_order()))
    n, seed = len(x), bench.profile.seed
    first = ground_truth.halves(n, seed=seed)
    codes = concepts.pooled(*map(torch.cat, zip(*codes_of(sae, dictionaries.unseen), strict=True)), sae.n_latents)
    bases = {
        "dictionary": ground_truth.dictionary(codes, n, sae.n_latents),
        "neurons": ground_truth.neurons(x),
        "random": ground_truth.random_dictionary(x, first, n_latents=sae.n_latents, k=sae.k, seed=seed),
        "pca": ground_truth.principal_components(x, first),
    }
    recovery = ground_truth.compare(bases, ground_truth.factors(dictionaries.probe.images), first, **bench.resampling)
    bench.keep(recovery.factors, "recovery-by-factor")
    display(bench.keep(recovery.summary, "recovery").round(3))
    display(bench.show(
        figures_components.recovery(recovery.summary, n_factors=int(recovery.bases["n_factors"].iloc[0])),
        "recovery",
        alt="Dictionary, neurons, random dictionary and principal components by AUROC, F1, own units and mixing units.",
    ))
else:
    display(Markdown("Left out: it needs drawn scenes, whose factors are known, and a dictionary of the class token."))

# %%
if is_known:
    display(bench.show(
        figures_components.recovery_by_factor(recovery.factors),
        "recovery-by-factor",
        alt="Every factor value with the AUROC of the best unit of each basis, grouped by factor.",
    ))
    score = recovery.summary.set_index(["measure", "basis"])
    ours = recovery.factors[recovery.factors["basis"] == "dictionary"].sort_values("auroc", kind="stable")
    rival = score.loc["auroc", "value"].drop("dictionary").idxmax()
    ahead = score.loc[("auroc", rival)]
    display(Markdown(
        f"The dictionary's best latents reach a mean AUROC of **{score.loc[('auroc', 'dictionary'), 'value']:.3f}** over {len(ours)} factor values; "
        f"the next best basis is {figures_components.BASES[rival][0].lower()} with {ahead['value']:.3f}, which is behind by {ahead['difference']:.3f} "
        f"({ahead['difference_low']:.3f} to {ahead['difference_high']:.3f}). "
        f"**{score.loc[('own', 'dictionary'), 'value']:.0f} of {len(ours)}** values have a latent of their own (neurons: "
        f"{score.loc[('own', 'neurons'), 'value']:.0f}), and {score.loc[('mixing', 'dictionary'), 'value']:.0f} latents mix values. Hardest to find: "
        + ", ".join(f"{row.factor} {row.value} ({row.auroc:.2f})" for row in ours.head(3).itertuples()) + "."
    ))

# %% [markdown]
# ## Where in the image
#
# A dictionary of the patches' tokens says where a latent is on. This one ships, too; it reads the last block but one, for after the last
# block nothing reads the patches any more.

# %%
patches = dictionaries.patches if is_there else None
if patches:
    on_patches = dictionaries.activations(dictionaries.probe.source, patches.origin.layer, "spatial")
    fires = concepts.examples(codes_of(patches.sae, on_patches), patches.sae.n_latents)
    listed = bench.keep(dictionaries.described(fires), "patch-components")
    clear = listed[listed["n_examples"] >= min(concepts.SHOWN, fires.n_images)].sort_values("alignment", ascending=False, kind="stable")
    clear = clear.drop_duplicates("label").head(4)
    shown = [[image for image in fires.image[latent, :6].tolist() if image >= 0] for latent in clear["latent"]]
    maps = [heat_maps(patches, on_patches, images, latent, bench.encoder.grid) for images, latent in zip(shown, clear["latent"], strict=True)]
    display(bench.show(
        figures_components.component_gallery(
            clear, [pictures(images) for images in shown], maps, title="Where latents of the patches' dictionary are on"
        ),
        "where-components",
        alt="Four latents of the patches' dictionary: the images that activate each most, and where in them it is on.",
    ))
else:
    display(Markdown("Left out: the profile names no dictionary of the patches' tokens (key `sae_patches`)."))
