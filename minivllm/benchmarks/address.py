"""Where a server is: from a URL as users write it to host, port and path."""
from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from minivllm.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Scheme, host and port of a server, and the path in front of /v1."""

    host: str
    port: int
    secure: bool = False
    prefix: str = ""

    @property
    def authority(self) -> str:
        """Host and port as URLs and Host headers have them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def of(cls, url: str) -> ServerAddress:
        """From a base URL, with or without /v1 at its end."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise InvalidInput(f"base_url {url!r} is not a URL ({error}): write it like http://127.0.0.1:8000", "base_url") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InvalidInput(f"base_url {url!r} is not a server's address: write it like http://127.0.0.1:8000", "base_url")
        secure = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if secure else 80), secure, parts.path.rstrip("/").removesuffix("/v1"))
