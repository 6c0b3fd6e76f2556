"""Tokenization equals HF's, and the pieces of a stream join to the whole text."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.engine.chat_template import ChatTemplate
from minivllm.engine.conversation import conversation
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput, ModelError
from tests.engine import tokenizers_for_tests as build

KINDS = {
    "byte level": build.byte_level,
    "sentencepiece": build.sentencepiece,
    "sentencepiece without strip": lambda: build.sentencepiece(strip=False),
    "metaspace": lambda: build.sentencepiece(metaspace=True),
}
TEXTS = [
    "", " ", "the fox", "  two  spaces\n\nand lines\t.", "déjà vu 日本語 🎉🚀", "<s>user</s> the <tool call> dog", "a\u0000b", "the" * 50,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: build.save(make(), root / name.replace(" ", "_")) for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def ours(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer(folder) for name, folder in folders.items()}


def _stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool, prompt: list[int] | None = None) -> list[str]:
    stream = tokenizer.stream(prompt or [], skip_special)
    return [*(stream.push(i) for i in ids), stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_and_decoding_equal_transformers(kind: str, folders: dict[str, Path], ours: dict[str, Tokenizer]) -> None:
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoTokenizer.from_pretrained(folders[kind])
    for text in TEXTS:
        for special in (True, False):
            ids = ours[kind].encode(text, add_special_tokens=special)
            assert ids == hf.encode(text, add_special_tokens=special), text
        for skip in (True, False):
            assert ours[kind].decode(ids, skip) == hf.decode(ids, skip_special_tokens=skip), text
    assert ours[kind].eos_token_id == hf.eos_token_id
    assert ours[kind].bos_token_id == hf.bos_token_id
    assert ours[kind].vocab_size == len(hf)


def test_bos_and_eos_flags_of_the_config_do_not_override_the_tokenizer_file(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = build.save(build.sentencepiece(), tmp_path, add_bos_token=False, add_eos_token=True)
    ids = Tokenizer(folder).encode("the fox")
    assert ids == transformers.AutoTokenizer.from_pretrained(folder).encode("the fox")
    assert (ids[0] == 1, ids[-1] == 2) == (True, False)


def test_tokens_that_only_the_config_lists_are_added(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = build.byte_level()
    size = base.get_vocab_size()
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    added = {str(size): {"content": "<extra>", **flags}}
    folder = build.save(base, tmp_path, added_tokens_decoder=added, pad_token="<pad>")
    ours, hf = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.encode("the<extra>fox<pad>") == hf.encode("the<extra>fox<pad>")
    assert ours.decode(ours.encode("the<extra>fox<pad>"), skip_special_tokens=True) == "thefox"


def test_a_folder_without_a_fast_tokenizer_file_is_converted_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    build.byte_level().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}))
    ours, hf = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode("the quick brown fox, déjà vu 🎉")
    assert ids == hf.encode("the quick brown fox, déjà vu 🎉")
    assert "".join(_stream(ours, ids, True)) == "the quick brown fox, déjà vu 🎉"


def test_an_unreadable_or_missing_tokenizer_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: not readable as JSON"):
        Tokenizer(tmp_path)


def test_text_that_is_not_unicode_is_refused(ours: dict[str, Tokenizer]) -> None:
    for encode in (ours["byte level"].encode, ours["byte level"].encode_inside):
        with pytest.raises(InvalidInput, match="lone surrogate"):
            encode("a\ud800b")


# -- streaming --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_the_pieces_of_a_byte_level_stream_join_to_the_decoded_whole(ours: dict[str, Tokenizer], data: st.DataObject, skip: bool) -> None:
    tokenizer = ours["byte level"]
    # Ids above the vocabulary occur with a padded embedding table.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    pieces = _stream(tokenizer, ids, skip)
    whole = tokenizer.decode(ids, skip)
    assert "".join(pieces) == whole
    assert "\ufffd" in whole or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece without strip", "metaspace"])
@settings(deadline=None, max_examples=100)
@given(text=st.text(st.sampled_from("the fox日本é🎉\n ab."), max_size=20), skip=st.booleans())
def test_the_pieces_of_a_sentencepiece_stream_join_to_the_decoded_continuation(
    kind: str, ours: dict[str, Tokenizer], text: str, skip: bool,
) -> None:
    tokenizer = ours[kind]
    ids = [*tokenizer.encode(text), 2]
    anchor = tokenizer.token_to_id("a")
    assert anchor is not None
    assert "".join(_stream(tokenizer, ids, skip, [anchor])) == tokenizer.decode([anchor, *ids], skip)[1:]


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(3, 258), max_size=12))
def test_malformed_bytes_keep_their_valid_characters(ours: dict[str, Tokenizer], ids: list[int]) -> None:
    expected = bytes(i - 3 for i in ids).decode("utf-8", errors="replace")
    assert "".join(_stream(ours["sentencepiece"], ids, True)) == expected


def test_a_character_of_several_tokens_is_returned_whole(ours: dict[str, Tokenizer]) -> None:
    for kind in KINDS:
        ids = ours[kind].encode("🚁", add_special_tokens=False)
        while not ours[kind].token_bytes(ids[0]).strip():  # a space that the normalizer adds
            ids = ids[1:]
        assert _stream(ours[kind], ids, True) == [""] * (len(ids) - 1) + ["🚁", ""], kind
        assert _stream(ours[kind], ids[:2], True) == ["", "", "\ufffd"], kind


def test_a_continuation_keeps_the_space_in_front_of_its_first_word(ours: dict[str, Tokenizer]) -> None:
    tokenizer = ours["sentencepiece"]
    ids = [tokenizer.token_to_id("▁the"), tokenizer.token_to_id("▁dog")]
    assert tokenizer.decode(ids) == "the dog"
    assert "".join(_stream(tokenizer, ids, True, [1])) == " the dog"


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 12), min_size=1, max_size=20))
def test_a_decoder_that_depends_on_neighboring_tokens_streams_the_same_text(wordpiece: Tokenizer, ids: list[int]) -> None:
    joined = "".join(_stream(wordpiece, ids[1:], False, ids[:1]))
    assert wordpiece.decode(ids[:1]) + joined == wordpiece.decode(ids)


def test_a_decoder_that_is_not_a_table_streams_whole_characters(tmp_path: Path) -> None:
    from tokenizers import decoders

    backend = build.sentencepiece()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip("x", 1, 0)])
    tokenizer = Tokenizer(build.save(backend, tmp_path))
    bos, first, *rest = tokenizer.encode("é🚁 the dog")
    assert tokenizer.decode([first]) == " "
    pieces = _stream(tokenizer, [*rest, 2], True, [bos, first])
    assert ("".join(pieces), pieces[:4]) == ("é🚁 the dog", ["", "é", "", ""])
    assert "".join(_stream(tokenizer, [*rest[:3], 10**6], True, [bos, first])) == "é\ufffd", "an unfinished character at the end"


@settings(deadline=None, max_examples=200)
@given(prompt=st.lists(st.integers(0, 4), max_size=8), ids=st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_a_stream_survives_tokens_that_change_earlier_text(changing: Tokenizer, prompt: list[int], ids: list[int]) -> None:
    """Bytes that complete a character replace the signs for invalid bytes, so the window's text stops being a prefix."""
    assert _stream(changing, ids, True, prompt)


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models

    words = ["a", "<0xE2>", "<0x82>", "<0xAC>", "b"]
    backend = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 2, 0), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(build.save(backend, tmp_path_factory.mktemp("changing"), bos_token=None, eos_token=None))


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = build.wordpiece()
    from tokenizers import decoders

    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    folder = build.save(tokenizer, tmp_path_factory.mktemp("wordpiece"), bos_token=None, eos_token=None, unk_token="[UNK]")
    return Tokenizer(folder)


def test_the_bytes_of_tokens_are_shown_even_inside_a_character(ours: dict[str, Tokenizer]) -> None:
    for kind in KINDS:
        ids = ours[kind].encode("é🚁", add_special_tokens=False)
        assert b"".join(ours[kind].token_bytes(i) for i in ids).strip() == "é🚁".encode()
    assert ours["byte level"].token_bytes(10**6) == b""
    assert ours["byte level"].token_text(ours["byte level"].encode("🚁")[0]) == "\ufffd"


# -- chat templates ---------------------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi <there> & {'you'} "}]
TEMPLATES = {
    "plain": build.CHAT_TEMPLATE,
    "json and tools": "{{ tools | tojson(indent=2) }}{{ messages | tojson }}{{ messages[1]['content'] | trim }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "whitespace": "{% for m in messages %}\n    {% if true %}\n  {{ m.content }}\n    {% endif %}\n{% endfor %}\n",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "date": "{{ strftime_now('%Y') }} {{ messages[0].content }} {{ messages[1].content }} {{ extra }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rendered_chat_equals_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = build.save(build.byte_level(), tmp_path, chat_template=TEMPLATES[name])
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    tools = [{"type": "function", "function": {"name": "f", "description": "<é>"}}] if "tools" in TEMPLATES[name] else None
    for prompt in (True, False):
        arguments = {"tools": tools, "add_generation_prompt": prompt, "extra": 3}
        text = hf.apply_chat_template(CHAT, tokenize=False, **arguments)
        assert Tokenizer(folder).apply_chat_template(CHAT, tokenize=False, **arguments) == text
        assert Tokenizer(folder).apply_chat_template(CHAT, **arguments) == hf(text, add_special_tokens=False)["input_ids"]


def test_the_final_message_can_be_continued_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for i, template in enumerate((build.CHAT_TEMPLATE, "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")):
        folder = build.save(build.byte_level(), tmp_path / str(i), chat_template=template)
        hf = transformers.AutoTokenizer.from_pretrained(folder)
        for chat in (CHAT, [*CHAT, {"role": "assistant", "content": "Well,"}]):
            ours = Tokenizer(folder).apply_chat_template(chat, add_generation_prompt=False, continue_final_message=True, tokenize=False)
            assert ours == hf.apply_chat_template(chat, continue_final_message=True, tokenize=False)


def test_a_template_in_its_own_file_has_precedence_over_the_config(tmp_path: Path) -> None:
    folder = build.save(build.byte_level(), tmp_path)
    (folder / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert Tokenizer(folder).apply_chat_template(CHAT[:1], tokenize=False) == "file be brief"


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLS = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
]}]


@pytest.mark.parametrize("own_file", [False, True])
def test_a_second_template_for_tools_is_used_with_tools_as_in_transformers(tmp_path: Path, own_file: bool) -> None:
    transformers = pytest.importorskip("transformers")
    default = "plain {{ messages[0].content }} {{ messages[1].content }}"
    tool_use = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    if own_file:
        folder = build.save(build.byte_level(), tmp_path, chat_template=None)
        (folder / "chat_template.jinja").write_text(default)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use)
    else:
        both = [{"name": "default", "template": default}, {"name": "tool_use", "template": tool_use}]
        folder = build.save(build.byte_level(), tmp_path, chat_template=both)
    hf, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for tools in (None, TOOLS):
        assert ours.apply_chat_template(CHAT, tools=tools, tokenize=False) == hf.apply_chat_template(CHAT, tools=tools, tokenize=False)
    assert '"arguments": {"a": 1}' in str(ours.apply_chat_template(CALLS, tokenize=False)), "earlier calls are not lost without tools"


def test_the_variables_of_a_template_are_known() -> None:
    template = ChatTemplate("{%- if not tools is defined %}{% set tools = none %}{% endif %}{% if thinking %}{{ x.y }}{% endif %}")
    assert {"tools", "thinking", "x"} <= template.variables and "y" not in template.variables


def test_the_built_in_template_for_tools_can_be_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer(build.save(build.byte_level(), tmp_path))
    messages = [*CALLS, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, {"role": "user", "content": "so?"}]
    text = str(tokenizer.apply_chat_template(messages, tools=TOOLS, chat_template="tool_chatml", tokenize=False))
    opening, _, turns = text.partition("<|im_end|>\n")
    assert opening.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n") and json.dumps(TOOLS[0]) in opening
    assert turns == (
        "<|im_start|>user\nx<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = tokenizer.apply_chat_template(CHAT, chat_template="tool_chatml", tokenize=False)
    assert str(plain).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n")


def test_a_conversation_in_openais_form_is_checked_and_its_results_are_connected_to_their_calls() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    user, assistant, result = conversation([{"role": "user", "content": parts, "name": None},
                                            {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1"}])
    assert user == {"role": "user", "content": parts} and assistant["tool_calls"] == [{**call, "id": "call_1_0"}]
    assert result == {"role": "tool", "content": "1", "tool_call_id": "call_1_0", "name": "f"} and "id" not in call
    with pytest.raises(InvalidInput, match=r"messages\.0\.content\.1"):
        conversation([{"role": "user", "content": [parts[0], {"type": "image_url", "image_url": {}}]}])
    call["function"]["arguments"] = 5
    with pytest.raises(InvalidInput, match=r"messages\.0\.tool_calls\.0\.function\.arguments"):
        conversation([{"role": "assistant", "tool_calls": [call]}])


def test_chat_errors_name_what_is_wrong(tmp_path: Path) -> None:
    tokenizer = Tokenizer(build.save(build.byte_level(), tmp_path / "a"))
    with pytest.raises(InvalidInput, match="non-empty list"):
        tokenizer.apply_chat_template([])
    with pytest.raises(InvalidInput, match=r"messages\[1\]"):
        tokenizer.apply_chat_template([CHAT[0], {"content": "x"}])
    with pytest.raises(InvalidInput, match="roles must alternate"):
        tokenizer.apply_chat_template(CHAT, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidInput, match="not valid Jinja"):
        tokenizer.apply_chat_template(CHAT, chat_template="{% if %}")
    with pytest.raises(InvalidInput, match="set one of them"):
        tokenizer.apply_chat_template(CHAT, continue_final_message=True)
    plain = Tokenizer(build.save(build.byte_level(), tmp_path / "b", chat_template=None))
    with pytest.raises(InvalidInput, match="no chat template"):
        plain.apply_chat_template(CHAT)


@pytest.mark.parametrize("template", [
    "{{ 1 // 0 }}", "{{ range(10 ** 9) }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ (10.0 ** 308) ** 9 }}",
], ids=["division", "range", "recursion", "overflow"])
def test_a_template_that_fails_is_an_error_of_the_input(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer(build.save(build.byte_level(), tmp_path))
    with pytest.raises(InvalidInput, match="the chat template cannot write these messages"):
        tokenizer.apply_chat_template(CHAT, chat_template=template)


def test_a_template_cannot_reach_python_internals(tmp_path: Path) -> None:
    tokenizer = Tokenizer(build.save(build.byte_level(), tmp_path))
    for attack in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ strftime_now.__globals__ }}"):
        with pytest.raises(InvalidInput):
            tokenizer.apply_chat_template(CHAT, chat_template=attack + "{{ undefined_name.x }}")


def test_tokenizing_does_not_import_transformers_or_torch(tmp_path: Path) -> None:
    folder = build.save(build.byte_level(), tmp_path)
    code = (
        "import sys; from minivllm.engine.tokenizer import Tokenizer\n"
        f"t = Tokenizer({str(folder)!r}); t.apply_chat_template([dict(role='user', content='x')]); t.stream().push(5)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("charsmap", ["AQID", ""])  # three bytes, and none
def test_a_file_on_which_the_tokenizer_library_panics_is_a_model_error(tmp_path: Path, charsmap: str) -> None:
    folder = build.save(build.byte_level(), tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(folder)


def test_a_text_on_which_the_tokenizer_library_panics_is_a_model_error(tmp_path: Path) -> None:
    folder = build.save(build.byte_level(), tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAABhYmM="}  # one unit, which points outside
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(folder)
    for encode in (tokenizer.encode, tokenizer.encode_inside):
        with pytest.raises(ModelError, match=r"the tokenizer in .* failed on a text"):
            encode("abc")


@pytest.mark.parametrize(("templates", "source"), [
    ([("tool_use", "T")], "T"), ([("rag", "R")], "R"), ([("rag", "R"), ("tool_use", "T")], "T"), ([("a", "A"), ("b", "B")], None),
    ([("a", "A"), ("b", "B"), ("default", "D")], "D"),
])
def test_named_templates_without_a_default(tmp_path: Path, templates: list[tuple[str, str]], source: str | None, caplog: Any) -> None:
    folder = build.save(build.byte_level(), tmp_path)
    named = [{"name": name, "template": template} for name, template in templates]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = Tokenizer(folder).chat_template
    assert (None if template is None else template.source) == source
    if source is None:
        assert "a, b" in caplog.text and "--chat-template" in caplog.text


def test_a_folder_with_a_template_for_tools_only_uses_it_for_all_chats(tmp_path: Path) -> None:
    folder = build.save(build.byte_level(), tmp_path)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    template = Tokenizer(folder).chat_template
    assert template is not None and template.source == template.for_tools().source == "T"
