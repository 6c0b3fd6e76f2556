"""Calibration text: from a file, or from documentation that every installation of Python has."""
from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivllm.errors import InvalidInput

SHORTEST = 200  # characters of a docstring that is used: shorter ones are mostly lists of parameters
CHARACTERS = 8  # of text per token that is needed; the tokenizers of language models need about 4


def windows(tokenizer: Any, file: str | None, num_samples: int, seq_len: int) -> Tensor:
    """Windows of token ids, evenly spaced in the text, without overlap. int64 [num_samples, seq_len]

    tokenizer: of Transformers. Raises `InvalidInput` if the text is too short.
    """
    text = read_text(file) if file is not None else standard_library(num_samples * seq_len * CHARACTERS)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < num_samples * seq_len:
        raise InvalidInput(f"the calibration text {file or '(of the standard library)'} has {len(ids):,} tokens, but {num_samples} windows "
                           f"of {seq_len} need {num_samples * seq_len:,}: lower num_samples or seq_len, or give a longer file with "
                           "calibration", "calibration")
    step = len(ids) // num_samples
    return torch.stack([ids[i * step: i * step + seq_len] for i in range(num_samples)])


def read_text(file: str) -> str:
    """A text file, or the `text` fields of a .jsonl file."""
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return text
        return "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"calibration file {file!r} cannot be read ({error}): name a text file in UTF-8", "calibration") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"calibration file {file!r} has a line that is no JSON object with a field text, which is a string ({error!r}): "
                           "correct it", "calibration") from None


def standard_library(characters: int) -> str:
    """Docstrings of the standard library with at least so many characters, or all of them, which are about 700,000."""
    found, size = [], 0
    for doc in _docstrings():
        found.append(doc)
        size += len(doc)
        if size >= characters:
            break
    return "\n\n".join(found)


def _docstrings() -> Iterator[str]:
    """The longer ones, from files in the order of their names read backwards, which mixes the topics. Nothing is imported."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda path: path.stem[::-1]):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node)
                if doc and len(doc) >= SHORTEST:
                    yield doc
