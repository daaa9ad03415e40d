"""requirements.lock, the environment that is tested: what setup.cfg asks for, pinned, hashed, and installed here."""

import configparser
import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def locked() -> dict[str, tuple[Requirement, list[str]]]:
    """(requirement, its hashes) by name."""
    entries = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()
    found = {}
    for entry in entries:
        requirement, *hashes = re.split(r"\s+--hash=", entry.strip())
        pinned = Requirement(requirement)
        found[canonicalize_name(pinned.name)] = (pinned, hashes)
    return found


def test_every_package_has_one_version_and_hashes():
    packages = locked()
    assert len(packages) > 50
    for requirement, hashes in packages.values():
        (pin,) = requirement.specifier
        assert pin.operator == "==", requirement
        assert hashes, requirement
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), requirement


def test_it_is_what_setup_cfg_asks_for():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["dev"]
    packages = locked()
    for line in filter(None, wanted.splitlines()):
        if not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = packages[canonicalize_name(requirement.name)][0].specifier
            assert pin.version in requirement.specifier, requirement


def test_it_is_what_is_installed_here():
    different = {}
    for name, (requirement, _) in locked().items():
        if requirement.marker is None or requirement.marker.evaluate():
            (pin,) = requirement.specifier
            if (here := importlib.metadata.version(name)) != pin.version:
                different[name] = here, pin.version
    assert not different, "make test installs requirements.lock; (here, there)"
