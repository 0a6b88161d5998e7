"""The runner: the notebook series from first to last, by papermill, in this process.

    python -m clipshift_core.reproduce --profile demo --set n_images=64 --force

Everything of a run lies in `runs/<profile name>/`:

    notebooks/NN_name.ipynb   executed; where a run failed, as far as it came
    stamps/NN_name.json       key of the inputs, seconds, the figures and tables it made
    figures/  tables/         what the notebooks wrote (the folders of the arrays are theirs, too)
    run.json                  commit, versions, seed, data and weight hashes, device, seconds

A notebook is skipped when its stamp holds the key that it would get now and all that it made is still there.
The key covers its source, the code of the notebooks before it, the core, the lock, the parameters, the
profile and the input files.
"""

import argparse
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import CellControlSignal
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from traitlets.config import Config

from . import claims, profiles, progress, provenance
from .profiles import Profile, ProfileError
from .series import KERNELSPEC, PARAMETERS, Notebook, RunError, read_series

GIVEN = {
    "images": "your folder of images (or .tar shards)",
    "captions": "a CSV with the columns file and caption",
    "classes": "a text file with one class name a line",
    "model": "a model folder, OpenCLIP's NAME/TAG or NAME@FILE, or hf-hub:owner/model",
}
"""What a user may bring, each for a key of the profile."""

TIMES = ("seconds", "finished")
"""What run.json repeats of a notebook's stamp."""

CELL_TIMEOUT = 24 * 3600
"""Seconds for one cell: far above the longest pass, so that only a hang meets it."""

UNDRAWN = (
    "There are figures without .png: no browser drew them. Where Chromium or Chrome is there now (BROWSER_PATH names "
    "one that is not found), `make reproduce ... FORCE=1` runs all again."
)

KERNEL_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # torch brings its own threads; two pools on few cores slow each other down
    "MALLOC_TRIM_THRESHOLD_": "1073741824",  # keep freed batches instead of asking the system for them again
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "NO_ALBUMENTATIONS_UPDATE": "1",  # albumentations asks the network for its newest version otherwise
}


@dataclass(frozen=True)
class Run:
    """What a finished run leaves to its caller."""

    profile: Profile
    stamps: dict[str, dict]
    """Per notebook: key, seconds, finished, products (paths relative to the run's folder)."""
    executed: list[str]
    """The notebooks that this call ran; the others were up to date."""

    @property
    def undrawn(self) -> list[str]:
        """The figures that no browser drew: a page without its picture."""
        made = {product for stamp in self.stamps.values() for product in stamp["products"]}
        pages = {name.removesuffix(".html") for name in made if name.endswith(".html")}
        return sorted(page for page in pages if f"{page}.png" not in made)


def run(
    profile: str | Path,
    overrides: dict | None = None,
    *,
    notebooks: Path | None = None,
    force: bool = False,
    console: Console | None = None,
) -> Run:
    """Run the series for a profile and return what it made.

    Parameters
    ----------
    profile, overrides : as for `Profile.load`; they are also the parameters that each notebook gets.
    notebooks : folder of the NN_name.py files; None for the repository's own.
    force : run every notebook, up to date or not.

    Raises ProfileError or RunError before any work for a choice that cannot be run, and RunError for a cell
    that fails.
    """
    began, console = time.monotonic(), console or Console()
    given = _given(profile, overrides)
    choices = Profile.load(**given)
    choices.check()
    series = read_series(notebooks or profiles.ROOT / "notebooks")
    run_dir = choices.run_dir
    for folder in ("notebooks", "stamps", "figures", "tables"):
        (run_dir / folder).mkdir(parents=True, exist_ok=True)
    for name, value in KERNEL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    stamps, executed = {}, []
    with _locked(run_dir):
        with progress.board(console, run_dir / "progress.txt") as board:
            if choices.listing:
                _fetch(choices, board)
            inputs = provenance.inputs(choices)
            keys = _keys(series, [given, choices.digest, inputs])
            for notebook, key in zip(series, keys, strict=True):
                stamp = None if force else _valid_stamp(run_dir, notebook, key)
                if stamp:
                    board.skipped(notebook.name)
                else:
                    stamp = _execute(notebook, key, given, run_dir, board)
                    executed.append(notebook.name)
                stamps[notebook.name] = stamp
        if executed or not (run_dir / "run.json").exists():
            record = provenance.record(choices) | {"parameters": given, "inputs": inputs}
            record["notebooks"] = {name: {k: stamp[k] for k in TIMES} for name, stamp in stamps.items()}
            record["seconds"] = round(time.monotonic() - began, 2)
            provenance.write_json(run_dir / "run.json", record | {"executed": executed})
    return Run(choices, stamps, executed)


def up_to_date(profile: str | Path, overrides: dict | None = None, *, notebooks: Path | None = None) -> list[str]:
    """The notebooks that `run` would skip."""
    given = _given(profile, overrides)
    choices, series = Profile.load(**given), read_series(notebooks or profiles.ROOT / "notebooks")
    keys = _keys(series, [given, choices.digest, provenance.inputs(choices)])
    return [each.name for each, key in zip(series, keys, strict=True) if _valid_stamp(choices.run_dir, each, key)]


def _given(profile: str | Path, overrides: dict | None) -> dict:
    """The parameters of every notebook."""
    is_file = str(profile).endswith((".yaml", ".yml"))  # the kernels' working directory is not ours
    return {"profile": str(Path(profile).resolve() if is_file else profile), "overrides": overrides or {}}


def _fetch(choices: Profile, board: progress.Board) -> None:
    """Fill the source of the run, or go on filling it. What is complete is left alone."""
    from . import fetch  # with all that decodes images: only where there is something to fetch

    board.start("fetch", 1)
    try:
        found = fetch.collect(
            choices.listing,
            choices.source_path,
            n_images=choices.n_images,
            seed=choices.seed,
            allow=choices.fetch_allow,
        )
    except fetch.FetchError as error:
        raise RunError(str(error)) from error
    board.done()
    board.console.print(found.summary, highlight=False, markup=False)


def _execute(notebook: Notebook, key: str, given: dict, run_dir: Path, board: progress.Board) -> dict:
    """Run one notebook and stamp it. The stamp goes first and comes last, so a killed run leaves none."""
    stamp_path = run_dir / "stamps" / f"{notebook.name}.json"
    stamp_path.unlink(missing_ok=True)
    (run_dir / "run.json").unlink(missing_ok=True)  # it speaks of the results that are now replaced
    path = run_dir / "notebooks" / f"{notebook.name}.ipynb"
    nbformat.write(notebook.node, path)
    parameters = {name: given[name] for name in PARAMETERS if given[name] != notebook.defaults[name]}
    board.start(notebook.name, len(notebook.code) + bool(parameters))  # papermill adds a cell that sets them
    before, began = _products(run_dir), time.monotonic()
    try:
        papermill.execute_notebook(
            path,
            path,
            parameters,
            kernel_name=KERNELSPEC["name"],
            cwd=notebook.path.parent,
            progress_bar=False,
            start_timeout=120,
            iopub_timeout=60,
            execution_timeout=CELL_TIMEOUT,
            store_widget_state=False,  # a FigureWidget's holds the whole of plotly.js
            on_cell_start=board.cell,
            # Shutting down interrupts the kernel, which at times logs that as an error of its own, into our report of
            # the failing cell. What goes wrong in a cell does not come this way.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),
        )
    except (PapermillExecutionError, CellControlSignal, RuntimeError) as error:
        raise RunError(_failure(error, notebook, board, path)) from error
    after = _products(run_dir)
    stamp = {
        "key": key,
        "seconds": round(time.monotonic() - began, 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "products": sorted(name for name, changed in after.items() if before.get(name) != changed),
    }
    provenance.write_json(stamp_path, stamp)
    board.done()
    return stamp


def _failure(error: Exception, notebook: Notebook, board: progress.Board, partial: Path) -> str:
    """Where it failed: the notebook, the cell, the line in the .py, the error, what there is to look at."""
    source, line = board.source, ""
    if isinstance(error, PapermillExecutionError):
        message = f"{error.ename}: {error.evalue}"
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
        frame = re.search(r"Cell In\[\d+\], line (\d+)", traceback)
        number = int(frame[1]) if frame else 1
        line = (source.splitlines() or [""])[number - 1].strip()
    else:  # a dead kernel or a timeout: all that is known is the cell
        message, number = f"{type(error).__name__}: {' '.join(str(error).split())}", 1
    cell = re.search(rf"^# %%.*\n{re.escape(source)}$", notebook.text, re.MULTILINE)
    at = f":{notebook.text.count(chr(10), 0, cell.start()) + 1 + number}" if cell else ""
    rows = [
        f"{notebook.path.name}: failed in code cell {board.index} of {board.total}",
        f"  at      {notebook.path}{at}",
        f"  line    {line}" if line else "",
        f"  error   {message}",
        f"  so far  {partial}",
    ]
    return "\n".join(row for row in rows if row)


def _keys(series: list[Notebook], fed: list) -> list[str]:
    """One key a notebook: all runs of equal key give the same results.

    The code of the earlier notebooks is in it, because what they leave in the run's folder feeds the later
    ones; their prose is not.
    """
    files = [*sorted(Path(__file__).parent.glob("*.py")), profiles.ROOT / "requirements.lock"]
    common = [fed, [(path.name, provenance.sha256(path)) for path in files if path.exists()]]
    keys, earlier = [], []
    for notebook in series:
        whole = json.dumps([common, earlier, notebook.text], sort_keys=True)
        keys.append(hashlib.sha256(whole.encode()).hexdigest())
        earlier.append(notebook.code)
    return keys


def _products(run_dir: Path) -> dict[str, int]:
    """Each figure and table of a run with the time it was written (nanoseconds)."""
    files = [path for folder in ("figures", "tables") for path in (run_dir / folder).rglob("*")]
    found = {str(path.relative_to(run_dir)): path.stat().st_mtime_ns for path in files if path.is_file()}
    ledger = run_dir / "claims.csv"
    return found | ({ledger.name: ledger.stat().st_mtime_ns} if ledger.exists() else {})


def _valid_stamp(run_dir: Path, notebook: Notebook, key: str) -> dict | None:
    """The notebook's stamp if it is up to date and all that it made is still there."""
    try:
        stamp = json.loads((run_dir / "stamps" / f"{notebook.name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # never run, or killed while it was written
        return None
    made = [f"notebooks/{notebook.name}.ipynb", *stamp["products"]]
    return stamp if stamp["key"] == key and all((run_dir / name).exists() for name in made) else None


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder. The lock falls with the process, so a killed run leaves none behind."""
    with (run_dir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{run_dir}: another run (process {file.read().strip()}) is at work there; "
                'wait for it, or give this one a folder of its own with SET="name=..."'
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def summarise(result: Run, console: Console) -> None:
    """Print what a run made, how long it took, and where it is."""
    run_dir = result.profile.run_dir
    table = Table("notebook", "seconds", "figures", "tables", box=None, title=f"run {result.profile.name}")
    for name, stamp in result.stamps.items():
        made = [Path(product).with_suffix("") for product in stamp["products"]]
        counts = [len({path for path in made if path.parts[0] == kind}) for kind in ("figures", "tables")]
        seconds = f"{stamp['seconds']:.1f}" + ("" if name in result.executed else " (before)")
        table.add_row(name, seconds, *map(str, counts))
    console.print(table)
    ledger = claims.read(run_dir / "claims.csv")
    if len(ledger):
        table = Table("claim", "statement", "value", "95 % interval", "verdict", box=None, title="claims")
        for row in ledger.itertuples():
            interval = f"{row.ci_low:.3g} to {row.ci_high:.3g}" if math.isfinite(row.ci_low) else "none"
            value = f"{row.value:.3g}" if math.isfinite(row.value) else "left out"
            table.add_row(row.claim, Text(row.statement), value, interval, row.verdict)
        console.print(table)
        if warning := claims.caveat(result.profile):
            console.print(warning, highlight=False)
    for what in ("notebooks", "figures", "tables"):
        console.print(f"{what:10}{run_dir / what}", highlight=False, soft_wrap=True)
    if result.undrawn:
        console.print(UNDRAWN, highlight=False)


def overrides_from(settings: list[str], profile: str, given: Mapping[str, str | None]) -> dict:
    """The overrides that the command line asks for.

    Parameters
    ----------
    settings : `key=value` each, the value as yaml reads it (`64`, `null`, `cpu`).
    given : as in `GIVEN`, paths from here; what is given gives the run a name, and so a folder, of its own.
    """
    overrides, given = {}, {key: value for key, value in given.items() if value}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise RunError(f"SET: {setting!r} is no key=value")
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RunError(f"SET: {setting!r}: the value is no yaml") from error
    defaults = {}
    if "images" in given:
        defaults = dict.fromkeys(("classes", "captions", "fetch"))
    if "model" in given:
        defaults |= dict.fromkeys(profiles.DICTIONARIES)  # each fits its own model alone
        if "images" in given:
            defaults["vocabulary"] = "imagenet"  # photographs, for a model that knows more than the embedded world
        overrides["model"] = _from_here(given["model"])
    for name, key in (("images", "source"), ("captions", "captions"), ("classes", "classes")):
        if name in given:
            overrides[key] = str(Path(given[name]).expanduser().resolve())
    if given:
        own = [_slug(name, value) for name, value in given.items()]
        slug = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join([Path(profile).stem, *own])).strip("-")
        defaults["name"] = slug
    return defaults | overrides


def _from_here(model: str) -> str:
    """A model's string with its path, if it has one, made absolute."""
    name, at, file = model.partition("@")
    folder = Path(model.removeprefix("local-dir:")).expanduser()
    if at and not folder.is_dir():
        return f"{name}@{Path(file).expanduser().resolve()}"
    is_path = model.startswith(("local-dir:", ".", "/", "~")) or folder.is_dir()
    return str(folder.resolve()) if is_path else model


def _slug(name: str, value: str) -> str:
    """What a run's name says of a given path or model: its last part, for a model on a hub all of it."""
    if name != "model":
        return Path(value).expanduser().resolve().name
    model = _from_here(value)
    architecture, at, file = model.rpartition("@")
    if at:
        return f"{architecture}-{Path(file).name}"
    return Path(model).name if Path(model).is_absolute() else model.removeprefix("hf-hub:")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="clipshift_core.reproduce", description="Run the notebook series.")
    parser.add_argument("--profile", default="demo", help="demo, paper, or the path of a yaml file")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the profile")
    for name, what in GIVEN.items():
        parser.add_argument(f"--{name}", help=what)
    parser.add_argument("--dry", action="store_true", help="print what would be downloaded, computed and stored")
    parser.add_argument("--force", action="store_true", help="run all, up to date or not")
    parser.add_argument("--notebooks", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        overrides = overrides_from(chosen.set, chosen.profile, {name: getattr(chosen, name) for name in GIVEN})
        if chosen.dry:
            from . import plan  # torch takes seconds to import

            done = up_to_date(chosen.profile, overrides, notebooks=chosen.notebooks)
            plan.show(plan.plan(Profile.load(chosen.profile, overrides), done=done), console)
            return 0
        options = {"notebooks": chosen.notebooks, "force": chosen.force}
        result = run(chosen.profile, overrides, console=console, **options)
    except (ProfileError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:  # of the run's own folder: a full disk, no right to write
        print(f"{error.filename or 'the folder of the run'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    summarise(result, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
