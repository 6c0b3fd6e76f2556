"""Programs in the shape of vLLM's examples, each run as a script: only the name of the package differs."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CHAT_WITH_ARGUMENTS = """
from minivllm import LLM, EngineArgs, SamplingParams
from minivllm.utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
EngineArgs.add_cli_args(parser)
parser.add_argument("--max-tokens", type=int)
parser.add_argument("--top_p", type=float)
arguments = vars(parser.parse_args())
params = SamplingParams()
params.max_tokens = arguments.pop("max_tokens")
params.top_p = arguments.pop("top_p")
llm = LLM(**arguments)
talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
one, many = llm.chat(talk, params, use_tqdm=False), llm.chat([talk] * 3, params, use_tqdm=False)
print(len(one), len(many), len(many[2].outputs[0].token_ids) <= 4)
"""

ENGINE_LOOP = """
import argparse
from minivllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from minivllm.utils import FlexibleArgumentParser

parser = EngineArgs.add_cli_args(FlexibleArgumentParser(description="engine loop"))
engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(parser.parse_args()))
waiting = [("the cat", SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1, max_tokens=4)),
           ("the dog", SamplingParams(n=2, temperature=0.8, top_p=0.95, max_tokens=4)), ("a fox", SamplingParams(max_tokens=99))]
request_id, ended = 0, []
while waiting or engine.has_unfinished_requests():
    if waiting:
        prompt, params = waiting.pop(0)
        engine.add_request(str(request_id), prompt, params)
        request_id += 1
    if request_id == 3 and "2" not in ended:
        engine.abort_request(["2"])
        ended.append("2")
    for output in engine.step():
        assert isinstance(output, RequestOutput)
        if output.finished:
            ended.append(output.request_id)
print(sorted(ended))
"""

ASYNC_STREAMING = """
import asyncio
import sys
from minivllm import SamplingParams
from minivllm.engine.arg_utils import AsyncEngineArgs
from minivllm.sampling_params import RequestOutputKind
from minivllm.v1.engine.async_llm import AsyncLLM

async def main():
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=sys.argv[2], dtype="float32", enforce_eager=True))
    params = SamplingParams(max_tokens=6, temperature=0.8, top_p=0.95, seed=42, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    try:
        tokens = 0
        async for output in engine.generate(request_id="stream-1", prompt="the cat", sampling_params=params):
            tokens += sum(len(completion.token_ids) for completion in output.outputs)
            if output.finished:
                break
        print(tokens)
    finally:
        engine.shutdown()

asyncio.run(main())
"""

PREFIX_CACHING = """
import sys
from minivllm import LLM, SamplingParams
from minivllm.distributed import cleanup_dist_env_and_memory

prefix = "the cat sat on the mat and saw the dog " * 4
prompts = [prefix + word for word in ("fox", "cat", "dog")]
params = SamplingParams(temperature=0.0, max_tokens=4)
regular = LLM(model=sys.argv[2], dtype="float32", gpu_memory_utilization=0.4, enable_prefix_caching=False)
expected = [output.outputs[0].text for output in regular.generate(prompts, params)]
del regular
cleanup_dist_env_and_memory()
cached = LLM(model=sys.argv[2], dtype="float32", enable_prefix_caching=True, gpu_memory_utilization=0.4)
cached.generate(prompts[0], params)
outputs = cached.generate(prompts, params)
print([output.outputs[0].text for output in outputs] == expected, outputs[2].num_cached_tokens > 0)
"""

METRICS_AND_STRUCTURE = """
import sys
from minivllm import LLM, SamplingParams
from minivllm.sampling_params import GuidedDecodingParams, StructuredOutputsParams
from minivllm.v1.metrics.reader import Counter, Gauge, Histogram, Vector

llm = LLM(model=sys.argv[2], dtype="float32", disable_log_stats=False, trust_remote_code=True, max_num_seqs=None)
choice = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["Positive", "Negative"]), max_tokens=20)
older = SamplingParams(guided_decoding=GuidedDecodingParams(choice=["yes", "no"]), max_tokens=20)
texts = [output.outputs[0].text for output in llm.generate(["a", "b"], [choice, older])]
kinds = {type(metric) for metric in llm.get_metrics()}
print(texts[0] in ("Positive", "Negative"), texts[1] in ("yes", "no"), kinds >= {Counter, Gauge, Histogram}, Vector.__name__)
"""

TOKENIZER = """
import sys
from minivllm import LLM, SamplingParams
from minivllm.inputs import TokensPrompt

llm = LLM(sys.argv[2], dtype="float32")
tokenizer = llm.get_tokenizer()
conversations = [[{"role": "user", "content": "hi"}]] * 2
texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
print(len(llm.generate(prompts, SamplingParams(max_tokens=2, min_tokens=1), use_tqdm=False)))
"""


TOOLS_PROFILE_AND_LORA = """
import json
import os
import sys
import tempfile
from minivllm import LLM, SamplingParams
from minivllm.lora.request import LoRARequest

os.environ["VLLM_TORCH_PROFILER_DIR"] = tempfile.mkdtemp()
llm = LLM(model=sys.argv[2], dtype="float32", enable_lora=False, hf_overrides={"max_position_embeddings": 2048})
tools = [{"type": "function", "function": {"name": "get_weather", "description": "Weather in a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
messages = [{"role": "user", "content": "Weather in Rome?"}]
llm.start_profile()
first = llm.chat(messages, sampling_params=SamplingParams(max_tokens=4), tools=tools, use_tqdm=False)[0]
trace = llm.stop_profile()
messages += [{"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {
                 "name": "get_weather", "arguments": json.dumps({"city": "Rome"})}}]},
             {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi", "name": "get_weather"}]
second = llm.chat(messages, SamplingParams(max_tokens=4), tools=tools, use_tqdm=False)[0]
try:
    llm.generate("a", SamplingParams(), lora_request=LoRARequest("sql", 1, "/adapter"))
except ValueError as error:
    print("get_weather" in first.prompt, "sunny" in second.prompt, trace.stat().st_size > 0, error.param)
"""


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> str:
    return str(tiny_llama())


def run(program: str, *arguments: str, module: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", module] if module else ["-c", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(("program", "arguments", "printed"), [
    (CHAT_WITH_ARGUMENTS, ("--dtype", "float", "--max-tokens", "4", "--top_p", "0.9", "--tensor-parallel-size=1"), "1 3 True"),
    (ENGINE_LOOP, ("--dtype=float32", "--max_num_seqs", "4"), "['0', '1', '2']"),
    (ASYNC_STREAMING, (), "6"),
    (PREFIX_CACHING, (), "True True"),
    (METRICS_AND_STRUCTURE, (), "True True True Vector"),
    (TOKENIZER, (), "2"),
    (TOOLS_PROFILE_AND_LORA, (), "True True True lora_request"),
], ids=["chat_with_arguments", "engine_loop", "async_streaming", "prefix_caching", "metrics_and_structure", "tokenizer", "tools"])
def test_a_program_runs(folder: str, program: str, arguments: tuple[str, ...], printed: str) -> None:
    assert run(program, "--model", folder, *arguments).stdout.splitlines()[-1] == printed


def test_the_batch_module_answers_a_file(folder: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": folder, "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 3}
    source.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n")
    run("", "-i", str(source), "-o", str(target), "--model", folder, "--dtype", "float32", "--served-model-name", folder,
        module="minivllm.entrypoints.openai.run_batch")
    assert json.loads(target.read_text())["response"]["body"]["usage"]["completion_tokens"] <= 3
