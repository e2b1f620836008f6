"""Leases: the identity of a process, its heartbeat, and what others conclude from them."""

import dataclasses
import subprocess
import sys
import threading
import time

import pytest

from megatron_ft.files import lease
from megatron_ft.files.lease import Heartbeat, HeartbeatWatch, Liveness, ProcessIdentity


@pytest.fixture
def ours() -> ProcessIdentity:
    return ProcessIdentity.of_this_process()


def test_a_running_process_is_alive(ours):
    assert ours.liveness() is Liveness.ALIVE


@pytest.mark.parametrize("elsewhere", [{"host": "another-node"}, {"namespace": "pid:[1]"}], ids=str)
def test_liveness_is_unknown_from_another_host_or_container(ours, elsewhere):
    assert dataclasses.replace(ours, **elsewhere).liveness() is Liveness.UNKNOWN


def test_a_reused_pid_is_not_the_process(ours):
    earlier = ours.process_started - 60
    assert dataclasses.replace(ours, process_started=earlier).liveness() is Liveness.DEAD


def test_a_clock_that_is_set_kills_no_process(ours, monkeypatch):
    """Linux knows a start since boot; the time since the epoch moves with the clock."""
    set_back = 3600
    boot, created = lease.psutil.boot_time(), lease.psutil.Process().create_time()
    monkeypatch.setattr(lease.psutil, "boot_time", lambda: boot - set_back)
    monkeypatch.setattr(lease.psutil.Process, "create_time", lambda process: created - set_back)
    assert ours.liveness() is Liveness.ALIVE


def test_hosts_of_one_name_are_told_apart_by_their_kernels(ours, monkeypatch):
    monkeypatch.setattr(lease.Path, "read_text", lambda path, encoding: "another kernel's boot id\n")
    assert ours.liveness() is Liveness.UNKNOWN


def test_an_ended_process_is_dead_even_before_its_parent_reaps_it(ours):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = lease._started(lease.psutil.Process(child.pid))
    identity = dataclasses.replace(ours, pid=child.pid, process_started=started)
    assert identity.liveness() is Liveness.ALIVE
    child.kill()
    deadline = time.monotonic() + 60
    while identity.liveness() is not Liveness.DEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    assert identity.liveness() is Liveness.DEAD  # a zombie
    child.wait()
    assert identity.liveness() is Liveness.DEAD


def test_a_heartbeat_survives_an_os_error_and_ends_when_told():
    beats = []
    enough = threading.Event()

    def beat() -> bool:
        beats.append(len(beats))
        if len(beats) == 1:
            raise OSError
        enough.set()
        return len(beats) < 3

    heartbeat = Heartbeat(beat, 0.01)
    heartbeat.stop()  # not started: nothing to wait for
    with Heartbeat(beat, 0.01):
        assert enough.wait(10)
        time.sleep(0.1)
    assert beats == [0, 1, 2]


def test_a_watch_waits_for_a_stopped_heartbeat_by_its_own_clock(monkeypatch):
    now = 100.0
    monkeypatch.setattr(lease.time, "monotonic", lambda: now)
    watch = HeartbeatWatch(30)
    assert watch.observe(7) is Liveness.UNKNOWN
    now += 29
    assert watch.observe(7) is Liveness.UNKNOWN
    assert watch.observe(8) is Liveness.ALIVE
    now += 29
    assert watch.observe(8) is Liveness.UNKNOWN
    now += 1
    assert watch.observe(8) is Liveness.DEAD
