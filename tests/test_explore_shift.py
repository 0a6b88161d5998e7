"""The shift explorer: a view at severity 1 is the one pass's, controls change the figures, and what fails is said."""

import html
import io
from datetime import datetime

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import percentileofscore

from clipshift_core import augment, exam, explore_shift, figures_look, profiles
from clipshift_core.canvas import LABELS, WIDTH
from clipshift_core.dictionaries import Dictionaries
from clipshift_core.explore_shift import ShiftExplorer, Viewer
from clipshift_core.profiles import Profile
from clipshift_core.workbench import Workbench


@pytest.fixture(scope="module")
def dictionaries(tmp_path_factory):
    """Five images of the demo, in a folder of their own."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles.Profile, "run_dir", property(lambda self: folder / self.name))
        yield Dictionaries(Workbench("14", Profile.load("demo", {"n_images": 5, "n_probe": 100})))


@pytest.fixture(scope="module")
def viewer(dictionaries):
    return Viewer(dictionaries)


@pytest.fixture
def explorer(dictionaries, viewer, monkeypatch):
    monkeypatch.setattr(explore_shift, "Viewer", lambda held: viewer)  # what it has loaded is kept
    return ShiftExplorer(dictionaries)


def upload(explorer, name, content):
    """What the browser sends for a chosen file."""
    file = {
        "name": name,
        "type": "",
        "size": len(content),
        "content": memoryview(content),
        "last_modified": datetime.now(),
    }
    explorer.upload.value = (file,)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def drawn(explorer):
    """What is on the figures now."""
    return [figure.to_dict() for figure in (explorer.pictures, explorer.densities, explorer.bars)]


def test_at_severity_1_the_view_is_the_one_of_the_series(viewer):
    bench = viewer.bench
    rows = bench.shifts.set_index(["image_id", "augmentation"])
    for image_id in bench.manifest.images["image_id"][:2]:
        pixels = bench.views(image_id)
        for name in augment.AUGMENTATIONS:
            look, row = viewer.look(image_id, name, 1.0), rows.loc[(image_id, name)]
            assert look.cosine == pytest.approx(row["cosine"], abs=1e-5)
            assert look.l2 == pytest.approx(row["l2"], rel=1e-5)
            np.testing.assert_array_equal(look.view.picture, pixels[augment.VIEWS.index(name)])
            kept = bench.dataset["attention_map"].sel(image=image_id, view=["original", name]).values
            np.testing.assert_allclose([look.original.attention, look.view.attention], kept, atol=1e-5)


def test_latents_are_those_of_the_tokens_that_the_pass_kept(viewer):
    bench, sae = viewer.bench, viewer.dictionaries.used.sae
    image_id = bench.manifest.images["image_id"][1]
    look = viewer.look(image_id, "noise", 1.0)
    tokens = bench.tokens["token"].sel(image=image_id, view=["original", "noise"]).isel(block=-1).values
    indices, values = sae.encode(torch.from_numpy(tokens))
    before, after = torch.zeros(2, sae.n_latents).scatter_(1, indices, values).detach().numpy()
    table = look.changed
    assert sorted(table["latent"]) == np.flatnonzero(before + after).tolist()
    np.testing.assert_allclose(table["before"], before[table["latent"]], atol=1e-3)
    np.testing.assert_allclose(table["after"], after[table["latent"]], atol=1e-3)
    assert (table["after"] - table["before"]).abs().is_monotonic_decreasing
    names = viewer.dictionaries.components.set_index("latent")["label"].fillna("no label")
    assert table["label"].tolist() == names[table["latent"]].tolist()


def test_the_change_is_that_of_the_cosine_with_the_images_own_word(viewer):
    bench = viewer.bench
    row = bench.manifest.images.iloc[2]
    look = viewer.look(row["image_id"], "blur", 1.0)
    words, phrases, templates = exam.TASKS["word"]
    text = bench.encoder.classifier(phrases, templates)[list(words).index(row["word"])]
    pair = bench.dataset["embedding"].sel(image=row["image_id"], view=["original", "blur"]).values
    original, view = (F.normalize(torch.from_numpy(pair), dim=1) @ text).tolist()
    assert look.asked == row["word"] and look.change == pytest.approx(view - original, abs=1e-5)
    # what no latent carries is the dictionary's error: the parts are of the change's own size
    assert 0 < look.changed["part"].abs().max() < 1


def test_severity_0_is_the_image_itself(viewer):
    image_id = viewer.bench.manifest.images["image_id"][0]
    for augmentation in augment.AUGMENTATIONS:
        look = viewer.look(image_id, augmentation, 0.0)
        assert look.cosine == pytest.approx(1, abs=1e-9) and look.l2 == 0 == look.change
        assert look.changed["before"].tolist() == look.changed["after"].tolist()
        assert look.changed["before"].is_monotonic_decreasing
    assert "No latent lost activation" in explore_shift.sentence(look, viewer)


def test_an_original_is_encoded_once(dictionaries, monkeypatch):
    fresh, encoder, seen = Viewer(dictionaries), dictionaries.bench.encoder, []
    own = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda pixels, **rest: seen.append(len(pixels)) or own(pixels, **rest))
    image_id = dictionaries.bench.manifest.images["image_id"][0]
    fresh.look(image_id, "blur", 1.0)
    seen.clear()
    for severity in (0.5, 0.6, 2.0):
        fresh.look(image_id, "noise", severity)
    assert seen == [1, 1, 1]


def test_the_sentence_places_the_view_among_the_runs_images(viewer):
    image_id = viewer.bench.manifest.images["image_id"][3]
    look = viewer.look(image_id, "perspective", 1.5)
    rows = viewer.bench.shifts[viewer.bench.shifts["augmentation"] == "perspective"]
    below = 100 - percentileofscore(rows["cosine"], look.cosine, kind="weak")
    said = explore_shift.sentence(look, viewer)
    assert f"further from the original than {below:.0f}% of the run's 5 images at severity 1" in said
    assert f"further than {percentileofscore(rows['l2'], look.l2, kind='strict'):.0f}%." in said
    change = look.changed["after"] - look.changed["before"]
    assert f"Latent {look.changed['latent'][change.argmin()]} (" in said


def test_every_augmentation_answers_on_the_same_figures(explorer):
    held, said = [id(figure) for figure in (explorer.pictures, explorer.densities, explorer.bars)], set()
    for name in augment.AUGMENTATIONS:
        explorer.augmentation.value = name
        assert explorer.trouble.value == "" and f"<b>{LABELS[name]} at severity 1.0</b>" in explorer.said.value
        assert augment.AUGMENTATIONS[name].dose in html.unescape(explorer.dose.value)
        said.add(explorer.said.value)
    assert len(said) == len(augment.AUGMENTATIONS)
    assert held == [id(figure) for figure in (explorer.pictures, explorer.densities, explorer.bars)]


def test_the_slider_changes_every_figure_in_place(explorer):
    before, traces = drawn(explorer), [id(trace) for trace in explorer.bars.data]
    explorer.severity.value = 0.3
    after = drawn(explorer)
    look = explorer.viewer.look(explorer.image.value, "noise", 0.3)
    sources = [[image["source"] for image in state[0]["layout"]["images"]] for state in (before, after)]
    assert [a == b for a, b in zip(*sources, strict=True)] == [True, False, True, False]
    lines = [after[1]["data"][i]["x"] for i in (1, 3)]
    np.testing.assert_allclose(lines, [[look.cosine] * 2, [look.l2] * 2], rtol=1e-5)
    rows = look.changed.head(figures_look.N_LATENTS)
    np.testing.assert_allclose(after[2]["data"][1]["x"], rows["after"], rtol=1e-5)
    assert before[2]["data"][1]["x"] != after[2]["data"][1]["x"]
    assert [
        str(latent) in text for latent, text in zip(rows["latent"], explorer.bars.layout.yaxis.ticktext, strict=True)
    ]
    assert "severity 0.3" in after[0]["layout"]["annotations"][1]["text"]
    assert traces == [id(trace) for trace in explorer.bars.data]
    explorer.severity.value = 1.0
    assert drawn(explorer) == before


def test_an_uploaded_image_of_any_size_becomes_the_chosen_one(explorer, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (181, 307, 3), np.uint8)
    answers, own = [], explorer.answer
    monkeypatch.setattr(explorer, "answer", lambda: answers.append(explorer.image.value) or own())
    upload(explorer, "mine.png", png(pixels))
    assert len(answers) == 1 and explorer.image.label == "Uploaded: mine.png" and explorer.trouble.value == ""
    look = explorer.viewer.look(explorer.image.value, "elastic", 1.0)
    resized = np.array(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(look.original.picture, resized)
    wanted = augment.view(resized, "elastic", seed=0, image_id=explorer.image.value)
    np.testing.assert_array_equal(look.view.picture, wanted)
    own_embedding = explorer.viewer.bench.encoder.encode(resized[None]).embedding[0]
    torch.testing.assert_close(look.original.embedding, own_embedding, atol=1e-5, rtol=1e-5)
    chosen, n_options = explorer.image.value, len(explorer.image.options)
    explorer.image.index = 3
    upload(explorer, "again.png", png(pixels))  # the same picture by another name
    assert explorer.image.value == chosen and len(explorer.image.options) == n_options == 6


@pytest.mark.parametrize("content", [b"<b>no picture</b>", b"", png(np.zeros((40, 40, 3), np.uint8))[:60]])
def test_an_unreadable_upload_is_said_in_words(explorer, content):
    before, chosen = drawn(explorer), explorer.image.value
    upload(explorer, "<i>x</i>.png", content)
    assert "&lt;i&gt;x&lt;/i&gt;.png cannot be read:" in explorer.trouble.value
    assert "Unreadable" not in explorer.trouble.value and "Traceback" not in explorer.trouble.value
    assert explorer.image.value == chosen and drawn(explorer) == before
    explorer.image.index = 1
    assert explorer.trouble.value == ""


def test_what_fails_is_said_and_the_figures_stay(explorer, monkeypatch):
    before, said = drawn(explorer), explorer.said.value

    def fail(look):
        raise RuntimeError("no bars <today>")

    monkeypatch.setattr(explore_shift, "bars", fail)
    explorer.severity.value = 0.5
    assert "RuntimeError: no bars &lt;today&gt;" in explorer.trouble.value
    assert drawn(explorer) == before and explorer.said.value == said


def test_controls_are_named_and_answer_when_let_go(explorer):
    named = [explorer.image, explorer.upload, explorer.augmentation, explorer.severity]
    assert all(control.description and control.tabbable is not False for control in named)
    assert (explorer.severity.min, explorer.severity.max, explorer.severity.step) == (0, 2, 0.1)
    assert not explorer.severity.continuous_update
    table = explorer.viewer.bench.manifest.images
    assert explorer.image.options[0] == (f"{table['image_id'][0]}: {table['caption'][0]}", table["image_id"][0])


def test_without_a_dictionary_it_says_why(dictionaries):
    # the dictionary that ships reads the last block, so of the one before no token is kept
    other = Dictionaries(dictionaries.bench.changed({"sae_layer": -2}))
    explorer = ShiftExplorer(other)
    assert explorer.bars is None and explorer.trouble.value == "" and "cosine" in explorer.said.value
    right = explorer.children[0].children[1]
    assert "No latents are shown: the run keeps class tokens alone" in right.children[-1].value
    assert len(explorer.static().data) == 5
    explorer.severity.value = 0.5
    assert explorer.trouble.value == "" and "severity 0.5" in explorer.said.value


def test_attention_that_cannot_be_read_is_said(viewer):
    look = viewer.look(viewer.bench.manifest.images["image_id"][0], "blur", 1.0)
    unknown = look._replace(
        **{half: getattr(look, half)._replace(attention=np.full((1, 1), np.nan)) for half in ("original", "view")}
    )
    (part,) = figures_look.pictures(unknown)
    assert [note["text"] for note in part.notes[2:]] == ["Attention cannot<br>be read"] * 2
    assert part.images[0]["source"] == part.images[2]["source"]


def test_static_is_the_default_state_whatever_is_chosen(explorer):
    first = explorer.static()
    assert first.layout.width is None and first.layout.template.layout.width == WIDTH and type(first) is go.Figure
    shown = drawn(explorer)
    assert [image.source for image in first.layout.images] == [i["source"] for i in shown[0]["layout"]["images"]]
    assert list(first.data[-1].x) == list(shown[2]["data"][1]["x"])
    explorer.augmentation.value, explorer.image.index = "blur", 2
    assert explorer.static() == first
