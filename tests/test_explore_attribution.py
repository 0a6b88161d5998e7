"""The attribution explorer: its numbers against the encoder and the tower's parts, its controls used one by one."""

import re
from types import SimpleNamespace

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from clipshift_core import attribution, exam, explore_attribution, profiles, prompted, scenes
from clipshift_core.dictionaries import FIRST_TO_LOOK_AT, Dictionaries
from clipshift_core.explore_attribution import CHOICES, AttributionExplorer, attribution_explorer, bars, change
from clipshift_core.profiles import Profile
from clipshift_core.prompted import PromptError, Questions
from clipshift_core.workbench import Workbench


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The demo's dictionary, looked at with 24 scenes, in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles.Profile, "run_dir", property(lambda self: folder / self.name))
        yield Questions(Dictionaries(Workbench("14", Profile.load("demo", {"n_probe": 24}))))


@pytest.fixture
def explorer(opened):
    return AttributionExplorer(opened)


def scene(index):
    return scenes.sample(FIRST_TO_LOOK_AT + index)


def token(questions, index):
    """The class token after the last block, captured anew."""
    encoder = questions.dictionaries.bench.encoder
    point = f"token.{encoder.n_blocks - 1}"
    return encoder.encode(scenes.render(scene(index), encoder.image_size)[None], capture=[point]).captured[point]


def headless(questions, index, latents):
    """The direction of an image without some latents: a_j d_j taken from its class token, then ln_post and proj."""
    visual, sae = questions.dictionaries.bench.encoder.model.visual, questions.dictionaries.used.sae
    x = token(questions, index)
    activation = sae.encode_eager(x).dense(sae.n_latents)[0].detach()
    with torch.no_grad():
        left = x - sum(activation[j] * sae.W_dec[j] for j in latents)
        return F.normalize(visual.ln_post(left) @ visual.proj, dim=1)[0]


def by_hand(encoder, phrase):
    """A phrase through the templates: the mean of its prompts' directions, of length 1."""
    each = F.normalize(encoder.encode_text([template.format(phrase) for template in scenes.KIND_TEMPLATES]), dim=1)
    return F.normalize(each.mean(0), dim=0)


@pytest.mark.parametrize("index", [0, 17])
def test_the_cosine_is_the_encoders_own(opened, index):
    encoder = opened.dictionaries.bench.encoder
    prompt = "a drawing of a pink key"
    image = F.normalize(encoder.encode(scenes.render(scene(index), encoder.image_size)[None]).embedding, dim=1)[0]
    text = F.normalize(encoder.encode_text([prompt]), dim=1)[0]
    assert opened.taken(index, prompt, "act_x_grad").cosine == pytest.approx(float(image @ text), abs=1e-5)
    own = scene(index).word
    assert opened.own(index) == own
    asked = opened.taken(index, own, "act_x_grad")
    assert asked.cosine == pytest.approx(float(image @ by_hand(encoder, scenes.article(own))), abs=1e-5)
    words, phrases, _ = exam.TASKS["word"]
    assert asked.word == max(zip(words, phrases, strict=True), key=lambda pair: image @ by_hand(encoder, pair[1]))[0]


def test_what_is_deleted_is_deleted_together_by_the_forward_pass(opened):
    taken = opened.taken(0, "star", "integrated_gradients")
    text = by_hand(opened.dictionaries.bench.encoder, "a star")
    first = taken.largest(10)["latent"].tolist()
    words, phrases, _ = exam.TASKS["word"]
    for latents in (first[:1], first[1:4], first):
        image = headless(opened, 0, latents)
        assert taken.without(latents) == pytest.approx(float(image @ text), abs=1e-5)
        cosines = [float(image @ by_hand(opened.dictionaries.bench.encoder, phrase)) for phrase in phrases]
        assert taken.word_without(latents) == words[int(np.argmax(cosines))]
    assert taken.without([]) == pytest.approx(taken.cosine, abs=1e-6)
    off = next(j for j in range(1024) if j not in set(taken.table["latent"]))
    assert taken.without([off]) == pytest.approx(taken.cosine, abs=1e-6)
    # all ten at once: not what they would take one by one
    alone = sum(float(headless(opened, 0, [j]) @ text) - taken.cosine for j in first)
    assert taken.added_up(first) == pytest.approx(alone, abs=1e-5)
    assert abs(taken.without(first) - taken.cosine - alone) > 0.01


@pytest.mark.parametrize("method", CHOICES)
def test_the_table_is_the_methods_own(opened, method):
    spliced, encoder = opened.spliced, opened.dictionaries.bench.encoder
    state = spliced.read(scenes.render(scene(3), encoder.image_size)[None])
    target = attribution.cosine(encoder.encode_text(["something green"])[0])
    table = opened.taken(3, "something green", method).table
    values = attribution.METHODS[method](spliced, state, target)
    wanted = dict(zip(values.latents[0].tolist(), values.values[0].tolist(), strict=True))
    assert table["value"].is_monotonic_decreasing and len(table) == 16  # k of the dictionary
    assert dict(zip(table["latent"], table["value"], strict=True)) == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    taken = opened.taken(3, "something green", method)
    for row in table.iloc[::5].itertuples():
        assert row.exact == pytest.approx(taken.cosine - taken.without([row.latent]), abs=1e-5)
    described = opened.dictionaries.components.set_index("latent")["label"]
    assert [described[row.latent] == row.label for row in table.itertuples()] == [True] * 16


def test_the_ten_largest_are_those_of_either_sign(opened):
    taken = opened.taken(0, "star", "integrated_gradients")
    shown = taken.largest(10)
    assert shown["value"].is_monotonic_decreasing and shown["value"].min() < 0 < shown["value"].max()
    others = taken.table[~taken.table["latent"].isin(shown["latent"])]
    assert len(others) == 6 and others["value"].abs().max() <= shown["value"].abs().min()


def test_texts_and_images_are_encoded_once(opened, monkeypatch):
    opened.taken(1, "a blue house", "energy")
    encoder = opened.dictionaries.bench.encoder
    for name in ("encode", "encode_text", "classifier"):
        monkeypatch.setattr(encoder, name, lambda *args, **kwargs: pytest.fail("encoded again"))
    assert opened.taken(1, "  a blue  house ", "logit_lens").cosine == opened.taken(1, "a blue house", "energy").cosine


@pytest.mark.parametrize(("prompt", "why"), [
    ("  ", "empty"), ("день", "letters that the tokenizer does not know"), ("star " * 40, "fills all 32 tokens"),
])  # fmt: skip
def test_a_prompt_that_cannot_be_read_is_said_in_words(opened, explorer, prompt, why):
    with pytest.raises(PromptError, match=why):
        opened.direction(prompt)
    before = explorer.bars.data[0].x
    explorer.prompt.value = prompt
    assert why in explorer.said.value and explorer.trouble.value == ""
    assert explorer.bars.data[0].x == before
    explorer.prompt.value = "star"
    assert "read as <b>star</b>" in explorer.said.value


def test_the_pictures_of_a_tower_with_a_tail_are_read_by_it(opened):
    place = {"sae": "data/models/sae-scene-s16-patches", "sae_layer": 3, "sae_token": "spatial", "n_probe": 20}
    patches = Questions(Dictionaries(opened.dictionaries.bench.changed(place)))
    taken = patches.taken(0, "star", "act_x_grad")
    assert taken.cosine == pytest.approx(opened.taken(0, "star", "act_x_grad").cosine, abs=1e-5)
    gone = taken.table["latent"].tolist()
    state, spliced = patches.state(0), patches.spliced
    with torch.no_grad():  # without any code the bias and the error are left
        rest = (spliced.sae.b_dec + state.error).unflatten(0, (1, -1))
        image = F.normalize(spliced.through(state.stream, rest), dim=1)[0]
    assert len(gone) > 16
    assert taken.without(gone) == pytest.approx(float(image @ taken.direction), abs=1e-5)


def test_a_tick_changes_the_figures_and_the_sentence(explorer):
    taken = explorer.taken
    first, second = explorer.taken.largest(10)["latent"].tolist()[:2]
    assert explorer.ticks[0].description == f"delete latent {first} ({taken.table['label'][0]})"
    own = explorer.bars.data[0].marker.color
    assert explorer.change.data[0].x[1] == explorer.change.data[0].x[0] == pytest.approx(taken.cosine, rel=1e-5)
    explorer.ticks[0].value = True
    after = taken.without([first])
    assert explorer.change.data[0].x[1] == pytest.approx(after, rel=1e-5)
    assert f"it is <b>{after:.3f}</b>" in explorer.said.value
    assert f"after the deletion as <b>{taken.word_without([first])}</b>" in explorer.said.value
    colours = explorer.bars.data[0].marker.color
    assert colours[0] != own[0] and colours[1:] == own[1:]
    assert "deleted: " in explorer.bars.layout.yaxis.ticktext[0]
    explorer.ticks[1].value = True
    added = float(taken.table["exact"][:2].sum())
    assert f"adds up to −{added:.3f}" in explorer.said.value and explorer.deleted == [first, second]
    assert explorer.change.data[1].x[2] == pytest.approx(taken.cosine - added, rel=1e-5)
    explorer.none.click()
    assert explorer.deleted == [] and explorer.bars.data[0].marker.color == own
    assert explorer.change.data[0].x[1] == pytest.approx(taken.cosine, rel=1e-5)


def answers(explorer, monkeypatch):
    """How often the explorer answered, counted from now on."""
    counted, answer = [], explorer.answer
    monkeypatch.setattr(explorer, "answer", lambda: counted.append(1) or answer())
    return counted


@pytest.mark.parametrize(
    ("control", "value"), [("image", 5), ("prompt", "something black"), ("method", "energy"), ("none", None)]
)
def test_another_question_clears_the_ticks_in_one_answer(explorer, monkeypatch, control, value):
    for tick in explorer.ticks[:4]:
        tick.value = True
    assert len(explorer.deleted) == 4
    picture, counted = explorer.picture.layout.images[0].source, answers(explorer, monkeypatch)
    if control == "none":
        explorer.none.click()
    else:
        getattr(explorer, control).value = value
    assert len(counted) == 1 and explorer.deleted == [] and not any(tick.value for tick in explorer.ticks)
    assert "without" not in explorer.said.value and explorer.trouble.value == ""
    assert (explorer.picture.layout.images[0].source != picture) == (control == "image")


def test_the_prompt_follows_the_image_until_one_is_typed(explorer):
    assert explorer.prompt.value == scene(0).word
    explorer.image.value = 5
    assert explorer.prompt.value == scene(5).word
    explorer.prompt.value = "something blue"
    explorer.image.value = 2
    assert explorer.prompt.value == "something blue" and "something blue" in explorer.said.value


def test_fewer_components_have_fewer_boxes(explorer, monkeypatch):
    monkeypatch.setattr(prompted.Taken, "largest", lambda taken, n: taken.table[:3])
    explorer.image.value = 4
    assert [tick.layout.display for tick in explorer.ticks] == [None] * 3 + ["none"] * 7
    assert len(explorer.bars.data[0].x) == 3 and explorer.trouble.value == ""
    monkeypatch.undo()
    explorer.image.value = 1
    assert {tick.layout.display for tick in explorer.ticks} == {None}


def test_what_goes_wrong_is_said(explorer, monkeypatch):
    def fails(*asked):
        raise RuntimeError("the <disk> is gone")

    before = explorer.bars.data[0].x
    with monkeypatch.context() as patch:
        patch.setattr(Questions, "taken", fails)
        explorer.image.value = 7
    assert "RuntimeError: the &lt;disk&gt; is gone" in explorer.trouble.value
    assert explorer.bars.data[0].x == before
    explorer.image.value = 8
    assert explorer.trouble.value == "" and explorer.bars.data[0].x != before


def test_every_control_says_what_it_is_and_offers_what_there_is(explorer, opened):
    assert [name for name, _ in explorer.image.options] == [f"{i}: {scenes.caption(scene(i))}" for i in range(24)]
    assert [name for _, name in explorer.method.options] == list(CHOICES) and len(CHOICES) == 5
    controls = [explorer.image, explorer.prompt, explorer.method, *explorer.ticks, explorer.none]
    assert all(control.description for control in controls)
    widths = [explorer.picture.layout.width + explorer.change.layout.width, explorer.bars.layout.width]
    assert widths == [explore_attribution.RIGHT] * 2


def test_without_a_dictionary_it_says_why():
    none = SimpleNamespace(left_out="12 < 100 images", bench=SimpleNamespace(profile=SimpleNamespace(sae=None)))
    said = attribution_explorer(none)
    assert isinstance(said, ipywidgets.HTML) and "12 &lt; 100 images" in said.value
    assert prompted.N_IMAGES == 100


def test_the_static_figure_shows_the_default_state(explorer, opened):
    figure = explorer.static()
    taken = opened.taken(0, scene(0).word, "integrated_gradients")
    assert figure.layout.template.layout.width == 960 and scene(0).word in figure.layout.title.text
    np.testing.assert_allclose(figure.data[0].x, taken.largest(10)["value"], rtol=1e-5)
    np.testing.assert_allclose(figure.data[1].x, taken.largest(10)["exact"], rtol=1e-5)
    np.testing.assert_allclose(figure.data[2].x, [taken.cosine] * 2, rtol=1e-5)
    assert len(figure.layout.images) == 1


def test_bars_and_stars_share_their_zero():
    rows = pd.DataFrame({"latent": [3, 9], "label": ["duck", "a < b"], "value": [20.0, 5.0], "exact": [0.1, -0.05]})
    (bar, star), layout = bars(rows, [9], "energy")
    # scale 20 / 0.1 = 200; in units of the cosine the ends are -0.05 and 0.1, with 0.06 x 0.15 = 0.009 around them
    assert layout["xaxis2"]["range"] == pytest.approx([-0.059, 0.109])
    assert layout["xaxis"]["range"] == pytest.approx([-11.8, 21.8])
    assert layout["xaxis2"]["visible"] and bar["x"] == [20, 5] and star["x"] == [0.1, -0.05]
    assert re.sub("<.*?>", "", layout["yaxis"]["ticktext"][1]) == "deleted: a &lt; b, latent 9"
    (_, _), layout = bars(rows.assign(value=[0.2, -0.1]), [], "act_x_grad")
    assert layout["xaxis"]["range"] == layout["xaxis2"]["range"] and not layout["xaxis2"]["visible"]


def test_the_change_is_drawn_with_its_words():
    (bar, star), layout = change(0.5, -0.1, 0.2, "duck", "boat")
    assert bar["x"] == [0.5, -0.1] and star["x"] == [0.5, 0, 0.2]
    assert [text.replace("\u00a0", "") for text in star["text"]] == ["0.500<br>duck", "−0.100<br>boat", "0.200"]
    low, high = layout["xaxis"]["range"]
    assert low < -0.1 and high > 0.5
