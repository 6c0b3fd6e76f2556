"""An executor without a model that finds paging bugs: every wrong block, slot or order changes a token or fails an assertion.

It has a memory with one cell per slot. The cell of a token depends on the token, its position and the cell before it, which is read
through the block table (as keys and values depend on all earlier tokens). The first cell depends on the LoRA adapter in the row's slot.
The next token is a hash of every cell that its position may see in each KV group. `expected_outputs` computes the same tokens from plain
lists, without blocks, rows or plans.

The executor does the worst that the interface allows. Unwritten cells contain poison. Moves finish late and in any order: a block
that moves out is read only when its move finishes, and a block that moves in is written once more then. A write to a block that
another request's launched plan reads fails an assertion. A failed step leaves junk wherever it wrote.
"""
from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace

from minivllm.core.plan import DEVICE_DRAFT, NULL_BLOCK, BlockMove, RowAdmission, StepPlan, StepResult
from minivllm.core.scheduler import SchedulerConfig
from minivllm.sampling_params import SamplingParams

POISON = None
VOCABULARY = 23

Cell = int | None


def cell_of(token: int, position: int, before: int, group: int) -> int:
    return hash((token, position, before, group))


def sample_token(visible: list[list[int]], position: int, seed: int, child: int) -> int:
    """The token after `position`, given the cells that each group may see there."""
    return hash((*map(tuple, visible), position, seed, child)) % VOCABULARY


class Model:
    """The same function from earlier tokens to next token, computed from plain lists."""

    def __init__(self, windows: tuple[int | None, ...], adapter: int = 0) -> None:
        self.windows, self.adapter = windows, adapter

    def cells(self, tokens: list[int]) -> list[list[int]]:
        """[G][T]"""
        groups: list[list[int]] = []
        for group, window in enumerate(self.windows):
            cells: list[int] = []
            for position, token in enumerate(tokens):
                cells.append(cell_of(token, position, cells[-1] if cells and window != 1 else self.adapter, group))
            groups.append(cells)
        return groups

    def next_token(self, tokens: list[int], seed: int, child: int) -> int:
        visible = [cells[first_visible(window, len(tokens) - 1):] for cells, window in zip(self.cells(tokens), self.windows, strict=True)]
        return sample_token(visible, len(tokens) - 1, seed, child)


def first_visible(window: int | None, position: int) -> int:
    return 0 if window is None else max(0, position - window + 1)


def stop_rule(tokens: list[int]) -> bool:
    """Whether the newest token completes a stop string. (Real stop strings need text, so this is a made-up rule.)"""
    return len(tokens) >= 2 and (tokens[-1] * 31 + tokens[-2]) % 41 == 0


def expected_outputs(
    model: Model, prompt: tuple[int, ...], params: SamplingParams, seed: int, eos: tuple[int, ...], limit: int, child: int, stops: bool,
) -> tuple[list[int], str]:
    """(outputs, finish reason) of one child, computed token by token."""
    outputs: list[int] = []
    total = limit if params.max_tokens is None else len(prompt) + params.max_tokens
    while len(prompt) + len(outputs) < total:
        token = model.next_token([*prompt, *outputs], seed, child)
        outputs.append(token)
        stop_ids = (*(() if params.ignore_eos else eos), *params.stop_token_ids)
        if token in stop_ids and len(outputs) > params.min_tokens:
            return outputs, "stop"
        if stops and stop_rule(outputs):
            return outputs, "stop"
    return outputs, "length"


@dataclass
class Row:
    """A worker's state of one row."""

    sequence_id: str
    tokens: list[int]
    tables: list[list[int]]
    seed: int
    child: int
    adapter_slot: int
    next_position: int | None = None  # where its next plan must start
    proposed: list[int] | None = field(default_factory=list)  # the worker's own drafts for the tokens after the newest one; None: not made

    @property
    def request_id(self) -> str:
        return self.sequence_id.split("#")[0]


@dataclass
class LaunchedStep:
    """A plan whose result was not fetched yet."""

    plan: StepPlan
    result: StepResult
    reads: dict[int, set[str]] = field(default_factory=dict)  # block that the plan reads -> request ids
    fails: bool = False


class FakeExecutor:
    """Runs plans in launch order. `chaos` decides when moves finish and what is drafted. Without it, moves finish at once."""

    def __init__(self, config: SchedulerConfig, chaos: random.Random | None = None, drafts: bool = False) -> None:
        self.config = config
        self.model = Model(config.kv_windows)
        self.chaos = chaos
        self.drafts = drafts
        self.device: list[list[Cell]] = [self._poison() for _ in range(config.num_blocks)]
        self.host: list[list[Cell]] = [self._poison() for _ in range(config.num_host_blocks)]
        self.rows: dict[int, Row] = {}
        self.adapters: dict[int, int] = {-1: 0}  # slot -> adapter
        self.launched: deque[LaunchedStep] = deque()
        self.moving: dict[int, tuple[BlockMove, list[Cell] | None]] = {}  # the content of a move in; None: a move out
        self.arriving: dict[int, tuple[str, list[Cell]]] = {}  # device block -> (its sequence, the content that is moved in)
        self.num_moves = 0
        self.num_copies = 0

    def _poison(self) -> list[Cell]:
        return [POISON] * self.config.block_size

    # The executor's interface.

    def launch(self, plan: StepPlan, fails: bool = False) -> None:
        """Run the plan at once; only its moves finish later. With `fails`, its result will be an error."""
        self._check_shape(plan)
        entry = LaunchedStep(plan, StepResult(plan.step_id, ()), fails=fails)
        self.launched.append(entry)
        for slot, adapter in plan.adapter_loads:
            assert 0 <= slot < self.config.max_loras
            self.adapters[slot] = adapter
        for admission in plan.admitted:
            self._admit(plan, admission)
        for row, group, index in plan.freed_blocks:
            assert self.rows[row].tables[group][index] != NULL_BLOCK, "a block is freed twice"
            self.rows[row].tables[group][index] = NULL_BLOCK
        self._start_moves(plan)
        for copy in plan.copies:
            table = self.rows[copy.row].tables[copy.group]
            assert table[copy.index] in (copy.src, copy.dst), "a copy replaces another block than its source"
            self._refuse_foreign_write(copy.dst, "")
            self.device[copy.dst] = list(self.device[copy.src])
            table[copy.index] = copy.dst
            self.num_copies += 1
        for column, blocks in enumerate(plan.new_blocks):
            for table, appended in zip(self.rows[plan.rows[column]].tables, blocks, strict=True):
                for block in appended:
                    self._refuse_foreign_write(block, "")
                    self.device[block] = self._poison()
                table.extend(appended)
        exact = self._exact(plan)
        for column in range(len(plan.rows)):
            self._write(exact, column)
        for column in range(len(plan.rows)):
            self._note_reads(entry, column)
        samples = tuple(self._sample(exact, i) for i in range(len(plan.sample_rows)))
        if fails:
            self._leave_junk(plan)
            return
        entry.result = StepResult(plan.step_id, samples, drafts=self._propose(plan) if self.drafts else ())

    def wait(self) -> tuple[StepPlan, StepResult]:
        """The oldest plan and its result, with the moves that are finished now."""
        entry = self.launched.popleft()
        plan = entry.plan
        only_moves = not plan.rows and not plan.moves_out
        finished = self._finish_moves(at_least=1 if only_moves and self.moving else 0)
        if entry.fails:
            return plan, StepResult(plan.step_id, (), error="the step failed", finished_moves=finished)
        return plan, StepResult(plan.step_id, entry.result.token_ids, drafts=entry.result.drafts, finished_moves=finished)

    def _leave_junk(self, plan: StepPlan) -> None:
        size = self.config.block_size
        for column, row in enumerate(plan.rows):
            for table in self.rows[row].tables:
                for position in range(plan.starts[column], plan.starts[column] + plan.num_tokens[column]):
                    self.device[table[position // size]][position % size] = hash(("junk", plan.step_id, position))
        for copy in plan.copies:
            self.device[copy.dst] = [hash(("junk", plan.step_id))] * size
        for move in (*plan.moves_out, *plan.moves_in):
            _, content = self.moving.pop(move.move_id)
            if content is None:
                self.host[move.host_block] = [hash(("junk", plan.step_id))] * size
            else:
                del self.arriving[move.device_block]
                self.device[move.device_block] = [hash(("junk", plan.step_id))] * size

    def prepare_ahead(self) -> bool:
        return False

    def drop_rows(self) -> None:
        self.rows.clear()

    # Parts of a step.

    def _check_shape(self, plan: StepPlan) -> None:
        count = len(plan.rows)
        assert {len(c) for c in (plan.request_ids, plan.starts, plan.num_tokens, plan.new_blocks, plan.drafts)} == {count}
        assert len(plan.sample_from) == len(plan.sample_rows) == len(plan.sample_ids)
        assert plan.total_tokens <= self.config.max_num_batched_tokens, "over budget"
        assert len(set(plan.rows)) == count <= self.config.max_num_seqs, "a row is planned twice"
        assert len(set(plan.sample_rows)) == len(plan.sample_rows), "a row samples twice"
        assert all(n >= 1 for n in plan.num_tokens)
        assert len({a.row for a in plan.admitted}) == len(plan.admitted), "a row is admitted twice"

    def _admit(self, plan: StepPlan, admission: RowAdmission) -> None:
        self.rows[admission.row] = Row(admission.request_id, list(admission.token_ids), [list(g) for g in admission.block_ids],
                                       admission.seed, admission.child_index, admission.adapter_slot)
        if admission.row not in plan.rows:
            assert admission.row in plan.sample_rows, "a row is admitted that neither computes nor samples"
            return
        column = plan.rows.index(admission.row)
        assert not any(plan.new_blocks[column]), "an admission contains all blocks, so none may be appended"
        first_new = -(-plan.starts[column] // self.config.block_size)
        for table in self.rows[admission.row].tables:
            for block in table[first_new:]:  # after the computed blocks
                self._refuse_foreign_write(block, "")
                self.device[block] = self._poison()

    def _start_moves(self, plan: StepPlan) -> None:
        for move in plan.moves_out:
            assert move.host_block != NULL_BLOCK != move.device_block
            self.host[move.host_block] = self._poison()
            self.moving[move.move_id] = (move, None)
            self.num_moves += 1
        for move in plan.moves_in:
            assert move.host_block != NULL_BLOCK != move.device_block
            self._refuse_foreign_write(move.device_block, "")
            content = list(self.host[move.host_block])
            self.device[move.device_block] = list(content)
            owner = next(a.request_id for a in plan.admitted if any(move.device_block in table for table in a.block_ids))
            self.moving[move.move_id] = (move, content)
            self.arriving[move.device_block] = (owner, content)
            self.num_moves += 1

    def _finish_moves(self, at_least: int) -> tuple[int, ...]:
        ids = list(self.moving)
        if self.chaos is not None:
            self.chaos.shuffle(ids)
            ids = ids[:self.chaos.randint(min(at_least, len(ids)), len(ids))]
        for move_id in ids:
            move, content = self.moving.pop(move_id)
            if content is None:  # a move out is read only now: the block must not have been written in between
                self.host[move.host_block] = list(self.device[move.device_block])
            else:
                del self.arriving[move.device_block]
                for offset, cell in enumerate(content):
                    if cell is not POISON:  # a move in is written once more: only its sequence may have written there
                        assert self.host[move.host_block][offset] == cell, "a host block was overwritten while it was read"
                        self.device[move.device_block][offset] = cell
        return tuple(ids)

    def _exact(self, plan: StepPlan) -> StepPlan:
        """The plan with true positions and drafts. A plan may name later positions if drafts were rejected since it was made."""
        if not self.config.num_device_drafts:
            return plan
        starts, drafts = list(plan.starts), list(plan.drafts)
        for column, row in enumerate(self.rows[r] for r in plan.rows):
            if DEVICE_DRAFT in drafts[column]:
                assert set(drafts[column]) == {DEVICE_DRAFT}
                assert row.proposed is not None, "a plan verifies drafts that no step made"
                drafts[column] = tuple(row.proposed[:len(drafts[column])])
            if column in plan.sample_from:
                starts[column] = len(row.tokens) - (plan.num_tokens[column] - len(drafts[column]))
                assert starts[column] <= plan.starts[column]
        return replace(plan, starts=tuple(starts), drafts=tuple(drafts))

    def _write(self, plan: StepPlan, column: int) -> None:
        row = self.rows[plan.rows[column]]
        assert row.sequence_id == plan.request_ids[column], f"row {plan.rows[column]} belongs to {row.sequence_id}"
        start, count, drafts = plan.starts[column], plan.num_tokens[column], plan.drafts[column]
        assert row.next_position in (None, start), f"{row.sequence_id} jumps from {row.next_position} to {start}"
        if drafts:
            row.tokens[start + count - len(drafts):] = drafts
        size = self.config.block_size
        for group, (table, window) in enumerate(zip(row.tables, self.config.kv_windows, strict=True)):
            assert len(table) * size >= start + count, "no slot to write to"
            for position in range(start, start + count):
                before = self._read(table, position - 1) if position > 0 and window != 1 else self.adapters[row.adapter_slot]
                block = table[position // size]
                assert block != NULL_BLOCK, "a write to the null block"
                self._refuse_foreign_write(block, row.request_id)
                self.device[block][position % size] = cell_of(row.tokens[position], position, before, group)
                owner, content = self.arriving.get(block, ("", []))
                if owner == row.sequence_id:
                    content[position % size] = POISON  # moves in come before writes, so this cell is not written once more
        row.next_position = start + count

    def _read(self, table: list[int], position: int) -> int:
        block = table[position // self.config.block_size]
        assert block != NULL_BLOCK, f"position {position} is outside the window"
        cell = self.device[block][position % self.config.block_size]
        assert cell is not POISON, f"block {block} is read at a slot that was not written"
        return cell

    def _refuse_foreign_write(self, block: int, request_id: str) -> None:
        for entry in list(self.launched)[:-1]:
            readers = entry.reads.get(block, set()) - {request_id}
            assert not readers, f"block {block} is written by {request_id!r} while a launched plan of {readers} names it"

    def _note_reads(self, entry: LaunchedStep, column: int) -> None:
        row = self.rows[entry.plan.rows[column]]
        for table in row.tables:
            for block in table:
                entry.reads.setdefault(block, set()).add(row.request_id)

    def _sample(self, plan: StepPlan, sample: int) -> tuple[int, ...]:
        source, target = self.rows[plan.rows[plan.sample_from[sample]]], self.rows[plan.sample_rows[sample]]
        assert target.sequence_id == plan.sample_ids[sample]
        column = plan.sample_from[sample]
        drafts = plan.drafts[column]
        position = plan.starts[column] + plan.num_tokens[column] - len(drafts) - 1
        sampled: list[int] = []
        for accepted in range(len(drafts) + 1):
            visible = [[self._read(table, p) for p in range(first_visible(window, position + accepted), position + accepted + 1)]
                       for table, window in zip(source.tables, self.config.kv_windows, strict=True)]
            sampled.append(sample_token(visible, position + accepted, target.seed, target.child))
            if accepted == len(drafts) or drafts[accepted] != sampled[-1]:
                break
        target.tokens[position + 1:] = sampled
        target.next_position = position + len(sampled)
        return tuple(sampled)

    def _propose(self, plan: StepPlan) -> tuple[tuple[int, ...] | None, ...]:
        """Drafts: some right, some wrong. None: the sequence does not wait for any."""
        assert self.chaos is not None
        proposals: list[tuple[int, ...] | None] = []
        for row in (self.rows[r] for r in plan.sample_rows):
            if not plan.proposes:
                row.proposed = None
                proposals.append(() if self.chaos.random() < 0.3 else None)
                continue
            tokens, guesses = list(row.tokens), list[int]()
            for _ in range(self.config.num_device_drafts or self.chaos.randint(0, 3)):
                right = self.model.next_token(tokens, row.seed, row.child)
                guesses.append(right if self.chaos.random() < 0.7 else (right + 1) % VOCABULARY)
                tokens.append(guesses[-1])
            row.proposed = guesses
            if self.config.num_device_drafts:
                guesses = guesses[:self.chaos.randint(0, len(guesses))]
            proposals.append(tuple(guesses) if self.chaos.random() < 0.7 else None)
        return tuple(proposals)
