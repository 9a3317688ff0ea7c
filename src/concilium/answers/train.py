"""Answer to `Train`: a model at a site, its optimiser, and the steps it takes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from concilium import catalog
from concilium.aggregation import check_like
from concilium.answers import Cancelled, Check, Cut, Job
from concilium.answers.features import features_of
from concilium.answers.leaving import leaving
from concilium.answers.ledger import Draws, draws_of
from concilium.answers.objective import Teacher, make_objective
from concilium.answers.time_box import while_it_fits
from concilium.data.draws import drawn_from, seed_all
from concilium.data.patches import Batches, stream
from concilium.data.places import Key
from concilium.errors import ContractError, DataError
from concilium.local_updates import Brought, Local, brought_by, finish_of, has_personal, when_alone
from concilium.messages import PlugIn, Tensors, Train, Trained
from concilium.networks import Parts, cut_apart
from concilium.networks._fusion import FRONTS, Own, own_part
from concilium.optimization import autocast, make_optimizer, memory_of, restore_state, set_rate, state_of
from concilium.wire import part, read_tensors, write_tensors


class Learner:
    """A model that trains at a site: network, optimiser, and in float16 the loss scale.

    With a cut it is the front and the tail only; the body between them is the server's. In `folder` lies what does not change
    from step to step.
    """

    def __init__(self, job: Job, device: torch.device, cut: Cut | None = None, folder: Path | None = None) -> None:
        self.job, self.device, self.cut, self.folder = job, device, cut, folder
        self.parts: Parts | None = None
        self.own: Own | None = None
        self.brought: Brought | None = None
        with drawn_from(job.seed, "weights", *job.of_fronts):  # as every site's begins, or its own
            self.network = self._built().to(device)
        self.scaler = self.brought.scaler if self.brought else None
        if self.brought is None and job.training.precision == "float16":
            self.scaler = torch.amp.GradScaler(device.type)
        self.own_optimizer = None if self.brought else make_optimizer(self.network, job.training)
        self.trained = False
        self.kept: frozenset[str] = frozenset()
        """What stays here of the weights, in the round at hand."""
        self.draws: Draws
        self.memory: dict[str, Tensor] = {}
        """The local update's own tensors."""
        self.personal: Learner | None = None
        """The site's own second network, from when the local update first trains one."""

    def _built(self) -> nn.Module:
        job, cut = self.job, self.cut
        if cut is not None and cut.party:
            whole = job.network(deep_supervision=job.training.deep_supervision and cut.after[-1] == FRONTS)
            self.own = own_part(whole, cut.party, tail_after=cut.after[-1], labelled=job.labelled)
            return self.own.held
        if cut is not None:
            whole = job.network(deep_supervision=job.training.deep_supervision and cut.reveal_labels)
            self.parts = cut_apart(whole, cut.after, reveal_labels=cut.reveal_labels)
            return self.parts.at_site
        self.brought = brought_by(
            job.training.local_update, plan=job.plan, labels=job.labels, channels=job.channels, device=self.device
        )
        return self.brought.network if self.brought else job.in_one_place()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Over the parameters that train."""
        return self.brought.optimizer if self.brought else self.own_optimizer

    def load_weights(self, weights: Tensors) -> None:
        """Replace all weights.

        Raises:
            ContractError: they are not those of this network.
        """
        check_like(weights, self.network.state_dict())
        self.network.load_state_dict(dict(weights))
        self.trained = True

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights, on the CPU."""
        return {name: t.detach().cpu().clone() for name, t in self.network.state_dict().items()}

    def trained_weights(self, *, personal: bool = False) -> dict[str, Tensor]:
        """The weights, or those of the site's own second network, of a model that has any but those it was built with.

        Raises:
            ContractError: it never received nor trained any.
        """
        asked = self.personal if personal else self
        if asked is None or not asked.trained:
            raise ContractError(
                "A model that never trained here was asked for. Only one that did can be kept. Train it first."
            )
        return asked.weights()

    def save(self, path: Path) -> None:
        """Write weights, optimiser and what the local update keeps, at once or not at all."""
        write_tensors(path, *self._state())

    def load(self, path: Path) -> None:
        """Go back to what `save` wrote."""
        self._restore(*read_tensors(path))

    def _state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        moments, numbers = state_of(self.optimizer)
        tensors = {f"weights/{n}": t for n, t in self.weights().items()}
        tensors |= {f"optimizer/{n}": t for n, t in moments.items()}
        tensors |= {f"memory/{n}": t for n, t in self.memory.items()}
        about = {"optimizer": numbers, "scaler": json.dumps(self.scaler.state_dict() if self.scaler else {})}
        about |= {"party": "yes"} if self.own is not None else {}
        if self.personal is not None:
            own, more = self.personal._state()
            tensors |= {f"personal/{n}": t for n, t in own.items()}
            about |= {f"personal/{n}": text for n, text in more.items()}
        return tensors, about

    def _restore(self, tensors: Tensors, about: Mapping[str, str]) -> None:
        self.load_weights(part(tensors, "weights/"))
        restore_state(self.optimizer, part(tensors, "optimizer/"), about["optimizer"])
        self.memory = part(tensors, "memory/")
        if self.scaler:
            self.scaler.load_state_dict(json.loads(about["scaler"]))
        if own := part(tensors, "personal/"):
            self.personal = Learner(self.job, self.device)
            self.personal._restore(own, part(about, "personal/"))

    def begin(self, weights: Tensors, *, site: str, model: str, begins: bool = False, alone: bool = False) -> Batches:
        """Take over the weights, where there are any, and get ready to take steps; where the batches come from.

        Args:
            begins: what stays here begins now, as it was drawn or is sent.
            alone: nothing is shared, and all weights are sent or none.

        Raises:
            ContractError: the weights are not what is shared of this network, or there never were any.
            DataError: there is nothing to train on.
        """
        if self.job.batches is None:
            raise DataError(
                f"{site} has no training cases in this fold. Expected at least one. Choose other folds.",
                code="no_training_cases",
            )
        self.kept = frozenset() if alone else self.job.kept
        if weights or self.own is not None:  # of a party all that does not stay comes, or what stayed could be had
            self._take_over(weights, begins=begins)
        self.trained |= begins or not self.network.state_dict()  # a part of which nothing trains is there as it is
        if not self.trained:
            raise ContractError(
                f"{site} has no weights of {model}. The first round must send them. Start the run again."
            )
        self.network.train()
        self.received = self.weights() if self.job.filters and not alone else {}
        return self.job.batches

    def _take_over(self, weights: Tensors, *, begins: bool) -> None:
        """Replace the shared weights; where the model begins, those that stay here too, if they are sent."""
        own = self.network.state_dict()
        fresh = begins and not self.trained
        if not (self.trained or fresh or self.kept.isdisjoint(own)):
            raise ContractError(
                f"{len(self.kept & own.keys())} tensors that stay at this site are not there any more. Only a model that begins "
                "has none. Restore the site's folder, or start the run again."
            )
        check_like(weights, {n: t for n, t in own.items() if n not in self.kept or (fresh and n in weights)})
        self.load_weights({**own, **weights})

    def begin_personal(self) -> None:
        """Get the second network ready to take steps; the first time it begins where the shared one does."""
        if self.personal is None:
            self.personal = Learner(self.job, self.device)
            self.personal.load_weights(self.weights())
        self.personal.network.train()

    def finish(
        self,
        losses: Sequence[float],
        *,
        model: str,
        round: int,
        send: bool,
        seconds: float,
        control: Tensors | None = None,
    ) -> Trained:
        """What the site answers after the steps with these losses.

        Raises:
            FloatingPointError: a weight is not finite.
        """
        # a loss is that before its step: the last step may have ruined the weights unnoticed
        own = self.personal.network.parameters() if self.personal else ()
        if not all(bool(torch.isfinite(t).all()) for t in (*self.network.parameters(), *own)):
            raise FloatingPointError(f"Weights of {model} are not finite after round {round}.")
        n_cases = len(self.job.entries["training"])
        mean = sum(losses) / max(1, len(losses))
        sent, beside = (
            ({n: t for n, t in tensors.items() if n not in self.kept} if send else {})
            for tensors in (self.weights(), control or {})
        )
        weights = leaving(self.job, sent, self.received, model=model, round=round, n_steps=len(losses))
        return Trained(weights, n_cases, len(losses), mean, seconds, beside, memory_of(self.device))

    def train(self, request: Train, *, site: str, cancelled: Check) -> Trained:
        """Take the steps that were asked for, or as many as fit into the time.

        Raises:
            ContractError: the weights are not this network's, or there never were any.
            DataError: there is nothing to train on.
            FloatingPointError: the loss, or a weight, is not finite.
            Cancelled: the request was cancelled.
        """
        started = time.monotonic()
        batches = self.begin(
            request.weights, site=site, model=request.model, begins=request.begins, alone=request.alone
        )
        if self.brought is not None:
            self.brought.begin(total_steps=request.total_steps)
        update = self.job.training.local_update
        update = when_alone(update) if request.alone else update
        if has_personal(update.name):
            self.begin_personal()
        self.draws = draws_of(self.job, request, update, self.network, batches)
        local = self._lend(request)
        losses = self._steps(local, update, request, site, cancelled, started)
        if self.brought is not None:
            self.brought.end()
        return self.finish(
            losses,
            model=request.model,
            round=request.round,
            send=request.send_weights,
            seconds=time.monotonic() - started,
            control=finish_of(update, local, steps=len(losses)),
        )

    def _lend(self, request: Train) -> Local:
        """What the steps of this round work on."""
        training, received = self.job.training, self.weights()
        precision = partial(autocast, self.device, training.precision)
        lend = partial(
            Local,
            objective=make_objective(self.job),
            autocast=precision,
            received=received,
            clip_norm=training.clip_norm,
            micro_batch=self.job.micro_batch,
        )
        return lend(
            self.network,
            self.optimizer,
            scaler=self.scaler,
            brought=self.brought,
            teacher=Teacher(self.job.network, received, self.device, precision, self.job.micro_batch),
            kept=features_of(self.job, self.network, self.folder),
            control=request.control,
            memory=self.memory,
            personal=lend(own.network, own.optimizer, scaler=own.scaler) if (own := self.personal) else None,
            labels=self.job.labels,
            n_patients=self.draws.n_patients,
            progress=request.first_step / max(1, request.total_steps - request.steps),
        )

    def _steps(
        self, local: Local, update: PlugIn, request: Train, site: str, cancelled: Check, began: float
    ) -> list[float]:
        training = self.job.training
        take = partial(catalog.load("local_updates", update.name), **update.options)
        keys: list[Key] = [
            (self.job.seed, site, request.round, step, *self.draws.hidden) for step in range(request.steps)
        ]
        losses: list[float] = []
        drawn = stream(self.draws.batches, keys, workers=training.loader_workers)
        for step, batch in enumerate(while_it_fits(drawn, request.seconds, began=began)):
            if cancelled():
                raise Cancelled
            if self.brought is not None:
                self.brought.set_rate(request.first_step + step)
            for learner in filter(None, (self, self.personal)) if self.brought is None else ():
                set_rate(learner.optimizer, training, step=request.first_step + step, total_steps=request.total_steps)
            seed_all(*keys[step], "step")  # whatever drew the batch, dropout and the like draw from here
            loss = float(take(local, batch.to(self.device)))
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"The loss of {request.model} is {loss} at step {step} of round {request.round}."
                )
            losses += [] if batch.is_unknown else [loss]  # nothing annotated: no step was taken
        return losses
