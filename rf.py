"""THE FLOW: all of rectified flow, for any callable model(x, t, text) → velocity.

The convention, stated here once for the whole project:

    t = 0 is data, t = 1 is noise, and between them lies the straight line
        x_t = (1 − t)·data + t·noise.
    The velocity says how x moves as t grows:
        d x_t / dt = noise − data.      The network learns this difference.

From one point and its velocity both ends of the line follow:
        data = x_t − t·v,      noise = x_t + (1 − t)·v.
So a prediction of v is also a prediction of the clean image and of the noise.

Why this makes pictures. Many lines pass through one point x_t, because many pairs of data and noise
meet there. The network sees only the point, so it cannot know which line it is on. The answer with
the least squared error is the mean over these lines: v(x, t) = E[noise − data | x_t = x]. Let p_t
be the density of x_t. Each line through x carries some probability with its own velocity. Together
they carry p_t(x) times the mean velocity v(x, t). So p_t obeys the continuity equation
∂p_t/∂t + ∇·(p_t·v) = 0. Hence points that start with the density p_1, Gaussian noise, and
follow dx/dt = v(x, t) from t = 1 down to t = 0 end with the density p_0, that of the data (Liu et
al. 2022, 2209.03003, Theorem 3.3). (The paper has t = 0 for noise and t = 1 for data.)

The file, from top to bottom: the line and its velocity, the loss, random numbers, time, guidance,
solvers, sampling, reflow (pairs and pieces, which need a first flow), and last the averages of the
weights. Read interpolate, velocity_target, rf_loss and sample first: these four are rectified flow.

Shapes: x, data, noise (B, ...) of any rank; t (B,) fp32; text is whatever the model takes, with the
batch first. A model may return bf16. States are fp32 or wider, losses are fp32.
This file imports no other file of the project: it works with any network.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor], Tensor]

# ------------------------------------------------------------------------------------------------
# The straight line and its velocity
# ------------------------------------------------------------------------------------------------


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t)·data + t·noise. data, noise (B, ...); t (B,) in [0, 1]; returns (B, ...)."""
    _same_shape(data, noise)
    t = _per_sample(t, data)  # (B, 1, ...)
    return (1 - t) * data + t * noise


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """d x_t / dt = noise − data: the same at every t. (B, ...) each."""
    _same_shape(data, noise)
    return noise - data


def _per_sample(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) → (B, 1, ...), to meet x (B, ...). Without this, torch would align t with
    the last axis, W: if B = W, that is no error but a wrong result. Any other shape is refused,
    because a (1,) would be repeated over B."""
    if t.shape != x.shape[:1]:
        raise ValueError(f"t has shape {tuple(t.shape)}, must be ({x.shape[0]},): one per sample")
    return t.reshape(-1, *[1] * (x.ndim - 1))  # (B, 1, ...)


def _same_shape(data: Tensor, noise: Tensor):
    if data.shape != noise.shape:
        raise ValueError(f"shapes {tuple(data.shape)} and {tuple(noise.shape)} must be equal")
    if not data.is_floating_point():
        raise ValueError(f"data is {data.dtype}, must be floating: bytes would wrap around")


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------

LOSSES = ("mse", "pseudo_huber")

# The loss has no weighting over t. Which times matter is decided once, by the density from which t
# is drawn (time_at). To draw a time twice as often gives, up to scale, the same expected gradient
# as to double its loss, and usually with less variance.


def rf_loss(
    model: Model, data: Tensor, text: Tensor, *, t: Tensor, noise: Tensor, loss: str = "mse"
) -> Tensor:
    """The flow-matching loss of each sample, (B,) fp32: how far v(x_t, t) is from noise − data.

    With e = v − (noise − data):
    "mse"            mean over the sample's values of e². Its minimiser is the conditional mean,
                     which the derivation at the top of this file needs.
    "pseudo_huber"   √(‖e‖² + c²) − c, c = 0.00054·√dim (Song & Dhariwal 2023, 2310.14189, section
                     3.3). Large errors count less. Its minimiser is not the mean. So use it for
                     reflow, where hardly ever more than one line passes through a point, and not
                     for the first flow.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss = {loss!r} must be one of {', '.join(LOSSES)}")
    velocity = model(interpolate(data, noise, t), t, text)
    _same_shape(data, velocity)
    # Difference, squares and mean are computed in fp32: bf16 would round each of them to 8 bits.
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
) -> tuple[Tensor, Tensor]:
    """The mean velocity MSE at each of t = 0, 1/n, …, (n−1)/n, and the mean of these n (MLPerf).

    The loss depends far more on t and on the noise than on the model, so a validation loss with
    fresh draws would jump about. Here every sample has its own fixed t_index (B,) int64 in 0..n−1
    and fixed noise: two evaluations differ by the model alone.
    Returns ((n,), ()) fp32; a t without samples is NaN in the first and left out of the second.
    """
    sums, counts = data.new_zeros(2, num_timesteps, dtype=torch.float32)
    losses = rf_loss(model, data, text, t=t_index / num_timesteps, noise=noise)
    sums.index_add_(0, t_index, losses)
    counts.index_add_(0, t_index, torch.ones_like(losses))
    means = sums / counts
    return means, means.nanmean()


# ------------------------------------------------------------------------------------------------
# Randomness: everything that a step draws is a function of (seed, number) alone
# ------------------------------------------------------------------------------------------------

# A run must give the same result after a kill and on another number of GPUs. So no state of a
# random generator is carried from step to step: random values are computed from the seed and the
# number of the sample (chapter 2) or of the step (chapter 1).
GOLDEN = (5**0.5 - 1) / 2  # its first n multiples, modulo 1, cover [0, 1) evenly for every n


def mix_seed(seed: int, purpose: str, number: int) -> int:
    """One seed of 64 bits from three values, so that each purpose has its own random numbers.

    The sum of the values would not do: seed 1 with number 0 would equal seed 0 with number 1.
    """
    words = (seed, *purpose.encode(), number)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def generators(seed: int, purpose: str, numbers: Sequence[int]) -> list[torch.Generator]:
    """One generator for each number, from (seed, purpose, number) alone. On the CPU, so that the
    values are the same on every machine."""
    return [torch.Generator().manual_seed(mix_seed(seed, purpose, n)) for n in numbers]


def uniform_at(seed: int, purpose: str, numbers: Sequence[int]) -> list[float]:
    """One value in [0, 1) for each number, from (seed, purpose, number) alone."""
    return [np.random.default_rng(mix_seed(seed, purpose, n)).random() for n in numbers]


def spread(n: int, generator: torch.Generator | None = None, device=None) -> Tensor:
    """u (n,) fp32 in [0, 1) (rounding may give 1). Sample i draws from the i-th of n equal slices.

    The loss varies strongly with t. If the times of a batch were independent, some batches would
    hold mostly hard times, and gradients would be noisier. Slices make every batch cover all of
    time (stratified sampling). The data are in random order, so each image still gets every time
    equally often.
    """
    u = torch.rand(n, generator=generator, device=device)
    return (torch.arange(n, device=device) + u) / n


def spread_at(seed: int, positions: Sequence[int]) -> Tensor:
    """u (n,) fp32 in [0, 1) for samples at these positions. Unlike spread, it need not know the
    whole batch.

    Neighbouring positions lie a golden step apart (a low-discrepancy sequence). So any block of
    positions covers all of time evenly, on every rank, and u depends on seed and position alone.
    """
    # The clamp: rounding to fp32 may give 1.
    u = np.random.default_rng((seed, 1)).random() + np.array(positions, float) * GOLDEN
    return torch.tensor(u % 1, dtype=torch.float32).clamp(max=1 - 2**-24)


# ------------------------------------------------------------------------------------------------
# Time: where to train, where to step
# ------------------------------------------------------------------------------------------------

# Training may draw t from any density. TIME_DISTRIBUTIONS gives each by its quantile function, the
# inverse of the distribution function: evenly spread u go in, times with that density come out.

# a in RF++'s p(t) ∝ e^{at} + e^{a(1−t)} (Lee et al. 2024, 2405.20320). This is the density that its
# code draws from. The paper prints e^{at} + e^{−at}, which does not rise towards t = 0.
U_SHAPE = 4.0
TIME_DISTRIBUTIONS = {  # name → quantile function, u in (0, 1) → t in (0, 1]
    "uniform": lambda u: u,
    # t = sigmoid(z), z ~ N(0, 1) (SD3, eq. 19): mostly the middle. Near t = 0 the best answer is
    # about −data, and near t = 1 about noise − mean(data). Both are easy, and learned soon.
    "logit_normal": lambda u: torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * u - 1)),
    # Mostly both ends. For reflow: its paths are almost straight, so the middle is easy.
    # F(t) = ½ + sinh(a(t − ½)) / (2 sinh(a/2))
    "u_shaped": lambda u: 0.5 + torch.asinh((2 * u - 1) * math.sinh(U_SHAPE / 2)) / U_SHAPE,
    # Only t = 1, the start of sampling; with segments, the start of each piece. With pairs this is
    # distillation: the network learns the velocity of one step per piece and nothing else.
    "start": torch.ones_like,
}


def shift_time(t, shift: float):
    """t' = α·t / (1 + (α − 1)·t): for α > 1 more values near 1, the noise (SD3, eq. 23).

    Neighbouring pixels of a large image are nearly equal, so averaging them removes noise: at the
    same t a large image is easier to guess than a small one. So the times of a large image are
    shifted towards the noise, by α = √(m/n), where the large image has m pixels and the small one
    n. Training and sampling should use the same α. The ends stay where they are. t: float or tensor
    in [0, 1]; shift = α in [0.01, 100].
    """
    if not 0.01 <= shift <= 100:
        raise ValueError(f"shift = {shift} must lie in [0.01, 100]; 1 leaves time alone")
    return shift * t / (1 + (shift - 1) * t)


def time_at(u: Tensor, distribution: str = "logit_normal", shift: float = 1.0) -> Tensor:
    """u in [0, 1] → the u-quantile of the training times, shifted; t in (0, 1).

    u and t are clamped, so that t is never exactly 0 or 1, where x_t is the data or the noise.
    """
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
    device=None,
) -> Tensor:
    """Training times t (batch_size,) fp32 in (0, 1), for a loop of your own: see time_at.

    stratified: evenly spread over the batch (spread), as train_mnist.py does, not independent.
    """
    how = {"generator": generator, "device": device}
    u = spread(batch_size, **how) if stratified else torch.rand(batch_size, **how)
    return time_at(u, distribution, shift)


def timesteps(steps: int, shift: float = 1.0) -> list[float]:
    """The sampler's grid: steps + 1 times from 1 (noise) to 0 (data), even, then shifted.

    shift should be the one of training.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps} must be at least 1")
    return [shift_time(1 - i / steps, shift) for i in range(steps + 1)]


# ------------------------------------------------------------------------------------------------
# Guidance
# ------------------------------------------------------------------------------------------------


def guided_velocity(
    model: Model,
    x: Tensor,
    t: Tensor,
    text: Tensor,
    null_text: Tensor | None = None,
    cfg: float | Tensor = 1.0,
) -> Tensor:
    """v_null + cfg·(v_text − v_null): classifier-free guidance (Ho & Salimans 2022, 2207.12598).

    v_text knows the caption and v_null does not, so their difference is what the caption adds. With
    cfg > 1 the sampler goes further in this direction than the training data justify, towards
    images from which the caption can be guessed more surely. Such images follow the text more
    closely and vary less. Training must drop some captions: otherwise the network has never seen
    null_text.

    cfg = 1 gives the conditional velocity and needs no null_text, cfg = 0 the unconditional one.
    For every cfg but 1, v_text and v_null are computed in one batch of 2B: one forward pass keeps a
    GPU busier than two. null_text (1 or B, ...) like text. cfg may be a tensor, (B, 1, ...).
    """
    if not isinstance(cfg, Tensor) and cfg == 1:
        return model(x, t, text)
    if isinstance(cfg, Tensor) and cfg.ndim not in (0, x.ndim):
        raise ValueError(f"cfg has shape {tuple(cfg.shape)}, must be (B, 1, ...) to meet x")
    if null_text is None:
        raise ValueError(f"cfg = {cfg} needs null_text, the encoded empty caption")
    both = torch.cat([text, null_text.expand_as(text)])  # (2B, ...)
    velocity = model(torch.cat([x, x]), torch.cat([t, t]), both)  # (2B, ...)
    # Convert to fp32 first. The difference of two close bf16 numbers is exact, but the product with
    # cfg and the sum would be rounded to bf16 again, at every step of the solver.
    v_text, v_null = velocity.to(torch.promote_types(velocity.dtype, torch.float32)).chunk(2)
    return v_null + cfg * (v_text - v_null)


# ------------------------------------------------------------------------------------------------
# Solvers: one step each of dx/dt = v(x, t), from t to t + h (h < 0 towards data)
# ------------------------------------------------------------------------------------------------


# A solver's error comes from changes of the velocity along the path, in direction or speed. On
# straight paths of constant speed every solver is exact in one step. Reflow aims at such paths.


def euler_step(v, x, t, h):
    """First order (the error of a path falls as 1/steps), one evaluation: follow the tangent."""
    return x + h * v(x, t)


def heun_step(v, x, t, h):
    """Second order (error as 1/steps²), two evaluations: the mean of the slopes at both ends.

    A step that ends at t = 0 is Euler's, as in EDM (Karras et al. 2022, 2206.00364, Algorithm 1).
    It needs no velocity at t = 0, where training has almost no samples. One such step does not
    change the order.
    """
    slope = v(x, t)
    if t + h == 0:
        return x + h * slope
    return x + h / 2 * (slope + v(x + h * slope, t + h))


def rf_solver_step(v, x, t, h):
    """Second order, two evaluations: RF-Solver (2411.04746), x + h·v + ½h²·v'.

    v' is the derivative of v along the path. RF-Solver takes it as a finite difference over half a
    step, v' = (v(x + h/2·v, t + h/2) − v) / (h/2). Inserted above, this gives x + h·v_mid with
    the velocity v_mid at the midpoint: the classical midpoint method.
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
    cfg_below: float = 1.0,
    solver: str = "euler",
    return_trajectory: bool = False,
) -> Tensor:
    """Follow the velocity from x at times[0] to times[-1], one solver step per pair of times.

    The order of the times gives the direction: sample passes falling ones, invert rising ones.
    The states are fp32 even if the model computes in bf16: many small steps are added up, and bf16
    would lose those that are below 1/256 of x.

    null_text: the features of the empty caption; needed where cfg ≠ 1 (guided_velocity). solver: a
    name in SOLVERS. return_trajectory: all states, (len(times), B, ...), not the last one alone.
    cfg_below: guidance begins when t has fallen to it (Kynkäänniemi et al. 2024, 2404.07724). In
    nearly pure noise guidance pushes all samples of a caption to the same layout; without it there,
    pictures vary more, and a higher cfg can be used below.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver = {solver!r} must be one of {', '.join(SOLVERS)}")
    if not 0 <= cfg_below <= 1:
        raise ValueError(f"cfg_below = {cfg_below} must lie in [0, 1]")
    step, dtype = SOLVERS[solver], torch.promote_types(x.dtype, torch.float32)

    def v(x: Tensor, t: float) -> Tensor:
        times = torch.full((x.shape[0],), t, dtype=dtype, device=x.device)
        strength = cfg if t <= cfg_below else 1.0
        velocity = guided_velocity(model, x, times, text, null_text, strength).to(dtype)
        _same_shape(x, velocity)
        return velocity

    x = x.to(dtype)
    trajectory = [x]
    for t, t_next in pairwise(times):
        x = step(v, x, t, t_next - t)
        if return_trajectory:
            trajectory.append(x)
    return torch.stack(trajectory) if return_trajectory else x


def sample(
    model: Model, noise: Tensor, text: Tensor, *, steps: int = 50, shift: float = 1.0, **how
) -> Tensor:
    """Noise → data: integrate the velocity from t = 1 to t = 0.

    noise (B, ...) ~ N(0, 1). shift: see shift_time; use the one of training. how: see integrate.
    solver "euler" costs one evaluation of the model a step, "heun" and "rf_solver" two (Heun's last
    step one); guidance (cfg ≠ 1) doubles the batch.
    Returns (B, ...) fp32 or wider, or with return_trajectory (steps + 1, B, ...), the noise first.
    """
    return integrate(model, noise, text, timesteps(steps, shift), **how)


def invert(
    model: Model,
    data: Tensor,
    text: Tensor,
    *,
    steps: int = 50,
    shift: float = 1.0,
    solver: str = "rf_solver",
    **how,
) -> Tensor:
    """Data → the noise that sample would turn into it: the same integral from t = 0 to t = 1.

    An ODE can be run in both directions, so each image has its own noise. Sample from that noise
    with another caption, and the image is edited (experiments/edit.py). An error of the inversion
    appears in the result too, so the default solver is of second order.
    Arguments and result as in sample; the trajectory starts with the data.
    """
    times = timesteps(steps, shift)[::-1]
    return integrate(model, data, text, times, solver=solver, **how)


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

    0 if and only if the path is straight and its speed constant: then one Euler step is exact. The
    mean over samples is the S of Liu et al. 2022 (2209.03003, eq. 5). The path has `steps` Euler
    steps of equal size. So the difference of two neighbouring states, divided by the step size, is
    the model's velocity, and no second evaluation is needed.
    """
    options = {"null_text": null_text, "cfg": cfg, "steps": steps}
    path = sample(model, noise, text, return_trajectory=True, **options)
    path = path.reshape(steps + 1, len(noise), -1)  # (steps + 1, B, dim)
    velocities = (path[:-1] - path[1:]) * steps  # (steps, B, dim): t falls by 1/steps each time
    return (path[0] - path[-1] - velocities).square().sum(2).mean(0)


# ------------------------------------------------------------------------------------------------
# Reflow: straighten the paths, so that few steps are enough
# ------------------------------------------------------------------------------------------------


# The lines of a first flow cross: data and noise are paired at random. Where lines cross, the
# network predicts the mean of their velocities, so its paths bend, and a bent path needs many
# steps. Reflow pairs each noise with the image that the first flow makes of it. Paths of an ODE
# never cross, and the lines between their ends cross less than random ones. So a second flow,
# trained on these lines, has straighter paths (Liu et al. 2022, 2209.03003, section 2.2;
# docs/reflow.md measures how straight).


def reflow_states(
    model: Model, noise: Tensor, text: Tensor, *, segments: int = 1, steps: int = 50, **options
) -> Tensor:
    """The path of the model from this noise, at segments + 1 points: (B, segments + 1, ...).

    The first state is the noise, the last the data that the model makes of it. A new flow, trained
    with squared error on lines between such pairs, makes the same distribution as the first (Liu et
    al. 2022, 2209.03003, Theorem 3.3) at no higher transport cost (Theorem 3.5). If reflow is
    repeated, the paths become straight (Theorem 3.7). With segments = K > 1 the K − 1 states
    between noise and data are returned too; all lie at timesteps(K, shift). Then each piece alone
    must become straight, and sampling takes K steps (PeRFlow, 2405.07510). options: those of
    sample. If the pairs are made with guidance (cfg), the new flow is sampled without (cfg = 1;
    InstaFlow, 2309.06380). Raises ValueError if segments do not divide steps.
    """
    if segments < 1 or steps % segments:
        raise ValueError(f"steps = {steps} must be a multiple of segments = {segments}")
    path = sample(model, noise, text, steps=steps, return_trajectory=True, **options)
    return path[:: steps // segments].transpose(0, 1)


def line(
    states: Tensor,
    fresh_noise: Tensor,
    u: Tensor,
    *,
    segments: int = 1,
    time: str = "logit_normal",
    shift: float = 1.0,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each sample the line and the time to train on: → data, noise (B, ...), t (B,).

    One function for every coupling of data and noise, so neither trainer has a branch for reflow.
    states (B, K + 1, ...): a path that is known at K + 1 points, from the noise to the data.
        K = 0  Only the data is known, and any noise may go with it: `fresh_noise` (B, ...). This is
               the first flow. shift moves t (shift_time).
        K ≥ 1  Noise and data belong together; an older flow made them. This is reflow. The states
               lie at timesteps(K, shift): shift must be the one that made them. It sets the ends
               of the pieces and does not move the time inside a piece.
    u (B,) in [0, 1], evenly spread: TIME_DISTRIBUTIONS[time] turns it into times.
    segments: number of straight pieces of the path. It must divide K, and be 1 at K = 0. The whole
        part of u·segments is the number of the piece, 0 next to the noise; the fraction gives the
        time inside the piece. With time="start" this is distillation in `segments` steps.
    beta in [0, 1]: noise becomes √(1 − β²)·noise + β·fresh. 1 is the coupling of the first flow, 0
        that of reflow. Lowered during training, it lets reflow start where the first flow ended
        (SlimFlow, 2407.12718). Both noises have variance 1, and so has the sum; with 1 − β and β it
        would be less, and sampling starts at variance 1. Needs segments = 1, since only the first
        piece starts at noise.
    Raises ValueError if segments or beta are not allowed.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta = {beta} must lie in [0, 1]")
    K = states.shape[1] - 1
    if K == 0 and segments == 1:
        return states[:, 0], fresh_noise, time_at(u, time, shift)
    if segments < 1 or K == 0 or K % segments:
        raise ValueError(f"segments = {segments} must divide the {K} of the states")
    times = _grid(segments, shift, u.device)
    piece = (u * segments).long().clamp(max=segments - 1)  # (B,): rounding may reach `segments`
    above, below = times[piece], times[piece + 1]  # (B,) each
    inside = time_at(u * segments - piece, time)  # (B,)
    t = (below + inside * (above - below)).clamp(1e-6, 1 - 1e-6)
    data, noise = line_at(states, fresh_noise, t, segments=segments, shift=shift)
    if beta:
        if segments > 1:
            raise ValueError(f"beta = {beta} needs segments = 1, not {segments}")
        noise = math.sqrt(1 - beta * beta) * noise + beta * fresh_noise
    return data, noise, t


def line_at(
    states: Tensor, fresh_noise: Tensor, t: Tensor, *, segments: int = 1, shift: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The straight piece on which t (B,) lies, extended to t = 0 and t = 1: → data, noise.

    So x_t = (1 − t)·data + t·noise lies on the piece, and noise − data is its slope: rf_loss needs
    no change for pieces. If t is a time at which two pieces meet, the lower piece (nearer to the
    data) is taken, because a sampler that arrives at this time goes on along that piece. Arguments
    as in `line`.
    """
    K = states.shape[1] - 1
    if K == 0:
        return states[:, 0], fresh_noise
    if segments < 1 or K % segments:
        raise ValueError(f"segments = {segments} must divide the {K} of the states")
    states = states[:, :: K // segments]  # (B, segments + 1, ...)
    if segments == 1:
        return states[:, 1], states[:, 0]
    times = _grid(segments, shift, states.device)
    piece = (times[1:-1] >= t[:, None]).sum(1)  # (B,): how many pieces lie nearer to the noise
    rows = torch.arange(len(states), device=states.device)
    upper, lower = states[rows, piece], states[rows, piece + 1]  # (B, ...) each
    velocity = (upper - lower) / _per_sample(times[piece] - times[piece + 1], upper)
    data = lower - _per_sample(times[piece + 1], lower) * velocity
    return data, data + velocity


def _grid(steps: int, shift: float, device) -> Tensor:
    """timesteps as a tensor, made on the device: a list would need a copy from the host."""
    return shift_time(1 - torch.arange(steps + 1, device=device) / steps, shift)


def transport_cost(data: Tensor, noise: Tensor) -> Tensor:
    """‖noise − data‖² of pairs, (B,): reflow never raises the mean (2209.03003, Theorem 3.5)."""
    _same_shape(data, noise)
    return (noise - data).reshape(len(data), -1).square().sum(1)


# ------------------------------------------------------------------------------------------------
# Averages of the weights (EDM2: Karras et al. 2023, 2312.02696, section 3)
# ------------------------------------------------------------------------------------------------


# While the learning rate is high the weights do not settle: each batch pushes them about, around a
# point that moves slowly. Their average over the last part of the run lies nearer to that point. So
# all pictures and validation losses here use averaged weights. An average is kept in fp32: at step
# n it moves by (γ + 1)/n of its distance to the weights, which bf16 would soon round to nothing.


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent γ whose profile has relative width σ (EDM2, eq. 126): 0.05 → 16.97, 0.10 → 6.94.

    σ² = (γ + 1) / ((γ + 2)²(γ + 3)) as a cubic in γ; its largest real root. σ in [0.001, 0.2887).
    """
    if not 1e-3 <= sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel = {sigma_rel} must lie in [0.001, {12**-0.5:.4f})")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def keep_averages(adamw: torch.optim.Optimizer, widths: Sequence[float]):
    """From its next step on, AdamW also averages the weights that it updates.

    Each weight gets a state "ema_<width>" beside Adam's moments, θ̂(t) ∝ ∫₀ᵗ τ^γ θ(τ) dτ in fp32.
        θ̂ ← β·θ̂ + (1 − β)·θ,   β_t = (1 − 1/t)^{γ+1},   t = 1, 2, … steps   (EDM2, eq. 127)
    An exponential average has a fixed length in steps. In a long run this length is too short. In a
    short run it is too long: the average still holds the initial weights. Here step
    τ has a weight ∝ τ^γ. The width is the standard deviation of τ under these weights, as a share
    of the run so far, so one value suits every length. t is counted in each parameter group as
    "updates". The averages are states of the optimizer, so state_dict saves them and
    load_state_dict loads them. Under ZeRO-2 AdamW's weights are flat shards, so each rank holds
    only its shard of the averages; a whole one might not fit. The hook runs after a step of AdamW,
    so a skipped step does not count. It is a hook and not a subclass, because DeepSpeed accepts
    AdamW itself but not a subclass of it. Call keep_averages before DeepSpeed takes the optimizer
    over.
    """
    gammas = {average_name(width): gamma_from_sigma_rel(width) for width in widths}
    if len(gammas) < len(widths):
        raise ValueError(f"widths {widths} must differ in their first two decimals")
    if getattr(adamw, "averaged", None):  # a second hook would count each step twice
        raise ValueError(f"it keeps averages of widths {adamw.averaged} already")
    adamw.averaged = [*widths]

    @torch.no_grad()
    def update(adamw, args, kwargs):  # after each step; under ZeRO-2 that is one group at a time
        for group in adamw.param_groups:
            group["updates"] = t = group.get("updates", 0) + 1
            weights = [w for w in group["params"] if w in adamw.state]
            for name, gamma in gammas.items():
                for w in weights:
                    if name not in adamw.state[w]:
                        adamw.state[w][name] = w.detach().clone()
                averages = [adamw.state[w][name] for w in weights]
                if averages:
                    torch._foreach_lerp_(averages, weights, 1 - (1 - 1 / t) ** (gamma + 1))

    adamw.register_step_post_hook(update)


def average_name(width: float) -> str:
    """The name of the average of this relative width, as a state of the optimizer."""
    return f"ema_{width:.2f}"


@torch.no_grad()
def exchange_averages(adamw: torch.optim.Optimizer, name: str):
    """Swap every weight that AdamW updates with its average; a second call restores both.

    To evaluate, swap, draw, and swap back. In place, because the network (chapter 1) and DeepSpeed
    (chapter 2) keep references to these tensors; in parts of 64 MiB, so that no second copy of the
    weights is held.
    """
    if not any(name in state for state in adamw.state.values()):
        raise ValueError(f"no average {name!r} is kept")
    for group in adamw.param_groups:
        for weight in group["params"]:
            if name in adamw.state.get(weight, {}):
                average = adamw.state[weight][name].view(-1).split(2**24)
                for w, a in zip(weight.data.view(-1).split(2**24), average, strict=True):
                    kept = w.clone()
                    w.copy_(a)
                    a.copy_(kept)


def posthoc_coefficients(
    snapshots: Sequence[tuple[int, float]], step: int, sigma_rel: float
) -> np.ndarray:
    """Coefficients with which a sum of stored averages comes nearest to an average that was not
    stored (EDM2, section 3.2).

    snapshots: (step, sigma_rel) of each stored average, say of two profiles at several checkpoints.
    step, sigma_rel: of the wanted average; step is not later than the last snapshot. Returns one
    coefficient for each snapshot. They come from a least-squares fit of the profiles p(τ) =
    (γ+1)·τ^γ / T^{γ+1} on [0, T], whose inner products have closed forms. The coefficients are then
    divided by their sum, so that the result is a mean.
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
    shares = np.linalg.lstsq(gram, np.array([product(a, wanted) for a in stored]), rcond=None)[0]
    return shares / shares.sum()
