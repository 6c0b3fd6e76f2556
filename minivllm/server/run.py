"""The life of a server: port, engine, readiness, shutdown.

    bind the port ─▶ load the engine ─▶ listen ─▶ "ready" ─▶ serve ─▶ SIGINT: abort running requests and exit
    (a port in use                                                    SIGTERM: let them finish for up to drain_timeout seconds
     fails at once)                                                   a second signal: exit at once
    the engine dies: running requests get an error, and the server ends with status 1, or the engine is started again (restart_engine)
    a replica dies (data_parallel_size): the others continue; see engine/replicas.py
"""
from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import shlex
import signal
import socket
import ssl
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minivllm import __version__
from minivllm.config import DOWNSCALE_DELAY, TARGET_QUEUE, UPSCALE_DELAY, EngineConfig, ServerConfig
from minivllm.engine.autoscaling import ScalingPolicy
from minivllm.engine.chat_template import BUILT_IN, ChatTemplate, built_in_template
from minivllm.engine.client import EngineClient, ThreadClient
from minivllm.engine.messages import EngineInfo
from minivllm.engine.process import ProcessClient, freeze_heap
from minivllm.engine.ray_replicas import connect
from minivllm.engine.replica import share_machine
from minivllm.engine.replica_keeper import SILENT_TIMEOUT
from minivllm.engine.replicas import RoutedClient
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput
from minivllm.server.terminal import configure_logging, print_status

if TYPE_CHECKING:
    from minivllm.engine.engine import EngineCore


def serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    """Serve until a signal. Returns the exit status; raises `InvalidInput` for errors that the user can fix."""
    begun = time.monotonic()
    configure_logging(config.log_level)
    check_packages()
    template = read_chat_template(config.chat_template)
    check_certificate(config)
    listener = bind(config.host, config.port) if config.uds is None else bind_unix(config.uds)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with listener:
            print_status(f"minivllm {__version__}: loading {engine_config.model or 'the default model'} ...")
            # Importing the web server's packages takes a second. Do it while the engine loads.
            threading.Thread(target=importlib.import_module, args=("minivllm.server.listen",), daemon=True).start()
            client = start_engine(engine_config, process=config.engine_process, log_level=config.log_level, restarts=config.restart_engine,
                                  replicas=config.data_parallel_size, ray=config.data_parallel_backend == "ray",
                                  scaling=scaling_policy(config), silent_timeout=config.silent_timeout)
            with contextlib.closing(client):
                _run(client, config, template, listener, begun)
                status = 0 if client.dead is None or client.restarting else 1  # a service manager restarts the server then
    except KeyboardInterrupt:
        status = 0
    finally:
        signal.signal(signal.SIGTERM, previous)
        if config.uds is not None:
            Path(config.uds).unlink(missing_ok=True)
    print_status("stopped" if status == 0 else "stopped, because the engine has stopped: start the server again")
    return status


def _run(client: EngineClient, config: ServerConfig, template: str | None, listener: socket.socket, begun: float) -> None:
    from minivllm.server.app import create_app
    from minivllm.server.listen import Server

    tokenizer = build_tokenizer(client.info, template)
    app = create_app(client, config, tokenizer)
    listen(listener)
    chat = tokenizer is not None and tokenizer.chat_template is not None

    def ready() -> None:
        freeze_heap()
        port = listener.getsockname()[1] if config.uds is None else 0
        name = app.state.frontend.names[0]
        print_status(readiness(client.info, config, port, name, chat, time.monotonic() - begun))

    server = Server(app, config, ready)
    client.on_death(server.engine_died)
    server.run(sockets=[listener])


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt  # SIGTERM during loading has the same effect as Ctrl-C


def check_packages() -> None:
    """The engine runs without these packages, so they may be missing."""
    missing = [package for package in ("fastapi", "httptools", "pydantic", "uvicorn") if importlib.util.find_spec(package) is None]
    if missing:
        raise InvalidInput(f"the server needs {', '.join(missing)}: pip install {' '.join(missing)}")


# -- the engine -------------------------------------------------------------------------------------------------------


def build_engine(config: EngineConfig, log_level: str | None) -> EngineCore:
    """Runs in the process that owns the engine. `log_level` is set if that process has not configured logging yet."""
    if log_level is not None:
        configure_logging(log_level)
    from minivllm.engine import compose

    return compose.build_engine(config)


def start_engine(
    config: EngineConfig, *, process: bool, log_level: str, restarts: int = 0, replicas: int = 1, ray: bool = False,
    scaling: ScalingPolicy | None = None, silent_timeout: float | None = None,
) -> EngineClient:
    """A client whose engine accepts requests. With `process`, only the engine's process imports torch. ray: replicas in a Ray cluster.

    scaling: how many replicas there are; None: always `replicas`. silent_timeout: see `RoutedClient`.
    """
    if ray or replicas > 1 or scaling is not None:
        build, gpus_each = partial(build_engine, config, log_level), config.tensor_parallel_size
        start = partial(RoutedClient.start_with, build, replicas=replicas, restarts=restarts, seed=config.seed, scaling=scaling,
                        silent_timeout=silent_timeout or SILENT_TIMEOUT)
        if ray:  # which gives each actor its GPUs
            return start(make=connect(replicas, gpus_each, config.device))
        name = "data_parallel_size" if scaling is None else "max_replicas"
        return start(prepare=partial(share_machine, config.device, gpus_each, name))
    if process:
        return ProcessClient.start_with(partial(build_engine, config, log_level), restarts=restarts)
    return ThreadClient.start_with(partial(build_engine, config, None))


def scaling_policy(config: ServerConfig) -> ScalingPolicy | None:
    """How the number of replicas follows the load; None: it is fixed."""
    if config.max_replicas is None:
        return None
    return ScalingPolicy(
        least=config.data_parallel_size, most=config.max_replicas,
        target_queue=TARGET_QUEUE if config.target_queue is None else config.target_queue,
        upscale_delay=UPSCALE_DELAY if config.upscale_delay is None else config.upscale_delay,
        downscale_delay=DOWNSCALE_DELAY if config.downscale_delay is None else config.downscale_delay)


# -- the port ---------------------------------------------------------------------------------------------------------


def bind(host: str, port: int) -> socket.socket:
    """Reserve the port before the slow parts of the start. Connections are refused until `listen`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)  # "localhost" is 127.0.0.1, not ::1
    except (socket.gaierror, UnicodeError):
        raise InvalidInput(f"host {host!r} is not an address of this machine: use 127.0.0.1, or 0.0.0.0 for all", "host") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port is free although old connections are in TIME_WAIT
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _port_error(error, host, port) from None
    return listener


def bind_unix(path: str) -> socket.socket:
    """A Unix socket. A file that an ended server left behind is replaced; a socket with a server behind it is not."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(ConnectionRefusedError):
                probe.connect(path)
                raise InvalidInput(f"uds {path} is in use: stop the program that uses it, or choose another path", "uds")
            Path(path).unlink()
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise InvalidInput(f"cannot listen on the Unix socket {path}: {error.strerror or error}: choose another path", "uds") from None
    except InvalidInput:
        listener.close()
        raise
    return listener


def check_certificate(config: ServerConfig) -> None:
    """Load the certificate once before the model is loaded, so that a wrong file is reported at once."""
    if config.ssl_certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        name = "ssl_keyfile" if config.ssl_keyfile is not None and not Path(config.ssl_keyfile).is_file() else "ssl_certfile"
        raise InvalidInput(f"{name}: {config.ssl_certfile} and {config.ssl_keyfile} are no certificate and its private key "
                           f"({getattr(error, 'strerror', None) or error}): give PEM files", name) from None


def listen(listener: socket.socket) -> None:
    try:
        listener.listen(2048)
    except OSError as error:  # another server has started to listen on the port in the meantime
        raise _port_error(error, *listener.getsockname()[:2]) from None


def _port_error(error: OSError, host: str, port: int) -> InvalidInput:
    if error.errno == errno.EADDRINUSE:
        other = port + 1 if port < 65535 else 8000
        return InvalidInput(f"port {port} on {host} is in use: stop the program that uses it, or choose another: --port {other}", "port")
    if error.errno == errno.EACCES:
        return InvalidInput(f"port {port} needs privileges that this user lacks: choose one above 1023, such as --port 8000", "port")
    if error.errno == errno.EADDRNOTAVAIL:
        return InvalidInput(f"host {host!r} is not an address of this machine: use 127.0.0.1, or 0.0.0.0 for all", "host")
    return InvalidInput(f"cannot listen on {host}:{port}: {error.strerror}", "port")


# -- tokenizer and chat template ---------------------------------------------------------------------------------------


def read_chat_template(file: str | None) -> str | None:
    if file is None:
        return None
    if file in BUILT_IN:
        return built_in_template(file)
    if "{%" in file or "{{" in file:  # the template itself
        return file
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidInput(f"chat_template: cannot read {file}: {reason}; give a file, or a built-in template: {', '.join(BUILT_IN)}",
                           "chat_template") from None


def build_tokenizer(info: EngineInfo, template: str | None) -> Tokenizer | None:
    """The server tokenizes itself, so that the engine receives token ids. None for an engine without a tokenizer."""
    if info.tokenizer_folder is None:
        return None
    tokenizer = Tokenizer(info.tokenizer_folder, info.trust_remote_code)
    if template is not None:
        tokenizer.chat_template = ChatTemplate(template)
    return tokenizer


def readiness(info: EngineInfo, config: ServerConfig, port: int, name: str, chat: bool, seconds: float) -> str:
    """A description of the server. The last line is a curl command that can be pasted into a shell."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, f"[{config.host}]" if ":" in config.host else config.host)
    scheme = "http" if config.ssl_certfile is None else "https"
    socket_flag = "" if config.uds is None else f" --unix-socket {shlex.quote(config.uds)}"
    url = f"{scheme}://{host}:{port}{config.root_path}" if config.uds is None else f"{scheme}://localhost"
    tokens = (info.num_blocks - 1) * info.block_size  # one block is the null block
    key = ' -H "Authorization: Bearer $MINIVLLM_API_KEY"' if config.needs_key else ""
    path, body = "/v1/completions", '{"prompt": "The capital of France is", "max_tokens": 16}'
    if chat:
        path, body = "/v1/chat/completions", '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64}'
    more = "" if config.max_replicas is None else f", up to {config.max_replicas} under load"
    open_to_all = not config.is_local and not config.needs_key
    hint = " (with MINIVLLM_API_KEY set to a key)" if config.needs_key else ""
    return "\n".join((
        *(["warning   all machines that reach this port may use the server: set --api-key, or --host 127.0.0.1"] if open_to_all else []),
        f"model     {name}, {info.dtype} on {info.device}",
        f"context   {info.max_model_len} tokens (prompt + output)",
        f"KV cache  {info.num_blocks - 1} blocks of {info.block_size} tokens = {tokens} tokens",
        *([f"replicas  {info.data_parallel_size}{more}, each with such a KV cache"] if more or info.data_parallel_size > 1 else []),
        f"ready after {seconds:.1f} s at {url} (Ctrl-C stops it). Try{hint}:",
        f"curl{socket_flag} {url}{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}",
    ))
