"""Public figures of each TPU generation: the peaks of a replica, its memory, the network between chips."""

import dataclasses
import itertools
import math

from conadv_tf.errors import ConfigError

GIB = 2**30
# Per hop between chips; assumed by the validation of ASTRA-sim on TPU v3 ("as per TPU research team").
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation. A replica is a core on v2 and v3, a chip on the later ones (`run.strategy.replicas_of`).

    Attributes:
      name: the name in an accelerator type.
      topology: the smallest host's, in the compiler's words; the program of one replica is the same on any slice.
      chip_config: the compiler's name for how cores make up a device.
      replicas_per_chip: 2 on v2 and v3.
      hbm_bytes: memory of a replica that the compiler lets a program use, a little less than there is.
      peak_flops: bfloat16 FLOP/s of a replica.
      hbm_bandwidth: bytes/s of a replica.
      ici_bandwidth: bytes/s that a chip sends over all its links together.
      axes: dimensions of the network between chips.
      wraps_at: an axis of this many chips, or a multiple of it, closes into a ring.
    """

    name: str
    topology: str
    chip_config: str
    replicas_per_chip: int
    hbm_bytes: float
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    axes: int
    wraps_at: int

    @property
    def unit(self) -> str:
        """The name of a replica: "core" or "chip"."""
        return "core" if self.replicas_per_chip == 2 else "chip"


# Per chip, halved for a core of v2 and v3. Sources: Google Cloud's pages cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e};
# for v2, and the links of v2 and v3, Jouppi et al., "A Domain-Specific Supercomputer for Training Deep Neural
# Networks", CACM 63(7), 2020 (4 links of 496 and 656 Gbit/s each way). Links of the others: the bandwidth those pages
# give for both directions, halved (v4: 6 links of 50 GB/s, Jouppi et al., "TPU v4", ISCA 2023). That agrees with the
# pages' all-reduce bandwidth of a pod over its chips: v3 340 TB/s over 1,024, v5e 51.2 over 256, v6e 102.4 over 256.
# HBM: what libtpu 0.0.51 calls "available HBM" where it refuses a program; the pages' capacities are 16, 32, 32, 16,
# 95 and 32 GiB a chip. Wrap-around: pods of v2 and v3 are 16 and 32 chips wide, of v5e and v6e 16; v4 and v5p are made
# of 4x4x4 cubes.
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v2", "v2:2x2", "default", 2, 7.48 * GIB, 46e12 / 2, 700e9 / 2, 4 * 62e9, 2, 16),
        Generation("v3", "v3:2x2", "default", 2, 15.48 * GIB, 123e12 / 2, 900e9 / 2, 4 * 82e9, 2, 32),
        # Without this configuration the compiler sees the two cores of a v4 chip as two devices.
        Generation("v4", "v4:2x2x1", "megacore", 1, 30.75 * GIB, 275e12, 1200e9, 6 * 50e9, 3, 4),
        Generation("v5e", "v5e:2x2", "default", 1, 15.75 * GIB, 197e12, 819e9, 200e9, 2, 16),
        Generation("v5p", "v5p:2x2x1", "default", 1, 95.73 * GIB, 459e12, 2765e9, 600e9, 3, 4),
        Generation("v6e", "v6e:2x2", "default", 1, 31.24 * GIB, 918e12, 1638e9, 400e9, 2, 16),
    )
}


# Sizes of the slices that Cloud TPU offers, as accelerator types count them. Of v4 and v5p the default shapes alone,
# which are nearest to a cube; there are others. Source: docs/tpu.md.
OFFERED = {
    "v2": (8, 32, 128, 256, 512),
    "v3": (8, 32, 64, 128, 256, 512, 1024, 2048),
    "v4": (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "v5litepod": (1, 4, 8, 16, 32, 64, 128, 256),
    "v5p": (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 12288),
    "v6e": (1, 4, 8, 16, 32, 64, 128, 256),
}


def slice_shape(generation: Generation, replicas: int) -> tuple[int, ...]:
    """Chips along each axis of a slice, smallest first: (16, 16) for 512 cores of v3, (4, 4, 8) for 128 chips of v4.

    Google names several shapes for some sizes; this is the most compact one.

    Raises:
      ConfigError: if the replicas do not fill whole chips.
    """
    if replicas % generation.replicas_per_chip:
        raise ConfigError(
            f"{replicas} replicas are no slice of {generation.name}, which has {generation.replicas_per_chip} a chip: "
            "use a multiple of it"
        )
    chips = replicas // generation.replicas_per_chip
    divisors = [d for d in range(1, chips + 1) if chips % d == 0]
    sides = itertools.product(divisors, repeat=generation.axes - 1)
    shapes = {tuple(sorted((*side, chips // math.prod(side)))) for side in sides if chips % math.prod(side) == 0}
    return min(shapes, key=lambda shape: (sum(shape), shape))


def allreduce_seconds(generation: Generation, replicas: int, contributed_bytes: int) -> float:
    """Time to sum `contributed_bytes` of every replica over all of them; a bound, the links being fully used.

    A bandwidth-optimal all-reduce sends 2 (N − 1)/N of the data out of each of N chips (Patarasuk and Yuan, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations", JPDC 2009), over all axes of the torus at once; an
    axis that does not wrap around has half the bandwidth ("How to Scale Your Model", jax-ml.github.io/scaling-book,
    chapter "Sharded matrices"). To that a hop of HOP_SECONDS for each step through the slice, out and back. The two
    cores of a v2 or v3 chip add up their data in the chip.
    """
    shape = slice_shape(generation, replicas)
    chips = math.prod(shape)
    if chips == 1:
        return 0.0
    rings = {side: side % generation.wraps_at == 0 for side in shape}
    share = sum(1.0 if rings[side] else 0.5 for side in shape if side > 1) / generation.axes
    moving = 2 * (chips - 1) / chips * contributed_bytes / (share * generation.ici_bandwidth)
    hops = sum(side // 2 if rings[side] else side - 1 for side in shape)
    return moving + 2 * hops * HOP_SECONDS
