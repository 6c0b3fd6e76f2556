"""The capstone's engine: it samples the tokens that minivllm samples, for a real checkpoint, and its blocks have the same owners."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from minivllm import LLM, SamplingParams
from minivllm.course.lesson_files import find_lesson
from tests.lessons.loading import LESSONS, Mistake

MISTAKES = [
    Mistake(1, "        if not self.owners[block]:\n            self.free.remove(block)\n", "", "must leave the free list"),
    Mistake(1, "            del self.block_of[self.hash_of.pop(block)]\n", "            pass\n", "its hash must be forgotten"),
    Mistake(2, "parent = sha256(parent + repr(", "parent = sha256(repr(", "must cover everything before"),
    Mistake(2, "block_hashes(request.tokens[:-1], self", "block_hashes(request.tokens, self", "compute at least the last"),
    Mistake(2, "                self.pool.share(block)\n", "", "share it, or the first request's end frees it"),
    Mistake(3, "gumbel_noise(len(logits), sampling.seed, position)", "-(-torch.rand(len(logits)).log()).log()", "what else was sampled"),
    Mistake(4, "        self.waiting.appendleft(request)\n", "        self.waiting.append(request)\n", "later requests overtake it"),
    Mistake(4, "        self.drop_blocks(request)\n        self.running", "        self.running", "its blocks are gone"),
    Mistake(5, "            count = min(len(request.tokens) - request.computed, settings.max_chunk, budget)\n            if not",
            "            count = len(request.tokens) - request.computed\n            if count > budget or not", "chunked prefill"),
    Mistake(6, "            if request.computed == len(request.tokens):\n", "            if True:\n", "no choice of the next token"),
    Mistake(6, "block_hashes(request.tokens[:request.computed], self", "block_hashes(request.tokens, self", "was not computed yet"),
    Mistake(6, "                    self.drop_blocks(request)\n            # END", "            # END", "releases all of its blocks"),
    Mistake(7, "max_tokens=4 + 3 * (i % 5)", "max_tokens=0", "must fit"),
]


def test_capstone_and_package_generate_the_same_tokens(lesson: ModuleType, tiny_llama: Callable[..., Path]) -> None:
    """Greedy, on a checkpoint in float32, with few blocks, so that both preempt."""
    folder = tiny_llama()
    prompts = [[5, 9, 200, 31, 7, 8, 9], [5, 9, 200, 31, 6], [100, 101], [5, 9, 200, 31, 7, 8, 9, 50, 51]]
    with LLM(str(folder), dtype="float32", device="cpu", max_model_len=64, block_size=4, num_gpu_blocks_override=40) as llm:
        wanted = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    engine = lesson.Engine(lesson.Model.from_folder(folder), lesson.Settings(num_blocks=10))
    requests = [engine.add(prompt, lesson.Sampling(max_tokens=12)) for prompt in prompts]
    engine.run()
    assert [request.output for request in requests] == [list(output.outputs[0].token_ids) for output in wanted]
    assert sum(request.preemptions for request in requests) > 0 and engine.pool.num_free == 10


def test_a_request_that_can_never_fit_is_refused(lesson: ModuleType) -> None:
    engine = lesson.Engine(lesson.Model.random(), lesson.Settings(num_blocks=4))
    with pytest.raises(ValueError, match="needs 5 blocks, and there are 4"):
        engine.add([1] * 16, lesson.Sampling(max_tokens=1))


@pytest.mark.parametrize("name", ["capstone-engine", "capstone_engine"])
def test_a_capstone_is_found_by_its_name_and_has_its_own_file(name: str) -> None:
    found = find_lesson(LESSONS, name)
    assert (found.number, found.label, found.answer.name) == ("capstone-engine", "capstone-engine", "capstone_engine.py")
