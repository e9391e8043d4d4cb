"""A wheel has every file that the packages need, and every command runs from it, outside the checkout.

The wheel is built of the files that git tracks, in a folder of its own, and installed into an environment that sees
this one's libraries and no checkout: so nothing is fetched, and nothing can be borrowed from the sources.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from slotwise.cli import build_parser

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("core", "slots", "proving", "models", "plans", "backends", "engine", "slotwise")

PAIR = ("stories", "--draft", "stories-draft", "--capacity", "64", "--threads", "1")
SHORT = ("--prompt", "Once upon a time", "--max-new-tokens", "12")
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "audit": (("--gpu", "sm_90", "--kernel", "embedding.rows", "--dtype", "bf16"),),
    "bisect": (("stories", "--threads", "1", *SHORT, "--backend", "numba_cpu", "--against", "--speculate", "0"),),
    "chat": (("talkative", "--threads", "1"),),
    "doctor": ((),),
    "generate": ((*PAIR, *SHORT, "--record", "run.jsonl", "--stats"), (*PAIR, *SHORT, "--preset", "latency")),
    "get": (("nobody/nothing",),),
    "lockstep": (("stories", "--threads", "1", *SHORT, "--backend", "reference", "--with", "numba_cpu"),),
    "plan": (
        ("show", "stories", "--save", "plan.json"),
        ("verify", "plan.json"),
        ("diff", "stories", "--against", "--page-size", "8"),
        ("view", "run.jsonl"),
        ("view", "plan.json", "--format", "perfetto"),
    ),
    "replay": (("run.jsonl",),),
    "tune": (("--table", "nowhere"),),
    "xval": (("--op", "add", "--backend", "numba_cpu", "--html", "report.html"),),
}
"""Command -> argument lists that reach what it needs of the package, in an order in which files are made, then read."""

REFUSED = {"get": "HF_HUB_OFFLINE", "tune": "GPU|'nowhere'"}
"""Commands that cannot do their work in a test, and what they must say: without a network, and without a GPU."""

DRIVER = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
import slotwise
from slotwise.cli import main

assert not slotwise.__file__.startswith(sys.argv[1]), slotwise.__file__
found = []
for words in json.load(sys.stdin):
    sys.stdin = io.StringIO()
    stream = io.StringIO()
    with redirect_stdout(stream), redirect_stderr(stream):
        try:
            code = main(words)
        except SystemExit as error:
            code = error.code
    found.append((code, stream.getvalue()))
print(json.dumps(found))
"""


def tracked() -> list[str]:
    """The files of the repository, as git knows them."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("needs git's list of files, and this tree is no git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if (REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built offline of a copy of the tracked files."""
    tree = tmp_path_factory.mktemp("tree")
    for name in tracked():
        if name.startswith(tuple(f"{package}/" for package in PACKAGES)) or "/" not in name:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((REPOSITORY / name).read_bytes())
    made = tree / "dist"
    build = ("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(made), ".")
    subprocess.run([sys.executable, "-m", "pip", *build], cwd=tree, check=True)
    (found,) = made.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a fresh environment with the wheel, beside this environment's libraries."""
    root = tmp_path_factory.mktemp("fresh")
    venv.create(root, with_pip=False, symlinks=True)
    python = root / "bin" / "python"
    into = ("install", "--quiet", "--no-deps", "--no-index", str(wheel))
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *into], check=True)
    # A path in a .pth file is searched, and its own .pth files are not read: an editable install stays unseen.
    (packages,) = root.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return root / "bin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands run: a folder with the bundled checkpoints, and one of them with a chat template."""
    made = tmp_path_factory.mktemp("elsewhere")
    models = REPOSITORY / "examples" / "models"
    (made / "talkative").mkdir()
    for name in ("stories", "stories-draft"):
        (made / name).symlink_to(models / name)
    for file in (models / "stories").iterdir():
        (made / "talkative" / file.name).symlink_to(file)
    (made / "talkative" / "chat_template.jinja").write_text("{{ messages[-1].content }}", encoding="utf-8")
    return made


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "COLUMNS": "160"}


def test_a_wheel_has_every_tracked_file_of_the_packages_but_their_readmes(wheel: Path) -> None:
    expected = set()
    for name in tracked():
        room, _, rest = name.partition("/")
        if room in PACKAGES and not name.endswith(".md"):
            expected.add(name if room == "slotwise" else f"slotwise/{room}/{rest}")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_every_command_has_a_line_here() -> None:
    (commands,) = build_parser()._subparsers._group_actions  # type: ignore[union-attr]
    assert set(COMMANDS) == set(commands.choices)  # type: ignore[arg-type]


def test_the_installed_script_runs_outside_the_checkout(installed: Path, folder: Path) -> None:
    words = [installed / "slotwise", "generate", *PAIR, *SHORT, "--temperature", "0"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")


def test_every_command_runs_from_a_wheel(installed: Path, folder: Path) -> None:
    lines = [[name, "--help"] for name in COMMANDS]
    lines += [[name, *words] for name in ("generate", *COMMANDS) for words in COMMANDS[name]]
    done = subprocess.run(
        [installed / "python", "-c", DRIVER, str(REPOSITORY)],
        input=json.dumps(lines),
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words, (code, printed) in zip(lines, json.loads(done.stdout), strict=True):
        command = f"slotwise {' '.join(words)}\n{printed}"
        if words[0] in REFUSED and "--help" not in words:
            assert code, command
            assert re.search(REFUSED[words[0]], printed), command
        elif words[:2] == ["plan", "diff"]:  # as diff does, it ends with 1 where there is a difference
            assert code == 1, command
            assert "page_size" in printed, command
        else:
            assert code == 0, command
    for made in ("run.html", "plan.perfetto.json", "report.html"):
        assert (folder / made).is_file(), sorted(path.name for path in folder.iterdir())
