"""hardware.py: what it prints of a machine, and what it exits with."""

import json
from pathlib import Path

from jmoe.planning.hardware import HardwareSpec
from jmoe.planning.hardware_files import load_preset
from tests.scripts.processes import assert_one_error, run_script

MIXTRAL = ("--model=mixtral-8x7b", "--quant=bf16", "--dtype=bfloat16")


def test_a_preset_is_shown_with_the_number_of_tokens_that_decides():
    result = run_script("hardware.py", *MIXTRAL, "--hardware=rtx6000-xeon6126")
    assert result.returncode == 0, result.stderr.decode()
    text = result.stdout.decode()
    for words in (
        "Quadro RTX 6000",
        "arXiv 2402.07033",
        "an expert of 4096 x 14336 in bf16, 336.00 MiB, bfloat16\n",
        "a copy takes 50 ms: computing on the host is sooner below 10 tokens",
    ):
        assert words in text


def test_json_is_a_hardware_file(tmp_path: Path):
    result = run_script("hardware.py", "--hardware=t4-colab", "--output=json")
    assert result.returncode == 0, result.stderr.decode()
    assert HardwareSpec.from_json(json.loads(result.stdout)) == load_preset("t4-colab")
    path = tmp_path / "machine.json"
    path.write_bytes(result.stdout)
    again = run_script("hardware.py", f"--hardware={path}")
    assert again.returncode == 0, again.stderr.decode()
    assert "estimated from others" in again.stdout.decode()  # of the embedded model's experts


def test_what_is_not_there_or_contradicts_is_one_error():
    assert_one_error(run_script("hardware.py", "--hardware=h200"), "h100-sxm", "h200")
    assert_one_error(run_script("hardware.py", "--hardware=h100-sxm", "--recalibrate"), "leave one")
