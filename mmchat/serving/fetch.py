"""Media at remote addresses, for servers that allow some domains: one checked address, no redirects, bounded.

The address that is checked is the one that is connected to, so a name that resolves to something else a moment later
(DNS rebinding) gains nothing. HTTP is spoken through h11, which uvicorn brings.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

import h11

from mmchat.serving.errors import ApiError
from mmchat.serving.limits import Limits

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
_DEFAULT_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")  # RFC 3986
_ALLOWED = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?(?::[0-9]{1,5})?")


def is_public(address: Address) -> bool:
    """Whether an address belongs to the open internet, also where it wraps one of IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        # Tunnels and translators end at an IPv4 address that this machine cannot see through.
        if address.sixtofour is not None or address.teredo is not None or any(address in net for net in _NAT64):
            return False
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def read_domains(text: str) -> frozenset[str]:
    """The names of --allow-media-domains, `a.org,b.org:8443`. Raises ValueError."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if not _ALLOWED.fullmatch(name):
            raise ValueError(f"found media domain {name!r}; wanted exact names such as a.org,media.b.org")
    if not names:
        raise ValueError("found no media domain; wanted exact names such as a.org,media.b.org")
    return frozenset(names)


class Fetcher:
    """Gets files from allowed domains.

    Args:
        domains: exact host names, with a port where it is not the scheme's own; none: every address is refused.
        is_allowed: judges each address that a name resolves to.
    """

    def __init__(
        self, domains: Collection[str], limits: Limits, is_allowed: Callable[[Address], bool] = is_public
    ) -> None:
        self.domains = frozenset(domains)
        self.limits = limits
        self.is_allowed = is_allowed
        self._tls = ssl.create_default_context() if domains else None

    async def get(self, url: str, param: str, hold: Callable[[int], None]) -> bytes:
        """The file at an address. Raises ApiError; `param` says which field of the request named it.

        hold: is told of the bytes as they come, and may refuse them by an ApiError.
        """
        secure, host, port, target, authority = self._split(url, param)
        try:
            async with asyncio.timeout(self.limits.fetch_timeout_s):
                addresses = await self._resolve(host, port, param)
                reader, writer = await self._connect(addresses, port, host if secure else None)
                try:
                    return await self._exchange(reader, writer, authority, target, param, hold)
                finally:
                    writer.transport.abort()
        except TimeoutError:
            raise _refused(param, f"it took over {self.limits.fetch_timeout_s:g} s", "media_timeout") from None
        except (OSError, h11.ProtocolError):  # ssl.SSLError is an OSError
            raise _refused(param, "it cannot be fetched", "media_unreachable") from None

    def _split(self, url: str, param: str) -> tuple[bool, str, int, str, str]:
        """Whether TLS is spoken, host, port, target and Host header. This is the only parser that sees the address."""
        scheme = url[:8].partition(":")[0].lower()
        if scheme not in _DEFAULT_PORTS:
            raise _refused(param, "wanted data:...;base64,... or an http(s) address", "invalid_url")
        if not self.domains:
            raise _refused(
                param,
                "this server fetches nothing; send the file as data:...;base64,... (its operator can allow domains "
                "with --allow-media-domains)",
                "remote_media_not_allowed",
            )
        # What parsers read differently is refused: blanks, backslashes, a user in front of the host, other scripts.
        if len(url) > 4096 or not _URL.fullmatch(url):
            raise _refused(param, "found an address with characters that addresses do not have", "invalid_url")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or _DEFAULT_PORTS[scheme]
        except ValueError:
            raise _refused(param, "found an address that cannot be read", "invalid_url") from None
        if "@" in parts.netloc:
            raise _refused(param, "found a user in the address; wanted none", "invalid_url")
        authority = host if port == _DEFAULT_PORTS[scheme] else f"{host}:{port}"
        if authority not in self.domains:
            raise _refused(param, "its domain is not among those that this server allows", "domain_not_allowed")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return scheme == "https", host, port, target, authority

    async def _resolve(self, host: str, port: int, param: str) -> list[str]:
        """The addresses of the host, where all of them are allowed."""
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(self.is_allowed(ipaddress.ip_address(a.partition("%")[0])) for a in addresses):
            raise _refused(param, "its domain leads to an address that is not public", "address_not_allowed")
        return addresses

    async def _connect(
        self, addresses: list[str], port: int, tls_name: str | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the first that answers. tls_name: whom its certificate must name; None: without TLS. Raises OSError."""
        tls = None if tls_name is None else self._tls
        for number, address in enumerate(addresses, 1):
            try:
                return await asyncio.open_connection(address, port, ssl=tls, server_hostname=tls_name)
            except OSError:
                if number == len(addresses):
                    raise
        raise OSError("the name has no address")

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        authority: str,
        target: str,
        param: str,
        hold: Callable[[int], None],
    ) -> bytes:
        connection = h11.Connection(h11.CLIENT)
        headers = [("Host", authority), ("User-Agent", "mmchat"), ("Accept-Encoding", "identity")]
        ask = h11.Request(method="GET", target=target, headers=[*headers, ("Connection", "close")])
        writer.write(connection.send(ask) + connection.send(h11.EndOfMessage()))
        body = bytearray()
        while True:
            match connection.next_event():
                case h11.NEED_DATA:
                    connection.receive_data(await reader.read(65536))
                case h11.Response(status_code=status, headers=answered):
                    if 300 <= status < 400:
                        raise _refused(param, "its server redirects, which is not followed", "media_redirected")
                    if status != 200:
                        raise _refused(param, f"its server answered {status}", "media_unreachable")
                    if dict(answered).get(b"content-encoding", b"identity") != b"identity":
                        raise _refused(param, "its server compresses it; wanted it as it is", "media_unreachable")
                case h11.Data(data=data):
                    if len(body) + len(data) > self.limits.fetch_bytes:
                        raise _refused(param, f"it has over {self.limits.fetch_bytes} bytes", "media_too_large")
                    hold(len(data))
                    body += data
                case h11.EndOfMessage():
                    return bytes(body)
                case h11.ConnectionClosed():
                    raise _refused(param, "it cannot be fetched", "media_unreachable")


def _refused(param: str, why: str, code: str) -> ApiError:
    return ApiError(400, f"{param}: {why}", code, param)
