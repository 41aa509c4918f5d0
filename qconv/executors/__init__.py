"""Executors: where the work runs. An ordered map of jobs with a bound on what is in flight.

``threads`` are those of this process: a map over experts and matrices that looks ahead only as far as there are workers
and as memory was allowed, with results in order, so that neither sums nor bytes depend on which thread was faster.
Inside a worker every torch operation runs on one thread.
"""
