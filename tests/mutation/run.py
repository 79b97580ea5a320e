"""Change the code in one small way at a time, and see whether the tests that run the changed line notice.

    python tests/mutation/run.py [--count 200] [--jobs 2] [--survivors] [--measure] [KEY...]

First the whole suite is measured once: which test runs which lines (`contexts.py`). Then each mutant of the sample
(`sample.py`) is written into a copy of the tree, and the tests that run the line are run there, those of the mirrored
folder first and cheap files before dear ones, until one fails or `--budget` seconds of tests have passed. What has been
found stays in build/mutants, so that the same command continues; --survivors tries those again that nothing noticed,
--measure measures again. survivors.toml says of each known survivor why no test should notice it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from filecmp import cmp
from functools import cache
from pathlib import Path
from queue import SimpleQueue

import coverage
from sample import Mutant, choose

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / "build/mutants"
MEASURED, RESULTS = WORK / "measured", WORK / "results.jsonl"
WANTED = 0.92
KINDS = ("equivalent", "speed", "memory", "message")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def environment(tree: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join(map(str, (tree, tree / "kernels", *filter(None, [os.environ.get("PYTHONPATH")]))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def copy_tree(tree: Path) -> None:
    """What git knows or would take, as it is now."""
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, stdout=-1, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


def measure(jobs: int) -> None:
    """Run the whole suite once, with coverage and its contexts."""
    tree = WORK / "tree-measured"
    shutil.rmtree(MEASURED, ignore_errors=True)
    MEASURED.mkdir(parents=True)
    copy_tree(tree)
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={tree / HERE.relative_to(ROOT) / 'coverage.ini'}"]
    command += [*PYTEST[1:], "-n", str(jobs), "-p", "contexts", "--hypothesis-seed=0"]
    plugin = os.pathsep.join((str(tree / HERE.relative_to(ROOT)), os.environ.get("PYTHONPATH", "")))
    os.environ["MUTANTS_WORK"] = str(WORK)
    env = environment(tree) | {"MUTANTS_CONTEXT": ""}
    env["PYTHONPATH"] = f"{env['PYTHONPATH']}{os.pathsep}{plugin}"
    done = subprocess.run(command, cwd=tree, env=env, check=False)
    if done.returncode == 1:
        print("what fails as it is notices nothing, and is not run with mutants")
    elif done.returncode:
        sys.exit(f"pytest cannot run: exit code {done.returncode}")
    whole = coverage.Coverage(data_file=str(MEASURED / "coverage"), config_file=str(HERE / "coverage.ini"))
    whole.combine([str(MEASURED)])
    whole.save()


@dataclass(frozen=True)
class Measured:
    """By file and line the tests that run it; by test its duration."""

    tests: dict[str, dict[int, set[str]]]
    elapsed_s: dict[str, float]

    def chosen(self, mutant: Mutant, budget_s: float) -> list[str]:
        """The tests to run, in their order; a file that has changed since it was measured is run whole.

        Where a line runs at import, nobody knows whom it is for: those that run the file, and the mirrored folder's.
        Where the file has changed since it was measured, those that ran any of it.
        """
        mirrored = "tests/" + mutant.path.removeprefix("weightops/").rpartition("/")[0]
        by_line = self.tests.get(mutant.path, {})
        is_known = not mutant.is_imported and is_as_measured(mutant.path)
        lines = range(mutant.first, mutant.last + 1) if is_known else by_line
        wanted = set().union(*(by_line.get(line, ()) for line in lines))
        if mutant.is_imported:
            wanted |= {test for test in self.elapsed_s if test.startswith(f"{mirrored}/")}
        files: dict[str, list[str]] = defaultdict(list)
        for test in wanted:
            files[test.partition("::")[0]].append(test)

        def cost_s(tests: Sequence[str]) -> float:
            return sum(self.elapsed_s[test] for test in tests)

        order = sorted(files, key=lambda file: (not file.startswith(mirrored + "/"), cost_s(files[file])))
        new = [
            file
            for file in changed_tests()
            if file in files or (file.startswith(f"{mirrored}/") and not (WORK / "tree-measured" / file).exists())
        ]
        chosen: list[str] = []
        for test in (t for file in order for t in sorted(files[file], key=lambda each: self.elapsed_s[each])):
            if cost_s(chosen) + self.elapsed_s[test] <= budget_s or not chosen:
                chosen.append(test)
        return [*new, *(test for test in chosen if test.partition("::")[0] not in new)]


@cache
def changed_tests() -> list[str]:
    """Files of tests that are not as they were when the suite was measured."""
    files = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    return [file for file in files if not is_as_measured(file)]


def is_as_measured(path: str) -> bool:
    measured = WORK / "tree-measured" / path
    return measured.exists() and cmp(ROOT / path, measured, shallow=False)


def read_measured() -> Measured:
    elapsed_s: dict[str, float] = {}
    users: dict[str, list[str]] = defaultdict(list)
    failed: set[str] = set()
    for log in MEASURED.glob("tests-*.jsonl"):
        for row in map(json.loads, log.read_text().splitlines()):
            if "failed" in row:
                failed.add(row["failed"])
                continue
            elapsed_s[row["test"]] = row["elapsed_s"]
            for fixture in row["fixtures"]:
                users[fixture].append(row["test"])
    data = coverage.CoverageData(str(MEASURED / "coverage"))
    data.read()
    tests: dict[str, dict[int, set[str]]] = {}
    for file in data.measured_files():
        path = file[file.rindex("/weightops/") + 1 :]
        by_line = tests.setdefault(path, {})
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in {part for each in contexts for part in each.split("|")}:
                found = users.get(context, [context] if context in elapsed_s else [])
                by_line.setdefault(line, set()).update(test for test in found if test not in failed)
    return Measured(tests, elapsed_s)


def try_one(mutant: Mutant, tree: Path, tests: Sequence[str], budget_s: float) -> dict[str, object]:
    """Whether the tests notice; the tree is afterwards what it was."""
    if not tests:
        return asdict(mutant) | {"noticed": False, "by": "", "tests": 0}
    file, arguments = tree / mutant.path, tree / "build-arguments"
    before = file.read_bytes()
    arguments.write_text("\n".join(tests))
    base = tree.with_name(f"{tree.name}-tmp")
    try:
        file.write_text(mutant.mutated(tree))
        command = [*PYTEST, "-x", "--tb=line", "--hypothesis-seed=0", f"--basetemp={base}", f"@{arguments}"]
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment(tree, PYTHONDONTWRITEBYTECODE="1"),
            timeout=60 + 3 * budget_s,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if "ERROR: not found" in done.stdout:
            sys.exit(f"tests are not those that were measured: give --measure\n{done.stdout[-300:]}")
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        by = failed[0] if failed else done.stdout[-300:] if done.returncode else ""
        noticed = done.returncode != 0
    except subprocess.TimeoutExpired:
        noticed, by = True, "time limit"
    finally:
        file.write_bytes(before)
        shutil.rmtree(base, ignore_errors=True)
    return asdict(mutant) | {"noticed": noticed, "by": by, "tests": len(tests)}


def run_all(mutants: Sequence[Mutant], measured: Measured, jobs: int, budget_s: float) -> None:
    trees: SimpleQueue[Path] = SimpleQueue()
    for number in range(jobs):
        copy_tree(WORK / f"tree-{number}")
        for folder in (WORK / f"tree-{number}").rglob("__pycache__"):
            shutil.rmtree(folder)
        trees.put(WORK / f"tree-{number}")

    def work(mutant: Mutant) -> None:
        tree = trees.get()
        try:
            row = try_one(mutant, tree, measured.chosen(mutant, budget_s), budget_s)
        finally:
            trees.put(tree)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print("noticed " if row["noticed"] else "SURVIVED", mutant, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, mutants))


def known_results() -> dict[str, dict[str, object]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def report(mutants: Sequence[Mutant]) -> int:
    """Print the figure and the survivors; 1 if too many have no reason, or a reason has no survivor."""
    results = known_results()
    reasons = tomllib.loads((HERE / "survivors.toml").read_text())
    tried = [mutant for mutant in mutants if mutant.key in results]
    survived = [mutant for mutant in tried if not results[mutant.key]["noticed"]]
    gaps = [mutant for mutant in survived if mutant.key not in reasons]
    assert all(reason["kind"] in KINDS for reason in reasons.values())
    for mutant in gaps:
        print(f"{mutant}  ({results[mutant.key]['tests']} tests ran)")
    kinds = Counter(reasons[mutant.key]["kind"] for mutant in survived if mutant.key in reasons)
    altering = len(tried) - kinds.total()
    noticed = len(tried) - len(survived)
    print(f"{len(tried)} of {len(mutants)} mutants tried; survivors that alter no result: {dict(kinds)}")
    print(f"noticed {noticed} of {altering} that alter behaviour: {100 * noticed / max(1, altering):.1f} %")
    gone = reasons.keys() - {mutant.key for mutant in survived}
    if len(tried) == len(mutants) and gone:
        print("in survivors.toml, but not survivors:", *sorted(gone))
    return int(noticed < WANTED * altering)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", help="these alone, whatever is known of them")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--budget", type=float, default=90.0, help="seconds of tests for a mutant")
    parser.add_argument("--survivors", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--report", action="store_true", help="what is known, and run nothing")
    given = parser.parse_args()
    mutants = choose(ROOT, given.count)
    if not given.report:
        if given.measure or not (MEASURED / "coverage").exists():
            measure(given.jobs)
        known = known_results()
        wanted = [m for m in mutants if m.key in given.keys or not given.keys]
        if not given.keys:
            wanted = [m for m in wanted if m.key not in known or (given.survivors and not known[m.key]["noticed"])]
        run_all(wanted, read_measured(), given.jobs, given.budget)
    sys.exit(report(mutants))


if __name__ == "__main__":
    main()
