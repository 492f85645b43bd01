"""Numbers as people write them: in digits, or spelled out."""

_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def digits(number: float) -> str:
    """
    >>> digits(45), digits(45.0), digits(0.5)
    ('45', '45', '0.5')
    """
    return f"{number:.0f}" if number == round(number) else f"{number:g}"


def spelled(number: float) -> str:
    """Whole numbers below a hundred in words, others in digits.

    >>> spelled(45), spelled(20), spelled(8.0), spelled(0.5), spelled(120)
    ('forty-five', 'twenty', 'eight', '0.5', '120')
    """
    if number not in range(100):
        return digits(number)
    if number < len(_SMALL):
        return _SMALL[int(number)]
    tens, units = divmod(int(number), 10)
    return f"{_TENS[tens - 2]}-{_SMALL[units]}" if units else _TENS[tens - 2]
