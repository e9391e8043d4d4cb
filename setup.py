"""Maps the top-level folders to one import name, `slotwise`; everything else is in pyproject.toml.

The list of packages is read off the folders, so that adding a folder (a backend, say) needs no edit here.
"""

from setuptools import find_packages, setup

ROOMS = ("core", "slots", "proving", "models", "plans", "backends", "engine")

setup(
    packages=[
        "slotwise",
        *(f"slotwise.{name}" for name in find_packages("slotwise")),
        *(f"slotwise.{room}" for room in ROOMS),
        *(f"slotwise.{room}.{name}" for room in ROOMS for name in find_packages(room)),
    ],
    package_data={
        "slotwise": ["py.typed"],
        "slotwise.inspect.pages": ["*.html", "*.css", "*.js"],
        "slotwise.backends.cuda_triton": ["*.toml"],
        "slotwise.backends": ["cuda_triton/*.toml"],
        "slotwise.plans.presets": ["*.toml"],
        "slotwise.plans": ["presets/*.toml"],
    },
)
