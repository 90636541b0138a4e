"""Every check must be able to fail, and fail when it should."""

import numpy as np
import pytest
import torch

from vaelib import checks

DRAWS = torch.randn(10_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_checks_pass_print_one_line_and_fail(capsys):
    cases = [
        (checks.unbiased, (DRAWS, 0.0), (DRAWS + 0.06, 0.0)),
        (checks.biased, (DRAWS + 0.06, 0.0), (DRAWS, 0.0)),
        (checks.less_variance, (DRAWS, 1.1 * DRAWS.flip(0)), (DRAWS, 1.01 * DRAWS.flip(0))),
        (checks.below, (DRAWS[:, 0], DRAWS[:, 0] + 0.01 + 0.1 * DRAWS[:, 1]), (DRAWS[:, 0], DRAWS[:, 1] + 0.01)),
        (checks.no_variance, (DRAWS[:1].expand(50, 3),), (DRAWS * 1e-9,)),
        (checks.same, (DRAWS, DRAWS + 1e-12), (DRAWS, DRAWS + 1e-4)),
        (checks.holds, (True, "it is so"), (False, "it is so")),
    ]
    for check, good, bad in cases:
        check(*good)
        line = capsys.readouterr().out
        assert line.startswith("ok: ") and line.count("\n") == 1
        with pytest.raises(AssertionError):
            check(*bad)
        assert not capsys.readouterr().out


def test_less_variance_can_ask_for_a_factor():
    checks.less_variance(DRAWS, 3 * DRAWS.flip(0), factor=8)
    with pytest.raises(AssertionError):
        checks.less_variance(DRAWS, 3 * DRAWS.flip(0), factor=10)


def test_a_check_without_spread_still_sees_a_difference():
    constant = torch.ones(100, 2, dtype=torch.float64)
    checks.unbiased(constant, 1.0 + 1e-14)
    for off in (1e-6, 1e-12, -1e-12):
        with pytest.raises(AssertionError):
            checks.unbiased(constant, 1.0 + off)


def test_the_false_alarm_rate_is_as_stated():
    """2,000 true claims at 4 standard errors: 0.13 false alarms expected; at 1 standard error a third of them."""
    draws = torch.randn(200, 2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = checks.z_scores(draws, torch.zeros(2000, dtype=torch.float64))
    assert (scores > checks.SIGMAS).sum() <= 2 and 500 < (scores > 1).sum() < 800


def test_two_silences_are_not_told_apart():
    with pytest.raises(AssertionError, match="0 against 0, a gap of 0 ± 0"):
        checks.less_variance(torch.ones(10, 2), torch.ones(10, 2))


def test_no_difference_is_a_claim_that_noise_does_not_show():
    """Inside the margin it passes; with a margin below the noise it is undecided, and that is no pass."""
    other = DRAWS[:, 0] + 0.1 * DRAWS[:, 1]
    checks.equivalent(DRAWS[:, 0], other, within=0.01)
    for within in (0.001, 0.0):
        with pytest.raises(AssertionError, match="undecided or different"):
            checks.equivalent(DRAWS[:, 0], other, within=within)
    with pytest.raises(AssertionError, match="undecided or different"):
        checks.equivalent(DRAWS[:, 0], other + 0.02, within=0.01)


NAN = DRAWS.clone()
NAN[7, 1] = float("nan")


@pytest.mark.parametrize(
    "draws",
    [NAN, DRAWS[:1], DRAWS[:0], DRAWS[:, :0], torch.tensor(1.0)],
    ids=["NaN", "one draw", "no draws", "no coordinate", "a number"],
)
@pytest.mark.parametrize(
    "check",
    [
        lambda d: checks.unbiased(d, 0.0),
        lambda d: checks.biased(d + 1, 0.0),
        lambda d: checks.less_variance(d * 1e-3, d),
        lambda d: checks.less_variance(DRAWS * 1e-3, d),
        lambda d: checks.below(d, d + 1),
        lambda d: checks.no_variance(d),
        lambda d: checks.equivalent(d, d, within=1.0),
    ],
    ids=["unbiased", "biased", "less_variance", "of less variance", "below", "no_variance", "equivalent"],
)
def test_nothing_passes_on_nan_on_nothing_or_on_one_draw(check, draws):
    with pytest.raises(AssertionError):
        check(draws)


def test_nothing_passes_by_a_shape_that_broadcasts():
    for bad in (
        lambda: checks.unbiased(DRAWS[:, 0], torch.zeros(10_000, 1)),
        lambda: checks.unbiased(DRAWS, torch.zeros(4, 3)),
        lambda: checks.unbiased(DRAWS[:, :1], torch.zeros(3)),
        lambda: checks.less_variance(DRAWS[:, :1], DRAWS * 2),
        lambda: checks.below(DRAWS[:, 0], DRAWS[:, :1] + 1),
        lambda: checks.equivalent(DRAWS[:, 0], DRAWS[:, :1], within=1.0),
        lambda: checks.biased(DRAWS, float("inf")),
        lambda: checks.same(torch.zeros(0), torch.zeros(0)),
        lambda: checks.same(torch.tensor([float("nan")]), torch.tensor([float("nan")])),
    ):
        with pytest.raises(AssertionError):
            bad()


@pytest.mark.parametrize("value", [float("nan"), "False", 1, (x for x in [1]), [True], torch.ones(2, dtype=torch.bool)])
def test_a_statement_is_true_or_false_and_nothing_else(value):
    with pytest.raises(AssertionError):
        checks.holds(value, "it is so")


@pytest.mark.parametrize("of", [bool, torch.tensor, np.bool_, lambda t: torch.tensor([t]), lambda t: np.array([[t]])])
def test_a_statement_may_be_a_tensor_or_an_array_of_one(of):
    checks.holds(of(True), "it is so")
    with pytest.raises(AssertionError, match="does not hold"):
        checks.holds(of(False), "it is so")


def test_a_variance_of_few_draws_has_no_error_to_go_by():
    """Two draws have equal squares, so that the error of their variance is 0, and chance decides."""
    with pytest.raises(AssertionError, match="at least 10 draws"):
        checks.less_variance(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]]))


SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(5000)  # of mean 0 and standard error 1 / 100
SCALES = torch.tensor([1.0, 100.0], dtype=torch.float64)


def fails(check, *arguments, **options):
    try:
        check(*arguments, **options)
    except AssertionError:
        return True
    return False


def test_means_are_checked_to_four_standard_errors_of_each_coordinate_s_own():
    draws = SIGNS.unsqueeze(-1) * SCALES
    error = draws.std(0) / 100
    for index in (0, 1, slice(None)):
        near, far = draws.clone(), draws.clone()
        near[:, index] += 3.9 * error[index]
        far[:, index] += 4.1 * error[index]
        assert not fails(checks.unbiased, near, 0.0) and fails(checks.unbiased, far, 0.0)
        assert fails(checks.biased, near, 0.0) and not fails(checks.biased, far, 0.0)
    torch.testing.assert_close(checks.z_scores(draws + 3 * error, 0.0), torch.full((2,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(checks.mean_and_error(draws[:4]), (draws[0] * 0, SCALES * (4 / 3) ** 0.5 / 2))


def test_pairs_are_checked_to_four_standard_errors():
    zero, error = torch.zeros_like(SIGNS), SIGNS.std() / 100
    assert not fails(checks.below, zero, SIGNS + 4.1 * error) and fails(checks.below, zero, SIGNS + 3.9 * error)
    assert fails(checks.below, SIGNS + 4.1 * error, zero)
    for off in (-1, 0, 1):  # from off - 4 to off + 4 errors
        margin = (4 + abs(off)) * error
        assert not fails(checks.equivalent, SIGNS + off * error, zero, within=1.02 * margin)
        assert fails(checks.equivalent, SIGNS + off * error, zero, within=0.98 * margin)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_variances_are_checked_to_four_standard_errors_of_the_difference_that_is_meant(factor):
    """Squares are 1 or 4, so the variance is 2.5 and its error 1.5 / 100, times the square of the scale."""
    quiet = (SIGNS * torch.tensor([1.0, 1, 2, 2]).repeat(2500)).unsqueeze(-1)
    for excess, enough in ((0.0335, False), (0.035, True)):  # 3.88 and 4.05 errors
        noisier = (factor * (1 + excess)) ** 0.5 * quiet
        assert fails(checks.less_variance, quiet, noisier, factor=factor) is not enough
    few = DRAWS[:5]
    assert abs(checks.total_variance(few)[0] - few.var(0).sum()) < 1e-12


def test_one_draw_that_differs_in_one_coordinate_is_variance():
    draws = torch.ones(1000, 3, dtype=torch.float64)
    draws[7, 1] += 1e-13
    checks.no_variance(draws)
    draws[7, 1] += 1e-11
    with pytest.raises(AssertionError, match="draws differ by"):
        checks.no_variance(draws)


def check_sum(total):
    checks.holds(total(1, 2) == 3, "1 + 2 is 3")


def unfinished(a, b):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda a, b: a + b, "ok: 1 + 2 is 3\n"),
        (lambda a, b: a - b, "not right yet: does not hold: 1 + 2 is 3\n"),
        (lambda a: a, "not right yet: "),
        (unfinished, "not solved yet\n"),
        (None, "not solved yet\n"),
    ],
)
def test_an_attempt_at_an_exercise_is_answered_and_never_stops_the_notebook(answer, said, capsys):
    checks.attempt(check_sum, answer)
    assert capsys.readouterr().out.startswith(said)


def test_a_planted_wrong_answer_must_be_refused_and_by_an_assertion(capsys):
    checks.refused(check_sum, lambda a, b: a - b, what="a difference")
    assert capsys.readouterr().out == "ok: refused, a difference\n"
    with pytest.raises(AssertionError, match="a wrong answer passes: a sum"):
        checks.refused(check_sum, lambda a, b: a + b, what="a sum")
    with pytest.raises(NotImplementedError):
        checks.refused(check_sum, unfinished, what="nothing")
