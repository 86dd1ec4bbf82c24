"""Pictures show what was given, with names and units, and leave no trace."""

import functools
import importlib
import sys

import matplotlib.figure
import numpy as np
import optax
import pytest

from optax_sam import plots
from optax_sam.plots import style
from optax_sam.sharpness import EigenLines, PathProjection, SpectralDensity

STEPS = np.arange(4)


def density(num_probes=2, scale=1.0):
    grid = np.linspace(-1, scale, 50)
    curve = np.exp(-((grid / 0.1) ** 2))
    stderr = curve / 10 if num_probes > 1 else np.full(50, np.nan)
    nodes = np.zeros((num_probes, 3))
    return SpectralDensity(grid, curve, stderr, nodes, nodes, np.array(0.1))


def record(samples=5.0, psf=0.5, rate=0.5):
    names = "samples_per_window", "psf_norm", "ascent_rate"
    return dict(zip(names, (samples, psf, rate), strict=True), ascents=3)


ONES, RECORDS = np.ones((4, 3)), [record()] * 4


def line(losses=STEPS**2, **options):
    return plots.loss_line(STEPS, losses, **options)


def surface(losses=ONES, **options):
    return plots.loss_surface(STEPS, STEPS[:3], losses, **options)


def spectrum(found=None, **options):
    return plots.spectral_density(density() if found is None else found, **options)


def history(rate=0.5, **options):
    return plots.sharpness_history(STEPS, STEPS + 1.0, learning_rate=rate, **options)


def sampling(records=RECORDS, window=10, **options):
    return plots.sampling_rate(STEPS, records, window=window, **options)


def eigenvectors(losses=STEPS**2.0, **options):
    found = EigenLines(STEPS, losses[None], 2 * losses[None], np.array([4.0]))
    return plots.loss_along_eigenvectors(found, **options)


EVERY = line, surface, spectrum, history, sampling, eigenvectors
every_picture = pytest.mark.parametrize("draw", EVERY)


def figure_axes(*shape):
    return matplotlib.figure.Figure().subplots(*shape)


def data(artist):
    return [np.asarray(x, float).tolist() for x in artist.get_data()]


def labels(ax):
    return [x for x in (line.get_label() for line in ax.lines) if x[:1] != "_"]


@every_picture
def test_a_figure_of_its_own_is_legible_and_leaves_no_trace(draw, tmp_path):
    before = dict(matplotlib.rcParams)
    pyplot = matplotlib.pyplot if "matplotlib.pyplot" in sys.modules else None
    ax = draw()
    assert isinstance(ax, matplotlib.axes.Axes)
    ax.figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
    assert dict(matplotlib.rcParams) == before
    assert pyplot is None or not pyplot.get_fignums()
    assert ax.get_xlabel()
    assert ax.figure.get_figwidth() <= 5
    texts = [x for x in ax.figure.findobj(matplotlib.text.Text) if x.get_text()]
    assert len(texts) > 5
    assert min(text.get_fontsize() for text in texts) >= 9


@every_picture
def test_it_draws_where_it_is_told_and_names_units(draw):
    ax = figure_axes()
    assert draw(ax=ax, unit="J") is ax
    assert ax.lines
    named = [x.get_ylabel() + x.get_xlabel() for x in ax.figure.axes]
    assert any("(J" in text for text in named)


def test_without_matplotlib_it_is_imported_and_the_extra_is_named(monkeypatch):
    removed = "matplotlib", "optax_sam.plots"
    for name in [x for x in sys.modules if x.startswith(removed)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    again = importlib.import_module("optax_sam.plots")
    assert again is not plots
    assert set(again.__all__) == set(plots.__all__)
    for draw in EVERY:
        with pytest.raises(ImportError, match="pip install matplotlib"):
            draw()


def test_several_lines():
    ax = line({"SGD": STEPS**2.0, "SAM": STEPS**2.0})
    assert [data(x) for x in ax.lines] == [[[0, 1, 2, 3], [0, 1, 4, 9]]] * 2
    assert labels(ax) == ["SGD", "SAM"]
    assert [x.get_text() for x in ax.get_legend().get_texts()] == ["SGD", "SAM"]
    # Equal curves: both are seen, the upper one has gaps.
    assert [x.get_linestyle() for x in ax.lines] == ["-", "--"]
    assert line().get_legend() is None


def looks(ax):
    """Of the lines: the colour, the dashes and the marker of each."""
    dashes = lambda x: str(x._unscaled_dash_pattern)
    return [(x.get_color(), dashes(x), x.get_marker()) for x in ax.lines]


METHODS = "SGD", "SAM", "vSAM", "MSAM", "SGD 2x", "another", "one more"


@pytest.mark.parametrize(
    "draw", [line, functools.partial(plots.sharpness_history, STEPS)]
)
@pytest.mark.parametrize("names", [METHODS, [str(i) for i in range(28)]])
def test_no_series_looks_like_another(names, draw):
    named = {name: STEPS + 1.0 for name in names}
    assert len({*looks(draw(named))}) == len(names)
    # Also among several calls.
    ax = figure_axes()
    for name, values in list(named.items())[:8]:
        draw({name: values}, ax=ax)
        draw({name: values}, ax=ax)
    assert len({*looks(ax)}) == len(ax.lines)


def test_what_is_on_the_axes_stays_in_view():
    ax = figure_axes()
    plots.sharpness_history(STEPS, [-2.0, 3.0, 90.0, 1.0], ax=ax)
    ax.axvline(1)  # from 0 to 1 in shares of the axes
    plots.sharpness_history(STEPS, STEPS + 1.0, learning_rate=1.0, ax=ax)
    assert ax.get_yscale() == "symlog"
    assert ax.get_ylim()[0] < -2
    assert ax.get_ylim()[1] > 90
    ax = figure_axes()
    ax.axvline(1)
    assert history(ax=ax).get_yscale() == "log"
    high = density()._replace(density=9 * density().density)
    for draw, large in ((eigenvectors, 9 * STEPS**2.0), (spectrum, high)):
        ax = figure_axes()
        limits = draw(large, ax=ax).get_ylim()
        draw(ax=ax)
        assert ax.get_ylim()[0] <= limits[0]
        assert ax.get_ylim()[1] == limits[1]


LONG = "a method with a name of some length, number "


@pytest.mark.parametrize("number", [6, 28])
@pytest.mark.parametrize("name", [LONG, 3 * LONG, "SAM "])
def test_names_of_any_length_have_a_legend_and_leave_room(name, number):
    ax = line({f"{name}{i}": STEPS * i for i in range(number)})
    ax.figure.draw_without_rendering()
    shown, whole = ax.get_legend().get_window_extent(), ax.figure.bbox
    texts = [x.get_text().replace("\n", " ") for x in ax.get_legend().get_texts()]
    assert texts == [f"{name}{i}" for i in range(number)]
    assert whole.x0 <= shown.x0 < shown.x1 <= whole.x1
    assert shown.y1 <= whole.y1
    assert ax.get_window_extent().height > 1.5 * ax.figure.dpi
    # On axes that cannot grow it stays in the figure, too.
    ax = line({f"{name}{i}": STEPS * i for i in range(6)}, ax=figure_axes())
    ax.figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().y1 <= ax.figure.bbox.y1


def test_a_method_has_one_colour():
    alone, among = line({"SAM": STEPS}), line({"other": STEPS, "SAM": STEPS})
    assert alone.lines[0].get_color() == plots.method_colour("SAM")
    assert among.lines[1].get_color() == plots.method_colour("SAM")
    assert among.lines[0].get_color() != plots.method_colour("SAM")
    # Black is what the style in use writes with, or it would be lost on black.
    with matplotlib.rc_context({"text.color": "#fefefe"}):
        assert line({"SGD": STEPS}).lines[0].get_color() == "#fefefe"


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([250.0, 1234.5, 0.0, -3.0], ["250", "1200", "0", "-3"]),
        ([1000.0, 1001.0], ["1000", "1001"]),
        ([0.0134, 0.2], ["0.013", "0.2"]),
        ([2.5e-5, 3e7], [r"$2.5 \times 10^{-5}$", r"$3 \times 10^{7}$"]),
        ([1.0, 1.0], ["1", "1"]),
        # Fewer eigenvalues were found.
        (np.array([2.125, np.nan, np.nan]), ["2.1", "nan", "nan"]),
    ],
)
def test_numbers_are_short_and_differ(values, texts):
    assert style.numerals(values) == texts


def test_surfaces_share_their_colours():
    x, y = np.linspace(-1, 1, 5), np.linspace(-2, 2, 9)
    bowl = 0.01 + x[:, None] ** 2 + 0 * y
    axes = plots.loss_surface(x, y, {"SGD": 9 * bowl, "SAM": bowl})
    assert [ax.get_title() for ax in axes] == ["SGD", "SAM"]
    filled = [ax.collections[0] for ax in axes]
    for drawn in filled:
        assert [drawn.norm.vmin, drawn.norm.vmax] == pytest.approx([0.01, 9.09])
        assert isinstance(drawn.norm, matplotlib.colors.LogNorm)
        np.testing.assert_array_equal(drawn.levels, filled[0].levels)
        assert len(drawn.levels) == 14
    # The first direction is to the right: this bowl's contours are upright lines.
    lowest = filled[1].get_paths()[0].vertices
    assert 0 < np.ptp(lowest[:, 0]) < 0.5
    assert np.ptp(lowest[:, 1]) == 4
    # And the second one is upwards: the lowest place is where it was put.
    corner = plots.loss_surface(x, y, (x[:, None] + 1.01) * (2.01 - y))
    assert corner.collections[0].get_paths()[0].vertices.mean(0)[1] > 1
    # One bar for both, with as many labels as are legible.
    assert len(axes[0].figure.axes) == 3
    assert axes[0].figure.axes[-1].get_ylabel() == "Loss (nats)"
    assert len(axes[0].figure.axes[-1].get_yticks()) <= 8
    # On the given axes, and an array of them also for one name.
    given = figure_axes(2, 1)
    losses = {"a": np.ones((4, 3)), "b": np.ones((4, 3))}
    assert list(surface(losses, ax=given)) == list(given)
    assert [ax.get_title() for ax in given] == ["a", "b"]
    assert isinstance(plots.loss_surface(x, y, {"SGD": bowl}), np.ndarray)


def test_surfaces_with_holes_and_flat_ones():
    losses = np.array([[-1.0, np.nan, 3.0], [2.0, np.inf, 0.0]])
    ax = plots.loss_surface([0, 1], [0, 1, 2], losses, num_levels=5)
    assert ax.collections[0].levels.tolist() == [-1, 0, 1, 2, 3]
    for flat in (np.zeros((4, 3)), np.full((4, 3), 1e6, np.float32)):
        surface(flat).figure.draw_without_rendering()


def test_a_surface_beside_the_weights_fills_its_axes():
    x, losses = STEPS[1:], 250.0 * np.arange(1, 7).reshape(3, 2)
    ax = plots.loss_surface(x, x[:2], losses)
    assert [*ax.get_xlim(), *ax.get_ylim()] == [1, 3, 1, 2]
    assert not ax.lines
    bar = ax.figure.axes[-1].get_yticklabels()
    assert [x.get_text() for x in bar][0] == "250"
    assert not any("e+" in x.get_text() for x in bar)


def test_paths_on_a_surface():
    walks = {"SGD": np.array([[0, 0], [2, 1.0]]), "SAM": np.array([[0, 0], [1, 2.0]])}
    path = PathProjection(walks, (None, None), np.array([0.7, 0.21]))
    ax = surface(path=path)
    assert ax.get_xlabel().endswith("(70 % of the path's variance)")
    assert "(21 %" in ax.get_ylabel()
    assert [x.get_text() for x in ax.texts] == ["SGD", "SAM"]
    assert [data(x) for x in ax.lines[1::2]] == [[[0, 2], [0, 1]], [[0, 1], [0, 2]]]
    assert ax.lines[3].get_color() == plots.method_colour("SAM")
    # Each on the surface of its name; one without a name on all.
    for given, texts in (
        (path, [["SAM"], ["SGD"]]),
        (path._replace(coordinates=walks["SAM"]), [[], []]),
    ):
        panels = surface({"SAM": ONES, "SGD": ONES}, path=given)
        assert [[x.get_text() for x in ax.texts] for ax in panels] == texts
        assert [len(ax.lines) for ax in panels] == [3, 3]


def test_lines_along_eigenvectors():
    found = EigenLines(STEPS, ONES.T, 100 * ONES.T, np.array([9.0, 0.5, -2.0]))
    ax = plots.loss_along_eigenvectors(found)
    assert labels(ax)[:3] == [
        rf"$\lambda_{{{i}}} = {x}$" for i, x in ((1, 9), (2, 0.5), (3, -2))
    ]
    assert {str(x.get_ydata().tolist()) for x in ax.lines[1:6:2]} == {
        "[100.0, 100.0, 100.0, 100.0]"
    }
    # A parabola that leaves does not squeeze the losses.
    assert ax.get_ylim()[1] < 2


def test_densities_one_above_the_other():
    found = {"Hessian": density(scale=3), "GGN": density(scale=1.5)}
    axes = plots.spectral_panels(found)
    assert [ax.get_title() for ax in axes] == list(found)
    for ax, one in zip(axes, found.values(), strict=True):
        assert data(ax.lines[0]) == [one.grid.tolist(), one.density.tolist()]
        assert ax.get_xlim() == (-1, 3)
        assert ax.get_ylim() == axes[0].get_ylim()
        assert ax.get_yscale() == "log"
    given = figure_axes(1, 2)
    assert list(plots.spectral_panels(found, ax=given)) == list(given)


def test_negative_sharpness_is_in_the_picture():
    values = np.array([-0.5, 0.0, 3.0, 18.0])
    ax = plots.sharpness_history(STEPS, values, learning_rate=0.1)
    assert ax.get_yscale() == "symlog"
    points = ax.transAxes.inverted().transform(
        ax.transData.transform(np.c_[STEPS, values])
    )
    assert (points >= 0).all()
    assert (points <= 1).all()
    assert (np.diff(points[:, 1]) > 0.05).all()
    assert history().get_yscale() == "log"


def test_what_is_not_finite_is_told():
    nothing = np.full(4, np.nan)
    assert labels(line({"SGD": STEPS, "SAM": nothing})) == [
        "SGD",
        "SAM (no finite value)",
    ]
    panels = surface({"SGD": ONES, "SAM": np.nan * ONES})
    assert [ax.get_title() for ax in panels] == ["SGD", "SAM (no finite value)"]
    panels[0].figure.draw_without_rendering()
    early = sampling([record(1.0, 0.0, 0.0)] * 4)
    assert [x.get_text() for x in early.texts] == ["No perturbed step yet"]


def test_densities_with_a_band():
    ax = spectrum({"SGD": density(scale=3), "SAM": density(num_probes=1)})
    assert labels(ax) == ["SGD", "SAM"]
    assert ax.get_yscale() == "log"
    assert ax.get_ylim() == pytest.approx((1e-7, 2), rel=0.1)
    (band,) = ax.collections  # of one probe there is no error
    assert band.get_facecolor()[0, 3] < 0.5
    x, y = density(scale=3).grid, density(scale=3).density
    assert data(ax.lines[0]) == [x.tolist(), y.tolist()]
    vertices = band.get_paths()[0].vertices
    assert vertices[:, 1].max() == pytest.approx(1.1 * y.max())
    assert spectrum(floor=0.1).get_ylim()[0] > 0.09


def test_the_edge_follows_the_learning_rate():
    ax = plots.sharpness_history(
        STEPS,
        {"SGD": [5.0, 9.0, np.nan, 30.0], "SAM": [1.0] * 4},
        learning_rate=np.array([0.1, 0.05, 0.01, 0.0]),
        sam_edge={"SAM": [4.0] * 4},
    )
    assert labels(ax) == ["SGD", "SAM", "SAM's edge", r"$2 / \eta$"]
    sgd, sam, sam_edge, edge = ax.lines
    np.testing.assert_allclose(edge.get_ydata(), [20, 40, 200, np.nan])
    assert data(sam_edge)[1] == [4, 4, 4, 4]
    assert sam_edge.get_color() == sam.get_color() != sgd.get_color()
    assert sam_edge.get_linestyle() != sam.get_linestyle()
    # The line that goes away does not take the curves out of sight.
    assert ax.get_ylim()[1] == 60


def test_the_edge_of_a_schedule_and_with_momentum():
    ax = history(optax.linear_schedule(0.5, 0.25, 3))
    assert data(ax.lines[-1])[1] == pytest.approx([4, 4.8, 6, 8])
    ax = history(0.1, momentum=0.9)
    assert data(ax.lines[-1])[1] == pytest.approx([38] * 4)
    assert r"\beta" in labels(ax)[-1]
    assert len(history(None).lines) == 1
    assert labels(history(None, sam_edge=STEPS + 2)) == ["SAM's edge"]


def test_sampling_rate_of_a_warm_up_and_after():
    records = [record(1.0, 0.0, 0.0), record(1.0, 2.0, 1.0), record(), record(2.0, 1.0)]
    columns = {name: np.array([x[name] for x in records]) for name in records[0]}
    for given in (records, columns):
        ax = sampling(given)
        right = ax.figure.axes[-1]
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), [np.nan, 100, 50, 20])
        np.testing.assert_array_equal(right.lines[0].get_ydata(), [np.nan, 2, 0.5, 1])
    assert ax.get_ylabel() == "Perturbed steps (%)"
    assert right.get_ylabel() == "PSF norm (nats per weight)"
    for side in (ax, right):
        assert side.yaxis.label.get_color() == side.lines[0].get_color()


NEEDED = "no samples_per_window, psf_norm, ascent_rate; .*vsam"


@pytest.mark.parametrize(
    ("draw", "given", "message"),
    [
        (line, [[1.0, 2.0]], r"losses must have shape \(4,\)"),
        (line, [{"SAM": [1.0]}], r"losses\['SAM'\] must have.*got \(1,\)"),
        (line, [{}], "no entries"),
        (surface, [np.ones((3, 4))], r"shape \(4, 3\).*got \(3, 4\)"),
        (surface, [np.full((4, 3), np.nan)], "finite.*smaller"),
        (line, [np.full(4, np.inf)], "losses has no finite value"),
        (eigenvectors, [STEPS * np.nan], "no finite value"),
        (spectrum, [np.ones(3)], "spectral_density returned.*got ndarray.*hist"),
        (spectrum, [{"SGD": np.ones(3)}], "spectral_density returned.*got ndarray"),
        (spectrum, [density()._replace(density=STEPS * np.nan)], "no finite value"),
        (surface, {"ax": (2,)}, "1 surfaces need as many axes; got 2"),
        (surface, {"num_levels": 1}, "num_levels"),
        (spectrum, {"floor": 0}, "floor"),
        (spectrum, [{}], "no entries"),
        (history, {"momentum": 1.0}, "momentum"),
        (history, {"sam_edge": {"SAM": STEPS}}, "'SAM', which lambda_max lacks"),
        (history, {"sam_edge": [1.0]}, "sam_edge must have shape"),
        (history, [[0.1, 0.2]], r"learning_rate must be.*\(4,\)"),
        (sampling, [[record()]], "shape"),
        (sampling, [[]], "shape"),
        (sampling, [[{"ascents": 1}] * 4], NEEDED),
        (sampling, {"window": 0}, "window"),
    ],
)
def test_bad_input_is_refused(draw, given, message):
    positional, options = ((), given) if isinstance(given, dict) else (given, {})
    if "ax" in options:
        options = {"ax": figure_axes(*options["ax"])}
    with pytest.raises(ValueError, match=message):
        draw(*positional, **options)
