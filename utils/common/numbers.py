"""Arithmetic that Python's operators do not name, and how counts and losses are written."""


def ceil_div(numerator: int, denominator: int) -> int:
    """
    Return `numerator / denominator`, rounded up, in integers.

    >>> [ceil_div(numerator, 4) for numerator in (0, 1, 4, 5)]
    [0, 1, 1, 2]
    """
    return -(-numerator // denominator)


def counted(number: int, noun: str) -> str:
    """
    Return a number with its noun, in the plural unless it is 1.

    >>> counted(1, "step"), counted(3000, "pack"), counted(2, "process")
    ('1 step', '3,000 packs', '2 processes')
    """
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def format_loss(loss: float) -> str:
    """
    Return a loss with four decimals, or in 8 characters where these would show nothing of it.

    >>> format_loss(12.34567), format_loss(0.0123), format_loss(2.056e-6)
    ('12.3457', '0.0123', '2.06e-06')
    """
    return f"{loss:.2e}" if 0 < abs(loss) < 1e-3 else f"{loss:.4f}"
