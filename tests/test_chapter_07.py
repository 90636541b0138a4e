"""The negative controls of chapter 7: what its checks must refuse, each on the chapter's own quantity.

Those of layers, densities and refusals are in test_flows.py. The measured table is looked at here; nothing is timed.
"""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import DTYPE

from vaelib import checks, flows, objectives
from vaelib.estimators import TABLEAU
from vaelib.posteriors import DiagonalGaussian

ROOT = Path(__file__).resolve().parent.parent
refused = pytest.raises(AssertionError)
X = torch.zeros(1, 1, dtype=DTYPE)
NODES, MASS = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(100))
GRID = torch.cartesian_prod(NODES, NODES)[None]
WEIGHT = torch.cartesian_prod(MASS, MASS).prod(1) / MASS.sum() ** 2


def make_flow(seed=3, depth=2, spread=0.3, layer=flows.AffineCoupling, one_pass=False):
    g = torch.Generator().manual_seed(seed)
    layers = [layer(2, (16,), generator=g) for _ in range(depth)]
    for last in (each.network[-1] for each in layers):
        torch.nn.init.normal_(last.weight, std=spread, generator=g)
        torch.nn.init.normal_(last.bias, std=spread / 2, generator=g)
    return flows.FlowEncoder(flows.StandardNormal(2), layers, one_pass=one_pass).double()


def crescent(z):
    return -(z[..., 0] ** 2 + (2 * z[..., 1] - z[..., 0] ** 2 + 1) ** 2) / 2


def draws(count=20):
    return torch.randn(5, count, 2, generator=torch.Generator().manual_seed(0), dtype=DTYPE)


def gradient(row, encoder, eps):
    encoder.zero_grad()
    x = X.expand(eps.shape[1], 1)
    objectives.backward(TABLEAU[row], Crescent(), encoder(x), x, eps)
    return torch.cat([p.grad.flatten() for p in encoder.parameters()])


def mean_gradient(sample_and_log_q, depth=2, log_p=None):
    encoder = make_flow(depth=depth)
    log_p = log_p or encoder(X).stop_gradient().log_prob
    z, log_q = sample_and_log_q(encoder(X), GRID)
    parts = torch.autograd.grad(WEIGHT @ (log_p(z) - log_q)[0], list(encoder.parameters()))
    return torch.cat([part.flatten() for part in parts])


def total(q, eps):
    return q.sample_and_log_prob(eps)


def stopped_copy(q, eps):
    z = q.sample(eps)
    return z, q.stop_gradient().log_prob(z)


def as_a_number(q, eps):
    z, log_q = q.sample_and_log_prob(eps)
    return z, log_q.detach()


def on_the_forward_pass(q, eps):
    z = q.base.sample(eps)
    log_q = q.base.log_prob(z)
    for live, still in zip(q.layers, q.stop_gradient().layers, strict=True):
        z, log_q = live(z)[0], log_q - still(z)[1]
    return z, log_q


def outputs_detached(q, eps):
    z = back = q.sample(eps)
    log_det = 0.0
    for layer in reversed(q.layers):
        moved, a = back.split(layer.sizes[::-1], -1)
        s, t = (out.detach() for out in layer.condition(a, None))
        back, log_det = torch.cat((a, (moved - t) / s.exp()), -1), log_det + s.sum(-1)
    return z, q.base.log_prob(back) - log_det


class NoLogDeterminant(flows.AffineCoupling):
    """The recursion without the slope of the log-determinant."""

    def push(self, z, force, context=None):
        fixed, _ = z.split(self.sizes, -1)
        moved, log_det, after = super().push(z, force, context)
        log_scale, _ = self.condition(fixed, context)
        (slope,) = torch.autograd.grad(log_scale.sum(), fixed, retain_graph=True)
        return moved, log_det, after + torch.cat((torch.zeros_like(slope), slope), -1)


class NotTransposed(flows.AffineCoupling):
    """The recursion with the diagonal of the Jacobian alone."""

    def push(self, z, force, context=None):
        fixed, _ = z.split(self.sizes, -1)
        log_scale, _ = self.condition(fixed, context)
        first, second = force.split(self.sizes, -1)
        (slope,) = torch.autograd.grad(log_scale.sum(), fixed, retain_graph=True)
        moved, log_det = self(z, context)
        return moved, log_det, torch.cat((second / log_scale.exp(), first - slope), -1).detach()


@pytest.mark.parametrize("layer", [NoLogDeterminant, NotTransposed])
def test_a_wrong_recursion_is_not_the_stopped_copy(layer):
    eps = draws()
    right = gradient("elbo-path", make_flow(), eps)
    checks.same(gradient("elbo-path", make_flow(one_pass=True), eps), right)
    with refused:
        checks.same(gradient("elbo-path", make_flow(layer=layer, one_pass=True), eps), right)


@pytest.mark.parametrize("row", ["elbo-path", "elbo-score", "iwae-dreg", "rws"])
def test_the_sign_of_the_first_order_term_matters(row, monkeypatch):
    eps = draws()
    right = gradient(row, make_flow(), eps)
    checks.same(gradient(row, make_flow(one_pass=True), eps), right)

    def mirrored(self, z):
        here, log_q, force = self.drawn
        return log_q + (force * (here - z)).sum(-1)

    monkeypatch.setattr(flows.OnePassFlow, "log_prob", mirrored)
    with refused:
        checks.same(gradient(row, make_flow(one_pass=True), eps), right)


def test_one_pass_knows_the_density_of_a_narrow_flow_too():
    """By the noise, and not by (z - mean) / std, of which single precision leaves nothing here."""
    layers = make_flow().float().layers
    base = DiagonalGaussian(torch.full((1, 2), 10.0, requires_grad=True), torch.full((1, 2), -14.0))
    flow, eps = flows.Flow(base, layers), draws(1).float()
    exact = flow.sample_and_log_prob(eps)[1]
    checks.same(flows.push(flow, eps).log_q, exact)
    with refused:
        checks.same(flow.log_prob(flow.sample(eps)), exact)


@pytest.mark.parametrize("wrong", [as_a_number, on_the_forward_pass, outputs_detached])
def test_wrong_ways_to_stop_a_flow_fail_the_check_at_the_target_and_away_from_it(wrong):
    checks.holds(mean_gradient(stopped_copy).norm() < 1e-12, "at the target")
    with refused:
        checks.holds(mean_gradient(wrong).norm() < 0.05, "at the target")
    truth = mean_gradient(total, log_p=crescent)
    right, off = ((mean_gradient(way, log_p=crescent) - truth).norm() for way in (stopped_copy, wrong))
    assert off > 100 * right


def test_detached_outputs_are_exact_for_one_layer_and_lose_the_zero_variance_of_two():
    checks.same(mean_gradient(outputs_detached, 1, crescent), mean_gradient(total, 1, crescent))
    encoder, eps = make_flow(), draws()[:, :1]
    log_p = encoder(X).stop_gradient().log_prob
    rows = {}
    for way in (stopped_copy, outputs_detached):
        z, log_q = way(encoder(X), eps)
        log_w = (log_p(z) - log_q).flatten()
        last = encoder.layers[0].network[-1].bias
        rows[way] = torch.stack([torch.autograd.grad(one, last, retain_graph=True)[0] for one in log_w])
    checks.no_variance(rows[stopped_copy])
    with refused:
        checks.no_variance(rows[outputs_detached])


def test_the_rank_one_correction_of_a_planar_layer_is_needed():
    class Uncorrected(flows.Planar):
        def push(self, z, force, context=None):
            moved, log_det = self(z)
            (slope,) = torch.autograd.grad(log_det.sum(), z, retain_graph=True)
            return moved, log_det, force - slope

    values = [torch.tensor(v, dtype=DTYPE) for v in ([1.0, 0.5], [0.6, -0.4], 0.1)]
    found = {}
    for layer in (flows.Planar, Uncorrected):
        encoder = flows.FlowEncoder(flows.StandardNormal(2), [layer(*(v.clone() for v in values))], one_pass=True)
        found[layer] = mean_of_path(encoder)
        z, log_q = encoder(X).flow.sample_and_log_prob(GRID)
        exact = torch.autograd.grad(WEIGHT @ (crescent(z) - log_q)[0], list(encoder.parameters()))
    truth = torch.cat([t.flatten() for t in exact])
    checks.same(found[flows.Planar], truth)
    with refused:
        checks.same(found[Uncorrected], truth)


def mean_of_path(encoder):
    x = X.expand(GRID.shape[1], 1)
    loss = TABLEAU["elbo-path"].loss(Crescent(), encoder(x), x, GRID)
    return torch.cat([g.flatten() for g in torch.autograd.grad(-WEIGHT @ loss, list(encoder.parameters()))])


class Crescent(torch.nn.Module):
    def forward(self, x, z):
        return crescent(z)


# --- the table of costs


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # it imports its neighbour
    spec = importlib.util.spec_from_file_location("benchmark_flows", ROOT / "benchmarks" / "flows.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "benchmarks"))
    return module


def test_the_stored_table_has_every_method_at_every_depth(benchmark):
    with open(ROOT / "results" / "benchmark-flows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    measured = {(row["method"], int(row["depth"])) for row in rows}
    assert measured == {(method, depth) for method in benchmark.METHODS for depth in (2, 4, 8, 16)}


def test_memory_is_counted_once_a_storage_and_given_back(benchmark):
    graph = benchmark.Graph(exempt=set())
    x = torch.ones(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(graph.pack, lambda kept: kept.tensor):
        y = x.exp()  # keeps its result
        z = y * y  # keeps it twice more
        assert graph.bytes == graph.peak == 4000
        z.sum().backward()
        del y, z
    assert (graph.bytes, graph.peak) == (0, 4000)


def test_memory_of_the_stopped_copy_is_that_of_two_graphs(benchmark):
    """Exact, so on any machine: the networks' activations twice for the copy, once for the recursion."""
    eps = torch.randn(64, 1, benchmark.DIM, generator=torch.Generator().manual_seed(0))
    kept = {}
    for name, (take, one_pass) in benchmark.METHODS.items():
        encoder = benchmark.make_encoder(4, 64, one_pass)
        kept[name] = benchmark.megabytes(lambda t=take, e=encoder: t(e, torch.zeros(1, 1), eps), encoder)
    assert kept["path, stopped copy"] > 1.8 * kept["total"] > 1.5 * kept["path, one pass"]
