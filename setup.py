"""Package layout: the repository root is the import package ``moescale`` (see docs/layout.md)."""

from setuptools import setup

FOLDERS = (
    "base", "compat", "parallel", "data", "scaling", "moe", "models", "checkpoint", "training", "benchmarks", "launch",
)  # fmt: skip

setup(
    package_dir={"moescale": "."},
    packages=["moescale", *(f"moescale.{folder}" for folder in FOLDERS), "moescale.configs"],
    package_data={
        "moescale": ["py.typed"],
        "moescale.configs": ["*/*.yaml"],
        "moescale.scaling": ["templates/*"],
    },
)
