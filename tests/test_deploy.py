"""The files of docs/deploy: the server accepts their settings, and the programs that read them find no fault, where they are installed."""
from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from minivllm.cli.flags import build, given
from minivllm.cli.main import build_parser
from minivllm.config import EngineConfig, ServerConfig

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "deploy"


def text_of(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def configs(arguments: list[str]) -> tuple[EngineConfig, ServerConfig]:
    """The configs of a command line of `minivllm serve`. An unknown flag ends the test."""
    args = build_parser()[0].parse_args(["serve", *arguments])
    values = given(args, EngineConfig, ServerConfig)
    return build(EngineConfig, values), build(ServerConfig, values)


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(name, arguments) of each instruction, without comments, and with continued lines joined."""
    text = re.sub(r"^#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def test_the_server_accepts_every_setting_of_the_config_file() -> None:
    engine, server = configs(["--config", str(FOLDER / "minivllm.yaml")])
    assert (engine.max_queue, server.host, server.restart_engine) == (200, "127.0.0.1", 3)


def test_the_service_starts_the_server_and_waits_longer_than_requests_may_take_to_finish() -> None:
    unit = text_of("minivllm.service")
    command = re.search(r"^ExecStart=\S+/minivllm serve (.*)$", unit, re.MULTILINE)
    assert command is not None
    _, server = configs(shlex.split(command[1].replace("/etc/minivllm/", f"{FOLDER}/")))
    timeout = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert timeout is not None and int(timeout[1]) > server.drain_timeout


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "minivllm.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text_of("minivllm.service"), flags=re.MULTILINE), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    if "Failed to initialize manager" in done.stderr:
        pytest.skip(f"systemd-analyze cannot run here: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_proxy_agrees_with_the_servers_limits() -> None:
    text, server = text_of("nginx.conf"), ServerConfig()
    size, idle = re.search(r"client_max_body_size (\d+)m;", text), re.search(r"keepalive_timeout (\d+)s;", text)
    assert size is not None and int(size[1]) << 20 == server.max_body_size
    listen = (ROOT / "minivllm" / "server" / "listen.py").read_text(encoding="utf-8")
    keep_alive = re.search(r"timeout_keep_alive=(\d+)", listen)
    assert idle is not None and keep_alive is not None and int(idle[1]) < int(keep_alive[1])
    assert f"server 127.0.0.1:{server.port};" in text and "proxy_buffering off;" in text


def test_nginx_accepts_the_configuration(tmp_path: Path) -> None:
    if shutil.which("nginx") is None or shutil.which("openssl") is None:
        pytest.skip("nginx or openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=a"],
                   capture_output=True, check=True)
    site = re.sub(r"ssl_certificate \S+;", f"ssl_certificate {certificate};", text_of("nginx.conf"))
    site = re.sub(r"ssl_certificate_key \S+;", f"ssl_certificate_key {key};", site).replace("listen 443", f"listen unix:{tmp_path}/socket")
    (tmp_path / "site.conf").write_text(site, encoding="utf-8")
    paths = "".join(f"{kind}_temp_path {tmp_path}/{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    main = tmp_path / "nginx.conf"
    main.write_text(f"pid {tmp_path}/pid; events {{}} http {{ access_log off; {paths} include {tmp_path}/site.conf; }}", encoding="utf-8")
    done = subprocess.run(["nginx", "-t", "-e", "stderr", "-p", tmp_path, "-c", main], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_image_copies_files_that_exist_and_starts_the_server() -> None:
    steps = instructions(text_of("Dockerfile"))
    kept = [line[1:] for line in text_of("Dockerfile.dockerignore").splitlines() if line.startswith("!")]
    copied = [name for step, arguments in steps if step == "COPY" for name in arguments.split()[:-1]]
    assert sorted(copied) == sorted(kept) and all((ROOT / name).exists() for name in copied)
    program, command, *arguments = json.loads(dict(steps)["ENTRYPOINT"])
    assert (program, command) == ("minivllm", "serve")
    _, server = configs(arguments)
    assert server.host == "0.0.0.0" and dict(steps)["EXPOSE"] == str(server.port)
    assert f":{server.port}/health" in dict(steps)["HEALTHCHECK"]
