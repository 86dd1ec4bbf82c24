"""One colour for one method, in all figures of the package, benchmarks and examples.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. Their
yellow is left out: it is too light for a line.
"""

from __future__ import annotations

BLACK, GREY = "#000000", "#666666"
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
ORANGE, RED, PINK = "#E69F00", "#D55E00", "#CC79A7"
# For series that are no methods, those that are told apart best first.
PALETTE = BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK

METHODS = {
    "SGD": BLACK,
    "SGD 2x": BLACK,
    "SAM": BLUE,
    "SAM-5": SKY,
    "vSAM": RED,
    "vSAM .33": PINK,
    "MSAM": GREEN,
    "quarter-batch SAM": ORANGE,
}


def method_colour(name: str) -> str:
    """The colour that a method has in every figure.

    Series that are named after a method have it by themselves.

    Args:
      name: of the method, as the pages of results write it.

    Returns:
      The colour, as ``#rrggbb``; a grey for a method that has none of its own.

    Examples:
      >>> from optax_sam import plots
      >>> plots.method_colour("SAM"), plots.method_colour("another")
      ('#0072B2', '#666666')
    """
    return METHODS.get(name, GREY)
