"""Slow hosts and hosts that are waited for, out of what processes post; the posts are made up here, the threads are real in the last test."""

import json
import time

from jaxvl.report.clock import Activity
from jaxvl.report.peers import LOOKS, Peers, Post, Slow, behind


def post(beat, step, *, data=0.0, compute=1.0, phase="compute", lasted=0.1, host="h"):
    return Post(host, beat, step, phase, lasted, {"data": data, "transfer": 0.0, "other": 0.001 * step}, data + compute)


def looks(slow, times, *, extra, first=1):
    """Lines of `times` looks at three hosts, ten steps of 0.2 s each; host 1 waits `extra` s a step for data."""
    lines = []
    for i in range(first, first + times):
        done = 10 * i
        hosts = {
            p: post(i, done, data=(looks.waited + extra * 10 * (i - first + 1)) if p == 1 else 0.0, compute=0.2 * done, host=f"h{p}")
            for p in range(3)
        }
        lines += slow.look(hosts)
    looks.waited += extra * 10 * times
    return lines


def test_a_slow_host_is_named_once_with_its_lag():
    slow, looks.waited = Slow(), 0.0
    lines = looks(slow, LOOKS + 4, extra=0.15)
    assert lines == [
        "slow host: process 1 on h1 holds every step up by 150 of 200 ms (waiting for data 150 ms, host work 1 ms, host to device 0 ms)"
    ]
    assert looks(slow, 2, extra=0.0, first=LOOKS + 5) == ["process 1 on h1 keeps up again"]
    slow, looks.waited = Slow(), 0.0
    assert looks(slow, 9, extra=0.01) == []  # 10 of 200 ms are no reason for a line


def test_two_hosts_and_hosts_that_stand_still():
    slow = Slow()
    for i in range(1, LOOKS + 2):
        lines = slow.look({0: post(i, i, data=0.5 * i, compute=0.5 * i), 1: post(i, i, compute=i)})
    assert len(lines) == 1 and "process 0" in lines[0]
    assert Slow().look({0: post(1, 5)}) == [] and slow.look({0: post(9, LOOKS + 1), 1: post(9, LOOKS + 1)}) == []


def test_a_host_that_posts_first_and_a_run_that_goes_back():
    for first in ({0: post(1, 1)}, {0: post(1, 500), 1: post(1, 500)}):
        slow = Slow()
        assert slow.look(first) == []
        lines = [
            line
            for i in range(2, LOOKS + 3)
            for line in slow.look({0: post(i, i, compute=i), 1: post(i, i, data=0.5 * i, compute=0.5 * i)})
        ]
        assert len(lines) == 1 and "process 1" in lines[0]


def test_who_is_waited_for():
    fresh = lambda beat: {p: post(beat, 40, host=f"h{p}") for p in range(3)}
    stuck = {**fresh(9), 1: post(9, 39, phase="data", lasted=312, host="h1")}
    assert behind(fresh(7), stuck, 3) == "the others wait for process 1 on h1 (after step 39, in data for 5:12)"
    assert behind(fresh(7), {**fresh(9), 2: post(9, 40, phase="checkpoint", lasted=60, host="h2")}, 3).startswith(
        "the others wait for process 2 on h2 (after step 40, in checkpoint"
    )
    assert (
        behind(fresh(7), {**fresh(9), 1: post(7, 39, host="h1")}, 3)
        == "the others wait for process 1 on h1, which has stopped telling what it does (step 39, compute)"
    )
    assert behind({}, fresh(1), 4) == "the others wait for process 3, which has not begun its loop"
    assert behind(fresh(7), fresh(9), 3) == "all 3 processes are at step 40, in compute"


class Shared:
    def __init__(self, posts):
        self.posts = posts

    def at(self, process):
        board = Shared(self.posts)
        board.process = process
        return board

    def post(self, words):
        self.posts[self.process] = words

    def read(self):
        return dict(self.posts)


def test_processes_post_and_one_that_hangs_is_told(monkeypatch):
    shared, since = Shared({}), time.perf_counter()
    peers = [
        Peers(shared.at(p), p, 2, lambda p=p: Activity(("compute", "data")[p], since, None), lambda p=p: 8 - p, dict, look=0.02)
        for p in range(2)
    ]
    end = time.monotonic() + 5
    while len(shared.posts) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    monkeypatch.setattr(time, "time", lambda: 1e12)  # whatever the clock of a host shows
    assert "process 1 on " in peers[0].missing() and "(after step 7, in data for 0:0" in peers[0].missing()
    peers[1].close()
    assert "has stopped telling what it does" in peers[0].missing()
    peers[0].close()
    assert json.loads(shared.posts[0])[2] == 8
