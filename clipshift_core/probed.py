"""Linear probes on biased splits of the embedded world beside zero-shot text, for one audited model."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from clipshift_core import biased, causal, exam, probes, scenes
from clipshift_core.activations import Source
from clipshift_core.audit import Audit
from clipshift_core.probes import Answers, Probe, Reader
from clipshift_core.splice import State

LEDGER_STRENGTH = 0.9
"""Strength of the bias at which the ledger's claims are decided."""


@dataclass(frozen=True)
class Probed:
    """The probes of one audited model; everything is made when first asked for."""

    audit: Audit

    @cached_property
    def splits(self) -> dict[object, list[scenes.Scene]]:
        """The tests by name, and (part, strength) for what a probe is made from."""
        parts = {
            "train": (biased.N_TRAIN, biased.FIRST_TO_TRAIN),
            "valid": (biased.N_VALIDATE, biased.FIRST_TO_VALIDATE),
        }
        return biased.trials(biased.N_TEST) | {
            (part, strength): biased.draw(n, strength=strength, first_seed=first)
            for part, (n, first) in parts.items()
            for strength in biased.STRENGTHS
        }

    @cached_property
    def states(self) -> dict[object, State]:
        """Every split at the splice; a picture that several show is encoded once."""
        pictures, index = biased.distinct(self.splits)
        dictionaries, spliced = self.audit.dictionaries, self.audit.spliced
        source = Source.of_drawings(pictures, dictionaries.bench.encoder.image_size)
        held = torch.cat(list(dictionaries.activations(source, spliced.layer, "class").in_order()))
        return {name: spliced.from_activations(held[rows]) for name, rows in index.items()}

    @cached_property
    def embeddings(self) -> dict[object, Float[Tensor, "image dim"]]:
        """Theirs, of length 1."""
        with torch.no_grad():
            return {name: F.normalize(self.audit.spliced.embed(state), dim=1) for name, state in self.states.items()}

    @cached_property
    def readers(self) -> dict[float, Probe]:
        """A probe for each strength of the bias."""
        x, y = self.embeddings, {name: [scene.word for scene in split] for name, split in self.splits.items()}
        return {s: probes.fit(x["train", s], y["train", s], x["valid", s], y["valid", s]) for s in biased.STRENGTHS}

    @cached_property
    def text(self) -> Reader:
        """Zero-shot text over the same words."""
        _, _, templates = exam.TASKS["word"]
        phrases = [scenes.article(word) for word in biased.WORDS]
        encoder = self.audit.dictionaries.bench.encoder
        return probes.text(biased.WORDS, encoder.classifier(phrases, templates).numpy())

    @property
    def truth(self) -> list[str]:
        """The word of each test thing."""
        return [scene.word for scene in self.splits["aligned"]]

    @cached_property
    def answers(self) -> Answers:
        """Which of the test things each reader names rightly."""
        tests = {name: self.embeddings[name] for name in biased.SPLITS}
        return probes.answers(self.readers, self.text, tests, self.truth)

    @cached_property
    def spurious(self) -> Bool[NDArray, " latent"]:
        """The latents that some cue alone turns up."""
        return causal.cue_latents(self.audit.states, self.audit.spliced.sae.n_latents).any(0).numpy()

    def share(self, reader: Reader, split: str = "balanced") -> Float[NDArray, " image"]:
        """Of each test thing's absolute attribution, by the reader's contrast, the share on spurious latents."""
        target = reader.contrast(self.truth)
        return probes.spurious_share(self.audit.spliced, self.states[split], target, self.spurious)

    @cached_property
    def right(self) -> Bool[NDArray, " image"]:
        """Which of the audited images, of all words, zero-shot text names rightly."""
        asked = self.audit.asked
        return ((self.audit.embeddings @ asked.texts.T).argmax(1) == asked.index).numpy()

    @property
    def words(self) -> NDArray[np.str_]:
        """Their words."""
        return np.array(self.audit.asked.words)[self.audit.asked.index.numpy()]
