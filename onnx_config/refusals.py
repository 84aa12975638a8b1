"""What a model's own words say is wrong with its inputs."""

from __future__ import annotations

import re

from onnx_config.declarations import Declaration, Role

__all__ = ["asked_for", "is_one_row_only", "is_too_small", "wrong_sizes"]

_SIZE_REFUSALS = (
    re.compile(r"length (?P<want>\d+), but (?:found|got) (?P<got>\d+)"),
    re.compile(r"to have (?P<want>\d+) channels, but got (?P<got>\d+)"),
    re.compile(r"\((?P<got>\d+)\) doesn't match (?:the )?model[^(]*\((?P<want>\d+)\)"),
    re.compile(r"[Ee]xpected .{0,80}?(?P<want>\d+)\D{1,40}(?:got|found|but is)\D{1,20}(?P<got>\d+)"),
    re.compile(r"\(\d+x(?P<got>\d+) and (?P<want>\d+)x\d+\)"),
)
_TOO_SMALL = re.compile(
    r"[Kk]ernel size can't be greater|[Oo]utput size is too small|too small|negative dimension|"
    r"must be (?:at least|greater|larger)|[Ii]nput.{0,40}too short|non-zero size|should be greater"
)
_ONE_ROW = re.compile(r"batch[ _]sizes? (?:> ?1|(?:greater|larger|bigger) than 1)\b", re.IGNORECASE)
_ASKS_FOR = (
    re.compile(r"missing \d+ required positional arguments?: (?P<names>.*)"),
    re.compile(r"(?:specify|provide|pass(?:ed)?|given?|required|expects?)(?P<names>.*)", re.IGNORECASE),
    re.compile(r"(?P<names>.*)(?:cannot be None|is required|should be passed|must be (?:passed|provided|specified))"),
)


def wrong_sizes(refusal: str) -> list[tuple[int, int]]:
    """Return the sizes that a refusal names as (got, wanted), the surest first.

    >>> wrong_sizes("expected input to have 80 channels, but got 16 channels instead")
    [(16, 80)]
    """
    found = [match for pattern in _SIZE_REFUSALS if (match := pattern.search(refusal))]
    return list(dict.fromkeys((int(match["got"]), int(match["want"])) for match in found))


def is_too_small(refusal: str) -> bool:
    """Return whether a refusal asks for a larger input."""
    return _TOO_SMALL.search(refusal) is not None


def is_one_row_only(refusal: str) -> bool:
    """Return whether a refusal says that only a batch of one row is taken."""
    return _ONE_ROW.search(refusal) is not None


def asked_for(refusal: str, declaration: Declaration) -> list[str]:
    """Return the data arguments that ``refusal`` asks for."""
    words: list[str] = []
    for pattern in _ASKS_FOR:
        if found := pattern.search(refusal):
            words += re.findall(r"[a-z]\w+", found["names"])
    data = {a.name for a in declaration.arguments if a.role is Role.DATA}
    return [word for word in dict.fromkeys(words) if word in data]
