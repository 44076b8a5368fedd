import math

import pytest

from dist_kd.report import gap_sentence, read_run
from dist_kd.report.compare import compare, difference, gap_share, group_runs, t95


def test_quantiles_are_those_of_students_t():
    stats = pytest.importorskip("scipy.stats")
    for degrees in [*range(1, 31), 40, 60, 120, 1000]:
        assert t95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=0.005), degrees
    assert t95(2.9) == t95(2)  # never narrower than it should be


def test_paired_difference_by_hand_and_by_scipy():
    # differences 3, 4, 2: mean 3, sd 1, standard error 1 / sqrt(3), t(2) = 4.303
    found = difference([85, 84, 86], [88, 88, 88])
    assert found.points == pytest.approx(3)
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert found.verdict == "helped"
    stats = pytest.importorskip("scipy.stats")
    interval = stats.ttest_rel([88, 88, 88], [85, 84, 86]).confidence_interval(0.95)
    assert (interval.high - interval.low) / 2 == pytest.approx(found.half_width, rel=1e-3)


def test_unpaired_difference_by_scipy():
    stats = pytest.importorskip("scipy.stats")
    plain, distilled = [85.0, 84.0, 86.0, 85.5], [88.0, 89.0, 86.5]
    result = stats.ttest_ind(distilled, plain, equal_var=False)
    error = (sum(stats.tvar(side) / len(side) for side in (plain, distilled))) ** 0.5
    found = difference(plain, distilled)
    assert found.half_width == pytest.approx(t95(result.df) * error)
    interval = result.confidence_interval(0.95)
    assert found.half_width >= (interval.high - interval.low) / 2  # degrees are rounded down
    assert found.seeds == "4 and 3 seeds"


HELPED = (
    "Distillation helped: top-1 is 88.00 % distilled and 85.00 % alone, +3.00 points (95 % interval +2.38 to +3.62, "
    "3 paired seeds); that closes 46 % of the gap to the teacher's 91.50 %."
)
# differences 1.5, -1.5, 0.5: mean 0.167, sd 1.528, half width 4.303 * 1.528 / sqrt(3) = 3.795
NOTHING = (
    "No difference beyond the seeds' spread: top-1 is 85.17 % distilled and 85.00 % alone, +0.17 points (95 % "
    "interval -3.63 to +3.96, 3 paired seeds); the teacher has 91.50 %."
)
HURT = (
    "Distillation hurt: top-1 is 80.00 % distilled and 85.00 % alone, -5.00 points (95 % interval -5.00 to -5.00, "
    "3 paired seeds); the gap to the teacher's 91.50 % grew by 77 %."
)
ONE = (
    "One seed shows no spread, so this is no evidence yet: top-1 is 88.00 % distilled and 85.00 % alone, +3.00 points "
    "(1 seed each); that closes 46 % of the gap to the teacher's 91.50 %. Run at least 3 seeds of each."
)


@pytest.mark.parametrize(
    "plain,distilled,sentence",
    [
        ([85, 85.5, 84.5], [88, 88.75, 87.25], HELPED),
        ([85, 85.5, 84.5], [86.5, 84, 85], NOTHING),
        ([85, 85.5, 84.5], [80, 80.5, 79.5], HURT),
        ([85], [88], ONE),
        ([], [88], "Nothing to compare: it takes finished runs of the student alone and of the distilled student."),
    ],
)
def test_the_last_line_says_what_happened(plain, distilled, sentence):
    assert gap_sentence(plain, distilled, 91.5) == sentence


def test_equal_figures_are_no_difference():
    assert "No difference" in gap_sentence([85.1, 85.2], [85.1, 85.2], 90.0)


def test_a_seed_without_a_figure_takes_its_pair_along():
    with_gap = gap_sentence([85, math.nan, 84.5, 85.5], [88, 70, 87.25, 88.75], 91.5)
    assert with_gap == HELPED


def test_share_of_the_gap():
    assert gap_share(80, 85, 90) == (50, "that closes 50 % of the gap to the teacher's 90.00 %")
    assert gap_share(80, 92, 90) == (
        120,
        "that closes 120 % of the gap to the teacher's 90.00 %, and goes beyond it",
    )
    assert gap_share(80, 85, 80)[0] is None and "not better than the student alone" in gap_share(80, 85, 80)[1]
    assert gap_share(80, 85, None)[0] is None and "unknown" in gap_share(80, 85, None)[1]


def test_runs_are_grouped_by_what_makes_the_result(runs, make_run):
    extra = [
        make_run("warmer", seed=0, T=8.0),
        make_run("more-workers", seed=7, workers=4),
        make_run("nowhere-else", seed=8, data="/other/place"),  # the same data by its fingerprint
        make_run("another-teacher-flag", seed=9, kd=False, T=9.0),  # which labels alone do not look at
    ]
    groups = group_runs([read_run(path) for path in [*runs, *extra]])
    assert [(group.label, [run.name for run in group.runs]) for group in groups] == [
        ("tiny_cnn, labels only", ["plain-s0", "plain-s1", "plain-s2", "another-teacher-flag"]),
        ("tiny_cnn, kd (T 4.0)", ["kd-s0", "kd-s1", "kd-s2", "more-workers", "nowhere-else"]),
        ("tiny_cnn, kd (T 8.0)", ["warmer"]),
    ]


def test_comparison_takes_last_evaluations_and_the_nearest_twin(runs, make_run):
    other = make_run("other-lr", seed=0, kd=False, final=80.0, lr=0.5)
    groups = group_runs([read_run(path) for path in [other, *runs]])
    (found,) = compare(groups)
    assert found["plain"] == "tiny_cnn, labels only (lr None)" and found["differs_also_in"] == []
    assert found["sentence"] == HELPED
    assert found["gap_closed_percent"] == pytest.approx(100 * 3 / 6.5)

    (far,) = compare(group_runs([read_run(path) for path in [other, runs[3]]]))
    assert far["differs_also_in"] == ["lr"]
    assert far["verdict"] == "unknown"


def test_comparison_is_of_the_test_set_where_all_runs_have_the_same(runs, make_run):
    """All figures two points lower than on the validation set, the teacher's too, so the share of the gap stays."""
    tested = [
        make_run(f"{kd}-{seed}", seed=seed, kd=kd, final=final, test="t")
        for kd, finals in ((False, (85.0, 85.5, 84.5)), (True, (88.0, 88.75, 87.25)))
        for seed, final in enumerate(finals)
    ]
    (found,) = compare(group_runs([read_run(path) for path in tested]))
    assert found["set"] == "test" and found["gap_closed_percent"] == pytest.approx(100 * 3 / 6.5)
    assert found["sentence"] == (
        "Distillation helped: top-1 on the test set is 86.00 % distilled and 83.00 % alone, +3.00 points (95 % "
        "interval +2.38 to +3.62, 3 paired seeds); that closes 46 % of the gap to the teacher's 89.50 %."
    )
    mixed = [*runs[:3], make_run("other", seed=0, final=88.0, test="t")]  # one side only
    other = [tested[0], make_run("another-set", seed=0, final=88.0, test="u")]
    for part in (mixed, other):
        (found,) = compare(group_runs([read_run(path) for path in part]))
        assert found["set"] == "val" and "top-1 is 88.00 % distilled and 85.00 % alone" in found["sentence"]


def test_another_student_is_no_twin(runs, make_run):
    other = make_run("bigger", seed=0, kd=False, arch="wide_cnn")
    assert compare(group_runs([read_run(path) for path in [other, *runs[3:]]])) == []


def test_seeds_that_do_not_match_are_not_paired(runs, make_run):
    later = [make_run(f"kd-s{seed}-later", seed=seed, final=88.0 + seed / 10) for seed in (5, 6, 7)]
    (found,) = compare(group_runs([read_run(path) for path in [*runs[:3], *later]]))
    assert "3 and 3 seeds" in found["sentence"]
