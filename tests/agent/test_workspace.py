"""No path leaves the workspace, and what files are asked to do is done whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import threading

import pytest

import agent.workspace
from agent import files, rpc
from agent.content import decode
from agent.files import Files, List, Read, Remove, Stat, Write
from agent.workspace import Workspace


@pytest.fixture
def home(tmp_path):
    """The workspace; a secret and its directory lie beside it."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("secret")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def workspace(home):
    before = set(os.listdir("/proc/self/fd"))
    workspace = Workspace(str(home))
    yield workspace
    workspace.close()
    assert set(os.listdir("/proc/self/fd")) == before, "a descriptor is left open"


@pytest.fixture
def box(workspace):
    return Files(workspace)


def failure(call, params):
    with pytest.raises(rpc.RpcError) as caught:
        call(params)
    return caught.value.code or caught.value.number


WAYS_OUT = [
    "../secret",
    "..",
    "a/../../secret",
    "/",
    "/etc/passwd",
    "up/secret",
    "up",
    "absolute",
    "absolute_directory/file",
    "chain",
    "sub/back/secret",
    "//etc//passwd",
]


@pytest.fixture
def ways_out(home):
    (home / "a").mkdir()
    (home / "sub").mkdir()
    (home / "up").symlink_to("..")
    (home / "sub" / "back").symlink_to("../..")
    (home / "absolute").symlink_to(home.parent / "secret")
    (home / "absolute_directory").symlink_to(home.parent / "outside")
    (home / "chain").symlink_to("sub/link")
    (home / "sub" / "link").symlink_to("../../secret")


@pytest.mark.parametrize("path", WAYS_OUT)
def test_no_path_and_no_link_leads_out(box, home, ways_out, path):
    outside = {"outside_workspace"}
    assert failure(box.read, Read(path)) in outside
    assert failure(box.write, Write(path, "changed")) in outside
    assert failure(box.list, List(path)) in outside
    if path not in ("up", "absolute", "chain"):  # A link itself lies inside.
        assert failure(box.stat, Stat(path)) in outside
        assert failure(box.remove, Remove(path, recursive=True)) in outside
    assert (home.parent / "secret").read_text() == "secret"
    assert (home.parent / "outside" / "file").read_text() == "secret"


@pytest.mark.parametrize(
    "path", ["in/file", "./in//file", "in/../in/file", "near/file", "far/file", "sub/../in/file", "sub/far/file"]
)
def test_what_stays_inside_is_reached_by_any_way(box, home, path):
    (home / "in").mkdir()
    (home / "in" / "file").write_text("here")
    (home / "near").symlink_to("in")
    (home / "far").symlink_to(home / "in")
    (home / "sub").mkdir()
    (home / "sub" / "far").symlink_to(home / "in")
    assert box.read(Read(path))["data"] == "here"
    assert box.read(Read(str(home / "in" / "file")))["data"] == "here"


def test_a_ring_of_links_is_an_error(box, home):
    (home / "a").symlink_to("b")
    (home / "b").symlink_to("a")
    assert failure(box.read, Read("a")) == "changed"
    assert failure(box.read, Read("a/b/c")) == "changed"


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_path_that_is_none_is_refused(box, path):
    assert failure(box.read, Read(path)) == rpc.INVALID_PARAMS


def test_a_directory_that_turns_into_a_link_meanwhile_leads_nowhere(box, home):
    """The race that a check of the path's text loses: the name is swapped while it is walked."""
    (home / "real").mkdir()
    (home / "real" / "file").write_text("here")
    (home / "way").symlink_to("real")
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            for target in (home.parent / "outside", "real"):
                os.symlink(target, home / "new")
                os.rename(home / "new", home / "way")
            os.unlink(home / "way")
            os.rename(home / "real", home / "way")
            os.rename(home / "way", home / "real")
            os.symlink("real", home / "way")

    thread = threading.Thread(target=swap)
    thread.start()
    read = set()
    try:
        for _ in range(1500):
            try:
                read.add(box.read(Read("way/file"))["data"])
            except rpc.RpcError as error:
                read.add(error.code)
    finally:
        stop.set()
        thread.join()
    assert "secret" not in read
    assert "here" in read
    assert read <= {"here", "not_found", "outside_workspace", "not_a_directory", "changed"}


@pytest.mark.parametrize("path", ["way/file", "file"])
def test_a_name_that_turns_into_a_link_between_look_and_open_is_not_followed(box, home, monkeypatch, path):
    (home / "way").mkdir()
    (home / "way" / "file").write_text("here")
    (home / "file").write_text("here")
    look = agent.workspace._link_target

    def look_then_swap(directory, name):
        target = look(directory, name)
        if name == path.partition("/")[0] and target is None:
            os.rename(home / name, home / "old")
            os.symlink(home.parent / ("outside" if name == "way" else "secret"), home / name)
        return target

    monkeypatch.setattr(agent.workspace, "_link_target", look_then_swap)
    assert failure(box.read, Read(path)) in ("changed", "not_a_directory")


def test_the_workspace_stays_the_same_when_it_is_renamed(box, home):
    box.write(Write("file", "here"))
    home.rename(home.parent / "moved")
    home.mkdir()
    (home / "file").write_text("another")
    assert box.read(Read("file"))["data"] == "here"


def test_a_write_is_seen_whole_by_every_reader(box, home):
    texts = {"a" * 100_000, "b" * 100_000}
    box.write(Write("file", "a" * 100_000))
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for text in texts:
                box.write(Write("file", text))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(100):
            assert (home / "file").read_text() in texts
    finally:
        stop.set()
        thread.join()
    assert os.listdir(home) == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(box, home, monkeypatch):
    box.write(Write("file", "old"))

    def full(fd):
        raise OSError(28, "disk full")

    monkeypatch.setattr(os, "fsync", full)
    assert failure(box.write, Write("file", "new")) == "no_space"
    assert (home / "file").read_text() == "old"
    assert os.listdir(home) == ["file"]


def test_a_write_keeps_the_mode_of_the_file_and_the_link_to_it(box, home):
    (home / "real").write_text("old")
    (home / "real").chmod(0o751)
    (home / "link").symlink_to("real")
    box.write(Write("link", "new"))
    assert (home / "link").is_symlink()
    assert (home / "real").read_text() == "new"
    assert stat.S_IMODE((home / "real").stat().st_mode) == 0o751
    box.write(Write("real", "new", mode=0o600))
    assert stat.S_IMODE((home / "real").stat().st_mode) == 0o600


def test_a_write_makes_directories_only_when_asked(box, home):
    assert failure(box.write, Write("x/y/file", "a")) == "not_found"
    assert not (home / "x").exists()
    assert box.write(Write("x/y/file", "/w==", encoding="base64", parents=True)) == {"size": 1}
    assert (home / "x/y/file").read_bytes() == b"\xff"


def test_a_link_to_nothing_is_written_through_and_stays_inside(box, home):
    (home / "link").symlink_to("target")
    (home / "out").symlink_to("../target")
    box.write(Write("link", "a"))
    assert (home / "target").read_text() == "a"
    assert failure(box.write, Write("out", "a")) == "outside_workspace"
    assert not (home.parent / "target").exists()


def test_a_file_is_read_in_parts_to_its_end(box, home):
    data = os.urandom(files.MAX_READ_BYTES + 10)
    (home / "file").write_bytes(data)
    first = box.read(Read("file", encoding="base64"))
    rest = box.read(Read("file", offset=files.MAX_READ_BYTES, encoding="base64"))
    assert (first["eof"], rest["eof"], first["size"]) == (False, True, len(data))
    assert decode(first["data"], "base64") + decode(rest["data"], "base64") == data
    assert box.read(Read("file", offset=10**12, length=1)) == {
        "data": "",
        "encoding": "utf-8",
        "size": len(data),
        "eof": True,
    }


def test_what_is_no_regular_file_is_refused_at_once(box, home):
    """A FIFO would block the thread for ever."""
    os.mkfifo(home / "fifo")
    (home / "directory").mkdir()
    assert failure(box.read, Read("fifo")) == "not_a_file"
    assert failure(box.write, Write("fifo", "a")) == "not_a_file"
    assert failure(box.read, Read("directory")) == "is_a_directory"
    assert failure(box.write, Write("directory", "a")) == "is_a_directory"
    assert failure(box.write, Write(".", "a")) == "is_a_directory"
    assert failure(box.read, Read("fifo/a")) == "not_a_directory"
    assert failure(box.list, List("fifo")) == "not_a_directory"


def test_a_list_is_sorted_bounded_and_tells_names_that_are_no_text(box, home):
    for name in (b"b", b"a", b"c\xff"):
        with open(os.fsencode(home) + b"/" + name, "wb") as file:
            file.write(b"12")
    (home / "link").symlink_to("nowhere")
    answer = box.list(List())
    assert [(entry["name"], entry["type"]) for entry in answer["entries"]] == [
        ("a", "file"),
        ("b", "file"),
        ("Y/8=", "file"),
        ("link", "symlink"),
    ]
    assert answer["entries"][2]["encoding"] == "base64"
    assert answer["entries"][0]["size"] == 2
    assert not answer["truncated"]
    assert box.list(List(limit=2))["truncated"]


def test_stat_tells_of_the_link_and_not_of_its_target(box, home):
    (home / "link").symlink_to("/etc/passwd")
    told = box.stat(Stat("link"))
    assert (told["type"], told["target"], told["target_encoding"]) == ("symlink", "/etc/passwd", "utf-8")
    assert box.stat(Stat("."))["type"] == "directory"
    assert failure(box.stat, Stat("none")) == "not_found"


def test_remove_takes_the_link_and_never_what_it_points_to(box, home):
    (home / "link").symlink_to(home.parent / "outside")
    (home / "full").mkdir()
    (home / "full" / "link").symlink_to(home.parent / "outside")
    assert failure(box.remove, Remove("full")) == "not_empty"
    box.remove(Remove("full", recursive=True))
    box.remove(Remove("link", recursive=True))
    assert failure(box.remove, Remove("link")) == "not_found"
    assert failure(box.remove, Remove(".", recursive=True)) == rpc.INVALID_PARAMS
    assert failure(box.remove, Remove("a/..", recursive=True)) in ("not_found", rpc.INVALID_PARAMS)
    assert os.listdir(home) == []
    assert (home.parent / "outside" / "file").exists()


def test_a_tree_too_deep_to_remove_is_an_error_and_no_fault_of_ours(box, home, monkeypatch):
    (home / "a").mkdir()

    def rmtree(name, *, dir_fd):
        raise RecursionError

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert failure(box.remove, Remove(path="a", recursive=True)) == "too_deep"
