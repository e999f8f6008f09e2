"""Tables as text."""


def aligned(lines: list[list[str]], markdown: bool = False, left_aligned: bool = False) -> str:
    """Return a table: the first column to the left, the others to the right.

    Args:
        lines: The cells; those of the first line are the heading.
        markdown: Draw it as markdown does.
        left_aligned: All columns to the left, for words.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if markdown:
        rule = ["-" * (w - 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)]
        lines = [lines[0], rule, *lines[1:]]
    specs = [f"{'<' if i == 0 or left_aligned else '>'}{w}" for i, w in enumerate(widths)]
    cells = [[format(t, spec) for t, spec in zip(line, specs, strict=True)] for line in lines]
    left, between, right = ("| ", " | ", " |") if markdown else ("", "  ", "")
    return "\n".join((left + between.join(line) + right).rstrip() for line in cells)


def count(number: float) -> str:
    """Return a large number in words: 12,345 or 300.001 B or 12.345 T."""
    if number < 1e9:
        return f"{number:,.0f}"
    return f"{number / 1e9:,.3f} B" if number < 1e13 else f"{number / 1e12:,.3f} T"
