"""The suite load: from a new process to the first token, for several forms of a model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from _bench.report import Report
from _bench.settings import Settings
from _bench.statistics import summarize, take_turns
from jmoe.errors import RequestError
from jmoe.store import hub

_SCRIPT = Path(__file__).parents[1] / "generate.py"
_PHASES = ("load_s", "compile_s", "prefill_s")


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Starts generate.py for every model in turn, for one token each."""
    models = settings.models or (settings.model,)
    for model in models:
        if model is not None and not settings.loading["random_weights"]:
            hub.resolve(model)  # which raises
    total = (settings.warmup + settings.repeats) * len(models)
    quiet = not sys.stderr.isatty()
    with tqdm(desc="loading", total=total, leave=False, disable=quiet) as bar:
        results = take_turns(
            {str(model): lambda model=model: _first_token(model, settings) for model in models},
            repeats=settings.repeats,
            warmup=settings.warmup,
            progress=bar.update,
        )
    rows = []
    for model, runs in results.items():
        seconds = {name: [run[name] for run in runs] for name in (*_PHASES, "first_token_s")}
        rows.append({"model": model} | {k: summarize(v).to_json() for k, v in seconds.items()})
        report.table(
            {"model": model}
            | {name.replace("_", " "): f"{summarize(seconds[name]).median:.2f}" for name in seconds}
        )
    return {"rows": rows}


def _first_token(model: str | None, settings: Settings) -> dict[str, Any]:
    given = {name: value for name, value in settings.loading.items() if value is not None}
    if not given.get("threads"):
        given.pop("threads", None)  # 0 is all of them, which is no value of the flag
    flags = [f"--{name}={value}" for name, value in given.items()]
    if model is not None:
        flags.append(f"--model={model}")
    command = [sys.executable, str(_SCRIPT), *flags, "--prompt=Hi", "--raw"]
    result = subprocess.run(
        [*command, "--max_new_tokens=1", "--output=json"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    if result.returncode:
        raise RequestError("a model could not be loaded", where=model, got=result.stderr.strip())
    stats = json.loads(result.stdout)["stats"]
    phases = {name: stats[name] for name in _PHASES}
    return phases | {"first_token_s": sum(phases.values())}
