"""Capstone: a whole engine in one file. Paged blocks, prefix sharing, chunked prefill, continuous batching, preemption, sampling.

    add ─▶ waiting ─▶ schedule ─▶ execute ─▶ update ─▶ finished
                         │  ▲        │          │
                    BlockPool ───────┴── Model  └── sample

One promise holds everything together: the tokens of a request depend on its prompt and its settings only. They do not depend on the other
requests of the batch, on the sizes of chunks, on the prefix cache, or on preemption. The checks test this promise.
"""
import json
import time
from collections import deque
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What the machine has, and how it is shared."""

    num_blocks: int = 64
    block_size: int = 4  # tokens of a block
    max_rows: int = 8  # sequences in one step
    token_budget: int = 32  # tokens in one step, of all sequences
    max_chunk: int = 32  # tokens in one step, of one sequence
    prefix_caching: bool = True


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when an output ends."""

    max_tokens: int = 16
    temperature: float = 0.0  # 0: always the most probable token
    top_k: int = 0  # 0: all tokens
    seed: int = 0
    stop_token: int | None = None


@dataclass(eq=False)
class Request:
    """One sequence: its tokens, and how many of them have keys and values in its blocks."""

    number: int  # in the order of arrival
    prompt: list[int]
    sampling: Sampling
    tokens: list[int]  # the prompt, then the output
    table: list[int] = field(default_factory=list)  # block table: the blocks of tokens 0 ... 3, 4 ... 7 and so on
    computed: int = 0  # tokens whose keys and values are in the blocks
    preemptions: int = 0
    finished: bool = False

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt):]


# ---- memory: lessons 2 and 7


def block_hashes(tokens: list[int], block_size: int) -> list[bytes]:
    """One hash per FULL block."""
    # TASK 2: the keys in a block depend on all tokens before its end, so its hash must too
    hashes, parent = [], b""
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = sha256(parent + repr(tokens[start:start + block_size]).encode()).digest()
        hashes.append(parent)
    return hashes
    # END


class BlockPool:
    """All blocks. A block without owners is free; if it has a hash, its content can be found until it is allocated again."""

    def __init__(self, num_blocks: int) -> None:
        self.owners = [0] * num_blocks  # reference counts
        self.free = deque(range(num_blocks))  # the next one to be allocated comes first
        self.block_of: dict[bytes, int] = {}  # hash -> block
        self.hash_of: dict[int, bytes] = {}  # block -> hash

    @property
    def num_free(self) -> int:
        return len(self.free)

    def allocate(self) -> int:
        """A free block, which gets an owner. What it contained cannot be found any more."""
        # TASK 1: take the first free block, and forget its hash
        block = self.free.popleft()
        if block in self.hash_of:
            del self.block_of[self.hash_of.pop(block)]
        self.owners[block] = 1
        return block
        # END

    def share(self, block: int) -> None:
        """One owner more. The block may be free before."""
        # TASK 1: a block with an owner is not free
        if not self.owners[block]:
            self.free.remove(block)
        self.owners[block] += 1
        # END

    def release(self, block: int) -> None:
        """One owner less."""
        # TASK 1: without owners it is free: at the end of the queue if its content may be useful again, else at the front
        self.owners[block] -= 1
        if not self.owners[block]:
            if block in self.hash_of:
                self.free.append(block)
            else:
                self.free.appendleft(block)
        # END

    def register(self, block: int, key: bytes) -> None:
        """The block is full and computed: it can be found from now on. Of two blocks with the same content the first one counts."""
        if key not in self.block_of and block not in self.hash_of:
            self.block_of[key] = block
            self.hash_of[block] = key


# ---- the model: lessons 1 and 3. It is complete: there is nothing to write here


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


class Model:
    """A Llama with a paged KV cache. weights: by the names of Hugging Face checkpoints."""

    def __init__(self, config: dict, weights: dict[str, Tensor]) -> None:
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.epsilon, self.theta = config.get("rms_norm_eps", 1e-6), config.get("rope_theta") or 10_000.0
        self.weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
        self.vocab_size = len(self.weights["embed_tokens.weight"])

    @classmethod
    def from_folder(cls, folder: Path) -> "Model":
        """A checkpoint on disk: config.json and model.safetensors."""
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text())
        config["rope_theta"] = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
        return cls(config, {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})

    @classmethod
    def random(cls, seed: int = 0, hidden: int = 32, layers: int = 2, vocabulary: int = 64) -> "Model":
        """A tiny model with random weights. In float64 the order of additions does not decide about tokens."""
        dice = torch.Generator().manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=dice, dtype=torch.float64) * 1.5 / shape[-1]**0.5

        weights = {"embed_tokens.weight": make(vocabulary, hidden), "norm.weight": torch.ones(hidden),
                   "lm_head.weight": make(vocabulary, hidden)}
        for i in range(layers):
            for name, shape in {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 2, hidden),
                                "self_attn.v_proj": (hidden // 2, hidden), "self_attn.o_proj": (hidden, hidden),
                                "mlp.gate_proj": (2 * hidden, hidden), "mlp.up_proj": (2 * hidden, hidden),
                                "mlp.down_proj": (hidden, 2 * hidden)}.items():
                weights[f"layers.{i}.{name}.weight"] = make(*shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                weights[f"layers.{i}.{name}.weight"] = torch.ones(hidden)
        return cls({"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": hidden}, weights)

    def new_cache(self, num_slots: int) -> Tensor:
        """Keys (index 0) and values (1) of all layers: [layers, 2, slots, KV heads, head_dim]. NaN: not written yet."""
        shape = (self.layers, 2, num_slots, self.kv_heads, self.head_dim)
        return torch.full(shape, torch.nan, dtype=self.weights["embed_tokens.weight"].dtype)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary position embedding of x [tokens, heads, head_dim]."""
        half = self.head_dim // 2
        angles = positions[:, None] * self.theta ** (-torch.arange(half, dtype=torch.float64) / half)  # [tokens, half]
        cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def forward(self, cache: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor, contexts: list[tuple[int, int, Tensor]]) -> Tensor:
        """One step for any mix of chunks and decodes -> hidden states [tokens, hidden].

        tokens, positions, slots [tokens]: of all sequences, one after the other; a token's key and value are written to its slot.
        contexts: for each sequence (its first row, the row after its last, the slots of all its keys up to the last row [keys]).
        """
        w, x = self.weights, self.weights["embed_tokens.weight"][tokens]
        for i in range(self.layers):
            at = f"layers.{i}"
            h = rms_norm(x, w[f"{at}.input_layernorm.weight"], self.epsilon)
            q, k, v = (F.linear(h, w[f"{at}.self_attn.{name}_proj.weight"]).unflatten(1, (-1, self.head_dim)) for name in "qkv")
            q, cache[i, 0, slots], cache[i, 1, slots] = self.rotate(q, positions), self.rotate(k, positions), v
            mixed = torch.empty_like(q)  # [tokens, heads, head_dim]
            for start, end, context in contexts:
                keys, values = cache[i][:, context].repeat_interleave(self.heads // self.kv_heads, dim=2)  # [keys, heads, head_dim]
                # q queries, k keys, h heads, d head_dim
                scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * self.head_dim**-0.5
                later = torch.arange(len(context)) > positions[start:end, None]  # [queries, keys]
                mixed[start:end] = torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), values)
            x = x + F.linear(mixed.flatten(1), w[f"{at}.self_attn.o_proj.weight"])
            h = rms_norm(x, w[f"{at}.post_attention_layernorm.weight"], self.epsilon)
            gate, up = (F.linear(h, w[f"{at}.mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, w[f"{at}.mlp.down_proj.weight"])
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> [rows, vocabulary]."""
        x = rms_norm(hidden, self.weights["norm.weight"], self.epsilon)
        return F.linear(x, self.weights.get("lm_head.weight", self.weights["embed_tokens.weight"]))


# ---- sampling: lesson 10


def gumbel_noise(count: int, seed: int, position: int) -> Tensor:
    """Noise [count] that depends on the seed of the request and the position of the token only."""
    dice = torch.Generator().manual_seed((seed * 1_000_003 + position) % 2**63)
    return -(-torch.rand(count, generator=dice, dtype=torch.float64).clamp_min(1e-300).log()).log()


def sample(logits: Tensor, sampling: Sampling, position: int) -> int:
    """The token at `position` of a sequence. logits [vocabulary]."""
    # TASK 3: temperature 0 is the largest logit; else divide by the temperature, keep the top_k largest, add the noise, take the largest
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.double() / sampling.temperature
    if sampling.top_k:
        scaled = scaled.masked_fill(scaled < scaled.topk(sampling.top_k).values[-1], -torch.inf)
    return int((scaled + gumbel_noise(len(logits), sampling.seed, position)).argmax())
    # END


# ---- the engine: lessons 4 to 7


class Engine:
    """Requests in, tokens out. A step computes at most `token_budget` tokens of at most `max_rows` sequences."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.pool = BlockPool(settings.num_blocks)
        self.cache = model.new_cache(settings.num_blocks * settings.block_size)
        self.waiting: deque[Request] = deque()  # in the order of arrival
        self.running: list[Request] = []  # in the order of arrival
        self.steps: list[list[tuple[int, int]]] = []  # of each step: (number of a request, its tokens)
        self.num_requests = 0

    def add(self, prompt: list[int], sampling: Sampling) -> Request:
        """A new request. A request that can never fit is refused."""
        most = -(-(len(prompt) + sampling.max_tokens) // self.settings.block_size)
        if not prompt or sampling.max_tokens < 1 or most > self.settings.num_blocks:
            raise ValueError(f"a prompt of {len(prompt)} tokens with max_tokens={sampling.max_tokens} needs {most} blocks, and there are "
                             f"{self.settings.num_blocks}: a prompt needs at least one token, and must fit")
        self.waiting.append(Request(self.num_requests, list(prompt), sampling, list(prompt)))
        self.num_requests += 1
        return self.waiting[-1]

    def match(self, request: Request) -> None:
        """A request without blocks gets the cached blocks of its longest known prefix."""
        # TASK 2: share the blocks, and count their tokens as computed. The last token is always computed: its logits give the next one
        if self.settings.prefix_caching:
            for key in block_hashes(request.tokens[:-1], self.settings.block_size):
                if key not in self.pool.block_of:
                    break
                block = self.pool.block_of[key]
                self.pool.share(block)
                request.table.append(block)
            request.computed = len(request.table) * self.settings.block_size
        # END

    def grow(self, request: Request, length: int) -> bool:
        """Blocks for the first `length` tokens of a request. False: not enough are free, and nothing has changed."""
        missing = -(-length // self.settings.block_size) - len(request.table)
        if missing > self.pool.num_free:
            return False
        request.table += [self.pool.allocate() for _ in range(missing)]
        return True

    def drop_blocks(self, request: Request) -> None:
        """Release all blocks of a request. The last ones first: beginnings are useful to more requests, so they are kept longest."""
        while request.table:
            self.pool.release(request.table.pop())
        request.computed = 0

    def preempt(self, request: Request) -> None:
        """Take the blocks of a running request. Later it computes its tokens again, as if they were a prompt."""
        # TASK 4: a preempted request keeps its tokens, and comes before all that wait
        self.drop_blocks(request)
        self.running.remove(request)
        self.waiting.appendleft(request)
        request.preemptions += 1
        # END

    def schedule(self) -> list[tuple[Request, int]]:
        """What the next step computes: (request, number of its next tokens). All blocks that it needs are in the tables afterwards.

        A request needs len(tokens) - computed tokens; that is 1 for a decode. The number is limited by max_chunk and by what is left of
        the token budget. Running requests come first. One that needs a block while none is free preempts the last running request.
        """
        # TASK 5: running requests; then waiting ones, unless a request was preempted in this step
        plan, budget, preempted, settings = [], self.settings.token_budget, False, self.settings
        for request in list(self.running):
            count = min(len(request.tokens) - request.computed, settings.max_chunk, budget)
            if request not in self.running or not count:
                continue
            while request in self.running and not self.grow(request, request.computed + count):
                self.preempt(self.running[-1])  # it has the lowest priority, and is not in the plan: that goes from the first to the last
                preempted = True
            if request in self.running:
                plan.append((request, count))
                budget -= count
        while self.waiting and budget and len(self.running) < settings.max_rows and not preempted:
            request = self.waiting[0]
            self.match(request)
            count = min(len(request.tokens) - request.computed, settings.max_chunk, budget)
            if not self.grow(request, request.computed + count):
                self.drop_blocks(request)
                break
            self.running.append(self.waiting.popleft())
            plan.append((request, count))
            budget -= count
        return plan
        # END

    def execute(self, plan: list[tuple[Request, int]]) -> Tensor:
        """Compute the tokens of a plan -> the logits after the last token of each request [requests, vocabulary]."""
        tokens, positions, slots, contexts = [], [], [], []
        for request, count in plan:
            end = request.computed + count
            of_all = [request.table[i // self.settings.block_size] * self.settings.block_size + i % self.settings.block_size
                      for i in range(end)]
            contexts.append((len(tokens), len(tokens) + count, torch.tensor(of_all)))
            tokens += request.tokens[request.computed:end]
            positions += range(request.computed, end)
            slots += of_all[request.computed:]
        hidden = self.model.forward(self.cache, torch.tensor(tokens), torch.tensor(positions), torch.tensor(slots), contexts)
        return self.model.logits(hidden[[end - 1 for _, end, _ in contexts]])

    def update(self, plan: list[tuple[Request, int]], logits: Tensor) -> None:
        """Count the computed tokens, make full blocks known, add sampled tokens, and end what is finished."""
        for (request, count), row in zip(plan, logits, strict=True):
            # TASK 6: only a request whose tokens are all computed gets a new token. One that has finished leaves at once
            request.computed += count
            keys = block_hashes(request.tokens[:request.computed], self.settings.block_size)
            for block, key in zip(request.table, keys, strict=False):
                self.pool.register(block, key)
            if request.computed == len(request.tokens):
                request.tokens.append(sample(row, request.sampling, len(request.tokens)))
                if len(request.output) == request.sampling.max_tokens or request.tokens[-1] == request.sampling.stop_token:
                    request.finished = True
                    self.running.remove(request)
                    self.drop_blocks(request)
            # END

    def step(self) -> None:
        plan = self.schedule()
        assert plan, "nothing was scheduled although requests are waiting or running"
        self.steps.append([(request.number, count) for request, count in plan])
        self.update(plan, self.execute(plan))

    def run(self) -> None:
        """Steps until all requests have finished."""
        while self.waiting or self.running:
            self.step()


def mixed_load(count: int = 24) -> list[tuple[list[int], Sampling]]:
    """Requests of different lengths. Every second one begins with the same 12 tokens."""
    dice = torch.Generator().manual_seed(1)
    load = []
    for i in range(count):
        own = torch.randint(0, 64, (3 + 5 * (i % 4),), generator=dice).tolist()
        shared = [7] * 4 + list(range(8)) if i % 2 else []
        load.append((shared + own, Sampling(max_tokens=4 + 3 * (i % 5), temperature=i % 3 / 2, seed=i)))
    return load


def main() -> None:
    torch.set_num_threads(1)
    model, results = Model.random(), {}
    print("24 requests                                  steps   tokens computed   preemptions   most rows       time")
    for name, settings in {
        "one at a time, no sharing": Settings(max_rows=1, prefix_caching=False), "continuous batching": Settings(prefix_caching=False),
        "with prefix sharing": Settings(), "chunks of 3 tokens": Settings(max_chunk=3), "14 blocks instead of 64": Settings(num_blocks=14),
    }.items():
        engine, start = Engine(model, settings), time.perf_counter()
        requests = [engine.add(prompt, sampling) for prompt, sampling in mixed_load()]
        engine.run()
        results[name] = [request.output for request in requests]
        print(f"  {name:37s}{len(engine.steps):11d}{sum(count for step in engine.steps for _, count in step):18d}"
              f"{sum(request.preemptions for request in requests):14d}{max(map(len, engine.steps)):12d}"
              f"{1e3 * (time.perf_counter() - start):8.0f} ms")
    first, *others = results.values()
    print(f"  the tokens are {'the same in all cases' if all(other == first for other in others) else 'DIFFERENT'}: {first[0]} ...")


if __name__ == "__main__":
    main()
