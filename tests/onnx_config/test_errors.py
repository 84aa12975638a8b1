"""The error tree: each kind has one class, each class its kinds, and a message is one paragraph."""

from __future__ import annotations

import pickle

import pytest

from onnx_config.errors import (
    ErrorKind,
    FerryError,
    InputError,
    InternalError,
    ModelError,
    ResourceError,
    TransientError,
    error_of_kind,
)

CLASSES = (InputError, TransientError, ModelError, ResourceError, InternalError)


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_each_kind_belongs_to_one_class(kind):
    assert [cls for cls in CLASSES if kind in cls.kinds] == [type(error_of_kind(kind, "why"))]


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_an_error_survives_the_way_out_of_a_child_process(kind):
    error = error_of_kind(kind, "asked,\n   found,\n   what to do")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - bytes that this test wrote
    assert (type(again), again.kind, str(again)) == (type(error), kind, "asked, found, what to do")


@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        pytest.param(InputError, ErrorKind.NETWORK, id="input"),
        pytest.param(TransientError, ErrorKind.BAD_INPUT, id="transient"),
        pytest.param(ModelError, ErrorKind.TIMEOUT, id="model"),
    ],
)
def test_a_class_refuses_the_kinds_of_another(cls, kind):
    with pytest.raises(ValueError, match=f"not '{kind.value}'"):
        cls("why", kind=kind)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_class_has_a_default_kind(cls):
    assert cls("why").kind is cls.kinds[0]
    assert issubclass(cls, FerryError)


def test_what_is_tried_again():
    transient = {kind for kind in ErrorKind if kind.transient}
    alone = {kind for kind in ErrorKind if kind.retried_alone}
    remembered = {kind for kind in ErrorKind if kind.remembered}
    assert transient == set(TransientError.kinds)
    assert alone == {ErrorKind.OUT_OF_MEMORY, ErrorKind.TIMEOUT}
    assert not remembered & (transient | alone)
