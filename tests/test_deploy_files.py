"""The files under ``deploy``: what can be held without Docker or a cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from flows.cli import app
from flows.deployment_file import read_deployment_file
from flows.settings import Settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
SETTINGS = {f"FERRY_{name.upper()}" for name in Settings.model_fields}
NOT_SETTINGS = {"FERRY_IMAGE_VARIANT"}


def documents(path: Path) -> list[Any]:
    return [document for document in YAML(typ="safe", pure=True).load_all(path) if document is not None]


COMPOSE = documents(DEPLOY / "compose.yaml")[0]
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
MANIFESTS = {
    path.name: documents(path)
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    if path.name not in ("kustomization.yaml", "models.yaml", "prefect.yaml")
}
OBJECTS = [document for found in MANIFESTS.values() for document in found]
KUSTOMIZATION = documents(DEPLOY / "kubernetes" / "kustomization.yaml")[0]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for document in OBJECTS:
        if document["kind"] in ("Deployment", "Job"):
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def containers() -> list[tuple[str, dict[str, Any]]]:
    return [(name, one) for name, pod in pods() for one in (*pod.get("initContainers", ()), *pod["containers"])]


def variables() -> set[str]:
    """Return every variable that a file sets or asks for."""
    found = {name for service in SERVICES.values() for name in service.get("environment", {})}
    found |= {item["name"] for _, one in containers() for item in one.get("env", ())}
    found |= {name for document in OBJECTS for name in document.get("stringData", {})}
    found |= {
        line.partition("=")[0] for made in KUSTOMIZATION["configMapGenerator"] for line in made.get("literals", ())
    }
    compose = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    found |= set(re.findall(r"\$\{(\w+)", compose))
    for name in ("Dockerfile", "server.Dockerfile"):
        text = (DEPLOY / name).read_text(encoding="utf-8")
        found |= set(re.findall(r"\b((?:FERRY|PREFECT|HF)_[A-Z_]+|DO_NOT_TRACK)=", text))
    return found


def test_every_setting_is_explained_in_one_place_and_no_other_is_named() -> None:
    explained = set(re.findall(r"^\| `(FERRY_\w+)` \|", README, re.MULTILINE)) - NOT_SETTINGS
    assert explained == SETTINGS
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            named = set(re.findall(r"\bFERRY_[A-Z_]+\b", path.read_text(encoding="utf-8")))
            assert named <= SETTINGS | NOT_SETTINGS, path


@pytest.mark.parametrize("name", sorted(variables()))
def test_every_variable_that_a_file_sets_is_explained(name: str) -> None:
    assert f"`{name}`" in README


@pytest.mark.parametrize("name", sorted(line.partition("=")[0] for line in
    (DEPLOY / ".env.example").read_text(encoding="utf-8").splitlines() if "=" in line))  # fmt: skip
def test_what_the_env_file_has_is_used(name: str) -> None:
    assert f"${{{name}:" in (DEPLOY / "compose.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_waits_for_what_is_there_and_opens_no_port_to_others(name: str) -> None:
    service = SERVICES[name]
    after = service.get("depends_on", {})
    for other in after:
        assert other in SERVICES
        condition = after[other]["condition"] if isinstance(after, dict) else "service_started"
        assert condition != "service_healthy" or "healthcheck" in SERVICES[other]
        if condition == "service_completed_successfully":
            assert SERVICES[other].get("restart", "no") == "no"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    for volume in service.get("volumes", ()):
        source = volume.partition(":")[0]
        assert (DEPLOY / source).exists() if source.startswith("./") else source in COMPOSE["volumes"]
    image = service["image"]
    assert image.startswith("onnx-ferry") or re.search(r":\D*\d", image), "others' images have a release"


def commands() -> list[list[str]]:
    found = [service["command"] for service in SERVICES.values() if "command" in service]
    found += [words for _, one in containers() if (words := one.get("args") or one.get("command"))]
    console = re.findall(r"^\$ (?:docker compose .* run --rm ferry )?(ferry [^#\n]*)", README, re.MULTILINE)
    return [*found, *(line.split() for line in console)]


OURS = sorted({tuple(words) for words in commands() if words[0] == "ferry"})


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_a_command_of_ours_is_one(words: tuple[str, ...]) -> None:
    help_text = CliRunner().invoke(app, [words[1], "--help"])
    assert help_text.exit_code == 0
    said = re.sub(r"\x1b\[[0-9;]*m", "", help_text.stdout)
    assert [word for word in words[2:] if word.startswith("--") and word not in said] == []


THEIRS = sorted({tuple(words) for words in commands() if words[0] == "prefect"})


@pytest.mark.parametrize("words", THEIRS, ids=" ".join)
def test_a_command_of_prefect_is_one(words: tuple[str, ...], tmp_path: Path) -> None:
    options = [word for word in words if word.startswith("--")]
    named = [word for word in words[1:4] if not word.startswith("--")]
    asked = subprocess.run(
        [sys.executable, "-m", "prefect", *named, "--help"],
        env=os.environ | {"PREFECT_HOME": str(tmp_path), "DO_NOT_TRACK": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr
    assert [option for option in options if option not in asked.stdout] == []


@pytest.mark.parametrize(("name", "container"), containers(), ids=[f"{n}-{c['name']}" for n, c in containers()])
def test_a_container_of_the_cluster_has_its_limits_and_what_it_names(name: str, container: dict[str, Any]) -> None:
    pod = dict(pods())[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["resources"]["limits"]["memory"]
    assert container["image"] in {image["name"] for image in KUSTOMIZATION["images"]}
    secrets = {document["metadata"]["name"] for document in OBJECTS if document["kind"] == "Secret"}
    maps = {made["name"] for made in KUSTOMIZATION["configMapGenerator"]}
    for source in container.get("envFrom", ()):
        assert source.get("secretRef", {}).get("name", "prefect-secrets") in secrets
        assert source.get("configMapRef", {}).get("name", "ferry-settings") in maps
    volumes = {volume["name"] for volume in pod.get("volumes", ())}
    assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
    ports = {port["name"] for port in container.get("ports", ())}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe in container:
            assert container[probe]["httpGet"]["port"] in ports


def test_the_cluster_has_all_that_its_kustomization_lists() -> None:
    assert set(KUSTOMIZATION["resources"]) == MANIFESTS.keys() - {"secret.example.yaml"}
    labels = [document["spec"]["selector"]["app"] for document in OBJECTS if document["kind"] == "Service"]
    assert set(labels) <= {document["metadata"]["name"] for document in OBJECTS if document["kind"] == "Deployment"}
    found, notes = read_deployment_file(DEPLOY / "kubernetes" / "prefect.yaml")
    assert found.deployments[0].manifest == "/etc/ferry/models.yaml"
    assert len(notes) == 1


def test_the_server_has_the_versions_that_were_tested() -> None:
    """Beside those, pip may choose: under newer ones of these the server does not start, or schedules nothing."""
    pins = set((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    lines = (DEPLOY / "constraints-server.txt").read_text(encoding="utf-8").splitlines()
    own = {line for line in lines if not line.startswith("#")}
    assert own <= pins
    assert {line.partition("==")[0].lower() for line in own} >= {"prefect", "fastapi", "sqlalchemy", "asyncpg"}


@pytest.mark.parametrize("name", ["Dockerfile", "server.Dockerfile"])
def test_an_image_copies_what_is_there_and_runs_as_nobody_special(name: str) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8").replace("\\\n", " ")
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ") and "--from" not in line]
    assert all((ROOT / source).exists() for sources in copied for source in sources)
    allowed = (DEPLOY / f"{name}.dockerignore").read_text(encoding="utf-8").splitlines()
    assert all(f"!{source}" in allowed for sources in copied for source in sources)
    assert re.search(r"^USER (?!0|root)\w+$", text, re.MULTILINE)
    packages = {"onnx_config", "tasks", "flows", "db"}
    assert name != "Dockerfile" or packages <= {source for sources in copied for source in sources}
