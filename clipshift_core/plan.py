"""The dry run: what a profile would download, compute and store, how long it would take, before any of it is done.

Sizes are arithmetic: the layouts of the stores, the parameters of the models. Times are counts of forward passes and
training steps times seconds that are measured here within a minute or so, or scaled from such by FLOPs; what could not
be measured is an assumption, and says so. Nothing is written, and no network is asked.
"""

import math
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from clipshift_core import costs
from clipshift_core.costs import Model, Speed, Weights
from clipshift_core.encoder import EncoderError
from clipshift_core.profiles import Profile
from clipshift_core.stages import Held, Stage, Work, look

TIMING = 30.0
"""Seconds after which no further model is timed."""
SPREAD = 1.5
"""A run may take this much longer: machines have other work."""


LEGEND = (
    "Times are counts times seconds measured just now: measured, with the model's own weights; random weights, with "
    "its configuration alone; by FLOPs, scaled from the nearest model that was measured; assumed, from another machine."
)


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    profile: Profile
    device: str
    downloads: pd.DataFrame
    """Columns what, state (as of `costs.Weights`), bytes (NaN: unknown), note."""
    computed: pd.DataFrame
    """The columns of `Stage`, in the order of the notebooks; seconds of what remains to be done."""
    stored: pd.DataFrame
    """The columns of `Held`; bytes of what remains to be written."""
    memory: pd.DataFrame
    """Columns stage, bytes (the largest at any time, roughly), there."""
    disk_free: int
    busy: float
    """Processes that want a core, for each core there is, over the last minute."""
    warnings: tuple[str, ...]

    @property
    def download_bytes(self) -> float:
        return float(self.downloads["bytes"][self.downloads["state"] == "to fetch"].sum())

    @property
    def store_bytes(self) -> float:
        return float(self.stored["bytes"][self.stored["how"] != "for a time"].sum())

    @property
    def seconds(self) -> float:
        return float(self.computed["seconds"].sum())


def plan(profile: Profile, *, done: Collection[str] = ()) -> Plan:
    """Measure for a short time, and count.

    done: names of the notebooks that are up to date, such as "02_embedding_shifts".

    Raises nothing for what is not there: a source, weights or a configuration that is missing is a row that says so.
    """
    images = look(profile)
    names = list(dict.fromkeys([profile.model, *profile.models, *filter(None, [profile.labeller])]))
    weights = {name: costs.find(name) for name in names}
    models = {name: _model(found) for name, found in weights.items()}
    speeds = _speeds(profile, weights, models)
    drawing = costs.drawing(profile.image_size)
    work = Work(profile, images, models, speeds, drawing, {name[:2] for name in done})
    stages, held = work.rows()
    downloads = [images.download, *(_download(name, weights[name], models[name]) for name in names)]
    memory = pd.DataFrame(work.memory(), columns=["stage", "bytes", "there"])
    free = shutil.disk_usage(next(folder for folder in profile.run_dir.parents if folder.exists())).free
    found = Plan(
        profile,
        torch.cuda.get_device_name() if work.on_gpu else f"{os.cpu_count()} CPU cores",
        pd.DataFrame(downloads, columns=["what", "state", "bytes", "note"]),
        pd.DataFrame(stages, columns=Stage._fields),
        pd.DataFrame(held, columns=Held._fields),
        memory,
        free,
        costs.busy(),
        (),
    )
    return replace(found, warnings=tuple(_warnings(found, weights)))


def _model(weights: Weights) -> Model | None:
    try:
        return None if weights.settings is None else costs.model(weights.settings)
    except (ValueError, OSError, RuntimeError):  # a tower that OpenCLIP cannot build without the hub
        return None


def _speeds(
    profile: Profile, weights: Mapping[str, Weights], models: Mapping[str, Model | None]
) -> dict[str, Speed | None]:
    """Each model's speed: timed once for equal configurations while `TIMING` lasts, else scaled by FLOPs."""
    known = {name: model for name, model in models.items() if model}
    first = [name for name in (profile.model, profile.labeller) if name in known]
    smallest = min((model.n_parameters for model in known.values()), default=0)
    timed: dict[Model, Speed] = {}
    began = time.monotonic()
    for name in dict.fromkeys([*first, *known]):
        model, is_late = known[name], time.monotonic() - began > TIMING
        if model in timed or model.n_parameters > max(costs.LARGEST_TIMED, smallest) or (timed and is_late):
            continue
        settings = {"size": profile.image_size, "device": profile.device, "precision": profile.precision}
        with suppress(EncoderError):  # the run says what is wrong with it
            timed[model] = costs.timed(name, weights[name], **settings, metrics=not timed)
    speeds: dict[str, Speed | None] = dict.fromkeys(models)
    for name, model in known.items() if timed else ():
        alike = [each for each in timed if bool(each.n_blocks) == bool(model.n_blocks)] or list(timed)
        near = min(alike, key=lambda each: abs(math.log(each.image_flops / model.image_flops)))
        speeds[name] = timed.get(model) or costs.scaled(model, near, timed[near])
    return speeds


def _download(name: str, weights: Weights, model: Model | None) -> dict[str, Any]:
    size = float(costs.BYTES * model.n_parameters) if model else math.nan
    count = f"{model.n_parameters / 1e6:.0f} million parameters, " if model and model.n_parameters >= 1e6 else ""
    return {"what": name, "state": weights.state, "bytes": size, "note": f"{count}{weights.place}"}


def _warnings(found: Plan, weights: Mapping[str, Weights]) -> Iterator[str]:
    needed = found.download_bytes + float(found.stored["bytes"].sum())
    if needed > found.disk_free:
        yield f"the disk of {found.profile.run_dir} has {size(found.disk_free)} free, {size(needed)} are needed"
    for row in found.memory.itertuples():
        if row.bytes > row.there:
            what = "takes about {} of memory and there are {}: a smaller batch_size or model would fit"
            yield f"{row.stage} {what.format(size(row.bytes), size(row.there))}"
    if found.busy > costs.CROWDED:
        yield f"others are at work here, a load of {found.busy:.1f} a core: the times are those of a machine to itself"
    for name, each in weights.items():
        if each.state in ("missing", "unknown"):
            yield f"{name}: {each.place}"
    images = found.downloads.iloc[0]
    if images["state"] == "missing":
        yield f"images: {images['note']}; a run would stop there"


def show(plan: Plan, console: Console) -> None:
    """Print it: tables, warnings, and the totals in one line."""
    console.print(f"A dry run of {plan.profile.name}: nothing is downloaded, computed or stored.", highlight=False)
    table = Table("download", "state", "size", "what is known", box=None, title="to download")
    for row in plan.downloads.itertuples():
        table.add_row(row.what, row.state, "" if row.state == "here" else size(row.bytes), row.note)
    console.print(table)
    table = Table("nb", "stage", "model", "count", "time", "how", box=None, title=f"to compute, on {plan.device}")
    for row in plan.computed.itertuples():
        table.add_row(row.notebook, row.stage, row.model, f"{row.count:,} {row.unit}", duration(row.seconds), row.how)
    console.print(table)
    table = Table("nb", "array", "model", "size", "how", box=None, title=f"to store, in {plan.profile.run_dir}")
    for row in plan.stored.itertuples():
        table.add_row(row.notebook, row.stage, row.model, size(row.bytes), row.how)
    console.print(table)
    table = Table("memory", "about", "there", box=None, title="memory")
    for row in plan.memory.itertuples():
        table.add_row(row.stage, size(row.bytes), size(row.there))
    console.print(table)
    console.print(LEGEND, highlight=False)
    for warning in plan.warnings:
        console.print(f"Warning: {warning}.", style="yellow", highlight=False)
    console.print(total(plan), highlight=False, soft_wrap=True)


def total(plan: Plan) -> str:
    """All of it in one line."""
    is_open = plan.downloads["bytes"].isna() & plan.downloads["state"].isin(["to fetch", "unknown"])
    unknown = " and what is unknown" if is_open.any() else ""
    untimed = ", without what is unknown" if plan.computed["seconds"].isna().any() else ""
    least, most = duration(plan.seconds), duration(SPREAD * plan.seconds)
    number, unit = least.rsplit(" ", 1)
    least = number if most.endswith(f" {unit}") else least
    return (
        f"In all about {size(plan.download_bytes)}{unknown} to download, {size(plan.store_bytes)} to store "
        f"({size(plan.disk_free)} free), {least} to {most} on {plan.device}{untimed}."
    )


def size(n_bytes: float) -> str:
    """Two digits, in decimal units."""
    if math.isnan(n_bytes):
        return "unknown"
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= 0.995 * least:
            return f"{_two(n_bytes / least)} {unit}"
    return f"{n_bytes:.0f} bytes" if n_bytes else "0"


def duration(seconds: float) -> str:
    """Two digits."""
    if math.isnan(seconds):
        return "unknown"
    if seconds < 1:
        return "under 1 s" if seconds else "0 s"
    for unit, least in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * least:
            return f"{_two(seconds / least)} {unit}"
    return f"{_two(seconds)} s"


def _two(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.{1 if value < 9.95 else 0}f}"
