"""The paper profile from the first link to the last claim, with stand-ins for what needs a network.

Real: the profile, the fetcher, every notebook, the architectures of ViT-B/32 and of the labeller. Stand-ins: their
weights are random, Conceptual Captions is a list of links to a server on loopback, some of them dead, and counts are
small.
"""

import hashlib
import json
import shutil

import open_clip
import pandas as pd
import pytest
import torch
from loopback import Loopback
from rich.console import Console
from safetensors.torch import save_file

from clipshift_core import claims, ledger, profiles
from clipshift_core.reproduce import run

N_IMAGES = 100
NOTEBOOKS = sorted(path.stem for path in (profiles.ROOT / "notebooks").glob("[0-9]*.py"))
pytestmark = pytest.mark.slow


def random_weights(name: str, folder) -> None:
    """A folder as OpenCLIP loads it, of this architecture."""
    torch.manual_seed(0)
    model, folder = open_clip.create_model(name), folder / name
    folder.mkdir()
    settings = {key: model.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": settings}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    for name in ("ViT-B-32", "MobileCLIP-S2"):
        random_weights(name, folder)
    with Loopback(side=160) as server:
        links = [f"picture {i}\t{server.url(f'image/{i}.jpg')}" for i in range(N_IMAGES + 20)]
        for i in range(30):
            links.insert(3 * i, f"a dead link {i}\t{server.url(f'status/404?{i}')}")
        (folder / "words.txt").write_text("\n".join(open_clip.IMAGENET_CLASSNAMES[:40]) + "\n")
        (folder / "links.tsv").write_text("\n".join(links) + "\n")
        overrides = {
            "name": "rehearsal",
            "source": str(folder / "cc3m"),
            "fetch": str(folder / "links.tsv"),
            "fetch_allow": [server.host],
            "n_images": N_IMAGES,
            "model": str(folder / "ViT-B-32"),
            "models": ["data/models/scene-s16"],
            "labeller": str(folder / "MobileCLIP-S2"),
            "n_bootstrap": 200,
            "n_layers": 32,
            "n_dose": 2,
            "vocabulary": str(folder / "words.txt"),
            "sae_latents": 2048,
            "sae_epochs": 3,
        }
        result = run("paper", overrides, console=Console(width=120))
    yield folder, result, server
    shutil.rmtree(result.profile.run_dir)


def test_every_notebook_of_the_series_ran(rehearsal):
    _, result, _ = rehearsal
    assert sorted(result.executed) == NOTEBOOKS
    tables = result.profile.run_dir / "tables"
    assert len(pd.read_csv(tables / "02-shifts.csv")) == 9 * N_IMAGES
    recipe = pd.read_csv(tables / "07-recipes.csv").iloc[0]
    assert (recipe["width"], recipe["n_latents"], recipe["k"]) == (768, 2048, 64)


def test_the_sample_is_full_and_dead_links_are_reported(rehearsal):
    folder, result, server = rehearsal
    manifest = pd.read_csv(result.profile.run_dir / "tables" / "01-manifest.csv")
    assert len(manifest) == N_IMAGES and manifest["caption"].str.fullmatch(r"picture \d+").all()
    assert pd.read_csv(result.profile.run_dir / "tables" / "01-set-aside.csv").empty
    links = pd.read_csv(result.profile.run_dir / "tables" / "01-links.csv").set_index("outcome")["n"]
    assert links["fetched"] == N_IMAGES and 0 < links["dead"] <= 30
    asked = sum(n for path, n in server.seen.items() if path.startswith("/image/"))
    assert asked < N_IMAGES + 20 + 1  # each once, and no more than there are


def test_the_record_holds_the_hashes_of_the_weights(rehearsal):
    folder, result, _ = rehearsal
    weights = json.loads((result.profile.run_dir / "run.json").read_text())["weights"]
    for name in ("ViT-B-32", "MobileCLIP-S2"):
        with (folder / name / "open_clip_model.safetensors").open("rb") as file:
            assert weights[str(folder / name)] == hashlib.file_digest(file, "sha256").hexdigest()


def test_every_claim_has_its_row_and_those_left_out_their_reason(rehearsal):
    found = claims.read(rehearsal[1].profile.run_dir / "claims.csv").set_index("claim")
    assert set(found.index) == set(ledger.MEANINGS) | set(ledger.SAME)
    assert found.loc[["A1a", "A1b", "A2a", "A2b", "A3a", "A3b"], "n"].eq(N_IMAGES).all()
    planted = ["B2b", "B3a", "B3b", "B3c", "B4a", "B4b", "B4c"]  # only drawn pictures have what these ask for
    assert found.loc[planted, "verdict"].eq("not testable here").all()
    assert found.loc[planted, "statistic"].str.startswith("Left out: ").all()
