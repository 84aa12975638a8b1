"""What a model's own words say is wrong with its inputs."""

from __future__ import annotations

import re

from onnx_config.declarations import Declaration, Role

__all__ = [
    "asked_for",
    "beyond_table",
    "exclusive",
    "is_one_row_only",
    "is_too_small",
    "reshaped",
    "token_counts",
    "unpacked",
    "unwanted",
    "wrong_sizes",
]

_SIZE_REFUSALS = (
    re.compile(r"length (?P<want>\d+), but (?:found|got) (?P<got>\d+)"),
    re.compile(r"to have (?P<want>\d+) channels, but got (?P<got>\d+)"),
    re.compile(r"\((?P<got>\d+)\) doesn't match (?:the )?model[^(]*\((?P<want>\d+)\)"),
    re.compile(r"[Ee]xpected .{0,80}?(?P<want>\d+)\D{1,40}(?:got|found|but is)\D{1,20}(?P<got>\d+)"),
    re.compile(r"\(\d+x(?P<got>\d+) and (?P<want>\d+)x\d+\)"),
    re.compile(r"tensor a \((?P<got>\d+)\) must match the size of tensor b \((?P<want>\d+)\)"),
    re.compile(r"\((?P<got>\d+)\*\d+\) doesn't match [^(]*\((?P<want>\d+)\*\d+\)"),
    re.compile(r"\(\d+\*(?P<got>\d+)\) doesn't match [^(]*\(\d+\*(?P<want>\d+)\)"),
    re.compile(r"is (?P<got>\d+) and the .{0,60} is (?P<want>\d+),? (?:but|which)"),
    re.compile(r": (?P<got>\d+) doesn't correspond to [^:]*: (?P<want>\d+)"),
)
_TOO_SMALL = re.compile(
    r"[Kk]ernel size can't be greater|[Oo]utput size is too small|too small|negative dimension|"
    r"must be (?:at least|greater|larger)|[Ii]nput.{0,40}too short|non-zero size|should be greater"
)
_ONE_ROW = re.compile(r"batch[ _]sizes? (?:> ?1|(?:greater|larger|bigger) than 1)\b", re.IGNORECASE)
_NOT_BOTH = re.compile(r"\b(?:cannot|can't|can not|must not|should not|do not|don't)\b[\w ]* both:? (?P<names>[^.;]*)")
_NOT_TAKEN = (
    re.compile(
        r"(?P<name>[a-z]\w+)`?'? (?:(?:is|are) not (?:expected|supported|allowed|accepted)|(?:should|must) be None)\b"
    ),
    re.compile(r"\b(?:cannot|can't|can not|must not) (?:pass|give|provide|specify) `?(?P<name>[a-z]\w+_\w+)`? to\b"),
)
_ASKS_FOR = (
    re.compile(r"missing \d+ required positional arguments?: (?P<names>.*)"),
    re.compile(r"(?:specify|provide|pass(?:ed)?|given?|required|expects?|\bset)(?P<names>.*)", re.IGNORECASE),
    re.compile(
        r"(?P<names>.*)(?:(?:cannot|should not|must not) be None|is required|should be passed|"
        r"must be (?:passed|provided|specified|given))"
    ),
)


def wrong_sizes(refusal: str) -> list[tuple[int, int]]:
    """Return the sizes that a refusal names as (got, wanted), the surest first.

    >>> wrong_sizes("expected input to have 80 channels, but got 16 channels instead")
    [(16, 80)]
    >>> wrong_sizes("not enough values to unpack (expected 4, got 3)")
    []
    """
    if "to unpack" in refusal:
        # That many axes, of which no size makes more.
        return []
    found = [match for pattern in _SIZE_REFUSALS if (match := pattern.search(refusal))]
    return list(dict.fromkeys((int(match["got"]), int(match["want"])) for match in found))


_UNPACKED = re.compile(r"(?:not enough|too many) values to unpack \(expected (\d+)")
_RESHAPED = re.compile(r"shape '\[([-\d, ]+)\]' is invalid for input of size \d+")
_BEYOND = re.compile(r"index -?\d+ is out of bounds for dimension \d+ with size (\d+)")
_COUNTS = re.compile(
    r"(?P<modality>image|video|audio|speech).{0,80}tokens?:? (?P<tokens>\d+),? ?(?:and )?(?:\w+ )?"
    r"features:? (?P<features>\d+)",
    re.IGNORECASE,
)


def unpacked(refusal: str) -> int | None:
    """Return how many axes a statement expected of a shape.

    >>> unpacked("not enough values to unpack (expected 5, got 4)")
    5
    """
    found = _UNPACKED.search(refusal)
    return int(found[1]) if found else None


def reshaped(refusal: str) -> int | None:
    """Return what the elements of a tensor must be a multiple of.

    >>> reshaped("shape '[2, -1, 80]' is invalid for input of size 12")
    80
    """
    found = _RESHAPED.search(refusal)
    if found is None:
        return None
    step = 1
    # The first axis is mostly the rows, which there are as many of as before.
    for size in found[1].split(",")[1:]:
        step *= max(1, int(size))
    return step if step > 1 else None


def beyond_table(refusal: str) -> int | None:
    """Return the size of the table that an index lay outside of.

    >>> beyond_table("index 29 is out of bounds for dimension 0 with size 22")
    22
    """
    found = _BEYOND.search(refusal)
    return int(found[1]) if found else None


def token_counts(refusal: str) -> tuple[str, int, int] | None:
    """Return (modality, placeholder tokens, features) where their numbers do not agree.

    >>> token_counts("Image features and image tokens do not match, tokens: 0, features: 32")
    ('image', 0, 32)
    """
    found = _COUNTS.search(refusal)
    return (found["modality"].lower(), int(found["tokens"]), int(found["features"])) if found else None


def is_too_small(refusal: str) -> bool:
    """Return whether a refusal asks for a larger input."""
    return _TOO_SMALL.search(refusal) is not None


def is_one_row_only(refusal: str) -> bool:
    """Return whether a refusal says that only a batch of one row is taken."""
    return _ONE_ROW.search(refusal) is not None


def exclusive(refusal: str) -> list[str]:
    """Return the names that a refusal says cannot be given together.

    >>> exclusive("You cannot use both `inputs` and `pixel_values`")
    ['inputs', 'pixel_values']
    """
    found = _NOT_BOTH.search(refusal)
    return re.findall(r"\b(?!and\b|or\b)[a-z]\w+", found["names"]) if found else []


def unwanted(refusal: str) -> list[str]:
    """Return the names that a refusal says are not taken.

    >>> unwanted("input_ids is not expected"), unwanted("`input_ids` should be None")
    (['input_ids'], ['input_ids'])
    >>> unwanted("You cannot pass input_ids to the encoder. Pass inputs_embeds instead.")
    ['input_ids']
    """
    return [found["name"] for pattern in _NOT_TAKEN if (found := pattern.search(refusal))]


def asked_for(refusal: str, declaration: Declaration) -> list[str]:
    """Return the arguments that ``refusal`` asks for, also by a name with the capital of a sentence.

    That is data, and states of another model where their shape is documented.
    """
    words: list[str] = []
    for pattern in _ASKS_FOR:
        if found := pattern.search(refusal):
            words += (word[0].lower() + word[1:] for word in re.findall(r"\b[A-Za-z]\w+", found["names"]))
    given = {a.name for a in declaration.arguments if a.role is Role.DATA or (a.role is Role.STATE and a.shape)}
    return [word for word in dict.fromkeys(words) if word in given]
