"""Lesson 17: outputs that match a grammar, always. Before each token, the tokens that would leave the grammar get the probability zero.

A grammar is a small tree. Its derivative by a letter is the grammar of all that may follow the letter, so a position in an output is a
grammar too. The vocabulary is a trie: letters that many tokens begin with are tried once. A mask says yes or no for each token.
"""
import functools
import json
import math
import random
import string
import time
from collections import Counter, defaultdict, namedtuple

import torch
from torch import Tensor

Empty = namedtuple("Empty", "")  # only the text ""
Letter = namedtuple("Letter", "allowed")  # one of these letters, a frozenset
Then = namedtuple("Then", "first rest")  # a text of `first`, and then one of `rest`
Either = namedtuple("Either", "options")  # a text of one of these, a frozenset; without options: no text at all
Repeat = namedtuple("Repeat", "inner")  # any number of texts of `inner`, also none
Rule = namedtuple("Rule", "name")  # a text of the rule with this name
Node = Empty | Letter | Then | Either | Repeat | Rule
NOTHING = Either(frozenset())
RULES: dict[str, Node] = {}  # grammars with names. A rule may contain itself, which is more than a regular expression can do
END, TOKEN = "\0", "token"  # the text of the end-of-sequence token, which is token 0; the key of a trie's node for a token that ends there
LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def then(first: Node, rest: Node) -> Node:
    if NOTHING in (first, rest):
        return NOTHING
    if isinstance(first, Then):
        return then(first.first, then(first.rest, rest))
    return rest if isinstance(first, Empty) else first if isinstance(rest, Empty) else Then(first, rest)


def either(*options: Node) -> Node:
    flat = frozenset(one for option in options for one in (option.options if isinstance(option, Either) else [option]))
    return next(iter(flat)) if len(flat) == 1 else Either(flat)


def sequence(*parts: Node | str) -> Node:
    """These in order. A string stands for its letters."""
    nodes = [node for part in parts for node in ([Letter(frozenset(c)) for c in part] if isinstance(part, str) else [part])]
    return functools.reduce(lambda rest, node: then(node, rest), reversed(nodes), Empty())


def can_end(node: Node) -> bool:
    """Whether the text "" matches."""
    match node:
        case Then(first, rest):
            return can_end(first) and can_end(rest)
        case Either(options):
            return any(can_end(option) for option in options)
        case Rule(name):
            return can_end(RULES[name])
    return isinstance(node, Empty | Repeat)


def derivative(node: Node, letter: str) -> Node:
    """The grammar of all texts that may follow `letter`. NOTHING: the letter is not allowed here."""
    # TASK 1: one case for each kind of node; build results with `then` and `either`, which simplify them
    match node:
        case Letter(allowed):
            return Empty() if letter in allowed else NOTHING
        case Then(first, rest):
            inside = then(derivative(first, letter), rest)
            return either(inside, derivative(rest, letter)) if can_end(first) else inside
        case Either(options):
            return either(*(derivative(option, letter) for option in options))
        case Repeat(inner):
            return then(derivative(inner, letter), node)
        case Rule(name):
            return derivative(RULES[name], letter)
    return NOTHING
    # END


def after(node: Node, text: str) -> Node:
    return functools.reduce(derivative, text, node)


def make_trie(vocabulary: list[str]) -> dict:
    """letter -> the same for the next letters; and TOKEN -> the token that ends here. Token 0, the end, is left out."""
    root: dict = {}
    for token, text in enumerate(vocabulary[1:], 1):
        node = root
        for letter in text:
            node = node.setdefault(letter, {})
        node[TOKEN] = token
    return root


def allowed_tokens(state: Node, trie: dict) -> set[int]:
    """The tokens that may come next in this state of the grammar. Token 0 may if the output may end here."""
    # TASK 2: walk through the trie and the grammar together; leave out a branch as soon as nothing can follow
    found, work = {0} if can_end(state) else set(), [(trie, state)]
    while work:
        node, here = work.pop()
        for letter, child in node.items():
            if letter == TOKEN:
                found.add(child)
            elif (there := derivative(here, letter)) != NOTHING:
                work.append((child, there))
    return found
    # END


def forced_text(state: Node) -> str:
    """The longest text that every output has here, whatever the model says. "": there is a choice."""
    # TASK 3: letters as long as exactly one of LETTERS is allowed, and the output cannot end
    text = ""
    while not can_end(state) and len(found := [letter for letter in LETTERS if derivative(state, letter) != NOTHING]) == 1:
        text, state = text + found[0], derivative(state, found[0])
    return text
    # END


def masks_of(text: str, start: Node, trie: dict) -> list[set[int]]:
    """The allowed tokens before each letter of a text."""
    return [allowed_tokens(after(start, text[:i]), trie) for i in range(len(text))]


class Model:
    """A small language model: the probability of a letter depends on the 8 letters before it, as counted in some texts."""
    def __init__(self, vocabulary: list[str], texts: list[str]) -> None:
        self.vocabulary, self.counts = vocabulary, defaultdict(Counter)
        for text in texts:
            for i, letter in enumerate(text + END):
                self.counts[text[max(i - 8, 0):i]][letter] += 1

    @functools.cache  # noqa: B019
    def logits(self, context: str) -> Tensor:
        """One score per token: the log-probabilities of its letters, plus 1 for each, because real models prefer long tokens."""
        scores = [0.0] * len(self.vocabulary)
        for token, text in enumerate(self.vocabulary):
            for i, letter in enumerate(text):
                counts = self.counts.get((context + text[:i])[-8:])
                scores[token] += 1 + (math.log(counts[letter] / counts.total()) if counts and letter in counts else -9.0)
        return torch.tensor(scores)


def generate(model: Model, dice: torch.Generator, state: Node | None = None, trie: dict | None = None) -> list[int]:
    """One sampled output, at most 150 tokens. state: a grammar that it follows."""
    text, tokens = "", []
    while len(tokens) < 150 and 0 not in tokens:
        logits = model.logits(text[-8:])
        if state is not None:
            mask = torch.full_like(logits, -math.inf)
            mask[list(allowed_tokens(state, trie))] = 0.0
            logits = logits + mask
        tokens.append(int(torch.multinomial(logits.softmax(0), 1, generator=dice)))
        text += model.vocabulary[tokens[-1]]
        state = None if state is None else after(state, model.vocabulary[tokens[-1]])
    return tokens


def example(count: int = 60) -> tuple[list[str], list[str], Node]:
    """Texts to train on, a vocabulary of their letters and of pieces that are frequent in them, and their grammar."""
    dice, names = random.Random(0), ["hen", "fox", "cat", "hare", "wolf", "toad"]
    texts = [json.dumps({"name": dice.choice(names), "legs": dice.randrange(9), "likes": dice.sample([1, *names, [2, "eggs"], []], 2)})
             for _ in range(count)]
    pieces = Counter(text[i:i + size] for text in texts for i in range(len(text)) for size in range(2, 7) if i + size <= len(text))
    vocabulary = [END, *LETTERS, *sorted(pieces, key=lambda piece: (-pieces[piece] * len(piece), piece))[:400]]
    word = sequence('"', Repeat(Letter(frozenset(string.ascii_lowercase))), '"')
    digits = Letter(frozenset(string.digits))
    RULES["value"] = either(word, sequence(digits, Repeat(digits)), Rule("list"))
    RULES["list"] = sequence("[", either(Empty(), sequence(Rule("value"), Repeat(sequence(", ", Rule("value"))))), "]")
    return texts, vocabulary, sequence('{"name": ', word, ', "legs": ', digits, ', "likes": ', Rule("list"), "}")


def main() -> None:
    torch.set_num_threads(1)
    texts, vocabulary, grammar = example()
    model, trie, dice, counts = Model(vocabulary, texts), make_trie(vocabulary), torch.Generator().manual_seed(0), Counter()
    print(f"20 outputs of a small model that was trained on {len(texts)} JSON records; its vocabulary has {len(vocabulary)} tokens")
    for name, settings in (("without a grammar", ()), ("with a grammar", (grammar, trie))):
        outputs = [generate(model, dice, *settings) for _ in range(20)]
        joined = ["".join(vocabulary[token] for token in tokens) for tokens in outputs]
        valid = [text.endswith(END) and can_end(after(grammar, text[:-1])) for text in joined]
        print(f"  {name:18s}{sum(valid):3d} of 20 match the grammar. The first: {joined[0].removesuffix(END)}")

    print("\nmasks on the way through it   allowed tokens   time with a trie    token by token    forced text")
    state = grammar
    for text in map(vocabulary.__getitem__, outputs[0]):
        start = time.perf_counter()
        allowed, middle = allowed_tokens(state, trie), time.perf_counter()
        one_by_one, end = [after(state, other) != NOTHING for other in vocabulary], time.perf_counter()
        assert len(allowed - {0}) == sum(one_by_one)
        times = f"{1e3 * (middle - start):16.2f} ms{1e3 * (end - middle):15.2f} ms"
        print(f"  before {text!r:18s}{len(allowed):17d}{times}     {forced_text(state)!r}")
        state = after(state, text)
    for tokens in outputs:
        state = grammar
        for text in map(vocabulary.__getitem__, tokens):
            if forced := forced_text(state):
                counts += Counter(inside=len(text) <= len(forced), ends=len(text) >= len(forced), crosses=len(text) > len(forced))
            state = after(state, text)
    print(f"\n{counts['inside']} of {sum(map(len, outputs))} tokens lie inside a text that the grammar forces. "
          f"But {counts['crosses']} of {counts['ends']} such texts end inside a token")
    print("\nthe engine can do all of it, with 2,000 tokens/s, say. How many requests of 100 tokens per second can it promise to serve?")


if __name__ == "__main__":
    main()
