"""Do the tests notice? Plants the mistakes of `data/faults.toml`, one at a time, and runs the tests that should fail.

    python tests/plant_faults.py [-j JOBS] [NAME...]

All work happens in copies of the source tree, which are gone at the end. Prints a table in Markdown.
"""

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).parent / "data" / "faults.toml"
LIMIT_SECONDS = 900
# An editable installation finds modules in the original tree, in front of every path; processes that tests start too.
STARTUP = """import sys
sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in type(one).__module__]
"""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A mistake: ``old`` stands once in ``file`` of the package, and ``new`` takes its place."""

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The file with the mistake."""
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise ValueError(f"{self.name}: {self.file} has its text {count} times, and it must be changed once")
        return text.replace(self.old, self.new)


def faults() -> list[Fault]:
    """All of the table."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))["fault"]
    return [Fault(**{**one, "tests": tuple(one["tests"])}) for one in table]


def copy_tree(place: Path) -> None:
    """What git knows of the source tree, or would, with the built kernels beside their sources."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    built = find_spec("mezzotint.kernels._native")
    assert built is not None, "the kernels are not built: make venv"
    assert built.origin is not None
    shutil.copy2(built.origin, place / "src" / "mezzotint" / "kernels" / Path(built.origin).name)
    (place / "startup").mkdir()
    (place / "startup" / "sitecustomize.py").write_text(STARTUP, encoding="utf-8")


def run(fault: Fault, place: Path) -> str:
    """The test that noticed, or nothing."""
    file = place / "src" / "mezzotint" / fault.file
    original = file.read_text(encoding="utf-8")
    file.write_text(fault.planted(original), encoding="utf-8")
    tests = [f"tests/{name}" for name in fault.tests]
    options = ["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    paths = os.pathsep.join(str(place / part) for part in ("startup", "src"))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=place,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "does not end"
    finally:
        file.write_text(original, encoding="utf-8")
    if done.returncode == 0:
        return ""
    noticed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or noticed is None:
        raise RuntimeError(f"{fault.name}: pytest ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return noticed[1].partition("[")[0]


def run_all(chosen: list[Fault], jobs: int, tell: Callable[[str], None]) -> dict[str, str]:
    """What noticed each mistake; ``jobs`` are looked at at a time."""
    with tempfile.TemporaryDirectory(prefix="mezzotint-faults-") as folder:
        places: queue.Queue[Path] = queue.Queue()
        for number in range(jobs):
            copy_tree(Path(folder) / str(number))
            places.put(Path(folder) / str(number))

        def one(fault: Fault) -> str:
            place = places.get()
            try:
                found = run(fault, place)
            finally:
                places.put(place)
            tell(f"{fault.name}: {found or 'survived'}")
            return found

        pool = ThreadPoolExecutor(jobs)
        try:
            return dict(zip((fault.name for fault in chosen), pool.map(one, chosen), strict=True))
        finally:  # on Ctrl-C the tests hear it too, and end
            pool.shutdown(cancel_futures=True)


def table(chosen: list[Fault], noticed: dict[str, str]) -> str:
    """In Markdown."""
    rows = [
        f"| `{fault.file}` | {fault.what} | {f'`{noticed[fault.name]}`' if noticed[fault.name] else '**survived**'} |"
        for fault in chosen
    ]
    return "\n".join(["| file | fault | noticed by |", "|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults; all of them if none is given")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="how many to look at at a time")
    asked = parser.parse_args()
    known = faults()
    unknown = {*asked.names} - {fault.name for fault in known}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(fault.name for fault in known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that copies go then too
    chosen = [fault for fault in known if not asked.names or fault.name in asked.names]
    noticed = run_all(chosen, asked.jobs, lambda line: sys.stderr.write(line + "\n") and sys.stderr.flush())
    sys.stdout.write(table(chosen, noticed) + "\n")


if __name__ == "__main__":
    main()
