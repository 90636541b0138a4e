"""Every check must be able to fail, and fail when it should."""

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
    checks.unbiased(constant, 1.0)
    with pytest.raises(AssertionError):
        checks.unbiased(constant, 1.0 + 1e-6)


def test_the_false_alarm_rate_is_as_stated():
    """2,000 true claims at 4 standard errors: 0.13 false alarms expected; at 1 standard error a third of them."""
    draws = torch.randn(200, 2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = checks.z_scores(draws, torch.zeros(2000, dtype=torch.float64))
    assert (scores > checks.SIGMAS).sum() <= 2 and 500 < (scores > 1).sum() < 800


def test_two_silences_are_not_told_apart():
    with pytest.raises(AssertionError, match="0 against 0, a gap of 0 ± 0"):
        checks.less_variance(torch.ones(10, 2), torch.ones(10, 2))
