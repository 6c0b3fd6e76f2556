"""Small tokenizers with every kind of decoder."""
from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "the quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not!",
    "Paging splits memory into blocks, and a block table says where each one lies.",
    "déjà vu, naïve café, größer, 日本語のテキスト, 你好世界, привет мир, 🎉🚀 done",
    "def f(x):\n    return x + 1\n\n\nprint(f(41))  # 42\n",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> Tokenizer:
    """GPT-2's kind: every byte has a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    return tokenizer


def _pieces() -> dict[str, int]:
    words = ["▁the", "▁fox", "▁dog", "the", "ca", "fé", "▁", "▁▁", "日", "本", ".", "!", "a", "b", "c", "e", "o", "▁a"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    return {name: i for i, name in enumerate(names)}


def sentencepiece(*, metaspace: bool = False, strip: bool = True, merges: bool = False) -> Tokenizer:
    """Llama-2's kind: pieces with U+2581 for a space, and tokens such as <0xE2> for bytes without a piece."""
    pieces = _pieces() | ({piece: 400 + i for i, piece in enumerate(("t", "h", "th"))} if merges else {})
    pairs = [("t", "h"), ("th", "e"), ("▁", "the")] if merges else []
    tokenizer = Tokenizer(models.BPE(pieces, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if strip else []),
        ])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT's kind: its decoder depends on neighboring tokens, so it is not a table of tokens."""
    words = ["[UNK]", "the", "dog", "fox", "##s", "##ing", "jump", "sleep", ".", "!", "'", "don", "t"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    """A model folder's tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE, **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder
