"""The front door: what is imported when, what the package shows of itself, how wrong use and closed streams end."""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import slotwise
from slotwise.cli import build_parser
from slotwise.plans.options import ACCEPTANCE_RULES, WEIGHTS
from slotwise.plans.presets import preset_names

from .commands import Run, pipe, start

# What takes longer to import than a person waits for a line of help.
SLOW = {"torch", "numba", "numpy", "transformers", "huggingface_hub", "tokenizers", "safetensors", "jinja2", "rich"}

QUICK = [
    ("slotwise --help", 0),
    ("slotwise --version", 0),
    ("slotwise", 2),
    ("slotwise genrate", 2),
    ("slotwise generate --capcity 4 model", 2),
    ("slotwise generate model --prompt x --capacity many", 2),
    ("slotwise plan diff --help", 0),
]

ASK = """
import sys
sys.argv = {words!r}
from slotwise.cli import main
try:
    code = main()
except SystemExit as error:
    code = error.code
loaded = {{name.partition(".")[0] for name in sys.modules}}
print("\\nloaded", *sorted(loaded & {slow!r}))
sys.exit(code)
"""


def commands() -> list[str]:
    (found,) = build_parser()._subparsers._group_actions  # type: ignore[union-attr]
    return sorted(found.choices)  # type: ignore[arg-type]


@pytest.mark.parametrize(("line", "code"), [*QUICK, *((f"slotwise {name} --help", 0) for name in commands())])
def test_help_and_wrong_use_wait_for_no_library(line: str, code: int) -> None:
    script = ASK.format(words=line.split(" "), slow=SLOW)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1].split() == ["loaded"]
    assert done.returncode == code
    if code == 2:
        assert done.stderr.count("\n") == 1


def test_importing_the_package_loads_none_of_its_parts() -> None:
    script = f"import slotwise, sys; dir(slotwise); print(sorted(set(sys.modules) & {SLOW!r}), slotwise.__version__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"[] {slotwise.__version__}\n"


def test_the_package_shows_its_api_alone() -> None:
    assert dir(slotwise) == sorted(slotwise.__all__)
    for name in slotwise.__all__:
        assert getattr(slotwise, name) is getattr(slotwise, name)
    every: dict[str, object] = {}
    exec("from slotwise import *", every)
    assert set(slotwise.__all__) <= set(every)


def test_types_are_told_of_the_names_that_are_there() -> None:
    tree = ast.parse(Path(slotwise.__file__).read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        alias.asname: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert told == slotwise._HOMES


def test_every_error_of_the_api_is_a_slotwise_error() -> None:
    errors = [name for name in slotwise.__all__ if name.endswith("Error") or name == "SequenceFault"]
    assert {"BackendError", "CheckpointError", "OptionError", "PlanError", "RequestError"} < set(errors)
    for name in errors:
        assert issubclass(getattr(slotwise, name), slotwise.SlotwiseError)


def test_a_mistyped_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Samplng' \(did you mean 'Sampling'\?\)"):
        _ = slotwise.Samplng


def test_records_of_the_api_can_be_pickled() -> None:
    sampling = slotwise.Sampling(temperature=0.5, stop="end", logit_bias={3: 1.0})
    assert pickle.loads(pickle.dumps(sampling)) == sampling


WRONG = [
    ("--verson", "slotwise: error: there is no option --verson (did you mean '--version'?)"),
    ("--jsn generate m", "slotwise: error: there is no option --jsn"),
    ("genrate", "slotwise: error: argument COMMAND: 'genrate' is not known (did you mean 'generate'?)"),
    ("plan shwo x", "slotwise plan: error: argument PART: 'shwo' is not known (did you mean 'show'?)"),
    ("generate m --capcity 4", "slotwise generate: error: there is no option --capcity (did you mean '--capacity'?)"),
    ("generate --capcity", "slotwise generate: error: there is no option --capcity (did you mean '--capacity'?)"),
    ("generate m --max-tokens=4", "slotwise generate: error: there is no option --max-tokens (did you mean"),
    ("chat m --sed 3", "slotwise chat: error: there is no option --sed (did you mean '--seed'?)"),
    ("doctor --jsn", "slotwise doctor: error: "),
    ("generate m n --prompt x", "slotwise generate: error: 'n' is one argument too many"),
    ("plan diff m --against --spculate 0", "slotwise plan diff PLAN --against: error: there is no option --spculate"),
    ("generate", "slotwise generate: error: the following arguments are required: MODEL"),
    ("generate m --capacity many", "slotwise generate: error: argument --capacity: invalid int value: 'many'"),
    (
        "plan view m --format htm",
        "slotwise plan view: error: argument --format: 'htm' is not known (did you mean 'html'?)",
    ),
]


@pytest.mark.parametrize(("line", "begins"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_use_is_one_line_with_the_nearest_name(run: Run, line: str, begins: str) -> None:
    done = run(*line.split(" "))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(begins)
    assert done.err.count("\n") == 1
    assert "--help` says more" in done.err


def test_help_names_every_choice_there_is(run: Run) -> None:
    shown = run("generate", "--help").out
    for name in (*ACCEPTANCE_RULES, *WEIGHTS, *preset_names()):
        assert name in shown


TELL = ("--max-new-tokens", 4, "--capacity", 32, "--max-sequences", 1, "--prefill-chunk", 16, "--threads", 1)


def in_shell(line: str, stories: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    words = " ".join(map(str, TELL))
    shell = f'"{sys.executable}" -m slotwise generate "{stories}" {words} {line}'
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", "-c", shell], capture_output=True, check=False, env=variables)


def test_a_closed_input_is_named(stories: Path) -> None:
    done = in_shell("--prompt-file - <&-", stories)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("slotwise generate: error: prompt file - cannot be read: standard input is")
    assert done.stderr.count(b"\n") == 1


def test_closed_outputs_are_no_failure(stories: Path) -> None:
    done = in_shell("--prompt Once >&- 2>&-", stories)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_terminal_that_lacks_a_character_gets_a_question_mark(stories: Path) -> None:
    done = in_shell("--prompt 'Caf\u00e9'", stories, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.startswith(b"Caf?")


def test_a_full_disk_is_said_in_one_line(stories: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    done = in_shell("--prompt Once --json >/dev/full", stories)
    assert done.returncode == 1
    assert b"the output cannot be written" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_reader_of_help_that_leaves_hears_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "slotwise", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    pipe(process.stdout).close()
    assert pipe(process.stderr).read() == ""
    assert process.wait(60) == 141


def test_a_reader_that_leaves_is_no_error(stories: Path) -> None:
    process = start("generate", stories, "--prompt", "Once", *TELL)
    pipe(process.stdout).close()
    assert pipe(process.stderr).read() == ""
    assert process.wait(60) == 141


def test_a_conversation_without_input_ends(run: Run, talkative: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    done = run("chat", talkative, *TELL)
    assert (done.code, done.out, done.err) == (0, "", "")


# Prompt files


def test_a_byte_order_mark_is_no_part_of_a_prompt(run: Run, stories: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    outs = []
    for raw in (b"Once upon\na time\n", b"\xef\xbb\xbfOnce upon\r\na time\r\n"):
        path.write_bytes(raw)
        done = run("generate", stories, "--prompt-file", path, *TELL)
        assert done.code == 0
        outs.append(done.out)
    assert outs[0].startswith("Once upon\na time")
    assert outs[0] == outs[1]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"caf\xe9", "not UTF-8 text: unexpected end of data 0xe9 at byte 3"),
        ("Once".encode("utf-16"), "not UTF-8 text (it begins as UTF-16 does): invalid start byte 0xff at byte 0"),
    ],
)
def test_a_prompt_that_is_not_utf_8_is_refused(run: Run, stories: Path, tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(raw)
    done = run("generate", stories, "--prompt-file", path, *TELL)
    assert (done.code, done.out) == (1, "")
    assert f"prompt file {path} is {said}; give a file of UTF-8 text" in done.err
