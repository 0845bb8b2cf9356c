"""The C++ example, built against the headers of OpenVINO's Python package."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from conftest import textured, write_good
from fettle.detector import Detector
from fettle.export.run import export_model
from fettle.inspection import Inspection

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

SOURCE = Path(__file__).parents[2] / "examples" / "openvino.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as docs/export.md says."""
    package = Path(openvino.__file__).parent
    libraries = sorted((package / "libs").glob("libopenvino.so*"))
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    if not (package / "include" / "openvino" / "openvino.hpp").exists() or not libraries:
        pytest.skip("OpenVINO's headers or its library were not found in its Python package")
    out = tmp_path_factory.mktemp("program") / "openvino"
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", str(SOURCE), "-o", str(out)]
    command += ["-isystem", str(package / "include"), str(libraries[0]), f"-Wl,-rpath,{package / 'libs'}"]
    subprocess.run(command, check=True)
    return out


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    good = write_good(tmp_path_factory.mktemp("good"), 24)
    return Detector.fit(
        good,
        backbone="tiny",
        weights="random",
        size=64,
        target_frr=0.05,
        settings={"bank_rows": 200},
    )


@pytest.fixture(scope="module")
def files(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Graph and weights of an export."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model(detector, folder, "openvino")
    return [str(next(folder.glob(pattern))) for pattern in ("graph-*.xml", "weights-*.bin")]


def write_ppm(path: Path, *, defect: bool, size: int = 64) -> Path:
    pixels = textured(900)
    if defect:
        pixels[20:32, 12:50] = 255 - pixels[20:32, 12:50]
    Image.fromarray(pixels).crop((0, 0, size, size)).save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("defect", [False, True])
def test_program_gives_the_score_and_verdict_of_inspect(
    program: Path, detector: Detector, files: list[str], tmp_path: Path, defect: bool
) -> None:
    path = write_ppm(tmp_path / "part.ppm", defect=defect)
    with_comment = path.read_bytes().replace(b"P6\n", b"P6\n# a remark\n", 1)
    remarked = tmp_path / "remarked.ppm"
    remarked.write_bytes(with_comment)
    Image.open(path).save(tmp_path / "part.png")
    (answer,) = detector.inspect([tmp_path / "part.png"])
    assert isinstance(answer, Inspection)
    assert (answer.verdict.value == "reject") == defect
    for one in (path, remarked):
        done = subprocess.run([program, *files, str(one)], capture_output=True, text=True, check=True)
        score, verdict = done.stdout.split()
        assert float(score) == pytest.approx(answer.score, rel=1e-4)
        assert verdict == answer.verdict.value


@pytest.mark.slow
def test_program_refuses_a_picture_that_it_cannot_take(
    program: Path, files: list[str], tmp_path: Path
) -> None:
    small = write_ppm(tmp_path / "small.ppm", defect=False, size=32)
    cut = tmp_path / "cut.ppm"
    cut.write_bytes(small.read_bytes()[:-1])
    png = tmp_path / "part.png"
    Image.open(small).save(png)
    for path, words in ((small, "frame's size"), (cut, "ends too early"), (png, "no binary PPM")):
        done = subprocess.run([program, *files, str(path)], capture_output=True, text=True)
        assert done.returncode == 1 and words in done.stderr and not done.stdout
