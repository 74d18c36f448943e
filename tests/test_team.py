"""Threads that share one sequence (csrc/cpu/team.h), with a thread that has no core of its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Two threads go through the steps; the second is away for a while before each meeting. What a step
# adds up is the whole of it only if each share was taken once, by whoever took it.
PROGRAM = r"""
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "cpu/team.h"

int main(int, char** arguments) {
  const int64_t away = std::atoll(arguments[1]), patience = std::atoll(arguments[2]), steps = 300;
  fastseq::Meeting meeting;
  static int64_t taken[300][2];
  int64_t went[2];
  const auto run = [&](int64_t index) {
    fastseq::Team team{index, index + 1, 2, &meeting, nullptr, patience};
    went[index] = 0;
    if (!team.gather()) return;
    for (int64_t n = 0; n < steps; ++n) {
      for (int64_t i = team.begin(2); i < team.end(2); ++i) ++taken[n][i];
      ++went[index];
      if (index == 1 && away > 0) std::this_thread::sleep_for(std::chrono::microseconds(away));
      if (!team.meet()) return;
    }
  };
  std::thread other(run, 1);
  run(0);
  other.join();
  for (int64_t n = 0; n < steps; ++n)
    if (taken[n][0] != 1 || taken[n][1] != 1) return 1;
  std::printf("%d %d\n", static_cast<int>(went[0]), static_cast<int>(went[1]));
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_a_team_parts_when_a_thread_keeps_it_waiting(tmp_path: Path) -> None:
    source, program = tmp_path / "team.cpp", tmp_path / "team"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)

    def steps(away_us: int, patience_ns: int) -> list[int]:
        ran = subprocess.run(
            [str(program), str(away_us), str(patience_ns)],
            check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return [int(count) for count in ran.stdout.split()]

    first, second = steps(2000, 100_000)
    # At least the meetings that show it; none if the second was not even there in time to begin.
    assert first == 300
    assert second < 20
    first, second = steps(0, 60 * 10**9)
    assert first == 300
    assert second in (0, 300)
