"""The split of the library: disjoint, the same under every root, and fixed for good by examples."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from attnopt.corpus import (
    MAX_FILE_BYTES,
    SPLITS,
    bind_line,
    binding,
    library_files,
    library_root,
    library_texts,
    query_line,
    split_of,
)


def test_splits_share_no_bucket_and_leave_none_out() -> None:
    assert sorted(b for buckets in SPLITS.values() for b in buckets) == list(range(20))


def test_every_file_is_in_exactly_one_split() -> None:
    files = {split: set(library_files(split)) for split in SPLITS}
    assert all(files.values())
    assert sum(map(len, files.values())) == len(set.union(*files.values()))
    for held_out in ("verify", "final", "calibrate"):
        assert not files[held_out] & files["train"]
        assert all(split_of(p.relative_to(library_root()).as_posix()) == held_out for p in files[held_out])


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("argparse.py", "train"),
        ("json/decoder.py", "train"),
        ("smtpd.py", "final"),
        ("posixpath.py", "final"),
        ("tkinter/constants.py", "verify"),
        ("zoneinfo/__init__.py", "verify"),
        ("encodings/cp949.py", "calibrate"),
        ("venv/__init__.py", "calibrate"),
    ],
)
def test_the_split_of_a_path_never_changes(path: str, split: str) -> None:
    # The demo model was trained under this split: another hash would put trained text into the held-out ones.
    assert split_of(path) == split


def test_the_split_does_not_depend_on_the_root(tmp_path: Path) -> None:
    wanted = [p.relative_to(library_root()) for split in SPLITS for p in library_files(split)[:4]]
    for relative in wanted:
        (tmp_path / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library_root() / relative, tmp_path / relative)
    for split in SPLITS:
        expected = [p.relative_to(library_root()) for p in library_files(split)[:4]]
        assert [p.relative_to(tmp_path) for p in library_files(split, tmp_path)] == expected


def test_what_is_no_library_code_is_passed_over(tmp_path: Path) -> None:
    text = "x = 1\n" * 60
    kept = ("a.py", "b/c.py")
    passed = ("site-packages/d.py", "dist-packages/e.py", "f/__pycache__/g.py", "h.txt")
    for name in (*kept, *passed):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "small.py").write_text("x\n")
    (tmp_path / "large.py").write_text("x" * (MAX_FILE_BYTES + 1))
    found = {p.relative_to(tmp_path).as_posix() for split in SPLITS for p in library_files(split, tmp_path)}
    assert found == set(kept)


def test_text_that_is_not_utf8_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n" * 60)
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe" * 200)
    assert [t for split in SPLITS for t in library_texts(split, tmp_path)] == ["x = 1\n" * 60]


def test_an_unknown_split_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"nonsense.*verify"):
        library_files("nonsense")


def test_the_recall_lines() -> None:
    name, value = binding(random.Random(0), ["red", "green", "blue", "grey"])
    assert binding(random.Random(0), ["red", "green", "blue", "grey"]) == (name, value)
    assert bind_line(name, value) == f"{name}={value}\n"
    assert "".join(query_line(name, value)) == f"assert {name}=={value}\n"
