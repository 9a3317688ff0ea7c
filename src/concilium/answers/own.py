"""Answers to `Personalize` and `Reestimate`: a finished model made to fit the site that has it. Nothing of it leaves.

Fine-tuning after federated training: Yu et al. 2020, arXiv:2002.04758. Running statistics estimated anew: Li et al. 2018, AdaBN,
doi:10.1016/j.patcog.2018.03.005.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from concilium.aggregation import check_like
from concilium.answers import Cancelled, Check, Entry, Job, built
from concilium.answers.train import Learner
from concilium.data.preprocess import preprocess
from concilium.data.windows import predict_logits
from concilium.errors import ContractError
from concilium.freezing import pin, trained_of
from concilium.messages import Personalize, PlugIn, Tensors, Train, Trained
from concilium.networks import as_stages
from concilium.optimization import make_optimizer
from concilium.sharing import STATISTICS, named


def personalize(
    job: Job, weights: Tensors, request: Personalize, *, site: str, device: torch.device, cancelled: Check
) -> tuple[Trained, Tensors]:
    """Fine-tune a finished model by plain steps on the site's own training cases; what it took, and the weights that came out.

    Raises:
        StudyError: no tensor of the network is meant.
        DataError: there is nothing to train on.
        FloatingPointError: the loss, or a weight, is not finite.
        Cancelled: the request was cancelled.
    """
    training = replace(
        job.training,
        local_update=PlugIn("plain"),
        learning_rate=request.learning_rate,
        deep_supervision=request.deep_supervision,
    )
    # of a model that was split with defences these are layers like others
    own = replace(job, training=training, kept=frozenset(), undefended=job.network)
    learner = Learner(own, device)
    learner.load_weights(trained_of(learner.network, weights))
    if request.tensors:
        _train_only(learner, request.tensors)
    asked = Train(request.model, request.round, 0, request.steps, request.steps, {}, False, alone=True)
    trained = learner.train(asked, site=site, cancelled=cancelled)
    return trained, learner.trained_weights()


def _train_only(learner: Learner, wanted: Sequence[str]) -> None:
    """Leave all other tensors as they are, running statistics too."""
    names = named(as_stages(learner.network), wanted, where="[personalize] tensors")
    for name, parameter in learner.network.named_parameters():
        parameter.requires_grad_(name in names)  # of what is frozen no name is there
    for prefix, module in learner.network.named_modules():
        if _has_statistics(module) and f"{prefix}.running_mean" not in names:
            pin(module, training=False)
    learner.own_optimizer = make_optimizer(learner.network, learner.job.training)


def reestimate(
    job: Job, weights: Tensors, entries: Sequence[Entry], *, device: torch.device, cancelled: Check
) -> dict[str, Tensor]:
    """The weights with running statistics of these cases' images: the mean over all windows that segmenting them would look at.

    Raises:
        ContractError: the network has no running statistics, or there is no case.
        Cancelled: the request was cancelled.
    """
    network = job.network().to(device)
    network.load_state_dict(dict(weights))
    network.eval()
    trains = network.state_dict().keys()
    norms = [m for n, m in network.named_modules() if _has_statistics(m) and f"{n}.{STATISTICS[0]}" in trains]
    if not norms or not entries:
        raise ContractError(
            f"Running statistics of {len(norms)} layers were to be estimated on {len(entries)} cases. At least one of each is "
            "needed. Choose [sharing] unseen = 'mean'."
        )
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # then it counts every window alike
        pin(norm, training=True)
    for entry in entries:
        if cancelled():
            raise Cancelled
        image, _ = preprocess(entry.case, entry.dataset, job.plan)
        predict_logits(
            network,
            image,
            job.plan,
            labels=job.labels,
            device=device,
            mirror=False,
            precision=job.training.precision,
        )
    return {name: t.detach().cpu().clone() for name, t in network.state_dict().items()}


def merged(job: Job, trained: Tensors, shared: Tensors) -> Tensors:
    """The shared weights with what stays here of those that trained.

    Raises:
        ContractError: together they are not the weights of the network, or of a party's part of it.
    """
    whole = {**shared, **{n: trained[n] for n in job.kept & trained.keys()}}
    check_like(whole, built(job).state_dict() if job.has_all else trained)
    return whole


def _has_statistics(module: nn.Module) -> bool:
    return getattr(module, STATISTICS[0], None) is not None
