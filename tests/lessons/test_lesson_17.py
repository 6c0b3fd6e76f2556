"""Lesson 17: its masks are those of minivllm's matchers, bit by bit, and its packed form does the same to logits."""
from __future__ import annotations

import json
from types import ModuleType

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from minivllm.engine.grammar import fill_masks
from minivllm.engine.grammar_text import VocabularySource, build_matcher
from minivllm.kernels.reference.sampling import apply_bitmask
from tests.lessons.loading import Mistake

pytest.importorskip("llguidance")

THEN = "return either(inside, derivative(rest, letter)) if can_end(first) else inside"
PRUNED = """                found.add(child)
            elif (there := derivative(here, letter)) != NOTHING:
                work.append((child, there))
"""
WHOLE = """                found |= {child} if here != NOTHING else set()
            else:
                work.append((child, derivative(here, letter)))
"""
MISTAKES = [
    Mistake(1, THEN, "return inside", "may also be the first one of `rest`"),
    Mistake(1, "return then(derivative(inner, letter), node)", "return derivative(inner, letter)", "the Repeat itself stays behind it"),
    Mistake(1, "return either(*(derivative(option, letter) for option in options))",
            "return next((d for option in options if (d := derivative(option, letter)) != NOTHING), NOTHING)", "ALL its options"),
    Mistake(2, "found, work = {0} if can_end(state) else set(), [(trie, state)]", "found, work = {0}, [(trie, state)]", "may not end here"),
    Mistake(2, "            if letter == TOKEN:\n", "            if letter == TOKEN and can_end(here):\n", "can CONTINUE after it"),
    Mistake(2, PRUNED, WHOLE, "leave a path as soon as"),
    Mistake(3, "while not can_end(state) and len(", "while len(", "may END"),
    Mistake(3, "for letter in LETTERS if derivative(state, letter) != NOTHING]) == 1:",
            "for letter in LETTERS if derivative(state, letter) != NOTHING]) >= 1:", "that is a choice of the model"),
    Mistake(4, "    return [allowed_tokens(after(start, text[:i]), trie) for i in range(len(text))]\n",
            "    return [allowed_tokens(start, trie)] * len(text)\n", "is wrong"),
]


def lark(lesson: ModuleType, node: object) -> str:
    """A grammar of the lesson in llguidance's dialect of Lark. It has no terminals of several letters, so letters stay letters."""
    match node:
        case lesson.Letter(allowed):
            return "(" + " | ".join(json.dumps(letter) for letter in sorted(allowed)) + ")"
        case lesson.Then(first, rest):
            return f"{lark(lesson, first)} {lark(lesson, rest)}"
        case lesson.Either(options):
            return "(" + " | ".join(sorted(lark(lesson, option) or '""' for option in options)) + ")"
        case lesson.Repeat(inner):
            return f"({lark(lesson, inner)})*"
        case lesson.Rule(name):
            return f"r_{name}"
    return '""'


def test_lesson_and_matcher_allow_the_same_tokens(lesson: ModuleType) -> None:
    texts, vocabulary, grammar = lesson.example(10)
    names = ["</s>", *(text.replace(" ", "Ġ").replace("\n", "Ċ") for text in vocabulary[1:])]  # the letters of byte-level tokenizers
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "</s>"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    rules = "".join(f"r_{name}: {lark(lesson, node)}\n" for name, node in lesson.RULES.items())
    text = f'%llguidance {{"no_forcing": true}}\nstart: {lark(lesson, grammar)}\n{rules}'
    matcher = build_matcher(text, VocabularySource(tokenizer.to_str(), (0,)).build(), "grammar")
    trie, state, words = lesson.make_trie(vocabulary), grammar, np.zeros((1, -(-len(vocabulary) // 32)), np.int32)
    for letter in texts[0] + lesson.END:
        fill_masks(None, [(matcher, [])], words)
        theirs = {i for i in range(len(vocabulary)) if words[0, i // 32] >> (i % 32) & 1}
        assert lesson.allowed_tokens(state, trie) == theirs, letter
        logits = torch.zeros(1, len(vocabulary))
        apply_bitmask(logits, None, torch.from_numpy(words.copy()))
        assert set(logits[0].isfinite().nonzero().flatten().tolist()) == theirs
        if letter != lesson.END:
            assert matcher.consume_token(vocabulary.index(letter))
            state = lesson.derivative(state, letter)
    assert theirs == {0}
