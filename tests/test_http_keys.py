"""The file of an HTTP service's keys: several processes that change it, and what it may not hold."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from disagg_ray.cli.command import main
from disagg_ray.errors import ConfigError, InputError, OutputError
from disagg_ray.http import keys
from disagg_ray.http.keys import Key, Keys, add_key, digest_of, read_keys, remove_key
from disagg_ray.media.locks import locked

DIGEST = digest_of("x")
ALICE = {"name": "alice", "sha256": DIGEST}
NUM_PROCESSES, NUM_KEYS = 4, 10
CHANGE = """
import sys
from pathlib import Path
from disagg_ray.http import keys
from disagg_ray.http.keys import Key, add_key, remove_key

keys.WAIT_S = 300.0
file, name = Path(sys.argv[1]), sys.argv[2]
print(flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    add_key(file, Key(f"{name}-{number}"))
    add_key(file, Key(f"{name}-gone"))
    remove_key(file, f"{name}-gone")
"""


def test_processes_that_change_a_file_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys.json"
    command = [sys.executable, "-c", CHANGE, str(file)]
    children = [
        subprocess.Popen([*command, f"p{n}", str(NUM_KEYS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for n in range(NUM_PROCESSES)
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()  # it has imported all
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
    for child in children:
        child.communicate(timeout=300)
    assert [child.returncode for child in children] == [0] * NUM_PROCESSES
    expected = {f"p{n}-{number}" for n in range(NUM_PROCESSES) for number in range(NUM_KEYS)}
    assert {key.name for key in read_keys(file)} == expected


def test_who_waits_too_long_is_told_for_whom_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.json"
    add_key(file, Key("alice"))
    monkeypatch.setattr(keys, "WAIT_S", 0.1)
    with locked(tmp_path / ".keys.json.lock"):
        for change in (lambda: add_key(file, Key("bob")), lambda: remove_key(file, "alice")):
            with pytest.raises(InputError, match=rf"^invalid --file='.*': process {os.getpid()} on .* has been"):
                change()
    assert [key.name for key in read_keys(file)] == ["alice"]


def test_a_process_that_was_killed_leaves_no_lock(tmp_path: Path) -> None:
    script = "import sys, time, pathlib; from disagg_ray.media.locks import locked\n"
    script += "with locked(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", script, str(tmp_path / ".keys.json.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.kill()
    assert add_key(tmp_path / "keys.json", Key("alice"))


def test_only_the_owner_reads_what_is_written_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "keys.json")
    add_key(tmp_path / "link", Key("alice"))
    add_key(tmp_path / "keys.json", Key("bob"))
    assert (tmp_path / "link").is_symlink()
    assert [key.name for key in read_keys(tmp_path / "link")] == ["alice", "bob"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_change_within_one_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    first = add_key(file, Key("alice"))
    os.utime(file, ns=(1, 1))
    found = Keys(str(file), None)
    second = add_key(file, Key("bob"))
    os.utime(file, ns=(1, 1))
    assert [found.find(key) for key in (first, second)] == read_keys(file)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("{}", "it holds no list"),
        ("null", "it holds no list"),
        ("[1]", "1 is no key"),
        (json.dumps([{"name": "alice"}]), "{'name': 'alice'} is no key"),
        (json.dumps([ALICE | {"limit": 1}]), "is no key"),
        (json.dumps([ALICE, ALICE]), "several keys have the name 'alice'"),
        (json.dumps([ALICE | {"name": "local"}]), "name='local': must be"),
        (json.dumps([ALICE | {"name": 5}]), "name=5: must be"),
        (json.dumps([ALICE | {"sha256": "é" * 64}]), "must be a digest"),
        (json.dumps([ALICE | {"max_in_flight": True}]), "max_in_flight=true: must be at least 1"),
        (json.dumps([ALICE | {"max_in_flight": -3}]), "max_in_flight=-3: must be at least 1"),
        (json.dumps([ALICE | {"seconds_a_day": "5"}]), "seconds_a_day='5': must be a positive number"),
        (json.dumps([ALICE | {"images_a_day": 2.5}]), "images_a_day=2.5: must be at least 1"),
        (json.dumps([ALICE | {"priority": 1.5}]), "priority=1.5: must be from -"),
        ("[" * 100_000, "it is nested too deeply"),
        ("[]".encode("utf-16"), "it is not UTF-8"),
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_refused_with_the_reason(
    text: str | bytes, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read_keys(file)
    message = str(caught.value)
    assert message.startswith(f"invalid service.api_keys='{file}': ")
    assert reason in message
    assert message.endswith("; must be a file that `disagg-ray keys add` wrote")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_at_once(make, tmp_path: Path) -> None:
    make(tmp_path / "keys")
    with pytest.raises(ConfigError, match=r"^invalid --file='.*': it is no regular file; must be"):
        add_key(tmp_path / "keys", Key("alice"))


def test_a_folder_that_cannot_be_made_is_named_with_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"^invalid --file='.*/file/keys': it cannot be written: .*; must be in"):
        add_key(tmp_path / "file" / "keys", Key("alice"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "_x"], "invalid NAME='_x': must be 1 to 40 of a-z, 0-9, - and _, the first a letter or digit"),
        (["add", "local"], "invalid NAME='local': must be"),
        (["add", "bob", "--in-flight", "0"], "invalid --in-flight=0: must be at least 1"),
        (["add", "bob", "--seconds-a-day", "nan"], "invalid --seconds-a-day=nan: must be a positive number"),
        (["add", "bob", "--images-a-day", "0"], "invalid --images-a-day=0: must be at least 1"),
        (["add", "bob", "--priority", "1001"], "invalid --priority=1001: must be from -1000 to 1000"),
        (["remove", "bob", "--in-flight", "1"], "--in-flight: it goes with `add`; leave it out"),
        (["remove", "bob"], "invalid NAME='bob': there is no such key; there are: none"),
        (["list", "--priority", "0"], "--priority: it goes with `add`; leave it out"),
    ],
)
def test_arguments_that_cannot_be_are_refused_and_nothing_is_made(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", *arguments, "--file", str(tmp_path / "new" / "keys.json")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_home_in_a_file_s_name_is_the_user_s_and_an_empty_list_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in (["list"], ["add", "alice"], ["remove", "alice"], ["list"]):
        assert main(["keys", *arguments, "--file=~/keys.json"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert (told[0], told[-1]) == (f"{tmp_path}/keys.json is not there", f"{tmp_path}/keys.json has no key")
