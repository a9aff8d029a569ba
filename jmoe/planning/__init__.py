"""HOW to run here: what a machine has, what a model needs of it, and what policies would give."""

from jmoe.planning.plan import Plan, make_plan
from jmoe.planning.policy import Policy
from jmoe.planning.simulate import SimulationResult, simulate
from jmoe.planning.traces import RoutingTrace, TraceRecorder

__all__ = [
    "Plan",
    "Policy",
    "RoutingTrace",
    "SimulationResult",
    "TraceRecorder",
    "make_plan",
    "simulate",
]
