"""Tables of numbers as text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], right: int = 0) -> list[str]:
    """Lines of columns, the last few aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<" * (len(widths) - right) + ">" * right
    formats = [f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)]
    return ["  ".join(formats).format(*row).rstrip() for row in rows]


def shortened(text: str, width: int) -> str:
    """The text, with its middle left out where it is longer than the width."""
    half = (width - 3) // 2
    return text if len(text) <= width else f"{text[:half]}...{text[-half:]}"


def flops_text(number: int) -> str:
    number = int(float(f"{number:.3g}"))
    power = min((len(str(number)) - 1) // 3, 5)
    return f"{number / 1000**power:.4g}{('', 'k', 'M', 'G', 'T', 'P')[power]}"


def bytes_text(number: int) -> str:
    power = min(max(number.bit_length() - 1, 0) // 10, 4)
    return f"{number / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
