"""HTTPS: TLS whose handshakes count as connections.

uvicorn and asyncio tell a protocol about a connection when its TLS handshake is complete, and asyncio gives a client 60 seconds for it. So
the limits for connections would not hold for clients that never complete it. Here the server listens without TLS, and the protocol of each
connection is TLS around HTTP:

    socket ──▶ TlsConnection (asyncio's SSLProtocol) ──▶ HttpProtocol
               counted as idle until the handshake       counted from then on
"""
from __future__ import annotations

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol
from typing import Any

from minivllm.server.connections import ConnectionLimit

HANDSHAKE_SECONDS = 10


def server_context(certificate: str, key: str | None) -> ssl.SSLContext:
    """TLS settings with a certificate and its private key, both PEM files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


class TlsConnection(SSLProtocol):
    """TLS of one connection."""

    def __init__(self, http: asyncio.Protocol, context: ssl.SSLContext, limit: ConnectionLimit) -> None:
        waiter: Any = None  # nothing waits for the handshake
        super().__init__(asyncio.get_running_loop(), http, context, waiter, server_side=True, ssl_handshake_timeout=HANDSHAKE_SECONDS)
        self._limit = limit
        self._raw: Any = None  # the socket's transport during the handshake

    def connection_made(self, transport: Any) -> None:
        self._raw = transport
        if self._limit.admit():
            self._limit.idle[self] = None
        else:
            transport.abort()  # without TLS there is no answer that the client would understand
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.complete()
        super().connection_lost(exc)

    def complete(self) -> None:
        """The handshake has ended: from now on the HTTP protocol counts this connection."""
        if self._raw is not None:
            self._raw = None
            self._limit.open -= 1
            self._limit.idle.pop(self, None)

    def give_up(self) -> None:
        """Close the connection, because a new one needs its place."""
        self._limit.idle.pop(self, None)
        if self._raw is not None:
            self._raw.abort()
