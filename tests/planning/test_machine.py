"""Which machine this is: caches, threads, and a fingerprint of what measurements depend on."""

from pathlib import Path

import jax
import pytest

from jmoe.planning import machine


def make_cache(root: Path, core: int, index: int, level: str, size: str, cores: str) -> None:
    directory = root / f"cpu{core}" / "cache" / f"index{index}"
    directory.mkdir(parents=True)
    for name, text in (("level", level), ("size", size), ("shared_cpu_list", cores)):
        (directory / name).write_text(text + "\n")


def test_last_caches_are_added_up_once_for_the_cores_that_share_them(tmp_path: Path):
    for core, cores in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        make_cache(tmp_path, core, 2, "2", "1024K", str(core))
        make_cache(tmp_path, core, 3, "3", "32M", cores)
    assert machine.cache_bytes(tmp_path) == 2 * 32 << 20


def test_caches_that_nobody_tells_of_are_assumed(tmp_path: Path):
    assert machine.cache_bytes(tmp_path) == 32 << 20
    make_cache(tmp_path, 0, 0, "1", "much", "0")
    assert machine.cache_bytes(tmp_path) == 32 << 20
    make_cache(tmp_path, 0, 1, "2", "512", "0")
    assert machine.cache_bytes(tmp_path) == 512


@pytest.mark.parametrize("text", ["", "0", "many", "-1"])
def test_threads_are_all_that_there_are_unless_named(text: str, monkeypatch):
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    everything = machine.num_threads()
    assert everything >= 1
    monkeypatch.setenv("PJRT_NPROC", text)
    assert machine.num_threads() == everything
    monkeypatch.setenv("PJRT_NPROC", "3")
    assert machine.num_threads() == 3


def test_a_fingerprint_tells_machines_and_versions_apart(monkeypatch):
    device = jax.local_devices(backend="cpu")[0]
    here = machine.fingerprint(device, 2)
    assert here == machine.fingerprint(device, 2)
    assert jax.__version__ in here and machine.processor_name() in here
    assert machine.fingerprint(device, 1) != here
    monkeypatch.setattr(machine.library, "library", lambda: None)
    assert "no host kernels" in machine.fingerprint(device, 2)
