"""Reads the log of a training run, for tests and pictures."""

import re


def read_log(path):
    """Returns a dict of floats for each epoch in the log at LOGS_PATH: {"epoch": 1.0, "train_loss": …, …}."""
    with open(path, encoding="utf-8") as file:
        lines = [line for line in file if line.startswith("epoch ")]
    return [{name: float(value) for name, value in re.findall(r"(\w+) ([-\d.naif]+)", line)} for line in lines]
