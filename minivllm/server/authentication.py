"""The outermost middleware: request ids, API keys, checks of `Host` and `Origin`, HEAD, and a response for errors that no handler caught.

Each valid key is an *owner* with a label: "key1", "key2", ..., "admin1" for administrators, "" if the server has no keys. Requests, their
ids, stored responses, cached prefixes, rows and queue positions belong to an owner.

A web page that the user of a browser visits can send requests to this machine. Two checks keep it from changing anything here:

    Origin, Sec-Fetch-Site   a request that another site's page sends, and that is more than a GET, is refused (`--allowed-origins`)
    Host                     a page whose own name leads to this machine (DNS rebinding) sends that name (`--allowed-hosts`)
"""
from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import uuid
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minivllm.config import ServerConfig
from minivllm.server.errors import ApiError, shorten, to_api_error
from minivllm.server.turns import RequestTurns

OWNER = "minivllm.owner"  # scope key of the owner's label
ADMIN = "minivllm.admin"  # scope key: whether the request may use the endpoints for administrators
RAW_SEND = "minivllm.send"  # scope key of a `send` for body messages that skips the middleware, which only changes headers
REFUSALS_PER_SECOND = 50  # of an owner; further ones are delayed
FREE_OPEN = 16  # open requests of an owner whose refusals are not delayed
MAX_DELAY = 30.0  # seconds
SINGLE_HEADERS = frozenset({b"host", b"authorization", b"origin", b"sec-fetch-site", b"content-type", b"content-encoding"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".lan", ".home.arpa")  # names that no public DNS server gives an address
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_PORT = re.compile(r":\d*$")


@dataclass(frozen=True)
class AccessRules:
    """Which requests are let in, from the server's settings."""

    digests: Mapping[str, bytes]  # by owner: SHA-256 of the key. Empty: requests need no key
    open_paths: Container[str] = ()  # need no key
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # "*": all
    local_names_only: bool = False  # without `hosts`: refuse names that a public DNS server could give

    @classmethod
    def of(cls, config: ServerConfig, open_paths: Container[str] = ()) -> AccessRules:
        digests = {f"key{i}": _digest(key) for i, key in enumerate(config.keys(), 1)}
        digests |= {f"admin{i}": _digest(key) for i, key in enumerate(config.admin_key, 1)}
        return cls(digests, open_paths, config.allowed_origins, config.allowed_hosts, not digests and config.is_local)

    def owner(self, authorization: str) -> str | None:
        """The owner of a bearer token. It is compared with every key, each in constant time, so that the duration reveals no key."""
        scheme, _, token = authorization.partition(" ")
        digest, found = _digest(token.strip()), None
        for owner, known in self.digests.items():
            if hmac.compare_digest(digest, known):
                found = owner
        return found if scheme.lower() == "bearer" else None

    def is_admin(self, owner: str, client: tuple[str, int] | None) -> bool:
        """Administrators have their own keys. Without keys, clients on this machine are administrators. No address: a Unix socket."""
        if self.digests:
            return owner.startswith("admin")
        return client is None or client[0] in ("127.0.0.1", "::1", "::ffff:127.0.0.1")

    def check_host(self, host: str) -> None:
        name = _PORT.sub("", host).strip("[]").lower()
        if self.hosts:
            allowed = "*" in self.hosts or name in self.hosts
        else:
            allowed = not self.local_names_only or "." not in name or name.endswith(LOCAL_SUFFIXES) or _is_address(name)
        if not allowed:
            raise ApiError(403, f"the host {shorten(name)!r} is not a name of this server: start it with --allowed-hosts {shorten(name)}",
                           code="host_not_allowed")

    def check_origin(self, headers: Headers) -> None:
        """Refuse a request of another site's page."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is None and site in (None, "same-origin", "none"):
            return
        if "*" in self.origins or origin in self.origins or site in ("same-origin", "none"):
            return
        if site is None and origin is not None and origin.partition("://")[2] == headers.get("host"):
            return
        raise ApiError(403, f"pages of {shorten(origin or 'another site')} may not send requests that change something here: start the "
                            "server with --allowed-origins", code="origin_not_allowed")


def require_admin(request: Request) -> None:
    """Raise `ApiError` unless an administrator sends the request."""
    if not request.scope[ADMIN]:
        raise ApiError(403, "this endpoint is for administrators: send a key that the server was started with as --admin-key (without "
                            "keys: from the same machine)", code="not_an_administrator")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class RefusalBrake:
    """Sends refusals of an owner that gets very many at no more than a fixed rate.

    Clients that repeat a refused request at once would otherwise take all of the server's time. The rate is kept as in a leaky bucket
    (GCRA): each refusal moves the owner's next time on by 1 / rate, and waits if that is in the future. At most `most_delayed` refusals
    of an owner wait, because each holds a connection; further ones are sent at once, and their connections closed.
    """

    def __init__(self, most_delayed: int) -> None:
        self._most_delayed = most_delayed
        self._delayed: Counter[str] = Counter()  # refusals that wait, by owner
        self._open: Counter[str] = Counter()  # requests by owner
        self._next: dict[str, float] = {}  # by owner: when its next refusal is due, on the event loop's clock

    @contextmanager
    def request(self, owner: str) -> Iterator[None]:
        self._open[owner] += 1
        try:
            yield
        finally:
            self._open[owner] -= 1

    async def delay(self, owner: str) -> bool:
        """Called before a refusal is sent. Returns whether the connection may stay open."""
        now = asyncio.get_running_loop().time()
        due = max(self._next.get(owner, 0.0), now - 1.0) + 1 / REFUSALS_PER_SECOND
        if due <= now or self._open[owner] <= FREE_OPEN:
            self._next[owner] = min(due, now)
            return True
        if self._delayed[owner] >= self._most_delayed:
            return False
        due = self._next[owner] = min(due, now + MAX_DELAY)
        self._delayed[owner] += 1
        try:
            await asyncio.sleep(due - now)
        finally:
            self._delayed[owner] -= 1
        return True


class AuthenticationMiddleware:
    """ASGI middleware that applies `AccessRules`. Every response carries `x-request-id`: the client's own if it sent one."""

    def __init__(self, app: ASGIApp, rules: AccessRules, most_delayed: int) -> None:
        self._app = app
        self._rules = rules
        self._brake = RefusalBrake(most_delayed)
        self._turns = RequestTurns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["method"] == "HEAD":  # the response to GET without its body
            scope, send = {**scope, "method": "GET"}, _head_only(send)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if 400 <= message["status"] < 500 and not await self._brake.delay(scope[OWNER]):
                    MutableHeaders(scope=message)["connection"] = "close"
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            owner = self._let_in(scope, headers)
        except ApiError as refusal:
            scope[OWNER] = ""
            with self._brake.request(""):
                await refusal.response()(scope, receive, send_with_id)
            return
        scope[RAW_SEND] = send
        scope[OWNER], scope[ADMIN] = owner, self._rules.is_admin(owner, scope.get("client"))
        with self._brake.request(owner):
            try:
                await self._turns.wait(owner)
                await self._app(scope, receive, send_with_id)
            except Exception as error:
                if started:
                    raise
                await to_api_error(error).response()(scope, receive, send_with_id)

    def _let_in(self, scope: Scope, headers: Headers) -> str:
        """The owner of a request. Raises `ApiError` if it must not enter."""
        rules = self._rules
        once = [name for name, _ in scope["headers"] if name in SINGLE_HEADERS]
        if len(once) != len(set(once)):  # a proxy may have checked another one of them than this server would read
            name = Counter(once).most_common(1)[0][0].decode()
            raise ApiError(400, f"the header {name} occurs more than once: send it once", code="duplicate_header")
        rules.check_host(headers.get("host", ""))
        if scope["method"] not in SAFE_METHODS:
            rules.check_origin(headers)
        if not rules.digests:
            return ""
        owner = rules.owner(headers.get("authorization", ""))
        if owner is None and scope["path"].removeprefix(scope.get("root_path", "")) not in rules.open_paths:
            raise ApiError(401, "Incorrect API key provided: send a valid one as 'Authorization: Bearer KEY'", code="invalid_api_key",
                           headers={"www-authenticate": "Bearer"})
        return owner or ""


def _head_only(send: Send) -> Send:
    """End a response after its head, even a stream that would never end."""
    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b""})

    return send_head


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
