"""Value and gradient of a method's loss in microbatches, with every row of the batch still a negative of every other.

Averaging the gradients of microbatches would be another loss: each row would meet the rows of its microbatch alone. Instead,
1. all microbatches are encoded without keeping what a backward pass needs;
2. the objective is evaluated once on the embeddings z of the whole batch, which gives its gradient dz and the gradient of
   the parameters it reads itself, such as the temperature;
3. each microbatch is encoded again and dz is pulled back through it.
The sum of the pulled-back gradients is the gradient of the whole, by the chain rule, while activations are held for one
microbatch at a time. Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021,
https://arxiv.org/abs/2101.06983; Pham et al., Combined Scaling for Zero-shot Transfer Learning, 2021,
https://arxiv.org/abs/2111.10050, section 4.

What frozen towers make of the rows (`Method.features`) has no gradient and is computed before all this, once.

One microbatch is not encoded twice: the last of pass 1 is the first of pass 3, and keeps its activations in between. With k
microbatches the arithmetic is (4k - 1) / 3k of that of an uncut step, a backward pass counted as two forward ones: below 4/3.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxvl.methods.method import Batch, Method
from jaxvl.rows import cut, join, split_over_devices


def value_and_grad(method: Method, accumulate: int) -> Callable[[Any, Any, Batch, jax.Array], tuple[tuple[jax.Array, dict], Any]]:
    """(params, memory, batch, key) -> ((loss, aux), gradient of params), the batch cut in `accumulate` microbatches.

    Microbatch i holds the rows i, i + accumulate, i + 2 accumulate, ...: of a batch split over devices, the same number
    from each device, so that no row moves. Each microbatch has a key of its own, the same in both passes; where a
    method draws random numbers per row (dropout), the draws therefore depend on `accumulate`, and nothing else does.

    Raises ValueError for a method without `encode`, and, when called, for a batch that does not divide.
    """
    if accumulate == 1:
        return jax.value_and_grad(method.loss, has_aux=True)
    encode_rows, objective = method.encode, method.objective
    if encode_rows is None or objective is None:
        raise ValueError(f"config.train.accumulate is {accumulate}, but the rows of this method cannot be encoded apart: use 1")
    last = accumulate - 1

    def grad_fn(params: Any, memory: Any, batch: Batch, key: jax.Array) -> tuple[tuple[jax.Array, dict], Any]:
        key_encode, key_objective = jax.random.split(key)
        keys = jax.random.split(key_encode, accumulate)
        parts = cut(batch, accumulate)
        features = method.features
        if features is not None:
            rows = lambda i: split_over_devices(jax.tree.map(lambda x: x[:, i], parts))
            parts |= jax.tree.map(lambda x: x.swapaxes(0, 1), lax.map(lambda i: features(params, rows(i)), jnp.arange(accumulate)))

        def encode(params: Any, i: Any) -> Any:
            return encode_rows(params, split_over_devices(jax.tree.map(lambda x: x[:, i], parts)), keys[i])

        z_first = lax.map(lambda i: encode(params, i), jnp.arange(last))
        z_last, pull_last = jax.vjp(lambda params: encode(params, last), params)
        z = jax.tree.map(lambda a, b: join(jnp.concatenate([a, b[None]])), z_first, z_last)

        on_all_rows = jax.value_and_grad(objective, argnums=(0, 2), has_aux=True)
        (loss, aux), (grads, dz) = on_all_rows(params, memory, split_over_devices(z), batch, key_objective)
        dz = cut(dz, accumulate)

        def pull(grads: Any, i: Any, pull_i: Callable) -> Any:
            return jax.tree.map(jnp.add, grads, pull_i(jax.tree.map(lambda d: d[:, i], dz))[0])

        # Without the barrier nothing keeps the compiler from merging the two passes, and all activations with them.
        grads, params = lax.optimization_barrier((pull(grads, last, pull_last), params))

        def encode_again(grads: Any, i: jax.Array) -> tuple[Any, None]:
            return pull(grads, i, jax.vjp(lambda params: encode(params, i), params)[1]), None

        grads, _ = lax.scan(encode_again, grads, jnp.arange(last))
        return (loss, aux), grads

    return grad_fn
