"""Who may ask: the key, as a bearer token or behind a cookie of the login page, the host and the origin."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from mmchat.inference.judge_endpoint import read_key
from mmchat.serving.errors import ApiError

COOKIE = "mmchat"
LOGIN_S = 7 * 24 * 3600
SHORT_KEY = 16

LOGIN_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>mmchat: log in</title>
</head>
<body>
<main>
<h1>mmchat</h1>
<form method="post" action="/login">
<p><label for="key">Key of this server</label></p>
<p><input id="key" name="key" type="password" autocomplete="current-password" required autofocus></p>
<p><button>Log in</button></p>
</form>
<p role="alert">{problem}</p>
</main>
</body>
</html>
"""


def load_key(path: Path) -> tuple[str, list[str]]:
    """The key of a file that holds nothing else, and what its operator should be warned of. Raises ValueError."""
    try:
        key = read_key(path)
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{path}: the key cannot be read ({error.strerror})") from error
    warnings = []
    if mode & 0o077:
        warnings.append(f"{path} can be read by other users of this machine; wanted chmod 600 {path}")
    if len(key) < SHORT_KEY:
        warnings.append(f"the key has {len(key)} characters, which can be guessed; wanted {SHORT_KEY} or more")
    return key, warnings


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Access:
    """Judges requests by their headers; raises ApiError.

    Args:
        key: None: nobody needs one.
        hosts: names that the server is reached by, beside localhost and plain addresses.
    """

    def __init__(self, key: str | None, hosts: Collection[str] = ()) -> None:
        self.key = key
        self.hosts = frozenset(host.lower() for host in hosts)

    def check_host(self, headers: Mapping[str, str]) -> None:
        """Refuses names that are not the server's: a page elsewhere could have its own name lead to this machine."""
        host = _host(headers.get("host", ""))
        if host not in self.hosts and host != "localhost" and not _is_address(host):
            raise ApiError(
                400,
                f"this server does not answer to the name {host[:100]!r}; its operator can allow it: --allow-host NAME",
                "host_not_allowed",
            )

    def check_origin(self, headers: Mapping[str, str], method: str, has_cookie: bool) -> None:
        """Refuses what another site's page sends through the user's browser."""
        if method in ("GET", "HEAD", "OPTIONS"):
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None:
            place = origin.lower().partition("://")[2]
            if place != headers.get("host", "").lower() and _host(place) not in self.hosts:
                raise ApiError(403, "a page of another site may not ask this server", "origin_not_allowed")
        elif site not in (None, "same-origin", "none") or (has_cookie and site is None):
            raise ApiError(403, "a page of another site may not ask this server", "origin_not_allowed")

    def check_key(self, headers: Mapping[str, str]) -> bool:
        """Whether it was the cookie that let the request in. Raises ApiError 401."""
        if self.key is None:
            return False
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            if self.is_key(token.strip()):
                return False
            raise ApiError(401, "Incorrect API key provided.", "invalid_api_key")
        if self._is_login(headers.get("cookie", "")):
            return True
        raise ApiError(401, "You didn't provide an API key: Authorization: Bearer KEY", "invalid_api_key")

    def is_key(self, offered: str) -> bool:
        """Compared by hashes, in the same time whatever is offered."""
        assert self.key is not None
        return hmac.compare_digest(_hash(offered), _hash(self.key))

    def cookie(self, is_secure: bool, now_s: float | None = None) -> str:
        """A Set-Cookie header's value; it does not hold the key, and ends by itself."""
        until = str(int((time.time() if now_s is None else now_s) + LOGIN_S))
        value = f"{until}.{self._signed(until)}"
        secure = "; Secure" if is_secure else ""
        return f"{COOKIE}={value}; Path=/; Max-Age={LOGIN_S}; HttpOnly; SameSite=Strict{secure}"

    def _is_login(self, header: str) -> bool:
        # Not by http.cookies: Pythons before 3.11.10 take a time that grows with the square of a quoted value.
        pairs = (pair.strip().partition("=") for pair in header.split(";"))
        value = next((value for name, _, value in pairs if name == COOKIE), "")
        until, _, signature = value.partition(".")
        if not (until.isascii() and until.isdecimal() and len(until) < 16):
            return False
        return hmac.compare_digest(_hash(signature), _hash(self._signed(until))) and int(until) > time.time()

    def _signed(self, until: str) -> str:
        assert self.key is not None
        return hmac.new(_hash(self.key), f"login until {until}".encode(), hashlib.sha256).hexdigest()


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _host(authority: str) -> str:
    """The host of `host:port`, without the brackets of an IPv6 address."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0].lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
