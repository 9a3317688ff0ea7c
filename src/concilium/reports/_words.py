"""What a site's replies are, in words for people who do not program. The fields beside them come from `messages.py`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Mapping

from concilium import messages as m

DATA, MODEL, VOXELS, SCORES, KEYS, ORDER = (
    "the data",
    "the model",
    "single voxels",
    "scores",
    "keys",
    "order",
)

WORDS: Mapping[type, tuple[str, str]] = {
    m.Examined: (DATA, "Statistics of all cases together: how many; sums, extremes and histograms of their "
                       "intensities; counts of "
                       "rounded image sizes; names of channels and labels; how many cases cannot be used, by reason."),
    m.Offered: (DATA, "A blinded number for each case, made with a secret of the site, in an order that tells nothing. "
                      "By it sites "
                      "find which patients they have in common, and the server how many any group of sites has. Which of them "
                      "the site cannot use."),
    m.Blinded: (DATA, "The blinded numbers of other sites, blinded once more."),
    m.Aligned: (DATA, "How many patients the site is to use; from whoever has the labels a made-up number for each."),
    m.Prepared: (DATA, "Numbers of cases and patients; how many cannot be used, by reason; warnings from a fixed list."),
    m.Described: (MODEL, "Names and shapes of the parts of the site's network. No values."),
    m.Trained: (MODEL, "The model's weights as training on the site's patients left them, those that stay at the site left out "
                       "(none at all where nothing of the model is shared); numbers of cases and steps, mean loss, "
                       "seconds, memory."),
    m.Introduced: (KEYS, "The public half of a key, with certificate and signature."),
    m.Passed: (MODEL, "The model's weights, sealed for the next site; in the open: numbers of cases and steps, mean "
                      "loss, seconds."),
    m.Handed: (MODEL, "The model's weights once more, sealed for one site; in the open only where the study and the "
                      "site say so."),
    m.Held: (MODEL, "Numbers of cases and steps, mean loss, seconds; public keys. The weights are held back."),
    m.Dealt: (KEYS, "Shares of the secrets behind this site's masks, each sealed for one other site."),
    m.Masked: (MODEL, "By how much the weights changed, under masks: numbers that look drawn at random, of use in the "
                      "sum only."),
    m.Agreed: (KEYS, "A signature of whose updates are in the sum."),
    m.Unmasked: (KEYS, "Shares by which the masks are taken from the sum."),
    m.Maps: (VOXELS, "What the first layers of the network make of each image patch: numbers for every place in the "
                     "image, from "
                     "which an image can be computed back, at a shallow cut nearly whole."),
    m.Gradients: (VOXELS, "How the result should change at every place of a patch. It depends on the label map."),
    m.Evaluated: (SCORES, "How well the model segments the site's cases: averages over patients; or, where the site "
                          "allows it, the "
                          "scores and volumes of each case under a made-up number."),
    m.Placed: (VOXELS, "Where patches lie that follow the labels: about where the structures are in each case."),
    m.Looked: (VOXELS, "What the first layers make of every place of a case that is to be segmented; how many cases "
                       "there are."),
    m.Judged: (SCORES, "How well another site's update segments a few of this site's cases: one number, and of how "
                       "many cases."),
    m.Fetched: (MODEL, "The parts of the network that otherwise stay at the site, and of how many cases they are made."),
    m.Done: (ORDER, "Nothing but: done."),
}  # fmt: skip
"""Reply -> what kind of thing it is, and what it holds."""


def fields_of(reply: type) -> tuple[tuple[str, str], ...]:
    """Field -> what the code says of it, of a message; inner values with their own fields."""
    said = _said(reply)
    return tuple((f.name, said.get(f.name, "").rstrip(".") or _of_type(str(f.type))) for f in dataclasses.fields(reply))


def first_words(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def _of_type(name: str) -> str:
    """What a field of a type of `messages.py` holds."""
    inner = next(
        (t for n, t in vars(m).items() if isinstance(t, type) and n in name and dataclasses.is_dataclass(t)), None
    )
    if inner is None:
        return {"Tensors": "tensors, by name"}.get(
            name, name.replace("tuple[", "list of [").replace("Tensor", "tensors")
        )
    return f"{inner.__name__}: {', '.join(f.name for f in dataclasses.fields(inner))}"


def _said(of: type) -> dict[str, str]:
    """Field -> the text below it in the code."""
    (body,) = (n.body for n in ast.parse(textwrap.dedent(inspect.getsource(of))).body if isinstance(n, ast.ClassDef))
    return {
        ast.unparse(field.target): first_words(str(below.value.value))
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }
