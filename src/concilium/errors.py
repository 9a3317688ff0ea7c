"""The exceptions that reach a user, drawn as a tree; each carries the exit code that the command ends with.

    ConciliumError
    ├── StudyError      2   the command or the study file is wrong
    ├── DataError       3   the data cannot be used
    ├── EngineError     4   the federation could not do what was asked
    ├── PrivacyError    5   a policy forbids it
    └── ContractError  70   a part of Concilium, or a plug-in, broke its contract

A message says what is wrong, what was given, what is allowed and what to do.
"""

from __future__ import annotations

from typing import ClassVar

CODES = frozenset({
    "unusable", "unreadable", "not_finite", "unknown_label", "missing_channel", "missing_label", "channel_mismatch",
    "shape_mismatch", "geometry_mismatch", "sites_differ", "no_foreground", "no_such_subset", "no_training_cases",
    "too_many_excluded", "micro_batch", "no_weights", "frozen_differs", "no_epsilon",
    "cases_changed", "case_failed",
})  # fmt: skip
"""What a `DataError` may tell outside its site."""


class ConciliumError(Exception):
    """Root of the errors that are reported without a traceback."""

    exit_code: ClassVar[int] = 70


class StudyError(ConciliumError):
    """The command line or the study file is wrong."""

    exit_code = 2


class DataError(ConciliumError):
    """A data set, or one case of it, cannot be used.

    `code` is one of `CODES` and may leave the site; the message may not (it holds paths and case ids). Any other code, as of a
    plug-in from outside, becomes `unusable`.
    """

    exit_code = 3

    def __init__(self, message: str, *, code: str = "unusable") -> None:
        super().__init__(message)
        self.code = code if code in CODES else "unusable"


class EngineError(ConciliumError):
    """The federation could not go on, or did not do what was asked."""

    exit_code = 4


RULES = frozenset({
    "policy", "split", "labels", "plug_ins", "image", "card", "sealed", "reveal",
    "open_weights", "kept", "shown", "new_patients", "least_summed", "unmask",
})  # fmt: skip
"""What a `PrivacyError` may tell outside its site."""


class PrivacyError(ConciliumError):
    """A policy of the site or of the study forbids what was asked; `rule`, one of `RULES`, may leave the site."""

    exit_code = 5

    def __init__(self, message: str, *, rule: str = "policy") -> None:
        super().__init__(message)
        self.rule = rule if rule in RULES else "policy"


class ContractError(ConciliumError):
    """A message, a plug-in or a file breaks the contract it was written for."""

    exit_code = 70
