"""The benchmark client: measures any echo server, and says whether its numbers can be trusted.

>>> from kecho import bench
>>> result = bench.run(bench.Workload(mode="closed", connections=50, duration=5))
>>> result.rate_per_s, result.latency["service"].percentile(99), result.verdict.valid
"""

from .results.histogram import Histogram
from .results.result import Result, Verdict
from .runner import run
from .target import TargetError
from .workload import Workload

__all__ = ["Histogram", "Result", "TargetError", "Verdict", "Workload", "run"]
