"""Exact nearest neighbours of patches in a memory bank, by Euclidean distance.

The winner is the row m with the least ||m||^2 / 2 - u.m, one matrix product for all queries u. That form
cancels near zero, so the winner's distance is then taken from the difference u - m: every route (this one,
faiss, an exported graph) gives the same value, and the value is right down to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.errors import UsageError

if TYPE_CHECKING:
    import faiss

_BLOCK = 4096  # bank rows that all queries meet at once, where their number is not known
_BLOCK_ON_GRIDS = 1024  # bank rows that a picture's patches meet at once: products stay in the cache
_MOST_ON_GRIDS = 1024  # patches of a picture that meet the bank at once
_WORTH_RESAMPLING = (
    128  # multiply-adds saved for each patch and row: below, resampling products costs as much
)
_GROUP = 64  # columns whose minimum is taken first; any value gives the same answer


class Nearest(NamedTuple):
    """Squared Euclidean distances, (N,) or (N, k), and the bank rows that they lead to, int64."""

    squared_distance: Tensor
    row: Tensor


def nearest(
    queries: Tensor,
    bank: Tensor,
    *,
    chunk: int | None = 1024,
    query_owners: Tensor | None = None,
    bank_owners: Tensor | None = None,
) -> Nearest:
    """The nearest bank row of each query. Ties go to the lowest row.

    The squared distance carries a gradient to queries and bank; the choice of the row does not. Without
    owners there is no control flow that depends on data, so the function can be traced.

    Args:
        queries: (N, D).
        bank: (M, D).
        chunk: queries a product, which bounds its memory to 4 * chunk * M bytes. None: all at once, as an
            export with a free number of queries needs it, and the bank in blocks, 16 KiB a query.
        query_owners: (N,) int64. A query never meets a bank row of its own owner (leave one out).
        bank_owners: (M,) int64, given together with `query_owners`.

    Raises:
        UsageError: shapes that do not fit, or a query all of whose bank rows are left out.
    """
    _check(queries, bank)
    if (query_owners is None) != (bank_owners is None):
        raise UsageError("Only one of query_owners and bank_owners is given.", "Give both or neither.")
    if chunk is None and query_owners is None:
        index = _winner_by_blocks(queries.detach(), bank.detach())
        return Nearest((queries - bank[index]).square().sum(1), index)
    half_norms = half_squared_norms(bank)
    starts = range(0, len(queries), chunk) if chunk else (0,)
    winners = []
    for start in starts:
        part = slice(start, start + chunk if chunk else None)
        product = _product(queries[part].detach(), bank.detach(), half_norms)
        if query_owners is not None and bank_owners is not None:
            _leave_out(product, query_owners[part], bank_owners)
        winners.append(_least(product)[1])
    index = winners[0] if len(winners) == 1 else torch.cat(winners) if winners else _no_rows(queries)
    return Nearest((queries - bank[index]).square().sum(1), index)


def k_nearest(queries: Tensor, bank: Tensor, k: int, *, chunk: int | None = 1024) -> Nearest:
    """The k nearest bank rows of each query, nearest first: (N, k) squared distances and rows.

    Args:
        queries: (N, D).
        bank: (M, D), M >= k.
        k: number of neighbours.
        chunk: queries a product; None as in `nearest`.

    Raises:
        UsageError: shapes that do not fit, or k beyond the bank.
    """
    _check(queries, bank)
    if not 1 <= k <= len(bank):
        raise UsageError(
            f"k = {k} neighbours are asked of a bank of {len(bank)} rows.", "Ask for 1 to all of them."
        )
    if chunk is None:
        rows = _candidates_by_blocks(queries, bank, k)
        first = (queries[:, None] - bank[rows]).square().sum(2).topk(k, dim=1, largest=False)
        return Nearest(first.values, rows.gather(1, first.indices))
    half_norms = half_squared_norms(bank)
    squared, index = [queries.new_empty(0, k)], [_no_rows(queries).reshape(0, k)]
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        rows = _product(part, bank, half_norms).topk(k, dim=1, largest=False).indices  # (n, k)
        distances = (part[:, None] - bank[rows]).square().sum(2)
        order = distances.argsort(stable=True, dim=1)  # the product's rounding may have swapped near ties
        squared.append(distances.gather(1, order))
        index.append(rows.gather(1, order))
    return Nearest(torch.cat(squared), torch.cat(index))


def grids_pay(levels: Sequence[Tensor]) -> bool:
    """Whether `nearest_on_grids` is faster for these levels than `nearest` for the patches they make."""
    places = [level.shape[-2] * level.shape[-1] for level in levels]
    saved = sum(level.shape[1] * (1 - own / places[0]) for level, own in zip(levels, places, strict=True))
    return places[0] <= _MOST_ON_GRIDS and saved >= _WORTH_RESAMPLING


def half_squared_norms(bank: Tensor) -> Tensor:
    """||m||^2 / 2 of each bank row, (M,)."""
    return bank.detach().square().sum(1) / 2


def nearest_on_grids(levels: Sequence[Tensor], bank: Tensor, half_norms: Tensor) -> Tensor:
    """The nearest bank row (B, h, w) of patches that join levels, up to rounding that of `nearest`.

    Resampling is linear, so it commutes with products: each level meets its part of the bank on its own grid,
    and products are resampled. No gradient.

    Args:
        levels: two or more (B, C, h, w), the finest first, as they are before the others are resampled
            bilinearly to its grid and joined.
        bank: (M, the sum of C). half_norms: its rows', see `half_squared_norms`.
    """
    levels, bank = [level.detach() for level in levels], bank.detach()
    height, width = levels[0].shape[-2:]
    found = []
    for picture in zip(*levels, strict=True):  # (C, h, w) each
        index = _no_rows(bank)
        least = bank.new_empty(0)
        for start in range(0, len(bank), _BLOCK_ON_GRIDS):
            block = slice(start, start + _BLOCK_ON_GRIDS)
            product = _product_on_grids(picture, bank[block], half_norms[block])
            own_least, own = _least(product)
            index, least = (own, own_least) if start == 0 else _lower(index, least, own + start, own_least)
        found.append(index)
    return torch.stack(found).view(-1, height, width)


def _product_on_grids(levels: Sequence[Tensor], bank: Tensor, half_norms: Tensor) -> Tensor:
    """As `_product`, of one picture's levels (C, h, w): (h * w of the finest, M)."""
    fine, *coarse = levels
    height, width = fine.shape[-2:]
    of_fine, *of_coarse = torch.split(bank, [len(level) for level in levels], dim=1)
    products: list[Tensor] = []
    for level, part in zip(coarse, of_coarse, strict=True):
        # Weights of a resampling add up to 1, so that a norm stays what it is, and is counted once.
        norms = half_norms if not products else torch.zeros_like(half_norms)
        own = torch.addmm(norms, level.flatten(1).T, part.T, alpha=-1).view(1, *level.shape[-2:], -1)
        own = F.interpolate(
            own.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", align_corners=False
        )
        products.append(own.permute(0, 2, 3, 1).reshape(height * width, -1))
    product = products[0] if len(products) == 1 else torch.stack(products).sum(dim=0)
    return product.addmm_(fine.flatten(1).T, of_fine.T, alpha=-1)


def _lower(index: Tensor, least: Tensor, own: Tensor, own_least: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and keys, replaced where the own key is lower."""
    nearer = own_least < least
    return torch.where(nearer, own, index), torch.where(nearer, own_least, least)


class FlatIndex:
    """The same search by faiss on the CPU, its flat L2 index built once.

    Args:
        bank: (M, D).
    """

    def __init__(self, bank: Tensor) -> None:
        import faiss

        self.bank = bank.detach().cpu().float().contiguous()
        self.index: faiss.IndexFlatL2 = faiss.IndexFlatL2(bank.shape[1])
        self.index.add(self.bank.numpy())

    def nearest(self, queries: Tensor) -> Nearest:
        """As `nearest`, for queries (N, D) on the CPU, without a gradient."""
        _check(queries, self.bank)
        queries = queries.detach().float().contiguous()
        index = torch.from_numpy(self.index.search(queries.numpy(), 1)[1][:, 0])
        return Nearest((queries - self.bank[index]).square().sum(1), index)


def _check(queries: Tensor, bank: Tensor) -> None:
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise UsageError(
            f"Queries {tuple(queries.shape)} and bank {tuple(bank.shape)} do not fit.",
            "Give (N, D) queries and an (M, D) bank of the same D.",
        )
    if bank.shape[0] == 0:
        raise UsageError("The memory bank has no rows.", "Fit on at least one picture.")


def _no_rows(queries: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=queries.device)


def _product(queries: Tensor, bank: Tensor, half_norms: Tensor) -> Tensor:
    """(n, M): half the squared distance, less ||u||^2 / 2, which changes no winner."""
    return torch.addmm(half_norms, queries, bank.T, alpha=-1)


def _winner_by_blocks(queries: Tensor, bank: Tensor) -> Tensor:
    """(n,) nearest row of each query, the lowest of equals."""
    index, least = _no_rows(queries), queries.new_empty(0)
    for start in range(0, len(bank), _BLOCK):
        block = bank[start : start + _BLOCK]
        product = _product(queries, block, block.square().sum(1) / 2)
        own_least, own = _least(product)
        index, least = (own, own_least) if start == 0 else _lower(index, least, own + start, own_least)
    return index


def _candidates_by_blocks(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """(n, k) nearest rows of each query, in any order."""
    rows, least = [], []
    for start in range(0, len(bank), _BLOCK):
        block = bank[start : start + _BLOCK]
        product = _product(queries, block, block.square().sum(1) / 2)
        found = product.topk(min(k, len(block)), dim=1, largest=False)
        rows.append(found.indices + start)
        least.append(found.values)
    nearest_of_all = torch.cat(least, dim=1).topk(k, dim=1, largest=False).indices
    return torch.cat(rows, dim=1).gather(1, nearest_of_all)


def _leave_out(product: Tensor, query_owners: Tensor, bank_owners: Tensor) -> None:
    """Put +inf where a bank row belongs to the query's own owner."""
    for owner in sorted(set(query_owners.tolist())):
        rows = (query_owners == owner).nonzero()  # (r, 1)
        columns = (bank_owners == owner).nonzero()[:, 0]
        if len(columns) == len(bank_owners):
            raise UsageError(
                f"Every bank row belongs to owner {owner}, so leaving it out leaves nothing.",
                "Fit on pictures of at least two owners (pictures or groups).",
            )
        product[rows, columns] = torch.inf


def _least(product: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's least value and its column, the first of equals, (n,) each.

    The minimum of 64 columns at a time vectorises where an argmin over the whole row does not: a third of
    its time. Both steps take the first of equals, so the answer is the plain one.
    """
    num_rows = product.shape[1]
    if num_rows % _GROUP:
        least, column = product.min(1)
        return least, column
    groups = product.reshape(-1, num_rows // _GROUP, _GROUP)  # (n, M / 64, 64)
    group = groups.amin(2).argmin(1)  # (n,)
    best = groups.gather(1, group[:, None, None].expand(-1, 1, _GROUP))[:, 0]  # (n, 64)
    least, column = best.min(1)
    return least, group * _GROUP + column
