"""One call makes an optimizer and its curvature; the method follows predicted costs."""

import io

import jax
import jax.numpy as jnp
import optax
import pytest

import kfgn
from tests.tables.small import OBJECTIVE, make_batch, make_params, shapes

SQUARED = kfgn.losses.half_squared_error


def wide(outputs):
    """A dense net on shapes alone, with so many outputs."""
    params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, outputs))}
    objective = kfgn.Objective(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], SQUARED)
    return objective, shapes(params), shapes((jnp.zeros((4096, 64)), jnp.zeros((4096, outputs))))


def attention():
    """Values mixed over positions, where a mean matrix over all entries is dear."""

    def model(p, x):
        h = x @ p["in"]
        return jnp.mean(jax.nn.softmax(h @ h.mT) @ h, axis=1) @ p["out"]

    params = {"in": jnp.zeros((8, 8)), "out": jnp.zeros((8, 8))}
    batch = jnp.zeros((32, 24, 8)), jnp.zeros((32, 8))
    return kfgn.Objective(model, SQUARED), shapes(params), shapes(batch)


def chosen(made, params, batch):
    """The method, found without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    _, curvature = jax.eval_shape(
        lambda p, b, k: made.curvature_fn(p, b, key=k), params, batch, key
    )
    return curvature.settings.method


def test_auto_takes_the_most_exact_method_that_is_cheap():
    one, many = wide(1), wide(512)
    assert chosen(kfgn.make(*one), *one[1:]) == "kflr"
    assert chosen(kfgn.make(*many), *many[1:]) in ("kfra", "kfac")
    tokens = attention()
    assert chosen(kfgn.make(*tokens), *tokens[1:]) != "kfra"


def routed():
    """An expert for each example, whose mean matrix comes back through it alone."""

    def model(p, x):
        h = jnp.tanh(x["rows"] @ p["in"])
        return jnp.einsum("ni,nio->no", h, p["experts"][x["index"]])

    params = {"in": jnp.zeros((64, 64)), "experts": jnp.zeros((4, 64, 64))}
    inputs = {"rows": jnp.zeros((64, 64)), "index": jnp.zeros(64, jnp.int32)}
    return kfgn.Objective(model, SQUARED), shapes(params), shapes((inputs, jnp.zeros((64, 64))))


def recurrent():
    """A loop, which a mean matrix unrolls."""

    def model(p, x):
        def step(h, x):
            return jnp.tanh(h @ p["w"] + x), None

        return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))[0] @ p["out"]

    params = {"w": jnp.zeros((16, 16)), "out": jnp.zeros((16, 24))}
    batch = jnp.zeros((4096, 6, 16)), jnp.zeros((4096, 24))
    return kfgn.Objective(model, SQUARED), shapes(params), shapes(batch)


def test_auto_leaves_out_what_goes_through_experts_and_loops_one_by_one():
    objective, params, batch = routed()
    found = kfgn.inspect(objective, params, batch, file=io.StringIO()).totals.update
    assert found["kfra"] > 1.5 * found["kfac"]
    assert chosen(kfgn.make(objective, params, batch), params, batch) == "kfac"
    objective, params, batch = recurrent()
    found = kfgn.inspect(objective, params, batch, file=io.StringIO()).totals.update
    assert found["kfra"] < found["kfac"]
    assert chosen(kfgn.make(objective, params, batch), params, batch) == "kfac"


def test_costs_of_sums_are_those_of_all_terms():
    objective, params, batch = wide(8)
    both = kfgn.inspect(
        kfgn.sum_of([objective] * 2), params, (batch, batch), file=io.StringIO()
    ).totals
    one = kfgn.inspect(objective, params, batch, file=io.StringIO()).totals
    assert both.gradient == 2 * one.gradient and both.inversion == one.inversion
    # The factors are inverted once, every fifth update, and there is one direction.
    less = (one.solve + 4 * one.inversion / 5) / one.gradient / 2
    for method, update in one.update.items():
        assert both.update[method] == pytest.approx(update - less)


def test_a_dear_method_is_said_with_the_cheaper_one():
    objective, params, batch = attention()
    with pytest.warns(kfgn.errors.CostWarning, match=r"'kfra' .* method 'kfac' is predicted"):
        kfgn.make(objective, params, batch, method="kfra")
    found = kfgn.inspect(objective, params, batch, file=io.StringIO()).totals.update
    assert found["kfra"] > 10 > found["kfac"]


def test_a_loss_that_is_decomposed_is_said_with_the_remedy():
    """Each example's output Hessian, of all positions and classes together, has a root then."""
    params = shapes({"a": jnp.zeros((8, 16)), "b": jnp.zeros((16, 50))})
    batch = shapes((jnp.zeros((4, 12, 8)), jnp.zeros((4, 12), jnp.int32)))

    def entropy(logits, labels):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def drawn(key, logits):
        return jax.random.categorical(key, logits)

    def made(loss, method, weighted=False):
        weights = (shapes(jnp.zeros(4)),) if weighted else ()
        objective = kfgn.Objective(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], loss)
        return kfgn.make(objective, params, (*batch, *weights), method=method)

    for convex in (True, False):
        loss = kfgn.losses.from_function(entropy, convex=convex)
        for method in ("kfac", "kflr"):
            with pytest.warns(kfgn.errors.CostWarning, match="pass sample= to kfgn.losses.from"):
                made(loss, method)
    with pytest.warns(kfgn.errors.CostWarning, match="pass sample= to kfgn.losses.from"):
        made(kfgn.losses.from_function(entropy, convex=True), "kfac", weighted=True)
    made(kfgn.losses.from_function(entropy, convex=True, sample=drawn), "kfac")  # no warning
    made(kfgn.losses.softmax_cross_entropy_with_integer_labels, "kfac")


def test_longer_periods_are_the_remedy_where_every_method_is_dear():
    """Wide layers and a small batch: inverses are most of an update."""
    params = shapes({"a": jnp.zeros((64, 2000)), "b": jnp.zeros((2000, 2))})
    objective = kfgn.Objective(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], SQUARED)
    batch = shapes((jnp.zeros((2048, 64)), jnp.zeros((2048, 2))))
    totals = kfgn.inspect(objective, params, batch, file=io.StringIO()).totals
    assert totals.update["kflr"] > 10 > totals.update_auto["kflr"]
    auto = dict.fromkeys(("refresh_factors_every", "refresh_inverse_every"), "auto")
    with pytest.warns(kfgn.errors.CostWarning, match='every="auto" .* is predicted to take'):
        kfgn.make(objective, params, batch, method="kflr")
    kfgn.make(objective, params, batch, method="kflr", **auto)  # as a warning would be an error


def test_a_matrix_too_large_for_kfra_is_refused_at_creation():
    objective = kfgn.Objective(lambda p, x: jnp.mean(x @ p["w"], axis=1), SQUARED)
    params, batch = (
        shapes({"w": jnp.zeros((4, 64))}),
        shapes((jnp.zeros((2, 1024, 4)), jnp.zeros((2, 64)))),
    )
    with pytest.raises(kfgn.errors.ModelError, match=r'65,536 x 65,536 .* spatial="homogeneous"'):
        kfgn.make(objective, params, batch, method="kfra")
    assert chosen(kfgn.make(objective, params, batch), params, batch) == "kfac"


def test_a_made_pair_trains_and_takes_every_option_once():
    params, batch = make_params(), make_batch()
    optimizer, curvature_fn = kfgn.make(
        OBJECTIVE, params, batch, model_examples=8, unassigned="gradient", learning_rate=0.8
    )

    @jax.jit
    def step(params, state, key):
        (value, grads), curvature = curvature_fn(params, batch, key=key)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for k in range(8):
        params, state, value = step(params, state, jax.random.key(k))
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    with pytest.raises(kfgn.errors.OptionError, match=r"unknown option\(s\) 'dampng'"):
        kfgn.make(OBJECTIVE, params, batch, dampng=1.0)


# Factors that cost more than a batch knows of them.


def wide_hidden(width, count, positions=1):
    """Shapes of a net with a hidden layer, at so many positions of an example."""
    objective = kfgn.Objective(
        lambda p, x: jnp.mean(jnp.tanh(x @ p["a"]["w"] + p["a"]["b"]) @ p["out"], axis=1), SQUARED
    )
    params = {
        "a": {"w": jnp.zeros((8, width)), "b": jnp.zeros(width)},
        "out": jnp.zeros((width, 2)),
    }
    batch = jnp.zeros((count, positions, 8)), jnp.zeros((count, 2))
    return objective, shapes(params), shapes(batch)


dear = pytest.mark.filterwarnings("ignore::kfgn.errors.CostWarning")  # the hidden width alone


@dear
@pytest.mark.parametrize(
    ("width", "count", "positions", "limit"),
    [
        (600, 32, 1, 256),  # at least 256 rows are whole
        (600, 128, 1, 384),
        (600, 200, 1, None),  # three rows for each of 200 examples
        (600, 32, 8, None),
        (200, 2, 1, None),
    ],
)
def test_factors_are_split_where_a_batch_knows_little_of_them(width, count, positions, limit):
    problem = wide_hidden(width, count, positions)
    optimizer, curvature_fn = kfgn.make(*problem, method="kfac")
    _, curvature = jax.eval_shape(curvature_fn, *problem[1:], key=jax.random.key(0))
    settings = curvature.settings
    assert (settings.large_factors, settings.factor_limit) == (
        ("raise", None) if limit is None else ("split", limit)
    )
    factors = curvature.factors
    whole = {1: (width, width), 2: (2, 1, 300, 300), 3: (3, 1, 200, 200)}
    blocks = 1 if limit is None else -(-width // limit)
    assert factors["out"].activation.shape == whole[blocks]
    jax.eval_shape(
        lambda p, c: optimizer.update(p, optimizer.init(p), p, curvature=c), problem[1], curvature
    )
    found = kfgn.inspect(*problem, file=io.StringIO())
    assert found.totals.split_at == limit
    assert (f"more than {limit} rows" in str(found)) == (limit is not None)


@dear
def test_what_a_user_says_of_large_factors_stays():
    for options in ({"large_factors": "diagonal"}, {"factor_limit": 1000}):
        problem = wide_hidden(600, 32)
        _, curvature_fn = kfgn.make(*problem, method="kfac", **options)
        _, curvature = jax.eval_shape(curvature_fn, *problem[1:], key=jax.random.key(0))
        found = {n: getattr(curvature.settings, n) for n in ("large_factors", "factor_limit")}
        assert found == {"large_factors": "raise", "factor_limit": None} | options


def test_costs_are_those_of_blocks():
    def predicted(**options):
        with pytest.warns(kfgn.errors.CostWarning, match="take [0-9]+ times a gradient") as said:
            kfgn.make(*wide_hidden(600, 32), method="kfac", **options)
        return int(str(said[0].message).split(" times a gradient")[0].split()[-1])

    assert predicted() < 0.5 * predicted(large_factors="raise")


def test_splitting_leaves_what_is_small_whole():
    """The limit is one for all layers: here 350, as "a" has at 20 positions, not 256."""
    objective = kfgn.Objective(
        lambda p, x: jnp.tanh(jnp.mean(jnp.tanh(x @ p["a"]), axis=1) @ p["b"]) @ p["c"], SQUARED
    )
    for hidden, limit in (600, 350), (340, None):
        params = {"a": (350, 30), "b": (30, hidden), "c": (hidden, 3)}
        params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in params.items()}
        batch = shapes((jnp.zeros((32, 20, 350)), jnp.zeros((32, 3))))
        found = kfgn.inspect(objective, params, batch, file=io.StringIO())
        assert found.totals.split_at == limit
