"""The benchmark suite: μMoE layers beside everything that could stand in their place, on this machine.

`workloads` and `implementations` say what is compared, as data; `check` refuses what is wrong; `records` is what a run
writes.
"""
