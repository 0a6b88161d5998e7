"""Words for latents: vocabularies, what a CLIP's tokenizer can read of them, and the best word of each latent.

The labelling CLIP may differ from the probed one: a latent's examples are images, and any CLIP embeds those.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clipshift_core import scenes
from clipshift_core.encoder import Encoder

PHOTO_TEMPLATES = ("{}", "a photo of {}")


class VocabularyError(ValueError):
    """Words that cannot be used: what they are, and what would be accepted."""


@dataclass(frozen=True)
class Vocabulary:
    """The words that a latent may be labelled with."""

    words: pd.DataFrame
    """One row a word: word (the label), kind (what sort of word), phrase (what the text tower reads)."""
    templates: tuple[str, ...]
    """Prompts, each with {} for the phrase."""


def of_world(*, cues: bool = False) -> Vocabulary:
    """The words of the embedded world: things, colours, backgrounds and relations, as its captions say them.

    The planted cues are in no caption, so that an embedded model has never read "ripples" and spells it letter by
    letter: what it makes of such a word means nothing. With `cues` they are offered all the same, for a CLIP that
    has read more than this world.
    """
    rows = [
        *((word, "thing", scenes.article(word)) for word in scenes.WORDS),
        *((colour, "colour", f"something {colour}") for colour in scenes.COLOURS),
        *((name, "background", f"something {phrase}") for name, phrase in scenes.BACKGROUNDS.items()),
        *((name, "relation", f"something {phrase[0]} something") for name, phrase in scenes.RELATIONS.items()),
    ]
    for cue in dict.fromkeys(cue for cue, _ in scenes.CUE_OF.values()) if cues else ():
        read = f"a sign that says {cue[5:].lower()}" if cue.startswith("sign:") else cue
        rows.append((cue, "cue", read))
    return Vocabulary(_table(rows), scenes.KIND_TEMPLATES)


def imagenet() -> Vocabulary:
    """OpenCLIP's names of the ImageNet classes, each once (two pairs share theirs).

    The paper takes the 21,000 of the whole of ImageNet, which OpenCLIP does not hold: give them as a file to `read`.
    """
    names = dict.fromkeys(open_clip.IMAGENET_CLASSNAMES)
    return Vocabulary(_table([(name, "imagenet", scenes.article(name)) for name in names]), PHOTO_TEMPLATES)


def read(path: Path, *, templates: tuple[str, ...] = PHOTO_TEMPLATES) -> Vocabulary:
    """A text file with one word or phrase a line; blank lines and repetitions are passed over."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VocabularyError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    words = dict.fromkeys(" ".join(line.split()) for line in lines)
    words.pop("", None)
    if not words:
        raise VocabularyError(f"{path}: holds no words; one a line is accepted")
    return Vocabulary(_table([(word, path.stem, word) for word in words]), templates)


def readable(vocabulary: Vocabulary, encoder: Encoder) -> tuple[Vocabulary, pd.DataFrame]:
    """The words that the tokenizer reads whole, and those it does not: columns word, phrase, reason.

    A tokenizer says nothing when it puts a mark for unknown letters, drops what it does not know, or cuts off what is
    too long; each would be labelled by something other than the word.
    """
    words, templates = vocabulary.words, vocabulary.templates
    unknown = getattr(getattr(encoder.tokenizer, "tokenizer", None), "unk_token_id", None)
    empty = encoder.tokenizer([template.format("") for template in templates])
    filled = [template.format(phrase) for phrase in words["phrase"] for template in templates]
    tokens = encoder.tokenizer(filled).view(len(words), *empty.shape)
    # some tokenizers mark the unknown by the token that also ends every text: that one tells nothing
    marked = (tokens == unknown).any((1, 2)) if unknown is not None and unknown not in empty else [False] * len(words)
    lost = (tokens == empty).all((1, 2))
    full = (tokens[:, :, -1] != empty[:, -1]).any(1)
    reasons = pd.Series("", index=words.index)
    reasons[full.tolist()] = f"with its prompt it fills all {empty.shape[1]} tokens that are read, or more"
    reasons[lost.tolist()] = "nothing of it is read"
    reasons[list(map(bool, marked))] = "has letters that the tokenizer does not know"
    good = reasons == ""
    aside = words.loc[~good, ["word", "phrase"]].assign(reason=reasons[~good]).reset_index(drop=True)
    return replace(vocabulary, words=words[good].reset_index(drop=True)), aside


class Directions(NamedTuple):
    """A vocabulary in the embedding space of one CLIP, each of length 1."""

    texts: Float[Tensor, "word dim"]
    """The mean of a word's normalised prompts, normalised, as OpenCLIP makes zero-shot classes."""
    empty: Float[Tensor, " dim"]
    """The same of the prompts with nothing in them."""

    @property
    def blank(self) -> Float[Tensor, " word"]:
        """Cosine of each word with the empty text: near 1 for a word in which this CLIP reads next to nothing."""
        return self.texts @ self.empty


def directions(vocabulary: Vocabulary, encoder: Encoder) -> Directions:
    """Encode a vocabulary. Raises VocabularyError for words that the tokenizer cannot read: see `readable`."""
    aside = readable(vocabulary, encoder)[1]
    if len(aside):
        first = aside.iloc[0]
        raise VocabularyError(
            f"{len(aside)} of {len(vocabulary.words)} words cannot be read by {encoder.name}, the first: "
            f"{first['word']!r} {first['reason']}; `readable` sets them aside"
        )
    found = encoder.classifier([*vocabulary.words["phrase"], ""], vocabulary.templates)
    return Directions(found[:-1], found[-1])


def labels(
    mean: Float[Tensor, "latent dim"], found: Directions, vocabulary: Vocabulary, *, chunk: int = 1024
) -> pd.DataFrame:
    """The best word of each latent by the mean embedding of its examples (`concepts.mean_embedding`, same CLIP).

    Columns: latent, label, kind, alignment, cosine, cosine_empty, second, second_alignment; a latent without
    examples has neither label nor numbers.

    alignment = cosine of the mean with the word - cosine of the mean with the empty text. What is subtracted is the
    same for all words: it decides where zero is, never which word is best. An embedded model was not trained on empty
    texts, so that there zero is a convention, and alignments are compared among latents of one model only.
    """
    if len(found.texts) < 2:
        raise VocabularyError(f"{len(found.texts)} words: two or more are needed to tell which is best")
    unit = F.normalize(mean.float(), dim=1)
    parts = [(part @ found.texts.T).topk(2, dim=1) for part in unit.split(chunk)]
    cosine, word = torch.cat([p.values for p in parts]).double(), torch.cat([p.indices for p in parts])
    empty = (unit @ found.empty).double()
    known = empty.isfinite().numpy()
    chosen = vocabulary.words.iloc[word[:, 0].numpy()].reset_index(drop=True)
    table = pd.DataFrame(
        {
            "latent": range(len(mean)),
            "label": chosen["word"],
            "kind": chosen["kind"],
            "alignment": (cosine[:, 0] - empty).numpy(),
            "cosine": cosine[:, 0].numpy(),
            "cosine_empty": empty.numpy(),
            "second": vocabulary.words["word"].iloc[word[:, -1].numpy()].to_numpy(),
            "second_alignment": (cosine[:, -1] - empty).numpy(),
        }
    )
    table.loc[~known, ["label", "kind", "second"]] = None
    return table


def _table(rows: list[tuple[str, str, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["word", "kind", "phrase"])
