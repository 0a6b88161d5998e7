"""One answer of a web server that is not to be trusted: from a public address only, bounded in time and in bytes.

Every address that a host resolves to must be public, and the very address that was looked at is connected to, on each
redirect anew. Proxies of the environment are not used: behind one, nobody could look. On httpcore, the wire of httpx:
httpx itself has no place to look at an address before it connects.
"""

import ipaddress
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any

import httpcore
import httpx

from clipshift_core import __version__
from clipshift_core.conceptual import DEAD, FetchError

CONNECT, SILENCE, TOTAL = 10.0, 15.0, 60.0
"""Seconds to connect, between two pieces of an answer, and for one image with all its redirects and tries."""
TRIES, BACKOFF, LONGEST_WAIT = 3, 1.0, 20.0
"""After 429, 503, a timeout or a reset: tries, seconds before the second (3 times as long before the third), and the
longest Retry-After that is waited for."""
REDIRECTS = 5
AGENT = f"clipshift/{__version__} (research; +project)"

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


class Fault(Exception):
    """Why a link gave nothing. kind: of `conceptual.OUTCOMES`; retry: the seconds after which another try may help, 0
    for as long as usual, None if none will."""

    def __init__(self, kind: str, reason: str, status: int | None = None, retry: float | None = None):
        super().__init__(reason)
        self.kind, self.status, self.retry = kind, status, retry


class Web:
    """Connections to public addresses, with a limit in time for what a thread does."""

    def __init__(self, allow: Sequence[str], connections: int):
        self.backend = _Checked(frozenset(allow))
        self.pool = httpcore.ConnectionPool(
            httpx.create_ssl_context(),
            max_connections=connections,
            keepalive_expiry=5,
            network_backend=self.backend,
        )
        self.limit = self.backend.limit

    def stop(self) -> None:
        """Ends all waiting, and closes every connection."""
        self.backend.stop()
        self.pool.close()

    def tried(self, act: Callable[[], Any]) -> Any:
        """What `act` returns, at the third try if it must be."""
        for attempt in range(1, TRIES + 1):
            try:
                with self._explained():
                    return act()
            except Fault as fault:
                wait = fault.retry or BACKOFF * 3 ** (attempt - 1)
                if fault.retry is None or attempt == TRIES or wait > min(LONGEST_WAIT, self.backend.remaining()):
                    raise
                self.backend.stopped.wait(wait)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever goes wrong between us and a server, as a Fault."""
        try:
            yield
        except (Fault, FetchError):
            raise
        except httpcore.TimeoutException as error:
            if self.backend.remaining() <= 0:
                raise Fault("timed out", f"not whole within {TOTAL:g} s") from None
            said = f"no connection within {CONNECT:g} s" if isinstance(error, httpcore.ConnectTimeout) else None
            raise Fault("timed out", said or f"silent for {SILENCE:g} s", retry=0) from None
        except (httpcore.ReadError, httpcore.WriteError) as error:
            raise Fault("unreachable", f"the connection broke: {error}", retry=0) from None
        except Exception as error:  # junk in the place of HTTP or of an address raises many types
            said, retry = " ".join(str(error).split())[:120], 0 if "disconnected" in str(error) else None
            raise Fault("unreachable", said or type(error).__name__, retry=retry) from None

    @contextmanager
    def answer(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[httpcore.Response]:
        """The answer after all redirects, if it is a good one, its body not read yet."""
        here = httpx.URL(url)
        sent = {"User-Agent": AGENT, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"} | dict(headers or {})
        timeout = dict(connect=CONNECT, read=SILENCE, write=SILENCE, pool=TOTAL)
        for _ in range(REDIRECTS + 1):
            if here.scheme not in ("http", "https") or not here.host:
                raise Fault("refused", f"{str(here)[:80]} is no http(s) address")
            to = httpcore.URL(scheme=here.raw_scheme, host=here.raw_host, port=here.port, target=here.raw_path)
            host = {"Host": here.netloc.decode("ascii")}
            with self.pool.stream("GET", to, headers=host | sent, extensions={"timeout": timeout}) as response:
                location = header(response, "location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    here = here.join(location)
                    continue
                _good(response)
                yield response
                return
        raise Fault("redirects", f"more than {REDIRECTS} redirects")

    def body(self, response: httpcore.Response, limit: int) -> Iterator[bytes]:
        """Pieces of a body, unpacked, `limit` bytes in all."""
        packed, declared = header(response, "content-encoding").lower(), header(response, "content-length")
        if packed not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise Fault("not decodable", f"packed by {packed}, which was not asked for", response.status)
        if declared.isdigit() and int(declared) > limit:
            raise Fault("too large", f"declares {int(declared):,} bytes; {limit:,} are read", response.status)
        unpack = zlib.decompressobj(zlib.MAX_WBITS | 32) if packed not in ("", "identity") else None
        n = 0
        try:
            for chunk in response.iter_stream():
                piece = unpack.decompress(chunk, limit + 1 - n) if unpack else chunk
                n += len(piece)
                if n > limit:
                    raise Fault("too large", f"more than the {limit:,} bytes that are read", response.status)
                yield piece
        except (httpcore.RemoteProtocolError, httpcore.ReadError) as error:
            reset = 0 if isinstance(error, httpcore.ReadError) else None
            raise Fault("truncated", f"broken off after {n:,} of {declared or '?'} bytes", 200, reset) from None
        except zlib.error as error:
            raise Fault("not decodable", f"damaged {packed}: {error}", response.status) from None
        if unpack and not unpack.eof:
            raise Fault("truncated", f"its {packed} ends early", response.status)


def _good(response: httpcore.Response) -> None:
    status, retry = response.status, None
    if status in (429, 503):
        after, retry = header(response, "retry-after"), 0.0
        if after.isdigit():
            retry = float(after)
        elif after:
            with suppress(ValueError, TypeError, OverflowError):
                retry = max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    if status not in (200, 203, 206):
        asks = f", asks to wait {retry:,.0f} s" if retry else ""
        raise Fault(DEAD if status in (404, 410) else "http error", f"HTTP {status}{asks}", status, retry)


def header(response: httpcore.Response, name: str) -> str:
    values = [value for key, value in response.headers if key.lower() == name.encode()]
    return values[0].decode("utf-8", "replace").strip() if values else ""


class _Checked(httpcore.NetworkBackend):
    """Resolves, looks at the addresses, and connects to what was looked at; one limit in time for each thread."""

    def __init__(self, allow: frozenset[str]):
        self.allow, self.stopped = allow, threading.Event()
        self.inner, self.local = httpcore.SyncBackend(), threading.local()
        self.open: set[_Stream] = set()

    def limit(self, seconds: float) -> None:
        self.local.until = time.monotonic() + seconds

    def remaining(self) -> float:
        return 0.0 if self.stopped.is_set() else self.local.until - time.monotonic()

    def within(self, seconds: float | None) -> float:
        left = self.remaining()
        if left <= 0:
            raise httpcore.ReadTimeout("the time is over")
        return left if seconds is None else min(seconds, left)

    def connect_tcp(self, host: str, port: int, timeout=None, local_address=None, socket_options=None) -> "_Stream":
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                raise Fault("unreachable", f"no name server answers for {host}") from None
            raise Fault(DEAD, f"no such host: {host}") from None
        except UnicodeError:
            raise Fault(DEAD, f"no such host: {host[:80]}") from None
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        if (f"[{host}]:{port}" if ":" in host else f"{host}:{port}") not in self.allow:
            for address in addresses:
                if not is_public(address):
                    where = address if host == address else f"{host}, {address},"
                    raise Fault("refused", f"{where} is not a public address")
        for address in addresses[:3]:
            try:
                inner = self.inner.connect_tcp(address, port, self.within(timeout), socket_options=socket_options)
                break
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as failed:
                error = failed
        else:
            raise error
        return _Stream(inner, self)

    def stop(self) -> None:
        """Ends what other threads still wait for."""
        self.stopped.set()
        for stream in list(self.open):
            with suppress(OSError):
                stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


class _Stream(httpcore.NetworkStream):
    """A connection on which a wait ends with the thread's limit."""

    def __init__(self, inner: httpcore.NetworkStream, backend: _Checked):
        self.inner, self.backend, self.get_extra_info = inner, backend, inner.get_extra_info
        backend.open.add(self)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.inner.read(max_bytes, self.backend.within(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.inner.write(buffer, self.backend.within(timeout))

    def close(self) -> None:
        self.backend.open.discard(self)
        self.inner.close()

    def start_tls(self, ssl_context, server_hostname=None, timeout=None) -> "_Stream":
        self.backend.open.discard(self)
        return _Stream(self.inner.start_tls(ssl_context, server_hostname, self.backend.within(timeout)), self.backend)


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet at large; one of IPv6 that stands for one of IPv4 counts as that."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        four = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            four = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        if four:
            return is_public(str(four))
        return ip.is_global and ip in _GLOBAL_UNICAST
    return ip.is_global and not ip.is_multicast and not ip.is_reserved
