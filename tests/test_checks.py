"""Every check must be able to fail, and fail when it should."""

import numpy as np
import pandas as pd
import pytest
import torch

from vaelib import checks, models
from vaelib.checks import statements
from vaelib.posteriors import DiagonalGaussian, FactorisedBernoulli

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


def test_draws_without_noise_are_no_sample():
    constant = torch.ones(100, 2, dtype=torch.float64)
    for bad in (
        lambda: checks.unbiased(constant, 1.0),
        lambda: checks.biased(constant, 2.0),
        lambda: checks.below(constant[:, 0], constant[:, 0] + 1),
        lambda: checks.equivalent(constant, constant, within=1.0),
    ):
        with pytest.raises(AssertionError, match="there is no noise in these 100 draws"):
            bad()


def test_a_coordinate_without_spread_beside_others_still_sees_a_difference():
    draws = DRAWS.clone()
    draws[:, 0] = 1e-9
    exact = torch.tensor([1e-9, 0, 0], dtype=torch.float64)
    checks.unbiased(draws, exact * (1 + 1e-14))
    for off in (1e-6, 1e-12, -1e-12):
        with pytest.raises(AssertionError):
            checks.unbiased(draws, exact * (1 + off))


def seeds(kind, draws, many):
    """Draws ``[draws, many]`` of mean 0: as many samples as there are seeds."""
    z = torch.randn(draws, many, generator=torch.Generator().manual_seed(draws), dtype=torch.float64)
    return {"normal": z, "squares": z**2 - 1, "fourth powers": z**4 - 3, "lognormal": z.exp() - np.exp(0.5)}[kind]


@pytest.mark.parametrize(
    ("kind", "draws", "many"),
    [("normal", n, 20_000) for n in (2, 5, 10, 99, 100)]
    + [("squares", 100, 20_000), ("squares", 1000, 4000), ("fourth powers", 1000, 4000), ("lognormal", 1000, 4000)],
)
def test_the_false_alarm_rate_is_as_stated(kind, draws, many):
    """Thousands of seeds of a true claim: P(|z| > 3) = 0.0027, P(|z| > 4) = 0.00006, for few draws and heavy tails."""
    found = statements.estimate(seeds(kind, draws, many))
    z = statements.normal_equivalent(found.mean, found).abs()
    assert (z > 3).sum() < 0.0027 * many + 4 * (0.0027 * many) ** 0.5
    assert (z > 4).sum() <= 0.00006 * many + 4
    assert 0.25 < (z > 1).double().mean() < 0.4  # and none is bought with power: 0.32


def test_the_plain_score_is_not_good_enough_for_few_draws_or_heavy_tails():
    for kind, draws in (("normal", 5), ("fourth powers", 1000)):
        z = checks.z_scores(seeds(kind, draws, 4000), 0.0)
        assert (z > 3).double().mean() > 4 * 0.0027


def at(sigmas, monkeypatch):
    """A narrower check, so that some hundred seeds show its rate: at 2 standard errors, one in 22."""
    monkeypatch.setattr(statements, "SIGMAS", sigmas)


def rate(check, many=300):
    generator = torch.Generator().manual_seed(7)
    return sum(fails(check, generator) for _ in range(many)) / many


def normal(*shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_many_coordinates_are_one_check(monkeypatch):
    """Among 100 coordinates five are beyond 2 standard errors, but the check states one rate for all of them."""
    at(2.0, monkeypatch)
    assert 0.01 < rate(lambda g: checks.unbiased(normal(50, 100, generator=g), 0.0)) < 0.08
    assert rate(lambda g: checks.biased(normal(50, 100, generator=g), 0.0)) > 0.93


@pytest.mark.parametrize("kind", ["less_variance", "below", "equivalent"])
@pytest.mark.parametrize("draws", [12, 400])
def test_a_comparison_at_its_border_passes_as_seldom_as_stated(kind, draws, monkeypatch):
    """Equal variances, equal means, means apart by the margin: one-sided, 2.3 % pass at 2 standard errors."""
    at(2.0, monkeypatch)
    check = {
        "less_variance": lambda a, b: checks.less_variance(a, b),
        "below": lambda a, b: checks.below(a, b),
        "equivalent": lambda a, b: checks.equivalent(a, b + 10, within=10.0),
    }[kind]
    passed = 1 - rate(lambda g: check(normal(draws, generator=g), normal(draws, generator=g)))
    assert passed < 0.06


@pytest.mark.parametrize(("draws", "kind"), [(30, "normal"), (2000, "normal"), (400, "squares")])
def test_the_bias_that_is_said_to_show_shows(draws, kind, capsys):
    """It is found 98 times in 100, in either direction, and one of half its size is not."""
    shape = {"normal": lambda z: z, "squares": lambda z: z**2 - 1}[kind]
    checks.unbiased(shape(normal(draws, 2, generator=torch.Generator().manual_seed(1))), 0.0)
    least = float(capsys.readouterr().out.split("a bias of ")[1].split()[0])
    for sign in (1, -1):
        shown = rate(lambda g, b=sign * least: checks.unbiased(shape(normal(draws, 2, generator=g)) + b, 0.0), 100)
        assert shown > 0.9
    assert rate(lambda g: checks.unbiased(shape(normal(draws, 2, generator=g)) + least / 4, 0.0), 100) < 0.3


def test_one_draw_that_outweighs_all_others_decides_nothing():
    draws = DRAWS[:1000, 0].clone()
    draws[5] = 1e4
    for check in (checks.unbiased, checks.biased):
        with pytest.raises(AssertionError, match="one of 1000 draws outweighs all others"):
            check(draws, 0.0)
    checks.unbiased(DRAWS[:1000, 0], 0.0)


def test_two_silences_are_not_told_apart():
    with pytest.raises(AssertionError, match="0 against 0, a gap of 0 ± 0"):
        checks.less_variance(torch.ones(10, 2), torch.ones(10, 2))


def test_no_difference_is_a_claim_that_noise_does_not_show():
    """Inside the margin it passes; with a margin below the noise it is undecided, and that is no pass."""
    other = DRAWS[:, 0] + 0.1 * DRAWS[:, 1]
    checks.equivalent(DRAWS[:, 0], other, within=0.01)
    with pytest.raises(AssertionError, match="undecided"):
        checks.equivalent(DRAWS[:, 0], other, within=0.001)
    with pytest.raises(AssertionError, match="undecided"):
        checks.equivalent(DRAWS[:, 0], other + 0.009, within=0.01)
    with pytest.raises(AssertionError, match="different"):
        checks.equivalent(DRAWS[:, 0], other + 0.02, within=0.01)
    for within in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(AssertionError, match="the smallest difference that would matter"):
            checks.equivalent(DRAWS[:, 0], other, within=within)


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


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, torch.tensor([1.0, float("nan")])])
def test_nothing_passes_by_a_scale_that_is_none(scale):
    for bad in (
        lambda: checks.no_variance(DRAWS[:, :2], scale=scale),
        lambda: checks.same(torch.zeros(2), torch.ones(2), scale=scale),
        lambda: checks.no_variance(torch.complex(DRAWS * 0, DRAWS)),
        lambda: checks.less_variance(DRAWS, DRAWS / 2, factor=-1.0),
        lambda: checks.less_variance(DRAWS, DRAWS / 2, factor=0.0),
    ):
        with pytest.raises(AssertionError):
            bad()


@pytest.mark.parametrize(
    "value", [float("nan"), "False", "", 1, None, (x for x in [True]), [], [1, True], torch.ones(2), torch.ones(0) > 0]
)
def test_a_statement_is_true_or_false_and_nothing_else(value):
    with pytest.raises(AssertionError):
        checks.holds(value, "it is so")


@pytest.mark.parametrize("of", [bool, torch.tensor, np.bool_, lambda t: torch.tensor([t]), lambda t: np.array([[t]])])
def test_a_statement_may_be_a_tensor_or_an_array_of_one(of):
    checks.holds(of(True), "it is so")
    with pytest.raises(AssertionError, match="does not hold"):
        checks.holds(of(False), "it is so")


@pytest.mark.parametrize("of", [list, torch.tensor, np.array, pd.Series])
def test_a_statement_may_be_about_each_of_several_but_not_of_none(of):
    checks.holds(of([True, True]), "each is so")
    with pytest.raises(AssertionError, match=r"each is so \(1 of 2 do not\)"):
        checks.holds(of([True, False]), "each is so")
    with pytest.raises(AssertionError):
        checks.holds(of([]), "each is so")


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
    """4 for one coordinate, and 4.16 for two, of which either may stray."""
    draws = SIGNS.unsqueeze(-1) * SCALES
    error = draws.std(0) / 100
    for index, width in ((0, 4.16), (1, 4.16), (slice(0, 1), 4.0)):
        some = slice(0, 2) if isinstance(index, int) else index
        near, far = draws.clone(), draws.clone()
        near[:, index] += (width - 0.05) * error[index]
        far[:, index] += (width + 0.05) * error[index]
        assert not fails(checks.unbiased, near[:, some], 0.0) and fails(checks.unbiased, far[:, some], 0.0)
        assert fails(checks.biased, near[:, some], 0.0) and not fails(checks.biased, far[:, some], 0.0)
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
    """To rounding of the coordinate's own size, however large the one beside it is."""
    draws = torch.tensor([1.0, 1e-8, 1e8], dtype=torch.float64).repeat(1000, 1)
    for index, size in enumerate(draws[0].tolist()):
        near, far = draws.clone(), draws.clone()
        near[7, index] += 1e-13 * size
        far[7, index] += 1e-11 * size
        checks.no_variance(near)
        with pytest.raises(AssertionError, match="draws differ by"):
            checks.no_variance(far)


def test_what_is_left_where_terms_cancel_is_compared_with_their_size():
    left = 1e-15 * DRAWS[:10]
    for check in (checks.no_variance, lambda d, **o: checks.same(d, torch.zeros_like(d), **o)):
        check(left, scale=1.0)
        for scale in (0.0, 1e-9):
            with pytest.raises(AssertionError, match="scale="):
                check(left, scale=scale)


def test_numbers_are_the_same_each_by_its_own_size():
    first = torch.tensor([1e8, 1e-8], dtype=torch.float64)
    checks.same(first, first * (1 + 5e-8))
    for index in (0, 1):
        other = first.clone()
        other[index] *= 1 + 5e-7
        with pytest.raises(AssertionError):
            checks.same(first, other)
    for other in (first.float(), first[:1], torch.tensor([1e8, float("inf")], dtype=torch.float64)):
        with pytest.raises(AssertionError):
            checks.same(first, other)


def test_checks_are_recorded_with_what_is_left_to_their_threshold(capsys):
    error = SIGNS.std() / 100
    with checks.recorded() as outcomes:
        checks.unbiased(SIGNS + error, 0.0, "the mean of signs")
        checks.biased(SIGNS + error, 0.0, "that mean")
        checks.below(SIGNS, SIGNS * 2 + 2 * error, what="a pair")
        checks.less_variance(SIGNS[:, None], SIGNS[:5, None], what="refused")
        checks.equivalent(SIGNS + error, 0 * SIGNS, within=8 * error.item(), what="all the same")
        checks.holds(False, "no")
        checks.same(SIGNS, SIGNS)
    assert not capsys.readouterr().out
    found = [(o.name, o.kind, o.holds, o.margin if o.margin is None else round(o.margin, 1)) for o in outcomes]
    assert found == [
        ("the mean of signs", "unbiased", True, 3.0),
        ("that mean", "biased", False, -3.0),
        ("a pair", "below", False, -2.0),
        ("refused", "less_variance", False, None),
        ("all the same", "equivalent", True, 3.0),
        ("no", "holds", False, None),
        ("values", "same", True, None),
    ]
    assert [o.rate for o in outcomes] == [checks.KINDS[o.kind] for o in outcomes]
    with pytest.raises(AssertionError, match="does not hold: no"):
        checks.holds(False, "no")


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


def test_a_wrong_answer_that_is_refused_is_one_check_that_holds():
    with checks.recorded() as outcomes:
        checks.refused(check_sum, lambda a, b: a - b, what="a difference")
        checks.refused(check_sum, lambda a, b: a + b, what="a sum")
        check_sum(lambda a, b: a + b)
    assert [(o.name, o.kind, o.holds) for o in outcomes] == [
        ("a difference", "refused", True),
        ("a sum", "refused", False),
        ("1 + 2 is 3", "holds", True),
    ]


def test_only_checks_are_recorded_and_other_errors_go_on():
    with pytest.raises(RuntimeError), checks.recorded() as outcomes:
        checks.unbiased(None, object())
    assert outcomes == []


# --- the contract of a joint ------------------------------------------------------------------------------------------


def joint(x, z):
    """p(z) = N(0, I), p(x | z) = N(z W, I), up to a constant."""
    weight = torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -1.1]], dtype=z.dtype)
    return -0.5 * (z.square().sum(-1) + (x - z @ weight).square().sum(-1))


MIXED = r"joint\(x, z\)\[0, 0\] changes with other draws or observations than z\[0, 0\] and x\[0\]"

BROKEN_JOINTS = [
    (r"of the shape \[K, B\] = \[4, 3\], .*returned \[4, 3, 2\]", lambda x, z: -z.square()),
    (r"of the shape \[K, B\] = \[4, 3\], .*returned \[4, 2\]", lambda x, z: -z.square().sum(1)),
    (r"of the shape \[K, B\] = \[4, 3\], .*returned \[3\]", lambda x, z: joint(x, z).sum(0)),
    ("of the shape .* returned a float", lambda x, z: joint(x, z).sum().item()),
    (r"fails for x and z of the shapes \[\[3, 3\], \[4, 3, 2\]\]: .*size", lambda x, z: joint(x[:, None], z)),
    (MIXED, lambda x, z: joint(x - x.mean(0), z)),
    (MIXED, lambda x, z: joint(x, z - z.mean(1, keepdim=True))),
    (MIXED, lambda x, z: joint(x, z - z.mean(0, keepdim=True))),
    (MIXED, lambda x, z: joint(x.roll(1, 0), z)),
    (MIXED, lambda x, z: joint(x, z.flip(0))),
    ("differs from call to call", lambda x, z: joint(x, torch.nn.functional.dropout(z, 0.5))),
    ("off its slope by 100%", lambda x, z: joint(x, z.detach())),
    ("off its slope by 100%", lambda x, z: joint(x, torch.from_numpy(z.detach().numpy()))),
    (r"off its slope by \d+%", lambda x, z: joint(x, z.detach()) - z.sum(-1)),
    ("off its slope by nan%", lambda x, z: joint(x, z) + torch.where(z > 9, (z - 9).sqrt(), 0.0 * z).sum(-1)),
    ("NaN or infinite for 12 of 12", lambda x, z: joint(x, z) + float("nan")),
    (r"NaN or infinite for \d+ of 12", lambda x, z: joint(x, z) + 1 / (z > 0).sum(-1)),
    ("minus infinity for every sample", lambda x, z: joint(x, z) - float("inf")),
    ("changes x or z in place", lambda x, z: joint(x, z.mul_(2))),
]


@pytest.fixture
def tried():
    """The q and x that a joint is tried on."""
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"q": DiagonalGaussian(x[:, :2], 0.1 * x[:, 1:]), "x": x}


@pytest.mark.parametrize(("sentence", "broken"), BROKEN_JOINTS)
def test_a_broken_joint_is_told_what_is_broken(sentence, broken, tried):
    with pytest.raises(AssertionError, match=sentence):
        checks.contract(broken, **tried)


def test_a_joint_of_your_own_keeps_the_contract_if_it_is_right(tried, capsys):
    checks.contract(joint, **tried)
    assert capsys.readouterr().out == "ok: joint keeps the contract of a joint density\n"
    condition = torch.randn(3, 1, dtype=torch.float64)
    checks.contract(lambda x, z: joint(x - condition, z), **tried)
    checks.contract(lambda x, z: joint(x, z).where(z[..., 0] > 0, -torch.inf), **tried)  # the log of 0


def test_the_sum_over_a_wrong_axis_is_found_where_the_shape_does_not_tell():
    """B = D = 2: the sum over the observations has the shape of that over the coordinates."""
    x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
    q = DiagonalGaussian(x[:, :2], 0 * x[:, :2])
    with pytest.raises(AssertionError, match="changes with other draws or observations"):
        checks.contract(lambda x, z: joint(x, z) - 0.5 * z.square().sum(1), q=q, x=x)
    checks.contract(lambda x, z: joint(x, z) - 0.5 * z.square().sum(-1), q=q, x=x)


def test_batch_norm_that_trains_is_found():
    model = models.build("mlp-1", 4, generator=torch.Generator().manual_seed(0), hidden=4, latent=2)
    model.joint.decode = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 4))
    x = torch.eye(4)

    def log_joint(x, z):
        pixels = model.joint.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        return -torch.nn.functional.softplus((1 - 2 * x) * pixels).sum(-1) - 0.5 * z.square().sum(-1)

    with pytest.raises(AssertionError, match="batch norm is in eval"):
        checks.contract(log_joint, q=model.encoder(x), x=x)
    model.eval()
    checks.contract(log_joint, q=model.encoder(x), x=x)


def test_whether_rows_are_mixed_up_is_not_seen_where_all_are_alike(tried):
    for x in (torch.ones(3, 3, dtype=torch.float64), tried["x"][:1]):
        q = DiagonalGaussian(x[:, :2], x[:, 1:])
        with pytest.raises(AssertionError, match="two observations or more that differ"):
            checks.contract(joint, q=q, x=x)
    with pytest.raises(AssertionError, match="x has 3 observations, but q"):
        checks.contract(joint, q=DiagonalGaussian(*tried["x"][None, :2, :2].expand(2, 2, 2)), x=tried["x"])
    with pytest.raises(AssertionError, match="x must be a tensor of observations"):
        checks.contract(joint, q=tried["q"])


@pytest.mark.parametrize("kind", ["mlp-1", "mlp-2", "mlp-1-mixture", "mlp-1-bernoulli", "mlp-1-categorical", "linear"])
def test_the_joints_here_keep_the_contract(kind):
    """In float32, of several layers, and where a sample does not move with its parameters."""
    model = models.build(kind, 64, generator=torch.Generator().manual_seed(0))
    x = torch.rand(5, 64, generator=torch.Generator().manual_seed(1)).round()
    checks.contract(model.joint, q=model.encoder(x), x=x)


def test_bits_that_do_not_move_ask_for_no_gradient(tried):
    q = FactorisedBernoulli(tried["x"][:, :2])
    checks.contract(lambda x, z: joint(x, z.detach()), q=q, x=tried["x"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_contract_is_tried_on_the_device_of_the_posterior():
    checks.contract(DiagonalGaussian(torch.zeros(2, 3, device="cuda"), torch.zeros(2, 3, device="cuda")))
