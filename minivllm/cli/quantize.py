"""`minivllm quantize [MODEL] --method M -o FOLDER`: make a quantized checkpoint."""
from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivllm.cli.flags import add_config_flags, add_model_argument, build, given
from minivllm.config import EngineConfig
from minivllm.quantization.quantize.settings import QuantizeConfig
from minivllm.server.terminal import print_status

if TYPE_CHECKING:
    from minivllm.models.hub import ModelFiles

FIELDS = ("model", "revision", "download_dir", "hf_token")  # of the engine's settings: those that say where the model is


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "quantize", help="make a quantized checkpoint",
        description="Write a quantized copy of a model into a folder that this program, Transformers and vLLM can load.")
    add_model_argument(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder for the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the weights in a folder that is not empty")
    add_config_flags(parser, QuantizeConfig, "quantization")
    add_config_flags(parser, EngineConfig, "model", only=FIELDS)


def run(args: argparse.Namespace) -> int:
    values = given(args, QuantizeConfig, EngineConfig)
    config = build(QuantizeConfig, values)
    engine = build(EngineConfig, {"skip_tokenizer_init": not config.calibrated, **{n: values[n] for n in FIELDS if n in values}})
    from minivllm.models.hub import find_model
    from minivllm.quantization.quantize.checkpoint import prepare
    from minivllm.quantization.quantize.run import quantize

    files, out = find_model(engine), Path(args.output).expanduser()
    prepare(out, files.folder, args.overwrite)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as aside:
        source = _unpacked(files, Path(aside))
        quantize(source, out, config, say=print_status)
    return 0


def _unpacked(files: ModelFiles, aside: Path) -> Path:
    """A folder that Transformers can load: the weights of a GGUF file are dequantized into `aside`."""
    from minivllm.models.gguf import convert
    from minivllm.models.gguf_weights import read_index
    from minivllm.models.weight_files import GGUF_INDEX

    if not (files.folder / GGUF_INDEX).is_file():
        return files.folder
    print_status("the model is a GGUF file: its weights are dequantized first, and quantized again")
    convert(Path(next(iter(read_index(files.folder / GGUF_INDEX).values())).file), aside)
    (aside / "generation_config.json").write_text(json.dumps(files.generation_config, indent=2) + "\n", encoding="utf-8")
    return aside
