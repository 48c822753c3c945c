"""Tables in Markdown, for the terminal, for result files and for the pages in `docs/`."""

from collections.abc import Mapping, Sequence


def table(lines: Sequence[Mapping[str, str]]) -> str:
    """Format a table with aligned columns from lines, each a mapping from columns to cells."""
    if not lines:
        return ""
    columns = [[name, *(line.get(name, "–") for line in lines)] for name in lines[0]]
    widths = [max(map(len, column)) for column in columns]
    header, *body = (
        [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in zip(*columns, strict=True)
    )
    rows = [header, ["-" * width for width in widths], *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plus_minus(median: float, spread: float) -> str:
    """Format milliseconds and their spread to three digits, but at most to the microsecond."""
    decimals = sum(median < bound for bound in (100, 10, 1))
    return f"{median:.{decimals}f} ± {spread:.{decimals}f}"


def fill(text: str, name: str, content: str) -> str:
    """Return the text of a page with this content between two marks.

    The marks are HTML comments, which a page does not show.

    Raises:
      ValueError: the text lacks a mark.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page must have a line {begin.strip()} and, below it, {end.strip()}")
    return f"{before}{begin}\n{content}\n\n{end}{after}"
