"""Runs `bridgetower demo --from-scratch` for two steps, and tests it on few images."""

from dataclasses import replace

from bridgetower import cli
from bridgetower.demo import plan

FEW = {"num_validation": 20, "num_test": 20}

if __name__ == "__main__":
    plan.NUM_VALIDATION = plan.NUM_TEST = 40
    datasets = {name: replace(config, **FEW) for name, config in plan.FROM_SCRATCH.datasets.items()}
    plan.FROM_SCRATCH = replace(plan.FROM_SCRATCH, datasets=datasets)
    cli.main(["demo", "--from-scratch", "--minutes", "0.01"])
