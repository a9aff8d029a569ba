"""The engine of a model that is on its device as a whole."""

import jmoe
from jmoe.engines.resident import ResidentEngine


def resident_engine(llm: jmoe.LLM) -> ResidentEngine:
    assert isinstance(llm.engine, ResidentEngine)
    return llm.engine
