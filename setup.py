"""Installation of `fedsp_mpi`; see README.md for the one line that uses it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

LOCAL = ["mpich"]  # an MPI as a wheel, for machines without one; a cluster uses its own
EVALUATE = ["lm_eval>=0.4.12"]  # drives the verb `evaluate`
PLOT = ["matplotlib>=3.11"]  # pictures of `report`
TENSORBOARD = ["tensorboardX>=2.6"]  # event files beside the record
ALL = [*LOCAL, *EVALUATE, *PLOT, *TENSORBOARD]  # all but what only the tests need
TOOLS = ["pytest", "pytest-xdist", "hypothesis", "jsonschema", "ruff", "mypy"]
BROWSER = ["axe-playwright-python"]  # opens pages of `report` in a real Chromium, for a slow test
TEST = [*ALL, *TOOLS]

[VERSION] = re.findall(
    r'^__version__ = "(.+)"$', Path("fedsp_mpi/__init__.py").read_text(encoding="utf-8"), re.M
)


setup(
    name="fedsp_mpi",
    version=VERSION,
    description="Federated tuning of soft prompts (FedSP) on MPI",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["fedsp_mpi", "fedsp_mpi.*"]),
    package_data={
        "fedsp_mpi": ["py.typed"],
        "fedsp_mpi.resources": ["*.yaml", "*.md", "recipes/*.yaml", "model/*", "data/*"],
        "fedsp_mpi.report": ["*.j2"],
        "fedsp_mpi.record": ["*.md"],
    },
    entry_points={"console_scripts": ["fedsp-mpi = fedsp_mpi.__main__:start"]},
    # Lower bounds: the minor versions of constraints.txt, with which the tests have run.
    install_requires=[
        "mpi4py>=4.1",
        "torch>=2.13",
        "transformers>=5.23",
        "peft>=0.21",
        "tokenizers>=0.23",
        "datasets>=5.2",
        "huggingface_hub>=2.4",
        "deepspeed>=0.19",
        "h5py>=3.16",
        "safetensors>=0.8",
        "xxhash>=4.1",
        "cmaes>=0.13",
        "threadpoolctl>=3.8",
        "cryptography>=50.0",
        "pydantic>=2.14",
        "tqdm>=4.70",
        "numpy>=2.4",
        "pandas>=3.1",
        "pyarrow>=26.0",
        "PyYAML>=6.0",
        "Jinja2>=3.1",
        "shtab>=1.13",
    ],
    extras_require={
        "local": LOCAL,
        "evaluate": EVALUATE,
        "plot": PLOT,
        "all": ALL,
        "browser": BROWSER,
        "tensorboard": TENSORBOARD,
        "test": TEST,
    },
)
