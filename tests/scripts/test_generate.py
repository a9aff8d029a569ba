"""generate.py: what goes to stdout and to stderr, in every way of asking."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.scripts.processes import ROOT, assert_one_error, command, environment, run_script

SHORT = ("--max_new_tokens=12",)


def test_without_flags_the_embedded_model_writes_python():
    result = run_script("generate.py")
    assert result.returncode == 0, result.stderr
    text = result.stdout.decode()
    assert re.search(r"^    def \w+\(self", text, re.MULTILINE), text
    stderr = result.stderr.decode().splitlines()
    assert stderr[0].startswith("tiny-mixtral (embedded): mixtral, 16.9 M parameters")
    assert stderr[1].startswith("host kernels: ")
    assert stderr[2] == "prompt: class Reader:"
    assert re.match(r"prefill \d+ tokens in .* tok/s\).*compilation, [\d.]+ s", stderr[4])
    assert len(stderr) == 5


def test_json_is_one_object_with_everything():
    result = run_script("generate.py", "--prompt=import os", "--output=json", *SHORT)
    assert result.stdout.count(b"\n") == 1
    answer = json.loads(result.stdout)
    assert set(answer) == {"results", "stats", "model"}
    (one,) = answer["results"]
    assert set(one) == {"prompt", "prompt_token_ids", "token_ids", "text", "finish_reason"}
    assert one["prompt"] == "import os"
    assert len(one["token_ids"]) == 12
    assert one["finish_reason"] == "length"
    stats = answer["stats"]
    assert stats["prefill_tokens"] == len(one["prompt_token_ids"])
    assert stats["decode_tokens"] == 11
    assert stats["decode_tok_per_s"] == pytest.approx(stats["decode_tokens"] / stats["decode_s"])
    assert stats["compile_s"] > 0 and stats["prefill_s"] > 0
    assert answer["model"]["num_experts"] == 8


def test_text_and_json_say_the_same():
    flags = ("--prompt=class A", "--seed=3", *SHORT)
    text = run_script("generate.py", *flags).stdout.decode()
    answer = json.loads(run_script("generate.py", *flags, "--output=json").stdout)
    assert text == answer["results"][0]["text"] + "\n"


def test_beams_are_printed_best_first_and_all_of_them_in_json():
    flags = ("--prompt=class A", "--prompt=import os", "--num_beams=3", *SHORT)
    answer = json.loads(
        run_script("generate.py", *flags, "--num_return_sequences=2", "--output=json").stdout
    )
    for one in answer["results"]:
        best, second = one["sequences"]
        assert set(best) == {"token_ids", "text", "finish_reason", "score"}
        assert best == {name: one[name] for name in best} and best["score"] > second["score"]
    assert answer["stats"]["num_beams"] == 3
    best = run_script("generate.py", *flags).stdout.decode()
    texts = [one["text"] for one in answer["results"]]
    assert best == f"=== 1/2 ===\n{texts[0]}\n=== 2/2 ===\n{texts[1]}\n"
    both = run_script("generate.py", *flags, "--num_return_sequences=2").stdout.decode()
    expected = ""
    for i, one in enumerate(answer["results"], 1):
        expected += f"=== {i}/2 ===\n"
        for j, sequence in enumerate(one["sequences"], 1):
            expected += f"--- {j}/2, score {sequence['score']:.4f} ---\n{sequence['text']}\n"
    assert both == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num_return_sequences=2",), "num_return_sequences=2, num_beams=1"),
        (("--num_beams=2", "--stop=x"), "stop strings do not go with beams"),
        (("--early_stopping=true",), "early_stopping is for beams"),
        (("--chat", "--num_beams=2", "--num_return_sequences=2"), "from one answer"),
    ],
)
def test_settings_of_beams_that_contradict_each_other_are_one_error(flags, words):
    assert_one_error(run_script("generate.py", *flags), words)


def test_several_prompts_are_answered_in_order(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "import re"}\n[{"role": "user", "content": "class B"}]\n')
    flags = ("--prompt=def f(", "--prompt=-", f"--prompt_file={path}", *SHORT)
    result = run_script("generate.py", *flags, stdin=b"x = ")
    parts = re.split(r"^=== (\d)/4 ===\n", result.stdout.decode(), flags=re.MULTILINE)
    assert parts[1::2] == ["1", "2", "3", "4"]
    answer = json.loads(run_script("generate.py", *flags, "--output=json", stdin=b"x = ").stdout)
    assert [text.removesuffix("\n") for text in parts[2::2]] == [
        result["text"] for result in answer["results"]
    ]
    prompts = [result["prompt"] for result in answer["results"]]
    assert prompts[:3] == ["def f(", "x = ", "import re"]


def test_a_text_file_is_one_prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("import os\nimport")
    flags = (f"--prompt_file={path}", "--output=json", *SHORT)
    answer = json.loads(run_script("generate.py", *flags).stdout)
    assert answer["results"][0]["prompt"] == "import os\nimport"


def test_a_chat_remembers_its_turns():
    lines = b"class A:\n    def f(self):\n/reset\nclass A:\n/exit\nnever read\n"
    result = run_script(
        "generate.py", "--chat", "--temperature=0", "--stop=\n", *SHORT, stdin=lines
    )
    assert result.returncode == 0, result.stderr
    prefilled = re.findall(r"^prefill (\d+) tokens", result.stderr.decode(), re.MULTILINE)
    first, second, third = map(int, prefilled)
    assert second > first == third


def test_a_system_message_and_raw_change_what_the_model_sees(tmp_path):
    def prompt_ids(*flags: str) -> list[int]:
        result = run_script("generate.py", "--prompt=import os", "--output=json", *SHORT, *flags)
        return json.loads(result.stdout)["results"][0]["prompt_token_ids"]

    assert prompt_ids() == prompt_ids("--raw")
    assert len(prompt_ids("--system=Reads files.")) > len(prompt_ids())


def test_verbose_tells_the_options():
    result = run_script("generate.py", "--verbose", "--temperature=0.25", *SHORT)
    assert "temperature=0.25" in result.stderr.decode()


def test_help_explains_itself_and_is_quick_to_come():
    result = run_script("generate.py", "--help")
    assert result.returncode == 0
    assert b"--prompt=" in result.stdout and b"--[no]chat" in result.stdout
    assert b"Examples:" in result.stdout


def test_a_reader_that_leaves_ends_the_script_quietly():
    process = subprocess.Popen(
        command("generate.py", "--max_new_tokens=900"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    stderr = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert "Traceback" not in stderr and "Exception ignored" not in stderr
    assert "error" not in stderr


@pytest.mark.parametrize("phase", ["import", "load", "generate"])
def test_ctrl_c_ends_the_script_with_130(phase, tmp_path):
    process = subprocess.Popen(
        command("generate.py", "--max_new_tokens=900"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=tmp_path,
    )
    assert process.stdout is not None and process.stderr is not None
    stderr = b""
    if phase == "import":
        time.sleep(0.4)
    elif phase == "load":
        stderr += process.stderr.read(5)
    else:
        process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    stderr += rest
    assert process.returncode == 130, stderr.decode()
    assert b"Traceback" not in stderr and b"Exception ignored" not in stderr
    assert not list(Path(tmp_path).iterdir())
