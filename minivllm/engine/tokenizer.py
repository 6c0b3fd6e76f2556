"""Text to token ids and back, equal to HF's, without importing transformers (which takes seconds).

The `tokenizers` package reads the `tokenizer.json` of a model folder. What `tokenizer_config.json` adds (special tokens, the chat
template) is read here. Older folders (vocab.json + merges.txt, sentencepiece) are converted by transformers.

Decoding works on bytes. Nearly every decoder of a language model is a table from token id to bytes:

    byte-level BPE    "Ġcaf" "Ã" "©"      ->  b" caf"  b"\\xc3"  b"\\xa9"
    sentencepiece     "▁caf" "<0xC3>" …   ->  b" caf"  b"\\xc3"  …

So an incremental UTF-8 decoder streams text in O(1) per token. It holds back an unfinished character.
"""
from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokenizers.decoders import DecodeStream

from minivllm.engine.chat_prompt import GENERIC_FORMAT, ChatOptions, write_chat
from minivllm.engine.chat_template import BUILT_IN, ChatTemplate, built_in_template
from minivllm.errors import InvalidInput, ModelError, is_failure
from minivllm.families.model_folder import read_json
from minivllm.models.remote_code import announce_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

log = logging.getLogger(__name__)
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream(Protocol):
    """Turns the tokens of one sequence into text as they are sampled. The pieces join to the whole text."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token. It consists of whole characters."""
        ...

    def finish(self) -> str:
        """The rest at the end. An unfinished character becomes U+FFFD."""
        ...


class Tokenizer:
    """One model's tokenizer. Only its caches change after construction, so requests may share it."""

    def __init__(self, folder: str | Path, trust_remote_code: bool = False) -> None:
        """trust_remote_code: run the folder's own tokenizer code, if there is no tokenizer.json."""
        self.folder = Path(folder)
        config = _read_json(self.folder / "tokenizer_config.json")
        self._backend = _load_backend(self.folder, config, trust_remote_code)
        self._special_tokens = _special_tokens(self.folder, config)
        _add_tokens(self._backend, config, self._special_tokens)
        self.chat_template = _chat_template(self.folder, config)
        self._special_ids = frozenset(
            token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special
        )
        self._bytes: dict[int, bytes] = {}
        self._stream_texts: tuple[dict[int, str | None], dict[int, str | None]] = ({}, {})  # by skip_special_tokens

    # -- text -> ids --------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. `add_special_tokens`: add those that the model expects around a text, such as BOS."""
        return self._encode(self._backend, text, add_special_tokens)

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of a part of a text: without the space that sentencepiece puts in front of a whole text, and without special tokens."""
        return self._encode(self._without_prefix, text, False)

    def _encode(self, backend: Backend, text: str, add_special_tokens: bool) -> list[int]:
        try:
            # A batch of one: unlike `encode`, it releases Python's global lock, so a server's event loop can run meanwhile.
            return list(backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)
        except TypeError:
            if any(0xD800 <= ord(char) <= 0xDFFF for char in text):
                raise InvalidInput("the text holds a lone surrogate, which is not Unicode text: correct it", "prompt") from None
            raise
        except BaseException as error:
            if is_failure(error):
                raise ModelError(f"the tokenizer in {self.folder} failed on a text ({error}): fetch it again", "tokenizer") from error
            raise

    @cached_property
    def _without_prefix(self) -> Backend:
        from tokenizers import Tokenizer as Backend

        whole = json.loads(self._backend.to_str())
        part = {**whole, **{name: _drop_prefix(whole[name]) for name in ("normalizer", "pre_tokenizer")}}
        return self._backend if part == whole else Backend.from_str(json.dumps(part))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True,
        continue_final_message: bool = False, tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | ChatTemplate | None = None, call_format: str = GENERIC_FORMAT, generic_tools: bool = False,
        tokenize: bool = True, **kwargs: Any,
    ) -> list[int] | str:
        """Write a conversation in the model's training format. The template writes the special tokens too.

        `chat_template` replaces the model's own: Jinja source, or the name of a built-in template.
        A template without a place for tools gets a generic prompt, with calls in `call_format`; `generic_tools`: any template does.
        """
        if isinstance(chat_template, str):
            chat_template = ChatTemplate(built_in_template(chat_template) if chat_template in BUILT_IN else chat_template)
        template = chat_template or self.chat_template
        if template is None:
            raise InvalidInput(
                "this model has no chat template: use a chat model, pass chat_template, or send a plain prompt", "messages",
            )
        text = write_chat(template, messages, ChatOptions(
            tools=tools or (), call_format=call_format, generic_tools=generic_tools, add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, variables={**self._special_tokens, **kwargs},
        ))
        return self.encode(text, add_special_tokens=False) if tokenize else text

    # -- ids -> text --------------------------------------------------------------------------------------------------

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of a whole sequence."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def stream(self, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> TextStream:
        """A stream that decodes one sequence. Its text continues the prompt, so a space in front of the first word is kept.

        (A sentencepiece decoder drops the space in front of a whole text.) Malformed UTF-8 keeps its valid characters; HF's sentencepiece
        decoder replaces the whole run of bytes.
        """
        if self._decoder is not None:
            return _ByteStream(self, skip_special_tokens)
        return _LibraryStream(self, prompt_token_ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token inside a text. Empty for an id that is not a token."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            if token is None:
                known = b""
            elif self._decoder is not None:
                known = self._decoder.to_bytes(token)
            else:
                known = self.decode([token_id]).encode()
            self._bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """The text of one token, for log-probabilities. Part of a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    @cached_property
    def _decoder(self) -> _TokenDecoder | None:
        decoder = json.loads(self._backend.to_str())["decoder"]
        return _TokenDecoder.from_json(decoder)

    # -- special tokens -----------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary. A model's embedding table is often larger, because it is padded."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    def token_to_id(self, token: str) -> int | None:
        token_id = self._backend.token_to_id(token)
        return None if token_id is None else int(token_id)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as it is written in the vocabulary, such as "Ġthe"."""
        token = self._backend.id_to_token(token_id)
        return None if token is None else str(token)

    def serialized(self) -> str:
        """This tokenizer as the text of a `tokenizer.json`, with the tokens that other files add."""
        return str(self._backend.to_str())

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self.token_to_id(token)


# -- streams ----------------------------------------------------------------------------------------------------------


class _ByteStream:
    """Bytes in, whole characters out. Most tokens are whole characters, so their text is looked up in a table.

    `DecodeStream` of the `tokenizers` package takes 0.9 µs a token where this takes 0.1 µs (`python -m bench.text_cost`). With 256
    sequences that is 0.2 ms of every step.
    """

    __slots__ = ("_texts", "_tokenizer", "_utf8", "_whole")

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._texts = tokenizer._stream_texts[skip_special]
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._whole = True  # no character is unfinished

    def push(self, token_id: int) -> str:
        try:
            text = self._texts[token_id]
        except KeyError:
            text = self._texts[token_id] = self._text_alone(token_id)
        if text == "" or (text is not None and self._whole):
            return text
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._whole = not self._utf8.getstate()[0]
        return text

    def _text_alone(self, token_id: int) -> str | None:
        """The text of a token. None: its bytes alone are not valid UTF-8."""
        if self._texts is self._tokenizer._stream_texts[True] and self._tokenizer.is_special(token_id):
            return ""
        try:
            return self._tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return None

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _LibraryStream:
    """For decoders that are not a table (WordPiece, CTC ...): the stream of the `tokenizers` package.

    It decodes a window of tokens with and without the new one. The prompt's last tokens are the window at the start, so that rules
    about neighboring tokens see them.
    """

    __slots__ = ("_skip_special", "_stream", "_tokenizer", "_waiting")

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._stream = DecodeStream(ids=list(prompt[-8:]), skip_special_tokens=skip_special)
        self._waiting: list[int] = []  # tokens whose text is not certain

    def push(self, token_id: int) -> str:
        try:
            text: str | None = self._stream.step(self._tokenizer._backend, token_id)
        except Exception:  # the text of the window's tokens is no longer a prefix of the text with the new token: a new window begins
            self._stream = DecodeStream(skip_special_tokens=self._skip_special)
            self._waiting.clear()
            text = self._stream.step(self._tokenizer._backend, token_id)
        if text is None:
            self._waiting.append(token_id)
            return ""
        self._waiting.clear()
        return text

    def finish(self) -> str:
        return self._tokenizer.decode(self._waiting, self._skip_special)


class _TokenDecoder:
    """From a token as it is written in the vocabulary to its bytes."""

    def __init__(self, *, byte_level: bool, replacements: Sequence[tuple[str, str]], byte_fallback: bool) -> None:
        self._byte_of = _byte_level_alphabet() if byte_level else None
        self._replacements = tuple(replacements)
        self._byte_fallback = byte_fallback

    @classmethod
    def from_json(cls, decoder: dict[str, Any] | None) -> _TokenDecoder | None:
        """From the decoder of a `tokenizer.json`. None: the decoder is not a table of tokens."""
        if decoder is None:
            return None  # tokens are joined with spaces
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        byte_level = byte_fallback = False
        replacements: list[tuple[str, str]] = []
        for step in steps:
            kind = step["type"]
            if kind == "ByteLevel" and len(steps) == 1:
                byte_level = True
            elif kind == "Metaspace":
                replacements.append((step["replacement"], " "))
            elif kind == "Replace" and "String" in step["pattern"]:
                replacements.append((step["pattern"]["String"], step["content"]))
            elif kind == "ByteFallback":
                byte_fallback = True
            elif kind == "Strip" and step["content"] == " " and step["stop"] == 0 and step is steps[-1]:
                pass  # drops the space in front of a whole text: see Tokenizer.stream
            elif kind != "Fuse":
                return None
        return cls(byte_level=byte_level, replacements=replacements, byte_fallback=byte_fallback)

    def to_bytes(self, token: str) -> bytes:
        if self._byte_of is not None:
            try:
                return bytes([self._byte_of[c] for c in token])
            except KeyError:  # an added token is written as plain text
                return token.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable bytes as themselves, the others as the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _drop_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer of a `tokenizer.json`, without the space that it puts in front of a text."""
    if step is None or step["type"] == "Prepend":
        return None
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            return {**step, name: [kept for part in step[name] if (kept := _drop_prefix(part)) is not None]}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if "add_prefix_space" in step else step


# -- reading a folder -------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, "tokenizer") if path.is_file() else {}


def _load_backend(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> Backend:
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_file(str(file))
        except BaseException as error:
            if not is_failure(error):
                raise
            raise ModelError(f"{file} cannot be read ({error}): fetch it again", "tokenizer") from None
    else:
        backend = _backend_of_transformers(folder, config, trust_remote_code)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _backend_of_transformers(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> Backend:
    known = ("vocab.json", "tokenizer.model", "spiece.model", "vocab.txt", "tiktoken.model", "tekken.json")
    if not config and not any((folder / name).is_file() for name in known):
        raise ModelError(
            f"{folder} holds no tokenizer (no tokenizer.json, {', '.join(known)}): pass tokenizer=FOLDER, "
            "or skip_tokenizer_init=True to work with token ids", "tokenizer",
        )
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ModelError(
            f"{folder} has no tokenizer.json, and reading its older format needs transformers: pip install transformers",
            "tokenizer",
        ) from None
    if trust_remote_code:
        announce_tokenizer(folder)
    try:
        backend = getattr(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True),
                          "backend_tokenizer", None)
    except (Exception, SystemExit) as error:  # of any code, if it is trusted
        if "trust_remote_code" in str(error):
            raise ModelError(f"the tokenizer in {folder} needs Python code from its folder, which is not run: name a tokenizer that has a "
                             "tokenizer.json, or read that code, and set trust_remote_code (--trust-remote-code) if you trust it",
                             "tokenizer") from None
        raise ModelError(f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())[:300]}", "tokenizer") from error
    if backend is None:
        raise ModelError(f"the tokenizer in {folder} exists only as Python code and has no fast form (backend_tokenizer): name a tokenizer "
                         "that has a tokenizer.json", "tokenizer")
    return backend


def _token_text(token: Any) -> str | None:
    """The text of a special token, which is a string or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> text. Older models have `special_tokens_map.json`; `tokenizer_config.json` has precedence."""
    both = {**_read_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
    found = {name: _token_text(both.get(name)) for name in _SPECIAL_NAMES}
    return {name: token for name, token in found.items() if token is not None}


def _add_tokens(backend: Backend, config: dict[str, Any], special: Mapping[str, str]) -> None:
    """Add the tokens that only `tokenizer_config.json` has."""
    from tokenizers import AddedToken

    existing = backend.get_added_tokens_decoder()
    listed = sorted((int(i), t) for i, t in (config.get("added_tokens_decoder") or {}).items())
    for token_id, token in listed:
        if token_id in existing or not isinstance(token, dict):
            continue
        flags = {k: bool(token[k]) for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in token}
        _add(backend, [AddedToken(token["content"], **flags)], flags.get("special", False))
    known = {t.content for t in backend.get_added_tokens_decoder().values()}
    missing = [AddedToken(token, special=True, normalized=False) for token in special.values() if token not in known]
    _add(backend, missing, True)


def _add(backend: Backend, tokens: Iterable[Any], special: bool) -> None:
    (backend.add_special_tokens if special else backend.add_tokens)(list(tokens))


def _chat_template(folder: Path, config: dict[str, Any]) -> ChatTemplate | None:
    """The model's template, with its second one for tools if it has one. A template for tools alone serves all chats."""
    template = config.get("chat_template")
    listed: dict[str, Any] = {t["name"]: t["template"] for t in template} if isinstance(template, list) else {"default": template}
    files = {"default": folder / "chat_template.jinja", "tool_use": folder / "additional_chat_templates" / "tool_use.jinja"}
    if any(file.is_file() for file in files.values()):
        listed = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    named: dict[str, str] = {name: source for name, source in listed.items() if isinstance(source, str)}
    if len(named) == 1:
        return ChatTemplate(next(iter(named.values())))
    if "default" not in named and "tool_use" not in named:
        if named:
            log.warning("%s has the chat templates %s, and none is the default: choose one with --chat-template", folder, ", ".join(named))
        return None
    return ChatTemplate(named.get("default") or named["tool_use"], named.get("tool_use"))
