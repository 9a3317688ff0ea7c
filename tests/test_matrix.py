"""Site by model: which figure stands in which cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from concilium.reports.matrix import INTERVAL, Matrix, fitting, matrix, matrix_of_run, to_markdown
from concilium.statistics import FOREGROUND_MEAN


def row(model: str, site: str, mean: float | None, *, n: int = 4, **more: Any) -> dict[str, Any]:
    subset = "test" if site == "test" else "validation"
    about = {"model": model, "site": site, "subset": subset, "label": FOREGROUND_MEAN, "metric": "dice"}
    return about | {"mean": mean, "ci_low": None, "ci_high": None, "n": n} | more


def table(*summary: dict[str, Any], models: tuple[str, ...] = ("federated", "local"), metric: str = "dice") -> Matrix:
    return matrix({"summary": list(summary), "models": [{"name": m} for m in models]}, metric)


def test_each_site_has_a_row_and_each_model_a_column() -> None:
    got = table(
        row("federated", "north", 0.8123, n=5),
        row("federated", "south", 0.5, n=7),
        row("local:north", "north", 0.7, n=5),
        row("local:south", "south", 0.45, n=7),
    )
    assert got.header == ("site", "federated", "local")
    assert got.rows == (
        ("north, n = 5", "0.812", "0.700"),
        ("south, n = 7", "0.500", "0.450"),
    )
    assert got.notes == ("Sites: their validation cases. n: patients.",)
    assert got.title == "Dice, mean over the foreground labels"


def test_on_the_test_set_the_sites_own_models_share_a_cell() -> None:
    """As the summary has it for the models together."""
    got = table(
        row("federated", "test", 0.9),
        row("local:north", "test", 0.6),
        row("local:south", "test", 0.8),
        row("local:west", "test", 0.4),
        row("local", "test", 0.62),
    )
    assert got.rows == (("test set, n = 4", "0.900", "0.620"),)
    assert len(got.notes) == 2
    assert got.notes[1].startswith("local: each site's own model")


def test_the_order_of_columns_is_that_of_the_models() -> None:
    models = ("federated", "local", "centralized", "centralized_long")
    got = table(*[row(m, "north", 0.1 * i) for i, m in enumerate(models)], models=models)
    assert got.header == ("site", *models)
    assert got.rows == (("north, n = 4", "0.000", "0.100", "0.200", "0.300"),)


def test_a_cell_without_a_figure_is_a_dash() -> None:
    got = table(row("federated", "north", None), row("local:north", "north", 0.5), row("federated", "south", 0.4))
    assert got.rows == (("north, n = 4", "–", "0.500"), ("south, n = 4", "0.400", "–"))


def test_only_the_mean_over_the_labels_of_the_metric_counts() -> None:
    got = table(
        row("federated", "north", 0.1, label="liver"),
        row("federated", "north", 0.5),
        row("federated", "north", 9.0, metric="hd95"),
    )
    assert got.rows == (("north, n = 4", "0.500", "–"),)


def test_one_label_stands_for_itself() -> None:
    got = table(row("federated", "north", 3.25, label="liver", metric="hd95"), metric="hd95")
    assert got.title == "95 % Hausdorff distance, liver"
    assert got.rows[0][1] == "3.250"


def test_models_with_other_numbers_of_patients_share_a_row() -> None:
    """`n` names the fewest and the most: the metric is undefined for some patients under some model."""
    models = ("federated", "local", "centralized")
    got = table(
        *(row(m, "north", 0.5, n=n) for m, n in zip(models, (7, 5, 6), strict=True)),
        row("federated", "south", 0.5),
        models=models,
    )
    assert [r[0] for r in got.rows] == ["north, n = 5–7", "south, n = 4"]


def test_no_results_give_an_empty_table() -> None:
    assert table(models=()).rows == ()


def test_markdown() -> None:
    got = table(row("federated", "north", 0.5), models=("federated",))
    assert to_markdown(got) == "| site | federated |\n| --- | --- |\n| north, n = 4 | 0.500 |"


def test_all_sites_and_the_test_set_come_last_with_their_intervals() -> None:
    got = table(
        row("federated", "test", 0.6, ci_low=0.5, ci_high=0.7),
        row("federated", "all", 0.75, ci_low=0.7123, ci_high=0.8, n=8),
        row("federated", "north", 0.8, ci_low=0.7, ci_high=0.9),
        row("federated", "south", 0.7),
        models=("federated",),
    )
    assert got.rows == (
        ("north, n = 4", "0.800"),
        ("south, n = 4", "0.700"),
        ("all sites, n = 8", "0.750"),
        ("    95 %", "[0.712, 0.800]"),
        ("test set, n = 4", "0.600"),
        ("    95 %", "[0.500, 0.700]"),
    )
    assert "In brackets: 95 % intervals." in got.notes


def test_intervals_give_way_where_the_table_grows_too_wide() -> None:
    models = tuple(f"model{i}" for i in range(6))
    got = table(*(row(m, "test", 0.6, ci_low=0.5, ci_high=0.7) for m in models), models=models)
    assert [r[0] for r in got.rows] == ["test set, n = 4"]


def test_seeds_and_folds_do_not_repeat_a_column() -> None:
    got = table(row("federated", "north", 0.5), row("local:north", "north", 0.4), models=("federated", "local") * 3)
    assert got.header == ("site", "federated", "local")


def test_undefined_scores_are_counted_below() -> None:
    got = table(
        row("federated", "north", 0.8, n_undefined=3),
        row("local:north", "north", 0.7),
        row("federated", "test", None, n_undefined=2),
        row("federated", "south", 0.7, n_undefined=0),
        row("federated", "all", 0.7, n_undefined=3),
    )
    assert got.notes[-1] == "Undefined, and in no mean: north (federated 3); test set (federated 2)."
    assert got.rows[-1] == ("test set", "–", "–")


@pytest.mark.parametrize("engine", ["flare", None])
def test_between_hospitals_few_patients_are_not_shown(engine: str | None, tmp_path: Path) -> None:
    """Nor the mean over all, from which theirs would follow."""
    summary = [
        row("federated", "north", 0.8, n=8),
        row("federated", "tiny", 0.4242, n=3),
        row("federated", "all", 0.7, n=11),
    ]
    results = {"summary": summary, "models": [{"name": "federated"}]}
    if engine:
        (tmp_path / "study.toml").write_text(f'[engine]\nname = "{engine}"\n')
    got = matrix_of_run(tmp_path, results)
    assert got.rows == (("north, n = 8", "0.800"), ("tiny", "n < 5"), ("all sites", "not shown"))
    assert "fewer than 5 patients" in got.notes[-1]
    (tmp_path / "study.toml").write_text('[engine]\nname = "simulation"\n')
    assert matrix_of_run(tmp_path, results) == matrix(results)
    assert ("tiny, n = 3", "0.424") in matrix(results).rows


def test_a_site_that_a_model_never_saw_has_a_row() -> None:
    """Under the model whose setting it was; what that model reaches at the other sites stands in results.json alone."""
    got = table(
        row("federated", "north", 0.8),
        row("federated", "test", 0.7),
        row("federated-without-north", "north", 0.6, subset="unseen", n=9),
        row("federated-without-north", "south", 0.5),
        row("federated-without-north", "test", 0.4),
        models=("federated", "federated-without-north"),
    )
    assert got.header == ("site", "federated")
    assert got.rows == (("north, n = 4", "0.800"), ("north unseen, n = 9", "0.600"), ("test set, n = 4", "0.700"))
    assert got.notes[-1].startswith("unseen:")


def test_models_that_do_not_fit_beside_one_another_stand_in_rows() -> None:
    wide = Matrix(
        "Dice, mean",
        ("site", "federated", "local", "asymmetric"),
        (
            ("north, n = 2", "0.1", "0.2", "0.3"),
            ("all sites, n = 5", "0.4", "0.5", "0.6"),
            (INTERVAL, "[0, 1]", "", ""),
        ),
        ("Sites: their validation cases. n: patients.", "In brackets: 95 % intervals."),
    )
    assert fitting(wide, 100) is wide
    turned = fitting(wide, 40)
    assert turned.header == ("model", "north 2", "all sites 5")
    assert turned.rows == (("federated", "0.1", "0.4"), ("local", "0.2", "0.5"), ("asymmetric", "0.3", "0.6"))
    assert turned.notes == ("Sites, with their patients: their validation cases.",)
