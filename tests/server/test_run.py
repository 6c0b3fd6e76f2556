"""The port and the startup message, without a model."""
from __future__ import annotations

import errno
import socket

import pytest

from minivllm.config import ServerConfig
from minivllm.engine.messages import EngineInfo
from minivllm.errors import InvalidInput
from minivllm.server.run import bind, listen, readiness

INFO = EngineInfo(
    model="m", model_folder="/f", tokenizer_folder="/f", max_model_len=2048, vocab_size=10, eos_token_ids=(1,), device="cpu",
    dtype="float32", num_blocks=129, block_size=16, generation_config={},
)


def test_a_bound_port_refuses_connections_until_it_listens() -> None:
    with bind("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        listen(listener)
        socket.create_connection(address).close()


def test_a_port_is_free_at_once_after_its_server_has_ended() -> None:
    with bind("127.0.0.1", 0) as listener:
        listen(listener)
        address = listener.getsockname()
        with socket.create_connection(address) as client, listener.accept()[0] as accepted:
            accepted.close()  # the side that closes first keeps the address in TIME_WAIT
            assert client.recv(1) == b""
    bind(*address).close()


def test_a_port_that_another_server_has_taken_while_loading_is_an_error_message() -> None:
    with bind("127.0.0.1", 0) as first, socket.socket() as second:
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            second.bind(first.getsockname())
        except OSError as error:
            pytest.skip(f"this system does not let two sockets bind one port: {errno.errorcode[error.errno or 0]}")
        second.listen()
        with pytest.raises(InvalidInput, match="is in use"):
            listen(first)


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid", "a" * 300])
def test_a_host_that_is_not_this_machine_is_refused(host: str) -> None:
    with pytest.raises(InvalidInput, match="is not an address of this machine") as caught:
        bind(host, 0)
    assert caught.value.param == "host"


def test_localhost_is_127_0_0_1() -> None:
    with bind("localhost", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("host, url", [
    ("127.0.0.1", "http://127.0.0.1:80/v1"), ("0.0.0.0", "http://127.0.0.1:80/v1"), ("::", "http://[::1]:80/v1"), ("::1", "http://[::1]:80/v1"),
])
def test_the_curl_line_has_a_reachable_address(host: str, url: str) -> None:
    assert f"curl {url}/chat/completions " in readiness(INFO, ServerConfig(host=host), 80, "m", True, 1.0)


def test_the_curl_line_fits_the_model_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIVLLM_API_KEY", raising=False)
    assert "/v1/completions" in readiness(INFO, ServerConfig(), 80, "m", False, 1.0)
    guarded = readiness(INFO, ServerConfig(api_key=("top-secret",)), 80, "m", True, 1.0)
    assert "$MINIVLLM_API_KEY" in guarded and "top-secret" not in guarded
    assert "Authorization" not in readiness(INFO, ServerConfig(), 80, "m", True, 1.0)


def test_the_null_block_is_not_counted_as_cache() -> None:
    assert "128 blocks of 16 tokens = 2048 tokens" in readiness(INFO, ServerConfig(), 80, "m", True, 1.0)


def test_a_server_that_all_machines_may_use_says_so() -> None:
    warning = "all machines that reach this port may use the server"
    assert warning in readiness(INFO, ServerConfig(host="0.0.0.0"), 80, "m", True, 1.0)
    for config in (ServerConfig(), ServerConfig(host="0.0.0.0", api_key=("k",)), ServerConfig(host="0.0.0.0", uds="/s")):
        assert warning not in readiness(INFO, config, 80, "m", True, 1.0)
