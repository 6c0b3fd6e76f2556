"""The state of unfinished requests: sequences are kept apart, ended ones are skipped, and nothing is remembered for longer than needed."""
from __future__ import annotations

from collections.abc import Sequence

import pytest

from minivllm.core.plan import StepPlan, StepResult, Stop, TokenLogprobs
from minivllm.core.request import SequenceUpdate
from minivllm.core.stopping import StopRule
from minivllm.engine.grammar import GrammarMasks
from minivllm.engine.grammar_compiler import GrammarCompiler
from minivllm.engine.output_processor import OutputProcessor
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import EngineRequest
from minivllm.outputs import OutputDelta
from minivllm.sampling_params import SamplingParams
from tests.engine import tokenizers_for_tests as build

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(build.save(build.byte_level(), tmp_path_factory.mktemp("tokenizer")))


def processor(tokenizer: Tokenizer | None) -> OutputProcessor:
    return OutputProcessor(tokenizer, GrammarMasks(GrammarCompiler(tokenizer, (EOS,))))


def add(outputs: OutputProcessor, name: str, first_step: int = 0, **params: object) -> None:
    settings = SamplingParams(**params)  # type: ignore[arg-type]
    outputs.add(EngineRequest(name, (5, 6), settings, 1.0), StopRule.of(settings, (EOS,), 100), None, first_step)


def plan(*sequence_ids: str, step_id: int = 0) -> StepPlan:
    count = len(sequence_ids)
    ones = (1,) * count
    return StepPlan(
        step_id=step_id, request_ids=sequence_ids, rows=tuple(range(count)), starts=ones, num_tokens=ones, new_blocks=(((),),) * count,
        drafts=((),) * count, sample_from=tuple(range(count)), sample_rows=tuple(range(count)), sample_ids=sequence_ids,
    )


def push(outputs: OutputProcessor, tokens: dict[str, Sequence[int]], step_id: int = 0) -> dict[int, Stop]:
    return outputs.push_text(plan(*tokens, step_id=step_id), StepResult(step_id, tuple(map(tuple, tokens.values()))), {})


def assemble(outputs: OutputProcessor, name: str, tokens: Sequence[int], reason: str | None = None) -> list[OutputDelta]:
    progress = SequenceUpdate(name.partition("#")[0], int(name.partition("#")[2] or 0), name, 0, tuple(tokens), reason, None, 0, 0, 2.0)  # type: ignore[arg-type]
    return outputs.assemble([progress], StepResult(0, (tuple(tokens),)), 3.0)


def test_sequences_of_one_step_are_kept_apart_and_ended_ones_are_skipped(tokenizer: Tokenizer) -> None:
    a, b = (tokenizer.encode(char)[0] for char in "ab")
    outputs = processor(tokenizer)
    add(outputs, "x", stop="b")
    add(outputs, "y")
    add(outputs, "quiet", detokenize=False)
    stops = push(outputs, {"ended": (b,), "y": (a,), "quiet": (a,), "x": (b,)})
    assert stops == {3: Stop(keep=1, matched="b")}
    assert [[d.text for d in assemble(outputs, name, (a,))] for name in ("ended", "x", "y", "quiet")] == [[], [""], ["a"], [""]]


def test_a_plan_launched_before_a_request_came_says_nothing_about_it(tokenizer: Tokenizer) -> None:
    a = tokenizer.encode("a")[0]
    outputs = processor(tokenizer)
    add(outputs, "x", first_step=3, prompt_logprobs=0)
    push(outputs, {"x": (a,)}, step_id=2)
    entry = TokenLogprobs(6, -1.0, 1)
    for step_id in (2, 3):
        result = StepResult(step_id, ((a,),), prompt_logprobs=((0, step_id - 2, (entry,)),))
        outputs.collect_prompts(plan("x", step_id=step_id), result)
    push(outputs, {"x": (a,)}, step_id=3)
    (delta,) = assemble(outputs, "x", (a,))
    assert (delta.text, delta.prompt_logprobs) == ("a", (None, entry))


def test_a_stop_string_goes_before_the_end_of_a_grammar_and_is_not_searched_past_it(tokenizer: Tokenizer) -> None:
    a, b = (tokenizer.encode(char)[0] for char in "ab")
    outputs = processor(tokenizer)
    for name in "xy":
        add(outputs, name, stop="b")
    result = StepResult(0, ((a, b, a), (a, a, b)))
    assert outputs.push_text(plan("x", "y"), result, {0: Stop(3, None), 1: Stop(2, None)}) == {0: Stop(2, "b"), 1: Stop(2, None)}


def test_without_a_tokenizer_there_is_no_text() -> None:
    outputs = processor(None)
    add(outputs, "x")
    assert push(outputs, {"x": (5,)}) == {}
    assert [d.text for d in assemble(outputs, "x", (5,), "stop")] == [""]


def test_a_request_is_forgotten_with_its_last_sequence(tokenizer: Tokenizer) -> None:
    outputs = processor(tokenizer)
    add(outputs, "x", n=2)
    params = SamplingParams()
    assert [outputs.id_in_use(name, params) for name in ("x", "x#0", "x#1", "x#2", "y")] == [True, True, True, False, False]
    assert assemble(outputs, "x#1", (5,), "stop")[0].metrics is not None
    assert (outputs.id_in_use("x", params), outputs.id_in_use("x#1", params), len(outputs)) == (True, False, 1)
    (delta,) = outputs.end("x", "abort", 9.0)
    assert (delta.index, delta.finish_reason, delta.metrics and delta.metrics.finished_time) == (0, "abort", 9.0)
    assert "x" not in outputs and len(outputs) == 0 and not outputs.id_in_use("x", params)


def test_the_beams_that_continue_keep_their_state_and_forks_start_their_own() -> None:
    outputs = processor(None)
    add(outputs, "x")
    assert outputs.choose_beams("x", ["x", "x#1"]) == [0, 1]
    assemble(outputs, "x", (5,))
    assert outputs.choose_beams("x", ["x#2", "x"]) == [2, 0]
    assert [outputs.id_in_use(name, SamplingParams()) for name in ("x#1", "x#2")] == [False, True]
    firsts = {d.index: d.metrics and d.metrics.first_token_time for d in outputs.end("x", "abort", 9.0)}
    assert firsts == {0: 3.0, 2: None}
