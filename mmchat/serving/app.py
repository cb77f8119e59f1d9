"""The routes of a server, and the gate in front of them: ids, keys, hosts, counts and a log line for each request.

Nothing of what is asked or answered is logged. docs/serving.md describes the routes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmchat.serving.access import LOGIN_PAGE
from mmchat.serving.chat import complete
from mmchat.serving.errors import ApiError, internal
from mmchat.serving.openapi import COMPLETION, ERRORS, describe
from mmchat.serving.service import Call, Service

_LOG = logging.getLogger("mmchat.serving")
_PAGE = Path(__file__).parent / "page"
_PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_CHAT = "/v1/chat/completions"
_ROUTES = ("/", "/health", "/ready", "/metrics", "/login", "/openapi.json", "/v1/models", _CHAT)
_QUIET = ("/health", "/ready", "/metrics")
_LOGIN_BYTES = 4096
_CLIENT_GONE = 499  # nginx's number; nobody is there to read it
# The page loads its own files alone; pictures, sounds and clips that the user chose are blobs or data of the page.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob: data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(self)",
    # no-referrer would make a browser send the login form with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def build_app(service: Service) -> ASGIApp:
    """The whole server as an ASGI application."""
    app = FastAPI(title="mmchat", docs_url=None, redoc_url=None, openapi_url=None)
    _add_api(app, service)
    _add_page(app, service)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(StarletteHTTPException, _told)
    app.add_exception_handler(ClientDisconnect, _unheard)
    app.add_exception_handler(Exception, _told)
    describe(app, service.access.key is not None)
    return _Gate(app, service)


def _add_api(app: FastAPI, service: Service) -> None:
    @app.post(_CHAT, responses={200: COMPLETION, **ERRORS}, summary="Answer a conversation")
    async def chat(request: Request) -> Response:
        return await complete(service, request)

    @app.get("/v1/models", responses=ERRORS, summary="The one model, and what it may be asked")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.described()]}

    @app.get("/v1/models/{model_id}", responses=ERRORS, summary="The one model by its id")
    async def model(model_id: str) -> dict[str, Any]:
        described = service.described()
        if model_id != described["id"]:
            raise ApiError(404, f"there is no model of that name here, only {described['id']!r}", "model_not_found")
        return described

    @app.get("/health", summary="Whether the process lives; needs no key")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses=ERRORS, summary="Whether questions are answered")
    async def ready() -> dict[str, str]:
        _ = service.model
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, summary="Counts for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": service.metrics.content_type})

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return app.openapi()


def _add_page(app: FastAPI, service: Service) -> None:
    files = _page_files()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _file(files, "index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return _file(files, name)

    @app.post("/login", include_in_schema=False)
    async def login(request: Request) -> Response:
        if service.access.key is None:
            return RedirectResponse("/", 303)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _LOGIN_BYTES:
                raise ApiError(413, f"the form is too large; wanted up to {_LOGIN_BYTES} bytes")
        offered = parse_qs(body.decode(errors="replace")).get("key", [""])[0]
        if not service.access.is_key(offered.strip()):
            return _login_page("This is not the key.")
        cookie = service.access.cookie(is_secure=request.url.scheme == "https")
        return RedirectResponse("/", 303, headers={"Set-Cookie": cookie})


def _page_files() -> dict[str, tuple[bytes, str]]:
    """The page's files by name, with their types: a request's path is never a path on this machine."""
    found = [path for path in _PAGE.iterdir() if path.suffix in _PAGE_TYPES] if _PAGE.is_dir() else []
    return {path.name: (path.read_bytes(), _PAGE_TYPES[path.suffix]) for path in found}


def _file(files: Mapping[str, tuple[bytes, str]], name: str) -> Response:
    if name not in files:
        raise ApiError(404, "there is no such file of the page")
    content, kind = files[name]
    return Response(content, headers={"Content-Type": kind, "Cache-Control": "no-cache"})


def _login_page(problem: str = "") -> Response:
    return HTMLResponse(LOGIN_PAGE.replace("{problem}", problem), 401, headers={"WWW-Authenticate": "Bearer"})


async def _told(request: Request, error: Exception) -> Response:
    """Any exception as an error object; one that is no refusal comes to the gate as well, which logs it."""
    headers: Mapping[str, str] = {}
    if isinstance(error, StarletteHTTPException):  # no such route, or not by this method
        headers = error.headers or {}
        error = ApiError(error.status_code, f"{request.method} of this path: {error.detail}")
    elif not isinstance(error, ApiError):
        error = internal(request.state.call.id)
    request.state.call.problem = error.code or ""
    return JSONResponse(error.body(), error.status, headers={**headers, **error.headers()})


async def _unheard(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


class _Gate:
    """What every request passes, whatever its route."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = scope.setdefault("state", {})["call"] = Call()
        is_chat = scope["path"] == _CHAT
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in {**_HEADERS, "X-Request-Id": call.id}.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        self.service.num_running += is_chat
        try:
            app = self._refusal(scope) or self.app
            await app(scope, receive, send_with_headers)
        except Exception:
            _LOG.exception("%s failed", call.id)
        finally:
            self.service.num_running -= is_chat
            self.service.holdings.give_back(call.held)
            self._count(scope, call, status)

    def _refusal(self, scope: Scope) -> Response | None:
        """Why a request is not let in; None where it is."""
        headers, path, access = Headers(scope=scope), scope["path"], self.service.access
        if path == "/health":
            return None
        try:
            access.check_host(headers)
            has_cookie = access.check_key(headers) if path != "/login" else False
            access.check_origin(headers, scope["method"], has_cookie)
        except ApiError as error:
            if error.status == 401 and (path == "/" or path.startswith("/page/")):
                return _login_page()
            return JSONResponse(error.body(), error.status, headers=error.headers())
        return None

    def _count(self, scope: Scope, call: Call, status: int) -> None:
        path, metrics = scope["path"], self.service.metrics
        route = path if path in _ROUTES else "other"
        metrics.requests.labels(route, str(status)).inc()
        line = f"{call.id} {scope['method']} {route if route != 'other' else ascii(path[:100])} {status} {call.problem}"
        if call.prompt_tokens or call.finish:
            metrics.request_s.observe(call.seconds)
            line += f"prompt {call.prompt_tokens} (cached {call.cached_tokens}) answer {call.completion_tokens}"
            line += f" {call.finish}"
        if call.first_s is not None:
            metrics.first_s.observe(call.first_s)
            line += f" first {call.first_s:.3f} s"
        _LOG.log(logging.DEBUG if route in _QUIET else logging.INFO, "%s %.3f s", line.strip(), call.seconds)
