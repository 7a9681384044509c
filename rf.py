"""THE FLOW: all of rectified flow, for any callable model(x, t, text) → velocity.

The convention, stated here once for the whole project:

    t = 0 is data, t = 1 is noise, and between them lies the straight line
        x_t = (1 − t)·data + t·noise.
    The velocity is what moves x as t grows:
        d x_t / dt = noise − data,    the target of the network.

Through one point x_t pass many lines (many pairs of data and noise); a network trained with squared
error learns their mean, v(x, t) = E[noise − data | x_t = x]. Flowing along v carries the
distribution of x_t to that of x_t+dt for every t (Liu et al. 2022, 2209.03003, Theorem 3.3), so
integrating from t = 1 down to t = 0 turns noise into data. (The paper itself runs time backwards.)

Shapes: x, data, noise (B, ...) of any rank; t (B,) fp32; text is whatever the model takes, with the
batch first. Model outputs may be bf16; states, losses and averages are fp32 or wider.
Imports nothing of ours: the flow does not know the network.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

Model = Callable[[Tensor, Tensor, Tensor], Tensor]

# ------------------------------------------------------------------------------------------------
# The straight line and its velocity
# ------------------------------------------------------------------------------------------------


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t)·data + t·noise. data, noise (B, ...); t (B,) in [0, 1]; returns (B, ...)."""
    _same_shape(data, noise)
    t = _per_sample(t, data)
    return (1 - t) * data + t * noise


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """d x_t / dt = noise − data: the same at every t. (B, ...) each."""
    _same_shape(data, noise)
    return noise - data


def _per_sample(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) → (B, 1, ...), to meet x (B, ...). Another shape is an error, never a broadcast:
    a (B,) against (B, C, H, W) would silently pair with W when B = W."""
    if t.shape != x.shape[:1]:
        raise ValueError(f"t has shape {tuple(t.shape)}, must be ({x.shape[0]},): one per sample")
    return t.reshape(-1, *[1] * (x.ndim - 1))


def _same_shape(data: Tensor, noise: Tensor):
    if data.shape != noise.shape:
        raise ValueError(f"data {tuple(data.shape)} and noise {tuple(noise.shape)} differ in shape")


# ------------------------------------------------------------------------------------------------
# Time: where to train, where to step
# ------------------------------------------------------------------------------------------------

# a in RF++'s p(t) ∝ e^{at} + e^{a(1−t)} (Lee et al. 2024, 2405.20320), as its sampler draws it; the
# e^{at} + e^{−at} that the paper prints has no second arm on [0, 1].
U_SHAPE = 4.0
TIME_DISTRIBUTIONS = {  # name → inverse of the distribution function, u in (0, 1) → t in (0, 1)
    "uniform": lambda u: u,
    # t = sigmoid(z), z ~ N(0, 1): the middle, for at the ends the best answer is a mere mean and
    # soon learned (SD3, eq. 19)
    "logit_normal": lambda u: torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * u - 1)),
    # both ends: for reflow, where the middle is easy. F(t) = ½ + sinh(a(t − ½)) / (2 sinh(a/2))
    "u_shaped": lambda u: 0.5 + torch.asinh((2 * u - 1) * math.sinh(U_SHAPE / 2)) / U_SHAPE,
    # only where the walk begins: distillation, the velocity of one step is all that is learned
    "start": torch.ones_like,
}


def shift_time(t, shift: float):
    """t' = α·t / (1 + (α − 1)·t): more time near the noise for α > 1; ends stay (SD3, eq. 23).

    A larger image needs more noise to be hidden as well: α = √(m/n) for m pixels against n.
    t: float or tensor in [0, 1]; shift = α > 0.
    """
    if shift <= 0:
        raise ValueError(f"shift = {shift} must be positive; 1 leaves time alone")
    return shift * t / (1 + (shift - 1) * t)


def time_at(u: Tensor, distribution: str = "logit_normal", shift: float = 1.0) -> Tensor:
    """The time below which a share u of the training times lies. u in [0, 1]; t in (0, 1)."""
    if distribution not in TIME_DISTRIBUTIONS:
        names = ", ".join(TIME_DISTRIBUTIONS)
        raise ValueError(f"distribution = {distribution!r} must be one of {names}")
    t = shift_time(TIME_DISTRIBUTIONS[distribution](u.clamp(1e-6, 1 - 1e-6)), shift)
    return t.clamp(1e-6, 1 - 1e-6)


def sample_time(
    batch_size: int,
    *,
    distribution: str = "logit_normal",
    shift: float = 1.0,
    stratified: bool = False,
    generator: torch.Generator | None = None,
    device: str | torch.device | None = None,
) -> Tensor:
    """Training times t (B,) fp32, each strictly inside (0, 1).

    distribution: a name in TIME_DISTRIBUTIONS; then moved by shift_time.
    stratified: sample i draws from the i-th of B slices of equal probability, so that a batch
    covers all of time and its loss varies less; over shuffled samples the distribution is the same.
    """
    u = torch.rand(batch_size, generator=generator, device=device)
    if stratified:
        u = (torch.arange(batch_size, device=device) + u) / batch_size
    return time_at(u, distribution, shift)


def timesteps(steps: int, shift: float = 1.0) -> list[float]:
    """The sampler's grid: steps + 1 times from 1 (noise) to 0 (data), even, then shifted."""
    if steps < 1:
        raise ValueError(f"steps = {steps} must be at least 1")
    return [shift_time(1 - i / steps, shift) for i in range(steps + 1)]


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------

LOSSES = ("mse", "pseudo_huber")


def rf_loss(
    model: Model, data: Tensor, text: Tensor, *, t: Tensor, noise: Tensor, loss: str = "mse"
) -> Tensor:
    """The flow-matching loss of each sample, (B,) fp32: how far v(x_t, t) is from noise − data.

    "mse":           mean over the sample's values of e², with e = v − (noise − data)
    "pseudo_huber":  √(‖e‖² + c²) − c, c = 0.00054·√dim (2310.14189, section 3.3): large errors
                     count less, for reflow and distillation.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss = {loss!r} must be one of {', '.join(LOSSES)}")
    velocity = model(interpolate(data, noise, t), t, text)
    error = velocity.float() - velocity_target(data, noise).float()
    error = error.reshape(len(error), -1)  # (B, dim)
    if loss == "mse":
        return error.square().mean(1)
    c = 0.00054 * math.sqrt(error.shape[1])
    return (error.square().sum(1) + c * c).sqrt() - c


@torch.no_grad()
def validation_loss(
    model: Model,
    data: Tensor,
    text: Tensor,
    t_index: Tensor,
    noise: Tensor,
    num_timesteps: int = 8,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Velocity MSE at t = 0, 1/n, …, (n−1)/n and the mean of those n means (MLPerf flux1's metric).

    Every sample has its own fixed t_index (B,) int64 in 0..n−1 and fixed noise, so that two
    evaluations differ by the model alone. Returns ((n,), ()) fp32; a t without samples is NaN in
    the first and left out of the second. batch_size: samples in one forward pass; None: all.
    """
    sums, counts = data.new_zeros(2, num_timesteps, dtype=torch.float32)
    for part in torch.arange(len(data), device=data.device).split(batch_size or len(data)):
        index = t_index[part]
        losses = rf_loss(model, data[part], text[part], t=index / num_timesteps, noise=noise[part])
        sums.index_add_(0, index, losses)
        counts.index_add_(0, index, torch.ones_like(losses))
    means = sums / counts
    return means, means.nanmean()


# ------------------------------------------------------------------------------------------------
# Guidance
# ------------------------------------------------------------------------------------------------


def guided_velocity(
    model: Model,
    x: Tensor,
    t: Tensor,
    text: Tensor,
    null_text: Tensor | None = None,
    cfg: float = 1.0,
) -> Tensor:
    """v_null + cfg·(v_text − v_null): classifier-free guidance (Ho & Salimans 2022, 2207.12598).

    cfg = 1 is the conditional velocity (null_text unused), 0 the unconditional one, above 1 goes
    further in the text's direction. Both run as one batch of 2B. null_text (1 or B, ...) like text.
    """
    if cfg == 1:
        return model(x, t, text)
    if null_text is None:
        raise ValueError(f"cfg = {cfg} needs null_text, the encoded empty caption")
    both = torch.cat([text, null_text.expand_as(text)])
    velocity = model(torch.cat([x, x]), torch.cat([t, t]), both)
    # Widened first: the difference of two bf16 velocities, times cfg, would be mostly rounding.
    v_text, v_null = velocity.to(torch.promote_types(velocity.dtype, torch.float32)).chunk(2)
    return v_null + cfg * (v_text - v_null)


# ------------------------------------------------------------------------------------------------
# Solvers: one step each of dx/dt = v(x, t), from t to t + h (h < 0 towards data)
# ------------------------------------------------------------------------------------------------


def euler_step(v, x, t, h):
    """First order, one evaluation."""
    return x + h * v(x, t)


def heun_step(v, x, t, h):
    """Second order, two evaluations: the mean of the slopes at both ends of an Euler step.

    A step that ends at t = 0 is Euler's, as in EDM (Karras et al. 2022, 2206.00364, Algorithm 1): a
    clean image shows the network no noise to judge by. One such step keeps the order.
    """
    slope = v(x, t)
    if t + h == 0:
        return x + h * slope
    return x + h / 2 * (slope + v(x + h * slope, t + h))


def rf_solver_step(v, x, t, h):
    """Second order, two evaluations: RF-Solver (2411.04746), x + h·v + ½h²·v'.

    With its finite difference at half a step, v' = (v(x + h/2·v, t + h/2) − v) / (h/2), the two
    terms in v cancel: what is left is h times the midpoint's slope, the classical midpoint method.
    """
    return x + h * v(x + h / 2 * v(x, t), t + h / 2)


SOLVERS = {"euler": euler_step, "heun": heun_step, "rf_solver": rf_solver_step}


@torch.no_grad()
def integrate(
    model: Model,
    x: Tensor,
    text: Tensor,
    times: Sequence[float],
    *,
    null_text: Tensor | None = None,
    cfg: float = 1.0,
    solver: str = "euler",
    return_trajectory: bool = False,
    progress: bool = False,
) -> Tensor:
    """Follow the velocity from x at times[0] to times[-1]: what sample and invert are made of."""
    if solver not in SOLVERS:
        raise ValueError(f"solver = {solver!r} must be one of {', '.join(SOLVERS)}")
    step, dtype = SOLVERS[solver], torch.promote_types(x.dtype, torch.float32)

    def v(x: Tensor, t: float) -> Tensor:
        t = torch.full((x.shape[0],), t, dtype=dtype, device=x.device)
        return guided_velocity(model, x, t, text, null_text, cfg).to(dtype)

    x = x.to(dtype)
    trajectory = [x]
    spans = list(pairwise(times))
    for t, t_next in tqdm(spans, desc=solver, unit="step", disable=not progress):
        x = step(v, x, t, t_next - t)
        if return_trajectory:
            trajectory.append(x)
    return torch.stack(trajectory) if return_trajectory else x


def sample(
    model: Model,
    noise: Tensor,
    text: Tensor,
    *,
    null_text: Tensor | None = None,
    cfg: float = 1.0,
    steps: int = 50,
    solver: str = "euler",
    shift: float = 1.0,
    return_trajectory: bool = False,
    progress: bool = False,
) -> Tensor:
    """Noise → data: integrate the velocity from t = 1 to t = 0.

    noise (B, ...) ~ N(0, 1). solver "euler" costs one evaluation of the model a step, "heun" and
    "rf_solver" two (Heun's last step one); guidance (cfg ≠ 1) doubles the batch. shift: see
    shift_time; use training's.
    Returns (B, ...) fp32, or with return_trajectory (steps + 1, B, ...), the noise first.
    """
    return integrate(
        model, noise, text, timesteps(steps, shift), null_text=null_text, cfg=cfg, solver=solver,
        return_trajectory=return_trajectory, progress=progress,
    )  # fmt: skip


def invert(
    model: Model,
    data: Tensor,
    text: Tensor,
    *,
    null_text: Tensor | None = None,
    cfg: float = 1.0,
    steps: int = 50,
    solver: str = "rf_solver",
    shift: float = 1.0,
    return_trajectory: bool = False,
    progress: bool = False,
) -> Tensor:
    """Data → the noise that sample would turn into it: the same integral from t = 0 to t = 1.

    Arguments and result as in sample; the trajectory starts with the data.
    """
    return integrate(
        model, data, text, timesteps(steps, shift)[::-1], null_text=null_text, cfg=cfg,
        solver=solver, return_trajectory=return_trajectory, progress=progress,
    )  # fmt: skip


def straightness(
    model: Model,
    noise: Tensor,
    text: Tensor,
    *,
    null_text: Tensor | None = None,
    cfg: float = 1.0,
    steps: int = 100,
) -> Tensor:
    """S = ∫₀¹ ‖(x₁ − x₀) − v(x_t, t)‖² dt along each sample's own trajectory, (B,) ≥ 0.

    0 if and only if the path is straight and walked at constant speed: then one Euler step is
    exact. Its mean over samples is the S of Liu et al. 2022 (2209.03003, eq. 5). Euler on `steps`
    even steps: each step's chord is the velocity that it followed.
    """
    options = {"null_text": null_text, "cfg": cfg, "steps": steps}
    path = sample(model, noise, text, return_trajectory=True, **options)
    path = path.reshape(steps + 1, len(noise), -1)  # (S+1, B, dim)
    velocities = (path[:-1] - path[1:]) * steps  # (S, B, dim): d x / d t, t falls by 1/S a step
    return (path[0] - path[-1] - velocities).square().sum(2).mean(0)


# ------------------------------------------------------------------------------------------------
# Reflow: straighten the paths, so that few steps are enough
# ------------------------------------------------------------------------------------------------


def reflow_states(
    model: Model, noise: Tensor, text: Tensor, *, segments: int = 1, steps: int = 50, **options
) -> Tensor:
    """Where the model takes this noise: what the next flow is trained on, (B, segments + 1, ...).

    The first state is the noise, the last the data that the model makes of it. Trained on lines
    between such pairs (rf_loss), a new flow makes the same distribution at no higher transport cost
    on straighter paths (Liu et al. 2022, 2209.03003, Theorems 3.3, 3.5, 3.7): its lines cross less.
    With K segments the states between, at timesteps(K, shift), come along, so that only pieces of
    the path need to become straight (PeRFlow, 2405.07510): for K steps instead of one.
    options: as of sample; guidance is folded in: the new flow needs none (InstaFlow, 2309.06380).
    Raises ValueError if segments do not divide steps.
    """
    if segments < 1 or steps % segments:
        raise ValueError(f"steps = {steps} must be a multiple of segments = {segments}")
    path = sample(model, noise, text, steps=steps, return_trajectory=True, **options)
    return path[:: steps // segments].transpose(0, 1)


def segment_time(
    u: Tensor, segments: int = 1, distribution: str = "uniform", shift: float = 1.0
) -> Tensor:
    """Training times for lines of several pieces: u (B,) in [0, 1) → t (B,) in (0, 1).

    The first digit of u in base K picks the piece, from the noise on, the rest of it the time
    inside by `distribution` (TIME_DISTRIBUTIONS). "start" makes it distillation in K steps.
    """
    times = _grid(segments, shift, u.device)
    k = (u * segments).long().clamp(max=segments - 1)
    above, below = times[k], times[k + 1]
    inside = time_at(u * segments - k, distribution)
    return (below + inside * (above - below)).clamp(1e-6, 1 - 1e-6)


def _grid(steps: int, shift: float, device) -> Tensor:
    """timesteps as a tensor, made on the device: a list would have to be copied there."""
    return shift_time(1 - torch.arange(steps + 1, device=device) / steps, shift)


def segment_line(states: Tensor, t: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """The straight piece on which t lies, extended to its ends: → data, noise for rf_loss.

    Where two pieces meet it is the lower one, that a walk takes from there.
    states (B, K + 1, ...) of reflow_states, made with the same shift; t (B,). So x_t is on the
    piece and noise − data its slope, whatever K is; with K = 1 it is the pair itself.
    """
    K = states.shape[1] - 1
    if K == 1:
        return states[:, 1], states[:, 0]
    times = _grid(K, shift, states.device)
    k = (times[1:-1] >= t[:, None]).sum(1)  # (B,): how many pieces lie above
    rows = torch.arange(len(states), device=states.device)
    upper, lower = states[rows, k], states[rows, k + 1]
    velocity = (upper - lower) / _per_sample(times[k] - times[k + 1], upper)
    data = lower - _per_sample(times[k + 1], lower) * velocity
    return data, data + velocity


def annealed_noise(noise: Tensor, fresh: Tensor, beta: float) -> Tensor:
    """√(1 − β²)·noise + β·fresh: from the first flow's coupling (β = 1: any noise with any data) to
    the reflowed one (β = 0), so that reflow starts where the first flow ended (SlimFlow,
    2407.12718). noise, fresh (B, ...) ~ N(0, 1), and so is the result.
    """
    _same_shape(noise, fresh)
    return math.sqrt(1 - beta * beta) * noise + beta * fresh


def transport_cost(data: Tensor, noise: Tensor) -> Tensor:
    """‖noise − data‖² of pairs, (B,): reflow never raises the mean (2209.03003, Theorem 3.5)."""
    _same_shape(data, noise)
    return (noise - data).reshape(len(data), -1).square().sum(1)


# ------------------------------------------------------------------------------------------------
# EMA with a power-function profile (Karras et al. 2023, EDM2, 2312.02696, section 3)
# ------------------------------------------------------------------------------------------------


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent γ whose profile has relative width σ (EDM2, eq. 126): 0.05 → 16.97, 0.10 → 6.94.

    σ² = (γ + 1) / ((γ + 2)²(γ + 3)) as a cubic in γ; its largest real root. σ in (0, 0.2887).
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel = {sigma_rel} must lie in (0, {12**-0.5:.4f})")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEMA:
    """A running average θ̂(t) ∝ ∫₀ᵗ τ^γ θ(τ) dτ of tensors, in fp32.

    Unlike an exponential average its width is a share of the whole run (sigma_rel: the profile's
    standard deviation over the training time), so it never remembers the initial weights.
    θ̂ ← β·θ̂ + (1 − β)·θ with β_t = (1 − 1/t)^{γ+1} (EDM2, eq. 127), exact at every step t = 1, 2, …
    """

    def __init__(self, tensors: Sequence[Tensor], sigma_rel: float = 0.1):
        self.sources = list(tensors)
        self.sigma_rel = sigma_rel
        self.gamma = gamma_from_sigma_rel(sigma_rel)
        self.averages = [s.detach().float().clone() for s in self.sources]

    @torch.no_grad()
    def update(self, step: int):
        """Take the tensors in after optimizer step `step`, counted from 1 (which copies them)."""
        beta = (1 - 1 / step) ** (self.gamma + 1)
        sources = [s.detach().to(a.dtype) for s, a in zip(self.sources, self.averages, strict=True)]
        torch._foreach_lerp_(self.averages, sources, 1 - beta)

    @torch.no_grad()
    def copy_to(self, tensors: Sequence[Tensor]):
        """Write the averages into tensors of the same shapes, in their dtype."""
        for target, average in zip(tensors, self.averages, strict=True):
            target.copy_(average)

    def state_dict(self) -> dict:
        return {"sigma_rel": self.sigma_rel, "averages": self.averages}

    def load_state_dict(self, state: dict):
        if state["sigma_rel"] != self.sigma_rel:
            raise ValueError(f"this EMA has sigma_rel {self.sigma_rel}, not {state['sigma_rel']}")
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)


def posthoc_coefficients(
    snapshots: Sequence[tuple[int, float]], step: int, sigma_rel: float
) -> np.ndarray:
    """Weights with which stored averages best make one that was never kept (EDM2, section 3.2).

    snapshots: (step, sigma_rel) of each stored average, say of two profiles at several checkpoints;
    (step, sigma_rel) the wanted one, not later than the last. Returns one coefficient a snapshot,
    summing to about 1: least squares between the profiles p(τ) = (γ+1)·τ^γ / T^{γ+1} on [0, T],
    whose inner products are closed forms.
    """

    def product(a, b):  # ∫ p_a p_b dτ over [0, min(T_a, T_b)], in units of the last step
        (T_a, g_a), (T_b, g_b) = a, b
        power = g_a + g_b + 1
        ratio = min(T_a, T_b) ** power / (T_a ** (g_a + 1) * T_b ** (g_b + 1))
        return (g_a + 1) * (g_b + 1) / power * ratio

    last = max(s for s, _ in snapshots)
    if step > last:
        raise ValueError(f"step = {step} lies after the last snapshot, {last}")
    stored = [(s / last, gamma_from_sigma_rel(sigma)) for s, sigma in snapshots]
    wanted = (step / last, gamma_from_sigma_rel(sigma_rel))
    gram = np.array([[product(a, b) for b in stored] for a in stored])
    return np.linalg.lstsq(gram, np.array([product(a, wanted) for a in stored]), rcond=None)[0]


def combine(snapshots: Sequence[Sequence[Tensor]], coefficients: Sequence[float]) -> list[Tensor]:
    """Σ_i c_i·snapshot_i, tensor by tensor, fp32: the post-hoc average itself."""
    return [
        sum(float(c) * tensor.float() for c, tensor in zip(coefficients, tensors, strict=True))
        for tensors in zip(*snapshots, strict=True)
    ]
