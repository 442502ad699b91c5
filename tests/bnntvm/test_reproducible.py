"""The same model gives the same bytes on another day, for another user, in another folder, with another umask and order of hash tables."""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

DIGITS = pathlib.Path(__file__).parents[2] / "tutorials/data/digits_bnn.onnx"
#: Every clock of the C library, 400 days later; another user's number.
ANOTHER_DAY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#define LATER (400 * 86400)
int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
  int status = real(clock, now);
  if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += LATER;
  return status;
}
time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
int gettimeofday(struct timeval *restrict out, void *restrict zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  out->tv_sec = now.tv_sec, out->tv_usec = now.tv_nsec / 1000;
  return 0;
}
uid_t getuid(void) { return 65534; }
uid_t geteuid(void) { return 65534; }
"""
MAKE = """
import os, sys, time
from bnntvm.__main__ import main
since, another = int(sys.argv[1]), os.environ["USER"] == "nobody"
assert since <= time.time() <= since + 86400 and (os.getuid() == 65534) == another
main(sys.argv[2:])
"""


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def another_day(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(ANOTHER_DAY)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", str(folder / "clock.c"), "-o", str(folder / "clock.so"), "-ldl"], check=True)
    return folder / "clock.so"


@pytest.mark.parametrize("words", [
    ["build", "digits_bnn.onnx", "-o", "made/digits.bnn"], ["package", "digits_bnn.onnx", "-o", "made", "--target", "armv7"],
    ["export-c", "digits_bnn.onnx", "-o", "made"],
], ids=" ".join)  # fmt: skip
def test_another_day(tmp_path, another_day, words):
    made = []
    for number in (0, 1):
        folder = tmp_path / ("here" if not number else "another place/ü")
        (folder / "home").mkdir(parents=True)
        shutil.copy(DIGITS, folder)
        if words[0] == "build":
            (folder / "made").mkdir()
        home = str(folder / "home")
        environment = os.environ | {"PYTHONHASHSEED": str(number), "HOME": home, "TMPDIR": home, "USER": "root"}
        options = {}
        if number:
            environment |= {"LD_PRELOAD": str(another_day), "TZ": "Asia/Tokyo", "LC_ALL": "C", "USER": "nobody", "LOGNAME": "nobody"}
            options["umask"] = 0o077
        since = int(time.time()) + number * 400 * 86400 - 1
        command = [sys.executable, "-c", MAKE, str(since), *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, **options)
        assert done.returncode == 0, done.stderr
        made.append(contents(folder / "made"))
    assert made[0].keys() == made[1].keys() and made[0]
    assert [name for name in made[0] if made[0][name] != made[1][name]] == []
