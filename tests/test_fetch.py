"""Fetching against a server on loopback that does everything wrong that a server can do."""

import gc
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import httpcore
import pandas as pd
import pytest
from loopback import Loopback, picture

from clipshift_core import conceptual, fetch, manifests, web
from clipshift_core.fetch import FetchError

SILENCE, TOTAL = 2.0, 8.0
"""Seconds, for the faults alone. A machine full of other tests is silent for half a second now and then, so no answer
that is to come is waited for in less; three silences fit into the total."""


@pytest.fixture(autouse=True, scope="module")
def soon_again():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "BACKOFF", 0.03)
        yield


@pytest.fixture(scope="module")
def server():
    with Loopback() as server:
        yield server


def listing_of(folder, urls, name="list.tsv"):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text("".join(f"about {url}\t{url}\n" if name.endswith("tsv") else f"{url}\n" for url in urls))
    return file


def collect(listing, target, server, n_images=None, seed=0, **more):
    return fetch.collect(listing, target, n_images=n_images, seed=seed, allow=[server.host], progress=print, **more)


def tables(target):
    return pd.concat([pd.read_parquet(path) for path in sorted(target.glob("0*.parquet"))], ignore_index=True)


def digest(data):
    return hashlib.sha256(data).hexdigest()  # pytest would take minutes to show how two shards differ


def shards(target):
    return {path.name: digest(path.read_bytes()) for path in sorted(target.glob("*.tar"))}


# Faults -------------------------------------------------------------------------------------------------------------

FAULTS = {
    "image/1.jpg": ("fetched", ""),
    "image/2.png": ("fetched", ""),
    "image/3.webp": ("fetched", ""),
    "image/4.gif": ("fetched", ""),
    "plain/5.jpg": ("fetched", ""),
    "zipped/6.jpg": ("fetched", ""),
    "slow/7.jpg": ("fetched", ""),
    "then/2/503/image/8.jpg": ("fetched", ""),
    "then/1/429/image/9.jpg?after=0": ("fetched", ""),
    "then/9/503/image/10.jpg": ("http error", "HTTP 503"),
    "then/1/429/image/11.jpg?after=3600": ("http error", "HTTP 429, asks to wait 3,600 s"),
    "status/404": ("dead", "HTTP 404"),
    "status/410": ("dead", "HTTP 410"),
    "status/403": ("http error", "HTTP 403"),
    "status/500": ("http error", "HTTP 500"),
    "stall": ("timed out", "silent for 2 s"),
    "drip": ("timed out", "not whole within 8 s"),
    "drip-headers": ("timed out", "not whole within 8 s"),
    "loop": ("redirects", "more than 5 redirects"),
    "redirect/301?to=/image/12.jpg": ("fetched", ""),
    "redirect/302?to=../image/13.jpg": ("fetched", ""),
    "redirect/307?to=OTHER/image/14.jpg": ("refused", "127.0.0.1 is not a public address"),
    "redirect/302?to=http://localhost:1/": ("refused", "is not a public address"),
    "redirect/302?to=http://10.0.0.1/x.jpg": ("refused", "10.0.0.1 is not a public address"),
    "redirect/302?to=http://169.254.169.254/latest": ("refused", "169.254.169.254 is not a public address"),
    "redirect/302?to=http://[::1]:80/x.jpg": ("refused", "::1 is not a public address"),
    "redirect/302?to=http://[::ffff:127.0.0.1]:80/": ("refused", "is not a public address"),
    "redirect/302?to=http://0/x.jpg": ("refused", "0.0.0.0, is not a public address"),
    "redirect/302?to=http://2130706433/x.jpg": ("refused", "127.0.0.1, is not a public address"),
    "redirect/302?to=file:///etc/passwd": ("refused", "file:/etc/passwd is no http(s) address"),
    "type/html": ("wrong type", "text/html"),
    "type/svg": ("wrong type", "image/svg+xml"),
    "type/lie": ("not decodable", "a web page or a drawing in text, not pixels"),
    "cut": ("truncated", "broken off after"),
    "short": ("not decodable", "cut off: the JPEG ends early"),
    "zipped-cut": ("truncated", "its gzip ends early"),
    "declares/99999999": ("too large", "declares 99,999,999 bytes; 2,097,152 are read"),
    "endless": ("too large", "more than the 2,097,152 bytes that are read"),
    "bomb": ("too large", "more than the 2,097,152 bytes that are read"),
    "bombs": ("not decodable", "packed by gzip, gzip, which was not asked for"),
    "empty": ("not decodable", "the file is empty"),
    "reset": ("unreachable", "the connection broke: [Errno 104]"),
    "junk": ("unreachable", "illegal status line"),
    "https://HOST/image/15.jpg": ("unreachable", "SSL"),
    "http://nowhere.invalid/16.jpg": ("dead", "no such host: nowhere.invalid"),
    "http://127.0.0.1:1/17.jpg": ("refused", "127.0.0.1 is not a public address"),
    "http://user:pass@HOST/image/18.jpg": ("fetched", ""),
    "http://" + "a" * 70 + ".org/19.jpg": ("dead", "no such host"),
}
"""For each path (or URL): the outcome and how its reason begins or ends."""


@pytest.fixture(scope="module")
def faults(server, soon_again, tmp_path_factory):
    """The outcome of every fault, of one run; and how long that took, and the folder."""
    folder = tmp_path_factory.mktemp("faults")
    with Loopback() as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "MAX_BYTES", 2**21)
        patch.setattr(web, "SILENCE", SILENCE)
        patch.setattr(web, "TOTAL", TOTAL)
        urls = {
            path: path.replace("HOST", server.host)
            if "://" in path.partition("?")[0]
            else server.url(path.replace("OTHER", f"http://{other.host}"))
            for path in FAULTS
        }
        began = time.monotonic()
        found = collect(listing_of(folder, urls.values()), folder / "out", server)
        seconds = time.monotonic() - began
        assert not other.seen
    rows = tables(folder / "out").set_index("url")
    return {path: rows.loc[url] for path, url in urls.items()}, seconds, folder / "out", found


@pytest.mark.parametrize("path", FAULTS)
def test_each_fault_has_its_outcome_and_its_reason(faults, path):
    row, (kind, reason) = faults[0][path], FAULTS[path]
    assert row["outcome"] == kind, row["reason"]
    assert reason in row["reason"] and (kind == "fetched") == (row["reason"] == ""), row["reason"]
    assert row["outcome"] in conceptual.OUTCOMES and row["seconds"] < TOTAL + 1.5


def test_no_fault_holds_the_others_up_and_the_report_counts_them(faults, server):
    _, seconds, folder, found = faults
    assert seconds < 3 * SILENCE + TOTAL  # one after the other, the three that are waited for take another TOTAL
    n = pd.Series([kind for kind, _ in FAULTS.values()]).value_counts()
    assert found.outcomes.set_index("outcome")["n"].sort_index().equals(n.sort_index().rename("n"))
    assert found.outcomes["share"].sum() == pytest.approx(1)
    assert (found.n_links, found.n_tried, found.n_images) == (len(FAULTS), len(FAULTS), n["fetched"])
    n_all, n_dead, n_good = len(FAULTS), n["dead"], n["fetched"]
    n_other = n_all - n_dead - n_good
    assert found.summary == (
        f"All {n_all} links were tried: {n_dead} are dead ({n_dead / n_all:.0%}), {n_other} are of no use for another "
        f"reason, and {n_good} images are there."
    )
    assert server.headers["/image/1.jpg"]["User-Agent"].startswith("clipshift/")
    assert "Authorization" not in server.headers["/image/18.jpg"]
    again = fetch.report(folder)
    assert again.summary == found.summary


def test_only_what_may_change_is_tried_again(faults, server):
    tries = {path: server.seen[f"/{path.partition('?')[0]}"] for path in FAULTS}
    three = {"then/2/503/image/8.jpg", "then/9/503/image/10.jpg", "reset"}
    two = {"then/1/429/image/9.jpg?after=0"}
    for path in three | two:
        assert tries[path] == (3 if path in three else 2), path
    for path in ("status/404", "status/500", "cut", "type/html", "then/1/429/image/11.jpg?after=3600", "junk", "bomb"):
        assert tries[path] == 1, path


def test_shards_hold_the_bytes_as_they_came_and_a_manifest_uses_all(faults):
    rows, _, folder, found = faults
    with tarfile.open(folder / "00000.tar", "r:") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
        assert all(member.mtime == 0 for member in tar.getmembers())
    for path in ("image/1.jpg", "image/2.png", "image/3.webp", "image/4.gif"):
        row, name = rows[path], path.rpartition("/")[2]
        assert members[f"{row['key']}.{name[2:]}"] == picture(name)
        assert members[f"{row['key']}.txt"].decode() == f"about {row.name}"
        assert json.loads(members[f"{row['key']}.json"]) == {"url": row.name, "sha256": row["sha256"]}
    manifest = manifests.build(folder, n_images=None, seed=0)
    assert len(manifest.images) == found.n_images and manifest.set_aside.empty
    assert set(manifest.images["image_id"]) == {row["key"] for row in rows.values() if row["outcome"] == "fetched"}
    assert manifest.images["caption"].str.startswith("about http").all()


# Addresses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [("8.8.8.8", True), ("2606:4700:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
     ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
     ("0.0.0.0", False), ("255.255.255.255", False), ("224.0.0.1", False), ("240.0.0.1", False), ("::1", False),
     ("::", False), ("fe80::1%eth0", False), ("fc00::1", False), ("fec0::1", False), ("ff02::1", False),
     ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", True), ("64:ff9b::7f00:1", False), ("64:ff9b::808:808", True),
     ("2002:7f00:1::", False), ("2001:db8::1", False), ("198.18.0.1", False), ("192.0.2.1", False)],
)  # fmt: skip
def test_which_addresses_are_public(address, public):
    assert web.is_public(address) is public


def test_the_address_that_was_looked_at_is_connected_to(monkeypatch, tmp_path):
    """A name that is public when asked first, and private ever after."""
    asked, reached = [], []

    def rebinding(host, port, *args, **more):
        asked.append(host)
        address = "8.8.8.8" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(self, host, port, *args, **more):
        reached.append(host)
        raise httpcore.ConnectError("far away")

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect)
    with pytest.raises(FetchError, match="unreachable 1"):
        fetch.collect(listing_of(tmp_path, ["http://rebinds.org/1.jpg"]), tmp_path / "out", n_images=1, seed=0)
    assert asked == ["rebinds.org"] and reached == ["8.8.8.8"]


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch, tmp_path):
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "192.168.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: both)
    with pytest.raises(FetchError, match="refused 1"):
        fetch.collect(listing_of(tmp_path, ["http://both.org/1.jpg"]), tmp_path / "out", n_images=1, seed=0)


def test_proxies_of_the_environment_are_not_used(monkeypatch, tmp_path, server):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    found = collect(listing_of(tmp_path, [server.url("image/p.jpg")]), tmp_path / "out", server)
    assert found.n_images == 1


# Numbers, resuming, the folder --------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(conceptual, "PER_SHARD", 8)


def mixed(server, n):
    """Links of which a third is dead and some have the same bytes."""
    paths = [f"image/m{i}.jpg" if i % 3 else "status/404?" + str(i) if i % 2 else f"same/{i}.png" for i in range(n)]
    return [server.url(path) for path in paths]


def test_exactly_as_many_as_wanted_and_the_manifest_sets_none_aside(tmp_path, server, small_shards):
    listing, out = listing_of(tmp_path, mixed(server, 90)), tmp_path / "out"
    said = []
    found = fetch.collect(listing, out, n_images=30, seed=3, allow=[server.host], progress=said.append)
    assert found.n_images == 30 and found.n_tried < 90 and "of 90 links were tried" in found.summary
    manifest = manifests.build(out, n_images=30, seed=3)
    assert len(manifest.images) == 30 and manifest.set_aside.empty and manifest.n_listed == 30
    n_dead = int(found.outcomes.set_index("outcome").loc["dead", "n"])
    assert said[-1] == f"images 30 of 30 ({n_dead} links dead)"
    # what is tried is a start of the order of rank, without a gap
    table = tables(out)
    assert table["url"].tolist() == [link.url for link in conceptual.read(listing, seed=3).links()][: found.n_tried]
    assert table["outcome"].iloc[-1] == "fetched"


def test_pictures_of_the_same_bytes_count_once(tmp_path, server):
    urls = [server.url(f"same/{i}.png") for i in range(3)] + [server.url("image/s.jpg")]
    found = collect(listing_of(tmp_path, urls), tmp_path / "out", server, n_images=4)
    assert found.n_images == 2 and found.outcomes.set_index("outcome")["n"].to_dict() == {"fetched": 2, "same bytes": 2}
    table = tables(tmp_path / "out").set_index("outcome")
    first = table.loc["fetched"].set_index("key")["url"]
    original = table.loc["same bytes", "reason"].str.removeprefix("the same bytes as ").map(first)
    assert original.str.contains("/same/").all()
    assert manifests.build(tmp_path / "out", n_images=2, seed=0).set_aside.empty


def test_more_images_later_make_the_folder_of_one_run(tmp_path, server, small_shards):
    listing = listing_of(tmp_path, mixed(server, 90))
    collect(listing, tmp_path / "steps", server, n_images=5)
    before = server.seen.copy()
    collect(listing, tmp_path / "steps", server, n_images=5)
    assert server.seen == before  # complete: nothing is asked for
    collect(listing, tmp_path / "steps", server, n_images=21)
    again = server.seen - before
    first = tables(tmp_path / "steps")["url"][:5]
    assert not any(again[f"/{url.split('/', 3)[3].partition('?')[0]}"] for url in first if "image" in url)
    collect(listing, tmp_path / "once", server, n_images=21)
    assert shards(tmp_path / "steps") == shards(tmp_path / "once") and len(shards(tmp_path / "once")) == 3
    every = collect(listing, tmp_path / "steps", server)
    assert every.n_tried == every.n_links == 90 and every.n_images == 61  # 60 of their own, one for all the same
    before = server.seen.copy()
    assert collect(listing, tmp_path / "steps", server, n_images=1000).n_images == 61
    assert server.seen == before  # every link was tried


CHILD = """
import sys
from clipshift_core import conceptual, fetch
conceptual.PER_SHARD = 8
listing, target, host = sys.argv[1:]
fetch.collect(listing, target, n_images=56, seed=0, allow=[host], progress=lambda text: print(text, flush=True))
"""


def test_killed_at_any_moment_it_ends_with_the_same_bytes_and_only_one_may_run(
    tmp_path, server, small_shards, monkeypatch
):
    urls = [server.url(f"slow/k{i}.jpg" if i % 4 else f"status/410?{i}") for i in range(90)]
    listing, out = listing_of(tmp_path, urls), tmp_path / "killed"
    monkeypatch.setattr(fetch, "PER_HOST", 16)  # another order in time than the children's
    for n_shards in (1, 3):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, listing, out, server.host], cwd=Path(fetch.__file__).parents[1]
        )
        while len(list(out.glob("*.parquet"))) < n_shards + 1:  # one is set_aside.parquet
            assert child.poll() is None
            time.sleep(0.01)
        if n_shards == 1:
            with pytest.raises(FetchError, match="another run is fetching into it"):
                collect(listing, out, server, n_images=56)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    there = pd.concat([pd.read_parquet(path) for path in out.glob("0*.parquet")])
    assert 24 <= (there["outcome"] == "fetched").sum() < 56
    before = server.seen.copy()
    assert collect(listing, out, server, n_images=56).n_images == 56
    asked = server.seen - before
    assert asked and not any(asked["/" + url.split("/", 3)[3]] for url in there["url"] if "slow" in url)
    collect(listing, tmp_path / "whole", server, n_images=56)
    assert shards(out) == shards(tmp_path / "whole")
    assert not list(out.glob(".*.partial"))


def test_a_shard_whose_table_was_never_written_is_cut_back(tmp_path, server, small_shards):
    """Killed between the two renames that end a shard: the longer shard stands beside the older table."""
    listing, out = listing_of(tmp_path, mixed(server, 60)), tmp_path / "out"
    collect(listing, out, server, n_images=5)
    old, five = (out / "00000.parquet").read_bytes(), shards(out)
    collect(listing, out, server, n_images=8)
    whole, longer = shards(out), (out / "00000.tar").read_bytes()
    assert len(tables(out)) > 5
    (out / "00000.parquet").write_bytes(old)
    (out / "00001.tar").write_bytes(longer)  # and one of which no table was written at all
    assert fetch.report(out).n_images == 5
    before = server.seen.copy()
    collect(listing, out, server, n_images=5)
    assert shards(out) == five and server.seen == before
    (out / "00000.tar").write_bytes(longer)
    collect(listing, out, server, n_images=8)
    assert shards(out) == whole


def test_another_seed_listing_or_folder_is_refused(tmp_path, server):
    urls = [server.url(f"image/r{i}.jpg") for i in range(6)]
    listing, out = listing_of(tmp_path, urls), tmp_path / "out"
    collect(listing, out, server, n_images=2)
    with pytest.raises(FetchError, match="fetched with seed 0, not 1"):
        collect(listing, out, server, n_images=2, seed=1)
    with pytest.raises(FetchError, match=r"another listing \(list.tsv\)"):
        collect(listing_of(tmp_path / "b", urls[:5]), out, server, n_images=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.tar").write_bytes(bytes(1024))
    with pytest.raises(FetchError, match="holds shards that were not fetched here"):
        collect(listing, tmp_path / "mine", server, n_images=2)
    (out / "00000.tar").write_bytes(b"")
    with pytest.raises(FetchError, match=r"00000.tar: shorter than 00000.parquet says"):
        collect(listing, out, server, n_images=4)
    (out / "00000.parquet").rename(out / "00001.parquet")
    with pytest.raises(FetchError, match=r"00000.parquet, which goes before it, is not there"):
        collect(listing, out, server, n_images=4)
    for text in ("[]", '{"listing": 1}', "{"):
        (out / "fetch.json").write_text(text)
        with pytest.raises(FetchError, match=r"fetch.json: (is not what was written|cannot be read)"):
            collect(listing, out, server, n_images=4)
    with pytest.raises(FetchError, match="b: nothing was fetched into it"):
        fetch.report(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "n_images", "said"),
    [("list.csv", 1, "list.csv: a .tsv of captions"), ("list.tsv", 0, "n_images 0: 1 or more"),
     ("gone.tsv", 1, "gone.tsv: cannot be read: No such file")],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, server, name, n_images, said):
    if name != "gone.tsv":
        listing_of(tmp_path, [server.url("image/1.jpg")], name)
    with pytest.raises(FetchError, match=said) as error:
        collect(tmp_path / name, tmp_path / "out", server, n_images=n_images)
    assert "\n" not in str(error.value)


def test_a_disk_that_is_full_or_no_folder_is_named(tmp_path, server):
    listing, out = listing_of(tmp_path, [server.url("image/1.jpg")]), tmp_path / "out"
    out.mkdir()
    (out / ".00000.tar.partial").symlink_to("/dev/full")
    with pytest.raises(FetchError, match=r"00000.tar.partial: cannot be written: No space left"):
        collect(listing, out, server)
    assert collect(listing, out, server).n_images == 1  # the link was removed: room again
    with pytest.raises(FetchError, match="list.tsv/out: cannot be written: Not a directory"):
        collect(listing, listing / "out", server)


def test_too_few_good_links_are_no_error_but_none_are(tmp_path, server):
    dead = [server.url(f"status/404?{i}") for i in range(3)]
    listing = listing_of(tmp_path / "a", [*dead, server.url("image/1.jpg")])
    found = collect(listing, tmp_path / "some", server, n_images=9)
    assert found.summary.startswith("All 4 links were tried: 3 are dead (75%)") and found.n_images == 1
    for _ in range(2):  # the second time from what is written down
        with pytest.raises(FetchError, match="no link gave an image: dead 3"):
            collect(listing_of(tmp_path / "b", dead), tmp_path / "none", server, n_images=9)


@pytest.mark.parametrize("code", [socket.EAI_AGAIN, socket.EAI_NONAME])
def test_a_network_that_is_gone_is_not_written_down_as_dead_links(tmp_path, monkeypatch, server, code):
    monkeypatch.setattr(fetch, "ALL_SILENT", 5)
    listing = listing_of(tmp_path, [server.url(f"image/n{i}.jpg") for i in range(20)])

    def no_network(*args, **more):
        raise socket.gaierror(code, "no name resolution")

    with monkeypatch.context() as gone:
        gone.setattr(socket, "getaddrinfo", no_network)
        with pytest.raises(FetchError, match="5 links in a row did not answer .* is there a network"):
            collect(listing, tmp_path / "out", server)
    assert collect(listing, tmp_path / "out", server).n_images == 20


def test_few_at_once_of_one_host(tmp_path):
    with Loopback(pause=0.05) as server:
        found = collect(listing_of(tmp_path, [server.url(f"slow/h{i}.jpg") for i in range(20)]), tmp_path / "o", server)
        assert found.n_images == 20 and server.most == fetch.PER_HOST


# Whole shards -------------------------------------------------------------------------------------------------------


def shard_of(file, names):
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            (file.parent / name).write_bytes(picture(name))
            tar.add(file.parent / name, name)
            (file.parent / name).unlink()
    return file


@pytest.fixture
def mirror(tmp_path, server):
    """Three shards of four images each: two on the server, one here."""
    for i in range(3):
        file = shard_of(tmp_path / f"{i}.tar", [f"{i}{j}.jpg" for j in range(4)])
        server.files[file.name] = file.read_bytes()
    return tmp_path


def test_shards_until_there_are_enough_and_a_manifest_of_them(mirror, server):
    there, dead, last = (server.url(path) for path in ("data/0.tar", "status/404", "data/2.tar"))
    listing = listing_of(mirror, [there, "# a remark", dead, "1.tar", "gone.tar", last], "list.txt")
    out = mirror / "out"
    found = collect(listing, out, server, n_images=7)
    assert (found.n_images, found.n_tried, found.n_links) == (8, 3, 5) and found.summary.startswith("3 of 5 shards")
    assert set(shards(out)) == {"0.tar", "1.tar"}
    assert len(manifests.build(out, n_images=7, seed=0).images) == 7
    before = server.seen.copy()
    collect(listing, out, server, n_images=8)
    assert server.seen == before
    found = collect(listing, out, server)
    assert found.n_images == 12 and found.outcomes.set_index("outcome")["n"].to_dict() == {"fetched": 3, "dead": 2}
    assert all(found == digest(server.files[name]) for name, found in shards(out).items())


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_off_goes_on_where_it_was(mirror, server, monkeypatch, ranges):
    monkeypatch.setattr(server, "ranges", ranges)
    server.cut_after = 5000
    out = mirror / "out"
    collect(listing_of(mirror, [server.url("data/0.tar")], "list.txt"), out, server)
    assert shards(out) == {"0.tar": digest(server.files["0.tar"])}
    assert server.headers["/data/0.tar"]["Range"] == "bytes=5000-"
    assert sorted(path.name for path in out.iterdir()) == [".lock", "0.tar", "fetch.json"]


def test_a_killed_download_goes_on_and_one_of_another_file_starts_again(mirror, server, monkeypatch):
    monkeypatch.setattr(web, "TRIES", 1)
    listing, out = listing_of(mirror, [server.url("data/1.tar")], "list.txt"), mirror / "out"
    server.cut_after = 6000
    with pytest.raises(FetchError, match="broken off after 6,000 of .* call again to go on"):
        collect(listing, out, server)
    assert (out / ".1.tar.partial").stat().st_size == 6000
    server.files["1.tar"] = server.files["2.tar"]  # another file under the same name meanwhile
    collect(listing, out, server)
    assert shards(out)["1.tar"] == digest(server.files["2.tar"])


def test_a_shard_that_cannot_be_reached_today_is_not_given_up(mirror):
    with Loopback() as gone:
        host = gone.host
    listing = listing_of(mirror, [f"http://{host}/data/0.tar"], "list.txt")
    with pytest.raises(FetchError, match="refused; call again to go on"):
        fetch.collect(listing, mirror / "out", n_images=1, seed=0, allow=[host])


def test_names_stay_inside_the_folder_and_what_is_no_shard_is_not_kept(mirror, server):
    server.files["..%2F..%2Fevil"] = server.files["0.tar"]
    server.files["page.tar"] = b"<html>" * 1000
    server.files["cut.tar"] = server.files["0.tar"][:3000]
    server.files["empty.tar"] = bytes(10240)
    names = ["..%2F..%2Fevil", "page.tar", "cut.tar", "empty.tar"]
    urls = [*(server.url(f"data/{name}") for name in names), "ftp://a/b.tar"]
    urls.append(server.url("redirect/302?to=http://10.0.0.1/x.tar"))
    found = collect(listing_of(mirror, urls, "list.txt"), mirror / "out", server)
    rows = json.loads((mirror / "out" / "fetch.json").read_text())["rows"]
    assert {row[0].rpartition("/")[2]: row[2] for row in rows} == {
        "..%2F..%2Fevil": "fetched", "page.tar": "not decodable", "cut.tar": "not decodable", "empty.tar": "wrong type",
        "x.tar": "refused", "b.tar": "refused",
    }  # fmt: skip
    assert list(shards(mirror / "out")) == ["_2F.._2Fevil.tar"] and found.n_images == 4
    assert [path.parent.name for path in mirror.rglob("*evil*")] == ["out"]


def test_the_command(tmp_path, server, capsys):
    assert fetch.main([str(tmp_path / "gone.tsv"), str(tmp_path / "out"), "--n-images", "3"]) == 1
    assert "gone.tsv: cannot be read" in capsys.readouterr().err


def test_no_connection_is_left_open(server, tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: left.append(str(found.exc_value)))
    listing = listing_of(tmp_path, [server.url(f"image/open{i}.jpg") for i in range(60)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        gc.collect()
        left.clear()  # of other tests
        collect(listing, tmp_path / "there", server, n_images=40)
        deadline = time.monotonic() + 10  # what was under way ends in threads of its own
        while any(each.name.startswith("ThreadPool") for each in threading.enumerate()) and time.monotonic() < deadline:
            time.sleep(0.05)
        gc.collect()
    assert left == []
