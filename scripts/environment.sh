# Makes .venv and installs the project into it; sourced by demo.sh and test.sh, from any folder.
#
#   ensure_environment [EXTRA]    EXTRA is one of pyproject.toml's optional dependency lists: dev, numba, ...
#
# A stamp in .venv records what was installed from; while nothing of that has changed, the install is skipped.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv_python=.venv/bin/python

heading() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

require_python() {
    local python=$1
    command -v "$python" >/dev/null ||
        fail "no '$python' on the PATH. Install Python 3.10 or newer, or name one: PYTHON=python3.12 $0"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "'$python' is $("$python" --version 2>&1), and Python 3.10 or newer is needed. Name one: PYTHON=python3.12 $0"
}

make_venv() {
    local python=$1
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$python' cannot make virtual environments. Install its venv module (Debian and Ubuntu: apt install python3-venv)."
    # --clear makes an environment of another Python, or a broken one, anew.
    "$python" -m venv --clear .venv
}

# All that an installation follows from. The folder counts: an editable install points into it.
fingerprint() {
    { pwd && "$1" -VV && cat pyproject.toml setup.py constraints.txt; } | cksum
}

ensure_environment() {
    local extra=${1:-} python=${PYTHON:-python3}
    local stamp=.venv/.installed${extra:+-$extra} wanted
    require_python "$python"
    wanted=$(fingerprint "$python")
    if [[ -x $venv_python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    heading "install into .venv (some minutes the first time)"
    if [[ $("$venv_python" -VV 2>/dev/null) != "$("$python" -VV)" ]] || ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        make_venv "$python"
    fi
    "$venv_python" -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
    # An extra comes on top of the project, so this counts as an installation without one too.
    printf '%s\n' "$wanted" | tee .venv/.installed >"$stamp"
}
