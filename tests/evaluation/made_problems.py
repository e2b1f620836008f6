"""Problems in HumanEvalPack's schema, written for the tests: the largest of a list, six times."""

import json
from pathlib import Path

from megatron_ft.evaluation.problems import ID_PREFIXES, Problem, load_problems

DOCSTRING = "Return the largest number of a list.\n>>> largest([1, 3, 2])\n3"
DECLARATIONS = {
    "python": "def largest(numbers):\n",
    "cpp": "#include<vector>\nusing namespace std;\nint largest(vector<int> numbers){\n",
    "js": "\nconst largest = (numbers) => {\n",
    "java": "import java.util.*;\n\nclass Solution {\n    public int largest(List<Integer> numbers) {\n",
    "go": "\nfunc Largest(numbers []int) int {\n",
    "rust": "\nuse std::cmp::max;\n\nfn largest(numbers:Vec<i32>) -> i32{\n",
}
PROMPTS = {
    "python": 'def largest(numbers):\n    """ Return the largest number of a list.\n    >>> largest([1, 3, 2])\n    3\n    """\n',
    "cpp": "/*\nReturn the largest number of a list.\n*/\n" + DECLARATIONS["cpp"],
    "js": "/* Return the largest number of a list.\n  */\nconst largest = (numbers) => {\n",
    "java": "import java.util.*;\n\nclass Solution {\n    /**\n    Return the largest number of a list.\n     */\n"
    "    public int largest(List<Integer> numbers) {\n",
    "go": 'import (\n    "sort"\n    "strings"\n)\n\n// Return the largest number of a list.\n'
    "func Largest(numbers []int) int {\n",
    "rust": "fn main(){}\n\nuse std::cmp::max;\n\n/*\n Return the largest number of a list.\n*/\n"
    "fn largest(numbers:Vec<i32>) -> i32{\n",
}
SOLUTIONS = {
    "python": "    return max(numbers)\n",
    "cpp": "    int m=numbers[0];\n    for (int n : numbers) m=max(m,n);\n    return m;\n}\n",
    "js": "  return Math.max(...numbers);\n}\n\n",
    "java": "        return Collections.max(numbers);\n    }\n}",
    "go": "    sort.Ints(numbers)\n    return numbers[len(numbers)-1]\n}\n\n",
    "rust": "    let mut m = numbers[0];\n    for n in numbers { m = max(m, n); }\n    return m;\n}\n",
}
BUGS = {
    "python": "    return min(numbers)\n",
    "cpp": "    return numbers[0];\n}\n",
    "js": "  return Math.min(...numbers);\n}\n\n",
    "java": "        return Collections.min(numbers);\n    }\n}",
    "go": "    sort.Ints(numbers)\n    return numbers[0]\n}\n\n",
    "rust": "    return numbers[0];\n}\n",
}
TESTS = {
    "python": "\n\ndef check(largest):\n    assert largest([1, 3, 2]) == 3\n    assert largest([5]) == 5\n\ncheck(largest)",
    "cpp": "#undef NDEBUG\n#include<assert.h>\nint main(){\n    assert (largest({1,3,2}) == 3);\n}\n",
    "js": "const testLargest = () => {\n  console.assert(largest([1, 3, 2]) === 3)\n}\n\ntestLargest()\n",
    "java": "public class Main {\n    public static void main(String[] args) {\n        Solution s = new Solution();\n"
    "        if (s.largest(new ArrayList<>(Arrays.asList(1, 3, 2))) != 3) {\n            throw new AssertionError();\n"
    "        }\n    }\n}",
    "go": "func TestLargest(t *testing.T) {\n    if Largest([]int{1, 3, 2}) != 3 {\n        t.Fatal()\n    }\n}\n",
    "rust": "\n#[cfg(test)]\nmod tests {\n    use super::*;\n\n    #[test]\n    fn test_largest() {\n"
    "        assert_eq!(largest(vec![1, 3, 2]), 3);\n    }\n\n}\n",
}
GO_SETUP = 'package main\n\nimport (\n    "testing"\n)\n'


def row(language: str, number: int = 0) -> dict[str, str]:
    """One row of a language's file."""
    name = "Largest" if language == "go" else "largest"
    go = {"import": 'import (\n    "sort"\n    "strings"\n)', "test_setup": GO_SETUP} if language == "go" else {}
    return {
        "task_id": f"{ID_PREFIXES[language]}/{number}",
        "prompt": PROMPTS[language],
        "declaration": DECLARATIONS[language],
        "canonical_solution": SOLUTIONS[language],
        "buggy_solution": BUGS[language],
        "bug_type": "value misuse",
        "failure_symptoms": "incorrect output",
        "entry_point": name,
        "test": TESTS[language],
        "signature": f"{name}(numbers)",
        "docstring": DOCSTRING,
        "instruction": f"Write a function `{name}(numbers)` to solve the following problem:\n{DOCSTRING}",
        **go,
    }


def write_rows(directory: Path, language: str, rows: list[dict]) -> Path:
    """LANGUAGE.jsonl of these rows."""
    path = directory / f"{language}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made_problem(directory: Path, language: str) -> Problem:
    """The problem of a language, read back from a file."""
    write_rows(directory, language, [row(language)])
    return load_problems(directory, language)[0]
