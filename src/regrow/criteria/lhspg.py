"""LoRAShear's saliencies: what LoRA has so far wanted to do with a unit (arXiv 2310.18356, §4).

x is everything that a unit owns of the base weights (rows of its producers, columns of its consumers), d the
displacement `s(BA)` that LoRA has accumulated on the same entries, the current period's share only: where a
period has begun with the factors `(A₀, B₀)`, `x = W + s B₀A₀` and `d = s(BA − B₀A₀)`; that is the paper's
merge of BA into x at the end of a period, without writing a base weight. Before any training d is zero, and so
are all terms but the magnitudes: hence the schedule's warm-up.

The formulas are those of the authors' OTO repository (`importance_score/*_lhspg`), which sums over producers'
rows and biases only, leaves s out, and takes the displacement since the beginning.
"""

from jaxtyping import Float
from torch import Tensor, stack, zeros

from regrow.criteria.evidence import Evidence, Linear


def magnitude(evidence: Evidence) -> Float[Tensor, " units"]:
    """`‖x‖₂`."""
    return _products(evidence)[0].sqrt()


def mean_magnitude(evidence: Evidence) -> Float[Tensor, " units"]:
    """`‖x‖₂ / n`, n being the number of entries of x.

    The repository's DHSPG divides by n; its LHSPG function divides by the number of units, which would make a
    score depend on the width of the layer, and is never reached, as the name also matches `magnitude`.
    """
    return _mean(_products(evidence), evidence)


def cosine(evidence: Evidence) -> Float[Tensor, " units"]:
    """`1 + cos(x, d)`: near 0 if training shrinks the unit, 2 if it lets it grow, 1 if it does neither."""
    return _cosine(_products(evidence))


def first_order(evidence: Evidence) -> Float[Tensor, " units"]:
    """`|<x, d>|`: d stands for the negative gradient, summed along the path of the training."""
    return _products(evidence)[2].abs()


def second_order(evidence: Evidence) -> Float[Tensor, " units"]:
    """`½ <x, d>²`."""
    return 0.5 * _products(evidence)[2].square()


def lhspg(evidence: Evidence) -> dict[str, Float[Tensor, " units"]]:
    """All five as terms of equal weight (0.2), each to be divided by its 2-norm over the whole model."""
    products = _products(evidence)
    return {
        "magnitude": products[0].sqrt(),
        "mean-magnitude": _mean(products, evidence),
        "cosine": _cosine(products),
        "first-order": products[2].abs(),
        "second-order": 0.5 * products[2].square(),
    }


def cosine_and_second_order(evidence: Evidence) -> dict[str, Float[Tensor, " units"]]:
    """Which way training takes a unit, and how much that matters to the loss: cosine and second order, of equal weight.

    The combination of the authors with the weights of the other three at zero.
    """
    products = _products(evidence)
    return {"cosine": _cosine(products), "second-order": 0.5 * products[2].square()}


def _mean(products: Float[Tensor, "3 units"], evidence: Evidence) -> Float[Tensor, " units"]:
    entries = sum(linear.positions.shape[1] * linear.weight.shape[1 - linear.axis] for linear in evidence.linears)
    return products[0].sqrt() / entries


def _cosine(products: Float[Tensor, "3 units"]) -> Float[Tensor, " units"]:
    tiny = 1e-30  # no displacement has no direction: 1
    cosines = products[2] / (products[0].sqrt() * products[1].sqrt()).clamp(min=tiny)
    return 1 + cosines.clamp(-1, 1)  # where squares are too small for float32, their product with x is not


def _products(evidence: Evidence) -> Float[Tensor, "3 units"]:
    """`‖x‖²`, `‖d‖²` and `<x, d>` of every unit."""
    return stack([_products_of(linear) for linear in evidence.linears]).sum(0)


def _products_of(linear: Linear) -> Float[Tensor, "3 units"]:
    per_position = zeros(3, linear.weight.shape[linear.axis], device=linear.weight.device)
    for rows in linear.row_blocks():
        x, d = linear.start_weight(rows), linear.displacement(rows)
        for total, product in zip(per_position, (x * x, d * d, x * d), strict=True):
            if linear.axis == 0:
                total[rows] = product.sum(1)
            else:
                total += product.sum(0)
    return stack([linear.per_unit(values) for values in per_position])
