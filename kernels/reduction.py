"""What losses of many terms have in common: whether the terms are added up, and what a mean divides by."""


def check_reduction(kernel, reduction, known=("none", "mean", "sum")):
    """Refuse a reduction that is not known, as PyTorch does."""
    if reduction not in known:
        expected = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        raise ValueError(f"{kernel}: reduction: got {reduction!r}, expected {expected}")


def check_fits(kernel, name, shapes, of):
    """Refuse an array that would make another one broadcast."""
    have, want = shapes[name], shapes[of]
    if len(have) > len(want) or any(n not in (1, m) for n, m in zip(have[::-1], want[::-1], strict=False)):
        raise ValueError(f"{kernel}: {name}: got shape {have}, expected one that broadcasts to {of}'s {want}")


def reduced(xp, terms, reduction, mass=None):
    """The terms themselves for "none", their sum, or that sum over its divisor."""
    if reduction == "none":
        return terms
    return per_term(xp.sum(terms, axis=None), terms, reduction, mass)


def per_term(total, terms, reduction, mass=None):
    """A number's part for each term: a loss, or the cotangent of one, over what the reduction divides by.

    That is `mass` where it is given, else the number of terms for "mean", and the number of rows for "batchmean".
    """
    if reduction not in ("mean", "batchmean"):
        return total
    rows, columns = terms.shape
    return total / (mass if mass is not None else rows if reduction == "batchmean" else rows * columns)
