"""Every number that was chosen by measuring: tiles, thresholds between kernels, shapes of captured graphs.

This module is plain Python, so that all packages can read it. Each number states its unit and where it was measured:

    H200     one NVIDIA H200: `python -m bench.gpu_kernels`, `python -m bench.step_budget`
    sm_89    compiled for an RTX 4060 and not run there: tiles are the largest that fit into its shared memory without spills
    CPU      x86 with AVX2 or AMX, two cores: `python -m bench.cpu_kernels`

The figures themselves are in docs/performance.md. Numbers that depend on each other are next to each other, with an assert.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# --- attention of decodes on a GPU ---------------------------------------------------------------------------------

MIN_KEYS_PER_SPLIT = 256  # keys; H200: a program with fewer spends its time on starting and merging
MAX_SPLITS = 16  # programs that share the keys of one sequence; H200
LONG_KEYS = 512  # keys; H200: beyond them sequences of a batch may differ so much that shorter ones wait for the longest
SHARED_KEYS_MULTIPLE = 128  # keys; H200: the shared prefix of decodes is counted in multiples, so that no tile is partly shared


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """The work of one program: as much as fits into the GPU's shared memory without spilling registers."""

    block_q: int  # tokens
    block_m: int  # rows, a power of two: tokens x query heads of a KV head
    block_n: int  # keys at a time
    num_warps: int
    num_stages: int  # tiles of keys that are loaded ahead, plus one


def decode_tile(programs: int, keys: int, head_dim: int, heads_per_kv: int, itemsize: int, arch: int) -> AttentionTile:
    """The tile of decodes with one query. programs: sequences x KV heads; keys: of the longest sequence; itemsize: bytes per element.

    With fewer programs than multiprocessors, a large tile has the lowest latency. With more, small tiles leave room for several
    programs per multiprocessor, which compute while others wait for memory. H200; sm_89.
    """
    block_m = max(16, next_power_of_2(heads_per_kv + 1))
    row = head_dim * itemsize  # bytes of a key
    if itemsize == 1:  # sm_89: as many bytes at a time as with 16 bits
        if arch < 90:
            return AttentionTile(1, block_m, 64 if row <= 64 else 32 if row <= 256 else 16, 4, 3 if row <= 128 else 2)
        if row > 128:
            return AttentionTile(1, block_m, 32, 4, 2)
        if programs <= (128 if keys > LONG_KEYS else 256):
            return AttentionTile(1, block_m, 128, 4, 2)
        return AttentionTile(1, block_m, 128, 2, 2) if programs <= 256 else AttentionTile(1, block_m, 32, 1, 2)
    if arch >= 90:
        if row == 256:
            if programs <= 128:
                return AttentionTile(1, block_m, 64 if programs <= (64 if keys > LONG_KEYS else 16) else 128, 4, 2)
            if programs <= (1024 if keys > LONG_KEYS else 256):
                return AttentionTile(1, block_m, 32, 4, 3)
            return AttentionTile(1, block_m, 16, 1, 3)
        return AttentionTile(1, block_m, 128 if row <= 256 else 64 if row <= 512 else 32, 4, 2)
    if row > 256:  # 8 warps: with 4, soft caps spill
        return AttentionTile(1, block_m, 16, 8, 2)
    return AttentionTile(1, block_m, 64 if row < 256 else 32, 4, 3)


@dataclass(frozen=True, slots=True)
class FewDecodesTile:
    """The programs of `hopper_decode.py`."""

    num_warps: int  # each has 16 keys at a time
    splits: int  # programs that share the keys of a sequence
    min_keys: int  # of a split


def few_decodes_tile(programs: int, keys: int, head_dim: int, heads_per_kv: int, itemsize: int, arch: int) -> FewDecodesTile | None:
    """The tile of few decodes on Hopper, or None: `decode_tile` is faster, or the only one. Arguments as there. H200.

    About 256 programs have the lowest latency: two per multiprocessor. Short sequences are split into at most 8, since merging takes 2 µs,
    and long ones into at least 8.
    """
    if arch < 90 or itemsize != 2 or head_dim not in (64, 128) or heads_per_kv > 8:
        return None
    if keys <= LONG_KEYS:
        return FewDecodesTile(4, min(8, 256 // programs), 64) if programs <= 64 else FewDecodesTile(8, 1, 64) if programs <= 128 else None
    return FewDecodesTile(4, max(8, min(32, 256 // programs)), 64 if programs <= 16 else 128) if programs <= 64 else None


def wide_decode_tile(query_width: int, head_dim: int, heads_per_kv: int, itemsize: int, arch: int) -> AttentionTile | None:
    """The tile of decodes with several queries. None: too many rows for the registers of a program.

    Not measured. Compiled for sm_89 without spills if head_dim is a power of two. Other shapes, and some for sm_90, spill a few registers.
    """
    block_m = max(16, next_power_of_2(query_width * (heads_per_kv + 1)))
    itemsize = max(itemsize, 2)  # 8 bits become 16 in registers
    row = next_power_of_2(head_dim) * itemsize
    size = block_m * row  # bytes of the queries
    most = 32768 if row == head_dim * itemsize <= 256 else 16384  # a padded head needs registers for masks
    if block_m > 128 or size > most:
        return None
    if arch >= 90:
        block_n = 128 if row <= 128 else 64 if row <= 256 else 32
    else:
        block_n = 32 if row <= 256 and size < most else 16
    num_warps = 4 if size <= 8192 and row <= 256 else 8
    return AttentionTile(query_width, block_m, block_n, num_warps, 3 if arch < 90 and row <= 128 else 2)


def shared_tile(head_dim: int, heads_per_kv: int, itemsize: int, arch: int) -> AttentionTile:
    """The tile of a prefix that decodes share: its rows are the heads of several tokens. H200; sm_89."""
    block_m = max(64, next_power_of_2(heads_per_kv))
    row = head_dim * max(itemsize, 2)  # 8 bits become 16 in registers
    if arch >= 90:
        return AttentionTile(block_m // heads_per_kv, block_m, 64 if row <= 256 else 32, 4, 2)
    if row > 256 or head_dim & (head_dim - 1):  # wide heads and padded ones need registers: smaller tiles
        block_m = max(16 if row > 256 else 32, next_power_of_2(heads_per_kv))
        return AttentionTile(block_m // heads_per_kv, block_m, 16 if row > 256 else 32, 4, 2)
    return AttentionTile(block_m // heads_per_kv, block_m, 64 if row <= 128 else 32, 8, 2)


def num_splits(programs: int, keys: int, num_sms: int) -> int:
    """Programs that share the keys of each decode: enough to fill the GPU, with at least MIN_KEYS_PER_SPLIT each.

    programs: sequences x KV heads. Long sequences are split more finely: four times as many programs while there are fewer programs
    than multiprocessors, and two splits up to four times as many. H200.
    """
    long = keys > LONG_KEYS
    if programs > num_sms:
        return 2 if long and programs < 4 * num_sms else 1
    splits = 1
    while splits < MAX_SPLITS and programs * splits < (4 * num_sms if long else num_sms) and keys > MIN_KEYS_PER_SPLIT * splits:
        splits *= 2
    return splits


def num_shared_parts(programs: int, num_sms: int) -> int:
    """Parts of a shared prefix: as many as fill the GPU once. programs: of one part. H200."""
    parts = 1
    while parts < MAX_SPLITS and 2 * parts * programs <= num_sms:
        parts *= 2
    return parts


# --- attention of prompts on a GPU ---------------------------------------------------------------------------------


def prompt_tile(head_dim: int, heads_per_kv: int, itemsize: int, arch: int) -> AttentionTile:
    """The tile of prompt chunks. H200 (227 KB of shared memory per block); sm_89 (99 KB)."""
    row = head_dim * itemsize
    if arch >= 90:
        block_m = max(64, next_power_of_2(heads_per_kv))
        return AttentionTile(block_m // heads_per_kv, block_m, 64 if row <= 256 else 32, 4, 3 if row <= 256 else 2)
    if row > 256:
        block_m = max(32, next_power_of_2(heads_per_kv))
        return AttentionTile(block_m // heads_per_kv, block_m, 16, 4, 2)
    block_m = max(128, next_power_of_2(heads_per_kv))
    return AttentionTile(block_m // heads_per_kv, block_m, 64 if row <= 128 else 32, 8, 2)


MIN_ORDERED_QUERIES = 128  # per key, on average; H200: with fewer, the copy of keys in order takes longer than it saves
WORKSPACE_BYTES = 128 << 20  # bytes of keys and values that are copied at a time; bounds memory. 32,768 tokens of 8 KV heads of 128
GATHER_TILE, GATHER_WARPS = 128, 4  # keys of a program that copies; a multiple of the tile of `hopper_attention.py`


def gathers(queries: Sequence[int], keys: Sequence[int]) -> bool:
    """Whether the prompt chunks of a step are computed over keys in order (`gathered_prompts.py`), on Hopper. Each: per sequence. H200."""
    return sum(q * n for q, n in zip(queries, keys, strict=True)) >= MIN_ORDERED_QUERIES * sum(keys)


def filling_chunks(tokens: int, limit: int, max_num_seqs: int, kv_size: int) -> tuple[int, int]:
    """(sequences, keys of each) whose chunks of `tokens` tokens together fill the workspace, or come as close to that as any step.

    limit: of a sequence, in tokens; kv_size: KV heads times head_dim, numbers of 16 bits each for keys and values."""
    rows = WORKSPACE_BYTES // (4 * kv_size)
    seqs = max(1, min(-(-rows // limit), tokens // MIN_ORDERED_QUERIES, max_num_seqs))
    return seqs, min(limit, max(1, rows // seqs))


MIN_SKIPPED_TOKENS = 256  # tokens; H200: minimum number of non-final prompt tokens for which skipping them in the last layer pays off

# --- captured graphs -----------------------------------------------------------------------------------------------

DECODE_GRAPHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # sequences
MIXED_GRAPHS = ((64, 16), (128, 16), (128, 64), (256, 16), (256, 128), (512, 16), (512, 128), (512, 256))  # (tokens, sequences)
LARGE_MIXED_GRAPHS = (768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  # tokens; captured as far as LAUNCH_FLOPS allows
LAUNCH_FLOPS = 3e12  # FLOPs that an H200 computes in the 5 to 10 ms of launching a step from Python: larger steps need no graph
assert sorted(DECODE_GRAPHS) == list(DECODE_GRAPHS) and max(seqs for _, seqs in MIXED_GRAPHS) <= DECODE_GRAPHS[-1]
assert MIXED_GRAPHS[-1][0] < LARGE_MIXED_GRAPHS[0] and sorted(LARGE_MIXED_GRAPHS) == list(LARGE_MIXED_GRAPHS)

MAX_SHORT_DECODES = 128  # sequences; H200: batches of up to so many decodes have one more graph for short sequences,
SHORT_KEYS = 512  # keys: of up to so many keys, since attention splits longer sequences more finely
assert SHORT_KEYS <= LONG_KEYS, "a graph of short sequences must not be captured with the splits of long ones"

SHARING_GRAPHS = (16, 32, 64, 96, 128, 192, 256)  # decodes that read a shared prefix once
MIN_SHARING_DECODES = 8  # decodes; H200: with fewer, the blocks of a batch are not compared
MIN_SHARED_BYTES = 32 << 20  # bytes of one layer's keys and values; H200: reading fewer again costs less than one more kernel per layer
assert SHARING_GRAPHS[0] >= MIN_SHARING_DECODES and SHARING_GRAPHS[-1] == DECODE_GRAPHS[-1]

# --- linear layers on a GPU ----------------------------------------------------------------------------------------

LINEAR_TILE_ROWS = 16  # rows of x in a tensor core tile
HOPPER_LINEAR_ROWS = 8  # rows; H200: with more, `hopper_linear.py` is no faster for weights of more than MAX_WEIGHT
MAX_WEIGHT = 8 << 20  # elements; H200: for two rows or more, a weight of 16 M elements takes 21 µs, and 13 with cuBLAS
MAX_WEIGHT_OF_TWO_TILES = 2 << 20  # elements; H200: the same for more rows than one tile holds


@dataclass(frozen=True, slots=True)
class LinearTile:
    """The work of one program of a linear layer."""

    block_n: int  # columns of the output (of gate and up each)
    block_k: int  # elements of x at a time
    num_warps: int


def linear_tile(rows: int, n: int, k: int, gated: bool, arch: int) -> LinearTile:
    """For x [rows, k] and an output [rows, n]. H200; sm_89, where wide blocks would spill registers."""
    block_k = max(16, min(next_power_of_2(k), 2048))
    if rows == 1:
        if k >= 4096 and gated:
            return LinearTile(4, 1024, 4)
        if k > 4096:
            return LinearTile(2, 2048, 4)
        if k == 4096 and n <= 4096:
            return LinearTile(8, 1024, 4)
        block_n = 4 if n < 1024 or (gated and block_k > 1024) else 8
        return LinearTile(block_n, block_k, 8 if gated or block_k > 1024 else 4)
    return LinearTile(16 if arch >= 90 and n >= 1024 and k <= 2048 else 8, block_k, 8 if k > 2048 else 4)


def hopper_linear_tile(rows: int, n: int, k: int, gated: bool, itemsize: int, arch: int) -> LinearTile | None:
    """The tile of `hopper_linear.py`, or None: other kernels are faster, or the only ones. block_k is of all warps together. H200.

    Small layers have so many bytes on the way that the loop over K has one to three iterations. Large ones with few outputs have too few
    for cuBLAS to fill the GPU.
    """
    small = n * k * (2 if gated else 1) <= MAX_WEIGHT
    if arch < 90 or itemsize != 2 or not 2 <= rows <= (LINEAR_TILE_ROWS if small else HOPPER_LINEAR_ROWS) or n % 16:
        return None
    if not small and (gated or n > 6144):
        return None
    block_k = (2048 if k <= 2048 or k % 2048 == 0 else 1024) if small and not gated else 512 if not small and k <= 4096 else 1024
    while k % block_k:
        block_k //= 2
    if block_k < 256:
        return None
    if small:
        return LinearTile(16, block_k, 4 if block_k == k <= 1024 else 8)
    return LinearTile(16, block_k, 4 if k <= 4096 else 8)


def fuses(rows: int, weights: int, gated: bool, itemsize: int) -> bool:
    """Whether the fused kernels are faster than cuBLAS and a kernel for each of norm, activation and addition. H200."""
    if rows <= 1:
        return rows == 1
    if rows > LINEAR_TILE_ROWS and (gated or rows > 2 * LINEAR_TILE_ROWS or weights > MAX_WEIGHT_OF_TWO_TILES):
        return False
    return weights <= MAX_WEIGHT and itemsize < 4


# --- LoRA adapters on a GPU ----------------------------------------------------------------------------------------

LORA_FEW_ROWS = 256  # rows; more are multiplied in tiles of tokens. Not measured
LORA_SHRINK_ELEMENTS = 8192  # numbers of A that a program multiplies with at a time; H200, few rows: with 4096 a few percent longer
LORA_SHRINK_INPUTS = 4096  # of them in one row of A, at most
LORA_EXPAND_COLUMNS = 256  # columns per program; H200: the same with 512
LORA_WARPS = 2  # of a program for few rows; H200: with 4 the kernels take 8% longer
LORA_COPIES = 8  # of what all programs of one row wait for; H200: 1 to 16 differ by 1%
LORA_CALLS = 128  # kernels whose words are filled at a time: 32 layers


def lora_shrink_tile(k: int) -> tuple[int, int]:
    """(inputs, rows of A) that a program multiplies at a time, for k inputs."""
    block_k = min(next_power_of_2(k), LORA_SHRINK_INPUTS)
    return block_k, min(16, LORA_SHRINK_ELEMENTS // block_k)


@dataclass(frozen=True, slots=True)
class LoRATile:
    """Tokens, columns and inputs of a program for many rows."""

    block_m: int
    block_n: int
    block_k: int


LORA_TILE = LoRATile(64, 128, 128)  # not measured; compiled for sm_89
assert LORA_SHRINK_INPUTS <= LORA_SHRINK_ELEMENTS

# --- packed weights on a GPU ----------------------------------------------------------------------------------------

PACKED_MAX_ROWS = 64  # rows; more are multiplied by cuBLAS with unpacked slices. Not measured
PACKED_NORM_ROWS = 8  # rows; with more, every program would compute the norms of too many rows again. Not measured
PACKED_ROW_PROGRAMS = 512  # programs of a product of one row, at least, where the weight has the outputs. Not measured
UNPACK_ELEMENTS = 64 << 20  # elements of an unpacked slice: bounds memory. Slices that are no multiple of 256 outputs were slow on an H200
UNPACK_ROWS, UNPACK_WORDS = 8, 256  # of a program that unpacks. Not measured


@dataclass(frozen=True, slots=True)
class PackedTile:
    """The work of one program of a product with a packed weight."""

    block_m: int  # rows of x
    block_n: int  # columns of the output (of gate and up each)
    words: int  # per iteration, of each row of the weight
    num_warps: int
    num_stages: int  # iterations that are loaded ahead, plus one
    splits: int  # programs that share the inputs of an output


def packed_row_tile(n: int, k: int, bits: int, supers: bool, gated: bool) -> tuple[int, int]:
    """(outputs of a program (of gate and up each), words of each row at a time, 8 per thread) for one row of x [1, k] and [1, n]. supers:
    whether scales have scales.

    H200, Mistral-7B's shape in AWQ, fp8, Q4_K and (down) Q6_K. With the registers of one thread in view: few rows of long inputs, whose
    next words are loaded ahead, or more rows of inputs that take one or two iterations.
    """
    words = k // (2 if bits == 8 else 4)
    simple = bits == 4 and not supers
    if k > 4096:
        outputs, most = 4 if simple else 2, 512
    else:
        wide = bits == 4 and not gated and (simple or n > 4096)
        outputs, most = 8 if wide else 2 if bits in (5, 6) else 4, 1024
    while outputs > 2 and n < outputs * PACKED_ROW_PROGRAMS:
        outputs //= 2
    return outputs, max(256, min(next_power_of_2(words), most))


def packed_tile(rows: int, n: int, k: int, bits: int, gated: bool, arch: int) -> PackedTile:
    """For x [rows, k] and an output [rows, n] (of gate and up each). H200, with 8 and 32 rows; sm_89.

    Few programs with wide blocks read x less often. Enough programs, by splitting the inputs, keep all multiprocessors busy.
    """
    words = k // (2 if bits == 8 else 4)  # of a row
    if rows <= 16:
        wide = arch >= 90 and not gated and n > 4096
        return PackedTile(8 if rows <= 8 else 16, 128 if wide else 64, 64, 8 if wide else 4, 3,
                          _splits(n // 128, 256, words // 128) if wide else _splits(n // 64, 512, words // 128))
    if arch < 90:
        return PackedTile(32, 64, 32, 4, 3, min(4, _splits(n // 64, 512, words // 64)))
    if bits == 4 and n <= 4096 and not gated:
        return PackedTile(32, 128, 128, 8, 3, _splits(n // 128, 128, words // 256))
    return PackedTile(32, 128, 64, 8, 3, 1 if bits < 8 and n > 8192 else _splits(n // 128, 256, words // 128))


def _splits(blocks: int, programs: int, most: int) -> int:
    """A power of two, at most 8: parts of the inputs, so that there are up to so many programs, each with work for all of its threads."""
    splits = 1
    while splits < 8 and 2 * splits * blocks <= programs and 2 * splits <= most:
        splits *= 2
    return splits


def norm_warps(width: int) -> int:
    """Warps of an RMSNorm of `width` elements. H200."""
    return min(8, max(1, next_power_of_2(width) // 256))


# --- the sampler on a GPU ------------------------------------------------------------------------------------------

SAMPLER_CHUNK = 2048  # tokens of the vocabulary per program; part of the result's rounding, so it must not depend on the batch
SAMPLER_WARPS = 4  # H200
THRESHOLD_POSITIONS = 4096  # tokens of the vocabulary per iteration; H200
THRESHOLD_WARPS = 16  # H200

# --- a CPU ---------------------------------------------------------------------------------------------------------

CPU_SPLIT_KEYS = 128  # keys of a task of the compiled attention
CPU_TILE_KEYS = 16  # keys whose scores are held at a time
CPU_TASK_FLOATS = 1024  # float32 numbers of a task's queries: with as many sums and a tile of keys they fit into the L1 cache
CPU_MAX_QUERIES = 16  # new tokens per sequence of the compiled attention, which keeps them on the stack; PyTorch computes more
assert CPU_SPLIT_KEYS % CPU_TILE_KEYS == 0 and CPU_TILE_KEYS % 4 == 0, "keys are loaded in groups of four"

CPU_MAX_ROWS = 256  # rows; PyTorch's norm and activation take no longer for more
CPU_PREFETCH_BYTES = 1024  # bytes of codes that a product with a packed weight requests ahead of their use
# Rows of float32, and of bfloat16 on a CPU that multiplies it fast. For more rows, packed weights are dequantized part by part. The rows
# at which both ways took the same time: float32 190 with AVX2 and 90 with AVX-512, bfloat16 50 with AMX.
CPU_PACKED_ROWS = (128, 48)
CPU_DENSE_BYTES = 1 << 20  # bytes of such a part
CPU_SERIAL_ELEMENTS = 1 << 13  # elements that one thread computes before a second thread has started

PACKED_FOR_ROWS = {"bfloat16": 1, "float32": 32}  # rows of x that oneDNN's weight layout is chosen for; measured over 1 to 1,024 rows

# --- the reference -------------------------------------------------------------------------------------------------

GATHER_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}  # bytes of keys and values copied at once: bounds memory, and should fit the caches
FREE_PADDING = {"cpu": 256, "cuda": 16384}  # padded keys that cost about as much as one more batch of decodes
PAGE_SLOTS = 16  # slots that are copied together: a whole block, or an equal part of each block
MAX_SCORES = 16 << 20  # elements of a [queries, keys] mask; longer prompt chunks are computed in several pieces

# --- speculative decoding ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpeculationCost:
    """What drafts cost; see `speculative/adaptive.py`."""

    free_tokens: float  # a step of T tokens takes as long as reading the weights, times 1 + T / free_tokens
    verify: float  # share of a step's time that is lost by verifying drafts at all
    most_seqs: int = 64  # in steps of more sequences nothing is proposed
    most_rows: int = 256  # logits rows of a step with drafts. More are sampled in several parts, and on a GPU no graph has them


MAX_DRAFT_PROBS_ROWS = 64  # rows for which the distributions of sampled drafts are kept: each takes k times the vocabulary in float32
NGRAM_BLOCK, NGRAM_WARPS = 2048, 8  # n-gram lookup: positions that a program compares at once
# cpu: the default model (Q4_1) on an EPYC without AVX-512, one thread: 11.7 ms for a step of 1 token, 18 for 2, 20 for 4, 35
# for 8, 62 for 16, 118 for 32. cuda: on one H200 a step with 5 drafts of the default model took 0.8 ms and one without 0.67, which is a
# verify of 0.15. Mistral-7B's shape with 4 drafts took 1.33 times as long, which is 0.3. With the larger number drafts seldom lose.
SPECULATION = {"cpu": SpeculationCost(3.0, 0.2, 16), "cuda": SpeculationCost(200.0, 0.3)}
# A step of T tokens takes as long as 1 + T / SHARED_TOKENS empty ones, to share steps between owners (`core/fair_share.py`). The tokens are
# mostly those of prompts, whose large products take less time per token than the few rows of a verification.
SHARED_TOKENS = {"cpu": 12, "cuda": 200}


# --- mixture of experts on a GPU -----------------------------------------------------------------------------------

MOE_PAIRS_AT_ONCE = 1024  # pairs of a token and an expert that a program looks at together; not measured


@dataclass(frozen=True, slots=True)
class ExpertTile:
    """The work of one program: pairs of one expert, times some of its outputs."""

    block_m: int  # pairs
    block_n: int  # outputs; twice as many for gate and up
    block_k: int  # inputs at a time
    num_warps: int
    num_stages: int


def moe_tile(pairs: int, experts: int, itemsize: int, arch: int) -> ExpertTile:
    """pairs: tokens times experts per token; experts: of the layer. Not measured. sm_89: fits without spills.

    With few pairs per expert, the time is that of reading weights, and narrow tiles give enough programs. With many, large tiles read
    each weight less often.
    """
    mean, block_k = pairs / experts, 128 // itemsize
    if mean <= 16:
        return ExpertTile(16, 32 if pairs <= 64 else 64, block_k, 4, 4)
    if mean <= 48 or itemsize > 2:
        return ExpertTile(32, 64, block_k, 4, 3)
    return ExpertTile(128, 64, block_k, 8, 3) if arch >= 90 else ExpertTile(64, 64, block_k, 8, 3)
