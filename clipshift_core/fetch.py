"""Images of a table of links, or whole shards of a list of them, into web-dataset shards; from a web not to be trusted.

Our own (`web` says what a server may do), because img2dataset, tried on the faults of `tests/loopback.py`, followed a
redirect to a private address, did not end on a dripping one, and knows neither equal pictures nor a number to reach.

What became of a link is written down, and it is not tried again: an empty folder starts anew. What arrives from beyond
the last image that is needed is dropped, so that a folder hangs on the answers alone, not on their order in time.

    python -m clipshift_core.fetch LISTING TARGET --n-images N --seed S

LISTING: a .tsv as `conceptual` reads it, or a .txt with the URL or the path of a plain .tar shard a line.
"""

import argparse
import fcntl
import io
import os
import re
import shutil
import sys
import tarfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pandas as pd
from PIL import Image

from clipshift_core import conceptual, images
from clipshift_core import web as limits
from clipshift_core.conceptual import COLUMNS, DEAD, FETCHED, FetchError, Link, Outcome, Store, writing
from clipshift_core.manifests import SUFFIXES
from clipshift_core.progress import note
from clipshift_core.web import Fault, Web, header

CONNECTIONS, PER_HOST = 32, 4
"""Links fetched at once, and of one host."""
MAX_BYTES, MAX_SHARD_BYTES = 20 * 2**20, 2 * 2**30
AHEAD, AHEAD_BYTES = 1024, 2**28
"""Links, and bytes that have come, ahead of the next link in the order of rank."""
ALL_SILENT = 300
"""Links in a row without an answer after which it is our own network that is taken to be gone."""

_DECODERS = threading.BoundedSemaphore(min(4, os.cpu_count() or 1))
_NOT_IMAGES = ("text/html", "video/", "audio/", "image/svg", "application/json", "application/pdf", "application/xhtml")


@dataclass(frozen=True)
class Report:
    """What a folder was fetched from, and what became of it."""

    outcomes: pd.DataFrame
    """outcome, n and share of the links tried, most frequent first."""
    n_links: int
    """Links (or shards) that the listing holds; `n_set_aside` more of its lines cannot be used."""
    n_images: int
    n_set_aside: int = 0
    what: str = "link"

    @property
    def n_tried(self) -> int:
        return int(self.outcomes["n"].sum())

    @property
    def reasons(self) -> str:
        """The outcomes in a few words: "dead 3, timed out 1"."""
        return ", ".join(f"{kind} {n:,}" for kind, n in zip(self.outcomes["outcome"], self.outcomes["n"], strict=True))

    @property
    def summary(self) -> str:
        """One sentence: how many links were tried, how many are dead, how many images are there."""
        n = self.outcomes.set_index("outcome")["n"]
        dead, tried = int(n.get(DEAD, 0)), self.n_tried
        other = tried - dead - int(n.get(FETCHED, 0))
        which = f"All {tried:,}" if tried == self.n_links else f"{tried:,} of {self.n_links:,}"
        share = f" ({dead / tried:.0%})" if tried else ""
        return (
            f"{which} {self.what}s were tried: {dead:,} are dead{share}, {other:,} are of no use for another reason, "
            f"and {self.n_images:,} images are there."
        )


def report(folder: Path) -> Report:
    """Read back what a folder's links came to. Raises FetchError for a folder that nothing was fetched into."""
    state = conceptual.state_of(Path(folder))
    if not state:
        raise FetchError(f"{folder}: nothing was fetched into it")
    if "rows" in state:
        found = pd.DataFrame(state["rows"], columns=list(COLUMNS))
    else:
        tables = conceptual.tables_of(Path(folder))
        found = pd.concat(tables) if tables else pd.DataFrame(columns=list(COLUMNS))
    n = found["outcome"].value_counts().rename_axis("outcome").rename("n").reset_index()
    n_images = state.get("n_images", int((found["outcome"] == FETCHED).sum()))
    n = n.assign(share=n["n"] / max(len(found), 1))
    return Report(n, state["n_links"], n_images, state.get("n_set_aside", 0), state.get("what", "link"))


def collect(
    listing: Path,
    target: Path,
    *,
    n_images: int | None,
    seed: int,
    allow: Sequence[str] = (),
    progress: Callable[[str], None] = note,
) -> Report:
    """Fetch links of `listing` into shards in `target`, until `n_images` different images are there (None: all).

    Killed and called again it goes on; with a larger `n_images` too; a folder that has enough is returned as it is.
    From a .tsv come exactly `n_images` that can be decoded; of a .txt whole shards, until so many members are named
    like images. allow: "host:port" as the URL has it, exempt from the rule that addresses be public.  progress: called
    with a short line. Fewer than `n_images` is no error, the report says so; none is. Raises FetchError in one line.
    """
    listing, target = Path(listing), Path(target)
    if listing.suffix not in (".tsv", ".txt"):
        raise FetchError(f"{listing}: a .tsv of captions and links, or a .txt of shards, is accepted")
    if n_images is not None and n_images < 1:
        raise FetchError(f"n_images {n_images}: 1 or more is accepted, or None for all")
    is_table = listing.suffix == ".tsv"
    state = conceptual.claim(target, listing, seed if is_table else None)
    if not _is_complete(state, target, n_images):
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            web = Web(allow, CONNECTIONS)
            try:
                (_images if is_table else _shards)(listing, target, n_images, seed, web, progress)
            finally:
                web.stop()
    found = report(target)
    if not found.n_images:
        raise FetchError(f"{listing}: no link gave an image: {found.reasons}")
    return found


def _is_complete(state: dict, target: Path, n_images: int | None) -> bool:
    if "n_links" not in state:  # a new folder
        return False
    if "rows" not in state and conceptual.unfinished(target):
        return False
    found = report(target)
    return found.n_tried == found.n_links or (n_images is not None and found.n_images >= n_images)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Holds a lock on the folder, which ends with the process however it ends."""
    file = target / ".lock"
    with writing(file):
        lock = file.open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FetchError(f"{target}: another run is fetching into it; wait for it, or stop it") from None
        yield


# Images of a table --------------------------------------------------------------------------------------------------


def _images(listing: Path, target: Path, n_images: int | None, seed: int, web: Web, progress: Callable) -> None:
    state = conceptual.claim(target, listing, seed)  # again: another run may have ended just before the lock
    store = Store(target)
    if _is_complete(state, target, n_images):
        return
    progress("reading the listing")
    table = conceptual.read(listing, seed=seed)
    with writing(target / "set_aside.parquet"):
        table.set_aside.to_parquet(target / "set_aside.parquet", index=False)
    conceptual.record(target, state | {"n_links": len(table), "n_set_aside": len(table.set_aside)})
    kinds = Counter(kind for known in store.tables for kind in known["outcome"])
    silent: list[Outcome] = []

    def wanted() -> int:
        return AHEAD if n_images is None else min(AHEAD, 2 * (n_images - store.n_images) + CONNECTIONS)

    def told() -> None:
        of = "" if n_images is None else f" of {n_images:,}"
        progress(f"images {store.n_images:,}{of} ({kinds[DEAD]:,} links dead)")

    try:
        for outcome in _in_order(table.links(store.n_tried), lambda link: _image(web, link), wanted):
            silent.append(outcome)
            answered = outcome.kind not in ("unreachable", "timed out", DEAD) or outcome.status is not None
            if answered:
                kinds.update([store.add(each) for each in silent])
                silent.clear()
                told()
            elif len(silent) == ALL_SILENT:
                store.commit()
                raise FetchError(
                    f"{ALL_SILENT} links in a row did not answer ({outcome.link.url}: {outcome.reason}): is there a "
                    f"network? {store.n_images:,} images are there; call again to go on"
                )
            if store.n_images == n_images:
                break
        kinds.update([store.add(each) for each in silent])
        store.commit()
        told()
    except BaseException:
        store.abandon()
        raise


def _in_order(links: Iterator[Link], fetch: Callable[[Link], Outcome], wanted: Callable[[], int]) -> Iterator[Outcome]:
    """Outcomes in the order of the links, of which many are fetched at once, few of one host, `wanted()` ahead."""
    queue: deque[Future] = deque()
    waiting: list[tuple[str, Link, Future]] = []
    done: SimpleQueue[tuple[str, int]] = SimpleQueue()
    active: Counter[str] = Counter()
    n_bytes = 0
    pool = ThreadPoolExecutor(CONNECTIONS)

    def work(host: str, link: Link, future: Future) -> None:
        try:
            future.set_result(fetch(link))
            done.put((host, len(future.result().data)))
        except BaseException as error:
            future.set_exception(error)
            done.put((host, 0))

    try:
        while True:
            while len(queue) < wanted() and n_bytes < AHEAD_BYTES and (link := next(links, None)):
                queue.append(Future())
                waiting.append((link.url.split("/", 3)[2].lower(), link, queue[-1]))
            later = []
            for host, link, future in waiting:
                if active.total() < CONNECTIONS and active[host] < PER_HOST:
                    active[host] += 1
                    pool.submit(work, host, link, future)
                else:
                    later.append((host, link, future))
            waiting = later
            if not queue:
                return
            host, size = done.get()
            active[host] -= 1
            n_bytes += size
            while queue and queue[0].done():
                outcome = queue.popleft().result()
                n_bytes -= len(outcome.data)
                yield outcome
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _image(web: Web, link: Link) -> Outcome:
    """What a link comes to. Whatever its host does, this returns."""
    began, data = time.monotonic(), b""
    web.limit(limits.TOTAL)
    try:
        data = web.tried(lambda: _picture(web, link.url))
        with _DECODERS:
            images.decode(data)
            with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
                suffix = {"JPEG": "jpg", "MPO": "jpg"}.get(image.format, image.format.lower())
        kind, reason, status = FETCHED, "", 200
    except Fault as fault:
        kind, reason, status, suffix = fault.kind, str(fault), fault.status, ""
    except images.Unreadable as error:
        kind, reason, status, suffix = "not decodable", str(error), 200, ""
    n_bytes = len(data)
    return Outcome(link, kind, reason, status, time.monotonic() - began, n_bytes, data if suffix else b"", suffix)


def _picture(web: Web, url: str) -> bytes:
    with web.answer(url) as response:
        kind = header(response, "content-type").lower()
        if kind.startswith(_NOT_IMAGES):
            raise Fault("wrong type", kind.partition(";")[0], response.status)
        return b"".join(web.body(response, MAX_BYTES))


# Whole shards -------------------------------------------------------------------------------------------------------


def _shards(listing: Path, target: Path, n_images: int | None, seed: int, web: Web, progress: Callable) -> None:
    state = {"rows": [], "n_images": 0, "what": "shard"} | conceptual.claim(target, listing, None)
    with conceptual.reading(listing):
        lines = [line.strip() for line in listing.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    lines = [line for line in dict.fromkeys(lines) if line and not line.startswith("#")]
    state["n_links"] = len(lines)
    conceptual.record(target, state)
    for line in lines[len(state["rows"]) :]:
        if n_images is not None and state["n_images"] >= n_images:
            return
        progress(f"shard {len(state['rows']) + 1} of {len(lines)} ({state['n_images']:,} images)")
        began = time.monotonic()
        name = re.sub(r"[^\w.-]", "_", line.partition("?")[0].rpartition("/")[2], flags=re.ASCII).lstrip(".")
        name = (name if name.endswith(".tar") else f"{name}.tar")[-120:]
        if name in {row[1] for row in state["rows"]}:
            name = f"{Link('', line).key}-{name}"
        try:
            n, kind, reason, status = _shard(web, line, listing.parent, target / name), FETCHED, "", None
        except Fault as fault:
            if fault.retry is not None or fault.kind in ("unreachable", "timed out", "truncated"):
                raise FetchError(f"{line}: {fault}; call again to go on") from None
            n, kind, reason, status = 0, fault.kind, str(fault), fault.status
        size = (target / name).stat().st_size if n else 0
        state["rows"].append((line, name, kind, reason, status, size, round(time.monotonic() - began, 3), None))
        state["n_images"] += n
        conceptual.record(target, state)


def _shard(web: Web, line: str, base: Path, file: Path) -> int:
    """Bring a shard to `file`, unless it is there; how many of its members are named like images."""
    partial = file.with_name(f".{file.name}.partial")
    if not file.exists():
        if "://" in line:
            web.tried(lambda: _download(web, line, partial))
        elif not (base / line).is_file():
            raise Fault(DEAD, "no such file")
        else:
            partial.unlink(missing_ok=True)
            with writing(file):
                try:
                    os.link(base / line, partial)
                except OSError:  # another disk
                    shutil.copyfile(base / line, partial)
    n = _members(file if file.exists() else partial)
    if not file.exists():
        with writing(file):
            partial.replace(file)
    return n


def _members(file: Path) -> int:
    try:
        with tarfile.open(file, mode="r:") as tar:
            n = sum(member.isreg() and member.name.lower().endswith(SUFFIXES) for member in tar)
    except (tarfile.TarError, OSError, ValueError) as error:
        file.unlink()
        raise Fault("not decodable", f"no plain .tar that can be read to its end: {error}") from None
    if not n:
        file.unlink()
        raise Fault("wrong type", "no member of it is named like an image")
    return n


def _download(web: Web, url: str, partial: Path) -> None:
    """Into `partial`, from where an earlier call broke off if the server has the same file still."""
    noted = partial.with_suffix(".tag")
    tag = noted.read_text() if partial.exists() and noted.exists() else ""
    have = partial.stat().st_size if tag else 0
    asked = {"Range": f"bytes={have}-", "If-Range": tag} if have else {}
    web.limit(limits.TOTAL)
    try:
        with web.answer(url, asked) as response:
            goes_on = response.status == 206 and header(response, "content-range").startswith(f"bytes {have}-")
            have = have if goes_on else 0
            tag = header(response, "etag")
            with writing(partial), partial.open("ab" if goes_on else "wb") as file:
                noted.write_text(tag if tag.startswith('"') else "")
                at = 0
                for chunk in web.body(response, MAX_SHARD_BYTES - have):
                    file.write(chunk)
                    at += len(chunk)
                    if at >= 2**20:
                        at = 0
                        web.limit(limits.TOTAL)  # each MiB has so long
    except Fault as fault:
        if fault.status == 416:
            partial.unlink(missing_ok=True)
        if fault.status == 416 or fault.kind == "truncated":
            fault.retry = 0
        raise
    noted.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clipshift_core.fetch", description="Fetch images into shards.")
    parser.add_argument("listing", type=Path, help="a .tsv of captions and links, or a .txt of shards")
    parser.add_argument("target", type=Path, help="the folder that the shards go into")
    parser.add_argument("--n-images", type=int, default=None, help="how many images are wanted (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    show = (lambda text: print(f"\r{text}", end="\033[K", file=sys.stderr)) if sys.stderr.isatty() else note
    try:
        found = collect(given.listing, given.target, n_images=given.n_images, seed=given.seed, progress=show)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    print(found.outcomes.to_string(index=False), found.summary, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
