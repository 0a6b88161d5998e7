"""Vocabularies against what the world's captions say and what tokenizers read; labels against a loop."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from clipshift_core import concepts, scenes, vocabulary
from clipshift_core.encoder import Encoder
from clipshift_core.vocabulary import Directions, Vocabulary, VocabularyError

MODEL = Path(__file__).parents[1] / "data/models/scene-s16"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(str(MODEL), device="cpu", precision="fp32")


def _words(*phrases: str, templates: tuple[str, ...] = ("{}",)) -> Vocabulary:
    table = pd.DataFrame([(p, "kind", p) for p in phrases], columns=["word", "kind", "phrase"])
    return Vocabulary(table, templates)


def test_the_world_words_are_those_of_its_captions():
    said = set()
    for seed in range(3000):
        said |= set(scenes.caption(scenes.sample(seed)).replace(",", "").split())
    spoken, all_words = vocabulary.of_world().words, vocabulary.of_world(cues=True).words
    for phrase in spoken["phrase"]:
        assert set(phrase.split()) <= said, phrase
    kinds = spoken["kind"].value_counts().to_dict()
    assert kinds == {"thing": len(scenes.WORDS), "colour": 10, "background": 6, "relation": 4}
    cues = all_words[all_words["kind"] == "cue"]
    assert set(cues["word"]) == {cue for cue, _ in scenes.CUE_OF.values()}
    silent = {"ripples", "moon", "leaf", "confetti", "watermark", "film", "stamp", "sticker", "sign"}
    assert not silent & said and all(silent & set(p.split()) for p in cues["phrase"])
    assert len(all_words) == len(spoken) + len(cues) and not all_words["word"].duplicated().any()


def test_imagenet_and_files(tmp_path):
    names = vocabulary.imagenet().words
    assert set(names["word"]) == set(open_clip.IMAGENET_CLASSNAMES) and not names["word"].duplicated().any()
    assert names["phrase"].iloc[0] == "a tench" and "an " in names.set_index("word")["phrase"]["axolotl"]
    file = tmp_path / "birds.txt"
    file.write_text("\ufeffgreat  tit\n\n crow \ncrow\n", encoding="utf-8")
    read = vocabulary.read(file)
    assert read.words.to_dict("list") == {
        "word": ["great tit", "crow"], "kind": ["birds"] * 2, "phrase": ["great tit", "crow"]
    }  # fmt: skip
    file.write_text("\n \n")
    with pytest.raises(VocabularyError, match="birds.txt: holds no words"):
        vocabulary.read(file)
    with pytest.raises(VocabularyError, match="nowhere.txt: cannot be read"):
        vocabulary.read(tmp_path / "nowhere.txt")


def test_words_that_the_tokenizer_cannot_read_are_set_aside(encoder):
    hard = _words("duck", "zebra", "café", "crane (bird)", " ", "duck " * 40, templates=("{}", "a picture of {}"))
    kept, aside = vocabulary.readable(hard, encoder)
    assert kept.words["phrase"].tolist() == ["duck", "zebra"]  # spelt by letters, but read
    assert aside["reason"].tolist() == [
        "has letters that the tokenizer does not know",
        "has letters that the tokenizer does not know",
        "nothing of it is read",
        "with its prompt it fills all 32 tokens that are read, or more",
    ]
    with pytest.raises(VocabularyError, match="4 of 6 words cannot be read by scene-s16, the first: 'café'"):
        vocabulary.directions(hard, encoder)
    assert vocabulary.readable(vocabulary.of_world(cues=True), encoder)[1].empty


def test_a_tokenizer_of_bytes_reads_everything_but_what_is_too_long():
    reader = SimpleNamespace(tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    kept, aside = vocabulary.readable(_words("café", "狗", "very " * 90), reader)
    assert kept.words["word"].tolist() == ["café", "狗"] and "fills all 77 tokens" in aside["reason"][0]


def test_directions_are_the_mean_of_the_normalised_prompts(encoder):
    words = _words("a duck", "something red", templates=("{}", "a drawing of {}"))
    found = vocabulary.directions(words, encoder)
    for phrase, direction in [("a duck", found.texts[0]), ("something red", found.texts[1]), ("", found.empty)]:
        prompts = normalize(encoder.encode_text([phrase, f"a drawing of {phrase}"]), dim=1)
        torch.testing.assert_close(direction, normalize(prompts.mean(0), dim=0), atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.blank, [found.texts[i] @ found.empty for i in (0, 1)], atol=1e-6)


def test_labels_hand_worked():
    # mean embedding along (0.6, 0.8): cosines 0.6 and 0.8 with the axes, 0 with the third axis, the empty text
    found = Directions(torch.eye(3)[:2], torch.eye(3)[2])
    mean = torch.tensor([[0.6, 0.8, 0.0], [3.0, 0.0, 4.0], [torch.nan] * 3])
    table = vocabulary.labels(mean, found, _words("east", "north"))
    assert table["label"].tolist()[:2] == ["north", "east"] and table["second"].tolist()[:2] == ["east", "north"]
    # the second latent: cosine 3/5 with east, 4/5 with the empty text, so an alignment of -1/5
    assert table["alignment"].tolist()[:2] == pytest.approx([0.8, -0.2])
    assert table["second_alignment"].tolist()[:2] == pytest.approx([0.6, -0.8])
    assert table.iloc[2][["label", "kind", "alignment", "cosine", "second"]].isna().all()
    with pytest.raises(VocabularyError, match="1 words: two or more"):
        vocabulary.labels(mean, Directions(torch.eye(3)[:1], torch.eye(3)[2]), _words("east"))


def test_labels_against_a_loop():
    rng = torch.Generator().manual_seed(0)
    texts, mean = normalize(torch.randn(9, 6, generator=rng), dim=1), torch.randn(7, 6, generator=rng)
    words = _words(*"abcdefghi")
    for chunk in (3, 1024):
        table = vocabulary.labels(mean, Directions(texts, texts[0]), words, chunk=chunk)
        for latent, row in table.iterrows():
            cosine = [torch.cosine_similarity(mean[latent], text, dim=0).item() for text in texts]
            assert row["label"] == "abcdefghi"[int(np.argmax(cosine))]
            assert row["cosine"] == pytest.approx(max(cosine), abs=1e-6)
            assert row["alignment"] == pytest.approx(max(cosine) - cosine[0], abs=1e-6)


def test_pictures_of_a_thing_get_its_word(encoder):
    """Ten pictures that share a thing and nothing else, as a latent's examples would."""
    own, pictures = ["duck", "apple", "boat"], []
    seeds = iter(range(scenes.HELD_OUT, scenes.HELD_OUT + 10_000))
    for word in own:
        some = (scene for scene in map(scenes.sample, seeds) if scene.kind == word)
        pictures += [scenes.render(next(some), encoder.image_size) for _ in range(10)]
    embeddings = encoder.encode(np.stack(pictures)).embedding
    mean = concepts.mean_embedding(embeddings, torch.arange(30).view(3, 10))
    words = vocabulary.of_world()
    table = vocabulary.labels(mean, vocabulary.directions(words, encoder), words)
    assert table["label"].tolist() == own and table["kind"].tolist() == ["thing"] * 3
    assert table["alignment"].min() > 0.1
