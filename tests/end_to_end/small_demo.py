"""Runs the demo from scratch for two steps, and tests it on few images."""

from dataclasses import replace

from bridgetower_demo import plan
from bridgetower_demo.__main__ import main

FEW = {"num_validation": 20, "num_test": 20}

if __name__ == "__main__":
    plan.NUM_VALIDATION = plan.NUM_TEST = 40
    datasets = {name: replace(config, **FEW) for name, config in plan.FROM_SCRATCH.datasets.items()}
    plan.FROM_SCRATCH = replace(plan.FROM_SCRATCH, datasets=datasets)
    main(["--from-scratch", "--minutes", "0.01"])
