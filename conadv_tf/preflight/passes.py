"""Updates of any method put together from compiled programs: their work, their memory, their row of the table.

The run's own update and the update of `vanilla` are compiled whole. The others are put together from passes, which cost
in a program what they cost alone:

    end                the end of an update: moving averages, optimizer, metrics      compiled
    train              a training pass                                                vanilla − end
    attack             the pass that makes x̂                                          own − end − others, or compiled
    train and attack   a training pass that makes x̂ too, as in `paired`               own − end − others, or compiled
    train, then attack the same, with a backward pass of its own for x̂                own − end − others, or compiled

An update of M micro-batches is M times its passes, M additions to the sums, and one end.
"""

import dataclasses
import math

from conadv_tf import methods
from conadv_tf.models.split_batchnorm import MAIN
from conadv_tf.preflight.table import CostRow, Work, Workload, make_row
from conadv_tf.preflight.tpu_compiler import Cost
from conadv_tf.preflight.tpu_generations import Generation
from conadv_tf.run.build import Run
from conadv_tf.training import sizes
from conadv_tf.training.sizes import count_numbers

# Names of compiled programs, beside that of the run's own method.
VANILLA, END, ATTACK, BOTH = "vanilla", "end of an update", "attack pass", "clean pass of paired"
# The program that is compiled for a pass, and the pass's cost in training passes by forward units. A run's attack is of
# one of the last two kinds, so that one program serves both.
PROGRAMS = {"attack": (ATTACK, 2 / 3), "train and attack": (BOTH, 1.0), "train, then attack": (BOTH, 4 / 3)}


class Passes:
    """Puts updates together from compiled programs.

    Args:
      built: the run.
      rows: images of a micro-batch.
      compared: the methods, the run's own first.
      costs: by the kind of the run's own method and the names above; it and VANILLA fit. Without VANILLA there is a
        row of the run's own method alone.
    """

    def __init__(self, built: Run, rows: int, compared: list[methods.Method], costs: dict[str, Cost]):
        self._built, self._rows, self._costs = built, rows, costs
        self._end = Work.of(costs[END])
        if VANILLA not in costs:
            return
        train = Work.of(costs[VANILLA]) - self._end
        self._passes = {"train": train}
        for name, (key, share_of_train) in PROGRAMS.items():
            if key in costs:
                # A pass that exceeds HBM has no cost: its row says that it does not fit, beside the time of its units.
                self._passes[name] = train * share_of_train if costs[key].over_bytes else Work.of(costs[key])
        own = compared[0]
        parts = own.passes
        for name in parts.keys() - self._passes.keys():
            known = sum((self._passes[part] * count for part, count in parts.items() if part != name), Work())
            self._passes[name] = (Work.of(costs[own.kind]) - self._end - known) * (1 / parts[name])

    def row(self, method: methods.Method, generation: Generation, roofline: bool = False) -> CostRow:
        """The row of one method; `roofline`: see `make_row`."""
        plan = self._built.plan
        return make_row(
            _label(method),
            method.kind in self._costs and microbatches(self._built, method, self._rows) % 1 == 0,
            self.work(method),
            self.used_bytes(method),
            reduced_bytes(self._built, method),
            generation,
            Workload(plan.num_replicas, plan.global_batch_size, plan.total_steps * plan.global_batch_size),
            roofline,
        )

    def work(self, method: methods.Method) -> Work:
        """The work of one update of the run on one replica."""
        if method.kind in self._costs:
            microbatch = Work.of(self._costs[method.kind]) - self._end
        else:
            microbatch = sum((self._passes[name] * n for name, n in method.passes.items()), Work())
        count = microbatches(self._built, method, self._rows)
        if count <= 1:
            return microbatch * count + self._end
        # Sums are read and written, the micro-batch's share is read.
        contributed = contributed_bytes(self._built, method)
        adding = Work(flop=contributed / 4, hbm_bytes=3.0 * contributed)
        return (microbatch + adding) * count + self._end

    def used_bytes(self, method: methods.Method) -> float:
        """Bytes of HBM that a replica uses."""
        if method.kind in self._costs:
            return used_bytes(self._built, self._rows, method, self._costs[method.kind])
        # One pass after the other, each beside the gradients of those before it.
        parts = method.passes
        compiled = [self._costs[name] for name in (VANILLA, ATTACK, BOTH) if name in self._costs]
        temporary = max(cost.temp_bytes for cost in compiled)
        if sum(parts.values()) > 1:
            own = self._built.model.method
            whole = self._costs[own.kind].temp_bytes if sum(own.passes.values()) > 1 else 0
            temporary = max(temporary + contributed_bytes(self._built, method), whole)
        network = self._built.model.network
        branch = 12 * count_numbers(network.moving_statistics([MAIN]))  # γ, β, their momentum, the moving statistics
        weights = 4 * count_numbers(network.variables)
        cost = dataclasses.replace(
            self._costs[VANILLA],
            temp_bytes=temporary,
            argument_bytes=self._costs[VANILLA].argument_bytes
            + branch * (len(method.branches) - 1)
            + weights * method.tau
            + carried_bytes(self._built, self._rows, method) * method.updates_per_batch,
        )
        return used_bytes(self._built, self._rows, method, cost)


def contributed_bytes(built: Run, method: methods.Method) -> int:
    """Bytes of gradients and BN statistics of a replica that trains by `method`, float32."""
    network = built.model.network
    branch = count_numbers(network.moving_statistics([MAIN]))  # γ and β have as many numbers
    shared = count_numbers(network.trainable_variables) - branch * len(network.branches)
    return 4 * (shared + 2 * branch * len(method.branches))


def reduced_bytes(built: Run, method: methods.Method) -> int:
    """Bytes that each replica adds to the all-reduce: gradients in their dtype on the way, and BN statistics."""
    statistics = 4 * len(method.branches) * count_numbers(built.model.network.moving_statistics([MAIN]))
    gradients = contributed_bytes(built, method) - statistics
    return gradients * built.model.all_reduce_dtype.size // 4 + statistics


def used_bytes(built: Run, rows: int, method: methods.Method, cost: Cost) -> float:
    """Bytes of HBM of a replica, from its program for one micro-batch; infinite where the compiler refused it."""
    if cost.over_bytes:
        return math.inf
    count = microbatches(built, method, rows)
    sums = contributed_bytes(built, method) if count > 1 else 0
    # Its program holds the carry of one micro-batch, or of as many as a batch lasts for.
    further = max(0.0, count - method.updates_per_batch)
    return cost.resident_bytes + cost.temp_bytes + sums + further * carried_bytes(built, rows, method)


def carried_bytes(built: Run, rows: int, method: methods.Method) -> int:
    """Bytes that a micro-batch of a run carries to the next update."""
    return sizes.carried_bytes(method, rows, built.data.train_shape)


def share(built: Run) -> int:
    """Images of a replica in an update of the run."""
    return built.plan.rows * built.plan.microbatches


def microbatches(built: Run, method: methods.Method, rows: int) -> float:
    """Passes over `rows` images in an update of `method` with the run's global batch, on each replica.

    A method whose batches last two updates has twice the images on a replica. Where that is the run's own, another
    one has half a micro-batch perhaps: its row is half of one.
    """
    return share(built) / rows * method.updates_per_batch / built.model.method.updates_per_batch


def _label(method: methods.Method) -> str:
    delay = f", τ {method.tau}" if method.record.delay is None else ""
    return f"{method.name}, {method.schedule}{delay}" if method.schedule else method.name
