"""Gemma 3 270M, the packaged model that is fetched only if a user names it. Oracles: Transformers, llama.cpp, SentencePiece's algorithm.

These tests run if its file is in the cache (`minivllm pull gemma3-270m`), or with MINIVLLM_TEST_DOWNLOADS=1, which downloads 238 MB.
"""
from __future__ import annotations

import os
import pydoc_data.topics
import random
import re
from pathlib import Path

import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.config import EngineConfig
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput
from minivllm.models.cache import DOWNLOADS, cache_dir
from minivllm.models.gguf import convert, read_header
from minivllm.models.gguf_tokenizer import TokenType
from minivllm.models.hub import ModelFiles, find_model
from minivllm.models.packaged import PACKAGED, packaged_gguf
from tests.models.test_gguf_tokenizer import by_score

NAME = "gemma3-270m"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = (
    "The capital of France is", "def fibonacci(n):\n    ", "Die Hauptstadt von Deutschland ist", "1, 1, 2, 3, 5, 8,", "人工智能是",
    "Q: What is the boiling point of water?\nA:", "aaa   lots   of   spaces\n\n\n",
    " ".join(f"Number {i} comes before {i + 1}." for i in range(70)),  # longer than the window of 512 tokens
)

# Text -> token ids of llama.cpp's server (/tokenize with add_special and parse_special).
LLAMA_CPP: tuple[tuple[str, list[int]], ...] = (
    ("Hello, world!", [2, 9259, 236764, 1902, 236888]),
    ("  two spaces", [2, 138, 13498, 9952]),
    ("a" + " " * 40 + "b", [2, 236746, 167, 145, 236763]),
    ("x\n\n\ny\r\nz\n" + "\n" * 33 + "end", [2, 236781, 109, 236762, 251, 107, 236802, 137, 109, 643]),
    ("\tdef f(x):\n        return x ** 2", [2, 255968, 2063, 517, 236769, 236781, 1473, 107, 144, 2060, 1123, 5213, 236743, 236778]),
    ("Größe: 3,14 €; ½ ﬁ", [2, 9322, 237001, 16756, 236787, 236743, 236800, 236764, 236770, 236812, 11361, 236793, 47041, 97940]),
    ("人工智能是什么？", [2, 136119, 54847, 237536]),
    ("한국어", [2, 114216, 237430]),
    ("مُحَمَّد", [2, 236873, 237880, 236989, 69622, 40929, 236897]),
    ("हिन्दी", [2, 16017, 70249]),
    ("\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f1e9\U0001f1ea",
     [2, 243767, 237243, 243767, 237243, 244814, 237243, 244990, 246841, 245562]),
    ("\u200b\xa0\u2028\ufeff", [2, 237141, 432, 398, 464, 366, 406, 237922]),
    ("\U0010ffff\x00\x7f", [2, 482, 381, 429, 429, 238, 251541]),
    ("<start_of_turn>user\nhi<end_of_turn>\n", [2, 105, 2364, 107, 2202, 106, 107]),
    ("<bos>a<eos>", [2, 2, 236746, 1]),
    ("<unused3>[multimodal]<table>", [2, 9, 5, 168]),
    ("a▁b ▁▁c", [2, 236746, 518, 236743, 236743, 505]),
    ("1234567890.50", [2, 236770, 236778, 236800, 236812, 236810, 236825, 236832, 236828, 236819, 236771, 236761, 236810, 236771]),
    ("I'm you'RE they'll", [2, 236777, 236789, 236757, 611, 236789, 1357, 901, 236789, 859]),
    ("https://example.com/a?b=c&d=%20",
     [2, 2574, 1411, 8358, 236761, 854, 236786, 236746, 236881, 236763, 236784, 236755, 236880, 236753, 38077, 236778, 236771]),
    ("<0x41>", [2, 236820, 236771, 236781, 236812, 236770, 236813]),
    ("ราชอาณาจักรไทย", [2, 59734, 20962, 109386, 173066, 49862]),
)


@pytest.fixture(scope="module")
def path() -> Path:
    if not (cache_dir() / DOWNLOADS / PACKAGED[NAME].file).exists() and not os.environ.get("MINIVLLM_TEST_DOWNLOADS"):
        pytest.skip(f"not in the cache: `minivllm pull {NAME}` downloads it, as does MINIVLLM_TEST_DOWNLOADS=1")
    return packaged_gguf(PACKAGED[NAME])


@pytest.fixture(scope="module")
def files(path: Path) -> ModelFiles:
    return find_model(EngineConfig(model=NAME))


def test_greedy_tokens_equal_those_of_transformers_with_dequantized_weights(path: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with LLM(NAME, dtype="float32", device="cpu", max_model_len=1100, num_gpu_blocks_override=400, max_num_batched_tokens=500) as llm:
        ours = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        with pytest.raises(InvalidInput, match="this model has no chat template"):
            llm.chat([{"role": "user", "content": "hi"}])
    assert max(len(output.prompt_token_ids) for output in ours) > 512
    convert(path, tmp_path / "float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.float32).eval()
    for output in ours:
        prompt = torch.tensor([output.prompt_token_ids])
        expected = theirs.generate(prompt, max_new_tokens=GREEDY.max_tokens, do_sample=False, eos_token_id=None)[0, prompt.shape[1]:]
        assert list(output.outputs[0].token_ids) == expected.tolist(), output.prompt


def test_token_ids_are_those_of_llama_cpp(files: ModelFiles) -> None:
    assert files.tokenizer_folder is not None
    tokenizer = Tokenizer(files.tokenizer_folder)
    for text, expected in LLAMA_CPP:
        assert tokenizer.encode(text) == expected, text


def test_tokens_are_those_of_sentencepieces_algorithm(path: Path, files: ModelFiles) -> None:
    """User-defined tokens are found first, the longest one at each place; between them, pieces are joined by score."""
    assert files.tokenizer_folder is not None
    meta, _, vocabulary, _, _ = read_header(path)
    assert vocabulary is not None
    tokenizer, scores = Tokenizer(files.tokenizer_folder), meta.tokenizer("ggml.scores")
    pieces = {token: scores[i] for i, token in enumerate(vocabulary.tokens) if vocabulary.types[i] == TokenType.NORMAL}
    words = {token for i, token in enumerate(vocabulary.tokens) if vocabulary.types[i] == TokenType.USER_DEFINED}
    split = re.compile("(" + "|".join(map(re.escape, sorted(words, key=len, reverse=True))) + ")")
    number = {token: i for i, token in enumerate(vocabulary.tokens)}
    rng, topics = random.Random(0), "\n".join(pydoc_data.topics.topics.values())
    texts = [topics[i:i + 120] for i in range(0, len(topics), len(topics) // 100)]
    texts += ["".join(rng.choices("ab zé漢\n  \t.,<>0159ÀЖ한👍e", k=rng.randint(1, 30))) for _ in range(100)]
    texts += ["".join(vocabulary.tokens[rng.randrange(260, len(number))].replace("▁", " ") for _ in range(8)) for _ in range(100)]
    control = {token for i, token in enumerate(vocabulary.tokens) if vocabulary.types[i] == TokenType.CONTROL}
    texts = [text for text in texts if not any(token in text for token in control)]
    assert len(texts) > 250
    for text in texts:
        expected = [token for part in split.split(text)
                    for token in ([part] if part in words else by_score(part.replace(" ", "▁"), pieces))]
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == [number[token] for token in expected], text
        assert tokenizer.decode(ids) == text
