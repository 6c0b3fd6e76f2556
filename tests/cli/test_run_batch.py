"""`run-batch` with a tiny model: each line gets the server's response, independent of the other lines."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minivllm.cli.main import main

ENGINE_FLAGS = ["--dtype", "float32", "--device", "cpu", "--num-gpu-blocks-override", "64", "--max-num-seqs", "2"]
GREEDY = {"temperature": 0, "max_tokens": 6}


def request(name: str, url: str, **body: Any) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": {**GREEDY, **body}})


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> str:
    return str(tiny_llama())


def run(folder: str, tmp_path: Path, lines: list[str]) -> list[dict[str, Any]]:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")  # with the byte order mark that some editors write
    assert main(["run-batch", "-i", str(source), "-o", str(target), folder, *ENGINE_FLAGS]) == 0
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def test_every_line_gets_a_response_in_order_and_wrong_lines_get_errors(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    from minivllm import LLM, SamplingParams

    chat = [{"role": "user", "content": "the cat"}]
    with LLM(model=folder, dtype="float32", device="cpu", num_gpu_blocks_override=64) as llm:
        params = SamplingParams(**GREEDY)  # type: ignore[arg-type]
        text = llm.generate("the hat", params, use_tqdm=False)[0].outputs[0].text
        answer = llm.chat(chat, params, use_tqdm=False)[0].outputs[0].text  # type: ignore[arg-type]
    entries = run(folder, tmp_path, [
        request("long", "/v1/completions", prompt="the hat", max_tokens=60),
        request("chat", "/v1/chat/completions", messages=chat),
        "not json",
        "",
        request("text", "/v1/completions", prompt="the hat"),
        request("field", "/v1/completions", prompt="the hat", temprature=1),
        request("path", "/v1/rerank", query="x"),
        request("stream", "/v1/completions", prompt="the hat", stream=True),
        request("response", "/v1/responses", input="the cat", max_output_tokens=6),  # and max_tokens, which is not its name there
        json.dumps({"custom_id": "\ud800", "url": "/v1/completions", "body": 5}),
        "[" * 100_000,
        request("last", "/v1/completions", prompt="the hat", model="another"),
    ])
    names = ["long", "chat", None, "text", "field", "path", "stream", "response", "?", None, "last"]
    assert [entry["custom_id"] for entry in entries] == names
    assert [entry["response"]["status_code"] for entry in entries] == [200, 200, 400, 200, 400, 400, 400, 400, 400, 400, 404]
    for entry in entries:
        good = entry["response"]["status_code"] == 200
        assert (entry["error"] is None) == good and (entry["response"]["body"] is not None) == good
        assert entry["id"] and entry["response"]["request_id"]
        assert good or entry["error"]["error"]["message"]
    bodies = {entry["custom_id"]: entry["response"]["body"] for entry in entries if entry["error"] is None}
    assert bodies["text"]["choices"][0]["text"] == text and bodies["chat"]["choices"][0]["message"]["content"] == answer
    assert bodies["long"]["choices"][0]["text"].startswith(text)
    assert "did you mean 'temperature'" in entries[4]["error"]["error"]["message"]
    assert "3 of 11 requests were answered, 8 have errors" in capsys.readouterr().err


def test_lines_may_ask_for_embeddings_and_scores(folder: str, tmp_path: Path) -> None:
    lines = [json.dumps({"custom_id": url, "url": url, "body": body}) for url, body in (
        ("/v1/embeddings", {"input": ["the cat", "a hat"]}), ("/score", {"text_1": "the cat", "text_2": ["the cat", "a hat"]}))]
    vectors, scores = (entry["response"]["body"]["data"] for entry in run(folder, tmp_path, lines))
    one, two = (entry["embedding"] for entry in vectors)
    assert [entry["score"] for entry in scores] == pytest.approx([1, sum(a * b for a, b in zip(one, two, strict=True))], abs=1e-4)



def test_requests_to_responses_are_answered(folder: str, tmp_path: Path) -> None:
    line = json.dumps({"custom_id": "r", "method": "POST", "url": "/v1/responses", "body": {"input": "the cat", "max_output_tokens": 3}})
    (entry,) = run(folder, tmp_path, [line])
    assert entry["response"]["body"]["object"] == "response" and entry["response"]["body"]["usage"]["output_tokens"] == 3


def test_files_that_cannot_be_read_or_written_are_one_line_errors(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run-batch", "-i", str(tmp_path / "none"), "-o", str(tmp_path / "out"), folder]) == 1
    (tmp_path / "in").write_text("")
    assert main(["run-batch", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "no" / "folder"), folder]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "cannot read" in errors[0] and "cannot write" in errors[1]


def test_the_input_file_is_not_overwritten(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, link = tmp_path / "in", tmp_path / "link"
    source.write_text(request("a", "/v1/completions", prompt="x"))
    link.symlink_to(source)
    before = source.read_text()
    assert main(["run-batch", "-i", str(source), "-o", str(link), folder]) == 1
    assert "overwrite" in capsys.readouterr().err and source.read_text() == before


def test_replicas_give_the_same_file(folder: str, tmp_path: Path) -> None:
    lines = [request(str(i), "/v1/completions", prompt="the hat " * (1 + i), max_tokens=4 + i) for i in range(6)]
    texts = []
    for flags in ([], ["--data-parallel-size", "2"]):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("\n".join(lines), encoding="utf-8")
        assert main(["run-batch", "-i", str(source), "-o", str(target), folder, *ENGINE_FLAGS, *flags]) == 0
        entries = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        texts.append([(entry["custom_id"], entry["response"]["body"]["choices"][0]["text"]) for entry in entries])
    assert texts[0] == texts[1]


def test_replicas_record_no_trace(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(request("a", "/v1/completions", prompt="x"), encoding="utf-8")
    assert main(["run-batch", "-i", str(source), "-o", str(tmp_path / "o"), folder, *ENGINE_FLAGS, "-dp", "2", "--trace", "t.jsonl"]) == 1
    assert "trace records one engine of this machine" in capsys.readouterr().err
