r"""Normalizing flows as posteriors: a Gaussian bent by invertible layers, and the gradient of its log-density for free.

A flow draws :math:`z_0` from a Gaussian and sends it through invertible layers, :math:`z_\ell = T_\ell(z_{\ell-1})`;
the density follows from the Jacobians :math:`J_\ell = \partial z_\ell / \partial z_{\ell-1}`:

.. math:: \log q_\ell(z_\ell) = \log q_{\ell-1}(z_{\ell-1}) - \log |\det J_\ell|

A path gradient wants the *force* :math:`F_\ell = \partial_{z_\ell} \log q_\ell(z_\ell)` at the end of the chain, with
the parameters held still. There are two ways to it, one posterior each:

* :class:`Flow` inverts a stopped copy of the layers, and lets automatic differentiation do the rest;
* :class:`OnePassFlow` carries the force along with the sample (Vaitl et al. 2024),

.. math:: F_\ell = J_\ell^{-\top} \left(F_{\ell-1} - \partial_{z_{\ell-1}} \log|\det J_\ell|\right)

which needs no inverse of the layers and a product with :math:`J_\ell^{-\top}` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaelib.errors import InputError
from vaelib.layers import tanh_layers
from vaelib.posteriors import DiagonalGaussian, Noise, Posterior, stop_gradient


class Layer(nn.Module):
    """An invertible map of z ``[K, B, D]``, perhaps another one for each observation's context ``[B, C]``.

    A layer defines ``forward``, and ``inverse`` or ``push`` or both; all logarithms of determinants are ``[K, B]``.
    """

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Return :math:`T(z)` and :math:`\log|\det J|` at z."""
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Return :math:`T^{-1}(z)` and :math:`\log|\det J|` of T there.

        Raises
        ------
        InputError
            if the layer has no inverse in closed form.
        """
        raise InputError(
            f"a {type(self).__name__} layer has no inverse in closed form, so log q of a given z cannot be evaluated: "
            "build the encoder with one_pass=True, which carries log q and its gradient along with the sample and "
            "serves every estimator, or differentiate Flow.sample_and_log_prob, which is elbo-total"
        )

    def push(self, z: Tensor, force: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`T(z)`, :math:`\log|\det J|` and the force behind the layer, given the one before it.

        z must be part of a graph; the new force is not.

        Raises
        ------
        InputError
            if the layer cannot carry the force.
        """
        raise InputError(
            f"a {type(self).__name__} layer does not say how it carries the force (method 'push'): "
            "build the encoder with one_pass=False, which inverts the layers"
        )


class AffineCoupling(Layer):
    r"""One half of z scales and shifts the other (Dinh et al. 2017), and the halves change places.

    .. math:: T(z^a, z^b) = (z^b e^{s(z^a)} + t(z^a),\; z^a), \qquad \log|\det J| = \sum_d s_d(z^a)

    s and t come from a network with tanh layers, s softly bounded to keep :math:`e^s` between
    :math:`e^{-2}` and :math:`e^2`. The last layer starts at zero, and T as a mere exchange of the halves.
    Introduced in book/07-flows.ipynb.

    Parameters
    ----------
    dim
        D, at least 2.
    hidden
        the widths of the network's hidden layers.
    context_dim
        C, the width of the context; 0 for none.
    generator
        draws the initial weights.

    Raises
    ------
    InputError
        if ``dim`` is below 2.
    """

    bound = 2.0

    def __init__(
        self, dim: int, hidden: Iterable[int] = (32,), context_dim: int = 0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if dim < 2:
            raise InputError(f"a coupling layer needs at least 2 dimensions, one half to move the other, but has {dim}")
        self.sizes = [dim - dim // 2, dim // 2]
        widths = [self.sizes[0] + context_dim, *hidden]
        last = nn.utils.skip_init(nn.Linear, widths[-1], 2 * self.sizes[1])
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.network = tanh_layers(widths, generator).append(last)

    def condition(self, fixed: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return s and t, ``[K, B, D / 2]`` each."""
        if context is not None:
            fixed = torch.cat((fixed, context.expand(*fixed.shape[:-1], -1)), -1)
        raw, shift = self.network(fixed).chunk(2, -1)
        return self.bound * torch.tanh(raw / self.bound), shift

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        fixed, moved = z.split(self.sizes, -1)
        log_scale, shift = self.condition(fixed, context)
        return torch.cat((moved * log_scale.exp() + shift, fixed), -1), log_scale.sum(-1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        moved, fixed = z.split(self.sizes[::-1], -1)
        log_scale, shift = self.condition(fixed, context)
        return torch.cat((fixed, (moved - shift) * (-log_scale).exp()), -1), log_scale.sum(-1)

    def push(self, z: Tensor, force: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return the force on the other side of the layer: :math:`F^b e^{-s} =: G` for the half that moved.

        For the other half it is :math:`F^a - \partial_{z^a}[\sum s + G \cdot T^b]`.
        """
        fixed, moved = z.split(self.sizes, -1)
        log_scale, shift = self.condition(fixed, context)
        scaled = moved * log_scale.exp()
        with torch.no_grad():
            force_fixed, force_moved = force.split(self.sizes, -1)
            force_moved = force_moved * (-log_scale).exp()
            (pulled,) = torch.autograd.grad(
                (log_scale, shift), fixed, (1 + force_moved * scaled, force_moved), retain_graph=True
            )
            force = torch.cat((force_moved, force_fixed - pulled), -1)
        return torch.cat((scaled + shift, fixed), -1), log_scale.sum(-1), force


class SinhArcsinh(Layer):
    r"""A skewed and stretched coordinate with an exact inverse (Jones and Pewsey 2009), each dimension on its own.

    .. math:: T(z) = \mu + \sigma \sinh\left(\tau\,(\operatorname{arcsinh} z + \alpha)\right)

    With :math:`\alpha = 0` and :math:`\tau = 1` it is affine; :math:`\alpha` skews, and :math:`\tau` > 1 makes the
    tails heavier than the Gaussian's. The toy of one dimension. Introduced in book/07-flows.ipynb.

    Parameters
    ----------
    mean, log_std, skew, log_tail
        :math:`\mu, \log\sigma, \alpha, \log\tau`, each ``[D]``.
    """

    def __init__(self, mean: Tensor, log_std: Tensor, skew: Tensor, log_tail: Tensor) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(mean), nn.Parameter(log_std)
        self.skew, self.log_tail = nn.Parameter(skew), nn.Parameter(log_tail)

    def log_diagonal(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log \partial T_d / \partial z_d`, ``[K, B, D]``."""
        angle = self.log_tail.exp() * (z.asinh() + self.skew)
        return self.log_std + self.log_tail + angle.cosh().log() - 0.5 * z.square().log1p()

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bent = (self.log_tail.exp() * (z.asinh() + self.skew)).sinh()
        return self.mean + self.log_std.exp() * bent, self.log_diagonal(z).sum(-1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bent = (z - self.mean) * (-self.log_std).exp()
        z = ((-self.log_tail).exp() * bent.asinh() - self.skew).sinh()
        return z, self.log_diagonal(z).sum(-1)

    def push(self, z: Tensor, force: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """J is diagonal: subtract the slope of its logarithm, and divide."""
        moved, log_det = self(z)
        log_diagonal = self.log_diagonal(z)
        (slope,) = torch.autograd.grad(log_diagonal.sum(), z, retain_graph=True)
        return moved, log_det, (force - slope) * (-log_diagonal.detach()).exp()


class Planar(Layer):
    r"""A plane that pushes (Rezende and Mohamed 2015): invertible, but its inverse has no closed form.

    .. math:: T(z) = z + u \tanh(w^\top z + b), \qquad J = I + h\, u w^\top, \quad h = 1 - \tanh^2(w^\top z + b)

    u is bent so that :math:`w^\top u > -1`, which makes T invertible. :math:`J^{-\top}` is a correction of rank one
    (Sherman and Morrison), so the force passes where no inverse does. Introduced in book/07-flows.ipynb.

    Parameters
    ----------
    direction, normal, bias
        the raw u ``[D]``, w ``[D]`` and b ``[]``.
    """

    def __init__(self, direction: Tensor, normal: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.direction, self.normal, self.bias = nn.Parameter(direction), nn.Parameter(normal), nn.Parameter(bias)

    def bent_direction(self) -> Tensor:
        r"""Return u with :math:`w^\top u > -1`, ``[D]``."""
        along = self.normal @ self.direction
        wanted = nn.functional.softplus(along) - 1
        return self.direction + (wanted - along) * self.normal / self.normal.square().sum()

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, wave = self.bent_direction(), torch.tanh(z @ self.normal + self.bias)
        return z + u * wave.unsqueeze(-1), torch.log1p((1 - wave.square()) * (self.normal @ u))

    def push(self, z: Tensor, force: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        r"""Solve :math:`(I + h\, w u^\top) F' = F - \partial_z \log|\det J|` by a correction of rank one."""
        moved, log_det = self(z)
        (slope,) = torch.autograd.grad(log_det.sum(), z, retain_graph=True)
        with torch.no_grad():
            u, right = self.bent_direction(), force - slope
            h = 1 - torch.tanh(z @ self.normal + self.bias).square()
            share = h * (right @ u) / log_det.exp()
            return moved, log_det, right - share.unsqueeze(-1) * self.normal


@dataclass(frozen=True)
class Flow(Posterior):
    r"""The density of :math:`z_L = T_L \circ \dots \circ T_1(z_0)` with a Gaussian start.

    The start is :math:`z_0 \sim \mathcal N(\mu, \operatorname{diag} \sigma^2)`. A posterior like those of
    :mod:`vaelib.posteriors`: the stopped copy holds the parameters of the Gaussian and of all layers constant, and
    evaluates a sample by inverting them, so that the gradient in z passes through every intermediate :math:`z_\ell`.
    Its layers are modules: under ``torch.func.functional_call``, use it inside the call, or it sees the parameters it
    had before. Introduced in book/07-flows.ipynb.

    Parameters
    ----------
    base
        the Gaussian of :math:`z_0`, ``[B, D]``.
    layers
        a ``nn.ModuleList`` of :class:`Layer`, the first applied first.
    context
        what the layers may see of x, ``[B, C]``, or None. It depends on x alone, so its *value* may be stopped.
    """

    base: DiagonalGaussian
    layers: nn.ModuleList
    context: Tensor | None = None

    def noise_like(self, k: int) -> Noise:
        """Return standard normal noise, ``[K, B, D]``."""
        return self.base.noise_like(k)

    def means(self) -> tuple[Tensor, ...]:
        """Return where the mean of the Gaussian ends, which stands for the mean: that of q has no closed form."""
        return (self.sample(torch.zeros_like(self.base.mean).unsqueeze(0))[0],)

    def sample(self, eps: Tensor) -> Tensor:
        r"""Return :math:`z_L`, ``[K, B, D]``."""
        return self.sample_and_log_prob(eps)[0]

    def sample_and_log_prob(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`z_L` and :math:`\log q(z_L)` from one forward pass; its gradient is the total derivative."""
        z, log_q = self.base.sample_and_log_prob(eps)
        for layer in self.layers:
            z, log_det = layer(z, self.context)
            log_q = log_q - log_det
        return z, log_q

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log q(z) = \log q_0(z_0) - \sum_\ell \log|\det J_\ell|`, ``[K, B]``; inverts the layers."""
        start, log_det = self.inverse(z)
        return self.base.log_prob(start) - log_det

    def log_prob_of_sample(self, z: Tensor, eps: Tensor) -> Tensor:
        """As :meth:`log_prob`; the Gaussian knows its part by the noise, to which the inverse gives the derivative."""
        start, log_det = self.inverse(z)
        start = self.base.stop_gradient().sample(eps) + (start - start.detach())
        return self.base.log_prob_of_sample(start, eps) - log_det

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`z_0` and :math:`\sum_\ell \log|\det J_\ell|`, by inverting the layers."""
        log_det = z.new_zeros(())
        for layer in reversed(self.layers):
            z, one = layer.inverse(z, self.context)
            log_det = log_det + one
        return z, log_det

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> Flow:
        """As for every posterior: the parameters of the Gaussian, and the context; the layers are as they were."""
        context = None if self.context is None else function(self.context)
        return replace(self, base=self.base.map_parameters(function), context=context)

    def stop_gradient(self) -> Flow:
        """Return the same flow with the parameters of the Gaussian and of every layer held constant."""
        context = None if self.context is None else self.context.detach()
        return replace(self, base=self.base.stop_gradient(), layers=stop_gradient(self.layers), context=context)


class Drawn(NamedTuple):
    """A sample ``[K, B, D]`` and its log-density ``[K, B]``, differentiable in phi, and the force ``[K, B, D]``."""

    z: Tensor
    log_q: Tensor
    force: Tensor


def push(flow: Flow, eps: Tensor) -> Drawn:
    r"""Send noise through the flow together with its log-density and the force, in one pass (Vaitl et al. 2024).

    It starts from :math:`F_0 = -(z_0 - \mu) / \sigma^2 = -\varepsilon / \sigma`. Introduced in book/07-flows.ipynb.
    """
    z, log_q = flow.base.sample_and_log_prob(eps)
    if not z.requires_grad:
        z.requires_grad_()  # a Gaussian without parameters; the layers' slopes in z are wanted all the same
    force = (-eps * (-flow.base.log_std).exp()).detach()
    for layer in flow.layers:
        z, log_det, force = layer.push(z, force, flow.context)
        log_q = log_q - log_det
    return Drawn(z, log_q, force)


@dataclass
class OnePassFlow(Posterior):
    r"""The same posterior, whose samples bring their log-density and force along: nothing is inverted.

    At the sample :math:`z = t(\varepsilon, \phi)` it drew last, the log-density of another z close by is

    .. math:: \log q_\phi(z') \simeq \log q(t(\varepsilon, \phi)) - F^\top (t(\varepsilon, \phi) - z')

    of which the value and both first derivatives are exact: the force with respect to z', and the score with respect
    to phi, as what is left of the total derivative without the path. Stopping phi is a ``detach`` of two tensors.
    It calls ``torch.autograd.grad`` while it samples; under the transforms of ``torch.func``, use :class:`Flow`.
    Introduced in book/07-flows.ipynb.

    Parameters
    ----------
    flow
        the flow.
    drawn
        what :meth:`sample` drew last.
    """

    flow: Flow
    drawn: Drawn | None = None

    def means(self) -> tuple[Tensor, ...]:
        """As for :class:`Flow`."""
        return self.flow.means()

    def noise_like(self, k: int) -> Noise:
        """Return standard normal noise, ``[K, B, D]``."""
        return self.flow.noise_like(k)

    def sample(self, eps: Tensor) -> Tensor:
        r"""Return :math:`z_L`, ``[K, B, D]``, and remember its log-density and force."""
        if torch.is_grad_enabled():
            self.drawn = push(self.flow, eps)
        else:
            z, log_q = self.flow.sample_and_log_prob(eps)
            self.drawn = Drawn(z, log_q, torch.zeros_like(z))  # nothing will be differentiated
        return self.drawn.z

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log q(z)` of the sample drawn last, ``[K, B]``.

        Raises
        ------
        InputError
            for any other z.
        """
        if self.drawn is None or not torch.equal(z, self.drawn.z):
            raise InputError(
                "OnePassFlow knows log q only at the sample that it drew last, but log_prob was asked about another z; "
                "use a Flow, which inverts its layers (one_pass=False)"
            )
        here, log_q, force = self.drawn
        return log_q - (force * (here - z)).sum(-1)

    def map_parameters(self, function: Callable[[Tensor], Tensor]) -> OnePassFlow:
        """As for :class:`Flow`; nothing is drawn yet."""
        return replace(self, flow=self.flow.map_parameters(function), drawn=None)

    def sample_and_log_prob(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`z_L` and :math:`\log q(z_L)`; the gradient of the latter is the total derivative."""
        z = self.sample(eps)
        return z, self.drawn.log_q

    def stop_gradient(self) -> OnePassFlow:
        """Return the same posterior, and the sample it drew last, with phi held constant."""
        drawn = None if self.drawn is None else Drawn(*(part.detach() for part in self.drawn))
        return replace(self, flow=self.flow.stop_gradient(), drawn=drawn)


class StandardNormal(nn.Module):
    """A base without parameters, for variational inference without an encoder. Introduced in book/07-flows.ipynb."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Return N(0, I) for each row of ``x``, ``[B, D]``."""
        zeros = x.new_zeros(len(x), self.dim)
        return DiagonalGaussian(zeros, zeros)


class FlowEncoder(nn.Module):
    r"""An encoder that returns a flow: a Gaussian encoder, and layers behind it. Introduced in book/07-flows.ipynb.

    Parameters
    ----------
    base
        an encoder that returns a diagonal Gaussian, such as :class:`vaelib.models.GaussianMLP`, or
        :class:`StandardNormal`.
    layers
        the layers, the first applied first.
    conditional
        whether the layers see x, through the mean and log-scale of the base (their context, of width 2 D).
    one_pass
        carry the force along (:class:`OnePassFlow`) instead of inverting the layers (:class:`Flow`).
    """

    def __init__(
        self, base: nn.Module, layers: Iterable[Layer], *, conditional: bool = False, one_pass: bool = False
    ) -> None:
        super().__init__()
        self.base, self.layers = base, nn.ModuleList(layers)
        self.conditional, self.one_pass = conditional, one_pass

    def forward(self, x: Tensor) -> Flow | OnePassFlow:
        """Return the posterior for ``x`` ``[B, X]``."""
        base = self.base(x)
        context = torch.cat((base.mean, base.log_std), -1) if self.conditional else None
        flow = Flow(base, self.layers, context)
        return OnePassFlow(flow) if self.one_pass else flow
