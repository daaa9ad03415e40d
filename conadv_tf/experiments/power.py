"""What so many seeds can show."""

import math
import statistics
from collections.abc import Sequence

SIGNIFICANCE, POWER = 0.05, 0.8


def detectable(differences: Sequence[float]) -> float:
    """The mean difference that as many pairs of the same spread show with probability POWER.

    By Student's two-sided t-test of paired differences at SIGNIFICANCE (Cohen 1988, Statistical Power Analysis, 2.3).

    Args:
      differences: at least two.
    """
    from scipy import optimize, stats  # half a second that other tables do without

    freedom = len(differences) - 1
    critical = stats.t.ppf(1 - SIGNIFICANCE / 2, freedom)

    def shortfall(effect: float) -> float:
        # The other side's share is below 1e-4 where this is 0.
        return stats.nct.sf(critical, freedom, effect) - POWER

    effect = optimize.brentq(shortfall, 0.0, 10.0 * critical)
    return effect * statistics.stdev(differences) / math.sqrt(len(differences))
