"""Trains the autoencoder by kfac-jax: run by path in an environment of its own, without kfgn.

    python train_kfac_jax.py PROBLEM.npz SETTINGS.json

The problem has the images, the weights to start from and the indices of every batch; the points
`[update, seconds, loss]` and the versions are printed as JSON on the last line.
"""

import importlib.metadata
import itertools
import json
import sys
import time

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np


def model(params, x, code):
    """tanh layers; the code and the outputs are linear."""
    for k, (kernel, bias) in enumerate(params):
        x = x @ kernel + bias
        x = x if k in (code, len(params) - 1) else jnp.tanh(x)
    return x


def losses(outputs, targets, loss):
    """Each example's loss, summed over its outputs."""
    if loss == "half_squared_error":
        return 0.5 * jnp.sum((outputs - targets) ** 2, axis=1)
    return jnp.sum(jax.nn.softplus(outputs) - outputs * targets, axis=1)


def main(problem_path, settings_path):
    """Trains for so many seconds of updates; compiling and evaluating do not count."""
    with open(settings_path) as file:
        settings = json.load(file)
    problem = np.load(problem_path, allow_pickle=False)
    images, batches = problem["images"], problem["batches"]
    layers = len([name for name in problem.files if name.startswith("kernel")])
    start = [
        (jnp.asarray(problem[f"kernel{k}"]), jnp.asarray(problem[f"bias{k}"]))
        for k in range(layers)
    ]
    seeded = jax.random.key(settings["seed"])
    code, loss, l2 = layers // 2 - 1, settings["loss"], settings["l2"]

    def objective(params, batch):
        outputs = model(params, batch, code)
        if loss == "half_squared_error":
            kfac_jax.register_squared_error_loss(outputs, batch, weight=0.5)
        else:
            kfac_jax.register_multi_bernoulli_predictive_distribution(outputs, batch)
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return jnp.mean(losses(outputs, batch, loss)) + 0.5 * l2 * squares

    held = jnp.asarray(images[: settings["evaluated"]])
    evaluate = jax.jit(lambda p: jnp.mean(losses(model(p, held, code), held, loss)))

    def made():
        optimizer = kfac_jax.Optimizer(
            value_and_grad_func=jax.value_and_grad(objective),
            l2_reg=l2,
            use_adaptive_learning_rate=True,
            use_adaptive_momentum=True,
            use_adaptive_damping=True,
            initial_damping=settings["damping"],
            inverse_update_period=5,
            num_burnin_steps=0,
        )
        params = jax.tree.map(jnp.copy, start)
        state = optimizer.init(params, seeded, jnp.asarray(images[batches[0]]))
        return optimizer, params, state

    optimizer, params, state = made()
    for k in range(11):  # compiles all kinds of steps
        batch = jnp.asarray(images[batches[k]])
        params, state, _ = optimizer.step(params, state, jax.random.key(k), batch=batch)
    params = jax.tree.map(jnp.copy, start)
    state = optimizer.init(params, seeded, jnp.asarray(images[batches[0]]))
    points, spent = [(0, 0.0, float(evaluate(params)))], 0.0
    for update in itertools.count(1):
        batch = jnp.asarray(images[batches[(update - 1) % len(batches)]])
        key = jax.random.fold_in(seeded, update)
        began = time.perf_counter()
        params, state, _ = optimizer.step(params, state, key, batch=batch)
        jax.block_until_ready(params)
        spent += time.perf_counter() - began
        done = spent >= settings["seconds"]
        if update % 10 == 0 or done:
            points.append((update, spent, float(evaluate(params))))
            if done or not np.isfinite(points[-1][2]):
                break
    versions = {name: importlib.metadata.version(name) for name in ("kfac-jax", "jax")}
    print(json.dumps({"points": points, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
