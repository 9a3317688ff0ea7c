"""A server that averages by cases, for sites whose losses are parabolas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from concilium.aggregation import Sum
from concilium.data.patches import Batch
from concilium.local_updates import take as plain_step
from concilium.messages import Tensors
from concilium.protocols.federated import added


class Server:
    """Federated averaging by cases, as `protocols/federated.py` does it."""

    def __init__(self, sites: Mapping[str, Any], cases: Mapping[str, int], w: Sequence[float]) -> None:
        self.sites, self.cases = sites, cases
        self.w = torch.tensor(w, dtype=torch.float64)
        self.control: Tensors = {}

    def round(self, rates: Sequence[float], batch: Batch, *, take: Any, finish: Any, who: Sequence[str] = ()) -> None:
        """One round, of all sites or of some."""
        total, sent = Sum(), Sum()
        for name in who or self.sites:
            site = self.sites[name]
            local = site.lend(self.w, self.control)
            for rate in rates:
                site.optimizer.param_groups[0]["lr"] = rate
                take(local, batch)
            total.add({"w": site.network.w.detach()}, self.cases[name])
            control = finish(local, steps=len(rates))
            if control:
                sent.add(control, self.cases[name])
        self.w = total.mean()["w"]
        self.control = added(self.control, sent, sum(self.cases.values()))


plain = partial(Server.round, take=plain_step, finish=lambda local, steps: {})
