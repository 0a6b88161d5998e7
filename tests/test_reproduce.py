"""The runner, on tiny series of its own: with real kernels where they matter, with a stand-in where they do not."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from rich.console import Console

from clipshift_core import claims, profiles, progress, provenance, publish, reproduce
from clipshift_core.profiles import ProfileError
from clipshift_core.reproduce import overrides_from, run
from clipshift_core.series import RunError

HEAD = '# %% tags=["parameters"]\nprofile = "small"\noverrides = {}\n\n# %%\n'
FIRST = HEAD + "from pathlib import Path\nprint(profile, overrides, Path.cwd().name)\n"
SECOND = HEAD + (
    "from pathlib import Path\n"
    'run_dir = Path("..", "runs", overrides.get("name", profile))\n'
    'for name in ("figures/01-a.png", "figures/01-a.json", "tables/01-a.csv"):\n'
    '    (run_dir / name).write_text("made")\n'
)
QUIET = Console(quiet=True)


def repository(folder, monkeypatch):
    """A repository with a profile `small`, two notebooks, a core and a lock; the runner takes it for its own."""
    monkeypatch.setattr(profiles, "ROOT", folder)
    monkeypatch.setattr(reproduce, "__file__", str(folder / "core" / "reproduce.py"))
    for name in ("notebooks/profiles", "core", "photos", "models/tiny"):
        (folder / name).mkdir(parents=True)
    (folder / "notebooks/profiles/small.yaml").write_text("source: photos\nmodel: models/tiny\n")
    (folder / "notebooks/00_first.py").write_text(FIRST)
    (folder / "notebooks/01_second.py").write_text(SECOND)
    for name in ("core/a.py", "requirements.lock", "photos/a.png", "models/tiny/open_clip_model.safetensors"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    return repository(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A repository and its run with real kernels, only to be looked at."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = repository(tmp_path_factory.mktemp("finished"), monkeypatch)
        yield folder, run("small", {"n_images": 7}, console=QUIET)


@pytest.fixture
def stand_in(root, monkeypatch):
    """No kernel: a notebook counts as run when the file is there, and 01 makes a table."""

    def execute(source, target, *_, **__):
        if Path(target).stem == "01_second":
            (Path(target).parents[1] / "tables" / "01-a.csv").write_text(str(time.monotonic_ns()))

    monkeypatch.setattr(reproduce.papermill, "execute_notebook", execute)
    return root


def executed(**options):
    return run("small", options.pop("overrides", {}), console=QUIET, **options).executed


def test_a_run_leaves_notebooks_products_and_its_record(finished):
    folder, result = finished
    run_dir = folder / "runs" / "small"
    assert result.executed == ["00_first", "01_second"]
    first = nbformat.read(run_dir / "notebooks" / "00_first.ipynb", as_version=4)
    assert first.cells[-1].outputs[0].text == "small {'n_images': 7} notebooks\n"
    products = ["figures/01-a.json", "figures/01-a.png", "tables/01-a.csv"]
    assert [stamp["products"] for stamp in result.stamps.values()] == [[], products]
    record = json.loads((run_dir / "run.json").read_text())
    assert record["parameters"] == {"profile": "small", "overrides": {"n_images": 7}}
    assert record["profile"]["n_images"] == 7 and record["digest"] == result.profile.digest
    assert set(record["notebooks"]) == {"00_first", "01_second"} and record["notebooks"]["00_first"]["seconds"] > 0
    assert record["weights"] == {} and record["inputs"]["images"]["files"] == 1  # no notebook loaded a model
    assert record["seeds"] == {"profile": 0} and record["versions"]["torch"] and record["device"]
    assert record["commit"] is None and record["dirty"] is None  # no clone
    assert not (run_dir / "progress.txt").exists()


def test_what_is_up_to_date_is_skipped(stand_in):
    assert executed() == ["00_first", "01_second"]
    assert executed() == []
    assert executed(force=True) == ["00_first", "01_second"]
    assert executed() == []


def change(name, by="\n# more\n"):
    return lambda root: (root / name).write_text((root / name).read_text() + by)


@pytest.mark.parametrize(
    "what, alter, expected",
    [
        ("prose of the first", change("notebooks/00_first.py", "\n# %% [markdown]\n# Hello\n"), ["00_first"]),
        ("code of the first", change("notebooks/00_first.py"), ["00_first", "01_second"]),
        ("code of the second", change("notebooks/01_second.py"), ["01_second"]),
        ("the core", change("core/a.py"), ["00_first", "01_second"]),
        ("the lock", change("requirements.lock"), ["00_first", "01_second"]),
        ("an image", change("photos/a.png"), ["00_first", "01_second"]),
        ("the weights", change("models/tiny/open_clip_model.safetensors"), ["00_first", "01_second"]),
        ("the profile", change("notebooks/profiles/small.yaml"), []),  # a comment
        ("a table is gone", lambda root: (root / "runs/small/tables/01-a.csv").unlink(), ["01_second"]),
        ("a notebook is gone", lambda root: (root / "runs/small/notebooks/00_first.ipynb").unlink(), ["00_first"]),
        ("a stamp is torn", lambda root: (root / "runs/small/stamps/00_first.json").write_text("{"), ["00_first"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_changed_is_run_again(stand_in, what, alter, expected):
    executed()
    alter(stand_in)
    assert executed() == expected
    assert executed() == []


def test_other_parameters_run_again(stand_in):
    executed()
    assert executed(overrides={"seed": 1}) == ["00_first", "01_second"]


def test_large_inputs_go_by_size_and_time(root, monkeypatch):
    monkeypatch.setattr(provenance, "HASH_LIMIT", 3)
    before = provenance.digest(root / "photos")
    assert before["of"] == "names, sizes and times" and provenance.digest(root / "photos") == before
    os.utime(root / "photos" / "a.png", ns=(1, 1))
    assert provenance.digest(root / "photos")["sha256"] != before["sha256"]


def test_a_failing_cell_is_named_with_its_line(root, capfd):
    source = HEAD + "def f(x):\n    return 1 / x\n\n# %%\na = 1\nb = f(a - 1)  # here\n"
    path = root / "notebooks" / "01_second.py"
    path.write_text(source)
    (root / "notebooks" / "00_first.py").unlink()
    assert reproduce.main(["--profile", "small"]) == 1
    said = capfd.readouterr().err.splitlines()
    number = source.splitlines().index("b = f(a - 1)  # here") + 1
    assert said == [
        "01_second.py: failed in code cell 3 of 3",
        f"  at      {path}:{number}",
        "  line    b = f(a - 1)  # here",
        "  error   ZeroDivisionError: division by zero",
        f"  so far  {root / 'runs/small/notebooks/01_second.ipynb'}",
    ]
    assert not (root / "runs/small/run.json").exists()


def test_a_killed_run_holds_the_folder_while_it_lives_and_goes_on_after(root):
    started = root / "started"
    waits = HEAD + (
        f"import time; from pathlib import Path; started = Path({str(started)!r})\n"
        "if not started.exists():\n    started.touch()\n    time.sleep(120)\n"
    )
    (root / "notebooks" / "01_second.py").write_text(waits)
    driver = (
        "import sys; from pathlib import Path; from clipshift_core import profiles, reproduce\n"
        f"profiles.ROOT = Path({str(root)!r}); reproduce.__file__ = {str(root / 'core' / 'reproduce.py')!r}\n"
        'sys.exit(reproduce.main(["--profile", "small"]))\n'
    )
    with subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not started.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert started.exists()
        with pytest.raises(RunError, match=rf"another run \(process {process.pid}\)"):
            executed()
        process.send_signal(signal.SIGKILL)
    assert executed() == ["01_second"]
    assert executed() == []


@pytest.mark.parametrize(
    "cell, said",
    [
        ('# %%\nprofile = "small"\n', "has 0 cells tagged 'parameters'"),
        ('# %% tags=["parameters"]\nprofile = "small"\noverrides = dict()\n', "only assign literals"),
        ('# %% tags=["parameters"]\nprofile = "small"\noverrides = {}\nimport os\n', "only assign literals"),
        ('# %% tags=["parameters"]\nprofile = "small"\noverrides = {"seed": n}\n', "only assign literals"),
        ('# %% tags=["parameters"]\nprofile = "small"\n', "its parameters are \\['profile'\\]"),
        (HEAD.replace("overrides = {}", "overrides: dict = {}\nextra = 1"), "'extra', 'overrides', 'profile'"),
    ],
)
def test_an_unsound_parameters_cell_is_refused_before_any_work(root, cell, said):
    (root / "notebooks" / "01_second.py").write_text(cell)
    with pytest.raises(RunError, match=said):
        executed()
    assert not (root / "runs").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--set", "n_image=3"], "unknown key 'n_image'; did you mean 'n_images'?"),
        (["--set", "n_images"], "SET: 'n_images' is no key=value"),
        (["--set", "n_images=[1"], "the value is no yaml"),
        (["--images", "nowhere"], "nowhere: does not exist"),
        (["--model", "./nowhere"], "nowhere: no such folder"),
        (["--notebooks", "nowhere"], "no notebook NN_name.py there"),
    ],
)
def test_a_choice_that_cannot_be_run_is_one_line_and_no_work(root, capfd, arguments, said):
    assert reproduce.main(["--profile", "small", *arguments]) == 1
    answer = capfd.readouterr()
    assert said in answer.err and answer.err.count("\n") == 1 and not answer.out
    assert not (root / "runs").exists()


def test_a_profile_file_reaches_the_kernels_as_an_absolute_path(stand_in, monkeypatch):
    (stand_in / "mine.yaml").write_text("source: photos\nmodel: models/tiny\n")
    monkeypatch.chdir(stand_in)
    run("mine.yaml", console=QUIET)
    record = json.loads((stand_in / "runs" / "mine" / "run.json").read_text())
    assert record["parameters"]["profile"] == str(stand_in / "mine.yaml")


def test_what_a_user_brings_makes_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("My photos", "vit"):
        (tmp_path / name).mkdir()
    assert overrides_from(["n_images=4", "classes=null"], "demo", {}) == {"n_images": 4, "classes": None}
    no_lists, no_dictionaries = dict.fromkeys(("classes", "captions", "fetch")), dict.fromkeys(profiles.DICTIONARIES)
    both = overrides_from(["seed=2"], "demo", {"images": "My photos", "model": "vit"})
    assert both == no_lists | no_dictionaries | {
        "name": "demo-My-photos-vit", "seed": 2, "source": str(tmp_path / "My photos"), "model": str(tmp_path / "vit"),
        "vocabulary": "imagenet",
    }  # fmt: skip
    lists = overrides_from([], "demo", {"images": "My photos", "captions": "c.csv", "classes": "animals.txt"})
    assert lists == {
        "name": "demo-My-photos-c.csv-animals.txt", "source": str(tmp_path / "My photos"), "fetch": None,
        "captions": str(tmp_path / "c.csv"), "classes": str(tmp_path / "animals.txt"),
    }  # fmt: skip
    named = overrides_from([], "paper", {"model": "ViT-B-16/openai"})
    assert named == {"name": "paper-ViT-B-16-openai", "model": "ViT-B-16/openai"} | no_dictionaries
    assert overrides_from(["sae=mine"], "paper", {"model": "vit"})["sae"] == "mine"  # SET wins
    strings = {
        "hf-hub:a/b": ("hf-hub:a/b", "demo-a-b"),
        "local-dir:vit": (str(tmp_path / "vit"), "demo-vit"),
        "./none": (str(tmp_path / "none"), "demo-none"),
        "ViT-B-16@epoch 3.pt": (f"ViT-B-16@{tmp_path / 'epoch 3.pt'}", "demo-ViT-B-16-epoch-3.pt"),
    }
    for string, (model, name) in strings.items():
        found = overrides_from([], "demo", {"model": string})
        assert (found["model"], found["name"]) == (model, name)
    assert overrides_from([], "demo", {"images": "", "model": ""}) == {}


def test_a_kernel_can_note_its_progress(tmp_path):
    path = tmp_path / "progress.txt"
    progress.note("nobody listens")
    with progress.board(QUIET, path):
        progress.note("images 1 of 2")
        assert path.read_text() == "images 1 of 2"
    assert not path.exists() and progress.NOTE_VARIABLE not in os.environ


def test_the_summary_shows_counts_and_claims(stand_in):
    result = run("small", console=QUIET)
    (stand_in / "notebooks" / "profiles" / "paper.yaml").write_text("source: s\nmodel: m\n")
    row = claims.Claim("A1", "moves [x] most", "mean", 1.25, 1.0, 1.5, 7, "reproduced", "02")
    claims.record(result.profile.run_dir / "claims.csv", [row])
    console = Console(width=110, record=True, file=io.StringIO())
    reproduce.summarise(result, console)
    text = console.export_text()
    assert "A1     moves [x] most  1.25   1 to 1.5       reproduced" in text
    assert str(result.profile.run_dir / "figures") in text
    row = next(line.split() for line in text.splitlines() if "01_second" in line)
    assert row[2:] == ["0", "1"]


@pytest.mark.parametrize("drawn", [True, False])
def test_the_summary_says_that_no_browser_drew_the_figures(stand_in, drawn):
    result = run("small", console=QUIET)
    made = ["figures/01-a.html", "figures/01-a.json", *["figures/01-a.png"] * drawn]
    console = Console(width=110, record=True, file=io.StringIO())
    reproduce.summarise(replace(result, stamps={"01_second": {"seconds": 1.0, "products": made}}), console)
    assert ("There are figures without .png: no browser drew them." in console.export_text()) == (not drawn)


def test_publishing_renews_figures_and_notebooks(finished, tmp_path):
    folder, result = finished
    for name in ("01-old.png", "README.md"):
        (tmp_path / name).touch()
    publish.publish_figures(result, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01-a.json", "01-a.png", "README.md"]
    publish.publish_notebooks(result, tmp_path)
    node = nbformat.read(tmp_path / "00_first.ipynb", as_version=4)
    nbformat.validate(node)
    assert [cell.execution_count for cell in node.cells] == [1, 2, 3] and "papermill" not in node.metadata


def test_unknown_profile_is_refused(root):
    with pytest.raises(ProfileError, match="accepted: small"):
        run("smal", console=QUIET)
