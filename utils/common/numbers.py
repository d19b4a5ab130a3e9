"""Integer arithmetic that Python's operators do not name."""


def ceil_div(numerator: int, denominator: int) -> int:
    """
    `numerator / denominator`, rounded up, in integers.

    >>> [ceil_div(numerator, 4) for numerator in (0, 1, 4, 5)]
    [0, 1, 1, 2]
    """
    return -(-numerator // denominator)
