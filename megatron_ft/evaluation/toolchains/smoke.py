"""A right and a wrong program per language, which use all that HumanEvalPack's programs may use.

Run before any answer: a toolchain that fails the right one, or passes the wrong one, gives no
score.
"""

from megatron_ft.evaluation.languages.cpp import HEADERS
from megatron_ft.evaluation.languages.python import IMPORTS
from megatron_ft.evaluation.programs import Program
from megatron_ft.evaluation.runner import run_programs
from megatron_ft.evaluation.sandbox.sandbox import Sandbox, SandboxError, ToolchainError
from megatron_ft.evaluation.toolchains.toolchain import Toolchain

MD5 = "5d41402abc4b2a76b9719d911017c592"  # of "hello"
CPU_S = 30.0  # of one CPU that may still read its toolchain from a network file system

# {wrong} is a digit that makes an assertion fail.
PROGRAMS = {
    "python": f"""{IMPORTS}
assert hashlib.md5(b"hello").hexdigest() == "{MD5}"
assert np.sum([1, 2]) == 3 + WRONG
""",
    "cpp": f"""{HEADERS}
#undef NDEBUG
#include<assert.h>
#include<openssl/md5.h>
int main(){{
    unsigned char digest[16];
    MD5((const unsigned char*)"hello", 5, digest);
    boost::any one = 1;
    assert(digest[0] == 0x5d && boost::any_cast<int>(one) == 1 + WRONG);
}}
""",
    "js": f"""
const md5 = require('js-md5')
console.assert(md5('hello') === '{MD5}' && 1 === 1 + WRONG)
""",
    "java": f"""
import java.security.*;
import java.util.*;
public class Main {{
    public static void main(String[] arguments) throws Exception {{
        MessageDigest md5 = MessageDigest.getInstance("MD5");
        md5.update("hello".getBytes());
        if (!HexFormat.of().formatHex(md5.digest()).equals("{MD5}") || 1 != 1 + WRONG) throw new AssertionError();
    }}
}}
""",
    "go": f"""package main

import (
    "crypto/md5"
    "fmt"
    "math/rand"
    "regexp"
    "sort"
    "strings"
    "testing"
    "github.com/stretchr/testify/assert"
)

func TestMd5(t *testing.T) {{
    assert := assert.New(t)
    digits := strings.Split(fmt.Sprintf("%x", md5.Sum([]byte("hello"))), "")
    assert.Equal("{MD5}", strings.Join(digits, ""))
    sort.Strings(digits)
    assert.True(regexp.MustCompile("^0").MatchString(digits[0]))
    assert.Equal(0, rand.Intn(1) + WRONG)
}}
""",
    "rust": f"""
fn main(){{}}
use rand::Rng;
use regex::Regex;
#[cfg(test)]
mod tests {{
    use super::*;
    #[test]
    fn test_md5() {{
        assert_eq!(format!("{{:x}}", md5::compute("hello")), "{MD5}");
        assert!(Regex::new("^h").unwrap().is_match("hello"));
        let number: i32 = rand::thread_rng().gen_range(0, 1);
        assert_eq!(number, WRONG);
    }}
}}
""",
}


def check(toolchain: Toolchain, sandbox: Sandbox) -> None:
    """Raise ToolchainError or SandboxError if a toolchain does not work in this sandbox."""
    text = PROGRAMS[toolchain.language]
    right, wrong = (Program(toolchain.language, text.replace("WRONG", digit), None) for digit in "01")
    verdicts = [pair for program in (right, wrong) for pair in run_programs([program], toolchain, sandbox, 1, CPU_S)]
    for program, verdict in verdicts:
        expected = "passed" if program == right else "wrong_answer"
        if verdict.status == "sandbox_error":
            raise SandboxError(f"{sandbox.kind}: {verdict.output}")
        if verdict.status != expected:
            lines = verdict.output.strip().splitlines()
            shown = next((line for line in lines if "rror" in line), lines[-1] if lines else "no output")
            raise ToolchainError(
                f"{toolchain.language} ({toolchain.version}): a {'right' if program == right else 'wrong'} program "
                f"ends as {verdict.status}: {shown.strip()[:200]}"
            )
