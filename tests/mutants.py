"""Check that the tests bite: apply small wrong changes to a copy of the package, one by one.

    python tests/mutants.py            # all
    python tests/mutants.py NAME ...   # some
    python tests/mutants.py --list

Each mutant names the tests that must catch it. A mutant is caught if one of them fails; the copy
without a mutant must pass. Not part of CI: it takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """One wrong change.

    Attributes:
        name: says what is wrong.
        file: of the package.
        before, after: a text that occurs once in it, and what replaces it.
        tests: arguments of pytest, relative to tests/.
    """

    name: str
    file: str
    before: str
    after: str
    tests: str


MUTANTS = [
    Mutant(
        "averages without weights",
        "aggregation/fedavg.py",
        "    return values / total\n",
        "    return np.full(len(values), 1 / len(values))\n",
        "unit/algorithms/test_oracle.py unit/aggregation",
    ),
    Mutant(
        "averages padding into the distillation loss",
        "models/losses.py",
        "torch.where(mask.bool(), squared_error, 0.0).sum()",
        "squared_error.sum()",
        "unit/training/test_training.py",
    ),
    Mutant(
        "takes the batches of the next round",
        "algorithms/fedsp.py",
        "first_step=(round - 1) * self._training.tuning.steps",
        "first_step=round * self._training.tuning.steps",
        "unit/algorithms/test_oracle.py",
    ),
    Mutant(
        "lets the server tune on the batches of the next round",
        "algorithms/prompt_server.py",
        "first_step=(round - 1) * self._stage.steps",
        "first_step=round * self._stage.steps",
        "unit/algorithms/test_oracle.py",
    ),
    Mutant(
        "skips fsync",
        "record/atomic.py",
        "                os.fsync(handle)\n",
        "                pass\n",
        "unit/run/test_guarantees.py",
    ),
    Mutant(
        "ignores deadlines",
        "comm/waiting.py",
        "if deadline is not None and waited > deadline:",
        "if deadline is not None and waited > 1e9 * deadline:",
        "unit/comm/test_comm.py",
    ),
    Mutant(
        "forgets optimizers on resume",
        "algorithms/client_state.py",
        "            engine.load_state(part_of_state(state, name))\n",
        "            pass\n",
        "unit/training/test_training.py",
    ),
    Mutant(
        "reverts what is better",
        "roles.py",
        "not loss <= aggregate_loss",
        "loss < aggregate_loss",
        "unit/algorithms/test_variants.py",
    ),
    Mutant(
        "takes a later round of equal loss for the best",
        "roles.py",
        "        if not loss < self.loss:\n",
        "        if not loss <= self.loss:\n",
        "unit/run/test_guarantees.py",
    ),
    Mutant(
        "does not seal the global model",
        "tensors.py",
        "            if address < end and begin < address + size:\n",
        "            if False:\n",
        "unit/test_tensors.py",
    ),
    Mutant(
        "counts rejected updates for the quorum",
        "federate.py",
        "num_accepted = len(updates.reports) - len(updates.rejected)",
        "num_accepted = len(updates.reports)",
        "unit/aggregation unit/run/test_guarantees.py",
    ),
    Mutant(
        "takes the mean for the median",
        "aggregation/robust.py",
        "median[where] = np.median(rows.astype(np.float64), axis=0)",
        "median[where] = np.mean(rows.astype(np.float64), axis=0)",
        "unit/aggregation",
    ),
    Mutant(
        "does not clip private updates",
        "algorithms/privacy.py",
        "factor = min(1.0, clip / norm) if norm > 0 else 1.0",
        "factor = 1.0",
        "unit/algorithms/test_privacy.py",
    ),
    Mutant(
        "adds noise of one sign",
        "algorithms/privacy.py",
        "np.where(bits & np.uint64(1), 1.0, -1.0)",
        "np.where(bits & np.uint64(1), 1.0, 1.0)",
        "unit/algorithms/test_privacy.py",
    ),
    Mutant(
        "leaves the clients' step size as it was",
        "algorithms/fedbpt.py",
        "        search.step_size *= ratio",
        "        search.step_size *= 1.0",
        "unit/algorithms/test_fedbpt.py",
    ),
    Mutant(
        "draws the same numbers for every client",
        "rng.py",
        "*map(str, numbers)])",
        "*map(str, numbers[:1])])",
        "unit/algorithms/test_fedbpt.py unit/aggregation",
    ),
    Mutant(
        "ignores alpha",
        "data/partition.py",
        "rng.dirichlet(np.full(num_shards, alpha))",
        "rng.dirichlet(np.full(num_shards, 1.0))",
        "unit/data/test_partition.py",
    ),
    Mutant(
        "divides by tokens, not by characters",
        "evaluation/scoring.py",
        "np.array(question.lengths, dtype=float)",
        "np.ones(len(question.lengths))",
        "unit/evaluation/test_scoring.py",
    ),
    Mutant(
        "starts again at the last checkpoint's own round",
        "federate.py",
        "range(schedule.rounds_done + 1, schedule.federation.rounds + 1)",
        "range(max(1, schedule.rounds_done), schedule.federation.rounds + 1)",
        "ranks/test_resume.py -k 'stop_in_a_round'",
    ),
    Mutant(
        "lets updates that are not finite through",
        "comm/inspection.py",
        "if float(np.dot(flat, flat)) <= MAX_ABS**2:",
        "if True:",
        "unit/comm/test_comm.py ranks/test_hostile_ranks.py",
    ),
    Mutant(
        "averages rows in the order of ranks",
        "comm/incoming.py",
        "        reorder(matrix, self._row_order)\n",
        "",
        "ranks/test_wire.py",
    ),
    Mutant(
        "reads damaged checkpoints",
        "record/checkpoint.py",
        "if digest != file.digest:",
        "if False:",
        "unit/record",
    ),
    Mutant(
        "does not lock the run's folder",
        "record/lock.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "unit/run/test_guarantees.py unit/files",
    ),
    Mutant(
        "goes on with other inputs",
        "run/fingerprints.py",
        "    names = changed(before, now)\n    if names:",
        "    names = changed(before, now)\n    if False:",
        "unit/files unit/data/test_tokens.py",
    ),
    Mutant(
        "warms up one step longer",
        "training/engine.py",
        "return settings.learning_rate * (step + 1) / num_warmup",
        "return settings.learning_rate * step / num_warmup",
        "unit/training/test_training.py",
    ),
    Mutant(
        "lets one client's failure stop the others",
        "federate.py",
        "            except ClientError as error:\n",
        "            except ZeroDivisionError as error:\n",
        "unit/training/test_training.py",
    ),
]


def run_tests(package: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests of this checkout against another copy of the package."""
    paths = [package.parent, ROOT / "tests"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *shlex.split(tests)],
        cwd=ROOT / "tests",
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def check(mutant: Mutant, folder: Path) -> str:
    """Return "caught", or what is wrong."""
    package = folder / mutant.name.replace(" ", "_") / "fedsp_mpi"
    shutil.copytree(ROOT / "fedsp_mpi", package, ignore=shutil.ignore_patterns("__pycache__"))
    file = package / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.before) != 1:
        return f"found its text {text.count(mutant.before)} times in {mutant.file}, expected once"
    file.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
    done = run_tests(package, mutant.tests)
    shutil.rmtree(package.parent)
    if done.returncode == 1:
        return "caught"
    if done.returncode == 0:
        return "NOT CAUGHT"
    return f"pytest ended with {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="words of the mutants' names; default: all")
    parser.add_argument("--list", action="store_true", help="show the mutants and their tests")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.names or any(n in m.name for n in options.names)]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name}: {mutant.file}; {mutant.tests}")
        return 0
    num_caught = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for mutant in chosen:
            start = time.perf_counter()
            result = check(mutant, Path(folder))
            num_caught += result == "caught"
            print(f"{time.perf_counter() - start:5.0f} s  {mutant.name}: {result}", flush=True)
    print(f"{num_caught} of {len(chosen)} caught")
    return 0 if num_caught == len(chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
