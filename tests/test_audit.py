"""One model audited: its images, decoys, alignments and repairs against the encoder itself and plain loops."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from clipshift_core import attribution, audit, causal, exam, profiles, reliance, scenes
from clipshift_core.audit import Audit
from clipshift_core.dictionaries import Dictionaries
from clipshift_core.profiles import Profile
from clipshift_core.workbench import Workbench


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The demo's audit on 160 images, few counterfactual scenes, in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles.Profile, "run_dir", property(lambda self: folder / self.name))
        patch.setattr(audit, "N_SCENES", 4)
        patch.setattr(audit, "N_MISLEADING", 8)
        patch.setattr(audit, "N_ORDINARY", 12)
        patch.setattr(audit, "N_DECOYS", 3)
        chosen = Profile.load("demo", {"n_probe": 160, "n_bootstrap": 100})
        yield Audit(Dictionaries(Workbench("11", chosen)))


def looked_at(found, drawn):
    """Embeddings of length 1 by the encoder alone, without store, splice or dictionary."""
    encoder = found.dictionaries.bench.encoder
    return exam.embed(encoder, np.stack([scenes.render(scene, encoder.image_size) for scene in drawn]))


def test_the_audited_images_are_the_models_own(opened):
    drawn = [scenes.sample(int(seed)) for seed in opened.dictionaries.probe.source.ids[:20]]
    torch.testing.assert_close(opened.embeddings[:20], looked_at(opened, drawn), atol=2e-6, rtol=0)
    assert [opened.asked.words[c] for c in opened.asked.index[:20]] == [scene.word for scene in drawn]


def test_the_reference_shows_cues_without_their_classes(opened):
    images, cue = opened.reference.images, "ripples"
    shows = images["cues"].str.contains(cue)
    assert len(images) == 160 and 0 < shows.sum() < 30
    probe = opened.dictionaries.probe.images
    ducks = probe[probe["word"] == "duck"]["cues"].str.contains(cue)
    assert ducks.mean() > 0.6 > 2 * shows[images["word"] != "duck"].mean()
    seeds = set(images["seed"])
    assert min(seeds) >= scenes.HELD_OUT and not seeds & set(probe["seed"])


def test_alignment_by_a_loop_over_latents(opened):
    encoder, state = opened.dictionaries.bench.encoder, opened.reference_state
    drawn = [scenes.sample(audit.FIRST_FREE + i, planted=False) for i in range(160)]
    embeddings = looked_at(opened, drawn)
    _, phrases, templates = exam.TASKS["word"]
    texts, empty = encoder.classifier(phrases, templates), encoder.classifier([""], templates)[0]
    active = torch.zeros(160, 1024).scatter_(1, state.latents, state.codes.values)
    checked = 0
    for latent in range(0, 1024, 37):
        order = [i for i in active[:, latent].argsort(descending=True, stable=True).tolist() if active[i, latent] > 0]
        if not order:
            assert opened.alignment[:, latent].isnan().all()
            continue
        mean = F.normalize(embeddings[order[:20]].mean(0), dim=0)
        torch.testing.assert_close(opened.alignment[:, latent], texts @ mean - empty @ mean, atol=1e-5, rtol=0)
        checked += 1
    assert checked > 10


def test_decoys_are_one_other_text_a_class_and_none_that_the_latent_means(opened):
    state, own = opened.probe, opened.asked.index
    meant = reliance.relative(opened.alignment) >= reliance.LOW
    by_text = [
        attribution.act_x_grad(opened.spliced, state, attribution.cosine(text)).values for text in opened.asked.texts
    ]
    draws = list(opened.decoys())
    assert len(draws) == 3
    others = []
    for draw in draws:
        for c in own.unique().tolist():
            here = own == c
            matches = []
            for other in range(len(opened.asked.words)):
                wanted = by_text[other][here].masked_fill(meant[other][state.latents[here]], 0)
                matches.append(torch.allclose(draw[here], wanted, atol=1e-6))
            assert sum(matches) == 1 and not matches[c]
            others.append(matches.index(True))
    assert len(set(others)) > 10
    assert not torch.equal(draws[0], draws[1])


def test_a_random_order_knows_nothing_of_how_often_a_latent_is_on(opened):
    ranking = opened.rankings["random"]
    candidates = ranking.candidates.assign(mean=ranking.means)
    drawn = np.random.default_rng([0, *b"random order"]).random((29, 1024), np.float32)
    number = {word: c for c, word in enumerate(opened.asked.words)}
    wanted = [drawn[number[row.word], row.latent] for row in candidates.itertuples()]
    np.testing.assert_allclose(candidates["mean"], wanted, rtol=1e-5)
    frequency = opened.rankings["frequency"]
    np.testing.assert_allclose(frequency.means, candidates["n_on"] / candidates["n"])


def test_the_best_candidates_come_with_evidence_and_ranks(opened):
    assert opened.discovery.table["attribution"].is_monotonic_decreasing
    row, values = opened.best.iloc[0], opened.values
    here = opened.asked.index == opened.asked.words.index(row["word"])
    on = (opened.probe.latents == row["latent"])[here]
    assert row["attribution"] == pytest.approx(float((values[here] * on).sum() / here.sum()), abs=1e-6)
    assert set(opened.rankings) == set(audit.COMPARED)
    own = opened.labels.set_index("latent").loc[row["latent"], "label"]
    assert own in set(opened.dictionaries.vocabulary[0].words["word"])


def test_what_is_suppressed_is_what_was_found_and_what_is_true(opened):
    sets = opened.suppressed
    words, table = opened.asked.words, opened.discovery.table
    found = {(words[c], latent) for c, latents in sets["found"][0].items() for latent in latents}
    assert found == set(zip(table[table["found"]]["word"], table[table["found"]]["latent"], strict=True))
    of_cues = opened.rises.removed[opened.rises.removed["family"] == "cue"]
    true = {(words[c], latent) for c, latents in sets["true"][0].items() for latent in latents}
    assert true <= set(zip(of_cues["word"], of_cues["latent"], strict=True))
    owners = {word for word, _ in scenes.CUE_OF.items()}
    assert {word for word, _ in true} <= owners
    assert [sum(map(len, draw.values())) for draw in sets["random"]] == [len(opened.best)] * 5


def test_repairs_count_scenes_that_a_cue_misleads(opened):
    outcomes = opened.repaired()
    assert {name: len(each.truth) for name, each in outcomes.items() if name != "misled"} == {
        "misleading": len(outcomes["misleading"].of), "without cue": 8, "ordinary": 12,
    }  # fmt: skip
    nothing = outcomes["misled"].by_set["nothing"][0]
    assert (nothing != outcomes["misled"].truth).all()
    drawn = [scenes.sample(audit.FIRST_ORDINARY + i) for i in range(12)]
    cosines = looked_at(opened, drawn) @ opened.asked.texts.T
    plain = cosines.argmax(1).numpy()
    with_intercepts = outcomes["ordinary"].by_set["nothing"][0]
    assert (plain == with_intercepts).mean() > 0.8  # intercepts decide a few close calls alone
    assert (outcomes["ordinary"].truth == [opened.asked.words.index(scene.word) for scene in drawn]).all()


def test_the_pictures_show_what_they_are_said_to(opened):
    ripples = opened.drawn["cue", "ripples"]
    bare = [replace(scene, cues=()) for scene in ripples]
    assert bare == opened.drawn[causal.BASE] and {scene.cues for scene in ripples} == {("ripples",)}
    embedded = F.normalize(opened.spliced.embed(opened.states["cue", "ripples"]), dim=1).detach()
    torch.testing.assert_close(embedded, looked_at(opened, ripples), atol=2e-6, rtol=0)


def test_other_models_and_too_few_images(opened):
    (other,) = Audit.others(opened.dictionaries.bench)
    assert other.name == "scene-xs12" and other.learned.origin.model == "scene-xs12"
    few = Audit(Dictionaries(opened.dictionaries.bench.changed({"n_probe": 60})))
    assert opened.left_out == "" and few.left_out == "too few images to audit (60, of at least 100)"
    elsewhere = {"sae_reference": None, "sae": None, "sae_layer": -2}
    assert "after block 3" in Audit(Dictionaries(opened.dictionaries.bench.changed(elsewhere))).left_out


def test_without_a_reference_the_probe_says_what_latents_stand_for(opened):
    plain = Audit(Dictionaries(opened.dictionaries.bench.changed({"sae_reference": None})))
    assert plain.reference.source.ids == plain.dictionaries.probe.source.ids
    assert plain.learned.origin == plain.dictionaries.used.origin
    assert isinstance(plain.discovery.table, pd.DataFrame)
