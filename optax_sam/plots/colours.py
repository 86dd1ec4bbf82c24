"""One colour for one method, in all figures of the package, benchmarks and examples.

The colours come from Okabe and Ito; colour-blind readers can tell them apart. Their
yellow is left out, because it is too light for a line.
"""

from __future__ import annotations

BLACK, GREY, WHITE = "#000000", "#666666", "#FFFFFF"
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
ORANGE, RED, PINK = "#E69F00", "#D55E00", "#CC79A7"
# For series that are not methods; the easiest to tell apart come first.
PALETTE = BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK

METHODS = {
    "SGD": BLACK,
    "SGD 2x": BLACK,
    "SAM": BLUE,
    "SAM-5": SKY,
    "vSAM": RED,
    "vSAM .33 to .4": PINK,
    "MSAM": GREEN,
    "quarter-batch SAM": ORANGE,
}


def method_colour(name: str) -> str:
    """The colour that a method has in every figure.

    Series that are named after a method get this colour by default.

    Args:
      name: the name of the method, as the pages of results write it.

    Returns:
      The colour, as ``#rrggbb``; a grey for a method without a colour.

    Examples:
      >>> from optax_sam import plots
      >>> plots.method_colour("SAM"), plots.method_colour("another")
      ('#0072B2', '#666666')
    """
    return METHODS.get(name, GREY)
