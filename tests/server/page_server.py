"""A server with a real engine and a fake model, for tests of the page and of the live view."""
from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minivllm.core.plan import RowAdmission
from minivllm.engine.chat_template import ChatTemplate
from minivllm.engine.client import ThreadClient
from minivllm.engine.tokenizer import Tokenizer
from tests.engine import tokenizers_for_tests as build
from tests.engine.fake import EOS, FakeExecutor, make_engine
from tests.server.scripted import LiveServer, serving

WORDS = "the quick brown fox jumps over the lazy dog. "


TEMPLATE = (  # like Qwen3's, it writes the reasoning of the final message only
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if loop.last and m['reasoning_content'] %}<think>\n{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
LAST_QUESTION = re.compile(r"user: ((?:(?!user: ).)*?)\nassistant: ((?:(?!user: ).)*)$", re.DOTALL)


class Pace:
    """The duration of each step, since a model without a delay would be done before a test could look, and the model's replies."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.failure: Exception | None = None  # of the next step
        self.replies: dict[str, str] = {}  # user message -> the model's whole output; anything else is answered with WORDS without end

    def wait(self) -> None:
        time.sleep(self.seconds)
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


class Model:
    """Chooses the next token of a reply. A final message that the request continues is the beginning of the reply."""

    def __init__(self, tokenizer: Tokenizer, pace: Pace) -> None:
        self._tokenizer, self._pace = tokenizer, pace
        self._words = tokenizer.encode(WORDS)
        self._last: dict[tuple[int, ...], tuple[str, str]] = {}  # prompt -> its last question, and what it has of the answer

    def choose(self, history: Sequence[int], admission: RowAdmission) -> int:
        prompt, count = tuple(history[:admission.num_prompt_tokens]), len(history) - admission.num_prompt_tokens
        if prompt not in self._last:
            found = LAST_QUESTION.search(self._tokenizer.decode(prompt))
            self._last[prompt] = ("", "") if found is None else (found[1], found[2])
        question, begun = self._last[prompt]
        reply = self._pace.replies.get(question)
        if reply is None:
            return self._words[count % len(self._words)]
        assert reply.startswith(begun), (reply, begun)
        rest = self._tokenizer.encode(reply[len(begun):])
        return rest[count] if count < len(rest) else EOS


@contextlib.contextmanager
def page_server(folder: Path, *, names: Sequence[str] = ("fox",), **settings: Any) -> Iterator[tuple[LiveServer, Pace]]:
    """A server of the model above. The settings are the server's."""
    build.save(build.byte_level(), folder)
    tokenizer = Tokenizer(folder)
    tokenizer.chat_template = ChatTemplate(TEMPLATE)
    pace = Pace()
    executor = FakeExecutor(200, choose=Model(tokenizer, pace).choose, gate=pace)  # type: ignore[arg-type]
    client = ThreadClient.start_with(lambda: make_engine(executor, folder=folder, max_model_len=600))
    try:
        with serving(client, tokenizer, served_model_name=tuple(names), **settings) as live:
            yield live, pace
    finally:
        pace.seconds = 0.0
        client.close()
