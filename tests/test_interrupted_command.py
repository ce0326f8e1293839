"""Signals and closed pipes: what is kept is kept, what ends ends at once, and nothing ends in a traceback."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest

from attnopt.cli import main

WAITING = """
import time
from attnopt.cli import interruptible
with interruptible():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("stopped", flush=True)
        time.sleep(60)
"""


def started(*before: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([*before, sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_interrupts_and_the_second_ends_at_once(first: signal.Signals) -> None:
    # A shell runs its background jobs with SIGINT ignored, and children inherit that; a handler they do not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = started()
    signal.signal(signal.SIGINT, before)
    process.send_signal(first)
    assert process.stdout is not None and process.stdout.readline() == "stopped\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT


def test_a_signal_that_was_switched_off_stays_off() -> None:
    process = started("sh", "-c", 'trap "" INT; exec "$@"', "sh")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "stopped\n"
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_calls_main_keeps_what_handles_its_signals(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnopt import commands

    def signalled(args: argparse.Namespace) -> None:
        signal.raise_signal(number)

    def own(number: int, frame: FrameType | None) -> None:
        pass

    monkeypatch.setitem(commands.COMMANDS, "show", signalled)
    before = signal.signal(number, own)
    try:
        assert main(["show", "x"]) == 1 and signal.getsignal(number) is own
    finally:
        signal.signal(number, before)
    assert "Interrupted." in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--help"], ["completion", "bash"], ["show", "--help"]], ids=str)
def test_a_reader_that_has_gone_is_no_mistake(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(words) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([]) == 1
    assert capsys.readouterr().err == "No space left on device.\n  Make room there, or choose another place.\n"
