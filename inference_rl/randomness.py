"""Noise without state: every random number is a function of (seed, step, stream).

Whoever draws an episode, alone or in whatever batch, draws the same one bit for bit; nothing has to
be saved but its seed. The numbers are Philox4x32-10's: a block cipher of ten rounds applied to a
counter, here (block, stream, step), under a key, here the episode's seed.

Salmon, Moraes, Dror & Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3", SC '11, §3.3.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch import distributions as td

from inference_rl.distributions import SparseCategorical
from inference_rl.truncated_normal import TruncatedNormal

STATES, ACTIONS, EPISODES = 0, 1, 2
"""Streams: of the states that follow, of the actions, and of the episodes' own seeds. State s_t is
step t of its stream, and so is action a_t."""

_AHEAD = 128
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_WORD, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_ROUNDS = np.arange(10, dtype=np.uint64)[:, np.newaxis, np.newaxis] * _WEYL


def derived(seed: int, name: str) -> int:
    """A seed for one purpose ("environment", "policy", ...) of a run, in [0, 2^63).

    :param seed: of the run, any integer.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextlib.contextmanager
def torch_seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Within this context torch's generator of `device` starts from `seed`; later it is as before.

    `torch.manual_seed` sees to the generators of all devices, which takes a millisecond.
    """
    generator = torch.default_generator
    if torch.device(device).type == "cuda":
        index = torch.device(device).index
        generator = torch.cuda.default_generators[
            torch.cuda.current_device() if index is None else index
        ]
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def episode_seeds(seed: int, episodes: np.ndarray) -> np.ndarray:
    """The seeds of the episodes numbered `episodes`, (N,) uint64, whatever their company.

    :param seed: of the run, in [0, 2^64); see `derived`.
    :raises ValueError: it is not.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(
            f"seed: expected an integer in [0, 2^64), got {seed}; derived(seed, name) makes one of "
            "any integer"
        )
    key = np.full(len(episodes), seed, dtype=np.uint64)
    words = _words(key, np.asarray(episodes).astype(np.uint64), EPISODES, 1)
    seeds: np.ndarray = words[0, 0] | words[1, 0] << _WORD
    return seeds


def uniforms(seeds: np.ndarray, steps: np.ndarray | int, stream: int, size: int) -> Tensor:
    """`size` numbers for each seed, (N, size) float64, uniform on the open interval (0, 1).

    :param seeds: (N,) uint64. :param steps: (N,), or one for all, >= 0.
    :param stream: in [0, 2^32).

    They are odd multiples of 2^-53, so that neither 0 nor 1 comes up, nor a number whose
    complement is rounded.
    """
    return torch.from_numpy(_uniforms(seeds, steps, stream, size))


def _uniforms(seeds: np.ndarray, steps: np.ndarray | int, stream: int, size: int) -> np.ndarray:
    given = np.broadcast_to(np.asarray(steps).astype(np.uint64), seeds.shape)
    words = _words(seeds.astype(np.uint64, copy=False), given, stream, (size + 1) // 2)
    # Words 0 and 2 are the even ones, 1 and 3 the odd ones: 52 bits of each pair.
    mantissas = (words[:2] >> np.uint64(6)) << np.uint64(26) | words[2:] >> np.uint64(6)
    numbers: np.ndarray = (mantissas.astype(np.float64) + 0.5) * 2.0**-52
    return numbers.transpose(2, 1, 0).reshape(len(seeds), -1)[:, :size]


def _words(keys: np.ndarray, steps: np.ndarray, stream: int, blocks: int) -> np.ndarray:
    """Words 0, 2, 1 and 3 of each block, (4, blocks, N)."""
    even = np.empty((2, blocks, len(keys)), dtype=np.uint64)
    odd = np.empty_like(even)
    even[0], even[1] = np.arange(blocks, dtype=np.uint64)[:, np.newaxis], steps & _LOW
    odd[0], odd[1] = stream, steps >> _WORD
    return philox(even, odd, keys)


def philox(even: np.ndarray, odd: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Philox4x32-10.

    :param even: words 0 and 2 of the counters, (2, blocks, N) uint64 below 2^32.
    :param odd: words 1 and 3. :param keys: (N,) uint64.
    :returns: words 0, 2, 1 and 3 of the results, (4, blocks, N) uint64 below 2^32.
    """
    halves = np.stack([keys & _LOW, keys >> _WORD])
    for key in (halves + _ROUNDS & _LOW)[:, :, np.newaxis]:
        product = even * _MULTIPLIERS[:, np.newaxis]
        even = (product >> _WORD)[::-1] ^ odd ^ key
        odd = (product & _LOW)[::-1]
    return np.concatenate([even, odd])


class Ahead:
    """The same numbers as `uniforms` gives, made for many steps of an episode at once.

    :param size: how many rows ask, each for one episode at a time.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows = np.arange(size)
        self._tables: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def uniforms(self, seeds: np.ndarray, steps: np.ndarray, stream: int, size: int) -> np.ndarray:
        """As the function of this name, for `self.size` rows, and as an array."""
        if (stream, size) not in self._tables:
            first = np.full(self.size, -_AHEAD)
            table = np.empty((self.size, _AHEAD, size))
            self._tables[stream, size] = np.zeros(self.size, dtype=np.uint64), first, table
        known, first, table = self._tables[stream, size]
        column = steps - first
        old = (known != seeds) | (column < 0) | (column >= _AHEAD)
        if old.any():
            stale = np.flatnonzero(old)
            known[stale], first[stale] = seeds[stale], steps[stale]
            column[stale] = 0
            following = steps[stale, np.newaxis] + np.arange(_AHEAD)
            fresh = _uniforms(np.repeat(seeds[stale], _AHEAD), following.ravel(), stream, size)
            table[stale] = fresh.reshape(stale.size, _AHEAD, size)
        numbers: np.ndarray = table[self._rows, column]
        return numbers


def draw(
    distribution: td.Distribution,
    seeds: np.ndarray,
    steps: np.ndarray | int,
    stream: int,
    ahead: Ahead | None = None,
) -> Tensor:
    """A draw from a distribution of batch shape (N,), as `distribution.sample()` would give.

    Row i is a function of row i of the distribution, seeds[i], steps[i] and the stream alone.

    :param stream: in [0, 256). :param ahead: where numbers wait, for whoever draws step by step.
    :raises ValueError: the batch shape is not (N,).
    :raises TypeError: a distribution of which no single row can be drawn.

    By the inverse of its distribution function where that is known: categorical, normal, uniform
    and truncated normal distributions, what transforms or wraps them, and whatever has an `icdf`.
    What has a function `of_noise`, of standard normals of the shape of a draw, by that.
    Others row by row with torch's generator seeded for each: slow, and equally pure. A value of
    probability zero is never drawn.
    """
    if distribution.batch_shape != (len(seeds),):
        raise ValueError(
            f"draw: expected a distribution of batch shape ({len(seeds)},), one row for each seed, "
            f"got {tuple(distribution.batch_shape)} from {distribution}; .expand makes it larger"
        )
    with torch.no_grad():
        noise = _Noise(seeds, steps, stream, ahead)
        return _draw(distribution, torch.Size([len(seeds)]), noise)


class _Noise:
    """The noise of one draw: each call of `take` gives numbers that no other call gave."""

    def __init__(
        self, seeds: np.ndarray, steps: np.ndarray | int, stream: int, ahead: Ahead | None
    ) -> None:
        self.seeds, self.steps, self.stream, self.ahead = seeds, steps, stream, ahead
        self.parts = 0

    def take(self, shape: torch.Size) -> Tensor:
        """Uniform numbers of shape (N, ...)."""
        return torch.from_numpy(self.take_array(shape))

    def take_array(self, shape: torch.Size) -> np.ndarray:
        stream = self.stream + (self.parts << 8)
        self.parts += 1
        make: Any = _uniforms if self.ahead is None else self.ahead.uniforms
        numbers: np.ndarray = make(self.seeds, self.steps, stream, shape[1:].numel())
        return numbers.reshape(shape)

    def standard_normals(self, shape: torch.Size) -> Tensor:
        return torch.special.ndtri(self.take(shape))

    def rows(self) -> list[int]:
        """A seed for torch's generator for each row."""
        return (self.take(torch.Size([len(self.seeds), 1])) * 2.0**52).long().flatten().tolist()


def _draw(distribution: Any, shape: torch.Size, noise: _Noise) -> Tensor:
    """A draw of batch shape `shape`, to which that of the distribution may have to be expanded."""
    d = distribution
    value: Tensor
    if isinstance(d, td.Categorical):  # first, as the most common
        return _category(d.probs, shape, noise)
    if isinstance(d, td.Independent | ExpandedDistribution | MaskedDistribution):
        return _draw(d.base_dist, _inner(d, shape), noise)
    if isinstance(d, td.TransformedDistribution):
        value = _draw(d.base_dist, _inner(d, shape), noise)
        for transform in d.transforms:
            value = transform(value)
        return value
    if isinstance(d, SparseCategorical):
        slot = _category(d.probs, shape, noise).unsqueeze(-1)
        return d.states.expand(*shape, -1).gather(-1, slot).squeeze(-1)
    if isinstance(d, td.Bernoulli):
        return (noise.take(shape) < d.probs).to(d.probs.dtype)
    if isinstance(d, td.Normal):
        return (d.loc + d.scale * noise.standard_normals(shape)).to(d.loc.dtype)
    if isinstance(d, td.Uniform):
        value = (d.low + (d.high - d.low) * noise.take(shape)).to(d.low.dtype)
        return torch.minimum(value, torch.nextafter(d.high, d.low))
    if isinstance(d, TruncatedNormal):
        return d.icdf(noise.take(shape), look=True).to(d.loc.dtype)
    if isinstance(d, td.MultivariateNormal):
        return _linear(d.loc, d.scale_tril, shape, noise)
    if hasattr(d, "_axes") and hasattr(d, "_scales"):
        return _linear(d.loc, d._axes * d._scales, shape, noise)  # our SingularNormal
    if type(d).__name__ == "Delta":
        return d.v.expand(shape + d.event_shape).clone()
    if hasattr(d, "mask_") and hasattr(d, "base"):  # our point mass where an episode has ended
        return d._select(_draw(d.base, shape, noise))
    if hasattr(d, "of_noise"):
        value = d.expand(shape).of_noise(noise.standard_normals(shape + d.event_shape))
        return value
    if isinstance(d, td.MixtureSameFamily):
        which = _category(d.mixture_distribution.probs, shape, noise)
        parts = d.component_distribution
        return _pick(_draw(parts, shape + parts.batch_shape[-1:], noise), which, len(shape))
    if hasattr(d, "components") and hasattr(d, "log_weights"):  # our mixture of any families
        weights = d.log_weights.exp().expand(*shape, -1)
        which = _category(weights, shape, noise)
        drawn = [_draw(part, shape, noise) for part in d.components]
        return _pick(torch.stack(drawn, dim=len(shape)), which, len(shape))
    return _by_quantiles(d, shape, noise)


def _inner(distribution: Any, shape: torch.Size) -> torch.Size:
    """The batch shape of what `distribution` wraps, if its own is to be `shape`."""
    return shape + distribution.base_dist.batch_shape[len(distribution.batch_shape) :]


def _category(probs: Tensor, shape: torch.Size, noise: _Noise) -> Tensor:
    # NumPy's small operations take a fraction of torch's time.
    cumulative = np.add.accumulate(probs.numpy(), axis=-1, dtype=np.float64)
    total = cumulative[..., -1:]
    threshold = noise.take_array(shape)[..., np.newaxis] * total
    # `< total`, so that rounding can never select a category past the last possible one.
    passed = (cumulative <= threshold) & (cumulative < total)
    return torch.from_numpy(passed.argmin(-1))  # the first that was not


def _linear(loc: Tensor, factor: Tensor, shape: torch.Size, noise: _Noise) -> Tensor:
    """loc + factor @ standard normals, column by column: the sums of a matrix product are grouped
    by the size of the batch, and would not be the same to the last bit in another one."""
    standard = noise.standard_normals(shape + factor.shape[-1:])
    value = loc.double().expand(*shape, -1)
    for column in range(factor.shape[-1]):
        value = value + factor[..., column] * standard[..., column : column + 1]
    return value.to(loc.dtype)


def _pick(drawn: Tensor, which: Tensor, dim: int) -> Tensor:
    """Of components drawn along dimension `dim`, those chosen."""
    index = which.reshape(which.shape + (1,) * (drawn.dim() - dim))
    return drawn.gather(dim, index.expand(*which.shape, 1, *drawn.shape[dim + 1 :])).squeeze(dim)


def _by_quantiles(distribution: Any, shape: torch.Size, noise: _Noise) -> Tensor:
    if distribution.event_shape == ():
        try:
            value: Tensor = distribution.icdf(noise.take(shape))
        except (NotImplementedError, AttributeError):
            pass
        else:
            return value.to(_dtype(distribution))
    return _row_by_row(distribution, shape, noise)


def _dtype(distribution: Any) -> torch.dtype:
    """That of the parameters, which `sample` gives too."""
    values = (getattr(distribution, name) for name in distribution.arg_constraints)
    return next((v.dtype for v in values if isinstance(v, Tensor)), torch.get_default_dtype())


def _row_by_row(distribution: Any, shape: torch.Size, noise: _Noise) -> Tensor:
    expanded = distribution.expand(shape)
    names = [n for n in expanded.arg_constraints if n in vars(expanded) or n not in _EITHER]
    try:
        given = {name: getattr(expanded, name) for name in names}
        rows = [type(expanded)(**{n: v[i] for n, v in given.items()}) for i in range(shape[0])]
    except Exception as error:
        raise TypeError(
            f"draw: a single row of {type(distribution).__name__} cannot be drawn, because its "
            "arg_constraints do not name what its constructor takes; write its icdf, or build it "
            f"of Pyro's own distributions ({type(error).__name__}: {error})"
        ) from error
    if not names:
        raise TypeError(
            f"draw: a single row of {type(distribution).__name__} cannot be drawn, because its "
            "arg_constraints name no parameters; name them, or write its icdf"
        )
    drawn = []
    with torch.random.fork_rng(devices=[]):
        for row, seed in zip(rows, noise.rows(), strict=True):
            torch.manual_seed(seed)
            drawn.append(row.sample())
    return torch.stack(drawn)


_EITHER = {"probs", "logits"}
"""Two forms of one parameter; a distribution keeps the one it was given."""
