"""Memory that can be used: the machine's, or what a container leaves of it."""

from pathlib import Path

import jax
import psutil
import pytest

from jmoe.planning import memory


def _group(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)


def test_without_limits_the_machine_decides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_cgroup_limits", list)
    assert memory.host_memory_bytes() == psutil.virtual_memory().total
    assert 0 < memory.available_host_bytes() < memory.host_memory_bytes()


def test_the_tightest_limit_decides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_cgroup_limits", lambda: [(5000, 4000), (9000, 8500), (700, 900)])
    assert memory.host_memory_bytes() == 700
    assert memory.available_host_bytes() == 0


def test_version_2_limits_of_this_group_and_of_those_around_it(tmp_path: Path):
    _group(tmp_path / "pod", {"memory.max": "1000\n", "memory.current": "500\n"})
    _group(
        tmp_path / "pod" / "job",
        {
            "memory.max": "900\n",
            "memory.current": "400\n",
            "memory.stat": "anon 300\nactive_file 30\ninactive_file 60\nunevictable 7\n",
        },
    )
    _group(tmp_path / "pod" / "job" / "task", {"memory.max": "max\n", "memory.current": "9\n"})
    proc = tmp_path / "cgroup"
    proc.write_text("0::/pod/job/task\n")
    assert memory._cgroup_limits(tmp_path, proc) == [(900, 310), (1000, 500)]


def test_version_1_limit_inside_a_container(tmp_path: Path):
    _group(
        tmp_path / "memory",
        {
            "memory.limit_in_bytes": "1000\n",
            "memory.usage_in_bytes": "800\n",
            "memory.stat": "inactive_file 1\ntotal_inactive_file 200\ntotal_active_file 100\n",
        },
    )
    proc = tmp_path / "cgroup"
    proc.write_text("5:cpu,cpuacct:/a\n4:memory:/path/of/the/host\n1:name=systemd:/\n")
    assert memory._cgroup_limits(tmp_path, proc) == [(1000, 500)]


def test_no_control_groups(tmp_path: Path):
    assert memory._cgroup_limits(tmp_path, tmp_path / "absent") == []


class _Device:
    def __init__(self, stats: dict[str, int] | None):
        self._stats = stats

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats


def test_device_memory_is_what_the_backend_reports():
    gpu = _Device({"bytes_limit": 100, "bytes_in_use": 7, "num_allocs": 1})
    assert memory.device_memory(gpu) == (100, 7, None)  # pyright: ignore[reportArgumentType]
    assert memory.device_memory(_Device({})) == (None, None, None)  # pyright: ignore[reportArgumentType]
    assert memory.device_memory(jax.devices("cpu")[0]) == (None, None, None)
