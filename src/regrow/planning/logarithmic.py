"""The allocation by depth alone: what a layer loses grows with the logarithm of its number."""

import math

from regrow.planning.counts import Counts
from regrow.planning.demand import Demand, settle_counts

BISECTIONS = 60


def log_increasing(demand: Demand, first_share: float) -> Counts:
    """Layer i of the L that may be cut loses the share `r_i = r_0 + (r_{L-1} - r_0) · log(i + 1) / log(L)` (SlimGPT).

    SlimGPT (arXiv 2412.18110) gives both ends; here `r_0` is `first_share` of the mean share and the other end is what
    the target leaves. Attention and FFN of a layer lose the same share; a group at its limit loses no more.
    """
    layers = sorted({group.layer for group in demand.groups})
    depth = {number: math.log(i + 1) / math.log(max(len(layers), 2)) for i, number in enumerate(layers)}
    mean = demand.amount / sum(demand.price[group.name] * group.units for group in demand.groups)

    def counts(last: float) -> dict[str, float]:
        first = first_share * mean
        shares = {g.name: first + (last - first) * depth[g.layer] for g in demand.groups}
        return {
            g.name: min(max(shares[g.name] * g.units, demand.gone[g.name]), demand.limit[g.name]) for g in demand.groups
        }

    low, high = first_share * mean, mean
    while sum(demand.price[name] * count for name, count in counts(high).items()) < demand.amount and high < 1e6:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        last = (low + high) / 2
        enough = sum(demand.price[name] * count for name, count in counts(last).items()) >= demand.amount
        low, high = (low, last) if enough else (last, high)
    rounded = {name: math.floor(count + 0.5) for name, count in counts(high).items()}
    order = [group.name for group in (*demand.of_kind(ffn=True), *demand.of_kind(ffn=False))]
    return settle_counts(demand, rounded, order)
