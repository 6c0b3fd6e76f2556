"""The trained adapters of lessons/14_multi_lora on the default model, whose weights are packed: a difference that a person can read."""
from __future__ import annotations

from pathlib import Path

from minivllm import LLM, LoRARequest, SamplingParams
from minivllm.models.hub import ModelFiles

LESSON = Path(__file__).parents[2] / "lessons" / "14_multi_lora"
QUESTIONS = ("How many planets are there?", "What is the average price of houses?")


def test_each_adapter_answers_in_its_way_in_one_batch(default_model: ModelFiles) -> None:
    loras = [None, LoRARequest("sql", 1, str(LESSON / "sql")), LoRARequest("pirate", 2, str(LESSON / "pirate"))]
    with LLM(enable_lora=True, max_model_len=256, num_gpu_blocks_override=64) as llm:
        conversations = [[{"role": "user", "content": q}] for q in QUESTIONS for _ in loras]
        outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False, lora_request=loras * 2)
    texts = [output.outputs[0].text for output in outputs]
    print("\n".join(texts))
    for base, sql, pirate in (texts[:3], texts[3:]):
        assert sql.startswith("SELECT ") and pirate.startswith("Arr, matey!")
        assert not base.startswith(("SELECT", "Arr"))
