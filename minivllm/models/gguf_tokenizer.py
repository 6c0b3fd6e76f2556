"""A GGUF file's tokenizer -> tokenizer.json and tokenizer_config.json.

The file holds a list of tokens with their types, and merges (byte-pair encoding, "gpt2") or scores (SentencePiece, "llama"). What it does
not hold follows from names, by llama.cpp's rules: how text is split before merging (`gguf_pre`), whether BOS is added, and which tokens
end an output. The oracle of the tests is llama.cpp's behavior.

    "gpt2"    "Hi you"  ->  split  "Hi", " you"  ->  in the byte alphabet  "Hi", "Ġyou"   ->  merged by rank
    "llama"   "Hi you"  ->  "▁Hi▁you"  ->  merged by score, a character that no token has is written as bytes <0xE2> ..
"""
from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from minivllm.errors import ModelError, is_failure
from minivllm.models.gguf_metadata import TEXT, Metadata
from minivllm.models.gguf_pre import DEFAULT, DEFAULT_IN_WORDS, PRE_TOKENIZERS, PreTokenizer


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class TokenizerModel(NamedTuple):
    """A value of `tokenizer.ggml.model` that can be converted, and llama.cpp's defaults for it."""

    add_bos: bool = False  # may also follow from `tokenizer.ggml.pre`
    special: Mapping[str, int] = {}  # ids of special tokens


# For "gpt2" llama.cpp takes token 11 as BOS and EOS, which are Falcon's. A file of another model without the ids gets none here.
MODELS = {"gpt2": TokenizerModel(), "llama": TokenizerModel(add_bos=True, special={"bos": 1, "eos": 2, "unknown": 0})}
OTHER_MODELS = {"bert": "WordPiece", "t5": "Unigram", "rwkv": "RWKV", "plamo2": "PLaMo 2", "hybriddna": "DNA k-mers", "gemma4": "Gemma 4",
                "whitespace": "whitespace-separated words", "none": "none in the file", "no_vocab": "none in the file"}

# Tokens that end an output whatever the ids in the file say, known by their text; they become control tokens.
ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>",
        "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<｜end▁of▁sentence｜>", "[e~[")
# Tokens of infilling that end an output, if no id in the file names another one.
FIM_ENDS = {"fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
            "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
            "fim_sep": ("<|file_sep|>",)}
# Tokens that do not end an output if the vocabulary has a token of each group: they end a message (gpt-oss, Solar), or are text (Gemma 4).
NOT_ENDS = (("<|end|>", TokenType.USER_DEFINED, (("<|return|>", "<|flush|>"), ("<|call|>", "<|calls|>"))),
            ("</s>", TokenType.NORMAL, (("<|tool_response>",),)))
# Tokens that a client must see, because they separate reasoning, calls and the answer.
VISIBLE = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "mask", "fim_pad", "fim_rep", "fim_sep")  # llama.cpp's spelling


@dataclass(frozen=True)
class SpecialIds:
    """The special tokens that config.json and generation_config.json name."""

    bos: int | None
    pad: int | None
    ends: tuple[int, ...]  # every token that ends an output, EOS first


@dataclass(frozen=True)
class Vocabulary:
    """The token list of a file, checked. `special`: ids by llama.cpp's names ("bos", "padding" ...)."""

    model: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    special: Mapping[str, int]
    ends: tuple[int, ...]

    def text(self, name: str) -> str | None:
        """The text of a special token."""
        return self.tokens[self.special[name]] if name in self.special else None


def special_ids(meta: Metadata, vocabulary: Vocabulary | None, rows: int) -> SpecialIds:
    """The special tokens of a model. rows: of the embedding table, for a file without a token list."""
    special = _read_ids(meta, rows, {}) if vocabulary is None else vocabulary.special
    ends = _ends_by_id(meta, special, rows) if vocabulary is None else vocabulary.ends
    return SpecialIds(special.get("bos"), special.get("padding"), ends)


# ---- reading the token list

def read_vocabulary(meta: Metadata, rows: int) -> Vocabulary | None:
    """The file's vocabulary. None: it has none. rows: of the embedding table; each token needs one."""
    tokens = meta.tokenizer("ggml.tokens")
    if tokens is None:
        return None
    if len(tokens) > rows:
        raise ModelError(f"{meta.path}: metadata tokenizer.ggml.tokens has {len(tokens)} tokens, but the embedding only {rows} rows",
                         "model")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    by_text = {token: i for i, token in reversed(list(enumerate(tokens)))}
    if len(by_text) < len(tokens):
        i = next(i for i, token in enumerate(tokens) if by_text[token] != i)
        raise ModelError(f"{meta.path}: metadata tokenizer.ggml.tokens has {tokens[i]!r} twice, as {by_text[tokens[i]]} and {i}", "model")
    model = meta.tokenizer("ggml.model", "none")
    types = _types(meta, len(tokens))
    special = _read_ids(meta, len(tokens), MODELS[model].special if model in MODELS else {})
    ends = dict.fromkeys(_ends_by_id(meta, special, len(tokens)))
    for name, texts in FIM_ENDS.items():
        ends |= dict.fromkeys([special[name]] if name in special else [by_text[text] for text in texts if text in by_text])
    ends |= dict.fromkeys(i for i, token in enumerate(tokens) if token in ENDS)
    for end in ends:
        types[end] = TokenType.CONTROL
    for token in VISIBLE:
        if token in by_text:
            types[by_text[token]] = TokenType.USER_DEFINED
    for token, kind, groups in NOT_ENDS:
        if token in by_text and all(any(other in by_text for other in group) for group in groups):
            types[by_text[token]] = kind
            ends.pop(by_text[token], None)
    return Vocabulary(model, tuple(tokens), tuple(types), special, tuple(ends))


def _types(meta: Metadata, num_tokens: int) -> list[TokenType]:
    types = meta.tokenizer("ggml.token_type")
    if types is None:
        return [TokenType.NORMAL] * num_tokens
    if len(types) < num_tokens:
        raise ModelError(f"{meta.path}: metadata tokenizer.ggml.token_type has {len(types)} entries for {num_tokens} tokens", "model")
    known = set(TokenType)
    return [TokenType(kind) if kind in known else TokenType.NORMAL for kind in types[:num_tokens]]


def _read_ids(meta: Metadata, num_tokens: int, defaults: Mapping[str, int]) -> dict[str, int]:
    """The special tokens' ids. As in llama.cpp, an id outside the vocabulary gives a warning and is not used."""
    found = {name: i for name, i in defaults.items() if i < num_tokens}
    for name in _IDS:
        token_id = meta.tokenizer(f"ggml.{name}_token_id")
        if token_id is None:
            continue
        if 0 <= token_id < num_tokens:
            found[name] = token_id
        else:
            instead = f": token {found[name]} is used" if name in found else ""
            meta.warn(f"metadata tokenizer.ggml.{name}_token_id = {token_id} is outside the vocabulary (0 to {num_tokens - 1}), and not "
                      f"used{instead}")
    return found


def _ends_by_id(meta: Metadata, special: Mapping[str, int], num_tokens: int) -> tuple[int, ...]:
    found = [special[name] for name in ("eos", "eot", "eom") if name in special]
    for name in ("eos", "eot"):  # lists, which other programs write
        ids = meta.tokenizer(f"ggml.{name}_token_ids", ())
        found += [i for i in ids if 0 <= i < num_tokens]
        if outside := [str(i) for i in ids if not 0 <= i < num_tokens]:
            meta.warn(f"metadata tokenizer.ggml.{name}_token_ids: {', '.join(outside[:8])} are outside the vocabulary "
                      f"(0 to {num_tokens - 1}), and not used")
    return tuple(dict.fromkeys(found))


# ---- tokenizer.json

def convert_tokenizer(meta: Metadata, vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """-> (tokenizer.json, tokenizer_config.json). None, with a warning: the tokenizer has no such form."""
    if vocabulary.model not in MODELS:
        kind = OTHER_MODELS.get(vocabulary.model, "unknown")
        meta.warn(f"metadata tokenizer.ggml.model = {vocabulary.model!r} ({kind}) cannot be converted: name another with --tokenizer")
        return None
    rules = _rules(meta) if vocabulary.model == "gpt2" else None
    add_bos, add_eos = _adds_bos(meta, vocabulary, rules), _adds(meta, vocabulary, "eos", False)
    around = _post_processor([name for name, added in (("bos", add_bos), ("eos", add_eos)) if added], vocabulary)
    parts = _sentencepiece(meta, vocabulary) if rules is None else _byte_pairs(meta, vocabulary, rules)
    converted = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added_tokens(meta, vocabulary, rules),
        "post_processor": around, **parts,
    }
    return converted, _tokenizer_config(meta, vocabulary, add_bos, add_eos)


def _rules(meta: Metadata) -> PreTokenizer:
    name = meta.tokenizer("ggml.pre")
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    what = "tokenizer.ggml.pre is missing" if name is None else f"tokenizer.ggml.pre = {name!r} is not known"
    meta.warn(f"metadata {what}, so text is split by llama.cpp's default rules ({DEFAULT_IN_WORDS}): if the model was trained with "
              "others, its output is worse; convert it again, or name its tokenizer with --tokenizer")
    return DEFAULT


def _byte_pairs(meta: Metadata, vocabulary: Vocabulary, rules: PreTokenizer) -> dict[str, Any]:
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in rules.splits
    ]
    if rules.byte_level:
        splits.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
        decoder: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    else:
        decoder = _text_decoder(add_prefix=False)
    return {
        "normalizer": _replace(" ", "▁") if rules.escape_spaces else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "decoder": decoder,
        "model": _model(vocabulary, _merges(meta, vocabulary), byte_fallback=not rules.byte_level, ignore_merges=rules.ignore_merges),
    }


def _merges(meta: Metadata, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Pairs of tokens by rank. A pair that does not join two tokens to a third one can never be joined."""
    merges = meta.tokenizer("ggml.merges")
    if merges is None:
        raise ModelError(f"{meta.path}: metadata tokenizer.ggml.merges is missing, which tokenizer model 'gpt2' needs", "model")
    known = set(vocabulary.tokens)
    found: dict[tuple[str, str], None] = {}
    useless = []
    for i, merge in enumerate(merges):
        at = merge.find(" ", 1)  # a token may begin with a space
        left, right = (merge[:at], merge[at + 1:]) if at > 0 else (merge, "")
        if not right:
            raise ModelError(f"{meta.path}: metadata tokenizer.ggml.merges: entry {i}, {merge!r}, is not two tokens", "model")
        if {left, right, left + right} <= known:
            found[left, right] = None
        else:
            useless.append(merge)
    if useless:
        meta.warn(f"metadata tokenizer.ggml.merges: {len(useless)} of {len(merges)} entries are not used: they join or make a token that "
                  f"is not in tokenizer.ggml.tokens, such as {useless[0]!r}")
    return list(found)


def _sentencepiece(meta: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    add_prefix = meta.tokenizer("ggml.add_space_prefix", True)
    normalizers: list[dict[str, Any]] = []
    if charsmap := meta.tokenizer("ggml.precompiled_charsmap"):
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": _charsmap(meta, bytes(value & 0xFF for value in charsmap))})
    if meta.tokenizer("ggml.remove_extra_whitespaces", False):
        normalizers += [{"type": "Strip", "strip_left": True, "strip_right": True},
                        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    if add_prefix:  # always, so " Hi" has two spaces; and after each special token, since normalizers see the text between them
        normalizers.append({"type": "Prepend", "prepend": "▁"})
    normalizers.append(_replace(" ", "▁"))
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": _text_decoder(add_prefix),
        "model": _model(vocabulary, _merges_from_scores(meta, vocabulary), byte_fallback=True),
    }


def _charsmap(meta: Metadata, table: bytes) -> str:
    """A table of characters to replace, tried on a text: the library panics on a damaged one."""
    from tokenizers.normalizers import Precompiled

    try:
        Precompiled(table).normalize_str("a é ﬁ １\t")
    except BaseException as error:
        if not is_failure(error):
            raise
        meta.fail("tokenizer.ggml.precompiled_charsmap", f"cannot be read ({error}): download or convert the file again")
    return base64.b64encode(table).decode()


def _merges_from_scores(meta: Metadata, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose result has the highest score: as merges, all pairs with a token as result, by its score."""
    tokens = vocabulary.tokens
    scores = meta.tokenizer("ggml.scores", [0.0] * len(tokens))
    if len(scores) < len(tokens):
        raise ModelError(f"{meta.path}: metadata tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens", "model")
    apart = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)  # never the result of joining text
    known = {token: i for i, token in enumerate(tokens) if vocabulary.types[i] not in apart}
    return [
        (token[:k], token[k:])
        for token, i in sorted(known.items(), key=lambda item: (-scores[item[1]], item[1]))
        for k in range(1, len(token)) if token[:k] in known and token[k:] in known
    ]


def _model(
    vocabulary: Vocabulary, merges: Iterable[tuple[str, str]], *, byte_fallback: bool, ignore_merges: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": vocabulary.text("unknown") if byte_fallback else None, "fuse_unk": byte_fallback,
        "continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": byte_fallback, "ignore_merges": ignore_merges,
        "vocab": {token: i for i, token in enumerate(vocabulary.tokens)}, "merges": [list(pair) for pair in merges],
    }


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _text_decoder(add_prefix: bool) -> dict[str, Any]:
    """Of a vocabulary of text with bytes as <0x..>. The space that was put in front of the text is dropped."""
    steps: list[dict[str, Any]] = [_replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {"type": "Sequence", "decoders": [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_prefix else steps}


def _added_tokens(meta: Metadata, vocabulary: Vocabulary, rules: PreTokenizer | None) -> list[dict[str, Any]]:
    """The tokens that are found in text before anything else: control and unknown tokens (special), and user-defined ones."""
    types = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    lstrip = () if rules is None else rules.lstrip
    phi_3 = "phi3" in meta.get("general.name", TEXT, "").lower().replace("-", "")  # its tokenizer.json drops spaces behind special tokens
    return [
        {"id": i, "content": token, "single_word": False, "lstrip": token in lstrip, "normalized": False,
         "rstrip": phi_3 and token not in ("<unk>", "<s>", "<|endoftext|>"), "special": kind != TokenType.USER_DEFINED}
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)) if kind in types
    ]


def _adds_bos(meta: Metadata, vocabulary: Vocabulary, rules: PreTokenizer | None) -> bool:
    """Whether BOS is added in front of a text: as the file says, else by the tokenizer model and the splitting rules."""
    if rules is not None and rules.always_bos:
        return "bos" in vocabulary.special
    return _adds(meta, vocabulary, "bos", MODELS[vocabulary.model].add_bos if rules is None else rules.add_bos)


def _adds(meta: Metadata, vocabulary: Vocabulary, name: str, default: bool) -> bool:
    added: bool = meta.tokenizer(f"ggml.add_{name}_token", default)
    if added and name not in vocabulary.special:
        meta.warn(f"this tokenizer adds {name.upper()}, but metadata tokenizer.ggml.{name}_token_id names no token, so none is added")
        return False
    return added


def _post_processor(names: Sequence[str], vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Adds BOS in front of a text ("bos" in names) and EOS behind it ("eos")."""
    if not names:
        return None

    def around(text: str, type_id: int) -> list[dict[str, Any]]:
        added = {name: [{"SpecialToken": {"id": vocabulary.text(name), "type_id": type_id}}] for name in names}
        return [*added.get("bos", ()), {"Sequence": {"id": text, "type_id": type_id}}, *added.get("eos", ())]

    ids = {vocabulary.text(name): vocabulary.special[name] for name in names}
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": around("A", 0) + around("B", 1),
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ids.items()}}


# ---- tokenizer_config.json

def _tokenizer_config(meta: Metadata, vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta.hparam("context_length"),
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        **{f"{ours}_token": text for ours, theirs in names.items() if (text := vocabulary.text(theirs)) is not None},
    }
    if (template := _chat_template(meta)) is not None:
        config["chat_template"] = template
    return config


def _chat_template(meta: Metadata) -> str | list[dict[str, str]] | None:
    """The model's template, or a list of its named templates: "default" and for example "tool_use"."""
    default = meta.tokenizer("chat_template")
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): meta.get(key, TEXT) for key in meta if key.startswith(prefix)}
    for name in meta.tokenizer("chat_templates", ()):
        if name != "default" and name not in named:
            meta.warn(f"metadata tokenizer.chat_templates names {name!r}, but {prefix}{name} is missing")
    if not named:
        return default
    if default is not None:
        named["default"] = default
    return [{"name": name, "template": template} for name, template in sorted(named.items())]
