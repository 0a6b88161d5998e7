# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12 Probes against text, and the lesion study
#
# - linear probes trained on ever more biased images, beside zero-shot text: which loses more when the bias turns round, and which leans more on the cues;
# - whether text pays with ambiguity;
# - the lesion study: which shortcuts a probe takes, which text takes, and what suppressing their latents does;
# - the verdict on paper B's claims B3 and B4.
#
# Paper B, methods 8 and 9, on which its public code is silent.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
import numpy as np
from IPython.display import Markdown, display

from clipshift_core import biased, claims, claims_latents, figures_probes, lesion_study, probes
from clipshift_core.audit import Audit
from clipshift_core.dictionaries import Dictionaries
from clipshift_core.lesion_case import Case
from clipshift_core.probed import LEDGER_STRENGTH, Probed
from clipshift_core.workbench import Workbench


def said(row, value="value"):
    return f"{row[value]:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


bench = Workbench.open("12", profile, overrides)
dictionaries = Dictionaries(bench)
audit = Audit(dictionaries)
reason = audit.left_out or ("" if dictionaries.drawn else "biased splits are drawn, and this run looks at other images")
Markdown(
    f"Probes are left out: {reason}." if reason else
    f"{len(biased.WORDS)} words whose cue is known. An image shows one thing and one cue: its own with a probability that is the *strength* of the bias, else another's. Probes are logistic "
    f"regressions on unit-length embeddings of {audit.name}, {biased.N_TRAIN} images each, their regularisation chosen on {biased.N_VALIDATE} images of the same bias. "
    f"All readers are tried on the same {biased.N_TEST} things three ways: with their own cue, with any cue, and with another word's."
)

# %% [markdown]
# ## Does a bias in training cost a probe more than it costs text?

# %%
if not reason:
    probed = Probed(audit)
    accuracy = bench.keep(probes.accuracy_table(probed.answers, **bench.resampling), "accuracy")
    display(bench.show(
        figures_probes.robustness(accuracy),
        "robustness",
        alt="Accuracy with the own cue, with any cue and with another word's cue against the strength of the bias in training, probe and text.",
    ))
    losses = bench.keep(probes.loss_table(probed.answers, **bench.resampling), "losses")
    display(losses.round(3))
    lost = losses.set_index(["strength", "reader"])
    display(Markdown(
        f"From own cues to others', a probe trained at strength {LEDGER_STRENGTH:g} loses {lost.loc[(LEDGER_STRENGTH, 'probe'), 'loss']:.1%} and text {lost.loc[(LEDGER_STRENGTH, 'text'), 'loss']:.1%}; "
        f"the difference is {said(lost.loc[(LEDGER_STRENGTH, 'probe - text')], 'loss')}. At strength 1, where cue and word never part in training, it is {said(lost.loc[(1.0, 'probe - text')], 'loss')}. "
        f"The model itself was trained on images in which about nine in ten of these things have their cue: its text is no unbiased reader."
    ))

# %% [markdown]
# ## Which leans more on the cues?
#
# The logit of the right word minus the mean of the others', attributed to latents by act x grad; the share of it that falls on latents which some cue alone
# turns up, on images where cues say nothing.

# %%
if not reason:
    shares = {s: probed.share(reader) for s, reader in probed.readers.items()}
    of_text = probed.share(probed.text)
    share = bench.keep(probes.share_table(shares, of_text, **bench.resampling), "shares")
    display(bench.show(
        figures_probes.shares(share),
        "shares",
        alt="Share of the absolute attribution on latents of cues against the strength of the bias in training, probe and text.",
    ))
    at = share.set_index(["strength", "reader"])
    display(Markdown(
        f"{int(probed.spurious.sum())} of {len(probed.spurious):,} latents are turned up by a cue alone. The probe's share minus text's: "
        + "; ".join(f"at strength {figures_probes.strength_text(s)} {said(at.loc[(s, 'probe - text')], 'share')}" for s in biased.STRENGTHS) + "."
    ))

# %% [markdown]
# ## Does text pay with ambiguity?
#
# Words with two drawings (bat, crane, kite), words within another word (star, fish and starfish), and all the others: the audited images of notebook 11, named by text.

# %%
if not reason:
    ambiguity = bench.keep(probes.ambiguity({"text": probed.right}, probed.words, biased.AMBIGUOUS, **bench.resampling), "ambiguity")
    row = ambiguity.iloc[0]
    display(Markdown(
        f"Text errs on {row['ambiguous']:.1%} of {row['n_ambiguous']} images of ambiguous words and on {row['other']:.1%} of {row['n_other']} others: a difference of {said(row, 'difference')}."
    ))

# %% [markdown]
# ## The lesion study
#
# Lesions whose label is a rule of four factors. Where the probe is trained a ruler goes with malignant, a coloured patch with benign and light skin with malignant; on
# the *balanced* images none of them says anything, on the *reversed* ones they say the opposite. To run the same on an ISIC folder, give its path:
# `make reproduce SET="lesions=path/to/isic"` (images beside a `metadata.csv`; artefacts from columns of 0 and 1 there or in an `artefacts.csv`).

# %%
case = Case(dictionaries)
if case.left_out:
    display(Markdown(f"Left out: {case.left_out}."))
else:
    if case.found:
        display(Markdown(f"{len(case.images.table):,} lesions of {bench.profile.lesions}; set aside: {len(case.found.manifest.set_aside):,}."))
        display(bench.keep(case.found.manifest.set_aside, "lesions-set-aside"))
    diagnosed = case.study
    table = bench.keep(diagnosed.accuracy, "lesion-accuracy")
    display(table.pivot(index="reader", columns="split", values="accuracy")[lesion_study.tests(case.images.table)].round(3))
    gaps = bench.keep(diagnosed.gaps, "lesion-gaps")
    here = gaps[gaps["split"] == case.split]
    if len(here):
        display(bench.show(
            figures_probes.gaps(here, n=int((case.images.table["split"] == case.split).sum())),
            "lesion-gaps",
            alt="For each artefact the share called malignant with minus without it, where it says nothing, by probe and text.",
        ))
    right = table.set_index(["reader", "split"])["accuracy"]
    display(Markdown("; ".join(
        f"**{reader}** is right in " + ", ".join(f"{right[reader, split]:.1%} ({split})" for split in lesion_study.tests(case.images.table)) for reader in case.readers
    ) + "."))

# %%
if not case.left_out and case.images.planted:
    effects = bench.keep(case.effects(), "lesion-effects")
    added = effects[(effects["label"] == "both") & (effects["measure"] == "probability")].set_index(["artefact", "reader"])
    display(Markdown("The same lesion with and without the artefact: the probability of malignant changes by " + "; ".join(
        f"{name.replace('_', ' ')} {said(added.loc[(name, 'probe')])} (probe), {said(added.loc[(name, 'text')])} (text)" for name in case.images.planted
    ) + "."))
    means = bench.keep(diagnosed.means, "lesion-means").set_index(["split", "reader"])
    display(means[["value", "low", "high", "labels", "amplification", "amplification_low", "amplification_high", "n"]].round(3))

# %% [markdown]
# ### Through which latents, and does suppressing them help?
#
# Latents that stand for an artefact are chosen on one half of the balanced lesions, and everything is measured on the other. Beside that choice by correlation, in
# the drawn world, the causal one: the latent that adding the artefact alone turns up most.

# %%
if not case.left_out and not case.no_dictionary:
    inside = case.latents
    bench.keep(inside.drivers, "lesion-drivers")
    display(bench.keep(inside.factors, "lesion-latents").round(3))
    display(bench.keep(inside.shares, "lesion-shares").round(3))
    if case.images.planted:
        turned = bench.keep(case.turned(), "lesion-turned")
        stands_for = inside.latents.set_index("latent")["factor"]
        strongest = turned[turned["rank"] == 1].assign(stands_for=lambda rows: rows["latent"].map(stands_for))
        display(strongest[["artefact", "latent", "change", "low", "high", "up", "stands_for"]].round(3))
    suppressed = bench.keep(case.suppressed(), "lesion-suppression")
    display(suppressed[suppressed["measure"].isin(["accuracy", "mean gap"])].pivot_table(
        index=["reader", "split", "measure"], columns="deleted", values="value", sort=False
    ).round(3))
    of_artefacts = inside.shares[inside.shares["factor"] == "artefacts"].set_index("reader")
    more = suppressed.set_index(["reader", "split", "measure", "deleted"])
    splits = lesion_study.tests(case.images.table)
    display(Markdown(
        f"Latents of artefacts carry {of_artefacts.loc['probe', 'share']:.0%} of the probe's attribution and {of_artefacts.loc['text', 'share']:.0%} of text's. Deleting those of "
        f"{len(inside.of(case.images.planted or case.images.artefacts))} changes the probe's accuracy, against as many random ones, by "
        + "; ".join(f"{said(more.loc[('probe', split, 'accuracy', 'artefacts - random')])} ({split})" for split in splits) + "; text's by "
        + "; ".join(f"{said(more.loc[('text', split, 'accuracy', 'artefacts - random')])} ({split})" for split in splits) + "."
    ))
elif not case.left_out:
    display(Markdown(f"Left out: {case.no_dictionary}."))

# %% [markdown]
# ## The ledger
#
# The intervals are over images: they take each probe as it was trained. Another draw of the training images gives another probe.

# %%
if not reason:
    rows = claims_latents.probes_against_text(
        {name: probed.answers.loss(name, LEDGER_STRENGTH) for name in probes.READERS}, {"probe": shares[LEDGER_STRENGTH], "text": of_text},
        probed.right, np.isin(probed.words, list(biased.AMBIGUOUS)), notebook="12", **bench.resampling,
    )
else:
    rows = claims.left_out(claims_latents.PROBES, reason, notebook="12")
if not case.left_out and case.images.planted:
    called = {split: some for split, some in diagnosed.called.groupby("split")}
    free, there = called["balanced"], called["biased"]
    rows += claims_latents.shortcuts(
        {name: free[name] for name in case.readers}, free, {"probe": there["probe"], "label": there["malignant"]}, there, case.images.planted, notebook="12", **bench.resampling
    )
else:
    rows += claims.left_out(claims_latents.LESIONS, case.left_out or "it is not known which artefacts were planted in these lesions", notebook="12")
ledger = claims.record(bench.profile.run_dir / "claims.csv", rows)
display(ledger[["claim", "statement", "value", "ci_low", "ci_high", "n", "verdict"]].round(4))
counts = ledger["verdict"].value_counts()
Markdown(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f". {claims.caveat(bench.profile)}")
