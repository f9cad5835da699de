"""Installation of `fedsp_mpi`; see README.md for the one line that uses it."""

from pathlib import Path

from setuptools import find_packages, setup

LOCAL = ["mpich"]  # an MPI as a wheel, for machines without one; a cluster uses its own
TEST = [*LOCAL, "pytest", "ruff", "mypy", "lm_eval"]

setup(
    name="fedsp_mpi",
    version="0.1.0",
    description="Federated tuning of soft prompts (FedSP) on MPI",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["fedsp_mpi", "fedsp_mpi.*"]),
    package_data={"fedsp_mpi.resources": ["*.yaml", "model/*", "data/*"]},
    install_requires=[
        "mpi4py>=4.1",
        "torch",
        "transformers>=5",
        "peft",
        "datasets",
        "deepspeed",
        "h5py",
        "safetensors",
        "numpy",
        "PyYAML",
    ],
    extras_require={"local": LOCAL, "test": TEST},
)
