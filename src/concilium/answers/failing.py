"""What leaves a site of an error: a class, a code word, and where to look in the site's own log. Never its text."""

from __future__ import annotations

import torch

from concilium.errors import ConciliumError, ContractError, DataError, PrivacyError
from concilium.messages import Failure, SiteError, SiteRefused


def failure_of(e: BaseException, reference: str) -> Failure:
    """The failure that an error is."""
    # a name that Python or Concilium gave; that of a class from outside may say anything
    name = next(c.__name__ for c in type(e).__mro__ if c.__module__ in ("builtins", "concilium.errors"))
    match e:
        case PrivacyError():
            return SiteRefused(e.rule)
        case DataError():
            return SiteError("DataError", e.code, reference)
        case ContractError():
            return SiteError("ContractError", "contract", reference)
        case FloatingPointError():
            return SiteError("FloatingPointError", "not_finite", reference)
        case OverflowError():
            return SiteError(name, "out_of_range", reference)
        case MemoryError() | torch.OutOfMemoryError():
            return SiteError(name, "out_of_memory", reference)
        case RuntimeError() if "can't allocate memory" in str(e) or "out of memory" in str(e):
            return SiteError(name, "out_of_memory", reference)
        case OSError():
            return SiteError(name, "disk", reference)
        case ConciliumError():
            return SiteError(name, "concilium", reference)
    return SiteError(name, "failed", reference)
