"""The lock files: what setup.cfg asks for, pinned, hashed, and installed here. The smaller one suffices to train."""

import configparser
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = "requirements.lock", "requirements-dev.lock"

# Imports all there is of the package and AutoAugment's part of tf-models, where these modules are not to be found.
WITHOUT = """
import importlib, json, pkgutil, sys

left_out = set(json.loads(sys.argv[1]))

class LeftOut:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in left_out:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, LeftOut)
import conadv_tf

for module in pkgutil.walk_packages(conadv_tf.__path__, "conadv_tf."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from conadv_tf.data import autoaugment

assert len(autoaugment.tables("imagenet").operations) > 10
import official.modeling, tensorflow_datasets
"""


def locked(lock: str) -> dict[str, tuple[Requirement, list[str]]]:
    """(requirement, its hashes) by name."""
    entries = (ROOT / lock).read_text().replace("\\\n", " ").splitlines()
    found = {}
    for entry in entries:
        if not entry.startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=", entry.strip())
            pinned = Requirement(requirement)
            found[canonicalize_name(pinned.name)] = (pinned, hashes)
    return found


def excluded() -> set[str]:
    lines = (ROOT / "requirements.excludes").read_text().splitlines()
    return {canonicalize_name(line) for line in lines if line and not line.startswith("#")}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_has_one_version_and_hashes(lock):
    packages = locked(lock)
    assert len(packages) > 50
    for requirement, hashes in packages.values():
        (pin,) = requirement.specifier
        assert pin.operator == "==", requirement
        assert hashes, requirement
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), requirement


@pytest.mark.parametrize("lock", LOCKS)
def test_it_is_what_setup_cfg_asks_for(lock):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"]
    if lock == "requirements-dev.lock":
        wanted += setup["options.extras_require"]["dev"]
    packages = locked(lock)
    for line in filter(None, wanted.splitlines()):
        if not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = packages[canonicalize_name(requirement.name)][0].specifier
            assert pin.version in requirement.specifier, requirement


def test_the_locks_agree_on_versions_and_differ_by_what_is_left_out():
    small, large = (locked(lock) for lock in LOCKS)
    assert all(large[name][0].specifier == small[name][0].specifier for name in small)
    assert excluded() <= large.keys() - small.keys()


@pytest.mark.parametrize("lock", LOCKS)
def test_an_installation_says_how_large_it_is(lock):
    first = (ROOT / lock).read_text().splitlines()[0]
    said = re.fullmatch(r"# (\d+) packages into \.venv, (\d+) MB to download", first)
    assert 0 <= len(locked(lock)) - int(said[1]) < 5  # those of other systems
    assert 500 < int(said[2]) < 2000


def test_the_larger_one_is_what_is_installed_here():
    different = {}
    for name, (requirement, _) in locked("requirements-dev.lock").items():
        if requirement.marker is None or requirement.marker.evaluate():
            (pin,) = requirement.specifier
            if (here := importlib.metadata.version(name)) != pin.version:
                different[name] = here, pin.version
    assert not different, "make test installs requirements-dev.lock; (here, there)"


def test_every_module_can_be_imported_with_the_smaller_one():
    small = locked("requirements.lock").keys()
    allowed = {
        module
        for module, packages in importlib.metadata.packages_distributions().items()
        if any(canonicalize_name(package) in small | {"conadv-tf", "pip"} for package in packages)
    }
    left_out = sorted(importlib.metadata.packages_distributions().keys() - allowed)
    assert {"cv2", "pycocotools", "tensorflow_text", "tensorflow_hub", "kaggle", "pandas", "pyarrow", "jax"} <= set(
        left_out
    )
    outcome = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(left_out)], capture_output=True, text=True, cwd=ROOT
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
