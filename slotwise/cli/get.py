"""`slotwise get`: download a checkpoint.

What always holds: what goes to the output stream is the folder in the cache, and nothing else, so that scripts can use
it; bars show the progress on a terminal, one line says what is fetched off it; a model that cannot be run is refused
before its weights are fetched; running it again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "get",
        help="download a checkpoint",
        description="Download what is needed of a model on the Hugging Face Hub (or HF_ENDPOINT) into the cache that "
        "its tools share (HF_HOME), and print the folder. Every MODEL may then be ORG/NAME. HF_TOKEN is for gated and "
        "private models. Run again, it goes on where it stopped.",
    )
    parser.add_argument("repository", metavar="ORG/NAME", help="the model's name on the hub")
    parser.add_argument("--revision", metavar="R", help="a branch, tag or commit (default: main)")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Download and print the folder."""
    from slotwise.core.errors import OptionError
    from slotwise.models.folder import is_repository

    name, _, revision = parsed.repository.partition("@")
    if revision or not is_repository(name):
        hint = f"; say --revision {revision}" if revision and is_repository(name) else ""
        raise OptionError(f"{parsed.repository!r} is no name of a model on a hub, expected ORG/NAME{hint}")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the library reads it when it is imported

    from huggingface_hub import constants

    from slotwise.models.hub import download
    from slotwise.models.load import check_config, load_model

    if not sys.stderr.isatty():
        print(f"getting {parsed.repository} from {constants.ENDPOINT}", file=sys.stderr)
    folder = download(parsed.repository, parsed.revision, check_config)
    load_model(folder)  # headers alone: whatever does not fit is said now, not at first use
    print(folder)
    return 0
