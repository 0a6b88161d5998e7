"""A web server on 127.0.0.1 that serves images made on the fly, and every fault that a fetcher must survive.

    with Loopback() as server:
        server.url("image/17.jpg")  # a picture of its own for every name: jpg, png, webp, gif
        server.seen["/image/17.jpg"]  # how often it was asked for

Faults, as paths: status/404, then/2/503/image/1.jpg (twice 503, then the image; ?after=1 sends Retry-After), stall,
drip, drip-headers, redirect/302?to=URL, loop, type/html, type/svg, cut, short, declares/999, endless, bomb, bombs,
reset, empty, junk, zipped/x.jpg, zipped-cut, plain/x.jpg, same/x.jpg (one picture under all names), slow/x.jpg,
data/NAME (bytes put into `server.files`, with Range and ETag).
"""

import functools
import gzip
import hashlib
import io
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}
CHUNK = bytes(2**16)
BOMB = gzip.compress(bytes(2**25), 6)


@functools.lru_cache(4096)
def picture(name: str, side: int = 24) -> bytes:
    """The file of an image, of noise that hangs on its name: equal names, equal bytes."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, FORMATS[name.rpartition(".")[2]])
    return out.getvalue()


class Loopback(ThreadingHTTPServer):
    """The server, in threads of this process until the `with` ends."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *, side: int = 24, pause: float = 0.2):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.side, self.pause = side, pause
        self.host = f"127.0.0.1:{self.server_port}"
        """As `allow` of `clipshift_core.fetch.collect` wants it."""
        self.seen: Counter[str] = Counter()
        """How often each path was asked for."""
        self.headers: dict[str, dict] = {}
        """What was sent with the last request for it."""
        self.files: dict[str, bytes] = {}
        self.cut_after: int | None = None
        """Bytes after which data/ breaks off, once."""
        self.ranges = True
        """Whether data/ knows Range."""
        self.most = 0
        """How many requests were served at once, at most."""
        self.n_served, self.counting, self.closing = 0, threading.Lock(), threading.Event()

    def url(self, path: str) -> str:
        return f"http://{self.host}/{path}"

    def __enter__(self) -> "Loopback":
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that went away is what several faults are about."""


class _Handler(BaseHTTPRequestHandler):
    server: Loopback
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802 (the name that http.server calls)
        server, parts = self.server, urlsplit(self.path)
        with server.counting:
            server.seen[parts.path] += 1
            server.headers[parts.path] = dict(self.headers)
            server.n_served += 1
            server.most = max(server.most, server.n_served)
        try:
            self.route(parts.path.strip("/").split("/"), {k: v[0] for k, v in parse_qs(parts.query).items()})
        finally:
            with server.counting:
                server.n_served -= 1

    def route(self, path: list[str], query: dict[str, str]) -> None:
        match path:
            case ["image", name]:
                self.answer(picture(name, self.server.side), f"image/{name.rpartition('.')[2]}")
            case ["same", _]:
                self.answer(picture("same.png"), "image/png")
            case ["plain", name]:
                self.answer(picture(name), "application/octet-stream")
            case ["slow", name]:
                time.sleep(self.server.pause)
                self.answer(picture(name), "image/jpeg")
            case ["status", code]:
                self.answer(b"no", "text/plain", int(code))
            case ["then", times, code, *rest]:
                if self.server.seen[urlsplit(self.path).path] <= int(times):
                    more = {"Retry-After": query["after"]} if "after" in query else {}
                    self.answer(b"later", "text/plain", int(code), **more)
                else:
                    self.route(rest, query)
            case ["redirect", code]:
                self.answer(b"", "text/plain", int(code), Location=query["to"])
            case ["loop"]:
                self.answer(b"", "text/plain", 302, Location="/loop")
            case ["type", "html"]:
                self.answer(b"<html>gone</html>", "text/html; charset=utf-8")
            case ["type", "svg"]:
                self.answer(b"<svg/>", "image/svg+xml")
            case ["type", "lie"]:
                self.answer(b"<html>gone</html>", "image/jpeg")
            case ["empty"]:
                self.answer(b"", "image/jpeg")
            case ["data", name]:
                self.data(self.server.files[name])
            case _:
                self.fault(path, query)

    def fault(self, path: list[str], query: dict[str, str]) -> None:
        """What breaks the protocol, or the patience."""
        self.close_connection = True
        whole = picture("1.jpg")
        match path:
            case ["stall"]:
                self.server.closing.wait(60)
            case ["drip"]:
                self.start(len(whole))
                self.drip(whole)
            case ["drip-headers"]:
                self.drip(b"HTTP/1.1 200 OK\r\nX-Long: " + bytes(10_000))
            case ["cut"]:
                self.start(len(whole))
                self.wfile.write(whole[: len(whole) // 2])
            case ["short"]:
                self.start(len(whole) // 2)
                self.wfile.write(whole)
            case ["declares", size]:
                self.start(int(size))
                self.wfile.write(whole)
            case ["endless"]:
                self.start(None)
                while not self.server.closing.is_set():
                    self.wfile.write(CHUNK)
            case ["bomb"]:
                self.answer(BOMB, "image/png", 200, **{"Content-Encoding": "gzip"})
            case ["bombs"]:
                self.answer(gzip.compress(BOMB), "image/png", 200, **{"Content-Encoding": "gzip, gzip"})
            case ["zipped", name]:
                self.answer(gzip.compress(picture(name)), "image/jpeg", 200, **{"Content-Encoding": "gzip"})
            case ["zipped-cut"]:
                self.answer(gzip.compress(whole)[:-20], "image/jpeg", 200, **{"Content-Encoding": "gzip"})
            case ["reset"]:
                linger = struct.pack("ii", 1, 0)  # close at once, with a RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
            case ["junk"]:
                self.wfile.write(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
            case _:
                self.answer(b"no such path", "text/plain", 404)

    def answer(self, body: bytes, kind: str, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def start(self, length: int | None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def drip(self, data: bytes) -> None:
        for i in range(len(data)):
            self.wfile.write(data[i : i + 1])
            if self.server.closing.wait(self.server.pause):
                return

    def data(self, body: bytes) -> None:
        """A file, from where it is asked for; breaks off after `cut_after` bytes, the first time."""
        first, tag = 0, f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        wanted = self.headers.get("Range", "")
        if self.server.ranges and wanted.startswith("bytes=") and self.headers.get("If-Range", tag) == tag:
            first = int(wanted[6:].rstrip("-"))
        if first >= len(body) > 0:
            return self.answer(b"", "text/plain", 416)
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body) - first))
        self.send_header("ETag", tag)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        cut, self.server.cut_after = self.server.cut_after, None
        self.wfile.write(body[first:] if cut is None else body[first : first + cut])
        self.close_connection = cut is not None
