"""Lesson 1: a language model generates one token at a time, and keeps keys and values so that it need not compute them again.

A transformer with 2 layers memorizes a short text, then writes it twice: once it recomputes the whole text for every new letter, once
it uses a KV cache. The letters are the same. The lesson counts the work of both, and what the cache costs.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TEXT = (
    "the hen sat on the hill. the hen saw the hat. the hat was on the fox. the fox ran up the hill. "
    "the hen ran down the hill. the fox ran after the hen. the hat fell in the mud. the hen sat on the hat. "
)
LETTERS = sorted(set(TEXT))


class Shape(NamedTuple):
    """The sizes of a model. With fewer key/value heads than query heads, attention is grouped-query attention (GQA)."""
    vocab: int = len(LETTERS)
    width: int = 64  # numbers per token between layers
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    inner: int = 128


@dataclass
class Work:
    """The cost of a forward pass, counted while it runs. One multiply-add = 2 operations (FLOPs)."""
    rows: int = 0  # token rows computed by the layers
    flops: int = 0

    def matmul(self, m: int, k: int, n: int) -> None:
        self.flops += 2 * m * k * n


class Cache:
    """Keys and values of every token seen so far: per layer, [tokens, kv_heads, head_dim] each."""
    def __init__(self, shape: Shape) -> None:
        empty = torch.empty(0, shape.kv_heads, shape.head_dim)
        self.k, self.v = [empty] * shape.layers, [empty] * shape.layers
        self.copied = 0  # tokens whose key and value were copied to make room, in one layer

    def __len__(self) -> int:
        return len(self.k[0])

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' k and v -> those of all tokens."""
        self.copied += len(self) if layer == 0 else 0
        self.k[layer] = torch.cat([self.k[layer], k])  # copies everything: simple and slow
        self.v[layer] = torch.cat([self.v[layer], v])
        return self.k[layer], self.v[layer]

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.k + self.v)


def random_weights(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """One flat dictionary. A weight matrix is stored [out, in], as checkpoints do."""
    generator = torch.Generator().manual_seed(seed)
    w = {"embed": torch.randn(shape.vocab, shape.width, generator=generator) * 0.1, "final_norm": torch.ones(shape.width)}
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"q": (q, shape.width), "k": (kv, shape.width), "v": (kv, shape.width), "o": (shape.width, q),
             "gate": (shape.inner, shape.width), "up": (shape.inner, shape.width), "down": (shape.width, shape.inner)}
    for i in range(shape.layers):
        w[f"{i}.norm1"], w[f"{i}.norm2"] = torch.ones(shape.width), torch.ones(shape.width)
        for name, (rows, cols) in sizes.items():
            w[f"{i}.{name}"] = torch.randn(rows, cols, generator=generator) * cols**-0.5
    return w


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding: numbers j and j + half form one complex number, rotated by position x speed_j."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half) / half)
    angle = positions[:, None, None] * speed  # [t, 1, half]
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, work: Work) -> Tensor:
    """Attention of the last `new` of `total` tokens: q [new, heads, d], k and v [total, kv_heads, d] -> [new, heads * d]."""
    (new, heads, d), (total, kv_heads, _) = q.shape, k.shape
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for x in (k, v))  # [heads, total, d]: heads share k and v
    scores = q.transpose(0, 1) @ k.transpose(1, 2) / d**0.5  # [heads, new, total]
    # TASK 2: visible [new, total]: True where the new token in that row may attend to the token in that column
    visible = torch.arange(total)[None, :] <= torch.arange(total - new, total)[:, None]  # no token sees a later one
    # END
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    work.matmul(new * heads, d, total)
    work.matmul(new * heads, total, d)
    return (weights @ v).transpose(0, 1).flatten(1)


def forward(w: dict[str, Tensor], shape: Shape, tokens: Tensor, work: Work, cache: Cache | None = None) -> Tensor:
    """tokens [t] -> logits [t, vocab]. With a cache, `tokens` are only the new ones; the cache holds all earlier ones."""
    work.rows += len(tokens)
    start = len(cache) if cache is not None else 0
    positions = torch.arange(start, start + len(tokens))

    def dense(x: Tensor, name: str) -> Tensor:
        work.matmul(len(x), w[name].shape[1], w[name].shape[0])
        return x @ w[name].T

    x = w["embed"][tokens]  # [t, width]
    for i in range(shape.layers):
        y = rms_norm(x, w[f"{i}.norm1"])
        q, k, v = (dense(y, f"{i}.{n}").unflatten(-1, (-1, shape.head_dim)) for n in "qkv")
        q, k = rotate(q, positions), rotate(k, positions)
        if cache is not None:
            k, v = cache.extend(i, k, v)
        x = x + dense(attend(q, k, v, work), f"{i}.o")
        y = rms_norm(x, w[f"{i}.norm2"])
        x = x + dense(torch.nn.functional.silu(dense(y, f"{i}.gate")) * dense(y, f"{i}.up"), f"{i}.down")
    return dense(rms_norm(x, w["final_norm"]), "embed")  # the output head is the embedding table


def train(w: dict[str, Tensor], shape: Shape, steps: int) -> float:
    """Train the model to predict letter i + 1 from letters 0..i, for all i at once. Returns the last loss."""
    for p in w.values():
        p.requires_grad_()
    ids = encode(TEXT)
    adam = torch.optim.Adam(w.values(), lr=5e-3)
    for _ in range(steps):
        adam.zero_grad()
        loss = torch.nn.functional.cross_entropy(forward(w, shape, ids[:-1], Work()), ids[1:])
        loss.backward()
        adam.step()
    for p in w.values():
        p.requires_grad_(False)
    return loss.item()


def generate_without_cache(w: dict[str, Tensor], shape: Shape, prompt: Tensor, n: int) -> tuple[list[int], list[Work]]:
    """n times: run the model over the whole text, and keep only the best letter of the last row."""
    text, steps = prompt.tolist(), []
    for _ in range(n):
        steps.append(Work())
        logits = forward(w, shape, torch.tensor(text), steps[-1])
        text.append(int(logits[-1].argmax()))
    return text[len(prompt):], steps


def generate_with_cache(w: dict[str, Tensor], shape: Shape, prompt: Tensor, n: int) -> tuple[list[int], list[Work], Cache]:
    """The first step computes the prompt (prefill). Every later step computes a single row (decode)."""
    cache, out, steps = Cache(shape), [], []
    # TASK 3: n steps with the cache. Each appends a letter to `out` and a Work to `steps`
    tokens = prompt
    for _ in range(n):
        steps.append(Work())
        logits = forward(w, shape, tokens, steps[-1], cache)
        out.append(int(logits[-1].argmax()))
        tokens = torch.tensor(out[-1:])
    # END
    return out, steps, cache


def kv_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int = 1, bytes_per_number: int = 2) -> int:
    """Bytes of the keys and values of `tokens` tokens in all layers. A key, and a value, has head_dim numbers for each of kv_heads."""
    # TASK 1: return the number of bytes
    return 2 * layers * kv_heads * head_dim * bytes_per_number * tokens
    # END


def encode(text: str) -> Tensor:
    return torch.tensor([LETTERS.index(c) for c in text])


def main(train_steps: int = 60, n: int = 96) -> None:
    torch.set_num_threads(1)  # more threads would slow a model of this size down
    shape, prompt = Shape(), encode("the hen ")
    w = random_weights(shape)
    print(f"trained {train_steps} steps on {len(TEXT)} letters: loss {train(w, shape, train_steps):.3f} nats per letter")
    slow, slow_steps = generate_without_cache(w, shape, prompt, n)
    fast, fast_steps, cache = generate_with_cache(w, shape, prompt, n)
    assert slow == fast, "the cache changed the text"
    print("both ways write: the hen |", "".join(LETTERS[i] for i in fast), sep="", end="\n\n")

    print("step  rows without  with   MFLOP without   with    (without and with the cache)")
    for name, steps in [(str(i), slice(i, i + 1)) for i in (0, 1, 2, 10, 50, n - 1)] + [("all", slice(None))]:
        a_rows, b_rows = (sum(work.rows for work in ways[steps]) for ways in (slow_steps, fast_steps))
        a_flops, b_flops = (sum(work.flops for work in ways[steps]) / 1e6 for ways in (slow_steps, fast_steps))
        print(f"{name:>4s}  {a_rows:12d}  {b_rows:4d}   {a_flops:13.3f}  {b_flops:5.3f}")

    formula = kv_bytes(shape.layers, shape.kv_heads, shape.head_dim, len(cache), bytes_per_number=4)
    print(f"\nthe cache holds {len(cache)} tokens in {cache.nbytes():,} bytes (formula: {formula:,})")
    print(f"to make room for them one by one, it copied {cache.copied:,} tokens\n")
    print("the same formula, 2-byte numbers            per token      2,000 tokens   131,072 tokens")
    for name, dims in (("SmolLM2-135M (30 layers, 3 kv heads of 64)", (30, 3, 64)), ("Llama-3-8B (32 layers, 8 of 128)", (32, 8, 128)),
                       ("Llama-3-70B (80 layers, 8 of 128)", (80, 8, 128)), ("the same without GQA (80, 64 of 128)", (80, 64, 128))):
        one, some, many = kv_bytes(*dims) / 2**10, kv_bytes(*dims, 2000) / 2**20, kv_bytes(*dims, 2**17) / 2**30
        print(f"{name:43s} {one:6.1f} KiB  {some:9.1f} MiB  {many:10.1f} GiB")


if __name__ == "__main__":
    main()
