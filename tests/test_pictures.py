"""The pictures of the documents are what the scripts beside them draw."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
LARGEST_BYTES = 200_000
PICTURES = ("attack_panel", "gain_by_batch", "timeline")


def script(name: str):
    """The script as a module."""
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def drawn(name: str, path: Path) -> None:
    """What the script draws, without training the network whose attack it shows."""
    module = script(name)
    if name == "attack_panel":
        clean = module.photograph().astype(np.float32)
        noise = np.random.default_rng(0).choice([-1.0, 1.0], clean.shape).astype(np.float32)
        module.draw(clean, np.clip(clean + module.EPSILON_PIXELS * noise, 0, 255), [0.79, 0.30], str(path))
    elif name == "gain_by_batch":
        module.draw(module.read_gains(module.GAINS), str(path))
    else:
        module.draw(str(path))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), np.float32)


def test_every_picture_has_its_script():
    for kind in ("png", "py"):
        assert sorted(path.stem for path in FOLDER.glob(f"*.{kind}")) == sorted(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_the_one_that_the_script_draws(name, tmp_path):
    kept = FOLDER / f"{name}.png"
    assert kept.stat().st_size <= LARGEST_BYTES
    drawn(name, tmp_path / "drawn.png")
    ours, theirs = pixels(kept), pixels(tmp_path / "drawn.png")
    assert ours.shape == theirs.shape
    assert ours.std() > 20, "the picture is blank"
    if name == "attack_panel":  # the perturbation differs, the clean photograph does not
        third = ours.shape[1] // 3
        ours, theirs = ours[60:-10, 10 : third - 10], theirs[60:-10, 10 : third - 10]
    # Another matplotlib sets letters a little differently.
    assert np.abs(ours - theirs).mean() < 8
