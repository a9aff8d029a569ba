"""The embedded model as something to calibrate for."""

import functools

import jax

from jmoe.engines.probes import Subject
from jmoe.loading import EMBEDDED_MODEL
from jmoe.native import library
from jmoe.native.choice import HostKernels
from jmoe.planning.model_shape import read_model_shape
from jmoe.quant.spec import parse_spec
from jmoe.residency.link import DeviceLink


@functools.cache
def make_subject(quant: str = "f32", *, kernels: bool = True) -> Subject:
    return Subject(
        device=jax.local_devices(backend="cpu")[0],
        config=read_model_shape(EMBEDDED_MODEL).config,
        dtype="float32",
        quant=parse_spec(quant),
        host=HostKernels() if kernels and library.status().available else None,
    )


def own_link(subject: Subject) -> DeviceLink:
    return DeviceLink(subject.device, subject.layout.dtype)
