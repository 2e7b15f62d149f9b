"""`dmpt-export serve` as a process: start, signals, exit codes; and the manifest that shows how to deploy it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
import yaml

import runtime
from dmpt_export.cli.main import cli
from dmpt_export.requests.serve import KEY_VARIABLE, ServeRequest
from tests.helpers.paths import REPOSITORY

# Blocks what is not installed on a device, then runs the command line. {late}: makes each run of the graph take 20 ms.
PROGRAM = """
import sys, time
for name in ("torch", "transformers", "onnx", "onnx_ir", "safetensors", "accelerate"):
    sys.modules[name] = None
from runtime.session import Engine
run = Engine.run
Engine.run = lambda *given, **more: (time.sleep({late}), run(*given, **more))[1]
from dmpt_export.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def process(
    device: Path, *options: str, late: float = 0.0, key: str = ""
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A running server and its port."""
    command = [sys.executable, "-c", PROGRAM.format(late=late), "serve", str(device), "--port", "0", *options]
    env = os.environ | {KEY_VARIABLE: key}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as running:
        assert running.stderr is not None
        line = running.stderr.readline()
        if line.startswith("Warning"):
            line = running.stderr.readline()
        try:
            yield running, int(line.rpartition(":")[2].partition("/")[0])
        finally:
            if running.poll() is None:
                running.kill()


def ask(port: int, prompt: str, most: int, key: str = "") -> tuple[int, str]:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"prompt": prompt, "max_tokens": most, "temperature": 0})
    client.request(
        "POST", "/v1/completions", body, {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    )
    answer = client.getresponse()
    text = answer.read().decode()
    client.close()
    return answer.status, text


def test_sigterm_under_load_loses_nothing_and_exits_with_0(dual_device: Path) -> None:
    with runtime.load(dual_device, threads=1) as model:
        want = model.generate("The tide mill", 30)
    with process(dual_device, late=0.02) as (running, port), ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, port, "The tide mill", 30) for _ in range(8)]
        time.sleep(0.4)
        running.send_signal(signal.SIGTERM)
        answers = [one.result() for one in asked]
        assert running.wait(20) == 0
        assert running.stderr is not None
        log = running.stderr.read()
    assert [status for status, _ in answers] == [200] * 8
    assert {json.loads(text)["choices"][0]["text"] for _, text in answers} == {want}
    assert log.count("POST /v1/completions 200 prompt") == 8
    assert "Traceback" not in log
    assert "mill" not in log


def test_ctrl_c_is_130(dual_device: Path) -> None:
    with process(dual_device, key="sesame") as (running, port):
        assert [ask(port, "The tide", 2, key)[0] for key in ("sesame", "open")] == [200, 401]
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 130
        assert running.stderr is not None
        assert running.stderr.read().endswith("Interrupted\n")


def test_a_second_ctrl_c_does_not_wait(dual_device: Path) -> None:
    with process(dual_device, "--grace", "600", late=0.2) as (running, port), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, port, "The tide", 60)
        time.sleep(1.0)
        running.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        assert running.wait(10) == 130
        assert json.loads(asked.result()[1])["choices"][0]["finish_reason"] == "length"


def test_a_port_in_use_is_5_in_one_line(dual_device: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "dmpt_export", "serve", str(dual_device), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    assert done.stderr.startswith(
        f"Error: cannot listen on 127.0.0.1:{port} (Address already in use): choose another port"
    )


def test_other_machines_without_a_key_are_warned_of(dual_device: Path) -> None:
    command = [
        sys.executable,
        "-c",
        PROGRAM.format(late=0),
        "serve",
        str(dual_device),
        "--port",
        "0",
        "--host",
        "0.0.0.0",
    ]
    for key, warned in (("", True), ("sesame", False)):
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {KEY_VARIABLE: key}
        ) as running:
            assert running.stderr is not None
            first = running.stderr.readline()
            running.kill()
        assert first.startswith("Warning: 0.0.0.0 can be reached from other machines") == warned


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("one\n\ntwo \n")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert ServeRequest("m").keys() == []
    assert ServeRequest("m", api_key_file=str(tmp_path / "keys")).keys() == ["one", "two"]
    monkeypatch.setenv(KEY_VARIABLE, " zero ")
    assert ServeRequest("m", api_key_file=str(tmp_path / "keys")).keys() == ["zero", "one", "two"]


# --- the manifest for Kubernetes -----------------------------------------------------------------------


def test_the_manifest_starts_the_server_as_it_is() -> None:
    """Its options exist, its probes ask paths that are there, and the grace periods add up."""
    documents = list(yaml.safe_load_all((REPOSITORY / "docs/examples/kubernetes.yaml").read_text(encoding="utf-8")))
    (deployment,) = [document for document in documents if document["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    program, verb, *words = container["command"]
    assert (program, verb) == ("dmpt-export", "serve")
    parsed = cli.get_command(click.Context(cli), verb)
    assert parsed is not None
    with parsed.make_context(verb, words) as context:
        request = ServeRequest(**context.params)
    assert request.host == "0.0.0.0"
    assert [port["containerPort"] for port in container["ports"]] == [request.port]
    assert {container[probe]["httpGet"]["path"] for probe in ("readinessProbe", "startupProbe")} == {"/health"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    wait = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= wait + request.grace + 5
    assert container["env"][0]["name"] == KEY_VARIABLE
    assert set(container["resources"]) == {"requests", "limits"}
    assert request.threads == int(container["resources"]["limits"]["cpu"])
    assert container["volumeMounts"][0]["mountPath"] == request.model
