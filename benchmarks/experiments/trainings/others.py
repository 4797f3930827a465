"""Trainings on tables, sets, graphs, a differential equation and rewards."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import kfgn
from benchmarks.experiments.poisson import solution
from benchmarks.experiments.trainings.images import cross_entropy, supervised
from benchmarks.experiments.trainings.task import Task, started


def tabular(seed: int, size: int = 256) -> Task:
    """Mean and log variance of a number, where noise grows with one of eight columns."""

    class Regression(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = nn.silu(nn.Dense(64)(nn.silu(nn.Dense(64)(x))))
            return nn.Dense(1)(h), nn.Dense(1)(h)

    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4000, 8))
    y = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + rng.normal(size=4000) * np.exp(x[:, 3] - 1)
    data = jnp.asarray(x, jnp.float32), jnp.asarray(y[:, None], jnp.float32)
    loss = kfgn.losses.gaussian_negative_log_likelihood
    return supervised(Regression(), data, seed, loss, size)


def sets(seed: int) -> Task:
    """The greatest distance between two points of a set of up to 12, with padding."""

    class Sets(nn.Module):
        @nn.compact
        def __call__(self, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            points, mask = inputs
            h = nn.Dense(32)(nn.gelu(nn.Dense(32)(points)))
            pooled = jnp.sum(jnp.where(mask[..., None], h, 0), axis=1)
            mean = pooled / jnp.sum(mask, axis=1, keepdims=True)
            most = jnp.max(jnp.where(mask[..., None], h, -jnp.inf), axis=1)
            h = jnp.concatenate([mean, most], axis=-1)
            return nn.Dense(1)(nn.gelu(nn.Dense(32)(h)))

    rng = np.random.default_rng(seed)
    points, mask = rng.normal(size=(2000, 12, 3)), np.arange(12) < rng.integers(3, 13, (2000, 1))
    distances = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
    both = mask[:, :, None] & mask[:, None]
    diameters = np.max(np.where(both, distances, 0), axis=(1, 2))[:, None]
    data = (jnp.asarray(points * mask[..., None], jnp.float32), jnp.asarray(mask))
    targets = jnp.asarray(diameters, jnp.float32)
    return supervised(Sets(), (data, targets), seed, kfgn.losses.half_squared_error, 128)


def graphs(seed: int) -> Task:
    """The triangles of a graph of up to 10 nodes, by three rounds of messages, with padding."""

    class Messages(nn.Module):
        @nn.compact
        def __call__(self, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            nodes, edges, mask = inputs
            h = nn.Dense(32)(nodes)
            for _ in range(3):
                sent = jnp.einsum("nij,njd->nid", edges, nn.Dense(32, use_bias=False)(h))
                h = h + nn.silu(nn.Dense(32)(h) + sent / 4)
            h = jnp.sum(h * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)
            return nn.Dense(1)(nn.silu(nn.Dense(32)(h)))

    rng = np.random.default_rng(seed)
    mask = np.arange(10) < rng.integers(4, 11, (2000, 1))
    upper = np.triu(rng.uniform(size=(2000, 10, 10)) < 0.4, 1)
    edges = (upper | upper.swapaxes(1, 2)) & mask[:, :, None] & mask[:, None]
    edges = edges.astype(np.float32)
    triangles = np.trace(edges @ edges @ edges, axis1=1, axis2=2)[:, None] / 6
    nodes = np.stack([edges.sum(-1) / 4, mask], axis=-1)
    inputs = [jnp.asarray(a, jnp.float32) for a in (nodes, edges, mask)]
    data = tuple(inputs), jnp.asarray(np.log1p(triangles), jnp.float32)
    return supervised(Messages(), data, seed, kfgn.losses.half_squared_error, 128)


def poisson(seed: int) -> Task:
    """-Δu = f in the unit square, u = 0 on its boundary: two objectives of one network."""
    network: Any = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(32), nn.tanh, nn.Dense(1)])
    params = network.init(jax.random.key(seed), jnp.zeros((1, 2)))

    def laplacian(params: Any, points: jax.Array) -> jax.Array:
        def u(x: jax.Array) -> jax.Array:
            return network.apply(params, x)[0]

        return jax.vmap(lambda x: jnp.trace(jax.hessian(u)(x)))(points)[:, None]

    squared = kfgn.losses.half_squared_error
    terms = {
        "interior": kfgn.Objective(laplacian, squared),
        "boundary": kfgn.Objective(network.apply, squared),
    }
    objective = kfgn.sum_of(terms, {"interior": 0.01, "boundary": 100.0})

    def draw(key: jax.Array, _: Any) -> Any:
        keys = jax.random.split(key, 3)
        inside, edge = (
            jax.random.uniform(k, (n, 2)) for k, n in zip(keys[:2], (256, 128), strict=True)
        )
        side = jax.random.randint(keys[2], (128, 1), 0, 4)
        edge = jnp.where(jnp.arange(2) == side % 2, side // 2, edge)
        right = -2 * jnp.pi**2 * solution(inside)[:, None]
        return {"interior": (inside, right), "boundary": (edge, jnp.zeros((128, 1)))}

    grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(0, 1, 40)] * 2), axis=-1).reshape(-1, 2)
    truth = solution(grid)

    def error(params: Any) -> jax.Array:
        wrong = network.apply(params, grid)[:, 0] - truth
        return jnp.linalg.norm(wrong) / jnp.linalg.norm(truth)

    return Task(objective, params, draw, error, "relative L2 error")


def rewards(seed: int) -> Task:
    """REINFORCE on a contextual bandit: advantages are the weights of the actions taken."""
    rng = np.random.default_rng(seed)
    reward_of = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    contexts = jnp.asarray(rng.normal(size=(1024, 8)), jnp.float32)
    policy: Any = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(5)])
    params = started(policy, contexts, seed)
    objective = kfgn.Objective(policy.apply, cross_entropy, mean_over="examples")

    def expected(x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(2 * jnp.tanh(x @ reward_of))

    def draw(key: jax.Array, params: Any) -> Any:
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (256, 8))
        actions = jax.random.categorical(keys[1], policy.apply(params, x))
        chance = jnp.take_along_axis(expected(x), actions[:, None], axis=1)[:, 0]
        reward = jax.random.bernoulli(keys[2], chance).astype(jnp.float32)
        return x, actions, reward - jnp.mean(reward)

    def regret(params: Any) -> jax.Array:
        chances = jax.nn.softmax(policy.apply(params, contexts))
        best = jnp.max(expected(contexts), axis=1)
        return jnp.mean(best - jnp.sum(chances * expected(contexts), axis=1))

    return Task(objective, params, draw, regret, "regret")
