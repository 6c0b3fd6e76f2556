"""How each byte-pair tokenizer of a GGUF file splits text before it merges: one row per value of `tokenizer.ggml.pre`.

A GGUF file stores a tokenizer's tokens and merges, and only the name of its splitting rules. The rules themselves are the model makers'
(the `pre_tokenizer` in their tokenizer.json); the names, and the flags beside them, are llama.cpp's (src/llama-vocab.cpp).

    "llama-bpe"   "Hi there 1234"  ->  "Hi", " there", " ", "123", "4"
    "qwen2"                        ->  "Hi", " there", " ", "1", "2", "3", "4"
    "gpt-2"                        ->  "Hi", " there", " 1234"

llama.cpp's flag clean_spaces is not listed: it has no effect on tokens or on text that is generated token by token.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PreTokenizer:
    """The splitting rules of one `tokenizer.ggml.pre`, and what else its name implies."""

    splits: tuple[str, ...]  # regular expressions, applied one after another: each match is a piece, and so is the text between matches
    ignore_merges: bool = False  # a piece that is a token of the vocabulary becomes this token, without merging
    add_bos: bool = False  # the default of tokenizer.ggml.add_bos_token
    always_bos: bool = False  # BOS is added even if the file says otherwise
    byte_level: bool = True  # tokens are written in GPT-2's alphabet for bytes; otherwise as text, with <0x..> for single bytes
    escape_spaces: bool = False  # a space is written as ▁ in the vocabulary, as in SentencePiece
    lstrip: tuple[str, ...] = ()  # special tokens that take the spaces in front of them


# ---- parts of the regular expressions

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_THREE_DIGITS = r"\p{N}{1,3}"
_THREES_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # 1234567 -> 1, 234, 567
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASIAN = ("[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff"
          "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+")
_LINES = r"[^\n]+|[\n]+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str, endings: str = _ENDINGS + "|") -> str:
    """Words with one leading character, as in cl100k, Llama 3 and Qwen 2."""
    return rf"{endings}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(digits: str, endings: str = f"{_ENDINGS}?", without: str = "", line_ends: str = r"[\r\n/]*") -> str:
    """Words that also end where the case changes, as in o200k."""
    upper, lower = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]"
    first = r"[^\r\n\p{L}\p{N}]?"
    return (rf"{first}{upper}*{lower}+{endings}|{first}{upper}+{lower}*{endings}|{digits}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+{line_ends}|{_SPACES}")


def _marked(symbols_end: str = r"[\r\n]*", spaces: str = _SPACES) -> str:
    """Words with their combining marks, and punctuation that takes the ASCII word after it, as in DeepSeek V3."""
    return (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
            rf"| ?[\p{{P}}\p{{S}}]+{symbols_end}|{spaces}")


_LLAMA3, _QWEN2 = _words(_THREE_DIGITS), _words(_DIGIT)
_O200K = _cased(_THREE_DIGITS)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_KIMI = r"\p{Han}+|" + _cased(_THREE_DIGITS, without=r"&&[^\p{Han}]", line_ends=r"[\r\n]*")
_DEEPSEEK3 = (_THREE_DIGITS, _HAN_KANA, _marked())

# ---- the rows

_GPT2_ROW = PreTokenizer((_GPT2,))
_DIGITS_ROW = PreTokenizer((_DIGIT, _GPT2))
_LLAMA3_ROW = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_ROW = PreTokenizer((_QWEN2,))
_O200K_ROW = PreTokenizer((_O200K,))
_DEEPSEEK3_ROW = PreTokenizer(_DEEPSEEK3)
_BLOOM_ROW = PreTokenizer((_BLOOM,))
_TINY_AYA_ROW = PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _O200K))
_BAILING_ROW = PreTokenizer((
    rf"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|{_DIGIT}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",))
_GEMMA4_ROW = PreTokenizer((_LINES,), always_bos=True, byte_level=False, escape_spaces=True)

# What llama.cpp does with a file that does not name its rules.
DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
DEFAULT_IN_WORDS = "punctuation, then GPT-2's words, then digits in groups of three"

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": DEFAULT,
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
                    _LLAMA3_ROW),
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "a.x-4.0", "mellum", "modern-bert", "exaone4", "mpt", "olmo",
                     "jais", "trillion", "granite-docling", "jina-v1-en", "roberta-bpe"), _GPT2_ROW),
    **dict.fromkeys(("jina-v2-es", "jina-v2-de", "jina-v2-code"), PreTokenizer((_GPT2,), lstrip=("<mask>",))),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS_ROW),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "megrez", "hunyuan", "grok-2", "solar-open"),
                    _QWEN2_ROW),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _O200K_ROW),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _DEEPSEEK3_ROW),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), _BLOOM_ROW),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _TINY_AYA_ROW),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING_ROW),
    **dict.fromkeys(("gemma4", "granite-embed-multi-311m"), _GEMMA4_ROW),
    "sarvam-moe": PreTokenizer((_LINES,), byte_level=False, escape_spaces=True),
    "whitespace": PreTokenizer((r"\S+",), byte_level=False),
    "granite-embed-multi-97m": PreTokenizer((_O200K,), ignore_merges=True),
    "tekken": PreTokenizer((_cased(_DIGIT, endings=""),), ignore_merges=True, add_bos=True),
    "minicpm5": PreTokenizer((_THREE_DIGITS, _words(r"\p{N}+")), ignore_merges=True),
    "qwen35": PreTokenizer((
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{_DIGIT}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",)),
    "ufakzeka": PreTokenizer((_words(_DIGIT, endings=""),)),
    "laguna": PreTokenizer((_LINES, _QWEN2)),
    "jais-2": PreTokenizer((_LLAMA3.removesuffix(r"\s+(?!\S)|\s+") + "|".join(
        rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")) + r"|\s{1}",)),
    "kimi-k2": PreTokenizer((_KIMI,)),
    "viking": PreTokenizer((_BLOOM, _DIGIT)),
    "seed-coder": PreTokenizer((
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{_DIGIT}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    "exaone-moe": PreTokenizer((
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|{_DIGIT}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",)),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "afmoe": PreTokenizer((_THREES_FROM_THE_RIGHT, _ASIAN, _marked())),
    "spark2_5": PreTokenizer((_THREE_DIGITS, _HAN_KANA, _marked("", r"[\r\n]|\s+(?!\S)|\s+"), _DIGIT)),
    "youtu": PreTokenizer((
        "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
        "|[\u3105-\u312f]+|" + _HAN_KANA, _cased(_DIGIT)), ignore_merges=True),
    "deepseek-llm": PreTokenizer((
        "[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$", _HAN_HANGUL,
        r"\p{N}+")),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, _DIGIT)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "chameleon": PreTokenizer((
        "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\t\n]|    |  )", _DIGIT, r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
        add_bos=True),
}
