import numpy as np
import pandas as pd
import pytest
import torch

from clipshift_core import exam, scenes


class Knowing:
    """An encoder that reads a scene's factors from three pixels: what a perfect model would say, by hand."""

    image_size = 8
    axes = {name: i for i, name in enumerate([*scenes.WORDS, *scenes.COLOURS, *scenes.BACKGROUNDS])}

    def classifier(self, classes, templates):
        directions = torch.zeros(len(classes), len(self.axes))
        for row, text in enumerate(classes):
            known = {scenes.article(word): word for word in scenes.WORDS}
            known |= {colour: colour for colour in scenes.COLOURS}
            known |= {phrase: name for name, phrase in scenes.BACKGROUNDS.items()}
            directions[row, self.axes[known[text]]] = 1
        return directions


def factors(n):
    return scenes.table([scenes.sample(seed) for seed in range(n)])


def embeddings_of(table):
    found = torch.zeros(len(table), len(Knowing.axes))
    for column in exam.TASKS:
        found[range(len(table)), [Knowing.axes[value] for value in table[column]]] = 1
    return exam.unit(found)


def test_zero_shot_counts_what_is_right():
    table = factors(40)
    perfect = exam.zero_shot(Knowing(), embeddings_of(table), table).set_index("task")
    assert (perfect["accuracy"] == 1).all() and (perfect["n"] == 40).all()
    assert perfect.loc["background", "chance"] == pytest.approx(1 / 6)
    # Ten of forty images are said to stand elsewhere: accuracy 30 / 40.
    wrong = table.copy()
    wrong.loc[:9, "background"] = table.loc[:9, "background"].map(
        dict(zip(scenes.BACKGROUNDS, [*list(scenes.BACKGROUNDS)[1:], "meadow"], strict=True))
    )
    found = exam.zero_shot(Knowing(), embeddings_of(table), wrong).set_index("task").loc["background"]
    assert found["accuracy"] == 0.75 and found["low"] < 0.75 < found["high"]


def test_retrieval_within_blocks():
    class Texts:
        def encode_text(self, captions):
            return torch.eye(8)[[int(caption) for caption in captions]]

    images = torch.eye(8)[[0, 1, 3, 2, 4, 5, 6, 7]]  # images 2 and 3 are nearest to each other's caption
    captions = [str(i) for i in range(8)]
    assert exam.retrieval(Texts(), images, captions, among=4) == 6 / 8
    # In blocks of three the last two images stand in no block. Image 2's caption lies in its block, but its nearest
    # does not: all cosines there are 0, the first caption wins, wrongly. For image 3 the first one is its own. 5 of 6.
    assert exam.retrieval(Texts(), images, captions, among=3) == 5 / 6


def test_reliances_see_a_cue(monkeypatch):
    planted = scenes.PLANTED[0]
    monkeypatch.setattr(scenes, "PLANTED", (planted,))

    class Leaning:
        image_size = 48

        def encode(self, images):
            blue_below = torch.from_numpy(
                images[:, 40:, :, 2].mean(axis=(1, 2)) - images[:, 40:, :, 0].mean(axis=(1, 2))
            )
            return type(
                "Encoded",
                (),
                {"embedding": torch.stack([blue_below, torch.full_like(blue_below, 300.0)], dim=1).float()},
            )

        def classifier(self, classes, templates):
            return torch.tensor([[1.0, 0.0]])

    row = exam.reliances(Leaning(), n_pairs=12).iloc[0]
    assert row["word"] == "duck" and row["cue"] == "ripples"
    assert row["cue_closer"] == 1.0 and row["cos_cue"] > row["cos_neither"] and row["cos_both"] > row["cos_class"]


def test_columns_of_the_exam():
    assert set(exam.TASKS) <= set(factors(3).columns)
    assert isinstance(factors(3), pd.DataFrame) and np.isfinite(embeddings_of(factors(3)).numpy()).all()
