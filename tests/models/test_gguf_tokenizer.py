"""Tokenizers of GGUF files. The oracle is llama.cpp: the expected ids, pieces and end tokens here are its own, and SentencePiece's."""
from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from minivllm import LLM, SamplingParams
from minivllm.engine.tokenizer import Tokenizer as EngineTokenizer
from minivllm.errors import ModelError
from minivllm.models.gguf_metadata import Metadata
from minivllm.models.gguf_pre import DEFAULT, PRE_TOKENIZERS, PreTokenizer
from minivllm.models.gguf_tokenizer import convert_tokenizer, read_vocabulary
from tests.models.gguf_files import convert, refused

SPECIAL, NORMAL, USER = 3, 1, 4
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_pairs(words: tuple[str, ...] = (), merges: tuple[str, ...] = (), special: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer: `special` tokens, then every byte, then `words`."""
    tokens = [*special, *ALPHABET, *words]
    return {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.tokens": tokens, "ggml.merges": list(merges),
            "ggml.token_type": [SPECIAL] * len(special) + [NORMAL] * (len(tokens) - len(special)), **more}


def pieces(words: dict[str, float], **more: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece tokenizer: <unk> <s> </s>, the bytes, then `words` with their scores."""
    return {"ggml.model": "llama", "ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES, *words],
            "ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)], "ggml.scores": [0.0] * 259 + list(words.values()), **more}


def metadata(values: dict[str, Any], **general: str) -> Metadata:
    given = {f"tokenizer.{key}": value for key, value in values.items() if value is not None}
    return Metadata(Path("m.gguf"), {"general.architecture": "llama", "llama.context_length": 64, **given, **general})


def converted(values: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    meta = metadata(values)
    vocabulary = read_vocabulary(meta, rows=10_000)
    assert vocabulary is not None
    made = convert_tokenizer(meta, vocabulary)
    assert made is not None
    tokenizer = Tokenizer.from_str(json.dumps(made[0]))
    assert tokenizer.get_vocab_size() == len(vocabulary.tokens)
    return tokenizer, made[1]


def ends(values: dict[str, Any]) -> set[str]:
    vocabulary = read_vocabulary(metadata(values), rows=10_000)
    assert vocabulary is not None
    return {vocabulary.tokens[i] for i in vocabulary.ends}


# ---- splitting

@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_name_of_splitting_rules_keeps_the_whole_text(name: str) -> None:
    text = "Hi I'M  CamelCase 1234567, x=한국 é\n\n \tend  "
    for regex in PRE_TOKENIZERS[name].splits:
        assert "".join(piece for piece, _ in pre_tokenizers.Split(Regex(regex), "isolated").pre_tokenize_str(text)) == text


@pytest.mark.parametrize(("name", "expected"), [
    ("gpt-2", ["I", "'", "M", " iPhone", " 12345", "\n\n", " x"]),
    ("llama-bpe", ["I", "'M", " iPhone", " ", "123", "45", "\n\n", " x"]),
    ("qwen2", ["I", "'M", " iPhone", " ", "1", "2", "3", "4", "5", "\n\n", " x"]),
    ("smollm", ["I", "'", "M", " iPhone", " ", "1", "2", "3", "4", "5", "\n\n", " x"]),
    ("gpt-4o", ["I'M", " i", "Phone", " ", "123", "45", "\n\n", " x"]),
    ("tekken", ["I", "'M", " i", "Phone", " ", "1", "2", "3", "4", "5", "\n\n", " x"]),
    ("deepseek-v3", ["I", "'M", " iPhone", " ", "123", "45", "\n\n", " x"]),
    ("afmoe", ["I", "'M", " iPhone", " ", "12", "345", "\n\n", " x"]),
    ("falcon", ["I", "'", "M", " iPhone", " ", "123", "45", "\n\n", " x"]),
    ("default", ["I", "'", "M", " iPhone", " ", "123", "45", "\n\n", " x"]),
    ("bloom", ["I'M", " iPhone", " 12345", "\n\n", " x"]),
    ("superbpe", ["I'M iPhone ", "12", "345", "\n\n x"]),
    ("chameleon", ["I", "'", "M", " iPhone", " ", "1", "2", "3", "4", "5", "\n", "\n", " x"]),
])
def test_text_is_split_as_the_rules_name_says(name: str, expected: list[str]) -> None:
    tokenizer, _ = converted(byte_pairs(**{"ggml.pre": name}))
    text = "I'M iPhone 12345\n\n x"
    assert [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == expected


def test_a_word_of_the_vocabulary_is_taken_whole_where_the_rules_ignore_merges() -> None:
    values = byte_pairs(("hello", "he", "ll"), ("h e", "l l"))
    assert converted(values | {"ggml.pre": "gpt-2"})[0].encode("hello").tokens == ["he", "ll", "o"]
    for name in ("llama-bpe", "tekken", "youtu", "minicpm5"):
        assert converted(values | {"ggml.pre": name})[0].encode("hello").tokens == ["hello"], name


@pytest.mark.parametrize(("pre", "says"), [
    (None, "tokenizer.ggml.pre is missing"), ("mystery", "tokenizer.ggml.pre = 'mystery' is not known"),
])
def test_unknown_splitting_rules_are_a_warning_that_says_how_text_is_split(pre: str | None, says: str, capsys: Any) -> None:
    tokenizer, _ = converted(byte_pairs(**{"ggml.pre": pre}))
    printed = capsys.readouterr().err
    assert printed.count(says) == printed.count("\n") == 1
    assert "default rules (punctuation, then GPT-2's words, then digits in groups of three)" in printed
    assert len(tokenizer.pre_tokenizer.pre_tokenize_str("a-1234")) == 4
    assert len(DEFAULT.splits) == 4


def test_a_vocabulary_of_text_with_byte_pairs_writes_spaces_as_sentencepiece_does() -> None:
    values = {"ggml.model": "gpt2", "ggml.pre": "gemma4", "ggml.tokens": ["<bos>", *BYTES, "▁", "a", "b", "▁a", "é"],
              "ggml.token_type": [3, *[6] * 256, *[1] * 5], "ggml.merges": ["▁ a"], "ggml.bos_token_id": 0, "ggml.add_bos_token": False}
    tokenizer, config = converted(values)
    assert tokenizer.encode("b aé\n漢").tokens == ["<bos>", "b", "▁a", "é", "<0x0A>", "<0xE6>", "<0xBC>", "<0xA2>"]
    assert tokenizer.decode(tokenizer.encode("b aé\n漢").ids) == "b aé\n漢"
    assert config["add_bos_token"] is True  # whatever the file says, as in llama.cpp


# ---- special tokens around a text

@pytest.mark.parametrize(("pre", "key", "expected"), [
    ("llama-bpe", None, True), ("tekken", None, True), ("chameleon", None, True), ("gpt-2", None, False), ("qwen2", None, False),
    ("smollm", None, False), ("llama-bpe", False, False), ("qwen2", True, True),
])
def test_whether_bos_is_added_follows_from_the_file_or_from_the_rules_name(pre: str, key: bool | None, expected: bool) -> None:
    tokenizer, config = converted(byte_pairs(special=("<s>",), **{"ggml.pre": pre, "ggml.bos_token_id": 0, "ggml.add_bos_token": key}))
    assert tokenizer.encode("a").tokens == (["<s>", "a"] if expected else ["a"])
    assert config["add_bos_token"] is expected


def test_sentencepiece_adds_bos_with_the_ids_that_files_leave_out() -> None:
    tokenizer, config = converted(pieces({"▁": -1.0, "a": -2.0}))
    assert tokenizer.encode("a").tokens == ["<s>", "▁", "a"]
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert ends(pieces({"▁": -1.0})) == {"</s>"}
    both = converted(pieces({"▁": -1.0, "a": -2.0}, **{"ggml.add_bos_token": False, "ggml.add_eos_token": True}))[0]
    assert both.encode("a").tokens == ["▁", "a", "</s>"]
    assert both.encode("a", "a").tokens == ["▁", "a", "</s>", "▁", "a", "</s>"]


def test_a_bos_that_the_file_does_not_have_is_a_warning(capsys: Any) -> None:
    assert converted(byte_pairs(**{"ggml.pre": "llama-bpe"}))[0].encode("a").tokens == ["a"]
    assert "adds BOS, but metadata tokenizer.ggml.bos_token_id names no token" in capsys.readouterr().err


# ---- tokens that end an output

@pytest.mark.parametrize(("special", "more", "expected"), [
    (("<s>", "<|eot_id|>"), {}, {"<|eot_id|>"}),
    (("<|im_start|>", "<|im_end|>", "<|endoftext|>"), {"ggml.eos_token_id": 0}, {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}),
    (("a1", "a2", "a3"), {"ggml.eos_token_id": 0, "ggml.eot_token_id": 1, "ggml.eom_token_id": 2}, {"a1", "a2", "a3"}),
    (("a1", "a2", "a3"), {"ggml.eos_token_ids": [0, 2, 999]}, {"a1", "a3"}),
    (("<end_of_turn>", "<eos>", "<start_of_turn>"), {}, {"<end_of_turn>", "<eos>"}),
    (("<|end|>", "<|user|>"), {}, {"<|end|>"}),
    (("<|return|>", "<|call|>", "<|end|>"), {}, {"<|return|>", "<|call|>"}),
    (("<|calls|>", "<|flush|>", "<|end|>"), {}, {"<|calls|>", "<|flush|>"}),
    (("<|return|>", "<|end|>"), {}, {"<|return|>", "<|end|>"}),
    (("<|tool_response>", "</s>", "<turn|>"), {}, {"<|tool_response>", "<turn|>"}),
    (("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"), {}, {"<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"}),
    (("<|fim_pad|>", "other"), {"ggml.fim_pad_token_id": 1}, {"other"}),
    (("<｜end▁of▁sentence｜>", "[EOS]", "[e~["), {}, {"<｜end▁of▁sentence｜>", "[EOS]", "[e~["}),
])
def test_every_token_that_ends_an_output_is_found(special: tuple[str, ...], more: dict[str, Any], expected: set[str]) -> None:
    assert ends(byte_pairs(special=special, **more)) == expected


def test_a_known_end_token_of_another_type_becomes_a_control_token() -> None:
    values = byte_pairs(special=("<|im_end|>", "<|channel|>", "<x>"))
    values["ggml.token_type"][:3] = [NORMAL, SPECIAL, USER]
    tokenizer, _ = converted(values)
    added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    assert added == {"<|im_end|>": True, "<|channel|>": False, "<x>": False}
    assert tokenizer.decode(tokenizer.encode("a<|im_end|><|channel|><x>").ids) == "a<|channel|><x>"


def test_a_model_stops_at_its_end_of_turn_token_and_does_not_print_it(write_gguf: Callable[..., Path]) -> None:
    """Its eos_token_id is another token, and nothing but its text says what the end of a turn is."""
    values = byte_pairs(("ab",), ("a b",), ("<s>", "<|end_of_text|>", "<|eot_id|>"),
                        **{"ggml.pre": "llama-bpe", "ggml.bos_token_id": 0, "ggml.eos_token_id": 1})
    values["ggml.token_type"][2] = NORMAL
    folder = convert(write_gguf("llama", rows=260, meta={f"tokenizer.{key}": value for key, value in values.items()}))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    with LLM(str(folder), dtype="float32", device="cpu", max_model_len=64, num_gpu_blocks_override=20) as llm:
        (answer,) = llm.generate(["a"], SamplingParams(max_tokens=8, allowed_token_ids=[2]), use_tqdm=False)
    assert answer.prompt_token_ids[0] == 0
    assert (answer.outputs[0].token_ids, answer.outputs[0].text, answer.outputs[0].finish_reason) == ([2], "", "stop")


# ---- SentencePiece

# The order of the tokens is not that of their scores.
WORDS = {"é": -10.0, "aba": -9.0, "ba": -8.0, "▁▁": -7.0, "▁ab": -6.0, "▁a": -5.0, "ab": -4.0, "b": -3.0, "a": -2.0, "▁": -1.0}


def by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's algorithm: join the neighbors whose result has the highest score, the leftmost of equals, while one can be joined."""
    symbols = list(text)
    while candidates := [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]:
        i = min(candidates)[1]
        symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
    return [token for symbol in symbols for token in ([symbol] if symbol in scores else [BYTES[b] for b in symbol.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_equal_its_algorithm(prefix: bool) -> None:
    tokenizer, _ = converted(pieces(WORDS, **{"ggml.add_space_prefix": prefix}))
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab é漢\n", weights=[6, 6, 4, 1, 1, 1], k=rng.randint(1, 20)))
        expected = by_score((" " * prefix + text).replace(" ", "▁"), WORDS)
        got = tokenizer.encode(text, add_special_tokens=False)
        assert got.tokens == expected, text
        assert tokenizer.decode(got.ids) == text


@pytest.mark.parametrize(("more", "text", "expected"), [
    ({}, "ab", ["▁ab"]),
    ({}, " ab", ["▁", "▁ab"]),  # the text's own space, and the one in front of every text
    ({}, "  ab", ["▁▁", "▁ab"]),
    ({}, "a</s>a", ["▁a", "</s>", "▁a"]),  # a text begins behind a special token too
    ({"ggml.add_space_prefix": False}, "ab", ["ab"]),
    ({"ggml.add_space_prefix": False}, " ab", ["▁ab"]),
    ({"ggml.add_space_prefix": False}, "a</s>a", ["a", "</s>", "a"]),
    ({"ggml.remove_extra_whitespaces": True}, "  a   b  ", ["▁a", "▁", "b"]),
])
def test_spaces_in_front_of_sentencepiece_texts(more: dict[str, Any], text: str, expected: list[str]) -> None:
    assert converted(pieces(WORDS, **more))[0].encode(text, add_special_tokens=False).tokens == expected


def test_user_defined_tokens_are_found_first_and_are_not_special() -> None:
    values = pieces({**WORDS, "<tool>": 0.0, "ab ab": 0.0})
    values["ggml.token_type"][-2:] = [USER, USER]
    tokenizer, _ = converted(values)
    got = tokenizer.encode("b<tool>ab ab", add_special_tokens=False)
    assert got.tokens == ["▁", "b", "<tool>", "ab ab"]
    assert tokenizer.decode(got.ids) == "b<tool>ab ab"


def test_phi_3_drops_spaces_behind_its_special_tokens() -> None:
    meta = metadata(pieces(WORDS), **{"general.name": "Phi-3 Mini"})
    vocabulary = read_vocabulary(meta, 10_000)
    assert vocabulary is not None
    added = (convert_tokenizer(meta, vocabulary) or ({}, {}))[0]["added_tokens"]
    assert {token["content"]: token["rstrip"] for token in added} == {"<unk>": False, "<s>": False, "</s>": True}


# ---- the token list

def test_no_token_is_added_that_the_file_does_not_have(tmp_path: Path) -> None:
    """A tokenizer class that is used for conversion may bring its own special tokens, for which the model has no embedding."""
    for name, values in (("bpe", byte_pairs(special=("<s>",), **{"ggml.bos_token_id": 0, "ggml.eos_token_id": 0})), ("spm", pieces(WORDS))):
        tokenizer, config = converted(values)
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        engines = EngineTokenizer(tmp_path / name)
        assert engines.vocab_size == len(values["ggml.tokens"])
        assert max(engines.encode("x <|endoftext|> <pad> [MASK]")) < len(values["ggml.tokens"])


def test_transformers_reads_the_converted_tokenizer_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bpe = byte_pairs(special=("<s>",), **{"ggml.pre": "llama-bpe", "ggml.bos_token_id": 0})
    for name, values in (("bpe", bpe), ("spm", pieces(WORDS))):
        tokenizer, config = converted(values)
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        assert len(theirs) == len(values["ggml.tokens"])
        for text in ("ab ab", " a", "<s>a"):
            assert theirs.encode(text) == tokenizer.encode(text).ids


def test_merges_of_tokens_that_the_file_lacks_are_a_warning_and_not_used(capsys: Any) -> None:
    tokenizer, _ = converted(byte_pairs(("he",), ("h e", "l l", "he llo")))
    assert tokenizer.encode("hello").tokens == ["he", "l", "l", "o"]
    assert "2 of 3 entries are not used" in (printed := capsys.readouterr().err) and "such as 'l l'" in printed


def test_an_empty_token_gets_a_name() -> None:
    tokenizer, _ = converted(byte_pairs(words=("",)))
    assert tokenizer.id_to_token(256) == "[EMPTY_256]"


@pytest.mark.parametrize(("change", "says"), [
    ({"ggml.tokens": [*ALPHABET, "a"]}, "tokenizer.ggml.tokens has 'a' twice"),
    ({"ggml.tokens": "a"}, "tokenizer.ggml.tokens = 'a' must be a list of texts"),
    ({"ggml.tokens": ["a", 3]}, "must be a list of texts"),
    ({"ggml.merges": None}, "tokenizer.ggml.merges is missing"),
    ({"ggml.merges": ["ab"]}, "entry 0, 'ab', is not two tokens"),
    ({"ggml.merges": ["a "]}, "is not two tokens"),
    ({"ggml.merges": [1]}, "must be a list of texts"),
    ({"ggml.token_type": [1, 1]}, "tokenizer.ggml.token_type has 2 entries for 256 tokens"),
    ({"ggml.token_type": ["a"] * 256}, "must be a list of whole numbers"),
    ({"ggml.model": 3}, "tokenizer.ggml.model = 3 must be text"),
    ({"ggml.pre": 3}, "tokenizer.ggml.pre = 3 must be text"),
    ({"ggml.bos_token_id": "a"}, "tokenizer.ggml.bos_token_id = 'a' must be a token id"),
    ({"ggml.bos_token_id": True}, "must be a token id"),
    ({"ggml.add_bos_token": 1}, "tokenizer.ggml.add_bos_token = 1 must be true or false"),
    ({"ggml.model": "llama", "ggml.scores": [0.0]}, "tokenizer.ggml.scores has 1 entries for 256 tokens"),
    ({"ggml.model": "llama", "ggml.scores": [float("nan")] * 256}, "must be a list of finite numbers"),
    *((pieces({"a": 0.0}, **{"ggml.precompiled_charsmap": charsmap}), "precompiled_charsmap = [") for charsmap in (
        [1, 2, 3], [1], [0] * 16, [4, *[0] * 7, 97, 98, 99], [255] * 16)),
    ({"chat_template": 5}, "tokenizer.chat_template = 5 must be text"),
    ({"chat_template.tool_use": ["a"]}, "tokenizer.chat_template.tool_use = ['a'] must be text"),
])
def test_wrong_tokenizer_metadata_is_an_error_that_names_key_and_value(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError) as error:
        converted(byte_pairs() | change)
    assert says in str(error.value) and "m.gguf" in str(error.value)


@pytest.mark.parametrize("wrong", [256, 4294967295, -1, 2**40])
@pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "mask", "fim_pad"])
def test_a_special_id_outside_the_vocabulary_is_a_warning_and_not_used(name: str, wrong: int, capsys: Any) -> None:
    tokenizer, config = converted(byte_pairs(**{f"ggml.{name}_token_id": wrong}))
    assert f"tokenizer.ggml.{name}_token_id = {wrong} is outside the vocabulary (0 to 255), and not used" in capsys.readouterr().err
    assert tokenizer.encode("a").tokens == ["a"]
    assert not any(key.endswith("_token") and isinstance(value, str) for key, value in config.items())


@pytest.mark.parametrize("name", ["eos", "eot"])
def test_an_end_outside_the_vocabulary_is_a_warning_and_not_used(name: str, capsys: Any) -> None:
    found = ends(byte_pairs(**{f"ggml.{name}_token_ids": [3, 256, -1]}))
    assert found == {ALPHABET[3]}
    assert f"tokenizer.ggml.{name}_token_ids: 256, -1 are outside the vocabulary (0 to 255), and not used" in capsys.readouterr().err


def test_a_default_id_replaces_one_outside_the_vocabulary(capsys: Any) -> None:
    assert converted(pieces(WORDS, **{"ggml.bos_token_id": 999}))[0].encode("a").tokens == ["<s>", "▁a"]
    assert "token 1 is used" in capsys.readouterr().err


def test_more_tokens_than_embedding_rows_are_an_error(write_gguf: Callable[..., Path]) -> None:
    values = {f"tokenizer.{key}": value for key, value in byte_pairs(("ab",), ("a b",)).items()}
    refused(write_gguf("llama", rows=256, meta=values), "tokenizer.ggml.tokens has 257 tokens, but the embedding only 256 rows")
    assert (convert(write_gguf("llama", rows=300, meta=values)) / "tokenizer.json").exists()  # more rows: padding, as in checkpoints


@pytest.mark.parametrize(("model", "says"), [
    ("bert", "'bert' (WordPiece)"), ("t5", "'t5' (Unigram)"), ("rwkv", "'rwkv' (RWKV)"), ("plamo2", "PLaMo"), ("none", "none in the file"),
    ("no-such-kind", "'no-such-kind' (unknown)"),
])
def test_a_tokenizer_that_cannot_be_converted_leaves_the_weights_usable(
    write_gguf: Callable[..., Path], capsys: Any, model: str, says: str,
) -> None:
    folder = convert(write_gguf("llama", meta={"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": ["a", "b"]}))
    assert not (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists()
    printed = capsys.readouterr().err
    assert says in printed and "cannot be converted: name another with --tokenizer" in printed
    assert (folder / "model.safetensors").exists()


# ---- chat templates

def test_named_templates_reach_the_engine(tmp_path: Path) -> None:
    values = byte_pairs(**{"chat_template": "plain", "chat_templates": ["tool_use", "rag"], "chat_template.tool_use": "{{ tools }}",
                           "chat_template.rag": "{{ documents }}"})
    tokenizer, config = converted(values)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = EngineTokenizer(tmp_path).chat_template
    assert template is not None and (template.source, template.for_tools().source) == ("plain", "{{ tools }}")

    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert theirs == {"default": "plain", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}


def test_a_file_with_a_template_for_tools_only_uses_it_for_all_chats(tmp_path: Path) -> None:
    tokenizer, config = converted(byte_pairs(**{"chat_template.tool_use": "{{ tools }}"}))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = EngineTokenizer(tmp_path).chat_template
    assert template is not None and template.source == "{{ tools }}"


def test_a_single_template_stays_text_and_a_missing_one_is_a_warning(capsys: Any) -> None:
    assert converted(byte_pairs(chat_template="plain"))[1]["chat_template"] == "plain"
    assert converted(byte_pairs(chat_template="plain", chat_templates=["default", "rag"]))[1]["chat_template"] == "plain"
    assert "tokenizer.chat_templates names 'rag', but tokenizer.chat_template.rag is missing" in capsys.readouterr().err
    assert "chat_template" not in converted(byte_pairs())[1]


def test_rows_of_the_table_are_shared_and_complete() -> None:
    assert all(isinstance(row, PreTokenizer) and row.splits for row in PRE_TOKENIZERS.values())
    assert {name for name, row in PRE_TOKENIZERS.items() if row.add_bos} == {
        "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken", "chameleon"}
