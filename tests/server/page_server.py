"""A server with a real engine and a fake model, for tests of the page and of the live view."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minivllm.engine.chat_template import ChatTemplate
from minivllm.engine.client import ThreadClient
from minivllm.engine.tokenizer import Tokenizer
from tests.engine import tokenizers_for_tests as build
from tests.engine.fake import FakeExecutor, make_engine
from tests.server.scripted import LiveServer, serving

WORDS = "the quick brown fox jumps over the lazy dog. "


class Pace:
    """The duration of each step. A model without a delay would be done before a test could look."""

    seconds = 0.0

    def wait(self) -> None:
        time.sleep(self.seconds)


@contextlib.contextmanager
def page_server(folder: Path, **settings: Any) -> Iterator[tuple[LiveServer, Pace]]:
    """The model answers every prompt with "the quick brown fox ..."."""
    build.save(build.byte_level(), folder)
    tokenizer = Tokenizer(folder)
    tokenizer.chat_template = ChatTemplate("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    words = tokenizer.encode(WORDS)
    pace = Pace()
    executor = FakeExecutor(
        200, choose=lambda history, admission: words[(len(history) - admission.num_prompt_tokens) % len(words)],
        gate=pace,  # type: ignore[arg-type]
    )
    client = ThreadClient.start_with(lambda: make_engine(executor, folder=folder, max_model_len=600))
    try:
        with serving(client, tokenizer, served_model_name=("fox",), **settings) as live:
            yield live, pace
    finally:
        pace.seconds = 0.0
        client.close()
