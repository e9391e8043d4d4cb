"""Maps the top-level folders to one import name, `slotwise`; everything else is in pyproject.toml.

Packages and what they carry beside Python are read off the folders, so that adding a folder (a backend, say) or a file
of a kind that is carried already needs no edit here. This is the one place that says what a wheel holds; the tests
build one and compare it with the files that git tracks.
"""

from setuptools import find_packages, setup

ROOMS = ("core", "slots", "proving", "models", "plans", "backends", "engine")
CARRIED = ("py.typed", "*.toml", "*.html", "*.css", "*.js")

setup(
    packages=[
        "slotwise",
        *(f"slotwise.{name}" for name in find_packages("slotwise")),
        *(f"slotwise.{room}" for room in ROOMS),
        *(f"slotwise.{room}.{name}" for room in ROOMS for name in find_packages(room)),
    ],
    # "" is every package; a folder without Python of its own (plans/presets) belongs to the package around it.
    package_data={"": [*CARRIED, *(f"*/{pattern}" for pattern in CARRIED)]},
)
