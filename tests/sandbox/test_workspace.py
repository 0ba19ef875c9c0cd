"""What is left when a home is removed: nothing of it, and all that its links point to."""

from __future__ import annotations

import os
import shutil
import stat

import pytest

from supervisor.sandbox import workspace


@pytest.fixture
def home(tmp_path):
    home = tmp_path / "tenants" / "acme"
    workspace.prepare_home(home)
    (home / "lock").touch()
    return home


@pytest.fixture
def modes_bind_root(monkeypatch):
    """As root, modes keep nobody out; whoever opens what he may not read is told so all the same."""
    if os.geteuid() != 0:
        return
    real = os.scandir

    def scandir(directory):
        if not os.fstat(directory).st_mode & stat.S_IRUSR:
            raise PermissionError(13, "Permission denied")
        return real(directory)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_home_is_removed_with_all_that_is_in_it_and_no_link_is_followed(home, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("kept")
    inside = home / "workspace" / "a" / "b"
    inside.mkdir(parents=True)
    os.symlink(kept, inside / "directory")
    os.symlink(kept / "file", inside / "file")
    os.symlink("nowhere", home / "workspace" / "dangling")
    os.link(kept / "file", inside / "hard")
    os.mkfifo(inside / "fifo")
    os.mkdir(os.fsencode(inside) + b"/\xff\n")
    workspace.remove_home(home)
    assert os.listdir(home.parent) == []
    assert (kept / "file").read_text() == "kept"


def test_a_workspace_that_became_a_link_is_removed_as_one(home, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    os.rename(home / "workspace", home / "old")
    os.symlink(kept, home / "workspace")
    workspace.remove_home(home)
    assert not home.exists()
    assert (kept / "file").exists()


def test_a_home_that_is_a_link_is_not_followed(home, tmp_path):
    os.rename(home, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", home)
    with pytest.raises(OSError, match="Not a directory"):
        workspace.remove_home(home)
    assert (tmp_path / "elsewhere" / "workspace").is_dir()


def test_depth_costs_neither_descriptors_nor_stack(home, monkeypatch):
    directory = os.open(home / "workspace", os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=directory)
        below = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    most = 0
    real = os.rename

    def rename(*arguments, **options):
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")))
        real(*arguments, **options)

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "rename", rename)
    workspace.remove_home(home)
    assert not home.exists()
    assert most - before <= 4


@pytest.mark.usefixtures("modes_bind_root")
def test_no_mode_keeps_a_home_from_its_removal(home):
    inside = home / "workspace" / "a" / "b"
    inside.mkdir(parents=True)
    (inside / "file").touch()
    for path in (inside, inside.parent, home / "workspace", home):
        path.chmod(0)
    workspace.remove_home(home)
    assert os.listdir(home.parent) == []


def test_more_names_than_one_look_takes_are_all_removed(home, monkeypatch):
    monkeypatch.setattr(workspace, "_BATCH", 3)
    for number in range(10):
        (home / "workspace" / f"d{number}").mkdir()
        (home / "workspace" / f"d{number}" / "f").touch()
    workspace.remove_home(home)
    assert not home.exists()


def test_a_home_that_is_not_there_is_no_error(home):
    shutil.rmtree(home)
    workspace.remove_home(home)
