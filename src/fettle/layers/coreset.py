"""A memory bank's coreset: greedy k-centre selection, exact and fast, and its bounded-memory stream.

Greedy k-centre (Gonzalez 1985) picks, again and again, the row farthest from the rows picked so far; its
radius is at most twice the best possible. PatchCore (Roth et al., CVPR 2022) chooses on a randomly
projected copy of the rows (Johnson-Lindenstrauss) and keeps the rows themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from fettle.errors import UsageError
from fettle.protocols import Progress, no_progress

BLOCK_BYTES = 2**21  # of the matrix product's buffer: about a core's cache
_NUM_CANDIDATES = 2048
_PICKS_A_ROUND = 256
_ROUNDING = 2e-6  # of a row's squared norm: what fp32 leaves of the distance between two equal rows
_BYTES_A_ROW = 40  # owner, arrival, norm, key and masks of one buffered row
_MIB = 2**20


# --- projection


def projection_dims(num_rows: int, eps: float = 0.9) -> int:
    """Johnson-Lindenstrauss dimensions that keep the squared distances of `num_rows` rows within 1 +- eps."""
    if num_rows < 2 or not 0 < eps < 1:
        raise UsageError(
            f"No projection for {num_rows} rows at eps = {eps}.", "Give at least 2 rows, 0 < eps < 1."
        )
    return int(4 * math.log(num_rows) / (eps**2 / 2 - eps**3 / 3))


def sparse_projection(num_in: int, num_out: int, generator: Generator) -> Tensor:
    """(num_in, num_out) sparse sign projection (Li et al., KDD 2006).

    An entry is other than 0 with probability 1 / sqrt(num_in), and then +-sqrt(sqrt(num_in) / num_out), so
    squared lengths are kept on average.
    """
    density = 1 / math.sqrt(num_in)
    kept = torch.rand(num_in, num_out, generator=generator) < density
    positive = torch.rand(num_in, num_out, generator=generator) < 0.5
    size = math.sqrt(1 / (density * num_out))
    return torch.where(positive, size, -size) * kept


def draw_projection(num_features: int, num_rows: int, generator: Generator) -> Tensor | None:
    """The projection for `num_rows` expected rows, or None where it would not make them shorter."""
    dims = projection_dims(max(num_rows, 2))
    return sparse_projection(num_features, dims, generator) if dims < num_features else None


def project(rows: Tensor, projection: Tensor | None) -> Tensor:
    """Rows (M, D) as (M, dims) for the selection, less their mean: shorter rows cancel less in fp32."""
    if projection is None:
        return rows - rows.mean(0)
    projected = rows @ projection
    return projected.sub_(projected.mean(0))


# --- selection


@dataclass(frozen=True)
class Selection:
    """Rows picked by greedy k-centre.

    Attributes:
        indices: (l,) int64, in the order of picking.
        squared_keys: (l,) float32, each pick's squared distance to the picks before it; inf for the first.
        squared_radius: squared distance of the farthest row from its nearest pick.
        exhausted: fewer rows were picked than asked, since every other row equals a pick.
    """

    indices: Tensor
    squared_keys: Tensor
    squared_radius: float
    exhausted: bool


def select_greedy(
    rows: Tensor,
    num_picks: int,
    *,
    start: int | None = None,
    progress: Progress = no_progress,
    block_bytes: int = BLOCK_BYTES,
    num_candidates: int = _NUM_CANDIDATES,
    picks_a_round: int = _PICKS_A_ROUND,
) -> Selection:
    """Greedy k-centre, exact, in rounds.

    A row's key (half its squared distance to the nearest pick) can only fall, so the `num_candidates` rows
    of largest key hold the farthest row as long as their best is above the least key with which they came
    in. Within a round only they are updated; between rounds one matrix product brings all keys up to date.
    Ties go to the lowest index. Keys closer than fp32 rounding may swap two picks.

    Args:
        rows: (M, d) float32; subtract the mean first (`project`).
        num_picks: rows to pick, 1 to M.
        start: the first pick; by default the row nearest to the mean.
        progress: called once a round.
        block_bytes: bound on the product's buffer.
        num_candidates, picks_a_round: change the time, not the answer.

    Raises:
        UsageError: rows that are no (M, d) float32 tensor, or num_picks or start outside 1..M, 0..M-1.
    """
    _check(rows, num_picks, start)
    half_norms = _half_norms(rows, block_bytes)  # (M,)
    if start is None:
        mean = rows.mean(0)
        start = int(torch.argmin(half_norms - rows @ mean))
    keys = torch.full_like(half_norms, torch.inf)
    picks, pick_keys = [start], [torch.inf]
    fresh = [start]
    while True:
        _lower_keys(keys, rows, half_norms, fresh, block_bytes)
        progress("coreset", len(picks), num_picks)
        farthest = float(keys.max())
        if len(picks) == num_picks or farthest == 0:
            break
        fresh, fresh_keys = _pick_round(
            rows, half_norms, keys, min(picks_a_round, num_picks - len(picks)), num_candidates
        )
        picks += fresh
        pick_keys += fresh_keys
    return Selection(
        indices=torch.tensor(picks, device=rows.device),
        squared_keys=2 * torch.tensor(pick_keys, device=rows.device),
        squared_radius=2 * farthest,
        exhausted=len(picks) < num_picks,
    )


def select_approximate(
    rows: Tensor,
    num_picks: int,
    generator: Generator,
    *,
    progress: Progress = no_progress,
    block_bytes: int = BLOCK_BYTES,
) -> Selection:
    """Greedy k-centre on a seeded sample of 4 num_picks rows, then the farthest rows of all added.

    A sample loses rare rows, which are where false alarms come from; one pass over all rows therefore adds
    the num_picks // 10 that the sample's picks leave farthest. So up to num_picks + num_picks // 10 rows are
    picked. With no more than 4 num_picks rows the selection is exact, and of num_picks rows.

    Args, raises: as `select_greedy`.
    """
    _check(rows, num_picks, None)
    if len(rows) <= 4 * num_picks:
        return select_greedy(rows, num_picks, progress=progress, block_bytes=block_bytes)
    sample = torch.randperm(len(rows), generator=generator)[: 4 * num_picks].sort().values.to(rows.device)
    chosen = select_greedy(rows[sample], num_picks, progress=progress, block_bytes=block_bytes)
    picks = sample[chosen.indices]
    half_norms = _half_norms(rows, block_bytes)
    keys = torch.full_like(half_norms, torch.inf)
    _lower_keys(keys, rows, half_norms, picks.tolist(), block_bytes)
    added = keys.topk(num_picks // 10)
    distinct = added.values > 0
    more = added.indices[distinct]
    _lower_keys(keys, rows, half_norms, more.tolist(), block_bytes)
    return Selection(
        indices=torch.cat([picks, more]),
        squared_keys=torch.cat([chosen.squared_keys, 2 * added.values[distinct]]),
        squared_radius=2 * float(keys.max()),
        exhausted=chosen.exhausted and len(more) < num_picks // 10,
    )


def _check(rows: Tensor, num_picks: int, start: int | None) -> None:
    if rows.ndim != 2 or rows.dtype != torch.float32:
        raise UsageError(
            f"Rows {tuple(rows.shape)} of {rows.dtype} cannot be selected from.", "Give (M, d) float32."
        )
    if not 1 <= num_picks <= len(rows):
        raise UsageError(
            f"{num_picks} picks are asked of {len(rows)} rows.", "Ask for 1 pick to as many as rows."
        )
    if start is not None and not 0 <= start < len(rows):
        raise UsageError(f"The start row {start} is not one of {len(rows)} rows.", "Give a row's index.")


def _half_norms(rows: Tensor, block_bytes: int) -> Tensor:
    """Half the squared norms of rows (M, d), (M,), in row blocks: no squared copy of all rows."""
    step = max(1, block_bytes // (4 * max(rows.shape[1], 1)))
    return torch.cat([rows[i : i + step].square().sum(1) / 2 for i in range(0, len(rows), step)])


def _lower_keys(keys: Tensor, rows: Tensor, half_norms: Tensor, fresh: list[int], block_bytes: int) -> None:
    """keys <- min(keys, half squared distance to the nearest fresh pick), in place, in row blocks.

    What is within rounding of a pick becomes 0: it is a copy of it.
    """
    for first in range(0, len(fresh), _PICKS_A_ROUND):
        some = torch.tensor(fresh[first : first + _PICKS_A_ROUND], device=rows.device)
        centres = rows[some].T.contiguous()  # (d, P)
        offsets = -half_norms[some]
        step = max(1, block_bytes // (4 * len(some)))
        buffer = rows.new_empty(min(step, len(rows)), len(some))
        for begin in range(0, len(rows), step):
            block = slice(begin, min(begin + step, len(rows)))
            product = torch.addmm(offsets, rows[block], centres, out=buffer[: block.stop - begin])
            keys[block] = torch.minimum(keys[block], half_norms[block] - product.amax(1))
    keys.masked_fill_(keys <= half_norms * _ROUNDING, 0.0)
    keys[fresh] = 0.0


def _pick_round(
    rows: Tensor, half_norms: Tensor, keys: Tensor, most: int, num_candidates: int
) -> tuple[list[int], list[float]]:
    """Up to `most` picks and their keys, each the true farthest row. `keys` is left as it is."""
    everything = num_candidates >= len(rows)
    candidates = keys.topk(min(num_candidates, len(rows)), sorted=False).indices
    candidates = candidates.sort().values  # argmax then takes the lowest index of equals
    own_keys = keys[candidates]
    bound = -1.0 if everything else float(own_keys.min())
    own_rows, own_norms = rows[candidates], half_norms[candidates]
    zero = own_norms * _ROUNDING
    picks: list[int] = []
    pick_keys: list[float] = []
    buffer = torch.empty_like(own_norms)
    while len(picks) < most:
        best = int(own_keys.argmax())
        key = float(own_keys[best])
        if key <= bound or key <= float(zero[best]):
            break
        picks.append(best)
        pick_keys.append(key)
        torch.addmv(own_norms, own_rows, own_rows[best], alpha=-1, out=buffer)
        torch.minimum(own_keys, buffer.add_(own_norms[best]), out=own_keys)
        own_keys[best] = -1.0
    if not picks:  # the best ties with rows outside the candidates: the lowest index of all wins
        best = int(keys.argmax())
        return [best], [float(keys[best])]
    return candidates[picks].tolist(), pick_keys


# --- the stream


@dataclass(frozen=True)
class Chosen:
    """The rows that a memory bank is to hold.

    Attributes:
        arrivals: (k,) int64, their numbers among all rows added, from 0; sorted by owner and then by number.
        owners: (k,) int64, the picture that each row came from.
        radius: certificate: every row ever added is within it of a chosen row, in the projected space.
        reductions: how often the buffer was reduced; 1 means one exact selection over all rows.
        num_seen: rows added.
    """

    arrivals: Tensor
    owners: Tensor
    radius: float
    reductions: int
    num_seen: int


class CoresetStream:
    """Greedy k-centre over a stream of rows in bounded memory: merge and reduce.

    Rows are projected into a buffer, which is all that is held of them. When it is full, `select_greedy`
    keeps `cap` of them and the rest makes room. If all rows fit, the answer is one exact selection. Otherwise
    the certificate adds up the radii of the reductions (triangle inequality). The answer depends on the order
    of rows: add pictures in an order of their own (by content hash), not of listing.

    Args:
        num_features: D.
        cap: largest number k of rows to choose.
        projection: (D, dims) for the selection, or None to select on the rows as they are.
        memory_mib: bound on the buffer, the chosen rows and the selection together.
        expected_rows: the buffer is made for so many within that bound, and grows where more come.
        sample: generator of the approximate selection; None selects exactly.
        progress: passed on to the selection.
        block_bytes: bound on the selection's product.

    Raises:
        UsageError: a bound that cannot hold 2 * cap rows; the needed one is named.
    """

    def __init__(
        self,
        num_features: int,
        cap: int,
        *,
        projection: Tensor | None = None,
        memory_mib: int = 256,
        expected_rows: int = 0,
        sample: Generator | None = None,
        progress: Progress = no_progress,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        if cap < 1:
            raise UsageError(f"A memory bank of {cap} rows holds nothing.", "Set the cap to at least 1.")
        self.num_features = num_features
        self.cap = cap
        self.projection = projection
        self.sample = sample
        self.progress = progress
        self.block_bytes = block_bytes
        self.dims = num_features if projection is None else projection.shape[1]
        row_bytes = 4 * self.dims + _BYTES_A_ROW
        fixed = block_bytes + 4 * num_features * cap + 4 * self.dims * _NUM_CANDIDATES
        self.room = (memory_mib * _MIB - fixed) // row_bytes
        if self.room < 2 * cap:
            needed = math.ceil((fixed + 2 * cap * row_bytes) / _MIB)
            raise UsageError(
                f"{memory_mib} MiB cannot hold twice a bank of {cap} rows of {num_features} features.",
                f"Set memory_mib to at least {needed}, or the bank's cap lower.",
            )
        self._expected = max(expected_rows, 2 * cap)
        self._buffer = torch.empty(0, self.dims)  # (rows, dims), less the centre; those held come first
        self._centre = torch.zeros(self.dims)
        self._owners = self._arrivals = torch.empty(0, dtype=torch.int64)  # (rows,)
        self._held = 0
        self._seen = 0
        self._radius = 0.0
        self._reductions = 0

    def add(self, rows: Tensor, owner: int) -> None:
        """Append rows (n, D) of the picture `owner`; reduces whenever the buffer is full.

        Raises:
            UsageError: another number of features, or a row that is not finite.
        """
        if rows.ndim != 2 or rows.shape[1] != self.num_features:
            raise UsageError(f"Rows {tuple(rows.shape)} do not fit.", f"Give (n, {self.num_features}).")
        if not bool(torch.isfinite(rows).all()):
            raise UsageError(
                f"Features of picture {owner} hold NaN or infinity.", "Check the backbone's weights."
            )
        projected = rows.detach().float()
        if not self._seen:
            self._buffer, self._centre = self._buffer.to(projected), self._centre.to(projected)
            self.projection = None if self.projection is None else self.projection.to(projected)
        if self.projection is not None:
            projected = projected @ self.projection
        while len(projected):
            if self._held == self.room:
                self._reduce()
            if self._held == len(self._buffer):
                self._grow()
            part = projected[: min(self.room, len(self._buffer)) - self._held]
            projected = projected[len(part) :]
            added = slice(self._held, self._held + len(part))
            torch.sub(part, self._centre, out=self._buffer[added])
            self._owners[added] = owner
            self._arrivals[added] = torch.arange(self._seen, self._seen + len(part))
            self._held += len(part)
            self._seen += len(part)

    def finish(self) -> Chosen:
        """The chosen rows. Rows may be added afterwards and `finish` called again.

        Raises:
            UsageError: no row was ever added.
        """
        if not self._seen:
            raise UsageError("The memory bank has no rows.", "Fit on at least one picture.")
        if self._held > self.cap:
            self._reduce()
        owners, arrivals = self._owners[: self._held], self._arrivals[: self._held]
        order = arrivals.argsort()
        order = order[owners[order].argsort(stable=True)]
        return Chosen(arrivals[order], owners[order], self._radius, self._reductions, self._seen)

    def expect(self, num_rows: int) -> tuple[float, float]:
        """(seconds, MiB) that selecting from `num_rows` rows should take: see `predict`."""
        held = min(num_rows, self.room)
        full, rest = divmod(max(num_rows - self.cap, 0), self.room - self.cap)
        seconds = full * predict(self.room, self.dims, self.cap)[0] if full else 0.0
        seconds += predict(rest + self.cap, self.dims, self.cap)[0] if rest else 0.0
        kept = 4 * self.num_features * min(self.cap, num_rows)
        return seconds, (held * (4 * self.dims + _BYTES_A_ROW) + kept + self.block_bytes) / _MIB

    def _grow(self) -> None:
        """Make room for the rows that are expected, or for twice as many as there is."""
        rows = max(self._expected, 2 * len(self._buffer))
        if 2 * rows > self.room:  # the last growth: the former buffer beside it is then at most half
            rows = self.room
        for name in ("_buffer", "_owners", "_arrivals"):
            before = getattr(self, name)
            after = before.new_empty(rows, *before.shape[1:])
            after[: self._held] = before[: self._held]
            setattr(self, name, after)

    def _reduce(self) -> None:
        held = self._buffer[: self._held]
        mean = held.mean(0)  # shorter rows cancel less in fp32
        held -= mean
        self._centre += mean
        chosen = self._select(held)
        self._radius += math.sqrt(chosen.squared_radius)
        self._reductions += 1
        picks = chosen.indices.cpu()
        self._held = len(picks)
        self._buffer[: self._held] = held[chosen.indices]
        for values in (self._owners, self._arrivals):
            values[: self._held] = values[picks]

    def _select(self, projected: Tensor) -> Selection:
        progress, block_bytes = self.progress, self.block_bytes
        if self.sample is None:
            return select_greedy(projected, self.cap, progress=progress, block_bytes=block_bytes)
        # The approximate selection adds a tenth of what it picks: together they keep to the cap.
        most = max(10 * self.cap // 11, 1)
        return select_approximate(projected, most, self.sample, progress=progress, block_bytes=block_bytes)


# --- time and memory, known beforehand


def predict(num_rows: int, dims: int, num_picks: int) -> tuple[float, float]:
    """(seconds, MiB) of `select_greedy` on (num_rows, dims), from a probe of about 50 ms on this machine.

    The time is 2 * picks * rows * dims / (rate of the product) + rounds * (a top-k over the rows) + picks *
    (one update of the candidates).
    """
    most = 4096
    rows = torch.rand(most, dims)
    centres = torch.rand(dims, _PICKS_A_ROUND)
    row, buffer = rows[0].clone(), torch.empty(most, _PICKS_A_ROUND)
    keys = torch.rand(16 * most)
    candidates = min(_NUM_CANDIDATES, num_rows)
    product = _seconds(lambda: torch.mm(rows, centres, out=buffer).amax(1)) / (most * _PICKS_A_ROUND)
    update = _seconds(lambda: float(torch.minimum(rows[:candidates] @ row, keys[:candidates]).max()))
    top = _seconds(lambda: keys.topk(_NUM_CANDIDATES)) / len(keys)
    rounds = math.ceil(num_picks / (0.75 * _PICKS_A_ROUND))
    seconds = num_picks * num_rows * product + num_picks * update + rounds * num_rows * top
    block = min(BLOCK_BYTES, 4 * num_rows * _PICKS_A_ROUND)
    return seconds, (4 * num_rows * (dims + 4) + 4 * candidates * dims + block) / _MIB


def _seconds(work: Callable[[], object], budget: float = 0.015) -> float:
    """The least time of `work` among the runs that fit the budget, after one to warm up."""
    work()
    least, end = math.inf, time.perf_counter() + budget
    while True:
        begin = time.perf_counter()
        work()
        now = time.perf_counter()
        least = min(least, now - begin)
        if now >= end:
            return least
