"""``from flows import convert_models``: what it takes and gives, without a server; with one in ``test_deploy``."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from flows import convert_models
from flows.manifest import read_models
from flows.manifest_keys import ManifestModel, ModelOptions
from flows.python_api import NothingVerifiedError
from onnx_config.errors import ErrorKind, InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return tmp_path


def test_importing_flows_imports_nothing_else() -> None:
    code = "import sys, flows; sys.exit(bool({'prefect', 'db', 'sqlalchemy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    import flows

    with pytest.raises(AttributeError, match="has no attribute 'convert_model'"):
        _ = flows.convert_model  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        pytest.param({}, "no models. Give a list of ids", id="nothing"),
        pytest.param({"models": []}, "no models", id="empty"),
        pytest.param({"models": ["org/a"], "manifest": Path("m.yaml")}, "a manifest and models", id="both"),
        pytest.param({"manifest": Path("m.yaml"), "options": ModelOptions()}, "under 'defaults'", id="options-twice"),
        pytest.param({"models": ["org//a"]}, "'org//a' is malformed", id="malformed"),
        pytest.param({"models": ["org/a", "org/a"]}, "'org/a' is listed twice", id="twice"),
        pytest.param({"models": ["org/a"], "shards": 2}, "one of shards and pool", id="shards-without-pool"),
        pytest.param({"manifest": Path("m.yaml")}, "there is no such file", id="no-manifest"),
        pytest.param({"models": ["org/a"], "timeout": "soon"}, "'soon' is not a duration", id="setting"),
    ],
)
def test_a_wrong_call_starts_nothing(folder: Path, call: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        convert_models.fn(**call)
    assert list(folder.iterdir()) == []


def test_without_prefect_it_is_a_function_and_says_when_nothing_was_verified() -> None:
    with pytest.raises(
        NothingVerifiedError, match=r"0 of 2 models.*not_found: The folder 'nowhere' does not"
    ) as caught:
        convert_models.fn(["./nowhere", ManifestModel(id="./neither", opset=18)])
    assert [entry.id for entry in caught.value.report.models] == ["./nowhere", "./neither"]
    assert caught.value.kind is ErrorKind.NOT_FOUND


def test_models_take_the_options_of_all_unless_they_have_their_own() -> None:
    models = [
        "org/a",
        ManifestModel(id="org/b@v1", opset=18, task="fill-mask"),
        ManifestModel(id="org/c", revision="x"),
    ]
    found = read_models(models, defaults=ModelOptions(opset=17, simplify=False))
    assert [(r.model_id, r.revision, r.options.opset, r.options.simplify, r.options.task) for r in found] == [
        ("org/a", None, 17, False, None),
        ("org/b", "v1", 18, False, "fill-mask"),
        ("org/c", "x", 17, False, None),
    ]


def test_a_server_checks_the_parameters_of_a_deployment_by_their_types() -> None:
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(convert_models).model_dump()
    assert schema["required"] == []
    assert schema["definitions"]["ManifestModel"]["additionalProperties"] is False
    assert schema["definitions"]["Refresh"]["enum"] == ["versions"] or "const" in schema["definitions"]["Refresh"]
    secret = {name for name in schema["properties"] if "url" in name}
    assert secret == set(), "Prefect shows parameters to whoever may look, and URLs may have passwords in them"


# Memory that machines share.


class Slots:
    """The server's concurrency limit, as far as the gate uses it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.asked: list[int] = []

    def __call__(self, name: str, *, occupy: int, strict: bool, **_: Any) -> Any:
        from contextlib import contextmanager

        assert name == "gib"
        assert strict, "without it a limit that is missing lets everything in"

        @contextmanager
        def hold() -> Any:
            self.asked.append(occupy)
            if self.held + occupy > self.limit:
                raise TimeoutError
            self.held += occupy
            try:
                yield
            finally:
                self.held -= occupy

        return hold()


GIB = 1024**3


def gate_over(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> Any:
    from flows import memory_slots

    monkeypatch.setattr(memory_slots, "concurrency", slots)
    monkeypatch.setattr(memory_slots.SlotGate, "_limit", staticmethod(lambda _name: slots.limit))
    return memory_slots.SlotGate(100 * GIB, "gib")


@pytest.mark.parametrize(
    ("wanted", "occupied"),
    [
        pytest.param(GIB // 2, 1, id="one-at-least"),
        pytest.param(3 * GIB + 1, 4, id="rounded-up"),
        pytest.param(50 * GIB, 8, id="all-there-are"),
    ],
)
def test_a_model_holds_a_slot_for_each_gibibyte(monkeypatch: pytest.MonkeyPatch, wanted: int, occupied: int) -> None:
    slots = Slots(8)
    with gate_over(slots, monkeypatch).admit(wanted) as share:
        assert (share, slots.held) == (wanted, occupied)
    assert slots.held == 0


def test_whoever_waits_for_slots_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(8)
    gate = gate_over(slots, monkeypatch)
    stopping = threading.Event()
    stopping.set()
    with gate.admit(6 * GIB), pytest.raises(KeyboardInterrupt), gate.admit(6 * GIB, stopping=stopping):
        pass
    with gate.admit(8 * GIB):
        assert slots.held == 8, "whoever was interrupted holds nothing"
