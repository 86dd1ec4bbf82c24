"""What no measure can make sense of is refused, with advice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from optax_sam import plots, sharpness

W, DATA = jnp.ones(3), jnp.ones((2, 4, 3))
QUADRATIC = lambda w, x: jnp.mean((x @ w) ** 2)
TREE = {"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
WRONG = {"a": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(2)}}
ABC = {"A": jnp.ones((5, 2)), "B": jnp.ones((4, 2)), "C": jnp.ones((2, 4))}
PAIR, BLOCK = sharpness.gl_pair("A", "B"), sharpness.GLBlock
LORA = lambda w, x: jnp.mean((w["A"] @ w["B"].T) ** 2)
HESSIAN = (
    *("hessian_eigenvalues", "hessian_trace", "hessian_diagonal"),
    *("hessian_frobenius_norm", "spectral_density", "renyi_entropy"),
)
ASCENTS = "worst_case_sharpness geodesic_sharpness keskar_sharpness"
BALLS = "worst_case_sharpness geodesic_sharpness sam_sharpness average_sharpness"
MEAN = dict(loss_fn=QUADRATIC, params=W, batches=DATA)
WORST = MEAN | dict(rho=0.1)
PLANE = dict(loss_fn=lambda w, x: 0.0, params=TREE, batches=DATA, alphas=[0.0])
LIVE = dict(loss=1.0, loss_perturbed=1.0, grads=W, grads_perturbed=W, perturbation=W)
# A call of each that is accepted, of which each case changes something.
GOOD = {
    "hvp": MEAN | dict(v=W),
    **dict.fromkeys(HESSIAN, MEAN | dict(key=0)),
    "worst_case_sharpness": WORST,
    "sam_sharpness": WORST,
    "average_sharpness": WORST | dict(key=0),
    "keskar_sharpness": MEAN,
    "pac_bayes_flatness": dict(metric_fn=QUADRATIC, params=W, batches=DATA, key=0),
    "pac_bayes_bound": dict(params=W, sigma=0.3, num_examples=5, initial=W),
    "normalize_logits": dict(logits=W),
    "geodesic_sharpness": WORST | dict(loss_fn=LORA, params=ABC, gl_pairs=[PAIR]),
    "gl_pair": dict(G="A", H="B"),
    "loss_line": PLANE | dict(direction=TREE),
    "loss_surface": PLANE | dict(directions=(TREE, TREE)),
    "interpolate_loss": PLANE | dict(other=TREE),
    "filter_normalized_direction": dict(key=0, params=TREE),
    "sam_metrics": LIVE,
    "sam_stability_edge": dict(grad_norm=1.0, rho=0.1, learning_rate=0.1),
    "to_scalars": dict(result=1.0),
    "stack_batches": dict(data=(np.ones((6, 2)), np.ones(6)), batch_size=3),
    "kendall_tau": dict(s=[1, 2], t=[1, 2]),
    "kendall_interval": dict(s=[1, 2], t=[1, 2]),
    "granulated_kendall": dict(s=range(4), t=range(4), grid_shape=(2, 2)),
    "accumulate": dict(f=jnp.mean, batches=[jnp.ones(2)]),
}


# What is called, what the message says, and what is changed.
REFUSED = {
    # Of the objective, which all measures share.
    "hessian_trace: loss_fn, a function": dict(loss_fn=None),
    r"hessian_trace: empty.*\(0, 4, 3\)": dict(batches=jnp.ones((0, 4, 3))),
    r"hessian_trace: \[\]\. .*stack_batches": dict(batches={}),
    r"hessian_trace: \(2,\), \(3,\)": dict(batches=(DATA, jnp.ones(3))),
    r"hessian_trace: not stacked.*\(4, 3\), \(4,\).*\[batch\].*jnp.ones\(4\)": dict(
        batches=(jnp.ones((4, 3)), jnp.ones(4))
    ),
    "hessian_trace: no batch": dict(batches=lambda: iter(())),
    "hessian_trace sam_sharpness: 3 numbers, and there are 2 batches": dict(
        batches=[DATA[0], DATA[1]], weights=jnp.ones(3)
    ),
    "hessian_trace: function of a batch for a list": dict(weights=len),
    "hessian_trace: outside of it. Leave axis_name out": dict(
        batches=[DATA[0]], axis_name="d"
    ),
    "hessian_trace: 'step'.*int32.*mask=": dict(params={"w": W, "step": jnp.array(3)}),
    "hessian_trace sam_sharpness: 'act'.* is 'relu', not a weight.*close over": dict(
        params={"w": W, "act": "relu"}
    ),
    "hessian_trace geodesic_sharpness: complex64": dict(params={"A": W * 1j, "B": W}),
    "hessian_trace: params is empty": dict(params={}),
    "hessian_trace loss_line: selects nothing": dict(mask=False),
    r"hessian_trace: \(2,\).*got \(3,\)": dict(weights=jnp.ones(3)),
    "hessian_trace: positive sum": dict(weights=jnp.zeros(2)),
    "hessian_trace: finite and >= 0": dict(weights=jnp.array([1.0, -1])),
    "hvp: finite and >= 0": dict(weights=jnp.array([[1.0] * 4, [3, 3, 3, jnp.inf]])),
    # Of a list, whether the mean is taken of products or of results of the batches.
    "hvp sam_sharpness: positive sum": dict(batches=[*DATA], weights=[0, 0]),
    "hvp sam_sharpness: finite and >= 0; got -1": dict(
        batches=[*DATA], weights=[2, -1]
    ),
    "hvp average_sharpness: finite and >= 0; got nan": dict(
        batches=[*DATA], weights=lambda batch: jnp.nan
    ),
    "hvp: a number for each batch.*got 3": dict(batches=[*DATA], weights=3),
    "hvp sam_sharpness: weights=lambda batch": dict(batches=[{"x": W, "epoch": 3}]),
    # Of products and estimates.
    "hvp: tree like params": dict(v={"w": W}),
    "hvp: fwd_rev": dict(mode="fwd"),
    "hessian_eigenvalues: only 3 parameters": dict(k=4),
    "hessian_eigenvalues: num_matvecs is 2": dict(k=3, num_matvecs=2),
    "hessian_eigenvalues: k must be an integer >= 1": dict(k=0),
    "hessian_eigenvalues: num_vectors must be an.* >= 3": dict(k=2, num_vectors=2),
    # The matrix is so small that no key is used.
    "hessian_trace hessian_diagonal: key must be an int.*None": dict(key=None),
    'hessian_eigenvalues: "LA", "SA" or "LM"': dict(which="max"),
    r"hessian_eigenvalues: init has shape \(4,\)": dict(init=jnp.ones(4)),
    'hessian_trace: "xtrace" or "hutchinson"': dict(method="magic"),
    "hessian_trace: >= 2": dict(method="hutchinson", num_matvecs=1),
    'hessian_diagonal: "xdiag" or "hutchinson"': dict(method="xtrace"),
    "hessian_frobenius_norm: >= 2": dict(num_matvecs=1),
    "spectral_density: sigma": dict(sigma=0.0),
    "renyi_entropy: num_probes must be an integer >= 2": dict(num_probes=1),
    "renyi_entropy: alpha must.*got 0": dict(alpha=0.0),
    "renyi_entropy: two or more dimensions": dict(layerwise=True),
    # Of ascents and offsets.
    rf"{BALLS}: rho must be a number in \(0, inf\); got 0": dict(rho=0.0),
    "worst_case_sharpness: rho must be.*got nan": dict(rho=float("nan")),
    "worst_case_sharpness: key must be an int": dict(key="a"),
    'worst_case_sharpness average_sharpness: norm must be "l2" or': dict(norm="l1"),
    f"{ASCENTS} pac_bayes_flatness: num_steps must be": dict(num_steps=0),
    "average_sharpness pac_bayes_flatness: num_samples must be": dict(num_samples=0),
    "worst_case_sharpness: num_restarts must be an integer >= 1": dict(num_restarts=0),
    "worst_case_sharpness: would all be the same": dict(
        num_restarts=2, random_init=False
    ),
    "keskar_sharpness: eps must be": dict(eps=0.0),
    "keskar_sharpness: subspace_dim=4 is more than the 3": dict(subspace_dim=4),
    "pac_bayes_flatness: target must be": dict(target=0.0),
    "pac_bayes_flatness: sigma_max must be": dict(sigma_max=0.0),
    "pac_bayes_flatness: first argument must be metric_fn": dict(metric_fn=None),
    r"pac_bayes_flatness: it returned \(0.0, 1\)": dict(
        metric_fn=lambda w, b: (0.0, 1)
    ),
    "pac_bayes_bound: initial is missing, the weights": dict(
        initial=None, reference="orig", magnitude_aware=True
    ),
    "pac_bayes_bound: reference must be": dict(reference="zero"),
    "pac_bayes_bound: got the number 0.0.*zeros_like, params": dict(initial=0.0),
    r"pac_bayes_bound: initial has shape \(\)": dict(initial=jnp.zeros(())),
    "pac_bayes_bound filter_normalized_direction: running statistic.*mask=": dict(
        params={"batch_stats": {"mean": W}}
    ),
    "pac_bayes_bound filter_normalized_direction: selects nothing": dict(mask=False),
    "pac_bayes_bound: 'n'.*int32.*mask=": dict(params={"n": jnp.arange(3)}),
    "normalize_logits: eps must be": dict(eps=0.0),
    # Of pairs.
    'geodesic_sharpness: metric must be "mix" or "inv"': dict(metric="max"),
    "geodesic_sharpness: eps must be a number in": dict(eps=-1.0),
    "geodesic_sharpness: pass key=0": dict(num_restarts=2),
    "geodesic_sharpness: gl_pairs must be a list.*GLPair": dict(gl_pairs=PAIR),
    "geodesic_sharpness: gl_pairs must be a list.*0.1": dict(gl_pairs=0.1),
    "geodesic_sharpness: A is in gl_pairs twice": dict(gl_pairs=[PAIR, PAIR]),
    "geodesic_sharpness: selects A but not B": dict(
        mask={"A": True, "B": False, "C": True}
    ),
    **{
        f"geodesic_sharpness: {message}": dict(gl_pairs=[sharpness.gl_pair(G, H)])
        for G, H, message in (
            ("A", "b", "'b'.*there are A, B, C"),
            ("A", "C", r"h = 2, C \(2, 4\).*rank_axis=0"),
            ("A", BLOCK("B", shape=(5, 1)), "cannot be read as"),
            (BLOCK("A", 2), "B", "rank_axis=2.*two different axes"),
            ("C", BLOCK("B", 0), "G has 2 rows and 4 columns"),
            (BLOCK("A", 1, 0), BLOCK("B", 1, 0), "multiples of the smallest"),
        )
    },
    r"gl_pair: G must be the path of a leaf.*got \['A": dict(G=["A", 3]),
    # Of directions.
    "loss_line: direction must be a pytree like params": dict(direction=TREE["a"]),
    r"loss_line: \(2, 4\).*\['a'\]\['kernel'\].*\(3, 2\)": dict(direction=WRONG),
    r"loss_line: alphas.*linspace.*shape \(\)": dict(alphas=0.5),
    "loss_surface: pair of pytrees.*dict of 2": dict(directions=TREE | {"b": 0}),
    r"loss_surface: betas.*\(1, 3\)": dict(betas=np.ones((1, 3))),
    'filter_normalized_direction: "filter", "layer" or None': dict(norm="kernel"),
    r"filter_normalized_direction: \['kernel'\].*2 axes.*=3": dict(filter_axis=3),
    r"filter_normalized_direction: \['n'\].*int32.*mask=": dict(
        params={"n": jnp.arange(3)}
    ),
    # Of what is logged, batched and correlated.
    "sam_metrics: perturbation must be a pytree like grads": dict(perturbation=[W]),
    r"sam_metrics: grads_perturbed has shape \(4,\) at": dict(
        grads_perturbed=jnp.ones(4)
    ),
    "sam_metrics: loss_perturbed must be a scalar": dict(loss_perturbed=W),
    "sam_metrics sam_stability_edge: learning_rate must be": dict(learning_rate=-1.0),
    "sam_stability_edge: rho must be a number in": dict(rho=-0.1),
    "sam_stability_edge: grad_norm must be a number in": dict(grad_norm=-0.1),
    "to_scalars: max_size": dict(max_size=0),
    "stack_batches: Take 4 of them": dict(batch_size=4),
    "stack_batches: do not fill": dict(batch_size=8),
    "stack_batches: same number": dict(data=(np.ones(6), np.ones(5))),
    r"kendall_tau: \(2,\) and \(3,\)": dict(t=[1, 2, 3]),
    "kendall_tau: at least 2": dict(s=[1], t=[2]),
    "kendall_tau: s is nan at .1.*rank": dict(s=[1, np.nan]),
    'kendall_tau kendall_interval: or "b"': dict(variant="c"),
    "kendall_interval: confidence": dict(confidence=1),
    "kendall_interval: num_resamples": dict(num_resamples=0),
    "granulated_kendall: 3 models do not fill.*2, 2": dict(s=range(3), t=range(3)),
    "granulated_kendall: at least 2.*fixed": dict(grid_shape=(4, 1)),
    "accumulate: no batch.*make a new one for each call": dict(batches=iter(())),
    "accumulate: same number of examples": dict(batches=[(jnp.ones(2), jnp.ones(3))]),
    "accumulate: weight=lambda batch": dict(batches=[1.0]),
    "accumulate: must have a positive sum": dict(weight=lambda batch: 0),
}


@pytest.mark.parametrize(
    ("name", "message", "change"),
    [
        (name, case.partition(": ")[2], change)
        for case, change in REFUSED.items()
        for name in case.partition(": ")[0].split()
    ],
)
def test_it_is_refused(name, message, change):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        getattr(sharpness, name)(**GOOD[name] | change)


@pytest.mark.parametrize("name", [x for x, call in GOOD.items() if "loss_fn" in call])
def test_all_measures_refuse_what_the_objective_does(name):
    message = r"(?s)loss_fn must return a scalar.*shape \(2,\).*losses.mean"
    with pytest.raises(ValueError, match=message):
        getattr(sharpness, name)(**GOOD[name] | dict(loss_fn=lambda w, x: jnp.ones(2)))


@pytest.mark.parametrize(
    ("message", "batches"),
    [
        (
            "a function, which the host reads.* must be called outside",
            lambda: iter(DATA),
        ),
        (r"same shapes; these have \(3, 3\), \(4, 3\)", [DATA[0], DATA[0][:3]]),
    ],
)
def test_streams_are_read_outside_of_programs(message, batches):
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda w: sharpness.hessian_trace(QUADRATIC, w, batches, 0))(W)


def test_scalars_are_no_part_of_a_program():
    with pytest.raises(ValueError, match="inside jit"):
        jax.jit(sharpness.to_scalars)(1.0)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("every must be an integer >= 1", dict(every=0)),
        ("key must be", dict(key="a")),
        ("measures must be a dict of functions", dict(measures={})),
        ("'x' takes init, so", dict(measures={"x": lambda f, w, b, init: W})),
        ("batches are empty", dict(batches=jnp.ones((0, 4, 3)))),
    ],
)
def test_a_probe_refuses(message, change):
    def measured():
        good = dict(loss_fn=QUADRATIC, batches=DATA, every=1)
        probe = sharpness.Probe(**good | change)
        probe(0, W, probe.init(W))

    with pytest.raises(ValueError, match=message):
        measured()


def test_a_progress_bar_refuses():
    with pytest.raises(ValueError, match="loss_fn must be a function"):
        sharpness.progress(3).__enter__()
    with pytest.raises(ValueError, match="total must be an integer >= 1"):
        sharpness.progress(QUADRATIC, total=0).__enter__()


def test_lines_along_numbers_are_refused():
    with pytest.raises(ValueError, match="eigen must be an EigenResult from"):
        sharpness.loss_along_eigenvectors(QUADRATIC, W, DATA, W, [0.0])


def attention(**more):
    kernel, out = ({"kernel": jnp.ones(x)} for x in ((6, 2, 4), (2, 4, 6)))
    return {"query": kernel, "key": kernel, "value": kernel, "out": out} | more


@pytest.mark.parametrize(
    ("message", "path", "params"),
    [
        ("no attention layer at 'b'.* at 'a/b'", "b", {"a": {"b": attention()}}),
        ("there are dense/kernel", "", {"dense": {"kernel": W}}),
        ("no attention layer, with kernels", None, {"dense": {"kernel": W}}),
        (r"query_ln/scale.*qk=False", "", attention(query_ln={"scale": W})),
        (r"\(heads, k, f\).*GLBlock", "", attention(out={"kernel": W})),
        ("no kernel of its outputs", "", attention(out={})),
    ],
)
def test_layers_that_are_no_attention(params, path, message):
    with pytest.raises(ValueError, match=message):
        sharpness.attention_gl_pairs(params, path)


def test_normalized_queries_are_no_factor():
    """Flax names their layers so; values and outputs are a pair still."""
    model = nn.MultiHeadDotProductAttention(2, normalize_qk=True)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3, 6)))[
        "params"
    ]
    with pytest.raises(ValueError, match="normalizes its queries and keys"):
        sharpness.attention_gl_pairs(params, "")
    (pair,) = sharpness.attention_gl_pairs(params, "", qk=False)
    assert pair.G[0].path == "value/kernel"
    assert sharpness.attention_gl_pairs(params, "", qk=False, vo=False) == []


def test_a_point_is_no_surface():
    with pytest.raises(ValueError, match=r"two or more alphas.* 1 and 2.*loss_line\("):
        plots.loss_surface([0.0], [0.0, 1.0], [[1.0, 2.0]])
