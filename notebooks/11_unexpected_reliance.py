# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11 Unexpected reliance
#
# - latents that a class relies on though they do not mean it, found against a control of shuffled texts;
# - each with its evidence, and a guess at what kind it is;
# - scored against what was planted, and against what really happens in counterfactual pictures;
# - suppressed: does that repair what a cue breaks, and at what cost; and the verdict on paper B's claim B2.
#
# Paper B, method 7, on which its public code is silent.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
import pandas as pd
from IPython.display import Markdown, display

from clipshift_core import (
    causal,
    claims,
    claims_latents,
    figures_causal,
    figures_evidence,
    figures_reliance,
    reliance,
    suppression,
)
from clipshift_core.audit import LOOKED_AT, Audit
from clipshift_core.dictionaries import Dictionaries
from clipshift_core.workbench import Workbench

bench = Workbench.open("11", profile, overrides)
audit = Audit(Dictionaries(bench))
reason = audit.left_out
drawn = not reason and audit.dictionaries.drawn
Markdown(
    f"Left out: {reason}." if reason else
    f"{len(audit.dictionaries.probe.images):,} images, each with its class; a dictionary of {audit.spliced.sae.n_latents:,} latents of {audit.name} after its last block"
    + (
        ", learned from scenes in which every cue is independent of the class, as are those that say what a latent stands for. (What a dictionary "
        "that is learned from the model's own biased world makes of the same question is shown below.)" if bench.profile.sae_reference else "."
    )
)

# %% [markdown]
# ## What is relied on, and does not mean the class
#
# A *candidate* is a latent that is on in at least three images of a class, and whose examples agree with the class's text less than half as well as
# those of the latent that agrees best. Its score is what it adds to the class's similarity on average (act x grad). The control: the same latents of the same
# images asked for the text of another class, drawn anew twenty times. The threshold is the lowest score at which shuffled texts would
# give at most a tenth as many.

# %%
if not reason:
    found = audit.discovery
    bench.keep(found.table, "candidates")
    display(bench.show(
        figures_reliance.attribution_and_alignment(found.table, found.threshold),
        "candidates",
        alt="Each candidate by its relative alignment with the class and its attribution to the class, those above the threshold marked.",
    ))
    sure = found.table[found.table["found"]]
    display(Markdown(
        f"Of {len(found.table):,} candidates **{len(sure)} are found** at a false-discovery rate of {reliance.FALSE_DISCOVERY_RATE:.0%} against shuffled texts: "
        f"{sure['latent'].nunique()} latents, in {sure['word'].nunique()} classes."
    ))

# %% [markdown]
# ## The evidence
#
# The best candidates, found or not. A kind is guessed by a written-down rule (`clipshift_core/evidence.py`) from what is shown: where in the image the
# latent reads, whether the same pixels are there in image after image, whether the written word brings it, whether label and class share a part of
# a word, and whether it is on as fully as on its own examples (*presence*; a half or less is a likeness). Nothing that is known of the drawing is used.

# %%
if not reason and len(audit.best):
    seen = audit.evidence
    columns = ["word", "latent", "label", "kind", "because", "attribution", "low", "high", "n", "n_on", "alignment", "relative", "fdr", "found", "presence", "reads", "border", "repeats", "split"]
    display(bench.keep(seen.table[columns], "evidence").round(3))
    rows = seen.table.head(9)
    classes = [audit.asked.index == audit.asked.words.index(word) for word in rows["word"]]
    spread = [(audit.values * (audit.probe.latents == latent)).sum(1)[here].numpy() for latent, here in zip(rows["latent"], classes, strict=True)]
    examples = [[audit.reference.source.read(i) for i in audit.examples.image[latent, :4].tolist() if i >= 0] for latent in rows["latent"]]
    pictures = [[audit.dictionaries.probe.source.read(i) for i in some if i >= 0] for some in seen.images[: len(rows)].tolist()]
    display(bench.show(
        figures_evidence.findings_gallery(rows, spread, examples, pictures, list(seen.maps[: len(rows)].numpy())),
        "evidence",
        alt="The best candidates: class, latent, guessed kind, distribution of the attribution, examples of the latent, and images of the class with where it reads.",
    ))

# %% [markdown]
# ## What really happens
#
# A scene without the thing and without the cue; the same with the cue alone. Whatever the similarity to the word then gains was caused by the cue. A latent carries
# that rise as far as deleting it removes it. So for every class and every cue, thing, colour and background it is known what raises it, and through which
# latents: the truth that candidates are scored against.

# %%
if drawn:
    audits = {audit.name: audit} | {other.name: other for other in Audit.others(bench)}
    rises = {name: each.rises for name, each in audits.items()}
    planted = bench.keep(pd.concat([found.planted.assign(model=name) for name, found in rises.items()]), "planted-rises")
    removed = pd.concat([found.removed.assign(model=name) for name, found in rises.items()])
    left = pd.concat([
        causal.remaining(each.drawn, each.states, each.spliced, each.asked.texts, each.asked.words, each.suppressed["looked at"][0]).assign(model=name)
        for name, each in audits.items()
    ])
    display(bench.show(
        figures_causal.rises(planted, removed, left),
        "causal-rises",
        alt="How far each planted cue alone raises its word's similarity, and what remains of that without the latents that carry it.",
    ))
    known = planted[planted["model"] == audit.name]
    carried = removed[removed["model"] == audit.name].merge(known.rename(columns={"cue": "value"})[["kind", "word", "family", "value"]])
    display(Markdown(
        f"{audit.name}: {known['causal'].sum()} of {len(known)} planted reliances raise their word when added alone; of these "
        f"{carried.drop_duplicates(['word', 'value']).shape[0]} have a latent whose deletion takes at least a fifth of the rise. "
        f"No single latent carries any of the others that far, so that no list of single latents can name them."
    ))

# %%
if drawn and len(audit.best):
    planted_kind = carried.drop_duplicates(["word", "latent"]).set_index(["word", "latent"])["kind"].rename("planted_kind")
    guessed = seen.table.join(planted_kind, on=["word", "latent"])
    display(bench.show(
        figures_evidence.kinds(guessed),
        "kinds",
        alt="How many of the best candidates were guessed to be of each kind, and as what those were planted that carry a planted reliance.",
    ))
    of_plan = guessed.dropna(subset="planted_kind")
    display(Markdown(
        f"Of {len(of_plan)} candidates that carry a planted reliance {(of_plan['kind'] == of_plan['planted_kind']).sum()} are guessed to be of its kind: too few to judge the rule by. "
        "What was not planted is likeness, mostly: *other*."
    ))

# %% [markdown]
# ## Scored
#
# All candidates in the order of five methods, against this truth. *Precision*: of the twenty best, the share that the pictures confirm. *Recall*: of the planted
# reliances, the share that one of the twenty best carries. Chance is the share of candidates that are true.

# %%
if drawn:
    scores = bench.keep(pd.concat([
        reliance.score_table(each.rankings, each.rises.removed, each.rises.planted, n_found=LOOKED_AT, **bench.resampling).assign(model=name)
        for name, each in audits.items()
    ]), "scores")
    display(bench.show(
        figures_reliance.scores(scores),
        "scores",
        alt="Average precision, precision and recall of five orders of the candidates with 95 % intervals, for two models.",
    ))
    value = scores.set_index(["model", "measure", "method"])["value"].sort_index()
    best = {name: value[name, "average precision"].drop("chance").idxmax() for name in audits}
    display(Markdown("; ".join(
        f"{name}: the best order is by {figures_reliance.look_of(method).label} (average precision {value[name, 'average precision', method]:.2f}, act x grad "
        f"{value[name, 'average precision', 'act_x_grad']:.2f}, logit lens {value[name, 'average precision', 'logit_lens']:.2f}, chance {value[name, 'average precision', 'chance']:.2f}), "
        f"and of act x grad's twenty best {value[name, 'precision', 'act_x_grad']:.0%} are confirmed" for name, method in best.items()
    ) + "."))

# %% [markdown]
# ### Where each planted reliance stands, and what a biased dictionary sees
#
# The same once more with the dictionary of notebook 08, which was learned from the model's own world, where nine in ten ducks have ripples, and with examples
# from that world.

# %%
if drawn:
    biased = Audit(Dictionaries(bench.changed({"sae_reference": None}))) if bench.profile.sae_reference else audit
    every = audits | ({f"{audit.name}, biased dictionary": biased} if biased is not audit else {})
    places = bench.keep(pd.concat([
        reliance.ranks(each.discovery.table, each.rises.removed, each.rises.planted).assign(model=name) for name, each in every.items()
    ]), "ranks")
    display(bench.show(
        figures_reliance.planted_ranks(places),
        "ranks",
        alt="The rank of each planted reliance among all candidates, by kind, for two models and for a dictionary that was learned from biased scenes.",
    ))
    hit = places.assign(hit=places["rank"].notna(), near=places["rank"].le(LOOKED_AT).fillna(False)).groupby("model", sort=False)[["hit", "near", "found"]].sum()
    display(Markdown("; ".join(
        f"**{name}**: {row['hit']} of {len(known)} planted reliances are carried by a candidate, {row['near']} by one of the {LOOKED_AT} best, {row['found']} by one that is found"
        for name, row in hit.iterrows()
    ) + "."))

# %% [markdown]
# ## Suppressed
#
# A class is scored without the latents that it is found to lean on; all other classes keep them. Every set, also none, gets the class intercepts that suit it
# on ordinary images. *Misled* are scenes that are right until a cue is added and are then taken for the cue's own word; *true* latents are those that the counterfactual
# pictures name for the planted cues: the best that a list could do.

# %%
if drawn:
    outcomes = bench.keep(pd.concat([
        suppression.outcome_table(each.repaired(), **bench.resampling).assign(model=name) for name, each in audits.items()
    ]), "suppression")
    display(outcomes.round(3))
    ours = outcomes[outcomes["model"] == audit.name]
    display(bench.show(
        figures_causal.suppression(ours.drop(columns="model")),
        "suppression",
        alt="The share of scenes that is predicted right as found, best, true or random latents are suppressed, with 95 % intervals.",
    ))
    at = ours.set_index(["scenes", "suppressed"])
    display(Markdown(
        f"Of {at.loc[('misled', 'nothing'), 'n']} misled scenes, suppressing the {LOOKED_AT} best candidates brings back **{at.loc[('misled', 'looked at'), 'accuracy']:.0%}**, those found alone "
        f"{at.loc[('misled', 'found'), 'accuracy']:.0%}, the true latents {at.loc[('misled', 'true'), 'accuracy']:.0%}, as many random ones {at.loc[('misled', 'random'), 'accuracy']:.0%}. "
        + " ".join(
            f"On {what} accuracy changes by {100 * at.loc[(name, 'looked at'), 'difference']:+.1f} points ({100 * at.loc[(name, 'looked at'), 'difference_low']:+.1f} to {100 * at.loc[(name, 'looked at'), 'difference_high']:+.1f})."
            for name, what in (("misleading", "all scenes with another word's cue"), ("ordinary", "ordinary scenes"))
        )
    ))

# %% [markdown]
# ## The ledger

# %%
if not reason:
    hits = None
    if drawn:
        planted_here = reliance.ranks(found.table, rises[audit.name].removed, rises[audit.name].planted).dropna(subset="rank")
        hits = planted_here.drop(columns="found").merge(found.table[["word", "latent", "attribution", "low", "high"]], on=["word", "latent"])
    rows = claims_latents.reliances(
        found.table, found.threshold, hits, n_latents=audit.spliced.sae.n_latents, n_images=len(audit.asked.index), notebook="11"
    )
else:
    rows = claims.left_out(claims_latents.RELIANCES, reason, notebook="11")
ledger = claims.record(bench.profile.run_dir / "claims.csv", rows)
display(ledger[["claim", "statement", "value", "ci_low", "ci_high", "n", "verdict"]].round(4))
Markdown(
    ("The interval of B2b is one of a count: what is found for certain, and what may be. " if drawn else "")
    + claims.caveat(bench.profile)
)
