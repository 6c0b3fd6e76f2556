"""Models on the Hugging Face hub: what a name means there, and downloads in an order that refuses early.

    owner/name           config.json ─▶ checked ─▶ tokenizer ─▶ checked ─▶ safetensors; pickles only if there are no safetensors
    owner/name:Q4_K_M    one GGUF file of the repository (or all its parts), by its quantization or its name; owner/name/file.gguf names
                         the same: its header, read with range requests ─▶ checked ─▶ the file

A model that cannot run here is refused by its config.json or its GGUF header, before its weights are downloaded.
"""
from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from minivllm.errors import ModelError, shown
from minivllm.lora.peft_config import CONFIG_FILE, PICKLED_FILE, WEIGHTS_FILE
from minivllm.models.weight_files import find_parts
from minivllm.quantization.methods import QUANTIZATION_FILES

Result = TypeVar("Result")

CONFIGS = ["config.json", *QUANTIZATION_FILES]
SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]  # config and tokenizer
CODE = ["*.py"]  # only with trust_remote_code
SAFETENSORS = "*.safetensors"
PICKLES = "pytorch_model*.bin"  # read only through torch.load(weights_only=True)
NOT_WANTED = ["*/*", "consolidated*", "*.index.fp*"]  # copies of the same weights in other formats
LONGEST_ID = 96  # characters of an id on the hub
MOST_LISTED = 6  # files in an error
HEAD_BYTES, MOST_HEAD_BYTES = 16 << 20, 256 << 20  # of a GGUF file; a vocabulary of 152k tokens with its merges takes 6 MB

_NAME = re.compile(r"(?:https?://)?(?:(?:www\.)?(?:huggingface\.co|hf\.co)/)?(?P<repository>[\w.-]+/[\w.-]+|[\w.-]+)"
                   r"(?::(?P<tag>[^:/]+)|/(?:(?:resolve|blob)/[^/]+/)?(?P<file>[^:]+\.gguf))?/?", re.IGNORECASE)
# Files that say what a repository or folder without config.json is.
NOT_A_MODEL = {
    "params.json": "params.json is the original format of Mistral or Meta: use the model's repository in Hugging Face's format",
    "adapter_config.json": "it is a LoRA adapter: use the model that it was trained for",
    "model_index.json": "it is a pipeline for images: use a text model",
}


@dataclass(frozen=True)
class HubName:
    """A name that may refer to the hub."""

    param: str  # model, tokenizer or lora_path
    given: str  # as the user wrote it
    repository: str
    gguf: str | None  # a quantization such as Q4_K_M, or a file
    revision: str | None = None
    cache_dir: str | None = None  # None: the hub client's own
    token: str | None = None  # None: HF_TOKEN
    trust_code: bool = False  # download Python files too

    def with_code(self, patterns: list[str]) -> list[str]:
        return [*patterns, *CODE] if self.trust_code else patterns


def parse_name(param: str, name: str, **settings: Any) -> HubName:
    """The repository that a name refers to. Raises `ModelError` for what can only be a path."""
    match = _NAME.fullmatch(name)
    if match is None or name.startswith((".", "/", "~")) or len(match["repository"]) > LONGEST_ID:
        raise ModelError(f"{param} {shown(name, 200)}: no such folder; give a folder with a config.json, a .gguf file, or a hub id such as "
                         "'facebook/opt-125m', without a leading / or .", param)
    if match["tag"] and "/" not in match["repository"]:
        raise ModelError(f"{param} {name!r} is not a hub id (owner/name, or owner/name:Q4_K_M for a GGUF file); names of other programs' "
                         "libraries are not known here", param)
    return HubName(param, name, match["repository"], match["tag"] or match["file"], **settings)


# ---- downloads

def download_model(name: HubName, load_format: str, check: Callable[[Path], object],
                   check_tokenizer: Callable[[Path], object] = lambda folder: None) -> Path:
    """The folder of a model. `check` raises if the config.json in the folder describes a model that cannot run here, and
    `check_tokenizer` if the tokenizer is missing. Both run before weights are downloaded."""
    check(download_config(name))
    folder = _snapshot(name, name.with_code(SMALL_FILES))
    try:
        check_tokenizer(folder)
    except ModelError:
        _refuse_gguf_only(name)  # the better reason
        raise
    if load_format == "dummy":
        return folder
    folder = _snapshot(name, name.with_code([*SMALL_FILES, SAFETENSORS]))
    if load_format == "auto" and not any(folder.glob(SAFETENSORS)):
        folder = _snapshot(name, name.with_code([*SMALL_FILES, PICKLES]))
    if not any(folder.glob(SAFETENSORS)) and not any(folder.glob(PICKLES)):
        _refuse_gguf_only(name)
    return folder


def download_adapter(name: HubName, check: Callable[[Path], object]) -> Path:
    """The folder of a LoRA adapter. `check` raises if the settings in the folder cannot be applied, before weights are downloaded."""
    if not (_snapshot(name, [CONFIG_FILE]) / CONFIG_FILE).is_file():
        raise ModelError(f"{name.param} {name.given!r} has no {CONFIG_FILE} on the hub, so it is no LoRA adapter: check the id, or give it "
                         "as model", name.param)
    check(_snapshot(name, [CONFIG_FILE]))
    folder = _snapshot(name, [CONFIG_FILE, WEIGHTS_FILE])
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = PICKLED_FILE in _file_names(name)
        raise ModelError(f"{name.param} {name.given!r} has no {WEIGHTS_FILE} on the hub"
                         f"{f', but {PICKLED_FILE}, which may run code when it is read' if pickled else ''}: save the adapter with "
                         "safe_serialization=True", name.param)
    return folder


def download_config(name: HubName) -> Path:
    """The folder with a model's config.json."""
    folder = _snapshot(name, name.with_code(CONFIGS))
    if not (folder / "config.json").is_file():
        files = _file_names(name)
        reason = "it holds only GGUF files" if _gguf_files(files) else not_a_model(files)
        raise ModelError(f"{name.param} {name.given!r} has no config.json on the hub: {reason}{_how_to_name(name, files)}", name.param)
    return folder


def read_tensors(name: HubName) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name -> (dtype, shape, bytes) of each tensor in a model's safetensors, from their headers, read with range requests. {}: none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    with _errors(name), suppress(NotASafetensorsRepoError):
        about = HfApi().get_safetensors_metadata(name.repository, revision=name.revision, token=name.token)
        return {tensor: (found.dtype, tuple(found.shape), found.data_offsets[1] - found.data_offsets[0])
                for file in about.files_metadata.values() for tensor, found in file.tensors.items()}
    return {}


def read_gguf_header(name: HubName, read: Callable[[Path, str], Result]) -> Result:
    """What `read` gets from the beginning of a GGUF file; see `download_gguf`."""
    files = _choose_gguf(name, _file_names(name))
    with gguf_head(name, files) as head:
        return read(head, f"{name.repository}/{files[0]}")


def _refuse_gguf_only(name: HubName) -> None:
    """Raise `ModelError` for a repository with a config.json whose weights are GGUF files."""
    files = _file_names(name)
    if _gguf_files(files) and not any(PurePosixPath(file).match(pattern) for file in files for pattern in (SAFETENSORS, PICKLES)):
        raise ModelError(f"{name.param} {name.given!r} has no safetensors on the hub, but GGUF files{_how_to_name(name, files)}",
                         name.param)


def download_tokenizer(name: HubName) -> Path:
    """The folder of a repository's small files."""
    return _snapshot(name, name.with_code(SMALL_FILES))


def download_gguf(name: HubName, check: Callable[[Path, str], object]) -> Path:
    """A GGUF file, or all its parts -> the first. `check` gets the beginning of the file and its name, and raises if it cannot run here."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    files = _choose_gguf(name, _file_names(name))
    if not all(isinstance(try_to_load_from_cache(name.repository, file, name.cache_dir, name.revision), str) for file in files):
        with gguf_head(name, files) as head:
            check(head, f"{name.repository}/{files[0]}")
    with _errors(name):
        paths = [hf_hub_download(name.repository, file, revision=name.revision, cache_dir=name.cache_dir, token=name.token)
                 for file in files]
    return Path(paths[0])


@contextmanager
def gguf_head(name: HubName, files: Sequence[str]) -> Iterator[Path]:
    """The headers of the parts of a GGUF file on the hub, each in a file with zeros instead of the weights -> the first.

    They take only the headers' space on disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / PurePosixPath(file).name for file in files]
        for file, path in zip(files, paths, strict=True):
            _read_head(name, file, path)
        yield paths[0]


def _read_head(name: HubName, file: str, path: Path) -> None:
    from gguf import GGUFReader

    from minivllm.models.gguf_config import ROPE_TENSORS
    from minivllm.models.gguf_structure import check_structure

    size = HEAD_BYTES
    while True:
        content, total = _read_range(name, file, 0, size)
        with path.open("wb") as out:
            out.write(content)
            out.truncate(total)  # the rest is a hole
        with suppress(ValueError, KeyError, IndexError, OverflowError, MemoryError):  # the header is longer, or the file is damaged
            check_structure(path)
            reader = GGUFReader(path)
            if reader.data_offset <= size:
                break
        if size >= min(total, MOST_HEAD_BYTES):
            return  # the reader of the header names the damage
        size *= 4
    for tensor in reader.tensors if size < total else ():
        if tensor.name in ROPE_TENSORS:  # a few numbers that belong to the configuration
            with path.open("r+b") as out:
                out.seek(tensor.data_offset)
                out.write(_read_range(name, file, tensor.data_offset, tensor.n_bytes)[0])


def not_a_model(files: Iterable[str]) -> str:
    """Why a repository or folder with these files, none of them config.json, cannot be loaded."""
    return next((reason for file, reason in NOT_A_MODEL.items() if file in files), "is it a model?")


# ---- GGUF files of a repository

def _gguf_files(files: Iterable[str]) -> list[str]:
    """The GGUF files that are models: mmproj files are encoders of images."""
    return sorted(file for file in files if file.lower().endswith(".gguf") and "mmproj" not in file.lower())


def _choose_gguf(name: HubName, files: Iterable[str]) -> list[str]:
    """The file that a name, or the end of a name such as Q4_K_M, refers to, or all its parts."""
    wanted, ggufs = str(name.gguf), _gguf_files(files)
    found = [file for file in ggufs if wanted in (file, PurePosixPath(file).name, PurePosixPath(file).stem)]
    tag = re.compile(rf"(.*[-./])?{re.escape(wanted)}(-\d{{5}}-of-\d{{5}})?\.gguf", re.IGNORECASE)
    found = found or [file for file in ggufs if tag.fullmatch(file)]
    models = {tuple(str(part) for part in find_parts(PurePosixPath(file))) for file in found}
    if len(models) != 1:
        what = "several files" if found else "no GGUF file"
        raise ModelError(f"{name.param} {name.given!r}: {what} of {name.repository!r} on the hub matches {wanted!r}"
                         f"{_how_to_name(name, found or ggufs)}", name.param)
    (parts,) = models
    if missing := set(parts) - set(ggufs):
        raise ModelError(f"{name.param} {name.given!r}: {name.repository!r} on the hub lacks {', '.join(sorted(missing))}: choose another",
                         name.param)
    return list(parts)


def _how_to_name(name: HubName, files: Iterable[str]) -> str:
    """The GGUF files that there are with their sizes, and how to name one."""
    found = _gguf_files(files)
    if not found:
        return ""
    best = next((file for file in found if "q4_k_m" in file.lower()), found[0])
    sizes = _sizes(name, found[:MOST_LISTED])
    listed = ", ".join(f"{file} {sizes[file] / 1e9:.1f} GB" if file in sizes else file for file in found[:MOST_LISTED])
    more = f", and {len(found) - MOST_LISTED} more" if len(found) > MOST_LISTED else ""
    return f" ({listed}{more}); name one, such as {name.repository}:{PurePosixPath(best).name}"


# ---- the hub's client

def hub_in_reach(timeout: float = 3.0) -> bool:
    """Whether the hub answers. False without a network, and if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants, get_session

    try:
        return not constants.HF_HUB_OFFLINE and get_session().head(constants.ENDPOINT, timeout=timeout).status_code < 500
    except Exception:
        return False


def _file_names(name: HubName) -> list[str]:
    """Names of a repository's files. Without a network: the GGUF files in the cache."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        with _errors(name):
            about = HfApi().model_info(name.repository, revision=name.revision, token=name.token, expand=["siblings"])
    except ModelError:
        with suppress(Exception):  # not in the cache either: the first error counts
            folder = Path(snapshot_download(name.repository, revision=name.revision, cache_dir=name.cache_dir, local_files_only=True,
                                            allow_patterns=["*.gguf"]))
            if cached := [str(file.relative_to(folder)) for file in folder.rglob("*.gguf")]:
                return cached
        raise
    return [file.rfilename for file in about.siblings or []]


def _sizes(name: HubName, files: list[str]) -> dict[str, int]:
    """Bytes of some files; without a network, of none."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with suppress(Exception):  # they only make an error more helpful
        paths = HfApi().get_paths_info(name.repository, files, revision=name.revision, token=name.token)
        return {path.path: path.size for path in paths if isinstance(path, RepoFile)}
    return {}


def _read_range(name: HubName, file: str, start: int, size: int) -> tuple[bytes, int]:
    """-> (up to `size` bytes of a file from `start` on, bytes of the whole file)."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(token=name.token), "Range": f"bytes={start}-{start + size - 1}"}
    with _errors(name):
        answer = get_session().get(hf_hub_url(name.repository, file, revision=name.revision), headers=headers)
        hf_raise_for_status(answer)
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        return answer.content, int(total) if total.isdigit() else start + len(answer.content)


def _snapshot(name: HubName, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _errors(name):
        return Path(snapshot_download(name.repository, revision=name.revision, cache_dir=name.cache_dir, token=name.token,
                                      allow_patterns=list(patterns), ignore_patterns=NOT_WANTED))


@contextmanager
def _errors(name: HubName) -> Iterator[None]:
    """Turn each error of the hub's client into one with a fix."""
    from huggingface_hub import errors

    param, what = name.param, f"{name.param} {name.given!r} is not a local folder"
    try:
        yield
    except errors.GatedRepoError as error:
        fix = f"accept its terms at https://huggingface.co/{name.repository}, then set HF_TOKEN or run `hf auth login`"
        raise ModelError(f"{what}, and on the hub it is gated: {fix}", param) from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the spelling; for a private one set HF_TOKEN"
        raise ModelError(f"{what}, and the hub has no such repository (or hides it): {fix}", param) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub's {name.repository!r} has no revision {name.revision!r}: check the branch, tag or commit",
                         "revision") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{what}, and not a valid hub id (owner/name): check the path", param) from error
    except _failures() as error:  # no network, or HF_HUB_OFFLINE, and not in its cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        others = "" if param == "lora_path" else " or .gguf file, or nothing for the default model"
        fix = f"check the network (HF_HUB_OFFLINE, HF_ENDPOINT, proxy), or name a folder{others}"
        raise ModelError(f"{what}, and the hub could not be reached ({reason}): {fix}", param) from error


def _failures() -> tuple[type[Exception], ...]:
    """OSError, and the base class of the errors of the HTTP library under the hub's client, whichever it is."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError" and issubclass(base, Exception))
