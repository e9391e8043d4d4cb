#!/usr/bin/env bash
# Installs the project into .venv and checks it: style, types, import arrows, tests. Stops at the first failure.
# Arguments go to pytest: scripts/test.sh -k ledger --slow
# With --quick first, the tests are those of $quick: the rules of graphs, plans and slots, and one model from end to end.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

quick=(tests/core tests/slots tests/proving tests/plans tests/engine/test_named_cases.py)

if [[ ${1:-} == --quick ]]; then
    shift
    set -- "${quick[@]}" "$@"
    heading "the quick checks: about a minute on two idle cores (all of them: make test)"
else
    heading "all checks: about 15 minutes on two idle cores (the quick ones, about a minute: make quick)"
fi

ensure_environment dev

# mypy and import-linter read a package as one folder, and ours are several, so they get one made of links.
tree=build/tree
rm -rf "$tree"
mkdir -p "$tree/slotwise"
ln -s "$PWD"/slotwise/* "$PWD"/{core,slots,proving,models,plans,backends,engine} "$tree/slotwise/"

heading "ruff check"
.venv/bin/ruff check

heading "ruff format"
.venv/bin/ruff format --check

heading "mypy --strict"
MYPYPATH=$tree .venv/bin/mypy --strict -p slotwise

heading "import arrows"
(cd "$tree" && ../../.venv/bin/lint-imports --no-logo --config ../../pyproject.toml --cache-dir ../../.import_linter_cache)

heading "pytest"
# Two workers: what the smallest machines have; tests keep PyTorch to one thread each.
.venv/bin/python -m pytest -n 2 "$@"
