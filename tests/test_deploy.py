"""The files in deploy/ are accepted by the programs that read them. The image is built and run where Docker is."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path

import httpx
import pytest

from bridgetower.cli import main
from bridgetower.inference.predictor import load
from helpers.servers import running_client, wait_until

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
KEY = "sesame open"


def output_of(command, **settings):
    """What a command writes that must succeed."""
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | settings, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_options_exist(capsys):
    files = ("bridgetower.service", "compose.yaml", "Dockerfile")
    text = "\n".join((DEPLOY / name).read_text(encoding="utf-8") for name in files)
    text = text.replace('", "', " ").replace('"]', "")  # the Dockerfile has JSON
    commands = [shlex.split(line) for line in re.findall(r"\bserve (--\S.*)", text)]
    assert len(commands) == 3
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert {word for words in commands for word in words if word.startswith("--")} <= options


def test_nothing_is_said_of_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("NO SYSTEMD, THE UNIT IS NOT CHECKED: apt-get install systemd")
    unit = (DEPLOY / "bridgetower.service").read_text(encoding="utf-8")
    (tmp_path / "bridgetower.service").write_text(
        unit.replace("/opt/bridgetower/bin/bridgetower", sys.executable)
    )
    assert output_of(["systemd-analyze", "verify", str(tmp_path / "bridgetower.service")]) == ""


def test_nothing_is_said_of_the_dockerfile():
    assert (
        output_of([str(Path(sys.executable).with_name("hadolint")), str(DEPLOY / "Dockerfile")])
        == ""
    )


def test_what_is_copied_into_the_image_is_not_ignored():
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    allowed = re.findall(r"^!(.*)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert sorted(name for names in copied for name in names.split()) == sorted(allowed)
    assert all((ROOT / name).exists() for name in allowed)


def test_the_torch_of_the_image_is_one_that_the_project_takes():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "dependencies"
    ]
    (torch,) = (requirement for requirement in needed if requirement.startswith("torch>"))
    assert f'"{torch}"' in DOCKERFILE


def test_compose_file():
    candidates = (
        program
        for program in (["docker", "compose"], ["docker-compose"])
        if shutil.which(program[0])
    )
    works = (
        command
        for command in candidates
        if subprocess.run([*command, "version"], capture_output=True).returncode == 0
    )
    if (program := next(works, None)) is None:
        pytest.skip(
            "NO DOCKER COMPOSE, compose.yaml IS NOT CHECKED: apt-get install docker-compose"
        )
    command = [*program, "--file", str(DEPLOY / "compose.yaml"), "config", "--format", "json"]
    service = json.loads(output_of(command, BRIDGETOWER_API_KEY=KEY))["services"]["bridgetower"]
    assert (ROOT / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert Path(service["build"]["context"]).samefile(ROOT)
    assert service["init"]  # else a signal to stop is lost while the model is loaded
    assert service["environment"] == {"BRIDGETOWER_API_KEY": KEY}
    without = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"BRIDGETOWER_API_KEY": ""}
    )
    assert "set the key that clients send" in without.stderr


def test_health_check(tiny_checkpoint):
    (command,) = re.findall(r"^    CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    program, *arguments = json.loads(command)
    assert program == "python"
    with running_client(load(tiny_checkpoint, device="cpu"), api_key=KEY) as client:
        port = f":{client.base_url.port}/"
        check = [sys.executable, *(argument.replace(":8000/", port) for argument in arguments)]
        assert any(port in argument for argument in check)
        output_of(check)
    assert subprocess.run(check, capture_output=True).returncode != 0


@pytest.fixture(scope="module")
def docker_image():
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True).returncode
    ):
        pytest.skip("NO DOCKER, THE IMAGE IS NOT BUILT: start a Docker daemon")
    name = f"bridgetower-test-{uuid.uuid4().hex[:8]}"
    output_of(
        ["docker", "build", "--file", str(DEPLOY / "Dockerfile"), "--tag", name, "."],
        DOCKER_BUILDKIT="1",
    )
    yield name
    output_of(["docker", "rmi", "--force", name])


@pytest.mark.slow
def test_the_image_serves_without_root(docker_image, tiny_checkpoint):
    tiny_checkpoint.chmod(0o755)
    options = [
        "--detach",
        "--rm",
        "--env",
        "BRIDGETOWER_API_KEY",
        "--publish",
        "127.0.0.1::8000",
        "--read-only",
    ]
    mounts = ["--tmpfs", "/tmp", "--volume", f"{tiny_checkpoint}:/data/model:ro"]
    command = ["serve", "--host", "0.0.0.0", "--model", "/data/model"]
    container = output_of(
        ["docker", "run", *options, *mounts, docker_image, *command], BRIDGETOWER_API_KEY=KEY
    ).strip()
    try:
        wait_until(
            lambda: (
                "healthy"
                in output_of(
                    ["docker", "inspect", "--format", "{{.State.Health.Status}}", container]
                ).split()
            )
        )
        address = output_of(["docker", "port", container, "8000"]).strip()
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = httpx.post(f"http://{address}/v1/embeddings", json={"input": "a"}, headers=headers)
        assert answer.status_code == 200
        assert output_of(["docker", "exec", container, "id", "--user"]).strip() == "1000"
    finally:
        output_of(["docker", "stop", container])
