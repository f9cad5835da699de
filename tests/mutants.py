"""Check that the tests bite: apply small wrong changes to a copy of the package, one by one.

    python tests/mutants.py            # all
    python tests/mutants.py NAME ...   # some
    python tests/mutants.py --list

Each mutant names the tests that must catch it, all of the default set. It is caught if one of them
fails; a line says which. In the copy without a mutant they must pass, which is looked at first. Not
part of CI: less than ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds, of the tests of one mutant


@dataclass(frozen=True)
class Mutant:
    """One wrong change.

    Attributes:
        name: says what is wrong.
        file: of the package.
        before, after: a text that occurs once in it, and what replaces it.
        module: of the tests that must catch it, relative to tests/.
        names: which of them, as pytest's -k has it.
    """

    name: str
    file: str
    before: str
    after: str
    module: str
    names: str


MUTANTS = [
    Mutant(
        "averages without weights",
        "aggregation/fedavg.py",
        "    return values / total\n",
        "    return np.full(len(values), 1 / len(values))\n",
        "unit/aggregation/test_robust.py",
        "follows_from_the_definition or rejects_nobody",
    ),
    Mutant(
        "averages padding into the distillation loss",
        "models/losses.py",
        "torch.where(mask.bool(), squared_error, 0.0).sum()",
        "squared_error.sum()",
        "unit/training/test_training.py",
        "hidden_loss",
    ),
    Mutant(
        "takes the batches of the next round",
        "algorithms/fedsp.py",
        "first_step=(round - 1) * self._training.tuning.steps",
        "first_step=round * self._training.tuning.steps",
        "unit/algorithms/test_oracle.py",
        "two_rounds and projection",
    ),
    Mutant(
        "lets the server tune on the batches of the next round",
        "algorithms/prompt_server.py",
        "first_step=(round - 1) * self._stage.steps",
        "first_step=round * self._stage.steps",
        "unit/algorithms/test_oracle.py",
        "two_rounds and projection",
    ),
    Mutant(
        "skips fsync",
        "record/atomic.py",
        "                os.fsync(handle)\n",
        "                pass\n",
        "unit/run/test_guarantees.py",
        "on_disk",
    ),
    Mutant(
        "does not sync folders",
        "record/atomic.py",
        "        os.fsync(handle)\n    finally",
        "        pass\n    finally",
        "unit/run/test_guarantees.py",
        "on_disk",
    ),
    Mutant(
        "ignores deadlines",
        "comm/waiting.py",
        "if deadline is not None and waited > deadline:",
        "if deadline is not None and waited > 1e9 * deadline:",
        "unit/comm/test_comm.py",
        "deadline",
    ),
    Mutant(
        "forgets optimizers on resume",
        "algorithms/client_state.py",
        "            engine.load_state(part_of_state(state, name))\n",
        "            pass\n",
        "unit/training/test_training.py",
        "goes_on_from_its_state",
    ),
    Mutant(
        "reverts what is better",
        "roles.py",
        "not loss <= aggregate_loss",
        "loss < aggregate_loss",
        "unit/algorithms/test_variants.py",
        "taken_back",
    ),
    Mutant(
        "swaps the losses of merged and tuned prompts",
        "federate.py",
        "return ServerTuning(trace, merged_loss, loss)",
        "return ServerTuning(trace, loss, merged_loss)",
        "unit/algorithms/test_variants.py",
        "taken_back",
    ),
    Mutant(
        "takes a later round of equal loss for the best",
        "roles.py",
        "        if not loss < self.loss:\n",
        "        if not loss <= self.loss:\n",
        "unit/run/test_guarantees.py",
        "equal_losses",
    ),
    Mutant(
        "does not seal the global model",
        "tensors.py",
        "            if address < end and begin < address + size:\n",
        "            if False:\n",
        "unit/test_tensors.py",
        "sealed",
    ),
    Mutant(
        "counts rejected updates for the quorum",
        "federate.py",
        "num_accepted = len(updates.reports) - len(updates.rejected)",
        "num_accepted = len(updates.reports)",
        "unit/aggregation/test_robust.py",
        "quorum",
    ),
    Mutant(
        "takes the mean for the median",
        "aggregation/robust.py",
        "median[where] = np.median(rows.astype(np.float64), axis=0)",
        "median[where] = np.mean(rows.astype(np.float64), axis=0)",
        "unit/aggregation/test_robust.py",
        "median",
    ),
    Mutant(
        "does not clip private updates",
        "algorithms/privacy.py",
        "factor = min(1.0, clip / norm) if norm > 0 else 1.0",
        "factor = 1.0",
        "unit/algorithms/test_privacy.py",
        "clip",
    ),
    Mutant(
        "adds noise of one sign",
        "algorithms/privacy.py",
        "np.where(bits & np.uint64(1), 1.0, -1.0)",
        "np.where(bits & np.uint64(1), 1.0, 1.0)",
        "unit/algorithms/test_privacy.py",
        "laplace",
    ),
    Mutant(
        "leaves the clients' step size as it was",
        "algorithms/fedbpt.py",
        "        search.step_size *= ratio",
        "        search.step_size *= 1.0",
        "unit/algorithms/test_fedbpt.py",
        "ranks_the_clients_means",
    ),
    Mutant(
        "draws the same numbers for every client",
        "rng.py",
        "*map(str, numbers)])",
        "*map(str, numbers[:1])])",
        "unit/algorithms/test_fedbpt.py",
        "go_on_where_they_were",
    ),
    Mutant(
        "ignores alpha",
        "data/partition.py",
        "rng.dirichlet(np.full(num_shards, alpha))",
        "rng.dirichlet(np.full(num_shards, 1.0))",
        "unit/data/test_partition.py",
        "known_draw or skew_grows",
    ),
    Mutant(
        "divides by tokens, not by characters",
        "evaluation/scoring.py",
        "np.array(question.lengths, dtype=float)",
        "np.ones(len(question.lengths))",
        "unit/evaluation/test_scoring.py",
        "full_sequence",
    ),
    Mutant(
        "starts again at the last checkpoint's own round",
        "federate.py",
        "range(schedule.rounds_done + 1, schedule.federation.rounds + 1)",
        "range(max(1, schedule.rounds_done), schedule.federation.rounds + 1)",
        "unit/run/test_guarantees.py",
        "stopped",
    ),
    Mutant(
        "lets updates that are not finite through",
        "comm/inspection.py",
        "if float(np.dot(flat, flat)) <= MAX_ABS**2:",
        "if True:",
        "ranks/test_hostile_ranks.py",
        "left_out_by_name",
    ),
    Mutant(
        "averages rows in the order of ranks",
        "comm/incoming.py",
        "        reorder(matrix, self._row_order)\n",
        "",
        "ranks/test_wire.py",
        "one_result",
    ),
    Mutant(
        "reads damaged checkpoints",
        "record/checkpoint.py",
        "if digest != file.digest:",
        "if False:",
        "unit/record/test_damage.py",
        "gives_way",
    ),
    Mutant(
        "does not lock the run's folder",
        "record/lock.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "unit/run/test_guarantees.py",
        "another_process_holds",
    ),
    Mutant(
        "goes on with other inputs",
        "run/fingerprints.py",
        "    names = changed(before, now)\n    if names:",
        "    names = changed(before, now)\n    if False:",
        "unit/files/test_folders.py",
        "other_texts",
    ),
    Mutant(
        "warms up one step longer",
        "training/engine.py",
        "return settings.learning_rate * (step + 1) / num_warmup",
        "return settings.learning_rate * step / num_warmup",
        "unit/training/test_training.py",
        "rate_climbs",
    ),
    Mutant(
        "lets one client's failure stop the others",
        "federate.py",
        "            except ClientError as error:\n",
        "            except ZeroDivisionError as error:\n",
        "unit/training/test_training.py",
        "the_others_go_on",
    ),
    Mutant(
        "scores users' prompts on an expert's own text",
        "run/user_silos.py",
        "        if not self._public_experts:\n",
        "        if client < 0:\n",
        "unit/run/test_user_silos.py",
        "without_public_text",
    ),
]


def copy_checkout(folder: Path) -> Path:
    """Copy what git knows of this checkout; ranks that tests start then run the copy, too."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    target = folder / "checkout"
    for name in listed.stdout.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    shared = folder / "shared"
    if (ROOT.parent / "shared").exists() and not shared.exists():
        shared.symlink_to(ROOT.parent / "shared")
    return target


def run_tests(checkout: Path, module: str, names: str) -> subprocess.CompletedProcess[str]:
    """Run tests of a copy of the checkout against the package in it."""
    paths = [checkout, checkout / "tests"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, module, "-k", names],
        cwd=checkout / "tests",
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def check(mutant: Mutant, checkout: Path) -> tuple[bool, str]:
    """Return whether a mutant is caught, and by which test; or what is wrong."""
    file = checkout / "fedsp_mpi" / mutant.file
    text = file.read_text(encoding="utf-8")
    count = text.count(mutant.before)
    if count != 1:
        return False, f"found its text {count} times in {mutant.file}, expected once"
    file.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
    try:
        done = run_tests(checkout, mutant.module, mutant.names)
    except subprocess.TimeoutExpired:
        return False, f"its tests still run after {TIMEOUT} s"
    finally:
        file.write_text(text, encoding="utf-8")
    if done.returncode == 0:
        return False, "NOT CAUGHT"
    failed = re.search(r"^FAILED (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return True, failed[1].removeprefix("tests/")
    return False, f"pytest ended with {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}"


def all_pass(checkout: Path, mutants: list[Mutant]) -> bool:
    """Return whether all tests pass where nothing is wrong; show those that do not."""
    patterns: dict[str, list[str]] = {}
    for mutant in mutants:
        patterns.setdefault(mutant.module, []).append(mutant.names)
    for module, names in patterns.items():
        done = run_tests(checkout, module, " or ".join(f"({name})" for name in names))
        if done.returncode != 0:
            print(f"{module}: found failures without a mutant\n{done.stdout[-2000:]}")
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="words of the mutants' names; default: all")
    parser.add_argument("--list", action="store_true", help="show the mutants and their tests")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.names or any(n in m.name for n in options.names)]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name}: {mutant.file}; {mutant.module} {mutant.names}")
        return 0
    num_caught = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        checkout = copy_checkout(Path(folder))
        if not all_pass(checkout, chosen):
            return 1
        for mutant in chosen:
            start = time.perf_counter()
            is_caught, result = check(mutant, checkout)
            num_caught += is_caught
            print(f"{time.perf_counter() - start:5.0f} s  {mutant.name}: {result}", flush=True)
    print(f"{num_caught} of {len(chosen)} caught")
    return 0 if num_caught == len(chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
