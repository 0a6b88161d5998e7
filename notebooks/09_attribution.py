# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 Which components drive a prediction
#
# - one image and one text: the similarity taken apart into latents;
# - six ways to attribute a prediction to latents, and exact ablation, the gold standard that is cheap at the last block;
# - which of them are faithful: by deleting and inserting latents, and by how they rank them beside exact ablation;
# - the same at an earlier block, on the tokens of the patches; and the verdict on paper B's claim B1.
#
# Paper B, methods 5 and 6. Its public code gives act x grad's own values as those of integrated gradients and leaves insertion unfilled; here
# both are computed.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
from IPython.display import Markdown, display

from clipshift_core import attributed, claims, claims_latents, faithfulness
from clipshift_core import figures_attribution as figures
from clipshift_core.canvas import n_images
from clipshift_core.dictionaries import Dictionaries
from clipshift_core.workbench import Workbench


def said(row):
    return f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


bench = Workbench.open("09", profile, overrides)
dictionaries = Dictionaries(bench)
is_there = bool(bench.profile.sae) or not dictionaries.left_out
Markdown(
    f"The dictionary of notebook 08, {dictionaries.used.sae.n_latents:,} latents of {bench.encoder.name} after block {dictionaries.layer}, is spliced into the "
    "forward pass; its error is added back as a constant, so that the prediction is exactly the model's own."
    if is_there else f"Left out: there is no dictionary to attribute to, for {dictionaries.left_out}."
)

# %% [markdown]
# ## One image, one text
#
# What each latent adds to the cosine between image and text, by integrated gradients: the parts sum to the similarity that the latents are
# responsible for. Beside each latent the images that activate it most. The rest of the similarity is there without any latent: it comes from the
# decoder's bias and the error.

# %%
if is_there:
    one = attributed.one_image(dictionaries)
    bench.keep(one.contributions, "one-image")
    display(bench.show(
        figures.image_taken_apart(one.contributions, one.picture, one.examples, one.text, one.total),
        "one-image",
        alt=f"A waterfall of the latents that make up the cosine of one picture with the text {one.text!r}.",
    ))
    first = one.contributions.iloc[0]
    display(Markdown(
        f"The cosine with *{one.text}* is {one.total:.3f}. The largest part is latent {first['latent']:.0f} (*{first['label']}*) with {first['value']:+.3f}; "
        f"deleting that one latent alone would change the cosine by {-first['exact']:+.3f}."
    ))

# %% [markdown]
# ## Deletion and insertion
#
# Every image of the probe, asked for its own word. Latents are deleted in the order that a method gives them, the highest first, and the cosine
# followed; or inserted into nothing. Curves are normalised image by image: 0 without any latent, 1 with all. A faithful order falls early and
# rises early. Only latents that are on take part. The image encoder never runs again.

# %%
found = attributed.attributed(dictionaries, dictionaries.used) if is_there else None
no_curves = faithfulness.left_out(found.curves) if found else dictionaries.left_out
if not no_curves:
    curves = faithfulness.normalised(found.curves)
    display(bench.show(
        figures.faithfulness_curves(bench.keep(faithfulness.curve_table(curves, **bench.resampling), "curves")),
        "faithfulness-curves",
        alt="Deletion and insertion: the normalised cosine against the share of latents, one line for each method.",
    ))
    areas = bench.keep(faithfulness.area_table(curves, **bench.resampling), "areas")
    display(bench.show(
        figures.faithfulness_areas(areas),
        "faithfulness-areas",
        alt="Area under the deletion and the insertion curve for each method with 95 % intervals.",
    ))
else:
    display(Markdown(f"Left out: {no_curves}."))

# %%
if not no_curves:
    area = areas.set_index(["kind", "method"])
    ranked = {kind: area.loc[kind]["mean"].sort_values(ascending=kind == "deletion", kind="stable").index for kind in faithfulness.KINDS}
    names = {kind: ", ".join(figures.method_look(name).label for name in order[:3]) for kind, order in ranked.items()}
    display(Markdown(
        f"Over {n_images(areas['n'])} with {found.n_units:.1f} latents on: best in deletion {names['deletion']}; best in insertion {names['insertion']}. Act x grad's "
        f"deletion area is {said(area.loc[('deletion', 'act_x_grad')])}, logit lens' {said(area.loc[('deletion', 'logit_lens')])}, a random order's "
        f"{said(area.loc[('deletion', 'random')])}. Without any latent the cosine is still {found.curves.none.mean():.3f}, with all {found.curves.every.mean():.3f}: the final norm "
        f"blows up what little the error holds once nothing stands beside it, and many latents lower the cosine, so that curves leave the range of 0 to 1. Integrated gradients' parts miss the change they explain by {'less than 0.0001' if abs(found.gap).max() < 1e-4 else f'{abs(found.gap).max():.0e}'}."
    ))
    differences = bench.keep(faithfulness.difference_table(curves, reference="act_x_grad", **bench.resampling), "differences")
    display(bench.show(
        figures.difference_from(differences),
        "faithfulness-differences",
        alt="The areas of each method minus those of act x grad, paired by image, with 95 % intervals.",
    ))

# %% [markdown]
# ### Over whole classes
#
# What a class leans on rather than what one image does: the latents of all images of a word, in one order, by their mean score over these images.

# %%
is_last = is_there and not dictionaries.not_shifted
by_class = attributed.attributed_by_class(dictionaries, dictionaries.used) if is_last else None
if by_class and not faithfulness.left_out(by_class):
    of_classes = faithfulness.normalised(by_class)
    class_areas = bench.keep(faithfulness.area_table(of_classes, **bench.resampling), "areas-classes")
    display(bench.show(
        figures.faithfulness_curves(bench.keep(faithfulness.curve_table(of_classes, **bench.resampling), "curves-classes")),
        "faithfulness-curves-classes",
        alt="Deletion and insertion of the latents of whole classes, one line for each method.",
    ))
    against_lens = faithfulness.difference_table(of_classes, reference="logit_lens", **bench.resampling).set_index(["kind", "method"])
    display(Markdown(
        "Act x grad's area minus logit lens', over whole classes: " + "; ".join(
            f"{kind} {said(against_lens.loc[(kind, 'act_x_grad')])}" for kind in faithfulness.KINDS
        ) + ". (Below 0 is better in deletion, above 0 in insertion.)"
    ))
else:
    display(Markdown(f"Left out: {faithfulness.left_out(by_class) if by_class else dictionaries.not_shifted}."))

# %% [markdown]
# ## Beside exact ablation
#
# At the last block only the final norm and the projection follow, so the true effect of deleting each latent is a small product. How well do the
# approximations rank the latents of an image as their true effects do? Both are computed in float64 from the dictionary on: many latents move the
# cosine by so little that float32's rounding would put them in order.

# %%
if is_there:
    agreement = bench.keep(faithfulness.agreement_table(found.agreement, **bench.resampling), "agreement")
    display(bench.show(
        figures.agreement(agreement, k=found.agreement.k),
        "agreement",
        alt="Rank correlation with exact ablation, and the overlap of the first five latents, for each method.",
    ))
    rho = agreement[agreement["measure"] == "rho"].set_index("method").sort_values("mean", ascending=False, kind="stable")
    display(Markdown(
        "Spearman's rho with exact ablation: " + "; ".join(f"{figures.method_look(name).label} {said(row)}" for name, row in rho.iterrows()) + "."
    ))

# %% [markdown]
# ## At an earlier block, on the patches
#
# The same for the dictionary of the patches' tokens. A latent is then one of an image's latents wherever in it it is on; deleting it deletes it
# everywhere, and the remaining blocks run again. A direction's logit lens, the final norm and projection of it alone, is a guess here: attention
# lies in between.

# %%
patches = dictionaries.patches if is_there else None
early = attributed.attributed(dictionaries, patches, n_images=64) if patches else None
no_patches = faithfulness.left_out(early.curves) if early else "the profile names no dictionary of the patches' tokens (key `sae_patches`)"
if not no_patches:
    early_curves = faithfulness.normalised(early.curves)
    early_areas = bench.keep(faithfulness.area_table(early_curves, **bench.resampling), "areas-patches")
    display(bench.show(
        figures.faithfulness_curves(bench.keep(faithfulness.curve_table(early_curves, **bench.resampling), "curves-patches")),
        "faithfulness-curves-patches",
        alt="Deletion and insertion of latents of the patches' tokens at an earlier block, one line for each method.",
    ))
    early_agreement = bench.keep(faithfulness.agreement_table(early.agreement, **bench.resampling), "agreement-patches")
    display(bench.show(
        figures.agreement(early_agreement, k=early.agreement.k),
        "agreement-patches",
        alt="Rank correlation with exact ablation at the earlier block for each method.",
    ))
    area = early_areas.set_index(["kind", "method"])
    display(Markdown(
        f"Over {n_images(early_areas['n'])} with {early.n_units:.0f} latents on in an image after block {patches.origin.layer}: act x grad's deletion area is "
        f"{said(area.loc[('deletion', 'act_x_grad')])}, logit lens' {said(area.loc[('deletion', 'logit_lens')])}, exact ablation's "
        f"{said(area.loc[('deletion', 'ablation')])}, a random order's {said(area.loc[('deletion', 'random')])}."
    ))
else:
    display(Markdown(f"Left out: {no_patches}."))

# %% [markdown]
# ## The ledger
#
# Claim B1 of paper B, decided by statistics that were written down before any value was seen (`clipshift_core/claims_latents.py`).

# %%
if not no_curves:
    rows = claims_latents.faithfulness(curves, notebook="09", **bench.resampling)
else:
    rows = claims.left_out(claims_latents.FAITHFUL, no_curves, notebook="09")
if not no_patches:
    rows += claims_latents.faithfulness(early_curves, notebook="09", criteria=claims_latents.EARLIER, **bench.resampling)
else:
    rows += claims.left_out(claims_latents.EARLIER, no_patches, notebook="09")
ledger = claims.record(bench.profile.run_dir / "claims.csv", rows)
display(ledger[["claim", "statement", "value", "ci_low", "ci_high", "n", "verdict"]].round(3))
counts = ledger["verdict"].value_counts()
Markdown(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f". {claims.caveat(bench.profile)}")
