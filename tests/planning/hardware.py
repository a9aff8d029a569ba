"""A machine for tests, with round numbers."""

from typing import Any

from jmoe.planning.hardware import Curve, ExpertTimes, HardwareSpec


def small_experts(**changes: Any) -> ExpertTimes:
    """1 ms for a token on the host and 0.5 for each further one; 0.1 ms on the device."""
    fields: dict[str, Any] = {
        "formats": "4g64",
        "hidden_size": 64,
        "intermediate_size": 128,
        "activation_bits": 8,
        "dtype": "float32",
        "host": Curve(points=((1, 1e-3), (9, 5e-3))),
        "device": Curve(points=((1, 1e-4),)),
    }
    return ExpertTimes(**fields | changes)


def small_spec(**changes: Any) -> HardwareSpec:
    fields: dict[str, Any] = {
        "name": "a machine",
        "platform": "gpu",
        "device_kind": "a device",
        "num_cores": 2,
        "host_bytes_per_s": 2.5e10,
        "device_bytes_per_s": 1e12,
        "device_memory_bytes": 1 << 34,
        "host_memory_bytes": 1 << 35,
        "to_device": Curve(points=((1 << 16, 2e-5), (1 << 26, 4e-3))),
        "to_host": Curve(points=((1 << 16, 2e-5),)),
        "round_trip_s": 3e-5,
        "dispatch_s": 1e-5,
        "hand_over_s": 1e-4,
        "fetch_s": 5e-5,
        "experts": (small_experts(),),
        "spread": 0.05,
        "source": "measured by hand",
        "fingerprint": "a processor; a device",
    }
    return HardwareSpec(**fields | changes)
