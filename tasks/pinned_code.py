"""The one condition under which a model's own code may run: at a commit that somebody has looked at."""

from __future__ import annotations

from onnx_config import hub
from onnx_config.errors import InputError
from tasks.request import ConversionRequest

__all__ = ["refuse_unpinned_code"]


def refuse_unpinned_code(request: ConversionRequest) -> None:
    """Refuse code of a repository that is not named by its commit: a branch may hold other code tomorrow.

    Raises:
        InputError: If code may run, and the model is a repository at a branch or a tag (``bad_input``).
    """
    if not request.options.trust_remote_code or hub.is_pinned(request.model_id, revision=request.revision):
        return
    raise InputError(
        f"trust_remote_code was asked for {request.model_id!r} at {request.revision or 'main'!r}, which may be other "
        "code tomorrow. Read the code at one commit, and name that commit as the revision: its 40 hexadecimal digits."
    )
