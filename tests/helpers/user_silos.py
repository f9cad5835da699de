"""What a run with tiers deals out, as a folder for each user and each expert, and public text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedsp_mpi import config
from fedsp_mpi.data import loading
from fedsp_mpi.data.examples import Example
from fedsp_mpi.run.tier_inputs import DomainInputs, TierInputs


def cut(settings: Sequence[str], folder: Path, *, public: bool = True) -> tuple[str, ...]:
    """Write the rows of every owner below a folder; return the settings of a run on them.

    Args:
        settings: of the run that shares a source.
        folder: is made.
        public: whether the domains' test text is public.
    """
    inputs = TierInputs(config.load(None, list(settings)))
    shards: dict[str, list[dict]] = {user: [] for user in inputs.config.tiers.users}
    experts = []
    for domain in inputs.domains:
        expert_rows, *users_rows = domain.shards
        train = domain.splits.train
        write(folder / "experts" / domain.name / "train", rows(domain, train, expert_rows))
        for split in ("validation", "test"):
            examples = getattr(domain.splits, split)
            write(folder / "experts" / domain.name / split, rows(domain, examples))
        write(folder / "public" / domain.name / "test", rows(domain, domain.splits.test))
        for user, places in zip(domain.config.federation.users, users_rows, strict=True):
            shards[user] += rows(domain, train, places)
        users = ", ".join(domain.config.federation.users)
        more = f", public_test: '{folder}/public/{domain.name}'" if public else ""
        source = f"{folder}/experts/{domain.name}"
        experts.append(f"{{name: {domain.name}, users: [{users}], source: '{source}'{more}}}")
    for user, own in shards.items():
        write(folder / "users" / user / "train", own)
    left = ("tiers.experts=", "data.limit.", "federation.clients=")
    return (
        *(item for item in settings if not item.startswith(left)),
        "data.source=null",
        f"tiers.experts=[{', '.join(experts)}]",
        f"federation.silos={{source: '{folder}/users/*'}}",
    )


def rows(domain: DomainInputs, examples: Sequence[Example], places=None) -> list[dict]:
    """The rows of a source that examples were read from, or those at some places of them."""
    tables, _ = loading.read_tables(domain.task, domain.source, domain.config.data.columns)
    chosen = examples if places is None else [examples[place] for place in places.tolist()]
    return loading.rows_of(tables, chosen).to_list()


def write(path: Path, lines: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
