"""The deployment file: what is read, and what a mistake says."""

from __future__ import annotations

import inspect
from datetime import timedelta
from pathlib import Path

import pytest

from flows.deployment_file import DeploymentFile, Parameters, read_deployment_file
from onnx_config.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.txt").write_text("org/a\n", encoding="utf-8")
    return tmp_path


def read(text: str) -> DeploymentFile:
    Path("prefect.yaml").write_text(text, encoding="utf-8")
    return read_deployment_file(Path("prefect.yaml"))[0]


WHOLE = """
work_pools:
  - name: ferry
    type: docker
    concurrency_limit: 4
concurrency_limits:
  - name: ferry-memory-gib
    slots: 64
tag_limits:
  - tag: gpu
    slots: 1
notifications:
  - name: team
    url_variable: NOTIFY_URL
deployments:
  - name: nightly
    manifest: models.txt
    work_pool: ferry
    schedules:
      - cron: "0 2 * * *"
        timezone: Europe/Berlin
      - interval: 90min
        active: false
    parameters: {workers: 2, refresh: versions, retry_failed: [network], shards: 2, memory_slots: ferry-memory-gib}
    tags: [ferry]
    concurrency_limit: 1
    collision: enqueue
    job_variables: {env: {FERRY_HOME: /srv/ferry}}
"""
LEAST = "deployments:\n- {name: a, manifest: models.txt, work_pool: ferry}\n"


def test_everything_that_a_file_can_say(folder: Path) -> None:
    found = read(WHOLE)
    (deployment,) = found.deployments
    assert deployment.manifest == str(folder / "models.txt")
    assert [(s.cron, s.interval, s.timezone, s.active) for s in deployment.schedules] == [
        ("0 2 * * *", None, "Europe/Berlin", True),
        (None, timedelta(minutes=90), "UTC", False),
    ]
    assert deployment.parameters.model_dump(mode="json", exclude_unset=True) == {
        "workers": 2,
        "refresh": "versions",
        "retry_failed": ["network"],
        "shards": 2,
        "memory_slots": "ferry-memory-gib",
    }
    assert (found.work_pools[0].type, found.concurrency_limits[0].slots, found.tag_limits[0].slots) == ("docker", 64, 1)
    assert (found.notifications[0].name, found.notifications[0].url_variable) == ("team", "NOTIFY_URL")


def test_what_is_shipped_can_be_read() -> None:
    found, notes = read_deployment_file(ROOT / "deploy" / "prefect.yaml")
    assert notes == ()
    assert {deployment.work_pool for deployment in found.deployments} <= {pool.name for pool in found.work_pools}


def test_the_parameters_are_those_of_the_flow() -> None:
    from flows import convert_models

    flows_own = set(inspect.signature(convert_models.fn).parameters) - {"models", "manifest", "options"}
    assert set(Parameters.model_fields) == flows_own


def test_a_manifest_on_another_machine_is_noted_and_one_that_is_nowhere_is_wrong() -> None:
    Path("prefect.yaml").write_text(LEAST.replace("models.txt", "/srv/elsewhere/models.yaml"), encoding="utf-8")
    found, notes = read_deployment_file(Path("prefect.yaml"))
    assert found.deployments[0].manifest == "/srv/elsewhere/models.yaml"
    assert notes == ("a: /srv/elsewhere/models.yaml is not on this machine, so it was not read",)
    with pytest.raises(InputError, match=r"line 2: there is no file '.*/nothing\.txt'"):
        read(LEAST.replace("models.txt", "nothing.txt"))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        pytest.param("cron:", "crom:", "line 20: unknown key 'crom'; did you mean 'cron'", id="unknown-key"),
        pytest.param("schedules:", "shedule:", "line 19: unknown key 'shedule'; did you mean 'schedules'", id="above"),
        pytest.param("workers: 2", "worker: 2", "line 24: unknown key 'worker'; did you mean 'workers'", id="inner"),
        pytest.param("Europe/Berlin", "Europe/Atlantis", "line 21: .*no time zone; write one such as UTC", id="zone"),
        pytest.param('"0 2 * * *"', '"0 2 * *"', "line 20: .*no cron line; write minute, hour", id="cron"),
        pytest.param("90min", "often", "line 22: 'interval': 'often' is not a duration", id="interval"),
        pytest.param("90min", "1", "line 22: 'interval': must be 10 s at least", id="interval-too-short"),
        pytest.param("type: docker", "type: doker", "line 4: 'type' is 'doker': it takes process.*'docker'", id="type"),
        pytest.param("enqueue", "queue", "line 27: 'collision' is 'queue'.*did you mean 'enqueue'", id="collision"),
        pytest.param("[network]", "[netwrok]", "line 24: .*'network'", id="kind"),
        pytest.param("slots: 64", "slots: many", "line 8: 'slots'", id="no-number"),
        pytest.param("slots: 64", "slots: 0", "line 8: 'slots'", id="no-slots"),
        pytest.param("    work_pool: ferry\n", "", "line 16: the key 'work_pool' is missing", id="missing-key"),
        pytest.param("tags: [ferry]", "tags: ferry", "line 25: 'tags' takes a list", id="no-list"),
        pytest.param("    tags: [ferry]", "    tags: [ferry]\n    tags: []", "line 26: the key 'tags' is given twice",
            id="key-twice"),
        pytest.param("- tag: gpu", "- {tag: gpu, slots: 2}\n  - tag: gpu", "line 11: 'gpu' stands on line 10 already",
            id="name-twice"),
        pytest.param("NOTIFY_URL", "https://x/y", "line 14: 'url_variable': is no name of an environment", id="url"),
        pytest.param("name: nightly", "name: a/b", "line 16: 'name': is no name", id="name"),
        pytest.param("interval: 90min", "timezone: UTC", "line 22: .*either 'cron' or 'interval'", id="no-schedule"),
        pytest.param("deployments:", "deployments: [", "not YAML", id="no-yaml"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(before: str, after: str, words: str) -> None:
    assert before in WHOLE
    with pytest.raises(InputError, match=words) as caught:
        read(WHOLE.replace(before, after, 1))
    assert caught.value.message.startswith("Deployment file 'prefect.yaml': ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", "the keys 'deployments' and 'work_pools' belong here", id="empty"),
        pytest.param("- a", "the keys 'deployments' and 'work_pools' belong here", id="list"),
        pytest.param("work_pools: []", "'deployments' is missing", id="no-deployments"),
        pytest.param("deployments: []", "'deployments'", id="none"),
    ],
)
def test_a_file_that_says_nothing(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(text)


def test_a_manifest_that_is_wrong_is_told_before_it_runs(folder: Path) -> None:
    (folder / "models.txt").write_text("org//a\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 2: Manifest '.*models\.txt': line 1: .*malformed"):
        read(LEAST)


def test_a_run_that_waits_for_its_own_parts_in_a_pool_of_one_would_wait_for_ever() -> None:
    text = "work_pools: [{name: ferry, concurrency_limit: 1}]\n" + LEAST.replace("}", ", parameters: {shards: 2}}")
    with pytest.raises(InputError, match=r"line 3: .*concurrency_limit of 1.*its own parts"):
        read(text)
