"""The component explorer: its table against plain loops and scikit-learn, and what its controls change."""

import base64
import io

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score

from clipshift_core import concepts, exam, explore_components, ground_truth, profiles, scenes
from clipshift_core.dictionaries import FIRST_TO_LOOK_AT, Dictionaries
from clipshift_core.explore_components import ComponentExplorer, Components, component_explorer, portrait
from clipshift_core.figures_attention import SHARE
from clipshift_core.profiles import Profile
from clipshift_core.splice import SpliceError
from clipshift_core.workbench import Workbench

N = 160


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    """On the demo's dictionaries and few images, in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles.Profile, "run_dir", property(lambda self: folder / self.name))
        yield component_explorer(Dictionaries(Workbench("14", Profile.load("demo", {"n_probe": N}))))


@pytest.fixture(autouse=True)
def default_state(explorer):
    yield
    explorer.text.value, explorer.sort.value, explorer.which.value = "", "alignment", "class token"


@pytest.fixture(scope="module", params=["class token", "patches"])
def components(request, explorer) -> Components:
    return explorer.components[request.param]


@pytest.fixture(scope="module")
def drawn(explorer):
    """The probe's scenes and their pixels, drawn without store or source."""
    some = [scenes.sample(FIRST_TO_LOOK_AT + i) for i in range(N)]
    return some, np.stack(
        [scenes.render(scene, explorer.found.dictionaries.bench.encoder.image_size) for scene in some]
    )


@pytest.fixture(scope="module")
def activation(components, drawn):
    """(image, latent) by the tower and the dictionary alone, without store or pooling."""
    encoder, origin = components.dictionaries.bench.encoder, components.learned.origin
    layer, token = origin.layer, origin.token
    stream = encoder.encode(drawn[1], capture=[f"residual.{layer}"]).captured[f"residual.{layer}"]
    sae = components.learned.sae
    tokens = stream[:, :1] if token == "class" else stream[:, 1:]
    with torch.no_grad():
        codes = sae.encode(tokens.flatten(0, 1))
    dense = torch.zeros(len(codes.indices), sae.n_latents).scatter_(1, codes.indices, codes.values.clamp_min(0))
    return dense.unflatten(0, tokens.shape[:2]).amax(1).numpy()


def often(components):
    """A latent that has all the examples that are shown."""
    return int(components.table["frequency"].idxmax())


def pictured(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"), float)


def test_frequency_and_examples_by_the_tower_alone(components, activation):
    np.testing.assert_allclose(components.table["frequency"], (activation > 0).mean(0), atol=2 / N)
    latent = often(components)
    best = np.argsort(-activation[:, latent], kind="stable")[:8]
    best = best[activation[best, latent] > 0]
    assert explore_components.shown(components.examples.image[latent]) == best.tolist()
    np.testing.assert_allclose(components.examples.value[latent, : len(best)], activation[best, latent], rtol=1e-3)


@pytest.mark.parametrize("text", ["", "duck", "BEACH ", "colour red", "e"])
@pytest.mark.parametrize("sort", ["alignment", "clarity", "frequency"])
def test_search_and_order_row_by_row(components, text, sort):
    found = components.search(text, sort)
    wanted = []
    for row in components.table.to_dict("records"):
        words = [word.lower() for word in (row["label"], row["factor"]) if isinstance(word, str)]
        if not text or any(text.strip().lower() in word for word in words):
            wanted.append((-row[sort] if row[sort] == row[sort] else np.inf, row["latent"]))
    assert [latent for _, latent in sorted(wanted)] == found["latent"].tolist()
    assert text == "" or 0 < len(found) < len(components.table)


def test_a_pattern_is_taken_as_it_is_written_and_another_order_is_refused(components):
    assert components.search("duck|beach").empty and components.search(".*").empty
    with pytest.raises(ValueError, match="'label': alignment, clarity, frequency are accepted"):
        components.search("", "label")


def test_best_factors_by_scikit_learn(components, activation):
    presence, table = ground_truth.factors(components.dictionaries.probe.images), components.table
    first = ground_truth.halves(N, seed=components.dictionaries.bench.profile.seed)
    presence = ground_truth.scored(presence, first)
    for latent in table[table["factor"].notna()]["latent"].sample(4, random_state=0):
        a = components.units[:, [latent]].toarray()[:, 0]
        np.testing.assert_allclose(a, activation[:, latent], atol=1e-3 * activation[:, latent].max())
        chosen = {column: roc_auc_score(presence[column][first], a[first]) for column in presence}
        best = max(chosen, key=chosen.get)
        assert table.at[latent, "factor"] == " ".join(best)
        assert table.at[latent, "auroc"] == pytest.approx(roc_auc_score(presence[best][~first], a[~first]), abs=1e-9)
    rare = (components.units[first] > 0).sum(axis=0) < 5
    np.testing.assert_array_equal(table["factor"].isna(), rare)
    np.testing.assert_array_equal(table["auroc"].isna(), rare)


def test_what_a_latent_drives_by_a_loop_over_one_class(components, drawn):
    """a_j dy/da_j of each image of the class by autograd through the open tower, its codes as the only leaves."""
    some, pixels = drawn
    word = pd.Series([scene.word for scene in some]).mode()[0]
    dictionaries = components.dictionaries
    encoder, spliced = dictionaries.bench.encoder, dictionaries.spliced(components.learned)
    words, phrases, templates = exam.TASKS["word"]
    text = encoder.classifier(phrases, templates)[list(words).index(word)]
    total, n = torch.zeros(components.learned.sae.n_latents), 0
    for scene, picture in zip(some, pixels, strict=True):
        if scene.word != word:
            continue
        state = spliced.read(picture[None])
        values = state.codes.values.detach().requires_grad_()
        F.cosine_similarity(spliced.embed(state, values), text[None]).sum().backward()
        total.index_add_(0, state.codes.indices.flatten(), (values * values.grad).detach().flatten())
        n += 1
    assert n >= 5
    np.testing.assert_allclose(components.driven[word], total / n, atol=2e-6)
    assert total.abs().max() / n > 1e-3
    highest = components.driven.loc[components.first].sort_values(ascending=False).head(3)
    assert components.table.at[components.first, "drives"] == tuple(highest[highest > 0].index)


def test_the_portrait_shows_the_examples_and_the_classes(components, drawn):
    latent = often(components)
    figure, images = portrait(components, latent), explore_components.shown(components.examples.image[latent])
    spatial = components.learned.origin.token == "spatial"
    assert len(figure.layout.images) == len(images) * (1 + spatial) and len(images) == 8
    for i, tile in zip(images, figure.layout.images[:8], strict=True):
        apart = [np.abs(pictured(tile.source) - each).mean() for each in drawn[1]]
        assert int(np.argmin(apart)) == i
    signed = components.driven.loc[latent]
    top = signed[signed.abs().nlargest(6).index].sort_values()
    np.testing.assert_allclose(figure.data[1].x, top, rtol=1e-5)
    assert list(figure.layout.yaxis2.ticktext) == list(top.index)


def test_maps_are_bright_where_the_latent_is_on(explorer):
    """The brightest patch of the map over the first example holds the latent's largest activation."""
    components = explorer.components["patches"]
    latent, (rows, columns) = often(components), components.dictionaries.bench.encoder.grid
    image = int(components.examples.image[latent, 0])
    tokens = torch.from_numpy(components.held.dataset()["activation"].values[image])
    codes = components.learned.sae.encode(tokens)
    on = torch.where(codes.indices == latent, codes.values, 0).sum(1).detach().numpy().reshape(rows, columns)
    grey = pictured(components.picture(image)) @ np.array([0.299, 0.587, 0.114])
    glow = pictured(components.mapped(latent)[0]).mean(2) - (1 - SHARE) * grey
    size = len(glow) // rows
    glow = glow[: size * rows, : size * columns].reshape(rows, size, columns, size).mean((1, 3))
    assert glow.argmax() == on.argmax() and np.corrcoef(glow.ravel(), on.ravel())[0, 1] > 0.9


def test_a_search_changes_the_list_and_the_figure(explorer):
    before, listed = [tile.source for tile in explorer.figure.layout.images], explorer.listed.options
    assert len(listed) == 1024 and explorer.listed.value == explorer.found.first
    explorer.text.value = "beach"
    latent = explorer.listed.value
    assert 0 < len(explorer.listed.options) < 100
    assert [value for _, value in explorer.listed.options] == explorer.found.search("beach")["latent"].tolist()
    row = explorer.found.table.loc[latent]
    assert explorer.listed.label == f"latent {latent}: {row['label']} (clarity {row['clarity']:.2f})"
    assert [tile.source for tile in explorer.figure.layout.images] != before
    assert explorer.figure.layout.title.text == f"Latent {latent}: {row['label']}"
    assert f"Latent {latent}: " in explorer.said.value and f"AUROC of {row['auroc']:.2f}" in explorer.said.value
    explorer.listed.index = 1
    assert f"Latent {explorer.listed.value}: " in explorer.said.value and explorer.listed.value != latent
    explorer.sort.value = "frequency"
    assert explorer.listed.value == explorer.found.search("beach", "frequency")["latent"].iloc[0]
    assert explorer.trouble.value == ""


def test_the_other_dictionary_shows_maps_in_place(explorer):
    explorer.sort.value = "frequency"
    assert len(explorer.figure.layout.images) == 8
    explorer.which.value = "patches"
    wanted = portrait(explorer.components["patches"], often(explorer.components["patches"]))
    assert explorer.trouble.value == "" and len(explorer.figure.layout.images) == 16
    assert explorer.figure.layout.images == wanted.layout.images
    assert explorer.figure.layout.height == wanted.layout.height
    np.testing.assert_array_equal(explorer.figure.data[1].x, wanted.data[1].x)
    explorer.which.value = "class token"
    assert len(explorer.figure.layout.images) == 8


def test_a_latent_that_is_never_on(explorer):
    table = explorer.found.table
    latent = int(table[table["frequency"] == 0]["latent"].iloc[0])
    explorer.listed.value = latent
    assert explorer.listed.label == f"latent {latent}: never on" and explorer.trouble.value == ""
    assert "it is never on" in explorer.said.value and not explorer.figure.layout.images
    assert not len(explorer.figure.data[0].x) and not len(explorer.figure.data[1].x)


def test_no_match_is_said_and_the_figure_stays(explorer):
    explorer.text.value = "duck"
    before = explorer.figure.to_dict()
    explorer.text.value = "<b>zz"
    assert "No latent of the class token has <i>&lt;b&gt;zz</i> in its label or best factor" in explorer.said.value
    assert explorer.listed.options == () and explorer.trouble.value == ""
    assert explorer.figure.to_dict() == before
    explorer.text.value = "duck"
    assert "Latent" in explorer.said.value and explorer.listed.options


def test_what_goes_wrong_is_said_and_forgotten(explorer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Components, "search", lambda self, text, sort: 1 / 0)
        explorer.text.value = "duck"
        assert "ZeroDivisionError: division by zero" in explorer.trouble.value
    explorer.text.value = "beach"
    assert explorer.trouble.value == "" and "beach" in explorer.said.value


def test_every_control_is_described_and_fits(explorer):
    left, right = explorer.children[0].children
    assert [each.description for each in left.children] == ["Search", "Sort by", "Tokens", "Latents"]
    assert not explorer.text.continuous_update and explorer.listed.rows == 12
    assert right.children == (explorer.figure,) and 300 + explorer.figure.layout.width <= 900


def test_the_default_state_stands_as_a_figure(explorer):
    explorer.text.value = "duck"
    figure, found = explorer.static(), explorer.components["class token"]
    assert figure.layout.width == 960 and figure.layout.title.text.startswith(f"Latent {found.first}: ")
    assert [tile.source for tile in figure.layout.images] == [
        tile.source for tile in portrait(found, found.first).layout.images
    ]
    assert figure.layout.xaxis.domain[1] < figure.layout.xaxis2.domain[0]


def test_one_dictionary_without_known_factors(explorer, monkeypatch):
    """As photographs have it: no table of factors, and classes by the model's own words."""
    bench = explorer.found.dictionaries.bench.changed({"sae_patches": None})
    dictionaries = Dictionaries(bench)
    dictionaries.probe, dictionaries.label_embeddings  # noqa: B018  made while its scenes are known
    monkeypatch.setattr(Dictionaries, "drawn", False)
    alone = component_explorer(dictionaries)
    assert isinstance(alone, ComponentExplorer) and alone.trouble.value == ""
    assert [each.description for each in alone.children[0].children[0].children] == ["Search", "Sort by", "Latents"]
    assert "factor" not in alone.found.table and "AUROC" not in alone.said.value
    words = set(dictionaries.vocabulary[0].words["word"])
    assert len(alone.found.driven.columns) and set(alone.found.driven.columns) <= words
    alone.text.value = "zzz"
    assert "in its label; the figure" in alone.said.value


def test_without_a_dictionary_it_says_so(explorer, monkeypatch):
    dictionaries = Dictionaries(explorer.found.dictionaries.bench.changed({"sae": None}))
    monkeypatch.setattr(Dictionaries, "left_out", "12 images are too few")
    said = component_explorer(dictionaries)
    assert isinstance(said, ipywidgets.HTML) and "12 images are too few" in said.value


def test_examples_are_those_of_the_run(explorer):
    own = explorer.found.dictionaries.examples
    torch.testing.assert_close(explorer.components["class token"].examples.image, own.image)
    assert isinstance(own, concepts.Examples)


def test_where_no_latent_can_drive_a_class(explorer, monkeypatch):
    def refused(self, learned):
        raise SpliceError("the tower does not read these tokens")

    monkeypatch.setattr(Dictionaries, "spliced", refused)
    found = Components(explorer.found.dictionaries, explorer.found.learned)
    assert found.undriven == "the tower does not read these tokens" and found.driven.shape == (1024, 0)
    assert set(found.table["drives"]) == {()}
    figure = portrait(found, found.first)
    assert not len(figure.data[1].x) and "What it drives is unknown" in figure.layout.annotations[0].text
    monkeypatch.setitem(explorer.components, "class token", found)
    explorer.text.value = "duck"
    assert "unknown: the tower does not read these tokens" in explorer.said.value and not explorer.trouble.value
