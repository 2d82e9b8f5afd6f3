import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from lib.staging import locked, staged, staged_file


def test_a_folder_that_fails_half_way_leaves_the_good_one(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with staged(out) as folder:
        (folder / "model").write_text("good")
        assert not out.exists()
    with pytest.raises(KeyboardInterrupt), staged(out) as folder:  # noqa: PT012 (the interruption is half-way)
        (folder / "model").write_text("ba")
        raise KeyboardInterrupt
    assert {file.name: file.read_text() for file in out.iterdir()} == {"model": "good"}
    assert list(out.parent.iterdir()) == [out]


def test_left_overs_of_a_killed_run_do_not_get_in(tmp_path: Path):
    killed = staged(tmp_path / "out")
    (killed.__enter__() / "half").touch()
    with staged(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["whole"]


def test_other_files_of_the_folder_stay(tmp_path: Path):
    (tmp_path / "checkpoint-3").mkdir()
    with staged(tmp_path) as folder:
        (folder / "model").touch()
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint-3", "model"}


def test_a_whole_folder_has_no_other_files(tmp_path: Path):
    (tmp_path / "earlier").touch()
    (tmp_path / "earlier folder/deep").mkdir(parents=True)
    with staged(tmp_path, whole=True) as folder:
        (folder / "model").touch()
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


def test_a_file_that_fails_half_way_leaves_the_good_one(tmp_path: Path):
    out = tmp_path / "new" / "result.json"
    with staged_file(out) as file:
        file.write_text("good")
    with pytest.raises(KeyboardInterrupt), staged_file(out) as file:  # noqa: PT012 (the interruption is half-way)
        file.write_text("ba")
        raise KeyboardInterrupt
    assert out.read_text() == "good"
    assert list(out.parent.iterdir()) == [out]


def test_two_processes_may_write_one_file(tmp_path: Path):
    out = tmp_path / "result.json"
    with staged_file(out) as one, staged_file(out) as other:
        one.write_text("one")
        other.write_text("other")
    assert out.read_text() == "one"  # the last to end
    assert list(tmp_path.iterdir()) == [out]


def test_a_locked_folder_is_refused_until_the_block_ends(tmp_path: Path):
    with locked(tmp_path / "new/out"):
        (tmp_path / "new/out/model").touch()
        with pytest.raises(SystemExit, match=r"another process writes to '.*out'"), locked(tmp_path / "new/out"):
            raise AssertionError("it was let in")
    with locked(tmp_path / "new/out"):
        pass
    assert (tmp_path / "new/out/model").exists()


def test_a_lock_without_a_result_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()


def test_a_killed_process_holds_no_lock(tmp_path: Path):
    code = "import sys, time; sys.path.append(sys.argv[1]); from pathlib import Path; from lib.staging import locked\n"
    code += "with locked(Path(sys.argv[2])): print('locked', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, ROOT / "scripts", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(SystemExit, match="another process"), locked(tmp_path / "out"):
            pass
        process.kill()
    with locked(tmp_path / "out"):
        pass
