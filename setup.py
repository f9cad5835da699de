"""Installation of `fedsp_mpi`; see README.md for the one line that uses it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

LOCAL = ["mpich"]  # an MPI as a wheel, for machines without one; a cluster uses its own
EVALUATE = ["lm_eval>=0.4.12"]  # drives the verb `evaluate`
PLOT = ["matplotlib"]  # pictures of `report`
TEST = [*LOCAL, *EVALUATE, *PLOT, "pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"]

[VERSION] = re.findall(r'^__version__ = "(.+)"$', Path("fedsp_mpi/__init__.py").read_text(encoding="utf-8"), re.M)

setup(
    name="fedsp_mpi",
    version=VERSION,
    description="Federated tuning of soft prompts (FedSP) on MPI",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["fedsp_mpi", "fedsp_mpi.*"]),
    package_data={"fedsp_mpi.resources": ["*.yaml", "recipes/*.yaml", "model/*", "data/*"]},
    install_requires=[
        "mpi4py>=4.1",
        "torch",
        "transformers>=5",
        "peft",
        "tokenizers",
        "datasets",
        "huggingface_hub",
        "deepspeed",
        "h5py",
        "safetensors",
        "xxhash",
        "cmaes",
        "threadpoolctl",
        "numpy",
        "PyYAML",
    ],
    extras_require={"local": LOCAL, "evaluate": EVALUATE, "plot": PLOT, "test": TEST},
)
