"""A backend that is not part of Slotwise can be known by name for one process, and takes nobody's place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from slotwise.core.backend import Backend, backend_names, load_backend, register_backend, unregister_backend
from slotwise.core.errors import BackendError


@pytest.fixture
def guest() -> Iterator[Backend]:
    """A registered copy of the reference."""
    backend = replace(load_backend("reference"), name="guest")
    register_backend(backend)
    yield backend
    unregister_backend(backend)


def test_a_registered_backend_is_found_by_name_until_it_is_forgotten(guest: Backend) -> None:
    assert load_backend("guest") is guest
    assert "guest" in backend_names()
    register_backend(guest)
    unregister_backend(guest)
    unregister_backend(guest)
    assert "guest" not in backend_names()
    with pytest.raises(BackendError, match="'guest' is not known"):
        load_backend("guest")


def test_no_backend_takes_the_place_of_another(guest: Backend) -> None:
    for name in ("reference", "guest"):
        with pytest.raises(BackendError, match=f"there is a backend '{name}' already"):
            register_backend(replace(guest, name=name, device="cuda"))
    assert load_backend("guest") is guest
    assert load_backend("reference").device == "cpu"


def test_an_unknown_name_lists_registered_backends_too(guest: Backend) -> None:
    with pytest.raises(
        BackendError, match=r"'gest' is not known \(did you mean 'guest'\?\); there are .*guest.*reference"
    ):
        load_backend("gest")
