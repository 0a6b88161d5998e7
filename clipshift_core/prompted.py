"""An image of a run and a prompt that somebody typed, taken apart, and what is left when components are deleted."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from clipshift_core import attribution, scenes, vocabulary
from clipshift_core.attributed import EXACT
from clipshift_core.attribution import METHODS
from clipshift_core.dictionaries import Asked, Dictionaries
from clipshift_core.splice import Splice, State

N_IMAGES = 100
"""Images of the probe that can be chosen."""


class PromptError(ValueError):
    """A prompt that the model cannot read, and why."""


@dataclass(frozen=True, eq=False)
class Taken:
    """What one image and one prompt give; made by `Questions.taken`."""

    table: pd.DataFrame
    """A row a latent that is on, the largest value first: latent, label, value (by the method, in its units), exact
    (what deleting it alone takes from the cosine)."""
    cosine: float
    """Of image and prompt, nothing deleted."""
    word: str
    """The word that the image is read as, nothing deleted."""
    direction: Float[Tensor, " dim"] = field(repr=False)
    """The prompt's, of length 1."""
    words: Asked = field(repr=False)
    """Among which words an image is read."""
    spliced: Splice = field(repr=False)
    state: State = field(repr=False)

    def largest(self, n: int) -> pd.DataFrame:
        """The rows of the n largest values, whichever their sign, in the order of the table."""
        return self.table.loc[sorted(self.table["value"].abs().nlargest(n).index)]

    def without(self, latents: Iterable[int]) -> float:
        """The cosine with these latents deleted, all together, by the forward pass from the splice on."""
        return float(self._embedding(latents) @ self.direction)

    def word_without(self, latents: Iterable[int]) -> str:
        """The word that the image is then read as."""
        return closest(self.words, self._embedding(latents))

    def added_up(self, latents: Iterable[int]) -> float:
        """The change of the cosine that exact ablation of each of them alone adds up to."""
        return -float(self.table.loc[self.table["latent"].isin(list(latents)), "exact"].sum())

    def _embedding(self, latents: Iterable[int]) -> Float[Tensor, " dim"]:
        gone = torch.isin(self.state.latents, torch.tensor(list(latents), dtype=torch.long).to(self.state.latents))
        return embedding(self.spliced, self.state, self.state.scaled((~gone).float()))


@dataclass(frozen=True)
class Questions:
    """What is asked of the first images of a run's probe; image states and texts are encoded once."""

    dictionaries: Dictionaries
    _states: dict[int, State] = field(default_factory=dict, repr=False)
    _texts: dict[str, Float[Tensor, " dim"]] = field(default_factory=dict, repr=False)

    @property
    def images(self) -> pd.DataFrame:
        """Those that can be chosen."""
        return self.dictionaries.probe.images.iloc[:N_IMAGES]

    @property
    def names(self) -> list[str]:
        """What each is called: for a drawn scene what a person might write under it."""
        if not self.dictionaries.drawn:
            titles = self.dictionaries.bench.titles[self.images["image_id"]]
            return [f"{i}: {title}" for i, title in enumerate(titles)]
        return [f"{i}: {scenes.caption(scenes.sample(int(seed)))}" for i, seed in enumerate(self.images["seed"])]

    @cached_property
    def spliced(self) -> Splice:
        return self.dictionaries.spliced(self.dictionaries.used)

    @cached_property
    def words(self) -> Asked:
        """The words that an image may be read as, each through its templates."""
        return self.dictionaries.asked(self.images.iloc[:1], embedding(self.spliced, self.state(0))[None])

    @cached_property
    def labels(self) -> pd.Series:
        """The label of each latent that has one."""
        return self.dictionaries.components.set_index("latent")["label"].dropna()

    def state(self, index: int) -> State:
        """An image at the splice: from stored activations where those are all that is read, else by the tower."""
        if index not in self._states:
            if self.spliced.tail.needs_class_alone:
                self._states[index] = self.spliced.from_activations(self._activations[index : index + 1])
            else:
                self._states[index] = self.spliced.read(self.dictionaries.probe.source.read(index)[None])
        return self._states[index]

    def own(self, index: int) -> str:
        """What is asked of an image at first: a drawn scene's own word, else the one that the model reads in it."""
        if self.dictionaries.drawn:
            return str(self.images["word"].iloc[index])
        return closest(self.words, embedding(self.spliced, self.state(index)))

    def direction(self, prompt: str) -> Float[Tensor, " dim"]:
        """A prompt's direction, of length 1: of one of `words` the mean over its templates, of all else as it stands.

        Raises PromptError for an empty prompt and for one that the tokenizer does not read whole.
        """
        prompt = " ".join(prompt.split())
        if prompt not in self._texts:
            self._texts[prompt] = self._encoded(prompt)
        return self._texts[prompt]

    def taken(self, index: int, prompt: str, method: str) -> Taken:
        """One image and one prompt, taken apart by one of `attribution.METHODS` and by exact ablation."""
        direction, state = self.direction(prompt), self.state(index)
        target = attribution.cosine(direction)
        values, exact = (METHODS[name](self.spliced, state, target).values[0].cpu() for name in (method, EXACT))
        table = pd.DataFrame(
            {"latent": state.latents[0].cpu().numpy(), "value": values.numpy(), "exact": exact.numpy()}
        )
        table = table[state.on[0].cpu().numpy()].sort_values("value", ascending=False, ignore_index=True, kind="stable")
        table.insert(1, "label", table["latent"].map(self.labels).fillna("no label"))
        found = embedding(self.spliced, state)
        word = closest(self.words, found)
        return Taken(table, float(found @ direction), word, direction, self.words, self.spliced, state)

    def picture(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """An image as the model sees it."""
        return self.dictionaries.probe.source.read(index)

    @cached_property
    def _activations(self) -> Float[np.ndarray, "image width"]:
        return self.dictionaries.unseen.dataset()["activation"][:N_IMAGES].values

    def _encoded(self, prompt: str) -> Float[Tensor, " dim"]:
        if not prompt:
            raise PromptError("The prompt is empty: type a word or a sentence.")
        if prompt in self.words.words:
            return self.words.texts[self.words.words.index(prompt)]
        typed = pd.DataFrame({"word": [prompt], "kind": ["prompt"], "phrase": [prompt]})
        encoder = self.dictionaries.bench.encoder
        _, aside = vocabulary.readable(vocabulary.Vocabulary(typed, ("{}",)), encoder)
        if len(aside):
            raise PromptError(f"{encoder.name} cannot read “{prompt}”: {aside['reason'].iloc[0]}.")
        return F.normalize(encoder.encode_text([prompt])[0], dim=0)


@torch.no_grad()
def embedding(spliced: Splice, state: State, values: Tensor | None = None) -> Float[Tensor, " dim"]:
    """The embedding of a single image from the splice on, of length 1, on the CPU."""
    return F.normalize(spliced.embed(state, values)[0].float().cpu(), dim=0)


def closest(words: Asked, found: Float[Tensor, " dim"]) -> str:
    """The word whose text is closest."""
    return words.words[int((words.texts @ found).argmax())]
