"""``ferry plan``: what it asks for, what it prints, and with what it ends.

The function that does the work is replaced, save where a test is about the whole command.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows import cli
from onnx_config.errors import ErrorKind
from tasks import plan as planning
from tasks.plan import Outlook, Plan, PlannedModel, PlanTotals, Rehearsal
from tasks.report import ErrorEntry, Status, Step, TensorEntry
from tasks.request import ConversionRequest, Workspace
from tests.faults.harness import ferry as whole_command

GIB = 1024**3
WORKS = PlannedModel(
    id="org/a",
    revision=None,
    outlook=Outlook.WORKS,
    task="fill-mask",
    model_type="bert",
    architecture="BertForMaskedLM",
    inputs=tuple(TensorEntry(name=f"input_{n}", dtype="int64", shape=("batch_size",)) for n in range(5)),
    parameters=110_000_000,
    weight_bytes=440_000_000,
    peak_memory_bytes=4 * GIB,
    disk_bytes=443_000_000,
    seconds=41.0,
    notes=("[red]a note\x1b[2J",),
)
FAILS = PlannedModel(
    id="org/[b]",
    revision=None,
    outlook=Outlook.FAILS,
    error=ErrorEntry(
        kind=ErrorKind.UNSUPPORTED, message="no [bold]class\x1b[2J", step=Step.DETECT, reproduce="ferry convert org/b"
    ),
)


@dataclass
class Work:
    """What the command asked for, and what it is answered."""

    models: tuple[PlannedModel, ...] = (WORKS, FAILS)
    calls: list[dict[str, Any]] = field(default_factory=list)
    raises: BaseException | None = None

    def plan(
        self,
        requests: Sequence[ConversionRequest],
        workspace: Workspace,
        *,
        workers: int,
        rehearse: bool,
        told: Callable[[str, int, int], None],
    ) -> Plan:
        self.calls.append({"requests": requests, "workspace": workspace, "workers": workers, "rehearse": rehearse})
        print("a library talks")  # noqa: T201
        if self.raises:
            raise self.raises
        told("detected", 1, 2)
        failing = sum(model.error is not None for model in self.models)
        totals = PlanTotals(
            works=len(self.models) - failing, fails=failing, parameters=110_000_000, weight_bytes=440_000_000,
            download_bytes=0, peak_memory_bytes=4 * GIB, disk_bytes=443_000_000, seconds=82.0,
        )  # fmt: skip
        return Plan(
            started_at=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0, rehearsed=rehearse, totals=totals,
            models=self.models,
        )  # fmt: skip


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FERRY_HOME", str(tmp_path / "home"))
    (tmp_path / "models.yaml").write_text("models: [org/a, org/b]\n")
    made = Work()
    monkeypatch.setattr(planning, "plan_models", made.plan)
    return made


def ferry(*args: str) -> Result:
    return CliRunner().invoke(cli.app, ["plan", *args])


@pytest.mark.parametrize(
    ("models", "code"),
    [
        pytest.param((WORKS,), 0, id="all-work"),
        pytest.param((WORKS, FAILS), 1, id="some-fail"),
        pytest.param((FAILS,), 1, id="all-fail"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_the_exit_code_tells_whether_all_would_work(work: Work, models, code, flags) -> None:
    work.models = models
    assert ferry("models.yaml", *flags).exit_code == code


@pytest.mark.parametrize(
    ("args", "words"),
    [
        pytest.param([], "Missing argument 'MANIFEST'", id="no-manifest"),
        pytest.param(["absent.yaml"], "'absent.yaml': there is no such file", id="absent"),
        pytest.param(["bad.yaml"], "line 2: unknown key 'modles'", id="unknown-key"),
        pytest.param(["twice.txt"], "line 2: 'org/a' stands on line 1 already", id="duplicate"),
        pytest.param(["odd.txt"], "'org/a/b' is malformed", id="bad-id"),
        pytest.param(["models.yaml", "--workers", "0"], "--workers", id="workers"),
        pytest.param(["models.yaml", "--timeout", "soon"], "--timeout: 'soon' is not a duration", id="timeout"),
        pytest.param(["models.yaml", "--output", "x"], "No such option.*--output", id="unknown-option"),
    ],
)
def test_a_wrong_manifest_starts_nothing(work: Work, tmp_path, args, words) -> None:
    (tmp_path / "bad.yaml").write_text("\nmodles: [a]\n")
    (tmp_path / "twice.txt").write_text("org/a\norg/a\n")
    (tmp_path / "odd.txt").write_text("org/a/b\n")
    result = ferry(*args)
    assert (result.exit_code, result.stdout, work.calls) == (2, "", [])
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert re.search(words, said), said


def test_flags_are_passed_on(work: Work) -> None:
    ferry("models.yaml", "--rehearse", "--workers", "3", "--memory-limit", "2GiB", "--timeout", "1h", "--home", "here")
    (call,) = work.calls
    assert [request.model_id for request in call["requests"]] == ["org/a", "org/b"]
    assert (call["workers"], call["rehearse"]) == (3, True)
    places = call["workspace"]
    assert (places.home, places.memory_limit_bytes, places.timeout_seconds) == (Path.cwd() / "here", 2 * GIB, 3600.0)


def test_json_is_one_document(work: Work) -> None:
    result = ferry("models.yaml", "--json")
    found = Plan.model_validate_json(result.stdout)
    assert found.models == (WORKS, FAILS)
    assert json.loads(result.stdout)["schema"] == 1
    assert "a library talks" in result.stderr


def test_the_table_says_what_fails_first_and_why(work: Work) -> None:
    result = ferry("models.yaml", "--workers", "2")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    rows = [line for line in lines if line.startswith(("works", "fails"))]
    assert rows == [
        "fails org/[b]",
        "works org/a fill-mask input_0, input_1, input_2, input_3, … 110.0M 419.6 MiB 4.0 GiB 422.5 MiB 41.0 s",
    ]
    assert "org/[b]: unsupported at detect: no [bold]class[2J" in lines
    assert "org/a: [red]a note[2J" in lines
    total = next(line for line in lines if "would work" in line)
    assert total.startswith("1 would work, 1 would fail. Estimated")
    assert "41.0 s with 2 workers" in total


def test_one_model_is_not_done_by_two_workers(work: Work) -> None:
    work.models = (WORKS.model_copy(update={"seconds": 82.0}),)
    assert "1:22 with 2 workers" in ferry("models.yaml", "--workers", "2").stdout


def test_a_rehearsal_has_a_column(work: Work) -> None:
    rehearsal = Rehearsal(status=Status.CONVERTED, parity=None, seconds=9.0)
    work.models = (WORKS.model_copy(update={"rehearsal": rehearsal}),)
    result = ferry("models.yaml", "--rehearse")
    header, row = (line.split() for line in result.stdout.splitlines() if re.match("outlook|works", line))
    assert (header[-1], row[-1]) == ("twin", "converted")


def test_an_interruption_is_130(work: Work) -> None:
    work.raises = KeyboardInterrupt()
    result = ferry("models.yaml")
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


# The whole command


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


BERT = {
    "model_type": "bert", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64,
    "vocab_size": 128, "architectures": ["BertForSequenceClassification"],
}  # fmt: skip


def test_a_plan_of_real_configs_and_its_rerun(tmp_path) -> None:
    write(tmp_path / "bert", BERT)
    write(tmp_path / "later", {"model_type": "bert9", "transformers_version": "99.0.0"})
    write(tmp_path / "head", {**BERT, "architectures": ["BertForTelepathy"], "transformers_version": "99.0.0"})
    (tmp_path / "models.txt").write_text("./bert\n./later\n./head\n")
    home = tmp_path / "home"
    ran = whole_command("plan", "models.txt", "--json", home=home, cwd=tmp_path)
    assert ran.returncode == 1, ran.stderr
    bert, later, head = json.loads(ran.stdout)["models"]
    assert (bert["outlook"], bert["task"]) == ("works", "text-classification")
    assert [tensor["name"] for tensor in bert["inputs"]] == ["input_ids", "attention_mask", "token_type_ids"]
    for model, words in ((later, "It was written by transformers 99.0.0: upgrade"), (head, "Upgrade transformers.")):
        assert (model["outlook"], model["error"]["kind"]) == ("fails", "unsupported")
        assert words in model["error"]["message"]
    again = whole_command("plan", "models.txt", "--json", home=home, cwd=tmp_path)
    found = json.loads(again.stdout)
    assert found["seconds"] < 2, "nothing is detected twice"
    assert [model["error"] for model in found["models"]] == [None, later["error"], head["error"]]
    # What the plan has found, every other command knows.
    told = whole_command("detect", "./later", home=home, cwd=tmp_path)
    assert (told.returncode, told.stdout) == (1, "")
    assert "transformers 99.0.0: upgrade transformers" in told.stderr
    shown = whole_command("detect", "./bert", "--json", home=home, cwd=tmp_path)
    assert json.loads(shown.stdout)["architecture"] == "BertForSequenceClassification"


def test_detect_says_that_a_config_needs_a_newer_transformers(tmp_path) -> None:
    write(tmp_path / "later", {"model_type": "bert9", "transformers_version": "99.0.0"})
    ran = whole_command("detect", "./later", home=tmp_path / "home", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(
        r"Error: \S*later/config\.json has the model_type 'bert9', which transformers \S+ does not know\. "
        r"It was written by transformers 99\.0\.0: upgrade transformers\.\n",
        ran.stderr,
    )
