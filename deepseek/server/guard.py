"""Middleware before every route: checks host, origin, key, body size and readiness."""

import asyncio
import ipaddress
import re
import time
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from urllib.parse import parse_qs

from fastapi import Depends
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek.errors import UserError
from deepseek.server import request_log
from deepseek.server.errors import CLIENT_LEFT, ApiError, as_api_error
from deepseek.server.keys import Permissions, permissions_of, sessions
from deepseek.server.service import Service

OPEN_PATHS = {"/health", "/ready"}
UPLOAD_PATH = "/v1/experts/upload"
LOGIN_PATH = "/login"
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
BODY_SECONDS = 30.0
"""Time limit for receiving a body, plus one second for each `BODY_RATE` bytes."""

BODY_RATE = 1 << 16

MAX_FORM = 1 << 14
"""Maximum size of the login form in bytes."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
REQUEST_IDS = ("x-request-id", "request-id")
"""Headers with the id of a request, as OpenAI's and Anthropic's clients read it."""

REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
LOGIN_PAGE = Path(__file__).parent / "static" / "login.html"
ALERT = '<p role="alert">That key is not one of this server\'s; check it.</p>'
"""Line of the login page after a wrong key."""


class Guard:
    """ASGI middleware around the whole application.

    It refuses requests with a foreign host or origin, a wrong key, or a body that is too large or
    too slow, and adds security headers to every reply.

    Args:
        app: the wrapped application.
        service: the server's state.
        computing: paths whose POST requests are refused while the engine's queue is full, before
            their bodies are read; refusing one under overload costs next to nothing.
        paths: paths of all routes; a request that is refused here is logged under its path if that
            is one of them.
    """

    def __init__(
        self, app: ASGIApp, service: Service, computing: frozenset[str], paths: frozenset[str]
    ) -> None:
        self.app = app
        self.service = service
        self.computing = computing
        self.paths = paths
        settings = service.settings
        self.keys = [
            *((key, Permissions("admin")) for key in settings.admin_keys),
            *(
                (key, Permissions("user", settings.key_experts.get(key)))
                for key in settings.api_keys
            ),
        ]
        # Browsers send a cookie to all ports of a host, so each server has a name of its own.
        self.cookie = f"deepseek_{sha256(settings.secret.encode()).hexdigest()[:16]}"
        self.sessions = sessions(settings.secret, [permissions for _, permissions in self.keys])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        identity = request_id(Headers(scope=scope))
        status = 0
        is_complete = False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                for name in REQUEST_IDS:
                    headers[name] = identity
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body")

        self.service.active += 1
        try:
            await self._guarded(scope, receive, send_with_headers)
            status = status or CLIENT_LEFT  # nothing failed, and nothing was sent
        finally:
            status = status or 500
            self.service.active -= 1
            path = str(scope["path"])
            # A request that was refused here has not been routed.
            unrouted = path if path in self.paths else "other"
            route = str(getattr(scope.get("route"), "path", unrouted))
            seconds = time.perf_counter() - started
            self.service.metrics.replied(route, status, seconds)
            reply = request_log.Answered(status, seconds, is_complete, identity)
            usage = scope.get("state", {}).get("usage")
            request_log.write(scope["method"], route, reply, usage)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request to the application, or answer it here."""
        settings = self.service.settings
        limits = {UPLOAD_PATH: settings.max_upload, LOGIN_PATH: MAX_FORM}
        body = LimitedBody(receive, limits.get(scope["path"], settings.max_body))
        try:
            answer = await self._checked(scope, body)
        except (ApiError, UserError, HTTPException) as error:
            answer = as_api_error(error).response(scope["path"])
        await (
            self.app(scope, body.receive, send) if answer is None else answer(scope, receive, send)
        )

    async def _checked(self, scope: Scope, body: "LimitedBody") -> Response | None:
        """Check a request; return the reply if no route needs to answer it, else None.

        Raises:
            ApiError, UserError, HTTPException: the request is refused.
        """
        headers = Headers(scope=scope)
        path = scope["path"]
        method = scope["method"]
        check_host(headers, self.service)
        if method not in SAFE_METHODS:
            check_origin(headers, self.service)
        else:
            check_no_body(headers, method)
        check_length(headers, body.limit)
        if path == LOGIN_PATH:
            return self._login(await body.whole()) if method == "POST" else RedirectResponse("/")
        permissions = self._permissions(headers)
        scope.setdefault("state", {})["permissions"] = permissions
        if permissions is None and path not in OPEN_PATHS:
            if path == "/" and method in ("GET", "HEAD"):
                return login_page()
            raise ApiError(
                401,
                "The API key is missing or wrong; send 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
            )
        refusal = self.service.refusal
        if refusal is not None and (
            path in self.computing or path.startswith("/v1/") or path == "/tokenizer_info"
        ):
            raise refusal
        if method == "POST" and path in self.computing:
            self.service.engine.check_open()
        return None

    def _permissions(self, headers: Headers) -> Permissions | None:
        """Return the permissions of a request's sender, None without a valid key."""
        if not self.keys:
            return Permissions("admin")
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return permissions_of(key.strip(), self.keys)
        if "x-api-key" in headers:  # Anthropic's client
            return permissions_of(headers["x-api-key"].strip(), self.keys)
        session = re.search(rf"(?:^|; *){self.cookie}=([^;]*)", headers.get("cookie", ""))
        return permissions_of(session[1], self.sessions) if session else None

    def _login(self, form: bytes) -> Response:
        """Exchange the key in the login form for a session cookie, which scripts cannot read."""
        key = parse_qs(form.decode("utf-8", "replace")).get("key", [""])[0].strip()
        permissions = permissions_of(key, self.keys)
        if permissions is None:
            return login_page(refused=True)
        session = next(token for token, owner in self.sessions if owner == permissions)
        response = RedirectResponse("/", 303)
        response.set_cookie(self.cookie, session, httponly=True, samesite="strict")
        return response


class LimitedBody:
    """The body of a request, limited in size and time.

    It must arrive within `BODY_SECONDS`, plus a second for each `BODY_RATE` bytes received.

    Args:
        receive: ASGI's `receive`.
        limit: most bytes.
    """

    def __init__(self, receive: Receive, limit: int) -> None:
        self.limit = limit
        self._receive = receive
        self._size = 0
        self._complete = False
        self._started = time.monotonic()

    async def receive(self) -> Message:
        """Return the next ASGI message.

        Raises:
            HTTPException: the body is too long or too slow. FastAPI passes this type through while
                it reads a body; an `ApiError` would become another error there.
        """
        if self._complete:
            return await self._receive()
        deadline = self._started + BODY_SECONDS + self._size / BODY_RATE
        try:
            message = await asyncio.wait_for(self._receive(), deadline - time.monotonic())
        except TimeoutError:
            raise HTTPException(408, "the body came too slowly") from None
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self.limit:
            raise HTTPException(413, f"the body is longer than {self.limit} bytes")
        return message

    async def whole(self) -> bytes:
        """Return the whole body."""
        body = b""
        while not self._complete:
            body += (await self.receive()).get("body", b"")
        return body


def request_id(headers: Headers) -> str:
    """Return the id of a request: the one that it brings, so that a proxy's log and this server's
    agree, or a new one.
    """
    given = headers.get(REQUEST_IDS[0], "")
    return given if REQUEST_ID.fullmatch(given) else f"req_{token_hex(12)}"


def check_host(headers: Headers, service: Service) -> None:
    """Raise `ApiError` for a foreign `Host`, which protects against DNS rebinding, unless the
    settings accept every one ("*").

    In such an attack, a page on the attacker's domain reaches this server because that domain
    resolves to the server's address. An IP address cannot be rebound, so it is always accepted.
    """
    found = re.match(r"\[([^\]]*)\]|[^:]*", headers.get("host", ""))
    name = (found[1] or found[0]).lower() if found else ""
    settings = service.settings
    known = {accepted.lower() for accepted in ("localhost", settings.host, *settings.hosts)}
    if "*" not in known and name not in known and not is_address(name):
        raise ApiError(
            421,
            f"This server is not {name!r:.100}; start it with --allow-host to accept this name.",
            code="foreign_host",
        )


def is_address(name: str) -> bool:
    """Whether `name` is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach what listens on `host`."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def check_origin(headers: Headers, service: Service) -> None:
    """Raise `ApiError` for requests from pages of sites that are not allowed. Programs other than
    browsers send no `Origin`.
    """
    origin = headers.get("origin")
    allowed = service.settings.origins
    if origin is None or origin.partition("://")[2] == headers.get("host"):
        return
    if not allowed & {origin, "*"}:
        raise foreign_origin(origin)


def foreign_origin(origin: str) -> ApiError:
    """Return the error for a request from a page of a site that is not allowed."""
    return ApiError(
        403,
        f"Pages of {origin!r:.100} must not send requests here; start the server with "
        "--allow-origin to accept them.",
        code="foreign_origin",
    )


def check_length(headers: Headers, limit: int) -> None:
    """Raise `ApiError` for a body whose `Content-Length` is above `limit` bytes."""
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > limit:
        raise ApiError(413, f"The body is longer than {limit} bytes.", code="too_large")


def check_no_body(headers: Headers, method: str) -> None:
    """Raise `ApiError` for a body that the route does not read: it would never be received in
    full.
    """
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise ApiError(400, f"A {method} request has no body here; leave it out.")


def login_page(refused: bool = False) -> Response:
    """Return the login page with status 401.

    Args:
        refused: whether it says that the key is not one of this server's.
    """
    policy = {
        "Content-Security-Policy": POLICY.replace("style-src 'self'", "style-src 'unsafe-inline'")
    }
    page = LOGIN_PAGE.read_text(encoding="utf-8")
    return HTMLResponse(page.replace(ALERT, ALERT if refused else ""), 401, policy)


def require_admin(request: HttpRequest) -> None:
    """Raise `ApiError` (403) unless the request has the admin role."""
    if request.state.permissions.role != "admin":
        raise ApiError(
            403,
            "This is for administrators only; use the admin key (--admin-key-file).",
            code="admin_only",
        )


ADMIN = Depends(require_admin)
