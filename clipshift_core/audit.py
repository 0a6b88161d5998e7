"""One model audited for unexpected reliance: what notebooks 11 and 12 start from.

Attributions are read off the run's probe, where cues and classes go together as they did in the model's training. What
a latent stands for is read off other images, the reference: for drawn scenes some in which every cue is independent of
the class. A dictionary that is learned from the former writes a cue and its class by one latent, and examples chosen
among the former show both at once; no alignment could then tell one from the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clipshift_core import attribution, causal, concepts, evidence, exam, reliance, scenes, suppression, vocabulary
from clipshift_core.activations import Source
from clipshift_core.attribution import METHODS
from clipshift_core.dictionaries import LEAST, Asked, Dictionaries, Learned, Probe, read
from clipshift_core.profiles import ROOT
from clipshift_core.splice import Splice, State
from clipshift_core.workbench import Workbench

FIRST_FREE = scenes.HELD_OUT + 600_000
"""Seed of the first scene of the reference."""
FIRST_PICTURE, N_SCENES = scenes.HELD_OUT + 800_000, 32
"""Seed of the first counterfactual picture, and how many there are of each value."""
FIRST_MISLEADING, N_MISLEADING = scenes.HELD_OUT + 700_000, 150
"""The same of the scenes that cues are added to."""
FIRST_ORDINARY, N_ORDINARY = scenes.HELD_OUT + 750_000, 500
"""The same of the scenes that show what suppression costs."""
LOOKED_AT = 20
"""Candidates that a person would look at."""
N_DECOYS = 20
"""Shuffles of the texts behind the false-discovery rate."""
COMPARED = ("act_x_grad", "ablation", "logit_lens", "frequency", "random")
"""What candidates are ranked by: methods of `attribution`, how often a latent is on, and chance."""


@dataclass(frozen=True)
class Audit:
    """The audit of one model; everything is made when first asked for."""

    dictionaries: Dictionaries

    @classmethod
    def others(cls, bench: Workbench) -> list["Audit"]:
        """The same of the profile's other models, as far as it names dictionaries for them."""
        profile, found = bench.profile, []
        for name, folder in zip(profile.models, profile.sae_others, strict=False):
            changed = {"model": name, "sae": None, "sae_patches": None, "sae_reference": folder}
            found.append(cls(Dictionaries(bench.changed(changed))))
        return found

    @property
    def name(self) -> str:
        """The model's."""
        return self.dictionaries.bench.encoder.name

    @property
    def left_out(self) -> str:
        """Why there is no audit; empty where there is."""
        found = self.dictionaries
        if found.bench.profile.sae_reference is None and found.not_shifted:
            return found.not_shifted
        n = len(found.probe.images)
        return f"too few images to audit ({n}, of at least {LEAST})" if n < LEAST else ""

    @cached_property
    def learned(self) -> Learned:
        """The profile's reference dictionary, or the one that the series goes on with."""
        found = self.dictionaries
        folder = found.bench.profile.sae_reference
        return read(ROOT / folder, found.bench.encoder, found.layer, "class") if folder else found.used

    @cached_property
    def spliced(self) -> Splice:
        """It in the forward pass."""
        return self.dictionaries.spliced(self.learned)

    def state(self, source: Source) -> State:
        """Images at the splice, all at once."""
        held = self.dictionaries.activations(source, self.spliced.layer, "class")
        return self.spliced.from_activations(torch.cat(list(held.in_order())))

    @cached_property
    def probe(self) -> State:
        """The audited images."""
        return self.state(self.dictionaries.probe.source)

    @cached_property
    def embeddings(self) -> Float[Tensor, "image dim"]:
        """Theirs, of length 1."""
        with torch.no_grad():
            return F.normalize(self.spliced.embed(self.probe), dim=1)

    @cached_property
    def asked(self) -> Asked:
        """The classes, and the one of each image."""
        return self.dictionaries.asked(self.dictionaries.probe.images, self.embeddings)

    @cached_property
    def reference(self) -> Probe:
        """The images that say what a latent stands for."""
        return self._reference(self.dictionaries.bench.encoder.image_size)

    @cached_property
    def reference_state(self) -> State:
        """They at the splice."""
        return self.state(self.reference.source)

    @cached_property
    def examples(self) -> concepts.Examples:
        """The reference images that activate each latent most."""
        state = self.reference_state
        return concepts.examples([(state.latents, state.codes.values)], self.spliced.sae.n_latents)

    @cached_property
    def means(self) -> Float[Tensor, "latent dim"]:
        """Mean embedding of each latent's examples, by the labelling model."""
        found = self.dictionaries
        if found.labeller is found.bench.encoder:
            with torch.no_grad():
                embeddings = self.spliced.embed(self.reference_state)
        else:
            embeddings = found.labelled(lambda size: self._reference(size).source)
        return concepts.mean_embedding(embeddings, self.examples.image[:, : concepts.SHOWN])

    @cached_property
    def labels(self) -> pd.DataFrame:
        """A row a latent: its best word and the rest of `vocabulary.labels`."""
        words, labeller = self.dictionaries.vocabulary[0], self.dictionaries.labeller
        return vocabulary.labels(self.means, self.dictionaries.bench.directions(words, labeller), words)

    @cached_property
    def alignment(self) -> Float[Tensor, "class latent"]:
        """Cosine of each latent's examples with each class's text, minus that with the empty text."""
        found = self.dictionaries
        directions = found.bench.directions(found.vocabulary[0], found.labeller)
        if found.drawn:
            _, phrases, templates = exam.TASKS["word"]
            texts = found.labeller.classifier(phrases, templates)
        else:
            texts = found.bench.directions(found.words, found.labeller).texts
        unit = F.normalize(self.means, dim=1)
        return (unit @ texts.T - (unit @ directions.empty)[:, None]).T

    def attributed(self, method: str, classes: Int[Tensor, " image"] | None = None) -> Float[Tensor, "image unit"]:
        """Attribution of each image's units to the text of its class, or of other `classes`, by one of `COMPARED`."""
        state = self.probe
        if method == "frequency":
            return state.on.float()
        if method == "random":
            return self._at_random()
        target = attribution.cosine(self.asked.texts[self.asked.index if classes is None else classes])
        if method == "ablation":
            return METHODS[method](self.spliced.in_double(), state.double(), target).values.float()
        return METHODS[method](self.spliced, state, target).values

    @cached_property
    def values(self) -> Float[Tensor, "image unit"]:
        """Attribution by act x grad, the paper's."""
        return self.attributed("act_x_grad")

    def decoys(self) -> Iterator[Float[Tensor, "image unit"]]:
        """For each shuffle the attribution to texts of other classes, one for all images of a class.

        It is 0 for a unit whose latent means the other class: that would be no decoy.
        """
        rng = np.random.default_rng([self.dictionaries.bench.profile.seed, *b"shuffled texts"])
        n, means_it = len(self.asked.words), reliance.relative(self.alignment) >= reliance.LOW
        for _ in range(N_DECOYS):
            other = torch.from_numpy((np.arange(n) + rng.integers(1, n, n)) % n)[self.asked.index]
            meant = means_it[other[:, None], self.probe.latents]
            yield self.attributed("act_x_grad", other).masked_fill(meant, 0)

    @cached_property
    def discovery(self) -> reliance.Discovery:
        """The candidates, and which of them are found."""
        decoys, settings = torch.stack(list(self.decoys())), self.dictionaries.bench.resampling
        latents, classes, on = self.probe.latents, self.asked.index, self.probe.on
        return reliance.discover(
            latents, self.values, decoys, classes, self.alignment, self.asked.words, on=on, **settings
        )

    @cached_property
    def drawn(self) -> dict[causal.Key, list[scenes.Scene]]:
        """Counterfactual pictures."""
        return causal.pictures(N_SCENES, first_seed=FIRST_PICTURE)

    @cached_property
    def states(self) -> dict[causal.Key, State]:
        """They at the splice."""
        pictures = [scene for some in self.drawn.values() for scene in some]
        source = Source.of_drawings(pictures, self.dictionaries.bench.encoder.image_size)
        held = self.dictionaries.activations(source, self.spliced.layer, "class")
        return causal.at_splice(self.drawn, torch.cat(list(held.in_order())), self.spliced)

    @cached_property
    def rises(self) -> causal.Rises:
        """What raises which class by itself, and through which latents: what the discovery is scored against."""
        return causal.rises(self.drawn, self.states, self.spliced, self.asked.texts, self.asked.words)

    @cached_property
    def rankings(self) -> dict[str, reliance.Ranking]:
        """The same candidates in the order of each of `COMPARED`."""
        latents, classes, words, on = self.probe.latents, self.asked.index, self.asked.words, self.probe.on
        return {
            method: reliance.ranked(latents, self.attributed(method), classes, self.alignment, words, on=on)
            for method in COMPARED
        }

    @property
    def best(self) -> pd.DataFrame:
        """The candidates that a person would look at, found or not: the first `LOOKED_AT`."""
        return self.discovery.table.head(LOOKED_AT)

    @cached_property
    def evidence(self) -> evidence.Evidence:
        """What is known about these."""
        probe = self.dictionaries.probe.source
        return evidence.evidence(
            self.best, words=self.asked.words, examples=self.examples, labels=self.labels.set_index("latent")["label"],
            latents=self.probe.latents, activations=self.probe.by_latent(self.probe.codes.values),
            contributions=self.values, classes=self.asked.index, embeddings=self.embeddings, read=probe.read,
            see=evidence.seeing(self.spliced), most=LOOKED_AT,
        )  # fmt: skip

    @cached_property
    def suppressed(self) -> dict[str, list[suppression.Suppressed]]:
        """What is suppressed, by name; several draws of what is random."""
        by_class = partial(suppression.by_class, words=self.asked.words)
        table, planted = self.discovery.table, self.rises.planted[["word", "family", "cue"]]
        visual = planted[planted["family"] == "cue"].rename(columns={"cue": "value"})
        looked_at, truth = by_class(self.best), self.asked.index.numpy()
        on = suppression.on_in_class(self.probe, truth, len(self.asked.words), self.spliced.sae.n_latents)
        return {
            suppression.NOTHING: [{}],
            "random": suppression.random_instead(looked_at, on, seed=self.dictionaries.bench.profile.seed),
            "found": [by_class(table[table["found"]])],
            "looked at": [looked_at],
            "true": [by_class(self.rises.removed.merge(visual))],
        }

    def repaired(self) -> dict[str, suppression.Predicted]:
        """What is predicted with each of these suppressed, on scenes with and without a cue that misleads.

        Every set, nothing among them, is given the intercepts that suit it on the audited images.
        """
        base, given = suppression.misleading(N_MISLEADING, first_seed=FIRST_MISLEADING)
        fresh = [scenes.sample(FIRST_ORDINARY + i) for i in range(N_ORDINARY)]
        pictures, words = [*base, *(each.scene for each in given), *fresh], self.asked.words
        truth = np.array([words.index(scene.word) for scene in pictures])
        state = self.state(Source.of_drawings(pictures, self.dictionaries.bench.encoder.image_size))
        predicted = {
            name: np.stack([self._predicted(state, each) for each in draws]) for name, draws in self.suppressed.items()
        }
        n, end, of = len(base), len(base) + len(given), np.array([each.base for each in given])
        before = predicted[suppression.NOTHING][0]
        misled = n + np.flatnonzero(suppression.misled(before[:n], before[n:end], given, base, words))
        parts = {
            "misled": (misled, of[misled - n]),
            "misleading": (np.arange(n, end), of),
            "without cue": (np.arange(n), None),
            "ordinary": (np.arange(end, len(truth)), None),
        }
        return {
            name: suppression.Predicted(truth[rows], {key: each[:, rows] for key, each in predicted.items()}, groups)
            for name, (rows, groups) in parts.items()
        }

    def _predicted(self, state: State, suppressed: suppression.Suppressed) -> Int[np.ndarray, " image"]:
        scores = [suppression.scores(self.spliced, each, self.asked.texts, suppressed) for each in (self.probe, state)]
        scale = self.dictionaries.bench.encoder.logit_scale
        return (scores[1] + suppression.intercepts(scores[0], self.asked.index, scale)).argmax(1).numpy()

    def _at_random(self) -> Float[Tensor, "image unit"]:
        """A number for each class and latent as its mean over the class's images, however often it is on there."""
        state, classes = self.probe, self.asked.index[:, None].expand_as(self.probe.latents)
        shape = (len(self.asked.words), self.spliced.sae.n_latents)
        rng = np.random.default_rng([self.dictionaries.bench.profile.seed, *b"random order"])
        drawn = torch.from_numpy(rng.random(shape, np.float32))
        n_on = torch.zeros(shape).index_put_((classes, state.latents), state.on.float(), accumulate=True)
        n = torch.bincount(self.asked.index, minlength=shape[0])[classes]
        return drawn[classes, state.latents] * n / n_on[classes, state.latents].clamp_min(1) * state.on

    def _reference(self, size: int) -> Probe:
        found = self.dictionaries
        if not found.drawn or found.bench.profile.sae_reference is None:
            return found.probe_at(size)
        drawn = [scenes.sample(FIRST_FREE + i, planted=False) for i in range(found.bench.profile.n_probe)]
        source = Source.of_drawings(drawn, size)
        return Probe(source, scenes.table(drawn).assign(image_id=list(source.ids)))
