"""Files from remote addresses: what is fetched, and what is refused. The other side is a real server."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from mmchat.serving.errors import ApiError
from mmchat.serving.fetch import Fetcher, is_public, read_domains
from mmchat.serving.limits import Limits
from tests.range_server import RangeServer, serving

LIMITS = Limits(fetch_bytes=50_000, fetch_timeout_s=20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RangeServer]:
    folder = tmp_path_factory.mktemp("media")
    (folder / "small.png").write_bytes(b"small" * 1000)
    (folder / "large.png").write_bytes(b"x" * 60_000)
    with serving(folder) as running:
        yield running


def no_matter(count: int) -> None:
    pass


def fetch(
    domain: str, url: str, limits: Limits = LIMITS, hold: Callable[[int], None] = no_matter, **options: object
) -> bytes:
    return asyncio.run(Fetcher({domain}, limits, **options).get(url, "url", hold))  # type: ignore[arg-type]


def refusal(domain: str, url: str, limits: Limits = LIMITS, **options: object) -> str | None:
    with pytest.raises(ApiError) as refused:
        fetch(domain, url, limits, **options)
    assert refused.value.status == 400 and refused.value.param == "url"
    return refused.value.code


def anywhere(address: object) -> bool:
    return True


def test_a_file_of_an_allowed_domain(server: RangeServer) -> None:
    domain = f"localhost:{server.server_port}"
    assert fetch(domain, f"HTTP://LOCALHOST:{server.server_port}/small.png", is_allowed=anywhere) == b"small" * 1000


def test_a_file_that_there_is_no_room_for_is_not_read_to_its_end(server: RangeServer) -> None:
    """Files that many requests fetch at one time count as they come, not when they are there."""
    held: list[int] = []

    def hold(count: int) -> None:
        held.append(count)
        if sum(held) > 1000:
            raise ApiError(503, "full")

    domain = f"localhost:{server.server_port}"
    with pytest.raises(ApiError, match="full"):
        fetch(domain, f"http://{domain}/small.png", hold=hold, is_allowed=anywhere)
    held[:] = [-9000]
    assert len(fetch(domain, f"http://{domain}/small.png", hold=hold, is_allowed=anywhere)) == sum(held) + 9000


def test_this_machine_is_never_asked_however_it_is_called(server: RangeServer) -> None:
    """An operator who allows such names still does not open this machine: the addresses are judged."""
    before = len(server.requests)
    port = server.server_port
    for host in ("localhost", "127.0.0.1", "0x7f.1", "2130706433", "0177.0.0.1", "127.1"):
        assert refusal(f"{host}:{port}", f"http://{host}:{port}/small.png") in (
            "address_not_allowed", "media_unreachable", "invalid_url"
        ), host  # fmt: skip
    assert len(server.requests) == before


def test_what_is_not_fetched(server: RangeServer) -> None:
    port = server.server_port
    domain = f"localhost:{port}"
    base = f"http://{domain}"
    server.fail["/moved.png"] = [302, 302]
    assert refusal(domain, f"{base}/moved.png", is_allowed=anywhere) == "media_redirected"
    assert refusal(domain, f"{base}/absent.png", is_allowed=anywhere) == "media_unreachable"
    assert refusal(domain, f"{base}/large.png", is_allowed=anywhere) == "media_too_large"
    server.fail["/cut.png"] = [0]
    assert refusal(domain, f"{base}/cut.png", is_allowed=anywhere) == "media_unreachable"
    before = len(server.requests)
    for url, code in {
        f"http://a.org:{port}/small.png": "domain_not_allowed",
        f"http://localhost.:{port}/small.png": "domain_not_allowed",
        "http://localhost/small.png": "domain_not_allowed",
        f"http://{domain}@a.org/small.png": "invalid_url",
        f"http://a.org\\@{domain}/small.png": "invalid_url",
        f"http://{domain}/a b": "invalid_url",
        f"http://{domain}/\r\nHost: a.org": "invalid_url",
        f"http://loc\u0430lhost:{port}/": "invalid_url",
        "http://[::1": "invalid_url",
        "http://localhost:99999999/": "invalid_url",
        f"ftp://{domain}/small.png": "invalid_url",
        f"file://{domain}/etc/passwd": "invalid_url",
        f"//{domain}/small.png": "invalid_url",
    }.items():
        assert refusal(domain, url, is_allowed=anywhere) == code, url
    assert len(server.requests) == before


def test_without_domains_nothing_is_fetched(server: RangeServer) -> None:
    with pytest.raises(ApiError, match="--allow-media-domains") as refused:
        asyncio.run(
            Fetcher((), LIMITS, anywhere).get(f"http://localhost:{server.server_port}/small.png", "url", no_matter)
        )
    assert refused.value.code == "remote_media_not_allowed"


def test_a_server_that_is_slow_on_purpose() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    accepted: list[object] = []  # and never answered
    threading.Thread(target=lambda: accepted.append(listening.accept()), daemon=True).start()
    domain = f"localhost:{listening.getsockname()[1]}"
    limits = Limits(fetch_timeout_s=0.3)
    assert refusal(domain, f"http://{domain}/", limits, is_allowed=anywhere) == "media_timeout"
    listening.close()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("192.0.2.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) == public


def test_domains_are_exact_names() -> None:
    assert read_domains("A.org, media.b.org:8443") == {"a.org", "media.b.org:8443"}
    for text in ("", "*.a.org", "http://a.org", "a.org/x"):
        with pytest.raises(ValueError, match="wanted exact names"):
            read_domains(text)
