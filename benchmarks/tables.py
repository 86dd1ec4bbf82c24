"""Tables of the pages, as the benchmarks print them."""


def table(header: list[str], lines: list[list[str]]) -> str:
    """As Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
