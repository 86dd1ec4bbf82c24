"""Pictures show what was given, with names and units, and leave no trace."""

import sys

import numpy as np
import optax
import pytest

from optax_sam import plots
from optax_sam.sharpness import SpectralDensity

matplotlib = pytest.importorskip("matplotlib")

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


def line(**options):
    return plots.loss_line(STEPS, STEPS**2, **options)


def surface(**options):
    return plots.loss_surface(STEPS, STEPS[:3], np.ones((4, 3)), **options)


def spectrum(**options):
    return plots.spectral_density(density(), **options)


def history(**options):
    return plots.sharpness_history(STEPS, STEPS + 1.0, learning_rate=0.5, **options)


def sampling(**options):
    return plots.sampling_rate(STEPS, [record()] * 4, window=10, **options)


every_picture = pytest.mark.parametrize(
    "draw", [line, surface, spectrum, history, sampling]
)


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
def test_it_draws_where_it_is_told(draw):
    ax = matplotlib.figure.Figure().subplots()
    assert draw(ax=ax) is ax
    assert ax.lines


@every_picture
def test_units_are_named(draw):
    ax = draw(unit="J")
    named = [x.get_ylabel() + x.get_xlabel() for x in ax.figure.axes]
    assert any("(J" in text for text in named)


@every_picture
def test_without_matplotlib_the_extra_is_named(draw, monkeypatch):
    for name in [x for x in sys.modules if x.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'optax_sam\[plots\]'"):
        draw()


def test_importing_it_needs_no_matplotlib(monkeypatch):
    for name in [x for x in sys.modules if x.startswith("optax_sam.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    import optax_sam.plots as again

    assert again is not plots
    assert set(again.__all__) == set(plots.__all__)


def test_several_lines():
    losses = {"SGD": STEPS**2.0, "SAM": STEPS**2.0}
    ax = plots.loss_line(STEPS, losses)
    assert [data(x) for x in ax.lines] == [[[0, 1, 2, 3], [0, 1, 4, 9]]] * 2
    assert labels(ax) == ["SGD", "SAM"]
    assert [x.get_text() for x in ax.get_legend().get_texts()] == ["SGD", "SAM"]
    # Equal curves: both are seen, the upper one has gaps.
    assert ax.lines[0].get_linestyle() == "-"
    assert ax.lines[1].get_linestyle() == "--"
    assert line().get_legend() is None


def test_many_lines_differ():
    ax = plots.loss_line(STEPS, {str(i): STEPS for i in range(28)})
    style = lambda x: (x.get_color(), str(x._unscaled_dash_pattern))
    assert len({style(x) for x in ax.lines}) == 28


def test_surfaces_share_their_colours():
    x, y = np.linspace(-1, 1, 5), np.linspace(-2, 2, 9)
    bowl = 0.01 + x[:, None] ** 2 + 0 * y
    axes = plots.loss_surface(x, y, {"SGD": 9 * bowl, "SAM": bowl})
    assert [ax.get_title() for ax in axes] == ["SGD", "SAM"]
    filled = [ax.collections[0] for ax in axes]
    for drawn in filled:
        assert drawn.norm.vmin == pytest.approx(0.01)
        assert drawn.norm.vmax == pytest.approx(9.09)
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
    one = plots.loss_surface(x, y, {"SGD": bowl})
    assert isinstance(one, np.ndarray)


def test_surfaces_with_holes_and_flat_ones():
    losses = np.array([[-1.0, np.nan, 3.0], [2.0, np.inf, 0.0]])
    ax = plots.loss_surface([0, 1], [0, 1, 2], losses, num_levels=5)
    assert ax.collections[0].levels.tolist() == [-1, 0, 1, 2, 3]
    flat = plots.loss_surface([0, 1], [0, 1], np.zeros((2, 2)))
    flat.figure.draw_without_rendering()
    flat = plots.loss_surface([0, 1], [0, 1], np.full((2, 2), 1e6, np.float32))
    flat.figure.draw_without_rendering()


def test_surfaces_on_given_axes():
    axes = matplotlib.figure.Figure().subplots(2, 1)
    losses = {"a": np.ones((4, 4)), "b": np.ones((4, 4))}
    assert list(plots.loss_surface(STEPS, STEPS, losses, ax=axes)) == list(axes)
    assert [ax.get_title() for ax in axes] == ["a", "b"]


def test_densities_with_a_band():
    ax = plots.spectral_density({"SGD": density(scale=3), "SAM": density(num_probes=1)})
    assert labels(ax) == ["SGD", "SAM"]
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] == pytest.approx(1e-7, rel=0.1)
    assert len(ax.collections) == 1  # of one probe there is no error
    (band,) = ax.collections
    assert band.get_facecolor()[0, 3] < 0.5
    x, y = density(scale=3).grid, density(scale=3).density
    assert data(ax.lines[0]) == [x.tolist(), y.tolist()]
    vertices = band.get_paths()[0].vertices
    assert vertices[:, 1].max() == pytest.approx(1.1 * y.max())
    higher = plots.spectral_density(density(), floor=0.1)
    assert higher.get_ylim()[0] > 0.09


def test_the_edge_follows_the_learning_rate():
    rates = np.array([0.1, 0.05, 0.01, 0.0])
    ax = plots.sharpness_history(
        STEPS,
        {"SGD": [5.0, 9.0, np.nan, 30.0], "SAM": [1.0, 1.0, 1.0, 1.0]},
        learning_rate=rates,
        sam_edge={"SAM": [4.0, 4.0, 4.0, 4.0]},
    )
    assert labels(ax) == ["SGD", "SAM", "SAM's edge", r"$2 / \eta$"]
    sgd, sam, sam_edge, edge = ax.lines
    np.testing.assert_allclose(edge.get_ydata(), [20, 40, 200, np.nan])
    assert data(sam_edge)[1] == [4, 4, 4, 4]
    assert sam_edge.get_color() == sam.get_color() != sgd.get_color()
    assert sam_edge.get_linestyle() != sam.get_linestyle()
    # The line that goes away does not take the curves out of sight.
    assert ax.get_ylim()[1] == 60


def test_the_edge_of_a_schedule():
    schedule = optax.linear_schedule(0.5, 0.25, 3)
    ax = plots.sharpness_history(STEPS, STEPS + 1, learning_rate=schedule)
    assert data(ax.lines[-1])[1] == pytest.approx([4, 4.8, 6, 8])


def test_the_edge_with_momentum():
    ax = plots.sharpness_history(STEPS, STEPS + 1, learning_rate=0.1, momentum=0.9)
    assert data(ax.lines[-1])[1] == pytest.approx([38] * 4)
    assert r"\beta" in labels(ax)[-1]
    assert len(plots.sharpness_history(STEPS, STEPS + 1).lines) == 1
    with_edge = plots.sharpness_history(STEPS, STEPS + 1, sam_edge=STEPS + 2)
    assert labels(with_edge) == ["SAM's edge"]


def test_sampling_rate_of_a_warm_up_and_after():
    records = [record(1.0, 0.0, 0.0), record(1.0, 2.0, 1.0), record(), record(2.0, 1.0)]
    ax = plots.sampling_rate(STEPS, records, window=10)
    right = ax.figure.axes[-1]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [np.nan, 100, 50, 20])
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [np.nan, 2, 0.5, 1])
    assert ax.get_ylabel() == "Steps that ascend (%)"
    assert right.get_ylabel() == "PSF norm (nats per weight)"
    assert ax.yaxis.label.get_color() == ax.lines[0].get_color()
    assert right.yaxis.label.get_color() == right.lines[0].get_color()
    columns = {name: np.array([x[name] for x in records]) for name in records[0]}
    again = plots.sampling_rate(STEPS, columns, window=10)
    np.testing.assert_array_equal(again.lines[0].get_ydata(), ax.lines[0].get_ydata())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.loss_line(STEPS, [1.0, 2.0]), r"losses must have shape \(4,\)"),
        (
            lambda: plots.loss_line(STEPS, {"SAM": [1.0]}),
            r"losses\['SAM'\] must have.*got \(1,\)",
        ),
        (lambda: plots.loss_line(STEPS, {}), "no entries"),
        (
            lambda: plots.loss_surface(STEPS, STEPS[:3], np.ones((3, 4))),
            r"shape \(4, 3\).*got \(3, 4\)",
        ),
        (
            lambda: plots.loss_surface(STEPS, STEPS, np.full((4, 4), np.nan)),
            "finite.*smaller",
        ),
        (
            lambda: plots.loss_surface(
                STEPS, STEPS, np.ones((4, 4)), ax=matplotlib.figure.Figure().subplots(2)
            ),
            "1 surfaces need as many axes; got 2",
        ),
        (lambda: surface(num_levels=1), "num_levels"),
        (lambda: spectrum(floor=0), "floor"),
        (lambda: plots.spectral_density({}), "no entries"),
        (lambda: history(momentum=1.0), "momentum"),
        (lambda: history(sam_edge={"SAM": STEPS}), "'SAM', which lambda_max has not"),
        (lambda: history(sam_edge=[1.0]), "sam_edge must have shape"),
        (
            lambda: plots.sharpness_history(STEPS, STEPS, learning_rate=[0.1, 0.2]),
            r"learning_rate must be.*\(4,\)",
        ),
        (lambda: plots.sampling_rate(STEPS, [record()], window=10), "shape"),
        (lambda: plots.sampling_rate(STEPS, [], window=10), "shape"),
        (
            lambda: plots.sampling_rate(STEPS, [{"ascents": 1}] * 4, window=10),
            "no samples_per_window, psf_norm, ascent_rate; .*vsam",
        ),
        (lambda: plots.sampling_rate(STEPS, [record()] * 4, window=0), "window"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
