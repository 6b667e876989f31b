"""The threads of NumPy's and SciPy's linear algebra."""

import contextlib
import functools

import threadpoolctl


def one_thread() -> contextlib.AbstractContextManager:
  """While it lasts, a product takes one thread.

  L-BFGS makes many products of a few numbers, whose threads wait for one another: on two cores it
  was 24 times slower with two threads.
  """
  return _libraries().limit(limits=1, user_api="blas")


@functools.cache
def _libraries() -> threadpoolctl.ThreadpoolController:
  return threadpoolctl.ThreadpoolController()
