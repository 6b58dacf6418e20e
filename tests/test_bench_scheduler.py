"""The simulation that measures the scheduler."""

import numpy as np
import pytest
from benchmarks import baselines
from benchmarks import scheduler as bench


def test_every_simulated_request_is_served_once_and_no_replica_computes_two_at_a_time():
    replicas = bench.make_replicas(7)
    requests = bench.make_requests(300, rate=10.0)
    simulation = bench.Simulation(replicas, requests)
    simulation.run()
    assert np.isfinite(simulation.finishes).all() and len(simulation.cpu_s) == 600
    busy = (simulation.starts[:, None] <= simulation.starts) & (simulation.starts < simulation.finishes[:, None])
    assert busy.sum(axis=0).max() == len(replicas)  # each request counts itself
    assert simulation.scheduler.num_running == 0


@pytest.mark.parametrize("rate", [10.0, None])
def test_no_way_is_better_than_the_lower_bound(rate):
    speeds, requests = bench.speeds_of(bench.make_replicas(7)), bench.make_requests(300, rate)
    simulation = bench.Simulation(bench.make_replicas(7), requests)
    simulation.run()
    mean, p95, makespan = baselines.lower_bound(speeds, requests)
    for finishes in (
        simulation.finishes,
        *(baselines.round_robin(speeds, requests, weighted)[1] for weighted in (0, 1)),
    ):
        latencies = finishes - requests.arrivals
        assert mean <= latencies.mean() and p95 <= np.quantile(latencies, 0.95) and makespan <= finishes.max()


def test_the_lower_bound_of_a_batch_is_what_one_replica_reaches_shortest_first():
    requests = baselines.Requests(np.zeros(3), np.ones(3), np.array([4.0, 1.0, 2.0]))
    mean, _, makespan = baselines.lower_bound(np.array([2.0]), requests)
    assert (mean, makespan) == ((0.5 + 1.5 + 3.5) / 3, 3.5)


def test_the_lower_bound_of_arrivals_serves_the_shortest_remaining_first():
    requests = baselines.Requests(np.array([0.0, 1.0]), np.ones(2), np.array([4.0, 1.0]))
    assert baselines.shortest_remaining_first(requests, 1.0).tolist() == [5.0, 2.0]


def test_weighted_round_robin_gives_each_replica_its_share_by_speed():
    turns = baselines.turns(np.array([1.0, 3.0]), weighted=True)
    assert sorted(next(turns) for _ in range(40)) == [0] * 10 + [1] * 30
