"""Fixtures that tests of the server have too."""
from __future__ import annotations

from tests.server.conftest import no_certificates as no_certificates
from tests.server.conftest import tokenizer_folder as tokenizer_folder
