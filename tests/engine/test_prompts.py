"""The forms of a prompt, and the errors for everything else."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minivllm.engine.prompts import check_params, read_prompt
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput
from minivllm.sampling_params import SamplingParams
from tests.engine import tokenizers_for_tests as build
from tests.engine.fake import make_engine


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(Path(build.save(build.byte_level(), tmp_path_factory.mktemp("tokenizer"))))


def test_every_form_of_prompt_is_read(tokenizer: Tokenizer) -> None:
    ids = tuple(tokenizer.encode("a cat"))
    assert read_prompt("a cat", tokenizer) == read_prompt({"prompt": "a cat"}, tokenizer) == ("a cat", ids, None)
    assert read_prompt([3, 4], None) == read_prompt({"prompt_token_ids": [3, 4]}, None) == (None, (3, 4), None)
    assert read_prompt({"prompt": "a cat", "cache_salt": "s"}, tokenizer).cache_salt == "s"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [(b"a cat", "text or a list of token ids, got b'a cat'"), ({5, 6}, "text or a list of token ids, got {5, 6}"),
     ({"promt": "a"}, "did you mean 'prompt'"), ({}, "needs"), ({"prompt": 3}, "needs"), (5, "text or a list"), ([1.5], "whole numbers"),
     ([True], "whole numbers"), ("\ud800", "lone surrogate"), ({"prompt": "a", "cache_salt": 5}, "cache_salt must be text")],
)
def test_everything_else_is_an_error_that_names_the_fix(tokenizer: Tokenizer, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_prompt(prompt, tokenizer)


def test_bad_words_without_tokens_in_the_model_ban_nothing(tokenizer: Tokenizer) -> None:
    words = check_params(SamplingParams(bad_words=["cat"]), tokenizer, 10**6, 20).bad_words_token_ids
    assert words
    assert check_params(SamplingParams(bad_words=["cat"]), tokenizer, 1, 20).bad_words_token_ids == ()


def test_a_salt_in_the_prompt_keeps_its_blocks_from_others() -> None:
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    cached = []
    for name, salt in (("a", "x"), ("b", "x"), ("c", "y")):
        engine.add_request(name, {"prompt_token_ids": list(range(5, 60)), "cache_salt": salt}, params)
        while engine.has_unfinished_requests():
            cached += [delta.num_cached_tokens for delta in engine.step() if delta.finish_reason]
    assert cached[0] == 0 and cached[1] > 0 and cached[2] == 0
    engine.close()


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("word", ["the", " the"])
def test_bad_words_of_a_sentencepiece_vocabulary_are_banned_with_and_without_a_leading_space(
    tmp_path: Path, metaspace: bool, word: str,
) -> None:
    """Its tokenizer puts a space in front of every text, so the spelling inside a text was never seen."""
    tokenizer = Tokenizer(build.save(build.sentencepiece(metaspace=metaspace, merges=True), tmp_path / "t"))
    words = check_params(SamplingParams(bad_words=[word]), tokenizer, 10**6, 20).bad_words_token_ids
    spellings = {"".join(tokenizer.id_to_token(i) or "" for i in ids) for ids in words}
    assert spellings - {"▁▁the"} == ({"the", "▁the"} if word == "the" else {"▁the"})


@pytest.mark.parametrize(("make", "expected"), [
    (build.byte_level, ["the", "Ġthe"]), (lambda: build.sentencepiece(merges=True), ["the", "▁the"]), (build.wordpiece, ["the", "the"]),
], ids=["byte level", "sentencepiece", "wordpiece"])
def test_a_part_of_a_text_is_encoded_without_what_a_whole_text_gets(tmp_path: Path, make: Any, expected: list[str]) -> None:
    tokenizer = Tokenizer(build.save(make(), tmp_path / "t"))
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode_inside("the the")] == expected
