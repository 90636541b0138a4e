"""Holding the parameters constant: true or refused, wherever they are kept; and q must be one function.

The probe is the gradient itself: for every way to keep a network inside q, a step is that of the same network kept
plainly, or an InputError.
"""

import functools
import types
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from toys import DTYPE

from vaelib import evaluation, models, objectives
from vaelib.errors import InputError
from vaelib.estimators import ESTIMATORS, TABLEAU
from vaelib.flows import FlowEncoder
from vaelib.posteriors import DiagonalGaussian, FactorisedBernoulli, HierarchicalGaussian, stop_gradient, undisturbed

ROWS = pytest.mark.parametrize("row", TABLEAU.values(), ids=lambda row: row.name)
X = torch.linspace(-1, 1, 4, dtype=DTYPE).unsqueeze(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed=1):
    return models.GaussianMLP((3, 5), 2, seeded(seed)).double()


def joint(x, z):
    return -0.5 * sum((layer - x).square().sum(-1) for layer in z) - (z[0].sum(-1) - z[1].sum(-1)).square()


def gradient(row, layer, parameters, engine="loss"):
    """Return a step's gradient in the first layer's numbers and in the parameters of the layer above."""
    first = DiagonalGaussian(*(torch.randn(4, 3, generator=seeded(2), dtype=DTYPE).requires_grad_() for _ in range(2)))
    q = HierarchicalGaussian(first, (layer,))
    eps = (
        torch.randn(3, 4, 3, generator=seeded(3), dtype=DTYPE),
        torch.randn(3, 4, 2, generator=seeded(4), dtype=DTYPE),
    )
    loss = getattr(TABLEAU[row], engine)(joint, q, X, eps).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [first.mean, first.log_std, *parameters])])


# --- ways to keep a network: stopped, or refused ----------------------------------------------------------------------


class Held(nn.Module):
    """A network kept by ``keep`` and called by ``call``."""

    def __init__(self, kept, call):
        super().__init__()
        self.kept, self.call = kept, call

    def forward(self, z):
        return self.call(self.kept, z)


class Pair(NamedTuple):
    net: nn.Module
    other: int


@dataclass
class Record:
    net: nn.Module


class Plain:
    """An object of no class that torch knows."""

    def __init__(self, net):
        self.net = net

    def __call__(self, z):
        return self.net(z)


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net


class Loose(nn.Module):
    """Weights that are plain tensors, registered nowhere."""

    def __init__(self, net, keep):
        super().__init__()
        self.weights = keep([net.mean.weight, net.mean.bias, net.log_std.weight, net.log_std.bias])
        self.hidden = net.hidden

    def forward(self, z):
        weights = self.weights
        while not isinstance(weights, list | tuple):
            weights = list(weights.values()) if isinstance(weights, dict) else weights.net
        hidden = self.hidden(z)
        return DiagonalGaussian(hidden @ weights[0].mT + weights[1], hidden @ weights[2].mT + weights[3])


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


def bound_to_another(net):
    shell = nn.Module()
    shell.forward = net.forward
    return shell


def rebound(net):
    """Its forward replaced by a method bound to itself, as quantisers and offloaders do."""
    old = type(net).forward
    net.forward = types.MethodType(lambda self, z: old(self, z), net)
    return net


def forward_compiled(net):
    net.forward = torch.compile(net.forward, backend="eager")
    return net


def shell(function):
    module = nn.Module()
    module.forward = function
    return module


def hooked(net):
    """A hook that adds what only the hook can see."""
    net.register_forward_hook(lambda module, args, out: DiagonalGaussian(out.mean + net.mean.bias, out.log_std))
    return net


def wrapped(net):
    return functools.wraps(net.forward)(lambda z: net(z))


TRUE = {
    "plain": lambda net: net,
    "torch.compile": lambda net: torch.compile(net, backend="eager"),
    "compiled twice": lambda net: torch.compile(torch.compile(net, backend="eager"), backend="eager"),
    "compile()": compiled_in_place,
    "inside compiled": lambda net: Held(torch.compile(net, backend="eager"), lambda kept, z: kept(z)),
    "forward of another": bound_to_another,
    "forward rebound": rebound,
    "forward compiled": forward_compiled,
    "a bound method": lambda net: net.forward,
    "a compiled function of a method": lambda net: torch.compile(net.forward, backend="eager"),
    "list": lambda net: Held([net], lambda kept, z: kept[0](z)),
    "tuple": lambda net: Held((net, None), lambda kept, z: kept[0](z)),
    "named tuple": lambda net: Held(Pair(net, 1), lambda kept, z: kept.net(z)),
    "dict": lambda net: Held({"a": net}, lambda kept, z: kept["a"](z)),
    "ordered dict": lambda net: Held(OrderedDict(a=net), lambda kept, z: kept["a"](z)),
    "list in a dict in a tuple": lambda net: Held(({"a": [net]},), lambda kept, z: kept[0]["a"][0](z)),
    "dataclass": lambda net: Held(Record(net), lambda kept, z: kept.net(z)),
    "partial of the module": lambda net: functools.partial(net),
    "partial of a function": lambda net: functools.partial(lambda net, z: net(z), net),
    "partial with keywords": lambda net: Held(functools.partial(lambda z, n: n(z), n=net), lambda kept, z: kept(z)),
    "partial of a partial": lambda net: functools.partial(functools.partial(lambda a, z: a[0](z), [net])),
    "a list of methods": lambda net: Held([net.forward], lambda kept, z: kept[0](z)),
    "loose tensors": lambda net: Loose(net, list),
    "loose tensors in a dict": lambda net: Loose(net, lambda ws: dict(enumerate(ws))),
    "Sequential of itself": lambda net: nn.Sequential(nn.Identity(), net),
    "twice the same": lambda net: Held([net, net], lambda kept, z: kept[0](z) if kept[0] is kept[1] else None),
}
REFUSED = {
    "lambda": lambda net: lambda z: net(z),
    "closure as forward": lambda net: shell(lambda z: net(z)),
    "wrapped function": wrapped,
    "closure in a list": lambda net: Held([lambda z: net(z)], lambda kept, z: kept[0](z)),
    "closure in a partial": lambda net: functools.partial(lambda f, z: f(z), lambda z: net(z)),
    "compiled closure": lambda net: torch.compile(lambda z: net(z), backend="eager"),
    "forward hook": hooked,
}
EITHER = {
    "an object": Plain,
    "an object in a module": lambda net: Held(Plain(net), lambda kept, z: kept.net(z)),
    "an object with slots": lambda net: Held(Slotted(net), lambda kept, z: kept.net(z)),
    "set": lambda net: Held({net}, lambda kept, z: next(iter(kept))(z)),
    "loose tensors in an object": lambda net: Loose(net, Plain),
}


@pytest.mark.parametrize("row", ["elbo-path", "iwae-dreg", "elbo-score"])
@pytest.mark.parametrize("way", [*TRUE, *REFUSED, *EITHER])
def test_stopped_is_true_or_refused(way, row):
    plain = network()
    parameters = list(plain.parameters())
    truth = gradient(row, plain, parameters)
    net = network()
    parameters = list(net.parameters())
    layer = (TRUE | REFUSED | EITHER)[way](net)
    for engine in ("loss", "reference_loss"):
        try:
            found = gradient(row, layer, parameters, engine)
        except InputError as error:
            assert way not in TRUE and "a way to its parameters" in str(error)
        else:
            assert way not in REFUSED
            torch.testing.assert_close(found, truth)


def test_the_probe_sees_a_layer_that_is_not_stopped():
    """The negative control: live weights in the stopped density change the gradient of these rows, all of it."""

    class Live(HierarchicalGaussian):
        def stop_gradient(self):
            return self

    net = network()
    for row in ("elbo-path", "iwae-dreg"):
        first = DiagonalGaussian(*(torch.randn(4, 3, generator=seeded(2), dtype=DTYPE).requires_grad_() for _ in "ab"))
        eps = tuple(torch.randn(3, 4, d, generator=seeded(3), dtype=DTYPE) for d in (3, 2))
        right, wrong = (
            torch.autograd.grad(TABLEAU[row].differentiate(joint, q, X, eps).mean(), net.mean.bias)[0]
            for q in (HierarchicalGaussian(first, (net,)), Live(first, (net,)))
        )
        assert (right - wrong).norm() > 0.05 * right.norm()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_closure_is_refused_at_every_depth(depth):
    """...also where the layers below and above it are as they should be."""
    nets = [models.GaussianMLP((2, 4), 2, seeded(i)).double() for i in range(3)]
    layers = [*nets]
    layers[depth - 1] = lambda z: nets[depth - 1](z)
    first = DiagonalGaussian(*(torch.zeros(4, 2, dtype=DTYPE, requires_grad=True) for _ in range(2)))
    q = HierarchicalGaussian(first, tuple(layers))
    eps = q.noise(3, seeded())
    with pytest.raises(InputError, match="a way to its parameters"):
        TABLEAU["elbo-path"].loss(lambda x, z: -sum(part.square().sum(-1) for part in z), q, X, eps)


def test_a_layer_that_was_tried_is_tried_again_when_another_takes_its_place():
    """The first layer is an old acquaintance, the second of the same class, with another inside."""
    lower, upper = (models.GaussianMLP((2, 4), 2, seeded(i)).double() for i in range(2))
    first = DiagonalGaussian(*(torch.zeros(4, 2, dtype=DTYPE, requires_grad=True) for _ in range(2)))
    target = lambda x, z: -sum(part.square().sum(-1) for part in z)  # noqa: E731

    def loss(above):
        q = HierarchicalGaussian(first, above)
        return TABLEAU["elbo-path"].loss(target, q, X, q.noise(3, seeded()))

    class Wrapper(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, z):
            return self.function(z)

    loss((lower, Wrapper(upper.forward)))
    with pytest.raises(InputError, match="a way to its parameters"):
        loss((lower, Wrapper(lambda z: upper(z))))


@pytest.mark.parametrize("wrap", ["compile(joint)", "joint.compile()", "joint in a list"])
@ROWS
def test_a_stopped_joint_is_stopped_however_it_is_kept(row, wrap):
    """The reference form stops the joint; the gradients are those of the plain one."""

    class Shell(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = [inner]
            self.parameters_of = list(inner.parameters())

        def forward(self, x, z):
            return self.inner[0](x, z)

    def step(keep):
        model = models.build("mlp-1", 6, generator=seeded(), hidden=5, latent=2).double()
        x = torch.ones(3, 6, dtype=DTYPE)
        eps = model.encoder(x).noise(4, seeded(1))
        loss = objectives.reference(row, keep(model.joint), model.encoder(x), x, eps).mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    keep = {
        "compile(joint)": lambda j: torch.compile(j, backend="eager"),
        "joint.compile()": compiled_in_place,
        "joint in a list": Shell,
    }[wrap]
    torch.testing.assert_close(step(keep), step(lambda j: j))


# --- the stopped module -----------------------------------------------------------------------------------------------


class Statistics(nn.Module):
    """A layer above with a batch norm in it, which counts its calls."""

    def __init__(self):
        super().__init__()
        self.norm, self.net = nn.BatchNorm1d(3).double(), network()

    def forward(self, z):
        return self.net(self.norm(z.reshape(-1, 3)).reshape(z.shape))


@ROWS
def test_statistics_move_no_more_than_by_the_passes_of_the_live_network(row):
    """The running mean after a step is the one after sampling once (rows with a path) or evaluating q once more."""
    layer = Statistics()
    gradient(row.name, layer, list(layer.parameters()))
    assert layer.norm.num_batches_tracked == (1 if row.automatic or row.example.score is None else 2)


def test_stop_gradient_follows_the_values_and_stops_the_parameters():
    lstm = torch.nn.LSTM(3, 4, batch_first=True)
    for module, x in [
        (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)), torch.randn(5, 3)),
        (torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 4)), torch.randn(5, 3)),
        (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)), torch.randn(5, 3)),
        (lstm, torch.randn(5, 2, 3)),
    ]:
        x.requires_grad_()
        stopped = stop_gradient(module)
        first = (lambda out: out[0] if isinstance(out, tuple) else out)(stopped(x)).sum()
        (gradient,) = torch.autograd.grad(first, x, retain_graph=True)
        assert gradient.shape == x.shape
        assert all(g is None for g in torch.autograd.grad(first, list(module.parameters()), allow_unused=True))
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.5)
        outputs = [
            (lambda out: out[0] if isinstance(out, tuple) else out)(m(x)) for m in (stop_gradient(module), module)
        ]
        torch.testing.assert_close(*outputs)


def test_stop_gradient_leaves_running_statistics_alone():
    norm = torch.nn.BatchNorm1d(4)
    stop_gradient(norm)(torch.randn(6, 4))
    assert norm.num_batches_tracked == 0 and (norm.running_mean == 0).all()


def test_stop_gradient_leaves_the_module_and_what_it_holds_as_they_were():
    inner = nn.Linear(2, 2)
    module = Held([inner, {"a": inner.weight}], lambda kept, z: kept[0](z))
    before = dict(module.__dict__)
    stopped = stop_gradient(module)
    assert module.__dict__ == before and module.kept[0] is inner and module.kept[1]["a"] is inner.weight
    assert stopped.kept[0] is not inner and not stopped.kept[1]["a"].requires_grad
    assert stopped.kept[0].weight is stopped.kept[1]["a"]  # shared before, shared after
    assert stopped.kept[0].weight.data_ptr() == inner.weight.data_ptr()


def test_stop_gradient_of_a_shared_module_stays_shared():
    shared = torch.nn.Linear(3, 3)
    stopped = stop_gradient(torch.nn.Sequential(shared, torch.nn.Tanh(), shared))
    assert stopped[0] is stopped[2]


def test_a_scripted_module_is_refused():
    with pytest.raises(InputError, match="a scripted module cannot be held constant"):
        stop_gradient(torch.jit.script(nn.Linear(2, 2)))


def test_stopping_on_purpose_where_it_should_not_is_let_through():
    model = models.build("mlp-2-detached", 6, generator=seeded(), hidden=5, latent=3, hidden2=4, latent2=2)
    x = torch.ones(2, 6)
    eps = model.encoder(x).noise(2, seeded())
    assert TABLEAU["elbo-path"].loss(model.joint, model.encoder(x), x, eps).isfinite().all()

    class Detaching(HierarchicalGaussian):
        """As the paper's code, but without saying so."""

        def stop_gradient(self):
            return replace(
                self, first=self.first.stop_gradient(), above=tuple(map(models.encoders.DetachedOutput, self.above))
            )

    q = model.encoder(x)
    with pytest.raises(InputError, match="stop_gradient makes another function of z of this Detaching"):
        TABLEAU["elbo-path"].loss(model.joint, Detaching(q.first, q.above), x, eps)


# --- random layers ----------------------------------------------------------------------------------------------------


class Jitter(nn.Module):
    """A noise layer of somebody's own, active in evaluation mode too."""

    def forward(self, z):
        return z + 0.1 * torch.randn_like(z)


RANDOM = {
    "dropout": lambda: nn.Dropout(0.5),
    "a little dropout": lambda: nn.Dropout(0.05),
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
    "feature dropout": lambda: nn.Dropout1d(0.5),
    "RReLU": lambda: nn.RReLU(-2.0, 2.0),
    "jitter": Jitter,
}


def second_layer(random):
    model = models.build("mlp-2", 6, generator=seeded(), hidden=5, latent=3, hidden2=16, latent2=2)
    model.encoder.above[0].hidden.insert(0, random)
    return model


def fourth_layer(random):
    model = models.build("mlp-4", 6, generator=seeded(), hidden=5, latent=16, hidden2=16)
    model.encoder.above[2].hidden.insert(1, random)
    return model


def coupling(random, one_pass=False):
    model = models.build("mlp-1", 6, generator=seeded(), hidden=5, latent=4)
    sizes = {"hidden": 5, "latent": 4, "layers": 2, "flow_hidden": 16}
    layers = models.build("mlp-1-flow", 6, generator=seeded(), **sizes).encoder.layers
    for layer in layers:
        nn.init.normal_(layer.network[-1].weight, 0, 0.5, generator=seeded(4))
        layer.network.insert(1, random)
    model.encoder = FlowEncoder(model.encoder, layers, conditional=True, one_pass=one_pass)
    return model


PLACES = {
    "the second layer": second_layer,
    "the fourth layer": fourth_layer,
    "a coupling": coupling,
    "a coupling, one pass": lambda random: coupling(random, one_pass=True),
}


def test_a_random_layer_that_is_rarely_seen_is_found_all_the_same():
    """One draw of one observation meets a dropout of 0.1 before one number once in five times."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = models.build("mlp-2", 6, generator=seeded(), hidden=5, latent=1, hidden2=4, latent2=2)
        model.encoder.above[0].hidden.insert(0, nn.Dropout(0.1))
        x = torch.ones(1, 6)
        q = model.encoder(x)
        with pytest.raises(InputError, match="another one each time"):
            TABLEAU["elbo-path"].loss(model.joint, q, x, q.noise(1, seeded(1)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_layer_inside_q_is_refused_in_every_row(place, kind):
    model, x = PLACES[place](RANDOM[kind]()), torch.ones(4, 6)
    for row in TABLEAU.values():
        q = model.encoder(x)
        eps = q.noise(2, seeded(1))
        for engine in (objectives.backward, objectives.reference):
            with pytest.raises(InputError, match="another one each time"):
                engine(row, model.joint, q, x, eps)


@pytest.mark.parametrize("place", PLACES)
def test_in_evaluation_mode_dropout_is_no_random_layer_but_jitter_is(place):
    x = torch.ones(4, 6)
    quiet, loud = PLACES[place](nn.Dropout(0.5)).eval(), PLACES[place](Jitter()).eval()
    for model in (quiet, loud):
        q = model.encoder(x)
        eps = q.noise(2, seeded(1))
        if model is quiet:
            assert TABLEAU["iwae-dreg"].loss(model.joint, q, x, eps).isfinite().all()
            assert evaluation.log_likelihood(model.train(), x, 10, 5).isfinite().all()
        else:
            with pytest.raises(InputError, match="another one each time"):
                TABLEAU["iwae-dreg"].loss(model.joint, q, x, eps)
            with pytest.raises(InputError, match="another one each time"):
                evaluation.log_likelihood(model, x, 10, 5)


def test_a_layer_that_becomes_random_is_tried_again():
    """Training mode switched on after a trial in evaluation mode, a rate raised, a layer put in."""
    dropout = nn.Dropout(0.0)
    model, x = second_layer(dropout), torch.ones(4, 6)

    def loss():
        q = model.encoder(x)
        return TABLEAU["elbo-total"].loss(model.joint, q, x, q.noise(2, seeded(1)))

    loss()
    dropout.p = 0.5
    with pytest.raises(InputError, match="another one each time"):
        loss()
    model.eval()
    loss()
    model.train()
    with pytest.raises(InputError, match="another one each time"):
        loss()
    dropout.p = 0.0
    loss()
    model.encoder.above[0].hidden.append(nn.Dropout(0.5))
    with pytest.raises(InputError, match="another one each time"):
        loss()


@ROWS
def test_dropout_before_the_parameters_of_q_is_no_fault(row):
    """It makes another q for each step, but each is one function."""
    model, x = models.build("mlp-1", 6, generator=seeded(), hidden=5, latent=3), torch.ones(4, 6)
    model.encoder.hidden.append(nn.Dropout(0.5))
    torch.manual_seed(3)
    q = model.encoder(x)
    eps = q.noise(3, seeded(1))
    value = objectives.backward(row, model.joint, q, x, eps)
    with torch.no_grad():
        torch.testing.assert_close(value, row.value(model.joint(x, q.sample(eps)) - q.log_prob(q.sample(eps))))


@ROWS
def test_a_posterior_with_networks_has_its_loss_in_inference_mode(row):
    model, x = models.build("mlp-1-flow", 6, generator=seeded(), hidden=5, latent=3), torch.ones(4, 6)
    losses = []
    for mode in (torch.inference_mode, torch.no_grad):  # the first is that of the trial
        with mode():
            q = model.encoder(x)
            losses.append(row.loss(model.joint, q, x, q.noise(3, seeded(1))).clone())
    torch.testing.assert_close(*losses)


def test_a_trial_leaves_torch_s_generator_and_the_statistics_as_they_were():
    layer = Statistics()
    state = torch.random.get_rng_state()
    gradient("elbo-path", layer, list(layer.parameters()))
    assert torch.equal(state, torch.random.get_rng_state())
    counted = layer.norm.num_batches_tracked.clone()
    layer.net.hidden.append(Jitter())
    with pytest.raises(InputError, match="another one each time"):
        gradient("elbo-path", layer, list(layer.parameters()))
    assert torch.equal(state, torch.random.get_rng_state()) and layer.norm.num_batches_tracked == counted


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("evaluating", [False, True])
def test_a_trial_calls_modules_on_copies_of_their_buffers(evaluating, scripted):
    """A graph that holds a buffer can still be differentiated, whatever the trial's calls write to it."""
    norm = nn.BatchNorm1d(2)
    norm = torch.jit.script(norm) if scripted else norm
    z, graph = torch.ones(3, 2), (torch.ones(2, requires_grad=True) * norm.running_mean).sum()
    with pytest.raises(ZeroDivisionError), undisturbed([norm, norm], z.device, evaluating):
        assert norm.training is not evaluating
        norm.eval()
        norm.running_mean.add_(norm(z).sum() + torch.rand(()))
        1 / 0
    assert norm.training and not norm.running_mean.any()
    graph.backward()


def test_a_trial_leaves_buffers_that_are_filled_shared_or_reached_another_way():
    """One that is None until a call fills it, one of two modules, one in a list beside; and a new one is taken away."""

    class Counting(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.register_buffer("cache", None)
            self.register_buffer("count", shared)
            self.kept = [torch.zeros(())]
            self.register_buffer("inside", self.kept[0])

        def forward(self):
            self.cache = torch.ones(())
            self.count += 1
            self.kept[0].add_(1)
            self.register_buffer("late", torch.ones(()))
            return self.count

    shared = torch.zeros(())
    one, other = Counting(shared), Counting(shared)
    with undisturbed([one, other], shared.device):
        assert one() == 1 and other() == 2
    assert one.cache is None and one.count is shared and other.count is shared and not hasattr(one, "late")
    assert shared == 0 and one.kept[0] == 0 and one.inside is one.kept[0]


def test_a_user_s_own_error_reaches_them_as_it_is():
    class Fault(RuntimeError):
        pass

    class Faulty(nn.Module):
        def forward(self, z):
            raise Fault("mine")

    with pytest.raises(Fault, match="mine"):
        gradient("elbo-path", Faulty(), [])


def test_estimators_beside_the_tableau_refuse_random_layers_too():
    """They go the same way: whatever is asked of a posterior is asked of theirs."""

    class Bits(FactorisedBernoulli):
        def log_prob(self, z):
            return super().log_prob(z) + 0.1 * torch.randn(())

    q = Bits(torch.zeros(3, 2, requires_grad=True))
    for name in ("elbo-arm", "elbo-disarm", "elbo-exact", "elbo-score-loo"):
        with pytest.raises(InputError, match="another one each time"):
            ESTIMATORS[name].loss(lambda x, z: z.sum(-1), q, torch.ones(3, 1), q.noise(4, seeded()))
