"""Trainers of nnU-Net and of users, at a site: against our own training, against nnU-Net, and what is refused."""

from __future__ import annotations

import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module
from torch import Tensor

from concilium import wire
from concilium.answers import Job, Policy, Settings
from concilium.answers.statistics import examine, prepare
from concilium.answers.train import Learner
from concilium.data.augment import mirror_axes
from concilium.data.draws import drawn_from, seed_all
from concilium.data.patches import Batch
from concilium.data.plan import make_plans
from concilium.data.windows import predict_logits
from concilium.errors import ContractError, StudyError
from concilium.exports.nnunet import export
from concilium.finished import open_finished
from concilium.line import Event, run
from concilium.local_updates import Local
from concilium.local_updates.nnunet_trainer import step
from concilium.messages import Examine, PlugIn, Prepare, SiteRefused, Train, Trained
from concilium.networks import Whole
from concilium.networks.nnunet import to_library
from concilium.networks.nnunet_trainer import stock_name, trainer_class
from concilium.site import Site
from concilium.study import Study, parse_study, to_toml, training_of
from concilium.wire import Envelope

STOCK = "nnunetv2.training.nnUNetTrainer."
PLAIN = f"{STOCK}nnUNetTrainer:nnUNetTrainer"
BATCH_NORM = f"{STOCK}variants.network_architecture.nnUNetTrainerBN:nnUNetTrainerBN"
ONE_SCALE = f"{STOCK}variants.network_architecture.nnUNetTrainerNoDeepSupervision:nnUNetTrainerNoDeepSupervision"
NO_MIRRORING = f"{STOCK}variants.data_augmentation.nnUNetTrainerNoMirroring:nnUNetTrainerNoMirroring"
TWO_AXES = f"{STOCK}variants.data_augmentation.nnUNetTrainerNoMirroring:nnUNetTrainer_onlyMirror01"
DA5 = f"{STOCK}variants.data_augmentation.nnUNetTrainerDA5:nnUNetTrainerDA5"
TOP_K = f"{STOCK}variants.loss.nnUNetTrainerTopkLoss:nnUNetTrainerTopk10Loss"
ADAM = f"{STOCK}variants.optimizer.nnUNetTrainerAdam:nnUNetTrainerAdam"
COSINE = f"{STOCK}variants.lr_schedule.nnUNetTrainerCosAnneal:nnUNetTrainerCosAnneal"
LONGER = f"{STOCK}variants.training_length.nnUNetTrainer_Xepochs:nnUNetTrainer_250epochs"
CPU = torch.device("cpu")
Parse = Callable[..., Study]
MakeJob = Callable[..., Job]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)  # so that studies can name `trainers_elsewhere:...`


def own(name: str) -> str:
    return f"trainers_elsewhere:{name}"


def tables(data: Path, trainer: str, **more: Mapping[str, Any]) -> dict[str, Any]:
    base: dict[str, dict[str, Any]] = {
        "study": {"name": "small", "seed": 3},
        "sites": {name: {"data": str(data / name)} for name in ("north", "south")},
        "protocol": {"rounds": 2, "steps": 2},
        "network": {"base_features": 4},
        "training": {"batch_size": 2, "patch_size": [16, 16, 8]},
        "local_update": {"name": "nnunet_trainer", "trainer": trainer},
        "engine": {"threads": 1, "device": "cpu", "pictures": False},
    }
    return {**base, **{k: {**base.get(k, {}), **table} for k, table in more.items()}}


@pytest.fixture(scope="session")
def parse(phantom: Path) -> Parse:
    return lambda trainer, **more: parse_study(tables(phantom, trainer, **more), folder=phantom)


def settings(phantom: Path, folder: Path, **more: Any) -> Settings:
    return Settings(
        "north", "site", {"north": phantom / "north"}, None, folder / "north", folder / "cache", 1, "cpu", **more
    )


@pytest.fixture(scope="session")
def asked(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Prepare]:
    """A site, and the request that prepares it for our own training."""
    here = settings(phantom, tmp_path_factory.mktemp("site"))
    told, _ = examine(here, Examine(False, 0.1), lambda: False)
    plans = make_plans(
        told.fingerprint, channels=told.channels, labels=told.labels, file_ending=told.file_ending,
        configuration="3d_fullres", base_features=4, batch_size=2, patch_size=(16, 16, 8),
    )  # fmt: skip
    study = parse_study(tables(phantom, PLAIN) | {"local_update": {}}, folder=phantom)
    return here, Prepare(
        plans, "3d_fullres", PlugIn("nnunet"), training_of(study), 5, 0, 3, 0.1, told.channels, told.labels
    )


@pytest.fixture(scope="session")
def job(asked: tuple[Settings, Prepare]) -> MakeJob:
    """`job(trainer)`: the site, prepared for this trainer; without one, for our own training."""

    def make(trainer: str | None = None) -> Job:
        here, request = asked
        if trainer is not None:
            plug_in = PlugIn("nnunet_trainer", {"trainer": trainer})
            request = replace(request, network=plug_in, training=replace(request.training, local_update=plug_in))
        return prepare(here, request, lambda: False)[1]

    return make


def initial(job: Job) -> dict[str, Tensor]:
    with drawn_from(3, "weights"):
        return job.network().state_dict()


def train(learner: Learner, weights: Mapping[str, Tensor], round: int = 1, steps: int = 3) -> Trained:
    """A round of `steps`, of three rounds."""
    request = Train("m", round, (round - 1) * steps, steps, 3 * steps, weights, True)
    return learner.train(request, site="north", cancelled=lambda: False)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------------------------------------ oracles


def test_nnunets_own_trainer_takes_the_steps_of_our_own_training(job: MakeJob) -> None:
    """The same draws of weights and batches, loss, clipping, momentum and rate. Only where the loss is summed differs."""
    plain, stock = job(), job(PLAIN)
    to_theirs = partial(to_library, plan=plain.plan.architecture, n_channels=1, n_labels=3)
    start, own_start = initial(plain), initial(stock)
    whole = "whole.network."
    assert all(torch.equal(to_theirs(start)[n.removeprefix(whole)], t) for n, t in own_start.items())
    ours, theirs = Learner(plain, CPU), Learner(stock, CPU)
    told = None
    for round in (1, 2):  # the rate falls, momentum goes on
        expected = train(ours, start if told is None else told[0].weights, round)
        found = train(theirs, own_start if told is None else told[1].weights, round)
        told = expected, found
        assert found.loss == pytest.approx(expected.loss, abs=1e-6)
        mapped = to_theirs(expected.weights)
        for name, tensor in found.weights.items():
            assert torch.allclose(tensor, mapped[name.removeprefix(whole)], rtol=0, atol=1e-5), name
    assert not equal(told[1].weights, own_start)


def test_a_trainers_loss_is_its_own(job: MakeJob) -> None:
    plain, other = (train(Learner(made, CPU), initial(made)) for made in (job(PLAIN), job(TOP_K)))
    assert abs(plain.loss - other.loss) > 1e-4


def test_its_batches_are_its_own(job: MakeJob) -> None:
    """Ours where its augmentation is; others where not; and the same again for the same key."""
    key = (3, "north", 1, 0)
    drawn = [cast(Any, made.batches).draw(*key) for made in (job(), job(PLAIN), job(DA5), job(DA5), job(ONE_SCALE))]
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert all(map(torch.equal, drawn[0][1], drawn[1][1]))
    assert not torch.equal(drawn[1][0], drawn[2][0])
    assert torch.equal(drawn[2][0], drawn[3][0])
    assert len(drawn[4][1]) == 1


@pytest.mark.parametrize("name", [BATCH_NORM, ADAM, COSINE, LONGER, own("Own")])
def test_a_trainer_that_was_put_away_goes_on_as_if_it_had_not(name: str, job: MakeJob, tmp_path: Path) -> None:
    made = job(name)
    one = Learner(made, CPU)
    first = train(one, initial(made))
    one.save(tmp_path / "state.safetensors")
    expected = train(one, first.weights, 2)
    seed_all("something else")
    other = Learner(made, CPU)
    other.load(tmp_path / "state.safetensors")
    found = train(other, first.weights, 2)
    assert equal(found.weights, expected.weights)
    assert found.loss == expected.loss
    assert not equal(first.weights, expected.weights)


def test_an_epoch_is_a_step_of_all(job: MakeJob) -> None:
    """nnU-Net's polynomial over all steps of the model, whatever number of epochs the trainer was written for."""
    learner = Learner(job(LONGER), CPU)
    train(learner, initial(learner.job), round=2)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * (1 - 5 / 9) ** 0.9)


def test_no_folder_and_no_variable_of_nnunet(job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = dict(vars(trainer_module))
    made = job(PLAIN)
    train(Learner(made, CPU), initial(made))
    assert list(tmp_path.iterdir()) == []
    assert dict(vars(trainer_module)) == before


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("name", [PLAIN, BATCH_NORM, own("Own")])
def test_every_tensor_has_one_name_and_the_network_has_all(name: str, job: MakeJob) -> None:
    network = job(name).network()
    tensors = network.state_dict()
    assert len({t.data_ptr() for t in tensors.values() if t.numel()}) == sum(t.numel() > 0 for t in tensors.values())
    inner = cast(Whole, network["whole"]).network.state_dict()
    assert len(inner) > len(tensors)
    other = job(name).network()
    other.load_state_dict(tensors)
    assert equal(cast(Whole, other["whole"]).network.state_dict(), inner)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(dict(list(tensors.items())[1:]))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**tensors, "whole.network.more": torch.zeros(1)})


def test_batch_norm_is_there_and_the_plan_is_not_changed(job: MakeJob) -> None:
    made = job(BATCH_NORM)
    assert any(n.endswith("running_mean") for n in made.network().state_dict())
    assert "InstanceNorm" in made.plan.architecture["architecture"]["arch_kwargs"]["norm_op"]


@pytest.mark.parametrize(
    ("name", "axes"), [(PLAIN, (0, 1, 2)), (NO_MIRRORING, ()), (TWO_AXES, (0, 1)), (own("Own"), (0, 1, 2))]
)
def test_images_are_mirrored_as_the_trainer_allows(name: str, axes: tuple[int, ...], job: MakeJob) -> None:
    made = job(name)
    network = made.network().eval()
    assert network.mirror_axes == axes
    image = torch.randn(1, 16, 16, 8, generator=torch.Generator().manual_seed(1))
    see = partial(predict_logits, network, plan=made.plan, labels=made.labels, device=CPU, precision="float32")
    mirrored, plain = see(image, mirror=True), see(image, mirror=False)
    assert torch.equal(mirrored, plain) == (axes == ())
    flips = [()] if not axes else [tuple(a for i, a in enumerate(axes) if k >> i & 1) for k in range(2 ** len(axes))]
    with torch.no_grad():
        each = [network(image[None].flip([2 + a for a in f]))[0].flip([2 + a for a in f])[0] for f in flips]
    middle = (..., slice(5, 11), slice(5, 11), slice(2, 6))  # at the edge the window's weight is all but 0 in float16
    assert torch.allclose(mirrored.float()[middle], torch.stack(each).mean(0)[middle], rtol=2e-3, atol=2e-3)
    assert mirror_axes(made.plan) == (0, 1, 2)


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nnUNetTrainer", "Expected `module:Class`"),
        ("not_there_at_all:Trainer", "cannot be loaded"),
        (own("function"), "is no nnUNetTrainer"),
        ("collections:OrderedDict", "is no nnUNetTrainer"),
        (own("Runs"), "replaces run_training, which a federation never calls"),
        (own("Loads"), "replaces get_dataloaders"),
        (f"{STOCK}variants.lr_schedule.nnUNetTrainer_warmup:nnUNetTrainer_warmup", "replaces .*on_train_epoch_start"),
    ],
)
def test_a_trainer_that_cannot_be_honoured_is_an_error_of_the_study(name: str, text: str, parse: Parse) -> None:
    with pytest.raises(StudyError, match=rf"(?s)1 error.*\[local_update\] trainer = .*{text}"):
        parse(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [("Wants", r"cannot be used \(\w+Error"), ("Breaks", r"cannot be used \(ValueError: no licence\)")],
)
def test_one_that_cannot_be_made_stops_the_site_as_it_is_prepared(name: str, text: str, job: MakeJob) -> None:
    with pytest.raises(StudyError, match=text):
        job(own(name))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Averages", "remembers ema between steps"),
        ("Counts", "remembers seen between steps"),
        ("Hides", "remembers network.again.n between steps"),
        ("Silent", "told no loss"),
        ("Plateau", "depends on the steps before"),
        ("Recursive", "depends on the steps before"),
    ],
)
def test_what_a_snapshot_does_not_hold_is_refused(name: str, text: str, job: MakeJob) -> None:
    made = job(own(name))
    with pytest.raises((StudyError, ContractError), match=text):
        train(Learner(made, CPU), initial(made))


def test_a_step_without_its_trainer_is_refused() -> None:
    local: Any = SimpleNamespace(brought=None)
    with pytest.raises(ContractError, match="not at hand"):
        step(cast(Local, local), Batch(torch.zeros(1), ()), trainer=PLAIN)


def test_a_distributed_process_is_refused(job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(trainer_module.dist, "get_rank", lambda: 0)
    with pytest.raises(StudyError, match=r"distributed over processes|cannot be used"):
        job(PLAIN)


def test_a_site_runs_trainers_from_outside_only_where_it_says_so(
    phantom: Path, asked: tuple[Settings, Prepare], tmp_path: Path
) -> None:
    """Those that come with nnU-Net are installed with Concilium; a plug-in is not one of them for saying so."""

    def handle(name: str, trainer: str, plug_ins: tuple[str, ...] | None) -> Any:
        here = replace(asked[0], policy=Policy(plug_ins=plug_ins), folder=tmp_path)
        plug_in = PlugIn(name, {"trainer": trainer})
        request = replace(asked[1], network=plug_in, training=replace(asked[1].training, local_update=plug_in))
        site = Site(here, run="0a1b", epoch=1)
        return wire.unpack(site.handle(wire.pack(request), Envelope("0a1b", 1, 1), lambda: False))

    sys.modules.pop("trainers_elsewhere", None)
    assert handle("nnunet_trainer", own("Own"), ()) == SiteRefused("plug_ins")
    assert handle("nnunet_trainer", own("Own"), (own("Runs"),)) == SiteRefused("plug_ins")
    assert "trainers_elsewhere" not in sys.modules
    assert type(handle("nnunet_trainer", own("Own"), (own("Own"),))).__name__ == "Prepared"
    assert type(handle("nnunet_trainer", own("Own"), None)).__name__ == "Prepared"
    assert type(handle("nnunet_trainer", BATCH_NORM, ())).__name__ == "Prepared"
    assert handle(PLAIN, PLAIN, ()) == SiteRefused("plug_ins")
    assert handle("nnunet_trainer", "nnunetv2.paths:join", ()) == SiteRefused("plug_ins")


# --------------------------------------------------------------------------------------------------------------- study


def test_the_network_of_a_study_is_the_trainers(parse: Parse, phantom: Path, tmp_path: Path) -> None:
    study = parse(
        BATCH_NORM,
        variants={"ours": {"local_update": {"name": "plain"}}, "other": {"local_update": {"trainer": PLAIN}}},
    )
    network = {"trainer": BATCH_NORM, "base_features": 4}
    assert study.network == PlugIn("nnunet_trainer", network)
    assert study.variants["ours"].network == PlugIn("nnunet", {"base_features": 4})
    assert study.variants["other"].network == PlugIn("nnunet_trainer", network | {"trainer": PLAIN})
    assert parse_study(tomllib.loads(to_toml(study)), folder=tmp_path) == study
    assert parse(BATCH_NORM, network={"name": "nnunet"}).network == study.network


@pytest.mark.parametrize(
    ("table", "given", "text"),
    [
        ("network", {"name": "unet"}, r"\[network\] name = 'unet' is not allowed with \[local_update\]"),
        ("network", {"trainer": PLAIN}, r"\[network\] trainer = .* is not allowed with \[local_update\]"),
        ("training", {"optimizer": "adamw"}, r"optimizer = 'adamw' is not allowed with .*: the trainer decides it"),
        ("training", {"learning_rate": 0.1}, r"learning_rate = 0.1 is not allowed with"),
        ("training", {"precision": "bfloat16"}, r"precision = 'bfloat16' is not allowed with"),
        ("training", {"deep_supervision": False}, r"deep_supervision = False is not allowed with"),
        ("training", {"augmentation": "none"}, r"augmentation = 'none' is not allowed with"),
        ("loss", {"name": "dice_ce", "ce_weight": 0.5}, r"\[loss\] name = 'dice_ce' is not allowed with"),
        ("protocol", {"name": "splitfed", "rounds": 2, "steps": 2}, r"not allowed with splitfed"),
        ("local_update", {"trainer": 3}, r"trainer = 3 is not allowed"),
    ],
)  # fmt: skip
def test_what_the_trainer_decides_is_refused_and_not_ignored(
    table: str, given: dict[str, Any], text: str, parse: Parse
) -> None:
    with pytest.raises(StudyError, match=text):
        parse(BATCH_NORM, **{table: given})


# ----------------------------------------------------------------------------------------------------------------- run


def test_a_run_is_resumed_to_the_bit_and_nnunet_predicts_with_it(
    parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = parse(BATCH_NORM, training={"mirror": False}, validation={"folds": 3})
    run(study, tmp_path / "once")

    def stop(event: Event) -> None:
        if (event.kind, event.round) == ("round", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "twice", watch=stop)
    outcome = run(study, tmp_path / "twice", resume=True)
    assert outcome.exit_code == 0
    once, twice = (open_finished(tmp_path / name) for name in ("once", "twice"))
    assert equal(once.weights()[0], twice.weights()[0])
    assert all(torch.isfinite(t).all() for t in twice.weights()[0].values())

    export(twice, tmp_path / "out", card="", intended_use="")
    checkpoint = torch.load(tmp_path / "out/fold_0/checkpoint_final.pth", weights_only=True)
    assert (checkpoint["trainer_name"], checkpoint["inference_allowed_mirroring_axes"]) == ("nnUNetTrainerBN", None)
    # its search by name imports every trainer there is, and some need packages that may be missing
    found_by_name = {"nnUNetTrainerBN": trainer_class(BATCH_NORM)}
    monkeypatch.setattr(predict_from_raw_data, "recursive_find_trainer_class_by_name", found_by_name.__getitem__)
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path / "out"), (0,))
    image = torch.randn(1, 20, 16, 12, generator=torch.Generator().manual_seed(1))
    expected = predictor.predict_logits_from_preprocessed_data(image)
    (network,) = twice.networks()
    found = predict_logits(
        network, image, twice.plan, labels=twice.labels, device=CPU, mirror=False, precision="float32"
    )
    assert torch.equal(found, expected.to(found.dtype))


def test_a_trainer_from_outside_is_exported_under_the_name_of_the_one_that_builds_its_network() -> None:
    assert stock_name(own("Breaks")) == "nnUNetTrainer"
    assert stock_name(own("Own")) is None
    assert stock_name(BATCH_NORM) == "nnUNetTrainerBN"
    assert trainer_class(DA5).__name__ == stock_name(DA5)
