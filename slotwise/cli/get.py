"""`slotwise get`: download a checkpoint.

What always holds: what is printed is the folder in the cache, and nothing else, so that scripts can use it; a model
that cannot be run is refused before its weights are fetched; running it again goes on where it stopped.
"""

from __future__ import annotations

import argparse
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
    from slotwise.models.hub import download
    from slotwise.models.load import check_config, load_model

    folder = download(parsed.repository, parsed.revision, check_config)
    load_model(folder)  # headers alone: whatever does not fit is said now, not at first use
    print(folder)
    return 0
