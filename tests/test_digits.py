from __future__ import annotations

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mnv2 import digits


def test_the_digits_are_all_there_and_the_same_each_time(tmp_path, capsys):
    assert digits.main([str(tmp_path / "a")]) == 0
    assert "1437 pictures to train on and 360 to validate, 10 classes" in capsys.readouterr().out
    assert digits.write(str(tmp_path / "b")) == (1437, 360)
    paths = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(paths) == 1797
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in paths)

    source = load_digits()
    for path in paths[::97]:
        number = int(path.stem)
        assert path.parts[0] == ("val" if number % 5 == 0 else "train")
        assert path.parts[1] == str(source.target[number])
        pixels = np.asarray(Image.open(tmp_path / "a" / path))
        assert pixels.shape == (40, 40)
        assert not pixels[:4].any()
        assert np.abs(pixels[4:36:4, 4:36:4] / 255 * 16 - source.images[number]).max() < 0.05


def test_every_class_is_in_both_parts(tmp_path):
    digits.write(str(tmp_path))
    for split in ("train", "val"):
        assert sorted(path.name for path in (tmp_path / split).iterdir()) == list("0123456789")


def test_a_folder_that_cant_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert digits.main([str(tmp_path / "file")]) == 1
    assert "mnv2.digits: [Errno 20] Not a directory" in capsys.readouterr().err
