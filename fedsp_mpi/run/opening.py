"""Open a run's record: a new one, or that of a run that is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedsp_mpi import comm
from fedsp_mpi.config import Config, to_yaml
from fedsp_mpi.files import ownership
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.log import Log, one_line
from fedsp_mpi.record import Checkpoint, Checkpoints, RunRecord, read
from fedsp_mpi.record.hdf5 import require_round_files
from fedsp_mpi.run import environment, few_labels, fingerprints, origin
from fedsp_mpi.run.folder import RunFolder
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.ranks import Assignment, RankInfo

STOPPED = 75  # exit status: told to stop; run.resume continues


@dataclass(frozen=True)
class OpenRecord:
    """A record that is open for writing.

    Attributes:
        record: of the run.
        digests: of the run's inputs, by name; those of the clients' texts are added later.
        resumed: the checkpoint that the run continues from; None: it begins at the first round.
    """

    record: RunRecord
    digests: dict[str, str]
    resumed: Checkpoint | None = None


def begin_record(
    place: RunFolder,
    inputs: ExperimentInputs,
    digests: dict[str, str],
    *,
    ranks: Sequence[RankInfo],
    assignment: Assignment,
) -> OpenRecord:
    """Create the record of a new run.

    Args:
        place: the run's folder; what an earlier run has left in it is removed.
        inputs: of the experiment.
        digests: of what the server reads.
        ranks: all of them.
        assignment: the clients of each rank.

    Raises:
        RecordError: it cannot be written.
    """
    config = inputs.config
    place.clear()
    # Whoever starts RUN/config.yaml again begins a new run: it resumes and replaces nothing.
    run = replace(config.run, name=place.path.name, if_exists="refuse", resume="never")
    record = RunRecord.create(
        place.path,
        config=asdict(config),
        config_text=to_yaml(replace(config, run=run)),
        environment=environment.environment(ranks),
    )
    with failure_recorded(record):
        splits = inputs.splits
        record.describe(
            data={
                "task": config.data.task,
                "train": len(splits.train),
                "validation": len(splits.validation),
                "test": len(splits.test),
                "server_shard": inputs.shard_sizes[0],
                "client_shards": inputs.shard_sizes[1:],
                "notes": list(inputs.notes),
            },
            topology={"assignment": [list(ids) for ids in assignment]},
            **_silos(config),
            inputs=digests,
            **_origin(inputs),
            **_privacy(config),
            **few_labels.section(inputs),
        )
    return OpenRecord(record, digests)


def resume_record(
    folder: Path,
    config: Config,
    digests: dict[str, str],
    *,
    gets_rounds: bool = False,
    ranks: Sequence[RankInfo],
    log: Log,
) -> OpenRecord:
    """Open the record of a run that is there, cut to the round of its newest usable checkpoint.

    Args:
        folder: of the run.
        config: of the run.
        digests: of what the server reads now.
        gets_rounds: the configuration has another number of rounds than the record.
        ranks: all of them.
        log: is told where the run continues.

    Raises:
        ValueError: the inputs are not those that the run was begun with, or record and checkpoint
            are not of one run.
        RecordError: the record cannot be written.
    """
    run = read(folder)
    digests_before = run.sections.get(fingerprints.SECTION, {})
    fingerprints.require_same(folder, digests_before, digests)
    ownership.remove_parts(folder)
    checkpoints = Checkpoints(folder)
    resumed, damaged = checkpoints.newest()
    for problem in damaged:
        log.say(f"checkpoint is not usable: {problem}")
    rounds_done = resumed.round if resumed else 0
    if resumed is not None:
        _require_own_checkpoint(folder, resumed, digests_before, log=log)
    require_round_files(run, rounds_done)
    record = RunRecord.open(folder)
    with failure_recorded(record):
        num_rounds = record.run.committed_rounds
        if rounds_done > num_rounds:
            raise ValueError(
                f"{folder}: found a checkpoint of round {rounds_done} and a record of "
                f"{num_rounds} rounds, expected them of one run; choose another run.name"
            )
        # Noise is drawn anew in rounds that are done again, and in the one that was under way.
        rounds_again = record.run.sections.get("privacy", {}).get("rounds_again", 0)
        rounds_again += num_rounds - rounds_done + 1
        record.describe(**_privacy(config, rounds_again))
        record.cut(rounds_done)
        if gets_rounds:
            log.say(f"goes on with {config.federation.rounds} rounds in all")
            record.set_rounds(config.federation.rounds)
        checkpoints.remove_after(rounds_done)
        number = len(record.run.sections.get("resumes", {})) + 1
        resume = {"round": rounds_done, "environment": environment.environment(ranks)}
        record.describe(resumes={str(number): resume})
    note = "" if resumed else ": it has no checkpoint"
    log.say(f"goes on after round {rounds_done} of {folder}{note}")
    return OpenRecord(record, digests, resumed)


def _origin(inputs: ExperimentInputs) -> dict[str, JsonObject]:
    """Return the record's section `origin`, if the global model comes from an earlier run."""
    return {} if inputs.origin is None else {origin.SECTION: inputs.origin}


def _silos(config: Config) -> dict[str, JsonObject]:
    """Return the record's section `silos`: their names by client id, if clients have silos."""
    names = [silo.name for silo in config.federation.silos]
    return {"silos": {"names": names}} if names else {}


def record_failure(record: RunRecord, error: BaseException) -> None:
    """Write into the record that the run ended before its end, and why."""
    is_interrupted = isinstance(error, KeyboardInterrupt)
    is_stopped = isinstance(error, comm.Refused) and error.exit_status == STOPPED
    reason = one_line(error)
    if is_interrupted:
        reason = f"interrupted (Ctrl-C) in {comm.guard.phase_info(error)}"
    with suppress(ValueError, OSError):  # the error itself is what matters
        record.finish("stopped" if is_stopped or is_interrupted else "failed", reason)


@contextmanager
def failure_recorded(record: RunRecord) -> Iterator[None]:
    """Write an error that is raised inside the `with` into the record."""
    try:
        yield
    except Exception as error:
        record_failure(record, error)
        raise


def privacy_section(config: Config, rounds_again: int = 0) -> JsonObject | None:
    """Return what is promised to clients whose updates get noise; None without noise.

    "epsilon" is of one round, "epsilon_all" of a client that takes part in all of them.

    Args:
        config: of the run.
        rounds_again: rounds that were begun more than once; each draws noise anew.
    """
    privacy = config.client.privacy
    if privacy.epsilon is None:
        return None
    num_rounds = config.federation.rounds + rounds_again
    return asdict(privacy) | {
        "epsilon": privacy.epsilon,
        "epsilon_all": num_rounds * privacy.epsilon,
        "rounds_again": rounds_again,
    }


def _privacy(config: Config, rounds_again: int = 0) -> dict[str, JsonObject]:
    """Return the record's section `privacy`, if there is one."""
    section = privacy_section(config, rounds_again)
    return {} if section is None else {"privacy": section}


def _require_own_checkpoint(
    folder: Path, checkpoint: Checkpoint, digests_before: Mapping[str, str], *, log: Log
) -> None:
    """Raise ValueError if the checkpoint was made from other inputs than the record."""
    if not digests_before or checkpoint.inputs is None:
        log.say(
            "checkpoint: has no digests of texts and weights; whether they are the same is not "
            "checked"
        )
    elif checkpoint.inputs != fingerprints.combined(digests_before):
        raise ValueError(
            f"{folder}: found a checkpoint of round {checkpoint.round} that was made from other "
            "texts or weights than the record, expected them of one run; copy the whole run "
            "folder again, or choose another run.name"
        )
