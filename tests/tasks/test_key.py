"""The action key: the same for the same work, another one as soon as anything differs that decides the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_config.variants import Variant
from tasks import key as key_module
from tasks import lookup as lookups
from tasks.key import action_key
from tasks.lookup import Lookup
from tasks.request import ConversionOptions, ConversionRequest, Device

COMMIT = "c" * 40
VERSIONS = {"onnx-ferry": "0.1.0", "torch": "2.13.0"}
PLAIN = ConversionOptions()
OTHERS = {
    "task": "fill-mask",
    "device": Device.CPU,
    "opset": 20,
    "dtype": "float16",
    "simplify": False,
    "weights": "link",
    "trust_remote_code": True,
    "variants": (Variant.Q4,),
}


def make(model: str = "org/name", revision: str = COMMIT, options: ConversionOptions = PLAIN, **more: str) -> str:
    return action_key(model, revision, options, versions={**VERSIONS, **more})


def test_it_is_a_whole_sha256():
    assert len(make()) == 64
    assert set(make()) <= set("0123456789abcdef")


def test_the_value_is_pinned():
    """A change here forgets every conversion of every user: raise ``CODE_EPOCH`` where that is meant."""
    assert make() == "0e7c246c8fa739b9d3ecc049879c8424181c1550621b9b8c3d6bbeb0f3263114"


def test_every_option_is_tried_below():
    assert set(OTHERS) == {field.name for field in fields(ConversionOptions)}


@pytest.mark.parametrize(
    "other",
    [
        *(pytest.param(make(options=replace(PLAIN, **{name: value})), id=name) for name, value in OTHERS.items()),
        pytest.param(make(model="org/other"), id="model"),
        pytest.param(make(model=""), id="a-folder-of-the-same-hash"),
        pytest.param(make(revision="d" * 40), id="revision"),
        pytest.param(make(torch="2.14.0"), id="version"),
        pytest.param(make(onnxsim="0.8.1"), id="one-package-more"),
    ],
)
def test_whatever_decides_the_result_changes_it(other):
    assert other != make()


def test_the_epoch_of_our_own_code_changes_it(monkeypatch):
    before = make()
    monkeypatch.setattr(key_module, "CODE_EPOCH", key_module.CODE_EPOCH + 1)
    assert make() != before


@given(st.permutations(list(OTHERS)), st.permutations(list(VERSIONS)))
def test_no_order_changes_it(names, packages):
    options = ConversionOptions(**{name: OTHERS[name] for name in names})
    versions = {name: VERSIONS[name] for name in packages}
    assert action_key("org/name", COMMIT, options, versions=versions) == make(options=ConversionOptions(**OTHERS))


def test_no_process_changes_it():
    code = (
        "from tasks.key import action_key; from tasks.request import ConversionOptions, Device;"
        f"print(action_key('org/name', {COMMIT!r}, ConversionOptions(task='fill-mask', device=Device.CPU)))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    options = ConversionOptions(task="fill-mask", device=Device.CPU)
    assert found == {action_key("org/name", COMMIT, options)}


def test_the_installed_versions_are_the_default():
    assert action_key("org/name", COMMIT, PLAIN) == action_key(
        "org/name", COMMIT, PLAIN, versions=key_module.package_versions()
    )


def test_a_folder_is_known_by_its_content_alone(tmp_path, monkeypatch):
    for name in ("one", "two", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": name == "other"}))
    monkeypatch.chdir(tmp_path)
    wanted = [ConversionRequest(model_id=model) for model in ("./one", str(tmp_path / "two"), "other")]
    keys = []
    for request in wanted:
        lookup = lookups._resolve_or_error(request)
        assert isinstance(lookup, Lookup)
        keys.append(lookup.key)
    assert keys[0] == keys[1] != keys[2]
