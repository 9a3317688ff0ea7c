"""What of a model travels: tensors that a study keeps at its sites, and those that sites whose networks differ have in common.

Kept by role or by name, and from both directions: neither does a site send them, nor does it take any from the server but those
that a model starts from. FedBN keeps normalisation (Li et al. 2021, arXiv:2102.07623), SiloBN its statistics only (Andreux et al.
2020, arXiv:2008.07424), FedPer heads (Arivazhagan et al. 2019, arXiv:1912.00818).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from torch import nn

from concilium.aggregation import Block
from concilium.errors import ContractError, StudyError
from concilium.messages import Described, Tensors
from concilium.networks import Stages, bare

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
ADDED = ("adapter", "lora")
"""Begins the name of a module that was added to a network to be trained in place of the rest."""
HIDDEN = "_frozen"
"""Attribute of a module: the names of its own tensors that are frozen, and so none of the network's (`freezing.py`)."""


Tensor: TypeAlias = tuple[str, tuple[int, ...], str, tuple[int, ...]]
"""What sites may have in common: name, shape, type, and of a kernel the axes along which it lies."""
KERNEL = 2
"""A tensor of more dimensions than inputs and outputs has extents along axes of the image."""


def _norms(network: Stages) -> Iterator[str]:
    owned = {
        id(t) for m in network.modules() if isinstance(m, NORMS) for t in m.state_dict(keep_vars=True).values()
    }  # by identity: a network may know a tensor by more names than one
    return (name for name, t in network.state_dict(keep_vars=True).items() if id(t) in owned)


def _statistics(network: Stages) -> Iterator[str]:
    return (name for name in _norms(network) if name.rpartition(".")[2] in STATISTICS)


def _adapters(network: Stages) -> Iterator[str]:
    return (n for n in network.state_dict() if any(part.startswith(ADDED) for part in n.split(".")))


def _biases(network: Stages) -> Iterator[str]:
    return (n for n in network.state_dict() if n.rpartition(".")[2].endswith("bias"))


def named_statistics(network: Stages) -> frozenset[str]:
    """The network's running statistics."""
    return frozenset(_statistics(network))


def _of_stages(network: Stages, fits: Callable[[str], bool]) -> Iterator[str]:
    return (name for name in network.state_dict() if fits(name.partition(".")[0]))


ROLES: Mapping[str, Callable[[Stages], Iterable[str]]] = {
    "norms": _norms,
    "statistics": _statistics,
    "heads": lambda n: _of_stages(n, lambda stage: stage.startswith("head")),
    "stem": lambda n: _of_stages(n, lambda stage: stage == n.names[0]),
    "decoder": lambda n: _of_stages(n, lambda stage: stage.startswith(("up", "decode", "head"))),
    "adapters": _adapters,
    "biases": _biases,
}
"""Names of many tensors: all of normalisation, its running statistics alone, the layers that make logits, the first stage, all
stages on the way up with the heads, what was added to be trained in place of the rest, and all biases."""


def named(network: Stages, wanted: Sequence[str], *, where: str) -> frozenset[str]:
    """The network's tensors that have one of these roles, or whose name fits one of these patterns (`*` stands for any text).

    Raises:
        StudyError: one of them fits nothing.
    """
    tensors = network.state_dict()
    found: set[str] = set()
    for one in wanted:
        fits = set(ROLES[one](network) if one in ROLES else (n for n in tensors if fnmatchcase(n, one)))
        if not fits:
            stages = ", ".join(network.names)
            here = "network that trains" if any(hasattr(m, HIDDEN) for m in network.modules()) else "network"
            raise StudyError(
                f"{where} = {list(wanted)} is not possible: {one!r} is no tensor of this {here} ({len(tensors)} tensors in the "
                f"stages {stages}). Allowed: {', '.join(ROLES)}, as far as the network has them, or patterns of names, such as "
                f"'{network.names[0]}.*'. Correct it, or take it out."
            )
        found |= fits
    return frozenset(found)


ENDS = "ends"
"""In `[sharing] keep`: all that sites hold of a network whose body is the server's."""


def kept_of(network: Stages, keep: Sequence[str]) -> frozenset[str]:
    """The tensors that stay at each site (`[sharing] keep`); with `ends` all, for the site to keep those that it has.

    Raises:
        StudyError: a role or pattern fits nothing; or nothing would be shared.
    """
    found = named(network, [one for one in keep if one != ENDS], where="[sharing] keep")
    if ENDS in keep:
        return frozenset(network.state_dict())
    if found == network.state_dict().keys():
        raise StudyError(
            f"[sharing] keep = {list(keep)} keeps all {len(found)} tensors at their sites. At least one must be shared. Keep "
            "less, or run protocol 'local'."
        )
    return found


TYPES = {
    str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
}
"""Types of tensors that networks have, by name."""

Table: TypeAlias = Mapping[str, tuple[tuple[int, ...], str]]
"""The tensors of a network: name -> shape and type."""


@dataclass(frozen=True)
class Sharing:
    """Which tensors of a model travel. `whole`: all of them, under the same names everywhere."""

    kept: frozenset[str] = frozenset()
    """Of the one network: what stays at each site."""
    blocks: tuple[Block, ...] = ()
    """Where sites' networks differ: what each has in common with others."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Site -> how many values its network has, where not all are shared."""
    own_heads: frozenset[str] = frozenset()
    """Sites that share no tensor of the layers that make logits."""

    @property
    def whole(self) -> bool:
        """Whether all tensors of the model are shared by all sites."""
        return not self.kept and not self.blocks

    def of(self, weights: Tensors) -> Tensors:
        """The shared tensors of the one network among these."""
        return {name: t for name, t in weights.items() if name not in self.kept} if self.kept else weights

    def names(self, site: str) -> dict[str, str]:
        """Where networks differ: a site's names of what it shares -> the server's."""
        return {own: key for b in self.blocks if site in b.names for key, own in b.names[site].items()}

    def alike(self, sites: Iterable[str]) -> tuple[frozenset[str], ...]:
        """The sites in groups that share the same tensors under the same names."""
        groups: dict[frozenset[tuple[str, str]], set[str]] = {}
        for site in sites:
            groups.setdefault(frozenset(self.names(site).items()), set()).add(site)
        return tuple(frozenset(group) for group in groups.values())

    def for_site(self, shared: Tensors, site: str) -> Tensors:
        """The shared tensors that a site has, under its own names."""
        return {own: shared[key] for own, key in self.names(site).items()} if self.blocks else shared


EVERYTHING = Sharing()


def table_of(told: Described) -> Table:
    """The table that a site told.

    Raises:
        ContractError: its parts do not belong together.
    """
    if not len(told.names) == len(told.shapes) == len(told.dtypes) == len(set(told.names)):
        raise ContractError(
            f"A site described {len(told.names)} tensors by {len(told.shapes)} shapes and {len(told.dtypes)} types. Expected one "
            "of each, and names that differ. Use one version of Concilium everywhere."
        )
    if unknown := set(told.dtypes) - TYPES.keys():
        raise ContractError(
            f"A site described tensors of type {sorted(unknown)}. Known: {', '.join(TYPES)}. Use one version at all sites."
        )
    return dict(zip(told.names, zip(told.shapes, told.dtypes, strict=True), strict=True))


def described(network: Stages, kept: frozenset[str]) -> Described:
    """The network's tensors but those that are kept anyway."""
    tensors = {name: t for name, t in network.state_dict().items() if name not in kept}
    shapes = tuple(tuple(t.shape) for t in tensors.values())
    n_values = sum(t.numel() for t in network.state_dict().values())
    types = tuple(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    return Described(tuple(tensors), shapes, types, n_values)


def all_but(network: Stages, kept: frozenset[str], shared: Sequence[str]) -> frozenset[str]:
    """The network's tensors that are not shared.

    Raises:
        ContractError: what is to be shared is not in the network, or is kept anyway.
    """
    names = network.state_dict().keys()
    if wrong := [name for name in shared if name not in names or name in kept]:
        raise ContractError(
            f"{wrong[:3]} are to be shared. Allowed: tensors of this network that the study does not keep. Take no part in this."
        )
    return frozenset(names - set(shared))


def match(
    tables: Mapping[str, Table],
    *,
    mode: Literal["resolution", "intersection", "published"],
    elsewhere: Mapping[str, Mapping[str, str]],
    axes: Mapping[str, tuple[int, ...]] | None = None,
) -> Sharing:
    """What networks that differ have in common: tensors of one name, shape and type, each averaged over those that have it.

    FednnU-Net's asymmetric averaging (Skorupko et al. 2025, arXiv:2503.02549). Our names count resolutions from the input, in the
    decoder too, so that networks of different depth share both ends. nnU-Net's own count its decoder from the bottom.

    Args:
        tables: site -> what its network has.
        mode: `resolution`: at least two sites have it. `intersection`: all have. `published`: at least two have it by the name
            that the network's authors gave it, the first where they gave several.
        elsewhere: of `published`: site -> published name -> its own.
        axes: site -> in which order its plan takes the axes of an image. Kernels along other axes are other tensors.

    Raises:
        StudyError: nothing is in common.
    """
    least = len(tables) if mode == "intersection" else 2
    found: dict[Tensor, dict[str, str]] = {}
    for site, table in tables.items():
        public: dict[str, str] = {}
        for theirs, own in elsewhere.get(site, {}).items():
            public.setdefault(own, theirs)
        for name, about in table.items():
            if mode != "published" or bare(name) in public:
                known = public[bare(name)] if mode == "published" else bare(name)
                along = (axes or {}).get(site, ()) if len(about[0]) > KERNEL else ()
                found.setdefault((known, *about, along), {})[site] = name
    shared = {key: names for key, names in found.items() if len(names) >= max(2, least)}
    if not shared:
        sizes = ", ".join(f"{site} {len(table)}" for site, table in tables.items())
        raise StudyError(
            f"[plan] fingerprint = 'site': the networks ({sizes} tensors) have none in common by [sharing] match = {mode!r}. At "
            "least one must be. Set patch_size or base_features, or train by one plan: [plan] fingerprint = 'pooled'."
        )
    sizes_of = {site: sum(math.prod(shape) for shape, _ in table.values()) for site, table in tables.items()}
    return Sharing(blocks=_blocks(shared), sizes=sizes_of)


def _blocks(shared: Mapping[Tensor, Mapping[str, str]]) -> tuple[Block, ...]:
    """Tensors that the same sites have stand together; one whose name is there several times has all of it in its key."""
    times = Counter(name for name, *_ in shared)
    members: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor, names in shared.items():
        members.setdefault(tuple(sorted(names)), []).append(tensor)
    blocks = []
    for sites, tensors in members.items():
        keys = {t: t[0] if times[t[0]] == 1 else " ".join(map(str, t)) for t in tensors}
        like = {keys[t]: torch.empty(t[1], dtype=TYPES[t[2]], device="meta") for t in tensors}
        blocks.append(Block(like, {site: {keys[t]: shared[t][site] for t in tensors} for site in sites}))
    return tuple(blocks)


def shared_now(
    blocks: Sequence[Block], answered: Iterable[str], sizes: Mapping[str, int]
) -> dict[str, tuple[float, tuple[str, ...]]]:
    """Site -> the share of its network's values that were averaged with those of others in a round, and with whom."""
    there = sorted(set(answered) & sizes.keys())
    told = {}
    for site in there:
        own = [b for b in blocks if site in b.sites and len(b.sites.intersection(there)) > 1]
        n = sum(t.numel() for b in own for t in b.like.values())
        others = {other for b in own for other in b.sites.intersection(there)} - {site}
        told[site] = (n / sizes[site], tuple(sorted(others)))
    return told
