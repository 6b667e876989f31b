"""Runs stages by the executors of datatrove: on this machine, on Slurm, on Ray."""

import concurrent.futures
import concurrent.futures.process
import contextlib
import copy
import dataclasses
import functools
import multiprocessing
import os
import resource
import shlex
import sys
import threading
from typing import Any, Callable, Sequence

import tqdm
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.io import DataFolder
from loguru import logger

from llm.core import UserError, first_line
from llm.corpus.stages import Output, Stage

NAMES = ("local", "slurm", "ray")
TRIES = 3  # of a task whose process was killed


@dataclasses.dataclass(frozen=True)
class Where:
  """Where tasks run. workers: tasks at a time. partition, time: of Slurm."""

  executor: str
  workers: int
  partition: str = ""
  time: str = "20:00:00"


class Local(LocalPipelineExecutor):
  """Runs the tasks in processes. A task whose process is killed is run again.

  The executor of datatrove takes a pool that waits for ever for a process that was killed.
  """

  def run_with(self, progress: tqdm.tqdm, name: str) -> None:
    """Runs the tasks that are not done. Raises UserError where one fails. name: of the stage."""
    self.save_executor_as_json()
    self.stage = name
    for _ in range(TRIES):
      left = self.get_incomplete_ranks()
      if not left or self._run_once(left, progress):
        return
    raise UserError(
      f"a process of stage {self.stage} was killed {TRIES} times (out of memory?): start again "
      "with fewer --workers; finished tasks are kept"
    )

  def _run_once(self, ranks: Sequence[int], progress: tqdm.tqdm) -> bool:
    """Whether all tasks were done. Stops at the first process that is killed."""
    if self.workers == 1:
      for rank in ranks:
        self._guard(functools.partial(_run_task, self, rank), rank, progress)
      return True
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llm.corpus.stages"])
    with concurrent.futures.ProcessPoolExecutor(self.workers, context, _end_with_command) as pool:
      try:
        tasks = {pool.submit(_run_task, self, rank): rank for rank in ranks}
        for task in concurrent.futures.as_completed(tasks):
          self._guard(task.result, tasks[task], progress)
      except (concurrent.futures.process.BrokenProcessPool, EOFError, ConnectionError):
        # One was killed, perhaps while it started. Others may wait for ever.
        for process in multiprocessing.active_children():
          process.terminate()
        return False
      finally:
        pool.shutdown(cancel_futures=True)
    return True

  def _guard(self, result: Callable[[], None], rank: int, progress: tqdm.tqdm) -> None:
    """Waits for a task. Raises UserError where it failed, and BrokenProcessPool as it is."""
    try:
      result()
    except (UserError, concurrent.futures.process.BrokenProcessPool):
      raise
    except Exception as error:
      raise UserError(
        f"task {rank} of stage {self.stage} failed: {type(error).__name__}: "
        f"{first_line(error)}; the whole story is in "
        f"{self.logging_dir.path}/logs/task_{rank:05d}.log; finished tasks are kept"
      )
    progress.update()


def _end_with_command() -> None:
  """Makes a process of the pool end when the command is killed: else two would write one file."""

  def wait():
    command = multiprocessing.parent_process()
    assert command is not None  # a process of a pool has a parent
    command.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


def _allow_many_files() -> None:
  """Stages that compare signatures open a file of every task at once."""
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run_task(executor: Local, rank: int) -> None:
  """Runs one task in a process of the pool."""
  logger.remove()
  _allow_many_files()
  executor = copy.copy(executor)
  executor.pipeline = copy.deepcopy(executor.pipeline)  # blocks count
  # datatrove shows errors on the console too; here the log has them, and the command its line.
  with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
    executor._run_for_rank(rank, local_rank=1)  # 0 would show all


def run(stages: Sequence[Stage], output: Output, where: Where, then: Callable[[], object]) -> None:
  """Runs the stages, and `then` after the last. Tasks that are done are not run again.

  On Slurm the stages are submitted, each dependent on the one before, and `then` is a job too.
  Raises UserError where a task fails.
  """
  logger.remove()
  os.environ["TQDM_DISABLE"] = "1"  # the bars of blocks, in processes that are started from here on
  if where.executor == "local":
    for stage in stages:
      executor = Local(stage.blocks, stage.tasks, where.workers, output.logs(stage.name))
      done = stage.tasks - len(executor.get_incomplete_ranks())
      title = {"desc": stage.name, "unit": "task", "total": stage.tasks, "initial": done}
      with tqdm.tqdm(**title, disable=None) as progress:
        executor.run_with(progress, stage.name)
    then()
    return
  chain = chained(stages, output, where, then)
  if where.executor == "ray":
    _run_on_ray(chain)
    return
  try:
    chain[-1].run()
  except FileNotFoundError as error:
    raise UserError(f"--executor={where.executor}: {error.filename} was not found on this machine")


def _run_on_ray(chain: Sequence[Any]) -> None:
  """Runs the stages on the cluster that RAY_ADDRESS names, else on this machine.

  One after another: an executor of datatrove waits for ever for a stage before it that failed.
  """
  try:
    import ray
  except ImportError:
    raise UserError("--executor=ray needs the extra ray: pip install -e '.[corpus,ray]'")
  ray.init(ignore_reinit_error=True, log_to_driver=False)
  for executor in chain:
    executor.depends = None
    executor.run()
    if left := executor.get_incomplete_ranks():
      raise UserError(
        f"{len(left)} tasks failed, whose logs are in {executor.logging_dir.path}/logs; finished "
        "tasks are kept"
      )


def chained(
  stages: Sequence[Stage], output: Output, where: Where, then: Callable[[], object]
) -> list[Any]:
  """An executor for each stage and for `then`, each dependent on the one before."""
  last = Stage(f"{len(stages):02d}-report", [_Last(then)], 1)  # pyright: ignore[reportArgumentType]
  executors: list[Any] = []
  for stage in (*stages, last):
    before = executors[-1] if executors else None
    if before is not None:
      blocks: list[Any] = [_Begins(before.logging_dir, before.tasks), *stage.blocks]
      stage = dataclasses.replace(stage, blocks=blocks)
    executors.append(_EXECUTORS[where.executor](stage, output, where, before))
  return executors


class _Begins:
  """The first block of a stage. Raises RuntimeError unless every task before it has ended well.

  Slurm takes a large stage as several arrays, of which the next stage waits for the last one.
  """

  def __init__(self, logs: DataFolder, tasks: int):
    self.logs = logs
    self.tasks = tasks

  def __call__(self, data: Any, rank: int, world_size: int) -> None:
    done = len(self.logs.list_files("completions"))
    if done < self.tasks:
      raise RuntimeError(f"{self.tasks - done} tasks of {self.logs.path} have not ended well")


class _Last:
  """A function as the block of a stage."""

  def __init__(self, function: Callable[[], object]):
    self.function = function

  def __call__(self, data: Any, rank: int, world_size: int) -> None:
    self.function()


def _slurm(stage: Stage, output: Output, where: Where, before: Any) -> SlurmPipelineExecutor:
  if not where.partition:
    raise UserError("--executor=slurm needs --partition, the one to submit to")
  return SlurmPipelineExecutor(
    stage.blocks,
    stage.tasks,
    time=where.time,
    partition=where.partition,
    workers=where.workers,
    job_name=stage.name,
    qos="",
    env_command=_environment(),
    depends=before,
    logging_dir=output.logs(stage.name),
    mem_per_cpu_gb=4,
  )


def _environment() -> str:
  """What a job does first: it opens many files, in the environment of this process."""
  path = os.path.join(sys.prefix, "bin", "activate")
  activation = f"; source {path}" if os.path.exists(path) else ""
  # Where the steps of a user's own are found, as here.
  modules = f"; export PYTHONPATH={shlex.quote(os.getcwd())}:$PYTHONPATH"
  return f"ulimit -n $(ulimit -Hn){activation}{modules}"


def _ray(stage: Stage, output: Output, where: Where, before: Any) -> RayPipelineExecutor:
  return RayPipelineExecutor(
    stage.blocks,
    stage.tasks,
    workers=where.workers,
    depends=before,
    logging_dir=output.logs(stage.name),
  )


_EXECUTORS: dict[str, Any] = {"slurm": _slurm, "ray": _ray}


def scripts(stages: Sequence[Stage], output: Output, where: Where) -> list[tuple[str, str]]:
  """(stage, script) of every job that Slurm would be given."""
  executors = chained(stages, output, where, _nothing)
  launch = "srun -l -n 1 launch_pickled_pipeline {}/executor.pik"
  return [
    (
      executor.job_name,
      executor.get_launch_file_contents(
        executor.get_sbatch_args(min(executor.tasks, executor.max_array_size)),
        launch.format(executor.logging_dir.path),
      ),
    )
    for executor in executors
  ]


def _nothing() -> None:
  pass
