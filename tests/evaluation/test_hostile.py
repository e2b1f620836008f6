"""Hostile programs: each gets its status, and leaves no process and no file behind."""

import os
import secrets
import socket
import time
from pathlib import Path

import pytest
from made_problems import made_problem
from sandboxes import CPU_S, sandbox_or_skip, verdict_on
from test_evaluation_programs import EXITS

from megatron_ft.evaluation.cutting import cut
from megatron_ft.evaluation.problems import LANGUAGES
from megatron_ft.evaluation.programs import program_of
from megatron_ft.evaluation.sandbox.probes import is_running
from megatron_ft.evaluation.sandbox.sandbox import KINDS

MARKER = "hostile-" + secrets.token_hex(8)
SLEEPER = f"[sys.executable, '-I', '-S', '-c', 'import time; time.sleep(600)', '{MARKER}']"

# Name: (program, statuses that are right). A program that is refused nothing would pass.
PROGRAMS = {
    "network": ("import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)", ["exception"]),
    "network to the outside": ("import socket\nsocket.create_connection(('8.8.8.8', 53), 2)", ["exception"]),
    "write to /usr": ("open('/usr/x', 'w')", ["exception"]),
    "write to /": ("open('/x', 'w')", ["exception"]),
    "write to a result": ("open('RESULT', 'w').write('passed')", ["exception"]),
    "read a result": ("open('RESULT').read()", ["exception"]),
    "read HOME": ("import os\nassert os.listdir(os.path.expanduser('~root')), 'empty'", ["exception", "wrong_answer"]),
    "read the environment": ("import os\nos.environ['HOSTILE_SECRET']", ["exception"]),
    "read the environment of others": (
        "import glob\nfor name in glob.glob('/proc/[0-9]*/environ'):\n    try: text = open(name).read()\n"
        "    except OSError: continue\n    if 'HOSTILE_SECRET' in text: break\nelse: raise KeyError",
        ["exception"],
    ),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", ["timeout", "memory"]),
    "memory": ("x = []\nwhile True: x.append(bytearray(1 << 24))", ["memory"]),
    "memory in many processes": (
        "import os, time\nfor _ in range(8):\n    if not os.fork():\n        x = bytearray(1 << 30)\n"
        "        for i in range(0, 1 << 30, 4096): x[i] = 1\n        time.sleep(600)\ntime.sleep(600)",
        ["memory", "timeout"],
    ),
    "/dev/shm": ("open('/dev/shm/x', 'wb').write(bytes(200 << 20))", ["exception"]),
    "full /tmp": ("while True: open('x', 'ab').write(bytes(1 << 24))", ["exception", "timeout"]),
    "output": ("while True: print('x' * 1000)", ["output_limit"]),
    "output on stderr": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", ["output_limit"]),
    "ignored signals": (
        "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        ["timeout"],
    ),
    "double fork": (
        f"import os, subprocess, sys\nif not os.fork():\n    os.setsid()\n    subprocess.Popen({SLEEPER})\n    os._exit(0)\n"
        "import time; time.sleep(0.3)",
        ["passed"],
    ),
    "background process that holds the output": (f"import subprocess, sys\nsubprocess.Popen({SLEEPER})", ["passed"]),
    "kill the parent": ("import os\nos.kill(os.getppid(), 9)\nwhile True: pass", ["exception", "timeout"]),
    "kill all": ("import os\nos.kill(-1, 9)\nwhile True: pass", ["exception", "timeout"]),
    "trace the parent": ("open('/proc/%d/mem' % __import__('os').getppid(), 'r+b')", ["exception"]),
    "write to the report": (
        "import os\nfor n in os.listdir('/proc/%d/fd' % os.getppid()): open('/proc/%d/fd/%s' % (os.getppid(), n), 'w').write('{}')",
        ["exception"],
    ),
    "exit": ("raise SystemExit(0)", ["exception"]),
    "os._exit": ("import os\nos._exit(0)", ["exception"]),
    "close the output": ("import os\nos.close(1); os.close(2)\nraise KeyError", ["exception"]),
    "stop itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", ["timeout"]),
    "recursion": ("def f(): f()\nf()", ["exception"]),
    "read the standard input": ("input()", ["exception"]),
}


def limit_for(expected: list[str]) -> float:
    """CPU seconds: few where they may run out, else so many that another limit is met before this
    one on any machine. To fill 2 GiB of memory can take 2 seconds."""
    return 2.0 if "timeout" in expected else CPU_S


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program_gets_its_status_and_leaves_nothing(name, tmp_path, monkeypatch):
    program, expected = PROGRAMS[name]
    monkeypatch.setenv("HOSTILE_SECRET", "secret")
    result = tmp_path / "results.jsonl"
    result.write_text("untouched", encoding="utf-8")
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = program.replace("PORT", str(server.getsockname()[1])).replace("RESULT", str(result))
        verdict = verdict_on("python", source, limit_for(expected))
    assert verdict.status in expected, verdict
    assert not is_running(MARKER)
    assert result.read_text(encoding="utf-8") == "untouched"
    assert not Path("/x").exists() and not Path("/usr/x").exists()
    assert verdict.rss < 6 << 30 and verdict.cpu_s < 60 and len(verdict.output) < 6000, verdict
    assert time.monotonic() - start < 120


COMPILER_ATTACKS = {
    "include of a file": ("cpp", '#include "/etc/passwd"\nint main(){}', ["compile_error"]),
    "include of a device": ("cpp", '#include "/dev/zero"\nint main(){}', ["compile_error", "memory", "timeout"]),
    "template bomb": (
        "cpp",
        "template<int N, int M> struct A { static const int v = A<N-1,M>::v + A<N-1,M+1>::v; };\n"
        "template<int M> struct A<0,M> { static const int v = M; };\nint main(){ return A<600,0>::v; }",
        ["compile_error", "memory", "timeout"],
    ),
    "huge array": (
        "cpp",
        "char x[1ull<<40] = {1};\nint main(){}",
        ["compile_error", "memory", "timeout", "output_limit"],
    ),
    "include_str! of a file": (
        "rust",
        f'fn main(){{}}\n#[test]\nfn t(){{ assert!(include_str!("{__file__}").len() > 0); }}',  # exists, outside
        ["compile_error"],
    ),
    "embedded file": (
        "go",
        'package main\nimport _ "embed"\nimport "testing"\n//go:embed /etc/passwd\nvar s string\n'
        'func TestX(t *testing.T) { if s == "" { t.Fatal() } }',
        ["compile_error"],
    ),
    "cgo": (
        "go",
        'package main\n// #include "/etc/passwd"\nimport "C"\nimport "testing"\nfunc TestX(t *testing.T) {}',
        ["compile_error"],
    ),
    "deep nesting": (
        "java",
        "public class Main { public static void main(String[] a) { int x = "
        + "(" * 20000
        + "1"
        + ")" * 20000
        + "; } }",
        ["compile_error", "exception", "memory"],
    ),
}


@pytest.mark.parametrize("name", COMPILER_ATTACKS)
def test_compiler_is_in_the_sandbox_too(name):
    language, source, expected = COMPILER_ATTACKS[name]
    verdict = verdict_on(language, source, limit_for(expected))
    assert verdict.status in expected, verdict
    assert "root:x:0:0:root:/root:/bin/bash" not in verdict.output or sandbox_or_skip().kind == KINDS[2]


@pytest.mark.parametrize("language", LANGUAGES)
def test_exit_before_the_tests_does_not_pass(language, tmp_path):
    problem = made_problem(tmp_path, language)
    solution = EXITS[language].replace("os.Exit", "humanevalOS.Exit" if language == "go" else "os.Exit")
    program = program_of(
        problem, "fixdocs", cut("\n" + solution.strip("\n"), problem, "fixdocs", mode="clean"), "clean"
    )
    verdict = verdict_on(language, program.source, nonce=program.nonce)
    assert verdict.status == "exception", verdict


def test_memory_hogs_of_each_runtime_are_recognized():
    hogs = {
        "cpp": "#include<vector>\nint main(){ std::vector<char*> v; for(;;) v.push_back(new char[1<<26]()); }",
        "js": "const x = []; for (;;) x.push_back(new Array(1e6).fill(1.5))".replace("push_back", "push"),
        "java": "import java.util.*; public class Main { public static void main(String[] a) {"
        " List<byte[]> x = new ArrayList<>(); for (;;) x.add(new byte[1 << 24]); } }",
        "go": 'package main\nimport "testing"\nfunc TestX(t *testing.T) {\n\tx := [][]byte{}\n'
        "\tfor {\n\t\tb := make([]byte, 1<<26)\n\t\tfor i := range b {\n\t\t\tb[i] = 1\n\t\t}\n\t\tx = append(x, b)\n\t}\n}",
        "rust": "fn main(){}\n#[test]\nfn t(){ let mut x = vec![]; loop { x.push(vec![1u8; 1 << 26]); } }",
    }
    statuses = {language: verdict_on(language, source).status for language, source in hogs.items()}
    assert statuses == dict.fromkeys(hogs, "memory")
    assert not any(name.startswith("hs_err") for name in os.listdir("."))
